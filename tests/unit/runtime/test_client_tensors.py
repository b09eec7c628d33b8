"""Users' values on their way to the wire and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from adapt.errors import InputMismatchError, WireError
from adapt.protocol.codecs import DTYPES
from adapt.protocol.wire import MAX_BLOBS, Blob
from adapt.runtime.tensors import from_wire, is_torch, to_wire

LIMIT_BYTES = 1 << 20
KINDS = st.sampled_from(sorted(set(DTYPES) - {"bfloat16"}))
ARRAYS = KINDS.flatmap(lambda kind: npst.arrays(kind, npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)))


def there_and_back(*values, codec="raw", as_torch=False):
    leaves, blobs = to_wire(values, codec=codec)
    return from_wire(leaves, blobs, as_torch=as_torch, limit_bytes=LIMIT_BYTES)


def in_parts(blob: Blob) -> Blob:
    """As it arrives in pieces."""
    data = bytes(blob.contiguous())
    parts = tuple(data[start : start + 3] for start in range(0, len(data), 3)) or (b"",)
    return Blob(blob.size, blob.checksum, parts)


@given(ARRAYS, st.sampled_from(["raw", "lz4"]), st.booleans())
def test_arrays_come_back_as_they_are_and_are_the_users_own(array, codec, comes_in_parts):
    leaves, blobs = to_wire([array, 3, array.T], codec=codec)
    if comes_in_parts:
        blobs = tuple(map(in_parts, blobs))
    same, number, transposed = from_wire(leaves, blobs, as_torch=False, limit_bytes=LIMIT_BYTES)
    assert number == 3
    for got, expected in ((same, array), (transposed, array.T)):
        assert isinstance(got, np.ndarray) and got.dtype == expected.dtype and got.shape == expected.shape
        assert got.tobytes() == expected.tobytes() and got.flags.writeable
        assert not any(np.shares_memory(got, np.frombuffer(bytes(part), np.uint8)) for blob in blobs for part in blob.parts)


def test_nothing_that_is_sent_shares_the_users_memory():
    for array in (np.zeros(64, np.float32), np.zeros((8, 8), np.float32)[::2]):
        _, (blob,) = to_wire([array], codec="raw")
        array[...] = 7
        assert not any(blob.contiguous())


def test_torch_tensors_of_every_kind():
    torch = pytest.importorskip("torch")
    assert is_torch(torch.ones(1)) and not is_torch(np.ones(1)) and not is_torch(1)
    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int64, torch.bool)
    for kind in kinds:
        for tensor in (torch.tensor(1).to(kind), torch.ones(0, 3).to(kind), torch.arange(12).reshape(3, 4).to(kind).t()):
            (got,) = there_and_back(tensor, as_torch=True)
            assert got.dtype == kind and got.shape == tensor.shape and torch.equal(got, tensor)
    negative = torch.view_as_complex(torch.ones(2, 2)).conj().imag  # a lazy minus
    assert torch.equal(there_and_back(negative, as_torch=True)[0], negative)
    frozen = torch.ones(2, requires_grad=True)
    assert not there_and_back(frozen, as_torch=True)[0].requires_grad


@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_numpy_gets_bfloat16_as_float32(shape):
    torch = pytest.importorskip("torch")
    tensor = torch.full(shape, -2.5, dtype=torch.bfloat16)
    (got,) = there_and_back(tensor)
    assert isinstance(got, np.ndarray) and got.dtype == np.float32 and got.shape == shape and np.all(got == -2.5)


def test_what_cannot_travel_is_named():
    for wrong in (np.array(["a"]), np.ones(3, complex), np.ones(2, ">f4"), np.ones((1,) * 9)):
        with pytest.raises(InputMismatchError):
            to_wire([wrong], codec="raw")
    with pytest.raises(InputMismatchError, match="257 tensors"):
        to_wire([np.ones(1)] * (MAX_BLOBS + 1), codec="raw")


def test_an_answer_beyond_the_limit_is_an_error():
    leaves, blobs = to_wire([np.zeros(LIMIT_BYTES, np.uint8)], codec="lz4")
    with pytest.raises(WireError):
        from_wire(leaves, blobs, as_torch=False, limit_bytes=LIMIT_BYTES - 1)
