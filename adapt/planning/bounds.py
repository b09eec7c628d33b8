"""What no plan can beat: bounds that are proven, for the gap that is printed and for leaving out what cannot be good.

work    Give each layer a price. A device serves one stage, and of that at most the share that T seconds allow, T / (its time for the stage);
        it earns at most T * max over stages of price / time. All devices together have to earn the prices of all layers, so that
            T >= sum of prices / sum over devices of max over stages of price / time.
        That is weak duality for the linear programme of covering the model with shares of stages, memory, links and codecs included.
        Prices tried: the seconds of each class, and what a few dozen steps make of them that raise the price of layers which earn too
        little (the multiplicative weights of Plotkin, Shmoys and Tardos, 1995).
layer   The stage around a layer takes at least what the best such stage takes on all devices together.
ends    Input and output have to pass the port, whoever computes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from adapt.planning.devices import ClusterProfile
from adapt.planning.model import ModelProfile
from adapt.planning.tables import Floats, Tables

STEPS = 60  # of the prices
STRIDE = 0.5  # of the first step


@dataclass(frozen=True, slots=True)
class Capacity:
    """The bound of work, for all of a model or the rest of it.

    Attributes:
        left: [price, boundary], prices of all layers after the boundary.
        rates: [price, class], what a device earns per second at best; infinite where a stage with a price costs it nothing.
    """

    left: Floats
    rates: Floats

    @classmethod
    def of(cls, model: ModelProfile, cluster: ClusterProfile, tables: Tables) -> Capacity:
        costs = np.array([group.profile.layer_costs_s(model) for group in cluster.classes])
        known = np.unique(costs / np.maximum(costs.sum(axis=1, keepdims=True), 1e-300), axis=0)
        prices = np.stack([*known, _raised(known.mean(axis=0), tables)])
        after = np.flip(np.cumsum(np.flip(prices, axis=1), axis=1), axis=1)
        left = np.concatenate([after, np.zeros((len(prices), 1))], axis=1)
        return cls(left, np.stack([_earnings(row, tables)[0] for row in prices]))

    def bound_s(self, counts: Floats) -> Floats:
        """[boundary], seconds that all layers after it take at least on so many devices of each class."""
        is_finite = np.isfinite(self.rates).all()
        together = self.rates @ (counts if is_finite else np.maximum(counts, 1e-9))
        with np.errstate(divide="ignore", invalid="ignore"):
            bounds: Floats = np.where(self.left > 0, self.left / together[:, None], 0.0).max(axis=0)
        return bounds


def _earnings(prices: Floats, tables: Tables) -> tuple[Floats, list[tuple[int, int]]]:
    """[class], the most per second, and the stage with which, as nodes."""
    before = np.concatenate([[0.0], np.cumsum(prices)])[tables.boundaries]
    price = np.maximum(before[None, :] - before[:, None], 0.0)
    best, stages = [], []
    for times in tables.times:
        with np.errstate(divide="ignore", invalid="ignore"):
            earned = np.where(np.isfinite(times) & (price > 0), price / times, 0.0)
        place = int(earned.argmax())
        best.append(float(earned.flat[place]))
        stages.append((place // earned.shape[1], place % earned.shape[1]))
    return np.array(best), stages


def _raised(prices: Floats, tables: Tables) -> Floats:
    """Prices with a higher bound: layers outside the stages that earn most become dearer."""
    counts = np.array([len(members) for members in tables.members], float)
    prices = prices + 1e-3 / len(prices)
    best, best_bound = prices, 0.0
    for step in range(STEPS):
        rates, stages = _earnings(prices, tables)
        total = float(counts @ rates)
        if not 0 < total < np.inf:
            return best
        if prices.sum() / total > best_bound:
            best, best_bound = prices, float(prices.sum() / total)
        covered = np.zeros(len(prices))
        for number, (begin, end) in enumerate(stages):
            if rates[number] > 0:
                layers = slice(int(tables.boundaries[begin]), int(tables.boundaries[end]))
                covered[layers] += counts[number] / tables.times[number, begin, end]
        wanted = float(covered @ prices) / float(prices.sum())
        prices = prices * np.exp(-STRIDE / (1 + step / 10) * np.clip(covered / wanted - 1.0, -1.0, 1.0))
        prices = prices / prices.sum()
    return best


def bound_s(tables: Tables, capacity: Capacity, *, has_replicas: bool) -> float:
    """No plan has a smaller bottleneck. Infinite only if a layer fits nowhere."""
    counts = np.array([len(members) for members in tables.members], float)
    work_s = float(capacity.bound_s(counts)[0])
    port_s = tables.port_s[tables.starts].min() + tables.port_s[tables.ends].min()
    return max(work_s, _stages_s(tables, counts, has_replicas=has_replicas), float(port_s))


def _stages_s(tables: Tables, counts: Floats, *, has_replicas: bool) -> float:
    """For each layer the best stage that contains it, on all devices at once or on the best one; the largest of these."""
    if has_replicas:
        with np.errstate(divide="ignore"):
            rates = np.where(np.isfinite(tables.times), 1.0 / tables.times, 0.0)
            times = 1.0 / np.tensordot(counts, rates, axes=1)
    else:
        times = tables.times.min(axis=0)
    worst_s = 0.0
    for boundary in range(int(tables.boundaries[-1])):
        around = times[np.ix_(tables.boundaries <= boundary, tables.boundaries > boundary)]
        worst_s = max(worst_s, float(around.min()))
    return worst_s
