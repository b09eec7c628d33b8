"""How soon each fault is noticed, in seconds: medians of five, without what the machine itself stood still. For a quiet machine.

    the death of a process          0.2 s
    a frozen process, a cut link    the silence that is borne + 1 s, after it was last heard
    a model that hangs              the timeout of its attempt
    out of the plan                 the lease + 1 s

Noticed means: seen in the status, which is asked for every few milliseconds; so all figures are upper bounds, by one clock, this process's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest

import adapt
from adapt.emulation.parse import parse
from adapt.runtime.endpoint import DEAF_MS
from tests.faults.clusters import SHORT, FaultDevices, states, wait_for_state, wait_until
from tests.faults.test_links import TRIO
from tests.faults.traffic import HostStall

pytestmark = [pytest.mark.timing, pytest.mark.timeout(300)]
ROUNDS = 5
# A worker that hears nobody is still heard, and its lease renewed, until its system has acknowledged nothing for so long.
DEAF_S = DEAF_MS / 1000
LEASE_S, SILENCE_S = float(SHORT["lease_ttl"]), float(SHORT["silence"])


def median_s(fault: Callable[[], object], is_noticed: Callable[[], bool], undo: Callable[[], object], *, rounds: int = ROUNDS) -> float:
    """How long after the fault it is noticed."""
    stall, took = HostStall(), []
    for _ in range(rounds):
        began = time.monotonic()
        fault()
        wait_until(is_noticed, every_s=0.002)
        ended = time.monotonic()
        took.append(ended - began - stall.between(began, ended))
        undo()
    stall.close()
    print(f"noticed after {', '.join(f'{seconds:.3f}' for seconds in took)} s")
    return statistics.median(took)


def test_the_death_of_a_process(cluster_of, workload):
    cluster = cluster_of(2)
    worker = cluster.workers[0]
    with adapt.Client(cluster.address) as client:

        def come_back() -> None:
            worker.begin_again()
            worker.wait_ready()
            wait_for_state(client, "w1", "ready")

        assert median_s(worker.kill, lambda: states(client)["w1"] != "ready", come_back) <= 0.2


@pytest.mark.parametrize(("state", "bound_s"), [("suspect", SILENCE_S + 1.0), ("lost", max(LEASE_S, SILENCE_S) + 1.0)])
def test_a_process_that_freezes(cluster_of, state, bound_s):
    cluster = cluster_of(2)
    worker = cluster.workers[0]
    with adapt.Client(cluster.address) as client:

        def come_back() -> None:
            worker.resume()
            wait_for_state(client, "w1", "ready")

        seen = {"suspect": ("suspect", "lost"), "lost": ("lost",)}[state]
        assert median_s(worker.stop, lambda: states(client)["w1"] in seen, come_back) <= bound_s


@pytest.mark.parametrize("direction", ["both", "up", "down"])
@pytest.mark.parametrize(("seen", "bound_s"), [(("suspect", "lost"), SILENCE_S + 1.0), (("lost",), max(LEASE_S, SILENCE_S) + 1.0)])
def test_a_link_that_is_cut(isolated, nursery, tmp_path, direction, seen, bound_s):
    still_heard_s = DEAF_S if (direction, seen) == ("down", ("lost",)) else 0.0
    with FaultDevices(nursery, parse(TRIO, name="trio"), directory=tmp_path) as cluster, adapt.Client(cluster.address) as client:
        device = cluster.device("pi-1")

        def come_back() -> None:
            device.restore()
            wait_for_state(client, "pi-1", "ready")

        assert median_s(lambda: device.cut(direction), lambda: states(client)["pi-1"] in seen, come_back) <= bound_s + still_heard_s


def test_a_worker_is_back_two_seconds_after_its_cable(isolated, nursery, tmp_path):
    with FaultDevices(nursery, parse(TRIO, name="trio"), directory=tmp_path) as cluster, adapt.Client(cluster.address) as client:
        device = cluster.device("pi-1")

        def pull() -> None:
            device.cut()
            wait_for_state(client, "pi-1", "lost")

        pull()
        assert median_s(device.restore, lambda: states(client)["pi-1"] == "ready", pull) <= 2.0


def test_a_model_that_hangs(cluster_of, workload):
    """Another worker has the task when the timeout of the first attempt is over. A worker that hangs is replaced for the next round."""
    timeout_s = 2.0
    cluster = cluster_of(3, dispatcher={"attempt_timeout": timeout_s, "min_attempt_timeout": timeout_s})
    with adapt.Client(cluster.address) as client:
        model = workload.deploy(client, stages=1)
        futures, marks = [], []

        def hang() -> None:
            marks.append(cluster.mishaps.plan("hang", times=1))
            futures.append(model.submit(workload.marked(marks[-1])))

        def replace() -> None:
            (hung,) = cluster.mishaps.happened(marks[-1])
            cluster.worker(hung).kill()
            cluster.worker(hung).begin_again()
            cluster.worker(hung).wait_ready()
            wait_for_state(client, hung, "ready")

        assert median_s(hang, lambda: futures[-1].done(), replace) <= timeout_s + 0.1


def test_a_task_of_a_worker_that_dies_is_elsewhere_at_once(cluster_of, workload):
    cluster = cluster_of(3)
    with adapt.Client(cluster.address) as client:
        model = workload.deploy(client, stages=1)
        futures, victims = [], []

        def die() -> None:
            cluster.worker(victims[-1]).kill()

        def begin() -> None:
            mark = cluster.mishaps.plan("hold", times=1)
            futures.append(model.submit(workload.marked(mark)))
            victims.extend(wait_until(lambda: cluster.mishaps.happened(mark)))

        def again() -> None:
            cluster.worker(victims[-1]).begin_again()
            cluster.worker(victims[-1]).wait_ready()
            wait_for_state(client, victims[-1], "ready")
            begin()

        begin()
        assert median_s(die, lambda: futures[-1].done(), again) <= 0.3
