"""The best pipeline in a direct network in which every pair has its own rate: exact or with a proven bound.

All devices differ, so that counting classes does not help. Instead the bottleneck T is bisected over the values that it can have. For each:

relaxed   can layers be run to the end by a walk in which each stage follows one on another device, though devices may return later?
          Dynamic programming from the end; says no only if there is no plan, so that every no raises the bound.
search    depth first along the walks that the first step leaves, each device once, fewest remaining stages first, remembering what has failed.
          It ends with a plan, with the certainty that there is none, or at its limit without an answer.

The optimum is known if every no is certain. Ours; SEIFER (2210.12218) searches the same space by colour coding, without a bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from adapt.planning.cost import Layout, StageLayout
from adapt.planning.tables import ROUNDING, Floats, Ints, Tables

STEP_LIMIT = 20_000  # of one search
FAR = 1 << 20  # more stages than there are


@dataclass(frozen=True, slots=True)
class Found:
    """The best layout, None if there is none; `bound_s`: nothing is faster; equal to the layout's bottleneck if it is proven to be the best."""

    layout: Layout | None
    bottleneck_s: float
    bound_s: float

    @property
    def is_proven(self) -> bool:
        return self.bottleneck_s <= self.bound_s * (1 + 1e-9)


def search(tables: Tables, *, steps: int = STEP_LIMIT) -> Found:
    """See the head of this file. Of a star or a direct network; of a star the port is not counted."""
    values = _values(tables)
    low, high = -1, len(values)  # nothing at low or below, as far as is proven; a plan at high
    relaxed_low, best = low, None
    while high - low > 1:
        middle = (low + high) // 2
        attempt = _Attempt(tables, float(values[middle]) * (1 + ROUNDING), steps)
        layout = attempt.layout()
        if layout is not None:
            best, high = layout, middle
            continue
        low = middle
        if attempt.is_certain:
            relaxed_low = max(relaxed_low, middle)
    if relaxed_low < low:
        relaxed_low = _surely_impossible(tables, values, relaxed_low, low)
    best_s = float(values[high]) if best is not None else math.inf
    bound_s = float(values[relaxed_low + 1]) if relaxed_low + 1 < len(values) else math.inf
    return Found(best, best_s, min(bound_s, best_s))


def _surely_impossible(tables: Tables, values: Floats, low: int, high: int) -> int:
    """The highest value between these at which not even a walk ends."""
    while high - low > 1:
        middle = (low + high) // 2
        if _Attempt(tables, float(values[middle]) * (1 + ROUNDING), 0).is_impossible:
            low = middle
        else:
            high = middle
    return low


def _values(tables: Tables) -> Floats:
    """All that a bottleneck can be, rising."""
    values = np.unique(np.concatenate([tables.times[np.isfinite(tables.times)].ravel(), tables.links.ravel()]))
    finite: Floats = values[np.isfinite(values)]
    return finite


class _Attempt:
    """Whether there is a plan within one limit."""

    def __init__(self, tables: Tables, limit_s: float, steps: int) -> None:
        self._tables, self._left = tables, steps
        self._class_of = [number for number, members in enumerate(tables.members) for _ in members]
        self._devices = [device for members in tables.members for device in members]
        classes = np.array(self._class_of)
        self._can_run = (tables.times <= limit_s)[classes]
        self._can_send = (tables.links <= limit_s)[np.ix_(classes, classes)]
        self._can_send[np.arange(len(classes)), np.arange(len(classes))] = False
        self._is_end = tables.boundaries == tables.boundaries[-1]
        self._stages_left = self._relax()
        self._failed: set[tuple[int, int, int]] = set()
        self._was_cut_short = False

    @property
    def is_impossible(self) -> bool:
        return bool(self._stages_left[:, self._tables.starts].min() > len(self._devices))

    @property
    def is_certain(self) -> bool:
        """Whether `layout` has looked at everything."""
        return self.is_impossible or not self._was_cut_short

    def layout(self) -> Layout | None:
        for start in self._tables.starts:
            for device in np.argsort(self._stages_left[:, start], kind="stable"):
                if self._stages_left[device, start] > len(self._devices):
                    break
                path = self._finish(int(device), int(start), 1 << int(device), 1)
                if path is not None:
                    return self._laid_out(path)
        return None

    def _relax(self) -> Ints:
        """[device, node], the fewest stages with which a walk that goes on here ends; FAR if none does."""
        count, nodes = self._can_run.shape[:2]
        fewest: Ints = np.full((count, nodes), FAR)
        after: Ints = np.full((count, nodes), FAR)  # once the stage that ends at the node is done
        after[:, self._is_end] = 0
        for node in range(nodes - 1, -1, -1):
            if not self._is_end[node]:
                fewest[:, node] = np.minimum(np.where(self._can_run[:, node], after, FAR).min(axis=1) + 1, FAR)
                after[:, node] = np.where(self._can_send[:, :, node], fewest[None, :, node], FAR).min(axis=1)
        self._after = after
        return fewest

    def _finish(self, device: int, node: int, used: int, stages: int) -> list[tuple[int, int, int]] | None:
        """The stages (device, from node, to node) to the end, on devices that are not used; None if there are none or time is up."""
        key = (device, node, used)
        if key in self._failed:
            return None
        self._left -= 1
        if self._left < 0:
            self._was_cut_short = True
            return None
        room = len(self._devices) - stages
        reachable = np.flatnonzero(self._can_run[device, node] & (self._after[device] <= room))
        for to in reachable[np.argsort(self._after[device, reachable] * FAR - reachable, kind="stable")]:
            if self._is_end[to]:
                return [(device, node, int(to))]
            for following in self._followers(device, int(to), used, room):
                rest = self._finish(following, int(to), used | 1 << following, stages + 1)
                if rest is not None:
                    return [(device, node, int(to)), *rest]
                if self._was_cut_short:
                    return None
        self._failed.add(key)
        return None

    def _followers(self, device: int, node: int, used: int, room: int) -> list[int]:
        able = np.flatnonzero(self._can_send[device, :, node] & (self._stages_left[:, node] <= room))
        free = [int(other) for other in able if not used >> int(other) & 1]
        return sorted(free, key=lambda other: int(self._stages_left[other, node]))

    def _laid_out(self, path: list[tuple[int, int, int]]) -> Layout:
        boundaries, codecs = self._tables.boundaries, self._tables.codecs
        stages = [StageLayout(int(boundaries[a]), int(boundaries[b]), (self._devices[device],)) for device, a, b in path]
        nodes = [path[0][1], *(to for _, _, to in path)]
        return Layout(tuple(stages), tuple(int(codecs[node]) for node in nodes))
