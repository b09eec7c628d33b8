"""What is promised of every codec: lossless is bit-exact, lossy stays within its bound, malformed is a WireError."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as hnp
import lz4.block
import msgspec
import numpy as np
import pytest
import zfpy
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace

from adapt.errors import ConfigError, InputMismatchError, WireError
from adapt.protocol import codecs
from adapt.protocol.codecs import TensorHeader, decode, encode, resolve_codec

LIMIT_BYTES = 1 << 24
ZFP = ["zfp", "zfp+lz4"]

dtypes = st.sampled_from(sorted(codecs.DTYPES))
shapes = hnp.array_shapes(min_dims=0, max_dims=6, min_side=0, max_side=5)
tolerances = st.sampled_from([1.0, 0.5, 0.1, 1e-3, 1e-6])
scales = st.sampled_from([5e-324, 1e-300, 1e-45, 1e-30, 1e-6, 1.0, 27.0, 1e6, 1e18, 1e30, 1e200])


def arrays_of(name: str) -> st.SearchStrategy[np.ndarray[Any, Any]]:
    """Arrays of any bits, so that NaNs with a payload, infinities and denormals are among them."""
    dtype = codecs.DTYPES[name]
    if name == "bool":
        return hnp.arrays(dtype, shapes)
    bits = hnp.arrays(np.dtype(f"<u{dtype.itemsize}"), shapes)
    return bits.map(lambda array: array.view(dtype))


def through(array: np.ndarray[Any, Any], **options: Any) -> tuple[TensorHeader, np.ndarray[Any, Any]]:
    """There and back, the header by way of the wire's msgpack."""
    header, payload = encode(array, **options)
    arrived = msgspec.msgpack.decode(msgspec.msgpack.encode(header), type=TensorHeader)
    assert arrived == header
    return header, decode(arrived, bytes(payload), limit_bytes=LIMIT_BYTES)


def assert_same_bits(decoded: np.ndarray[Any, Any], sent: np.ndarray[Any, Any]) -> None:
    assert (decoded.shape, decoded.dtype, decoded.tobytes()) == (sent.shape, sent.dtype, sent.tobytes())


def largest_error(decoded: np.ndarray[Any, Any], sent: np.ndarray[Any, Any]) -> float:
    return float(np.abs(decoded.astype(np.longdouble) - sent.astype(np.longdouble)).max())


# --- lossless ------------------------------------------------------------------------------------------------------


@given(dtypes.flatmap(lambda name: st.tuples(st.just(name), arrays_of(name))), st.sampled_from(["raw", "lz4", "auto"]))
def test_lossless_is_bit_exact_for_every_type_and_shape(typed, codec):
    name, array = typed
    header, decoded = through(array, codec=codec, dtype=name)
    assert_same_bits(decoded, array)
    assert header.bound == 0.0 and header.dtype == name and header.codec in ("raw", "lz4")


@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=4, max_side=6)), st.integers(0, 3))
def test_any_memory_layout_is_accepted_and_nothing_is_written_to_it(array, view):
    strided = [array.T, array[::-1], array[:, ::2], np.asfortranarray(array)][view]
    strided.flags.writeable = False
    before = strided.copy()
    for codec in codecs.CODECS:
        header, decoded = through(strided, codec=codec, tolerance=0.1)
        assert header.bound or decoded.tobytes() == before.tobytes()
    assert strided.tobytes() == before.tobytes()


def test_raw_copies_nothing():
    array = np.arange(1000, dtype=np.float32).reshape(10, 100)
    header, payload = encode(array)
    assert np.shares_memory(np.frombuffer(payload, np.uint8), array)
    received = bytearray(payload)
    decoded = decode(header, received, limit_bytes=LIMIT_BYTES)
    assert np.shares_memory(decoded, np.frombuffer(received, np.uint8)) and decoded.flags.writeable
    assert not decode(header, bytes(received), limit_bytes=LIMIT_BYTES).flags.writeable


def test_a_frame_that_begins_at_an_odd_address_gives_an_aligned_array():
    header, payload = encode(np.arange(100.0))
    odd = memoryview(b"x" + bytes(payload))[1:]
    decoded = decode(header, odd, limit_bytes=LIMIT_BYTES)
    assert decoded.flags.aligned and np.array_equal(decoded, np.arange(100.0))


@pytest.mark.parametrize("codec", ["lz4", *ZFP])
def test_what_does_not_shrink_travels_raw(codec):
    noise = np.random.default_rng(0).integers(0, 256, 4096, np.uint8)
    header, payload = encode(noise, codec=codec, tolerance=0.5)
    assert header.codec == "raw" and len(payload) == noise.nbytes


def test_zeros_shrink_under_lz4():
    header, payload = encode(np.zeros((64, 64), np.float16), codec="lz4")
    assert header.codec == "lz4" and len(payload) < 100


# --- lossy ---------------------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**32),
    dtype=st.sampled_from([np.float32, np.float64]),
    shape=hnp.array_shapes(min_dims=0, max_dims=6, max_side=9),
    scale=scales,
    mean=st.sampled_from([0.0, 1.0, -1e4]),
    outlier=st.sampled_from([0.0, 1e3, 1e6, 1e12]),
    zeros=st.sampled_from([0.0, 0.5, 0.99]),
    tolerance=tolerances,
    codec=st.sampled_from(ZFP),
)
@example(0, np.float32, (64, 64, 4), 1.0, 0.0, 1e6, 0.0, 1e-3, "zfp")  # known to break zfp's own bound
@example(0, np.float32, (1, 8, 14, 14), 1.0, 0.0, 0.0, 0.5, 0.1, "zfp+lz4")
@example(0, np.float64, (3, 8, 7, 7), 1e200, 0.0, 1e12, 0.5, 1e-6, "zfp")
def test_the_bound_holds(seed, dtype, shape, scale, mean, outlier, zeros, tolerance, codec):
    rng = np.random.default_rng(seed)
    with np.errstate(over="ignore", under="ignore"):
        exact = (rng.standard_normal(shape) + mean) * scale * (rng.random(shape) >= zeros)
        array = np.asarray(exact).astype(dtype)
    if array.size:
        array.reshape(-1)[rng.integers(array.size)] += dtype(min(outlier * scale, float(np.finfo(dtype).max) / 4))
    header, decoded = through(array, codec=codec, tolerance=tolerance)
    if header.bound == 0.0:
        assert_same_bits(decoded, array)
    else:
        assert (decoded.shape, decoded.dtype) == (array.shape, array.dtype) and decoded.flags.writeable
        assert largest_error(decoded, array) <= header.bound <= tolerance * array.std(dtype=np.float64)


# A block of zfp, found by search: at tolerance 2, twice its largest number, the inverse transform wraps.
WRAPPING_BLOCK = """
    -0.091395 -0.082965 0.316793 0.710918  -0.347959 -0.985449 0.197176 -0.277574
     0.243711 -0.416406 0.329913 0.399515   0.604814 0.610775 0.160348 -0.225646 """


def test_the_bound_holds_where_zfp_misses_its_own():
    block = np.array(WRAPPING_BLOCK.split(), np.float32).reshape(4, 4)
    stream = zfpy.compress_numpy(block, tolerance=2.0, write_header=False)
    alone = zfpy._decompress(stream, zfpy.type_float, block.shape, tolerance=2.0)
    assert largest_error(alone, block) > 2 * 1.4  # or the library has been repaired, and headroom can be saved
    rest = np.full((400, 4), 10.0, np.float32) * np.where(np.arange(1600).reshape(400, 4) % 3, 1, -1)
    array = np.concatenate([block, rest]).astype(np.float32)
    for factor in np.linspace(0.9, 1.1, 41):  # the block's worst scale is among these
        tolerance = float(factor * 2 * 1.51 / array.std())
        header, decoded = through(array, codec="zfp", tolerance=tolerance)
        assert header.codec == "zfp" and largest_error(decoded, array) <= header.bound


@pytest.mark.parametrize("codec", ZFP)
@pytest.mark.parametrize(
    "array",
    [
        np.array([1.0, math.nan, 2.0] * 99),
        np.array([1.0, math.inf, 2.0] * 99),
        np.array([-math.inf, math.inf] * 99),
        np.full((8, 8), 3.0),
        np.zeros((8, 8), np.float32),
        np.empty((0,)),
        np.empty((0, 4), np.float32),
        np.array(2.5),
        np.full(999, 5e-324) * (np.arange(999) % 2),
        np.r_[np.linspace(0, 1, 1000), 1e30].astype(np.float32) * np.float32(1e-3),
        np.linspace(-1, 1, 999).astype(np.float16),
        np.arange(999),
        np.arange(999) % 2 == 0,
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_what_zfp_cannot_promise_travels_lossless(array, codec):
    header, decoded = through(array, codec=codec, tolerance=1e-6)
    assert header.bound == 0.0
    assert_same_bits(decoded, array)


@pytest.mark.parametrize("shape", [(1, 64, 56, 56), (1, 64, 28, 28), (1, 512, 7, 7), (4, 512, 2, 2)])
def test_the_layout_is_what_makes_activations_shrink(shape):
    rng = np.random.default_rng(3)
    smooth = np.maximum(np.cumsum(rng.standard_normal(shape), axis=-1), 0).astype(np.float32)
    header, payload = encode(smooth, codec="zfp", tolerance=0.1)
    in_four_dimensions = zfpy.compress_numpy(smooth, tolerance=header.bound)
    assert header.codec == "zfp" and len(payload) < 0.7 * len(in_four_dimensions)


def test_lz4_after_zfp_is_kept_only_where_smaller():
    array = np.zeros((1024, 64), np.float32)
    array[::64] = np.linspace(0, 1, 64)
    header, payload = encode(array, codec="zfp+lz4", tolerance=0.1)
    assert header.codec == "zfp+lz4" and len(payload) < header.zfp_bytes
    noise = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    header, payload = encode(noise, codec="zfp+lz4", tolerance=0.1)
    assert header.codec == "zfp" and len(payload) == header.zfp_bytes


# --- refusals ------------------------------------------------------------------------------------------------------


def test_names_and_tolerances_are_resolved():
    assert resolve_codec("auto", None) == "raw"
    assert resolve_codec("auto", 0.1) == "zfp+lz4"
    assert [resolve_codec(codec, 0.1) for codec in codecs.CODECS] == list(codecs.CODECS)


@pytest.mark.parametrize(
    ("codec", "tolerance", "reason"),
    [
        ("zpf", 0.1, "did you mean 'zfp'"),
        ("LZ4", None, "did you mean 'lz4'"),
        ("blosc", None, "expected one of auto, raw, lz4"),
        ("zfp", None, "needs a tolerance"),
        ("zfp+lz4", None, "needs a tolerance"),
        *(("zfp", tolerance, "expected a number above 0") for tolerance in (0, -0.1, 1.1, math.nan, math.inf, "1", True)),
    ],
)
def test_impossible_settings_are_config_errors(codec, tolerance, reason):
    with pytest.raises(ConfigError, match=reason):
        resolve_codec(codec, tolerance)
    with pytest.raises(ConfigError, match=reason):
        encode(np.zeros(4), codec=codec, tolerance=tolerance)


@pytest.mark.parametrize(
    ("array", "dtype", "reason"),
    [
        (np.zeros(3, ">f4"), None, "reverse order.*expected one of float16"),
        (np.zeros(3, ">i2"), "int16", "reverse order"),
        (np.zeros(3, object), None, "object cannot be sent; expected one of"),
        (np.zeros(3, complex), None, "complex128"),
        (np.array(["a"]), None, "<U1"),
        (np.zeros(3, "datetime64[s]"), None, "datetime64"),
        (np.zeros(3, np.float32), "bfloat16", "float32 cannot be sent as 'bfloat16'"),
        (np.zeros(3, np.float32), "float8", "cannot be sent as 'float8'"),
        (np.zeros((1,) * 9), None, "at most 8 dimensions, got 9"),
        ([1.0, 2.0], None, "expected a numpy array, got list"),
    ],
)
def test_arrays_that_cannot_travel_are_refused(array, dtype, reason):
    with pytest.raises(InputMismatchError, match=reason):
        encode(array, dtype=dtype)


SMOOTH = np.linspace(-1, 1, 4096, dtype=np.float32).reshape(4, 16, 64)
MALFORMED: list[tuple[str, dict[str, Any], str]] = [
    ("raw", {"dtype": "object"}, "dtype 'object': expected one of"),
    ("raw", {"dtype": ">f4"}, "expected one of"),
    ("raw", {"codec": "zstd"}, "codec 'zstd': expected one of raw"),
    ("raw", {"shape": (1,) * 9}, "at most 8 dimensions"),
    ("raw", {"shape": (-4, -1024)}, "negative"),
    ("raw", {"shape": (2**40, 2**40)}, "above the limit"),
    ("raw", {"shape": (2**48, 0)}, "above the limit"),
    ("raw", {"shape": (4095,)}, "expected by shape and dtype"),
    ("raw", {"bound": 0.5}, "bound 0.5 is impossible"),
    ("raw", {"zfp_bytes": 1}, "zfp_bytes 1 is impossible"),
    ("raw", {"payload_bytes": 5}, "expected 5 bytes, got 16384"),
    ("lz4", {"shape": (4097,)}, "lz4 payload"),
    ("lz4", {"shape": (4095,)}, "lz4 payload"),
    ("lz4", {"shape": (4,)}, "cannot be 16 bytes compressed"),
    ("lz4", {"shape": (4_000_000,)}, "lz4 payload"),
    ("zfp", {"dtype": "int32"}, "codec zfp carries only float32 and float64"),
    ("zfp", {"bound": 0.0}, "impossible for codec zfp"),
    ("zfp", {"bound": math.nan}, "impossible for codec zfp"),
    ("zfp", {"bound": 1e-300}, "outside what codec zfp can promise"),
    ("zfp", {"zfp_bytes": 8}, "zfp stream"),
    ("zfp", {"shape": (0, 4)}, "zfp stream"),
    ("zfp", {"shape": (2,)}, "zfp stream"),
    ("zfp+lz4", {"zfp_bytes": 2**40}, "zfp stream"),
    ("zfp+lz4", {"zfp_bytes": 16000}, "lz4 payload"),
]


@pytest.mark.parametrize(("codec", "changes", "reason"), MALFORMED)
def test_malformed_headers_are_wire_errors(codec, changes, reason):
    array = np.where(np.abs(SMOOTH) > 0.9, SMOOTH, 0) if codec.endswith("lz4") else SMOOTH
    header, payload = encode(array, codec=codec, tolerance=0.1)
    assert header.codec == codec
    with pytest.raises(WireError, match=reason):
        decode(replace(header, **changes), payload, limit_bytes=LIMIT_BYTES)


def test_an_lz4_bomb_is_refused_before_it_grows():
    bomb = lz4.block.compress(bytes(1 << 26), store_size=False)
    for shape, reason in (((1 << 26,), "above the limit"), ((1 << 20,), "lz4 payload")):
        header = TensorHeader(dtype="uint8", shape=shape, codec="lz4", payload_bytes=len(bomb))
        with pytest.raises(WireError, match=reason):
            decode(header, bomb, limit_bytes=LIMIT_BYTES)


def test_a_bool_is_zero_or_one():
    header = TensorHeader(dtype="bool", shape=(2,), codec="raw", payload_bytes=2)
    with pytest.raises(WireError, match="0 and 1 only"):
        decode(header, b"\x00\x02", limit_bytes=LIMIT_BYTES)


@pytest.mark.parametrize("field", [{"shape": [1] * 9}, {"shape": [-1]}, {"shape": [2**49]}, {"dtype": "x" * 17}])
def test_the_types_of_the_header_already_refuse_the_absurd(field):
    fields = {"dtype": "bool", "shape": [1], "codec": "raw", "payload_bytes": 1} | field
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(fields, TensorHeader)


def test_nothing_malformed_kills_the_decoder():
    for seed in (1, 2, 3):
        fuzz = [sys.executable, str(Path(__file__).with_name("fuzz_codecs.py")), str(seed), "10000"]
        done = subprocess.run(fuzz, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, f"status {done.returncode}, by a signal if negative\n{done.stderr[-4000:]}"
