"""A cluster's description as the planner sees it."""

from __future__ import annotations

import math

from adapt.emulation.facts import cluster_profile
from adapt.emulation.parse import load, parse


def test_workers_in_a_star():
    cluster = cluster_profile(load("mixed4"))
    assert [(device.name, device.speed) for device in cluster.devices] == [
        ("odroid-1", 0.25),
        ("odroid-2", 0.25),
        ("pi", 0.2),
        ("jetson", 0.8),
    ]
    assert len(cluster.classes) == 3 and cluster.pairs is None and cluster.port_bytes_per_s == math.inf
    assert cluster.devices[0].up_bytes_per_s == 100e6 / 8


def test_the_dispatchers_device_has_a_port_and_no_worker():
    cluster = cluster_profile(load("pi3"))
    assert [device.name for device in cluster.devices] == ["pi-1", "pi-2"]
    assert cluster.port_bytes_per_s == 100e6 / 8


def test_in_an_area_the_link_to_the_dispatcher_counts():
    spec = load("seifer-5")
    rates = {link.between: link.bytes_per_s for link in spec.links}
    for device in cluster_profile(spec).devices:
        assert device.down_bytes_per_s == device.up_bytes_per_s == rates["edge-1", device.name]


def test_absent_ones_do_not_count_and_a_worker_beside_the_dispatcher_has_no_link():
    spec = parse(
        """
dispatcher = "front"
[[device]]
name = "front"
cores = 2
threads = 2
rate = "10 Mbit/s"
[[device]]
name = "late"
present = false
[[device]]
name = "pi"
cores = 2
latency = "1 ms"
""",
        name="x.toml",
    )
    front, pi = cluster_profile(spec).devices
    assert (front.speed, front.up_bytes_per_s, front.latency_s) == (2.0, math.inf, 0.0)
    assert (pi.name, pi.speed, pi.latency_s) == ("pi", 1.0, 0.001)
