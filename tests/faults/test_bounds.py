"""How soon each fault is noticed, in seconds: medians of five, without what the machine itself stood still. For a quiet machine.

    the death of a process          0.2 s
    a frozen process, a cut link    the silence that is borne + 1 s, after it was last heard
    a model that hangs              the timeout of its attempt
    out of the plan                 the lease + 1 s

All by stamps of one monotonic clock in one log: what a test does to a cluster, what its dispatcher writes down, and what a client got.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
import torch

import adapt
from adapt.emulation.parse import parse
from adapt.runtime.endpoint import DEAF_MS
from tests.faults.clusters import SHORT, FaultDevices, wait_for_state, wait_until
from tests.faults.event_log import EventLog
from tests.faults.test_links import TRIO
from tests.host import HostStall

pytestmark = [pytest.mark.timing, pytest.mark.timeout(300)]
ROUNDS = 5
LEASE_S, SILENCE_S = float(SHORT["lease_ttl"]), float(SHORT["silence"])
LOGGED = {"log_format": "json"}
ANSWERED = "an answer has come"
SUSPECT, LOST, READY = ("worker suspected", "worker evicted"), ("worker evicted",), ("worker ready",)


def median_s(fault: Callable[[], float], noticed: Callable[[float], float], undo: Callable[[], object], *, rounds: int = ROUNDS) -> float:
    """Seconds from a fault to its notice. Both say when it was; the one of the notice is told since when, and waits for it."""
    stall, took = HostStall(), []
    for _ in range(rounds):
        began = fault()
        ended = noticed(began)
        took.append(ended - began - stall.between(began, ended))
        undo()
    stall.close()
    print(f"noticed after {', '.join(f'{seconds:.3f}' for seconds in took)} s")
    return statistics.median(took)


class Story:
    """A cluster, its client, and the log of both."""

    def __init__(self, cluster: adapt.LocalCluster | FaultDevices, client: adapt.Client) -> None:
        self.cluster, self.client = cluster, client
        self.log = EventLog(cluster.directory / "dispatcher.log")

    def noting(self, what: str, act: Callable[[], object]) -> Callable[[], float]:
        """Does it, and says since when: before it was begun."""

        def do() -> float:
            began = self.log.note(what)
            act()
            return began

        return do

    def logs(self, events: tuple[str, ...], worker: str) -> Callable[[float], float]:
        """Waits for the dispatcher to write down one of these of the worker, and says when it did."""
        return lambda since_s: self.log.await_first(events, since_s=since_s, worker_id=worker)

    def ask(self, model: adapt.Model, x: torch.Tensor) -> None:
        """The moment of the answer is noted."""
        model.submit(x).add_done_callback(lambda answer: self.log.note(ANSWERED if answer.exception() is None else "an error has come"))

    def answered(self, since_s: float) -> float:
        """When the answer came."""
        return self.log.await_first([ANSWERED], since_s=since_s)

    def await_ready(self, worker: str) -> None:
        wait_for_state(self.client, worker, "ready")

    def begin_again(self, worker: str) -> None:
        process = self.cluster.worker(worker)
        process.begin_again()
        process.wait_ready()
        self.await_ready(worker)


def test_the_death_of_a_process(cluster_of):
    cluster = cluster_of(2, dispatcher=LOGGED)
    with adapt.Client(cluster.address) as client:
        story = Story(cluster, client)
        kill = story.noting("a worker is killed", cluster.worker("w1").kill)
        assert median_s(kill, story.logs(SUSPECT, "w1"), lambda: story.begin_again("w1")) <= 0.2


@pytest.mark.parametrize(("noticed", "bound_s"), [(SUSPECT, SILENCE_S + 1.0), (LOST, max(LEASE_S, SILENCE_S) + 1.0)])
def test_a_process_that_freezes(cluster_of, noticed, bound_s):
    cluster = cluster_of(2, dispatcher=LOGGED)
    with adapt.Client(cluster.address) as client:
        story, worker = Story(cluster, client), cluster.worker("w1")

        def come_back() -> None:
            worker.resume()
            story.await_ready("w1")

        assert median_s(story.noting("a worker is stopped", worker.stop), story.logs(noticed, "w1"), come_back) <= bound_s


@pytest.mark.parametrize(
    ("direction", "noticed", "lease_s", "bound_s"),
    [(direction, SUSPECT, LEASE_S, SILENCE_S + 1.0) for direction in ("both", "up", "down")]
    + [(direction, LOST, LEASE_S, max(LEASE_S, SILENCE_S) + 1.0) for direction in ("both", "up")]
    # Who hears nobody is heard until its system has acknowledged nothing for two seconds; then comes the grace. A shorter lease ends it no sooner.
    + [("down", LOST, 2 * LEASE_S, 2 * LEASE_S + 1.0), ("down", LOST, LEASE_S, LEASE_S + 1.0 + DEAF_MS / 1000)],
)
def test_a_link_that_is_cut(isolated, nursery, tmp_path, direction, noticed, lease_s, bound_s):
    settings = {**LOGGED, "lease_ttl": lease_s}
    with (
        FaultDevices(nursery, parse(TRIO, name="trio"), directory=tmp_path, dispatcher=settings) as cluster,
        adapt.Client(cluster.address) as client,
    ):
        story, device = Story(cluster, client), cluster.device("pi-1")

        def come_back() -> None:
            device.restore()
            story.await_ready("pi-1")

        cut = story.noting("a cable is cut", lambda: device.cut(direction))
        assert median_s(cut, story.logs(noticed, "pi-1"), come_back) <= bound_s


def test_a_worker_is_back_two_seconds_after_its_cable(isolated, nursery, tmp_path):
    with (
        FaultDevices(nursery, parse(TRIO, name="trio"), directory=tmp_path, dispatcher=LOGGED) as cluster,
        adapt.Client(cluster.address) as client,
    ):
        story, device = Story(cluster, client), cluster.device("pi-1")

        def pull() -> None:
            device.cut()
            wait_for_state(client, "pi-1", "lost")

        pull()
        assert median_s(story.noting("a cable is put back", device.restore), story.logs(READY, "pi-1"), pull) <= 2.0


def test_a_model_that_hangs(cluster_of, workload):
    """Another worker has the task when the timeout of the first attempt is over. A worker that hangs is replaced for the next round."""
    timeout_s = 2.0
    cluster = cluster_of(3, dispatcher={**LOGGED, "attempt_timeout": timeout_s, "min_attempt_timeout": timeout_s})
    with adapt.Client(cluster.address) as client:
        story, model, marks = Story(cluster, client), workload.deploy(client, stages=1), []

        def hang() -> None:
            marks.append(cluster.mishaps.plan("hang", times=1))
            story.ask(model, workload.marked(marks[-1]))

        def replace() -> None:
            (hung,) = cluster.mishaps.happened(marks[-1])
            cluster.worker(hung).kill()
            story.begin_again(hung)

        assert median_s(story.noting("a model hangs", hang), story.answered, replace) <= timeout_s + 0.1


def test_a_task_of_a_worker_that_dies_is_elsewhere_at_once(cluster_of, workload):
    cluster = cluster_of(3, dispatcher=LOGGED)
    with adapt.Client(cluster.address) as client:
        story, model, victims = Story(cluster, client), workload.deploy(client, stages=1), []

        def begin() -> None:
            mark = cluster.mishaps.plan("hold", times=1)
            story.ask(model, workload.marked(mark))
            victims.extend(wait_until(lambda: cluster.mishaps.happened(mark)))

        def again() -> None:
            story.begin_again(victims[-1])
            begin()

        begin()
        kill = story.noting("its worker is killed", lambda: cluster.worker(victims[-1]).kill())
        assert median_s(kill, story.answered, again) <= 0.3
