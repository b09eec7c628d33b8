"""Dynamic programming along devices in a fixed order: ours for the bottleneck, and the one of the Pi system for its own objective."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from adapt.planning import tables
from adapt.planning.cost import Layout
from adapt.planning.devices import ClusterProfile
from adapt.planning.model import ModelProfile
from adapt.planning.ordered import best_in_order
from adapt.planning.strategies.simple import pipeline
from adapt.planning.tables import Floats, Ints, Tables

COMPUTE_SHARE, TRANSFER_SHARE = 0.7, 0.3  # of the Pi system's objective
MOST_LIMITS = 200


def dp(model: ModelProfile, cluster: ClusterProfile) -> Layout | None:
    """The pipeline with the smallest bottleneck if devices come in their own order, or in the opposite one; some may be left out. In a direct
    network links count in `pi` only."""
    costs = tables.build(model.with_codecs(model.codecs[0]), cluster)
    order = list(range(len(cluster.devices)))
    best, best_s = None, np.inf
    for direction in (order, order[::-1]):
        found = best_in_order(costs, direction, longest=1)
        if found is not None and (found_s := _stages_s(costs, found)) < best_s:
            best, best_s = found, found_s
    return best


def _stages_s(costs: Tables, layout: Layout) -> float:
    at = {int(boundary): number for number, boundary in enumerate(costs.boundaries)}
    return max(float(costs.times[costs.class_of(stage.devices[0]), at[stage.begin], at[stage.end]]) for stage in layout.stages)


def pi(model: ModelProfile, cluster: ClusterProfile) -> Layout | None:
    """The objective of the Pi system (Foley-ops/distributed-inference, 2025): devices in their order, each with a stage, the smallest

        0.7 * largest compute + 0.3 * sum of transfers

    Where we depart: its dynamic programme keeps one pair of the two per state, by which it can lose the smallest, cuts where no cut is
    legal, and has all links at 100 Mbit/s; here the minimum is exact (where stages have up to MOST_LIMITS different times), cuts are legal, and
    links are those of the cluster.
    """
    search = _Weighted(model, cluster)
    options = [found for limit_s in search.limits for found in search.within(float(limit_s))]
    return min(options, key=lambda option: option[0])[1] if options else None


class _Weighted:
    """For each largest compute that can be, the smallest sum of transfers."""

    def __init__(self, model: ModelProfile, cluster: ClusterProfile) -> None:
        self._stages = min(len(cluster.devices), len(model.layers))
        memory = tables.memory_bytes(model)
        self._compute = [_compute(model, cluster, memory, device) for device in range(self._stages)]
        crossing = np.array([model.wire_bytes(boundary, 0) for boundary in range(len(model.layers) + 1)])
        self._sent_s = [crossing / cluster.rate(device, device + 1) for device in range(self._stages - 1)]
        values = np.unique(np.concatenate([times[np.isfinite(times)] for times in self._compute]))
        few = np.linspace(0, len(values) - 1, min(len(values), MOST_LIMITS)).round().astype(int)
        self.limits = values[few]

    def within(self, limit_s: float) -> Iterator[tuple[float, Layout]]:
        """The best plan for each number of stages, none slower than this, and its score."""
        last = self._compute[0].shape[0] - 1
        best = np.full(last + 1, np.inf)
        best[0] = 0.0
        came: list[Ints] = []
        for stage, times in enumerate(self._compute):
            ending = np.where(times[:, last] <= limit_s, best, np.inf)
            if np.isfinite(ending).any():
                cuts = _cuts(came, int(np.argmin(ending)), last)
                slowest_s = max(float(self._compute[k][a, b]) for k, (a, b) in enumerate(itertools.pairwise(cuts)))
                score = COMPUTE_SHARE * slowest_s + TRANSFER_SHARE * float(ending.min())
                yield score, pipeline(cuts, range(stage + 1))
            if stage + 1 == self._stages:
                return
            reached = np.where(times <= limit_s, best[:, None] + self._sent_s[stage][None, :], np.inf)
            came.append(reached.argmin(axis=0))
            best = reached.min(axis=0)


def _cuts(came: Sequence[Ints], boundary: int, last: int) -> list[int]:
    """All boundaries of a plan whose last stage begins at this one."""
    cuts = [last, boundary]
    for sources in reversed(came):
        cuts.append(int(sources[cuts[-1]]))
    return cuts[::-1]


def _compute(model: ModelProfile, cluster: ClusterProfile, memory: Floats, device: int) -> Floats:
    """[begin, end], seconds, infinite where the device has no room."""
    profile = cluster.devices[device]
    before = np.concatenate([[0.0], np.cumsum(profile.layer_costs_s(model))])
    has_room = np.isfinite(memory) if profile.budget_bytes is None else memory <= profile.budget_bytes
    times: Floats = np.where(has_room, before[None, :] - before[:, None], np.inf)
    return times
