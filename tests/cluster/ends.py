"""Two ends of a wire for tests: a dispatcher that only keeps sessions and echoes, a client over a PeerLink, a proxy to hurt what is between.

Run as a program, each end is a process that tells on its standard output what happens to it: `ends.py dispatcher ADDRESS TERM` and
`ends.py client ADDRESS`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from adapt.protocol import codecs
from adapt.protocol import messages as msg
from adapt.protocol.ids import RequestId, RoutingId, control_of
from adapt.protocol.wire import Blob
from adapt.runtime.endpoint import Arrival, Disconnected, Malformed, Received, RouterEndpoint
from adapt.runtime.link import LinkEvent, LinkReceived, LinkRefused, PeerLink, SessionLost, SessionOpened
from adapt.scheduling.session import Sessions

WAIT_S = 20.0
LIMIT_BYTES = 64 << 20
PIECE_BYTES = 64 << 10
WELCOME = msg.Welcome(software="test", heartbeat_s=0.5, piece_bytes=PIECE_BYTES, max_message_bytes=LIMIT_BYTES, max_budget_s=60.0)


def on_loop(test: Callable[..., Any]) -> Callable[..., None]:
    """A test that is a coroutine, run on a loop of its own, which has to be left without background tasks."""

    async def watched(*arguments: Any, **named: Any) -> None:
        await test(*arguments, **named)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, left

    @functools.wraps(test)
    def run(*arguments: Any, **named: Any) -> None:
        asyncio.run(watched(*arguments, **named))

    return run


class Watched:
    """Whoever waits for a fact is woken when something has happened."""

    def __init__(self) -> None:
        self._happened = asyncio.Event()

    def happened(self) -> None:
        self._happened.set()

    async def until(self, fact: Callable[[], Any]) -> Any:
        async with asyncio.timeout(WAIT_S):
            while not (found := fact()):
                self._happened.clear()
                await self._happened.wait()
        return found


class Echo(Watched):
    """A dispatcher that welcomes everybody and answers each InferRequest with a Reply of the same tensors."""

    def __init__(self, address: str = "tcp://127.0.0.1:*", *, term: int = 1) -> None:
        super().__init__()
        self.term, self.sessions = term, Sessions()
        self.arrivals: list[Arrival] = []
        self.welcomes = True
        self.answers = True
        self.tell: Callable[[str], None] = lambda text: None
        self.endpoint = RouterEndpoint(address, receive=self._receive, limit_bytes=LIMIT_BYTES, piece_bytes=PIECE_BYTES)
        self.address = self.endpoint.address

    def close(self) -> None:
        self.endpoint.close()

    def messages(self, kind: type) -> list[Any]:
        return [
            arrival.envelope.message
            for arrival in self.arrivals
            if isinstance(arrival, Received) and isinstance(arrival.envelope.message, kind)
        ]

    def all(self, kind: type) -> list[Any]:
        return [arrival for arrival in self.arrivals if isinstance(arrival, kind)]

    def _receive(self, arrival: Arrival) -> None:
        self.arrivals.append(arrival)
        self.happened()
        match arrival:
            case Received(routing_id, envelope):
                self._received(routing_id, envelope)
            case Disconnected(routing_id):
                self.tell(f"disconnected {routing_id.decode()}")
                if (session := self.sessions.routed(routing_id)) is not None:
                    self.sessions.end(session.number)
            case Malformed(error=error):
                self.tell(f"malformed {error}")

    def _received(self, routing_id: RoutingId, envelope: Any) -> None:
        message = envelope.message
        if isinstance(message, msg.ClientHello):
            self.tell(f"hello {routing_id.decode()}")
            if self.welcomes:
                session = self.sessions.welcome(routing_id, "client", message.client_id.hex(), message.incarnation)
                self.endpoint.send(routing_id, WELCOME, session=session.number, term=self.term)
            return
        session = self.sessions.find(routing_id, envelope.session)
        if session is None or envelope.term != self.term:
            self.endpoint.send(control_of(routing_id), msg.SayHello(), session=envelope.session, term=envelope.term)
        elif isinstance(message, msg.Attach):
            self.sessions.attach(routing_id, session.number)
            self.tell(f"attached {session.number}")
        elif isinstance(message, msg.InferRequest) and self.answers:
            reply = msg.Reply(request_id=message.request_id, leaves=message.leaves, attempts=1, numeric_classes=[])
            self.endpoint.send(session.routing_id, reply, session=session.number, term=self.term, blobs=envelope.blobs)

    async def attached(self, count: int = 1) -> Any:
        """The session of the one peer, once both its connections have stood so often."""
        await self.until(lambda: len(self.messages(msg.Attach)) >= count and any(session.is_attached for session in self.sessions))
        return next(session for session in self.sessions if session.is_attached)


class Caller(Watched):
    """A client that keeps what has happened to it."""

    def __init__(self, address: str, *, limit_bytes: int = LIMIT_BYTES) -> None:
        super().__init__()
        self.client_id = os.urandom(16)
        self.events: list[LinkEvent] = []
        self.terms: list[int] = []  # that each hello named
        self.opened = asyncio.Event()
        self.tell: Callable[[str], None] = lambda text: None
        self._sequence = 0
        self.link = PeerLink(
            address, name=self.client_id.hex(), incarnation=9, hello=self._hello, receive=self._receive, limit_bytes=limit_bytes
        )

    def _hello(self, highest_term: int) -> msg.ClientHello:
        self.terms.append(highest_term)
        self.happened()
        return msg.ClientHello(
            protocol_version=msg.PROTOCOL_VERSION, client_id=self.client_id, incarnation=9, highest_term=highest_term, software="test"
        )

    def _receive(self, event: LinkEvent) -> None:
        self.events.append(event)
        match event:
            case SessionOpened(session=session, term=term):
                self.opened.set()
                self.tell(f"opened {session} {term}")
            case SessionLost(reason=reason):
                self.opened.clear()
                self.tell(f"lost {reason}")
            case LinkRefused(error=error):
                self.tell(f"refused {error.code}")
            case LinkReceived(message=message):
                self.tell(f"received {type(message).__name__}")
        self.happened()

    def all(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def received(self, kind: type) -> list[Any]:
        return [event.message for event in self.all(LinkReceived) if isinstance(event.message, kind)]

    def send(self, size: int) -> tuple[bool, int, bytes]:
        """Ask for the echo of so many bytes, no two times the same: whether they went, the number of the request, the bytes."""
        self._sequence += 1
        data = np.random.default_rng(self._sequence).integers(0, 256, size, np.uint8)
        header, payload = codecs.encode(data)
        request = msg.InferRequest(
            request_id=RequestId(self.client_id, self._sequence),
            deployment="d",
            version=0,
            program=None,
            budget_s=1.0,
            numerics="exact",
            leaves=[header],
        )
        return self.link.send(request, (Blob.of(payload),)), self._sequence, data.tobytes()

    def reply(self, sequence: int) -> LinkReceived | None:
        replies = (event for event in self.all(LinkReceived) if isinstance(event.message, msg.Reply))
        return next((event for event in replies if event.message.request_id.sequence == sequence), None)

    async def echo(self, size: int) -> None:
        """Send and wait for the echo, again in every new session, as a client does. Asserts that it is the same."""
        while not await self._echo_once(size):
            pass

    async def _echo_once(self, size: int) -> bool:
        await self.until(lambda: self.link.is_open)
        opened = len(self.all(SessionOpened))
        sent, sequence, data = self.send(size)
        assert sent
        await self.until(lambda: self.reply(sequence) or len(self.all(SessionOpened)) > opened)
        reply = self.reply(sequence)
        if reply is not None:
            assert b"".join(bytes(part) for part in reply.blobs[0].parts) == data
        return reply is not None


@contextlib.asynccontextmanager
async def calling(address: str, **options: Any):
    caller = Caller(address, **options)
    caller.link.start()
    try:
        yield caller
    finally:
        await caller.link.close()


@contextlib.asynccontextmanager
async def echoing(address: str = "tcp://127.0.0.1:*", **options: Any):
    echo = Echo(address, **options)
    try:
        yield echo
    finally:
        echo.close()


class Proxy(Watched):
    """Passes connections on to another port, and can cut or slow down what it passes. A connection is known by its routing id."""

    def __init__(self, target: str) -> None:
        super().__init__()
        self._target = int(target.rsplit(":", 1)[1])
        self._tasks: set[asyncio.Task[None]] = set()
        self._pairs: list[dict[str, Any]] = []
        self._writers: list[asyncio.StreamWriter] = []
        self.bytes_per_s: dict[str, float] = {}  # by the last letter of the routing id, from peer to dispatcher
        self.passed = {"c": 0, "b": 0}

    async def start(self) -> Proxy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.address = f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def close(self) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._writers:
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            onward = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            self._writers.append(writer)
            writer.close()
            return
        pair = {"writers": [writer, onward[1]], "kind": ""}
        self._writers += pair["writers"]
        self._pairs.append(pair)
        for source, sink, is_up in ((reader, onward[1], True), (onward[0], writer, False)):
            task = asyncio.get_running_loop().create_task(self._pass(source, sink, pair, is_up), name="proxy")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, pair: dict[str, Any], is_up: bool) -> None:
        start = b""
        with contextlib.suppress(OSError):
            while data := await source.read(16 << 10):
                if is_up and not pair["kind"]:
                    start += data
                    if b".c" in start or b".b" in start:
                        pair["kind"] = "c" if b".c" in start else "b"
                        self.happened()
                if is_up and pair["kind"]:
                    self.passed[pair["kind"]] += len(data)
                    self.happened()
                    if rate := self.bytes_per_s.get(pair["kind"]):
                        await asyncio.sleep(len(data) / rate)
                sink.write(data)
                await sink.drain()
        for writer in pair["writers"]:
            writer.close()
        if pair in self._pairs:
            self._pairs.remove(pair)

    def standing(self, kind: str) -> list[dict[str, Any]]:
        return [pair for pair in self._pairs if pair["kind"] == kind]

    def cut(self, kind: str) -> None:
        for pair in self.standing(kind):
            for writer in pair["writers"]:
                writer.transport.abort()


@contextlib.asynccontextmanager
async def proxied(target: str):
    proxy = await Proxy(target).start()
    try:
        yield proxy
    finally:
        await proxy.close()


class Process(Watched):
    """One end as a process of its own. `lines` is what it has told so far."""

    def __init__(self, *arguments: str) -> None:
        super().__init__()
        self._process = subprocess.Popen([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, cwd=os.getcwd())
        self.lines: list[str] = []
        self._unfinished = b""
        os.set_blocking(self._process.stdout.fileno(), False)
        asyncio.get_running_loop().add_reader(self._process.stdout.fileno(), self._read)

    def _read(self) -> None:
        data = os.read(self._process.stdout.fileno(), 1 << 16)
        if not data:
            asyncio.get_running_loop().remove_reader(self._process.stdout.fileno())
        *lines, self._unfinished = (self._unfinished + data).split(b"\n")
        self.lines += [line.decode() for line in lines]
        self.happened()

    async def told(self, start: str, count: int = 1) -> str:
        """The so-many-eth line that starts so."""
        found = await self.until(lambda: [line for line in self.lines if line.startswith(start)][count - 1 : count])
        return found[0]

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def end(self) -> None:
        with contextlib.suppress(ValueError):
            asyncio.get_running_loop().remove_reader(self._process.stdout.fileno())
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()


@contextlib.contextmanager
def process(*arguments: str) -> Iterator[Process]:
    started = Process(*arguments)
    try:
        yield started
    finally:
        started.end()


def _say(text: str) -> None:
    print(text, flush=True)


async def _be_dispatcher(address: str, term: int) -> None:
    async with echoing(address, term=term) as echo:
        echo.tell = _say
        _say(f"ready {echo.address}")
        await _asked_to_end()


async def _be_client(address: str) -> None:
    async with calling(address) as caller:
        caller.tell = _say
        _say(f"ready {caller.client_id.hex()}")
        await _asked_to_end()


async def _asked_to_end() -> None:
    asked = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asked.set)
    await asked.wait()


if __name__ == "__main__":
    role, address, *rest = sys.argv[1:]
    asyncio.run(_be_dispatcher(address, int(rest[0])) if role == "dispatcher" else _be_client(address))
