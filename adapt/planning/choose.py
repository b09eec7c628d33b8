"""Plan by name, or take the best of all: `plan(model, cluster, "auto")`.

`auto` asks every strategy, then improves: exact pipelines over all codecs, replicas, one device, all devices alike. All of them are judged
by `cost.forecast`; the smallest bottleneck wins, then the smallest latency. It is never worse than one of them alone. What cannot
be searched in full is compared with a bound that holds for every plan.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from adapt.errors import ConfigError, PlanError
from adapt.planning import bounds, exact, pairwise, replicas, tables
from adapt.planning.bounds import Capacity
from adapt.planning.cost import Forecast, Layout, fits, forecast
from adapt.planning.devices import ClusterProfile
from adapt.planning.missing import what_is_missing
from adapt.planning.model import ModelProfile
from adapt.planning.placement import Plan, StageNeed
from adapt.planning.strategies import ordered, seifer, simple
from adapt.protocol.ids import Digest, Epoch, WorkerId

Strategy = Callable[[ModelProfile, ClusterProfile], Layout | None]

BASELINES: dict[str, Strategy] = {
    "single": simple.single,
    "all": simple.data_parallel,
    "equal": simple.equal,
    "random": simple.random_plan,
    "greedy": simple.greedy,
    "dp": ordered.dp,
    "pi": ordered.pi,
    "seifer": seifer.seifer,
}
EXACT, AUTO = "exact", "auto"
STRATEGIES = (*BASELINES, EXACT, AUTO)
TOLERANCE = 1e-9  # bottlenecks that differ by less are alike, and latency decides
FEW_CUTS = (1, 2, 4, 8)  # where the dispatcher's port counts


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan and what is known of it.

    Attributes:
        strategy: whose it is.
        bound_s: no plan has a smaller bottleneck, of those with replicas too.
        is_optimal: no plan has a smaller bottleneck than this one.
    """

    strategy: str
    layout: Layout
    forecast: Forecast
    bound_s: float
    is_optimal: bool

    @property
    def gap(self) -> float:
        """How much larger the bottleneck is than the bound, as a share; 0 if it is proven to be the smallest."""
        if self.is_optimal or self.forecast.bottleneck_s <= self.bound_s:
            return 0.0
        return self.forecast.bottleneck_s / self.bound_s - 1.0 if self.bound_s > 0 else math.inf


def plan(model: ModelProfile, cluster: ClusterProfile, strategy: str = AUTO) -> Planned:
    """Plan with one strategy.

    Raises:
        ConfigError: no strategy has this name.
        PlanError: it found no plan that fits the memory; says what is missing.
    """
    return compare(model, cluster, [strategy])[strategy]


def compare(model: ModelProfile, cluster: ClusterProfile, strategies: Sequence[str] = STRATEGIES) -> dict[str, Planned]:
    """Plan with each of these strategies; one that finds no plan is left out, unless no plan is found at all.

    Raises: as `plan`.
    """
    for strategy in strategies:
        if strategy not in STRATEGIES:
            raise ConfigError(f"strategy={strategy!r}: expected one of {', '.join(STRATEGIES)}")
    if not cluster.devices:
        raise PlanError(what_is_missing(model, cluster))
    planner = _Planner(model, cluster)
    for strategy in strategies:
        planner.layout(strategy)  # first, since each may raise the bound that all are held against
    found = {strategy: planner.planned(strategy) for strategy in strategies}
    kept = {strategy: planned for strategy, planned in found.items() if planned is not None}
    if not kept:
        raise PlanError(_why_none(model, cluster, strategies))
    return kept


def _why_none(model: ModelProfile, cluster: ClusterProfile, strategies: Sequence[str]) -> str:
    if {EXACT, AUTO}.isdisjoint(strategies) and _Planner(model, cluster).planned(AUTO) is not None:
        return f"{', '.join(strategies)}: no plan that fits the memory of the {len(cluster.devices)} workers; auto finds one"
    return what_is_missing(model, cluster)


class _Planner:
    """Plans of one model on one cluster; what several strategies need is done once."""

    def __init__(self, model: ModelProfile, cluster: ClusterProfile) -> None:
        self._model, self._cluster = model, cluster
        self._tables = tables.build(model, cluster)
        self._capacity = Capacity.of(model, cluster, self._tables)
        self._bound_s = bounds.bound_s(self._tables, self._capacity, has_replicas=cluster.pairs is None)
        self._layouts: dict[str, Layout | None] = {}
        self._is_best = False  # the plan of auto is proven to be

    def planned(self, strategy: str) -> Planned | None:
        layout = self.layout(strategy)
        if layout is None or not fits(self._model, self._cluster, layout):
            return None
        judged = forecast(self._model, self._cluster, layout)
        is_optimal = (strategy == AUTO and self._is_best) or judged.bottleneck_s <= self._bound_s * (1 + TOLERANCE)
        return Planned(strategy, layout, judged, min(self._bound_s, judged.bottleneck_s), is_optimal)

    def layout(self, strategy: str) -> Layout | None:
        """Found once."""
        if strategy not in self._layouts:
            makers = BASELINES | {EXACT: self._exact, AUTO: self._auto}
            self._layouts[strategy] = makers[strategy](self._model, self._cluster)
        return self._layouts[strategy]

    def _judge(self, layout: Layout) -> tuple[float, float]:
        judged = forecast(self._model, self._cluster, layout)
        return judged.bottleneck_s, judged.latency_s

    def _better(self, layouts: Sequence[Layout | None]) -> Layout | None:
        """The smallest bottleneck; of those that are nearly as small the smallest latency."""
        scores = [(layout, *self._judge(layout)) for layout in layouts if layout is not None and fits(self._model, self._cluster, layout)]
        if not scores:
            return None
        best_s = min(score[1] for score in scores)
        return min((score for score in scores if score[1] <= best_s * (1 + TOLERANCE)), key=lambda score: score[2])[0]

    # ── exact ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _exact(self, model: ModelProfile, cluster: ClusterProfile) -> Layout | None:
        """One device per stage: by counting classes where that can be done, else by searching pairs."""
        if exact.work(self._tables) <= exact.WORK_LIMIT:
            layout = exact.solve(self._tables, below_s=self._known_s(), capacity=self._capacity)
            if layout is not None and cluster.pairs is not None:
                self._bound_s = max(self._bound_s, self._judge(layout)[0])
            return layout
        found = pairwise.search(self._tables)
        if cluster.pairs is not None:  # in a star, replicas may be faster than any pipeline
            self._bound_s = max(self._bound_s, found.bound_s)
        return found.layout

    def _known_s(self) -> float:
        """A bottleneck that pipelines reach, found quickly."""
        layouts = [BASELINES[name](self._model, self._cluster) for name in ("greedy", "dp")]
        known = [self._judge(layout)[0] for layout in layouts if layout is not None]
        if self._cluster.pairs is None:
            found, _ = replicas.by_orders(self._tables, self._orders(), longest=1)
            known += [self._judge(found)[0]] if found is not None else []
        return min(known, default=math.inf)

    # ── auto ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _auto(self, model: ModelProfile, cluster: ClusterProfile) -> Layout | None:
        layouts = [self.layout(name) for name in (*BASELINES, EXACT)]
        best = self._better(layouts)
        if cluster.pairs is not None:
            self._is_best = best is not None and exact.work(self._tables) <= exact.WORK_LIMIT
            return best
        best = self._better([best, *self._replicated(best)])
        if best is None:
            return None
        costs, is_whole = self._tables, replicas.work(self._tables) <= replicas.WORK_LIMIT
        if not is_whole:
            costs = self._tables.only(replicas.representatives(self._tables, best))
        improved, _, is_best = replicas.improve(costs, best, self._judge(best)[0], self._bound_s, self._capacity)
        self._is_best = is_best and is_whole
        return self._better([best, improved])

    def _replicated(self, best: Layout | None) -> Iterator[Layout | None]:
        below_s = math.inf if best is None else self._judge(best)[0]
        orders = self._orders()
        found, below_s = replicas.by_orders(self._tables, orders, below_s=below_s)
        yield found
        if math.isfinite(self._cluster.port_bytes_per_s):
            inside = range(1, len(self._model.layers))
            cheapest = sorted(inside, key=lambda boundary: self._model.crossing_bytes[boundary])
            for count in FEW_CUTS:
                few = tables.build(self._model, self._cluster, boundaries=cheapest[:count])
                yield replicas.by_orders(few, orders[:4], below_s=below_s)[0]

    def _orders(self) -> list[Sequence[int]]:
        draw = random.Random(0)
        devices = range(len(self._cluster.devices))
        return replicas.likely_orders(self._tables, iter(lambda: draw.sample(devices, len(devices)), None))


# ── for the runtime ──────────────────────────────────────────────────────────────────────────────────────────────────


def positions(model: ModelProfile, layout: Layout) -> list[int]:
    """Where the program is cut: positions among its operators, as `models.cut.write_stages` takes them."""
    return [model.layers[stage.end - 1].end for stage in layout.stages[:-1]]


def to_plan(
    model: ModelProfile, cluster: ClusterProfile, layout: Layout, *, program: Digest, artifacts: Sequence[Digest], epoch: Epoch
) -> Plan:
    """A layout in the form in which the runtime has plans; devices' names are the workers' ids.

    Args:
        artifacts: of each stage, as they have been written for `positions`.
    """
    needs = [
        StageNeed(
            artifact=artifact,
            memory_bytes=model.memory_bytes(stage.begin, stage.end),
            cost_s=model.seconds_before[stage.end] - model.seconds_before[stage.begin],
        )
        for stage, artifact in zip(layout.stages, artifacts, strict=True)
    ]
    places = tuple(tuple(WorkerId(cluster.devices[device].name) for device in stage.devices) for stage in layout.stages)
    return Plan(program=program, epoch=epoch, stages=tuple(needs), places=places)
