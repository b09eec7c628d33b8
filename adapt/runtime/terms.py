"""What a deployment is planned by: its program as the planner sees it, and the workers as they are now. Nothing here writes anything.

A worker without a profile is as fast as it has proved to be, at first as fast as who exported the model.
"""

from __future__ import annotations

import contextlib
import logging
import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Self

from adapt.errors import PlanError
from adapt.models.layers import layer_costs_s, with_workspace
from adapt.planning import choose
from adapt.planning.cost import Layout, StageLayout
from adapt.planning.devices import ClusterProfile, DeviceProfile
from adapt.planning.model import ModelProfile
from adapt.planning.placement import WorkerOffer, apart
from adapt.planning.replanning import bottleneck_s
from adapt.protocol.ids import WorkerId
from adapt.runtime.profiles import KnownCosts
from adapt.scheduling.links import Link

log = logging.getLogger(__name__)

HEADER_BYTES = 256 << 10  # of a stage's file, beside its weights, at most
MANY_KINDS = 5  # of workers; with more, planning takes more than a second or two
PROFILE_HOLDS = 1.5  # a worker that has proved to be slower, or faster, than its kind by more than this is taken as it is
LEAST_LAYER_S = 1e-9  # no layer takes less; plans divide by it
MOST_RATIO = 1e3  # of a worker's seconds to what they should be, either way; more is not believed
NO_LIMIT_BYTES_PER_S = 200e6  # of a link; what is faster, as within one machine, costs processor time and no more
NO_LATENCY_S = 2e-3  # what is less is the loops' own


@dataclass(frozen=True, slots=True)
class Proposal:
    """Where to cut a program, as positions among its operators, and the workers of each stage."""

    positions: tuple[int, ...]
    places: tuple[tuple[WorkerId, ...], ...]


@dataclass(frozen=True, slots=True)
class Terms:
    """See the head of this file."""

    model: ModelProfile
    measured: Mapping[WorkerId, KnownCosts]  # seconds of each layer, on workers of whose kind they are known
    links: Mapping[WorkerId, Link]

    @classmethod
    def of(cls, model: ModelProfile, known: Mapping[WorkerId, KnownCosts], links: Mapping[WorkerId, Link]) -> Self:
        """`known`: what the program takes on these workers, operator by operator."""
        measured = {
            worker: KnownCosts(tuple(max(cost, LEAST_LAYER_S) for cost in layer_costs_s(model, costs.costs_s)), costs.handling)
            for worker, costs in known.items()
        }
        workspace = {costs.workspace_bytes for costs in known.values() if costs.workspace_bytes is not None}
        return cls(with_workspace(model, workspace), measured, links)

    def best(self, offers: Sequence[WorkerOffer], *, exact: bool) -> Proposal:
        """What should be fastest in the memory that is offered. May take seconds. Raises PlanError: what is missing.

        The kernels' workspace is counted unless nothing fits then: it is the most that any device has told of, and need not be what it takes
        on this one."""
        groups = apart(offers) if exact else [offers]
        try:
            group, layout = _first_that_fits(self.model, groups, self._device)
        except PlanError as error:
            if not any(layer.workspace_bytes for layer in self.model.layers):
                raise
            group, layout = _first_that_fits(self.model.without_workspace(), groups, self._device)
            log.info("planned without the kernels' workspace", extra={"model": self.model.name, "reason": str(error)})
        places = tuple(tuple(sorted(group[index].worker_id for index in stage.devices)) for stage in layout.stages)
        return Proposal(tuple(choose.positions(self.model, layout)), places)

    def seconds(self, offers: Sequence[WorkerOffer], proposal: Proposal) -> float:
        """Per request, of the busiest of the workers that are there, whatever their memory; infinite: a stage has none of them."""
        number = {offer.worker_id: index for index, offer in enumerate(offers)}
        devices = [tuple(number[worker] for worker in place if worker in number) for place in proposal.places]
        ends = [layer.end for layer in self.model.layers]
        boundaries = [0, *(1 + bisect_left(ends, position) for position in proposal.positions), len(ends)]
        stages = [StageLayout(begin, end, place) for (begin, end), place in zip(pairwise(boundaries), devices, strict=True)]
        return bottleneck_s(self.model, ClusterProfile(tuple(map(self._device, offers))), stages)

    def _device(self, offer: WorkerOffer) -> DeviceProfile:
        return _linked(_device(offer, self.model, self.measured.get(offer.worker_id)), self.links.get(offer.worker_id))


def _first_that_fits(
    model: ModelProfile, groups: Sequence[Sequence[WorkerOffer]], device: Callable[[WorkerOffer], DeviceProfile]
) -> tuple[Sequence[WorkerOffer], Layout]:
    """A group of workers that can hold the model, and the best plan for it. Raises PlanError: what the first lacks."""
    errors = []
    for group in groups:
        try:
            return group, _best_layout(model, ClusterProfile(tuple(device(offer) for offer in group)))
        except PlanError as error:
            errors.append(error)
    raise errors[0]


def _best_layout(model: ModelProfile, cluster: ClusterProfile) -> Layout:
    """Of very many kinds of workers, planning takes long; those that differ little are then taken to be alike, if there is a plan for that."""
    if len(cluster.classes) > MANY_KINDS:
        with contextlib.suppress(PlanError):
            return choose.plan(model, cluster.coarse(model.memory_bytes(0, len(model.layers)))).layout
    return choose.plan(model, cluster).layout


def _linked(device: DeviceProfile, link: Link | None) -> DeviceProfile:
    """In steps, so that links that are alike stay alike."""
    if link is None:
        return device
    down, up = (math.inf if rate > NO_LIMIT_BYTES_PER_S else _stepped(rate) for rate in (link.down_bytes_per_s, link.up_bytes_per_s))
    latency_s = _stepped(link.latency_s) if link.latency_s > NO_LATENCY_S else 0.0
    return replace(device, down_bytes_per_s=down, up_bytes_per_s=up, latency_s=latency_s)


def _stepped(value: float) -> float:
    """The nearest of four steps between doublings."""
    return math.exp2(round(math.log2(value) * 4) / 4)


def _device(offer: WorkerOffer, model: ModelProfile, measured: KnownCosts | None) -> DeviceProfile:
    """`measured`: seconds of each layer."""
    budget_bytes = max(offer.free_bytes - HEADER_BYTES, 0)
    if measured is None:
        return DeviceProfile(name=offer.worker_id, speed=1.0 / _believed(offer.slowness), budget_bytes=budget_bytes)
    costs_s = measured.costs_s
    usual = sum(costs_s) / model.seconds_before[-1] if model.seconds_before[-1] > 0 else 1.0
    drift = _believed(offer.slowness / usual) if offer.slowness != 1.0 and usual > 0 else 1.0  # 1: it has done nothing yet
    if 1 / PROFILE_HOLDS < drift < PROFILE_HOLDS:
        drift = 1.0
    drift = _stepped(drift)  # so that workers that are alike stay alike
    costs_s = costs_s if drift == 1.0 else tuple(cost * drift for cost in costs_s)
    return DeviceProfile(
        name=offer.worker_id,
        speed=1.0 / (usual * drift or 1.0),
        budget_bytes=budget_bytes,
        costs_s=costs_s,
        handling=measured.handling.times(drift),
    )


def _believed(ratio: float) -> float:
    """A worker may say what it likes of its seconds; plans have to go on."""
    return min(max(ratio, 1 / MOST_RATIO), MOST_RATIO)
