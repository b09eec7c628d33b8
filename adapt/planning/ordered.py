"""The best plan for devices that come in a given order, replicas included.

A stage runs on a stretch of consecutive devices, and devices may be left out between stages:

    F[d][node] = min over d' < d, earlier node n of max(F[d'][n], time of the stretch d'..d for the stage from n to node),  F[d] <= F[d - 1]

Polynomial, devices^2 * nodes^2, so that many orders can be tried; the exact solvers need no order but more time. With stretches of one device
this is the pipeline for unequal devices in a fixed order. Stars only: a direct network has no replicas, and its order is the question.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from adapt.planning.cost import Layout, StageLayout
from adapt.planning.tables import Floats, Ints, Tables


def best_in_order(tables: Tables, order: Sequence[int], *, longest: int | None = None, below_s: float = np.inf) -> Layout | None:
    """The layout with the smallest bottleneck of stages and replicas; what crosses the port is not counted.

    Args:
        order: numbers of devices.
        longest: most replicas of a stage; None: any number.
        below_s: only layouts that are faster than this are of interest.

    Returns:
        None: there is no layout as fast.
    """
    ordered = _Ordered(tables, [tables.class_of(device) for device in order], longest or len(order), below_s)
    ordered.fill()
    return ordered.layout(order)


MOST = 1e300  # requests per second: as good as infinite, and can be added to what is not


class _Ordered:
    """The table F, and where each of its values comes from."""

    def __init__(self, tables: Tables, classes: Sequence[int], longest: int, below_s: float) -> None:
        self._tables, self._classes, self._longest, self._below_s = tables, classes, longest, below_s
        with np.errstate(divide="ignore"):
            self._rates = np.where(np.isfinite(tables.times), np.minimum(1.0 / tables.times, MOST), -np.inf)
        self._table = np.full((len(classes) + 1, len(tables.boundaries)), np.inf)
        self._table[0, tables.starts] = 0.0
        self._came: Ints = np.full((*self._table.shape, 3), -1)  # first device of the stage, the one after its last, node before it

    def fill(self) -> None:
        for first in range(len(self._classes)):
            self._leave_out(first)
            rows = np.flatnonzero(self._table[first] < self._below_s)
            rate: Floats = np.zeros((len(rows), self._table.shape[1]))
            for after in range(first + 1, min(len(self._classes), first + self._longest) + 1):
                rate = rate + self._rates[self._classes[after - 1]][rows]
                if not (rate > 0).any():
                    break  # no stage finds room on all of these
                self._extend(first, after, rows, rate)
        self._leave_out(len(self._classes))

    def layout(self, order: Sequence[int]) -> Layout | None:
        ends = self._tables.ends
        node, place = int(ends[np.argmin(self._table[-1, ends])]), len(order)
        if not self._table[-1, node] < self._below_s:
            return None
        stages: list[StageLayout] = []
        codecs = [int(self._tables.codecs[node])]
        while self._tables.boundaries[node] > 0:
            first, after, before = (int(part) for part in self._came[place, node])
            begin, end = (int(self._tables.boundaries[n]) for n in (before, node))
            stages.append(StageLayout(begin, end, tuple(order[first:after])))
            codecs.append(int(self._tables.codecs[before]))
            place, node = first, before
        return Layout(tuple(reversed(stages)), tuple(reversed(codecs)))

    def _leave_out(self, place: int) -> None:
        """The device before this place need not run anything."""
        if place:
            better = self._table[place - 1] < self._table[place]
            self._table[place][better] = self._table[place - 1][better]
            self._came[place][better] = self._came[place - 1][better]

    def _extend(self, first: int, after: int, rows: Ints, rate: Floats) -> None:
        """A stage on the devices from `first` up to `after`, from each of these nodes to each."""
        with np.errstate(divide="ignore"):
            times = np.where(rate > 0, 1.0 / rate, np.inf)
        reached = np.maximum(self._table[first, rows][:, None], times)
        best = reached.argmin(axis=0)
        value = reached[best, np.arange(len(best))]
        better = np.flatnonzero(value < self._table[after])
        self._table[after, better] = value[better]
        self._came[after, better, 0], self._came[after, better, 1] = first, after
        self._came[after, better, 2] = rows[best[better]]
