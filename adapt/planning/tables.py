"""The costs of all possible stages as arrays, for the solvers. `cost.forecast` says the same of one layout, in plain words.

A node is a boundary of the model together with a codec for what crosses it; a stage leads from one node to a later one. Codecs that are
nowhere better than another at their boundary are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from adapt.planning.devices import ClusterProfile, DeviceProfile
from adapt.planning.model import ModelProfile

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

ROUNDING = 1e-12  # two sums of the same numbers in another order differ by less, as a share


@dataclass(frozen=True, slots=True)
class Tables:
    """Costs in seconds per request; infinite where a stage cannot be.

    Attributes:
        boundaries, codecs: of each node, boundaries rising.
        members: the devices of each class.
        times: [class][node, node], the time of a device for a stage.
        latencies: [class][node, node].
        links: [class, class, node], the time of the link from one class to the other in a direct network; zeros in a star.
        port_s: [node], of the dispatcher's port.
    """

    boundaries: Ints
    codecs: Ints
    members: tuple[tuple[int, ...], ...]
    times: Floats
    latencies: Floats
    links: Floats
    port_s: Floats
    is_star: bool

    @property
    def starts(self) -> Ints:
        return np.flatnonzero(self.boundaries == 0)

    @property
    def ends(self) -> Ints:
        return np.flatnonzero(self.boundaries == self.boundaries[-1])

    def only(self, nodes: Ints) -> Tables:
        """With these nodes alone."""
        among = np.ix_(np.arange(len(self.members)), nodes, nodes)
        return replace(
            self,
            boundaries=self.boundaries[nodes],
            codecs=self.codecs[nodes],
            times=self.times[among],
            latencies=self.latencies[among],
            links=self.links[:, :, nodes],
            port_s=self.port_s[nodes],
        )

    def class_of(self, device: int) -> int:
        return next(number for number, members in enumerate(self.members) if device in members)

    def limited(self, limit_s: float) -> Tables:
        """Without stages and links that take longer."""
        allowed = self.times <= limit_s
        return replace(
            self,
            times=np.where(allowed, self.times, np.inf),
            latencies=np.where(allowed, self.latencies, np.inf),
            links=np.where(self.links <= limit_s, self.links, np.inf),
        )


def build(model: ModelProfile, cluster: ClusterProfile, *, boundaries: Sequence[int] | None = None) -> Tables:
    """Args: boundaries: the only ones that may be cut at, besides both ends."""
    allowed = range(len(model.layers) + 1) if boundaries is None else sorted({0, *boundaries, len(model.layers)})
    nodes = [(boundary, codec) for boundary in allowed for codec in _useful_codecs(model, boundary)]
    at = np.array([boundary for boundary, _ in nodes])
    memory = memory_bytes(model)[np.ix_(at, at)]
    wire = np.array([model.wire_bytes(*node) for node in nodes])
    decode_s = np.array([model.decode_s(*node) for node in nodes])
    encode_s = np.array([model.encode_s(*node) for node in nodes])
    profiles = [group.profile for group in cluster.classes]
    parts = [_class_tables(model, cluster, profile, at, memory, wire, decode_s, encode_s) for profile in profiles]
    return Tables(
        boundaries=at,
        codecs=np.array([codec for _, codec in nodes]),
        members=tuple(group.members for group in cluster.classes),
        times=np.stack([times for times, _ in parts]),
        latencies=np.stack([latencies for _, latencies in parts]),
        links=_links(cluster, wire, at, len(model.layers)),
        port_s=wire / cluster.port_bytes_per_s if cluster.pairs is None else np.zeros(len(nodes)),
        is_star=cluster.pairs is None,
    )


def _useful_codecs(model: ModelProfile, boundary: int) -> list[int]:
    """Without those that another beats, or equals and comes before, in bytes and in both directions' seconds."""
    costs = [
        (model.wire_bytes(boundary, codec), model.encode_s(boundary, codec), model.decode_s(boundary, codec), codec)
        for codec in range(len(model.codecs))
    ]

    def is_beaten(mine: tuple[float, float, float, int]) -> bool:
        return any(
            all(a <= b for a, b in zip(other, mine, strict=True)) for other in costs if other is not mine and other[:3] != mine[:3]
        ) or any(other[:3] == mine[:3] and other[3] < mine[3] for other in costs)

    return [cost[3] for cost in costs if not is_beaten(cost)]


def memory_bytes(model: ModelProfile) -> Floats:
    """[begin, end] bytes of a stage, infinite for one without layers; as `ModelProfile.memory_bytes`."""
    count = len(model.layers)
    weights = np.array(model.weights_before, float)
    crossing = np.array(model.crossing_bytes, float)
    running = np.full((count + 1, count + 1), np.inf)
    for begin in range(count):
        running[begin, begin + 1 :] = np.maximum.accumulate([layer.running_bytes for layer in model.layers[begin:]])
    memory: Floats = weights[None, :] - weights[:, None] + np.maximum(running, crossing[:, None] + crossing[None, :])
    return memory


def _class_tables(
    model: ModelProfile,
    cluster: ClusterProfile,
    profile: DeviceProfile,
    at: Ints,
    memory: Floats,
    wire: Floats,
    decode_s: Floats,
    encode_s: Floats,
) -> tuple[Floats, Floats]:
    before_s = np.concatenate([[0.0], np.cumsum(profile.layer_costs_s(model))])[at]
    cpu_s = before_s[None, :] - before_s[:, None] + (decode_s[:, None] + encode_s[None, :]) / profile.speed
    cpu_s += profile.handling.task_s + profile.handling.byte_s * (wire[:, None] + wire[None, :])
    down_s, up_s = wire / profile.down_bytes_per_s, wire / profile.up_bytes_per_s
    if cluster.pairs is not None:
        down_s, up_s = np.where(at == 0, down_s, 0.0), np.where(at == len(model.layers), up_s, 0.0)
    is_possible = memory <= (np.inf if profile.budget_bytes is None else profile.budget_bytes)
    is_possible &= at[None, :] > at[:, None]
    latencies = cpu_s + down_s[:, None] + up_s[None, :] + 2 * profile.latency_s
    busy = np.maximum(np.maximum(cpu_s, down_s[:, None]), up_s[None, :]) if cluster.is_overlapped else latencies
    return np.where(is_possible, busy, np.inf), np.where(is_possible, latencies, np.inf)


def _links(cluster: ClusterProfile, wire: Floats, at: Ints, layers: int) -> Floats:
    classes = cluster.classes
    links = np.zeros((len(classes), len(classes), len(wire)))
    if cluster.pairs is None:
        return links
    for a, sender in enumerate(classes):
        for b, receiver in enumerate(classes):
            pair = (sender.members[0], receiver.members[0] if a != b else sender.members[-1])
            rate = cluster.pairs[pair[0]][pair[1]] if pair[0] != pair[1] else np.inf
            links[a, b] = np.where((at > 0) & (at < layers), wire / rate, 0.0)
    return links
