"""From a `torch.export` graph to a `Graph`: the same operators in the same order, as data.

The exported graph is taken as it is, because it holds the very operators that eager torch runs; rewriting it with
torch's decompositions takes longer than the export and replaces some of them. Three things are changed:

- An operator that writes into its argument (`relu_`) becomes the one that does not (`relu`). A stage could otherwise
  overwrite the activation that it was given and that a retry needs. Who reads the old tensor through another name
  (a view taken before) would no longer see the change: then `NeedsDecomposition` is raised and torch has to do it.
- What does nothing in inference goes: dropout in eval mode, aliases, assertions, operators without users.
- `x.new_zeros(...)` and the like depend on `x` only by name: with a fixed shape they become constants, which every
  stage can compute for itself.
"""

from __future__ import annotations

import difflib
import operator
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.export import ExportedProgram as TorchProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from adapt.errors import ExportError
from adapt.models.compaction import compact
from adapt.models.layouts import memory_order
from adapt.models.operators import DTYPES, IMPURE_IN_TRAINING, OPERATORS, TRAINING_FLAGS
from adapt.models.program import (
    Affine,
    Argument,
    Operator,
    Size,
    SizeSpec,
    Symbol,
    TensorSpec,
    ValueRef,
    ValueSpec,
    WeightRef,
    operator_references,
)
from adapt.models.structure import KINDS, Constant, Leaf, Node, Structure, is_field_name

_ASSERTIONS = {
    "aten._assert_async.default", "aten._assert_async.msg", "aten._assert_scalar.default", "aten._assert_tensor_metadata.default",
    "aten.sym_constrain_range.default", "aten.sym_constrain_range_for_size.default",
}  # fmt: skip
_ALIASES = {
    "aten.alias.default",
    "aten.detach.default",
    "aten.detach_.default",
    "aten.lift_fresh.default",
    "aten.lift_fresh_copy.default",
}
_DROPOUTS = {
    f"aten.{name}{suffix}.default"
    for name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
    for suffix in ("", "_")
}  # (x, p, train)
_NUMBERS = {"aten.item.default", "aten._local_scalar_dense.default"}
_CREATIONS = {
    "aten.new_zeros.default": "aten.zeros.default",
    "aten.new_ones.default": "aten.ones.default",
    "aten.new_full.default": "aten.full.default",
}
_FUNCTIONAL = {"aten.zero_.default": "aten.zeros_like.default"}  # where it is not the name without the underscore
# Composite operators promise nothing about aliasing (`reshape` may return its argument); of these it is known that they do not.
_FRESH_COMPOSITES = {
    "aten.conv1d.default", "aten.conv2d.default", "aten.conv2d.padding", "aten.conv3d.default", "aten.batch_norm.default",
    "aten.linear.default", "aten.matmul.default", "aten.max_pool2d.default", "aten.adaptive_avg_pool2d.default",
    "aten.layer_norm.default", "aten.group_norm.default", "aten.softmax.int", "aten.scaled_dot_product_attention.default",
    "aten.adaptive_avg_pool1d.default", "aten.max_pool1d.default", "aten.avg_pool1d.default", "aten.log_softmax.int",
}  # fmt: skip


class NeedsDecomposition(Exception):
    """The graph writes into a tensor that is still read under another name."""


@dataclass(slots=True)
class ConvertedWeight:
    """A tensor of the model; `key` is its name there. Stored permuted by `order` if not None."""

    key: str
    tensor: torch.Tensor
    order: tuple[int, ...] | None


@dataclass(slots=True)
class Converted:
    """The parts of a graph, its weights still in the model's own memory."""

    operators: list[Operator] = field(default_factory=list)
    values: list[ValueSpec] = field(default_factory=list)
    weights: list[ConvertedWeight] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    input_structure: Structure = Leaf()
    output_structure: Structure = Leaf()


def convert(exported: TorchProgram, trained: Collection[str] = ()) -> Converted:
    """Convert an exported program.

    Args:
        exported: what torch.export made; its graph is changed (regions are inlined).
        trained: names of the weights that require a gradient in the module, which `exported` has forgotten.

    Raises:
        NeedsDecomposition: see there; `exported.run_decompositions({})` has a chance.
        ExportError: an operator is not supported, or the model is not a pure function of its inputs.
    """
    return _Converter(exported, trained).convert()


class _Converter:
    def __init__(self, exported: TorchProgram, trained: Collection[str]) -> None:
        self._exported, self._trained = exported, trained
        _inline_regions(exported.graph_module)
        self._result = Converted()
        self._argument_of: dict[torch.fx.Node, Any] = {}
        self._storage: dict[torch.fx.Node, set[torch.fx.Node]] = {}  # nodes that may share memory
        self._frozen: set[torch.fx.Node] = set()  # weights: never written to
        self._weight_names: dict[torch.fx.Node, str] = {}
        self._weight_index: dict[tuple[Any, ...], int] = {}
        nodes = list(exported.graph.nodes)
        self._last_use = {source: position for position, node in enumerate(nodes) for source in node.all_input_nodes}

    def convert(self) -> Converted:
        self._enter()
        for position, node in enumerate(self._exported.graph.nodes):
            if node.op == "call_function":
                self._call(node, position)
            elif node.op == "output":
                self._finish(node)
        return _compacted(self._result)

    # -- inputs and outputs --

    def _enter(self) -> None:
        """Define inputs, and remember which placeholders are weights."""
        placeholders = [node for node in self._exported.graph.nodes if node.op == "placeholder"]
        arguments: list[Structure] = []
        for node, spec in zip(placeholders, self._exported.graph_signature.input_specs, strict=True):
            self._storage[node] = {node}
            if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
                self._weight_names[node] = str(spec.target)
                self._frozen.add(node)
            elif spec.kind != InputKind.USER_INPUT:
                raise ExportError(f"the model holds an object that is not a tensor ({spec.target}); ADAPT moves tensors only")
            elif isinstance(spec.arg, ConstantArgument):
                self._argument_of[node] = spec.arg.value
                arguments.append(_constant(spec.arg.value))
            else:
                self._argument_of[node] = value = self._define(node.meta["val"], node)
                self._result.inputs.append(value.index)
                arguments.append(Leaf())
        in_spec = self._exported.call_spec.in_spec
        self._result.input_structure = _structure(in_spec, iter(arguments))

    def _finish(self, node: torch.fx.Node) -> None:
        leaves: list[Structure] = []
        for spec, value in zip(self._exported.graph_signature.output_specs, node.args[0], strict=True):  # type: ignore[arg-type]
            if spec.kind == OutputKind.USER_INPUT_MUTATION:
                continue  # the caller's tensor is not ours to change
            if spec.kind != OutputKind.USER_OUTPUT:
                raise ExportError(
                    f"the model writes to its own {spec.target}, but a stage must give the same answer however often it runs; "
                    "return the state as an output and take it as an input"
                )
            argument = self._argument(value, node)
            if isinstance(argument, WeightRef):
                argument = self._emit("aten.clone.default", (argument,), {}, value)
            if isinstance(argument, ValueRef):
                self._result.outputs.append(argument.index)
                leaves.append(Leaf())
            else:
                leaves.append(_constant(argument))
        self._result.output_structure = _structure(self._exported.call_spec.out_spec, iter(leaves))

    # -- operators --

    def _call(self, node: torch.fx.Node, position: int) -> None:
        name = _name_of(node)
        if name == "operator.getitem":
            source, index = node.args
            self._argument_of[node] = self._argument_of[source][index]  # type: ignore[index]
            self._share(node, node.all_input_nodes)
            return
        if name in _ASSERTIONS:
            return
        value = node.meta.get("val")
        if isinstance(value, (bool, int, float, torch.SymInt, torch.SymFloat, torch.SymBool)):
            self._call_on_sizes(node, name, value)
            return
        if name in _ALIASES or (name in _DROPOUTS and not _is_training(node)):
            self._argument_of[node] = self._argument(node.args[0], node)
            self._share(node, node.all_input_nodes[:1])
            return
        self._call_on_tensors(node, name, position)

    def _call_on_sizes(self, node: torch.fx.Node, name: str, value: Any) -> None:
        if isinstance(value, (torch.SymFloat, torch.SymBool)):
            self._argument_of[node] = _Unusable(name)  # guards; an error only if somebody uses it
            return
        size = size_of(value) if isinstance(value, torch.SymInt) else value
        if not isinstance(size, Affine):
            self._argument_of[node] = size
            return
        self._check_supported(node, name)
        self._argument_of[node] = self._emit(name, self._arguments(node), {}, node)

    def _call_on_tensors(self, node: torch.fx.Node, name: str, position: int) -> None:
        if not name.startswith(("aten.", "operator.")):
            self._check_supported(node, name)  # now: its arguments may be graphs
        kwargs = {key: self._argument(argument, node) for key, argument in node.kwargs.items()}
        args = self._arguments(node)
        mutated = _mutated(node)
        if mutated is not None:
            self._check_unread(mutated, node, position)
            name = _FUNCTIONAL.get(name) or name.replace("_.", ".", 1)
            if name == "aten.zeros_like.default":
                kwargs = {}
        elif name in _CREATIONS and not references_values(args[1:]):
            name, args = _CREATIONS[name], args[1:]
            kwargs = {"dtype": Symbol("dtype", _dtype_name(node.meta["val"].dtype)), "device": Symbol("device")}
        self._check_supported(node, name)
        self._argument_of[node] = self._emit(name, args, kwargs, node)
        if mutated is not None:
            for other in self._storage[mutated]:
                if self._argument_of.get(other) == self._argument_of[mutated]:
                    self._argument_of[other] = self._argument_of[node]
            self._share(node, [mutated])
        else:
            self._share(node, [] if _is_fresh(node, name) else node.all_input_nodes)

    def _check_unread(self, mutated: torch.fx.Node, node: torch.fx.Node, position: int) -> None:
        """Refuse a write that somebody could see who reads the same memory under another name."""
        others = [other for other in node.all_input_nodes if other is not mutated and isinstance(other.meta.get("val"), torch.Tensor)]
        target = mutated.meta["val"]
        if any(other.meta["val"].dtype != target.dtype for other in others):
            raise NeedsDecomposition(f"{node}: the result would be promoted to another dtype")
        for alias in self._storage[mutated]:
            if alias in self._frozen:
                raise NeedsDecomposition(f"{node}: writes to the weight {self._weight_names[alias]}")
            same = self._argument_of.get(alias) == self._argument_of[mutated]
            if self._last_use.get(alias, -1) > position and not same:
                raise NeedsDecomposition(f"{node}: {alias} is still read")

    def _check_supported(self, node: torch.fx.Node, name: str) -> None:
        if name in OPERATORS and not (name in IMPURE_IN_TRAINING and _is_training(node)):
            return
        if name.startswith("higher_order") or not name.startswith("aten."):
            advice = "ADAPT runs plain operators only; replace control flow by torch.where and custom operators by those of torch"
        elif name in OPERATORS or name in _DROPOUTS:
            advice = "in training mode it writes to its statistics or draws random numbers; pass `training=self.training`"
            advice += ", and call eval() before it is exported"
        elif torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            advice = "it draws random numbers, also in eval mode; leave it out when `self.training` is false"
        else:
            known = {other.split(".")[1]: other for other in OPERATORS}
            close = [known[word] for word in difflib.get_close_matches(name.split(".")[1], known, n=3, cutoff=0.7)]
            advice = "compute the same with supported operators" + (f", say {' or '.join(close)}" if close else "")
            advice += ", or do this step outside of the model"
        raise ExportError(f"operator {name}, used in {_where(node)}, is not supported: {advice}")

    def _emit(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], node: torch.fx.Node) -> Any:
        """Append an operator; return the reference to its result, or the tuple of them."""
        value = node.meta["val"]
        unpacks = isinstance(value, (list, tuple))
        results = tuple(None if item is None else self._define(item, node) for item in (value if unpacks else [value]))
        outputs = tuple(None if result is None else result.index for result in results)
        self._result.operators.append(Operator(name, args, kwargs, outputs, unpacks, _module_path(node)))
        return results if unpacks else results[0]

    def _define(self, value: Any, node: torch.fx.Node) -> ValueRef:
        self._result.values.append(_spec(value, node))
        return ValueRef(len(self._result.values) - 1)

    # -- arguments --

    def _arguments(self, node: torch.fx.Node) -> tuple[Argument, ...]:
        return tuple(self._argument(argument, node) for argument in node.args)

    def _argument(self, argument: Any, node: torch.fx.Node) -> Any:
        match argument:
            case torch.fx.Node():
                if argument in self._weight_names and argument not in self._argument_of:
                    self._argument_of[argument] = self._weight(argument)
                found = self._argument_of[argument]
                if isinstance(found, _Unusable) and found.name in _NUMBERS:
                    raise ExportError(
                        f"operator {found.name}, used in {_where(node)}, is not supported: it makes a plain number of a tensor, "
                        "which depends on the input; keep it a tensor"
                    )
                if isinstance(found, _Unusable):
                    raise ExportError(f"{_where(node)} computes with {found.name} of the batch size, which is not an int")
                return found
            case None | bool() | int() | float() | str():
                return argument
            case list() | tuple():
                return tuple(self._argument(item, node) for item in argument)
            case torch.dtype():
                return Symbol("dtype", _dtype_name(argument))
            case torch.memory_format() | torch.layout():
                kind = "layout" if isinstance(argument, torch.layout) else "memory_format"
                return Symbol(kind, str(argument).removeprefix("torch."))
            case torch.device():
                return Symbol("device")
        raise ExportError(f"{_where(node)}: an argument of type {type(argument).__name__} is not supported")

    def _weight(self, node: torch.fx.Node) -> WeightRef:
        """The weight behind a placeholder; tied weights are stored once."""
        name = self._weight_names[node]
        source = self._exported.state_dict if name in self._exported.state_dict else self._exported.constants
        tensor = source[name].detach().requires_grad_(name in self._trained)
        _dtype_name(tensor.dtype)
        memory = tensor.untyped_storage().data_ptr() or id(source[name])
        key = (memory, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad)
        if key not in self._weight_index:
            self._weight_index[key] = len(self._result.weights)
            order = memory_order(tensor)
            is_plain = order is None or order == tuple(range(tensor.dim()))
            self._result.weights.append(ConvertedWeight(name, tensor, None if is_plain else order))
        return WeightRef(self._weight_index[key])

    def _share(self, node: torch.fx.Node, sources: Iterable[torch.fx.Node]) -> None:
        """Note that `node` may share memory with `sources`, and with whatever they share it with."""
        shared = {node}
        for source in sources:
            shared |= self._storage.get(source, set())
        for member in shared:
            self._storage[member] = shared


def _inline_regions(module: torch.fx.GraphModule) -> None:
    """Put the bodies of `with torch.no_grad()` and of switched-off autocast, which export keeps apart, in their place."""
    for node in list(module.graph.nodes):
        if node.op != "call_function" or not _is_neutral_region(node):
            continue
        body = next(argument for argument in node.args if isinstance(argument, torch.fx.Node) and argument.op == "get_attr")
        inner = getattr(module, str(body.target))
        _inline_regions(inner)
        outer = node.args[node.args.index(body) + 1 :]
        placeholders = [part for part in inner.graph.nodes if part.op == "placeholder"]
        with module.graph.inserting_before(node):
            results = module.graph.graph_copy(inner.graph, dict(zip(placeholders, outer, strict=True)))
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]  # always a getitem
            module.graph.erase_node(user)
        module.graph.erase_node(node)
    module.recompile()  # torch may be asked to decompose it yet


def _is_neutral_region(node: torch.fx.Node) -> bool:
    name = getattr(node.target, "__name__", "")
    if name == "wrap_with_autocast":  # (device type, dtype, enabled, cache enabled, body, ...)
        return node.args[2] is False
    return name == "wrap_with_set_grad_enabled"


@dataclass(frozen=True, slots=True)
class _Unusable:
    """A bool or float computed from the batch size."""

    name: str


def size_of(value: int | torch.SymInt) -> Size:
    """The size as an int or as a multiple of the batch plus a constant.

    Raises:
        NotAffine: it depends on the batch in another way.
    """
    if isinstance(value, int):
        return value
    expression = value.node.expr
    symbols = sorted(expression.free_symbols, key=str)
    if not symbols:
        return int(expression)
    scale = expression.coeff(symbols[0], 1)
    offset = expression - scale * symbols[0]
    if len(symbols) > 1 or not scale.is_Integer or not (offset := offset.expand()).is_Integer:
        raise NotAffine(f"a size is {expression}")
    return Affine(int(scale), int(offset))


class NotAffine(Exception):
    """A size is not a multiple of the batch plus a constant: the model can run with fixed shapes only."""


def references_values(arguments: tuple[Argument, ...]) -> bool:
    return any(isinstance(reference, ValueRef) for reference in operator_references(Operator("", arguments, {}, ())))


def _spec(value: Any, node: torch.fx.Node) -> ValueSpec:
    if free_unbacked_symbols(value):
        raise ExportError(
            f"operator {_name_of(node)}, used in {_where(node)}, is not supported here: the size of its result depends on the values "
            "of its input; use torch.where, or do this step outside of the model"
        )
    if isinstance(value, torch.Tensor):
        # The layout is filled in when the operators have run: what export believes of it is not always true.
        return TensorSpec(_dtype_name(value.dtype), tuple(size_of(size) for size in value.shape), None)
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return SizeSpec(size_of(value))
    raise ExportError(f"{_where(node)} gives a {type(value).__name__}; ADAPT moves tensors and ints")


def _dtype_name(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ExportError(f"the model uses tensors of {name}; supported are {', '.join(DTYPES)}")
    return name


def _name_of(node: torch.fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    name = getattr(target, "__name__", str(target))
    return f"operator.{name}" if getattr(operator, name, None) is target else name


def _is_training(node: torch.fx.Node) -> bool:
    """Whether the flag of that name is set; in a norm it does no harm while there are no running statistics."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    names = [argument.name for argument in node.target._schema.arguments]
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    if "running_mean" in names and given.get("running_mean") is None:
        return False
    return any(bool(given.get(flag, False)) for flag in TRAINING_FLAGS)


def _mutated(node: torch.fx.Node) -> torch.fx.Node | None:
    """The tensor that the operator writes to; ExportError if it is not simply its first argument."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return None
    written = [argument.alias_info is not None and argument.alias_info.is_write for argument in target._schema.arguments]
    if written[0] and sum(written) == 1 and isinstance(node.args[0], torch.fx.Node) and target._schema.name.endswith("_"):
        return node.args[0]
    raise NeedsDecomposition(f"{node}: {target} writes to an argument that is not the first")


def _is_fresh(node: torch.fx.Node, name: str) -> bool:
    """Whether the result certainly is memory of its own."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or any(result.alias_info is not None for result in target._schema.returns):
        return False
    schema_name = target._schema.name + (f".{target._schema.overload_name}" if target._schema.overload_name else "")
    return name in _FRESH_COMPOSITES or not torch._C._dispatch_has_kernel_for_dispatch_key(schema_name, "CompositeImplicitAutograd")


def _module_path(node: torch.fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0])[:200] if stack else ""


def _where(node: torch.fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return "the model"
    path, kind = stack[-1]
    kind = kind if isinstance(kind, str) else kind.__name__
    return f"{path or 'the model itself'} ({kind.rpartition('.')[2]})"


def _constant(value: Any) -> Constant:
    if value is not None and not isinstance(value, (bool, int, float, str)):
        raise ExportError(f"an input or output of type {type(value).__name__} is not supported; use tensors and plain values")
    return Constant(value)


def _structure(spec: Any, leaves: Iterator[Structure]) -> Structure:
    """Torch's description of a nesting as ours."""
    if spec.is_leaf():
        return next(leaves)
    kind, context = spec.type, spec.context
    items = tuple(_structure(child, leaves) for child in spec.children())
    if kind in (tuple, list):
        return Node(kind.__name__, items)
    if isinstance(kind, type) and issubclass(kind, dict) and isinstance(context, list):
        keys = tuple(context)
        if not all(type(key) in (str, int) for key in keys):
            raise ExportError(f"a dict with keys {list(keys)[:5]} is not supported; use texts or ints")
        name = kind.__name__.lower()
        return Node(name if name in KINDS else "dict", items, keys)
    fields = getattr(context, "_fields", getattr(kind, "_fields", None))
    if fields is not None:
        name = getattr(context, "__name__", kind.__name__)
        if all(is_field_name(name) for name in (name, *fields)):
            return Node("namedtuple", items, tuple(fields), name)
        return Node("tuple", items)
    raise ExportError(f"an input or output of type {getattr(kind, '__name__', kind)} is not supported; use tuples, lists and dicts")


def _compacted(result: Converted) -> Converted:
    """Without operators, values and weights that no output depends on."""
    left = compact(result.operators, result.inputs, result.outputs)
    return Converted(
        operators=left.operators,
        values=[result.values[old] for old in left.values],
        weights=[result.weights[old] for old in left.weights],
        inputs=list(left.inputs),
        outputs=list(left.outputs),
        input_structure=result.input_structure,
        output_structure=result.output_structure,
    )
