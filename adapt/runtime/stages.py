"""The stages of a worker: which are resident, which are being loaded, and the budget that they share.

    LoadStage   resident already: said at once. Loading already: one load, one answer. Else: is there room in the
                budget? From the cache, verified, or pulled from the dispatcher; then mapped and made ready.
    UnloadStage the stage goes, after the last attempt that uses it. Its file stays in the cache.
    a session ends: what is being pulled stops, and goes on where it stopped when `LoadStage` comes again.

Files and loading block; they run on one thread of their own, one after the other.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

from adapt.clock import Clock, monotonic
from adapt.errors import AdaptError, PlanError, WireError
from adapt.protocol.ids import Digest
from adapt.protocol.messages import (
    ArtifactMissing,
    ArtifactPiece,
    Fetch,
    LoadFailed,
    LoadStage,
    StageLoaded,
    UnloadStage,
)
from adapt.protocol.wire import Blob
from adapt.runtime.artifacts import ArtifactStore, Download, check_digest

log = logging.getLogger(__name__)

StageT = TypeVar("StageT")
Spawn: TypeAlias = Callable[[Coroutine[Any, Any, None], str], "asyncio.Task[None]"]


@dataclass(slots=True)
class _Resident(Generic[StageT]):
    stage: StageT
    file_bytes: int
    users: int = 0
    is_unwanted: bool = False  # to be dropped when nobody uses it


@dataclass(slots=True)
class _Loading:
    file_bytes: int
    task: asyncio.Task[None]
    download: Download | None = None


class ResidentStages(Generic[StageT]):
    """See above. Used on one loop.

    Args:
        budget_bytes: the most that the files of resident stages and of those being loaded may take together.
        load_stage: makes a stage of a verified file; runs on the thread.
        send: sends a message to the dispatcher; False when that is not possible at the moment.
        spawn: starts a named background task whose owner outlives this object.
    """

    def __init__(
        self,
        store: ArtifactStore,
        *,
        budget_bytes: int,
        load_stage: Callable[[Path], StageT],
        send: Callable[[Fetch | StageLoaded | LoadFailed], bool],
        spawn: Spawn,
        clock: Clock = monotonic,
    ) -> None:
        self._store, self._budget_bytes, self._load_stage = store, budget_bytes, load_stage
        self._send, self._spawn, self._clock = send, spawn, clock
        self._resident: dict[Digest, _Resident[StageT]] = {}
        self._loading: dict[Digest, _Loading] = {}
        self._ending: dict[Digest, asyncio.Task[None]] = {}  # loads that were stopped and have yet to clean up
        self._went = asyncio.Event()  # a stage that was unwanted
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="adapt-files")

    @property
    def resident(self) -> list[Digest]:
        return sorted(digest for digest, entry in self._resident.items() if not entry.is_unwanted)

    @property
    def resident_bytes(self) -> int:
        return sum(entry.file_bytes for entry in self._resident.values())

    @property
    def room_bytes(self) -> int:
        """What is left of the budget. On any thread."""
        taken = sum(entry.file_bytes for entry in list(self._resident.values())) + sum(
            entry.file_bytes for entry in list(self._loading.values())
        )
        return max(self._budget_bytes - taken, 0)

    def acquire(self, digest: str) -> StageT | None:
        """The stage, which stays until it is released; None if it is not resident."""
        entry = self._resident.get(Digest(digest))
        if entry is None:
            return None
        entry.users += 1
        return entry.stage

    def release(self, digest: str) -> None:
        entry = self._resident[Digest(digest)]
        entry.users -= 1
        if entry.is_unwanted and not entry.users:
            del self._resident[Digest(digest)]
            self._went.set()

    def load(self, order: LoadStage) -> None:
        """Make a stage resident; `StageLoaded` or `LoadFailed` is sent when that is decided."""
        digest = check_digest(order.artifact)
        if (entry := self._resident.get(digest)) is not None:
            entry.is_unwanted = False
            self._send(StageLoaded(artifact=digest, resident_bytes=entry.file_bytes, load_s=0.0))
        elif digest in self._loading:
            log.debug("load asked for again", extra={"artifact": digest})
        elif (error := self._lack_of_room(order)) is not None:
            self._refuse(digest, error)
        else:
            task = self._spawn(self._load(digest, order.file_bytes), f"load-{digest[:12]}")
            self._loading[digest] = _Loading(order.file_bytes, task)

    def unload(self, order: UnloadStage) -> None:
        digest = check_digest(order.artifact)
        self._stop(digest)
        if (entry := self._resident.get(digest)) is None:
            return
        if entry.users:
            entry.is_unwanted = True
        else:
            del self._resident[digest]

    def received(self, message: ArtifactPiece | ArtifactMissing, blobs: tuple[Blob, ...]) -> None:
        """The dispatcher answers a `Fetch`."""
        loading = self._loading.get(Digest(message.artifact))
        if loading is None or loading.download is None:
            return
        match message:
            case ArtifactPiece():
                loading.download.received(message, blobs[0])
            case ArtifactMissing():
                loading.download.missing()

    def stop_pulling(self) -> None:
        """The session has ended: nobody answers what was asked for in it."""
        for digest in [digest for digest, loading in self._loading.items() if loading.download is not None]:
            self._stop(digest)

    async def close(self) -> None:
        """Stop loading, and wait until files are closed."""
        for digest in list(self._loading):
            self._stop(digest)
        while self._ending:
            await asyncio.wait(list(self._ending.values()))
        await asyncio.to_thread(self._thread.shutdown)
        self._resident.clear()

    def _stop(self, digest: Digest) -> None:
        if (loading := self._loading.pop(digest, None)) is not None:
            self._ending[digest] = loading.task
            loading.task.add_done_callback(lambda task: self._ended(digest, task))
            loading.task.cancel()

    def _ended(self, digest: Digest, task: asyncio.Task[None]) -> None:
        if self._ending.get(digest) is task:
            del self._ending[digest]

    def _lack_of_room(self, order: LoadStage) -> PlanError | None:
        staying = sum(entry.file_bytes for entry in self._resident.values() if not entry.is_unwanted)  # others go with their last attempt
        taken = staying + sum(loading.file_bytes for loading in self._loading.values())
        if taken + order.file_bytes <= self._budget_bytes:
            return None
        sizes = {digest: entry.file_bytes for digest, entry in self._resident.items()}
        sizes |= {digest: loading.file_bytes for digest, loading in self._loading.items()}
        there = ", ".join(f"{digest[:12]} ({size:,} bytes)" for digest, size in sorted(sizes.items())[:20])
        return PlanError(
            f"stage {order.artifact[:12]} needs {order.file_bytes:,} bytes, and of the stage budget of {self._budget_bytes:,} bytes "
            f"{max(self._budget_bytes - taken, 0):,} are left; resident or being loaded: {there or 'nothing'}"
        )

    async def _load(self, digest: Digest, file_bytes: int) -> None:
        started_at = self._clock()
        try:
            if (before := self._ending.get(digest)) is not None:
                await asyncio.wait([before])  # it holds the part file
            path = await self._file(digest, file_bytes)
            await self._room(file_bytes)
            stage = await self._on_thread(lambda: self._made_ready(path))
        except AdaptError as error:
            del self._loading[digest]
            self._refuse(digest, error)
            return
        del self._loading[digest]
        self._resident[digest] = _Resident(stage, file_bytes)
        load_s = self._clock() - started_at
        log.info("stage loaded", extra={"artifact": digest, "file_bytes": file_bytes, "load_s": load_s})
        self._send(StageLoaded(artifact=digest, resident_bytes=file_bytes, load_s=load_s))

    async def _room(self, file_bytes: int) -> None:
        """Wait until what is unwanted, and may still be used, has made room."""
        while self.resident_bytes + file_bytes > self._budget_bytes and any(entry.is_unwanted for entry in self._resident.values()):
            self._went.clear()
            await self._went.wait()

    async def _file(self, digest: Digest, file_bytes: int) -> Path:
        """The verified file, from the cache or from the dispatcher."""
        if not await self._on_thread(lambda: self._is_cached(digest)):
            loading = self._loading[digest]
            loading.download = Download(self._store, digest, file_bytes, send=self._send, threads=self._thread, clock=self._clock)
            try:
                await loading.download.run()
            finally:
                loading.download = None
        path = self._store.path(digest)
        if (there_bytes := path.stat().st_size) != file_bytes:
            raise WireError(f"stage {digest[:12]}: expected a file of {file_bytes:,} bytes, it has {there_bytes:,}")
        return path

    def _is_cached(self, digest: Digest) -> bool:
        if not self._store.has(digest):
            return False
        try:
            is_whole = self._store.verify(digest)
        except OSError as error:
            raise PlanError(f"stage {digest[:12]}: the cache cannot be read: {error.strerror or error}") from None
        if not is_whole:
            log.warning("a damaged file was removed from the cache", extra={"artifact": digest})
        return is_whole

    def _made_ready(self, path: Path) -> StageT:
        try:
            return self._load_stage(path)
        except AdaptError:
            raise
        except Exception as error:  # foreign code: torch and the system below it
            raise PlanError(f"stage {path.name[:12]} cannot be loaded: {type(error).__name__}: {str(error)[:1000]}") from error

    def _refuse(self, digest: Digest, error: AdaptError) -> None:
        log.warning("stage not loaded", extra={"artifact": digest, "reason": str(error)})
        code, message, fields = error.to_wire()
        self._send(LoadFailed(artifact=digest, code=code, message=message[:4000], fields=fields))

    async def _on_thread(self, call: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)
