"""How much memory an operator would take, known before it runs: a stage may come from anybody, and a few bytes can ask for terabytes.

`zeros(2**40)`, a broadcast of two long vectors, padding without end: each is one allowed operator. So the elements of a result, or of the
scratch memory where that is more, are bounded from the shapes of what an operator is given. That is done twice:

- when a stage is loaded, from the shapes that its file claims: what asks for too much is refused before anything runs;
- at the first run with inputs of new shapes, before each operator, from the real shapes: there a file that lied is found.

Bounds are exact where an operator can make much of little (`_RULES`), a broadcast for what works element by element, and else the sum of what
is given, which no other operator on the list exceeds. Sizes computed from the batch are followed as the terms that they are.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch

from adapt.errors import WireError
from adapt.models.operators import DTYPES, ELEMENTWISE, IMPURE_IN_TRAINING, OPERATORS, TRAINING_FLAGS
from adapt.models.program import INT_LIMIT, Affine, Argument, Graph, Operator, Size, SizeSpec, TensorSpec, ValueRef, ValueSpec, WeightRef

ITEM_BYTES = 8  # of the widest dtype
LEAST_ITEM_BYTES = 4  # that convolutions and products compute with: narrower ones may be widened
MANY_COLUMNS = 16  # times what a convolution is given and makes; of fewer its kernel makes a block at a time
LSTM_GATES = 4
OBJECT_ELEMENTS = 64  # what one more tensor costs, though it shares its memory, in elements


class Shape(tuple[int, ...]):
    """Of a tensor, to be told from a list of sizes."""

    item_bytes = ITEM_BYTES

    @classmethod
    def of(cls, sizes: Sequence[int], dtype: torch.dtype) -> Shape:
        shape = cls(sizes)
        shape.item_bytes = dtype.itemsize
        return shape

    @property
    def elements(self) -> int:
        return math.prod(self)


Given: TypeAlias = Mapping[str, Any]  # argument by its name in the schema; shapes for tensors


def memory_limit_bytes() -> int:
    """The most that one value may take here: half of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


# --- when a stage is loaded -------------------------------------------------------------------------------------------


def check_graph(graph: Graph, limit_bytes: int) -> None:
    """Refuse a graph that asks for more than `limit_bytes` for a value, for a batch of 1, that trains, or that computes sizes wrongly.

    Raises:
        WireError: naming the operator.
    """
    for index, spec in enumerate(graph.values):
        _check_value(spec, f"values[{index}]", limit_bytes)
    weights = [Shape.of(_as_seen(weight.stored.shape, weight.order), DTYPES[weight.stored.dtype]) for weight in graph.weights]

    def shape_of(reference: ValueRef | WeightRef) -> Any:
        if isinstance(reference, WeightRef):
            return weights[reference.index]
        spec = graph.values[reference.index]
        return Shape.of(spec.shape_at(1), DTYPES[spec.dtype]) if isinstance(spec, TensorSpec) else _at_one(spec.size)

    for position, operator in enumerate(graph.operators):
        where = f"operators[{position}]: {operator.name}"
        call = OPERATORS[operator.name]
        if isinstance(call, torch._ops.OpOverload):
            given = _named(call, [_shapes(arg, shape_of) for arg in operator.args], _each(operator.kwargs, shape_of))
            _check_inference(operator.name, given, where)
            _check_indices(operator, graph.values, where)
            check_need(operator.name, given, limit_bytes, where)
        else:
            _check_size(operator, graph.values, where)


def _check_value(spec: ValueSpec, where: str, limit_bytes: int) -> None:
    if isinstance(spec, SizeSpec):
        return
    for size in spec.shape:
        least, scale = _at_one(size), size.scale if isinstance(size, Affine) else 0
        if least < 0 or scale < 0:
            raise WireError(f"{where}: {spec}: a size is negative")
    if spec.bytes_at(1) > limit_bytes:
        raise WireError(f"{where}: {spec}: {_gib(spec.bytes_at(1))} for one item, of at most {_gib(limit_bytes)} here")


def _at_one(size: Size) -> int:
    return size if isinstance(size, int) else size.at(1)


def _as_seen(stored: Sequence[int], order: Sequence[int] | None) -> Sequence[int]:
    return stored if order is None else [stored[order.index(dim)] for dim in range(len(order))]


def _shapes(argument: Argument, shape_of: Callable[[ValueRef | WeightRef], Any]) -> Any:
    if isinstance(argument, (ValueRef, WeightRef)):
        return shape_of(argument)
    return [_shapes(item, shape_of) for item in argument] if isinstance(argument, tuple) else argument


def _each(kwargs: Mapping[str, Argument], shape_of: Callable[[ValueRef | WeightRef], Any]) -> dict[str, Any]:
    return {name: _shapes(argument, shape_of) for name, argument in kwargs.items()}


def _check_inference(name: str, given: Given, where: str) -> None:
    """What trains writes to its statistics, which are the stage's weights, or draws random numbers."""
    if name not in IMPURE_IN_TRAINING or ("running_mean" in given and given["running_mean"] is None):
        return
    if flags := [flag for flag in TRAINING_FLAGS if given.get(flag)]:
        raise WireError(f"{where}: {flags[0]} is set; stages compute the same whenever they run")


def _check_indices(operator: Operator, values: Sequence[ValueSpec], where: str) -> None:
    """A mask as an index gives a tensor whose size nobody knows before."""
    if operator.name != "aten.index.Tensor" or len(operator.args) < 2 or not isinstance(operator.args[1], tuple):
        return
    for index in operator.args[1]:
        spec = values[index.index] if isinstance(index, ValueRef) else None
        if isinstance(spec, TensorSpec) and spec.dtype in ("bool", "uint8"):
            raise WireError(f"{where}: an index of {spec.dtype}: the size of the result depends on values")


def _check_size(operator: Operator, values: Sequence[ValueSpec], where: str) -> None:
    """An operator on sizes gives what its file claims, whatever the batch."""
    try:
        claimed = values[operator.outputs[0]] if not operator.unpacks and not operator.kwargs else None  # type: ignore[index]
        found = _size_of(operator, values)
    except (ArithmeticError, IndexError, TypeError, ValueError):
        claimed, found = None, None
    if found is None or not isinstance(claimed, SizeSpec) or _terms(claimed.size) != _terms(found):
        raise WireError(f"{where}: is not a size that the batch decides as the file claims")
    if max(map(abs, _terms(found))) >= INT_LIMIT:
        raise WireError(f"{where}: a size beyond all integers")


def _size_of(operator: Operator, values: Sequence[ValueSpec]) -> Size | None:
    args = operator.args
    if operator.name == "aten.sym_size.int":
        tensor, dim = args
        spec = values[tensor.index] if isinstance(tensor, ValueRef) else None
        return spec.shape[dim] if isinstance(spec, TensorSpec) and type(dim) is int else None
    terms = [_terms(_known_size(argument, values)) for argument in args]
    if operator.name == "operator.neg":
        ((scale, offset),) = terms
        return Affine(-scale, -offset)
    (scale, offset), (other_scale, other_offset) = terms
    match operator.name.removeprefix("operator."):
        case "add":
            return Affine(scale + other_scale, offset + other_offset)
        case "sub":
            return Affine(scale - other_scale, offset - other_offset)
        case "mul" if not scale or not other_scale:
            return Affine(scale * other_offset + other_scale * offset, offset * other_offset)
        case "floordiv" if not other_scale and scale % other_offset == 0:
            return Affine(scale // other_offset, offset // other_offset)
        case "mod" if not other_scale and scale % other_offset == 0:
            return Affine(0, offset % other_offset)
    return None


def _known_size(argument: Argument, values: Sequence[ValueSpec]) -> Size:
    if type(argument) is int:
        return argument
    spec = values[argument.index] if isinstance(argument, ValueRef) else None
    if not isinstance(spec, SizeSpec):
        raise TypeError
    return spec.size


def _terms(size: Size) -> tuple[int, int]:
    return (0, size) if isinstance(size, int) else (size.scale, size.offset)


# --- before an operator runs ------------------------------------------------------------------------------------------


def check_call(call: Callable[..., Any], name: str, args: Sequence[Any], kwargs: Mapping[str, Any], limit_bytes: int) -> None:
    """Raises WireError if the operator would take more than `limit_bytes` for what it is really given: tensors, lists of them, plain values."""
    if isinstance(call, torch._ops.OpOverload):
        real = {key: _real(value) for key, value in kwargs.items()}
        check_need(name, _named(call, [_real(value) for value in args], real), limit_bytes, name)
    elif any(type(value) is int and abs(value) >= INT_LIMIT for value in args):
        raise WireError(f"{name}: a size beyond all integers")


def _real(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return Shape.of(value.shape, value.dtype)
    return [_real(item) for item in value] if isinstance(value, list) else value


def check_need(name: str, given: Given, limit_bytes: int, where: str) -> None:
    """Raises WireError if what the operator makes of this may take more than `limit_bytes`, or cannot be told."""
    try:
        needed = most_elements(name, given) * _item_bytes(name, given)
    except (ArithmeticError, AttributeError, IndexError, KeyError, StopIteration, TypeError, ValueError) as error:
        raise WireError(f"{where}: arguments of the wrong kind: {type(error).__name__}: {str(error)[:100]}") from None
    if needed > limit_bytes:
        raise WireError(f"{where}: may take {_gib(needed)} of at most {_gib(limit_bytes)} here")


def most_elements(name: str, given: Given) -> int:
    """A bound for the elements of an operator's result, and of what it needs meanwhile. Raises many errors for arguments of the wrong kind."""
    rule = _RULES.get(_family(name))
    shapes = list(_tensors(given.values()))
    if rule is not None:
        return max(int(rule(given)), 0)
    return _broadcast(shapes) if name in ELEMENTWISE else sum(shape.elements for shape in shapes)


def _item_bytes(name: str, given: Given) -> int:
    if _family(name) not in _KEEP_DTYPE:
        return ITEM_BYTES
    return max(LEAST_ITEM_BYTES, *(shape.item_bytes for shape in _tensors(given.values())))


def _family(name: str) -> str:
    """Of an operator, without its overload."""
    return name.removeprefix("aten.").partition(".")[0]


def _named(call: torch._ops.OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    schema = call._schema.arguments
    given = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    return given | dict(zip((argument.name for argument in schema), args, strict=False)) | dict(kwargs)


def _tensors(values: Any) -> Iterator[Shape]:
    for value in values:
        if isinstance(value, Shape):
            yield value
        elif isinstance(value, list):
            yield from _tensors(value)


def _broadcast(shapes: Sequence[Sequence[int]]) -> int:
    rank = max(map(len, shapes), default=0)
    return math.prod(max((shape[dim] for shape in shapes if len(shape) >= -dim), default=1) for dim in range(-rank, 0))


def _first(given: Given) -> int:
    return next(_tensors(given.values())).elements


def _sizes(value: Any) -> list[int]:
    """A size or a list of sizes, as a list."""
    sizes = value if isinstance(value, list) else [value]
    if not all(type(size) is int for size in sizes):
        raise TypeError("not sizes")
    return sizes


def _created(given: Given) -> int:
    return math.prod(_sizes(given["size"]))


def _stepped(given: Given) -> int:
    return int(abs(math.ceil((given["end"] - given.get("start", 0)) / given.get("step", 1))) + 1)


def _one_hot(given: Given) -> int:
    if given["num_classes"] < 0:
        raise ValueError("the size of the result depends on values")
    return _first(given) * int(given["num_classes"])


def _repeated(given: Given) -> int:
    counts = _sizes(given[next(name for name in ("repeats", "dims") if name in given)])
    return _first(given) * math.prod(max(count, 1) for count in counts)


def _padded(given: Given) -> int:
    pads = _sizes(given["pad"] if "pad" in given else given["padding"])
    shape = list(next(_tensors(given.values())))
    for place, (before, after) in enumerate(zip(pads[::2], pads[1::2], strict=True), start=1):
        shape[-place] = max(shape[-place] + before + after, 0)
    return math.prod(shape)


def _upsampled(given: Given) -> int:
    shape = next(_tensors(given.values()))
    if given.get("output_size") is not None:
        sides = _sizes(given["output_size"])
    else:
        sides = [math.ceil(side * factor) for side, factor in zip(shape[2:], given["scale_factors"], strict=True)]
    return math.prod(shape[:2]) * math.prod(sides)


def _pooled_to(given: Given, dims: int) -> int:
    return math.prod(next(_tensors(given.values()))[:-dims]) * math.prod(_spread(given["output_size"], dims))


def _pooled(given: Given) -> int:
    return math.prod(side + 1 for side in next(_tensors(given.values())))


def _convolved(given: Given) -> int:
    """The result; and the columns of one item, which some kernels make at once, where they are very many."""
    image, weight = given["input"], given["weight"]
    dims = len(weight) - 2
    stride, padding, dilation = (_spread(given[name], dims) for name in ("stride", "padding", "dilation"))
    sides = image[-dims:]
    if given["padding"] == "same":
        out = math.prod(sides)
    else:
        out = math.prod(max(side + 2 * pad, 0) // step + 1 for side, pad, step in zip(sides, padding, stride, strict=True))
    if given.get("transposed") or ("output_padding" in given and "transposed" not in given):
        return _convolved_back(given, image, weight, dims, stride, dilation)
    items = image[0] if len(image) == len(weight) else 1
    columns = math.prod(weight[1:]) * int(given["groups"]) * out
    return _with_columns(columns, image.elements, items * weight[0] * out, items)


def _convolved_back(
    given: Given, image: Shape, weight: Shape, dims: int, stride: Sequence[int], dilation: Sequence[int]
) -> int:  # transposed
    more = _spread(given["output_padding"], dims)
    out = math.prod(
        max((side - 1) * step + gap * (kernel - 1) + extra + 1, 0)
        for side, step, gap, kernel, extra in zip(image[-dims:], stride, dilation, weight[2:], more, strict=True)
    )
    items = image[0] if len(image) == len(weight) else 1
    columns = math.prod(weight[1:]) * math.prod(image[-dims:])
    return _with_columns(columns, image.elements, items * weight[1] * int(given["groups"]) * out, items)


def _with_columns(columns: int, taken: int, made: int, items: int) -> int:
    return max(made, columns) if columns * max(items, 1) > MANY_COLUMNS * (taken + made) else made


def _spread(value: Any, dims: int) -> list[int]:
    if isinstance(value, str):
        return [0] * dims
    sizes = _sizes(value)
    return sizes * dims if len(sizes) == 1 else sizes


def _multiplied(given: Given) -> int:
    one, other = list(_tensors(given.values()))[-2:]
    left, right = (1, *one) if len(one) == 1 else one, (*other, 1) if len(other) == 1 else other
    return max(_broadcast([left[:-2], right[:-2]]) * left[-2] * right[-1], one.elements, other.elements)


def _linear(given: Given) -> int:
    image, weight = given["input"], given["weight"]
    return int(math.prod(image[:-1]) * (weight[0] if len(weight) == 2 else 1))


def _outer(given: Given) -> int:
    return math.prod(shape.elements for shape in _tensors(given.values()))


def _bilinear(given: Given) -> int:
    return int(math.prod(given["input1"][:-1]) * given["weight"][0] * max(given["weight"][1:]))


def _einsum(given: Given) -> int:
    """The result of two; of more also all that may come between."""
    equation, shapes = given["equation"].replace(" ", ""), given["tensors"]
    terms, _, result = equation.partition("->")
    sizes: dict[str, int] = {}
    for term, shape in zip(terms.split(","), shapes, strict=True):
        for label, side in zip(_labels(term, len(shape)), shape, strict=True):
            sizes[label] = max(side, sizes.get(label, 1))
    if "->" not in equation or len(shapes) > 2:
        return math.prod(sizes.values())
    dots = sum(label.startswith(".") for label in sizes)
    return math.prod(sizes[label] for label in _labels(result, len(result.replace("...", "")) + (dots if "..." in result else 0)))


def _labels(term: str, rank: int) -> list[str]:
    before, dots, after = term.partition("...")
    count = rank - len(before) - len(after) if dots else 0
    return [*before, *(f".{place}" for place in range(count, 0, -1)), *after]


def _attended(given: Given) -> int:
    """The scores, which some kernels keep."""
    query, key = given["query"], given["key"]
    _require(min(len(query), len(key), len(given["value"])) >= 2, "keys")
    return int(max(math.prod(query[:-1]) * key[-2], query.elements, _broadcast([query[:-1], key[:-1]]) * given["value"][-1]))


def _attended_at_once(given: Given) -> int:
    """By a kernel without a check of its own."""
    query, key, value = given["query"], given["key"], given["value"]
    fits = len(query) == 4 and key == value and (query[:2], query[3]) == (key[:2], key[3])
    _require(fits and (given.get("attn_mask") is None or _is_mask(given["attn_mask"], query, key)), "keys")
    return _attended(given)


def _is_mask(mask: Any, query: Shape, key: Shape) -> bool:
    return isinstance(mask, Shape) and 2 <= len(mask) <= 4 and mask[-2:] == (query[2], key[2])


def _embedded(given: Given) -> int:
    return int(given["indices"].elements * given["weight"][1])


def _indexed(given: Given) -> int:
    shape, indices = given["self"], given["indices"]
    chosen = [index for index in indices if index is not None]
    kept = [side for place, side in enumerate(shape) if place >= len(indices) or indices[place] is None]
    return int(_broadcast(chosen) * math.prod(kept))


def _selected(given: Given) -> int:
    shape, dim = given["self"], given["dim"]
    return int(shape.elements // max(shape[dim] if shape else 1, 1) * given["index"].elements)


def _recurrent(given: Given, gates: int) -> int:
    """All gates of all steps in both directions. Kernels write outside of their memory if shapes do not agree: nobody else checks them.

    Where an LSTM's hidden state is of another width than its cell state, it is projected to that, with one more weight."""
    steps, directions = given["input"], 2 if given["bidirectional"] else 1
    states = given["hx"] if isinstance(given["hx"], list) else [given["hx"]]
    out, hidden, batch = states[0][2], states[-1][2], steps[0 if given["batch_first"] else 1]
    ends = [(given["num_layers"] * directions, batch, width) for width in (out, hidden)]
    _require(len(steps) == 3 and states == (ends if gates == LSTM_GATES else ends[:1]), "states")
    parts = [(gates * hidden,)] * (2 * bool(given["has_biases"])) + [(out, hidden)] * (out != hidden)
    expected: list[tuple[int, ...]] = []
    for layer in range(given["num_layers"]):
        width = out * directions if layer else steps[2]
        expected += [(gates * hidden, width), (gates * hidden, out), *parts] * directions
        _require(len(expected) <= len(given["params"]), "weights")
    _require([tuple(shape) for shape in given["params"]] == expected, "weights")
    return int(math.prod(steps[:2]) * max(gates * hidden, out, steps[2]) * 2)


def _require(is_so: bool, what: str) -> None:
    if not is_so:
        raise ValueError(f"the {what} do not fit the input")


def _normalized(given: Given) -> int:
    """By kernels without a check of their own."""
    image = given["input"]
    channels = given["C"] if "C" in given else image[1]
    if "C" in given:
        _require(given["N"] * channels * given["HxW"] == image.elements and channels == image[1], "sizes")
    parts = [given[name] for name in ("weight", "bias", "running_mean", "running_var") if given.get(name) is not None]
    _require(all(part == (channels,) for part in parts), "weights")
    return int(image.elements)


def _parted(given: Given) -> int:
    """The parts share the memory of the whole; but each is an object."""
    shape = given["self"]
    side = shape[given["dim"]]
    if "split_size" in given and isinstance(given["split_size"], int):
        parts = -(-side // given["split_size"]) if given["split_size"] else 1
    else:
        parts = next((given[name] for name in ("chunks", "sections") if name in given), side)
    return int(max(shape.elements, abs(int(parts)) * OBJECT_ELEMENTS))


_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_PRODUCTS = ("matmul", "mm", "bmm", "addmm", "baddbmm")
_KEEP_DTYPE = frozenset((*_CONVOLUTIONS, *_PRODUCTS, "linear"))

# By the name of the operator without its overload.
_RULES: dict[str, Callable[[Given], int]] = {
    **dict.fromkeys(("zeros", "ones", "full", "new_zeros", "new_ones", "new_full"), _created),
    "eye": lambda given: given["n"] * given.get("m", given["n"]),
    "arange": _stepped,
    "linspace": lambda given: given["steps"],
    "one_hot": _one_hot,
    **dict.fromkeys(("repeat", "tile", "repeat_interleave"), _repeated),
    **dict.fromkeys(
        ("constant_pad_nd", "pad", "reflection_pad1d", "reflection_pad2d", "replication_pad2d"), _padded
    ),
    **dict.fromkeys(("upsample_bicubic2d", "upsample_bilinear2d", "upsample_nearest2d"), _upsampled),
    "adaptive_avg_pool1d": partial(_pooled_to, dims=1),
    **dict.fromkeys(("adaptive_avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d"), partial(_pooled_to, dims=2)),
    **dict.fromkeys(
        ("avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d", "max_pool2d_with_indices", "max_pool3d"), _pooled
    ),
    **dict.fromkeys(_CONVOLUTIONS, _convolved),
    **dict.fromkeys(_PRODUCTS, _multiplied),
    "linear": _linear,
    "outer": _outer,
    "bilinear": _bilinear,
    "einsum": _einsum,
    "scaled_dot_product_attention": _attended,
    "_scaled_dot_product_flash_attention_for_cpu": _attended_at_once,
    **dict.fromkeys(("native_group_norm", "_native_batch_norm_legit_no_training"), _normalized),
    "embedding": _embedded,
    "index": _indexed,
    "index_select": _selected,
    "gather": lambda given: given["index"].elements,
    "lstm": partial(_recurrent, gates=LSTM_GATES),
    "gru": partial(_recurrent, gates=3),
    **dict.fromkeys(("rnn_tanh", "rnn_relu"), partial(_recurrent, gates=1)),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split", "unbind"), _parted),
    "prelu": _first,
    "cosine_similarity": lambda given: _broadcast(list(_tensors(given.values()))),
}  # fmt: skip


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB" if size < 2**80 else "endless memory"
