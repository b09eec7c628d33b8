"""Slots, and what is learnt of a worker."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapt.errors import AdaptError
from adapt.protocol.ids import AttemptId, Digest, RequestId, WorkerId
from adapt.protocol.messages import StageTimes
from adapt.scheduling.liveness import Verdict
from adapt.scheduling.roster import AHEAD_S, LEARNING_RATE, STEADY, Member, Roster

A, B = Digest("a"), Digest("b")


def attempt(number: int) -> AttemptId:
    return AttemptId(RequestId(bytes(16), number), 1, 0, 1)


def times(*, wait_s: float = 0.0, busy_s: float = 0.0) -> StageTimes:
    """Decode and encode take a fifth each."""
    return StageTimes(wait_s=wait_s, decode_s=busy_s / 5, compute_s=3 * busy_s / 5, encode_s=busy_s / 5)


def run(member: Member, artifact: Digest, *, since: float, until: float, busy_s: float, predicted_s: float = 1.0) -> None:
    member.take(attempt(0), artifact, predicted_s, since)
    slot = member.free(attempt(0), until)
    assert slot is not None
    member.learn(slot, times(busy_s=busy_s), until)


def test_before_the_first_task_the_profile_is_believed_and_after_it_the_task():
    member = Member(WorkerId("w1"))
    assert member.expect(A, 2.0) == (2.0, 0.0)
    run(member, A, since=0, until=10, busy_s=8, predicted_s=2.0)
    assert member.expect(A, 2.0) == pytest.approx((8.0, 2.0))


def test_what_was_slow_in_one_stage_is_expected_to_be_slow_in_another():
    member = Member(WorkerId("w1"))
    run(member, A, since=0, until=5, busy_s=5, predicted_s=1.0)
    assert member.slowness == pytest.approx(1 + LEARNING_RATE * 4)
    assert member.expect(B, 3.0) == pytest.approx((3.0 * member.slowness, 0.0))


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=12))
def test_each_expectation_is_the_moving_average_of_its_samples(samples):
    member = Member(WorkerId("w1"))
    busy_s, transfer_s, slowness = *samples[0], 1.0
    for number, (busy, transfer) in enumerate(samples):
        run(member, A, since=10, until=10 + busy + transfer, busy_s=busy, predicted_s=2.0)
        if number:
            busy_s += LEARNING_RATE * (busy - busy_s)
            transfer_s += LEARNING_RATE * (transfer - transfer_s)
        slowness += LEARNING_RATE * (busy / 2.0 - slowness)
    assert member.expect(A, 2.0) == pytest.approx((busy_s, transfer_s))
    assert member.slowness == pytest.approx(slowness)
    assert member.tally.tasks_done == len(samples)
    assert member.tally.compute_s == pytest.approx(sum(3 * busy / 5 for busy, _ in samples))


def test_waiting_on_the_worker_is_neither_service_nor_transfer():
    member = Member(WorkerId("w1"))
    member.take(attempt(1), A, 1.0, 0)
    slot = member.free(attempt(1), 10)
    member.learn(slot, times(wait_s=6, busy_s=3), 10)
    assert member.expect(A, 1.0) == pytest.approx((3.0, 1.0))


def test_clocks_that_do_not_agree_teach_no_negative_transfer():
    member = Member(WorkerId("w1"))
    run(member, A, since=0, until=2, busy_s=5)
    assert member.expect(A, 1.0) == pytest.approx((5.0, 0.0))


def test_a_stage_without_a_prediction_says_nothing_about_slowness():
    member = Member(WorkerId("w1"))
    run(member, A, since=0, until=5, busy_s=5, predicted_s=0.0)
    assert member.slowness == 1.0


@given(st.lists(st.tuples(st.sampled_from(["take", "take", "free"]), st.integers(0, 5), st.integers(0, 3), st.integers(0, 3)), max_size=30))
def test_slots_and_the_moment_at_which_all_is_done(steps):
    member, now = Member(WorkerId("w1"), credit=4), 0
    held: dict[AttemptId, int] = {}
    for step, number, cost_s, wait_s in steps:
        now += wait_s
        one = attempt(number)
        if step == "take" and one not in held:
            until = max(member.busy_until, now)
            member.take(one, A, cost_s, now)
            held[one] = cost_s
            assert member.busy_until == until + cost_s
            assert member.last_used == now
        elif step == "free":
            slot = member.free(one, now)
            assert (slot is not None) == (one in held)
            if slot is not None:
                assert (slot.busy_s, slot.predicted_s, slot.artifact) == (held.pop(one), slot.predicted_s, A)
                assert member.busy_until == now + sum(held.values())
        assert set(member.slots) == set(held)
        assert member.held_s == sum(held.values())
        assert member.has_room == (len(held) < STEADY or (len(held) < 4 and sum(held.values()) == 0)), "beyond two only what is short"
        assert member.busy_until - now <= sum(held.values()), "it is never thought busier than with all that it holds"


@pytest.mark.parametrize("credit", [0, 1, STEADY, STEADY + 1, 9])
@pytest.mark.parametrize("busy_s", [0.0, AHEAD_S / 8, AHEAD_S / 2, AHEAD_S, 1.0])
def test_a_worker_has_room_for_two_tasks_and_for_more_while_all_it_holds_is_short(credit, busy_s):
    member = Member(WorkerId("w1"), credit=credit)
    for number in range(12):
        is_expected = number < credit and (number < STEADY or number * busy_s < AHEAD_S)
        assert member.has_room == is_expected
        member.take(attempt(number), A, busy_s, 0.0)
    for number in range(12):
        member.free(attempt(number), 0.0)
    assert member.held_s == 0.0 and member.has_room == (credit > 0), "what was held leaves no trace"


def test_a_new_session_keeps_what_was_learnt_and_begins_the_rest():
    member = Member(WorkerId("w1"))
    run(member, A, since=0, until=3, busy_s=2)
    member.is_draining = True
    member.loading.add(A)
    member.refused[B] = AdaptError("disk full")
    member.join(numeric_class="x", stage_budget_bytes=9, credit=2, resident=frozenset({A}))
    assert (member.loading, member.refused, member.resident, member.is_draining) == (set(), {}, {A}, False)
    assert (member.numeric_class, member.stage_budget_bytes, member.credit) == ("x", 9, 2)
    assert member.expect(A, 9.0) == pytest.approx((2.0, 1.0))


@pytest.mark.parametrize("verdict", list(Verdict))
@pytest.mark.parametrize("is_draining", [False, True])
def test_only_a_ready_worker_that_does_not_drain_gets_something_new(verdict, is_draining):
    member = Member(WorkerId("w1"), verdict=verdict, is_draining=is_draining)
    assert member.is_ready == (verdict is Verdict.READY and not is_draining)


def test_a_worker_is_made_once_and_forgotten_whole():
    roster = Roster()
    assert roster.get(WorkerId("w1")) is None
    member = roster.member(WorkerId("w1"))
    assert roster.member(WorkerId("w1")) is member and roster.get(WorkerId("w1")) is member
    assert WorkerId("w1") in roster and list(roster) == [member]
    roster.forget(WorkerId("w1"))
    roster.forget(WorkerId("w1"))
    assert WorkerId("w1") not in roster and roster.member(WorkerId("w1")) is not member
