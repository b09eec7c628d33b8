"""ADAPT's own stage files on plain arrays: every peer computes the very same thing, and only the way between stages differs."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from adapt.runtime import heap
from bench.harness.contest import Array

Value: TypeAlias = Array | int
ALIGNMENT_BYTES = 64  # what the interpreter would otherwise copy itself


class ArrayStage:
    """A stage at one thread, on whatever thread it is called: OpenMP keeps the number per thread."""

    def __init__(self, path: Path | str) -> None:
        import torch

        from adapt.models.interpreter import Stage

        heap.keep_freed(heap.ALL_BYTES)  # a limit, and a floor, must not depend on what lies where in the heap
        self._torch = torch
        self._stage = Stage.load(path)
        self._limited: set[int] = set()  # threads

    def __call__(self, values: Sequence[Value]) -> list[Value]:
        if threading.get_ident() not in self._limited:
            self._limited.add(threading.get_ident())
            self._torch.set_num_threads(1)
        outputs = self._stage.run([self._leaf(value) for value in values])
        return [output if isinstance(output, int) else output.numpy() for output in outputs]

    def _leaf(self, value: Value) -> Any:
        """The same memory, unless it is read-only, as in messages and object stores, or less aligned than torch's own."""
        if isinstance(value, int):
            return value
        if value.flags.writeable and value.__array_interface__["data"][0] % ALIGNMENT_BYTES == 0:
            return self._torch.from_numpy(value)
        aligned = self._torch.empty(value.nbytes, dtype=self._torch.uint8).numpy().view(value.dtype).reshape(value.shape)
        aligned[...] = value
        return self._torch.from_numpy(aligned)

    def shapes(self) -> list[tuple[str, tuple[int, ...]] | None]:
        """dtype and shape of each input, for a batch of 1; None for an integer."""
        return [(spec.dtype, spec.shape_at(1)) if hasattr(spec, "shape_at") else None for spec in self._stage.inputs]


@cache
def loaded(path: str) -> ArrayStage:
    """The stage of this process; for peers whose tasks are functions."""
    return ArrayStage(path)


@dataclass(frozen=True, slots=True)
class MakeFrameWork:
    """For a relay: a stage on frames that have no headers. The file says what is in them."""

    path: Path

    def __call__(self) -> FrameWork:
        return FrameWork(ArrayStage(self.path))


class FrameWork:
    def __init__(self, stage: ArrayStage) -> None:
        self._stage, self._shapes = stage, stage.shapes()

    def __call__(self, frames: list[Any]) -> list[Any]:
        values = [_from_frame(frame, shape) for frame, shape in zip(frames, self._shapes, strict=True)]
        return [_to_frame(value) for value in self._stage(values)]


def _from_frame(frame: Any, shape: tuple[str, tuple[int, ...]] | None) -> Value:
    if shape is None:
        return int.from_bytes(bytes(frame), "little", signed=True)
    return np.frombuffer(frame, shape[0]).reshape(shape[1])


def _to_frame(value: Value) -> Any:
    return (
        value.to_bytes(8, "little", signed=True) if isinstance(value, int) else np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
    )
