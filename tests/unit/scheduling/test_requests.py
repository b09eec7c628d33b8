"""One request's book-keeping, and the memory of those that have ended."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from adapt.errors import AdaptError
from adapt.protocol.ids import AttemptId, RequestId, WorkerId
from adapt.protocol.wire import Blob
from adapt.scheduling.events import Activation, Answer, Fail
from adapt.scheduling.requests import HISTORY_LIMIT, Attempt, EndedRequests, Request

W1, W2 = WorkerId("w1"), WorkerId("w2")
R1 = RequestId(bytes(16), 1)


def tensor(size_bytes: int) -> Activation:
    return Activation((), (Blob.of(bytes(size_bytes)),))


def a_request() -> Request:
    return Request(
        request_id=R1, version=None, fingerprint=7, exact=False, deadline=9.0, budget_s=9.0, arrival=1, activation=tensor(3)
    )  # fmt: skip


def test_an_answer_is_current_only_for_this_stage_and_generation_and_a_number_that_was_given():
    request = a_request()
    request.issued[1] = W1
    assert request.is_current(AttemptId(R1, 1, 0, 1))
    for other in (
        AttemptId(R1, 1, 0, 2),  # never dispatched
        AttemptId(R1, 1, 1, 1),  # another stage
        AttemptId(R1, 2, 0, 1),  # another generation
        AttemptId(RequestId(bytes(16), 2), 1, 0, 1),  # another request
        AttemptId(RequestId(bytes([1]) * 16, 1), 1, 0, 1),  # another client's request of this number
    ):
        assert not request.is_current(other)


def test_the_next_stage_begins_with_a_clean_sheet():
    request = a_request()
    request.issued[1], request.attempts[1] = W1, Attempt(W1, 5.0)
    request.failed_on.add(W2)
    request.failures, request.model_error, request.ticket, request.attempts_made = 3, "RuntimeError", 8, 4
    first = request.attempt_id(1)
    request.advance(tensor(5))
    assert (request.stage, request.activation.size_bytes) == (1, 5)
    assert (request.attempts, request.issued, request.failed_on) == ({}, {}, set())
    assert (request.failures, request.model_error, request.ticket) == (0, None, 0)
    assert request.attempts_made == 4, "over all stages"
    assert not request.is_current(first)


def test_a_request_waits_for_the_attempts_that_have_not_expired():
    request = a_request()
    assert not request.is_waited_for
    request.attempts[1] = Attempt(W1, 5.0)
    assert request.is_waited_for
    request.attempts[1].is_expired = True
    assert not request.is_waited_for
    request.attempts[2] = Attempt(W2, 5.0)
    assert request.is_waited_for


def test_the_story_of_one_request_is_bounded_and_keeps_its_beginning():
    request = a_request()
    for number in range(2 * HISTORY_LIMIT):
        request.note(W1, number, "lost")
    assert len(request.history) == HISTORY_LIMIT
    assert request.history[0] == {"stage": 0, "attempt": 0, "worker": "w1", "outcome": "lost"}


# ── those that have ended ────────────────────────────────────────────────────────────────────────────────────────────

LIMIT_BYTES = 10
STEPS = st.lists(
    st.tuples(st.sampled_from(["answer", "answer", "fail", "bury", "forget"]), st.integers(1, 6), st.integers(0, 12)),
    max_size=40,
)


@given(STEPS)
def test_results_are_kept_up_to_the_limit_and_ids_beyond_it(steps):
    ended = EndedRequests(max_kept_bytes=LIMIT_BYTES)
    known: dict[RequestId, bool] = {}  # id -> whether its client has decided
    kept: list[tuple[RequestId, int]] = []  # oldest first, with the bytes of each
    outcomes = {}
    for step, number, size_bytes in steps:
        one = RequestId(bytes(16), number)
        match step:
            case "answer" | "fail" if one not in known:
                if step == "answer":
                    outcome = Answer(request_id=one, output=tensor(size_bytes), attempts=1, numeric_classes=())
                else:
                    outcome, size_bytes = Fail(request_id=one, error=AdaptError("no")), 0
                ended.keep(one, number, outcome)
                known[one], outcomes[one] = False, outcome
                kept.append((one, size_bytes))
                while sum(size for _, size in kept) > LIMIT_BYTES:
                    kept.pop(0)
            case "bury":
                ended.bury(one)
                known[one] = True
                kept = [entry for entry in kept if entry[0] != one]
            case "forget":
                ended.forget(one)
                known.pop(one, None)
                kept = [entry for entry in kept if entry[0] != one]
        assert len(ended) == len(known)
        assert ended.kept == len(kept)
        assert ended.kept_bytes == sum(size for _, size in kept) <= LIMIT_BYTES
        for asked in {RequestId(bytes(16), n) for n in range(1, 7)}:
            entry = ended.get(asked)
            assert (entry is not None) == (asked in known)
            if entry is not None:
                assert entry.is_final == known[asked]
                assert (entry.outcome is outcomes.get(asked)) if asked in dict(kept) else (entry.outcome is None)


def test_a_decided_request_is_still_known_by_its_fingerprint():
    ended = EndedRequests(max_kept_bytes=LIMIT_BYTES)
    ended.keep(R1, 7, Fail(request_id=R1, error=AdaptError("no")))
    ended.bury(R1)
    assert ended.get(R1).fingerprint == 7
