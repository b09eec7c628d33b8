"""What a worker holds, under any order of messages."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from adapt.protocol.ids import AttemptId, RequestId
from adapt.protocol.messages import StageCancelled, StageFailed
from adapt.scheduling import holdings as holdings_module
from adapt.scheduling.holdings import KEPT_LIMIT, TOMBSTONE_LIMIT, Holdings, Verdict

CREDIT = 3


def attempt(number: int) -> AttemptId:
    return AttemptId(RequestId(bytes(16), number), 1, 0, 1)


def answer(number: int) -> StageFailed:
    return StageFailed(attempt=attempt(number), code="model", message="", fields={})


def test_an_attempt_from_acceptance_to_acknowledgement():
    holdings = Holdings(credit=CREDIT)
    holdings.reopen(1)
    assert holdings.accept(attempt(1)) is Verdict.ACCEPTED
    assert holdings.accept(attempt(1)) is Verdict.HELD
    assert (holdings.held, holdings.finished) == ([attempt(1)], [])
    kept = holdings.finish(attempt(1), answer(1))
    assert holdings.accept(attempt(1)) is Verdict.FINISHED and holdings.kept(attempt(1)) is kept
    assert (holdings.held, holdings.finished) == ([], [attempt(1)])
    assert holdings.unsent() == [kept]
    kept.is_sent = True
    assert holdings.unsent() == []
    holdings.reopen(1)
    assert holdings.unsent() == [kept] and kept.answer == answer(1)
    holdings.acknowledge([attempt(1), attempt(2)])
    assert holdings.is_empty


def test_a_cancel_that_overtakes_is_answered_and_remembered():
    holdings = Holdings(credit=CREDIT)
    assert holdings.cancel(attempt(1)) is Verdict.UNKNOWN
    assert [kept.answer for kept in holdings.unsent()] == [StageCancelled(attempt=attempt(1))]
    holdings.acknowledge([attempt(1)])
    assert holdings.accept(attempt(1)) is Verdict.CANCELLED
    assert holdings.is_empty


def test_a_cancel_that_comes_late_changes_nothing():
    holdings = Holdings(credit=CREDIT)
    holdings.accept(attempt(1))
    kept = holdings.finish(attempt(1), answer(1))
    assert holdings.cancel(attempt(1)) is Verdict.FINISHED
    assert holdings.unsent() == [kept] and kept.answer == answer(1)


def test_what_another_term_left_is_answered_only_as_cancelled():
    holdings = Holdings(credit=CREDIT)
    holdings.reopen(1)
    for number in (1, 2):
        holdings.accept(attempt(number))
    holdings.finish(attempt(1), answer(1))
    assert holdings.reopen(2) == [attempt(2)]
    holdings.finish(attempt(2), answer(2))
    assert [kept.answer for kept in holdings.unsent()] == [StageCancelled(attempt=attempt(number)) for number in (1, 2)]
    assert holdings.accept(attempt(1)) is Verdict.FINISHED  # the same number for other work: cancelled, and tried again
    assert holdings.accept(attempt(3)) is Verdict.ACCEPTED
    holdings.finish(attempt(3), answer(3))
    assert holdings.unsent()[-1].answer == answer(3)


def test_tombstones_end_with_their_session():
    holdings = Holdings(credit=CREDIT)
    holdings.cancel(attempt(1))
    holdings.acknowledge([attempt(1)])
    holdings.reopen(0)
    assert holdings.accept(attempt(1)) is Verdict.ACCEPTED


def test_a_dispatcher_that_never_acknowledges_fills_no_memory():
    holdings = Holdings(credit=CREDIT)
    for number in range(2 * TOMBSTONE_LIMIT):
        holdings.cancel(attempt(number))
    assert len(holdings.finished) <= KEPT_LIMIT + CREDIT <= 4096  # what fits into a hello
    assert len(holdings._tombstones) == TOMBSTONE_LIMIT
    assert holdings.accept(attempt(-1)) is Verdict.FULL


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["accept", "cancel", "finish", "acknowledge", "hand_back", "session", "term"]),
            st.integers(0, 6),
        )
    )
)
def test_held_never_exceeds_credit_and_no_answer_is_lost(steps):
    holdings, term = Holdings(credit=CREDIT), 0
    held: set[AttemptId] = set()
    owed: set[AttemptId] = set()  # answers that the dispatcher has not acknowledged
    for step, number in steps:
        one = attempt(number)
        match step:
            case "accept":
                verdict = holdings.accept(one)
                assert (verdict is Verdict.HELD) == (one in held)
                assert (verdict is Verdict.FULL) <= (len(held) == CREDIT)
                if verdict is Verdict.ACCEPTED:
                    assert one not in owed
                    held.add(one)
            case "cancel":
                verdict = holdings.cancel(one)
                assert (verdict is Verdict.HELD) == (one in held)
                if verdict is Verdict.UNKNOWN:
                    owed.add(one)
            case "finish" if one in held:
                holdings.finish(one, answer(number))
                held.remove(one)
                owed.add(one)
            case "acknowledge":
                holdings.acknowledge([one])
                owed.discard(one)
            case "hand_back" if one in held:
                holdings.hand_back([one])
                held.remove(one)
            case "session" | "term":
                term += step == "term"
                stale = holdings.reopen(term)
                assert set(stale) <= held
                assert len(holdings.unsent()) == len(owed)
        assert set(holdings.held) == held and len(held) <= CREDIT
        assert set(holdings.finished) == owed
        assert not held & owed
        assert holdings.is_empty == (not held and not owed)


def test_the_limits_fit_into_a_hello():
    assert holdings_module.KEPT_LIMIT + 1024 <= 4096  # the most credit that a configuration allows
