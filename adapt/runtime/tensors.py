"""A user's tensors <-> what travels. numpy arrays and torch tensors alike; torch is used only where the user already does."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from adapt.errors import InputMismatchError
from adapt.protocol.codecs import TensorHeader, decode, encode
from adapt.protocol.messages import Leaf
from adapt.protocol.wire import MAX_BLOBS, Blob
from adapt.runtime.endpoint import copied


def is_torch(value: Any) -> bool:
    """Whether this is a torch tensor; never imports torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def to_wire(values: Sequence[Any], *, codec: str) -> tuple[list[Leaf], tuple[Blob, ...]]:
    """The leaves of a call as headers and bytes. Nothing of the result shares memory with the values.

    Args:
        values: numpy arrays, torch tensors on any device, plain numbers.
        codec: a lossless one.

    Raises:
        InputMismatchError: a value cannot travel, or there are too many.
    """
    if len(values) > MAX_BLOBS:
        raise InputMismatchError(f"{len(values)} tensors in one call; at most {MAX_BLOBS} can be sent")
    leaves: list[Leaf] = []
    blobs = []
    for value in values:
        if not hasattr(value, "shape"):
            leaves.append(value)
            continue
        array, dtype = _as_array(value)
        header, data = encode(array, codec=codec, dtype=dtype)
        if header.codec == "raw":  # the user may write to his array as soon as `submit` returns
            data = copied(memoryview(data))
        leaves.append(header)
        blobs.append(Blob.of(data))
    return leaves, tuple(blobs)


def from_wire(leaves: Sequence[Leaf], blobs: Sequence[Blob], *, as_torch: bool, limit_bytes: int) -> list[Any]:
    """The values that headers and bytes describe: torch tensors on the CPU, or numpy arrays; writable, the user's own.

    numpy has no bfloat16: such a tensor becomes a float32 array, which holds every value of it exactly.

    Raises:
        WireError: bytes and headers do not belong together.
    """
    rest = iter(blobs)
    return [_from_tensor(leaf, next(rest), as_torch, limit_bytes) if isinstance(leaf, TensorHeader) else leaf for leaf in leaves]


def _as_array(value: Any) -> tuple[np.ndarray[Any, Any], str | None]:
    if not is_torch(value):
        array = np.asarray(value)
        is_foreign = array.dtype.isbuiltin == 2  # to ask for the name takes a microsecond
        return (array.view(np.uint16), "bfloat16") if is_foreign and array.dtype.name == "bfloat16" else (array, None)  # of ml_dtypes
    tensor = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if str(tensor.dtype) == "torch.bfloat16":
        return tensor.view(sys.modules["torch"].int16).numpy().view(np.uint16), "bfloat16"
    return tensor.numpy(), None


def _from_tensor(header: TensorHeader, blob: Blob, as_torch: bool, limit_bytes: int) -> Any:
    data = blob.contiguous() if len(blob.parts) == 1 else memoryview(bytearray().join(blob.parts))
    array = decode(header, data, limit_bytes=limit_bytes)
    if (
        not array.flags.writeable
    ):  # small ones lie in a message that others use too; a large one has its frame to itself, which is the user's now
        array = array.copy()
    if as_torch:
        torch = sys.modules["torch"]
        if header.dtype == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)
    if header.dtype == "bfloat16":
        wide: np.ndarray[Any, Any] = np.left_shift(array, 16, dtype=np.uint32)
        return np.asarray(wide).view(np.float32)
    return array
