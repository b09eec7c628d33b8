"""A worker's profiles: a program is fetched, measured on the compute thread while nothing else is there to do, and told.

    ProfileProgram  one at a time; another one, or one while draining, is refused
    the first one   what a task takes besides computing is measured before it (handling.py), once in the life of the worker
    CancelProfile   it ends at the next pause, and nothing more is said of it; so does a lost session
    LoadStage       goes first: a profile whose weights take the room that the stage needs is given up

A program's file that was fetched for it is removed from the cache afterwards: nothing else needs it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from adapt.clock import Clock, monotonic
from adapt.errors import AdaptError, OverloadedError, PlanError
from adapt.planning.model import CodecProfile, Handling
from adapt.protocol.ids import Digest
from adapt.protocol.messages import (
    ArtifactMissing,
    ArtifactPiece,
    CancelProfile,
    CodecMeasured,
    Fetch,
    ProfileFailed,
    ProfileProgram,
    ProfileProgress,
    ProgramProfiled,
)
from adapt.protocol.wire import Blob
from adapt.runtime.artifacts import ArtifactStore, Download, check_digest

log = logging.getLogger(__name__)

TELL_S = 0.3  # how often it is said how far it has come
BUSY_RETRY_S = 5.0
MESSAGE_CHARACTERS = 3000  # of an error; the wire allows 4096

Said: TypeAlias = Fetch | ProfileProgress | ProgramProfiled | ProfileFailed


class Profiler(Protocol):
    """What is needed of `models.profiler.Profiler`."""

    costs_s: list[float | None]
    workspace_bytes: list[int | None]
    held_bytes: int

    @property
    def share(self) -> float: ...

    @property
    def codecs(self) -> Sequence[CodecProfile]: ...

    def step(self) -> bool: ...


class Meter(Protocol):
    """What is needed of `handling.HandlingMeter`."""

    @property
    def share(self) -> float:
        """How much is done, 0 to 1."""
        ...

    @property
    def handling(self) -> Handling: ...

    def step(self) -> bool: ...


class Slices(Protocol):
    """What is needed of `executor.Chore`."""

    done: Any  # a concurrent Future

    def cancel(self) -> None: ...


class Measuring:
    """See above. Used on one loop.

    Args:
        open_profiler: of a program's file and a number of runs; blocks, on a thread of its own.
        open_meter: of what a task takes besides computing; None: it is not measured.
        begin: has the steps of a profiler or meter done on the compute thread.
        send: sends a message to the dispatcher; False when that is not possible at the moment.
        spawn: starts a named background task whose owner outlives this object.
    """

    def __init__(
        self,
        store: ArtifactStore,
        *,
        open_profiler: Callable[[Path, int], Profiler],
        open_meter: Callable[[], Meter] | None = None,
        begin: Callable[[Callable[[], bool]], Slices],
        send: Callable[[Said], bool],
        spawn: Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]],
        clock: Clock = monotonic,
    ) -> None:
        self._store, self._open_profiler, self._open_meter, self._begin = store, open_profiler, open_meter, begin
        self._send, self._spawn, self._clock = send, spawn, clock
        self._program: Digest | None = None  # that is being measured
        self._task: asyncio.Task[None] | None = None
        self._download: Download | None = None
        self._profiler: Profiler | None = None
        self._handling: Handling | None = None  # once it has been measured
        self._tell_at = 0.0  # moment from which on it may be said again how much has been fetched

    @property
    def held_bytes(self) -> int:
        """The most that the weights and activations of a profile under way take."""
        return self._profiler.held_bytes if self._profiler is not None else 0

    def measure(self, order: ProfileProgram) -> None:
        """`ProgramProfiled` or `ProfileFailed` is sent when that is decided."""
        program = check_digest(order.program)
        if self._program is not None:
            if program != self._program:
                self._refuse(program, OverloadedError("the worker profiles another program", retry_after_s=BUSY_RETRY_S))
            return
        self._program = program
        self._task = self._spawn(self._measure(order, after=self._task), f"profile-{program[:12]}")

    def cancel(self, order: CancelProfile) -> None:
        if order.program == self._program:
            self.stop()

    def stop(self) -> None:
        """Nobody waits any more: not a session that has ended, nor a dispatcher that has cancelled."""
        if self._task is not None and self._program is not None:
            self._task.cancel()
            self._program = None

    def give_way(self) -> None:
        """Its room is needed for a stage."""
        if self._program is not None:
            self._refuse(self._program, OverloadedError("a stage needs the memory that the profile takes", retry_after_s=BUSY_RETRY_S))
            self.stop()

    def refuse(self, order: ProfileProgram, reason: str) -> None:
        self._refuse(check_digest(order.program), OverloadedError(reason, retry_after_s=BUSY_RETRY_S))

    def received(self, message: ArtifactPiece | ArtifactMissing, blobs: tuple[Blob, ...]) -> None:
        """The dispatcher answers a `Fetch`."""
        if self._download is None or self._download.digest != message.artifact:
            return
        match message:
            case ArtifactPiece():
                self._download.received(message, blobs[0])
            case ArtifactMissing():
                self._download.missing()

    async def _measure(self, order: ProfileProgram, *, after: asyncio.Task[None] | None) -> None:
        """`after`: the one before, which may have to clean up."""
        program = Digest(order.program)
        if after is not None:
            await asyncio.wait([after])
        thread = ThreadPoolExecutor(1, thread_name_prefix="adapt-profile")
        is_ours = False
        try:
            if not await asyncio.get_running_loop().run_in_executor(thread, self._store.verify, program):
                is_ours = True
                await self._pull(program, order.file_bytes, thread)
            path = self._store.path(program)
            self._profiler = await asyncio.get_running_loop().run_in_executor(thread, self._open_profiler, path, order.repetitions)
            handling = await self._handled(program)
            told = await self._measured(program, self._profiler, handling)
        except Exception as error:  # foreign code: a program may come from anybody, and it must not end the worker
            self._program = None
            self._refuse(program, _refusal(error))
        else:
            self._program = None
            log.info("program profiled", extra={"program": program, "seconds": sum(cost or 0.0 for cost in told.costs_s)})
            self._send(told)
        finally:
            thread.shutdown(wait=False, cancel_futures=True)
            self._profiler = None
            if is_ours:
                with contextlib.suppress(OSError):
                    self._store.path(program).unlink(missing_ok=True)

    async def _pull(self, program: Digest, file_bytes: int, thread: ThreadPoolExecutor) -> None:
        self._download = Download(self._store, program, file_bytes, send=self._fetch, threads=thread, clock=self._clock)
        try:
            await self._download.run()
        finally:
            self._download = None

    def _fetch(self, fetch: Fetch) -> bool:
        now = self._clock()
        if self._download is not None and now >= self._tell_at:
            self._tell_at = now + TELL_S
            share = min(fetch.offset / max(self._download.file_bytes, 1), 1.0)
            self._send(ProfileProgress(program=fetch.artifact, step="fetching the program", share=share))
        return self._send(fetch)

    async def _handled(self, program: Digest) -> Handling | None:
        """What a task takes besides computing; None if that cannot be measured now: a profile without it is still one."""
        if self._handling is None and self._open_meter is not None:
            meter = self._open_meter()
            try:
                await self._stepped(program, meter, "measuring what a task takes besides computing")
            except Exception as error:  # of sockets and threads, which may be short for a moment
                log.warning("what a task takes besides computing was not measured", extra={"reason": f"{type(error).__name__}: {error}"})
                return None
            self._handling = meter.handling
            log.info("handling measured", extra={"task_s": self._handling.task_s, "byte_s": self._handling.byte_s})
        return self._handling

    async def _measured(self, program: Digest, profiler: Profiler, handling: Handling | None) -> ProgramProfiled:
        await self._stepped(program, profiler, "measuring")
        return ProgramProfiled(
            program=program,
            costs_s=profiler.costs_s,
            task_s=None if handling is None else handling.task_s,
            byte_s=None if handling is None else handling.byte_s,
            codecs=[_told(codec) for codec in profiler.codecs] or None,
            workspace_bytes=profiler.workspace_bytes,
        )

    async def _stepped(self, program: Digest, work: Profiler | Meter, step: str) -> None:
        """Have it done slice by slice, and tell how far it is."""
        slices = self._begin(work.step)
        done = asyncio.wrap_future(slices.done)
        try:
            told = -1.0
            while not (await asyncio.wait([done], timeout=TELL_S))[0]:
                # While others are served nothing is said, and the dispatcher draws its conclusion.
                if (share := min(work.share, 1.0)) > told:
                    told = share
                    self._send(ProfileProgress(program=program, step=step, share=share))
            done.result()
        finally:
            slices.cancel()  # on the compute thread the last reference goes, and with it the weights

    def _refuse(self, program: Digest, error: AdaptError) -> None:
        log.warning("program not profiled", extra={"program": program, "reason": str(error)})
        code, message, fields = error.to_wire()
        self._send(ProfileFailed(program=program, code=code, message=message[:MESSAGE_CHARACTERS], fields=fields))


def _told(codec: CodecProfile) -> CodecMeasured:
    return CodecMeasured(
        name=codec.name,
        ratio=codec.ratio,
        ratios=list(codec.ratios),
        encode_bytes_per_s=codec.encode_bytes_per_s,
        decode_bytes_per_s=codec.decode_bytes_per_s,
    )


def _refusal(error: Exception) -> AdaptError:
    if isinstance(error, AdaptError):
        return error
    what = "read" if isinstance(error, OSError) else "profiled"
    return PlanError(f"the program cannot be {what}: {type(error).__name__}: {str(error)[:1000]}")
