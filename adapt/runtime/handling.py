"""What a task takes of a worker besides computing, measured by the worker: it gives itself tasks and reads its processor's clock.

    ┌▶ encode, check, send ──TCP on this machine──▶ receive, verify ──▶ Executor: decode, a stage without use, encode ─┐
    └─────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘

One round is what a task is for a worker: so many bytes come, and as many leave, by the same code as ever. Rounds of two sizes tell apart what
each task and what each byte takes. CPU seconds of the whole process are counted, which no quota stretches, but for those of the stage: that
works for as long as a small stage does, so that threads have gone to sleep and caches are full of other things. Without it a task took
half as much.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from statistics import median
from time import process_time, thread_time
from typing import Any, Protocol

import numpy as np
import zmq

from adapt.errors import AdaptError
from adapt.planning.model import Handling
from adapt.protocol import codecs
from adapt.protocol.ids import AttemptId, RequestId
from adapt.protocol.messages import Leaf, RunStage
from adapt.protocol.pieces import Assembler
from adapt.protocol.wire import Blob
from adapt.runtime.endpoint import WatchedSocket, letter, parcels, read
from adapt.runtime.link import DEFAULT_PIECE_BYTES

SMALL_BYTES, LARGE_BYTES = 128 << 10, 1 << 20  # activations of that order travel in pieces, as most do
ROUNDS, IN_FLIGHT = 4, 2  # of each size in a sample; as on a busy worker, where one task computes and one waits
SAMPLES = 7  # of which the median counts, after one to warm up
WORK_S, WORKED_BYTES = 0.002, 4 << 20  # of the stage
PATIENCE_S = 2.0  # for a sample: somebody may have forbidden this machine to talk to itself
LIMIT_BYTES = 16 << 20
SESSION = TERM = 1
ARTIFACT = "0" * 64
LOOPBACK = "tcp://127.0.0.1:*"


class Echo:
    """A stage that gives back what it is given, and meanwhile works on other memory.

    Attributes:
        spent_s: CPU seconds of its work, over all runs.
    """

    def __init__(self) -> None:
        self.spent_s = 0.0
        self._memory = np.zeros(WORKED_BYTES // 4, np.float32)

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        began = thread_time()
        while (spent_s := thread_time() - began) < WORK_S:
            np.add(self._memory, 1, out=self._memory)
        self.spent_s += spent_s
        return list(inputs)


class Runs(Protocol):
    """What is needed of `executor.Executor`."""

    async def start(self) -> None: ...
    def submit(self, order: RunStage, blobs: tuple[Blob, ...], stage: Echo) -> Any: ...
    def run_soon(self) -> None: ...
    async def close(self) -> None: ...


class HandlingMeter:
    """Measures in `step`s of 20 to 50 ms of a plain core, which leave nothing behind. A task that comes meanwhile waits for one of them.

    Args:
        open_executor: makes one like the worker's, given what it shall notify.
    """

    def __init__(self, open_executor: Callable[[Callable[[list[Any]], None]], Runs]) -> None:
        self._open_executor = open_executor
        self._samples: list[tuple[float, float]] = []

    @property
    def share(self) -> float:
        """How much is done, 0 to 1."""
        return len(self._samples) / (SAMPLES + 1)

    def step(self) -> bool:
        """Take a sample; on a thread without a running loop. Whether there is more to do.

        Raises:
            AdaptError: this machine cannot be connected to itself.
        """
        try:
            self._samples.append(asyncio.run(self._sample()))
        except (zmq.ZMQError, OSError, TimeoutError) as error:
            raise AdaptError(f"a worker's tasks to itself: {type(error).__name__}: {error}") from error
        return len(self._samples) <= SAMPLES

    @property
    def handling(self) -> Handling:
        """Of the samples so far but the first."""
        small_s, large_s = (median(sizes) for sizes in zip(*self._samples[1:], strict=True))
        byte_s = max(large_s - small_s, 0.0) / (2 * (LARGE_BYTES - SMALL_BYTES))
        return Handling(max(small_s - byte_s * 2 * SMALL_BYTES, 0.0), byte_s)

    async def _sample(self) -> tuple[float, float]:
        """CPU seconds of a round of each size."""
        circle = _Circle(self._open_executor)
        try:
            async with asyncio.timeout(PATIENCE_S):
                await circle.open()
                await circle.go_round(1, SMALL_BYTES)
                return await circle.go_round(ROUNDS, SMALL_BYTES), await circle.go_round(ROUNDS, LARGE_BYTES)
        finally:
            await circle.close()


class _Circle:
    """The two ends of a connection of this process with itself, and an executor between them. On one loop."""

    def __init__(self, open_executor: Callable[[Callable[[list[Any]], None]], Runs]) -> None:
        self._executor = open_executor(self._executed)
        self._context: zmq.Context[Any] = zmq.Context()
        self._assembler = Assembler(session=SESSION, term=TERM, limit_bytes=LIMIT_BYTES)
        self._transfers = itertools.count(1)
        self._stage = Echo()
        self._left = self._unsent = 0  # rounds that have not come to their end, and those that have not begun
        self._round: asyncio.Future[None] | None = None

    async def open(self) -> None:
        self._there = self._socket(self._read)
        self._there.socket.bind(LOOPBACK)
        self._here = self._socket(lambda: None)
        self._here.connect(self._there.socket.get_string(zmq.LAST_ENDPOINT))
        await self._executor.start()

    def _socket(self, receive: Callable[[], None]) -> WatchedSocket:
        return WatchedSocket(self._context, zmq.DEALER, read=receive, noticed=lambda kind, descriptor: None, limit_bytes=LIMIT_BYTES)

    async def go_round(self, rounds: int, size_bytes: int) -> float:
        """CPU seconds of this process for each of so many rounds, without those of the stage."""
        header, payload = codecs.encode(np.random.default_rng(0).random(size_bytes // 4, np.float32))
        self._round = asyncio.get_running_loop().create_future()
        self._left, self._unsent = rounds, max(rounds - IN_FLIGHT, 0)
        began = process_time() - self._stage.spent_s
        for _ in range(min(rounds, IN_FLIGHT)):
            self._send([header], (Blob.of(payload),))
        await self._round
        return (process_time() - self._stage.spent_s - began) / rounds

    def _send(self, leaves: Sequence[Leaf], blobs: tuple[Blob, ...]) -> None:
        attempt = AttemptId(RequestId(bytes(16), 0), 1, 0, 1)
        order = RunStage(attempt=attempt, artifact=ARTIFACT, budget_s=60.0, codec="raw", tolerance=None, leaves=list(leaves))
        _, ready = letter(order, session=SESSION, term=TERM, blobs=blobs)
        for frames in parcels(ready, session=SESSION, term=TERM, transfers=self._transfers, piece_bytes=DEFAULT_PIECE_BYTES):
            self._here.send(frames)

    def _read(self) -> None:
        try:
            for frames in self._there.batch():
                for envelope in read(frames, self._assembler, limit_bytes=LIMIT_BYTES):
                    if isinstance(envelope.message, RunStage):
                        self._executor.submit(envelope.message, envelope.blobs, self._stage)
            self._executor.run_soon()
        except AdaptError as error:  # a stranger has found the port
            self._end(error)

    def _executed(self, events: list[Any]) -> None:
        for event in events:
            if hasattr(event, "blobs"):  # done
                self._came_round(event.leaves, event.blobs)
            elif hasattr(event, "error"):
                self._end(event.error)

    def _came_round(self, leaves: Sequence[Leaf], blobs: tuple[Blob, ...]) -> None:
        self._left -= 1
        if self._unsent:
            self._unsent -= 1
            self._send(leaves, blobs)
        if not self._left:
            self._end(None)

    def _end(self, error: BaseException | None) -> None:
        if self._round is not None and not self._round.done():
            self._round.set_result(None) if error is None else self._round.set_exception(error)

    async def close(self) -> None:
        for end in ("_here", "_there"):
            if (watched := getattr(self, end, None)) is not None:
                watched.close()
        await self._executor.close()
        self._context.destroy(linger=0)
