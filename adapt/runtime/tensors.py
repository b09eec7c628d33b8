"""A user's tensors <-> what travels. numpy arrays and torch tensors alike; torch is used only where the user already does."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from adapt.protocol.codecs import TensorHeader, decode, encode
from adapt.protocol.messages import Leaf
from adapt.protocol.wire import Blob


def is_torch(value: Any) -> bool:
    """Whether this is a torch tensor; never imports torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def to_wire(values: Sequence[Any], *, codec: str, tolerance: float | None) -> tuple[list[Leaf], tuple[Blob, ...]]:
    """The leaves of a call as headers and bytes. Nothing of the result shares memory with the values."""
    leaves: list[Leaf] = []
    blobs = []
    for value in values:
        if not hasattr(value, "shape"):
            leaves.append(value)
            continue
        array, dtype = _as_array(value)
        header, data = encode(array, codec=codec, tolerance=tolerance, dtype=dtype)
        if header.codec == "raw":  # the user may write to his array as soon as `submit` returns
            data = bytes(data)
        leaves.append(header)
        blobs.append(Blob.of(data))
    return leaves, tuple(blobs)


def from_wire(leaves: Sequence[Leaf], blobs: Sequence[Blob], *, as_torch: bool, limit_bytes: int) -> list[Any]:
    """The values that headers and bytes describe: torch tensors on the CPU, or numpy arrays.

    numpy has no bfloat16: such a tensor becomes a float32 array, which holds every value of it exactly.

    Raises:
        WireError: bytes and headers do not belong together.
    """
    rest = iter(blobs)
    return [_from_tensor(leaf, next(rest), as_torch, limit_bytes) if isinstance(leaf, TensorHeader) else leaf for leaf in leaves]


def _as_array(value: Any) -> tuple[np.ndarray[Any, Any], str | None]:
    if not is_torch(value):
        return np.asarray(value), None
    tensor = value.detach().cpu().contiguous()
    if str(tensor.dtype) == "torch.bfloat16":
        return tensor.view(sys.modules["torch"].int16).numpy().view(np.uint16), "bfloat16"
    return tensor.numpy(), None


def _from_tensor(header: TensorHeader, blob: Blob, as_torch: bool, limit_bytes: int) -> Any:
    array = decode(header, blob.contiguous(), limit_bytes=limit_bytes)
    if not array.flags.writeable or array.base is not None:
        array = array.copy()  # the user's own, not a view into a received message
    if as_torch:
        torch = sys.modules["torch"]
        if header.dtype == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)
    if header.dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array
