"""Inputs with what the module itself makes of them, as a file that goes with a program. Works on data, without torch.

A file of canaries is a tensor file (see tensorfile.py) with the tensors of all inputs and outputs, and one text:

    adapt.canaries    format, program, numeric_class
                      canaries: for each   inputs, outputs: each a tensor's key, or a number
                                           values: a mark (protocol/digests.py) for each value of the program that may cross a cut,
                                                   then one for each output

Because every value has its mark, the digest that a stage's output must have is known for whatever cuts are chosen later.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from adapt.errors import WireError
from adapt.models.program import Graph, SizeSpec, TensorSpec
from adapt.models.tensorfile import StoredTensor, TensorFile, TensorSource, canonical_json, copy_pieces, parse_json, read_tensor_file
from adapt.models.tensorfile import write_tensor_file as write_tensor_file  # for who makes canaries
from adapt.protocol.codecs import DTYPES
from adapt.protocol.digests import PLAIN_LIMIT, digest_of

FORMAT = 1
KEY = "adapt.canaries"
COUNT_LIMIT = 16
FILE_LIMIT_BYTES = 64 << 20  # a dispatcher has it in memory while the version is tried
TOLERANCE = 1e-3

Tensor: TypeAlias = tuple[str, np.ndarray[Any, Any]]  # the wire's name of the type, and the values; bfloat16 as uint16
Leaf: TypeAlias = "Tensor | int"


@dataclass(frozen=True, slots=True, eq=False)
class KnownCanary:
    """One input, its outputs, and the marks of all values and outputs; None: the value cannot cross a cut."""

    inputs: tuple[Leaf, ...]
    outputs: tuple[Leaf, ...]
    values: tuple[bytes | None, ...]


@dataclass(frozen=True, slots=True, eq=False)
class KnownCanaries:
    """What a file of canaries says. `program`: digest of what computed them; `numeric_class`: in which."""

    program: str
    numeric_class: str
    canaries: tuple[KnownCanary, ...]

    def stage_digests(self, canary: int, leaving: Sequence[Sequence[int]], value_count: int) -> tuple[bytes, ...]:
        """Of each stage's output, if they were in `check_fits` before.

        Args:
            leaving: for each stage but the last, the values that leave it, in order.
            value_count: how many the program has.

        Raises:
            WireError: a value that crosses a cut has no mark.
        """
        marks = self.canaries[canary].values
        digests = []
        for leaves in (*leaving, range(value_count, len(marks))):
            found = [mark for index in leaves if (mark := marks[index]) is not None]
            if len(found) != len(leaves):
                raise WireError(f"canary {canary}: a value that crosses a cut has no mark")
            digests.append(digest_of(found))
        return tuple(digests)


def check_fits(known: KnownCanaries, program: str, graph: Graph) -> None:
    """Raises WireError: the canaries are not for this program."""
    if known.program != program:
        raise WireError(f"the canaries are for program {known.program[:12]}, not for {program[:12]}")
    for number, canary in enumerate(known.canaries):
        if len(canary.values) != len(graph.values) + len(graph.outputs):
            raise WireError(f"canary {number}: {len(canary.values)} marks, and the program has {len(graph.values)} values")
        for what, leaves, specs in (("input", canary.inputs, graph.input_specs), ("output", canary.outputs, graph.output_specs)):
            if len(leaves) != len(specs):
                raise WireError(f"canary {number}: {len(leaves)} {what}s, and the program has {len(specs)}")
            for leaf, spec in zip(leaves, specs, strict=True):
                if not _suits(leaf, spec):
                    raise WireError(f"canary {number}: an {what} is not {spec}")


def _suits(leaf: Leaf, spec: Any) -> bool:
    if isinstance(spec, SizeSpec):
        return isinstance(leaf, int)
    return isinstance(spec, TensorSpec) and isinstance(leaf, tuple) and leaf[0] == spec.dtype and leaf[1].ndim == len(spec.shape)


def deviation(got: Leaf, expected: Leaf) -> float:
    """The largest difference, as a share of the largest magnitude expected; infinite if they cannot be compared."""
    if isinstance(got, int) or isinstance(expected, int):
        return 0.0 if got == expected and isinstance(got, int) and isinstance(expected, int) else math.inf
    if got[0] != expected[0] or got[1].shape != expected[1].shape:
        return math.inf
    a, b = _numbers(*got), _numbers(*expected)
    if not a.size:
        return 0.0
    is_same = (a == b) | (np.isnan(a) & np.isnan(b))
    if is_same.all():
        return 0.0
    with np.errstate(all="ignore"):
        largest = np.abs(np.where(is_same, 0, a - b)).max()
        magnitude = np.abs(b[np.isfinite(b)]).max(initial=0.0)
    return float(largest / magnitude) if np.isfinite(largest) and magnitude > 0 else math.inf


def _numbers(dtype: str, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if dtype == "bfloat16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64)


# --- files ------------------------------------------------------------------------------------------------------------


def write_canaries(directory: Path | str, known: KnownCanaries) -> tuple[Path, str, int]:
    """Write them into `directory`; the path, the digest and the size in bytes."""
    sources: list[TensorSource] = []

    def plain(leaf: Leaf, key: str) -> str | int:
        if isinstance(leaf, int):
            return leaf
        dtype, array = leaf
        data = np.ascontiguousarray(array).tobytes()
        sources.append(TensorSource(key, dtype, array.shape, lambda: [data] if data else []))
        return key

    described = [
        {
            "inputs": [plain(leaf, f"{number}.input.{place}") for place, leaf in enumerate(canary.inputs)],
            "outputs": [plain(leaf, f"{number}.output.{place}") for place, leaf in enumerate(canary.outputs)],
            "values": [None if mark is None else mark.hex() for mark in canary.values],
        }
        for number, canary in enumerate(known.canaries)
    ]
    document = {"format": FORMAT, "program": known.program, "numeric_class": known.numeric_class, "canaries": described}
    return write_tensor_file(directory, {KEY: canonical_json(document)}, sources)


def read_canaries(path: Path | str) -> KnownCanaries:
    """Read and check a file of canaries, tensors and all.

    Raises:
        WireError: it is none; the message names the place.
        OSError: it cannot be read.
    """
    file = read_tensor_file(path)
    name = file.path.name
    if file.file_bytes > FILE_LIMIT_BYTES:
        raise WireError(f"{name}: canaries of {file.file_bytes} bytes; {FILE_LIMIT_BYTES} are allowed: give fewer, or smaller ones")
    if KEY not in file.metadata:
        raise WireError(f"{name}: has no {KEY}")
    match parse_json(file.metadata[KEY], f"{name}: {KEY}"):
        case {"format": 1, "program": str() as program, "numeric_class": str() as numeric_class, "canaries": list() as described}:
            pass
        case _:
            raise WireError(f"{name}: {KEY} is not what this version of ADAPT reads")
    if not 1 <= len(described) <= COUNT_LIMIT:
        raise WireError(f"{name}: {len(described)} canaries; 1 to {COUNT_LIMIT} are allowed")
    canaries = tuple(_canary(file, item, f"{name}: canary {number}") for number, item in enumerate(described))
    return KnownCanaries(program, numeric_class, canaries)


def _canary(file: TensorFile, item: Any, place: str) -> KnownCanary:
    match item:
        case {"inputs": list() as inputs, "outputs": list() as outputs, "values": list() as values}:
            return KnownCanary(
                tuple(_leaf(file, leaf, place) for leaf in inputs),
                tuple(_leaf(file, leaf, place) for leaf in outputs),
                tuple(_mark(mark, place) for mark in values),
            )
    raise WireError(f"{place}: has not inputs, outputs and values")


def _leaf(file: TensorFile, leaf: Any, place: str) -> Leaf:
    if type(leaf) is int:
        return leaf
    stored = file.tensors.get(leaf) if isinstance(leaf, str) else None
    if stored is None:
        raise WireError(f"{place}: {str(leaf)[:40]!r} is no tensor of the file")
    return stored.dtype, _array(file.path, stored, place)


def _array(path: Path, stored: StoredTensor, place: str) -> np.ndarray[Any, Any]:
    if stored.dtype not in DTYPES:
        raise WireError(f"{place}: tensors of {stored.dtype} do not travel")
    return np.frombuffer(b"".join(copy_pieces(path, stored)), DTYPES[stored.dtype]).reshape(stored.shape)


def _mark(mark: Any, place: str) -> bytes | None:
    if mark is None:
        return None
    try:
        found = bytes.fromhex(mark)
    except (TypeError, ValueError):
        found = b""
    if not 0 < len(found) <= PLAIN_LIMIT:
        raise WireError(f"{place}: {str(mark)[:40]!r} is no mark")
    return found
