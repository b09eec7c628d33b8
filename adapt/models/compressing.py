"""What codecs make of what crosses the boundaries of a program: how much smaller it gets, and how fast.

With the very encoder that activations go through, on the values of one run. Each value is tried once, however many boundaries it crosses;
of a large one a sample, spans of rows from all over it: so a slice stays short and memory small, whatever the model.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import thread_time

import torch

from adapt.models.interpreter import Leaf
from adapt.planning.model import STANDARD_TOLERANCE, CodecProfile
from adapt.protocol.codecs import Array, decode, encode

log = logging.getLogger(__name__)

CODECS: dict[str, float | None] = {"lz4": None, "zfp": STANDARD_TOLERANCE}  # with the tolerance at which each is tried
SAMPLE_BYTES = 1 << 18  # of a tensor; several times the 64 KiB that lz4 looks back
SPANS = 8  # that a sample consists of
BLOCK = 4  # rows and columns that zfp takes together
PLACES = 4  # behind the point, of ratios
NUMBER_BYTES = 8  # of a plain number, as planning counts it


class Compressing:
    """Tries each codec on what it is shown, boundary by boundary. A codec that fails for a tensor sends it as it is."""

    def __init__(self, boundaries: int) -> None:
        self._trials = [_Trial(name, tolerance, boundaries) for name, tolerance in CODECS.items()]

    def take(self, boundary: int, crossing: Mapping[int, Leaf]) -> None:
        """Try what crosses there.

        Args:
            crossing: by the numbers of the program's values: tensors as they travel, for a batch of 1, and plain numbers.
        """
        for number, leaf in crossing.items():
            if isinstance(leaf, torch.Tensor) and number not in self._trials[0].kept:
                self._try(number, leaf)
        sizes = {number: leaf.nbytes if isinstance(leaf, torch.Tensor) else NUMBER_BYTES for number, leaf in crossing.items()}
        for trial in self._trials:
            trial.add(boundary, sizes)

    def profiles(self) -> tuple[CodecProfile, ...]:
        """Of the codecs that could be used at all; the speeds are those of a whole core. Boundaries that were not taken have the codec's
        overall ratio."""
        return tuple(profile for trial in self._trials if (profile := trial.profile()) is not None)

    def _try(self, number: int, tensor: torch.Tensor) -> None:
        try:
            array, dtype = _as_array(sampled(tensor))
        except Exception as error:  # of a type that does not travel; a profile without it is still one
            log.debug("a value was not compressed", extra={"reason": f"{type(error).__name__}: {error}"})
            for trial in self._trials:
                trial.kept[number] = 1.0
            return
        for trial in self._trials:
            trial.take(number, array, dtype)


@dataclass(slots=True)
class _Trial:
    """Of one codec.

    Attributes:
        kept: the share of its bytes that is sent of each value.
        at: bytes of the tensors, and of them sent, at each boundary; None: it was not taken.
    """

    name: str
    tolerance: float | None
    boundaries: int
    kept: dict[int, float] = field(default_factory=dict)
    at: list[tuple[float, float] | None] = field(init=False)
    tried_bytes: int = 0
    encode_s: float = 0.0
    decode_s: float = 0.0
    is_used: bool = False  # by one of the tensors: a codec may leave them to another one

    def __post_init__(self) -> None:
        self.at = [None] * self.boundaries

    def take(self, number: int, array: Array, dtype: str) -> None:
        self.kept[number] = 1.0
        if not array.size:
            return
        try:
            began_s = thread_time()
            header, payload = encode(array, codec=self.name, tolerance=self.tolerance, dtype=dtype)
            encoded_s = thread_time()
            decode(header, payload, limit_bytes=array.nbytes)
            ended_s = thread_time()
        except Exception as error:  # foreign code, and types that do not travel
            log.debug("a codec failed", extra={"codec": self.name, "reason": f"{type(error).__name__}: {error}"})
            return
        self.kept[number] = len(payload) / array.nbytes
        self.is_used |= self.tolerance is None or header.codec.startswith(self.name)
        self.tried_bytes += array.nbytes
        self.encode_s += encoded_s - began_s
        self.decode_s += ended_s - encoded_s

    def add(self, boundary: int, sizes: Mapping[int, int]) -> None:
        self.at[boundary] = (sum(sizes.values()), sum(size * self.kept.get(number, 1.0) for number, size in sizes.items()))

    def profile(self) -> CodecProfile | None:
        if not self.is_used or not self.encode_s > 0 or not self.decode_s > 0:
            return None
        taken = [sizes for sizes in self.at if sizes is not None]
        overall = _ratio(sum(plain for plain, _ in taken), sum(sent for _, sent in taken))
        return CodecProfile(
            name=self.name,
            ratio=overall,
            encode_bytes_per_s=self.tried_bytes / self.encode_s,
            decode_bytes_per_s=self.tried_bytes / self.decode_s,
            ratios=tuple(overall if sizes is None else _ratio(*sizes) for sizes in self.at),
        )


def _ratio(plain: float, sent: float) -> float:
    return round(plain / sent, PLACES) if sent > 0 else 1.0


def sampled(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or about `SAMPLE_BYTES` of a larger one: spans of its rows, and if these are long of its columns, spread evenly."""
    if tensor.nbytes <= SAMPLE_BYTES:
        return tensor
    if tensor.ndim < 2:
        return _spans(tensor.reshape(-1), SAMPLE_BYTES // tensor.element_size())
    rows = tensor.reshape(-1, tensor.shape[-1])
    rows = _spans(rows, SAMPLE_BYTES // (rows.shape[1] * rows.element_size()))
    columns = SAMPLE_BYTES // (rows.shape[0] * rows.element_size())
    return rows if columns >= rows.shape[1] else _spans(rows.t(), columns).t()


def _spans(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """About `count` entries along the first dimension, in spans of whole blocks, one block at least."""
    length = max(count // (SPANS * BLOCK), 1) * BLOCK
    if length * SPANS >= len(tensor):
        return tensor
    step = (len(tensor) - length) / (SPANS - 1)
    return torch.cat([tensor[(first := int(step * number)) : first + length] for number in range(SPANS)])


def _as_array(tensor: torch.Tensor) -> tuple[Array, str]:
    """On the CPU, and the wire's name of its type."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype is torch.bfloat16:  # numpy has none
        return tensor.view(torch.int16).numpy().view("uint16"), "bfloat16"
    return tensor.numpy(), str(tensor.dtype).removeprefix("torch.")
