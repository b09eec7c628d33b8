"""A cluster's description as the planner sees it: workers as the dispatcher can reach them."""

from __future__ import annotations

import math

from adapt.emulation.description import HOST, ClusterSpec, DeviceSpec
from adapt.planning.devices import ClusterProfile, DeviceProfile


def cluster_profile(spec: ClusterSpec) -> ClusterProfile:
    """The workers that are there from the beginning, in a star around the dispatcher.

    A device's speed is its CPU share, at most as many cores as its worker has threads; without a share it is one core. Links between workers
    do not count: everything goes through the dispatcher. The worker on its own device has no link at all.
    """
    hub = None if spec.dispatcher == HOST else spec.device(spec.dispatcher)
    workers = [device for device in spec.devices if device.has_worker and device.is_present]
    return ClusterProfile(
        tuple(_profile(spec, device, hub) for device in workers),
        port_bytes_per_s=math.inf if hub is None else min(_rate(hub.up_bytes_per_s), _rate(hub.down_bytes_per_s)),
    )


def _profile(spec: ClusterSpec, device: DeviceSpec, hub: DeviceSpec | None) -> DeviceProfile:
    speed = float(device.threads) if device.cores is None else min(device.cores, float(device.threads))
    if hub is device:
        return DeviceProfile(name=device.name, speed=speed, budget_bytes=device.memory_bytes)
    pairs = [link.bytes_per_s for link in spec.links if hub is not None and {*link.between} == {hub.name, device.name}]
    pair = min(pairs, default=math.inf)
    return DeviceProfile(
        name=device.name,
        speed=speed,
        budget_bytes=device.memory_bytes,
        down_bytes_per_s=min(_rate(device.down_bytes_per_s), pair),
        up_bytes_per_s=min(_rate(device.up_bytes_per_s), pair),
        latency_s=device.latency_s + (0.0 if hub is None else hub.latency_s),
    )


def _rate(bytes_per_s: float | None) -> float:
    return math.inf if bytes_per_s is None else bytes_per_s
