"""The client's one answer, under any order of what user, dispatcher, connection and clock do."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from adapt.errors import (
    AdaptError,
    ConnectError,
    DeadlineExceededError,
    InputMismatchError,
    ModelError,
    OverloadedError,
)
from adapt.protocol.ids import Digest, RequestId
from adapt.protocol.messages import Accepted, CancelRequest, InferRequest, Reply, ReplyAck, RequestFailed
from adapt.protocol.wire import Blob
from adapt.scheduling.outcome import ACK_S, ACKS_PER_MESSAGE, SMALL_BYTES, Outcomes, Question, Resolve, Say

LIMIT_BYTES = 1 << 20
PROGRAM = Digest("a" * 64)
SMALL, BIG = Blob.of(bytes(8)), Blob.of(bytes(SMALL_BYTES + 1))


def rid(number: int) -> RequestId:
    return RequestId(bytes(16), number)


def question(deadline: float, *, now: float = 0, blob: Blob = BIG) -> Question:
    return Question(deployment="m", program=None, numerics="close", leaves=[], blobs=(blob,), budget_s=deadline - now, deadline=deadline)


def reply(number: int) -> Reply:
    return Reply(request_id=rid(number), leaves=[], attempts=1, numeric_classes=[])


def failed(number: int, error: AdaptError | None = None) -> RequestFailed:
    code, message, fields = (error or ModelError("it raised")).to_wire()
    return RequestFailed(request_id=rid(number), code=code, message=message, fields=fields)


def accepted(number: int, version: int = 1, program: str = PROGRAM) -> Accepted:
    return Accepted(request_id=rid(number), deployment="m", version=version, program=program)


def said(actions, kind) -> list:
    return [action.message for action in actions if isinstance(action, Say) and isinstance(action.message, kind)]


def resolved(actions) -> list[tuple[RequestId, object]]:
    return [(action.request_id, action.outcome) for action in actions if isinstance(action, Resolve)]


class AnyOrder(RuleBasedStateMachine):
    """Whole seconds, so that ties happen. `deadlines`: of the requests that have no outcome yet, oldest first."""

    def __init__(self) -> None:
        super().__init__()
        self.outcomes, self.now, self.term, self.session = Outcomes(), 0, 1, 0
        self.is_open = self.has_ended = False
        self.deadlines: dict[RequestId, float] = {}
        self.pins: dict[RequestId, int] = {}
        self.decided: dict[RequestId, str] = {}
        self.said_under: dict[RequestId, int] = {}  # -> the first term
        self.said_in: dict[RequestId, int] = {}  # -> the last session in which the request was said
        self.excused: set[RequestId] = set()  # need not have been said in this session: told to wait, or no time left
        self.owed: list[RequestId] = []
        self.owed_until: float | None = None  # when they have to be said, if nothing comes that they can ride on
        self.has_spoken = False  # a request was said in this turn
        self.owed_cancels: set[RequestId] = set()
        self.submitted = 0

    def take(self, actions) -> None:
        for action in actions:
            match action:
                case Say(message=InferRequest() as message):
                    assert self.is_open, "said without a session"
                    assert message.request_id in self.deadlines, "said again after its outcome"
                    assert 0 < message.budget_s <= self.deadlines[message.request_id] - self.now
                    assert message.version == self.pins.get(message.request_id, 0)
                    assert (message.program is None) == (message.version == 0)
                    self.said_in[message.request_id] = self.session
                    self.said_under.setdefault(message.request_id, self.term)
                    self.has_spoken = True
                case Say(message=CancelRequest(request_id=request_id)):
                    assert self.is_open and self.decided[request_id] in ("cancel", "deadline")
                    self.owed_cancels.discard(request_id)
                case Say(message=ReplyAck(request_ids=request_ids)):
                    assert self.is_open and request_ids == self.owed
                    assert self.has_spoken or (self.owed_until is not None and self.owed_until <= self.now), "alone before its time"
                    self.owed.clear()
                case Resolve(request_id=request_id, outcome=outcome):
                    is_late = isinstance(outcome, DeadlineExceededError)
                    self.decide(request_id, "deadline" if is_late else "answer")
                    if is_late and not self.has_ended and self.said_in.get(request_id):
                        self.owed_cancels.add(request_id)

    def decide(self, request_id: RequestId, how: str) -> None:
        assert request_id not in self.decided, "a second outcome"
        self.decided[request_id] = how
        del self.deadlines[request_id]

    @rule(budget=st.integers(1, 6), blob=st.sampled_from([SMALL, BIG]))
    def submit(self, budget, blob):
        self.submitted += 1
        request_id = rid(self.submitted)
        self.deadlines[request_id] = self.now + budget
        self.take(self.outcomes.submit(request_id, question(self.now + budget, now=self.now, blob=blob), self.now))

    @rule(number=st.integers(1, 5))
    def cancel(self, number):
        if rid(number) in self.deadlines:
            self.decide(rid(number), "cancel")
            if self.said_in.get(rid(number)):
                self.owed_cancels.add(rid(number))
        self.take(self.outcomes.cancel(rid(number)))

    @precondition(lambda self: self.is_open)
    @rule(number=st.integers(1, 5), version=st.integers(1, 3))
    def accept(self, number, version):
        self.outcomes.accepted(accepted(number, version))
        if rid(number) in self.deadlines:
            self.pins.setdefault(rid(number), version)

    @precondition(lambda self: self.is_open)
    @rule(number=st.integers(1, 5))
    def answer(self, number):
        self.owed.append(rid(number))
        was_open = rid(number) in self.deadlines
        self.take(self.outcomes.replied(reply(number), ()))
        assert not was_open or self.decided[rid(number)] == "answer"

    @precondition(lambda self: self.is_open)
    @rule(number=st.integers(1, 5), error=st.sampled_from([ModelError("x"), OverloadedError("full", retry_after_s=1.0)]))
    def fail(self, number, error):
        one = rid(number)
        was_let_in = one in self.pins or self.said_under.get(one) != self.term
        waits = isinstance(error, OverloadedError) and was_let_in and self.now + 1 < self.deadlines.get(one, 0)
        was_open = one in self.deadlines
        if waits:
            self.excused.add(one)
        else:
            self.owed.append(one)
        self.take(self.outcomes.failed(failed(number, error), self.now))
        assert (one in self.deadlines) == (was_open and waits)

    @rule(number=st.integers(1, 5))
    def refuse_to_send(self, number):
        self.outcomes.unsaid(rid(number), self.now)

    @precondition(lambda self: not self.has_ended)
    @rule(later_term=st.booleans())
    def open_session(self, later_term):
        if later_term:
            self.term += 1
            self.owed.clear()
            self.owed_until = None
            self.owed_cancels.clear()
        self.is_open, self.session = True, self.session + 1
        self.excused.clear()
        self.take(self.outcomes.opened(self.term, limit_bytes=LIMIT_BYTES, now=self.now))
        assert not self.owed_cancels

    @rule()
    def lose_session(self):
        self.is_open = False
        self.outcomes.lost()

    @rule(wait=st.sampled_from([0, ACK_S / 2, ACK_S, 1, 2, 3]))
    def wait(self, wait):
        self.now += wait
        self.take(self.outcomes.tick(self.now))
        assert all(deadline > self.now for deadline in self.deadlines.values())
        self.end_turn()
        wakeup = self.outcomes.next_wakeup()
        assert wakeup is None or wakeup > self.now, "the loop would spin"

    @rule()
    def end_turn(self):
        if self.is_open and self.owed and self.owed_until is None:
            self.owed_until = self.now + ACK_S
        self.take(self.outcomes.take_acks(self.now))
        self.has_spoken = False
        if self.is_open and self.owed:
            assert self.now < self.owed_until and self.outcomes.next_wakeup() <= self.owed_until, "it waits for a little while at most"
        elif self.is_open:
            self.owed_until = None

    @precondition(lambda self: self.session > 3)
    @rule()
    def give_up(self):
        self.has_ended, self.is_open = True, False
        self.take(self.outcomes.give_up(ConnectError("tcp://x:1", "refused")))
        assert not self.deadlines

    @invariant()
    def all_that_is_open_is_waited_for(self):
        assert len(self.outcomes) == len(self.deadlines)
        if self.deadlines:
            wakeup = self.outcomes.next_wakeup()
            assert wakeup is not None and wakeup <= min(self.deadlines.values())
        if self.is_open:
            assert not self.owed_cancels
            for request_id in self.deadlines.keys() - self.excused:
                assert self.said_in[request_id] == self.session, "a session that knows nothing of it"


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=40)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.lists(st.integers(1, 4), max_size=10))
def test_every_deadline_is_met_to_the_second_and_once(budgets, waits):
    outcomes, now, ended = Outcomes(), 0, []
    outcomes.opened(1, limit_bytes=LIMIT_BYTES, now=0)
    for number, budget in enumerate(budgets):
        outcomes.submit(rid(number), question(budget), 0)
    for wait in (*waits, 9):
        now += wait
        for request_id, error in resolved(outcomes.tick(now)):
            assert isinstance(error, DeadlineExceededError) and error.budget_s == budgets[request_id.sequence]
            assert budgets[request_id.sequence] <= now
            ended.append(request_id)
        assert all(budget > now for number, budget in enumerate(budgets) if rid(number) not in ended)
    assert sorted(ended) == sorted(rid(number) for number in range(len(budgets)))
    assert outcomes.next_wakeup() is None


def test_a_deadline_tells_the_cluster_and_a_late_answer_is_acknowledged():
    outcomes = Outcomes()
    outcomes.opened(1, limit_bytes=LIMIT_BYTES, now=0)
    outcomes.submit(rid(1), question(5), 0)
    assert outcomes.take_acks(0) == []
    assert said(outcomes.tick(5), CancelRequest) == [CancelRequest(request_id=rid(1))]
    assert outcomes.replied(reply(1), ()) == []
    assert outcomes.take_acks(5) == []
    assert outcomes.next_wakeup() == 5 + ACK_S
    assert said(outcomes.take_acks(5 + ACK_S), ReplyAck) == [ReplyAck(request_ids=[rid(1)])]
    assert outcomes.next_wakeup() is None


def test_an_acknowledgement_rides_on_the_next_request_or_waits_a_little():
    outcomes = Outcomes()
    outcomes.opened(1, limit_bytes=LIMIT_BYTES, now=0)
    for number in (1, 2, 3):
        outcomes.submit(rid(number), question(90), 0)
    assert outcomes.take_acks(0) == []
    outcomes.replied(reply(1), ())
    outcomes.submit(rid(4), question(90), 1)
    assert said(outcomes.take_acks(1), ReplyAck) == [ReplyAck(request_ids=[rid(1)])], "it rides"
    outcomes.replied(reply(2), ())
    assert outcomes.take_acks(2) == []
    outcomes.replied(reply(3), ())
    assert outcomes.take_acks(2 + ACK_S / 2) == []
    assert outcomes.next_wakeup() == 2 + ACK_S, "what comes meanwhile does not put it off"
    assert said(outcomes.take_acks(2 + ACK_S), ReplyAck) == [ReplyAck(request_ids=[rid(2), rid(3)])]


def test_the_dispatchers_story_of_a_deadline_comes_before_our_own_timer():
    outcomes = Outcomes()
    outcomes.opened(1, limit_bytes=LIMIT_BYTES, now=0)
    told = said(outcomes.submit(rid(1), question(2.0), 0), InferRequest)[0].budget_s
    assert 1.9 < told < 2.0
    story = [{"stage": 0, "attempt": 1, "worker": "w1", "outcome": "timeout"}]
    ((_, error),) = resolved(outcomes.failed(failed(1, DeadlineExceededError(told, attempts=story)), told))
    assert error.budget_s == 2.0 and error.attempts == story and str(error) == "no answer within 2 s"


def test_what_was_never_said_is_not_cancelled():
    outcomes = Outcomes()
    outcomes.submit(rid(1), question(5), 0)
    assert outcomes.cancel(rid(1)) == []
    assert outcomes.opened(1, limit_bytes=LIMIT_BYTES, now=1) == []


def test_cancels_and_acks_wait_for_a_session_but_not_for_another_reign():
    outcomes = Outcomes()
    outcomes.opened(7, limit_bytes=LIMIT_BYTES, now=0)
    for number in (1, 2):
        outcomes.submit(rid(number), question(9), 0)
    outcomes.replied(reply(1), ())
    outcomes.lost()
    assert outcomes.cancel(rid(2)) == [] and outcomes.take_acks(0) == outcomes.take_acks(1) == []
    assert outcomes.next_wakeup() is None, "without a session there is nothing to wake up for"
    again = outcomes.opened(7, limit_bytes=LIMIT_BYTES, now=1) + outcomes.take_acks(1) + outcomes.take_acks(1 + ACK_S)
    assert said(again, CancelRequest | ReplyAck) == [CancelRequest(request_id=rid(2)), ReplyAck(request_ids=[rid(1)])]
    outcomes.replied(reply(1), ())
    assert outcomes.take_acks(2) == []
    outcomes.lost()
    assert outcomes.opened(8, limit_bytes=LIMIT_BYTES, now=3) + outcomes.take_acks(3) + outcomes.take_acks(4) == []
    assert outcomes.next_wakeup() is None


def test_a_request_that_was_accepted_is_said_again_with_its_pin_and_the_time_left():
    outcomes = Outcomes()
    outcomes.opened(1, limit_bytes=LIMIT_BYTES, now=0)
    outcomes.submit(rid(1), question(10), 0)
    outcomes.accepted(accepted(1, version=3))
    outcomes.accepted(accepted(1, version=4))  # pinned is pinned
    outcomes.lost()
    (again,) = said(outcomes.opened(2, limit_bytes=LIMIT_BYTES, now=6), InferRequest)
    assert (again.version, again.program) == (3, PROGRAM)
    assert 3.9 < again.budget_s <= 4


def test_overload_is_told_to_who_submits_but_not_of_a_request_that_had_been_let_in():
    outcomes = Outcomes()
    outcomes.opened(1, limit_bytes=LIMIT_BYTES, now=0)
    overloaded = OverloadedError("full", retry_after_s=2.0)
    outcomes.submit(rid(1), question(10), 0)
    ((_, error),) = resolved(outcomes.failed(failed(1, overloaded), 0))
    assert isinstance(error, OverloadedError) and error.retry_after_s == 2.0
    outcomes.submit(rid(2), question(10), 0)
    outcomes.accepted(accepted(2))
    outcomes.opened(2, limit_bytes=LIMIT_BYTES, now=1)  # a dispatcher that knows nothing of it
    assert outcomes.failed(failed(2, overloaded), 1) == []
    assert outcomes.tick(2) == []
    assert [message.version for message in said(outcomes.tick(3), InferRequest)] == [1]


def test_overload_of_a_reign_that_a_request_was_not_first_said_to_is_not_told():
    """The reign before may have been computing it already."""
    outcomes, overloaded = Outcomes(), OverloadedError("full", retry_after_s=2.0)
    outcomes.opened(1, limit_bytes=LIMIT_BYTES, now=0)
    outcomes.submit(rid(1), question(10), 0)
    outcomes.lost()
    outcomes.opened(2, limit_bytes=LIMIT_BYTES, now=1)
    assert outcomes.failed(failed(1, overloaded), 1) == []
    assert len(said(outcomes.tick(3), InferRequest)) == 1


def test_the_last_acknowledgements_do_not_wait():
    outcomes = Outcomes()
    outcomes.opened(1, limit_bytes=LIMIT_BYTES, now=0)
    outcomes.submit(rid(1), question(10), 0)
    outcomes.take_acks(0)
    outcomes.replied(reply(1), ())
    assert outcomes.take_acks(0) == []
    assert said(outcomes.take_acks(0, is_last=True), ReplyAck) == [ReplyAck(request_ids=[rid(1)])]


def test_a_small_request_that_is_not_accepted_is_said_again_and_ever_less_often():
    outcomes, moments = Outcomes(), []
    outcomes.opened(1, limit_bytes=LIMIT_BYTES, now=0)
    outcomes.submit(rid(1), question(30, blob=SMALL), 0)
    for now in range(1, 30):
        moments += [now] * len(said(outcomes.tick(now), InferRequest))
    assert moments == [1, 3, 7, 15]
    outcomes.submit(rid(2), question(60, blob=SMALL), 30)
    outcomes.accepted(accepted(2))
    assert outcomes.next_wakeup() == 30  # the deadline of the first
    outcomes.tick(30)
    assert outcomes.next_wakeup() == 60


def test_what_the_socket_did_not_take_is_said_again():
    outcomes = Outcomes()
    outcomes.opened(1, limit_bytes=LIMIT_BYTES, now=0)
    outcomes.submit(rid(1), question(30), 0)
    outcomes.unsaid(rid(1), 0)
    assert len(said(outcomes.tick(outcomes.next_wakeup()), InferRequest)) == 1
    assert outcomes.next_wakeup() == 30
    outcomes.replied(reply(1), ())
    outcomes.unsaid(rid(1), 0)
    assert outcomes.next_wakeup() is None


def test_inputs_that_the_dispatcher_would_not_take_are_not_sent():
    outcomes = Outcomes()
    outcomes.submit(rid(1), question(30), 0)
    ((_, error),) = resolved(outcomes.opened(1, limit_bytes=SMALL_BYTES, now=0))
    assert isinstance(error, InputMismatchError) and str(SMALL_BYTES) in str(error)
    assert len(outcomes) == 0 and outcomes.next_wakeup() is None


def test_acks_fit_into_messages():
    outcomes = Outcomes()
    outcomes.opened(1, limit_bytes=LIMIT_BYTES, now=0)
    for number in range(ACKS_PER_MESSAGE + 1):
        outcomes.replied(reply(number), ())
    assert outcomes.take_acks(0) == []
    assert [len(message.request_ids) for message in said(outcomes.take_acks(ACK_S), ReplyAck)] == [ACKS_PER_MESSAGE, 1]


@pytest.mark.parametrize("wish", [None, "soon", -1.0, 0.0, float("nan"), 1e9, True])
def test_an_odd_wish_for_a_pause_is_not_taken_literally(wish):
    outcomes = Outcomes()
    outcomes.opened(1, limit_bytes=LIMIT_BYTES, now=0)
    outcomes.submit(rid(1), question(100), 0)
    outcomes.accepted(accepted(1))
    message = RequestFailed(request_id=rid(1), code="overloaded", message="full", fields={"retry_after_s": wish})
    assert outcomes.failed(message, 0) == []
    assert 0 < outcomes.next_wakeup() <= 5


def test_after_the_end_everything_ends_at_once():
    outcomes = Outcomes()
    outcomes.opened(1, limit_bytes=LIMIT_BYTES, now=0)
    outcomes.submit(rid(1), question(30), 0)
    refused = ConnectError("tcp://x:1", "refused")
    assert resolved(outcomes.give_up(refused)) == [(rid(1), refused)]
    assert outcomes.submit(rid(2), question(30), 0) == [Resolve(rid(2), refused)]
    assert outcomes.next_wakeup() is None
