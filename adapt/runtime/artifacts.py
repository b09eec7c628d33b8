"""Files named by the SHA-256 of their bytes: a store on disk, and how a file that is missing is pulled.

    <directory>/<digest>.safetensors          complete, verified, never changed again: it may be mapped
    <directory>/<digest>.part                 the beginning of a file on its way; kept when the session is lost
    <directory>/<digest>-<random>.part        the same, of a second process that pulls the same file

A file gets its name only after its bytes have been synced and their digest compared, by a rename: several processes
may share a directory. Who writes a `.part` file holds an flock on it.

Pulling is taken apart into `Pull`, which only decides what to ask for next (pure), `PartFile`, which blocks on the
disk, and `Download`, which drives the two on an asyncio loop. The worker pulls stages from the dispatcher, the
dispatcher programs from clients.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from adapt.clock import Clock, monotonic
from adapt.errors import ConfigError, PlanError, WireError
from adapt.protocol.ids import Digest
from adapt.protocol.messages import ArtifactPiece, Fetch
from adapt.protocol.wire import Blob

SUFFIX = ".safetensors"
PART_SUFFIX = ".part"

LEAST_PIECE_BYTES = 16 << 10
FIRST_PIECE_BYTES = 256 << 10
MOST_PIECE_BYTES = 1 << 20
PIECE_S = 0.25  # what a piece should take: well under a heartbeat's timeout, so that it delays nothing for long
IN_FLIGHT = 2  # one under way while the other is asked for
SILENCE_S = 30.0  # activations go first: on a slow link an answer may take this long
ASKS = 4  # times that silence is borne
REFUSED_PAUSE_S = 0.1  # after the socket did not take a `Fetch`

_Result = TypeVar("_Result")


class DigestMismatchError(Exception):
    """All bytes have come, and they are not those that were asked for."""


def check_digest(digest: str) -> Digest:
    """Raises WireError unless `digest` may name a file."""
    if re.fullmatch(r"[0-9a-f]{64}", digest) is None:
        raise WireError(f"{digest[:80]!r} is not a digest: expected 64 lower-case hexadecimal digits")
    return Digest(digest)


class ArtifactStore:
    """A directory of content-addressed files. All methods block on the disk; every thread may call them.

    Raises:
        ConfigError: the directory cannot be made, or not be written to.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory).absolute()  # children that export work in another directory
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.directory):
                pass
        except OSError as error:
            raise ConfigError(f"directory {self.directory}: cannot keep files there: {error.strerror or error}") from None
        self._sweep()

    def path(self, digest: str) -> Path:
        """Where the file lies, or would lie."""
        return self.directory / f"{check_digest(digest)}{SUFFIX}"

    def has(self, digest: str) -> bool:
        return self.path(digest).is_file()

    def size_bytes(self, digest: str) -> int:
        """Raises FileNotFoundError."""
        return self.path(digest).stat().st_size

    def read(self, digest: str, offset: int, length: int) -> bytes:
        """The bytes from `offset` on, fewer than `length` only at the end of the file. Raises FileNotFoundError."""
        descriptor = os.open(self.path(digest), os.O_RDONLY)
        try:
            return os.pread(descriptor, length, offset)
        finally:
            os.close(descriptor)

    def add(self, source: Path | str) -> Digest:
        """Copy a file into the store; the digest of its bytes. The source may change or go afterwards.

        Raises:
            OSError: the source cannot be read, or the store not be written.
        """
        descriptor, temporary = tempfile.mkstemp(dir=self.directory, prefix=".adding-", suffix=PART_SUFFIX)
        try:
            sha = hashlib.sha256()
            with os.fdopen(descriptor, "wb") as target, open(source, "rb") as file:
                fcntl.flock(target, fcntl.LOCK_EX)
                while data := file.read(MOST_PIECE_BYTES):
                    sha.update(data)
                    target.write(data)
                target.flush()
                os.fsync(target.fileno())
                digest = Digest(sha.hexdigest())
                self._publish(Path(temporary), digest)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        return digest

    def verify(self, digest: str) -> bool:
        """Whether the file is there and whole. One that is not whole is removed."""
        path = self.path(digest)
        try:
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == digest:
                    return True
        except FileNotFoundError:
            return False
        path.unlink(missing_ok=True)  # who has mapped it keeps it
        return False

    def _publish(self, temporary: Path, digest: str) -> None:
        """Give a complete, synced file its name."""
        os.chmod(temporary, 0o644)  # temporary files are private; a cache may be shared
        os.replace(temporary, self.path(digest))
        directory = os.open(self.directory, os.O_RDONLY)
        try:
            os.fsync(directory)  # the rename survives a power cut only with its directory
        finally:
            os.close(directory)

    def _sweep(self) -> None:
        """Remove what processes that died have left and nobody will resume: part files with a random name, not locked."""
        for pattern in (f"*-*{PART_SUFFIX}", f".adding-*{PART_SUFFIX}"):
            for path in self.directory.glob(pattern):
                with contextlib.suppress(OSError), _locked(path, create=False) as (_, is_ours):
                    if is_ours:
                        path.unlink()


@contextlib.contextmanager
def _locked(path: Path, *, create: bool) -> Iterator[tuple[int, bool]]:
    """Open `path` and try to lock it; whether that worked. The descriptor is closed at the end."""
    descriptor = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o600)
    try:
        yield descriptor, _try_lock(descriptor, path)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        there, ours = os.stat(path), os.fstat(descriptor)
    except (BlockingIOError, FileNotFoundError):
        return False
    return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)  # it may have been renamed before we had the lock


class PartFile:
    """The beginning of a file on its way. Blocks on the disk; used by one thread at a time."""

    def __init__(self, store: ArtifactStore, digest: str, file_bytes: int, path: Path, descriptor: int) -> None:
        self._store, self._digest, self._file_bytes = store, digest, file_bytes
        self._path, self._descriptor = path, descriptor
        self.size_bytes = os.fstat(descriptor).st_size
        if self.size_bytes > file_bytes:
            self.clear()

    @classmethod
    def open(cls, store: ArtifactStore, digest: str, file_bytes: int) -> Self:
        """Go on with the part file that is there, or begin one; another process's is left to it.

        Raises:
            OSError: among others, when the disk has no room for the file.
        """
        name = store.path(digest).name.removesuffix(SUFFIX)
        for path in (
            store.directory / f"{name}{PART_SUFFIX}",
            store.directory / f"{name}-{secrets.token_hex(6)}{PART_SUFFIX}",
        ):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            if _try_lock(descriptor, path):
                part = cls(store, digest, file_bytes, path, descriptor)
                try:
                    part._check_room()
                except BaseException:
                    part.close()
                    raise
                return part
            os.close(descriptor)
        raise OSError(errno.EAGAIN, "another process removes part files of this name")

    def _check_room(self) -> None:
        free, missing = shutil.disk_usage(self._path.parent).free, self._file_bytes - self.size_bytes
        if free < missing:
            raise OSError(errno.ENOSPC, f"the disk has {free:,} bytes left, {missing:,} are needed")

    def append(self, data: memoryview) -> None:
        while len(data):
            written = os.pwrite(self._descriptor, data, self.size_bytes)
            self.size_bytes += written
            data = data[written:]

    def clear(self) -> None:
        os.ftruncate(self._descriptor, 0)
        self.size_bytes = 0

    def finish(self) -> Path:
        """Sync, verify, rename.

        Raises:
            DigestMismatchError: the bytes are others; the file is empty now.
        """
        os.fsync(self._descriptor)
        with open(self._path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != self._digest:
                self.clear()
                raise DigestMismatchError
        self._store._publish(self._path, self._digest)
        return self._store.path(self._digest)

    def close(self) -> None:
        """Let go of the file. What has come is kept under the common name, where another `open` finds it."""
        with contextlib.suppress(OSError):
            if not self.size_bytes or "-" in self._path.name:
                ours = os.fstat(self._descriptor)
                if os.stat(self._path).st_ino == ours.st_ino:  # after `finish` it is not there, or another's
                    self._path.unlink()
        os.close(self._descriptor)


def _close_opened(opening: Future[PartFile]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


@dataclass(slots=True)
class _Ask:
    offset: int
    length: int
    asked_at: float | None = None  # None: it is still to be sent, or to be sent again


class Pull:
    """What to ask for next, two asks at a time, in pieces that take about `PIECE_S` each. Pure; `now` in seconds."""

    def __init__(self, *, file_bytes: int, begin: int = 0, now: float) -> None:
        self._file_bytes, self._next = file_bytes, begin
        self._asks: list[_Ask] = []  # lowest offset first
        self._piece_bytes = FIRST_PIECE_BYTES
        self._rate: float | None = None  # bytes per second
        self._heard_at = now
        self._silences = 0
        self._retry_at: float | None = None

    @property
    def is_complete(self) -> bool:
        return not self._asks and self._next >= self._file_bytes

    @property
    def is_hopeless(self) -> bool:
        """Whether the other side has left every ask unanswered for too long."""
        return self._silences >= ASKS

    def ask(self, now: float) -> list[tuple[int, int]]:
        """(offset, length) of what is to be asked for now."""
        while len(self._asks) < IN_FLIGHT and self._next < self._file_bytes:
            length = min(self._piece_bytes, self._file_bytes - self._next)
            self._asks.append(_Ask(self._next, length))
            self._next += length
        if self._retry_at is not None and now < self._retry_at:
            return []
        self._retry_at = None
        due = [ask for ask in self._asks if ask.asked_at is None]
        for ask in due:
            ask.asked_at = now
        return [(ask.offset, ask.length) for ask in due]

    def refused(self, offset: int, now: float) -> None:
        """The socket did not take this ask."""
        for ask in self._asks:
            if ask.offset == offset:
                ask.asked_at = None
        self._retry_at = now + REFUSED_PAUSE_S

    def received(self, offset: int, size_bytes: int, now: float) -> bool:
        """A piece has come. False: nobody waits for it (any more).

        Raises:
            WireError: it is not as long as was asked for.
        """
        ask = next((ask for ask in self._asks if ask.offset == offset), None)
        if ask is None:
            return False
        if size_bytes != ask.length:
            raise WireError(f"artifact piece at {offset}: expected {ask.length} bytes, got {size_bytes}")
        self._asks.remove(ask)
        elapsed_s = now - max(self._heard_at, ask.asked_at if ask.asked_at is not None else now)
        self._heard_at, self._silences = now, 0
        self._adapt(size_bytes / max(elapsed_s, 1e-6))
        return True

    def _adapt(self, rate: float) -> None:
        self._rate = rate if self._rate is None else (self._rate + rate) / 2
        wish = min(max(self._rate * PIECE_S, self._piece_bytes / 2), self._piece_bytes * 2)  # by steps: one measurement is little
        rounded = int(wish) // LEAST_PIECE_BYTES * LEAST_PIECE_BYTES
        self._piece_bytes = min(max(rounded, LEAST_PIECE_BYTES), MOST_PIECE_BYTES)

    def tick(self, now: float) -> None:
        """After a long silence ask once more."""
        if self._silent_at() <= now:
            self._silences += 1
            self._heard_at = now
            for ask in self._asks:
                ask.asked_at = None

    def next_wakeup(self) -> float:
        """Later than the `now` of the `tick` before it."""
        silent_at = self._silent_at()
        return silent_at if self._retry_at is None else min(self._retry_at, silent_at)

    def _silent_at(self) -> float:
        asked = [ask.asked_at for ask in self._asks if ask.asked_at is not None]
        return max([self._heard_at, *asked]) + SILENCE_S


class Download:
    """One file on its way into a store. Used on one asyncio loop; what blocks runs on `threads`, never two calls at a time.

    A lost session ends a download (cancel the task that runs it): what has come stays in its part file, and the next
    download of that digest goes on from there.

    Args:
        send: sends a `Fetch` to whoever has the file; False when that is not possible at the moment.
    """

    def __init__(
        self,
        store: ArtifactStore,
        digest: str,
        file_bytes: int,
        *,
        send: Callable[[Fetch], bool],
        threads: Executor,
        clock: Clock = monotonic,
    ) -> None:
        self.digest, self.file_bytes = check_digest(digest), file_bytes
        self._store, self._send, self._threads, self._clock = store, send, threads, clock
        self._pull: Pull | None = None
        self._early: dict[int, memoryview] = {}  # pieces that have overtaken the one before; at most IN_FLIGHT - 1
        self._arrived = asyncio.Event()
        self._failure: Exception | None = None
        self._busy: Future[Any] = Future()  # the last call that blocks

    async def run(self) -> Path:
        """Pull, verify and store the file.

        Returns:
            Its path in the store.

        Raises:
            PlanError: the disk is full or fails, or the other side does not have the file or does not answer.
            WireError: twice the bytes were not those of the digest, or a piece was not what had been asked for.
        """
        opening = self._busy = self._threads.submit(PartFile.open, self._store, self.digest, self.file_bytes)
        try:
            part = await asyncio.wrap_future(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close_opened)  # it may be opened all the same
            raise
        except OSError as error:
            raise self._disk_error(error) from None
        try:
            for is_last in (False, True):
                await self._pull_into(part)
                try:
                    return await self._blocking(part.finish)
                except DigestMismatchError:
                    if is_last:
                        raise WireError(f"artifact {self.digest[:12]}: what was sent, twice, has another digest") from None
            raise AssertionError("unreachable")
        except OSError as error:
            raise self._disk_error(error) from None
        finally:
            self._pull = None
            # When this task was cancelled, a write may still be under way.
            self._busy.add_done_callback(lambda _: part.close())

    def received(self, message: ArtifactPiece, blob: Blob) -> None:
        """A piece has come; it may be of an earlier session or a repetition."""
        if self._pull is None or self._failure is not None:
            return
        if message.file_bytes != self.file_bytes:
            self._fail(WireError(f"artifact {self.digest[:12]}: expected a file of {self.file_bytes} bytes, it has {message.file_bytes}"))
            return
        try:
            if self._pull.received(message.offset, blob.size, self._clock()):
                self._early[message.offset] = blob.contiguous()
                self._arrived.set()
        except WireError as error:
            self._fail(error)

    def missing(self) -> None:
        """The other side does not have the file."""
        self._fail(PlanError(f"artifact {self.digest[:12]}: the sender does not have it any more"))

    def _fail(self, error: Exception) -> None:
        self._failure = error
        self._arrived.set()

    async def _pull_into(self, part: PartFile) -> None:
        pull = self._pull = Pull(file_bytes=self.file_bytes, begin=part.size_bytes, now=self._clock())
        self._early.clear()
        while not pull.is_complete or self._early:
            self._arrived.clear()
            if self._failure is not None:
                raise self._failure
            if (data := self._early.pop(part.size_bytes, None)) is not None:
                self._ask(pull)  # the link is not idle while the disk works
                await self._blocking(lambda data=data: part.append(data))  # type: ignore[misc]
                continue
            self._ask(pull)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(pull.next_wakeup() - self._clock(), 0.001)):
                    await self._arrived.wait()
            pull.tick(self._clock())
            if pull.is_hopeless:
                raise PlanError(f"artifact {self.digest[:12]}: no answer to {ASKS} asks, {SILENCE_S:.0f} s each")

    def _ask(self, pull: Pull) -> None:
        now = self._clock()
        for offset, length in pull.ask(now):
            if not self._send(Fetch(artifact=self.digest, offset=offset, length=length)):
                pull.refused(offset, now)

    async def _blocking(self, call: Callable[[], _Result]) -> _Result:
        busy = self._busy = self._threads.submit(call)
        return await asyncio.wrap_future(busy)

    def _disk_error(self, error: OSError) -> PlanError:
        return PlanError(f"artifact {self.digest[:12]}: cannot be kept in {self._store.directory}: {error.strerror or error}")
