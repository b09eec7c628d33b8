"""From a program and the seconds of its operators to what the planner knows of it. Works on data, without torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from adapt.errors import ConfigError
from adapt.models.cut import legal_cuts
from adapt.models.program import Graph, Operator, Program, TensorSpec, ValueRef, WeightRef, operator_references
from adapt.planning.model import RAW, CodecProfile, LayerProfile, ModelProfile

WEIGHTS_PER_S, ELEMENTS_PER_S = 5e9, 5e8  # of a plain core, for estimates


def estimated_costs_s(program: Program) -> list[float]:
    """Seconds of each operator for a batch of 1, for whoever cannot measure: each weight is used once for each output that it belongs to
    (exact for products and convolutions), and whatever is made is written. Good for comparing operators, not for predicting seconds."""
    graph = program.graph
    costs_s = []
    for operator in graph.operators:
        made = [graph.values[index] for index in operator.outputs if index is not None]
        elements = sum(math.prod(spec.shape_at(1)) for spec in made if isinstance(spec, TensorSpec))
        shapes = [graph.weights[ref.index].stored.shape for ref in operator_references(operator) if isinstance(ref, WeightRef)]
        uses = sum(math.prod(shape[1:]) * elements for shape in shapes if len(shape) > 1)
        costs_s.append(uses / WEIGHTS_PER_S + elements / ELEMENTS_PER_S)
    return costs_s


def profile_model(
    name: str, program: Program, costs_s: Sequence[float], *, codecs: Sequence[CodecProfile] = (RAW,), reference: str = ""
) -> ModelProfile:
    """The layers between all legal cuts, for a batch of 1. What is constant counts where it stands, though every stage that needs it computes
    it again.

    Args:
        costs_s: seconds of each operator.

    Raises:
        ConfigError: the seconds are not those of this program, or it has no operators.
    """
    graph = program.graph
    if not graph.operators:
        raise ConfigError(f"{name or 'the program'} has no operators: there is nothing to measure or to plan")
    if len(costs_s) != len(graph.operators):
        raise ConfigError(f"{name}: the profile has {len(costs_s)} operators, the program {len(graph.operators)}")
    cuts = legal_cuts(program)
    ends = [*(cut.position for cut in cuts), len(graph.operators)]
    output_bytes = sum(spec.bytes_at(1) for spec in graph.output_specs)
    crossing = [*(cut.crossing_bytes for cut in cuts), output_bytes]
    alive = _alive_bytes(graph)
    layers = tuple(
        _layer(graph, costs_s, alive, begin, end, sent) for (begin, end), sent in zip(pairwise([0, *ends]), crossing, strict=True)
    )
    input_bytes = sum(spec.bytes_at(1) for spec in graph.input_specs)
    return ModelProfile(name, input_bytes, layers, tuple(codecs), reference)


def layer_costs_s(model: ModelProfile, costs_s: Sequence[float]) -> tuple[float, ...]:
    """Seconds of each layer of a profile, from those of the program's operators."""
    return tuple(sum(costs_s[begin:end]) for begin, end in _spans(model))


def with_workspace(model: ModelProfile, told: Collection[Sequence[int | None]]) -> ModelProfile:
    """With what the kernels of each layer take besides: the most of one of its operators on any device.

    Args:
        told: by some devices: bytes of each of the program's operators; None: not known.
    """
    if not told:
        return model
    most = [max(taken_bytes or 0 for taken_bytes in operator) for operator in zip(*told, strict=True)]
    spans = zip(model.layers, _spans(model), strict=True)
    return replace(model, layers=tuple(replace(layer, workspace_bytes=max(most[begin:end])) for layer, (begin, end) in spans))


def completed(costs_s: Sequence[float | None], quick_s: Sequence[float]) -> tuple[float, ...]:
    """Seconds of all operators, where some could not be measured: these as in another profile of the program, at the ratio of the two."""
    measured = [(cost, quick) for cost, quick in zip(costs_s, quick_s, strict=True) if cost is not None]
    there_s, here_s = sum(quick for _, quick in measured), sum(cost for cost, _ in measured)
    ratio = here_s / there_s if there_s > 0 else 1.0
    return tuple(quick * ratio if cost is None else cost for cost, quick in zip(costs_s, quick_s, strict=True))


def _spans(model: ModelProfile) -> Iterator[tuple[int, int]]:
    """Where the operators of each layer begin and end."""
    return pairwise([0, *(layer.end for layer in model.layers)])


def _layer(graph: Graph, costs_s: Sequence[float], alive: Sequence[int], begin: int, end: int, output_bytes: int) -> LayerProfile:
    operators = graph.operators[begin:end]
    sizes = [_weight_bytes(graph, _weights(operator)) for operator in operators]
    heaviest = max(range(len(operators)), key=lambda place: (sizes[place], costs_s[begin + place], -place))
    return LayerProfile(
        place=operators[heaviest].place or operators[heaviest].name,
        cost_s=sum(costs_s[begin:end]),
        weight_bytes=_weight_bytes(graph, {index for operator in operators for index in _weights(operator)}),
        peak_bytes=max(alive[begin:end]),
        output_bytes=output_bytes,
        end=end,
        heaviest_bytes=sizes[heaviest],
    )


def _weights(operator: Operator) -> set[int]:
    return {reference.index for reference in operator_references(operator) if isinstance(reference, WeightRef)}


def _weight_bytes(graph: Graph, weights: set[int]) -> int:
    return sum(graph.weights[index].stored.size_bytes for index in weights)


def _alive_bytes(graph: Graph) -> list[int]:
    """While each operator runs: what was computed before and is still needed, and its own results."""
    last_use = {
        reference.index: position
        for position, operator in enumerate(graph.operators)
        for reference in operator_references(operator)
        if isinstance(reference, ValueRef)
    } | dict.fromkeys(graph.outputs, len(graph.operators))
    sizes = [spec.bytes_at(1) for spec in graph.values]
    alive = {index for index in graph.inputs if index in last_use}
    found = []
    for position, operator in enumerate(graph.operators):
        alive |= {output for output in operator.outputs if output is not None}
        found.append(sum(sizes[index] for index in alive))
        alive = {index for index in alive if last_use.get(index, -1) > position}
    return found
