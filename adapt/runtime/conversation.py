"""A client's conversation with its dispatcher, on one asyncio loop: what `Client` and `AsyncClient` are doors to.

Requests and calls come from any thread through a queue; one wake-up of the loop serves a whole burst of them. Outcomes leave as
results of `concurrent.futures.Future`s.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import secrets
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from adapt.clock import Clock, monotonic
from adapt.errors import AdaptError, ConnectError, DeadlineExceededError
from adapt.protocol import messages as msg
from adapt.protocol.ids import ClientId, Digest, RequestId
from adapt.protocol.wire import Blob
from adapt.runtime.link import LinkEvent, LinkReceived, LinkRefused, PeerLink, SessionLost, SessionOpened
from adapt.scheduling.outcome import Outcomes, Pending
from adapt.version import VERSION

log = logging.getLogger(__name__)

LIMIT_BYTES = 1 << 30  # of one answer
INLINE_BYTES = 64 << 10  # answers up to this size are decoded on the loop itself
GOODBYE_S = 0.2  # how long the last messages may take to leave


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is known of a request besides its result.

    Attributes:
        attempts: tries that all its stages took together.
        numeric_classes: what the bits of the result depend on besides the model; one entry if all stages agreed.
    """

    attempts: int
    numeric_classes: tuple[str, ...]


class InferFuture(Future[Any]):
    """The answer to one request, to come. `cancel()` reaches the cluster. `outcome` tells more once there is a result."""

    outcome: Outcome | None = None


@dataclass(slots=True)
class Submission:
    """A request on its way: what has to be said, and how its answer becomes the user's."""

    deployment: str
    numerics: str
    leaves: list[msg.Leaf]
    blobs: tuple[Blob, ...]
    deadline: float
    budget_s: float
    finish: Callable[[list[msg.Leaf], tuple[Blob, ...]], Any]
    future: InferFuture = field(default_factory=InferFuture)
    request_id: RequestId | None = None


@dataclass(slots=True)
class Call:
    """A question that is answered once: a deployment, a status."""

    message: msg.Deploy | msg.Undeploy | msg.StatusQuery
    future: Future[Any]
    progress: Callable[[str], None] | None = None
    offered: tuple[Digest, Path] | None = None  # a program that the dispatcher may fetch meanwhile


class Conversation:
    """See the head of this file. Made and closed on its loop; `submit` and `call` are for any thread."""

    def __init__(self, address: str, *, clock: Clock = monotonic) -> None:
        self.address = address
        self.client_id = ClientId(secrets.token_bytes(16))
        self._clock, self._loop = clock, asyncio.get_running_loop()
        self._incarnation = secrets.randbits(63)
        self._inbox: deque[Submission | Call | RequestId] = deque()  # what users ask; a request id: cancel it
        self._is_woken = False
        self._sequence = itertools.count(1)
        self._calls_made = itertools.count(1)
        self._outcomes = Outcomes()
        self._submissions: dict[RequestId, Submission] = {}
        self._calls: dict[int, Call] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._opened = asyncio.Event()
        self._refusal: AdaptError | None = None
        self._decoding = ThreadPoolExecutor(1, thread_name_prefix="adapt-decode")
        self._link = PeerLink(
            address,
            name=self.client_id.hex(),
            incarnation=self._incarnation,
            hello=self._hello,
            receive=self._received,
            limit_bytes=LIMIT_BYTES,
            clock=clock,
        )

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def open(self, timeout_s: float) -> None:
        """Connect and say hello.

        Raises:
            ConnectError: nobody answers in time.
            AdaptError: the dispatcher refuses, and says why.
        """
        self._link.start()
        try:
            async with asyncio.timeout(timeout_s):
                await self._opened.wait()
        except TimeoutError:
            reason = f"no answer within {timeout_s:g} s; is an adapt-dispatcher running there?"
            raise ConnectError(self.address, reason) from None
        if self._refusal is not None:
            raise self._refusal

    async def close(self) -> None:
        """Cancel what is open, say goodbye, disconnect."""
        for request_id, _ in self._outcomes:
            self._cancel(request_id)
        for submission in self._submissions.values():
            submission.future.cancel()
        for call in self._calls.values():
            _fail(call.future, ConnectError(self.address, "this client was closed"))
        self._link.send(msg.Goodbye(reason="the client was closed"))
        if self._timer is not None:
            self._timer.cancel()
        await self._link.close(linger_s=GOODBYE_S)
        self._decoding.shutdown(wait=False, cancel_futures=True)

    def _hello(self, highest_term: int) -> msg.ClientHello:
        return msg.ClientHello(
            protocol_version=msg.PROTOCOL_VERSION,
            client_id=self.client_id,
            incarnation=self._incarnation,
            highest_term=highest_term,
            software=f"adapt {VERSION}",
        )

    # ── what users ask, from any thread ──────────────────────────────────────────────────────────────────────────────

    def submit(self, submission: Submission) -> InferFuture:
        submission.request_id = request_id = RequestId(self.client_id, next(self._sequence))
        submission.future.add_done_callback(lambda future: self._ask(request_id) if future.cancelled() else None)
        self._ask(submission)
        return submission.future

    def call(self, call: Call) -> Future[Any]:
        """Ask; the answer comes as the future's result. The message's own `call` number is given here."""
        call.message = replace(call.message, call=next(self._calls_made))
        self._ask(call)
        return call.future

    def _ask(self, item: Submission | Call | RequestId) -> None:
        self._inbox.append(item)
        if not self._is_woken:
            self._is_woken = True
            with contextlib.suppress(RuntimeError):  # the loop is closed, and everything with it
                self._loop.call_soon_threadsafe(self._serve)

    def _serve(self) -> None:
        self._is_woken = False
        while self._inbox:
            match self._inbox.popleft():
                case Submission() as submission:
                    self._take(submission)
                case Call() as call:
                    self._calls[call.message.call] = call
                    if self._refusal is not None:
                        _fail(call.future, self._refusal)
                    self._link.send(call.message)
                case request_id:
                    self._cancel(request_id)
        self._arm_timer()

    def _take(self, submission: Submission) -> None:
        if self._refusal is not None:
            _fail(submission.future, self._refusal)
            return
        if submission.future.cancelled():
            return
        assert submission.request_id is not None, "given by submit"
        self._submissions[submission.request_id] = submission
        self._say(submission, self._outcomes.submitted(submission.request_id, submission.deadline))

    def _say(self, submission: Submission, pending: Pending) -> None:
        """Send the request, if there is a session; else it is said when there is one."""
        assert submission.request_id is not None
        request = msg.InferRequest(
            request_id=submission.request_id,
            deployment=submission.deployment,
            version=pending.version,
            program=pending.program,
            budget_s=max(pending.deadline - self._clock(), 0.0),
            numerics=submission.numerics,
            leaves=submission.leaves,
        )
        self._link.send(request, submission.blobs)

    def _cancel(self, request_id: RequestId) -> None:
        if self._outcomes.cancelled(request_id):
            self._submissions.pop(request_id, None)
            self._link.send(msg.CancelRequest(request_id=request_id))

    # ── what the dispatcher says ─────────────────────────────────────────────────────────────────────────────────────

    def _received(self, event: LinkEvent) -> None:
        match event:
            case LinkReceived(message=message, blobs=blobs):
                self._understand(message, blobs)
            case SessionOpened():
                self._opened.set()
                for request_id, pending in self._outcomes:
                    self._say(self._submissions[request_id], pending)
                for call in self._calls.values():
                    self._link.send(call.message)
            case SessionLost(reason=reason):
                log.info("session lost", extra={"address": self.address, "reason": reason})
            case LinkRefused(error=error):
                self._refused(error)
        self._arm_timer()

    def _understand(self, message: msg.Message, blobs: tuple[Blob, ...]) -> None:
        match message:
            case msg.Accepted():
                self._outcomes.accepted(message.request_id, message.version, Digest(message.program))
            case msg.Reply():
                if self._outcomes.answered(message.request_id):
                    self._reply(self._submissions.pop(message.request_id), message, blobs)
            case msg.RequestFailed():
                if self._outcomes.answered(message.request_id):
                    error = AdaptError.from_wire(message.code, message.message, message.fields)
                    _fail(self._submissions.pop(message.request_id).future, error)
            case msg.Fetch():
                self._serve_piece(message)
            case msg.Progress():
                call = self._calls.get(message.call)
                if call is not None and call.progress is not None:
                    call.progress(message.step)
            case msg.Deployed() | msg.StatusReport() | msg.CallDone():
                call = self._calls.pop(message.call, None)
                if call is not None:
                    _settle(call.future, message)
            case msg.CallFailed():
                call = self._calls.pop(message.call, None)
                if call is not None:
                    _fail(call.future, AdaptError.from_wire(message.code, message.message, message.fields))
            case _:
                log.debug("message passed over", extra={"kind": type(message).__name__})

    def _reply(self, submission: Submission, reply: msg.Reply, blobs: tuple[Blob, ...]) -> None:
        submission.future.outcome = Outcome(reply.attempts, tuple(reply.numeric_classes))

        def finish() -> None:
            try:
                result = submission.finish(reply.leaves, blobs)
            except AdaptError as error:
                _fail(submission.future, error)
            else:
                _settle(submission.future, result)

        if sum(blob.size for blob in blobs) <= INLINE_BYTES:
            finish()
        else:
            self._decoding.submit(finish)

    def _serve_piece(self, fetch: msg.Fetch) -> None:
        """Give a piece of a program that is being deployed."""
        for call in self._calls.values():
            if call.offered is not None and call.offered[0] == fetch.artifact:
                with open(call.offered[1], "rb") as file:
                    data = os.pread(file.fileno(), fetch.length, fetch.offset)
                    size = os.fstat(file.fileno()).st_size
                piece = msg.ArtifactPiece(artifact=fetch.artifact, offset=fetch.offset, file_bytes=size)
                self._link.send(piece, (Blob.of(data),))
                return
        self._link.send(msg.ArtifactMissing(artifact=fetch.artifact))

    def _refused(self, error: AdaptError) -> None:
        """The dispatcher will not have us: everything that is open ends in its reason."""
        self._refusal = error
        self._opened.set()
        for request_id, _ in self._outcomes:
            self._outcomes.cancelled(request_id)
            _fail(self._submissions.pop(request_id).future, error)
        for call in self._calls.values():
            _fail(call.future, error)
        self._calls.clear()

    # ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _tick(self) -> None:
        for request_id in self._outcomes.take_overdue(self._clock()):
            submission = self._submissions.pop(request_id)
            _fail(submission.future, DeadlineExceededError(submission.budget_s))
            self._link.send(msg.CancelRequest(request_id=request_id))
        self._arm_timer()

    def _arm_timer(self) -> None:
        """Also the moment at which acknowledgements leave, all of this turn of the loop in one message."""
        if acks := self._outcomes.take_acks():
            self._link.send(msg.ReplyAck(request_ids=acks))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = self._outcomes.next_wakeup()
        if due is not None:
            self._timer = self._loop.call_later(max(due - self._clock(), 0.0), self._tick)


def _settle(future: Future[Any], result: Any) -> None:
    with contextlib.suppress(InvalidStateError):  # it was cancelled at this very moment
        future.set_result(result)


def _fail(future: Future[Any], error: AdaptError) -> None:
    with contextlib.suppress(InvalidStateError):
        future.set_exception(error)
