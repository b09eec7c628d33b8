"""From a program to a faster one of nearly the same numbers: rewrite as data (`fold.py`), run for layouts, deviation and seconds, write.

The rewritten program is one like any other: cut, planned and profiled as it runs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adapt.errors import ExportError
from adapt.models.fold import Rewritten, rewrite
from adapt.models.interpreter import Leaf, Stage, load_weights
from adapt.models.layouts import Layouts
from adapt.models.profiler import example_inputs, operator_costs_s, single_thread
from adapt.models.program import Program, Weight, program_to_metadata, read_program
from adapt.models.tensorfile import TensorSource, copy_pieces, write_tensor_file

log = logging.getLogger(__name__)

_SEVERAL = 2  # a batch in which every dimension shows its stride


@dataclass(frozen=True, slots=True)
class OptimizedProgram:
    """A program on disk, and what was done to it.

    Attributes:
        path, digest, file_bytes: the file, its SHA-256 and its size.
        operator_costs_s: seconds of each operator here, at one thread, for `leaves`.
        folded: how many batch norms are gone.
        changes: what was done, of `program.CHANGES`; none: the program is the one that was given.
        deviation: the largest difference that this made to an output, as a share of the largest number in that output.
    """

    path: Path
    digest: str
    file_bytes: int
    operator_costs_s: list[float]
    folded: int
    changes: tuple[str, ...]
    deviation: float


def optimize_program(
    path: Path | str, directory: Path | str, *, leaves: Sequence[Leaf] | None = None, profile_repetitions: int = 3
) -> OptimizedProgram:
    """Fold the program in `path`, lay it channels last if it is a convolutional one, and write the result into `directory`.

    Args:
        path: a program named by its digest, which is believed.
        leaves: inputs on which layouts, deviation and seconds are measured; by default made-up ones of a batch of 1.
        profile_repetitions: how many runs are timed; 0 leaves the costs empty.

    Raises:
        ExportError: the program has been optimized before.
        WireError: the file is no program.
        OSError: it cannot be read, or the directory not be written.
    """
    program = read_program(path, verify=False)
    if program.changes:
        raise ExportError(f"{program.path.name} has been optimized before")
    with single_thread():
        inputs = example_inputs(program.graph.input_specs, 1) if leaves is None else list(leaves)
        rewritten = rewrite(program.graph, partial(_read, program.path))
        stage = Stage(rewritten.graph, _tensors(program.path, rewritten), torch.device("cpu"), "")
        layouts = _layouts(program, stage, rewritten, inputs)
        deviation = _deviation(Stage.load(program.path, verify=False).run(inputs), stage.run(inputs))
        costs_s = operator_costs_s(stage, inputs, profile_repetitions) if profile_repetitions else []
    rewritten.graph = replace(rewritten.graph, values=tuple(layouts.values))
    written, digest, file_bytes = _write(program, rewritten, directory)
    facts = {"folded": rewritten.folded, "changes": "/".join(rewritten.changes), "deviation": deviation}
    log.info("program optimized", extra=facts)
    return OptimizedProgram(written, digest, file_bytes, costs_s, rewritten.folded, rewritten.changes, deviation)


def _layouts(program: Program, stage: Stage, rewritten: Rewritten, inputs: Sequence[Leaf]) -> Layouts:
    layouts = Layouts(rewritten.graph)
    if program.is_batched:
        stage.run(example_inputs(program.graph.input_specs, _SEVERAL), observe=layouts.record)
    stage.run(inputs, observe=layouts.confirm if program.is_batched else layouts.record)
    return layouts


def _deviation(exact: Sequence[Leaf], changed: Sequence[Leaf]) -> float:
    pairs = zip(exact, changed, strict=True)
    return max((_difference(one, other) for one, other in pairs if isinstance(one, torch.Tensor) and one.numel()), default=0.0)


def _difference(exact: Leaf, changed: Leaf) -> float:
    assert isinstance(exact, torch.Tensor) and isinstance(changed, torch.Tensor)
    if torch.equal(exact, changed):
        return 0.0
    exact, changed = exact.double(), changed.double()
    largest = float(exact.abs().max())
    return float((changed - exact).abs().nan_to_num(torch.inf).max()) / largest if largest else torch.inf


def _tensors(path: Path, rewritten: Rewritten) -> list[torch.Tensor]:
    weights = rewritten.graph.weights
    kept = iter(load_weights(path, [weight for index, weight in enumerate(weights) if index not in rewritten.arrays], torch.device("cpu")))
    return [_tensor(weight, rewritten.arrays[index]) if index in rewritten.arrays else next(kept) for index, weight in enumerate(weights)]


def _tensor(weight: Weight, array: np.ndarray[Any, Any]) -> torch.Tensor:
    tensor = torch.from_numpy(array).view(getattr(torch, weight.stored.dtype))
    tensor = tensor if weight.order is None else tensor.permute(*np.argsort(weight.order).tolist())
    return tensor.requires_grad_(weight.requires_grad)


def _read(path: Path, weight: Weight) -> np.ndarray[Any, Any]:
    """A weight as the operators see it; numpy has no bfloat16, whose bits it gives."""
    stored = weight.stored
    dtype = np.dtype(np.int16 if stored.dtype == "bfloat16" else stored.dtype)
    array: np.ndarray[Any, Any] = np.zeros(stored.shape, dtype)
    if stored.size_bytes:
        array = np.memmap(path, dtype, "r", stored.begin, stored.shape)
    return array if weight.order is None else array.transpose(np.argsort(weight.order))


def _write(program: Program, rewritten: Rewritten, directory: Path | str) -> tuple[Path, str, int]:
    metadata = program_to_metadata(
        rewritten.graph, program.parameters, program.input_structure, program.output_structure, program.batch_limit, rewritten.changes
    )
    return write_tensor_file(
        directory, metadata, [_source(program.path, rewritten, index) for index in range(len(rewritten.graph.weights))]
    )


def _source(path: Path, rewritten: Rewritten, index: int) -> TensorSource:
    weight, array = rewritten.graph.weights[index], rewritten.arrays.get(index)
    pieces = partial(copy_pieces, path, weight.stored) if array is None else partial(_bytes, array)
    return TensorSource(weight.stored.key, weight.stored.dtype, weight.stored.shape, pieces)


def _bytes(array: np.ndarray[Any, Any]) -> list[memoryview]:
    return [memoryview(array.reshape(-1).view(np.uint8).data)] if array.size else []
