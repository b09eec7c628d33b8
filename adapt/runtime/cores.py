"""How many cores the control groups of this process allow it: what a container or an emulated device has of a machine's CPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

PROCESS = Path("/proc/self")


def allowed_cores(process: Path = PROCESS) -> float:
    """The smallest quota of its group and those around it; 0 if nothing limits it, or nothing is known (as outside Linux)."""
    try:
        quotas = [cores for folder in _folders(process) if (cores := _quota(folder)) is not None]
    except (OSError, ValueError, IndexError, ZeroDivisionError):
        return 0.0
    return min(quotas, default=0.0)


def _folders(process: Path) -> Iterator[Path]:
    """Where the CPU quotas that hold for the process lie, in either version of control groups."""
    groups: dict[str, str] = {}
    for line in (process / "cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        groups |= dict.fromkeys(controllers.split(","), path)
    for line in (process / "mountinfo").read_text(encoding="utf-8").splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = right.split()[:3]
        is_first = kind == "cgroup" and "cpu" in options.split(",") and "cpu" in groups
        if is_first or (kind == "cgroup2" and "" in groups):
            root, mount = left.split()[3:5]
            inside = groups["cpu" if is_first else ""].removeprefix(root.rstrip("/")).strip("/")  # a container may see only its part
            for depth in range(len(Path(inside).parts), -1, -1):
                yield Path(mount, *Path(inside).parts[:depth])


def _quota(folder: Path) -> float | None:
    """The cores that this group may use; None without a limit of its own."""
    try:
        if (second := folder / "cpu.max").exists():
            quota, period = second.read_text(encoding="ascii").split()[:2]
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text(encoding="ascii").strip()
            period = (folder / "cpu.cfs_period_us").read_text(encoding="ascii").strip()
    except OSError:
        return None
    if quota in ("max", "-1"):
        return None
    cores = float(quota) / float(period)
    return cores if math.isfinite(cores) and cores > 0 else None
