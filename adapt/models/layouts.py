"""How tensors lie in memory: what kernels look at when they choose their path, and so what has to be kept where a value crosses a cut."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from adapt.models.program import Graph, TensorSpec


def memory_order(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """The dimensions from the outermost to the innermost, such that the tensor so permuted is contiguous; else None."""
    strides = tensor.stride()
    order = tuple(sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], tensor.shape[dim] == 1)))
    return order if has_memory_order(tensor, order) else None


def has_memory_order(tensor: torch.Tensor, order: tuple[int, ...]) -> bool:
    """Whether kernels cannot tell the tensor from a contiguous one that was permuted back from `order`.

    The stride of a dimension of size 1 moves no data, but convolutions look at it when they choose between channels
    first and last. So it counts in tensors of 4 and 5 dimensions, and in no others.
    """
    expected = 1
    for dim in reversed(order):
        is_looked_at = tensor.shape[dim] != 1 or tensor.dim() in (4, 5)
        if is_looked_at and tensor.stride(dim) != expected:
            return False
        expected *= max(tensor.shape[dim], 1)
    return True


class Layouts:
    """Learns the layout of every value from runs. Export's own idea of it is not always what kernels do.

    A layout has to hold for every batch size, and a batch of 1 is where strides are told apart last; so the first
    run, of 2 or more, sets it and the second, of the example, has to confirm it.
    """

    def __init__(self, graph: Graph) -> None:
        self.values = list(graph.values)
        self._operators = graph.operators

    def record(self, position: int, result: Any) -> None:
        for index, spec, tensor in self._tensors(position, result):
            self.values[index] = replace(spec, order=memory_order(tensor))

    def confirm(self, position: int, result: Any) -> None:
        for index, spec, tensor in self._tensors(position, result):
            if spec.order is not None and not has_memory_order(tensor, spec.order):
                self.values[index] = replace(spec, order=None)

    def _tensors(self, position: int, result: Any) -> Iterator[tuple[int, TensorSpec, torch.Tensor]]:
        operator = self._operators[position]
        for index, item in zip(operator.outputs, result if operator.unpacks else [result], strict=True):
            spec = None if index is None else self.values[index]
            if index is not None and isinstance(spec, TensorSpec):
                yield index, spec, item
