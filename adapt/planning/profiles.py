"""Measured numbers, units in the names: what the planner knows about models, devices and links."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CutPoint:
    """A place at which a model may be cut: before operator `position`, so 0 < position < number of operators."""

    position: int
    crossing_bytes: int  # of the activations that cross the cut, for a batch of one


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerProfile:
    """The operators between two neighbouring legal cuts, on one device at one thread."""

    begin: int  # first operator
    end: int  # one past the last
    compute_s: float  # for the batch that was profiled
    crossing_bytes: int  # what leaves it, for a batch of one
