"""A worker's or client's two connections to its dispatcher, kept in one session: it says hello again whenever that is needed."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any, TypeAlias

import zmq
from msgspec import Struct

from adapt.clock import Clock, monotonic
from adapt.errors import AdaptError, ConfigError, WireError
from adapt.protocol.ids import routing_ids
from adapt.protocol.messages import Attach, ClientHello, Goodbye, Message, Refused, Welcome, WorkerHello
from adapt.protocol.pieces import Assembler
from adapt.protocol.wire import Blob, Envelope, Letter, bundles, encode
from adapt.runtime.endpoint import TURN_MESSAGES, WatchedSocket, letter, parcels, read
from adapt.scheduling.session import PeerSession, Step

HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS = 500, 1_500
RECONNECT_MS, RECONNECT_MAX_MS = 100, 1_000
DEFAULT_PIECE_BYTES = 1 << 20
UNTAKEN_PAUSE_S = 0.05  # before what the socket did not take is given to it again
_CLOSED = "the connection was closed"
_RENEWED = "the dispatcher asked for a new session"


class SessionOpened(Struct, frozen=True):
    """Say now what has to be said in every session."""

    welcome: Welcome
    session: int
    term: int


class SessionLost(Struct, frozen=True):
    reason: str


class LinkRefused(Struct, frozen=True):
    """The dispatcher will not have us; the link is of no use any more."""

    error: AdaptError


class LinkReceived(Struct, frozen=True, gc=False):
    message: Message
    blobs: tuple[Blob, ...]


LinkEvent: TypeAlias = SessionOpened | SessionLost | LinkRefused | LinkReceived


class _Turn:
    """A context that may be entered within itself; `end` is called when the outermost is left. (A generator's takes five times as long.)"""

    def __init__(self, end: Callable[[], None]) -> None:
        self._end = end
        self.depth = 0

    def __enter__(self) -> None:
        self.depth += 1

    def __exit__(self, *error: object) -> None:
        self.depth -= 1
        if not self.depth:
            self._end()


class PeerLink:
    """See the head of this file. `start` and everything after it belong to one running loop.

    Args:
        address: of the dispatcher.
        name: of this worker or client, with `incarnation` its address on the other side.
        hello: makes the hello, given the highest term met so far.
        receive: called on the loop with everything that happens.
        turned: called after what has happened together; what is sent until then leaves together.
    """

    def __init__(
        self,
        address: str,
        *,
        name: str,
        incarnation: int,
        hello: Callable[[int], WorkerHello | ClientHello],
        receive: Callable[[LinkEvent], None],
        turned: Callable[[], None] = lambda: None,
        limit_bytes: int,
        clock: Clock = monotonic,
    ) -> None:
        self.address = address
        self._routing_ids = routing_ids(name, incarnation)
        self._hello, self._receive, self._turned, self._limit_bytes, self._clock = hello, receive, turned, limit_bytes, clock
        self._turn = _Turn(self._flush_if_any)
        self._session = PeerSession()
        self._assembler: Assembler | None = None  # of the last session
        self._piece_bytes = DEFAULT_PIECE_BYTES
        self._transfers = itertools.count(1)
        self._timer: asyncio.TimerHandle | None = None
        self._context: zmq.Context[Any] | None = None
        self._sockets: list[WatchedSocket] = []
        self._outbox: list[Letter] = []  # for control, of the open session; leaves at the end of this turn of the loop
        self._flush: asyncio.Handle | None = None
        self._is_refused = False  # the socket did not take what is in the outbox; it is given it again in a moment
        self._bulk_stands = False
        self._reason = _CLOSED

    @property
    def is_open(self) -> bool:
        return self._session.is_open

    @property
    def session(self) -> int:
        return self._session.session

    @property
    def term(self) -> int:
        return self._session.term

    def start(self) -> None:
        """Connect, from the running loop; it goes on by itself, also when nobody listens yet.

        Raises:
            ConfigError: the address is none.
        """
        self._context = zmq.Context()
        self._control = self._connect(self._routing_ids[0], read=self._read_control, noticed=self._noticed, beats=True)
        self._bulk = self._connect(self._routing_ids[1], read=self._read_bulk, noticed=self._noticed_on_bulk, beats=False)

    def _connect(self, identity: bytes, *, read: Callable[[], None], noticed: Callable[[int, int], None], beats: bool) -> WatchedSocket:
        assert self._context is not None
        watched = WatchedSocket(self._context, zmq.DEALER, read=read, noticed=noticed, limit_bytes=self._limit_bytes)
        self._sockets.append(watched)
        socket = watched.socket
        socket.set(zmq.IDENTITY, identity)
        socket.set(zmq.RECONNECT_IVL, RECONNECT_MS)
        socket.set(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
        if beats:  # never on bulk: a large frame on a slow link would starve it, and be cut off for ever
            socket.set(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
            socket.set(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
            socket.set(zmq.HEARTBEAT_TTL, HEARTBEAT_TIMEOUT_MS)
        try:
            watched.connect(self.address)
        except (zmq.ZMQError, ValueError) as error:
            raise ConfigError(f"dispatcher={self.address!r}: not an address: {error}; expected tcp://HOST:PORT") from None
        return watched

    def send(self, message: Message, blobs: tuple[Blob, ...] = ()) -> bool:
        """Send within the open session, with whatever else this turn of the loop has to say.

        False: there is none, or bulk refuses; say it again after `SessionOpened`. What was taken and does not leave is lost only with
        the session."""
        if not self.is_open:
            return False
        session, term = self._session.session, self._session.term
        is_bulk, ready = letter(message, session=session, term=term, blobs=blobs)
        if not is_bulk:
            self._outbox.append(ready)
            if len(self._outbox) >= TURN_MESSAGES and not self._is_refused:
                self._cancel_flush()
                self._flush_outbox()
            elif self._flush is None and not self._turn.depth:
                self._flush = asyncio.get_running_loop().call_soon(self._flush_outbox)
            return True
        pieces = parcels(ready, session=session, term=term, transfers=self._transfers, piece_bytes=self._piece_bytes)
        return all(self._bulk.send(frames) for frames in pieces)

    def turn(self) -> _Turn:
        """What is sent within leaves at its end, together."""
        return self._turn

    def _flush_if_any(self) -> None:
        if self._outbox and self._flush is None:
            self._flush_outbox()

    def _flush_outbox(self) -> None:
        self._flush = None
        self._is_refused = False
        letters, self._outbox = self._outbox, []
        left = 0
        for carried, frames in bundles(letters):
            if not self._control.send(frames):
                self._outbox, self._is_refused = letters[left:], True
                self._flush = asyncio.get_running_loop().call_later(UNTAKEN_PAUSE_S, self._flush_outbox)
                return
            left += len(carried)

    def _clear_outbox(self) -> None:
        """What was to be said in a session that is over."""
        self._outbox.clear()
        self._is_refused = False
        self._cancel_flush()

    def _cancel_flush(self) -> None:
        if self._flush is not None:
            self._flush.cancel()
            self._flush = None

    async def close(self, *, linger_s: float = 0.0) -> None:
        """Disconnect. `linger_s`: how long what was sent last may take to leave."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._context is None:
            return
        context, self._context = self._context, None
        self._flush_outbox()
        self._clear_outbox()
        self._session = PeerSession()
        for watched in self._sockets:
            watched.close(linger_s=linger_s)
        await asyncio.get_running_loop().run_in_executor(None, context.term)

    # ── what arrives ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _read_control(self) -> None:
        self._read(self._control, None)

    def _read_bulk(self) -> None:
        self._read(self._bulk, self._assembler)

    def _read(self, watched: WatchedSocket, assembler: Assembler | None) -> None:
        with self.turn():
            try:
                self._read_batch(watched, assembler)
            finally:
                self._turned()

    def _read_batch(self, watched: WatchedSocket, assembler: Assembler | None) -> None:
        for frames in watched.batch():
            try:
                envelopes = read(frames, assembler, limit_bytes=self._limit_bytes)
            except WireError as error:
                self._spoilt(error)
                continue
            for envelope in envelopes:
                self._take(self._session.received(envelope, self._clock()), envelope)
                if self._context is None:  # closed by whoever was told
                    return

    def _spoilt(self, error: WireError) -> None:
        """A message that cannot be read: only a new session tells the dispatcher that it was lost."""
        self._tear(f"a message could not be read: {error}")

    def _tear(self, reason: str) -> None:
        if self.is_open:
            self._reason = reason
        self._take(self._session.torn(self._clock()), None)

    def _noticed(self, event: int, descriptor: int) -> None:
        self._reason = _CLOSED
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._take(self._session.connected(self._clock()), None)
        elif event == zmq.EVENT_DISCONNECTED:
            self._take(self._session.disconnected(), None)
        self._turned()

    def _noticed_on_bulk(self, event: int, descriptor: int) -> None:
        """libzmq reconnects by itself, but not without loss: pieces that were under way are gone."""
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._bulk_stands = True
        elif event == zmq.EVENT_DISCONNECTED and self._bulk_stands:
            self._bulk_stands = False
            self._tear("the bulk connection was closed")
            self._turned()

    def _tick(self) -> None:
        self._timer = None
        self._take(self._session.tick(self._clock()), None)
        self._turned()

    def _take(self, steps: list[Step], envelope: Envelope | None) -> None:
        """Do what the session says."""
        if len(steps) == 1 and steps[0] is Step.DELIVER and envelope is not None:  # as always, in an open session; it changes no moment
            self._receive(LinkReceived(envelope.message, envelope.blobs))
            return
        for step in steps:
            match step:
                case Step.SAY_HELLO:
                    self._control.send(encode(self._hello(self._session.highest_term), session=0, term=0))
                case Step.ATTACH:
                    assert envelope is not None and isinstance(envelope.message, Welcome)
                    self._attach(envelope.message)
                case Step.DELIVER:
                    assert envelope is not None
                    self._receive(LinkReceived(envelope.message, envelope.blobs))
                case Step.LOST:
                    self._clear_outbox()
                    self._renew_bulk()  # now: libzmq would go on with the rest of what it had, as soon as it has connected again
                    said_goodbye = envelope is not None and isinstance(envelope.message, Goodbye)
                    self._receive(SessionLost("the dispatcher said goodbye" if said_goodbye else self._reason))
                case Step.GIVE_UP:
                    assert envelope is not None and isinstance(envelope.message, Refused)
                    refused = envelope.message
                    self._receive(LinkRefused(AdaptError.from_wire(refused.code, refused.message, refused.fields)))
        self._arm_timer()

    def _attach(self, welcome: Welcome) -> None:
        session, term = self._session.session, self._session.term
        self._piece_bytes = welcome.piece_bytes
        if self._assembler is not None:  # once more: without heartbeats nobody knows whether it has outlived the time between
            self._renew_bulk()
        self._assembler = Assembler(session=session, term=term, limit_bytes=self._limit_bytes)
        self._reason = _RENEWED
        self._bulk.send(encode(Attach(), session=session, term=term))
        self._receive(SessionOpened(welcome, session, term))

    def _renew_bulk(self) -> None:
        """A fresh connection, rid of all that an earlier session had to say."""
        self._bulk_stands = False
        self._bulk.events()
        self._bulk.reconnect()

    def _arm_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = self._session.next_wakeup()
        if due is not None and self._context is not None:
            self._timer = asyncio.get_running_loop().call_later(max(due - self._clock(), 0.0), self._tick)
