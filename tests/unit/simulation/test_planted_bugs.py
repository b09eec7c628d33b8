"""Bugs that were planted into the machines under test: the simulation has to find each within a few seeds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random

import pytest
from msgspec import structs

from adapt.errors import OverloadedError
from adapt.protocol.messages import RunStage
from adapt.protocol.wire import Envelope
from adapt.scheduling import events as ev
from adapt.scheduling.outcome import Outcomes, Resolve
from adapt.scheduling.roster import Member
from adapt.scheduling.scheduler import Scheduler
from adapt.scheduling.session import PeerSession, Step
from adapt.scheduling.settings import SchedulerSettings
from adapt.simulation.dispatcher import Dispatcher
from adapt.simulation.faults import Kind
from adapt.simulation.simulation import Report, Simulation

WITHIN = 100  # seeds


def first_bad(
    make_scheduler: Callable[[SchedulerSettings, Random], Scheduler] | None = None, *, kinds: tuple[Kind, ...], since: int = 0
) -> Report:
    """`since`: the seed to begin with, so that what is rarely hit takes no minutes."""
    for seed in range(since, since + WITHIN):
        options = {} if make_scheduler is None else {"make_scheduler": make_scheduler}
        report = Simulation(seed, kinds=kinds, **options).run()
        if not report.is_good:
            return report
    pytest.fail(f"not found in {WITHIN} seeds")


def made(kind: type[Scheduler]) -> Callable[[SchedulerSettings, Random], Scheduler]:
    return lambda settings, random: kind(settings, random=random, generation=random.getrandbits(32))


# ── in the scheduler ─────────────────────────────────────────────────────────────────────────────────────────────────


class SkipsTheHeapEntry(Scheduler):
    def _dispatch(self, request, member, now, **options):
        super()._dispatch(request, member, now, **options)
        self._due.clear(("attempt", request.attempt_id(len(request.issued))))


class IgnoresCredit(Scheduler):
    def _place(self, request, eligible, waiting_s, now):
        chosen, _ = self._choice.best(request, eligible, waiting_s, now)
        self._dispatch(request, chosen, now)
        return True


class ForgetsTheLostWorkersTasks(Scheduler):
    def _loss(self, member, attempt, reason, now, *, suspects=0):
        self._free(member, attempt, now)


class RetriesWhereItFailed(Scheduler):
    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self._choice.eligible = partial(self._all_but_forgiving, self._choice.eligible)

    def _all_but_forgiving(self, real, request, now):
        failed_on, request.failed_on = request.failed_on, set()
        able = real(request, now)
        request.failed_on = failed_on
        return [member for member in able if member.worker_id in failed_on] or able


class CountsSlotsOfAnEarlierSession(Scheduler):
    def _worker_joined(self, event, now):
        held = event.held | self.roster.member(event.worker_id).slots.keys()
        super()._worker_joined(structs.replace(event, held=held), now)


class DropsACancel(Scheduler):
    def decide(self, now):
        return [action for action in super().decide(now) if not isinstance(action, ev.Cancel)]


class FreesTheSlotAtTimeout(Scheduler):
    def _stop_waiting(self, request, attempt_id, now):
        super()._stop_waiting(request, attempt_id, now)
        attempt = request.attempts.get(attempt_id.attempt)
        if attempt is not None and attempt.is_expired:
            self.roster.member(attempt.worker_id).free(attempt_id, now)


class ForgetsAnIdEarly(Scheduler):
    def _release(self, request, now):
        super()._release(request, now)
        self._due.set(("forget", request.request_id), now + 0.01)


class RefusesAtTheMemoryLimit(Scheduler):
    def _stage_finished(self, event, now):
        if self.reserved_bytes + event.output.size_bytes <= self.settings.max_retained_bytes:
            super()._stage_finished(event, now)
            return
        self._free(self.roster.member(event.worker_id), event.attempt, now)
        request = self._wanted(event.attempt, event.worker_id)
        if request is not None:
            self._fail(request, OverloadedError("no memory is left for it", retry_after_s=1.0), now)


class KeepsAProbeForEver(Scheduler):
    """A half-open breaker's one task, ended without an answer, leaves it waiting for that answer."""

    def _free(self, member, attempt, now):
        is_probed = member.qos._is_probed
        slot = super()._free(member, attempt, now)
        member.qos._is_probed = is_probed
        return slot


class NamesAttemptsAsEarlierReignsDid(Scheduler):
    def __init__(self, settings, *, random, generation):
        super().__init__(settings, random=random)

    def _admit(self, event, now):
        self._generation = -self._arrivals
        super()._admit(event, now)


class BelievesEveryCanary(Scheduler):
    def _agrees(self, request, run, member, digest):
        return True

    def _canary_judged(self, event):
        super()._canary_judged(structs.replace(event, error=None))


class TakesRequestsUntried(Scheduler):
    def _note(self, event, now):
        super()._note(structs.replace(event, canaries=()) if isinstance(event, ev.VersionDeployed) else event, now)


class GoesOnInAnotherCut(Scheduler):
    """A request that has begun goes over to the stages of the newest cut."""

    def _enqueue(self, request):
        live = self._residency.find(request.version.deployment, request.version.number, None) if request.run is None else None
        if live is not None and live.version.cut > request.version.cut and 0 < request.stage < len(live.plan.stages):
            self._residency.request_began(live)
            self._residency.request_ended(request.version)
            request.version = live.version
        super()._enqueue(request)


class BelievesTheFirstOfTwoThatDiffer(Scheduler):
    def _weigh(self, request, now, *, is_lost=False):
        if request.check.is_split:
            self._verified(request, request.check, next(iter(request.check.answers.values())), now)
        else:
            super()._weigh(request, now, is_lost=is_lost)


class BelievesOneAnswer(Scheduler):
    def _compare(self, request, check, member, event, now):
        self._go_on(request, event.output, member.numeric_class, now)


MUCH = (Kind.WORKER_CRASH, Kind.CONNECTION_BREAK, Kind.WORKER_STOP, Kind.WORKER_SLOW, Kind.CANCEL)


@pytest.mark.parametrize(
    ("kind", "kinds", "since"),
    [
        (SkipsTheHeapEntry, (), 0),
        (IgnoresCredit, (), 0),
        (ForgetsTheLostWorkersTasks, MUCH, 0),
        (RetriesWhereItFailed, (Kind.FRAGILE, Kind.WRONG), 0),
        (CountsSlotsOfAnEarlierSession, MUCH, 0),
        (DropsACancel, MUCH, 0),
        (FreesTheSlotAtTimeout, MUCH, 0),
        (ForgetsAnIdEarly, (Kind.CONNECTION_BREAK, Kind.CLIENT_STOP, Kind.CUT), 0),
        (RefusesAtTheMemoryLimit, (), 0),
        (KeepsAProbeForEver, (*MUCH, Kind.FRAGILE, Kind.POISON), 40),
        (BelievesEveryCanary, (Kind.SWITCH,), 0),
        (TakesRequestsUntried, (Kind.SWITCH,), 0),
        (TakesRequestsUntried, (Kind.RECUT,), 0),
        (GoesOnInAnotherCut, (Kind.RECUT,), 0),
        (BelievesTheFirstOfTwoThatDiffer, (Kind.WORKER_LIES,), 0),
        (BelievesOneAnswer, (Kind.WORKER_LIES,), 0),
        (NamesAttemptsAsEarlierReignsDid, (*MUCH, Kind.DISPATCHER_CRASH, Kind.DISPATCHER_STOP, Kind.CUT), 0),
    ],
)
def test_a_planted_bug_of_the_scheduler_is_found(kind, kinds, since):
    report = first_bad(made(kind), kinds=kinds, since=since)
    assert report.violation is not None or report.findings.violations


def test_a_failing_seed_fails_again_and_tells_the_story_of_its_request():
    first = first_bad(made(ForgetsTheLostWorkersTasks), kinds=MUCH)
    again = Simulation(first.seed, kinds=MUCH, make_scheduler=made(ForgetsTheLostWorkersTasks)).run()
    assert list(again.told()) == list(first.told())
    lines = list(first.told())
    assert lines[0].startswith(f"seed {first.seed}, faults: a connection breaks")
    assert first.violation is not None and str(first.violation) in lines[1]
    request_id = first.violation.request_id
    assert request_id is not None and any("RequestArrived" in line and str(request_id) in line for line in lines)


# ── in what is around it ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_late_answer_that_is_taken_for_the_present_stage_is_found(monkeypatch):
    monkeypatch.setattr(Scheduler, "_wanted", lambda self, attempt, worker_id: self._requests.get(attempt.request))
    assert not first_bad(kinds=MUCH).is_good


def test_more_tasks_than_a_worker_offers_are_found(monkeypatch):
    monkeypatch.setattr(Member, "has_room", True)
    report = first_bad(kinds=())
    assert report.violation is not None and "credit" in str(report.violation)


def test_a_tick_before_what_has_come_was_read_is_found(monkeypatch):
    empty_inbox = Dispatcher._empty_inbox

    def turn_over(self: Dispatcher) -> None:
        self._is_driven = False
        now = self.clock()
        due = self._next_wakeup()
        if due is not None and due <= now:
            actions = self.scheduler.tick(now)
            self.inspector.ticked(now)
            self._act(actions)
        empty_inbox(self)
        self._flush_acks()
        self._arm()
        self.inspector.turned(now)

    monkeypatch.setattr(Dispatcher, "_turn_over", turn_over)
    report = first_bad(kinds=(Kind.DISPATCHER_STOP,))
    assert report.violation is not None and "was not read" in str(report.violation)


def test_a_worker_that_believes_a_foreign_session_is_found(monkeypatch):
    received = PeerSession.received

    def received_always(self: PeerSession, envelope: Envelope, now: float) -> list[Step]:
        steps = received(self, envelope, now)
        return [Step.DELIVER] if not steps and isinstance(envelope.message, RunStage) else steps

    monkeypatch.setattr(PeerSession, "received", received_always)
    kinds = (Kind.CONNECTION_BREAK, Kind.CUT, Kind.DISPATCHER_STOP, Kind.SLOW_LINK, Kind.DAMAGE)
    report = first_bad(kinds=kinds, since=40)
    assert report.violation is not None and "credit" in str(report.violation)


# ── at the client ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_second_outcome_is_found(monkeypatch):
    replied = Outcomes.replied

    def replied_always(self: Outcomes, message, blobs):
        replied(self, message, blobs)
        return [Resolve(message.request_id, message, blobs)]

    monkeypatch.setattr(Outcomes, "replied", replied_always)
    report = first_bad(kinds=(Kind.CONNECTION_BREAK, Kind.CANCEL, Kind.WORKER_SLOW))
    assert {kind for kind, _ in report.findings.violations} == {"duplicated"}


def test_a_deadline_that_is_not_kept_is_found(monkeypatch):
    tick = Outcomes.tick
    monkeypatch.setattr(Outcomes, "tick", lambda self, now: [action for action in tick(self, now) if not isinstance(action, Resolve)])
    report = first_bad(kinds=(Kind.DISPATCHER_STOP, Kind.CUT, Kind.DISPATCHER_CRASH))
    assert {kind for kind, _ in report.findings.violations} == {"lost"}


def test_an_outcome_that_comes_late_is_found(monkeypatch):
    submit = Outcomes.submit

    def submit_for_longer(self: Outcomes, request_id, question, now):
        return submit(self, request_id, structs.replace(question, deadline=question.deadline + 2.0), now)

    monkeypatch.setattr(Outcomes, "submit", submit_for_longer)
    report = first_bad(kinds=(Kind.DISPATCHER_STOP, Kind.CUT, Kind.DISPATCHER_CRASH))
    assert {kind for kind, _ in report.findings.violations} == {"late"}


def test_a_loop_that_spins_is_found(monkeypatch):
    monkeypatch.setattr(Outcomes, "tick", lambda self, now: [])
    report = first_bad(kinds=(Kind.DISPATCHER_STOP,))
    assert report.violation is not None and "circles" in str(report.violation)


def test_an_answer_to_somebody_else_is_found():
    class MixesUp(Scheduler):
        output = None

        def _end(self, request, outcome, now):
            if isinstance(outcome, ev.Answer):
                last, self.output = self.output, outcome.output
                outcome = structs.replace(outcome, output=last or outcome.output)
            super()._end(request, outcome, now)

    report = first_bad(made(MixesUp), kinds=())
    assert {kind for kind, _ in report.findings.violations} == {"wrong"} or report.violation is not None
