"""The client's one answer: for each request the first of reply, error, cancel and its own deadline, and no other. Pure.

    state    event                                   to        does
    -        submitted                               OPEN      says the request, if there is a session
    OPEN     session opened                          OPEN      says it again, with what `Accepted` has pinned it to and the time left
    OPEN     accepted                                OPEN      notes version and program
    OPEN     small, and not accepted for a while     OPEN      says it again: an answer is lost if it finds half a session
    OPEN     the socket took nothing                 OPEN      says it again in a moment
    OPEN     overloaded, but accepted before, or     OPEN      says it again when asked to: this reign may not have known it
             said under another term
    OPEN     reply, error                            -         resolves, acknowledges
    OPEN     cancelled                               -         says so, if the request was ever said
    OPEN     its deadline                            -         resolves with `DeadlineExceededError`, says cancel
    OPEN     link refused, client closed             -         resolves with the error
    -        reply, error (late, or a second one)    -         acknowledges, so that the dispatcher can forget it

A cancel or an acknowledgement that finds no session waits for one; it is void under another term, which knows of neither.
"""

from __future__ import annotations

from typing import TypeAlias

from msgspec import Struct

from adapt.errors import AdaptError, DeadlineExceededError, InputMismatchError, OverloadedError
from adapt.protocol.ids import Digest, RequestId
from adapt.protocol.messages import Accepted, CancelRequest, InferRequest, Leaf, Reply, ReplyAck, RequestFailed
from adapt.protocol.wire import Blob
from adapt.scheduling.deadlines import Deadlines, earliest

ACKS_PER_MESSAGE = 4096
ACK_S = 0.1  # how long an acknowledgement waits for a request that it can ride on
SMALL_BYTES = 64 << 10  # goes on control; what goes on bulk follows `Attach`, and may take long
UNHEARD_PAUSE_S = 1.0  # doubled each time
UNSAID_PAUSE_S = 0.05  # after the socket did not take a request
RETRY_PAUSES_S = (0.01, 5.0)  # between these a dispatcher may ask for when it is overloaded

# The dispatcher is told a little less than there is: its own error knows the attempts, and should come before our timer.
LAST_WORD_SHARE, LAST_WORD_S = 0.02, 0.05


class Question(Struct, frozen=True, kw_only=True):
    """What is asked of the cluster. `deadline`: a moment on the clock of `now`; `budget_s`: as the user gave it."""

    deployment: str
    program: Digest | None  # None: whatever is deployed under this name
    interface: str = ""  # digest of the inputs and outputs that are known of it; "": any
    numerics: str
    leaves: list[Leaf]
    blobs: tuple[Blob, ...]
    budget_s: float
    deadline: float


class Say(Struct, frozen=True):
    """Action: send this. If the socket does not take an `InferRequest` on bulk, tell `unsaid`; on control it is said again until accepted."""

    message: InferRequest | CancelRequest | ReplyAck
    blobs: tuple[Blob, ...] = ()


class Resolve(Struct, frozen=True):
    """Action: the request's one outcome, a reply with its blobs or an error. Cancelled requests have none: who cancels knows."""

    request_id: RequestId
    outcome: Reply | AdaptError
    blobs: tuple[Blob, ...] = ()


Action: TypeAlias = Say | Resolve


class _Open(Struct):
    """A request that has no outcome yet."""

    question: Question
    version: int = 0  # 0 until it was accepted
    program: Digest | None = None
    said_under: int | None = None  # the first term under which it was said
    patience_s: float = UNHEARD_PAUSE_S


class Outcomes:
    """See the head of this file. `now`: seconds, monotonic, never going back."""

    def __init__(self) -> None:
        self._open: dict[RequestId, _Open] = {}  # in the order in which they were submitted
        self._due: Deadlines[RequestId] = Deadlines()  # its deadline, or when it is to be said again if that is sooner
        self._cancels: list[RequestId] = []  # not said yet
        self._acks: list[RequestId] = []  # not said yet
        self._acks_due: float | None = None  # when they have to be
        self._has_spoken = False  # a request was said in this turn of the loop
        self._term = 0
        self._limit_bytes: int | None = None  # None: there is no session
        self._end: AdaptError | None = None  # what everything ends in from now on

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._open

    # ── what the user does ───────────────────────────────────────────────────────────────────────────────────────────

    def submit(self, request_id: RequestId, question: Question, now: float) -> list[Action]:
        """A new request. Its id was never used before."""
        if self._end is not None:
            return [Resolve(request_id, self._end)]
        self._open[request_id] = _Open(question, program=question.program)
        return self._say(request_id, now)

    def cancel(self, request_id: RequestId) -> list[Action]:
        """The user does not want it any more; nothing happens if it has its outcome already."""
        request = self._close(request_id)
        return self._say_cancel(request_id) if request is not None and request.said_under is not None else []

    # ── what happens to the connection ───────────────────────────────────────────────────────────────────────────────

    def opened(self, term: int, *, limit_bytes: int, now: float) -> list[Action]:
        """A session has begun, with a dispatcher that takes messages up to `limit_bytes`: say what it may not know."""
        if term != self._term:
            self._cancels.clear()
            self._acks.clear()
            self._acks_due = None
        self._term, self._limit_bytes = term, limit_bytes
        actions: list[Action] = [Say(CancelRequest(request_id=request_id)) for request_id in self._cancels]
        self._cancels.clear()
        for request_id, request in list(self._open.items()):
            request.patience_s = UNHEARD_PAUSE_S
            actions += self._say(request_id, now)
        return actions

    def lost(self) -> None:
        """The session is over."""
        self._limit_bytes = None

    def unsaid(self, request_id: RequestId, now: float) -> None:
        """The socket did not take the request."""
        if (request := self._open.get(request_id)) is not None:
            self._say_again(request_id, request, now + UNSAID_PAUSE_S)

    def give_up(self, error: AdaptError) -> list[Action]:
        """There will be no session any more: what is open, and what comes, ends in this error."""
        self._end, self._limit_bytes = error, None
        resolved: list[Action] = [Resolve(request_id, error) for request_id in list(self._open)]
        for request_id in list(self._open):
            self._close(request_id)
        return resolved

    # ── what the dispatcher says ─────────────────────────────────────────────────────────────────────────────────────

    def accepted(self, message: Accepted) -> None:
        """The request is pinned; it is said again with this, so that no other version answers."""
        request = self._open.get(message.request_id)
        if request is None:
            return
        self._say_again(message.request_id, request, None)
        if not request.version:
            request.version, request.program = message.version, Digest(message.program)

    def replied(self, message: Reply, blobs: tuple[Blob, ...]) -> list[Action]:
        self._acks.append(message.request_id)
        is_first = self._close(message.request_id) is not None
        return [Resolve(message.request_id, message, blobs)] if is_first else []

    def failed(self, message: RequestFailed, now: float) -> list[Action]:
        error = AdaptError.from_wire(message.code, message.message, message.fields)
        request = self._open.get(message.request_id)
        if request is not None and isinstance(error, OverloadedError) and (request.version or request.said_under != self._term):
            pause_s = _retry_pause_s(error)
            if now + pause_s < request.question.deadline:
                self._say_again(message.request_id, request, now + pause_s)
                return []
        self._acks.append(message.request_id)
        if self._close(message.request_id) is None or request is None:
            return []
        if isinstance(error, DeadlineExceededError):  # said of the budget that it was told of
            attempts = message.fields.get("attempts")
            error = DeadlineExceededError(request.question.budget_s, attempts=attempts if isinstance(attempts, list) else None)
        return [Resolve(message.request_id, error)]

    def take_acks(self, now: float, *, is_last: bool = False) -> list[Action]:
        """For the end of a turn of the loop: the acknowledgements of what has come, if they can ride on a request or have waited long.

        None while there is no session. `is_last`: they cannot wait."""
        has_spoken, self._has_spoken = self._has_spoken, False
        if self._limit_bytes is None or not self._acks:
            return []
        if self._acks_due is None:
            self._acks_due = now + ACK_S
        if not has_spoken and not is_last and now < self._acks_due:
            return []
        self._acks_due = None
        acks, self._acks = self._acks, []
        batches = [acks[start : start + ACKS_PER_MESSAGE] for start in range(0, len(acks), ACKS_PER_MESSAGE)]
        return [Say(ReplyAck(request_ids=batch)) for batch in batches]

    # ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def tick(self, now: float) -> list[Action]:
        """Do what has fallen due."""
        actions: list[Action] = []
        for request_id in self._due.take_due(now):
            question = self._open[request_id].question
            if now < question.deadline:
                actions += self._say(request_id, now)
                continue
            actions.append(Resolve(request_id, DeadlineExceededError(question.budget_s)))
            actions += self.cancel(request_id)
        return actions

    def next_wakeup(self) -> float | None:
        """The moment of the next `tick` and `take_acks`; after them it is later than `now`."""
        return earliest(self._due.next_wakeup(), None if self._limit_bytes is None else self._acks_due)

    # ── the parts ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _say(self, request_id: RequestId, now: float) -> list[Action]:
        """Say an open request, if there is a session and time left for an answer."""
        request = self._open[request_id]
        question = request.question
        budget_s = question.deadline - now - min(LAST_WORD_SHARE * question.budget_s, LAST_WORD_S)
        if self._limit_bytes is None or budget_s <= 0:
            self._say_again(request_id, request, None)
            return []
        size_bytes = sum([blob.size for blob in question.blobs])
        if size_bytes > self._limit_bytes:
            self._close(request_id)
            reason = f"the inputs take {size_bytes} bytes, and the dispatcher accepts messages of up to {self._limit_bytes}; send fewer at a time"
            return [Resolve(request_id, InputMismatchError(reason))]
        if size_bytes <= SMALL_BYTES:
            self._say_again(request_id, request, now + request.patience_s)
            request.patience_s *= 2
        else:
            self._say_again(request_id, request, None)
        self._has_spoken = True
        if request.said_under is None:
            request.said_under = self._term
        message = InferRequest(
            request_id=request_id,
            deployment=question.deployment,
            version=request.version,
            program=request.program,
            interface=question.interface,
            budget_s=budget_s,
            numerics=question.numerics,
            leaves=question.leaves,
        )
        return [Say(message, question.blobs)]

    def _say_again(self, request_id: RequestId, request: _Open, moment: float | None) -> None:
        """At that moment, unless its deadline comes first. None: not of its own accord."""
        deadline = request.question.deadline
        self._due.set(request_id, deadline if moment is None or moment > deadline else moment)

    def _say_cancel(self, request_id: RequestId) -> list[Action]:
        if self._limit_bytes is None:
            self._cancels.append(request_id)
            return []
        return [Say(CancelRequest(request_id=request_id))]

    def _close(self, request_id: RequestId) -> _Open | None:
        """The request is open no more; None if it was not."""
        self._due.clear(request_id)
        return self._open.pop(request_id, None)


def _retry_pause_s(error: OverloadedError) -> float:
    wish = getattr(error, "retry_after_s", None)  # it came over a wire
    least, most = RETRY_PAUSES_S
    return min(max(least, wish), most) if isinstance(wish, (int, float)) else least  # in this order a NaN becomes the least
