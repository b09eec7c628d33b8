"""numpy array <-> bytes: raw, lz4, zfp and zfp+lz4. Pure functions; every thread may call them at once.

What the sender asks for is a wish, what the header names is the truth: an array that a codec cannot take within the
promise travels lossless instead, and lossless data that LZ4 does not shrink travels raw.

    asked for    array and bound                                          travels as
    raw          any                                                      raw
    lz4          any                                                      lz4, or raw where that is not larger
    zfp(+lz4)    float32/64, finite, not constant, and a bound that       zfp, or zfp+lz4 where that is smaller,
                 `_zfp_bound` accepts                                     or as if asked for lz4 where zfp gains nothing
    zfp(+lz4)    anything else: integers, bool, 16-bit floats, empty,     as if asked for lz4
                 NaN, infinity, constant, an outlier above all else

Bytes are little-endian, arrays C-ordered. The codecs notice neither a flipped byte nor a foreign stream: checksums are
the work of the layer above (`wire.py`). What is judged here, before foreign code sees a byte, is every *size*, so that
a wrong or hostile frame costs its sender an error and not the receiver its memory or its life.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias, get_args

import lz4.block
import msgspec
import numpy as np
import numpy.typing as npt
import zfpy
from msgspec import Struct

from adapt.errors import ConfigError, InputMismatchError, WireError

Array: TypeAlias = npt.NDArray[Any]
Buffer: TypeAlias = bytes | bytearray | memoryview

CODECS = ("raw", "lz4", "zfp", "zfp+lz4")
MAX_RANK = 8
MAX_TOLERANCE = 1.0  # an error as large as the spread of the tensor itself: beyond, nothing of it is left

# Names on the wire and how their elements lie in memory. numpy has no bfloat16: its bits travel as uint16.
DTYPES: dict[str, np.dtype[Any]] = {
    **{f"float{bits}": np.dtype(f"<f{bits // 8}") for bits in (16, 32, 64)},
    "bfloat16": np.dtype("<u2"),
    **{f"int{bits}": np.dtype(f"<i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": np.dtype(f"<u{bits // 8}") for bits in (8, 16, 32, 64)},
    "bool": np.dtype("?"),
}

_NAMES = {dtype: name for name, dtype in DTYPES.items() if name != "bfloat16"}  # `dtype.name` takes microseconds
DtypeName: TypeAlias = Literal[
    "float16", "float32", "float64", "bfloat16", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool"
]  # fmt: skip
CodecName: TypeAlias = Literal["raw", "lz4", "zfp", "zfp+lz4"]
assert get_args(DtypeName) == tuple(DTYPES) and get_args(CodecName) == CODECS
_Size: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**48)]


class TensorHeader(Struct, frozen=True, kw_only=True, gc=False):
    """What `decode` needs besides the bytes themselves; travels in the header of a message."""

    # Judged when a header is read, so that whoever only forwards a tensor can trust the names.
    dtype: DtypeName
    shape: Annotated[tuple[_Size, ...], msgspec.Meta(max_length=MAX_RANK)]
    codec: CodecName  # what was used, which may be less than was asked for
    payload_bytes: _Size  # length of the buffer that belongs to this header
    zfp_bytes: _Size = 0  # length of the zfp stream; zfp+lz4 stores it compressed
    bound: float = 0.0  # max |decoded - sent|, absolute, in the units of the tensor; 0.0: bit-identical


# --- names ---------------------------------------------------------------------------------------------------------


def resolve_codec(codec: str, tolerance: float | None) -> str:
    """The codec that the user's choice means; "auto" is lossless while no tolerance is given.

    Args:
        codec: "auto", "raw", "lz4", "zfp" or "zfp+lz4".
        tolerance: the largest error allowed, as a share of the tensor's standard deviation, in (0, 1].

    Raises:
        ConfigError: unknown name, impossible tolerance, or zfp without a tolerance.
    """
    if tolerance is not None and not (_is_number(tolerance) and 0 < tolerance <= MAX_TOLERANCE):
        raise ConfigError(
            f"tolerance={tolerance!r}: expected a number above 0 and at most {MAX_TOLERANCE:g}, "
            "the largest error allowed as a share of the tensor's standard deviation"
        )
    if codec == "auto":
        return "raw" if tolerance is None else "zfp+lz4"
    if codec not in CODECS:
        close = difflib.get_close_matches(str(codec)[:32].lower(), (*CODECS, "auto"), n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"codec={str(codec)[:32]!r}: expected one of auto, {', '.join(CODECS)}{hint}")
    if codec.startswith("zfp") and tolerance is None:
        raise ConfigError(
            f"codec={codec!r} needs a tolerance: the largest error allowed as a share of the tensor's "
            "standard deviation, for instance tolerance=0.1"
        )
    return codec


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# --- both ways -----------------------------------------------------------------------------------------------------


def encode(array: Array, *, codec: str = "raw", tolerance: float | None = None, dtype: str | None = None) -> tuple[TensorHeader, Buffer]:
    """The bytes of an array, and the header that turns them back.

    Args:
        array: of any layout, writable or not; at most 8 dimensions, of a type in DTYPES.
        codec: see `resolve_codec`.
        tolerance: promises max |decoded - array| <= tolerance * std(array), of which the header's `bound` is the
            absolute value. Without it everything is lossless.
        dtype: the wire's name of the type where the array cannot tell: "bfloat16" for bits held as uint16.

    Returns:
        Header and buffer. Under "raw" the buffer is the array's own memory if that is contiguous (nothing is
        copied): leave the array unchanged until the buffer has been sent.

    Raises:
        ConfigError: the codec or the tolerance is impossible.
        InputMismatchError: an array of this type or rank cannot travel.
    """
    if codec != "raw" or tolerance is not None:
        codec = resolve_codec(codec, tolerance)
    name = _wire_dtype(array, dtype)
    array_c = np.ascontiguousarray(array)  # the same memory if it is contiguous; makes a scalar an array of one
    packed = _ENCODERS[codec](array_c, name, tolerance)
    header = TensorHeader(
        dtype=name,  # type: ignore[arg-type]  # it is one of these
        shape=array.shape,
        codec=packed.codec,  # type: ignore[arg-type]
        payload_bytes=len(packed.payload),
        zfp_bytes=packed.zfp_bytes,
        bound=packed.bound,
    )
    return header, packed.payload


def decode(header: TensorHeader, buffer: Buffer, *, limit_bytes: int) -> Array:
    """The array that `encode` was given, or one within the header's bound of it.

    Args:
        header: as it arrived; nothing in it is believed before it is checked.
        buffer: one contiguous run of bytes, whose checksum has been verified.
        limit_bytes: the largest array that may be made of it.

    Returns:
        An array of the header's shape; bfloat16 as uint16. Under "raw" it shares the buffer's memory, is as writable
        as the buffer and keeps it alive; otherwise it owns its memory and is writable.

    Raises:
        WireError: header and buffer do not belong together, or are not what this protocol allows.
    """
    dtype = DTYPES.get(header.dtype)
    if dtype is None:
        raise WireError(f"dtype {header.dtype[:32]!r}: expected one of {', '.join(DTYPES)}")
    decoder = _DECODERS.get(header.codec)
    if decoder is None:
        raise WireError(f"codec {header.codec[:32]!r}: expected one of {', '.join(CODECS)}")
    raw_bytes = _checked_bytes(header.shape, dtype.itemsize, limit_bytes)
    data = memoryview(buffer).cast("B")
    if len(data) != header.payload_bytes:
        raise WireError(f"{header.codec} payload: expected {header.payload_bytes} bytes, got {len(data)}")
    is_lossy = header.codec.startswith("zfp")
    if not math.isfinite(header.bound) or (header.bound > 0) != is_lossy or header.bound < 0:
        raise WireError(f"bound {header.bound!r} is impossible for codec {header.codec}")
    if not is_lossy and header.zfp_bytes:
        raise WireError(f"zfp_bytes {header.zfp_bytes} is impossible for codec {header.codec}")
    flat = decoder(header, data, dtype, raw_bytes)
    if header.dtype == "bool" and flat.size and flat.view(np.uint8).max() > 1:
        raise WireError("bool: expected bytes of 0 and 1 only")  # numpy would compute nonsense with others
    return flat.reshape(header.shape)


def _wire_dtype(array: Array, dtype: str | None) -> str:
    """The name under which this array travels."""
    if not isinstance(array, np.ndarray):
        raise InputMismatchError(f"expected a numpy array, got {type(array).__name__}")
    if array.ndim > MAX_RANK:
        raise InputMismatchError(f"expected at most {MAX_RANK} dimensions, got {array.ndim}")
    name = _NAMES.get(array.dtype, array.dtype.char) if dtype is None else dtype
    if DTYPES.get(name) != array.dtype:  # numpy's equality takes byte order into account
        order = "" if array.dtype.isnative else " with its bytes in reverse order (use array.astype of the native type)"
        wish = "" if dtype is None else f" as {dtype[:32]!r}"
        raise InputMismatchError(
            f"an array of type {array.dtype}{order} cannot be sent{wish}; "
            f"expected one of {', '.join(DTYPES)} (bfloat16 as the bits in uint16)"
        )
    return name


def _checked_bytes(shape: tuple[int, ...], itemsize: int, limit_bytes: int) -> int:
    """Bytes of an array of this shape. An empty one is judged as if its zeros were ones: its other sizes count too."""
    if len(shape) > MAX_RANK:
        raise WireError(f"shape: expected at most {MAX_RANK} dimensions, got {len(shape)}")
    if min(shape, default=0) < 0:
        raise WireError(f"shape {shape}: a dimension is negative")
    raw_bytes = math.prod(shape) * itemsize  # Python's integers do not overflow
    at_least_bytes = raw_bytes or math.prod(max(size, 1) for size in shape) * itemsize
    if at_least_bytes > limit_bytes:
        raise WireError(f"shape {shape}: {at_least_bytes} bytes, above the limit of {limit_bytes}")
    return raw_bytes


# --- the codecs, one pair of functions each ------------------------------------------------------------------------


class _Packed(Struct, frozen=True, gc=False):
    codec: str
    payload: Buffer
    bound: float = 0.0
    zfp_bytes: int = 0


LZ4_MAX_INPUT_BYTES = 0x7E000000
LZ4_MAX_RATIO = 255  # what one byte of an LZ4 block can stand for at most


def _as_bytes(array: Array) -> memoryview:
    """The memory of a contiguous array. A uint8 view first: memoryview.cast refuses float16, bool and what is empty."""
    return array.reshape(-1).view(np.uint8).data


def _encode_raw(array: Array, name: str, tolerance: float | None) -> _Packed:
    return _Packed("raw", _as_bytes(array))


def _decode_raw(header: TensorHeader, data: memoryview, dtype: np.dtype[Any], raw_bytes: int) -> Array:
    if len(data) != raw_bytes:
        raise WireError(f"raw payload: {raw_bytes} bytes expected by shape and dtype, got {len(data)}")
    if not raw_bytes:
        return np.empty(0, dtype)
    flat = np.frombuffer(data, dtype)
    return flat if flat.flags.aligned else flat.copy()  # a frame may begin anywhere; torch expects alignment


def _encode_lz4(array: Array, name: str, tolerance: float | None) -> _Packed:
    plain = _as_bytes(array)
    if 0 < len(plain) <= LZ4_MAX_INPUT_BYTES:
        packed: bytes = lz4.block.compress(plain, store_size=False)
        if len(packed) < len(plain):
            return _Packed("lz4", packed)
    return _Packed("raw", plain)


def _decode_lz4(header: TensorHeader, data: memoryview, dtype: np.dtype[Any], raw_bytes: int) -> Array:
    return np.frombuffer(_unpack_lz4(data, raw_bytes), dtype)


def _unpack_lz4(data: memoryview, size_bytes: int) -> bytearray:
    """Exactly `size_bytes` bytes, or an error; never more memory than that."""
    if not 0 < len(data) < size_bytes <= len(data) * LZ4_MAX_RATIO:
        raise WireError(f"lz4 payload: {len(data)} bytes cannot be {size_bytes} bytes compressed")
    try:
        plain: bytearray = lz4.block.decompress(data, uncompressed_size=size_bytes, return_bytearray=True)
    except lz4.block.LZ4BlockError as error:
        raise WireError(f"lz4 payload: {error}") from None
    if len(plain) != size_bytes:
        raise WireError(f"lz4 payload: expected {size_bytes} bytes inside, got {len(plain)}")
    return plain


# ZFP (P. Lindstrom, 2014, "Fixed-Rate Compressed Floating-Point Arrays") in its mode of fixed accuracy. Decoding must
# never miss the promised bound, and checking every array by decoding it again would halve the speed of encoding; so
# the bound is made sure beforehand. Let 2^e be the least power of two above a block's largest |x|, d the number of
# dimensions of the layout, and let zfp's tolerance be 1:
#
#   e <= -1  the inverse transform may exceed its 32 (64) bit integers and wrap, but what
#            comes out lies in [-2, 2) * 2^e whatever happens                            error < 3 * 2^e <= 1.5
#   e >= 0   nothing wraps; dropped bit planes: (15/4)^d * 2/3 * 2^(-2d) <= 0.625, plus
#            rounding in cast, transform, conversion and scaling: less than 257 * 2^(e-30)
#            for float32, 1601 * 2^(e-62) for float64: below 0.5 if e <= 20 or e <= 50   error < 1.125
#
# The first line is no mere theory: the tests hold a block of 4 x 4 numbers that zfp 1.0.1 returns 1.48 tolerances away.
# Therefore an array is scaled so that the promised bound becomes _HEADROOM, just above 1.5, and zfp's tolerance is
# always 1. Of a tolerance zfp uses only the power of two below, half a bit per number on average: scaling costs little
# more than it saves. The second line bounds |x|: an array with an outlier above `bound * reach` goes lossless.
_HEADROOM = 1.51
_ZFP_TOLERANCE = 1.0


@dataclass(frozen=True, slots=True)
class _ZfpType:
    code: int
    reach: float  # largest |x| / bound for which the argument above holds
    least_bound: float  # so that neither the scale nor a scaled number leaves the normal range
    most_bound: float


_ZFP_TYPES = {
    "float32": _ZfpType(zfpy.type_float, reach=2.0**19, least_bound=2.0**-96, most_bound=2.0**96),
    "float64": _ZfpType(zfpy.type_double, reach=2.0**48, least_bound=2.0**-800, most_bound=2.0**800),
}


def _zfp_bound(array: Array, kind: _ZfpType, tolerance: float) -> float | None:
    """The absolute error that the tolerance allows for this array; None if zfp cannot promise it."""
    if not array.size:
        return None
    peak = max(abs(float(array.min())), abs(float(array.max())))  # NaN and infinity come through
    if not math.isfinite(peak):
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        bound = tolerance * float(array.std(dtype=np.float64))  # in float32 a large mean would make it wrong
    if not kind.least_bound <= bound <= kind.most_bound or peak > bound * kind.reach:
        return None
    return bound


def _zfp_scale(bound: float, dtype: np.dtype[Any]) -> Any:
    """The factor between the tensor and what zfp sees; both sides compute it from the header's bound."""
    return dtype.type(_HEADROOM / bound)


def _zfp_layout(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that zfp is given: rows of the last dimension, or a flat run where a row would mostly be padding.

    zfp's blocks are 4 wide in every dimension. Four dimensions pad a batch of 1 to 4 and make the array larger;
    two keep neighbours in the plane together. Sender and receiver must agree: a change is a change of the protocol.
    """
    size, width = math.prod(shape), shape[-1] if shape else 1
    if len(shape) >= 2 and (width % 4 == 0 or width >= 28):
        return size // width, width
    return (size,)


def _encode_zfp(array: Array, name: str, tolerance: float | None) -> _Packed:
    kind = _ZFP_TYPES.get(name)
    bound = None if kind is None or tolerance is None else _zfp_bound(array, kind, tolerance)
    if bound is not None:
        scaled = (array * _zfp_scale(bound, array.dtype)).reshape(_zfp_layout(array.shape))
        stream: bytes = zfpy.compress_numpy(scaled, tolerance=_ZFP_TOLERANCE, write_header=False)
        if len(stream) < array.nbytes:
            return _Packed("zfp", stream, bound, zfp_bytes=len(stream))
    return _encode_lz4(array, name, tolerance)


def _encode_zfp_lz4(array: Array, name: str, tolerance: float | None) -> _Packed:
    packed = _encode_zfp(array, name, tolerance)
    if packed.codec == "zfp" and packed.zfp_bytes <= LZ4_MAX_INPUT_BYTES:
        smaller: bytes = lz4.block.compress(packed.payload, store_size=False)
        if len(smaller) < packed.zfp_bytes:
            return _Packed("zfp+lz4", smaller, packed.bound, packed.zfp_bytes)
    return packed


def _decode_zfp(header: TensorHeader, data: memoryview, dtype: np.dtype[Any], raw_bytes: int) -> Array:
    kind = _ZFP_TYPES.get(header.dtype)
    if kind is None:
        raise WireError(f"dtype {header.dtype}: codec zfp carries only {' and '.join(_ZFP_TYPES)}")
    if not kind.least_bound <= header.bound <= kind.most_bound:
        raise WireError(f"bound {header.bound!r}: outside what codec zfp can promise")
    if not 0 < len(data) == header.zfp_bytes < raw_bytes:
        raise WireError(f"zfp stream: got {len(data)} bytes; {header.zfp_bytes} announced, {raw_bytes} the size of the array")
    layout = _zfp_layout(header.shape)
    out = np.empty(layout, dtype)
    stream = _zfp_padded(data, layout, dtype.itemsize)
    zfpy._decompress(stream, kind.code, layout, out=out, tolerance=_ZFP_TOLERANCE)
    with np.errstate(over="ignore", invalid="ignore"):  # a forged stream may hold anything
        out /= _zfp_scale(header.bound, dtype)
    return out.reshape(-1)


def _zfp_padded(data: memoryview, layout: tuple[int, ...], itemsize: int) -> npt.NDArray[np.uint8]:
    """The stream, followed by as many zeros as a decoder can read beyond its end.

    zfp reads on without looking where its buffer ends, so that a truncated or forged stream reads foreign memory.
    With zeros behind it that cannot happen: the block that straddles the end reads at most one block's worth of bits
    (1 + exponent + values - 1 + values * width), every later block one zero bit, which says "all zeros"; and the reader
    fetches whole words.
    """
    values = 4 ** len(layout)
    blocks = math.prod((size + 3) // 4 for size in layout)
    straddling_bits = 1 + (8 if itemsize == 4 else 11) + values + values * itemsize * 8
    padded = np.zeros(-(-len(data) // 8) * 8 + (straddling_bits + blocks) // 8 + 16, np.uint8)
    padded[: len(data)] = data
    return padded


def _decode_zfp_lz4(header: TensorHeader, data: memoryview, dtype: np.dtype[Any], raw_bytes: int) -> Array:
    if header.zfp_bytes >= raw_bytes:  # never more memory than the array itself
        raise WireError(f"zfp stream: {header.zfp_bytes} bytes announced for an array of {raw_bytes}")
    return _decode_zfp(header, memoryview(_unpack_lz4(data, header.zfp_bytes)), dtype, raw_bytes)


_ENCODERS: dict[str, Callable[[Array, str, float | None], _Packed]] = {
    "raw": _encode_raw,
    "lz4": _encode_lz4,
    "zfp": _encode_zfp,
    "zfp+lz4": _encode_zfp_lz4,
}
_DECODERS: dict[str, Callable[[TensorHeader, memoryview, np.dtype[Any], int], Array]] = {
    "raw": _decode_raw,
    "lz4": _decode_lz4,
    "zfp": _decode_zfp,
    "zfp+lz4": _decode_zfp_lz4,
}
