"""Bugs that schedulers are known to have, planted one at a time: the machine of random orders must find each, or it proves nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from adapt.protocol.ids import AttemptId
from adapt.scheduling import admission, deadlines, requests, roster, scheduler
from adapt.scheduling import events as ev
from adapt.scheduling.choice import Choice
from adapt.scheduling.verification import Check
from tests.unit.scheduling.test_scheduler_machine import Cluster

Patch = Callable[[pytest.MonkeyPatch], None]
S, R, M = scheduler.Scheduler, requests.Request, roster.Member


def heap_entry_skipped(patch: pytest.MonkeyPatch) -> None:
    """A request's deadline is not watched."""
    real = deadlines.Deadlines.set
    patch.setattr(deadlines.Deadlines, "set", lambda self, key, moment: None if key[0] == "deadline" else real(self, key, moment))


def late_answer_taken_twice(patch: pytest.MonkeyPatch) -> None:
    """An answer counts for whatever stage its request is at."""
    patch.setattr(S, "_wanted", lambda self, attempt, worker_id: self._requests.get(attempt.request))


def credit_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(M, "has_room", property(lambda self: True))


def lost_tasks_forgotten(patch: pytest.MonkeyPatch) -> None:
    """What a lost worker held is freed, and nobody dispatches it again."""
    patch.setattr(S, "_loss", lambda self, member, attempt, reason, now, suspects=0: self._free(member, attempt, now))


def retried_where_it_failed(patch: pytest.MonkeyPatch) -> None:
    real = Choice.eligible

    def all_but_forgiving(self: Choice, request: requests.Request, now: float) -> list[roster.Member]:
        failed_on, request.failed_on = request.failed_on, set()
        able = real(self, request, now)
        request.failed_on = failed_on
        return [member for member in able if member.worker_id in failed_on] or able

    patch.setattr(Choice, "eligible", all_but_forgiving)


def cancel_dropped(patch: pytest.MonkeyPatch) -> None:
    """The client's cancel changes nothing."""
    patch.setattr(S, "_request_cancelled", lambda self, request_id, now: None)


def started_again_in_the_same_generation(patch: pytest.MonkeyPatch) -> None:
    real = R.start_again
    patch.setattr(R, "start_again", lambda self, generation: real(self, self.generation))


def slot_freed_at_the_timeout(patch: pytest.MonkeyPatch) -> None:
    real = S._attempt_timed_out

    def timed_out(self: scheduler.Scheduler, attempt: AttemptId, now: float) -> None:
        real(self, attempt, now)
        for member in self.roster:
            member.free(attempt, now)

    patch.setattr(S, "_attempt_timed_out", timed_out)


def id_forgotten_early(patch: pytest.MonkeyPatch) -> None:
    """As soon as its outcome is acknowledged."""
    real = S._outcome_acknowledged

    def acknowledged(self: scheduler.Scheduler, request_id: ev.RequestId, now: float) -> None:
        real(self, request_id, now)
        self._ended.forget(request_id)

    patch.setattr(S, "_outcome_acknowledged", acknowledged)


def output_refused_at_the_limit(patch: pytest.MonkeyPatch) -> None:
    """What a stage has made is dropped when memory is short: the request then waits for nothing."""
    real = S._stage_finished

    def finished(self: scheduler.Scheduler, event: ev.StageFinished, now: float) -> None:
        if self._admission.reserved_bytes > 0 and len(self._requests) > 3:
            self._free(self.roster.member(event.worker_id), event.attempt, now)
        else:
            real(self, event, now)

    patch.setattr(S, "_stage_finished", finished)


def bytes_never_released(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(admission.Admission, "release", lambda self, request_id: self._reserved.pop(request_id))


def one_answer_believed(patch: pytest.MonkeyPatch) -> None:
    """Of a task that is to be verified, the next stage begins with the first answer."""
    patch.setattr(
        S, "_compare", lambda self, request, check, member, event, now: self._go_on(request, event.output, member.numeric_class, now)
    )


def first_of_two_that_differ_believed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Check, "agreed", property(lambda self: next(iter(self.answers.values())) if len(self.answers) > 1 else None))


PLANTED: list[Patch] = [
    heap_entry_skipped,
    late_answer_taken_twice,
    credit_ignored,
    lost_tasks_forgotten,
    retried_where_it_failed,
    cancel_dropped,
    started_again_in_the_same_generation,
    slot_freed_at_the_timeout,
    id_forgotten_early,
    output_refused_at_the_limit,
    bytes_never_released,
    one_answer_believed,
    first_of_two_that_differ_believed,
]
LOOK = settings(
    max_examples=2000, stateful_step_count=60, deadline=None, derandomize=True, database=None, print_blob=False, phases=[Phase.generate]
)


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_found(monkeypatch, plant):
    plant(monkeypatch)
    with pytest.raises(BaseException) as found:
        run_state_machine_as_test(Cluster, settings=LOOK)
    assert not isinstance(found.value, KeyboardInterrupt)
