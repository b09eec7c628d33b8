"""A model as data: operators, values, weights. No torch, no code, nothing to unpickle.

A *program* is a whole model, a *stage* a run of its operators; both are one tensor file (see `tensorfile`) named
by the SHA-256 of its bytes. The weights are the file's tensors, the rest is JSON under one metadata key:

    adapt.program    graph + nesting of arguments and results + range of the batch size
    adapt.stage      graph

A *graph* is a list of operators over numbered values, each value defined once and before its use:

    value 0, 1   input                      tensor of float32 (batch, 3, 224, 224), or an int (a size)
    operator 0   aten.conv2d.default        (value 0, weight 0, weight 1, (2, 2))     -> value 2
    operator 1   aten.chunk.default         (value 2, 2, 1)                           -> values 3, 4 (unpacked)

Operators name overloads of an allow-list that lives where they are run (`operators.py`); arguments are plain
values, `ValueRef` and `WeightRef` (by number, never by name) and `Symbol` (dtypes, memory formats, "the device").
A size is an int or `Affine`: a multiple of the batch size plus a constant.

Everything read from a file is checked for type and range; what is wrong is a WireError that names the place.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from adapt.errors import ConfigError, WireError
from adapt.models.structure import Node, Structure, count_leaves, from_plain, to_plain
from adapt.models.structure import unflatten as unflatten  # for who puts a result together
from adapt.models.tensorfile import (
    DTYPES,
    RANK_LIMIT,
    StoredTensor,
    TensorFile,
    canonical_json,
    digest_of,
    parse_json,
    read_tensor_file,
)

FORMAT = 1
PROGRAM_KEY = "adapt.program"
STAGE_KEY = "adapt.stage"
OPERATOR_LIMIT = 200_000
ARGUMENT_DEPTH_LIMIT = 4
INT_LIMIT = 2**63  # what torch's integers hold
TEXT_LIMIT = 1_000
OPERATOR_NAME = re.compile(r"[a-z]+(\.[A-Za-z0-9_]{1,80}){1,2}")
# What may have been done to a program that changes the last bits of its results; see `fold.py`.
CHANNELS_LAST, FOLD = "channels_last", "fold"
CHANGES = (CHANNELS_LAST, FOLD)
UNCHANGED = "contiguous"  # what a model is that nobody laid out anew
OPTIMIZE = ("none", FOLD)  # what a user may ask for
SYMBOL_KINDS = ("dtype", "memory_format", "layout", "device")


# --- sizes and values -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Affine:
    """The size `scale * batch + offset`."""

    scale: int
    offset: int

    def at(self, batch: int) -> int:
        return self.scale * batch + self.offset

    def __str__(self) -> str:
        text = "batch" if self.scale == 1 else f"{self.scale}*batch"
        return text if self.offset == 0 else f"{text}{self.offset:+d}"


Size: TypeAlias = int | Affine


def size_at(size: Size, batch: int) -> int:
    return size if isinstance(size, int) else size.at(batch)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor's dtype (torch's and numpy's name, say "float32"), shape and layout.

    `order`: the dimensions from the outermost in memory to the innermost, such that the tensor permuted by it is
    contiguous; None for a tensor with gaps or overlaps (a slice, an expanded dimension).
    """

    dtype: str
    shape: tuple[Size, ...]
    order: tuple[int, ...] | None

    @property
    def is_contiguous(self) -> bool:
        return self.order == tuple(range(len(self.shape)))

    def shape_at(self, batch: int) -> tuple[int, ...]:
        return tuple(size_at(size, batch) for size in self.shape)

    def bytes_at(self, batch: int) -> int:
        return math.prod(self.shape_at(batch)) * DTYPES[self.dtype][1]

    def __str__(self) -> str:
        return f"{self.dtype} ({', '.join(map(str, self.shape))}{',' if len(self.shape) == 1 else ''})"


@dataclass(frozen=True, slots=True)
class SizeSpec:
    """An int that depends on the batch size: it travels between stages as an int."""

    size: Size

    def bytes_at(self, batch: int) -> int:
        return 8

    def __str__(self) -> str:
        return f"int ({self.size})"


ValueSpec: TypeAlias = TensorSpec | SizeSpec


# --- operators --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ValueRef:
    index: int


@dataclass(frozen=True, slots=True)
class WeightRef:
    index: int


@dataclass(frozen=True, slots=True)
class Symbol:
    """A dtype, memory format or layout by its torch name, or the device (name empty) that the stage runs on."""

    kind: str
    name: str = ""


Argument: TypeAlias = "None | bool | int | float | str | ValueRef | WeightRef | Symbol | tuple[Argument, ...]"


@dataclass(frozen=True, slots=True)
class Operator:
    """One call. `outputs`: the value it defines or, if it `unpacks` a list, one per item, None where unused."""

    name: str
    args: tuple[Argument, ...]
    kwargs: Mapping[str, Argument]
    outputs: tuple[int | None, ...]
    unpacks: bool = False
    place: str = ""  # path of the module it comes from, for people


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of the file. Stored permuted by `order` (None: as it is), so that it is contiguous there.

    `requires_grad`: as in the module. Inference computes no gradients, but `matmul` looks at the flag when it chooses
    between one large product and many small ones, which round differently.
    """

    stored: StoredTensor
    order: tuple[int, ...] | None = None
    requires_grad: bool = False


@dataclass(frozen=True, slots=True)
class Graph:
    """Operators in the order in which they run; `inputs` and `outputs` are numbers of values."""

    operators: tuple[Operator, ...]
    values: tuple[ValueSpec, ...]
    weights: tuple[Weight, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def input_specs(self) -> tuple[ValueSpec, ...]:
        return tuple(self.values[index] for index in self.inputs)

    @property
    def output_specs(self) -> tuple[ValueSpec, ...]:
        return tuple(self.values[index] for index in self.outputs)

    @property
    def weight_bytes(self) -> int:
        return sum(weight.stored.size_bytes for weight in self.weights)


@dataclass(frozen=True, slots=True)
class Program:
    """A whole model. `input_structure` is the tuple (args, kwargs) of a call; `parameters` names the args.

    `batch_limit`: the largest batch; None when all shapes are fixed.
    `changes`: how it differs from the module in its last bits, of `CHANGES`; none in a program as it was exported.
    """

    path: Path
    digest: str
    file_bytes: int
    graph: Graph
    parameters: tuple[str, ...]
    input_structure: Structure
    output_structure: Structure
    batch_limit: int | None
    changes: tuple[str, ...] = ()

    @property
    def is_batched(self) -> bool:
        return self.batch_limit is not None

    @property
    def arithmetic(self) -> str:
        """The part of a result's numeric class that the program decides."""
        return "/".join(self.changes) or UNCHANGED


@dataclass(frozen=True, slots=True)
class StageFile:
    """A stage as it lies on disk."""

    path: Path
    digest: str
    file_bytes: int
    graph: Graph


def check_optimize(optimize: str) -> None:
    """Raises ConfigError unless it is one of `OPTIMIZE`."""
    if optimize not in OPTIMIZE:
        raise ConfigError(f"optimize={str(optimize)[:32]!r}: expected one of {', '.join(OPTIMIZE)}")


def references(argument: Argument) -> list[ValueRef | WeightRef]:
    """Every reference in an argument, in order."""
    if isinstance(argument, (ValueRef, WeightRef)):
        return [argument]
    if isinstance(argument, tuple):
        return [reference for item in argument for reference in references(item)]
    return []


def operator_references(operator: Operator) -> list[ValueRef | WeightRef]:
    return references((*operator.args, *operator.kwargs.values()))


def map_references(argument: Argument, replace: Callable[[ValueRef | WeightRef], Argument]) -> Argument:
    """The argument with each reference replaced."""
    if isinstance(argument, (ValueRef, WeightRef)):
        return replace(argument)
    if isinstance(argument, tuple):
        return tuple(map_references(item, replace) for item in argument)
    return argument


# --- writing ----------------------------------------------------------------------------------------------------------


def graph_to_plain(graph: Graph) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "operators": [
            [
                operator.name,
                [_argument_to_plain(argument) for argument in operator.args],
                {name: _argument_to_plain(argument) for name, argument in operator.kwargs.items()},
                list(operator.outputs) if operator.unpacks else operator.outputs[0],
                operator.place,
            ]
            for operator in graph.operators
        ],
        "values": [spec_to_plain(spec) for spec in graph.values],
        "weights": [_weight_to_plain(weight) for weight in graph.weights],
        "inputs": list(graph.inputs),
        "outputs": list(graph.outputs),
    }


def program_to_metadata(
    graph: Graph,
    parameters: Sequence[str],
    input_structure: Structure,
    output_structure: Structure,
    batch_limit: int | None,
    changes: Sequence[str] = (),
) -> dict[str, str]:
    """The metadata of a program's file."""
    document = graph_to_plain(graph) | {
        "parameters": list(parameters),
        "input_structure": to_plain(input_structure),
        "output_structure": to_plain(output_structure),
        "batch_limit": batch_limit,
    }
    if changes:
        document["changes"] = list(changes)
    return {PROGRAM_KEY: canonical_json(document)}


def stage_to_metadata(graph: Graph) -> dict[str, str]:
    """The metadata of a stage's file."""
    return {STAGE_KEY: canonical_json(graph_to_plain(graph))}


def _size_to_plain(size: Size) -> int | list[int]:
    return size if isinstance(size, int) else [size.scale, size.offset]


def spec_to_plain(spec: ValueSpec) -> list[Any]:
    if isinstance(spec, SizeSpec):
        return ["size", _size_to_plain(spec.size)]
    order = "contiguous" if spec.is_contiguous else None if spec.order is None else list(spec.order)
    return [spec.dtype, [_size_to_plain(size) for size in spec.shape], order]


def _weight_to_plain(weight: Weight) -> list[Any]:
    return [weight.stored.key, None if weight.order is None else list(weight.order), weight.requires_grad]


def _argument_to_plain(argument: Argument) -> Any:
    match argument:
        case ValueRef(index=index):
            return {"v": index}
        case WeightRef(index=index):
            return {"w": index}
        case Symbol(kind=kind, name=name):
            return {kind: name}
        case tuple():
            return [_argument_to_plain(item) for item in argument]
        case float() if not math.isfinite(argument):  # JSON has no infinity, and masks are full of it
            return {"float": repr(argument)}
        case _:
            return argument


# --- reading ----------------------------------------------------------------------------------------------------------


def read_program(path: Path | str, *, verify: bool = True) -> Program:
    """Read and check a program.

    Args:
        path: file named `<sha256>.safetensors`, or otherwise if `verify` is true.
        verify: hash the file; without it the digest is taken from the name, for a file that was just written.

    Raises:
        WireError: the file is malformed or does not have the digest that it is named by.
        OSError: the file cannot be read.
    """
    file = read_tensor_file(path)
    document = _document(file, PROGRAM_KEY)
    graph = _graph_from_plain(document, file)
    name = file.path.name
    batch_limit = document.get("batch_limit")
    if batch_limit is not None:
        batch_limit = _int(batch_limit, f"{name}: batch_limit", 1, INT_LIMIT)
    input_structure = from_plain(document.get("input_structure"), f"{name}: input_structure")
    output_structure = from_plain(document.get("output_structure"), f"{name}: output_structure")
    match input_structure:
        case Node(kind="tuple", items=(Node(kind="tuple"), Node(kind="dict"))):
            pass
        case _:
            raise WireError(f"{name}: input_structure is not (args, kwargs)")
    for structure, indices, kind in (
        (input_structure, graph.inputs, "inputs"),
        (output_structure, graph.outputs, "outputs"),
    ):
        if count_leaves(structure) != len(indices):
            raise WireError(f"{name}: {count_leaves(structure)} leaves for {len(indices)} {kind}")
    parameters = tuple(_text(item, f"{name}: parameters") for item in _list(document.get("parameters"), f"{name}: parameters"))
    changes = tuple(_text(item, f"{name}: changes") for item in _list(document.get("changes", []), f"{name}: changes", len(CHANGES)))
    if changes != tuple(change for change in CHANGES if change in changes):
        raise WireError(f"{name}: changes {str(changes)[:80]} are not, in this order, of {', '.join(CHANGES)}")
    digest = _checked_digest(file, verify)
    return Program(file.path, digest, file.file_bytes, graph, parameters, input_structure, output_structure, batch_limit, changes)


def read_stage(path: Path | str, *, verify: bool = True) -> StageFile:
    """Read and check a stage; arguments and errors as for `read_program`."""
    file = read_tensor_file(path)
    graph = _graph_from_plain(_document(file, STAGE_KEY), file)
    return StageFile(file.path, _checked_digest(file, verify), file.file_bytes, graph)


def read_graph(path: Path | str, *, verify: bool = True) -> StageFile:
    """Read a stage or, as the one stage that it is, a whole program."""
    file = read_tensor_file(path)
    graph = _graph_from_plain(_document(file, STAGE_KEY if STAGE_KEY in file.metadata else PROGRAM_KEY), file)
    return StageFile(file.path, _checked_digest(file, verify), file.file_bytes, graph)


def _checked_digest(file: TensorFile, verify: bool) -> str:
    named = file.path.name.removesuffix(".safetensors")
    is_digest = re.fullmatch(r"[0-9a-f]{64}", named) is not None
    if not verify:
        if not is_digest:
            raise WireError(f"{file.path.name}: not named by a digest")
        return named
    digest = digest_of(file.path)
    if is_digest and digest != named:
        raise WireError(f"{file.path.name}: the bytes have the digest {digest}")
    return digest


def _document(file: TensorFile, key: str) -> dict[str, Any]:
    name = file.path.name
    if key not in file.metadata:
        raise WireError(f"{name}: has no {key}")
    document = parse_json(file.metadata[key], f"{name}: {key}")
    if not isinstance(document, dict):
        raise WireError(f"{name}: {key} is not an object")
    if document.get("format") != FORMAT:
        raise WireError(f"{name}: format {str(document.get('format'))[:20]}, this version of ADAPT reads {FORMAT}")
    return document


def _graph_from_plain(document: dict[str, Any], file: TensorFile) -> Graph:
    name = file.path.name
    values = [spec_from_plain(item, f"{name}: values[{i}]") for i, item in enumerate(_list(document.get("values"), f"{name}: values"))]
    weights = [
        _weight_from_plain(item, file, f"{name}: weights[{i}]") for i, item in enumerate(_list(document.get("weights"), f"{name}: weights"))
    ]
    inputs = _indices(document.get("inputs"), f"{name}: inputs", len(values))
    outputs = _indices(document.get("outputs"), f"{name}: outputs", len(values))
    plain_operators = _list(document.get("operators"), f"{name}: operators", OPERATOR_LIMIT)
    defined = set(inputs)
    if len(defined) != len(inputs):
        raise WireError(f"{name}: inputs: a value twice")
    operators = []
    for index, item in enumerate(plain_operators):
        place = f"{name}: operators[{index}]"
        operator = _operator_from_plain(item, place, len(values))
        _check_references(operator, defined, len(weights), place)
        for output in operator.outputs:
            if output in defined:
                raise WireError(f"{place}: value {output} is defined twice")
            if output is not None:
                defined.add(output)
        operators.append(operator)
    if missing := [output for output in outputs if output not in defined]:
        raise WireError(f"{name}: outputs: nothing defines value {missing[0]}")
    return Graph(tuple(operators), tuple(values), tuple(weights), inputs, outputs)


def _check_references(operator: Operator, defined: set[int], weight_count: int, place: str) -> None:
    for reference in operator_references(operator):
        if isinstance(reference, ValueRef) and reference.index not in defined:
            raise WireError(f"{place}: value {reference.index} is used before it is defined")
        if isinstance(reference, WeightRef) and not 0 <= reference.index < weight_count:
            raise WireError(f"{place}: there is no weight {reference.index}")


def _operator_from_plain(item: Any, place: str, value_count: int) -> Operator:
    if not isinstance(item, list) or len(item) != 5:
        raise WireError(f"{place}: expected [name, args, kwargs, outputs, place]")
    name, args, kwargs, outputs, module_path = item
    if not isinstance(name, str) or not OPERATOR_NAME.fullmatch(name):
        raise WireError(f"{place}: {str(name)[:80]!r} is not the name of an operator")
    if not isinstance(kwargs, dict) or not all(key.isidentifier() for key in kwargs):
        raise WireError(f"{place}: kwargs is not an object of arguments")
    unpacks = isinstance(outputs, list)
    places = outputs if isinstance(outputs, list) else [outputs]
    return Operator(
        name,
        tuple(_argument_from_plain(argument, f"{place}.args[{i}]") for i, argument in enumerate(_list(args, f"{place}.args"))),
        {key: _argument_from_plain(argument, f"{place}.{key}") for key, argument in kwargs.items()},
        tuple(None if i is None and unpacks else _int(i, f"{place}.outputs", 0, value_count - 1) for i in places),
        unpacks,
        _text(module_path, f"{place}: place"),
    )


def _argument_from_plain(item: Any, place: str, depth: int = 0) -> Argument:
    match item:
        case None | bool() | float():
            return item
        case int():
            return _int(item, place, -INT_LIMIT, INT_LIMIT - 1)
        case str():
            return _text(item, place)
        case list() if depth < ARGUMENT_DEPTH_LIMIT:
            return tuple(_argument_from_plain(part, f"{place}[{index}]", depth + 1) for index, part in enumerate(item))
        case {"v": index, **rest} if not rest:
            return ValueRef(_int(index, place, 0, INT_LIMIT))
        case {"w": index, **rest} if not rest:
            return WeightRef(_int(index, place, 0, INT_LIMIT))
        case {"float": "inf" | "-inf" | "nan" as text, **rest} if not rest:
            return float(text)
        case dict() if len(item) == 1 and (kind := next(iter(item))) in SYMBOL_KINDS:
            return Symbol(kind, _text(item[kind], place))
    raise WireError(f"{place}: {str(item)[:80]!r} is not an argument")


def spec_from_plain(item: Any, place: str) -> ValueSpec:
    match item:
        case ["size", size]:
            return SizeSpec(_size_from_plain(size, place))
        case [str() as dtype, list() as sizes, order] if dtype in DTYPES and len(sizes) <= RANK_LIMIT:
            shape = tuple(_size_from_plain(size, place) for size in sizes)
            if order == "contiguous":
                return TensorSpec(dtype, shape, tuple(range(len(shape))))
            return TensorSpec(dtype, shape, None if order is None else _order(order, len(shape), place))
    raise WireError(f"{place}: {str(item)[:80]!r} is not a value")


def _size_from_plain(item: Any, place: str) -> Size:
    match item:
        case int():
            return _int(item, place, -INT_LIMIT, INT_LIMIT)
        case [scale, offset]:
            return Affine(_int(scale, place, -INT_LIMIT, INT_LIMIT), _int(offset, place, -INT_LIMIT, INT_LIMIT))
    raise WireError(f"{place}: {str(item)[:80]!r} is not a size")


def _weight_from_plain(item: Any, file: TensorFile, place: str) -> Weight:
    match item:
        case [str() as key, order, bool() as requires_grad] if key in file.tensors:
            stored = file.tensors[key]
            if requires_grad and "float" not in stored.dtype:
                raise WireError(f"{place}: a tensor of {stored.dtype} has no gradient")
            return Weight(stored, None if order is None else _order(order, len(stored.shape), place), requires_grad)
    raise WireError(f"{place}: {str(item)[:80]!r} is not a tensor of this file")


def _order(item: Any, rank: int, place: str) -> tuple[int, ...]:
    order = tuple(_int(dim, place, 0, rank - 1) for dim in _list(item, place))
    if len(order) != rank or len(set(order)) != rank:
        raise WireError(f"{place}: {list(order)} is not an order of {rank} dimensions")
    return order


def _indices(item: Any, place: str, count: int) -> tuple[int, ...]:
    return tuple(_int(index, place, 0, count - 1) for index in _list(item, place))


def _int(item: Any, place: str, low: int, high: int) -> int:
    if type(item) is not int or not low <= item <= high:
        raise WireError(f"{place}: {str(item)[:80]!r} is not an int from {low} to {high}")
    return item


def _list(item: Any, place: str, limit: int = 10_000_000) -> list[Any]:
    if not isinstance(item, list) or len(item) > limit:
        raise WireError(f"{place}: not a list of at most {limit}")
    return item


def _text(item: Any, place: str) -> str:
    if not isinstance(item, str) or len(item) > TEXT_LIMIT:
        raise WireError(f"{place}: not a text of at most {TEXT_LIMIT} characters")
    return item
