"""Sockets that speak messages, not bytes: the dispatcher's one ROUTER, and the ways that every socket here shares.

Plain sockets on the loop, not `zmq.asyncio`: the descriptor of a socket is watched, and what has arrived is taken without blocking. That
costs a third of what futures cost. The descriptor is edge-triggered: it tells that something has changed, once, and says nothing more
until the socket has been asked for its events, so every socket is read again after each send and after each full batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import zmq
from msgspec import Struct
from zmq.utils.monitor import parse_monitor_message

from adapt.errors import ConfigError, WireError
from adapt.protocol.ids import RoutingId, bulk_of, control_of, routing_ids
from adapt.protocol.messages import HELLOS, ArtifactPiece, Attach, Message, Welcome, WorkerHello
from adapt.protocol.pieces import CONTROL_BYTES, Assembler, decode_piece, is_piece, split
from adapt.protocol.wire import (
    MAX_BLOBS,
    MAX_HEADER_BYTES,
    Blob,
    Buffer,
    Envelope,
    Letter,
    bundles,
    decode,
    decode_bundle,
    encode_header,
    is_bundle,
    preamble,
)

log = logging.getLogger(__name__)

DRAIN_LIMIT = 64  # messages taken in one go before others get their turn
DRAIN_ALL = 64 * DRAIN_LIMIT  # ... when everything that has arrived is asked for: endless would be a gift to a flood
TURN_MESSAGES = 24  # what has gathered so far is handled, and leaves: so that a burst keeps several processes busy at a time
ZERO_COPY_BYTES = 64 << 10  # from here on a frame is neither copied when it is sent nor when it arrives
SEND_QUEUE = 10_000  # messages that may wait for one connection before it counts as stuck
HANDSHAKE_MS = 5_000
DEAF_MS = 2_000  # a peer whose system acknowledges nothing for so long hears nothing: answers to its heartbeats are always sent
MAX_FRAME_BYTES = MAX_HEADER_BYTES  # of what may be long in one frame, nothing is longer
MAX_PARTS = MAX_BLOBS + 2

_NOBLOCK = int(zmq.NOBLOCK)  # `zmq.A | zmq.B` costs half a microsecond each time
_SEND_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)
_EVENTS, _POLLIN = int(zmq.EVENTS), int(zmq.POLLIN)


class Received(Struct, frozen=True, gc=False):
    """A message; `routing_id` is the connection that it came from."""

    routing_id: RoutingId
    envelope: Envelope


class Malformed(Struct, frozen=True):
    """Something that is no message."""

    routing_id: RoutingId
    error: WireError


class Disconnected(Struct, frozen=True):
    """The control connection that said hello as `routing_id` is closed."""

    routing_id: RoutingId


class Undelivered(Struct, frozen=True):
    """The control connection is unknown or stuck: these messages were sent and not taken."""

    routing_id: RoutingId
    messages: tuple[Message, ...]


Arrival: TypeAlias = Received | Malformed | Disconnected | Undelivered


class WatchedSocket:
    """A plain socket on the loop, and its monitor. `read` is called whenever something may have arrived, `noticed` for each event."""

    def __init__(
        self, context: zmq.Context[Any], kind: int, *, read: Callable[[], None], noticed: Callable[[int, int], None], limit_bytes: int
    ) -> None:
        self.socket = context.socket(kind)
        self.socket.set(zmq.LINGER, 0)
        self.socket.set(zmq.RCVHWM, 0)  # credit and quotas are the flow control, never a mark at which messages vanish
        self.socket.set(zmq.SNDHWM, SEND_QUEUE)
        self.socket.set(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        self.socket.set(zmq.MAXMSGSIZE, min(limit_bytes, MAX_FRAME_BYTES))
        self._read, self._noticed = read, noticed
        self._loop = asyncio.get_running_loop()
        self._again = False
        self._last: zmq.Frame | None = None  # of the message taken last
        events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        self._monitor = self.socket.get_monitor_socket(events)
        self._loop.add_reader(self.socket.fileno(), self._readable)
        self._loop.add_reader(self._monitor.fileno(), self._monitor_readable)
        self.read_soon()  # a descriptor that was never asked for its events tells nothing
        self._loop.call_soon(self._monitor_readable)

    def close(self, *, linger_s: float = 0.0) -> None:
        """`linger_s`: how long what was sent last may take to leave, in the background."""
        if self.socket.closed:
            return
        self._loop.remove_reader(self.socket.fileno())
        self._loop.remove_reader(self._monitor.fileno())
        self.socket.disable_monitor()
        self._monitor.close(linger=0)
        self.socket.close(linger=int(1000 * linger_s))

    def expect(self, address: str) -> None:
        """Prepare for an address. Raises ValueError for a TCP port that libzmq would take for another: 99999 for 34463."""
        port = address.rpartition(":")[2]
        if address.startswith("tcp://") and port.lstrip("-").isdigit() and not 0 <= int(port) <= 65535:
            raise ValueError("a port is a number from 0 to 65535")
        self.socket.set(zmq.IPV6, int("[" in address))  # not always: where there is none, it costs IPv4 as well

    def connect(self, address: str) -> None:
        """Raises zmq.ZMQError or ValueError for what is no address."""
        self.expect(address)
        self.socket.connect(address)
        self.read_soon()

    def reconnect(self) -> None:
        """A fresh connection to where the last one leads; what waited to be sent is dropped."""
        address = self.socket.get_string(zmq.LAST_ENDPOINT)
        self.socket.disconnect(address)
        self.connect(address)

    # ── what arrives ─────────────────────────────────────────────────────────────────────────────────────────────────

    def read_if_any(self) -> None:
        """Look whether something has arrived. After a send the descriptor may not tell; to ask is what makes it tell again."""
        if self.socket.get(_EVENTS) & _POLLIN:
            self.read_soon()

    def read_soon(self) -> None:
        """Look again in a moment: the descriptor will not tell."""
        if not self._again:
            self._again = True
            self._loop.call_soon(self._readable)

    def _readable(self) -> None:
        self._again = False
        if self.socket.closed:
            return
        try:
            self._read()
        except BaseException:
            self.read_soon()  # a bug in whoever was told of one message must not make us deaf for the next
            raise

    def _monitor_readable(self) -> None:
        """Report what has happened to connections, after what they have brought."""
        events = self.events()
        if events:
            self._read()
        for kind, descriptor in events:
            if not self.socket.closed:
                self._noticed(kind, descriptor)

    def events(self) -> list[tuple[int, int]]:
        """Take what has happened to connections and was not reported yet: kind and descriptor each."""
        events: list[tuple[int, int]] = []
        while not self.socket.closed and self._monitor.get(zmq.EVENTS) & zmq.POLLIN:
            event = parse_monitor_message(self._monitor.recv_multipart(_NOBLOCK))
            events.append((int(event["event"]), int(event["value"])))
        return events

    def batch(self, limit: int = DRAIN_LIMIT) -> Iterator[list[Buffer]]:
        """The frames of what has arrived, at most `limit` messages; more of it is read in a moment."""
        for _ in range(limit):
            if not self.socket.get(_EVENTS) & _POLLIN:  # to ask costs less than to be told by an exception
                return
            yield self._take()
            self._last = None
            if self.socket.closed:
                return
        self.read_soon()

    def _take(self) -> list[Buffer]:
        """One message. Small frames are copied: each would hold the whole buffer into which the socket had read."""
        receive = self.socket.recv
        frame = receive(_NOBLOCK, copy=False)
        frames: list[Buffer] = [frame.bytes if len(frame) < ZERO_COPY_BYTES else frame.buffer]
        while frame.more:  # `recv_multipart` asks the socket instead, which costs a microsecond a frame
            frame = receive(_NOBLOCK, copy=False)
            if len(frames) > MAX_PARTS + 1:
                frames.append(b"")  # only counted
            else:
                frames.append(frame.bytes if len(frame) < ZERO_COPY_BYTES else frame.buffer)
        self._last = frame
        return frames

    def descriptor(self) -> int | None:
        """Of the connection that brought the last message; None where connections have none."""
        assert self._last is not None
        with contextlib.suppress(zmq.ZMQError):
            return int(self._last.get(zmq.SRCFD))
        return None

    # ── what leaves ──────────────────────────────────────────────────────────────────────────────────────────────────

    def send(self, frames: list[Buffer]) -> bool:
        """Hand a message over. False: the connection is unknown or stuck, and nothing was taken."""
        send = self.socket.send
        is_refused = False
        last = len(frames) - 1
        for index, frame in enumerate(frames):
            try:
                flags = _SEND_MORE if index < last else _NOBLOCK
                if len(frame) < ZERO_COPY_BYTES:
                    send(frame, flags)
                else:
                    send(sendable(frame), flags, copy=False)
            except zmq.ZMQError as error:
                if error.errno not in (errno.EAGAIN, errno.EHOSTUNREACH):
                    raise
                is_refused = True
                if index == 0:
                    break  # else the connection has gone while we spoke: the socket drops the rest, but wants to be given it
        self.read_if_any()
        return not is_refused


def sendable(data: Buffer) -> Buffer | zmq.Frame:
    """The frame itself where `data` is all of one: the socket shares it, and nobody has to be told when it has left."""
    if type(data) is memoryview and type(data.obj) is zmq.Frame and len(data) == len(data.obj):
        return data.obj
    return data


def copied(data: memoryview) -> Buffer:
    """A copy that sockets can send as it lies."""
    if len(data) < ZERO_COPY_BYTES:
        return bytes(data)
    with memoryview(data) as view:  # a frame remembers what it was made from: a view that is closed keeps nothing
        return zmq.Frame(view, copy=True).buffer


def letter(message: Message, *, session: int, term: int, blobs: tuple[Blob, ...]) -> tuple[bool, Letter]:
    """Whether a message has to travel on bulk, and itself with its header."""
    header = encode_header(message, session=session, term=term, blobs=blobs)
    is_bulk = type(message) is ArtifactPiece or len(header) + sum([blob.size for blob in blobs]) > CONTROL_BYTES
    return is_bulk, Letter(message, header, blobs)


def parcels(bulky: Letter, *, session: int, term: int, transfers: Iterator[int], piece_bytes: int) -> Iterator[list[Buffer]]:
    """What has to travel on bulk: the message's pieces, or itself if it is a piece already."""
    if type(bulky.message) is ArtifactPiece:
        head = [preamble(bulky.message.KIND, bulky.header), bulky.header]
        return iter([[*head, *(blob.contiguous() for blob in bulky.blobs)]])
    return split(bulky.message, session=session, term=term, blobs=bulky.blobs, transfer=next(transfers), piece_bytes=piece_bytes)


def read(frames: list[Buffer], assembler: Assembler | None, *, limit_bytes: int) -> Sequence[Envelope]:
    """The messages of these frames; none while pieces are missing.

    Args:
        assembler: of the connection that they came from, if it belongs to a session.

    Raises:
        WireError: they are none.
    """
    if not 0 < len(frames) <= MAX_PARTS:
        raise WireError(f"a message of {len(frames)} frames; 2 to {MAX_PARTS} are accepted")
    if is_bundle(frames):
        return decode_bundle(frames, limit_bytes=limit_bytes)
    if is_piece(frames):
        envelope = decode_piece(frames, assembler)
        return () if envelope is None else (envelope,)
    return (decode(frames, limit_bytes=limit_bytes),)


class RouterEndpoint:
    """The dispatcher's socket. On the loop it calls `receive` for everything that arrives, and `turned` after what came together.

    It never waits. What is sent before `turned` has returned leaves then, all that is for one peer in one bundle."""

    def __init__(
        self,
        address: str,
        *,
        receive: Callable[[Arrival], None],
        turned: Callable[[], None] = lambda: None,
        limit_bytes: int,
        piece_bytes: int,
    ) -> None:
        """Bind.

        Raises:
            ConfigError: the address is none, or in use.
        """
        self._receive, self._turned, self._limit_bytes, self._piece_bytes = receive, turned, limit_bytes, piece_bytes
        self._is_turning = False
        self._assemblers: dict[RoutingId, Assembler] = {}  # of the bulk connections of those who were welcomed
        zmq.Frame(bytes(ZERO_COPY_BYTES), copy=False)  # pyzmq now starts what it needs for that; later there may be no descriptors left
        self._greeted: dict[int, RoutingId] = {}  # descriptor -> the control connection that said hello over it
        self._transfers = itertools.count(1)
        self._outbox: dict[RoutingId, list[Letter]] = {}  # of this turn of the loop, by control connection
        self._refused: list[Undelivered] = []
        self._is_flushed_soon = False
        self._loop = asyncio.get_running_loop()
        self.messages_in = self.messages_out = self.parcels_in = self.parcels_out = 0
        self._context: zmq.Context[Any] = zmq.Context()
        self._watched = WatchedSocket(self._context, zmq.ROUTER, read=self._read_turn, noticed=self._noticed, limit_bytes=limit_bytes)
        self._watched.socket.set(zmq.ROUTER_MANDATORY, 1)  # without it a message to a stuck peer vanishes
        self._watched.socket.set(zmq.TCP_MAXRT, DEAF_MS)
        self._watched.socket.set(zmq.ROUTER_HANDOVER, 1)  # a peer that comes back is heard, though its old connection lingers
        try:
            self._watched.expect(address)
            self._watched.socket.bind(address)
        except (zmq.ZMQError, ValueError) as error:
            self.close()
            is_taken = isinstance(error, zmq.ZMQError) and error.errno == errno.EADDRINUSE
            reason = "it is in use; stop the other process or choose another --listen" if is_taken else str(error)
            raise ConfigError(f"listen={address}: cannot be bound: {reason}") from None
        self.address = self._watched.socket.get_string(zmq.LAST_ENDPOINT)

    def close(self, *, linger_s: float = 0.0) -> None:
        """Unbind. Blocks for up to `linger_s` seconds while what was sent last leaves."""
        self._receive, self._turned = _ignore, lambda: None  # whoever listened has gone
        self.flush()
        self._watched.close(linger_s=linger_s)
        self._context.term()

    def send(self, control: RoutingId, message: Message, *, session: int, term: int, blobs: tuple[Blob, ...] = ()) -> None:
        """Send to the peer of this control connection, with whatever else this turn of the loop has for it.

        What is not taken comes back as `Undelivered`; a big message may be torn then, and its receiver drops it."""
        if type(message) is Welcome:
            self._assemblers[bulk_of(control)] = Assembler(session=session, term=term, limit_bytes=self._limit_bytes)
        is_bulk, ready = letter(message, session=session, term=term, blobs=blobs)
        self.messages_out += 1
        if not is_bulk:
            letters = self._outbox.setdefault(control, [])
            letters.append(ready)
            if len(letters) >= TURN_MESSAGES:
                self.flush()
            else:
                self._flush_soon()
            return
        pieces = parcels(ready, session=session, term=term, transfers=self._transfers, piece_bytes=self._piece_bytes)
        route = bulk_of(control)
        self.parcels_out += max(sum(-(-blob.size // self._piece_bytes) for blob in blobs), 1)
        if not all(self._watched.send([route, *frames]) for frames in pieces):
            self._refused.append(Undelivered(control, (message,)))
            self._flush_soon()

    def _flush_soon(self) -> None:
        if not self._is_flushed_soon and not self._is_turning:
            self._is_flushed_soon = True
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Let go what was sent. Done by itself at the end of a turn of the loop."""
        self._is_flushed_soon = False
        if self._watched.socket.closed:
            return
        outbox, self._outbox = self._outbox, {}
        for control, letters in outbox.items():
            for carried, frames in bundles(letters):
                self.parcels_out += 1
                if not self._watched.send([control, *frames]):
                    self._refused.append(Undelivered(control, tuple(one.message for one in carried)))
        refused, self._refused = self._refused, []
        for undelivered in refused:
            self._receive(undelivered)
        if refused:
            self._loop.call_soon(self._turned)

    def counters(self) -> dict[str, float]:
        """What has come and gone, by name. A parcel is one message of libzmq: a bundle, or a piece."""
        names = ("messages_in", "messages_out", "parcels_in", "parcels_out")
        return {name: float(getattr(self, name)) for name in names}

    def drain(self) -> None:
        """Take everything that has arrived, for once without regard to others: before peers are judged by a loop that was late."""
        self._read_batch(DRAIN_ALL, sys.maxsize)

    def _read_turn(self) -> None:
        self._is_turning = True
        try:
            if not self._read_batch(DRAIN_LIMIT, TURN_MESSAGES):
                self._turned()
        finally:
            self._is_turning = False
            self.flush()

    def _read_batch(self, limit: int, turn: int) -> bool:
        """Read up to `limit` parcels. After each `turn` messages others have something to do already. Whether that came last."""
        turn_at, is_handled = self.messages_in + turn, False
        for route, *frames in self._watched.batch(limit):
            routing_id = RoutingId(bytes(route))
            self.parcels_in += 1
            is_handled = False
            try:
                envelopes = read(frames, self._assemblers.get(routing_id), limit_bytes=self._limit_bytes)
                for envelope in envelopes:
                    _check_connection(routing_id, envelope.message)
            except WireError as error:
                self._receive(Malformed(routing_id, error))
                continue
            self.messages_in += len(envelopes)
            for envelope in envelopes:
                if isinstance(envelope.message, HELLOS):
                    self._greet(routing_id)
                self._receive(Received(routing_id, envelope))
            if self.messages_in >= turn_at:
                turn_at, is_handled = self.messages_in + turn, True
                self._turned()
                self.flush()
        return is_handled

    def _greet(self, routing_id: RoutingId) -> None:
        """Learn over which descriptor the peer speaks, so that the end of its connection can be told at once."""
        for event, descriptor in self._watched.events():  # it may have had another owner, whose end must be told first
            self._noticed(event, descriptor)
        own = self._watched.descriptor()
        if own is not None:  # else heartbeats will tell
            self._greeted[own] = routing_id

    def _noticed(self, event: int, descriptor: int) -> None:
        if event != zmq.EVENT_DISCONNECTED or (routing_id := self._greeted.pop(descriptor, None)) is None:
            return
        if routing_id not in self._greeted.values():  # else it has said hello again over a new connection
            self._assemblers.pop(bulk_of(routing_id), None)
            self._receive(Disconnected(routing_id))
            self._loop.call_soon(self._turned)


def _ignore(_: object) -> None:
    pass


def _check_connection(routing_id: RoutingId, message: Message) -> None:
    """Raises WireError for a message about the connection that came over another."""
    if isinstance(message, HELLOS):
        name = message.worker_id if isinstance(message, WorkerHello) else message.client_id.hex()
        if routing_id != routing_ids(name, message.incarnation)[0]:
            raise WireError(f"{type(message).__name__}: it does not come from the control connection of {name}")
    elif isinstance(message, Attach) and routing_id == control_of(routing_id):
        raise WireError("Attach: it should come over the bulk connection")
