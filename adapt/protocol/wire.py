"""Message <-> list of frames. Everything that arrives is judged here; whatever is wrong is a WireError that says where.

    frame 0    kind (2 bytes) and the xxh3-64 of kind and header (8 bytes, big-endian)
    frame 1    header: msgpack map   s session   t term   m fields of the message   b [[size, xxh3-64], ...] of the blobs
    frame 2 .. one blob each

The form of frames 0 and 1, and of a hello's `protocol_version`, is the same in every version of the protocol, so that two versions
can tell each other apart.

A header is read twice at most. First straight into its types; if packing what was understood gives the very bytes that came, then nothing
was unknown, missing, repeated or odd, and that is that (3 µs). Else it is taken apart slowly, which accepts what is merely written
otherwise (an int for a float) and names the place of what is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any, Generic, TypeAlias, TypeVar, get_args, get_type_hints

import msgpack
import msgspec
import xxhash

from adapt.errors import VersionError, WireError
from adapt.protocol.codecs import TensorHeader
from adapt.protocol.ids import Natural
from adapt.protocol.messages import BY_KIND, HELLOS, PROTOCOL_VERSION, ArtifactPiece, Message

Buffer: TypeAlias = bytes | bytearray | memoryview  # a view is one-dimensional, of bytes
M = TypeVar("M")

PREAMBLE_BYTES = 10
MAX_HEADER_BYTES = 8 << 20
MAX_SLOW_BYTES = 1 << 20  # of a header that is taken apart slowly: a small map in it costs 60 times its size in memory
MAX_BLOBS = 256
_TOLD = 300  # characters of foreign text in an error


@dataclass(frozen=True, slots=True)
class Blob:
    """The bytes of one payload frame, perhaps in several parts as they arrived; copied by nobody who does not ask for it."""

    size: int
    checksum: int  # xxh3-64 over all bytes
    parts: tuple[Buffer, ...]

    @classmethod
    def of(cls, buffer: Buffer) -> Blob:
        """A blob of one part, C-contiguous, which must not change from now on."""
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
        if sum(map(len, self.parts)) != self.size or hasher.intdigest() != self.checksum:
            raise WireError(f"a payload frame of {self.size} bytes does not match its checksum")


class Head(
    msgspec.Struct,
    Generic[M],
    frozen=True,
    forbid_unknown_fields=True,
    rename={"session": "s", "term": "t", "message": "m", "blobs": "b"},
):
    """Frames 0 and 1, understood."""

    session: Natural
    term: Natural
    message: M
    blobs: Annotated[  # size and checksum of each
        list[tuple[Annotated[int, msgspec.Meta(ge=0, le=2**48)], Annotated[int, msgspec.Meta(ge=0)]]], msgspec.Meta(max_length=MAX_BLOBS)
    ]


@dataclass(frozen=True, slots=True)
class Envelope:
    """A message as it arrived."""

    message: Message
    session: int
    term: int
    blobs: tuple[Blob, ...] = ()


# ── out ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

_BYTES = (bytes,)  # travels as it is


def encode_head(message: Message, *, session: int, term: int, blobs: Sequence[Blob] = ()) -> list[Buffer]:
    """Frames 0 and 1."""
    document = {
        "s": session,
        "t": term,
        "m": msgspec.to_builtins(message, builtin_types=_BYTES),
        "b": [(blob.size, blob.checksum) for blob in blobs],
    }
    try:
        header: bytes = msgpack.packb(document)
    except UnicodeEncodeError:  # half a surrogate pair, as in the name of an odd file: better told with a "?" than not at all
        header = msgpack.packb(document, unicode_errors="replace")
    if len(header) > MAX_HEADER_BYTES:  # the receiver would cut the connection without a word
        raise WireError(f"{type(message).__name__}: a header of {len(header)} bytes; at most {MAX_HEADER_BYTES} can travel")
    return [message.KIND + xxhash.xxh3_64_digest(message.KIND + header), header]


def encode(message: Message, *, session: int, term: int, blobs: Sequence[Blob] = ()) -> list[Buffer]:
    """All frames of a message; blobs of several parts are joined."""
    return [*encode_head(message, session=session, term=term, blobs=blobs), *(blob.contiguous() for blob in blobs)]


# ── in ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


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
    total = sum(map(len, frames))
    if total > limit_bytes:
        raise WireError(f"a message of {total} bytes; at most {limit_bytes} are accepted")
    head = decode_head(frames[0], frames[1])
    if len(head.blobs) != len(frames) - 2:
        raise WireError(f"{type(head.message).__name__}: the header names {len(head.blobs)} payload frames, {len(frames) - 2} came")
    if not head.blobs:
        return Envelope(head.message, head.session, head.term)
    blobs = []
    for (size, checksum), frame in zip(head.blobs, frames[2:], strict=True):
        if len(frame) != size or xxhash.xxh3_64_intdigest(frame) != checksum:
            raise WireError(f"{type(head.message).__name__}: a payload frame of {len(frame)} bytes does not match its size and checksum")
        blobs.append(Blob(size, checksum, (frame,)))
    return Envelope(head.message, head.session, head.term, tuple(blobs))


def decode_head(preamble: Buffer, header: Buffer) -> Head[Message]:
    """Frames 0 and 1, with everything checked that can be checked without the blobs. Raises as `decode` does."""
    kind = _check_preamble(preamble, header)
    head = _read_header(kind, header)
    _check_blobs(head)
    return head


def _check_preamble(preamble: Buffer, header: Buffer) -> type[Message]:
    if len(preamble) != PREAMBLE_BYTES:
        raise WireError(f"the first frame has {len(preamble)} bytes, expected {PREAMBLE_BYTES}")
    if len(header) > MAX_HEADER_BYTES:
        raise WireError(f"a header of {len(header)} bytes; at most {MAX_HEADER_BYTES} are accepted")
    start = bytes(preamble)
    if xxhash.xxh3_64_digest(start[:2] + bytes(header)) != start[2:]:
        raise WireError("kind and header do not match their checksum")
    kind = BY_KIND.get(start[:2])
    if kind is None:
        raise WireError(f"unknown kind of message {start[:2]!r}")
    return kind


def _read_header(kind: type[Message], header: Buffer) -> Head[Message]:
    decoder = _DECODERS.get(kind)
    if decoder is None:
        return _read_slowly(kind, header, limit_bytes=MAX_SLOW_BYTES)
    try:
        head = decoder.decode(header)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return _read_slowly(kind, header, limit_bytes=MAX_SLOW_BYTES)
    canonical = _ENCODER.encode(head)
    if canonical == header:
        return head
    return _read_slowly(kind, header, limit_bytes=max(MAX_SLOW_BYTES, len(canonical)))  # ints for floats make it shorter, never longer


def _read_slowly(kind: type[Message], header: Buffer, *, limit_bytes: int) -> Head[Message]:
    """As `_read_header`, naming what is wrong; and the version of a hello before its other fields."""
    if len(header) > limit_bytes:
        raise WireError(f"{kind.__name__}: a header of {len(header)} bytes that is not as it should be; not read further")
    document = _unpack(header)
    if kind in HELLOS:
        match document:
            case {"m": {"protocol_version": int(theirs)}} if type(theirs) is int and theirs != PROTOCOL_VERSION:
                raise VersionError(theirs, ours=PROTOCOL_VERSION)
    try:
        head: Head[Message] = msgspec.convert(document, _HEADS[kind], builtin_types=_BYTES)
        strange = _strange_field(document, msgpack.unpackb(_ENCODER.encode(head)), "$")
    except TypeError:  # a time, which msgpack hands over without asking for extensions
        raise WireError(f"{kind.__name__}: msgpack extensions are not used here") from None
    except RecursionError:
        raise WireError(f"{kind.__name__}: nested too deep") from None
    except msgspec.ValidationError as error:
        raise WireError(f"{kind.__name__}: {str(error)[:_TOLD]}") from None
    if strange is not None:
        raise WireError(f"{kind.__name__}: {strange}")
    return head


def _unpack(header: Buffer) -> Any:
    try:
        return msgpack.unpackb(header, object_pairs_hook=_without_twins, ext_hook=_refuse_extension, strict_map_key=True)
    except WireError:
        raise
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
        raise WireError(f"header: not one msgpack value: {type(error).__name__} {str(error)[:100]}") from None


def _without_twins(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise WireError("header: a key stands twice in one map")
    return document


def _refuse_extension(code: int, data: bytes) -> Any:
    raise WireError(f"header: msgpack extension {code} is not used here")


def _strange_field(came: Any, understood: Any, place: str) -> str | None:
    """The first field that came and was not understood, or was made up; dataclasses of msgspec know no `forbid_unknown_fields`."""
    if isinstance(came, dict) and isinstance(understood, dict):
        for name in came:
            if name not in understood:
                return f"unknown field {str(name)[:40]!r} at `{place}`"
        for name in understood:
            if name not in came:
                return f"field {name!r} is missing at `{place}`"
        inner = [(came[name], understood[name], f"{place}.{str(name)[:40]}") for name in came]
    elif isinstance(came, list) and isinstance(understood, list):
        inner = [(one, other, f"{place}[{index}]") for index, (one, other) in enumerate(zip(came, understood, strict=True))]
    else:
        return None
    return next((told for one, other, where in inner if (told := _strange_field(one, other, where)) is not None), None)


def _check_blobs(head: Head[Message]) -> None:
    message, blobs = head.message, head.blobs
    kind = type(message)
    if kind in _WITH_LEAVES:
        sizes = [leaf.payload_bytes for leaf in message.leaves if type(leaf) is TensorHeader]  # type: ignore[union-attr]
        if sizes != [size for size, _ in blobs]:
            raise WireError(f"{kind.__name__}: its tensors are of {sizes[:8]} bytes, its payload frames of {[s for s, _ in blobs][:8]}")
    elif len(blobs) != (kind is ArtifactPiece):
        raise WireError(f"{kind.__name__}: expected {int(kind is ArtifactPiece)} payload frames, the header names {len(blobs)}")


# ── tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _is_free_form(declared: Any) -> bool:
    """Whether a type holds `Any` somewhere: there msgspec takes what msgpack extensions bring."""
    if declared is Any:
        return True
    inner = get_type_hints(declared).values() if is_dataclass(declared) else get_args(declared)
    return any(_is_free_form(one) for one in inner)


_WITH_LEAVES = frozenset(kind for kind in BY_KIND.values() if "leaves" in get_type_hints(kind))
_HEADS: dict[type[Message], Any] = {kind: Head[kind] for kind in BY_KIND.values()}  # type: ignore[valid-type]
_DECODERS: dict[type[Message], msgspec.msgpack.Decoder[Head[Message]]] = {
    kind: msgspec.msgpack.Decoder(_HEADS[kind]) for kind in BY_KIND.values() if kind not in HELLOS and not _is_free_form(kind)
}
_ENCODER = msgspec.msgpack.Encoder()
