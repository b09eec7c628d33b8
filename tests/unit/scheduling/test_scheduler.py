"""The rules of the scheduler, one by one, on clusters small enough to read. Every order of events: test_scheduler_machine.py."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from random import Random

import pytest

from adapt.errors import (
    AdaptError,
    AttemptTimeoutError,
    DeadlineExceededError,
    InputMismatchError,
    ModelError,
    OverloadedError,
    PoisonError,
    StageNotResidentError,
    UnknownModelError,
    WireError,
    WorkerLostError,
)
from adapt.planning.placement import Plan, StageNeed
from adapt.protocol.ids import AttemptId, ClientId, Digest, Epoch, RequestId, WorkerId
from adapt.protocol.messages import StageTimes
from adapt.protocol.wire import Blob
from adapt.scheduling import events as ev
from adapt.scheduling.choice import REGAINED_SHARE
from adapt.scheduling.liveness import Verdict
from adapt.scheduling.requests import POISONED
from adapt.scheduling.residency import REFUSED_S, SPARELESS_S
from adapt.scheduling.roster import AHEAD_S, STEADY, Member, Service
from adapt.scheduling.scheduler import (
    ACCEPT_S,
    EARLY_CANCEL_S,
    MEMBER_MEMORY_S,
    REMEMBER_S,
    STORY_LENGTH,
    WORTH_S,
    Scheduler,
)
from adapt.scheduling.settings import SchedulerSettings
from adapt.scheduling.suspicion import REACHED_S
from adapt.scheduling.tokens import TokenSettings

SILENCE_S, GRACE_S, TIMEOUT_S, LOAD_TIMEOUT_S, CLIENT_GRACE_S = 3.0, 2.0, 20.0, 60.0, 10.0
ANNE, BERT = ClientId(b"a" * 16), ClientId(b"b" * 16)
EMPTY = ev.Activation((), ())


def tensor(size_bytes: int) -> ev.Activation:
    return ev.Activation((), (Blob.of(bytes(size_bytes)),))


@dataclass(frozen=True)
class Sent:
    """A task that a worker was sent."""

    worker: str
    attempt: AttemptId
    action: ev.Dispatch

    @property
    def request(self) -> RequestId:
        return self.attempt.request


class Cluster:
    """A scheduler, and short words for what happens around it. What it asks for gathers in `actions`.

    Stages are named `d.0`, `d.1` ...; workers heartbeat by themselves unless they are in `silent`.
    """

    def __init__(self, **settings) -> None:
        chosen = {
            "silence_s": SILENCE_S,
            "grace_s": GRACE_S,
            "attempt_timeout_s": TIMEOUT_S,
            "load_timeout_s": LOAD_TIMEOUT_S,
            "client_grace_s": CLIENT_GRACE_S,
        }
        self.scheduler = Scheduler(SchedulerSettings(**(chosen | settings)), random=Random(0))
        self.now = 1.0  # later than any worker was ever used
        self.silent: set[str] = set()
        self.sequence = 0
        self.actions: list[ev.Action] = []

    # ── what happened ────────────────────────────────────────────────────────────────────────────────────────────────

    def tell(self, event: ev.Event) -> list[ev.Action]:
        actions = self.scheduler.handle(event, self.now)
        self.actions += actions
        return actions

    def wait(self, seconds: float) -> list[ev.Action]:
        """Let time pass; what falls due is done at its moment, and the workers go on beating."""
        end, seen = self.now + seconds, []
        while True:
            self._beat()
            due = self.scheduler.next_wakeup()
            if due is None or due > end:
                break
            self.now = max(due, self.now)
            self._beat()
            seen += self.scheduler.tick(self.now)
            assert (again := self.scheduler.next_wakeup()) is None or again > self.now, "the loop would spin"
        self.now = end
        self._beat()
        self.actions += seen
        return seen

    def _beat(self) -> None:
        for member in list(self.scheduler.roster):
            if member.worker_id not in self.silent:
                self.actions += self.scheduler.handle(ev.WorkerHeard(worker_id=member.worker_id), self.now)

    def join(self, worker: str, *, numeric_class="x", credit=2, budget=100, resident=(), held=(), finished=()) -> list[ev.Action]:
        return self.tell(
            ev.WorkerJoined(
                worker_id=WorkerId(worker),
                numeric_class=numeric_class,
                stage_budget_bytes=budget,
                credit=credit,
                resident=frozenset(map(Digest, resident)),
                held=frozenset(held),
                finished=frozenset(finished),
            )
        )

    def lose(self, worker: str) -> list[ev.Action]:
        """Its connection is closed."""
        self.silent.add(worker)
        return self.tell(ev.WorkerDisconnected(worker_id=WorkerId(worker), reason="its connection was closed"))

    def deploy(self, *places: str, number=1, exact=False, cost_s=1.0, name="d", peak_ratio=1.0, load=True) -> ev.Version:
        """A stage per place; a place lists its workers, separated by blanks. All of them load it at once."""
        stages = tuple(StageNeed(artifact=Digest(f"{name}.{i}"), memory_bytes=10, cost_s=cost_s) for i in range(len(places)))
        at = tuple(tuple(map(WorkerId, place.split())) for place in places)
        plan = Plan(program=Digest(name), epoch=Epoch(1), stages=stages, places=at)
        version = ev.Version(
            deployment=name, number=number, program=Digest(name), codec="raw", tolerance=None, exact=exact, peak_ratio=peak_ratio, plan=plan
        )
        self.tell(ev.VersionDeployed(version=version))
        if load:
            self.load()
        return version

    def load(self, *workers: str) -> list[ev.Action]:
        """Whatever is loading (on these workers) has been loaded."""
        actions = []
        for member in list(self.scheduler.roster):
            for artifact in sorted(member.loading) if not workers or member.worker_id in workers else ():
                actions += self.tell(ev.StageResident(worker_id=member.worker_id, artifact=artifact))
        return actions

    def submit(self, *, client=ANNE, budget_s=100.0, exact=False, size_bytes=1, name="d", version=0, program=None) -> RequestId:
        self.sequence += 1
        arrived = ev.RequestArrived(
            request_id=RequestId(client, self.sequence),
            deployment=name,
            version=version,
            program=program,
            budget_s=budget_s,
            exact=exact,
            fingerprint=self.sequence,
            input=tensor(size_bytes),
        )
        self.arrived = arrived
        self.tell(arrived)
        return arrived.request_id

    def begin(self, sent: Sent) -> None:
        self.tell(ev.StageBegun(worker_id=WorkerId(sent.worker), attempt=sent.attempt))

    def finish(self, sent: Sent, *, busy_s=1.0, wait_s=0.0, size_bytes=1, worker=None) -> list[ev.Action]:
        times = StageTimes(wait_s=wait_s, decode_s=0.0, compute_s=busy_s, encode_s=0.0)
        who = WorkerId(worker or sent.worker)
        return self.tell(ev.StageFinished(worker_id=who, attempt=sent.attempt, output=tensor(size_bytes), times=times))

    def fail(self, sent: Sent, error: AdaptError) -> list[ev.Action]:
        return self.tell(ev.AttemptFailed(worker_id=WorkerId(sent.worker), attempt=sent.attempt, error=error))

    # ── what was asked for ───────────────────────────────────────────────────────────────────────────────────────────

    def taken(self, *kinds: type) -> list:
        """The actions since the last look, of these kinds."""
        actions, self.actions = self.actions, []
        return [action for action in actions if isinstance(action, kinds)] if kinds else actions

    def sent(self) -> list[Sent]:
        """The tasks that were sent since the last look."""
        return [Sent(str(action.worker_id), action.attempt, action) for action in self.taken(ev.Dispatch)]

    def the_one_sent(self) -> Sent:
        (sent,) = self.sent()
        return sent

    def the_error(self) -> AdaptError:
        (fail,) = self.taken(ev.Fail)
        return fail.error

    def slots(self, worker: str) -> int:
        return len(self.scheduler.roster.member(WorkerId(worker)).slots)

    def verdict(self, worker: str) -> Verdict:
        return self.scheduler.roster.member(WorkerId(worker)).verdict

    def assert_idle(self) -> None:
        """Nothing lives, and nothing is reserved for what does not."""
        assert self.scheduler.live_requests == self.scheduler.reserved_bytes == 0
        assert all(not member.slots for member in self.scheduler.roster)


def a_cluster(*workers: str, places: tuple[str, ...] = (), exact: bool = False, **settings) -> Cluster:
    """All workers run every stage of a one-stage model, unless `places` says otherwise."""
    cluster = Cluster(**settings)
    for worker in workers:
        cluster.join(worker)
    cluster.deploy(*(places or (" ".join(workers),)), exact=exact)
    cluster.taken()
    return cluster


def only(actions: list[ev.Action], kind: type) -> list:
    return [action for action in actions if isinstance(action, kind)]


# ── the life of a request ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_request_from_its_arrival_to_its_answer():
    cluster = a_cluster("w1", "w2", places=("w1", "w2"))
    request_id = cluster.submit()
    (dispatch,) = cluster.taken()
    assert (dispatch.worker_id, dispatch.artifact, dispatch.budget_s, dispatch.codec) == ("w1", "d.0", 100.0, "raw")
    assert dispatch.attempt == AttemptId(request_id, 1, 0, 1)
    cluster.wait(2)
    assert cluster.taken() == [ev.Accept(request_id=request_id, deployment="d", version=1, program=Digest("d"))]
    cluster.finish(Sent("w1", dispatch.attempt, dispatch), size_bytes=7)
    acknowledge, dispatch = cluster.taken()
    assert acknowledge == ev.Acknowledge(worker_id=WorkerId("w1"), attempt=AttemptId(request_id, 1, 0, 1))
    assert (dispatch.worker_id, dispatch.artifact, dispatch.budget_s) == ("w2", "d.1", 98.0)
    assert dispatch.attempt == AttemptId(request_id, 1, 1, 1)
    assert dispatch.input.size_bytes == 7, "the input of a stage is the output of the one before"
    cluster.finish(Sent("w2", dispatch.attempt, dispatch), size_bytes=3)
    _, answer = cluster.taken()
    assert (answer.request_id, answer.attempts, answer.numeric_classes) == (request_id, 2, ("x",))
    assert answer.output.size_bytes == 3
    cluster.assert_idle()
    assert (cluster.scheduler.unacknowledged, cluster.scheduler.kept_bytes) == (1, 3)
    cluster.tell(ev.OutcomeAcknowledged(request_id=request_id))
    assert (cluster.scheduler.unacknowledged, cluster.scheduler.kept_bytes) == (0, 0)


def test_what_is_answered_soon_is_not_accepted_besides():
    """When an acceptance has to be said, those that would follow soon go with it."""
    cluster = a_cluster("w1", "w2")
    quick, gone, slow = cluster.submit(), cluster.submit(), cluster.submit()
    sent = {one.request: one for one in cluster.sent()}
    due = cluster.now + ACCEPT_S
    cluster.wait(ACCEPT_S / 4)
    soon = cluster.submit()
    assert only(cluster.finish(sent[quick]), ev.Answer)
    cluster.tell(ev.RequestCancelled(request_id=gone))
    cluster.wait(ACCEPT_S / 2)
    late = cluster.submit()
    assert cluster.scheduler.next_wakeup() == due
    assert [accept.request_id for accept in only(cluster.wait(ACCEPT_S / 4), ev.Accept)] == [slow, soon]
    assert only(cluster.wait(ACCEPT_S / 2), ev.Accept) == []
    assert [accept.request_id for accept in only(cluster.wait(ACCEPT_S / 4), ev.Accept)] == [late]
    assert only(cluster.wait(2.5), ev.Accept) == [], "once is enough"


def test_a_request_for_what_is_not_deployed_is_refused_by_name():
    cluster = a_cluster("w1")
    cluster.submit(name="e")
    assert isinstance(cluster.the_error(), UnknownModelError)
    cluster.submit(version=1, program=Digest("other"))
    assert isinstance(cluster.the_error(), UnknownModelError), "another program under this name never answers"
    cluster.assert_idle()


def test_a_request_without_time_is_refused():
    cluster = a_cluster("w1")
    cluster.submit(budget_s=0.0)
    assert isinstance(cluster.the_error(), DeadlineExceededError)
    cluster.assert_idle()


def test_a_budget_has_a_maximum():
    cluster = a_cluster("w1", max_budget_s=30.0)
    cluster.submit(budget_s=1e9)
    assert cluster.the_one_sent().action.budget_s == 30.0


def test_the_deadline_ends_a_request_with_the_story_of_its_attempts():
    """Regression: in the Pi system a wait that timed out returned zeros. Here it is an error, never a value."""
    cluster = a_cluster("w1", "w2")
    request_id = cluster.submit(budget_s=30.0)
    first = cluster.the_one_sent()
    cluster.wait(29)
    assert not cluster.taken(ev.Fail, ev.Answer)
    cluster.wait(1)
    (fail,) = cluster.taken(ev.Fail, ev.Answer)
    assert fail.request_id == request_id and isinstance(fail.error, DeadlineExceededError)
    assert fail.error.budget_s == 30.0
    assert [(line["stage"], line["attempt"], line["worker"]) for line in fail.error.attempts] == [(0, 1, first.worker)]
    assert cluster.scheduler.live_requests == 0


def test_what_a_deadline_leaves_on_its_workers_is_called_off():
    cluster = a_cluster("w1")
    cluster.submit(budget_s=5.0)
    sent = cluster.the_one_sent()
    actions = cluster.wait(5)
    assert only(actions, ev.Cancel) == [ev.Cancel(worker_id=WorkerId("w1"), attempt=sent.attempt)]
    assert cluster.slots("w1") == 1, "the slot is free when the worker says so"
    cluster.tell(ev.AttemptCancelled(worker_id=WorkerId("w1"), attempt=sent.attempt))
    assert cluster.slots("w1") == 0
    assert cluster.taken(ev.Dispatch, ev.Answer) == []


def test_an_answer_at_the_moment_of_the_deadline_counts_if_it_is_told_first():
    cluster = a_cluster("w1")
    cluster.submit(budget_s=5.0)
    sent = cluster.the_one_sent()
    cluster.now += 5.0
    assert only(cluster.finish(sent), ev.Answer)
    assert only(cluster.scheduler.tick(cluster.now), ev.Fail) == []


def test_nothing_falls_due_for_a_request_that_has_ended():
    cluster = a_cluster("w1")
    cluster.submit(budget_s=5.0)
    cluster.finish(cluster.the_one_sent())
    cluster.taken()
    assert len(cluster.scheduler._due) == 2, "the end of the memory of its id, and the next look whether somebody is slow"
    assert cluster.scheduler.next_wakeup() > cluster.now + ACCEPT_S
    cluster.wait(TIMEOUT_S + 5)
    assert cluster.taken() == []
    assert cluster.scheduler.counters["deadlines_exceeded"] == cluster.scheduler.counters["attempt_timeouts"] == 0


# ── many facts, one decision ─────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_noted_together_is_decided_together():
    """The more urgent request goes first, though it was the later to come; and nothing is dispatched before all is known."""
    cluster = Cluster()
    cluster.join("w1", credit=1)
    cluster.deploy("w1")
    running = cluster.submit()
    sent = cluster.the_one_sent()
    times = StageTimes(wait_s=0.0, decode_s=0.0, compute_s=1.0, encode_s=0.0)
    arrivals = []
    for number, budget_s in ((11, 90.0), (12, 50.0)):
        request_id = RequestId(BERT, number)
        arrived = ev.RequestArrived(
            request_id=request_id, deployment="d", version=0, program=None, budget_s=budget_s, exact=False, fingerprint=1, input=tensor(1)
        )
        arrivals.append(arrived)
    finished = ev.StageFinished(worker_id=WorkerId("w1"), attempt=sent.attempt, output=tensor(1), times=times)
    for event in (finished, *arrivals):
        cluster.scheduler.note(event, cluster.now)
    actions = cluster.scheduler.decide(cluster.now)
    assert [type(action) for action in actions] == [ev.Acknowledge, ev.Answer, ev.Dispatch]
    assert actions[1].request_id == running and actions[2].attempt.request == arrivals[1].request_id
    assert cluster.scheduler.decide(cluster.now) == []


# ── order ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_earlier_deadline_goes_first_then_the_earlier_arrival():
    cluster = Cluster()
    cluster.join("w1", credit=1)
    cluster.deploy("w1")
    running = cluster.submit()
    late, early, early_too = cluster.submit(budget_s=90.0), cluster.submit(budget_s=50.0), cluster.submit(budget_s=50.0)
    order = []
    while sent := cluster.sent():
        order += [one.request for one in sent]
        cluster.finish(sent[0])
    assert order == [running, early, early_too, late]


def test_later_stages_go_first():
    cluster = Cluster()
    cluster.join("w1", credit=1)
    cluster.deploy("w1", "w1")
    first = cluster.submit()
    second = cluster.submit(budget_s=50.0)  # more urgent, but at the beginning
    sent = cluster.the_one_sent()
    cluster.finish(sent)
    one = cluster.the_one_sent()
    assert one.request == first and one.attempt.stage == 1
    cluster.finish(one)
    assert cluster.the_one_sent().request == second


def test_no_worker_gets_more_than_its_credit():
    cluster = Cluster()
    cluster.join("w1", credit=3)
    cluster.deploy("w1", cost_s=AHEAD_S / 100)
    for _ in range(5):
        cluster.submit()
    sent = cluster.sent()
    assert len(sent) == cluster.slots("w1") == 3
    cluster.fail(sent[0], WireError("flipped"))
    assert len(cluster.sent()) == 1 and cluster.slots("w1") == 3
    cluster.finish(sent[1], busy_s=AHEAD_S / 100)
    assert len(cluster.sent()) == 1 and cluster.slots("w1") == 3


@pytest.mark.parametrize("cost_s, given", [(1.0, STEADY), (AHEAD_S, STEADY), (AHEAD_S / 2, STEADY), (AHEAD_S / 4.5, 5), (0.0, 8)])
def test_a_worker_is_given_more_than_two_tasks_only_while_they_are_short(cost_s, given):
    """What waits there can go nowhere else; what waits here goes wherever it is finished first."""
    cluster = Cluster()
    cluster.join("w1", credit=8)
    cluster.deploy("w1", cost_s=cost_s)
    for _ in range(10):
        cluster.submit()
    sent = cluster.sent()
    assert len(sent) == cluster.slots("w1") == given
    cluster.finish(sent[0], busy_s=1.0)  # and now it is known to be long
    for one in sent[1:]:
        cluster.finish(one, busy_s=1.0)
    assert cluster.slots("w1") == STEADY


# ── the choice of a worker ───────────────────────────────────────────────────────────────────────────────────────────


def a_fast_and_a_slow_worker(fast_s: float, slow_s: float) -> Cluster:
    """Each takes one task at a time, and has shown how long it needs for it."""
    cluster = Cluster()
    for worker in ("fast", "slow"):
        cluster.join(worker, credit=1)
    cluster.deploy("fast slow")
    cluster.taken()
    for worker, busy_s in (("fast", fast_s), ("slow", slow_s)):
        for other in {"fast", "slow"} - {worker}:
            cluster.scheduler.roster.member(WorkerId(other)).credit = 0
        cluster.submit()
        sent = cluster.the_one_sent()
        assert sent.worker == worker
        cluster.wait(busy_s)
        cluster.finish(sent, busy_s=busy_s)
        for other in ("fast", "slow"):
            cluster.scheduler.roster.member(WorkerId(other)).credit = 1
    cluster.taken()
    return cluster


def test_the_faster_worker_is_preferred_and_waited_for_while_that_ends_earlier():
    cluster = a_fast_and_a_slow_worker(1.0, 10.0)
    for _ in range(3):
        cluster.submit()
    first = cluster.the_one_sent()
    assert first.worker == "fast"
    cluster.wait(1)
    cluster.finish(first)
    second = cluster.the_one_sent()
    assert second.worker == "fast"
    cluster.wait(1)
    cluster.finish(second)
    assert cluster.the_one_sent().worker == "fast"


def test_the_slower_worker_gets_what_it_would_finish_earlier():
    """2 s each on the fast one, 5 on the slow one: of four, the third is finished as early by 6, so the slow one takes it."""
    cluster = a_fast_and_a_slow_worker(2.0, 5.0)
    requests = [cluster.submit() for _ in range(4)]
    assert [(one.worker, one.request) for one in cluster.sent()] == [("fast", requests[0]), ("slow", requests[2])]


@pytest.mark.parametrize("saved_s, is_waited_for", [(WORTH_S / 2, False), (WORTH_S * 2, True)])
def test_a_better_worker_is_waited_for_only_if_that_is_worth_it(saved_s, is_waited_for):
    """The fast one takes 2 s after the 2 s of what it runs; the slow one begins at once and takes a little more than 4."""
    cluster = a_fast_and_a_slow_worker(2.0, 4.0 + saved_s)
    first, second = cluster.submit(), cluster.submit()
    sent = [(one.worker, one.request) for one in cluster.sent()]
    assert sent == ([("fast", first)] if is_waited_for else [("fast", first), ("slow", second)])


@pytest.mark.parametrize("names", ["az", "za"])
def test_deployments_that_share_a_worker_take_turns(names):
    """By deadline, then by arrival; what a deployment is called is nobody's business."""
    cluster = a_cluster("w1")
    for name in names:
        cluster.deploy("w1", name=name)
    cluster.taken()
    requests = [cluster.submit(name=names[n % 2]) for n in range(6)]
    urgent = cluster.submit(name=names[1], budget_s=50.0)
    sent = cluster.sent()
    for number in range(7):
        cluster.wait(1)
        cluster.finish(sent[number])
        sent += cluster.sent()
    assert [one.request for one in sent] == [*requests[:2], urgent, *requests[2:]]


def test_a_worker_whose_way_was_long_once_is_tried_again_after_a_rest():
    cluster = a_cluster("far", "near", hedge_share=0.0)
    began = cluster.now
    for worker, transfer_s in (("far", 3.0), ("near", 0.0)):
        member = cluster.scheduler.roster.member(WorkerId(worker))
        member.services[Digest("d.0")], member.last_used = Service(1.0, transfer_s), began
    chosen = []
    while "far" not in chosen:
        cluster.submit()
        sent = cluster.the_one_sent()
        chosen.append(sent.worker)
        rested_s = cluster.now - began
        cluster.wait(1)
        cluster.finish(sent)
    assert rested_s == pytest.approx(3.0 / REGAINED_SHARE, abs=1.0)


def test_of_equal_workers_the_one_that_has_rested_longest_is_chosen():
    cluster = a_cluster("w1", "w2", "w3")
    order = []
    for _ in range(6):
        cluster.submit()
        order.append(sent := cluster.the_one_sent())
        cluster.wait(1)
        cluster.finish(sent)
    assert [sent.worker for sent in order] == ["w1", "w2", "w3"] * 2


def test_a_worker_that_is_overdue_is_not_waited_for_for_ever():
    """The fast one hangs: by the numbers alone it would be free in no time, for ever. The later it is, the longer it is expected to be."""
    cluster = a_fast_and_a_slow_worker(1.0, 10.0)
    cluster.submit()
    assert cluster.the_one_sent().worker == "fast"
    waiting = cluster.submit(budget_s=60.0)
    assert cluster.sent() == []
    cluster.wait(5)
    assert cluster.sent() == [], "a little late is no reason to take ten times as long"
    cluster.wait(14)
    sent = cluster.the_one_sent()
    assert (sent.worker, sent.request) == ("slow", waiting)


def test_a_free_slot_behind_an_overdue_task_is_not_taken_for_a_free_worker():
    cluster = a_cluster("w1", "w2")
    hanging = cluster.submit()
    first = cluster.the_one_sent()
    cluster.wait(10)
    for _ in range(3):
        cluster.submit()
        sent = cluster.the_one_sent()
        assert sent.worker != first.worker and sent.request != hanging
        cluster.finish(sent)


def test_late_answers_are_learned_from():
    """Else a slow worker would never be known as slow: every answer of it comes too late."""
    cluster = a_cluster("w1", "w2")
    cluster.submit()
    first = cluster.the_one_sent()
    cluster.wait(TIMEOUT_S)
    second = cluster.the_one_sent()
    assert {first.worker, second.worker} == {"w1", "w2"}
    cluster.finish(second)
    assert len(cluster.taken(ev.Answer)) == 1
    cluster.wait(10)
    actions = cluster.finish(first, busy_s=30.0)
    assert only(actions, ev.Answer) == [] and only(actions, ev.Acknowledge), "acknowledged, counted, and dropped"
    assert cluster.scheduler.counters["late_answers"] == 1
    member = cluster.scheduler.roster.member(WorkerId(first.worker))
    assert member.expect(Digest("d.0"), 1.0)[0] == 30.0
    assert member.slowness > 1.0 and not member.slots
    cluster.submit()
    assert cluster.the_one_sent().worker == second.worker


# ── timeouts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_timeout_ends_the_waiting_and_not_the_slot():
    cluster = a_cluster("w1", "w2")
    cluster.submit()
    first = cluster.the_one_sent()
    actions = cluster.wait(TIMEOUT_S)
    assert only(actions, ev.Cancel) == [ev.Cancel(worker_id=WorkerId(first.worker), attempt=first.attempt)]
    second = cluster.the_one_sent()
    assert second.worker != first.worker and second.attempt.attempt == 2
    assert cluster.slots(first.worker) == cluster.slots(second.worker) == 1
    cluster.tell(ev.AttemptCancelled(worker_id=WorkerId(first.worker), attempt=first.attempt))
    assert cluster.slots(first.worker) == 0
    assert cluster.sent() == [], "the second is waited for"


def test_the_slots_of_timed_out_tasks_are_not_given_away():
    cluster = Cluster()
    cluster.join("w1", credit=1)
    cluster.deploy("w1")
    cluster.submit(budget_s=TIMEOUT_S + 1)
    cluster.submit()
    assert len(cluster.sent()) == 1
    cluster.wait(TIMEOUT_S + 5)  # timed out, and then past its deadline
    assert cluster.sent() == [] and cluster.slots("w1") == 1


def test_the_first_answer_wins_whichever_attempt_it_is_of():
    cluster = a_cluster("w1", "w2")
    request_id = cluster.submit()
    first = cluster.the_one_sent()
    cluster.wait(TIMEOUT_S)
    second = cluster.the_one_sent()
    actions = cluster.finish(first, size_bytes=5)
    (answer,) = only(actions, ev.Answer)
    assert (answer.request_id, answer.attempts) == (request_id, 2)
    assert only(actions, ev.Cancel) == [ev.Cancel(worker_id=WorkerId(second.worker), attempt=second.attempt)]
    assert only(cluster.finish(second), ev.Answer) == []
    cluster.assert_idle()


def test_an_answer_in_the_middle_calls_off_the_other_attempts():
    cluster = a_cluster("w1", "w2", places=("w1 w2", "w1 w2"))
    cluster.submit()
    first = cluster.the_one_sent()
    cluster.wait(TIMEOUT_S)
    second = cluster.the_one_sent()
    actions = cluster.finish(first)
    assert only(actions, ev.Cancel) == [ev.Cancel(worker_id=WorkerId(second.worker), attempt=second.attempt)]
    assert cluster.the_one_sent().attempt.stage == 1


def test_a_worker_whose_attempt_was_cancelled_may_try_again():
    cluster = a_cluster("w1", "w2")
    cluster.submit()
    first = cluster.the_one_sent()
    cluster.wait(TIMEOUT_S)
    second = cluster.the_one_sent()
    cluster.tell(ev.AttemptCancelled(worker_id=WorkerId(first.worker), attempt=first.attempt))
    cluster.fail(second, WireError("flipped"))
    third = cluster.the_one_sent()
    assert third.worker == first.worker and third.attempt.attempt == 3


def test_a_timeout_starts_nothing_while_another_attempt_has_time():
    cluster = a_cluster("w1", "w2", "w3")
    cluster.submit()
    first = cluster.the_one_sent()
    cluster.lose(first.worker)
    second = cluster.the_one_sent()
    cluster.wait(1)
    cluster.silent.clear()
    cluster.join(first.worker, resident=["d.0"], held=[first.attempt])  # it has it after all
    cluster.taken()
    actions = cluster.wait(TIMEOUT_S - 1)
    assert cluster.scheduler.counters["attempt_timeouts"] == 1
    assert only(actions, ev.Dispatch) == only(actions, ev.Cancel) == []
    (third,) = only(cluster.wait(1), ev.Dispatch)
    assert third.worker_id not in (first.worker, second.worker)


def test_without_another_worker_a_timeout_keeps_waiting():
    cluster = a_cluster("w1")
    request_id = cluster.submit()
    sent = cluster.the_one_sent()
    actions = cluster.wait(4 * TIMEOUT_S)
    assert only(actions, ev.Cancel) == only(actions, ev.Dispatch) == []
    assert cluster.scheduler.counters["attempt_timeouts"] == 4
    (answer,) = only(cluster.finish(sent), ev.Answer)
    assert answer.request_id == request_id


def test_a_worker_that_comes_meanwhile_ends_the_waiting():
    cluster = a_cluster("w1")
    cluster.submit()
    first = cluster.the_one_sent()
    cluster.join("w2")
    cluster.load()
    assert cluster.sent() == [], "the first has time still"
    cluster.wait(TIMEOUT_S)
    assert (second := cluster.the_one_sent()).worker == "w2" and second.attempt.task == first.attempt.task


def test_a_timeout_asks_another_worker_to_load_the_stage():
    cluster = Cluster(spares=0)
    for worker in ("w1", "w2"):
        cluster.join(worker)
    cluster.deploy("w1")
    cluster.submit()
    cluster.taken()
    actions = cluster.wait(TIMEOUT_S)
    assert ev.Load(worker_id=WorkerId("w2"), artifact=Digest("d.0")) in actions
    assert cluster.sent() == []
    cluster.load("w2")
    assert cluster.the_one_sent().worker == "w2"


def test_if_the_other_worker_is_lost_as_well_the_first_is_waited_for_again():
    cluster = a_cluster("w1", "w2")
    cluster.submit()
    first = cluster.the_one_sent()
    cluster.wait(TIMEOUT_S)
    second = cluster.the_one_sent()
    cluster.lose(second.worker)
    assert cluster.sent() == []
    cluster.wait(2 * TIMEOUT_S)
    assert cluster.sent() == [], "no second task on the worker that has the first"
    assert only(cluster.finish(first), ev.Answer)


# ── failures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_failure_frees_the_slot_and_is_tried_elsewhere():
    """Regression: in the published system a worker whose model raised stayed BUSY for ever."""
    cluster = a_cluster("w1", "w2")
    cluster.submit()
    first = cluster.the_one_sent()
    actions = cluster.fail(first, WireError("flipped"))
    assert only(actions, ev.Acknowledge) == [ev.Acknowledge(worker_id=WorkerId(first.worker), attempt=first.attempt)]
    second = cluster.the_one_sent()
    assert second.worker != first.worker
    assert cluster.slots(first.worker) == 0
    assert cluster.scheduler.counters["retries"] == 1
    cluster.fail(second, WireError("flipped"))
    assert cluster.the_one_sent().worker in ("w1", "w2"), "both have failed: on the same one, now that it has ended"


def test_the_same_kind_of_model_error_twice_is_the_models_own():
    cluster = a_cluster("w1", "w2")
    cluster.submit()
    cluster.fail(cluster.the_one_sent(), ModelError("RuntimeError: shape 3"))
    cluster.fail(cluster.the_one_sent(), ModelError("RuntimeError: shape 4"))
    assert str(cluster.the_error()) == "RuntimeError: shape 4"
    assert cluster.scheduler.counters["attempts_failed"] == 2
    cluster.assert_idle()


def test_another_kind_of_model_error_is_another_story():
    """The first was out of memory, say; the second is the first of its kind."""
    cluster = a_cluster("w1", "w2")
    cluster.submit()
    cluster.fail(cluster.the_one_sent(), ModelError("MemoryError: no"))
    cluster.fail(cluster.the_one_sent(), ModelError("RuntimeError: no"))
    assert cluster.taken(ev.Fail) == []
    assert cluster.scheduler.live_requests == 1


def test_a_model_error_of_an_earlier_stage_does_not_count():
    cluster = a_cluster("w1", "w2", places=("w1 w2", "w1 w2"))
    cluster.submit()
    cluster.fail(cluster.the_one_sent(), ModelError("RuntimeError: no"))
    cluster.finish(cluster.the_one_sent())
    cluster.fail(cluster.the_one_sent(), ModelError("RuntimeError: no"))
    assert len(cluster.sent()) == 1


def test_what_cannot_succeed_is_not_tried_again():
    cluster = a_cluster("w1", "w2")
    cluster.submit()
    cluster.fail(cluster.the_one_sent(), InputMismatchError("rank 3"))
    assert isinstance(cluster.the_error(), InputMismatchError)
    cluster.assert_idle()


def test_failures_have_an_end():
    """Regression: the published system tried a poisonous input for ever."""
    cluster = a_cluster("w1", "w2", max_failures=5)
    cluster.submit(budget_s=1000.0)
    tries = 0
    while sent := cluster.sent():
        tries += 1
        failed = cluster.fail(sent[0], WireError("flipped"))
    assert tries == 5
    assert [type(fail.error) for fail in only(failed, ev.Fail)] == [WireError]
    cluster.assert_idle()


def test_an_input_that_kills_its_workers_has_an_end():
    """Regression: endless retries of a poison input. A death counts only once the task had begun."""
    cluster = a_cluster("w1", "w2", max_failures=3)
    cluster.submit(budget_s=1000.0)
    deaths = []
    while sent := cluster.sent():
        deaths.append(sent[0].worker)
        cluster.begin(sent[0])
        failed = cluster.lose(sent[0].worker)
        cluster.silent.clear()
        cluster.actions += cluster.join(sent[0].worker, resident=["d.0"])[:0]
    assert len(deaths) == 3
    (fail,) = only(failed, ev.Fail)
    assert isinstance(fail.error, PoisonError)
    assert len(fail.error.attempts) == 3
    assert cluster.scheduler.live_requests == 0


def test_losses_before_the_task_had_begun_cost_nothing():
    """Of what a worker holds only the oldest can have begun without its saying so."""
    cluster = a_cluster("w1", max_failures=2)
    behind = cluster.submit(budget_s=1000.0)
    ahead = cluster.submit(budget_s=50.0)
    cluster.lose("w1")
    for _ in range(10):
        cluster.silent.clear()
        cluster.join("w1", resident=["d.0"])
        assert [one.request for one in cluster.sent()[-2:]] == [ahead, behind]
        cluster.lose("w1")
        cluster.tell(ev.RequestCancelled(request_id=ahead))
        ahead = cluster.submit(budget_s=50.0)
    assert cluster.scheduler.live_requests == 2
    assert cluster.scheduler.counters["tasks_lost"] == 22


def test_the_oldest_task_of_a_lost_worker_counts_as_begun():
    """Of short tasks a worker says only with their answer that they had begun: an input that kills it must have an end all the same."""
    cluster = Cluster()
    cluster.join("w1")
    cluster.deploy("w1", cost_s=AHEAD_S / 2)
    finished = cluster.submit()
    killer = cluster.submit()
    innocent = cluster.submit()
    first, *_ = cluster.sent()
    cluster.finish(first, busy_s=AHEAD_S / 2)
    assert first.request == finished and [one.request for one in cluster.sent()] == [innocent]
    for _ in range(3):
        cluster.wait(2 * REACHED_S)
        cluster.lose("w1")
        cluster.silent.clear()
        cluster.join("w1", resident=["d.0"])
    (fail,) = cluster.taken(ev.Fail)
    assert fail.request_id == killer and isinstance(fail.error, PoisonError)
    assert cluster.scheduler.live_requests == 1


def test_of_several_that_may_have_killed_each_is_tried_with_nothing_behind_it():
    cluster = Cluster()
    cluster.join("w1", credit=8)
    cluster.join("w2")
    cluster.deploy("w1 w2", cost_s=AHEAD_S / 20)
    for _ in range(2):
        cluster.submit()
    for sent in cluster.sent():
        cluster.finish(sent, busy_s=AHEAD_S / 20)
    cluster.tell(ev.WorkerDraining(worker_id="w2", handed_back=frozenset()))
    several = {cluster.submit() for _ in range(4)}
    assert {one.request for one in cluster.sent()} == several
    cluster.wait(2 * REACHED_S)
    cluster.lose("w1")
    cluster.silent.clear()
    cluster.join("w1", resident=["d.0"], credit=8)
    for _ in range(4):
        (alone,) = cluster.sent()
        several.remove(alone.request)
        cluster.finish(alone, busy_s=AHEAD_S / 20)
    assert not several and cluster.scheduler.counters["poisonous_requests"] == 0, "innocents are answered"


def a_cluster_that_works(*workers: str, cost_s: float = AHEAD_S / 20, **settings) -> Cluster:
    """Workers, each of which has succeeded once, and takes eight at a time; one if none is named."""
    workers = workers or ("w1",)
    cluster = Cluster(**settings)
    for worker in workers:
        cluster.join(worker, credit=8)
    cluster.deploy(" ".join(workers), cost_s=cost_s)
    for _ in workers:
        cluster.submit()
    sent = cluster.sent()
    assert {one.worker for one in sent} == {*workers}
    for one in sent:
        cluster.finish(one, busy_s=cost_s)
    return cluster


def test_what_is_always_suspected_with_others_has_an_end_too():
    """A worker may die so soon that the answer of the task before is lost as well: then nothing is ever certain."""
    cluster = a_cluster_that_works()
    killer = cluster.submit(budget_s=1000.0)
    deaths = 0
    while not (failed := [fail for fail in cluster.taken(ev.Fail) if fail.request_id == killer]):
        innocent = cluster.submit(budget_s=1.0)  # goes first
        cluster.wait(2 * REACHED_S)
        cluster.lose("w1")
        cluster.silent.clear()
        cluster.tell(ev.RequestCancelled(request_id=innocent))
        cluster.join("w1", resident=["d.0"], credit=8)
        deaths += 1
        assert deaths < 20
    assert isinstance(failed[0].error, (PoisonError, WorkerLostError))


def test_what_is_behind_a_task_that_had_begun_may_have_killed_too():
    """Regression: the answer to what had begun died with its worker, which was killed by the next; that took a fourth worker."""
    cluster = a_cluster_that_works()
    ahead, killer = cluster.submit(), cluster.submit()
    first, _ = cluster.sent()
    cluster.begin(first)
    cluster.wait(2 * REACHED_S)
    cluster.lose("w1")
    cluster.silent.clear()
    cluster.join("w1", resident=["d.0"], credit=8)
    alone = cluster.the_one_sent()
    assert alone.request == ahead
    cluster.finish(alone, busy_s=AHEAD_S / 20)
    for _ in range(2):
        cluster.wait(2 * REACHED_S)
        cluster.lose("w1")
        cluster.silent.clear()
        cluster.join("w1", resident=["d.0"], credit=8)
    (fail,) = cluster.taken(ev.Fail)
    assert fail.request_id == killer and isinstance(fail.error, PoisonError) and cluster.scheduler.live_requests == 0


def test_what_was_sent_a_moment_ago_has_killed_nobody():
    """Regression: a dispatcher that had been stopped sent a request from one dead worker to the next, and then condemned it."""
    cluster = a_cluster("w1", "w2", "w3")
    for _ in range(3):
        cluster.submit()
    for sent in cluster.sent():
        cluster.finish(sent, busy_s=AHEAD_S / 2)
    cluster.submit()
    cluster.taken()
    for worker in ("w1", "w2", "w3"):
        cluster.lose(worker)
    assert cluster.taken(ev.Fail) == [] and cluster.scheduler.live_requests == 1


def the_deaths_of(cluster: Cluster, killer: RequestId, *, before: int = 0) -> int:
    """How many workers die until the request that kills at once is condemned. Each that dies joins again; all other work succeeds first."""
    deaths, answered = before, set()
    for _ in range(20):
        actions = cluster.taken()
        answered |= {action.request_id for action in only(actions, ev.Answer)}
        if failed := only(actions, ev.Fail):
            assert [fail.request_id for fail in failed] == [killer] and isinstance(failed[0].error, PoisonError)
            return deaths
        for action in sorted(only(actions, ev.Dispatch), key=lambda action: action.attempt.request == killer):
            one = Sent(str(action.worker_id), action.attempt, action)
            if one.request != killer:
                cluster.finish(one, busy_s=AHEAD_S / 20)
                continue
            cluster.wait(2 * REACHED_S)
            cluster.lose(one.worker)
            cluster.silent.clear()
            cluster.join(one.worker, resident=["d.0"], credit=8)
            deaths += 1
    raise AssertionError("it has no end")


def a_doubt(cluster: Cluster, *, budget_s: float, others: int, their_budget_s: float) -> tuple[Sent, Member, list[Sent]]:
    """A task whose worker dies of it, while others come: how it was sent, who is kept for it now, and what the workers that are left hold."""
    cluster.submit(budget_s=budget_s)
    first = cluster.the_one_sent()
    cluster.wait(2 * REACHED_S)
    for _ in range(others):
        cluster.submit(budget_s=their_budget_s)
    cluster.lose(first.worker)
    held = [one for one in cluster.sent() if one.worker != first.worker]
    assert first.request not in {one.request for one in held}
    (kept,) = (member for member in cluster.scheduler.roster if member.is_kept)
    return first, kept, held


def test_a_worker_is_emptied_for_what_may_have_killed():
    """Regression: it ran behind others, whose answers died with it each time; five workers died before it was certain."""
    cluster = a_cluster_that_works()
    cluster.submit(budget_s=1.0)  # goes first
    killer = cluster.submit(budget_s=1000.0)
    for _ in range(4):
        cluster.submit(budget_s=1000.0)
    cluster.taken()
    cluster.wait(2 * REACHED_S)
    cluster.lose("w1")
    cluster.silent.clear()
    for _ in range(4):
        cluster.submit(budget_s=1.0)
    cluster.join("w1", resident=["d.0"], credit=8)
    assert the_deaths_of(cluster, killer, before=1) == 3


def test_new_requests_do_not_keep_a_worker_from_what_may_have_killed():
    """It is kept for that, finishes what it holds, and then others have it again."""
    cluster = a_cluster_that_works("w1", "w2")
    doubtful, _, held = a_doubt(cluster, budget_s=5.0, others=12, their_budget_s=10.0)
    for one in held[:-1]:
        cluster.submit(budget_s=10.0)
        cluster.finish(one, busy_s=AHEAD_S / 20)
        assert cluster.sent() == [], "it is kept"
    cluster.finish(held[-1], busy_s=AHEAD_S / 20)
    alone = cluster.the_one_sent()
    assert alone.request == doubtful.request
    cluster.finish(alone, busy_s=AHEAD_S / 20)
    assert len(cluster.sent()) > 1


def test_what_a_worker_was_kept_for_is_not_behind_those_who_may_not_have_it():
    """Regression: they came first, could not have the worker that was kept, and all waited for ever."""
    cluster = a_cluster_that_works("w1", "w2")
    doubtful, _, held = a_doubt(cluster, budget_s=50.0, others=4, their_budget_s=60.0)
    for _ in range(12):
        cluster.submit(budget_s=10.0)
    for one in held:
        cluster.finish(one, busy_s=AHEAD_S / 20)
    assert doubtful.request in {one.request for one in cluster.sent()}


def test_a_worker_that_hangs_is_not_waited_for():
    """It is kept, and does not come to an end. The others always have something to do, until one of them is kept instead."""
    cluster = a_cluster_that_works("w1", "w2", "w3", hedge_share=0.0)
    doubtful, hanging, held = a_doubt(cluster, budget_s=100.0, others=40, their_budget_s=100.0)
    hanging_id = hanging.worker_id
    busy = [one for one in held if one.worker != hanging_id]
    for _ in range(40):
        cluster.wait(AHEAD_S / 10)
        cluster.finish(busy.pop(0), busy_s=AHEAD_S / 20)
        cluster.submit()
        sent = cluster.sent()
        if doubtful.request in {one.request for one in sent}:
            break
        busy += [one for one in sent if one.worker != hanging_id]
    assert [one.worker for one in sent if one.request == doubtful.request] not in ([], [hanging_id])


@pytest.mark.parametrize("how", ["cancelled", "expired", "absolved"])
def test_a_worker_is_kept_no_longer_than_somebody_waits_for_it(how):
    """Absolved: the worker that was thought dead has come back as the same process."""
    cluster = a_cluster_that_works("w1", "w2")
    first, _, _ = a_doubt(cluster, budget_s=5.0, others=8, their_budget_s=100.0)
    match how:
        case "cancelled":
            cluster.tell(ev.RequestCancelled(request_id=first.request))
        case "expired":
            cluster.wait(5.0)
        case "absolved":
            cluster.tell(
                ev.WorkerJoined(
                    worker_id=WorkerId(first.worker), incarnation=0, numeric_class="x", stage_budget_bytes=100, credit=8,
                    resident=frozenset(["d.0"]), held=frozenset([first.attempt]), finished=frozenset(),
                )
            )  # fmt: skip
    assert not any(member.is_kept for member in cluster.scheduler.roster)


def test_what_is_absolved_needs_no_worker_of_its_own():
    """Its task had not reached the worker that was thought dead, and is as any other now."""
    cluster = a_cluster_that_works("w1", "w2")
    hellos = {}
    for worker in ("w1", "w2"):
        hellos[worker] = ev.WorkerJoined(
            worker_id=WorkerId(worker), incarnation=7, numeric_class="x", stage_budget_bytes=100, credit=8,
            resident=frozenset(["d.0"]), held=frozenset(), finished=frozenset(),
        )  # fmt: skip
        cluster.tell(hellos[worker])
    first, _, _ = a_doubt(cluster, budget_s=5.0, others=8, their_budget_s=100.0)
    cluster.tell(ev.WorkerDisconnected(worker_id=WorkerId(first.worker), reason="once more"))
    cluster.silent.clear()
    cluster.tell(hellos[first.worker])
    assert not any(member.is_kept for member in cluster.scheduler.roster)
    assert first.request in {one.request for one in cluster.sent()}


def test_a_socket_that_refuses_a_task_tells_of_a_death_too():
    """Regression: a task that the dead worker did not get any more excused the one that had killed it."""
    cluster = a_cluster_that_works()
    killer = cluster.submit(budget_s=1000.0)
    first = cluster.the_one_sent()
    cluster.wait(2 * REACHED_S)
    cluster.submit()
    refused = cluster.the_one_sent()
    cluster.taken()
    cluster.tell(ev.DispatchRefused(worker_id=WorkerId("w1"), attempt=refused.attempt))
    cluster.silent.clear()
    cluster.join("w1", resident=["d.0"], credit=8)
    assert first.request == killer and the_deaths_of(cluster, killer, before=1) == 3


def test_what_left_with_a_task_that_was_refused_has_killed_nobody():
    """They travelled together, and neither came."""
    cluster = a_cluster_that_works(cost_s=100 * AHEAD_S)
    refused, innocent = cluster.submit(), cluster.submit()
    first, _ = cluster.sent()
    cluster.wait(2 * REACHED_S)
    cluster.tell(ev.DispatchRefused(worker_id=WorkerId("w1"), attempt=first.attempt))
    requests = cluster.scheduler._requests
    assert not requests[refused].is_doubtful and not requests[innocent].is_doubtful


def test_what_a_worker_held_that_has_left_by_intent_has_not_killed_it():
    cluster = a_cluster_that_works()
    crossed = cluster.submit()
    cluster.wait(2 * REACHED_S)
    cluster.tell(ev.WorkerDisconnected(worker_id=WorkerId("w1"), reason="it said goodbye", is_intended=True))
    cluster.tell(ev.WorkerLeft(worker_id=WorkerId("w1")))
    assert not cluster.scheduler._requests[crossed].is_doubtful


def test_workers_that_are_cut_off_together_have_not_died_of_what_went_from_one_to_the_next():
    """One falls silent a moment after the other, and the request is sent on each time; then all are lost."""
    workers = ("w1", "w2", "w3", "w4")
    cluster = a_cluster_that_works(*workers, cost_s=1.0, hedge_share=0.0, attempt_timeout_s=100.0)
    request = cluster.submit(budget_s=1000.0)
    seen = []
    for _ in workers:
        sent = cluster.the_one_sent()
        cluster.begin(sent)
        seen.append(sent.worker)
        cluster.silent.add(sent.worker)
        cluster.wait(SILENCE_S)
    assert sorted(seen) == [*workers]
    for worker in seen:
        cluster.tell(ev.LeaseEnded(worker_id=WorkerId(worker)))
        cluster.tell(ev.WorkerDisconnected(worker_id=WorkerId(worker), reason="its connection was closed"))
    assert cluster.taken(ev.Fail) == [] and len(cluster.scheduler._requests[request].deaths) < POISONED


def test_a_worker_that_is_late_because_of_its_codec_announces_nothing_either():
    """It says that it has begun if computing takes long; what takes long here is something else."""
    cluster = a_cluster_that_works()
    for _ in range(8):
        cluster.submit()
        sent = cluster.the_one_sent()
        times = StageTimes(wait_s=0.0, decode_s=10 * AHEAD_S, compute_s=AHEAD_S / 20, encode_s=10 * AHEAD_S)
        cluster.tell(ev.StageFinished(worker_id=WorkerId(sent.worker), attempt=sent.attempt, output=tensor(1), times=times))
    ahead, killer = cluster.submit(budget_s=1.0), cluster.submit(budget_s=1000.0)
    cluster.wait(2 * REACHED_S)
    cluster.lose("w1")
    requests = cluster.scheduler._requests
    assert requests[ahead].suspected == requests[killer].suspected == ["w1"]


def test_heartbeats_do_not_make_a_worker_kept_for_nothing():
    """Regression: the policy preferred another worker at each heartbeat, whoever was let go was filled again, and none was ever empty."""
    cluster = a_cluster_that_works("w1", "w2", "w3", cost_s=5.0, policy="lowest-memory", hedge_share=0.0, attempt_timeout_s=1000.0)
    doubtful, _, held = a_doubt(cluster, budget_s=500.0, others=12, their_budget_s=600.0)
    workers = sorted({one.worker for one in held})
    for turn in range(12):
        for place, worker in enumerate(workers):
            heard = ev.WorkerHeard(worker_id=WorkerId(worker), memory_percent=40.0 + (turn + place) % 2)
            cluster.tell(heard)
        cluster.now += 1.0
        if turn % 2:
            cluster.finish(held.pop(0), busy_s=5.0)
        held += (sent := cluster.sent())
        if doubtful.request in {one.request for one in sent}:
            return
    raise AssertionError("it never had a worker")


def test_a_request_that_a_worker_is_kept_for_does_not_let_later_ones_of_its_deployment_pass():
    """Regression: the turns between deployments, by deadline, were off while it waited."""
    workers = ("w1", "w2", "w3")
    cluster = Cluster(hedge_share=0.0)
    for worker in workers:
        cluster.join(worker)
    for name in "de":
        cluster.deploy(" ".join(workers), name=name)
        for _ in workers:
            cluster.submit(name=name)
        for sent in cluster.sent():
            cluster.finish(sent)
    cluster.submit(name="d", budget_s=5.0)
    first = cluster.the_one_sent()
    for _ in range(5):
        cluster.submit(name="d", budget_s=50.0)
    held = [one for one in cluster.sent() if one.worker != first.worker]
    cluster.begin(first)
    cluster.lose(first.worker)
    held += [one for one in cluster.sent() if one.worker != first.worker]
    (kept,) = (member.worker_id for member in cluster.scheduler.roster if member.is_kept)
    for name, budget_s in (("d", 90.0), ("e", 9.0)):
        cluster.submit(name=name, budget_s=budget_s)
    cluster.finish(next(one for one in held if one.worker != kept))
    assert cluster.the_one_sent().action.artifact == "e.0"


def test_what_kills_at_once_among_long_tasks_is_found():
    """Regression: of what is long a worker says that it has begun; but that died with it, and nothing was ever suspected."""
    cluster = a_cluster_that_works("w1", "w2", cost_s=100 * AHEAD_S)
    killer = cluster.submit(budget_s=1000.0)
    assert the_deaths_of(cluster, killer) == 3


def test_what_stands_behind_a_long_task_that_may_have_ended_is_suspected_too():
    """The answer to the long one died, and the word that the next had begun: or the long one alone would be blamed."""
    cluster = a_cluster_that_works(cost_s=100 * AHEAD_S)
    ahead, killer = cluster.submit(), cluster.submit(budget_s=1000.0)
    first, _ = cluster.sent()
    cluster.begin(first)
    cluster.wait(60 * AHEAD_S)
    cluster.lose("w1")
    requests = cluster.scheduler._requests
    assert requests[ahead].suspected == requests[killer].suspected == ["w1"] and not requests[ahead].deaths


def test_a_bad_moment_of_a_worker_does_not_excuse_what_is_short():
    """Regression: an average above what a worker announces, of tasks that it did not announce, and nothing was suspected but what stood first."""
    cluster = a_cluster_that_works()
    for busy_s in (100 * AHEAD_S, AHEAD_S / 20):
        cluster.submit()
        cluster.finish(cluster.the_one_sent(), busy_s=busy_s)
    ahead, killer = cluster.submit(budget_s=1.0), cluster.submit(budget_s=1000.0)
    assert cluster.scheduler.roster.member(WorkerId("w1")).services[Digest("d.0")].busy_s > AHEAD_S
    cluster.wait(2 * REACHED_S)
    cluster.lose("w1")
    requests = cluster.scheduler._requests
    assert requests[ahead].suspected == requests[killer].suspected == ["w1"]


def test_what_had_begun_counts_wherever_it_stands():
    """Of long tasks it does say so: then the later one cannot be excused by the earlier."""
    cluster = a_cluster("w1")
    first, second = cluster.submit(), cluster.submit()
    cluster.begin(cluster.sent()[1])
    cluster.lose("w1")
    requests = cluster.scheduler._requests
    assert requests[second].deaths == ["w1"] and not requests[first].is_doubtful


def test_who_comes_back_as_the_same_process_has_not_died():
    """Also of what it does not list: that had not reached it."""
    cluster = Cluster()
    cluster.join("w1")
    cluster.deploy("w1", cost_s=AHEAD_S / 20)
    cluster.submit()
    cluster.finish(cluster.the_one_sent(), busy_s=AHEAD_S / 20)
    cluster.submit()
    for _ in range(5):
        cluster.wait(2 * REACHED_S)
        cluster.lose("w1")
        cluster.silent.clear()
        cluster.tell(
            ev.WorkerJoined(
                worker_id=WorkerId("w1"), incarnation=7, numeric_class="x", stage_budget_bytes=100, credit=2,
                resident=frozenset(["d.0"]), held=frozenset(), finished=frozenset(),
            )
        )  # fmt: skip
    assert cluster.scheduler.counters["poisonous_requests"] == 0 and cluster.scheduler.live_requests == 1


def test_a_connection_that_was_lost_is_no_death():
    cluster = a_cluster("w1")
    cluster.submit()
    for _ in range(5):
        (sent,) = cluster.sent()
        cluster.begin(sent)
        cluster.lose("w1")
        cluster.silent.clear()
        cluster.join("w1", resident=["d.0"], held=[sent.attempt])
        assert cluster.sent() == []
        cluster.actions.append(sent.action)
    cluster.finish(sent)
    assert len(cluster.taken(ev.Answer)) == 1


def test_a_worker_that_never_succeeds_is_no_evidence():
    """Of the two, one is broken: it dies of everything."""
    cluster = a_cluster("w1", "w2")
    cluster.submit()
    cluster.submit()
    for sent in cluster.sent():
        if sent.worker == "w2":
            cluster.finish(sent)
    for _ in range(4):
        cluster.lose("w1")
        cluster.silent.clear()
        cluster.join("w1", resident=["d.0"])
    assert cluster.scheduler.counters["poisonous_requests"] == 0


# ── penalties and breakers ───────────────────────────────────────────────────────────────────────────────────────────


def penalty(cluster: Cluster, worker: str) -> float:
    return cluster.scheduler.roster.member(WorkerId(worker)).qos.penalty(cluster.now)


def test_a_bad_answer_costs_its_worker_fifty_and_a_good_one_takes_a_fifth_away():
    cluster = a_cluster("w1", "w2")
    cluster.submit()
    sent = cluster.the_one_sent()
    cluster.fail(sent, WireError("flipped"))
    assert penalty(cluster, sent.worker) == 50.0
    other = cluster.the_one_sent()
    cluster.finish(other)
    assert penalty(cluster, other.worker) == 0.0
    cluster.submit()
    cluster.submit()
    for again in cluster.sent():
        cluster.finish(again)
    assert penalty(cluster, sent.worker) == 40.0


def test_what_the_model_raises_is_its_workers_fault_only_if_another_worker_succeeds():
    cluster = a_cluster("w1", "w2")
    cluster.submit()
    first = cluster.the_one_sent()
    cluster.fail(first, ModelError("RuntimeError: no memory"))
    assert penalty(cluster, first.worker) == 0.0
    cluster.finish(cluster.the_one_sent())
    assert penalty(cluster, first.worker) == 50.0
    cluster.submit()
    for _ in range(2):
        cluster.fail(cluster.the_one_sent(), ModelError("ValueError: bad input"))
    assert [penalty(cluster, worker) for worker in ("w1", "w2") if worker != first.worker] == [0.0]


def test_silence_costs_once_however_it_goes_on():
    cluster = a_cluster("w1", "w2")
    cluster.silent.add("w1")
    cluster.wait(SILENCE_S + 0.1)
    assert penalty(cluster, "w1") == 50.0
    cluster.lose("w1")
    assert penalty(cluster, "w1") == 50.0


def test_leaving_and_refusing_cost_nothing():
    cluster = a_cluster("w1", "w2")
    cluster.submit()
    sent = cluster.the_one_sent()
    cluster.fail(sent, OverloadedError("full", retry_after_s=0.1))
    cluster.tell(ev.WorkerDraining(worker_id=WorkerId("w2"), handed_back=frozenset()))
    cluster.tell(ev.WorkerLeft(worker_id=WorkerId("w2")))
    assert penalty(cluster, "w1") == penalty(cluster, "w2") == 0.0


def broken(cluster: Cluster, worker: str, *, failures: int = 5) -> None:
    member = cluster.scheduler.roster.member(WorkerId(worker))
    for _ in range(failures):
        cluster.scheduler._penalize(member, cluster.now)


def test_a_worker_whose_breaker_is_open_gets_nothing_until_it_half_opens_and_then_one_task():
    cluster = a_cluster("w1", "w2")
    broken(cluster, "w1")
    for _ in range(4):
        cluster.submit()
    assert {sent.worker for sent in cluster.sent()} == {"w2"}
    cluster.wait(3.0)
    probes = cluster.sent()
    assert [sent.worker for sent in probes] == ["w1"]
    cluster.finish(probes[0])
    assert [sent.worker for sent in cluster.sent()] == ["w1"]
    assert cluster.scheduler.counters["breakers_opened"] == 1


@pytest.mark.parametrize("end", ["unlisted at the next hello", "failed, for nobody", "handed back"])
def test_a_half_open_worker_is_tried_again_however_the_one_task_has_ended(end):
    cluster = a_cluster("w1", "w2")
    broken(cluster, "w1")
    for _ in range(4):
        cluster.submit(client=BERT)
    others = cluster.sent()
    cluster.wait(3.0)
    probe = cluster.the_one_sent()
    assert probe.worker == "w1"
    match end:
        case "unlisted at the next hello":
            cluster.join("w1", resident=["d.0"])
        case "failed, for nobody":
            cluster.tell(ev.RequestCancelled(request_id=probe.request))
            cluster.fail(probe, ModelError("ValueError: no"))
        case "handed back":
            cluster.tell(ev.WorkerDraining(worker_id=WorkerId("w1"), handed_back=frozenset({probe.attempt})))
            cluster.join("w1", resident=["d.0"])
    for sent in others:
        cluster.finish(sent)
    cluster.submit()
    cluster.submit()
    cluster.submit()
    assert "w1" in {sent.worker for sent in cluster.sent()}


def test_the_last_worker_gets_tasks_whatever_it_did():
    cluster = a_cluster("w1")
    broken(cluster, "w1", failures=9)
    cluster.submit()
    assert cluster.the_one_sent().worker == "w1"


def test_penalties_are_a_factor_of_the_expected_finish():
    cluster = a_cluster("w1", "w2")
    broken(cluster, "w1", failures=1)
    cluster.submit()
    assert cluster.the_one_sent().worker == "w2"


def test_lowest_memory_prefers_the_emptier_host_and_counts_penalties():
    cluster = a_cluster("w1", "w2", policy="lowest-memory")
    cluster.silent = {"w1", "w2"}
    cluster.tell(ev.WorkerHeard(worker_id=WorkerId("w1"), memory_percent=20.0, resident_bytes=90))  # of a budget of 100
    cluster.tell(ev.WorkerHeard(worker_id=WorkerId("w2"), memory_percent=60.0, resident_bytes=0))
    cluster.submit()
    assert cluster.the_one_sent().worker == "w2"
    broken(cluster, "w2", failures=1)
    cluster.submit()
    assert cluster.the_one_sent().worker == "w1"


# ── how long is waited ───────────────────────────────────────────────────────────────────────────────────────────────


def practised(cluster: Cluster, *, busy_s: float, times: int = 8) -> None:
    """The workers have done this stage before."""
    for _ in range(times):
        cluster.submit()
        sent = cluster.the_one_sent()
        cluster.begin(sent)
        cluster.now += busy_s
        cluster.finish(sent, busy_s=busy_s)
        cluster.taken()


def test_what_is_known_to_be_quick_is_not_waited_for_as_long_as_what_is_not_known():
    cluster = a_cluster("w1", "w2", attempt_timeout_s=20.0, min_attempt_timeout_s=0.5)
    cluster.submit()
    first = cluster.the_one_sent()
    assert cluster.scheduler._requests[first.request].attempts[1].timeout_s == 20.0
    cluster.finish(first, busy_s=0.1)
    practised(cluster, busy_s=0.1, times=30)
    cluster.submit()
    sent = cluster.the_one_sent()
    assert cluster.scheduler._requests[sent.request].attempts[1].timeout_s < 2.0
    cluster.wait(2.0)
    retried = cluster.the_one_sent()
    assert retried.worker != sent.worker and penalty(cluster, sent.worker) == 50.0


def test_a_device_that_has_become_slow_is_believed_in_the_end():
    """What was given up is learned from as longer than was waited; else each of its answers would come too late, for ever."""
    cluster = a_cluster("w1", attempt_timeout_s=100.0, min_attempt_timeout_s=0.1)
    practised(cluster, busy_s=0.1, times=20)
    for _ in range(12):
        cluster.submit()
        sent = cluster.the_one_sent()
        cluster.begin(sent)
        cluster.wait(5.0)
        cluster.finish(sent, busy_s=5.0)
        cluster.taken()
    timeouts = cluster.scheduler.counters["attempt_timeouts"]
    practised(cluster, busy_s=5.0, times=3)
    assert cluster.scheduler.counters["attempt_timeouts"] == timeouts


def test_who_only_waits_behind_others_is_not_to_blame():
    cluster = a_cluster("w1", attempt_timeout_s=1.0)
    cluster.submit()
    cluster.submit()
    first, second = cluster.sent()
    cluster.begin(first)
    cluster.join("w2", resident=["d.0"])
    before = penalty(cluster, "w1")
    cluster.tell(
        ev.StageFinished(
            worker_id=WorkerId("w9"),
            attempt=first.attempt,
            output=tensor(1),
            times=StageTimes(wait_s=0, decode_s=0, compute_s=0, encode_s=0),
        )
    )
    cluster.scheduler._attempt_timed_out(second.attempt, cluster.now)
    assert penalty(cluster, "w1") == before


def test_second_attempts_wait_for_tokens_when_there_are_none():
    cluster = a_cluster("w1", "w2", tokens=TokenSettings(most=1, per_request=0.0, per_s=0.1))
    for _ in range(2):
        cluster.submit()
    first, second = cluster.sent()
    cluster.fail(first, WireError("flipped"))
    assert [sent.request for sent in cluster.sent()] == [first.request]
    cluster.fail(second, WireError("flipped"))
    assert cluster.sent() == [] and cluster.scheduler.counters["retries_delayed"] == 1
    cluster.wait(10.1)
    assert [sent.request for sent in cluster.sent()] == [second.request]


def test_what_was_lost_needs_no_token():
    cluster = a_cluster("w1", "w2", tokens=TokenSettings(most=1, per_request=0.0, per_s=0.001))
    for _ in range(2):
        cluster.submit()
    first, second = cluster.sent()
    cluster.fail(first, WireError("flipped"))
    cluster.taken()
    cluster.lose(second.worker)
    assert second.request in [sent.request for sent in cluster.sent()]


def test_failures_of_one_stage_do_not_count_in_the_next():
    cluster = a_cluster("w1", "w2", places=("w1 w2", "w1 w2"), max_failures=2)
    cluster.submit()
    cluster.fail(cluster.the_one_sent(), WireError("flipped"))
    cluster.finish(cluster.the_one_sent())
    cluster.fail(cluster.the_one_sent(), WireError("flipped"))
    assert len(cluster.sent()) == 1


def test_a_refusal_of_the_worker_is_nobodys_failure():
    cluster = a_cluster("w1", "w2")
    cluster.submit()
    first = cluster.the_one_sent()
    cluster.fail(first, OverloadedError("full", retry_after_s=0.1))
    assert len(cluster.sent()) == 1
    assert cluster.scheduler.counters["attempts_failed"] == 0 and cluster.scheduler.counters["neutral_answers"] == 1
    assert cluster.scheduler.roster.member(WorkerId(first.worker)).tally.tasks_failed == 0


def test_a_stage_that_is_not_there_is_loaded_again_and_run_elsewhere_meanwhile():
    cluster = a_cluster("w1", "w2")
    cluster.submit()
    first = cluster.the_one_sent()
    actions = cluster.fail(first, StageNotResidentError("gone"))
    assert ev.Load(worker_id=WorkerId(first.worker), artifact=Digest("d.0")) in actions
    assert cluster.the_one_sent().worker != first.worker


def test_who_failed_and_waits_for_another_worker_does_not_hold_up_the_others():
    """The head of the queue may only go to w2, which is full; w1 is free, and the next one may go there."""
    cluster = Cluster()
    for worker in ("w1", "w2"):
        cluster.join(worker, credit=1)
    cluster.deploy("w1 w2")
    head, other = cluster.submit(budget_s=50.0), cluster.submit(budget_s=90.0)
    next_one = cluster.submit(budget_s=90.0)
    on_w1, on_w2 = cluster.sent()
    assert [(on_w1.request, on_w1.worker), (on_w2.request, on_w2.worker)] == [(head, "w1"), (other, "w2")]
    cluster.fail(on_w1, WireError("flipped"))
    sent = cluster.the_one_sent()
    assert (sent.request, sent.worker) == (next_one, "w1")
    cluster.finish(on_w2)
    assert cluster.the_one_sent().request == head


# ── identities ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_two_requests_on_one_worker_are_kept_apart():
    """Regression: without task ids two images on one worker collided."""
    cluster = a_cluster("w1")
    anne, bert = cluster.submit(client=ANNE), cluster.submit(client=BERT)
    of_anne, of_bert = cluster.sent()
    assert (of_anne.request, of_bert.request) == (anne, bert)
    (answer,) = only(cluster.finish(of_bert, size_bytes=2), ev.Answer)
    assert (answer.request_id, answer.output.size_bytes) == (bert, 2)
    (answer,) = only(cluster.finish(of_anne, size_bytes=9), ev.Answer)
    assert (answer.request_id, answer.output.size_bytes) == (anne, 9)


def test_requests_of_two_clients_under_one_number_are_two():
    cluster = a_cluster("w1")
    anne = cluster.submit(client=ANNE)
    cluster.sequence -= 1
    bert = cluster.submit(client=BERT)
    assert anne.sequence == bert.sequence and len(cluster.sent()) == 2


def test_a_late_result_is_not_forwarded_a_second_time():
    """Regression: in the published system a late result went on to the next stage once more."""
    cluster = a_cluster("w1", "w2", places=("w1 w2", "w1 w2"))
    cluster.submit()
    first = cluster.the_one_sent()
    cluster.wait(TIMEOUT_S)
    second = cluster.the_one_sent()
    cluster.finish(second)
    assert [one.attempt.stage for one in cluster.sent()] == [1]
    cluster.finish(first)
    cluster.finish(second)  # said twice
    assert cluster.sent() == []
    assert cluster.scheduler.counters["late_answers"] == 2


def test_an_answer_from_a_worker_that_was_not_asked_changes_nothing():
    cluster = a_cluster("w1", "w2")
    cluster.submit()
    sent = cluster.the_one_sent()
    stranger = "w2" if sent.worker == "w1" else "w1"
    assert only(cluster.finish(sent, worker=stranger), ev.Answer) == []
    assert cluster.slots(sent.worker) == 1
    cluster.tell(ev.AttemptFailed(worker_id=WorkerId(stranger), attempt=sent.attempt, error=InputMismatchError("no")))
    cluster.tell(ev.AttemptCancelled(worker_id=WorkerId(stranger), attempt=sent.attempt))
    assert cluster.scheduler.live_requests == 1 and cluster.sent() == []
    assert only(cluster.finish(sent), ev.Answer)


def test_an_answer_to_what_was_never_dispatched_changes_nothing():
    cluster = a_cluster("w1")
    request_id = cluster.submit()
    sent = cluster.the_one_sent()
    for attempt in (AttemptId(request_id, 1, 0, 2), AttemptId(request_id, 2, 0, 1), AttemptId(request_id, 1, 1, 1)):
        actions = cluster.finish(Sent("w1", attempt, sent.action))
        assert [type(action) for action in actions] == [ev.Acknowledge], "the worker need not keep it"
    assert cluster.scheduler.live_requests == 1


# ── duplicates ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_second_submission_of_a_living_request_is_accepted_and_not_run_again():
    cluster = a_cluster("w1")
    cluster.submit()
    cluster.taken()
    (accept,) = cluster.tell(cluster.arrived)
    assert isinstance(accept, ev.Accept)
    assert cluster.scheduler.live_requests == 1


@pytest.mark.parametrize("how", ["answer", "error"])
def test_a_second_submission_of_an_ended_request_gets_the_same_outcome(how):
    cluster = a_cluster("w1")
    cluster.submit()
    sent = cluster.the_one_sent()
    (outcome,) = only(cluster.finish(sent) if how == "answer" else cluster.fail(sent, InputMismatchError("no")), ev.Answer | ev.Fail)
    for _ in range(2):
        assert cluster.tell(cluster.arrived) == [outcome]
    assert cluster.scheduler.counters["duplicate_requests"] == 2


@pytest.mark.parametrize("when", ["living", "ended"])
def test_one_id_for_two_inputs_is_an_error(when):
    cluster = a_cluster("w1")
    request_id = cluster.submit()
    sent = cluster.the_one_sent()
    if when == "ended":
        cluster.finish(sent)
    other = ev.RequestArrived(
        request_id=request_id, deployment="d", version=0, program=None, budget_s=9.0, exact=False, fingerprint=-1, input=tensor(4)
    )
    (fail,) = cluster.tell(other)
    assert isinstance(fail.error, WireError) and "used before" in str(fail.error)
    (action,) = cluster.tell(cluster.arrived)
    assert isinstance(action, ev.Answer if when == "ended" else ev.Accept), "the first is as it was"


def test_a_decided_request_is_never_run_again():
    cluster = a_cluster("w1")
    for decide in (ev.OutcomeAcknowledged, ev.RequestCancelled):
        request_id = cluster.submit()
        cluster.finish(cluster.the_one_sent())
        cluster.tell(decide(request_id=request_id))
        assert cluster.tell(cluster.arrived) == []


def test_ids_are_forgotten_some_time_after_their_deadline():
    cluster = a_cluster("w1")
    request_id = cluster.submit(budget_s=10.0)
    cluster.finish(cluster.the_one_sent())
    cluster.wait(10 + REMEMBER_S - 1)
    assert only(cluster.tell(cluster.arrived), ev.Answer)
    cluster.wait(1)
    assert (cluster.scheduler.unacknowledged, cluster.scheduler.kept_bytes) == (0, 0)
    cluster.taken()
    cluster.tell(cluster.arrived)
    assert cluster.the_one_sent().request == request_id, "a new request, as far as anybody knows"


def test_acknowledged_ids_are_forgotten_some_time_after_the_acknowledgement():
    """What its client had sent before may still be under way, but its client asks no more: no need to wait for the deadline."""
    cluster = a_cluster("w1")
    request_id = cluster.submit(budget_s=3000.0)
    asked = cluster.arrived
    cluster.finish(cluster.the_one_sent())
    cluster.tell(ev.OutcomeAcknowledged(request_id=request_id))
    cluster.wait(REMEMBER_S - 1)
    assert cluster.tell(asked) == [], "it was on its way when the answer was acknowledged"
    cluster.tell(ev.OutcomeAcknowledged(request_id=RequestId(ANNE, 99)))
    assert cluster.tell(asked) == []
    cluster.wait(1)
    cluster.tell(ev.OutcomeAcknowledged(request_id=RequestId(ANNE, 99)))
    assert len(cluster.scheduler._ended) == len(cluster.scheduler._due) == 0
    cluster.tell(asked)
    assert cluster.the_one_sent().request == request_id, "a new request, as far as anybody knows"


def test_results_that_were_dropped_for_their_size_are_computed_again():
    cluster = a_cluster("w1", max_kept_bytes=10)
    first = cluster.submit(budget_s=30.0)
    asked_first, sent_first = cluster.arrived, cluster.the_one_sent()
    cluster.finish(sent_first, size_bytes=6)
    cluster.submit()
    asked_second = cluster.arrived
    cluster.finish(cluster.the_one_sent(), size_bytes=6)
    assert cluster.scheduler.kept_bytes == 6
    cluster.taken()
    (kept,) = cluster.tell(asked_second)
    assert isinstance(kept, ev.Answer), "the newer one is there"
    cluster.taken()
    cluster.wait(20)
    cluster.tell(asked_first)
    again = cluster.the_one_sent()
    assert again.request == first and again.attempt.generation != sent_first.attempt.generation, "a worker may still have the earlier one"
    cluster.wait(10 + REMEMBER_S + 1)  # the memory of its first end would end while it runs
    (answer,) = only(cluster.finish(again, size_bytes=6), ev.Answer)
    assert answer.request_id == first
    assert cluster.tell(asked_first) == [answer]


def test_an_answer_to_an_earlier_run_is_none_to_the_run_after_a_dropped_result():
    cluster = a_cluster("w1", "w2", max_kept_bytes=10)
    first = cluster.submit(budget_s=30.0)
    asked, earlier = cluster.arrived, cluster.the_one_sent()
    cluster.finish(earlier, size_bytes=11)
    cluster.tell(asked)
    again = cluster.the_one_sent()
    cluster.join(earlier.worker, resident=["d.0"], finished=[earlier.attempt])
    assert only(cluster.finish(earlier), ev.Answer) == []
    cluster.wait(TIMEOUT_S - 1)
    (answer,) = only(cluster.finish(Sent(again.worker, again.attempt, again.action)), ev.Answer)
    assert answer.request_id == first
    cluster.assert_idle()


def test_an_attempt_of_an_earlier_reign_is_none_of_this_one():
    before = a_cluster("w1", places=("w1",))
    before.submit()
    earlier = before.the_one_sent()
    cluster = Cluster()
    cluster.scheduler = Scheduler(cluster.scheduler.settings, random=Random(0), generation=1000)
    for worker in ("w1", "w2"):
        cluster.join(worker, resident=["d.0"], finished=[earlier.attempt] if worker == "w1" else ())
    cluster.deploy("w1 w2")
    cluster.submit()
    sent = cluster.the_one_sent()
    assert sent.request == earlier.request
    assert cluster.tell(ev.AttemptCancelled(worker_id=WorkerId("w1"), attempt=earlier.attempt)) == [
        ev.Acknowledge(worker_id=WorkerId("w1"), attempt=earlier.attempt)
    ]
    assert cluster.slots(sent.worker) == 1
    assert only(cluster.finish(sent), ev.Answer)


def test_after_a_stall_an_id_is_remembered_for_a_while_and_the_loop_does_not_spin():
    cluster = a_cluster("w1")
    cluster.submit(budget_s=10.0)
    asked = cluster.arrived
    cluster.now += 10.0 + 2 * REMEMBER_S
    assert only(cluster.scheduler.tick(cluster.now), ev.Fail)
    assert cluster.scheduler.next_wakeup() > cluster.now
    (fail,) = cluster.tell(asked)
    assert isinstance(fail.error, DeadlineExceededError)


def test_a_result_above_the_limit_is_sent_and_not_kept():
    cluster = a_cluster("w1", max_kept_bytes=10)
    cluster.submit()
    assert only(cluster.finish(cluster.the_one_sent(), size_bytes=11), ev.Answer)
    assert (cluster.scheduler.kept_bytes, cluster.scheduler.unacknowledged) == (0, 0)


# ── cancelling ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_cancel_calls_off_what_runs_and_says_nothing():
    cluster = a_cluster("w1")
    request_id = cluster.submit()
    sent = cluster.the_one_sent()
    assert cluster.tell(ev.RequestCancelled(request_id=request_id)) == [ev.Cancel(worker_id=WorkerId("w1"), attempt=sent.attempt)]
    assert (cluster.scheduler.live_requests, cluster.scheduler.reserved_bytes) == (0, 0)
    assert only(cluster.finish(sent), ev.Answer) == [], "it had been finished before it could be cancelled"
    assert cluster.tell(cluster.arrived) == []
    cluster.assert_idle()


def test_a_cancel_before_the_request_prevents_it():
    cluster = a_cluster("w1")
    cluster.tell(ev.RequestCancelled(request_id=RequestId(ANNE, 1)))
    cluster.wait(EARLY_CANCEL_S - 1)
    assert cluster.submit() == RequestId(ANNE, 1)
    assert cluster.taken() == []
    cluster.assert_idle()
    cluster.wait(1)
    assert cluster.scheduler._ended.get(RequestId(ANNE, 1)) is None, "not for ever"


def test_a_cancelled_request_leaves_no_bytes_in_the_queue():
    """Nobody can run anything; what is cancelled is reserved no more, so it must not be retained either."""
    cluster = a_cluster("w1")
    cluster.lose("w1")
    for _ in range(5):
        request_id = cluster.submit(size_bytes=1000)
    keeper = RequestId(ANNE, 1)
    for sequence in range(2, request_id.sequence + 1):
        cluster.tell(ev.RequestCancelled(request_id=RequestId(ANNE, sequence)))
    held = {id(entry[3]): entry[3] for heap in cluster.scheduler._queues._heaps.values() for entry in heap}
    assert cluster.scheduler._requests.keys() == {keeper}
    assert sum(request.activation.size_bytes for request in held.values()) <= cluster.scheduler.reserved_bytes == 1000


def test_the_requests_of_a_client_that_stays_away_are_cancelled():
    cluster = a_cluster("w1")
    cluster.submit(client=ANNE)
    of_bert = cluster.submit(client=BERT)
    cluster.taken()
    cluster.tell(ev.ClientDisconnected(client_id=ANNE))
    cluster.tell(ev.ClientDisconnected(client_id=BERT))
    cluster.wait(CLIENT_GRACE_S - 1)
    cluster.tell(ev.ClientArrived(client_id=BERT))
    assert cluster.scheduler.live_requests == 2
    assert [action.attempt.request.client for action in only(cluster.wait(1), ev.Cancel)] == [ANNE]
    assert list(cluster.scheduler._requests) == [of_bert]
    cluster.tell(ev.ClientLeft(client_id=BERT))
    assert cluster.scheduler.live_requests == 0


# ── losses ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_a_lost_worker_held_is_dispatched_again_at_once():
    """Regression: in the published system a dictionary changed while recovery walked over it; here every task is found."""
    cluster = Cluster()
    for worker in ("w1", "w2"):
        cluster.join(worker, credit=50)
    cluster.deploy("w1 w2", "w1 w2", cost_s=AHEAD_S / 100)
    for _ in range(40):
        cluster.submit()
    sent = cluster.sent()
    for one in sent[:10]:
        cluster.finish(one, busy_s=AHEAD_S / 100)
    lost = [one for one in [*sent[10:], *cluster.sent()] if one.worker == "w1"]
    assert len(lost) > 10 and {one.attempt.stage for one in lost} == {0, 1}
    cluster.lose("w1")
    again = cluster.sent()
    assert sorted(one.attempt.task for one in again) == sorted(one.attempt.task for one in lost)
    assert {one.worker for one in again} == {"w2"} and {one.attempt.attempt for one in again} == {2}
    assert cluster.slots("w1") == 0
    assert cluster.scheduler.counters["tasks_lost"] == len(lost)


def test_a_lost_connection_makes_a_suspect_and_after_the_grace_a_loss():
    cluster = a_cluster("w1", "w2")
    cluster.lose("w1")
    assert cluster.verdict("w1") is Verdict.SUSPECT
    cluster.submit()
    assert cluster.the_one_sent().worker == "w2", "a suspect gets nothing new"
    (accept, changed, evict) = cluster.wait(GRACE_S)
    assert isinstance(accept, ev.Accept)
    assert isinstance(changed, ev.PlanChanged) and changed.version.plan.places == (("w2",),)
    assert isinstance(evict, ev.Evict) and evict.worker_id == "w1"
    assert cluster.verdict("w1") is Verdict.LOST
    assert cluster.scheduler.counters["evictions"] == 1


def test_a_worker_that_is_back_within_the_grace_keeps_its_place():
    cluster = a_cluster("w1", "w2")
    cluster.lose("w1")
    cluster.wait(GRACE_S - 1)
    cluster.silent.clear()
    actions = cluster.join("w1", resident=["d.0"])
    assert actions == [ev.Trust(worker_id=WorkerId("w1"))]
    assert cluster.wait(10 * GRACE_S) == []
    assert cluster.verdict("w1") is Verdict.READY


def test_a_silent_worker_keeps_its_tasks_while_others_try_them():
    cluster = a_cluster("w1", "w2")
    cluster.submit()
    first = cluster.the_one_sent()
    cluster.silent.add(first.worker)
    actions = cluster.wait(SILENCE_S)
    assert cluster.verdict(first.worker) is Verdict.SUSPECT
    assert only(actions, ev.Cancel) == [ev.Cancel(worker_id=WorkerId(first.worker), attempt=first.attempt)]
    assert cluster.the_one_sent().worker != first.worker
    assert cluster.slots(first.worker) == 1, "it may be there still"
    assert only(cluster.finish(first), ev.Answer), "and its answer is as good as any"


def test_it_is_told_who_is_suspected_and_why_and_who_is_heard_again():
    cluster = a_cluster("w1", "w2")
    cluster.silent.add("w1")
    silent = ev.Suspect(worker_id=WorkerId("w1"), reason=f"it has been silent for {SILENCE_S:g} s")
    assert only(cluster.wait(SILENCE_S), ev.Suspect) == [silent]
    assert only(cluster.wait(SILENCE_S / 2), ev.Suspect) == [], "once"
    cluster.silent.clear()
    cluster.taken()
    cluster.wait(SILENCE_S / 2)
    assert cluster.taken(ev.Trust) == [ev.Trust(worker_id=WorkerId("w1"))]
    cluster.lose("w2")
    assert cluster.taken(ev.Suspect) == [ev.Suspect(worker_id=WorkerId("w2"), reason="its connection is down")]
    cluster.silent.add("w1")
    cluster.tell(ev.LeaseEnded(worker_id=WorkerId("w1")))
    (evicted,) = [evict for evict in only(cluster.wait(SILENCE_S), ev.Evict) if evict.worker_id == "w1"]
    assert evicted.reason == f"its lease has ended, and it has been silent for {SILENCE_S:g} s"


def test_who_waits_for_a_worker_that_falls_silent_is_given_another():
    """The only thing on w1 is of a request that was cancelled: nothing but the silence itself can wake the queue."""
    cluster = Cluster()
    cluster.join("w1", credit=1)
    cluster.deploy("w1")
    request_id = cluster.submit()
    cluster.tell(ev.RequestCancelled(request_id=request_id))
    cluster.submit()
    cluster.join("w2", budget=0)
    cluster.scheduler.roster.member(WorkerId("w2")).stage_budget_bytes = 100
    cluster.silent.add("w1")
    cluster.taken()
    assert only(cluster.wait(SILENCE_S), ev.Load) == [ev.Load(worker_id=WorkerId("w2"), artifact=Digest("d.0"))]


def test_the_lease_decides_about_a_silent_worker_and_not_about_one_that_works():
    cluster = a_cluster("w1", "w2")
    for worker in ("w1", "w2"):
        cluster.tell(ev.LeaseEnded(worker_id=WorkerId(worker)))
    assert cluster.taken(ev.Evict) == [], "a stalled registry removes nobody who works"
    cluster.silent.add("w1")
    assert [evict.worker_id for evict in only(cluster.wait(SILENCE_S), ev.Evict)] == ["w1"]
    assert (cluster.verdict("w1"), cluster.verdict("w2")) == (Verdict.LOST, Verdict.READY)


def test_a_lost_worker_is_shown_for_a_while_and_forgotten():
    cluster = a_cluster("w1")
    cluster.lose("w1")
    cluster.wait(GRACE_S + MEMBER_MEMORY_S - 1)
    assert WorkerId("w1") in cluster.scheduler.roster
    cluster.wait(1)
    assert WorkerId("w1") not in cluster.scheduler.roster


def test_a_lost_worker_that_came_back_is_not_forgotten():
    cluster = a_cluster("w1")
    cluster.lose("w1")
    cluster.wait(GRACE_S + 1)
    cluster.silent.clear()
    cluster.join("w1")
    cluster.wait(MEMBER_MEMORY_S + 10)
    assert cluster.verdict("w1") is Verdict.READY


def test_a_stage_whose_workers_are_gone_is_moved_and_the_request_goes_on():
    cluster = a_cluster("w1", "w2", places=("w1", "w2"))
    cluster.submit()
    cluster.finish(cluster.the_one_sent())
    first = cluster.the_one_sent()
    assert first.worker == "w2"
    actions = cluster.lose("w2")
    assert only(actions, ev.Load) == [ev.Load(worker_id=WorkerId("w1"), artifact=Digest("d.1"))]
    assert cluster.sent() == []
    cluster.load()
    second = cluster.the_one_sent()
    assert (second.worker, second.attempt.stage) == ("w1", 1)
    assert only(cluster.finish(second), ev.Answer)


def test_a_request_waits_for_a_worker_and_goes_when_one_comes():
    cluster = a_cluster("w1")
    cluster.lose("w1")
    cluster.wait(GRACE_S)
    request_id = cluster.submit(budget_s=50.0)
    assert cluster.sent() == []
    cluster.join("w2")
    assert cluster.taken(ev.Load) == [ev.Load(worker_id=WorkerId("w2"), artifact=Digest("d.0"))]
    cluster.load()
    assert cluster.the_one_sent().request == request_id


def test_a_stage_that_is_resident_because_of_another_deployment_is_used_at_once():
    """Versions of one model share their artifacts; no `StageResident` will come that could wake the queue."""
    cluster = Cluster()
    for worker in ("w1", "w2"):
        cluster.join(worker)
    stage = StageNeed(artifact=Digest("same"), memory_bytes=10, cost_s=1.0)
    for name, worker in (("d", "w1"), ("e", "w2")):
        plan = Plan(program=Digest("same"), epoch=Epoch(1), stages=(stage,), places=((WorkerId(worker),),))
        version = ev.Version(deployment=name, number=1, program=Digest("same"), codec="raw", tolerance=None, exact=False, plan=plan)
        cluster.tell(ev.VersionDeployed(version=version))
        cluster.load()
    cluster.submit(name="e")
    assert cluster.the_one_sent().worker == "w2"
    cluster.lose("w2")
    assert cluster.the_one_sent().worker == "w1"


def test_what_is_deployed_while_a_worker_is_silent_is_loaded_when_it_is_heard():
    cluster = Cluster()
    cluster.join("w1")
    cluster.silent.add("w1")
    cluster.wait(SILENCE_S)
    cluster.deploy("w1", load=False)
    assert cluster.taken(ev.Load) == []
    cluster.silent.clear()
    cluster.wait(1)
    assert cluster.taken(ev.Load) == [ev.Load(worker_id=WorkerId("w1"), artifact=Digest("d.0"))]


# ── hello, and what the two sides think of one another ───────────────────────────────────────────────────────────────


def test_what_the_hello_does_not_list_is_dispatched_again_and_what_it_lists_is_not():
    cluster = a_cluster("w1")
    cluster.submit()
    cluster.submit()
    gone, held = cluster.sent()
    cluster.join("w1", resident=["d.0"], held=[held.attempt])
    again = cluster.the_one_sent()
    assert again.attempt.task == gone.attempt.task and again.attempt.attempt == 2
    assert cluster.slots("w1") == 2
    assert only(cluster.finish(held), ev.Answer)


def test_what_was_finished_during_a_break_is_waited_for_and_not_run_again():
    cluster = a_cluster("w1", "w2")
    cluster.submit()
    first = cluster.the_one_sent()
    other = "w2" if first.worker == "w1" else "w1"
    cluster.lose(other)  # nobody else
    cluster.lose(first.worker)
    cluster.silent.clear()
    cluster.join(first.worker, resident=["d.0"], finished=[first.attempt])
    assert cluster.sent() == []
    assert cluster.slots(first.worker) == 1
    (answer,) = only(cluster.finish(first), ev.Answer)
    assert answer.attempts == 1
    cluster.assert_idle()


def test_what_the_hello_lists_was_never_lost():
    cluster = a_cluster("w1")
    cluster.submit()
    cluster.submit()
    held, finished = cluster.sent()
    cluster.join("w1", resident=["d.0"], held=[held.attempt], finished=[finished.attempt])
    assert cluster.scheduler.counters["tasks_lost"] == 0
    assert cluster.sent() == [] and cluster.slots("w1") == 2


def test_what_was_queued_again_and_turns_up_in_a_hello_leaves_the_queue():
    cluster = Cluster()
    for worker in ("w1", "w2"):
        cluster.join(worker, credit=1)
    cluster.deploy("w1 w2")
    cluster.submit()
    cluster.submit()
    on_w1, on_w2 = cluster.sent()
    cluster.lose("w1")
    assert cluster.sent() == [], "w2 is full"
    cluster.silent.clear()
    cluster.join("w1", resident=["d.0"], finished=[on_w1.attempt])
    cluster.finish(on_w2)
    assert cluster.sent() == []
    assert only(cluster.finish(on_w1), ev.Answer)


def test_what_had_timed_out_and_turns_up_in_a_hello_is_waited_for_anew():
    cluster = Cluster()
    for worker in ("w1", "w2"):
        cluster.join(worker, credit=1)
    cluster.deploy("w1 w2")
    request_id = cluster.submit()
    cluster.submit()
    on_w1, _ = cluster.sent()
    cluster.wait(TIMEOUT_S)
    request = cluster.scheduler._requests[request_id]
    assert request.ticket and not request.is_waited_for
    cluster.join("w1", resident=["d.0"], held=[on_w1.attempt])
    assert request.is_waited_for and not request.ticket
    timeouts = cluster.scheduler.counters["attempt_timeouts"]
    cluster.wait(TIMEOUT_S)
    assert cluster.scheduler.counters["attempt_timeouts"] > timeouts


def test_what_nobody_wants_any_more_is_called_off_after_a_hello():
    cluster = a_cluster("w1")
    request_id = cluster.submit()
    sent = cluster.the_one_sent()
    cluster.lose("w1")
    cluster.tell(ev.RequestCancelled(request_id=request_id))
    cluster.silent.clear()
    actions = cluster.join("w1", resident=["d.0"], held=[sent.attempt])
    assert only(actions, ev.Cancel) == [ev.Cancel(worker_id=WorkerId("w1"), attempt=sent.attempt)]
    assert cluster.slots("w1") == 1, "it does occupy the worker"
    cluster.tell(ev.AttemptCancelled(worker_id=WorkerId("w1"), attempt=sent.attempt))
    cluster.assert_idle()


def test_a_hello_that_was_not_preceded_by_a_loss_starts_the_loads_afresh():
    """The dispatcher tells of a new session of a process only by its hello. The old load must not time out in the new one."""
    cluster = Cluster()
    for worker in ("w1", "w2"):
        cluster.join(worker)
    cluster.deploy("w1", load=False)
    cluster.taken()
    cluster.wait(LOAD_TIMEOUT_S - 1)
    cluster.join("w1", resident=["d.0"])
    assert cluster.wait(LOAD_TIMEOUT_S) == []
    cluster.submit()
    assert cluster.the_one_sent().worker == "w1"


def test_a_load_without_progress_is_given_to_another_worker():
    cluster = Cluster()
    for worker in ("w1", "w2"):
        cluster.join(worker)
    cluster.deploy("w1", load=False)
    cluster.taken()
    cluster.wait(LOAD_TIMEOUT_S - 1)
    cluster.tell(ev.LoadProgressed(worker_id=WorkerId("w1"), artifact=Digest("d.0")))
    assert cluster.wait(LOAD_TIMEOUT_S - 1) == []
    assert only(cluster.wait(1), ev.Load) == [ev.Load(worker_id=WorkerId("w2"), artifact=Digest("d.0"))]


def test_spares_come_back_by_themselves():
    cluster = a_cluster("w1", "w2", places=("w1",))
    cluster.load("w2")
    spare = {"worker_id": WorkerId("w2"), "artifact": Digest("d.0")}
    assert cluster.tell(ev.RoomWanted(worker_id=WorkerId("w2"))) == [ev.Unload(**spare)]
    assert cluster.wait(SPARELESS_S - 1) == []
    assert cluster.wait(1) == [ev.Load(**spare)]
    cluster.tell(ev.StageRefused(worker_id=WorkerId("w2"), artifact=Digest("d.0"), error=AdaptError("disk full")))
    assert cluster.wait(REFUSED_S) == [ev.Load(**spare)]


def test_a_worker_that_could_not_load_a_stage_is_asked_again_after_a_while():
    """Its disk was full for a moment; nobody else is left, and requests wait."""
    cluster = a_cluster("w1", "w2", places=("w1",), spares=0)
    cluster.lose("w1")
    cluster.wait(GRACE_S)
    cluster.submit(budget_s=500.0)
    assert only(cluster.taken(), ev.Load) == [ev.Load(worker_id=WorkerId("w2"), artifact=Digest("d.0"))]
    cluster.tell(ev.StageRefused(worker_id=WorkerId("w2"), artifact=Digest("d.0"), error=AdaptError("disk full")))
    assert only(cluster.wait(REFUSED_S - 1), ev.Load) == []
    assert only(cluster.wait(1), ev.Load) == [ev.Load(worker_id=WorkerId("w2"), artifact=Digest("d.0"))]
    cluster.load()
    assert cluster.the_one_sent().worker == "w2"


def test_a_load_that_nobody_can_do_fails_the_version_with_its_reason():
    cluster = Cluster()
    cluster.join("w1")
    cluster.deploy("w1", load=False)
    (failed,) = only(cluster.wait(LOAD_TIMEOUT_S), ev.VersionFailed)
    assert isinstance(failed.error, AttemptTimeoutError)


def test_what_falls_due_while_the_dispatcher_stands_still_is_nobodys_fault_but_deadlines_stay():
    cluster = a_cluster("w1", "w2")
    cluster.submit(budget_s=32.0)
    sent = cluster.the_one_sent()
    due = cluster.scheduler.next_wakeup()
    cluster.now += 28.0  # longer than silence, grace and the attempt's timeout
    cluster.scheduler.excuse(cluster.now - due)
    assert only(cluster.scheduler.tick(cluster.now), ev.Evict) == []
    assert [cluster.verdict(worker) for worker in ("w1", "w2")] == [Verdict.READY, Verdict.READY]
    assert cluster.scheduler.counters["attempt_timeouts"] == 0
    cluster.taken()
    cluster.wait(5)
    assert isinstance(cluster.the_error(), DeadlineExceededError)
    assert only(cluster.finish(sent), ev.Answer) == []


# ── a socket that takes nothing ──────────────────────────────────────────────────────────────────────────────────────


def test_a_send_that_is_refused_costs_no_time_and_no_attempt():
    """Regression: in the published system a failed send cost the whole timeout."""
    cluster = a_cluster("w1", "w2")
    cluster.submit()
    first = cluster.the_one_sent()
    cluster.tell(ev.DispatchRefused(worker_id=WorkerId(first.worker), attempt=first.attempt))
    second = cluster.the_one_sent()
    assert second.worker != first.worker
    assert cluster.slots(first.worker) == 0 and cluster.verdict(first.worker) is Verdict.SUSPECT
    (answer,) = only(cluster.finish(second), ev.Answer)
    assert answer.attempts == 1, "the first never started"


def test_refused_sends_do_not_use_up_the_failures():
    cluster = a_cluster("w1", max_failures=2)
    cluster.submit()
    for _ in range(5):
        sent = cluster.the_one_sent()
        cluster.tell(ev.DispatchRefused(worker_id=WorkerId("w1"), attempt=sent.attempt))
        cluster.join("w1", resident=["d.0"])
    assert cluster.scheduler.live_requests == 1


def test_a_worker_rests_for_the_cooldown_after_each_task():
    """The published rule: two seconds after an assignment nothing new goes to that worker, however soon it is done."""
    cluster = a_cluster("w1", "w2", cooldown_s=2.0, hedge_share=0.0)
    for _ in range(3):
        cluster.submit()
    first, second = cluster.sent()
    assert {first.worker, second.worker} == {"w1", "w2"}
    cluster.finish(first)
    assert cluster.sent() == []
    cluster.wait(1.9)
    assert cluster.sent() == []
    cluster.wait(0.1)
    assert cluster.the_one_sent().worker == first.worker


# ── hedges ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def a_hedging_cluster(share: float, *workers: str, **settings) -> Cluster:
    """Each worker has run five tasks of one second, and is known."""
    cluster = a_cluster(*workers, hedge_share=share, **settings)
    for _ in range(5 * len(workers)):
        for _ in workers:
            cluster.submit()
        cluster.wait(1)
        for sent in cluster.sent():
            cluster.finish(sent)
    cluster.taken()
    return cluster


def test_what_takes_longer_than_usual_is_tried_by_an_idle_worker_too_and_the_first_answer_wins():
    cluster = a_hedging_cluster(0.5, "w1", "w2")
    cluster.submit()
    first = cluster.the_one_sent()
    cluster.begin(first)
    hedges = []
    while not hedges:
        cluster.wait(0.1)
        hedges = cluster.sent()
    (second,) = hedges
    assert second.worker != first.worker and cluster.now < first.action.budget_s
    actions = cluster.finish(second)
    assert len(only(actions, ev.Answer)) == 1
    assert [cancel.attempt for cancel in only(actions, ev.Cancel)] == [first.attempt]
    assert only(cluster.finish(first), ev.Answer) == []
    assert (cluster.scheduler.counters["hedges"], cluster.scheduler.counters["retries"]) == (1, 0)
    cluster.assert_idle()


def test_no_hedge_is_made_without_a_share_without_an_idle_worker_or_twice():
    cluster = a_hedging_cluster(0.0, "w1", "w2")
    cluster.submit()
    cluster.begin(cluster.the_one_sent())
    cluster.wait(1.9)
    assert cluster.sent() == []
    cluster = a_hedging_cluster(0.5, "w1", "w2")
    for _ in range(2):
        cluster.submit()
    for sent in cluster.sent():
        cluster.begin(sent)
    cluster.wait(1.9)
    assert cluster.sent() == [], "both are busy"
    cluster = a_hedging_cluster(0.5, "w1", "w2", "w3")
    cluster.submit()
    cluster.begin(cluster.the_one_sent())
    cluster.wait(1.5)
    (second,) = cluster.sent()
    cluster.begin(second)
    cluster.wait(1.9)
    assert cluster.scheduler.counters["hedges"] == 1


def test_a_worker_that_has_nothing_to_do_only_later_tries_then():
    cluster = a_hedging_cluster(0.5, "w1", "w2", min_attempt_timeout_s=20.0)
    for _ in range(2):
        cluster.submit()
    stuck, other = cluster.sent()
    for sent in (stuck, other):
        cluster.begin(sent)
    cluster.wait(5)
    assert cluster.sent() == [], "both are busy"
    cluster.finish(other)
    assert cluster.sent() == []
    cluster.wait(2)
    (second,) = cluster.sent()
    assert (second.request, second.worker) == (stuck.request, other.worker)


def test_hedges_are_a_share_of_all_tasks():
    cluster = a_hedging_cluster(0.05, "w1", "w2")
    cluster.scheduler._hedges = 0.0
    learnt = {member.worker_id: copy.deepcopy(member.services) for member in cluster.scheduler.roster}
    for _ in range(45):
        request = cluster.submit()
        first = cluster.the_one_sent()
        cluster.begin(first)
        cluster.wait(1.8)
        cluster.tell(ev.RequestCancelled(request_id=request))
        for sent in (first, *cluster.sent()):
            cluster.tell(ev.AttemptCancelled(worker_id=WorkerId(sent.worker), attempt=sent.attempt))
        for member in cluster.scheduler.roster:
            member.services = copy.deepcopy(learnt[member.worker_id])  # the usual time is always the same
    assert cluster.scheduler.counters["hedges"] == 2


def test_a_worker_that_was_always_outrun_is_known_to_be_slow():
    """Regression: nothing was learnt of tasks that were called off because another had answered first, so that it was chosen again and again."""
    cluster = a_hedging_cluster(0.5, "w1", "w2")
    for _ in range(12):
        cluster.submit()
        first = cluster.the_one_sent()
        cluster.begin(first)
        if first.worker == "w1":
            while not (hedges := cluster.sent()):
                cluster.wait(0.1)
            cluster.finish(hedges[0])
            cluster.wait(3)
            cluster.tell(ev.AttemptCancelled(worker_id=WorkerId("w1"), attempt=first.attempt))
        else:
            cluster.finish(first)
    assert cluster.scheduler.counters["hedges"] == 1


# ── drain and departure ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_draining_worker_finishes_what_it_has_begun_and_gets_nothing_new():
    cluster = a_cluster("w1", "w2")
    cluster.lose("w2")
    cluster.submit()
    cluster.submit()
    begun, waiting = cluster.sent()
    cluster.silent.clear()
    cluster.join("w2", resident=["d.0"])
    cluster.tell(ev.WorkerDraining(worker_id=WorkerId("w1"), handed_back=frozenset({waiting.attempt})))
    again = cluster.the_one_sent()
    assert (again.worker, again.request) == ("w2", waiting.request)
    assert only(cluster.finish(begun), ev.Answer)
    for _ in range(3):
        cluster.submit()
    assert {one.worker for one in cluster.sent()} == {"w2"}
    cluster.tell(ev.WorkerDisconnected(worker_id=WorkerId("w1"), reason="it said goodbye"))
    cluster.silent.add("w1")
    actions = cluster.tell(ev.WorkerLeft(worker_id=WorkerId("w1")))
    assert [action.version.plan.places for action in only(actions, ev.PlanChanged)] == [(("w2",),)]
    assert only(cluster.wait(10 * GRACE_S), ev.Evict) == []
    assert cluster.scheduler.counters["evictions"] == 0, "who leaves by intent is not evicted"


def test_a_draining_dispatcher_finishes_what_lives_and_takes_nothing_new():
    cluster = a_cluster("w1")
    cluster.submit()
    sent = cluster.the_one_sent()
    cluster.tell(ev.DrainBegun())
    cluster.submit()
    assert isinstance(cluster.the_error(), OverloadedError)
    assert only(cluster.finish(sent), ev.Answer)


# ── numeric classes ──────────────────────────────────────────────────────────────────────────────────────────────────


def two_classes(*, stages: int = 2) -> Cluster:
    cluster = Cluster()
    for worker, numeric_class in (("a1", "avx"), ("a2", "avx"), ("b1", "arm")):
        cluster.join(worker, numeric_class=numeric_class, credit=4)
    cluster.deploy(*["a1 a2 b1"] * stages)
    cluster.taken()
    return cluster


def test_an_exact_request_stays_within_the_class_of_its_first_dispatch():
    cluster = two_classes(stages=4)
    cluster.submit(exact=True)
    workers = []
    while sent := cluster.sent():
        workers.append(sent[0].worker)
        finished = cluster.finish(sent[0])
    assert set(workers) == {"a1", "a2"} and len(workers) == 4
    (answer,) = only(finished, ev.Answer)
    assert answer.numeric_classes == ("avx",)


def test_a_request_that_need_not_be_exact_names_the_classes_it_met():
    cluster = two_classes(stages=3)
    cluster.submit()
    while sent := cluster.sent():
        finished = cluster.finish(sent[0])
    (answer,) = only(finished, ev.Answer)
    assert answer.numeric_classes == ("arm", "avx")


@pytest.mark.parametrize("who", ["request", "version"])
def test_an_exact_request_of_whose_class_nobody_is_left_starts_again_in_another(who):
    cluster = two_classes()
    if who == "version":
        cluster.deploy(*["a1 a2 b1"] * 2, number=2, exact=True)
    cluster.taken()
    request = cluster.submit(exact=who == "request", size_bytes=5)
    first = cluster.the_one_sent()
    cluster.finish(first, size_bytes=9)
    second = cluster.the_one_sent()
    cluster.lose("a1")
    cluster.lose("a2")
    assert cluster.taken(ev.Fail, ev.Dispatch) == [], "they may come back"
    cluster.wait(GRACE_S)
    again = cluster.the_one_sent()
    assert (again.worker, again.request, again.attempt.stage) == ("b1", request, 0)
    assert again.attempt.generation != first.attempt.generation
    assert again.action.input.size_bytes == 5, "from the input on"
    cluster.silent.clear()
    cluster.join(second.worker, numeric_class="avx", resident=["d.0", "d.1"], finished=[second.attempt])
    assert only(cluster.finish(second), ev.Answer) == [], "of an earlier start"
    cluster.finish(again)
    (answer,) = only(cluster.finish(cluster.the_one_sent()), ev.Answer)
    assert answer.numeric_classes == ("arm",)
    assert cluster.scheduler.counters["restarts"] == 1
    cluster.assert_idle()


def test_an_exact_request_is_given_to_a_suspect_of_its_class_that_returns():
    cluster = two_classes(stages=1)
    cluster.submit(exact=True)
    first = cluster.the_one_sent()
    for worker in ("a1", "a2"):
        cluster.lose(worker)
    assert [one.worker for one in cluster.sent()] == ["a2"]
    cluster.silent.clear()
    cluster.join("a2", numeric_class="avx", resident=["d.0"])
    assert (second := cluster.the_one_sent()).worker == "a2" and second.attempt.task == first.attempt.task


def test_an_exact_request_for_which_nothing_was_computed_yet_may_change_its_class():
    cluster = two_classes(stages=1)
    cluster.submit(exact=True)
    assert cluster.the_one_sent().worker in ("a1", "a2")
    cluster.lose("a1")
    cluster.lose("a2")
    cluster.taken()
    cluster.silent.clear()
    cluster.wait(GRACE_S)
    assert cluster.slots("b1") == 1 and cluster.taken(ev.Fail) == []


def test_an_exact_request_that_has_met_no_worker_yet_waits_for_any():
    cluster = a_cluster("w1")
    cluster.lose("w1")
    cluster.wait(GRACE_S)
    cluster.submit(exact=True)
    assert cluster.taken(ev.Fail) == []
    cluster.join("w2", numeric_class="y", resident=["d.0"])
    assert cluster.the_one_sent().worker == "w2"


def test_an_exact_request_that_waits_for_its_class_does_not_hold_up_the_others():
    """The head of the queue may only go to a2, which is full; b1 is free, and the next one may go there."""
    cluster = Cluster()
    for worker, numeric_class in (("a1", "avx"), ("a2", "avx"), ("b1", "arm")):
        cluster.join(worker, numeric_class=numeric_class, credit=1)
    cluster.deploy("a1 a2 b1")
    pinned = cluster.submit(exact=True, budget_s=50.0)
    for _ in range(2):
        cluster.submit()
    on_a1, on_a2, on_b1 = cluster.sent()
    assert [(one.worker, one.request == pinned) for one in (on_a1, on_a2, on_b1)] == [("a1", True), ("a2", False), ("b1", False)]
    cluster.lose("a1")
    next_one = cluster.submit(budget_s=90.0)
    assert cluster.sent() == []
    cluster.finish(on_b1)
    sent = cluster.the_one_sent()
    assert (sent.request, sent.worker) == (next_one, "b1")
    cluster.finish(on_a2)
    sent = cluster.the_one_sent()
    assert (sent.request, sent.worker) == (pinned, "a2")


def test_an_exact_request_without_a_worker_does_not_hold_up_the_others():
    cluster = Cluster()
    for worker, numeric_class in (("a1", "avx"), ("b1", "arm")):
        cluster.join(worker, numeric_class=numeric_class, credit=1)
    cluster.deploy("a1 b1")
    cluster.submit(exact=True, budget_s=50.0)
    cluster.submit()
    on_a1, on_b1 = cluster.sent()
    assert (on_a1.worker, on_b1.worker) == ("a1", "b1")
    cluster.lose("a1")
    next_one = cluster.submit(budget_s=90.0)
    cluster.finish(on_b1)
    assert cluster.the_one_sent().request == next_one


# ── admission ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_admission_reserves_what_the_plan_may_retain_at_its_peak():
    cluster = Cluster(max_retained_bytes=100)
    cluster.join("w1")
    cluster.deploy("w1", "w1", peak_ratio=20.0)
    cluster.submit(size_bytes=3)
    sent = cluster.the_one_sent()
    assert cluster.scheduler.reserved_bytes == 60
    cluster.submit(size_bytes=3)
    error = cluster.the_error()
    assert isinstance(error, OverloadedError) and error.retry_after_s > 0.0
    assert cluster.scheduler.counters["requests_refused"] == 1
    cluster.finish(sent, size_bytes=80)  # more than was foreseen: it is there, so it counts
    assert cluster.scheduler.reserved_bytes == 80
    cluster.finish(cluster.the_one_sent())
    cluster.assert_idle()


def test_a_ratio_below_one_reserves_the_input_all_the_same():
    cluster = Cluster()
    cluster.join("w1")
    cluster.deploy("w1", peak_ratio=0.1)
    cluster.submit(size_bytes=50)
    assert cluster.scheduler.reserved_bytes == 50


def test_there_are_never_more_requests_than_allowed():
    cluster = a_cluster("w1", max_requests=2)
    requests = [cluster.submit() for _ in range(3)]
    assert [fail.request_id for fail in cluster.taken(ev.Fail)] == requests[2:]
    cluster.tell(ev.RequestCancelled(request_id=requests[0]))
    cluster.submit()
    assert cluster.taken(ev.Fail) == []


# ── versions ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_request_stays_with_the_version_that_accepted_it():
    cluster = a_cluster("w1", places=("w1", "w1"))
    old = cluster.submit()
    sent = cluster.the_one_sent()
    cluster.deploy("w1", "w1", number=2)
    cluster.taken()
    cluster.finish(sent)
    assert cluster.the_one_sent().request == old
    new = cluster.submit()
    accepted = {accept.request_id: accept.version for accept in only(cluster.wait(ACCEPT_S), ev.Accept)}
    assert accepted == {old: 1, new: 2}
    assert [(version.number, is_ready) for version, is_ready in cluster.scheduler.versions()] == [(2, True)]


def test_a_request_that_is_undeployed_is_finished_and_then_its_stages_go():
    cluster = a_cluster("w1")
    cluster.submit()
    sent = cluster.the_one_sent()
    assert cluster.tell(ev.Undeployed(deployment="d")) == []
    kinds = [type(action) for action in cluster.finish(sent)]
    assert kinds == [ev.Acknowledge, ev.Unload, ev.VersionReleased, ev.Answer]
    cluster.submit()
    assert isinstance(cluster.the_error(), UnknownModelError)


# ── the story ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_story_is_bounded_and_holds_no_tensor():
    cluster = a_cluster("w1")
    for _ in range(STORY_LENGTH):
        cluster.submit(size_bytes=1000)
    assert len(cluster.scheduler.story) == STORY_LENGTH
    assert all(isinstance(subject, (str, tuple)) for _, _, subject in cluster.scheduler.story)


def test_an_unknown_event_is_a_bug_that_is_seen():
    with pytest.raises(AssertionError, match="unknown event"):
        Scheduler().handle("something", 0.0)


def test_a_version_names_what_its_program_adds_to_the_numeric_class():
    plan = Plan(program=Digest("p"), epoch=Epoch(1), stages=(), places=())
    plain = ev.Version(deployment="d", number=1, program=Digest("p"), codec="raw", tolerance=None, exact=True, plan=plan)
    folded = replace(plain, arithmetic="channels_last/fold")
    assert plain.classes({"b", "a"}) == ("a", "b")
    assert folded.classes({"b", "a"}) == ("a/channels_last/fold", "b/channels_last/fold")
