"""Workers of emulated devices that leave, join, die and end by themselves. Real processes, but what they run is no worker."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from adapt.emulation import device as device_module
from adapt.emulation import ready
from adapt.emulation.description import DeviceSpec, Event, Kind
from adapt.emulation.device import EmulatedDevice
from adapt.emulation.machines import MemoryKills, PlainMachines
from adapt.emulation.observation import Mishap
from adapt.emulation.parse import load
from adapt.emulation.processes import Processes, Watch
from adapt.emulation.proxy_control import LinkProxy
from adapt.errors import AdaptError
from adapt.runtime.local import LocalProcess, Reaper

WAIT_S = 20.0
WORKER = """
import os, signal, sys, time
def leave(*_):
    time.sleep({drain_s})
    os._exit(0)
signal.signal(signal.SIGTERM, leave)
print("first words", file=sys.stderr, flush=True)
time.sleep({start_s})
print("worker ready x", flush=True)
time.sleep(600)
"""


class Machines:
    """What was done to whom."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.kills: dict[str, MemoryKills] = {}

    def hurry(self, name: str) -> None:
        self.calls.append("hurry")

    def settle(self, name: str) -> None:
        self.calls.append("settle")

    def memory_kills(self) -> dict[str, MemoryKills]:
        return self.kills


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[SimpleNamespace]:
    machines, processes = Machines(), Processes(tmp_path)

    def make(name: str = "pi", *, start_s: float = 0.0, drain_s: float = 0.0) -> EmulatedDevice:
        command = ["timeit", "-n", "1", "-r", "1", WORKER.format(start_s=start_s, drain_s=drain_s)]
        return EmulatedDevice(DeviceSpec(name=name), machines, processes, lambda: processes.launch(name, command))

    yield SimpleNamespace(machines=machines, processes=processes, make=make)
    processes.close()


def until(fact, what: str) -> None:
    limit = time.monotonic() + WAIT_S
    while not fact():
        assert time.monotonic() < limit, what
        time.sleep(0.01)


def test_who_leaves_and_shall_join_soon_after_is_let_go_and_comes_back(scene, monkeypatch):
    device = scene.make(drain_s=0.3)
    first = device.begin()
    device.settle(first)
    device.stop()
    device.terminate()
    second = device.begin()
    assert first.process.returncode == 0 and second is not None and device.process.life is second
    device.settle(second)
    assert scene.machines.calls == ["hurry", "settle"] * 2

    monkeypatch.setattr(device_module, "LEAVE_WITHIN_S", 0.05)
    device.terminate()
    third = device.begin()
    assert second.process.returncode == -signal.SIGKILL and third.is_alive
    assert scene.processes.ends() == []


def test_a_join_of_a_living_worker_changes_nothing(scene):
    device = scene.make()
    life = device.begin()
    device.settle()
    assert device.begin() is None
    began = time.monotonic()
    device.settle()
    device.perform(Event(at_s=0.0, kind=Kind.JOIN, device="pi"))
    assert time.monotonic() - began < 1.0
    assert device.process.life is life and scene.machines.calls[:2] == ["hurry", "settle"]


def test_joiners_do_not_wait_for_each_other(scene):
    stopped, quick = scene.make("stopped", start_s=0.2), scene.make("quick")
    stopped.join()
    stopped.stop()
    quick.join()
    until(lambda: scene.machines.calls.count("settle") == 1, "the one that can has settled")
    stopped.resume()
    until(lambda: scene.machines.calls.count("settle") == 2, "the other one when it goes on")
    until(lambda: not [thread for thread in threading.enumerate() if thread.name.startswith("adapt-join")], "no thread stays")


def test_who_waits_for_a_life_that_has_ended_settles_no_other(scene):
    device = scene.make(start_s=0.3)
    first = device.begin()
    device.kill()
    second = device.begin()
    with pytest.raises(AdaptError, match="before it was ready"):
        device.settle(first)
    assert "settle" not in scene.machines.calls
    device.settle(second)
    assert scene.machines.calls[-1] == "settle"


def test_who_waits_while_it_is_killed_learns_it(scene):
    device, said = scene.make(start_s=60.0), []

    def wait() -> None:
        try:
            device.settle(timeout_s=60)
        except AdaptError as error:
            said.append(str(error))

    life = device.begin()
    thread = threading.Thread(target=wait)
    thread.start()
    device.kill()
    thread.join(WAIT_S)
    assert len(said) == 1 and "ended with status -9" in said[0] and life.process.stdout.closed


def test_nothing_starts_after_the_end(scene):
    device, other = scene.make(), scene.make("other")
    device.begin()
    scene.processes.end()
    for act in (device.begin, device.restart, other.begin):
        with pytest.raises(AdaptError, match="does not run"):
            act()
    assert not device.is_alive and other.process is None


def test_who_ends_by_itself_is_noticed_and_who_was_told_to_is_not(scene):
    device, other = scene.make(), scene.make("other")
    watch = Watch(scene.machines, scene.processes)
    for one in (device, other):
        one.begin()
        one.settle()
    assert watch.look() == []
    os.kill(device.pid, signal.SIGUSR1)
    other.kill()
    device.wait()
    device.begin()
    assert watch.look() == [Mishap("ended", "pi", {"status": -signal.SIGUSR1, "log": "first words"})]
    assert watch.look() == []


def test_what_the_memory_limit_kills_is_told_once(scene):
    device = scene.make()
    watch = Watch(scene.machines, scene.processes)
    device.begin()
    scene.machines.kills = {"pi": MemoryKills(0, 300)}
    assert watch.look() == []
    os.kill(device.pid, signal.SIGKILL)
    scene.machines.kills = {"pi": MemoryKills(1, 300)}
    until(lambda: not device.is_alive, "it is dead")
    assert watch.look() == [Mishap("killed-by-memory", "pi", {"limit_bytes": 300})]
    assert watch.look() == []


@pytest.mark.parametrize("name", ready.names())
def test_every_ready_cluster_can_be_read_without_isolation(name):
    spec = load(name)
    machines = PlainMachines(spec)
    try:
        workers = [device.name for device in spec.devices if device.has_worker]
        for worker in workers:
            machines.connect(worker, "tcp://127.0.0.1:9")
        assert list(machines.read({workers[0]: os.getpid()})) == workers
    finally:
        machines.close()


def test_a_fork_of_the_users_program_keeps_nothing_alive(tmp_path):
    reaper, proxy = Reaper(), LinkProxy(0)
    proxy.start()
    process = LocalProcess("sleeper", ["timeit", "-n", "1", "import time; time.sleep(600)"], tmp_path, reaper)
    fork = os.fork()
    if fork == 0:
        time.sleep(60)
        os._exit(0)
    try:
        began = time.monotonic()
        proxy.close()
        reaper.close()
        assert time.monotonic() - began < 1.5
        assert process.wait() == -signal.SIGKILL
    finally:
        os.kill(fork, signal.SIGKILL)
        os.waitpid(fork, 0)


def test_a_reaper_whose_pipe_somebody_holds_is_ended_nevertheless(monkeypatch):
    monkeypatch.setattr("adapt.runtime.local.REAPER_TIMEOUT_S", 0.1)
    reaper = Reaper()
    held = os.dup(reaper._process.stdin.fileno())
    reaper.close()
    os.close(held)
