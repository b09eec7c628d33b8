"""When a plan is worth giving up for a better one, as workers and links have changed since it was made.

    what is measured ──Figures: held until it has moved──▶ seconds of the present plan and of the best one
                                                             └─ Patience: the best is better twice in a row ──▶ change

Everything is judged by one measure, seconds of the bottleneck, and a plan is left only for one that is better by more than `WORTH`. So as
long as nothing changes each plan is better than the one before, none comes back, and there is an end to it. Noise does not get so far: a
figure counts as it was until it has moved by more than `HOLDS`, and a worker as its kind unless it is off by more than `ALIKE`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from statistics import median_low
from typing import Generic, TypeVar

from adapt.planning.cost import StageLayout, busy_s
from adapt.planning.devices import ClusterProfile
from adapt.planning.model import ModelProfile

WORTH = 0.1  # more requests per second, as a share, for which stages are loaded anew
HOLDS = 1.15  # a figure that has moved by less than this factor has not moved
ALIKE = 1.5  # workers of a kind that differ by less than this factor are alike
MOST_LOOKS = 64  # that a plan rests
SWEEPS = 30  # over all stages, to divide requests among workers that have several

Key = TypeVar("Key", bound=Hashable)
Proposal = TypeVar("Proposal")
Kind = TypeVar("Kind", bound=Hashable)


class Patience(Generic[Proposal]):
    """Of one deployment: whether to change its plan. What a look proposes has to be worth it at the next one too."""

    def __init__(self) -> None:
        self._before: Proposal | None = None
        self._resting = 0

    def rest(self, looks: int) -> None:
        """Look away so many times."""
        self._before, self._resting = None, looks

    @property
    def is_waiting(self) -> bool:
        """Whether the next look decides on what the last one proposed."""
        return self._before is not None

    def is_resting(self) -> bool:
        """To be asked once at each look."""
        self._resting = max(self._resting - 1, -1)
        return self._resting >= 0

    def look(self, present_s: float, best: Proposal | None, seconds: Callable[[Proposal], float]) -> Proposal | None:
        """The plan to change to now.

        Args:
            present_s: of the present plan's bottleneck; infinite: it can answer nothing.
            best: of all plans by what is known now; None: there is none.
            seconds: of any plan's bottleneck, by what is known now; infinite: it cannot be had any more.
        """
        before, self._before = self._before, None
        if best is None or not is_worth_it(present_s, seconds(best)):
            return None
        if before is not None and is_worth_it(present_s, seconds(before)):
            return best
        self._before = best
        return None


def looks_after(changes: int) -> int:
    """How long a plan rests that has been changed so often: each time longer, as what is measured under one plan may mislead about another."""
    return int(min(2 ** min(changes, 30), MOST_LOOKS)) if changes else 0


def gain(present_s: float, other_s: float) -> float:
    """How many more requests per second, as a share of those now."""
    if math.isinf(other_s):
        return -1.0
    return present_s / other_s - 1.0 if other_s > 0 else math.inf


def is_worth_it(present_s: float, other_s: float) -> bool:
    return gain(present_s, other_s) > WORTH


class Figures(Generic[Key]):
    """What was measured, as it counts: each figure is held until it has moved."""

    def __init__(self) -> None:
        self._held: dict[Key, float] = {}

    def hold(self, key: Key, value: float) -> float:
        """The figure to go by. `value`: as it is measured now, not negative."""
        held = self._held.get(key)
        if held is None or not held / HOLDS <= value <= held * HOLDS:
            self._held[key] = held = value
        return held


def as_their_kind(slowness: Mapping[Key, float], kinds: Mapping[Key, Kind]) -> dict[Key, float]:
    """The slowness of workers; those that are nearly as slow as most of their kind are as slow as these. Of an unknown kind each is alone."""
    usual: dict[Kind, float] = {}
    for kind in set(kinds.values()):
        known = [value for worker, value in slowness.items() if kinds.get(worker) == kind]
        if known:
            usual[kind] = median_low(known)

    def counted(worker: Key, value: float) -> float:
        middle = usual[kinds[worker]] if worker in kinds else value
        return middle if middle / ALIKE < value < middle * ALIKE else value

    return {worker: counted(worker, value) for worker, value in slowness.items()}


# ── the present plan, whatever has become of it ──────────────────────────────────────────────────────────────────────


def bottleneck_s(model: ModelProfile, cluster: ClusterProfile, stages: Sequence[StageLayout]) -> float:
    """Seconds per request that the busiest worker of a star needs, if requests are divided well; infinite: a stage has no worker.

    As `cost.forecast`, for plans in which a worker may have several stages, as it comes after losses: then stage after stage is divided so
    that its workers are equally busy with all they have, a few times over. Codecs are the first of the model.
    """
    if not all(stage.devices for stage in stages):
        return math.inf
    times = [{device: busy_s(model, cluster, stage, device) for device in stage.devices} for stage in stages]
    ends = [0, *(stage.end for stage in stages)]
    port_s = sum(model.wire_bytes(boundary, 0) for boundary in ends) / cluster.port_bytes_per_s
    return max(port_s, _divided(times))


def _divided(times: Sequence[Mapping[int, float]]) -> float:
    """Seconds per request of the busiest worker, from those of a whole request of each stage on each of its workers."""
    busy: dict[int, float] = {device: 0.0 for stage in times for device in stage}
    parts = [_level(stage, busy) for stage in times]
    for stage_parts in parts:
        for device, part_s in stage_parts.items():
            busy[device] += part_s
    if len(busy) == sum(len(stage) for stage in times):  # each worker has one stage
        return max(busy.values())
    for _ in range(SWEEPS):
        for number, stage in enumerate(times):
            for device, part_s in parts[number].items():
                busy[device] -= part_s
            parts[number] = _level(stage, busy)
            for device, part_s in parts[number].items():
                busy[device] += part_s
    return max(busy.values())


def _level(stage: Mapping[int, float], busy: Mapping[int, float]) -> dict[int, float]:
    """Seconds that each worker of a stage needs for its part of a request, so that they are equally busy, whatever else they do; who is
    busier than that by all else has no part."""
    order = sorted(stage, key=lambda device: (busy[device], device))
    rate = 0.0  # requests per second
    weighed = 0.0
    level = math.inf
    for count, device in enumerate(order, 1):
        seconds = max(stage[device], 1e-12)
        rate += 1.0 / seconds
        weighed += busy[device] / seconds
        level = (1.0 + weighed) / rate
        if count < len(order) and busy[order[count]] >= level:
            break
    return {device: max(level - busy[device], 0.0) for device in stage}
