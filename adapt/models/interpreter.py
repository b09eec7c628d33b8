"""Runs a stage: from a file to a callable, without generating code.

Loading maps the file and turns each operator into a `_Step`: the function, a template of its arguments, and which
slots to fill in. Slots hold weights, inputs and results; a slot is emptied after its last use. Weights stay in the
mapped file (on the CPU), so their memory is clean pages that the kernel may drop and read again.

The same bits as the user's own module: the operators are those that eager torch runs, in its order, on tensors of
the same layout; weights and inputs have the alignment of torch's allocations, and weights even their `requires_grad`,
which kernels look at; nothing is folded or fused.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, Self

import torch

from adapt.errors import ModelError, WireError
from adapt.models.forms import FITTED_LIMIT, InputCheck, batch_size_of, dtype_name
from adapt.models.needs import check_call, check_graph, memory_limit_bytes
from adapt.models.operators import DTYPES, LAYOUTS, MEMORY_FORMATS, OPERATORS
from adapt.models.program import (
    Argument,
    Graph,
    Operator,
    SizeSpec,
    Symbol,
    ValueRef,
    ValueSpec,
    Weight,
    WeightRef,
    operator_references,
    read_graph,
    references,
    size_at,
)
from adapt.models.tensorfile import ALIGNMENT_BYTES

Leaf = torch.Tensor | int
_Signature = tuple[Any, ...]  # shapes and ints of a run's inputs


@dataclass(slots=True)
class _Step:
    """One call. `slots_of` fills places of `args` from slots, `lists_of` fills places with lists, `named_*` those of kwargs."""

    call: Callable[..., Any]
    operator: Operator
    args: list[Any]
    slots_of: list[tuple[int, int]] = field(default_factory=list)
    lists_of: list[tuple[int, Callable[[list[Any]], Any]]] = field(default_factory=list)
    kwargs: dict[str, Any] = field(default_factory=dict)
    named: list[tuple[str, Callable[[list[Any]], Any]]] = field(default_factory=list)
    output: int = -1  # slot of the result; -1: see `items`
    items: list[tuple[int, int]] = field(default_factory=list)  # (place in the result, slot)
    emptied: list[int] = field(default_factory=list)  # slots that nobody needs after this step


class Stage:
    """A loaded stage: safe to run on several threads at once, as nothing in it changes.

    Attributes:
        digest: SHA-256 of its file.
        inputs, outputs: dtype and shape of each input and output.
        weight_bytes: size of its weights; on the CPU they stay in the mapped file.
    """

    def __init__(
        self, graph: Graph, weights: Sequence[torch.Tensor], device: torch.device, digest: str, *, limit_bytes: int | None = None
    ) -> None:
        self.digest, self.device = digest, device
        self.inputs: tuple[ValueSpec, ...] = graph.input_specs
        self.outputs: tuple[ValueSpec, ...] = graph.output_specs
        self.weight_bytes = graph.weight_bytes
        self._first_slot = len(weights)
        self._initial: list[Any] = [*weights, *[None] * len(graph.values)]
        self._input_slots = [self._first_slot + index for index in graph.inputs]
        self._output_slots = [self._first_slot + index for index in graph.outputs]
        self._check_inputs = InputCheck(self.inputs)
        self._steps = _compile(graph, self._first_slot, device)
        self._values, self._limit_bytes = graph.values, limit_bytes or memory_limit_bytes()
        check_graph(graph, self._limit_bytes)
        self._known: set[_Signature] = set()  # shapes of inputs for which every operator has been watched

    @classmethod
    def load(cls, path: Path | str, *, device: torch.device | str = "cpu", verify: bool = True, limit_bytes: int | None = None) -> Self:
        """Load a stage, or a whole program as its only stage.

        Args:
            path: the file.
            device: where to run; weights are copied there unless it is the CPU.
            verify: hash the file first; leave out only for a file whose digest has just been checked.
            limit_bytes: the most that one value may take; by default half of this machine's memory.

        Raises:
            WireError: the file is malformed, has another digest than its name, names an operator that is not allowed, or asks for more than
                `limit_bytes`. Nothing of it has run then.
            OSError: the file cannot be read.
        """
        file = read_graph(path, verify=verify)
        return cls.of(file.graph, file.path, device=device, digest=file.digest, limit_bytes=limit_bytes)

    @classmethod
    def of(cls, graph: Graph, path: Path, *, device: torch.device | str, digest: str, limit_bytes: int | None = None) -> Self:
        """A stage whose weights lie in the file at `path`, which may hold others besides. Raises as `load`."""
        device = torch.device(device)
        return cls(graph, load_weights(path, graph.weights, device), device, digest, limit_bytes=limit_bytes)

    def run(self, inputs: Sequence[Leaf], *, observe: Callable[[int, Any], None] | None = None) -> list[Leaf]:
        """Run the stage once. The inputs are never written to.

        Args:
            inputs: as `self.inputs` says: tensors (moved to the stage's device if need be) and ints.
            observe: called after each operator with its position and its result; the profiler's eye.

        Returns:
            As `self.outputs` says: contiguous tensors on the CPU, and ints. An output may share memory with an input.

        Raises:
            InputMismatchError: number, dtype or shape of the inputs do not fit.
            ModelError: an operator raised; the message names it and its place in the model. Or it would take more than the limit, or gives
                another shape than the file claims.
        """
        self._check_inputs(inputs)
        signature = _signature(inputs)
        watch = self._watch(inputs, signature)
        with nullcontext() if torch.is_inference_mode_enabled() else torch.inference_mode():  # to enter it again takes 2 us
            slots = self._filled(inputs)
            del inputs  # so that an input can be freed after its last use, if the caller lets go of it too
            self._run_steps(slots, observe, watch)
            self._was_watched(watch, signature)
            return [self._delivered(slots[slot]) for slot in self._output_slots]

    def __len__(self) -> int:
        """How many operators it runs."""
        return len(self._steps)

    def begin(self, inputs: Sequence[Leaf]) -> PausedRun:
        """A run that pauses before every operator; it keeps the inputs. Call all of it under `torch.inference_mode`.

        Raises:
            InputMismatchError: as `run`.
        """
        self._check_inputs(inputs)
        signature = _signature(inputs)
        return PausedRun(self._filled(inputs), signature, self._watch(inputs, signature))

    def step(self, run: PausedRun, position: int) -> None:
        """Run the operator of that position, after all before it. Raises ModelError."""
        self._run_step(position, run.slots, None, run.watch)

    def value(self, run: PausedRun, number: int) -> Leaf | None:
        """A value of the graph, on the stage's device, for looking at only. None: it is not there yet, or not needed any more."""
        found: Leaf | None = run.slots[self._first_slot + number]
        return found

    def finish(self, run: PausedRun) -> list[Leaf]:
        """The outputs, after the last step, as `run` returns them."""
        self._was_watched(run.watch, run.signature)
        return [self._delivered(run.slots[slot]) for slot in self._output_slots]

    def _watch(self, inputs: Sequence[Leaf], signature: _Signature) -> _Watch | None:
        return None if signature in self._known else _Watch(self.inputs, self._values, inputs, self._limit_bytes)

    def _was_watched(self, watch: _Watch | None, signature: _Signature) -> None:
        """A run has come to its end."""
        if watch is not None and len(self._known) < FITTED_LIMIT:
            self._known.add(signature)

    def _filled(self, inputs: Sequence[Leaf]) -> list[Any]:
        slots = self._initial.copy()
        for slot, value in zip(self._input_slots, inputs, strict=True):
            slots[slot] = self._placed(value) if isinstance(value, torch.Tensor) else value
        return slots

    def _run_steps(self, slots: list[Any], observe: Callable[[int, Any], None] | None, watch: _Watch | None) -> None:
        for position in range(len(self._steps)):
            self._run_step(position, slots, observe, watch)

    def _run_step(self, position: int, slots: list[Any], observe: Callable[[int, Any], None] | None, watch: _Watch | None) -> None:
        step = self._steps[position]
        args = step.args.copy()
        for place, slot in step.slots_of:
            args[place] = slots[slot]
        for place, make in step.lists_of:
            args[place] = make(slots)
        kwargs = step.kwargs
        if step.named:
            kwargs = kwargs | {name: make(slots) for name, make in step.named}
        if watch is not None:
            watch.look(position, step, args, kwargs)
        try:
            result = step.call(*args, **kwargs)
            if step.output >= 0:
                slots[step.output] = result
            for place, slot in step.items:
                slots[slot] = result[place]
        except Exception as error:  # the model's own
            raise _model_error(step.operator, error) from error
        if watch is not None:
            watch.made(position, step.operator, result)
        if observe is not None:
            observe(position, result)
        del args, result
        for slot in step.emptied:
            slots[slot] = None

    def _placed(self, tensor: torch.Tensor) -> torch.Tensor:
        """The input where and as eager torch would have it: contiguous, on the device, aligned like torch's own memory."""
        if tensor.requires_grad or tensor.device != self.device or not tensor.is_contiguous():
            tensor = tensor.detach().to(self.device).contiguous()
        return tensor.clone() if tensor.data_ptr() % ALIGNMENT_BYTES else tensor

    @staticmethod
    def _delivered(value: Leaf) -> Leaf:
        if not isinstance(value, torch.Tensor) or (value.is_contiguous() and value.is_cpu and not value.requires_grad):
            return value
        return value.detach().contiguous().cpu()


class _Watch:
    """Looks at every operator of one run: see `needs.py`. Of a batch of one, which may be a case of its own (`squeeze`), shapes may differ."""

    def __init__(self, specs: Sequence[ValueSpec], values: Sequence[ValueSpec], inputs: Sequence[Leaf], limit_bytes: int) -> None:
        self._values, self._limit_bytes = values, limit_bytes
        self._batch = batch_size_of(specs, inputs) or 0

    def look(self, position: int, step: _Step, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raises ModelError before an operator that would take too much."""
        try:
            check_call(step.call, step.operator.name, args, kwargs, self._limit_bytes)
        except WireError as error:
            raise ModelError(f"operators[{position}]: {error}") from None

    def made(self, position: int, operator: Operator, result: Any) -> None:
        """Raises ModelError unless it is what the file claims."""
        for index, item in zip(operator.outputs, result if operator.unpacks else [result], strict=False):
            spec = None if index is None else self._values[index]
            if spec is not None and not self._fits(spec, item):
                got = (
                    f"{dtype_name(item)} {tuple(item.shape)}"
                    if isinstance(item, torch.Tensor)
                    else f"{type(item).__name__} {str(item)[:40]}"
                )
                raise ModelError(f"operators[{position}]: {operator.name}: gives {got}, the file claims {spec}")

    def _fits(self, spec: ValueSpec, item: Any) -> bool:
        if isinstance(spec, SizeSpec):
            return type(item) is int and item == size_at(spec.size, self._batch)
        if not isinstance(item, torch.Tensor) or item.dtype != DTYPES[spec.dtype]:
            return False
        return self._batch == 1 or tuple(item.shape) == spec.shape_at(self._batch)


@dataclass(frozen=True, slots=True)
class PausedRun:
    """A run of a stage between two of its operators."""

    slots: list[Any]
    signature: _Signature
    watch: _Watch | None  # None: a run on inputs of these shapes has been watched before


def _signature(inputs: Sequence[Leaf]) -> _Signature:
    return tuple([leaf.shape if isinstance(leaf, torch.Tensor) else leaf for leaf in inputs])


def _model_error(operator: Operator, error: Exception) -> ModelError:
    where = f" in {operator.place}" if operator.place else ""
    return ModelError(f"{operator.name}{where}: {type(error).__name__}: {str(error)[:1000]}")


def load_weights(path: Path, weights: Sequence[Weight], device: torch.device) -> list[torch.Tensor]:
    """The weights that lie in a file, mapped on the CPU, copied to other devices."""
    if not weights:
        return []
    with open(path, "rb") as file:
        # A private mapping: torch wants writable memory, and were it ever written to, the file would not change.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    # Detached, because a view (of the mapping) does not hand `requires_grad` on to its own views as a parameter does.
    return [_weight(mapped, weight).to(device).detach().requires_grad_(weight.requires_grad) for weight in weights]


def _weight(mapped: mmap.mmap, weight: Weight) -> torch.Tensor:
    stored = weight.stored
    dtype = DTYPES[stored.dtype]
    if not stored.size_bytes:
        tensor = torch.empty(stored.shape, dtype=dtype)
    else:
        tensor = torch.frombuffer(mapped, dtype=dtype, count=math.prod(stored.shape), offset=stored.begin).view(stored.shape)
    if weight.order is None:
        return tensor
    return tensor.permute(sorted(range(len(weight.order)), key=weight.order.__getitem__))


def _compile(graph: Graph, first_slot: int, device: torch.device) -> list[_Step]:
    steps = []
    last_use: dict[int, int] = {}
    for index, operator in enumerate(graph.operators):
        steps.append(_compile_step(operator, index, first_slot, device))
        used = [ref.index for ref in operator_references(operator) if isinstance(ref, ValueRef)]
        last_use |= dict.fromkeys([*used, *(output for output in operator.outputs if output is not None)], index)
    for value, index in last_use.items():
        if value not in graph.outputs:
            steps[index].emptied.append(first_slot + value)
    return steps


def _compile_step(operator: Operator, index: int, first_slot: int, device: torch.device) -> _Step:
    where = f"operators[{index}]"
    call = OPERATORS.get(operator.name)
    if call is None:
        raise WireError(f"{where}: {operator.name} is not an operator that stages may use")
    _check_signature(call, operator, where)
    step = _Step(call, operator, [None] * len(operator.args))
    for place, argument in enumerate(operator.args):
        if isinstance(argument, (ValueRef, WeightRef)):
            step.slots_of.append((place, _slot(argument, first_slot)))
        elif references(argument):
            step.lists_of.append((place, _maker(argument, first_slot, device, where)))
        else:
            step.args[place] = _maker(argument, first_slot, device, where)([])
    for name, argument in operator.kwargs.items():
        make = _maker(argument, first_slot, device, where)
        if references(argument):
            step.named.append((name, make))
        else:
            step.kwargs[name] = make([])
    if operator.unpacks:
        step.items = [(place, first_slot + output) for place, output in enumerate(operator.outputs) if output is not None]
    else:
        step.output = first_slot + (operator.outputs[0] or 0)
    return step


def _slot(reference: ValueRef | WeightRef, first_slot: int) -> int:
    return reference.index if isinstance(reference, WeightRef) else first_slot + reference.index


def _maker(argument: Argument, first_slot: int, device: torch.device, where: str) -> Callable[[list[Any]], Any]:
    """A function from the slots to the argument's value."""
    if isinstance(argument, (ValueRef, WeightRef)):
        return itemgetter(_slot(argument, first_slot))
    if isinstance(argument, tuple):
        makers = [_maker(item, first_slot, device, where) for item in argument]
        return lambda slots: [make(slots) for make in makers]
    value = _symbol_value(argument, device, where) if isinstance(argument, Symbol) else argument
    return lambda slots: value


def _symbol_value(symbol: Symbol, device: torch.device, where: str) -> Any:
    if symbol.kind == "device":
        return device
    tables: dict[str, Mapping[str, Any]] = {"dtype": DTYPES, "memory_format": MEMORY_FORMATS, "layout": LAYOUTS}
    value = tables[symbol.kind].get(symbol.name)
    if value is None:
        raise WireError(f"{where}: {symbol.name[:80]!r} is not a {symbol.kind} that stages may use")
    return value


def _check_signature(call: Callable[..., Any], operator: Operator, where: str) -> None:
    """Refuse at once what could only fail later: too many arguments, unknown names."""
    if not isinstance(call, torch._ops.OpOverload):
        return
    schema = call._schema
    names = [argument.name for argument in schema.arguments]
    by_position = [argument.name for argument in schema.arguments if not argument.kwarg_only]
    unknown = set(operator.kwargs) - set(names[len(operator.args) :])
    if len(operator.args) > len(by_position) or unknown:
        raise WireError(f"{where}: {operator.name} does not take these arguments: {len(operator.args)} and {sorted(operator.kwargs)}")
