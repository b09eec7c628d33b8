"""Seconds per operator, from time stamps of straight runs of the real executor.

Stamps after every operator of one run agree with the time of a stage to within 5 % where it takes 10 ms or more;
hooks on modules miss what is not a module, and floating point operations do not predict time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from adapt.models.interpreter import Leaf, Stage
from adapt.models.operators import DTYPES
from adapt.models.program import SizeSpec, ValueSpec, size_at


def operator_costs_s(stage: Stage, inputs: Sequence[Leaf], repetitions: int) -> list[float]:
    """Median seconds of each operator over `repetitions` runs at one thread, after one run to warm up."""
    runs = []
    with single_thread():
        stage.run(inputs)
        for _ in range(repetitions):
            runs.append(_timed_run(stage, inputs))
    return [median(times) for times in zip(*runs, strict=True)]


def profile_file(
    path: Path | str, *, batch: int = 1, repetitions: int = 3, device: torch.device | str = "cpu", verify: bool = True
) -> list[float]:
    """Seconds per operator of the program or stage in a file, on made-up inputs; errors as `Stage.load` and `Stage.run`."""
    stage = Stage.load(path, device=device, verify=verify)
    return operator_costs_s(stage, example_inputs(stage.inputs, batch), repetitions)


def example_inputs(specs: Sequence[ValueSpec], batch: int) -> list[Leaf]:
    """Inputs of the right dtypes and shapes: normal numbers, zeros for ints (a valid index anywhere), True for bools."""
    generator = torch.Generator().manual_seed(0)
    return [_example(spec, batch, generator) for spec in specs]


@contextmanager
def single_thread() -> Iterator[None]:
    """Run torch at one thread; the number of threads is a setting of the whole process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _timed_run(stage: Stage, inputs: Sequence[Leaf]) -> list[float]:
    is_cuda = stage.device.type == "cuda"
    moments = []

    def stamp(position: int, result: Any) -> None:
        if is_cuda:
            torch.cuda.synchronize(stage.device)
        moments.append(perf_counter())

    moments.append(perf_counter())
    stage.run(inputs, observe=stamp)
    return [after - before for before, after in pairwise(moments)]


def _example(spec: ValueSpec, batch: int, generator: torch.Generator) -> Leaf:
    if isinstance(spec, SizeSpec):
        return size_at(spec.size, batch)
    dtype, shape = DTYPES[spec.dtype], spec.shape_at(batch)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.ones(shape, dtype=dtype) if dtype is torch.bool else torch.zeros(shape, dtype=dtype)
