"""The machine under the figures: without it a figure says nothing."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TypeAlias

import psutil
import zmq

Facts: TypeAlias = dict[str, str | int | float]

DISTRIBUTIONS = ("torch", "numpy", "pyzmq", "ray", "distributed")  # whose versions matter; what is not installed is left out


def facts() -> Facts:
    """What is known of this machine now. Read it before a bench, so that the load is that of others."""
    known: Facts = {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / (1 << 30), 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "libzmq": zmq.zmq_version(),
        "load_before": round(os.getloadavg()[0], 2),
    }
    return known | {name: version for name in DISTRIBUTIONS if (version := _version(name))}


def lines(known: Mapping[str, object]) -> list[str]:
    """The facts as `name: value`, for the head of a file."""
    return [f"{name}: {value}" for name, value in known.items()]


def in_words(known: Mapping[str, object]) -> str:
    """The facts on one line, for a terminal or a plot."""
    libraries = ", ".join(f"{name} {known[name]}" for name in ("torch", "pyzmq", "libzmq") if name in known)
    return f"{known['cores']} cores {known['cpu']}, {known['memory_gib']} GiB, Python {known['python']}, {libraries}; load before {known['load_before']}"


def _cpu_model() -> str:
    try:
        rows = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = (row.partition(":")[2].strip() for row in rows if row.startswith(("model name", "Model")))
    return next(names, platform.machine())


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
