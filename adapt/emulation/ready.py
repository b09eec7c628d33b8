"""Clusters that come with ADAPT: files in `clusters/`, and the areas of SEIFER, which are drawn.

`parse.load` takes their names.
"""

from __future__ import annotations

import math
import random
import tomllib
from importlib import resources
from itertools import combinations

from adapt.config import MEBIBYTE
from adapt.emulation.description import ClusterSpec, DeviceSpec, LinkSpec
from adapt.errors import ConfigError

FILES = ("adapt1", "adapt4", "adapt8", "defer8", "mixed4", "pi3")
AREAS = {f"seifer-{count}": count for count in (5, 10, 15, 20, 50)}

AREA_M = 150.0
BUDGETS_MIB = (64, 128, 256, 512)
TOTAL_CORES = 1.6  # what the smallest machine that we think of, one of two cores, can give
DISPATCHER_CORES = 0.25


def names() -> dict[str, str]:
    """The name of every ready cluster, and what it is."""
    about = {name: str(tomllib.loads(text(name))["about"]) for name in FILES}
    return about | {name: seifer(count).about for name, count in AREAS.items()}


def text(name: str) -> str:
    """The file of one of `FILES`."""
    return resources.files("adapt.emulation").joinpath("clusters", f"{name}.toml").read_text(encoding="utf-8")


def seifer(count: int, seed: int = 0) -> ClusterSpec:
    """Devices strewn over a square of 150 m, as in the tests of SEIFER (2210.12218, 2304.11941): the rate of a pair falls with its distance,
    log2(1 + 283230 / d^2) Mbit/s at d metres; the stage budget of each is 64, 128, 256 or 512 MiB.

    Where we depart: there, devices pass activations on to each other; in ADAPT everything goes through the dispatcher. It is on the first
    device, which has no worker: with one, the two would take CPU from each other, and the links are what this is about. All
    workers have the same CPU share: the original counts only links.

    Args:
        count: devices, from 3 on, with that of the dispatcher.
        seed: of places and budgets.

    Raises:
        ConfigError: fewer than 3 or more than 64 devices.
    """
    if not 3 <= count <= 64:
        raise ConfigError(f"count={count!r}: expected 3 to 64 devices")
    draw = random.Random(f"seifer: {count} devices, seed {seed}")
    devices = [f"edge-{number}" for number in range(1, count + 1)]
    places = {name: (draw.uniform(0, AREA_M), draw.uniform(0, AREA_M)) for name in devices}
    dispatcher_cores = min(DISPATCHER_CORES, TOTAL_CORES / count)
    cores = math.floor((TOTAL_CORES - dispatcher_cores) / (count - 1) * 1e4) / 1e4
    first = DeviceSpec(name=devices[0], cores=dispatcher_cores, has_worker=False, board="where requests come in")
    rest = [
        DeviceSpec(name=name, cores=cores, memory_bytes=draw.choice(BUDGETS_MIB) * MEBIBYTE, board="a wireless device")
        for name in devices[1:]
    ]
    links = [LinkSpec(between=(a, b), bytes_per_s=_rate(math.dist(places[a], places[b]))) for a, b in combinations(devices, 2)]
    return ClusterSpec(
        name=f"seifer-{count}",
        about=f"{count} wireless devices strewn over 150 m x 150 m, as in the tests of SEIFER: the farther, the slower",
        devices=(first, *rest),
        dispatcher=devices[0],
        links=tuple(links),
        seed=seed,
    )


def _rate(distance_m: float) -> float:
    """Bytes per second. Nobody stands closer than a metre."""
    return math.log2(1 + 283230 / max(distance_m, 1.0) ** 2) * 1e6 / 8
