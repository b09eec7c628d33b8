"""What a plan costs: the time that each device and link needs per request, memory, and what follows from them.

    throughput = 1 / bottleneck,   bottleneck = the largest busy time per request over all devices and links      (DESIGN.md, section 6)

A device of a stage needs, for one request,

    star, overlapped       max(cpu,  received / down,  sent / up)            cpu = decode + compute + encode + handling
    star, not overlapped   cpu + received / down + sent / up + both latencies
    direct                 cpu;  the link to the next device has its own time, sent / rate of the pair

Codecs, and the handling of a task and its bytes, use the CPU that computes: so it is where all threads of a worker share a core or a quota;
where other cores are idle, these do it meanwhile, and it takes a little less than predicted.

Replicas of a stage share its requests in proportion to their rates, which is the best they can do: a stage of devices that need t1, t2 ... has
the time 1 / (1/t1 + 1/t2 + ...). In a star all activations, the input and the output included, pass the dispatcher's port one after the
other. A device serves one stage at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from adapt.planning.devices import ClusterProfile, DeviceProfile
from adapt.planning.model import ModelProfile

PORT = "the dispatcher's port"


@dataclass(frozen=True, slots=True)
class StageLayout:
    """Layers `begin` to `end`, not including it, on the devices of these numbers."""

    begin: int
    end: int
    devices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """A whole plan: stages in order, and the number of the codec at each of their ends: before the first, ..., after the last."""

    stages: tuple[StageLayout, ...]
    codecs: tuple[int, ...]

    def with_devices(self, stage: int, devices: Sequence[int]) -> Layout:
        changed = replace(self.stages[stage], devices=tuple(devices))
        return replace(self, stages=(*self.stages[:stage], changed, *self.stages[stage + 1 :]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a layout will do.

    Attributes:
        where: the device or link that limits it, in words.
        latency_s: of a request that meets no other, on average over replicas.
        stage_s: time of each stage per request, its replicas together.
        busy_s: per request of the whole cluster, of each device that is used.
        memory_bytes: of each device that is used.
        shares: of the stage's requests, of each device that is used.
    """

    bottleneck_s: float
    where: str
    latency_s: float
    stage_s: tuple[float, ...]
    busy_s: dict[int, float]
    memory_bytes: dict[int, int]
    shares: dict[int, float]

    @property
    def throughput_per_s(self) -> float:
        return 1.0 / self.bottleneck_s if self.bottleneck_s else float("inf")


@dataclass(frozen=True, slots=True)
class _Times:
    """Of one device for one request of its stage, seconds."""

    cpu: float
    down: float
    up: float
    waits: float

    def busy(self, is_overlapped: bool) -> float:
        return max(self.cpu, self.down, self.up) if is_overlapped else self.total

    @property
    def total(self) -> float:
        return self.cpu + self.down + self.up + self.waits

    @property
    def largest(self) -> str:
        return max((self.cpu, "compute"), (self.down, "receiving"), (self.up, "sending"), key=lambda item: item[0])[1]


def fits(model: ModelProfile, cluster: ClusterProfile, layout: Layout) -> bool:
    """Whether every device has room for its stage."""
    return all(
        cluster.devices[device].has_room(model.memory_bytes(stage.begin, stage.end)) for stage in layout.stages for device in stage.devices
    )


def forecast(model: ModelProfile, cluster: ClusterProfile, layout: Layout) -> Forecast:
    """Raises ValueError: the layout does not run all layers in order, or uses a device twice."""
    _check(model, layout)
    limits: list[tuple[float, str]] = []
    stage_s: list[float] = []
    busy_s: dict[int, float] = {}
    shares: dict[int, float] = {}
    latency_s = 0.0
    for stage, (entering, leaving) in zip(layout.stages, pairwise(layout.codecs), strict=True):
        times = {device: _times(model, cluster, stage, device, entering, leaving) for device in stage.devices}
        busy = {device: time.busy(cluster.is_overlapped) for device, time in times.items()}
        together_s = _together(list(busy.values()))
        stage_s.append(together_s)
        for device, seconds in busy.items():
            shares[device] = together_s / seconds if seconds else 1.0 / len(busy)
            busy_s[device] = together_s
            latency_s += shares[device] * times[device].total
        slowest = max(times, key=lambda device: busy[device])
        limits.append((together_s, f"{_names(cluster, stage.devices)}: {times[slowest].largest}"))
    for seconds, words in _links(model, cluster, layout):
        limits.append((seconds, words))
        latency_s += seconds if cluster.pairs is not None else 0.0
    bottleneck_s, where = max(limits, key=lambda item: item[0])
    memory = {device: model.memory_bytes(stage.begin, stage.end) for stage in layout.stages for device in stage.devices}
    return Forecast(
        bottleneck_s=bottleneck_s,
        where=where,
        latency_s=latency_s,
        stage_s=tuple(stage_s),
        busy_s=busy_s,
        memory_bytes=memory,
        shares=shares,
    )


def busy_s(model: ModelProfile, cluster: ClusterProfile, stage: StageLayout, device: int) -> float:
    """Seconds that a request of the stage keeps one device busy, with the first codec of the model at both ends."""
    return _times(model, cluster, stage, device, 0, 0).busy(cluster.is_overlapped)


def _together(busy_s: Sequence[float]) -> float:
    return 0.0 if 0.0 in busy_s else 1.0 / sum(1.0 / seconds for seconds in busy_s)


def _times(model: ModelProfile, cluster: ClusterProfile, stage: StageLayout, number: int, entering: int, leaving: int) -> _Times:
    device = cluster.devices[number]
    coding_s = (model.decode_s(stage.begin, entering) + model.encode_s(stage.end, leaving)) / device.speed
    received, sent = model.wire_bytes(stage.begin, entering), model.wire_bytes(stage.end, leaving)
    handling_s = device.handling.task_s + device.handling.byte_s * (received + sent)
    down_s, up_s = received / device.down_bytes_per_s, sent / device.up_bytes_per_s
    if cluster.pairs is not None:  # only the ends of the model cross the devices' own links
        down_s, up_s = (down_s if stage.begin == 0 else 0.0), (up_s if stage.end == len(model.layers) else 0.0)
    return _Times(compute_s(model, device, stage.begin, stage.end) + coding_s + handling_s, down_s, up_s, 2 * device.latency_s)


def compute_s(model: ModelProfile, device: DeviceProfile, begin: int, end: int) -> float:
    """Of the layers from `begin` to `end`."""
    if device.costs_s is None:
        return (model.seconds_before[end] - model.seconds_before[begin]) / device.speed
    return sum(device.costs_s[begin:end])


def _links(model: ModelProfile, cluster: ClusterProfile, layout: Layout) -> list[tuple[float, str]]:
    boundaries = [0, *(stage.end for stage in layout.stages)]
    wire = [model.wire_bytes(boundary, codec) for boundary, codec in zip(boundaries, layout.codecs, strict=True)]
    if cluster.pairs is None:
        return [(sum(wire) / cluster.port_bytes_per_s, PORT)]
    links = []
    for (stage, following), sent in zip(pairwise(layout.stages), wire[1:-1], strict=True):
        if len(stage.devices) != 1 or len(following.devices) != 1:
            raise ValueError("a direct network has no replicas")
        sender, receiver = stage.devices[0], following.devices[0]
        words = f"{cluster.devices[sender].name} to {cluster.devices[receiver].name}"
        links.append((sent / cluster.pairs[sender][receiver], words))
    return links


def _names(cluster: ClusterProfile, devices: Sequence[int]) -> str:
    return "+".join(cluster.devices[device].name for device in devices)


def _check(model: ModelProfile, layout: Layout) -> None:
    ends = [0, *(stage.end for stage in layout.stages)]
    used = [device for stage in layout.stages for device in stage.devices]
    is_whole = [stage.begin for stage in layout.stages] == ends[:-1] and ends[-1] == len(model.layers)
    if not is_whole or any(stage.begin >= stage.end or not stage.devices for stage in layout.stages):
        raise ValueError(
            f"stages {[(stage.begin, stage.end) for stage in layout.stages]}: expected all {len(model.layers)} layers in order"
        )
    if len(set(used)) < len(used) or len(layout.codecs) != len(ends):
        raise ValueError("a device serves one stage at most, and each end of a stage has one codec")
