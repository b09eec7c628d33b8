"""Control groups: how much CPU and memory the processes of a machine get, and how much they have used. Version 1 and 2.

All groups of one emulation lie in `adapt-<tag>`, directly below where the hierarchies are mounted. No other group is touched.

    when          a process enters `procs` when it starts. The memory limit holds from then on, the CPU share only from
                  `begin_limit` or `limit_cores`: importing torch at a tenth of a core would take half a minute.
    version 1     cpu, cpuacct and memory may be hierarchies of their own, so a group is up to three folders
    version 2     one folder; the root has to pass the controllers on (cgroup.subtree_control)
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from adapt.errors import AdaptError

MOUNTINFO = Path("/proc/self/mountinfo")
PERIOD_S = 0.010  # short, so that a stage of a few ms is slowed evenly instead of now not at all, now by a long pause
MIN_QUOTA_S, MAX_PERIOD_S = 0.001, 1.0  # the kernel's
MIN_CORES = MIN_QUOTA_S / MAX_PERIOD_S
EMPTY_WITHIN_S = 2.0  # a killed process leaves its group when it has torn down its memory
POLL_S = 0.005


@dataclass(frozen=True, slots=True)
class Hierarchies:
    """Where the controllers are mounted; in version 2 all at one place."""

    version: int
    cpu: Path
    cpuacct: Path
    memory: Path

    @property
    def roots(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys((self.cpu, self.cpuacct, self.memory)))


@dataclass(frozen=True, slots=True)
class Usage:
    """What the processes of a group have used.

    Attributes:
        cpu_s: CPU time since the group was made.
        memory_bytes: held now, without file pages that the kernel can drop at any moment.
    """

    cpu_s: float
    memory_bytes: int


def find_hierarchies(mountinfo: str | None = None) -> Hierarchies:
    """Where groups can be made.

    Args:
        mountinfo: the text of /proc/self/mountinfo; by default this process's.

    Raises:
        AdaptError: a controller is missing; the message says what to do.
    """
    first: dict[str, Path] = {}  # v1 controller -> mount point
    second: Path | None = None
    for place, kind, options in _mounts(MOUNTINFO.read_text() if mountinfo is None else mountinfo):
        if kind == "cgroup2":
            second = second or place
        elif kind == "cgroup":
            for option in options:
                first.setdefault(option, place)
    if {"cpu", "cpuacct", "memory"} <= first.keys():
        return Hierarchies(1, first["cpu"], first["cpuacct"], first["memory"])
    if second is None:
        raise AdaptError("no cgroup hierarchy with cpu and memory is mounted; mount one: mount -t cgroup2 none /sys/fs/cgroup")
    for name, remedy in (
        ("cgroup.controllers", "boot with cgroup_enable=memory, or give the container its controllers"),
        ("cgroup.subtree_control", f'run: echo "+cpu +memory" > {second}/cgroup.subtree_control'),
    ):
        if missing := {"cpu", "memory"} - _words(second / name):
            raise AdaptError(f"{second / name} lacks {' and '.join(sorted(missing))}; {remedy}")
    return Hierarchies(2, second, second, second)


def quota(cores: float) -> tuple[int, int]:
    """Quota and period in microseconds for a share of the CPU. Raises AdaptError for a share the kernel cannot keep."""
    if not cores >= MIN_CORES:
        raise AdaptError(f"cores={cores:g}: expected at least {MIN_CORES:g}")
    period_s = max(PERIOD_S, MIN_QUOTA_S / cores)
    return max(round(cores * period_s * 1e6), round(MIN_QUOTA_S * 1e6)), min(round(period_s * 1e6), round(MAX_PERIOD_S * 1e6))


class Group:
    """The group of one machine; made by `Groups`.

    Attributes:
        name: of the machine.
        procs: the cgroup.procs files that its processes enter when they start, with `enter.py --procs`.
        cpu_procs, memory_procs: those of them that carry the limits; the same one in version 2.
    """

    def __init__(self, name: str, hierarchies: Hierarchies, folder: str, *, cores: float | None, memory_bytes: int | None) -> None:
        self.name, self._version, self._cores = name, hierarchies.version, cores
        if cores is not None:
            quota(cores)
        self._cpu, self._cpuacct, self._memory = (
            root / folder / name for root in (hierarchies.cpu, hierarchies.cpuacct, hierarchies.memory)
        )
        self._folders = tuple(root / folder / name for root in hierarchies.roots)
        self.procs = tuple(place / "cgroup.procs" for place in self._folders)
        self.cpu_procs, self.memory_procs = self._cpu / "cgroup.procs", self._memory / "cgroup.procs"
        for place in self._folders:
            place.mkdir()
        if memory_bytes is not None:
            self._limit_memory(memory_bytes)

    def begin_limit(self) -> None:
        """From now on its processes get the CPU share that the group was made with."""
        self.limit_cores(self._cores)

    def limit_cores(self, cores: float | None) -> None:
        """From now on its processes get this CPU share; None: as much as there is."""
        allowed_us, period_us = (-1, round(PERIOD_S * 1e6)) if cores is None else quota(cores)
        if self._version == 2:
            _write(self._cpu / "cpu.max", f"{'max' if allowed_us < 0 else allowed_us} {period_us}")
            return
        _write(self._cpu / "cpu.cfs_quota_us", "-1")  # else the new period may not fit the old quota
        _write(self._cpu / "cpu.cfs_period_us", str(period_us))
        _write(self._cpu / "cpu.cfs_quota_us", str(allowed_us))

    def usage(self) -> Usage:
        """Cheap: two or three small files."""
        if self._version == 2:
            cpu_s = _field(self._cpu / "cpu.stat", "usage_usec") / 1e6
            held, prefix = int(_read(self._memory / "memory.current")), ""
        else:
            cpu_s = int(_read(self._cpuacct / "cpuacct.usage")) / 1e9
            held, prefix = int(_read(self._memory / "memory.usage_in_bytes")), "total_"
        facts = _fields(self._memory / "memory.stat")
        droppable = facts.get(f"{prefix}active_file", 0) + facts.get(f"{prefix}inactive_file", 0)
        return Usage(cpu_s, max(held - droppable, 0))

    def out_of_memory_kills(self) -> int:
        """How many of its processes the kernel has killed because the group exceeded its memory."""
        return _field(self._memory / ("memory.events" if self._version == 2 else "memory.oom_control"), "oom_kill")

    def remove(self) -> None:
        """Remove it; its processes must have been ended. Removing twice is nothing. Raises AdaptError if it is not empty."""
        for place in self._folders:
            _remove(place)

    def _limit_memory(self, limit_bytes: int) -> None:
        """Without swap where the kernel lets us: a board that swaps would be another board."""
        if self._version == 2:
            _write(self._memory / "memory.max", str(limit_bytes))
            with contextlib.suppress(OSError):
                _write(self._memory / "memory.swap.max", "0")
            return
        _write(self._memory / "memory.limit_in_bytes", str(limit_bytes))
        with contextlib.suppress(OSError):
            _write(self._memory / "memory.swappiness", "0")
        with contextlib.suppress(OSError):  # memory and swap together; the file is missing without swapaccount=1
            _write(self._memory / "memory.memsw.limit_in_bytes", str(limit_bytes))


class Groups:
    """The groups of one emulation.

    Args:
        tag: of the emulation.
        hierarchies: by default those of this machine.

    Raises:
        AdaptError: no groups can be made here; see `find_hierarchies`.
    """

    def __init__(self, tag: str, hierarchies: Hierarchies | None = None) -> None:
        self._hierarchies, self._folder = hierarchies or find_hierarchies(), folder_of(tag)
        self._groups: dict[str, Group] = {}

    def make(self, name: str, *, cores: float | None = None, memory_bytes: int | None = None) -> Group:
        """The group of a machine. The memory limit holds at once, the CPU share from `Group.begin_limit`."""
        try:
            for root in self._hierarchies.roots:
                (root / self._folder).mkdir(exist_ok=True)
            if self._hierarchies.version == 2:
                _write(self._hierarchies.cpu / self._folder / "cgroup.subtree_control", "+cpu +memory")
            group = Group(name, self._hierarchies, self._folder, cores=cores, memory_bytes=memory_bytes)
        except OSError as error:
            raise AdaptError(f"the group of {name!r} cannot be made: {error}") from error
        self._groups[name] = group
        return group

    def close(self) -> None:
        """Remove all of them; their processes must have been ended. Raises AdaptError if one is not empty."""
        for group in self._groups.values():
            group.remove()
        for root in self._hierarchies.roots:
            _remove(root / self._folder)


def folder_of(tag: str) -> str:
    return f"adapt-{tag}"


def is_used(tag: str) -> bool:
    """Whether there are groups with this tag."""
    return any(place.exists() for place in _tagged(tag))


def processes(tag: str) -> set[int]:
    """Who is in the groups with this tag."""
    return {process for place in _tagged(tag) for folder in _below(place) for process in _processes(folder)}


def remove(tag: str) -> None:
    """Remove the groups with this tag; their processes must have been ended. Raises AdaptError if one is not empty."""
    for place in _tagged(tag):
        for folder in _below(place):
            _remove(folder)


def _tagged(tag: str) -> list[Path]:
    """In every hierarchy that is mounted, also those that an emulation would not choose today."""
    mounts = _mounts(MOUNTINFO.read_text())
    return list(dict.fromkeys(place / folder_of(tag) for place, kind, _ in mounts if kind in ("cgroup", "cgroup2")))


def _below(folder: Path) -> list[Path]:
    """A folder and all within it, the innermost first."""
    return [Path(place) for place, _, _ in os.walk(folder, topdown=False)]


def _processes(folder: Path) -> list[int]:
    with contextlib.suppress(OSError):  # it has just been removed
        return [int(line) for line in _read(folder / "cgroup.procs").split()]
    return []


def _mounts(mountinfo: str) -> Iterator[tuple[Path, str, list[str]]]:
    """Mount point, kind and options of each line of mountinfo; see proc(5)."""
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, (kind, _, *options) = before.split(), after.split()
        place = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
        yield Path(place), kind, options[-1].split(",") if options else []


def _remove(folder: Path) -> None:
    limit = time.monotonic() + EMPTY_WITHIN_S
    while True:
        try:
            folder.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.ENOTEMPTY) or time.monotonic() > limit:
                inside = ", ".join(map(str, _processes(folder))) or "none"
                raise AdaptError(f"{folder} cannot be removed: {error.strerror}; its processes: {inside}") from error
        time.sleep(POLL_S)


def _read(path: Path) -> str:
    return path.read_text()


def _words(path: Path) -> set[str]:
    """None if there is no such file."""
    with contextlib.suppress(OSError):
        return set(_read(path).split())
    return set()


def _write(path: Path, text: str) -> None:
    path.write_text(text)


def _fields(path: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    return {name: int(value) for name, _, value in (line.partition(" ") for line in _read(path).splitlines()) if value.isdigit()}


def _field(path: Path, name: str) -> int:
    return _fields(path).get(name, 0)
