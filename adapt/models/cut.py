"""From a program to stages: where it may be cut, and the files of the pieces. Works on data, without torch.

A cut at position p lies before operator p. What is computed before it and used after it crosses: often one tensor,
several across skip connections, ints where shapes depend on the batch. A value that crosses a stage that has no use
for it is an input and an output of that stage. Operators that depend on no input (masks, position tables) cross
nothing: every stage that needs them computes them again.

A cut is legal where every crossing tensor can travel without changing a bit of what follows. Kernels choose their
path, and so their rounding, by the layout in memory: a tensor that is contiguous after a permutation of its
dimensions (channels last) crosses permuted and is permuted back on the other side, both without touching the data;
a tensor with gaps or overlaps (a slice, an expanded one) cannot cross.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from adapt.errors import PlanError
from adapt.models.program import (
    Argument,
    Graph,
    Operator,
    Program,
    SizeSpec,
    TensorSpec,
    ValueRef,
    ValueSpec,
    Weight,
    WeightRef,
    map_references,
    operator_references,
    stage_to_metadata,
)
from adapt.models.tensorfile import TensorSource, copy_pieces, write_tensor_file
from adapt.planning.profiles import CutPoint


@dataclass(frozen=True, slots=True)
class Cut(CutPoint):
    """A legal cut. `crossing`: numbers of the program's values that cross it, rising."""

    crossing: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StageArtifact:
    """One stage on disk. Its outputs are, in order, the inputs of the next stage.

    `begin`, `end`: the program's operators that it runs are those from `begin` up to, not including, `end`.
    """

    digest: str
    path: Path
    file_bytes: int
    weight_bytes: int
    inputs: tuple[ValueSpec, ...]
    outputs: tuple[ValueSpec, ...]
    begin: int
    end: int


class Held(NamedTuple):
    """Where a window holds a value of the program: under which number of its own, and in which order of dimensions it crosses a cut.

    `order`: None: it travels as it lies there.
    """

    number: int
    order: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class Window:
    """A stage that is not written: its weights stay in the program's file.

    `positions`: of each of its operators in the program; -1 for what only the cuts bring along. `held`: by the program's numbers; what came
    permuted and is used is held twice, and for as long as each is needed.
    """

    graph: Graph
    positions: tuple[int, ...]
    held: Mapping[int, tuple[Held, ...]]


def legal_cuts(program: Program) -> list[Cut]:
    """Every legal cut, positions rising. Cuts between which nothing but constants is computed count once, as the first."""
    graph = program.graph
    constant = constant_values(graph)
    is_real = [not set(operator.outputs) - {None} <= constant for operator in graph.operators]
    last_use = _last_uses(graph)
    live = {index for index in graph.inputs if last_use.get(index, -1) >= 0}
    last_real = max((position for position, real in enumerate(is_real) if real), default=0)
    cuts = []
    for position, operator in enumerate(graph.operators[:last_real], start=1):
        live |= {output for output in operator.outputs if output is not None and output not in constant}
        live = {index for index in live if last_use.get(index, -1) >= position}
        if is_real[position - 1] and live and all(_can_cross(graph.values[index]) for index in live):
            crossing_bytes = sum(graph.values[index].bytes_at(1) for index in live)
            cuts.append(Cut(position, crossing_bytes, tuple(sorted(live))))
    return cuts


def write_stages(program: Program, positions: Sequence[int], directory: Path | str) -> list[StageArtifact]:
    """Write the stages of a program cut before the operators at `positions`; no position gives one stage.

    Weights are copied in pieces from file to file, so that the memory needed does not grow with the model.

    Raises:
        PlanError: a position is not that of a legal cut, or they do not rise.
        OSError: the program's file cannot be read, or the directory not written.
    """
    legal = {cut.position: cut for cut in legal_cuts(program)}
    if list(positions) != sorted(set(positions)) or not all(position in legal for position in positions):
        raise PlanError(f"cannot cut at {list(positions)}: positions must rise and be among the {len(legal)} legal cuts")
    ends = [(position, legal[position].crossing) for position in positions] + [(len(program.graph.operators), None)]
    artifacts, begin, entering = [], 0, None
    for end, leaving in ends:
        graph = _StageBuilder(program.graph, begin, end, entering, leaving).build()
        artifacts.append(_write_stage(program, graph, begin, end, directory))
        begin, entering = end, leaving
    return artifacts


def window(program: Program, begin: Cut | None, end: Cut | None) -> Window:
    """What a stage between these two legal cuts would run; None is the beginning, and the end, of the program."""
    first = begin.position if begin is not None else 0
    last = end.position if end is not None else len(program.graph.operators)
    entering, leaving = (cut.crossing if cut is not None else None for cut in (begin, end))
    builder = _StageBuilder(program.graph, first, last, entering, leaving)
    graph = builder.build()
    return Window(graph, tuple(builder.positions), builder.held())


def constant_values(graph: Graph) -> set[int]:
    """Values that depend on no input of the graph."""
    constant: set[int] = set()
    for operator in graph.operators:
        if all(ref.index in constant for ref in operator_references(operator) if isinstance(ref, ValueRef)):
            constant.update(output for output in operator.outputs if output is not None)
    return constant


def _last_uses(graph: Graph) -> dict[int, int]:
    """Value -> position of the last operator that uses it; results of the model are used after the last one."""
    last_use = {
        reference.index: position
        for position, operator in enumerate(graph.operators)
        for reference in operator_references(operator)
        if isinstance(reference, ValueRef)
    }
    return last_use | dict.fromkeys(graph.outputs, len(graph.operators))


def _can_cross(spec: ValueSpec) -> bool:
    return isinstance(spec, SizeSpec) or spec.order is not None


def _write_stage(program: Program, graph: Graph, begin: int, end: int, directory: Path | str) -> StageArtifact:
    sources = [
        TensorSource(
            weight.stored.key,
            weight.stored.dtype,
            weight.stored.shape,
            partial(copy_pieces, program.path, weight.stored),
        )
        for weight in graph.weights
    ]
    path, digest, file_bytes = write_tensor_file(directory, stage_to_metadata(graph), sources)
    return StageArtifact(digest, path, file_bytes, graph.weight_bytes, graph.input_specs, graph.output_specs, begin, end)


class _StageBuilder:
    """Collects the operators of one stage under new numbers of values and weights."""

    def __init__(self, graph: Graph, begin: int, end: int, entering: tuple[int, ...] | None, leaving: tuple[int, ...] | None) -> None:
        self._graph, self._begin, self._end = graph, begin, end
        self._entering = graph.inputs if entering is None else entering
        self._leaving = graph.outputs if leaving is None else leaving
        self._arrives_permuted, self._leaves_permuted = entering is not None, leaving is not None
        self._operators: list[Operator] = []
        self._values: list[ValueSpec] = []
        self._weights: list[Weight] = []
        self._value_of: dict[int, int] = {}  # the program's number -> the stage's
        self._weight_of: dict[int, int] = {}
        self._arrived: dict[int, int] = {}  # the program's number -> the stage's, as it arrived
        self.positions: list[int] = []  # in the program, of each operator of the stage; -1 for those of the cuts

    def build(self) -> Graph:
        needed = self._needed_operators()
        references = (ref for position in needed for ref in operator_references(self._graph.operators[position]))
        used = {ref.index for ref in references if isinstance(ref, ValueRef)}
        for index in self._entering:
            self._enter(index, is_used=index in used or not self._leaves_permuted)
        inputs = tuple(self._arrived[index] for index in self._entering)
        for position in needed:
            self._copy(self._graph.operators[position])
            self.positions.append(position)
        outputs = tuple(self._leave(index) for index in self._leaving)
        return Graph(tuple(self._operators), tuple(self._values), tuple(self._weights), inputs, outputs)

    def held(self) -> dict[int, tuple[Held, ...]]:
        """After `build`: what has come and what is computed, by the program's numbers."""
        found = {index: (Held(number, None),) for index, number in self._arrived.items()}
        for index, number in self._value_of.items():
            spec = self._graph.values[index]
            order = spec.order if isinstance(spec, TensorSpec) and _is_permuted(spec) else None
            found[index] = (*found.get(index, ()), Held(number, order))
        return found

    def _needed_operators(self) -> list[int]:
        """Positions of the stage's own operators, and before them of the constants that they or the results depend on."""
        constant = constant_values(self._graph)
        needed = {index for index in self._leaving if index in constant}
        chosen = []
        for position in range(self._end - 1, -1, -1):
            operator = self._graph.operators[position]
            defined = {output for output in operator.outputs if output is not None}
            if defined & needed or (position >= self._begin and not defined <= constant):
                chosen.append(position)
                needed |= {r.index for r in operator_references(operator) if isinstance(r, ValueRef) and r.index in constant}
        return chosen[::-1]

    def _enter(self, index: int, *, is_used: bool) -> None:
        spec = self._graph.values[index]
        if not self._arrives_permuted or not _is_permuted(spec):
            self._arrived[index] = self._value_of[index] = self._define(spec)
            return
        assert isinstance(spec, TensorSpec) and spec.order is not None
        self._arrived[index] = self._define(_as_it_travels(spec))
        if is_used:
            self._value_of[index] = self._permute(self._arrived[index], spec, _inverse(spec.order))

    def _leave(self, index: int) -> int:
        spec = self._graph.values[index]
        if not self._leaves_permuted or not _is_permuted(spec):
            return self._value_of[index]
        if self._arrives_permuted and index in self._arrived:
            return self._arrived[index]  # passes through as it came
        assert isinstance(spec, TensorSpec) and spec.order is not None
        return self._permute(self._value_of[index], _as_it_travels(spec), spec.order)

    def _permute(self, source: int, spec: TensorSpec, order: Iterable[int]) -> int:
        target = self._define(spec)
        self._operators.append(Operator("aten.permute.default", (ValueRef(source), tuple(order)), {}, (target,), place="cut"))
        self.positions.append(-1)
        return target

    def _copy(self, operator: Operator) -> None:
        args = tuple(map_references(argument, self._renumber) for argument in operator.args)
        kwargs = {name: map_references(argument, self._renumber) for name, argument in operator.kwargs.items()}
        outputs = []
        for output in operator.outputs:
            if output is not None:
                self._value_of[output] = self._define(self._graph.values[output])
            outputs.append(None if output is None else self._value_of[output])
        self._operators.append(replace(operator, args=args, kwargs=kwargs, outputs=tuple(outputs)))

    def _renumber(self, reference: ValueRef | WeightRef) -> Argument:
        if isinstance(reference, ValueRef):
            return ValueRef(self._value_of[reference.index])
        if reference.index not in self._weight_of:
            self._weight_of[reference.index] = len(self._weights)
            self._weights.append(self._graph.weights[reference.index])
        return WeightRef(self._weight_of[reference.index])

    def _define(self, spec: ValueSpec) -> int:
        self._values.append(spec)
        return len(self._values) - 1


def _is_permuted(spec: ValueSpec) -> bool:
    return isinstance(spec, TensorSpec) and spec.order is not None and not spec.is_contiguous


def _as_it_travels(spec: TensorSpec) -> TensorSpec:
    """The contiguous tensor that `spec` is after its permutation."""
    assert spec.order is not None
    return TensorSpec(spec.dtype, tuple(spec.shape[dim] for dim in spec.order), tuple(range(len(spec.shape))))


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(len(order)), key=order.__getitem__))
