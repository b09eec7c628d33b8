"""What planning knows about devices and their links. Rates are bytes per second, infinite where nothing limits them.

Two shapes of network:

star     every activation goes to the dispatcher and on to the next worker, as in ADAPT. What counts of a device is its own link, in both
         directions; the dispatcher has one too, its port, which all activations share.
direct   a worker sends to the next one; each pair has its own rate. The shape of DEFER, SEIFER and PipeEdge, and of their published settings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from adapt.planning.model import NO_HANDLING, Handling, ModelProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProfile:
    """One worker.

    Attributes:
        speed: times that of the reference device.
        budget_bytes: stage budget; None: no limit.
        down_bytes_per_s, up_bytes_per_s: received and sent.
        latency_s: added to each direction.
        costs_s: seconds of each layer where they were measured on this kind of device; instead of reference seconds over speed.
        handling: what each task takes besides, in seconds of this device.
    """

    name: str
    speed: float = 1.0
    budget_bytes: int | None = None
    down_bytes_per_s: float = math.inf
    up_bytes_per_s: float = math.inf
    latency_s: float = 0.0
    costs_s: tuple[float, ...] | None = None
    handling: Handling = NO_HANDLING

    def layer_costs_s(self, model: ModelProfile) -> tuple[float, ...]:
        return self.costs_s or tuple(layer.cost_s / self.speed for layer in model.layers)

    def has_room(self, memory_bytes: float) -> bool:
        return self.budget_bytes is None or memory_bytes <= self.budget_bytes


@dataclass(frozen=True, slots=True)
class DeviceClass:
    """Devices that planning need not tell apart. `members`: their numbers, rising."""

    profile: DeviceProfile
    members: tuple[int, ...]


@dataclass(frozen=True)
class ClusterProfile:
    """The workers and what connects them.

    Attributes:
        pairs: [sender][receiver], the rates of a direct network; None: a star.
        port_bytes_per_s: of the dispatcher in a star, the slower of its two directions.
        is_overlapped: receiving, computing and sending go on at once for different requests.
    """

    devices: tuple[DeviceProfile, ...]
    pairs: tuple[tuple[float, ...], ...] | None = None
    port_bytes_per_s: float = math.inf
    is_overlapped: bool = True

    def __post_init__(self) -> None:
        if not self.is_overlapped and self.pairs is not None:
            raise ValueError("a direct network is planned with overlap only")

    @cached_property
    def classes(self) -> tuple[DeviceClass, ...]:
        """Devices that may change places without changing any plan, in the order of their first member."""
        found: list[list[int]] = []
        for number in range(len(self.devices)):
            for members in found:
                if self._are_alike(members[0], number):
                    members.append(number)
                    break
            else:
                found.append([number])
        return tuple(DeviceClass(self.devices[members[0]], tuple(members)) for members in found)

    def _are_alike(self, a: int, b: int) -> bool:
        if replace(self.devices[a], name="") != replace(self.devices[b], name=""):
            return False
        if self.pairs is None:
            return True
        others = [number for number in range(len(self.devices)) if number not in (a, b)]
        from_alike = all(self.pairs[a][other] == self.pairs[b][other] for other in others)
        to_alike = all(self.pairs[other][a] == self.pairs[other][b] for other in others)
        return from_alike and to_alike and self.pairs[a][b] == self.pairs[b][a]

    def rate(self, sender: int, receiver: int) -> float:
        """From one worker to another, in a star by way of the dispatcher."""
        if self.pairs is not None:
            return self.pairs[sender][receiver]
        return min(self.devices[sender].up_bytes_per_s, self.devices[receiver].down_bytes_per_s, self.port_bytes_per_s)

    def with_more(self, like: DeviceProfile, count: int) -> ClusterProfile:
        """What if there were `count` more of these? Of a star only: nobody knows what rates they would have to the others."""
        if self.pairs is not None:
            raise ValueError("only a star can be asked what more devices would bring")
        taken = {device.name for device in self.devices}
        names = (f"{like.name}+{number}" for number in range(1, len(taken) + count + 1))
        new = [replace(like, name=name) for name in names if name not in taken][:count]
        return replace(self, devices=(*self.devices, *new))

    def coarse(self, whole_bytes: int) -> ClusterProfile:
        """The same devices, those nearly alike made alike: speeds to the nearest of four steps between doublings, rates and latencies to
        doublings, budgets down to a sixteenth of what the whole model needs, and without limit from there on. A plan that fits this one fits
        the devices as they are."""
        return replace(self, devices=tuple(_coarse(device, whole_bytes) for device in self.devices))

    def without(self, name: str) -> ClusterProfile:
        """What if this device of a star were not there?"""
        if self.pairs is not None:
            raise ValueError("only a star can be asked what fewer devices would mean")
        return replace(self, devices=tuple(device for device in self.devices if device.name != name))


def _coarse(device: DeviceProfile, whole_bytes: int) -> DeviceProfile:
    speed = 2.0 ** (round(math.log2(device.speed) * 4) / 4)
    budget_bytes = device.budget_bytes
    if budget_bytes is not None:
        step = max(whole_bytes // 16, 1)
        budget_bytes = None if budget_bytes >= whole_bytes else budget_bytes // step * step
    return replace(
        device,
        speed=speed,
        budget_bytes=budget_bytes,
        down_bytes_per_s=_doubling(device.down_bytes_per_s),
        up_bytes_per_s=_doubling(device.up_bytes_per_s),
        latency_s=_doubling(device.latency_s),
    )


def _doubling(value: float) -> float:
    return 2.0 ** round(math.log2(value)) if 0 < value < math.inf else value


def between_ports(devices: Sequence[DeviceProfile]) -> tuple[tuple[float, ...], ...]:
    """The rates of a direct network in which a pair has the slower of its two devices' rates, as PipeEdge has it (2110.14895)."""
    return tuple(tuple(math.inf if a is b else min(a.up_bytes_per_s, b.down_bytes_per_s) for b in devices) for a in devices)
