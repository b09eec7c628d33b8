"""The best pipeline with one device per stage: exact, over cuts, codecs and placement, by counting the devices of each class.

Devices of a class are alike, so that a partial plan is told by how many of each class it uses:

    F[counts][last class][node] = min over class k and earlier node n of
        max(min over last class j of max(F[counts - k][j][n], link(j, k, n)), time_k(n, node))

Sources: PipeEdge (Hu et al. 2021, arXiv 2110.14895, algorithm 1) has this table for devices in a chain; codecs, the shapes of networks and the
second pass are ours. Cost: states * classes * nodes^2, where states = product of (devices of a class + 1); where every device is a class of its
own, that is 2^devices.

The second pass takes, among all plans that are as fast, one with the smallest latency. A dispatcher with a limited port adds a cost that grows
with every cut; then the limit is bisected, and the second pass minimises what crosses the port.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adapt.planning.bounds import Capacity
from adapt.planning.cost import Layout, StageLayout
from adapt.planning.tables import ROUNDING, Floats, Tables

WORK_LIMIT = 4e10  # states * classes * nodes^2; tens of seconds
BISECTIONS = 40


@dataclass(frozen=True, slots=True)
class Hop:
    """One stage: up to which node, on a device of which class."""

    class_number: int
    node: int


def work(tables: Tables) -> float:
    """How many steps `solve` takes; compare with `WORK_LIMIT`."""
    states = math.prod(len(members) + 1 for members in tables.members)
    return float(states) * len(tables.members) * len(tables.boundaries) ** 2


def solve(tables: Tables, *, below_s: float = math.inf, capacity: Capacity | None = None) -> Layout | None:
    """A layout with the smallest bottleneck, and among those with the smallest latency; None if there is none at all.

    Args:
        below_s: a bottleneck that some plan is known to reach; helps to leave out what is worse.
        capacity: of the same model and cluster; helps to leave out what cannot be finished in time.
    """
    best_s = _Sweep(tables, below_s * (1 + 1e3 * ROUNDING), is_sum=False, capacity=capacity).best()
    if best_s == math.inf:
        return None
    if tables.port_s.max() > 0.0:
        return _with_port(tables, best_s)
    limit_s = best_s * (1 + ROUNDING)
    return _Sweep(tables.limited(limit_s), limit_s, is_sum=True, capacity=capacity).layout()


def _with_port(tables: Tables, low_s: float) -> Layout | None:
    """The smallest of max(limit, what a plan within the limit needs of the port)."""
    layout, port_s = _least_port(tables, low_s)
    best_s, found = max(low_s, port_s), layout
    high_s = best_s
    for _ in range(BISECTIONS):
        if high_s <= low_s * (1 + ROUNDING):
            break
        middle_s = math.sqrt(low_s * high_s) if low_s > 0 else high_s / 2
        layout, port_s = _least_port(tables, middle_s)
        if port_s <= middle_s:
            high_s = middle_s
        else:
            low_s = middle_s
        if max(middle_s, port_s) < best_s:
            best_s, found = max(middle_s, port_s), layout
    return found


def _least_port(tables: Tables, limit_s: float) -> tuple[Layout | None, float]:
    sweep = _Sweep(tables.limited(limit_s * (1 + ROUNDING)), limit_s, is_sum=True, costs=tables.port_s)
    return sweep.layout(), sweep.best()


class _Sweep:
    """The table over counts, with max (bottleneck) or plus (latency, or `costs` of the nodes) along a plan."""

    def __init__(
        self, tables: Tables, limit_s: float, *, is_sum: bool, costs: Floats | None = None, capacity: Capacity | None = None
    ) -> None:
        self._tables, self._is_sum, self._costs, self._capacity = tables, is_sum, costs, capacity
        self._steps = self._step_costs()
        self._limit_s = limit_s
        self._counts = np.array([len(members) for members in tables.members])
        self._radix = self._strides()
        self._star_last = tables.is_star
        lasts = 1 if tables.is_star else len(tables.members)
        self._table = np.full((self._states, lasts, len(tables.boundaries)), np.inf)
        self._table[0][:, tables.starts] = 0.0 if costs is None else costs[tables.starts]
        for state in range(1, self._states):
            self._fill(state)

    def best(self) -> float:
        return float(self._table[:, :, self._tables.ends].min())

    def layout(self) -> Layout | None:
        """Raises no error: None if nothing reaches the end."""
        ends = self._table[:, :, self._tables.ends]
        if not np.isfinite(ends).any():
            return None
        state, last, end = (int(part) for part in np.unravel_index(int(np.argmin(ends)), ends.shape))
        return self._traced(state, last, int(self._tables.ends[end]))

    def _step_costs(self) -> Floats:
        if not self._is_sum:
            return self._tables.times
        if self._costs is None:
            return self._tables.latencies
        return np.where(np.isfinite(self._tables.times), self._costs[None, None, :], np.inf)

    def _strides(self) -> list[int]:
        strides, self._states = [], 1
        for members in self._tables.members:
            strides.append(self._states)
            self._states *= len(members) + 1
        return strides

    def _has(self, state: int, number: int) -> bool:
        return (state // self._radix[number]) % (len(self._tables.members[number]) + 1) > 0

    def _fill(self, state: int) -> None:
        for number, stride in enumerate(self._radix):
            if not self._has(state, number):
                continue
            before = self._entering(state - stride, number)
            rows = np.flatnonzero(self._is_promising(state - stride, before))
            if not len(rows):
                continue
            steps = self._steps[number][rows]
            reached = (before[rows, None] + steps if self._is_sum else np.maximum(before[rows, None], steps)).min(axis=0)
            place = self._table[state, 0 if self._star_last else number]
            np.minimum(place, reached, out=place)

    def _is_promising(self, state: int, before: Floats) -> npt.NDArray[np.bool_]:
        """Of each node: it is reached, and the devices that are left may yet finish in time."""
        reached: npt.NDArray[np.bool_] = np.isfinite(before) & (before <= (math.inf if self._is_sum else self._limit_s))
        if self._capacity is None or not reached.any():
            return reached
        used = (state // np.array(self._radix)) % (self._counts + 1)
        rest_s = self._capacity.bound_s((self._counts - used).astype(float))
        return reached & (rest_s[self._tables.boundaries] <= self._limit_s * (1 + 1e3 * ROUNDING))

    def _entering(self, state: int, number: int) -> Floats:
        """What the best way to each node costs when a device of this class goes on from there, with the link to it."""
        if self._star_last:
            row: Floats = self._table[state, 0]
            return row
        links = self._tables.links[:, number]
        if self._is_sum:
            entering: Floats = (self._table[state] + links).min(axis=0)
        else:
            entering = np.maximum(self._table[state], links).min(axis=0)
        return entering

    def _traced(self, state: int, last: int, node: int) -> Layout:
        hops: list[Hop] = []
        while self._tables.boundaries[node] > 0:
            number, before, came_from = self._predecessor(state, last, node)
            hops.append(Hop(number, node))
            state -= self._radix[number]
            last, node = came_from, before
        return lay_out(self._tables, node, hops[::-1])

    def _predecessor(self, state: int, last: int, node: int) -> tuple[int, int, int]:
        """Class of the stage that ends here, the node before it, and the class before that."""
        value = self._table[state, last, node]
        for number in range(len(self._radix)) if self._star_last else [last]:
            if not self._has(state, number):
                continue
            before, steps = self._entering(state - self._radix[number], number), self._steps[number][:, node]
            reached = before + steps if self._is_sum else np.maximum(before, steps)
            if reached.min() == value:
                node = int(np.argmin(reached))
                links = self._tables.links[:, number, node]
                came = self._table[state - self._radix[number], :, node]
                if self._star_last:
                    return number, node, 0
                return number, node, int(np.argmin(came + links if self._is_sum else np.maximum(came, links)))
        raise AssertionError("a value of the table comes from somewhere")


def lay_out(tables: Tables, start: int, hops: list[Hop]) -> Layout:
    """The layout of these stages, on the first devices of each class that are left."""
    left = [list(members) for members in tables.members]
    stages, begin = [], 0
    for hop in hops:
        end = int(tables.boundaries[hop.node])
        stages.append(StageLayout(begin, end, (left[hop.class_number].pop(0),)))
        begin = end
    nodes = [start, *(hop.node for hop in hops)]
    return Layout(tuple(stages), tuple(int(tables.codecs[node]) for node in nodes))
