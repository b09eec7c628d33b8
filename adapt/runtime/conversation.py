"""A client's conversation with its dispatcher, on one asyncio loop: what `Client` and `AsyncClient` are doors to.

    any thread ──submit, call, cancel──▶ inbox ──one wake-up for a whole burst──▶ loop: Outcomes decides ──▶ link
               ◀──results of futures── loop, or for large answers that are not what they will be the decoding thread
               ◀──callbacks, progress── a thread of their own: nothing that a user's function does stops sockets or answers

Which answer counts is decided in scheduling/outcome.py. Calls (deploy, undeploy, status) are asked again in every new session, under a
new number: the dispatcher has given up what it did for the earlier one.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import secrets
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from functools import partial
from pathlib import Path
from typing import Any, Self

from msgspec import Struct
from msgspec.structs import replace

from adapt.clock import Clock, monotonic
from adapt.errors import AdaptError, ConfigError, ConnectError, UnknownModelError, WireError
from adapt.protocol import messages as msg
from adapt.protocol import wire
from adapt.protocol.codecs import TensorHeader
from adapt.protocol.ids import ClientId, Digest, RequestId
from adapt.protocol.wire import Blob
from adapt.runtime import heap
from adapt.runtime.alarm import Alarm
from adapt.runtime.link import LinkEvent, LinkReceived, LinkRefused, PeerLink, SessionLost, SessionOpened
from adapt.runtime.threads import SerialThread
from adapt.scheduling.outcome import Action, Outcomes, Question, Resolve, Say
from adapt.version import VERSION

log = logging.getLogger(__name__)

LIMIT_BYTES = 1 << 30  # of one answer
INLINE_BYTES = 64 << 10  # answers up to this size are decoded on the loop itself, whatever that takes
GOODBYE_S = 0.2  # how long the last messages may take to leave

_CANCELLING = threading.Lock()  # of any future: so that each is told of once

Decode = Callable[[list[msg.Leaf], tuple[Blob, ...]], Any]
Encode = Callable[[], tuple[list[msg.Leaf], tuple[Blob, ...]]]


class Outcome(Struct, frozen=True):
    """What is known of a request besides its result.

    Attributes:
        attempts: tries that all its stages took together.
        numeric_classes: what the bits of the result depend on besides the model; one entry if all stages agreed.
    """

    attempts: int
    numeric_classes: tuple[str, ...]


class InferFuture(Future[Any]):
    """The answer to one request, to come.

    `cancel()` reaches the cluster. Callbacks are called on a thread of the client's own, one after the other, unless the future is done or
    cancelled by the thread that adds them or cancels it.

    Attributes:
        request_id: what logs call the request.
        outcome: attempts and numeric classes; None until there is a result.
    """

    def __init__(
        self,
        request_id: RequestId,
        deliver: Callable[[Callable[[], None]], None],
        tell_cancelled: Callable[[RequestId], None] | None = None,
    ) -> None:
        """`tell_cancelled`: for the conversation; called once, by the cancelling thread."""
        super().__init__()
        self.request_id = request_id
        self.outcome: Outcome | None = None
        self._deliver, self._tell_cancelled = deliver, tell_cancelled

    def cancel(self) -> bool:
        """Nobody wants the answer any more. False: it has come already."""
        is_cancelled = super().cancel()
        self._tell_if_cancelled()
        return is_cancelled

    def _tell_if_cancelled(self) -> None:
        if not self.cancelled():
            return
        with _CANCELLING:
            tell, self._tell_cancelled = self._tell_cancelled, None
        if tell is not None:
            self.set_running_or_notify_cancel()  # else `concurrent.futures.wait` would never see it
            tell(self.request_id)

    # A future keeps its callbacks. What they hold must not lead back to it, or answers would stay until the collector comes.

    def add_done_callback(self, fn: Callable[[Future[Any]], object]) -> None:
        deliver = self._deliver

        def done(future: Future[Any]) -> None:
            assert isinstance(future, InferFuture)
            future._tell_if_cancelled()  # first: a user's function may take its time
            deliver(partial(fn, future))

        super().add_done_callback(done)

    def on_done(self, tell: Callable[[Future[Any]], object]) -> None:
        """For what waits on a user's behalf: `tell` is called at once, by the thread that settles or cancels. It must not block."""
        super().add_done_callback(tell)


class Submission(Struct):
    """A request on its way: what is asked, and how its answer becomes the user's."""

    question: Question
    decode: Decode
    future: InferFuture


class Call:
    """A question that is answered once: a deployment, a status. `message.call` is given when it is asked."""

    def __init__(
        self,
        message: msg.Deploy | msg.Rollback | msg.Profile | msg.Undeploy | msg.StatusQuery,
        *,
        progress: Callable[[str, float | None], None] | None = None,
        offered: Mapping[Digest, Path] | None = None,
    ) -> None:
        """Args:
        progress: is told what is being done, and the share of it that is done, if that is known.
        offered: files that the dispatcher may fetch until the answer has come.
        """
        self.message, self.progress, self.offered = message, progress, dict(offered or {})
        self.future: Future[Any] = Future()
        self.times_asked = 0


class Conversation:
    """See the head of this file. Made, opened and closed on its loop; `submit`, `call` and `withdraw` are for any thread.

    Raises:
        ConfigError: the address is none.
    """

    def __init__(self, address: str, *, clock: Clock = monotonic) -> None:
        heap.keep_freed()
        self.address = address
        self.client_id = ClientId(secrets.token_bytes(16))
        self.max_budget_s: float | None = None  # longest deadline that the dispatcher allows; None until it was met
        self._clock, self._loop, self._thread_id = clock, asyncio.get_running_loop(), threading.get_ident()
        # Apart from the others, because a callback may wait for another answer.
        self._decoding, self._callbacks = SerialThread("adapt-decode"), SerialThread("adapt-callbacks")
        self._encoding = SerialThread("adapt-encode")
        self._incarnation = secrets.randbits(63)
        self._inbox: deque[Callable[[], None]] = deque()  # what users ask
        self._is_woken = False
        self._sequence = itertools.count(1)
        self._call_numbers = itertools.count(1)
        self._outcomes = Outcomes()
        self._submissions: dict[RequestId, Submission] = {}
        self._calls: dict[int, Call] = {}
        self._alarm = Alarm(self._end_turn, clock)
        self._end: AdaptError | None = None  # what everything ends in from now on
        self._is_closed = False
        self._opened = asyncio.Event()
        self._link = PeerLink(
            address,
            name=self.client_id.hex(),
            incarnation=self._incarnation,
            hello=self._hello,
            receive=self._received,
            turned=self._end_turn,
            limit_bytes=LIMIT_BYTES,
            clock=clock,
        )

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    @classmethod
    async def opened(cls, address: str, timeout_s: float) -> Self:
        """One that stands. Raises as `open` does, and then leaves nothing behind."""
        conversation = cls(address)
        try:
            await conversation.open(timeout_s)
        except BaseException:
            await conversation.close()
            raise
        return conversation

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
        if self._end is not None:
            raise self._end

    async def close(self) -> None:
        """Cancel what is open, say goodbye, disconnect. Whatever is asked from now on ends in ConnectError."""
        self._serve()
        for submission in list(self._submissions.values()):
            submission.future.cancel()
        self._serve()
        self._act(self._outcomes.take_acks(self._clock(), is_last=True))
        self._give_up(ConnectError(self.address, "this client was closed"))
        self._link.send(msg.Goodbye(reason="the client was closed"))
        self._alarm.cancel()
        self._is_closed = True
        self._end_threads()
        with contextlib.suppress(RuntimeError):  # the interpreter is ending: there are no threads to wait on any more
            await self._link.close(linger_s=GOODBYE_S)

    def abandon(self) -> None:
        """As `close`, for what was forgotten: on the loop, or when that runs no more. Does not wait."""
        closing: Coroutine[Any, Any, None]
        if self._loop.is_running():
            closing = self.close()
        else:  # nobody can be told, and nothing be said
            self._end_threads()
            closing = self._link.close()
        with contextlib.suppress(RuntimeError, StopIteration):
            closing.send(None)  # all is done but waiting for libzmq's threads

    def _end_threads(self) -> None:
        for thread in (self._encoding, self._decoding, self._callbacks):
            thread.close()

    def _hello(self, highest_term: int) -> msg.ClientHello:
        return msg.ClientHello(
            protocol_version=msg.PROTOCOL_VERSION,
            client_id=self.client_id,
            incarnation=self._incarnation,
            highest_term=highest_term,
            software=f"adapt {VERSION}",
        )

    # ── what users ask, from any thread ──────────────────────────────────────────────────────────────────────────────

    def submit(self, question: Question, decode: Decode, *, encode: Encode | None = None) -> InferFuture:
        """Ask for an inference.

        Args:
            encode: makes the question's leaves and blobs, on a thread of its own; a question without it overtakes one with it.

        Raises:
            ConfigError: the dispatcher allows no such budget.
        """
        if self.max_budget_s is not None and question.budget_s > self.max_budget_s:
            raise ConfigError(f"deadline_s={question.budget_s:g}: expected at most {self.max_budget_s:g}, the dispatcher's --max-budget")
        request_id = RequestId(self.client_id, next(self._sequence))
        future = InferFuture(request_id, self._deliver, self._cancel_soon)
        submission = Submission(question, decode, future)
        if encode is None:
            self._ask(partial(self._submit, submission))
        else:
            self._encoding.post(lambda: self._encode(submission, encode))
        return future

    def _encode(self, submission: Submission, encode: Encode) -> None:
        if submission.future.cancelled():
            return
        try:
            leaves, blobs = encode()
        except AdaptError as error:
            _fail(submission.future, error)
            return
        except Exception as error:  # short of memory, say; a caller must not wait for ever
            _fail(submission.future, AdaptError(f"the inputs could not be encoded: {type(error).__name__}: {error}"))
            return
        submission.question = replace(submission.question, leaves=leaves, blobs=blobs)
        self._ask(lambda: self._submit(submission))

    def call(self, call: Call) -> Future[Any]:
        """Ask; the answer comes as the future's result, after all that was told to `progress`.

        Raises:
            ConfigError: the question is none: a field is of a wrong type, or out of range.
        """
        try:
            wire.decode(wire.encode(call.message, session=0, term=0), limit_bytes=LIMIT_BYTES)
        except (WireError, TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f"{type(call.message).__name__.lower()}: {error}") from None
        self._ask(lambda: self._begin_call(call))
        return call.future

    def withdraw(self, call: Call) -> None:
        """Nobody waits for this call any more."""
        self._ask(lambda: self._forget_call(call))

    def _cancel_soon(self, request_id: RequestId) -> None:
        self._ask(partial(self._cancel, request_id))

    def _ask(self, item: Callable[[], None]) -> None:
        self._inbox.append(item)
        if not self._is_woken:
            self._is_woken = True
            call_soon = self._loop.call_soon if threading.get_ident() == self._thread_id else self._loop.call_soon_threadsafe
            with contextlib.suppress(RuntimeError):  # the loop has ended
                call_soon(self._serve)
        if self._is_closed:  # looked at last: either the loop has seen the item or we see this. All there is to do is to end in an error
            self._serve()

    def _serve(self) -> None:
        self._is_woken = False  # before the inbox is emptied: what comes later wakes us again
        with self._link.turn():
            while True:
                try:
                    item = self._inbox.popleft()
                except IndexError:
                    break
                item()
            self._end_turn()

    def _submit(self, submission: Submission) -> None:
        if submission.future.cancelled():
            return
        request_id = submission.future.request_id
        self._submissions[request_id] = submission
        self._act(self._outcomes.submit(request_id, submission.question, self._clock()))

    def _cancel(self, request_id: RequestId) -> None:
        self._submissions.pop(request_id, None)
        self._act(self._outcomes.cancel(request_id))

    def _begin_call(self, call: Call) -> None:
        if self._end is not None:
            _fail(call.future, self._end)
            return
        self._say_call(call)

    def _say_call(self, call: Call) -> None:
        number = next(self._call_numbers)
        self._calls[number] = call
        call.message = replace(call.message, call=number)
        if self._link.send(call.message):
            call.times_asked += 1

    def _forget_call(self, call: Call) -> None:
        if self._calls.pop(call.message.call, None) is not None and isinstance(call.message, (msg.Deploy, msg.Rollback, msg.Profile)):
            self._link.send(msg.CancelCall(call=call.message.call))

    # ── what the dispatcher says ─────────────────────────────────────────────────────────────────────────────────────

    def _received(self, event: LinkEvent) -> None:
        match event:
            case LinkReceived(message=message, blobs=blobs):
                self._understand(message, blobs)
            case SessionOpened(welcome=welcome, term=term):
                self.max_budget_s = welcome.max_budget_s
                self._act(self._outcomes.opened(term, limit_bytes=welcome.max_message_bytes, now=self._clock()))
                calls, self._calls = list(self._calls.values()), {}
                for call in calls:
                    self._say_call(call)
                self._opened.set()
            case SessionLost(reason=reason):
                self._outcomes.lost()
                log.info("session lost", extra={"address": self.address, "reason": reason})
            case LinkRefused(error=error):
                self._give_up(error)
                self._opened.set()

    def _understand(self, message: msg.Message, blobs: tuple[Blob, ...]) -> None:
        match message:
            case msg.Reply():
                self._act(self._outcomes.replied(message, blobs))
            case msg.Accepted():
                self._outcomes.accepted(message)
            case msg.RequestFailed():
                self._act(self._outcomes.failed(message, self._clock()))
            case msg.Fetch():
                self._serve_piece(message)
            case msg.Progress():
                call = self._calls.get(message.call)
                if call is not None and call.progress is not None:
                    told = call.progress
                    self._callbacks.post(lambda: told(message.step, message.share))
            case msg.Deployed() | msg.Profiled() | msg.StatusReport() | msg.CallDone():
                if (call := self._calls.pop(message.call, None)) is not None:
                    self._after_progress(call, partial(_settle, call.future, message))
            case msg.CallFailed():
                if (call := self._calls.pop(message.call, None)) is not None:
                    self._call_failed(call, AdaptError.from_wire(message.code, message.message, message.fields))
            case _:
                log.debug("message passed over", extra={"kind": type(message).__name__})

    def _call_failed(self, call: Call, error: AdaptError) -> None:
        was_done_before = isinstance(call.message, msg.Undeploy) and isinstance(error, UnknownModelError) and call.times_asked > 1
        if was_done_before:  # only the answer was lost
            _settle(call.future, msg.CallDone(call=call.message.call))
        else:
            self._after_progress(call, partial(_fail, call.future, error))

    def _after_progress(self, call: Call, work: Callable[[], None]) -> None:
        if call.progress is None:
            work()
        else:
            self._callbacks.post(work)

    def _serve_piece(self, fetch: msg.Fetch) -> None:
        """Give a piece of a program that is being deployed, or of its canaries."""
        for call in self._calls.values():
            if (path := call.offered.get(Digest(fetch.artifact))) is not None:
                with contextlib.suppress(OSError), open(path, "rb") as file:
                    data = os.pread(file.fileno(), fetch.length, fetch.offset)
                    piece = msg.ArtifactPiece(artifact=fetch.artifact, offset=fetch.offset, file_bytes=os.fstat(file.fileno()).st_size)
                    self._link.send(piece, (Blob.of(data),))
                    return
        self._link.send(msg.ArtifactMissing(artifact=fetch.artifact))

    # ── what is decided is done ──────────────────────────────────────────────────────────────────────────────────────

    def _act(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Say(message=message, blobs=blobs):
                    if not self._link.send(message, blobs) and isinstance(message, msg.InferRequest):
                        self._outcomes.unsaid(message.request_id, self._clock())
                case Resolve(outcome=msg.Reply() as reply):
                    self._reply(self._submissions.pop(action.request_id), reply, action.blobs)
                case Resolve(outcome=AdaptError() as error):
                    submission = self._submissions.pop(action.request_id)
                    if isinstance(error, UnknownModelError):
                        error.add_note(
                            f"It was there when this handle was made; client.model({submission.question.deployment!r}) gives a new one."
                        )
                    _fail(submission.future, error)

    def _reply(self, submission: Submission, reply: msg.Reply, blobs: tuple[Blob, ...]) -> None:
        def finish() -> None:
            future = submission.future
            try:
                result = submission.decode(reply.leaves, blobs)
            except AdaptError as error:
                _fail(future, error)
                return
            except Exception as error:  # short of memory, say; a caller must not wait for ever
                _fail(future, AdaptError(f"the answer could not be decoded: {type(error).__name__}: {error}"))
                return
            future.outcome = Outcome(reply.attempts, tuple(reply.numeric_classes))
            if not _settle(future, result):
                future.outcome = None

        if is_at_hand(reply.leaves, blobs):
            finish()
        else:
            self._decoding.post(lambda: None if submission.future.done() else finish())

    def _give_up(self, error: AdaptError) -> None:
        """There will be no session any more: everything that is open, and that comes, ends in this error."""
        if self._end is None:
            self._end = error
            self._act(self._outcomes.give_up(error))
            for call in self._calls.values():
                _fail(call.future, error)
            self._calls.clear()

    def _deliver(self, work: Callable[[], None]) -> None:
        """Call a user's function: here, if here is a thread of the user's; it might block ours."""
        if threading.get_ident() == self._thread_id or self._decoding.is_current or self._encoding.is_current:
            self._callbacks.post(work)
        else:
            work()

    # ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _end_turn(self) -> None:
        """Do what is due, acknowledge what has come, and set the timer for what is next."""
        now = self._clock()
        self._act(self._outcomes.tick(now))
        self._act(self._outcomes.take_acks(now))
        if self._end is None:
            self._alarm.set(self._outcomes.next_wakeup())


def is_at_hand(leaves: Sequence[msg.Leaf], blobs: Sequence[Blob]) -> bool:
    """Whether to decode this is next to nothing: it is small, or lies there as the user will have it."""
    if sum([blob.size for blob in blobs]) <= INLINE_BYTES:
        return True
    lies_whole = all(len(blob.parts) == 1 and not memoryview(blob.parts[0]).readonly for blob in blobs)
    return lies_whole and all(leaf.codec == "raw" and leaf.dtype != "bfloat16" for leaf in leaves if isinstance(leaf, TensorHeader))


def _settle(future: Future[Any], result: Any) -> bool:
    """False: it has ended before, by being cancelled for instance."""
    try:
        future.set_result(result)
    except InvalidStateError:
        return False
    return True


def _fail(future: Future[Any], error: AdaptError) -> None:
    with contextlib.suppress(InvalidStateError):
        future.set_exception(error)
