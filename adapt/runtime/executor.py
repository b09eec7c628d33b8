"""Runs stages and codecs off the event loop.

    loop ──submit──▶ pool: decode ──▶ compute thread: run, one at a time, in order of arrival ──▶ pool: encode ──▶ loop

    state of a work     event                     to
    WAITING             its turn comes            RUNNING     (Begun is said)
                        withdrawn, cancelled      ENDED       (nothing is said: the caller knows)
                        its deadline has come     ENDED       (Failed)
    RUNNING             computed                  ENCODING
                        the model raised          ENDED       (Failed)
                        cancelled, then computed  ENDED       (Cancelled)
    ENCODING            encoded                   ENDED       (Done; Cancelled if it was cancelled meanwhile)

A *chore*, such as a profile, is done in short slices, and only after the compute thread has had nothing else to do for a while: a work that
comes waits for one slice at most.

Large inputs are decoded as soon as they come, while another work computes; large outputs are encoded while the next one computes.
What is small, or travels raw and is not very large, is decoded and encoded on the compute thread itself: the way to another thread takes longer.
Threads only say what happened, in batches, by `notify` on the loop; whoever is told owns all other state.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from enum import Enum, auto
from math import prod
from queue import Empty, SimpleQueue
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
import xxhash
from msgspec import Struct

from adapt.clock import Clock, monotonic
from adapt.errors import AdaptError, DeadlineExceededError, InputMismatchError, ModelError, WireError
from adapt.models import devices
from adapt.protocol import codecs, digests
from adapt.protocol.codecs import TensorHeader
from adapt.protocol.messages import Leaf, RunStage, StageTimes
from adapt.protocol.wire import Blob
from adapt.runtime import heap

log = logging.getLogger(__name__)

INLINE_BYTES = 1 << 20  # raw: to copy and sum so much takes 0.2 ms on a Xeon, less than the way to another thread and back
INLINE_PACKED_BYTES = 8 << 10  # a codec takes longer than a copy
UNALIGNED_BYTES = 64 << 10  # inputs up to this size are left to the interpreter to align
SLOWER = 3.0  # times what is usual, and a computation that nobody waits for any more hangs
SHORT_S = 0.002  # a stage that took less last time is not said to have begun: its answer says as much
HEADER_BYTES = 64 << 10  # at least what the frames of a message take besides its tensors
ALIGNMENT_BYTES = 64  # of torch's own memory: the interpreter copies what is less aligned
MESSAGE_CHARACTERS = 3000  # of an error; the wire allows 4096
QUIET_S = 0.05  # without work, before a chore goes on

Value: TypeAlias = torch.Tensor | int | float | bool | None


class RunnableStage(Protocol):
    """What the executor needs of `models.interpreter.Stage`. It is run under `torch.inference_mode`."""

    def run(self, inputs: Sequence[Any]) -> list[Any]: ...


class Chore:
    """What is done a slice at a time while no work is there. `done` ends with the error that a slice raised, if one did.

    Args:
        step: does a slice, on the compute thread and under `torch.inference_mode`; False: that was the last.
    """

    def __init__(self, step: Callable[[], bool]) -> None:
        self._step = step
        self.done: Future[None] = Future()

    def cancel(self) -> None:
        """No slice begins any more; one that runs comes to its end. On any thread."""
        self.done.cancel()

    def slice(self) -> bool:
        """Whether there is more to do."""
        if self.done.cancelled():
            return False
        try:
            if self._step():
                return True
            error = None
        except Exception as foreign:  # torch, and the model
            error = foreign
        with contextlib.suppress(InvalidStateError):  # cancelled at this very moment
            self.done.set_result(None) if error is None else self.done.set_exception(error)
        return False


class State(Enum):
    WAITING = auto()
    RUNNING = auto()
    ENCODING = auto()
    ENDED = auto()


class Work(Struct, eq=False):
    """One attempt on its way through the executor. Only the executor changes it, under its lock where threads meet."""

    order: RunStage
    blobs: tuple[Blob, ...]
    stage: RunnableStage
    arrived_at: float
    state: State = State.WAITING
    is_cancelled: bool = False
    is_queued: bool = False  # for the compute thread
    decoded: Future[None] | None = None  # None: it is small, and decoded on the compute thread
    inputs: list[Value] = []
    input_digest: bytes = b""
    began_at: float = 0.0
    decode_s: float = 0.0
    compute_s: float = 0.0
    elements: int = 0  # of all inputs: how much there is to compute

    @property
    def is_withdrawn(self) -> bool:
        """Asked before it begins: what has ended then was withdrawn."""
        return self.state is State.ENDED

    def take_inputs(self) -> list[Value]:
        """The inputs, which nobody else keeps from now on: the interpreter can free each after its last use."""
        inputs, self.inputs = self.inputs, []
        return inputs


class Begun(Struct, frozen=True):
    work: Work


class Done(Struct, frozen=True):
    """Computed and encoded. The blobs may share the memory of the output tensors, and keep it alive."""

    work: Work
    leaves: list[Leaf]
    blobs: tuple[Blob, ...]
    times: StageTimes
    output_digest: bytes


class Failed(Struct, frozen=True):
    work: Work
    error: AdaptError


class Cancelled(Struct, frozen=True):
    """It had begun when it was cancelled, and now it has left the compute thread."""

    work: Work


class Crashed(Struct, frozen=True):
    """A bug has ended a thread: the process cannot go on."""

    error: BaseException


Event: TypeAlias = Begun | Done | Failed | Cancelled | Crashed


class Executor:
    """One compute thread and a few codec threads. Created, used and closed on one asyncio loop.

    Args:
        device: where stages run; only used to warm up.
        threads: that torch uses within one operator.
        limit_bytes: the most that the tensors of one message may take, decoded or encoded.
        notify: is given events, in order, on the loop.
        at_once_s: a stage that took less last time is run on the loop itself, if nothing else runs; 0: none is.
    """

    def __init__(
        self,
        *,
        device: str,
        threads: int,
        limit_bytes: int,
        notify: Callable[[list[Event]], None],
        clock: Clock = monotonic,
        codec_threads: int = 2,
        at_once_s: float = 0.0,
    ) -> None:
        self._device, self._threads = device, threads
        self.limit_bytes = limit_bytes  # may be changed at any time
        self._notify, self._clock = notify, clock
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pool = ThreadPoolExecutor(codec_threads, thread_name_prefix="adapt-codec")
        self._queue: SimpleQueue[Work | Chore | None] = SimpleQueue()
        self._chores: deque[Chore] = deque()  # of the compute thread
        self._slice_began_at: float | None = None  # of a chore
        self._quiet_at = 0.0  # moment from which on chores may go on
        self._lock = threading.Lock()
        self._outbox: list[Event] = []  # under the lock; not empty: the loop has been called
        self._unsaid: list[Event] = []  # of the compute thread; said together with what it does next
        self._computing: Work | None = None
        self._took: dict[str, tuple[float, int]] = {}  # seconds that each stage took last, and for how many elements at most, by artifact
        self._at_once_s = at_once_s if device == "cpu" and threads == 1 else 0.0
        self._soon: deque[Work] = deque()  # run on the loop, in a moment
        self._queued = 0  # works that the compute thread was given and has not ended, as far as the loop knows
        self._progress = 0
        self._warm: Future[None] = Future()
        # A daemon: a model that never returns must not keep the process from ending.
        self._compute_thread = threading.Thread(target=self._compute_until_closed, name="adapt-compute", daemon=True)

    async def start(self) -> None:
        """Start the compute thread and wait until the libraries below torch are set up."""
        self._loop = asyncio.get_running_loop()
        devices.limit_threads(self._threads)  # this thread computes as well
        self._compute_thread.start()
        await asyncio.wrap_future(self._warm)

    @property
    def progress(self) -> int:
        """Grows with every step of every work; one that stands still while work is held hangs."""
        return self._progress

    def hanging_s(self, limit_s: float) -> float | None:
        """How long something has been computing that nobody waits for any more, if that is more than the limit. On any thread."""
        work, now, slice_began_at = self._computing, self._clock(), self._slice_began_at
        if slice_began_at is not None and now - slice_began_at > limit_s:
            return now - slice_began_at
        if work is None or now - work.began_at <= max(limit_s, SLOWER * self._usual_s(work)):
            return None
        is_wanted = not work.is_cancelled and now - work.arrived_at < work.order.budget_s
        return None if is_wanted else now - work.began_at

    def _usual_s(self, work: Work) -> float:
        """What it should take, as the last one of its stage did; 0 if there was none."""
        took_s, most = self._took.get(work.order.artifact, (0.0, 0))
        return took_s * max(work.elements / most, 1.0) if most else took_s

    def submit(self, order: RunStage, blobs: tuple[Blob, ...], stage: RunnableStage) -> Work:
        """Take an attempt; its end is told by `notify`, unless `cancel` tells. What is short waits for `run_soon`, which has to follow."""
        work = Work(order, blobs, stage, self._clock(), elements=_elements(order))
        is_small = _is_small(sum([blob.size for blob in blobs]), _packs(order))
        if not is_small:
            work.decoded = self._pool.submit(self._decode, work)
        if self._soon or self._runs_at_once(work):
            self._soon.append(work)
        else:
            self._enqueue(work)
        return work

    def _runs_at_once(self, work: Work) -> bool:
        """Whether it takes less than to wake another thread, and nothing else runs."""
        return self._queued == 0 and work.decoded is None and self._is_within(work, self._at_once_s)

    def _is_within(self, work: Work, limit_s: float) -> bool:
        """Whether it should take less: as the last time, and with no more input than took less before. A larger batch may take long."""
        took_s, most = self._took.get(work.order.artifact, (limit_s, 0))
        return took_s < limit_s and work.elements <= most

    def run_soon(self) -> None:
        """Run what came together, in its order; what is not short, and all after it, on the compute thread. Called by itself as well."""
        if not self._soon:
            return
        events: list[Event] = []
        with torch.inference_mode():
            self._run_some(events)
        self._notify(events)
        events.clear()  # an error among them knows the frames that it went through, and these know the list

    def _run_some(self, events: list[Event]) -> None:
        began = self._clock()
        while self._soon:
            work = self._soon.popleft()
            if work.is_withdrawn:
                continue
            if self._runs_at_once(work):
                self._compute(work, events)
            else:
                self._enqueue(work)
            if self._soon and self._clock() - began > SHORT_S:  # what has been done leaves now, and others want the loop as well
                assert self._loop is not None
                self._loop.call_soon(self.run_soon)
                break

    def _enqueue(self, work: Work) -> None:
        self._queued += 1
        work.is_queued = True
        self._queue.put(work)

    def take_on(self, chore: Chore) -> None:
        """Do this whenever there is nothing else to do. It is over when `done` is, or was cancelled."""
        self._queue.put(chore)

    def withdraw(self, work: Work) -> bool:
        """Take a work back that has not begun: nothing more is heard of it. False: it has begun, and goes on."""
        with self._lock:
            if work.state is not State.WAITING:
                return False
            work.state = State.ENDED
        self._queued -= work.is_queued
        work.blobs = ()  # a decode that is under way has its own reference
        return True

    def cancel(self, work: Work) -> bool:
        """Nobody wants the result. True: it is withdrawn. False: it ends with an event, `Cancelled` if it can."""
        work.is_cancelled = True  # seen at the latest when the state changes, under the lock
        return self.withdraw(work)

    def give_memory_back(self) -> None:
        """Return freed memory to the system, on a codec thread."""
        self._pool.submit(heap.give_memory_back)

    async def close(self, *, patience_s: float = 1.0) -> None:
        """End the threads. A computation that is not over within `patience_s` is left behind."""
        self._queue.put(None)
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._compute_thread.is_alive():
            await asyncio.to_thread(self._compute_thread.join, patience_s)

    # --- on the compute thread -------------------------------------------------------------------------------------

    def _compute_until_closed(self) -> None:
        try:
            devices.limit_threads(self._threads)
            devices.warm_up(self._device)
        except BaseException as error:
            self._warm.set_exception(error)
            return
        self._warm.set_result(None)
        try:
            with torch.inference_mode():
                while (work := self._next()) is not None:
                    self._compute(work, self._unsaid)
                    del work  # or the last work, and its tensors, would stay until the next one comes
        except BaseException as error:
            self._say(*self._unsaid, Crashed(error))

    def _next(self) -> Work | None:
        """The next work; what is unsaid is said before waiting for it. Chores fill the waiting."""
        while True:
            if self._queue.empty():
                self._say_rest()
            item = self._taken()
            if not isinstance(item, Chore):
                return item
            self._chores.append(item)

    def _taken(self) -> Work | Chore | None:
        while self._chores:
            with contextlib.suppress(Empty):
                quiet_s = self._quiet_at - self._clock()
                return self._queue.get(timeout=quiet_s) if quiet_s > 0 else self._queue.get_nowait()
            if self._clock() >= self._quiet_at:  # a short work may have run on the loop meanwhile
                self._do_a_slice(self._chores[0])
        return self._queue.get()

    def _do_a_slice(self, chore: Chore) -> None:
        self._slice_began_at = self._clock()
        if not chore.slice():
            self._chores.popleft()
        self._slice_began_at = None
        self._progress += 1

    def _compute(self, work: Work, events: list[Event]) -> None:
        """Run a work; what happens is added to `events`."""
        if not self._begin(work, events):
            return
        started_at = self._clock()
        self._computing = work
        try:
            outputs = work.stage.run(work.take_inputs())
        except Exception as error:  # foreign code: the model, and torch below it
            self._quiet_at = self._clock() + QUIET_S
            self._end(work, Failed(work, _as_adapt_error(error)), events)
            return
        finally:
            if self._computing is work:
                self._computing = None
        ended_at = self._clock()
        work.compute_s, self._quiet_at = ended_at - started_at, ended_at + QUIET_S
        self._remember(work)
        self._progress += 1
        with self._lock:
            work.state = State.ENCODING
            is_cancelled = work.is_cancelled
        if is_cancelled:
            self._end(work, Cancelled(work), events)
        elif _is_small(sum([value.nbytes for value in outputs if isinstance(value, torch.Tensor)]), work.order.codec != "raw"):
            events.append(self._encode(work, outputs))
        else:
            self._pool.submit(self._encode_and_say, work, outputs)

    def _remember(self, work: Work) -> None:
        """What it took, and for how much: for what is short, the most that has been."""
        _, most = self._took.get(work.order.artifact, (0.0, 0))
        self._took[work.order.artifact] = (work.compute_s, max(work.elements, most) if work.compute_s < SHORT_S else work.elements)

    def _begin(self, work: Work, events: list[Event]) -> bool:
        """A work's turn has come. Whether it is to be computed; its inputs are decoded then."""
        if work.is_withdrawn:  # if it is from here on, that is seen below
            return False
        try:
            if work.decoded is None:
                self._decode(work)
            else:
                if not work.decoded.done():
                    self._say_rest()
                work.decoded.result()
        except Exception as error:
            self._end(work, Failed(work, error if isinstance(error, AdaptError) else WireError(_text_of(error))), events)
            return False
        with self._lock:
            if work.is_withdrawn:
                return False
            work.state = State.RUNNING
        work.began_at = self._clock()
        if work.began_at - work.arrived_at >= work.order.budget_s:
            self._end(work, Failed(work, DeadlineExceededError(work.order.budget_s)), events)
            return False
        self._progress += 1
        if not self._is_within(work, SHORT_S):
            events.append(Begun(work))
        if events is self._unsaid:
            self._say_rest()
        return True

    def _end(self, work: Work, event: Event, events: list[Event]) -> None:
        with self._lock:
            if work.state is State.ENDED:  # cancelled while it waited: that has been told
                return
            work.state = State.ENDED
        work.inputs, work.blobs = [], ()
        events.append(event)

    # --- on any thread ---------------------------------------------------------------------------------------------

    def _say_rest(self) -> None:
        if self._unsaid:
            events = self._unsaid.copy()
            self._unsaid.clear()  # before it is said: then the loop may think that this thread rests
            self._say(*events)

    def _say(self, *events: Event) -> None:
        """Tell the loop. One call of the loop carries whatever is said before it gets to run."""
        assert self._loop is not None
        with self._lock:
            is_called = bool(self._outbox)
            self._outbox.extend(events)
        if not is_called:
            try:
                self._loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:  # the loop is closed: nobody is left who wants to know
                log.debug("said to a closed loop")

    def _deliver(self) -> None:
        with self._lock:
            events, self._outbox = self._outbox, []
        self._queued -= sum([not isinstance(event, (Begun, Crashed)) and event.work.is_queued for event in events])
        self._notify(events)

    def _decode(self, work: Work) -> None:
        started_at = self._clock()
        blobs = iter(work.blobs)
        digest = xxhash.xxh3_128()
        left_bytes = self.limit_bytes
        for leaf in work.order.leaves:
            if isinstance(leaf, TensorHeader):
                blob = next(blobs)
                array = _decoded(leaf, blob, left_bytes)
                left_bytes -= array.nbytes
                _digest_tensor(digest, leaf, array, blob)
                work.inputs.append(_to_tensor(array, leaf.dtype))
            else:
                digest.update(digests.plain_mark(leaf))
                work.inputs.append(leaf)
        work.blobs = ()  # frames that were copied can go
        work.input_digest = digest.digest()
        work.decode_s = self._clock() - started_at
        self._progress += 1

    def _encode_and_say(self, work: Work, outputs: list[Value]) -> None:
        try:
            self._say(self._encode(work, outputs))
        except BaseException as error:
            self._say(Crashed(error))

    def _encode(self, work: Work, outputs: list[Value]) -> Event:
        """The event with which a computed work ends."""
        started_at = self._clock()
        try:
            leaves, blobs, digest = _encoded(outputs, work.order.codec, work.order.tolerance, self.limit_bytes)
        except Exception as error:  # foreign code again: the codecs
            event: Event = Failed(work, _as_adapt_error(error))
        else:
            times = StageTimes(
                wait_s=max(work.began_at - work.arrived_at - work.decode_s, 0.0),
                decode_s=work.decode_s,
                compute_s=work.compute_s,
                encode_s=self._clock() - started_at,
            )
            event = Done(work, leaves, blobs, times, digest)
        with self._lock:
            work.state = State.ENDED
            if work.is_cancelled:
                event = Cancelled(work)
        self._progress += 1
        return event


def _elements(order: RunStage) -> int:
    return sum([prod(leaf.shape) for leaf in order.leaves if isinstance(leaf, TensorHeader)])


def _packs(order: RunStage) -> bool:
    return any(isinstance(leaf, TensorHeader) and leaf.codec != "raw" for leaf in order.leaves)


def _is_small(size_bytes: int, is_packed: bool) -> bool:
    """Whether a codec is done with this sooner than another thread wakes up."""
    return size_bytes <= (INLINE_PACKED_BYTES if is_packed else INLINE_BYTES)


# --- tensors -------------------------------------------------------------------------------------------------------


def _decoded(header: TensorHeader, blob: Blob, limit_bytes: int) -> codecs.Array:
    """The array of one payload. What travelled raw is joined or moved into aligned memory at most once."""
    if header.codec != "raw":
        return codecs.decode(header, blob.contiguous(), limit_bytes=limit_bytes)
    if len(blob.parts) == 1:
        view = blob.contiguous()
        if not view.readonly and _address(view) % ALIGNMENT_BYTES == 0:
            return codecs.decode(header, view, limit_bytes=limit_bytes)
    if blob.size > limit_bytes:
        raise WireError(f"tensors of {blob.size} bytes: {limit_bytes} bytes of the limit are left")
    if blob.size <= UNALIGNED_BYTES:
        return codecs.decode(header, bytearray(blob.contiguous()), limit_bytes=limit_bytes)
    target = torch.empty(blob.size, dtype=torch.uint8).numpy()
    begin = 0
    for part in blob.parts:
        source = np.frombuffer(part, np.uint8)
        target[begin : begin + source.size] = source
        begin += source.size
    return codecs.decode(header, target.data, limit_bytes=limit_bytes)


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0]) if len(view) else 0


def _to_tensor(array: codecs.Array, dtype: str) -> torch.Tensor:
    """A tensor over the same memory."""
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def _to_array(tensor: torch.Tensor) -> tuple[codecs.Array, str]:
    """An array over the same memory if that is contiguous and on the CPU, and the wire's name of its type."""
    if tensor.requires_grad or not tensor.is_cpu or not tensor.is_contiguous():
        tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype is torch.bfloat16:  # numpy has none
        return tensor.view(torch.int16).numpy().view(np.uint16), "bfloat16"
    return tensor.numpy(), _name_of(tensor.dtype)


@functools.cache
def _name_of(dtype: torch.dtype) -> str:
    """The wire's name of a type."""
    return str(dtype).removeprefix("torch.")


def _digest_tensor(digest: Any, header: TensorHeader, array: codecs.Array, blob: Blob) -> None:
    """Add a tensor as it was before the codec, see protocol/digests.py. What travels raw has been summed already."""
    digest.update(digests.label(header.dtype, array.shape))
    checksum = blob.checksum if header.codec == "raw" else xxhash.xxh3_64_intdigest(array.reshape(-1).view(np.uint8).data)
    digest.update(checksum.to_bytes(8, "big"))


def _encoded(outputs: Sequence[Value], codec: str, tolerance: float | None, limit_bytes: int) -> tuple[list[Leaf], tuple[Blob, ...], bytes]:
    """Leaves, payloads, and the digest of the tensors as they were before the codec."""
    leaves: list[Leaf] = []
    blobs: list[Blob] = []
    digest = xxhash.xxh3_128()
    for value in outputs:
        if isinstance(value, torch.Tensor):
            array, dtype = _to_array(value)
            header, payload = codecs.encode(array, codec=codec, tolerance=tolerance, dtype=dtype)
            leaves.append(header)
            blobs.append(Blob.of(payload))
            _digest_tensor(digest, header, array, blobs[-1])
        else:
            digest.update(digests.plain_mark(value))
            leaves.append(value)
    sent_bytes = sum([blob.size for blob in blobs])
    if sent_bytes + HEADER_BYTES > limit_bytes:
        raise InputMismatchError(f"the stage's output takes {sent_bytes:,} bytes, a message {limit_bytes:,}: use a smaller batch")
    return leaves, tuple(blobs), digest.digest()


def _as_adapt_error(error: Exception) -> AdaptError:
    """Our own errors as they are, foreign ones as the model's."""
    return error if isinstance(error, AdaptError) else ModelError(_text_of(error))


def _text_of(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:MESSAGE_CHARACTERS]
