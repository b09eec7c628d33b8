"""CPU seconds of processes and their threads, from /proc.

A thread of ADAPT is called "python" whatever it does, as every thread of an interpreter is; so threads are told apart as

    main     the first thread of the process: the event loop of a dispatcher or worker, the user's own code in a client
    io       ZeroMQ's I/O thread, "ZMQbg/IO/0"
    python   all other threads with the name of the first one: codecs, computing, a client's loop
    other    all that is called otherwise: ZeroMQ's reaper, the threads of other runtimes
    ended    threads that have ended meanwhile: of the process's own sum, what no living thread has used
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import psutil

from bench.harness.contest import Contestant

TICK_S = 1 / os.sysconf("SC_CLK_TCK")  # 10 ms, and rounded down; threads have a finer count of their own
ENDED_AT_LEAST_S = 5 * TICK_S  # less is the rounding of many threads
Use: TypeAlias = Counter[tuple[str, str]]  # (role of the process, kind of thread) -> CPU seconds, user and system
PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Stat:
    """What a line of /proc/PID/stat says that we want."""

    number: int
    name: str
    cpu_s: float


def parse_stat(line: str) -> Stat:
    """One line of /proc/PID/stat or /proc/PID/task/TID/stat. The name may have blanks and brackets of its own."""
    head, _, tail = line.rpartition(")")
    number, _, name = head.partition(" (")
    fields = tail.split()  # from the third on: state, ...; utime and stime are the 14th and 15th of all
    return Stat(int(number), name, (int(fields[11]) + int(fields[12])) * TICK_S)


def kind_of_thread(stat: Stat, pid: int, main_name: str) -> str:
    if stat.number == pid:
        return "main"
    if stat.name.startswith("ZMQbg/IO"):
        return "io"
    return "python" if stat.name == main_name else "other"


def read(pid: int, proc: Path = PROC) -> Counter[str]:
    """Kind of thread -> CPU seconds since the process began; nothing if it is gone."""
    try:
        whole = parse_stat((proc / str(pid) / "stat").read_text())
        threads = _threads(proc / str(pid) / "task")
    except OSError:
        return Counter()
    use: Counter[str] = Counter()
    for thread in threads:
        use[kind_of_thread(thread, pid, whole.name)] += thread.cpu_s
    use["ended"] = max(whole.cpu_s - sum(thread.cpu_s for thread in threads), 0.0)
    return use


def _threads(folder: Path) -> list[Stat]:
    found = []
    for task in folder.iterdir():
        try:
            stat = parse_stat((task / "stat").read_text())
            found.append(replace(stat, cpu_s=_exact_s(task / "schedstat", stat.cpu_s)))
        except OSError:  # it has just ended
            continue
    return found


def _exact_s(path: Path, otherwise: float) -> float:
    """The scheduler's own count, in nanoseconds, where the kernel keeps one; for a thread only."""
    try:
        return int(path.read_text().split()[0]) * 1e-9
    except (OSError, ValueError, IndexError):
        return otherwise


def role_of(name: str) -> str:
    """ "worker 1" and "worker 2" are both workers."""
    return name.rstrip("0123456789 ") or name


def use_of(processes: Mapping[str, int], proc: Path = PROC) -> Use:
    use: Use = Counter()
    for name, pid in processes.items():
        for kind, cpu_s in read(pid, proc).items():
            use[role_of(name), kind] += cpu_s
    return use


class CpuMeter:
    """Adds up what a contestant's processes use while it runs; all workers together are one role.

    Its figures are "cpu_us ROLE.KIND" and "cpu_us ROLE" per task, and "cpu_us total".
    """

    def __init__(self) -> None:
        self._before: Use = Counter()
        self._used: Use = Counter()

    def begin(self, contestant: Contestant) -> None:
        self._before = use_of(contestant.processes())

    def end(self, contestant: Contestant) -> None:
        after = use_of(contestant.processes())
        for key, cpu_s in after.items():
            self._used[key] += cpu_s - self._before[key]

    def figures(self, tasks: int) -> dict[str, float]:
        found: Counter[str] = Counter()
        for (role, kind), cpu_s in sorted(self._used.items()):
            if kind == "ended" and cpu_s < ENDED_AT_LEAST_S:
                continue
            for name in (f"{role}.{kind}", role, "total"):
                found[f"cpu_us {name}"] += cpu_s / tasks * 1e6
        self._used.clear()
        return dict(found)


class OthersMeter:
    """How many cores did something else meanwhile. Figure: "others_cores"; above 0.1 a measurement is one of a crowd."""

    def __init__(self) -> None:
        self._began = self._before_s = self._others_s = self._elapsed_s = 0.0

    def begin(self, contestant: Contestant) -> None:
        self._before_s, self._began = _foreign_s(contestant), time.monotonic()

    def end(self, contestant: Contestant) -> None:
        self._elapsed_s += time.monotonic() - self._began
        self._others_s += _foreign_s(contestant) - self._before_s

    def figures(self, tasks: int) -> dict[str, float]:
        cores = max(self._others_s / self._elapsed_s, 0.0)
        self._others_s = self._elapsed_s = 0.0
        return {"others_cores": cores}


def _foreign_s(contestant: Contestant) -> float:
    """CPU seconds of the machine since it started, without those of the contestant's processes."""
    times = psutil.cpu_times()
    busy_s = times.user + times.nice + times.system + times.irq + times.softirq
    return float(busy_s) - sum(use_of(contestant.processes()).values())
