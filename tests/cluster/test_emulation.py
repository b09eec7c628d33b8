"""An emulated cluster as its users see it: the library form and the command, with and without isolation."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

import adapt
from adapt.emulation import ownership
from adapt.emulation.parse import parse
from adapt.emulation.report import planned
from tests.faults.etcd import needs_etcd

MISSING = ownership.missing_rights()
isolated = pytest.mark.skipif(bool(MISSING), reason="; ".join(MISSING))

TRIO = """
about = "three devices, one of them slow and far away"
seed = 3
[[device]]
name = "pi"
count = 2
cores = 0.5
memory = "64MiB"
rate = "200 Mbit/s"
[[device]]
name = "far"
cores = 0.4
memory = "64MiB"
rate = "50 Mbit/s"
latency = "2 ms"
jitter = "1 ms"
[[event]]
at = "0.2 s"
device = "pi-2"
kind = "crash"
[[event]]
at = "0.5 s"
device = "far"
kind = "stall"
for = "0.5 s"
[[event]]
at = "0.8 s"
device = "pi-2"
kind = "join"
"""


class Layers(torch.nn.Sequential):
    """Small, but of several stages."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(*(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU()) for _ in range(4)))
        self.eval()


@pytest.fixture(autouse=True)
def nothing_remains() -> Iterator[None]:
    """After each test there are no namespaces and no groups of emulations that were not there before."""
    before = _traces()
    yield
    assert _traces() == before


def _traces() -> set[str]:
    """But for emulations of other programs, which may come and go meanwhile."""
    traces = {path.name for path in Path("/run/netns").glob("adapt-*")} if Path("/run/netns").is_dir() else set()
    traces |= {str(path) for root in ("cpu", "memory", ".") for path in Path("/sys/fs/cgroup", root).glob("adapt-*")}
    traces |= {name for name in psutil.net_if_addrs() if name.startswith("adapt")}
    return {trace for trace in traces if not any(f"adapt-{tag}" in trace for tag in _foreign())}


def _foreign() -> set[str]:
    """Tags whose owners live and are not ours."""
    found = set()
    for record in ownership.RECORDS.glob("*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, psutil.Error):
            owner = psutil.Process(json.loads(record.read_text())["pid"])
            if os.getpid() not in (owner.pid, *(parent.pid for parent in owner.parents())):
                found.add(record.stem)
    return found


def _equal_answers(cluster: adapt.EmulatedCluster, count: int, *, stages: int = 3) -> None:
    module, inputs = Layers(), torch.randn(count, 1, 64, generator=torch.Generator().manual_seed(1))
    with adapt.Client(cluster.address) as client, torch.inference_mode():
        model = client.deploy(module, example_inputs=(inputs[0],), stages=stages, name="layers")
        for x, y in zip(inputs, model.map(iter(inputs), in_flight=8, deadline_s=60.0), strict=True):
            assert torch.equal(y, module(x))


@isolated
def test_devices_answer_as_the_module_does_while_one_dies_and_one_stalls(tmp_path: Path) -> None:
    with adapt.EmulatedCluster(parse(TRIO, name="trio"), directory=tmp_path) as cluster:
        assert [device.name for device in cluster.workers] == ["pi-1", "pi-2", "far"]
        pids = [device.pid for device in cluster.workers]
        own = os.stat("/proc/self/ns/net").st_ino
        assert len({own, *(os.stat(f"/proc/{pid}/ns/net").st_ino for pid in pids)}) == 4  # every device has a network of its own
        cluster.play()
        _equal_answers(cluster, 200)
        assert cluster.wait_played(30)
        seen = cluster.observation()
        assert [(event.kind, event.device, event.error) for event in seen.events] == [
            ("crash", "pi-2", None), ("stall", "far", None), ("join", "pi-2", None), ("restore", "far", None),
        ]  # fmt: skip
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_without_isolation_it_needs_no_rights_and_says_so() -> None:
    with adapt.EmulatedCluster(parse(TRIO, name="trio"), is_isolated=False) as cluster:
        cluster.play()
        _equal_answers(cluster, 50)
        assert cluster.wait_played(30)
        assert [event.error for event in cluster.observation().events] == [None] * 4
        with pytest.raises(adapt.AdaptError, match="without isolation"):
            cluster.device("pi-1").slow(0.1)


def test_what_cannot_be_is_refused_before_anything_starts() -> None:
    spec = parse(TRIO, name="trio")
    with pytest.raises(adapt.ConfigError, match=r"expected the name of a device"):
        adapt.EmulatedCluster(spec, is_isolated=False, proxied=["nobody"])
    with pytest.raises(adapt.ConfigError, match="no such"):
        adapt.EmulatedCluster("no-such-cluster")


def test_what_is_not_started_says_so() -> None:
    cluster = adapt.EmulatedCluster(parse(TRIO, name="trio"), is_isolated=False)
    for act in (cluster.play, cluster.observation, cluster.wait_played, lambda: cluster.address, lambda: cluster.dispatcher):
        with pytest.raises(adapt.AdaptError, match="not been started"):
            act()


NOBODY = 'dispatcher = "front"\n[[device]]\nname = "front"\nworker = false\n[[device]]\nname = "pi"\npresent = false\n'
STOPPED = '[[event]]\nat = "9 s"\ndevice = "pi"\nkind = "cut"\n[[event]]\nat = "0 s"\ndevice = "front"\nkind = "restore"\n'


@pytest.mark.slow
def test_a_cluster_that_is_forgotten_or_closed_is_gone() -> None:
    cluster = adapt.EmulatedCluster(parse(NOBODY + STOPPED, name="nobody"), is_isolated=False)
    cluster.start()
    pid, directory, (front, pi) = cluster.dispatcher.pid, cluster.directory, cluster.devices
    cluster.play()
    limit = time.monotonic() + 10
    while not cluster.observation().events:
        assert time.monotonic() < limit
    assert cluster.observation().events[0].error is None
    del cluster
    gc.collect()
    assert not psutil.pid_exists(pid) and not directory.exists()
    with pytest.raises(adapt.AdaptError, match="does not run"):
        pi.begin()
    with pytest.raises(adapt.AdaptError, match="does not run"):
        front.restart()


SHORT = """
[[device]]
name = "pi"
cores = 0.5
memory = "64MiB"
latency = "1 ms"
[[event]]
at = "0 s"
device = "pi"
kind = "leave"
for = "0.01 s"
[[event]]
at = "0.02 s"
device = "pi"
kind = "slow"
cores = 0.2
[[event]]
at = "0.03 s"
device = "pi"
kind = "stall"
for = "0.2 s"
"""


@isolated
@pytest.mark.slow
def test_a_device_that_leaves_for_a_moment_comes_back_and_is_then_as_slow_as_it_should_be() -> None:
    with adapt.EmulatedCluster(parse(SHORT, name="short")) as cluster:
        (pi,) = cluster.workers
        first = pi.pid
        cluster.play()
        assert cluster.wait_played(30)
        assert [(event.kind, event.error) for event in cluster.observation().events] == [
            ("leave", None), ("join", None), ("slow", None), ("stall", None), ("restore", None),
        ]  # fmt: skip
        limit = time.monotonic() + 60
        while _quota_us(cluster) != (2000, 10000):
            assert time.monotonic() < limit
            time.sleep(0.1)
        assert pi.is_alive and pi.pid != first and pi.process.ready
        os.kill(pi.pid, signal.SIGKILL)
        pi.wait()
        assert [(event.kind, event.detail["status"]) for event in cluster.observation().events[5:]] == [("ended", -9)]


def _quota_us(cluster: adapt.EmulatedCluster) -> tuple[int, int] | None:
    """Of the device pi; None until its worker has entered its group."""
    groups = Path(f"/proc/{cluster.device('pi').pid}/cgroup").read_text().splitlines()
    name = next((line.rpartition(":")[2] for line in groups if "adapt-" in line), None)
    if name is None:
        return None
    v2, v1 = Path(f"/sys/fs/cgroup{name}/cpu.max"), Path(f"/sys/fs/cgroup/cpu{name}")
    words = v2.read_text().split() if v2.exists() else [(v1 / f"cpu.cfs_{key}_us").read_text() for key in ("quota", "period")]
    return (-1 if words[0] == "max" else int(words[0])), int(words[1])


WITH_ETCD = (
    'membership = "etcd"\n'
    + TRIO
    + """
[[event]]
at = "0.3 s"
kind = "restart-etcd"
[[event]]
at = "0.6 s"
kind = "crash-etcd"
for = "0.6 s"
"""
)


@needs_etcd
@pytest.mark.parametrize("is_isolated", [pytest.param(True, marks=isolated), pytest.param(False, marks=pytest.mark.slow)])
def test_etcd_keeps_the_leases_dies_and_comes_back(is_isolated: bool) -> None:
    with adapt.EmulatedCluster(parse(WITH_ETCD, name="trio"), is_isolated=is_isolated) as cluster, adapt.Client(cluster.address) as client:
        before = cluster.etcd.pid
        assert client.status().counters["etcd_is_well"] == 1
        cluster.play()
        _equal_answers(cluster, 200)
        assert cluster.wait_played(30)
        told = [(event.kind, event.device) for event in cluster.observation().events if event.device == "etcd"]
        assert told == [("restart-etcd", "etcd"), ("crash-etcd", "etcd"), ("start-etcd", "etcd")]
        assert [event.error for event in cluster.observation().events] == [None] * 7  # nobody wonders about its ends
        assert cluster.etcd.pid != before
        _until(lambda: client.status().counters["etcd_workers"] == 3)  # it is well again, and has the lease of every worker
        _until(lambda: {worker.state for worker in client.status().workers} == {"ready"})


def _until(fact: Callable[[], bool]) -> None:
    limit = time.monotonic() + 30.0
    while not fact():
        assert time.monotonic() < limit
        time.sleep(0.05)


@isolated
def test_more_speed_than_there_is_is_refused_with_the_arithmetic() -> None:
    spec = parse(TRIO, name="trio")
    greedy = replace(spec, devices=tuple(replace(device, cores=float(psutil.cpu_count() or 1)) for device in spec.devices))
    with pytest.raises(adapt.ConfigError, match="--time-scale"):
        adapt.EmulatedCluster(greedy)


@isolated
def test_one_seed_gives_one_event_log() -> None:
    text = TRIO + '[[random]]\nkinds = ["stop", "cut"]\ndevices = ["pi-*"]\nevery = "0.3 s"\nfor = "0.1 s"\nfrom = "1 s"\nuntil = "2.5 s"\n'
    logs = []
    for _ in range(2):
        with adapt.EmulatedCluster(parse(text, name="trio"), seed=11) as cluster:
            cluster.play()
            assert cluster.wait_played(30)
            logs.append(planned(cluster.observation().events))
    assert logs[0] == logs[1]
    assert len(logs[0]) > 6


@isolated
def test_bytes_and_cpu_are_seen() -> None:
    with adapt.EmulatedCluster(parse(TRIO, name="trio")) as cluster:
        _equal_answers(cluster, 100)
        used = {name: samples[-1] for name, samples in cluster.observation().samples.items()}
    assert set(used) == {"pi-1", "pi-2", "far"}


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────

PROGRAM = """
import adapt, numpy as np, torch
torch.manual_seed(0)
module = torch.nn.Linear(8, 8).eval()
x = torch.ones(1, 8)
with adapt.Client() as client, torch.inference_mode():
    print("equal", torch.equal(client.deploy(module, example_inputs=(x,), name="l")(x), module(x)))
raise SystemExit(3)
"""


def _adapt(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "adapt.interfaces.cli.main", *arguments], capture_output=True, text=True, timeout=100, **options
    )  # type: ignore[call-overload]


@isolated
def test_a_command_finds_the_cluster_and_its_status_is_ours(tmp_path: Path) -> None:
    (tmp_path / "trio.toml").write_text(TRIO)
    out = tmp_path / "out"
    done = _adapt("emulate", str(tmp_path / "trio.toml"), "--out", str(out), "--", sys.executable, "-c", PROGRAM)
    assert (done.returncode, done.stdout) == (3, "equal True\n"), done.stderr
    assert "Mbit/s" in done.stderr and "64MiB" in done.stderr
    record = json.loads((out / "observation.json").read_text())
    assert record["is_isolated"] is True and (out / "samples.csv").stat().st_size > 0


def test_the_ready_clusters_are_listed() -> None:
    done = _adapt("emulate", "--list")
    assert done.returncode == 0
    assert {"defer8", "pi3", "mixed4", "adapt4", "seifer-20"} <= {line.split()[0] for line in done.stdout.splitlines()}


RESNET = """
import adapt, torch
from adapt.models.vision import import_torchvision
torch.manual_seed(0)
torch.set_num_threads(1)  # as the devices; some processors come to other bits with more
module = import_torchvision().models.resnet18().eval()
inputs = torch.randn(8, 1, 3, 96, 96)
with adapt.Client() as client, torch.inference_mode():
    model = client.deploy(module, example_inputs=(inputs[0],), stages=8, name="resnet18")
    print(sum(torch.equal(y, module(x)) for x, y in zip(inputs, model.map(iter(inputs), in_flight=8, deadline_s=100))), "equal")
    print(len({worker.worker_id for worker in client.status().workers if worker.resident}), "devices")
"""


@isolated
@pytest.mark.slow
def test_a_model_runs_in_eight_stages_on_eight_devices() -> None:
    done = _adapt("emulate", "defer8", "--", sys.executable, "-c", RESNET)
    assert (done.returncode, done.stdout) == (0, "8 equal\n8 devices\n"), done.stderr


TWENTY = """
[[device]]
name = "d"
count = 20
cores = 0.08
memory = "64MiB"
rate = "50 Mbit/s"
"""


@isolated
@pytest.mark.timing
def test_twenty_devices_are_soon_there_and_soon_gone_without_a_trace(tmp_path: Path) -> None:
    (tmp_path / "twenty.toml").write_text(TWENTY)
    before, began = _traces(), time.monotonic()
    with adapt.EmulatedCluster(tmp_path / "twenty.toml") as cluster:
        pids = [device.pid for device in cluster.workers]
        assert time.monotonic() - began < 60
        with adapt.Client(cluster.address) as client:
            assert [worker.state for worker in client.status().workers] == ["ready"] * 20
        began = time.monotonic()
    assert time.monotonic() - began < 5
    assert _traces() == before and not any(psutil.pid_exists(pid) for pid in pids)

    process, address = _begin(tmp_path / "twenty.toml")
    assert len(_traces()) > len(before) and address
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    began = time.monotonic()
    done = _adapt("emulate", "--clean")
    assert done.returncode == 0 and "removed" in done.stdout
    assert time.monotonic() - began < 5
    assert _traces() == before and not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def _begin(file: Path) -> tuple[subprocess.Popen[str], str]:
    """The command on a description, when all is ready, and the dispatcher's address."""
    process = subprocess.Popen([sys.executable, "-m", "adapt.interfaces.cli.main", "emulate", str(file)], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "dispatcher ready" in line:
            return process, line.split()[-1]
    raise AssertionError("it ended before it was ready")


@isolated
@pytest.mark.slow
def test_what_a_killed_emulation_leaves_is_cleaned_and_nothing_else(tmp_path: Path) -> None:
    """Another one lives beside it, and goes on."""
    (tmp_path / "trio.toml").write_text(TRIO)
    with adapt.EmulatedCluster(parse(TRIO.replace("0.5", "0.2").replace("0.4", "0.2"), name="other")) as other:
        before = _traces()
        process, _ = _begin(tmp_path / "trio.toml")
        assert len(_traces()) > len(before)
        process.kill()
        process.communicate()
        done = _adapt("emulate", "--clean")
        assert done.returncode == 0 and "removed" in done.stdout
        assert _traces() == before
        _equal_answers(other, 10)


@isolated
@pytest.mark.slow
def test_ctrl_c_ends_everything(tmp_path: Path) -> None:
    (tmp_path / "trio.toml").write_text(TRIO)
    process, _ = _begin(tmp_path / "trio.toml")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode in (0, 130)  # the second may come before the first was looked at
