"""What people do without a planner: one device, all devices alike, equal stages, chance, and one step after the other."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

from adapt.planning.cost import Layout, StageLayout, compute_s, fits, forecast
from adapt.planning.devices import ClusterProfile
from adapt.planning.model import ModelProfile

TRIES = 200  # of chance


def single(model: ModelProfile, cluster: ClusterProfile) -> Layout | None:
    """The whole model on the device that is fastest with it."""
    layers = len(model.layers)
    return _best(model, cluster, [pipeline([0, layers], [device]) for device in range(len(cluster.devices))])


def data_parallel(model: ModelProfile, cluster: ClusterProfile) -> Layout | None:
    """The whole model on every device that has room for it."""
    layers = len(model.layers)
    roomy = [number for number, device in enumerate(cluster.devices) if device.has_room(model.memory_bytes(0, layers))]
    if not roomy or cluster.pairs is not None:
        return single(model, cluster)
    return Layout((StageLayout(0, layers, tuple(roomy)),), (0, 0))


def equal(model: ModelProfile, cluster: ClusterProfile) -> Layout | None:
    """As many stages as devices, of equal seconds as far as cuts allow, on the devices in their order. How DEFER is used (2201.06769)."""
    count = min(len(cluster.devices), len(model.layers))
    total_s = model.seconds_before[-1]
    cuts = [0]
    for stage in range(1, count):
        choices = range(cuts[-1] + 1, len(model.layers) - (count - stage) + 1)
        cuts.append(min(choices, key=lambda cut: abs(model.seconds_before[cut] - total_s * stage / count)))
    return _fitting(model, cluster, pipeline([*cuts, len(model.layers)], range(count)))


def random_plan(model: ModelProfile, cluster: ClusterProfile, *, seed: int = 0) -> Layout | None:
    """The first plan by chance that fits: any number of stages, any cuts, any devices. The baseline of SEIFER (2210.12218)."""
    draw = random.Random(seed)
    for _ in range(TRIES):
        count = draw.randint(1, min(len(cluster.devices), len(model.layers)))
        cuts = sorted(draw.sample(range(1, len(model.layers)), count - 1))
        devices = draw.sample(range(len(cluster.devices)), count)
        layout = pipeline([0, *cuts, len(model.layers)], devices)
        if fits(model, cluster, layout):
            return layout
    return None


def greedy(model: ModelProfile, cluster: ClusterProfile) -> Layout | None:
    """One stage after the other, the best of all beginnings.

    In a direct network the next device is the one with the best link to the last, and it takes all the layers that it has room for: SEIFER's
    joint greedy baseline, towards the highest rate (its published code walks to the lowest). In a star the fastest device comes first, and
    takes the layers that are its share of the speed.
    """
    if cluster.pairs is None:
        speeds = [1.0 / max(compute_s(model, device, 0, len(model.layers)), 1e-12) for device in cluster.devices]
        order = sorted(range(len(speeds)), key=lambda number: -speeds[number])
        shares = [(order[:count], [speeds[number] for number in order[:count]]) for count in range(1, len(order) + 1)]
        return _best(model, cluster, [_by_share(model, cluster, devices, speed) for devices, speed in shares])
    return _best(model, cluster, [_to_nearest(model, cluster, first) for first in range(len(cluster.devices))])


def _by_share(model: ModelProfile, cluster: ClusterProfile, devices: Sequence[int], speeds: Sequence[float]) -> Layout | None:
    """Each device goes on until its share of all seconds is reached, or its memory is full; the last ones may have nothing to do."""
    boundaries, used, reached = [0], list[int](), 0.0
    for device, speed in zip(devices, speeds, strict=True):
        begin = boundaries[-1]
        if begin == len(model.layers):
            break
        reached += speed / sum(speeds)
        end = begin
        while end < len(model.layers) and cluster.devices[device].has_room(model.memory_bytes(begin, end + 1)):
            if end > begin and model.seconds_before[end] >= reached * model.seconds_before[-1] * (1 - 1e-9):
                break
            end += 1
        if end > begin:
            boundaries.append(end)
            used.append(device)
    return pipeline(boundaries, used) if boundaries[-1] == len(model.layers) else None


def _to_nearest(model: ModelProfile, cluster: ClusterProfile, first: int) -> Layout | None:
    boundaries, used = [0], [first]
    while True:
        begin, device = boundaries[-1], cluster.devices[used[-1]]
        ends = [end for end in range(begin + 1, len(model.layers) + 1) if device.has_room(model.memory_bytes(begin, end))]
        if not ends:
            return None
        boundaries.append(ends[-1])
        if ends[-1] == len(model.layers):
            return pipeline(boundaries, used)
        left = [number for number in range(len(cluster.devices)) if number not in used]
        if not left:
            return None
        used.append(max(left, key=lambda number: cluster.rate(used[-1], number)))


def pipeline(boundaries: Sequence[int], devices: Sequence[int]) -> Layout:
    """One device for each stage, and the first codec everywhere."""
    stages = tuple(StageLayout(begin, end, (device,)) for (begin, end), device in zip(pairwise(boundaries), devices, strict=True))
    return Layout(stages, (0,) * len(boundaries))


def _fitting(model: ModelProfile, cluster: ClusterProfile, layout: Layout) -> Layout | None:
    return layout if fits(model, cluster, layout) else None


def _best(model: ModelProfile, cluster: ClusterProfile, layouts: Sequence[Layout | None]) -> Layout | None:
    fitting = [layout for layout in layouts if layout is not None and fits(model, cluster, layout)]
    return min(fitting, key=lambda layout: forecast(model, cluster, layout).bottleneck_s, default=None)
