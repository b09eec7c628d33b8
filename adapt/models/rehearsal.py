"""What a module itself makes of canaries, and what its program makes of them on the way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash

from adapt.errors import ConfigError, ExportError
from adapt.models.canaries import COUNT_LIMIT, FILE_LIMIT_BYTES, KnownCanaries, KnownCanary, Leaf, deviation, write_canaries
from adapt.models.devices import device_facts
from adapt.models.export import as_tensors, deterministic, eager
from adapt.models.interface import Interface
from adapt.models.interpreter import Stage
from adapt.models.profiler import single_thread
from adapt.models.program import Program, TensorSpec, ValueSpec, read_program
from adapt.protocol.codecs import DTYPES
from adapt.protocol.digests import plain_mark, tensor_mark


def rehearse(
    module: Any, program: Path | str, canaries: Sequence[Any], *, directory: Path | str, tolerance: float
) -> tuple[Path, str, int]:
    """Run a module and its program on canaries, at one thread, and write a file of them into `directory`.

    Args:
        module: whose program lies at `program`; as it computes when it is called, so in eval mode, and it may write to itself.
        canaries: inputs; for a module with several, tuples of them.
        tolerance: how much the program may deviate from the module, see `deviation`.

    Returns:
        Path, digest and size of the file.

    Raises:
        InputMismatchError: one does not fit the model.
        ConfigError: there are too many, or they are too large.
        ExportError: the program deviates from the module on one of them.
    """
    if not 1 <= len(canaries) <= COUNT_LIMIT:
        raise ConfigError(f"canaries: {len(canaries)} were given; 1 to {COUNT_LIMIT} are allowed")
    source = read_program(program, verify=False)
    stage = Stage.load(program, verify=False)
    with deterministic(), single_thread():
        known = tuple(_rehearse(module, source, stage, given, number, tolerance) for number, given in enumerate(canaries))
        numeric_class = f"{device_facts('cpu', threads=1).numeric_class}/{source.arithmetic}"
    path, digest, file_bytes = write_canaries(directory, KnownCanaries(source.digest, numeric_class, known))
    if file_bytes > FILE_LIMIT_BYTES:
        raise ConfigError(f"canaries: their inputs and outputs take {file_bytes} bytes; {FILE_LIMIT_BYTES} are allowed: give fewer")
    return path, digest, file_bytes


def _rehearse(module: Any, program: Program, stage: Stage, given: Any, number: int, tolerance: float) -> KnownCanary:
    args = as_tensors(given if isinstance(given, tuple) else (given,))
    leaves = Interface.of(program).match(args, {})
    marks = _Marks(program)
    marks.enter(leaves)
    outputs = stage.run(leaves, observe=marks.note)
    own = iter(eager(module, args, {}))
    expected: list[Leaf] = [_stored(next(own)) if isinstance(value, torch.Tensor) else int(value) for value in outputs]
    for place, (value, wanted) in enumerate(zip(outputs, expected, strict=True)):
        got = _stored(value) if isinstance(value, torch.Tensor) else int(value)
        if (off := deviation(got, wanted)) > tolerance:
            raise ExportError(
                f"canary {number}: output {place} of the exported program deviates from the module's own by {off:.3g} "
                f"of its largest magnitude; {tolerance:g} is allowed"
            )
    inputs = tuple(_stored(leaf) if isinstance(leaf, torch.Tensor) else int(leaf) for leaf in leaves)
    return KnownCanary(inputs, tuple(expected), (*marks.values, *map(_mark, outputs)))


class _Marks:
    """Of every value of a program, as it would cross a cut."""

    def __init__(self, program: Program) -> None:
        self._graph = program.graph
        self.values: list[bytes | None] = [None] * len(program.graph.values)

    def enter(self, leaves: Sequence[Any]) -> None:
        for index, leaf in zip(self._graph.inputs, leaves, strict=True):
            self.values[index] = _mark(leaf)

    def note(self, position: int, result: Any) -> None:
        operator = self._graph.operators[position]
        for index, item in zip(operator.outputs, result if operator.unpacks else [result], strict=True):
            if index is not None:
                self.values[index] = _mark_as_it_travels(item, self._graph.values[index])


def _mark_as_it_travels(value: Any, spec: ValueSpec) -> bytes | None:
    if not isinstance(spec, TensorSpec):
        return plain_mark(value)
    return None if spec.order is None else _mark(value.permute(spec.order))


def _mark(value: Any) -> bytes:
    if not isinstance(value, torch.Tensor):
        return plain_mark(value)
    dtype, array = _stored(value)
    return tensor_mark(dtype, tuple(array.shape), xxhash.xxh3_64_intdigest(array.tobytes()))


def _stored(tensor: torch.Tensor) -> Any:
    """Type and values, as they are written down."""
    tensor = tensor.detach().cpu().contiguous()
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ExportError(f"canaries: tensors of {dtype} do not travel")
    return dtype, (tensor.view(torch.int16) if dtype == "bfloat16" else tensor).numpy().view(DTYPES[dtype])
