"""Message <-> list of frames. Everything that arrives is judged here; whatever is wrong is a WireError that says where.

    frame 0    kind (2 bytes) and the xxh3-64 of kind and header (8 bytes, big-endian)
    frame 1    header: msgpack map   s session   t term   m fields of the message   b [[size, xxh3-64], ...] of the blobs
    frame 2 .. one blob each

What is said to one peer within one turn of a loop leaves as one *bundle*, because frames are what costs:

    frame 0    "BU", the xxh3-64 of what follows it (8 bytes, big-endian), and
               for each message   kind (2 bytes), length of its header (4 bytes, big-endian), header, its blobs up to `INLINE_BYTES`
    frame 1 .. the larger blobs, one each

The form of frames 0 and 1, and of a hello's `protocol_version`, is the same in every version of the protocol, so that two versions
can tell each other apart. A hello and the answers to it travel by themselves.

A header is read twice at most. First straight into its types; if packing what was understood gives the very bytes that came, then nothing
was unknown, missing, repeated or odd, and that is that (3 µs). Else it is taken apart slowly, which accepts what is merely written
otherwise (an int for a float) and names the place of what is wrong.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Generic, TypeAlias, TypeVar, get_args, get_type_hints

import msgpack
import msgspec
import xxhash
from msgspec import Struct

from adapt.errors import VersionError, WireError
from adapt.protocol.codecs import TensorHeader
from adapt.protocol.ids import Natural
from adapt.protocol.messages import (
    BY_KIND,
    HELLOS,
    PROTOCOL_VERSION,
    ArtifactPiece,
    Attach,
    LinkEcho,
    LinkProbe,
    Message,
    Piece,
    Refused,
    SayHello,
    Welcome,
)

Buffer: TypeAlias = bytes | bytearray | memoryview  # a view is one-dimensional, of bytes
M = TypeVar("M")

PREAMBLE_BYTES = 10
MAX_HEADER_BYTES = 8 << 20
MAX_SLOW_BYTES = 1 << 20  # of a header that is taken apart slowly: a small map in it costs 60 times its size in memory
MAX_BLOBS = 256
BUNDLE = b"BU"
INLINE_BYTES = 2 << 10  # a blob up to this size travels within the body of a bundle; to copy it costs less than a frame of its own
MAX_BODY_BYTES = 48 << 10  # of a bundle; a longer one would not be copied when it is received, and its inline blobs would keep it
MAX_BUNDLE_FRAMES = 64
MAX_BUNDLE_BYTES = 512 << 10  # with all payloads, unless one message has more: less than any receiver accepts
MAX_BUNDLE_MESSAGES = 256  # a reader has others to look after
_ENTRY = struct.Struct(">2sI")  # before each message of a bundle
_TOLD = 300  # characters of foreign text in an error


class Blob(Struct, frozen=True, gc=False):
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
    Struct,
    Generic[M],
    frozen=True,
    gc=False,
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


class Envelope(Struct, frozen=True, gc=False):
    """A message as it arrived."""

    message: Message
    session: int
    term: int
    blobs: tuple[Blob, ...] = ()


# ── out ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

_BYTES = (bytes,)  # travels as it is


def encode_header(message: Message, *, session: int, term: int, blobs: Sequence[Blob] = ()) -> bytes:
    """Frame 1."""
    head = Head(session, term, message, [(blob.size, blob.checksum) for blob in blobs])
    try:
        header = _ENCODER.encode(head)
    except UnicodeEncodeError:  # half a surrogate pair, as in the name of an odd file: better told with a "?" than not at all
        document = msgspec.to_builtins(head, builtin_types=_BYTES)
        header = msgpack.packb(document, unicode_errors="replace")
    if len(header) > MAX_HEADER_BYTES:  # the receiver would cut the connection without a word
        raise WireError(f"{type(message).__name__}: a header of {len(header)} bytes; at most {MAX_HEADER_BYTES} can travel")
    return header


def preamble(kind: bytes, header: Buffer) -> bytes:
    """Frame 0."""
    return kind + xxhash.xxh3_64_digest(kind + header)


def encode_head(message: Message, *, session: int, term: int, blobs: Sequence[Blob] = ()) -> list[Buffer]:
    """Frames 0 and 1."""
    header = encode_header(message, session=session, term=term, blobs=blobs)
    return [preamble(message.KIND, header), header]


def encode(message: Message, *, session: int, term: int, blobs: Sequence[Blob] = ()) -> list[Buffer]:
    """All frames of a message; blobs of several parts are joined."""
    return [*encode_head(message, session=session, term=term, blobs=blobs), *(blob.contiguous() for blob in blobs)]


class Letter(Struct, frozen=True, gc=False):
    """A message ready to be bundled."""

    message: Message
    header: bytes
    blobs: tuple[Blob, ...] = ()


def bundles(letters: Sequence[Letter]) -> Iterator[tuple[Sequence[Letter], list[Buffer]]]:
    """The letters in their order as few messages of frames, each with the letters that it carries."""
    begin, size, payloads, weight, is_closed = 0, 0, 0, 0, False
    for index, letter in enumerate(letters):
        taken, large, heavy = _ENTRY.size + len(letter.header), 0, 0
        for blob in letter.blobs:
            if blob.size <= INLINE_BYTES:
                taken += blob.size
            else:
                large, heavy = large + 1, heavy + blob.size
        stands_alone = type(letter.message) in _BY_THEMSELVES
        is_full = size + taken > MAX_BODY_BYTES or payloads + large > MAX_BUNDLE_FRAMES or index - begin >= MAX_BUNDLE_MESSAGES
        is_full |= size + taken + weight + heavy > MAX_BUNDLE_BYTES
        if index > begin and (is_closed or stands_alone or is_full):
            yield letters[begin:index], _bundle(letters[begin:index])
            begin, size, payloads, weight = index, 0, 0, 0
        size, payloads, weight, is_closed = size + taken, payloads + large, weight + heavy, stands_alone
    if letters:
        yield letters[begin:], _bundle(letters[begin:])


def _bundle(letters: Sequence[Letter]) -> list[Buffer]:
    if len(letters) == 1 and not any(blob.size <= INLINE_BYTES for blob in letters[0].blobs):
        only = letters[0]
        return [preamble(only.message.KIND, only.header), only.header, *(blob.contiguous() for blob in only.blobs)]
    parts: list[Buffer] = []
    payloads: list[Buffer] = []
    for letter in letters:
        parts.append(_ENTRY.pack(letter.message.KIND, len(letter.header)))
        parts.append(letter.header)
        for blob in letter.blobs:
            (parts if blob.size <= INLINE_BYTES else payloads).append(blob.contiguous())
    body = b"".join(parts)
    return [BUNDLE + xxhash.xxh3_64_digest(body) + body, *payloads]


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
    kind = type(head.message)
    pairs = zip(head.blobs, frames[2:], strict=True)
    return Envelope(head.message, head.session, head.term, tuple(_verified(kind, frame, *facts) for facts, frame in pairs))


def decode_bundle(frames: Sequence[Buffer], *, limit_bytes: int) -> list[Envelope]:
    """The messages of a bundle, in order. Its inline blobs are copies. Raises WireError, also if only the last message is wrong."""
    if not 1 <= len(frames) <= 2 + MAX_BLOBS:
        raise WireError(f"a bundle has 1 to {2 + MAX_BLOBS} frames, this one {len(frames)}")
    total = sum(map(len, frames))
    if total > limit_bytes:
        raise WireError(f"a bundle of {total} bytes; at most {limit_bytes} are accepted")
    body, payloads = bytes(frames[0]), iter(frames[1:])
    if xxhash.xxh3_64_digest(memoryview(body)[PREAMBLE_BYTES:]) != body[2:PREAMBLE_BYTES]:
        raise WireError("a bundle does not match its checksum")
    envelopes: list[Envelope] = []
    begin = PREAMBLE_BYTES
    while begin < len(body):
        envelope, begin = _decode_letter(body, begin, payloads)
        envelopes.append(envelope)
        if len(envelopes) > MAX_BUNDLE_MESSAGES:
            raise WireError(f"a bundle of more than {MAX_BUNDLE_MESSAGES} messages")
    if next(payloads, None) is not None or not envelopes:
        raise WireError(f"a bundle of {len(envelopes)} messages came with {len(frames) - 1} payload frames, not all of them theirs")
    return envelopes


def _decode_letter(body: bytes, begin: int, payloads: Iterator[Buffer]) -> tuple[Envelope, int]:
    """The message that begins at `begin`, and where the next one does."""
    header_at = begin + _ENTRY.size
    if header_at > len(body):
        raise WireError("a bundle ends within a message")
    name, length = _ENTRY.unpack_from(body, begin)
    end = header_at + length
    if end > len(body):
        raise WireError("a bundle ends within a message")
    kind = _kind_of(name)
    if kind in _BY_THEMSELVES:
        raise WireError(f"{kind.__name__} does not travel in a bundle")
    head = _read_header(kind, body[header_at:end])
    _check_blobs(head)
    if not head.blobs:
        return Envelope(head.message, head.session, head.term), end
    blobs = []
    for size, checksum in head.blobs:
        if size > INLINE_BYTES:
            blob = next(payloads, b"")
        else:
            blob = body[end : end + size]
            end += size
        blobs.append(_verified(kind, blob, size, checksum))
    return Envelope(head.message, head.session, head.term, tuple(blobs)), end


def decode_head(preamble: Buffer, header: Buffer) -> Head[Message]:
    """Frames 0 and 1, with everything checked that can be checked without the blobs. Raises as `decode` does."""
    head = _read_header(_kind_of(_check_preamble(preamble, header)), header)
    _check_blobs(head)
    return head


def is_bundle(frames: Sequence[Buffer]) -> bool:
    return bool(frames) and frames[0][:2] == BUNDLE


def _check_preamble(preamble: Buffer, header: Buffer) -> bytes:
    """The kind that it names."""
    if len(preamble) != PREAMBLE_BYTES:
        raise WireError(f"the first frame has {len(preamble)} bytes, expected {PREAMBLE_BYTES}")
    if len(header) > MAX_HEADER_BYTES:
        raise WireError(f"a header of {len(header)} bytes; at most {MAX_HEADER_BYTES} are accepted")
    start = bytes(preamble)
    if xxhash.xxh3_64_digest(start[:2] + bytes(header)) != start[2:]:
        raise WireError("kind and header do not match their checksum")
    return start[:2]


def _kind_of(name: bytes) -> type[Message]:
    kind = BY_KIND.get(name)
    if kind is None:
        raise WireError(f"unknown kind of message {name!r}")
    return kind


def _verified(kind: type[Message], frame: Buffer, size: int, checksum: int) -> Blob:
    if len(frame) != size or xxhash.xxh3_64_intdigest(frame) != checksum:
        raise WireError(f"{kind.__name__}: a payload frame of {len(frame)} bytes does not match its size and checksum")
    return Blob(size, checksum, (frame,))


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
    """The first field that came and was not understood, or was made up; to forbid them would not say where."""
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
    elif len(blobs) != (kind in _WITH_ONE_BLOB):
        raise WireError(f"{kind.__name__}: expected {int(kind in _WITH_ONE_BLOB)} payload frames, the header names {len(blobs)}")


# ── tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _is_free_form(declared: Any) -> bool:
    """Whether a type holds `Any` somewhere: there msgspec takes what msgpack extensions bring."""
    if declared is Any:
        return True
    inner = get_type_hints(declared).values() if isinstance(declared, type) and issubclass(declared, Struct) else get_args(declared)
    return any(_is_free_form(one) for one in inner)


_WITH_ONE_BLOB = frozenset((ArtifactPiece, LinkProbe, LinkEcho))
_WITH_LEAVES = frozenset(kind for kind in BY_KIND.values() if "leaves" in get_type_hints(kind))
_HEADS: dict[type[Message], Any] = {kind: Head[kind] for kind in BY_KIND.values()}  # type: ignore[valid-type]
_DECODERS: dict[type[Message], msgspec.msgpack.Decoder[Head[Message]]] = {
    kind: msgspec.msgpack.Decoder(_HEADS[kind]) for kind in BY_KIND.values() if kind not in HELLOS and not _is_free_form(kind)
}
_ENCODER = msgspec.msgpack.Encoder()
assert BUNDLE not in BY_KIND
_BY_THEMSELVES = frozenset((*HELLOS, Welcome, Refused, SayHello, Attach, Piece))  # what they say is about the connection
