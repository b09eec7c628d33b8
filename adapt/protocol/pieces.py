"""Big messages in pieces, so that their progress can be seen and nothing else waits long behind them.

    Piece(transfer, index 0)       payload: frames 0 and 1 of the message
    Piece(transfer, index 1 ..)    payload: the next slice of its blobs, `piece_bytes` long except at the end of a blob

Pieces of one transfer follow each other on one connection; the first piece of the next transfer drops what was left unfinished.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import xxhash

from adapt.errors import WireError
from adapt.protocol.messages import Message, Piece
from adapt.protocol.wire import Blob, Buffer, Envelope, Head, decode_head, encode_head

CONTROL_BYTES = 64 << 10  # messages up to this size travel whole, on control


def split(
    message: Message, *, session: int, term: int, blobs: Sequence[Blob], transfer: int, piece_bytes: int
) -> Iterator[list[Buffer]]:
    """The frames of each piece, in order. Slices share the blobs' memory, unless one has to span two of their parts."""
    count = 1 + sum(_slices(blob.size, piece_bytes) for blob in blobs)
    payloads: Iterator[list[Buffer]] = _payloads(message, session=session, term=term, blobs=blobs, piece_bytes=piece_bytes)
    for index, payload in enumerate(payloads):
        piece = Piece(transfer=transfer, index=index, count=count, piece_bytes=piece_bytes)
        yield [*encode_head(piece, session=session, term=term), *payload]


def _payloads(message: Message, *, session: int, term: int, blobs: Sequence[Blob], piece_bytes: int) -> Iterator[list[Buffer]]:
    yield encode_head(message, session=session, term=term, blobs=blobs)
    for blob in blobs:
        for piece in _cut(blob, piece_bytes):
            yield [piece]


def _slices(size: int, piece_bytes: int) -> int:
    return -(-size // piece_bytes)


def _cut(blob: Blob, piece_bytes: int) -> Iterator[Buffer]:
    """Slices of exactly `piece_bytes`, the last one shorter."""
    held: list[memoryview] = []
    held_bytes = 0
    for part in blob.parts:
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


class Assembler:
    """Puts the pieces of one connection together again. Holds at most one unfinished message of at most `limit_bytes`."""

    def __init__(self, *, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._transfer: _Transfer | None = None
        self._spoilt: int | None = None  # number of a transfer that was given up; its other pieces are passed over

    def take(self, frames: Sequence[Buffer]) -> Envelope | None:
        """As `receive`, from the frames of a `Piece` as they arrived."""
        if len(frames) < 2:
            raise WireError(f"a piece has 3 or 4 frames, this one {len(frames)}")
        head = decode_head(frames[0], frames[1])
        if not isinstance(head.message, Piece):
            raise WireError(f"expected a piece, got {type(head.message).__name__}")
        return self.receive(head.message, frames[2:])

    def receive(self, piece: Piece, payload: Sequence[Buffer]) -> Envelope | None:
        """Take the next piece; returns the message when it was the last.

        Raises:
            WireError: the piece does not fit what came before, or what is complete does not match its checksums.
        """
        try:
            return self._receive(piece, payload)
        except WireError:
            self._transfer, self._spoilt = None, piece.transfer
            raise

    def _receive(self, piece: Piece, payload: Sequence[Buffer]) -> Envelope | None:
        if piece.index == 0:
            self._transfer = _Transfer(piece, payload, self._limit_bytes)
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
        if len(payload) != 2:
            raise WireError(f"the first piece carries 2 frames, this one {len(payload)}")
        self.number, self._piece_bytes, self._count = piece.transfer, piece.piece_bytes, piece.count
        self._head: Head = decode_head(payload[0], payload[1])
        sizes = [size for size, _ in self._head.blobs]
        if sum(sizes) > limit_bytes:
            raise WireError(f"a message of {sum(sizes)} bytes; at most {limit_bytes} are accepted")
        expected = 1 + sum(_slices(size, self._piece_bytes) for size in sizes)
        if piece.count != expected:
            raise WireError(f"{sum(sizes)} bytes in pieces of {self._piece_bytes} are {expected} pieces, not {piece.count}")
        self._sizes = sizes
        self._parts: list[list[Buffer]] = [[] for _ in sizes]
        self._hashers = [xxhash.xxh3_64() for _ in sizes]
        self._next = 1
        self._blob = 0
        self._missing = 0  # bytes of the current blob
        self._open_blob()

    @property
    def is_complete(self) -> bool:
        return self._next == self._count

    def add(self, piece: Piece, payload: Sequence[Buffer]) -> None:
        if piece.index != self._next or piece.count != self._count or piece.piece_bytes != self._piece_bytes:
            raise WireError(f"expected piece {self._next} of {self._count}, got {piece.index} of {piece.count}")
        expected = min(self._piece_bytes, self._missing)
        if len(payload) != 1 or memoryview(payload[0]).nbytes != expected:
            raise WireError(f"piece {piece.index}: expected one frame of {expected} bytes")
        self._parts[self._blob].append(payload[0])
        self._hashers[self._blob].update(payload[0])
        self._next += 1
        self._missing -= expected
        if self._missing == 0:
            self._blob += 1
            self._open_blob()

    def _open_blob(self) -> None:
        """Go on to the next blob that has bytes."""
        while self._blob < len(self._sizes) and self._sizes[self._blob] == 0:
            self._blob += 1
        self._missing = self._sizes[self._blob] if self._blob < len(self._sizes) else 0

    def envelope(self) -> Envelope:
        blobs = []
        for (size, checksum), parts, hasher in zip(self._head.blobs, self._parts, self._hashers, strict=True):
            if hasher.intdigest() != checksum:
                raise WireError(f"a payload frame of {size} bytes does not match its checksum")
            blobs.append(Blob(size, checksum, tuple(parts) or (b"",)))
        return Envelope(self._head.message, self._head.session, self._head.term, tuple(blobs))
