"""The store keeps only whole files, and a pull asks for every byte once, whatever happens on the way."""

from __future__ import annotations

import asyncio
import hashlib
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapt.errors import ConfigError, PlanError, WireError
from adapt.protocol.messages import ArtifactPiece, Fetch
from adapt.protocol.wire import Blob
from adapt.runtime import artifacts
from adapt.runtime.artifacts import IN_FLIGHT, MOST_PIECE_BYTES, SILENCE_S, ArtifactStore, Download, PartFile, Pull

SIZE = 3 * (256 << 10) + 12_345


def content(seed: int = 0, size: int = SIZE) -> bytes:
    return hashlib.shake_128(str(seed).encode()).digest(size)


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def store(tmp_path):
    return ArtifactStore(tmp_path / "store")


# --- the store -----------------------------------------------------------------------------------------------------


def test_what_is_added_is_found_read_and_verified(store, tmp_path):
    data = content()
    source = tmp_path / "source"
    source.write_bytes(data)
    digest = store.add(source)
    assert digest == digest_of(data)
    assert store.has(digest) and store.size_bytes(digest) == len(data) and store.verify(digest)
    assert store.read(digest, 100, 50) == data[100:150]
    assert store.read(digest, len(data) - 10, 50) == data[-10:]
    assert [path.name for path in store.directory.iterdir()] == [f"{digest}.safetensors"]


def test_a_damaged_file_is_removed_when_it_is_verified(store):
    digest = digest_of(content())
    store.path(digest).write_bytes(content()[:-1] + b"x")
    assert store.has(digest)
    assert not store.verify(digest)
    assert not store.has(digest) and not store.verify(digest)


@pytest.mark.parametrize("name", ["../../etc/passwd", "", "ABCDEF" * 10, "a" * 63, "a" * 64 + "\n", "é" * 64])
def test_only_a_digest_names_a_file(store, name):
    with pytest.raises(WireError, match="is not a digest"):
        store.path(name)


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"directory .*file.*cannot keep files there"):
        ArtifactStore(tmp_path / "file" / "below")


def test_what_a_dead_process_left_is_swept_but_not_what_is_locked_or_can_be_resumed(store):
    common, dead, adding = (store.directory / name for name in ("a.part", "a-1f.part", ".adding-x.part"))
    for path in (common, dead, adding):
        path.write_bytes(b"x")
    alive = PartFile.open(store, "b" * 64, 10)
    second = PartFile.open(store, "b" * 64, 10)  # the common name is locked: gets one of its own
    second.append(memoryview(b"12345"))
    ArtifactStore(store.directory)
    assert common.exists() and not dead.exists() and not adding.exists()
    assert len(list(store.directory.glob("b*.part"))) == 2
    second.close()
    alive.close()
    assert list(store.directory.glob("b*.part")) == []  # nothing in it that could be resumed


# --- what is asked for ---------------------------------------------------------------------------------------------


@given(
    size=st.integers(0, 4 << 20),
    begin=st.integers(0, 4 << 20),
    steps=st.lists(st.tuples(st.sampled_from(["first", "last", "refuse", "silence", "stranger"]), st.integers(0, 3))),
)
def test_every_byte_is_asked_for_and_taken_once_in_any_order(size, begin, steps):
    now, begin = 0.0, min(begin, size)
    pull = Pull(file_bytes=size, begin=begin, now=now)
    under_way: dict[int, int] = {}
    taken: list[tuple[int, int]] = []

    def ask() -> None:
        for offset, length in pull.ask(now):
            assert 0 < length <= MOST_PIECE_BYTES and offset + length <= size
            assert under_way.setdefault(offset, length) == length  # asked again as before
        assert len(under_way) <= IN_FLIGHT

    def take(offset: int) -> None:
        taken.append((offset, under_way.pop(offset)))
        assert pull.received(*taken[-1], now)
        assert not pull.received(*taken[-1], now)  # a repetition

    for step, wait_s in [*steps, *[("first", 1)] * 400]:
        now += wait_s
        ask()
        match step:
            case "first" if under_way:
                take(min(under_way))
            case "last" if under_way:
                take(max(under_way))
            case "refuse" if under_way:
                pull.refused(max(under_way), now)
                now += 1
            case "silence":
                now = max(pull.next_wakeup(), now)
                pull.tick(now)
                assert pull.next_wakeup() > now
            case "stranger":
                assert not pull.received(size + 1, 10, now)
    assert pull.is_complete
    position = begin
    for offset, length in sorted(taken):
        assert offset == position
        position += length
    assert position == size


def test_pieces_grow_and_shrink_with_the_rate():
    pull, now, waiting = Pull(file_bytes=100 << 20, now=0.0), 0.0, []
    lengths = []
    for rate in [100e6] * 20 + [20e3] * 20:  # bytes per second
        waiting += pull.ask(now)
        offset, length = waiting.pop(0)
        lengths.append(length)
        now += length / rate
        pull.received(offset, length, now)
    assert max(lengths) == MOST_PIECE_BYTES
    assert lengths[-1] == artifacts.LEAST_PIECE_BYTES


def test_a_piece_of_another_length_is_refused():
    pull = Pull(file_bytes=SIZE, now=0.0)
    (offset, length), _ = pull.ask(0.0)
    with pytest.raises(WireError, match=f"expected {length} bytes, got 5"):
        pull.received(offset, 5, 0.0)


def test_silence_is_borne_a_few_times_and_any_piece_ends_it():
    pull, now = Pull(file_bytes=100 << 20, now=0.0), 0.0
    for _ in range(artifacts.ASKS - 1):
        asked = pull.ask(now)
        assert len(asked) == IN_FLIGHT
        now = pull.next_wakeup()
        pull.tick(now)
    assert not pull.is_hopeless
    pull.received(*asked[0], now)
    for _ in range(artifacts.ASKS):
        assert not pull.is_hopeless
        pull.ask(now)
        now += SILENCE_S
        pull.tick(now)
    assert pull.is_hopeless


# --- whole downloads -----------------------------------------------------------------------------------------------


class Sender:
    """Has a file and answers `Fetch`, at once or as the test says. Runs on the loop of the download."""

    def __init__(self, data: bytes, *, spoil: int = 0) -> None:
        self.data, self.spoil = data, spoil  # the first `spoil` answers are wrong
        self.asked: list[Fetch] = []
        self.download: Download | None = None
        self.answers_left = 10**6
        self.is_silent = asyncio.Event()

    def send(self, fetch: Fetch) -> bool:
        self.asked.append(fetch)
        if self.answers_left:
            self.answers_left -= 1
            asyncio.get_running_loop().call_soon(self.answer, fetch)
        else:
            self.is_silent.set()
        return True

    def answer(self, fetch: Fetch) -> None:
        data = self.data[fetch.offset : fetch.offset + fetch.length]
        if self.spoil:
            self.spoil -= 1
            data = bytes(len(data))
        piece = ArtifactPiece(artifact=fetch.artifact, offset=fetch.offset, file_bytes=len(self.data))
        self.download.received(piece, Blob.of(data))


@pytest.fixture
def threads():
    with ThreadPoolExecutor(2) as threads:
        yield threads


def make(store, sender, threads, *, digest: str | None = None, file_bytes: int | None = None) -> Download:
    download = Download(
        store,
        digest or digest_of(sender.data),
        len(sender.data) if file_bytes is None else file_bytes,
        send=sender.send,
        threads=threads,
    )
    sender.download = download
    return download


@pytest.mark.parametrize("size", [0, 1, 16 << 10, 256 << 10, SIZE, 5 << 20])
def test_a_file_is_pulled_and_verified(store, threads, size):
    async def pull():
        sender = Sender(content(size=size))
        path = await make(store, sender, threads).run()
        assert path.read_bytes() == sender.data
        assert sum(fetch.length for fetch in sender.asked) == size

    asyncio.run(pull())
    assert len(list(store.directory.iterdir())) == 1


def test_a_download_that_was_stopped_goes_on_where_it_was(store, threads):
    async def pull():
        sender = Sender(content(size=5 << 20))
        sender.answers_left = 4
        first = asyncio.create_task(make(store, sender, threads).run())
        await sender.is_silent.wait()
        part = store.directory / f"{digest_of(sender.data)}.part"
        while part.stat().st_size < sender.asked[4].offset:  # noqa: ASYNC110 - the disk tells nobody
            await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait([first])
        kept = part.stat().st_size
        sender.answers_left, sender.asked = 10**6, []
        path = await make(store, sender, threads).run()
        assert path.read_bytes() == sender.data
        assert sender.asked[0].offset == kept > 0

    asyncio.run(pull())


def test_spoiled_bytes_are_asked_for_once_more_and_then_given_up(store, threads):
    async def pull():
        sender = Sender(content(), spoil=1)
        path = await make(store, sender, threads).run()
        assert path.read_bytes() == sender.data
        path.unlink()
        sender = Sender(content(), spoil=1000)
        with pytest.raises(WireError, match="twice, has another digest"):
            await make(store, sender, threads).run()

    asyncio.run(pull())
    assert list(store.directory.iterdir()) == []


def test_a_spoiled_part_file_is_pulled_anew(store, threads):
    async def pull():
        sender = Sender(content())
        (store.directory / f"{digest_of(sender.data)}.part").write_bytes(b"\0" * 70_000)
        path = await make(store, sender, threads).run()
        assert path.read_bytes() == sender.data

    asyncio.run(pull())


def test_another_size_than_announced_is_named(store, threads):
    async def pull():
        sender = Sender(content())
        with pytest.raises(WireError, match=rf"expected a file of {SIZE + 7} bytes, it has {SIZE}"):
            await make(store, sender, threads, file_bytes=SIZE + 7).run()

    asyncio.run(pull())


def test_a_file_that_the_sender_lacks_ends_the_download(store, threads):
    async def pull():
        sender = Sender(content())
        sender.answers_left = 0
        download = make(store, sender, threads)
        asyncio.get_running_loop().call_soon(download.missing)
        with pytest.raises(PlanError, match="does not have it any more"):
            await download.run()

    asyncio.run(pull())


def test_a_full_disk_is_named_with_its_numbers(store, threads, monkeypatch):
    usage = artifacts.shutil.disk_usage(store.directory)
    monkeypatch.setattr(artifacts.shutil, "disk_usage", lambda path: usage._replace(free=1000))

    async def pull():
        with pytest.raises(PlanError, match=f"the disk has 1,000 bytes left, {SIZE:,} are needed"):
            await make(store, Sender(content()), threads).run()

    asyncio.run(pull())


def test_a_disk_that_fills_up_on_the_way_ends_the_download(store, threads, monkeypatch):
    real = os.pwrite

    def pwrite(descriptor, data, offset):
        if offset > 256 << 10:
            raise OSError(28, "No space left on device")
        return real(descriptor, data, offset)

    async def pull():
        monkeypatch.setattr(artifacts.os, "pwrite", pwrite)
        with pytest.raises(PlanError, match="No space left on device"):
            await make(store, Sender(content(size=2 << 20)), threads).run()

    asyncio.run(pull())


def test_two_downloads_of_one_file_do_not_disturb_each_other(store, threads):
    async def pull():
        senders = [Sender(content(size=3 << 20)) for _ in range(2)]
        downloads = [make(store, sender, threads) for sender in senders]
        paths = await asyncio.gather(*(download.run() for download in downloads))
        assert paths[0] == paths[1] and paths[0].read_bytes() == senders[0].data

    asyncio.run(pull())
    assert len(list(store.directory.iterdir())) == 1


def _meet(barrier) -> None:
    barrier.wait(timeout=60)  # both processes are there before either begins


def _pull_in_process(directory) -> str:
    async def pull() -> str:
        sender = Sender(content(size=4 << 20))
        with ThreadPoolExecutor(1) as threads:
            path = await make(ArtifactStore(directory), sender, threads).run()
        return digest_of(path.read_bytes())

    return asyncio.run(pull())


def test_two_processes_pull_one_file_into_one_directory(store):
    context = multiprocessing.get_context("spawn")  # a fork would copy threads' locks
    expected = digest_of(content(size=4 << 20))
    with ProcessPoolExecutor(2, context, initializer=_meet, initargs=(context.Barrier(2),)) as processes:
        assert list(processes.map(_pull_in_process, [store.directory] * 2)) == [expected, expected]
    assert [path.name for path in store.directory.iterdir()] == [f"{expected}.safetensors"]
