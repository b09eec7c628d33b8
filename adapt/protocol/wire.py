"""Message <-> list of frames. Everything that arrives is judged here; whatever is wrong is a WireError that says where.

    frame 0    kind (2 bytes) and the xxh3-64 of kind and header (8 bytes, big-endian)
    frame 1    header: msgpack map   s session   t term   m fields of the message   b [[size, xxh3-64], ...] of the blobs
    frame 2 .. one blob each

The form of frames 0 and 1, and of a hello's `protocol_version`, is the same in every version of the protocol, so that two versions
can tell each other apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import msgpack
import msgspec
import xxhash

from adapt.errors import VersionError, WireError
from adapt.protocol.codecs import TensorHeader
from adapt.protocol.messages import BY_KIND, HELLOS, PROTOCOL_VERSION, ArtifactPiece, Message

Buffer: TypeAlias = bytes | bytearray | memoryview

PREAMBLE_BYTES = 10
MAX_HEADER_BYTES = 8 << 20
MAX_BLOBS = 256
_BYTES = (bytes,)
_FIELDS: dict[type, frozenset[str]] = {kind: frozenset(field.name for field in fields(kind)) for kind in BY_KIND.values()}
_WITH_LEAVES = {kind for kind, names in _FIELDS.items() if "leaves" in names}


@dataclass(frozen=True, slots=True)
class Blob:
    """The bytes of one payload frame, perhaps in several parts as they arrived; copied by nobody who does not ask for it."""

    size: int
    checksum: int  # xxh3-64 over all bytes
    parts: tuple[Buffer, ...]

    @classmethod
    def of(cls, buffer: Buffer) -> Blob:
        """A blob of one part, which must not change from now on."""
        view = memoryview(buffer)
        flat = view.cast("B") if view.nbytes else memoryview(b"")
        return cls(flat.nbytes, xxhash.xxh3_64_intdigest(flat), (flat,))

    def contiguous(self) -> memoryview:
        """All bytes in a row: the one part itself, or a joined copy."""
        return memoryview(self.parts[0]) if len(self.parts) == 1 else memoryview(b"".join(self.parts))

    def verify(self) -> None:
        """Raises WireError unless the bytes are those of the checksum."""
        hasher = xxhash.xxh3_64()
        for part in self.parts:
            hasher.update(part)
        if sum(memoryview(part).nbytes for part in self.parts) != self.size or hasher.intdigest() != self.checksum:
            raise WireError(f"a payload frame of {self.size} bytes does not match its checksum")


@dataclass(frozen=True, slots=True)
class Head:
    """Frames 0 and 1, understood."""

    message: Message
    session: int
    term: int
    blobs: tuple[tuple[int, int], ...]  # size and checksum of each


@dataclass(frozen=True, slots=True)
class Envelope:
    """A message as it arrived."""

    message: Message
    session: int
    term: int
    blobs: tuple[Blob, ...] = ()


def encode_head(message: Message, *, session: int, term: int, blobs: Sequence[Blob] = ()) -> list[Buffer]:
    """Frames 0 and 1."""
    header = msgpack.packb(
        {
            "s": session,
            "t": term,
            "m": msgspec.to_builtins(message, builtin_types=_BYTES),
            "b": [(blob.size, blob.checksum) for blob in blobs],
        }
    )
    return [message.KIND + xxhash.xxh3_64_digest(message.KIND + header), header]


def encode(message: Message, *, session: int, term: int, blobs: Sequence[Blob] = ()) -> list[Buffer]:
    """All frames of a message; blobs of several parts are joined."""
    return [*encode_head(message, session=session, term=term, blobs=blobs), *(blob.contiguous() for blob in blobs)]


def decode(frames: Sequence[Buffer], *, limit_bytes: int, max_blobs: int = MAX_BLOBS) -> Envelope:
    """The message of `frames`, whose blobs share their memory.

    Args:
        limit_bytes: the most that all frames together may hold.

    Raises:
        VersionError: a hello of another protocol version.
        WireError: anything else that is wrong.
    """
    if not 2 <= len(frames) <= 2 + max_blobs:
        raise WireError(f"a message has 2 to {2 + max_blobs} frames, this one {len(frames)}")
    total = sum(memoryview(frame).nbytes for frame in frames)
    if total > limit_bytes:
        raise WireError(f"a message of {total} bytes; at most {limit_bytes} are accepted")
    head = decode_head(frames[0], frames[1])
    if len(head.blobs) != len(frames) - 2:
        raise WireError(f"{type(head.message).__name__}: the header names {len(head.blobs)} payload frames, {len(frames) - 2} came")
    blobs = tuple(Blob(size, checksum, (frame,)) for (size, checksum), frame in zip(head.blobs, frames[2:], strict=True))
    for blob in blobs:
        blob.verify()
    return Envelope(head.message, head.session, head.term, blobs)


def decode_head(preamble: Buffer, header: Buffer) -> Head:
    """Frames 0 and 1, with everything checked that can be checked without the blobs. Raises as `decode` does."""
    kind = _check_preamble(preamble, header)
    document = _unpack(header)
    session, term, plain, blobs = _parts(kind, document)
    message = _typed(kind, plain)
    _check_blobs(message, blobs)
    return Head(message, session, term, blobs)


def _check_preamble(preamble: Buffer, header: Buffer) -> type:
    start = bytes(preamble[: PREAMBLE_BYTES + 1])
    if len(start) != PREAMBLE_BYTES:
        raise WireError(f"the first frame has {memoryview(preamble).nbytes} bytes, expected {PREAMBLE_BYTES}")
    if memoryview(header).nbytes > MAX_HEADER_BYTES:
        raise WireError(f"a header of {memoryview(header).nbytes} bytes; at most {MAX_HEADER_BYTES} are accepted")
    if xxhash.xxh3_64_digest(start[:2] + bytes(header)) != start[2:]:
        raise WireError("kind and header do not match their checksum")
    kind = BY_KIND.get(start[:2])
    if kind is None:
        raise WireError(f"unknown kind of message {start[:2]!r}")
    return kind


def _unpack(header: Buffer) -> Any:
    try:
        return msgpack.unpackb(header, object_pairs_hook=_without_twins, ext_hook=_refuse_extension, strict_map_key=True)
    except WireError:
        raise
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise WireError(f"header: not one msgpack value: {type(error).__name__} {str(error)[:100]}") from None


def _without_twins(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise WireError("header: a key stands twice in one map")
    return document


def _refuse_extension(code: int, data: bytes) -> Any:
    raise WireError(f"header: msgpack extension {code} is not used here")


def _parts(kind: type, document: Any) -> tuple[int, int, dict[str, Any], tuple[tuple[int, int], ...]]:
    match document:
        case {"s": int(session), "t": int(term), "m": dict(plain), "b": list(blobs)} if len(document) == 4:
            pass
        case _:
            raise WireError(f"{kind.__name__}: the header should be a map of s, t, m and b")
    if not (0 <= session < 2**63 and 0 <= term < 2**63) or isinstance(session, bool) or isinstance(term, bool):
        raise WireError(f"{kind.__name__}: session and term should be numbers from 0 to 2^63 - 1")
    if len(blobs) > MAX_BLOBS or not all(_is_blob(blob) for blob in blobs):
        raise WireError(f"{kind.__name__}: b should be a list of at most {MAX_BLOBS} pairs of size and checksum")
    return session, term, plain, tuple((size, checksum) for size, checksum in blobs)


def _is_blob(blob: Any) -> bool:
    match blob:
        case [int(size), int(checksum)]:
            return 0 <= size < 2**48 and 0 <= checksum < 2**64
    return False


def _typed(kind: type, plain: dict[str, Any]) -> Message:
    if kind in HELLOS and (theirs := plain.get("protocol_version")) != PROTOCOL_VERSION and type(theirs) is int:
        raise VersionError(theirs, ours=PROTOCOL_VERSION)
    if plain.keys() != _FIELDS[kind]:
        unknown, missing = sorted(plain.keys() - _FIELDS[kind], key=str), sorted(_FIELDS[kind] - plain.keys())
        told = [f"unknown field {str(unknown[0])[:40]!r}"] * bool(unknown) + [f"field {name!r} is missing" for name in missing[:1]]
        raise WireError(f"{kind.__name__}: {', '.join(told)}")
    try:
        message: Message = msgspec.convert(plain, kind, builtin_types=_BYTES)
    except (msgspec.ValidationError, RecursionError) as error:
        raise WireError(f"{kind.__name__}: {str(error)[:300]}") from None
    return message


def _check_blobs(message: Message, blobs: tuple[tuple[int, int], ...]) -> None:
    kind = type(message)
    if kind in _WITH_LEAVES:
        sizes = [leaf.payload_bytes for leaf in message.leaves if isinstance(leaf, TensorHeader)]  # type: ignore[union-attr]
        if sizes != [size for size, _ in blobs]:
            raise WireError(f"{kind.__name__}: its tensors are of {sizes[:8]} bytes, its payload frames of {[s for s, _ in blobs][:8]}")
    elif len(blobs) != (kind is ArtifactPiece):
        raise WireError(f"{kind.__name__}: expected {int(kind is ArtifactPiece)} payload frames, the header names {len(blobs)}")
