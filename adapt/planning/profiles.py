"""What planning knows about a model: where it may be cut, and what crosses there."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CutPoint:
    """A place at which a model may be cut: before operator `position`, so 0 < position < number of operators."""

    position: int
    crossing_bytes: int  # of the activations that cross the cut, for a batch of one
