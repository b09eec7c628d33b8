"""What is left of a graph when operators have gone: without what no output depends on, and numbered anew. Works on data, without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from adapt.models.program import Argument, Operator, ValueRef, WeightRef, map_references, operator_references


@dataclass(frozen=True, slots=True)
class Compacted:
    """`values` and `weights`: the old numbers of those that are left, in their new order."""

    operators: list[Operator]
    values: list[int]
    weights: list[int]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def compact(operators: Sequence[Operator], inputs: Sequence[int], outputs: Sequence[int]) -> Compacted:
    """Drop operators, values and weights that no output depends on, and number the rest anew. Inputs stay."""
    needed = set(outputs)
    kept = []
    for op in reversed(operators):
        if needed.intersection(op.outputs):
            kept.append(op)
            needed |= {ref.index for ref in operator_references(op) if isinstance(ref, ValueRef)}
    kept.reverse()
    values = sorted(needed | set(inputs))
    value_of = {old: new for new, old in enumerate(values)}
    weights = sorted({ref.index for op in kept for ref in operator_references(op) if isinstance(ref, WeightRef)})
    weight_of = {old: new for new, old in enumerate(weights)}

    def renumber(reference: ValueRef | WeightRef) -> Argument:
        return ValueRef(value_of[reference.index]) if isinstance(reference, ValueRef) else WeightRef(weight_of[reference.index])

    renumbered = [
        replace(
            op,
            args=tuple(map_references(argument, renumber) for argument in op.args),
            kwargs={name: map_references(argument, renumber) for name, argument in op.kwargs.items()},
            outputs=tuple(None if output is None else value_of.get(output) for output in op.outputs),
        )
        for op in kept
    ]
    return Compacted(renumbered, values, weights, tuple(value_of[old] for old in inputs), tuple(value_of[old] for old in outputs))
