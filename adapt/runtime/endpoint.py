"""Sockets that speak messages, not bytes: the dispatcher's one ROUTER, and the ways that every socket here shares.

Plain sockets on the loop, not `zmq.asyncio`: the descriptor of a socket is watched, and what has arrived is taken without blocking. That
costs a third of what futures cost. The descriptor is edge-triggered: it tells that something has changed, once, and says nothing more
until the socket has been asked for its events, so every socket is read again after each send and after each full batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import zmq
from zmq.utils.monitor import parse_monitor_message

from adapt.errors import ConfigError, WireError
from adapt.protocol.ids import RoutingId, bulk_of
from adapt.protocol.messages import HELLOS, ArtifactPiece, Message, Piece
from adapt.protocol.pieces import CONTROL_BYTES, Assembler, split
from adapt.protocol.wire import MAX_BLOBS, Blob, Buffer, Envelope, decode, encode_head

log = logging.getLogger(__name__)

DRAIN_LIMIT = 64  # messages taken in one go before others get their turn
ZERO_COPY_BYTES = 64 << 10  # from here on a frame is sent without copying it
SEND_QUEUE = 10_000  # messages that may wait for one connection before it counts as stuck
HANDSHAKE_MS = 5_000
MAX_FRAME_BYTES = 32 << 20  # the largest single frame: a piece or a header is far below
MAX_PARTS = MAX_BLOBS + 4

_NOBLOCK = int(zmq.NOBLOCK)
_SEND_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)


@dataclass(frozen=True, slots=True)
class Received:
    """A message; `routing_id` is the connection that it came from."""

    routing_id: RoutingId
    envelope: Envelope


@dataclass(frozen=True, slots=True)
class Malformed:
    """Something that is no message."""

    routing_id: RoutingId
    error: WireError


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The control connection that said hello as `routing_id` is closed."""

    routing_id: RoutingId


Arrival: TypeAlias = Received | Malformed | Disconnected


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
        events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        self._monitor = self.socket.get_monitor_socket(events)
        self._loop.add_reader(self.socket.fileno(), self._readable)
        self._loop.add_reader(self._monitor.fileno(), self.read_monitor)
        self.read_soon()  # a descriptor that was never asked for its events tells nothing
        self._loop.call_soon(self.read_monitor)

    def close(self, *, linger_s: float = 0.0) -> None:
        """`linger_s`: how long what was sent last may take to leave, in the background."""
        self._loop.remove_reader(self.socket.fileno())
        self._loop.remove_reader(self._monitor.fileno())
        self.socket.disable_monitor()
        self._monitor.close(linger=0)
        self.socket.close(linger=int(1000 * linger_s))

    def read_soon(self) -> None:
        """Look again in a moment: the descriptor will not tell."""
        if not self._again:
            self._again = True
            self._loop.call_soon(self._readable)

    def _readable(self) -> None:
        self._again = False
        if not self.socket.closed:
            self._read()

    def read_monitor(self, *, is_read: bool = False) -> None:
        """Report what has happened to connections, after what they have brought (`is_read`: that is being seen to)."""
        if self.socket.closed:
            return
        events = []
        while self._monitor.get(zmq.EVENTS) & zmq.POLLIN:
            event = parse_monitor_message(self._monitor.recv_multipart(_NOBLOCK))
            events.append((int(event["event"]), int(event["value"])))
        if events and not is_read:
            self._read()
        for kind, descriptor in events:
            if not self.socket.closed:
                self._noticed(kind, descriptor)

    def batch(self) -> Iterator[list[zmq.Frame]]:
        """What has arrived, at most `DRAIN_LIMIT` messages; more of it is read in a moment."""
        for _ in range(DRAIN_LIMIT):
            try:
                yield self.socket.recv_multipart(_NOBLOCK, copy=False)
            except zmq.Again:
                return
        self.read_soon()

    def send(self, frames: list[Buffer]) -> bool:
        """Hand a message over. False: the connection is unknown or stuck, and nothing was taken."""
        try:
            for frame in frames[:-1]:
                self.socket.send(frame, _SEND_MORE, copy=_nbytes(frame) < ZERO_COPY_BYTES)
            self.socket.send(frames[-1], _NOBLOCK, copy=_nbytes(frames[-1]) < ZERO_COPY_BYTES)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != errno.EHOSTUNREACH:
                raise
            return False
        finally:
            self.read_soon()
        return True


def _nbytes(frame: Buffer) -> int:
    return frame.nbytes if isinstance(frame, memoryview) else len(frame)


def is_big(message: Message, head: list[Buffer], blobs: tuple[Blob, ...]) -> bool:
    """Whether a message has to travel on bulk."""
    return isinstance(message, ArtifactPiece) or sum(blob.size for blob in blobs) + _nbytes(head[1]) > CONTROL_BYTES


def whole(head: list[Buffer], blobs: tuple[Blob, ...]) -> list[Buffer]:
    """All frames of a message that travels in one piece."""
    return [*head, *(blob.contiguous() for blob in blobs)]


def is_piece(frames: list[zmq.Frame]) -> bool:
    return bytes(frames[0].buffer[:2]) == Piece.KIND


def read(frames: list[zmq.Frame], assembler: Assembler | None, *, limit_bytes: int) -> Envelope | None:
    """The message of these frames, or None while pieces of it are missing.

    Args:
        assembler: of the connection that they came from; None if no pieces are expected there.

    Raises:
        WireError: they are none.
    """
    if not 0 < len(frames) <= MAX_PARTS:
        raise WireError(f"a message of {len(frames)} frames; 1 to {MAX_PARTS} are accepted")
    if not is_piece(frames):
        return decode([frame.buffer for frame in frames], limit_bytes=limit_bytes)
    if assembler is None:
        raise WireError("a piece came where none are expected: say hello first, and use the bulk connection")
    return assembler.take([frame.buffer for frame in frames])


class RouterEndpoint:
    """The dispatcher's socket. Calls `receive` for everything that arrives, on the loop; it never waits."""

    def __init__(self, address: str, *, receive: Callable[[Arrival], None], limit_bytes: int, piece_bytes: int) -> None:
        """Bind.

        Raises:
            ConfigError: the address is none, or in use.
        """
        self._receive, self._limit_bytes, self._piece_bytes = receive, limit_bytes, piece_bytes
        self._assemblers: dict[RoutingId, Assembler] = {}  # of the bulk connections of those who have said hello
        self._greeted: dict[int, RoutingId] = {}  # descriptor -> the control connection that said hello over it
        self._transfers = 0
        self._context: zmq.Context[Any] = zmq.Context()
        self._watched = WatchedSocket(self._context, zmq.ROUTER, read=self.drain, noticed=self._noticed, limit_bytes=limit_bytes)
        self._watched.socket.set(zmq.ROUTER_MANDATORY, 1)  # without it a message to a stuck peer vanishes
        self._watched.socket.set(zmq.ROUTER_HANDOVER, 1)  # a peer that comes back is heard, though its old connection lingers
        try:
            self._watched.socket.bind(address)
        except zmq.ZMQError as error:
            self.close()
            reason = "it is in use; stop the other process or choose another --listen" if error.errno == errno.EADDRINUSE else str(error)
            raise ConfigError(f"listen={address}: cannot be bound: {reason}") from None
        self.address = self._watched.socket.get_string(zmq.LAST_ENDPOINT)

    def close(self, *, linger_s: float = 0.0) -> None:
        """Unbind. Blocks for up to `linger_s` seconds while what was sent last leaves."""
        self._watched.close(linger_s=linger_s)
        self._context.term()

    def send(self, control: RoutingId, message: Message, *, session: int, term: int, blobs: tuple[Blob, ...] = ()) -> bool:
        """Send to the peer of this control connection. False: refused; a big message may be torn, and its receiver drops it."""
        head = encode_head(message, session=session, term=term, blobs=blobs)
        if not is_big(message, head, blobs):
            return self._watched.send([control, *whole(head, blobs)])
        bulk = bulk_of(control)
        if isinstance(message, ArtifactPiece):
            return self._watched.send([bulk, *whole(head, blobs)])
        self._transfers += 1
        pieces = split(message, session=session, term=term, blobs=blobs, transfer=self._transfers, piece_bytes=self._piece_bytes)
        return all(self._watched.send([bulk, *piece]) for piece in pieces)

    def drain(self) -> None:
        """Take what has arrived."""
        for routing, *frames in self._watched.batch():
            routing_id = RoutingId(routing.bytes)
            try:
                envelope = read(frames, self._assemblers.get(routing_id), limit_bytes=self._limit_bytes)
            except WireError as error:
                self._receive(Malformed(routing_id, error))
                continue
            if envelope is not None:
                if isinstance(envelope.message, HELLOS):
                    self._greet(routing_id, frames[0])
                self._receive(Received(routing_id, envelope))

    def _greet(self, routing_id: RoutingId, frame: zmq.Frame) -> None:
        """Learn over which descriptor the peer speaks, so that the end of its connection can be told at once."""
        self._watched.read_monitor(is_read=True)  # the descriptor may have had another owner, whose end must be told first
        self._assemblers[bulk_of(routing_id)] = Assembler(limit_bytes=self._limit_bytes)
        with contextlib.suppress(zmq.ZMQError):  # transports without descriptors; heartbeats will tell
            self._greeted[int(frame.get(zmq.SRCFD))] = routing_id

    def _noticed(self, event: int, descriptor: int) -> None:
        if event != zmq.EVENT_DISCONNECTED or (routing_id := self._greeted.pop(descriptor, None)) is None:
            return
        if routing_id not in self._greeted.values():  # else it has said hello again over a new connection
            self._assemblers.pop(bulk_of(routing_id), None)
            self._receive(Disconnected(routing_id))
