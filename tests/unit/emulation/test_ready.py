"""The clusters that come with ADAPT: each fits on a machine of two cores, and is what it says."""

from __future__ import annotations

import math

import pytest

from adapt.emulation import ready
from adapt.emulation.description import HOST
from adapt.emulation.parse import check_speed, load
from adapt.emulation.schedule import expand
from adapt.errors import ConfigError

NAMES = [*ready.FILES, *ready.AREAS]
MIB = 1 << 20


def shares(name):
    return [device.cores for device in load(name).devices if device.has_worker]


@pytest.mark.parametrize("name", NAMES)
def test_a_ready_cluster_fits_on_two_cores_and_says_what_it_is(name):
    spec = load(name)
    check_speed(spec, 2)
    assert spec.about == ready.names()[name]
    assert all(device.board and device.cores for device in spec.devices)
    assert all(device.memory_bytes for device in spec.devices if device.has_worker)
    assert expand(spec) == (), "mishaps are for the user to add"


def test_all_are_listed():
    assert list(ready.names()) == NAMES
    files = {path.name.removesuffix(".toml") for path in ready.resources.files("adapt.emulation").joinpath("clusters").iterdir()}
    assert files == set(ready.FILES)


def test_the_clusters_have_the_devices_of_the_published_runs():
    assert shares("defer8") == [0.2] * 8
    assert len(shares("pi3")) == 2
    assert load("pi3").dispatcher == "front"
    assert [len(shares(f"adapt{count}")) for count in (1, 4, 8)] == [1, 4, 8]
    assert load("adapt8").dispatcher == HOST


def test_a_device_of_the_first_adapt_is_as_fast_on_average_however_many_there_are():
    assert [sum(shares(f"adapt{count}")) / count for count in (1, 4, 8)] == pytest.approx([0.2] * 3)


def test_the_boards_of_the_mixed_cluster_are_as_fast_as_measured():
    milliseconds = {"pi": (46.28, 60.74, 32.91), "odroid-1": (35.73, 54.17, 25.75), "jetson": (9.03, 15.39, 10.61)}
    speed = {name: 1 / math.prod(times) ** (1 / 3) for name, times in milliseconds.items()}
    spec = load("mixed4")
    for name in speed:
        assert spec.device(name).cores / spec.device("pi").cores == pytest.approx(speed[name] / speed["pi"], rel=0.05)


# ── SEIFER ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("count", [3, 5, 50, 64])
def test_an_area_has_a_link_for_every_pair_with_the_rate_of_some_distance_in_it(count):
    spec = ready.seifer(count, 1)
    names = [device.name for device in spec.devices]
    pairs = [frozenset(link.between) for link in spec.links]
    assert len(names) == count
    assert set(pairs) == {frozenset((a, b)) for a in names for b in names if a != b}
    assert len(pairs) == count * (count - 1) // 2
    farthest_m = math.hypot(150, 150)
    least, most = (math.log2(1 + 283230 / distance_m**2) * 1e6 / 8 for distance_m in (farthest_m, 1.0))
    assert all(least <= link.bytes_per_s <= most for link in spec.links)
    check_speed(spec, 2)


def test_the_places_of_an_area_agree_with_each_other():
    """Distances found back from the rates obey the triangle inequality."""
    spec = ready.seifer(10, 4)
    distance_m = {frozenset(link.between): math.sqrt(283230 / (2 ** (link.bytes_per_s * 8e-6) - 1)) for link in spec.links}
    names = [device.name for device in spec.devices]
    for a in names:
        for b in names:
            for c in names:
                if len({a, b, c}) == 3:
                    direct = distance_m[frozenset((a, c))]
                    assert direct <= distance_m[frozenset((a, b))] + distance_m[frozenset((b, c))] + 1e-6


def test_an_area_is_that_of_its_seed():
    assert ready.seifer(5, 1) == ready.seifer(5, 1)
    assert ready.seifer(5, 1).links != ready.seifer(5, 2).links
    assert load("seifer-5") == ready.seifer(5)
    assert load("seifer-5").seed == 0


def test_budgets_are_those_of_the_paper():
    workers = [device for device in ready.seifer(50).devices if device.has_worker]
    assert {device.memory_bytes for device in workers} == {64 * MIB, 128 * MIB, 256 * MIB, 512 * MIB}
    assert len({device.cores for device in workers}) == 1
    assert len(workers) == 49


@pytest.mark.parametrize("count", [2, 65])
def test_an_impossible_area_is_refused(count):
    with pytest.raises(ConfigError, match="expected 3 to 64 devices"):
        ready.seifer(count)
