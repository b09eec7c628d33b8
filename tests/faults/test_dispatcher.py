"""F25, F29, F30: the dispatcher dies and comes back, stands still, runs out of descriptors; a disk is full."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import adapt
from tests.faults.clusters import counter, log_lines, states, wait_until, workers_of
from tests.faults.traffic import Traffic, assert_clean
from tests.host import HostStall

pytestmark = pytest.mark.timeout(240)


def test_f25_the_dispatcher_dies_and_comes_back(cluster_of, workload):
    """Three times in traffic; also what it had answered and not delivered is answered once, by the next reign."""
    cluster = cluster_of(3)
    with adapt.Client(cluster.address) as client:
        workload.deploy(client, stages=3)
        first = client.status().term
        with Traffic(cluster.address, workload) as traffic:
            for _ in range(3):
                traffic.until_more(40)
                cluster.dispatcher.kill()
                cluster.dispatcher.begin_again()
                cluster.dispatcher.wait_ready()
            traffic.until_more(40)
        assert client.status().term == first + 3
        assert set(states(client).values()) == {"ready"}
    assert_clean(traffic)


def test_f25_without_a_dispatcher_a_request_ends_at_its_deadline(cluster_of, workload):
    cluster = cluster_of(1)
    with adapt.Client(cluster.address) as client:
        model = workload.deploy(client, stages=1)
        cluster.dispatcher.kill()
        stall = HostStall()
        future = model.submit(workload.inputs[0], deadline_s=1.0)
        with pytest.raises(adapt.DeadlineExceededError):
            future.result(10)
        stall.close()
        cluster.dispatcher.begin_again()
        cluster.dispatcher.wait_ready()
        assert model(workload.inputs[1]).equal(workload.expect(workload.inputs[1]))


def test_f29_a_dispatcher_that_stands_still_blames_nobody(cluster_of, workload):
    """For longer than silence, grace, lease and the connections' own heartbeats."""
    cluster = cluster_of(3)
    with adapt.Client(cluster.address) as client:
        workload.deploy(client, stages=3)
        with Traffic(cluster.address, workload) as traffic:
            traffic.until_ended(30)
            cluster.dispatcher.stop()
            _stand_still(3.0)
            cluster.dispatcher.resume()
            traffic.until_more(60)
            assert set(states(client).values()) == {"ready"}
        assert counter(client, "evictions") == 0
        assert counter(client, "loop_lags") >= 1
    assert all(worker.is_alive for worker in cluster.workers)
    assert_clean(traffic)


def _stand_still(seconds: float) -> None:
    """The fault itself, not a wait for anything: its length is what is tested."""
    import time

    time.sleep(seconds)


def test_f30_a_dispatcher_without_descriptors_serves_whom_it_has(cluster_of, workload):
    """More connections than it can have: they end in an error that names the address, the others are served, and later ones too."""
    cluster = cluster_of(2, dispatcher_inside=["ulimit", "64"])
    with adapt.Client(cluster.address) as client:
        model = workload.deploy(client, stages=2)
        with contextlib.ExitStack() as stack, Traffic(cluster.address, workload, clients=1) as traffic:
            traffic.until_ended(10)
            refused = _crowd(stack, cluster.address)
            assert refused is not None and cluster.address in str(refused)
            traffic.until_more(20)
            assert psutil.Process(cluster.dispatcher.pid).num_fds() <= 64
        wait_until(lambda: psutil.Process(cluster.dispatcher.pid).num_fds() < 50)
        with adapt.Client(cluster.address) as later:
            assert later.model("layers")(workload.inputs[0]).equal(workload.expect(workload.inputs[0]))
        assert model(workload.inputs[0]).equal(workload.expect(workload.inputs[0]))
    assert cluster.dispatcher.is_alive and not log_lines(cluster.dispatcher, "Traceback")
    assert_clean(traffic)


def _crowd(stack: contextlib.ExitStack, address: str) -> adapt.ConnectError | None:
    """Connect until that is refused, or nobody answers."""
    for _ in range(64):
        try:
            stack.enter_context(adapt.Client(address, connect_timeout_s=2.0))
        except adapt.ConnectError as error:
            return error
    return None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of half a MiB."""
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(place)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path) -> Path:
    """Leave no room there; removing the file that is returned gives it back."""
    ballast = place / "ballast"
    with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 4096)
    return ballast


def test_f30_a_worker_whose_disk_is_full_leaves_the_stage_to_others(cluster_of, workload, small_disk):
    cluster = cluster_of(1)
    cluster.add_worker(name="full", cache_dir=small_disk)
    ballast = fill(small_disk)
    with adapt.Client(cluster.address) as client:
        model = workload.deploy(client, stages=2)
        assert model(workload.inputs[0]).equal(workload.expect(workload.inputs[0]))
        assert "full" not in {worker for stage in client.model("layers").record.stages for worker in stage.workers}
        assert log_lines(cluster.dispatcher, "stage refused  worker_id=full")
        ballast.unlink()
        other = workload.deploy(client, stages=1, name="other")  # the worker is as good as any again
        assert other(workload.inputs[1]).equal(workload.expect(workload.inputs[1]))
        assert set(states(client).values()) == {"ready"}


def test_f30_no_worker_has_room_on_its_disk(cluster_of, workload, small_disk):
    """The deployment ends in an error that names the reason; it succeeds when there is room."""
    cluster = cluster_of(2, worker={"cache_dir": small_disk})
    ballast = fill(small_disk)
    with adapt.Client(cluster.address) as client:
        with pytest.raises(adapt.AdaptError, match="the disk has 0 bytes left"):
            workload.deploy(client, stages=2)
        ballast.unlink()
        model = workload.deploy(client, stages=2)
        assert model(workload.inputs[0]).equal(workload.expect(workload.inputs[0]))


def test_f30_the_disk_of_the_dispatcher_is_full(cluster_of, workload, small_disk):
    """What is deployed goes on; what is new is refused with the reason; and there is an end to it."""
    cluster = cluster_of(2, dispatcher={"state_dir": small_disk / "state"})
    with adapt.Client(cluster.address) as client:
        model = workload.deploy(client, stages=2)
        ballast = fill(small_disk)
        with Traffic(cluster.address, workload, count=40) as traffic:
            with pytest.raises(adapt.AdaptError, match="No space left on device"):
                workload.deploy(client, stages=1, name="another")
            cluster.workers[0].kill()  # a new plan, which cannot be written down
            cluster.workers[0].begin_again()
            cluster.workers[0].wait_ready()
        ballast.unlink()
        another = workload.deploy(client, stages=1, name="another")
        for handle in (model, another):
            assert handle(workload.inputs[0]).equal(workload.expect(workload.inputs[0]))
        assert counter(client, "requests_failed") == 0
        assert all(record.state == "ready" for record in workers_of(client.status()).values())
    assert cluster.dispatcher.is_alive
    assert os.path.exists(small_disk / "state" / "deployments.json")
    assert_clean(traffic)
