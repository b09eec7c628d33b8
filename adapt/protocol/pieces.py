"""Big messages in pieces, so that their progress can be seen and nothing else waits long behind them.

    Piece(transfer, index 0)       payload: frames 0 and 1 of the message, and the first slice of its blobs if they have any bytes
    Piece(transfer, index 1 ..)    payload: the next slice, `piece_bytes` long except at the end of a blob

Where a blob lies in several parts, because it arrived in pieces itself, slices are cut as if it lay in a row: those that span two parts are
joined, the others share its memory. So the pieces of a message depend on its bytes alone, and forwarding with the same `piece_bytes` copies
nothing.

Pieces of one transfer follow each other on one connection; the first piece of the next transfer drops what was left unfinished. A checksum
is compared when its blob is complete; until then pieces are judged by their number and length.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import xxhash

from adapt.errors import WireError
from adapt.protocol.messages import HELLOS, Attach, Message, Piece
from adapt.protocol.wire import Blob, Buffer, Envelope, Head, decode_head, encode_head

CONTROL_BYTES = 64 << 10  # messages up to this size travel whole, on control
_NEVER_IN_PIECES = (*HELLOS, Attach, Piece)  # what they say is about the connection that they come from


def split(message: Message, *, session: int, term: int, blobs: Sequence[Blob], transfer: int, piece_bytes: int) -> Iterator[list[Buffer]]:
    """The frames of each piece, in order.

    Args:
        transfer: a number that no earlier message had on this connection, in this session.
        piece_bytes: length of a slice, from 4 KiB to 1 MiB.
    """
    count = max(sum(_slices(blob.size, piece_bytes) for blob in blobs), 1)
    payloads = _payloads(message, session=session, term=term, blobs=blobs, piece_bytes=piece_bytes)
    for index, payload in enumerate(payloads):
        piece = Piece(transfer=transfer, index=index, count=count, piece_bytes=piece_bytes)
        yield [*encode_head(piece, session=session, term=term), *payload]


def _payloads(message: Message, *, session: int, term: int, blobs: Sequence[Blob], piece_bytes: int) -> Iterator[list[Buffer]]:
    slices = itertools.chain.from_iterable(_cut(blob, piece_bytes) for blob in blobs)
    yield [*encode_head(message, session=session, term=term, blobs=blobs), *itertools.islice(slices, 1)]
    for piece in slices:
        yield [piece]


def _slices(size: int, piece_bytes: int) -> int:
    return -(-size // piece_bytes)


def _cut(blob: Blob, piece_bytes: int) -> Iterator[Buffer]:
    """Slices of exactly `piece_bytes`, the last one shorter."""
    held: list[Buffer] = []
    held_bytes = 0
    for part in blob.parts:
        if not held and len(part) == piece_bytes:  # as it arrived, so it goes
            yield part
            continue
        view = memoryview(part)
        while view.nbytes:
            taken = view[: piece_bytes - held_bytes]
            view = view[taken.nbytes :]
            held.append(taken)
            held_bytes += taken.nbytes
            if held_bytes == piece_bytes:
                yield held[0] if len(held) == 1 else b"".join(held)
                held, held_bytes = [], 0
    if held:
        yield held[0] if len(held) == 1 else b"".join(held)


def is_piece(frames: Sequence[Buffer]) -> bool:
    return bool(frames) and bytes(frames[0][:2]) == Piece.KIND


def decode_piece(frames: Sequence[Buffer], assembler: Assembler | None) -> Envelope | None:
    """What the frames of a piece make complete, if anything.

    Args:
        assembler: of the session to which their connection belongs, if it belongs to any.

    Returns:
        The message whose last piece this was; or, of a message of any other session, its last `Piece` as it came, so that whoever judges
        sessions can answer the sender.

    Raises:
        WireError: it is no piece, or does not fit what came before, or what is complete does not match its checksums.
    """
    if len(frames) < 2:
        raise WireError(f"a piece has 3 or 4 frames, this one {len(frames)}")
    head = decode_head(frames[0], frames[1])
    piece = head.message
    if not isinstance(piece, Piece):
        raise WireError(f"expected a piece, got {type(piece).__name__}")
    if assembler is None or not assembler.expects(head.session, head.term):
        return Envelope(piece, head.session, head.term) if piece.index + 1 >= piece.count else None
    return assembler.receive(piece, frames[2:])


class Assembler:
    """Puts the pieces of one session together again. Holds at most one unfinished message of at most `limit_bytes`."""

    def __init__(self, *, session: int, term: int, limit_bytes: int) -> None:
        self._session, self._term, self._limit_bytes = session, term, limit_bytes
        self._transfer: _Transfer | None = None
        self._spoilt: int | None = None  # number of a transfer that was given up; its other pieces are passed over

    def expects(self, session: int, term: int) -> bool:
        """Whether a piece with these numbers on it is of this session."""
        return (session, term) == (self._session, self._term)

    def receive(self, piece: Piece, payload: Sequence[Buffer]) -> Envelope | None:
        """Take the next piece of this session; returns the message when it was the last.

        Raises:
            WireError: the piece does not fit what came before, or what is complete does not match its checksums. Told once a transfer.
        """
        try:
            return self._receive(piece, payload)
        except WireError:
            self._transfer, self._spoilt = None, piece.transfer
            raise

    def _receive(self, piece: Piece, payload: Sequence[Buffer]) -> Envelope | None:
        if piece.index == 0:
            self._transfer = None  # before the next is judged: it may be as large as is allowed
            self._transfer = _Transfer(piece, payload, self._limit_bytes)
            if not self.expects(self._transfer.head.session, self._transfer.head.term):
                raise WireError("a message and the piece that carries it name different sessions")
        elif self._transfer is None or self._transfer.number != piece.transfer:
            if piece.transfer == self._spoilt:
                return None
            raise WireError(f"piece {piece.index} of transfer {piece.transfer}: its first piece never came")
        else:
            self._transfer.add(piece, payload)
        if not self._transfer.is_complete:
            return None
        done, self._transfer = self._transfer, None
        return done.envelope()


class _Transfer:
    """One message on its way."""

    def __init__(self, piece: Piece, payload: Sequence[Buffer], limit_bytes: int) -> None:
        if not 2 <= len(payload) <= 3:
            raise WireError(f"the first piece carries 2 or 3 frames, this one {len(payload)}")
        self.number, self._piece_bytes, self._count = piece.transfer, piece.piece_bytes, piece.count
        self.head: Head[Message] = decode_head(payload[0], payload[1])
        if isinstance(self.head.message, _NEVER_IN_PIECES):
            raise WireError(f"{type(self.head.message).__name__} does not travel in pieces")
        sizes = [size for size, _ in self.head.blobs]
        if sum(sizes) > limit_bytes:
            raise WireError(f"a message of {sum(sizes)} bytes; at most {limit_bytes} are accepted")
        expected = max(sum(_slices(size, self._piece_bytes) for size in sizes), 1)
        if piece.count != expected:
            raise WireError(f"{sum(sizes)} bytes in pieces of {self._piece_bytes} are {expected} pieces, not {piece.count}")
        self._sizes = sizes
        self._parts: list[list[Buffer]] = [[] for _ in sizes]
        self._hasher = xxhash.xxh3_64()
        self._next = 0
        self._blob = 0
        self._missing = 0  # bytes of the current blob
        self._open_blob()
        if any(sizes):
            self.add(piece, payload[2:])
        elif len(payload) > 2:
            raise WireError("the first piece brings a slice of blobs that have no bytes")
        self._next = 1

    @property
    def is_complete(self) -> bool:
        return self._next == self._count

    def add(self, piece: Piece, payload: Sequence[Buffer]) -> None:
        if piece.index != self._next or piece.count != self._count or piece.piece_bytes != self._piece_bytes:
            raise WireError(f"expected piece {self._next} of {self._count}, got {piece.index} of {piece.count}")
        expected = min(self._piece_bytes, self._missing)
        if len(payload) != 1 or len(payload[0]) != expected:
            raise WireError(f"piece {piece.index}: expected one frame of {expected} bytes")
        self._parts[self._blob].append(payload[0])
        self._hasher.update(payload[0])
        self._next += 1
        self._missing -= expected
        if self._missing == 0:
            self._close_blob()
            self._blob += 1
            self._open_blob()

    def _open_blob(self) -> None:
        """Go on to the next blob that has bytes."""
        while self._blob < len(self._sizes) and self._sizes[self._blob] == 0:
            self._close_blob()
            self._blob += 1
        self._missing = self._sizes[self._blob] if self._blob < len(self._sizes) else 0

    def _close_blob(self) -> None:
        size, checksum = self.head.blobs[self._blob]
        if self._hasher.intdigest() != checksum:
            raise WireError(f"a payload frame of {size} bytes does not match its checksum")
        self._hasher.reset()

    def envelope(self) -> Envelope:
        blobs = (Blob(size, checksum, tuple(parts) or (b"",)) for (size, checksum), parts in zip(self.head.blobs, self._parts, strict=True))
        return Envelope(self.head.message, self.head.session, self.head.term, tuple(blobs))
