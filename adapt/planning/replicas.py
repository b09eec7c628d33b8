"""The best plan with replicas: exact by bisection over the bottleneck, where it is small enough, else by many orders of the devices.

Whether a bottleneck T can be had is decided by adding devices one at a time to the stage that is under way:

    rate[counts][stage]  = the largest rate that these devices, all that are used so far, can give to the stage
                         = max over class k of rate[counts - k][stage] + 1 / time_k(stage);   0 where the stage may begin
    the stage may end, and each that begins at its end may begin, once its rate is 1/T

which is right because rates of replicas add up, and because only the largest rate matters for the same counts and stage. This dynamic
programme is ours; PipeEdge has no replicas, and PipeDream (Narayanan et al. 2019) has them for equal devices only. Each plan that is found sets
T to its own bottleneck; the search ends when nothing below it can be had.

What crosses the port of a dispatcher adds up over the plan. If it is too much for T, every plan that is not must do without one of the nodes
of this one: each is banned in its turn, and the question asked again.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from adapt.planning.bounds import Capacity
from adapt.planning.cost import Layout, StageLayout
from adapt.planning.ordered import best_in_order
from adapt.planning.tables import Floats, Ints, Tables

WORK_LIMIT = 6e7  # states * stages * classes of one question; a fraction of a second
CLOSE = 1e-9  # a plan that is better by less is no other
NEAR = 1.001  # within this, ask at once whether the best known can be beaten at all
QUESTIONS = 60
SMALL = 1e7  # work of all the bans of one question, if more than BANS
BANS = 10
ORDERS = 12


def work(tables: Tables) -> float:
    """How many steps one question takes; compare with `WORK_LIMIT`."""
    states = math.prod(len(members) + 1 for members in tables.members)
    return float(states) * float(np.isfinite(tables.times).any(axis=0).sum()) * len(tables.members)


def improve(
    tables: Tables, best: Layout, best_s: float, bound_s: float, capacity: Capacity, *, limit: float = WORK_LIMIT
) -> tuple[Layout, float, bool]:
    """The best layout with replicas, from a known one.

    Args:
        best, best_s: a layout, and its bottleneck.
        bound_s: nothing is faster.

    Returns:
        The layout, its bottleneck, and whether nothing can be faster.
    """
    if best_s <= bound_s * (1 + CLOSE):
        return best, best_s, True
    if work(tables) > limit:
        return best, best_s, False
    question = _Question(tables, capacity)
    for _ in range(QUESTIONS):
        asked_s = best_s * (1 - CLOSE) if best_s <= bound_s * NEAR else math.sqrt(max(bound_s, best_s / 1e6) * best_s)
        found, is_certain = _within_port(question, tables, asked_s)
        if found is not None:
            best, best_s = found, bottleneck_s(tables, found)
        elif not is_certain:
            return best, best_s, False
        elif best_s <= bound_s * NEAR:
            return best, best_s, True
        else:
            bound_s = asked_s
    return best, best_s, False


def _within_port(question: _Question, tables: Tables, limit_s: float) -> tuple[Layout | None, bool]:
    """A layout that keeps the limit, the port included; and whether no answer means that there is none."""
    ends_s = float(tables.port_s[tables.starts].min() + tables.port_s[tables.ends].min())
    is_inside = (tables.boundaries > 0) & (tables.boundaries < tables.boundaries[-1])
    hopeless = frozenset(int(node) for node in np.flatnonzero(is_inside & (tables.port_s + ends_s > limit_s)))
    waiting, seen = [hopeless], {hopeless}
    for _ in range(max(int(SMALL / work(tables)), BANS)):
        if not waiting:
            return None, True
        banned = waiting.pop(0)
        found = question.layout(limit_s, banned)
        if found is None:
            continue
        nodes = _nodes(tables, found)
        if float(tables.port_s[nodes].sum()) <= limit_s * (1 + CLOSE / 2):
            return found, True
        for node in sorted(nodes, key=lambda node: -float(tables.port_s[node])):
            if (more := banned | {node}) not in seen:
                seen.add(more)
                waiting.append(more)
    return None, not waiting


def representatives(tables: Tables, layout: Layout, *, limit: float = WORK_LIMIT) -> Ints:
    """Few enough nodes for the exact search: the layout's own, both ends, and for the rest one codec for each boundary, the one that costs
    stages least on average; where these are too many, the cheapest boundary of each stretch of the model."""
    own = set(_nodes(tables, layout))
    cost = np.array([_mean(tables.times[:, :, node]) + _mean(tables.times[:, node, :]) for node in range(len(tables.boundaries))])
    boundaries = [int(boundary) for boundary in np.unique(tables.boundaries)]
    best = {b: min(np.flatnonzero(tables.boundaries == b), key=lambda node: (int(node) not in own, cost[node])) for b in boundaries}
    states = math.prod(len(members) + 1 for members in tables.members)
    most = max(int(math.sqrt(2 * limit / (states * len(tables.members)))) - len(own) - 2, 2)
    inside = [int(best[b]) for b in boundaries[1:-1]]
    stretches = np.array_split(np.array(inside, int), min(most, len(inside))) if inside else []
    cheapest = {int(min(stretch, key=lambda node: cost[node])) for stretch in stretches}
    return np.array(sorted({int(best[boundaries[0]]), int(best[boundaries[-1]])} | cheapest | own))


def _mean(times: Floats) -> float:
    known = times[np.isfinite(times)]
    return float(known.mean()) if len(known) else 0.0


def bottleneck_s(tables: Tables, layout: Layout) -> float:
    """Of a layout in a star."""
    nodes = _nodes(tables, layout)
    worst_s = float(tables.port_s[nodes].sum())
    for stage, begin, end in zip(layout.stages, nodes, nodes[1:], strict=False):
        times = [float(tables.times[tables.class_of(device), begin, end]) for device in stage.devices]
        worst_s = max(worst_s, 0.0 if 0.0 in times else 1.0 / sum(1.0 / time for time in times))
    return worst_s


def _nodes(tables: Tables, layout: Layout) -> list[int]:
    boundaries = [0, *(stage.end for stage in layout.stages)]
    numbers = {(int(b), int(c)): number for number, (b, c) in enumerate(zip(tables.boundaries, tables.codecs, strict=True))}
    return [numbers[node] for node in zip(boundaries, layout.codecs, strict=True)]


class _Question:
    """Can a bottleneck be had?"""

    def __init__(self, tables: Tables, capacity: Capacity) -> None:
        self._tables = tables
        begins, ends = np.nonzero(np.isfinite(tables.times).any(axis=0))
        by_end = np.argsort(ends, kind="stable")
        self._begins, self._ends = begins[by_end], ends[by_end]
        self._last_nodes, self._firsts = np.unique(self._ends, return_index=True)
        with np.errstate(divide="ignore"):
            times = tables.times[:, self._begins, self._ends]
            self._rates = np.where(np.isfinite(times), np.minimum(1.0 / times, 1e300), -np.inf)
        sizes_of = np.array([len(members) for members in tables.members])
        self._together = (np.maximum(self._rates, 0.0) * sizes_of[:, None]).sum(axis=0)  # of all devices there are
        sizes = [len(members) + 1 for members in tables.members]
        self._strides = [math.prod(sizes[:number]) for number in range(len(sizes))]
        states = np.arange(math.prod(sizes))
        self._counts: Ints = states[:, None] // np.array(self._strides) % np.array(sizes)
        self._rest_s = np.stack([capacity.bound_s((np.array(sizes) - 1 - counts).astype(float)) for counts in self._counts])

    def layout(self, limit_s: float, banned: frozenset[int] = frozenset()) -> Layout | None:
        """One with this bottleneck or a smaller one, on as few devices as can be, without the nodes that are banned; None if there is none."""
        needed = (1.0 - 1e-12) / limit_s if limit_s > 0 else 1e299
        return self._narrowed(needed)._layout(limit_s, needed, banned)

    def _narrowed(self, needed: float) -> _Question:
        """The same without stages that all devices together are too slow for."""
        kept = np.flatnonzero(self._together >= needed)
        narrowed = copy.copy(self)
        narrowed._begins, narrowed._ends, narrowed._rates = self._begins[kept], self._ends[kept], self._rates[:, kept]
        narrowed._last_nodes, narrowed._firsts = np.unique(narrowed._ends, return_index=True)
        return narrowed

    def _layout(self, limit_s: float, needed: float, banned: frozenset[int]) -> Layout | None:
        if not len(self._begins):
            return None
        is_hopeful = self._rest_s[:, self._tables.boundaries] <= limit_s * (1 + CLOSE)
        is_allowed = np.array([node not in banned for node in range(len(self._tables.boundaries))])
        can_begin = np.zeros((len(self._counts), len(self._tables.boundaries)), bool)
        can_begin[0, self._tables.starts] = is_allowed[self._tables.starts]
        rates: Floats = np.full((len(self._counts), len(self._begins)), -np.inf)
        rates[0][can_begin[0][self._begins]] = 0.0
        is_alive = np.zeros(len(self._counts), bool)
        is_alive[0] = True
        totals = self._counts.sum(axis=1)
        for total in range(1, int(totals.max()) + 1):
            states = np.flatnonzero(totals == total)
            level = self._one_more(rates, states, is_alive)
            can_begin[states[:, None], self._last_nodes] = np.logical_or.reduceat(level >= needed, self._firsts, axis=1)
            can_begin[states] &= is_allowed
            if can_begin[np.ix_(states, self._tables.ends)].any():
                rates[states] = level
                return self._traced(rates, can_begin, needed, states)
            can_begin[states] &= is_hopeful[states]
            level = np.where(can_begin[states][:, self._begins], np.maximum(level, 0.0), level)
            level[~is_hopeful[states][:, self._ends]] = -np.inf
            is_alive[states] = (level > -np.inf).any(axis=1)
            rates[states] = level
        return None

    def _one_more(self, rates: Floats, states: Ints, is_alive: npt.NDArray[np.bool_]) -> Floats:
        level: Floats = np.full((len(states), len(self._begins)), -np.inf)
        for number, stride in enumerate(self._strides):
            with_it = np.flatnonzero((self._counts[states, number] > 0) & is_alive[np.maximum(states - stride, 0)])
            level[with_it] = np.maximum(level[with_it], rates[states[with_it] - stride] + self._rates[number])
        return level

    def _traced(self, rates: Floats, can_begin: npt.NDArray[np.bool_], needed: float, states: Ints) -> Layout:
        ends = self._tables.ends
        row, column = (int(part) for part in np.argwhere(can_begin[np.ix_(states, ends)])[0])
        state, node = int(states[row]), int(ends[column])
        left = [list(members) for members in self._tables.members]
        stages, codecs = list[StageLayout](), [int(self._tables.codecs[node])]
        while self._tables.boundaries[node] > 0:
            stage = self._ending(rates[state], node, needed)
            begin = int(self._begins[stage])
            devices, state = self._devices_of(rates, can_begin, state, stage, left)
            stages.append(StageLayout(int(self._tables.boundaries[begin]), int(self._tables.boundaries[node]), tuple(sorted(devices))))
            codecs.append(int(self._tables.codecs[begin]))
            node = begin
        return Layout(tuple(reversed(stages)), tuple(reversed(codecs)))

    def _ending(self, rates: Floats, node: int, needed: float) -> int:
        ending = np.flatnonzero(self._ends == node)
        return int(ending[np.argmax(rates[ending])])

    def _devices_of(
        self, rates: Floats, can_begin: npt.NDArray[np.bool_], state: int, stage: int, left: Sequence[list[int]]
    ) -> tuple[list[int], int]:
        """The devices of a stage that is under way in this state, and the state in which it began."""
        devices: list[int] = []
        while not devices or not can_begin[state, self._begins[stage]] or rates[state, stage] > 0.0:
            number = max(
                (n for n in range(len(self._strides)) if self._counts[state, n]),
                key=lambda n: float(rates[state - self._strides[n], stage] + self._rates[n, stage]),
            )
            devices.append(left[number].pop(0))
            state -= self._strides[number]
        return devices, state


# ── many orders ──────────────────────────────────────────────────────────────────────────────────────────────────────


def by_orders(
    tables: Tables, orders: Sequence[Sequence[int]], *, below_s: float = math.inf, longest: int | None = None
) -> tuple[Layout | None, float]:
    """The best layout over these orders of the devices, each optimal for its order, and its bottleneck. See `best_in_order`."""
    best: Layout | None = None
    for order in orders:
        found = best_in_order(tables, order, longest=longest, below_s=below_s * (1 - CLOSE))
        if found is not None and (found_s := bottleneck_s(tables, found)) < below_s:
            best, below_s = found, found_s
    return best, below_s


def likely_orders(tables: Tables, draw: Iterator[Sequence[int]]) -> list[Sequence[int]]:
    """Classes one after the other in every direction that is cheap to try, then drawn ones; `ORDERS` in all."""
    in_classes = [device for members in tables.members for device in members]
    by_size = sorted(tables.members, key=lambda members: -len(members))
    rotated = [[device for members in (*by_size[k:], *by_size[:k]) for device in members] for k in range(min(len(by_size), 4))]
    orders = [in_classes, in_classes[::-1], *rotated, *(order[::-1] for order in rotated)]
    return [*orders, *(next(draw) for _ in range(max(ORDERS - len(orders), 2)))]
