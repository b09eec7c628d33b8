"""The processes of an emulated cluster: started as long as it runs, switched off at once, and those that end by themselves are noticed."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import SIGKILL

from adapt.emulation.machines import Machines, MemoryKills
from adapt.emulation.observation import ENDED, KILLED_BY_MEMORY, Mishap
from adapt.errors import AdaptError
from adapt.runtime.etcd_server import EtcdServer
from adapt.runtime.local import Life, LocalProcess, Reaper, as_flags

MAX_WORDS = 300  # of a log


@dataclass(frozen=True, slots=True)
class End:
    """A process that ended without being told to. `words`: the last line of its log."""

    name: str
    status: int
    words: str


class Processes:
    """All processes of one cluster. For several threads.

    Args:
        directory: for their logs.
    """

    def __init__(self, directory: Path) -> None:
        self._directory, self._reaper = directory, Reaper()
        self._all: list[LocalProcess] = []
        self._watched: list[tuple[LocalProcess, Life]] = []
        self._lock, self._is_over = threading.RLock(), False

    def check(self) -> None:
        """Raises AdaptError if the cluster has been closed."""
        if self._is_over:
            raise AdaptError("the cluster does not run: it has been closed")

    def launch(self, name: str, command: Sequence[str], *, inside: Sequence[str] = ()) -> LocalProcess:
        """Start one more; arguments as those of `LocalProcess`. Raises AdaptError if the cluster has been closed."""
        with self._lock:
            self.check()
            process = self._make(name, command, inside)
            self._keep(process)
        return process

    def launch_etcd(self, *, host: str, inside: Sequence[str] = ()) -> EtcdServer:
        """Start an etcd; arguments as those of `EtcdServer`. Raises AdaptError if the cluster has been closed, ConfigError without etcd."""
        with self._lock:
            self.check()
            process = EtcdServer(self._directory, self._reaper, host=host, inside=inside)
            self._keep(process)
        return process

    def _keep(self, process: LocalProcess) -> None:
        self._all.append(process)
        self._watched.append((process, process.life))

    def _make(self, name: str, command: Sequence[str], inside: Sequence[str]) -> LocalProcess:
        return LocalProcess(name, command, self._directory, self._reaper, inside=inside)

    def again(self, process: LocalProcess) -> None:
        """Start anew what has ended. Raises AdaptError if the cluster has been closed."""
        with self._lock:
            self.check()
            process.wait()
            process.begin_again()
            self._watched.append((process, process.life))

    def ends(self) -> list[End]:
        """Those that have ended by themselves since this was called last."""
        with self._lock:
            known = {id(life) for _, life in self._watched}
            self._watched += [(process, process.life) for process in self._all if process.is_alive and id(process.life) not in known]
            gone = [(process, life) for process, life in self._watched if not life.is_alive]
            self._watched = [(process, life) for process, life in self._watched if life.is_alive]
        return [_end_of(process, life) for process, life in gone if not life.is_told_to_end]

    def end(self) -> None:
        """All at once: to drain at a tenth of a core, behind a cable that is pulled, would take its time. Ending twice is nothing."""
        with self._lock:
            self._is_over = True
        for process in self._all:
            process.send_signal(SIGKILL)
        for process in self._all:
            process.wait()

    def close(self) -> None:
        """End them, and what sees to it that none outlives us."""
        try:
            self.end()
        finally:
            self._reaper.close()


def _end_of(process: LocalProcess, life: Life) -> End:
    lines = process.log_tail().splitlines()
    return End(process.name, life.process.returncode, lines[-1][:MAX_WORDS])


def command_of(door: str, settings: Mapping[str, object]) -> list[str]:
    """The command of a dispatcher or worker, for `Processes.launch`."""
    return [f"adapt.interfaces.cli.{door}", "--log-level", "info", *as_flags(settings)]


class Watch:
    """What happens to machines and processes that nobody has ordered."""

    def __init__(self, machines: Machines, processes: Processes) -> None:
        self._machines, self._processes = machines, processes
        self._killed: dict[str, int] = {}
        self._unexplained: dict[str, int] = {}  # killed by memory, but whose end has not been seen yet
        self._ends: list[End] = []

    def look(self) -> list[Mishap]:
        """All since the last look. Raises AdaptError or OSError if it cannot look."""
        self._ends += self._processes.ends()  # first: of what is seen dead the kernel has counted why
        killed = [self._killed_by_memory(name, kills) for name, kills in self._machines.memory_kills().items()]
        ends, self._ends = self._ends, []
        return [seen for seen in killed if seen is not None] + [self._ended(end) for end in ends if not self._is_explained(end)]

    def _killed_by_memory(self, name: str, kills: MemoryKills) -> Mishap | None:
        new = kills.count - self._killed.get(name, 0)
        if new <= 0:
            return None
        self._killed[name] = kills.count
        self._unexplained[name] = self._unexplained.get(name, 0) + new
        return Mishap(KILLED_BY_MEMORY, name, {"limit_bytes": kills.limit_bytes})

    def _is_explained(self, end: End) -> bool:
        """One end is not told twice."""
        if end.status != -SIGKILL or not self._unexplained.get(end.name):
            return False
        self._unexplained[end.name] -= 1
        return True

    def _ended(self, end: End) -> Mishap:
        return Mishap(ENDED, end.name, {"status": end.status, "log": end.words})
