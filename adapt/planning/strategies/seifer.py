"""SEIFER's planner: Parthasarathy and Krishnamachari, "Partitioning and Placement of Deep Neural Networks on Distributed Edge Devices to
Maximize Inference Throughput" (2022, arXiv 2210.12218); and its code, ANRGUSC/SEIFER, test/algorithms.ipynb.

1. Cuts: the path of least cost through the graph of all stages that fit the smallest memory of all devices; a stage costs what is sent after it,
   and there are at most as many stages as devices. The sum is minimised, not the largest.
2. What is sent is sorted into classes. From the largest class down: each run of consecutive links of that class or a larger one that are not
   yet placed becomes a path on devices that are not yet used, with the highest least rate for which one is found. That rate is found by
   bisection, the path by colour coding: devices get colours by chance, and dynamic programming looks for a path with all colours different.

Compute and differences of memory are not looked at, which is the algorithm's own choice. Where we depart: the rounds of colour coding are
capped, since the 10 * e^k of the original are 200,000 for ten devices; a path of colours on so few devices is found in far fewer, and where
it is not, a lower rate is taken. Runs that are longer than MOST_COLOURED devices are placed in pieces.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from adapt.planning.cost import Layout, fits
from adapt.planning.devices import ClusterProfile
from adapt.planning.model import ModelProfile
from adapt.planning.strategies.simple import pipeline
from adapt.planning.tables import Floats, memory_bytes

CLASSES = 20
COLOURS_PER_DEVICE = 1.3
MOST_ROUNDS = 150
MOST_COLOURED = 9  # devices on a path


def seifer(model: ModelProfile, cluster: ClusterProfile, *, classes: int = CLASSES, seed: int = 0) -> Layout | None:
    """See the head of this file. None if no cuts fit the smallest memory, or no path is found."""
    cuts = least_sum_cuts(model, cluster)
    if cuts is None:
        return None
    sent = [model.wire_bytes(cut, 0) for cut in cuts[1:-1]]
    devices = _Placement(cluster, sent, classes, random.Random(seed)).devices()
    if devices is None:
        return None
    layout = pipeline(cuts, devices)
    return layout if fits(model, cluster, layout) else None


def least_sum_cuts(model: ModelProfile, cluster: ClusterProfile) -> list[int] | None:
    """Boundaries of all stages, both ends included; among equal sums the fewest stages. None if none fit."""
    budgets = [device.budget_bytes for device in cluster.devices if device.budget_bytes is not None]
    smallest = min(budgets, default=None)
    count, boundaries = len(cluster.devices), len(model.layers) + 1
    best = np.full((count + 1, boundaries), np.inf)
    came = np.zeros((count + 1, boundaries), int)
    best[0, 0] = 0.0
    memory = memory_bytes(model)
    allowed = np.isfinite(memory) if smallest is None else memory <= smallest
    sent = np.array([*(model.wire_bytes(boundary, 0) for boundary in range(boundaries - 1)), 0.0])
    for stages in range(count):
        reached = np.where(allowed, best[stages][:, None] + sent[None, :], np.inf)
        best[stages + 1], came[stages + 1] = reached.min(axis=0), reached.argmin(axis=0)
    stages = int(np.argmin(best[:, -1]))
    if not np.isfinite(best[stages, -1]):
        return None
    cuts = [boundaries - 1]
    for stage in range(stages, 0, -1):
        cuts.append(int(came[stage, cuts[-1]]))
    return cuts[::-1]


@dataclass
class _Placement:
    """Devices for stages 0 to len(sent); link s leads from stage s to the next and carries sent[s] bytes."""

    cluster: ClusterProfile
    sent: Sequence[float]
    classes: int
    draw: random.Random
    chosen: dict[int, int] = field(default_factory=dict)  # stage -> device

    def devices(self) -> list[int] | None:
        self.rates: Floats = self._rates()
        for floor in self._class_floors():
            for first, last in self._runs(floor):
                if not self._place(first, last):
                    return None
        if not self.chosen:  # a single stage: any device
            self.chosen[0] = 0
        return [self.chosen[stage] for stage in range(len(self.sent) + 1)]

    def _rates(self) -> Floats:
        count = len(self.cluster.devices)
        rates = np.array([[0.0 if a == b else self.cluster.rate(a, b) for b in range(count)] for a in range(count)])
        limited: Floats = np.minimum(rates, 1e18)
        return limited

    def _class_floors(self) -> list[float]:
        """The lower edge of each class, from the largest down, as a histogram of equal widths has them."""
        if not self.sent:
            return []
        edges = np.linspace(min(self.sent), max(self.sent), self.classes + 1)
        return [float(edge) for edge in edges[-2::-1]]

    def _runs(self, floor: float) -> list[tuple[int, int]]:
        """Stretches of stages, first and last, whose links are of this class or larger and not yet placed; the longest first."""
        runs, first = list[tuple[int, int]](), None
        for link in range(len(self.sent) + 1):
            is_wanted = link < len(self.sent) and self.sent[link] >= floor * (1 - 1e-12) and not {link, link + 1} <= self.chosen.keys()
            if is_wanted and first is None:
                first = link
            if not is_wanted and first is not None:
                runs.append((first, link))
                first = None
        pieces = [piece for run in runs for piece in _pieces(*run)]
        return sorted(pieces, key=lambda run: run[0] - run[1])

    def _place(self, first: int, last: int) -> bool:
        """Choose devices for the stages from `first` to `last`; those at its ends, or within, may have theirs."""
        stages = range(first, last + 1)
        values = np.unique(self.rates[self.rates > 0])
        low, high, best = 0, len(values) - 1, None
        while low <= high:
            middle = (low + high) // 2
            path = self._path(stages, float(values[middle]))
            if path is not None:
                best, low = path, middle + 1
            else:
                high = middle - 1
        if best is None:
            return False
        self.chosen |= dict(zip(stages, best, strict=True))
        return True

    def _path(self, stages: range, rate: float) -> list[int] | None:
        """Devices for the stages with links of at least this rate, by colour coding."""
        taken = {device for stage, device in self.chosen.items() if stage not in stages}
        free = [device for device in range(len(self.cluster.devices)) if device not in taken]
        count = len(stages)
        if len(free) < count:
            return None
        colours = max(math.floor(COLOURS_PER_DEVICE * count), count)
        is_linked = self.rates >= rate
        rounds = 1 if len(free) <= colours else min(math.ceil(10 * math.e**count), MOST_ROUNDS)
        for _ in range(rounds):
            if len(free) <= colours:
                colour_of = {device: number for number, device in enumerate(free)}
            else:
                colour_of = {device: self.draw.randrange(colours) for device in free}
            path = self._colourful(stages, free, colour_of, is_linked)
            if path is not None:
                return path
        return None

    def _colourful(
        self, stages: range, free: Sequence[int], colour_of: dict[int, int], is_linked: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]
    ) -> list[int] | None:
        """A path with all colours different: layer by layer, one way to each pair of last device and colours used."""
        layer: dict[tuple[int, int], tuple[int, ...]] = {
            (device, 1 << colour_of[device]): (device,) for device in self._candidates(stages[0], stages, free)
        }
        for stage in stages[1:]:
            following: dict[tuple[int, int], tuple[int, ...]] = {}
            for device in self._candidates(stage, stages, free):
                bit = 1 << colour_of[device]
                for (last, used), path in layer.items():
                    if not used & bit and is_linked[last, device]:
                        following.setdefault((device, used | bit), (*path, device))
            layer = following
        return list(next(iter(layer.values()))) if layer else None

    def _candidates(self, stage: int, stages: range, free: Sequence[int]) -> list[int]:
        if stage in self.chosen:
            return [self.chosen[stage]]
        placed = {self.chosen[other] for other in stages if other in self.chosen}
        return [device for device in free if device not in placed]


def _pieces(first: int, last: int) -> list[tuple[int, int]]:
    """A long run in pieces that share their ends."""
    step = MOST_COLOURED - 1
    return [(begin, min(begin + step, last)) for begin in range(first, last, step)]
