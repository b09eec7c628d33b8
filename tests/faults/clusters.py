"""Clusters for tests of faults: as `LocalCluster` and `EmulatedCluster`, with processes from the nursery and workers that mishaps find."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import adapt
from adapt.emulation.processes import Processes
from adapt.protocol.messages import StatusReport, WorkerRecord
from adapt.runtime.local import Life, LocalProcess, Reaper, as_flags
from tests.faults.mishaps import Mishaps
from tests.faults.nursery import CLIENT, DISPATCHER, ROOT, UNLUCKY, WORKER, Nursery

# Every timeout is a setting: a few seconds, so that tests end. Heartbeats are ten times as frequent as silence is long.
SHORT: Mapping[str, object] = {
    "lease_ttl": 2,
    "silence": 2,
    "grace": 2,
    "heartbeat": 0.2,
    "attempt_timeout": 3,
    "client_grace": 1,
    "hedge_share": 0,  # a hedge would answer before what is tested does
}

HEDGING: Mapping[str, object] = {"hedge_share": 0.05}  # as users have it


class ForkedProcess(LocalProcess):
    """A `LocalProcess` that the nursery forks."""

    def __init__(
        self, nursery: Nursery, name: str, command: Sequence[str], directory: Path, reaper: Reaper, *, inside: Sequence[str] = ()
    ) -> None:
        self._nursery = nursery
        super().__init__(name, command, directory, reaper, inside=inside)

    def _start(self) -> Life:
        process = self._nursery.fork(self._command, self.log, self._inside)
        self._reaper.add(process.pid)
        return Life(process)  # type: ignore[arg-type]


class FaultCluster(adapt.LocalCluster):
    """A `LocalCluster` whose processes start in no time.

    Args:
        is_lucky: its workers' stages are the product's own; else they look for marks, see mishaps.py.
        dispatcher: settings over those of `SHORT`.
        dispatcher_inside: where the dispatcher runs; see nursery.py.

    Attributes:
        mishaps: what is to happen to its workers.
    """

    def __init__(
        self,
        nursery: Nursery,
        directory: Path,
        workers: int = 3,
        *,
        is_lucky: bool = False,
        dispatcher: Mapping[str, object] | None = None,
        dispatcher_inside: Sequence[str] = (),
        **settings: Any,
    ) -> None:
        super().__init__(workers, dispatcher={**SHORT, **(dispatcher or {})}, directory=directory, **settings)
        self._nursery, self._is_lucky, self._dispatcher_inside = nursery, is_lucky, dispatcher_inside
        self.mishaps = Mishaps(directory / "mishaps")

    def _launch(self, door: str, settings: Mapping[str, object], *, name: str) -> LocalProcess:
        flags = ["--log-level", "info", *as_flags(settings)]
        if door == "dispatcher":
            command, inside = [DISPATCHER, *flags], self._dispatcher_inside
        elif self._is_lucky:
            command, inside = [WORKER, *flags], ()
        else:
            command, inside = [UNLUCKY, str(self.mishaps.directory), *flags], ()
        process = ForkedProcess(self._nursery, name, command, self.directory, self._reaper, inside=inside)
        self._processes.append(process)
        return process

    def worker(self, name: str) -> LocalProcess:
        return next(process for process in reversed(self.workers) if process.name == name)

    def add_client(self, name: str, *arguments: str) -> LocalProcess:
        """A client in a process of its own; see client_process.py. It is ready when it has begun to ask."""
        process = ForkedProcess(self._nursery, name, [CLIENT, self.address, *arguments], self.directory, self._reaper)
        self._processes.append(process)
        return process


class FaultDevices(adapt.EmulatedCluster):
    """An `EmulatedCluster` whose processes start in no time, and whose workers mishaps find.

    Args:
        nursery: None: every process imports for itself, and its memory is all its own; else it shares what was imported.
    """

    def __init__(self, nursery: Nursery | None, source: Any, *, dispatcher: Mapping[str, object] | None = None, **settings: Any) -> None:
        super().__init__(source, dispatcher={**SHORT, **(dispatcher or {})}, **settings)
        self._nursery = nursery
        self._mishaps: Mishaps | None = None

    @property
    def mishaps(self) -> Mishaps:
        """What is to happen to its workers."""
        if self._mishaps is None:
            self._mishaps = Mishaps(self.directory / "mishaps")
        return self._mishaps

    def _command(self, door: str, settings: Mapping[str, object]) -> list[str]:
        flags = ["--log-level", "info", *as_flags(settings)]
        return [DISPATCHER, *flags] if door == "dispatcher" else [UNLUCKY, str(self.mishaps.directory), *flags]

    def _processes(self) -> Processes:
        return FaultProcesses(self.directory, self._nursery)


class FaultProcesses(Processes):
    """Of `FaultDevices`."""

    def __init__(self, directory: Path, nursery: Nursery | None) -> None:
        super().__init__(directory)
        self._nursery = nursery

    def _make(self, name: str, command: Sequence[str], inside: Sequence[str]) -> LocalProcess:
        if self._nursery is None:
            return LocalProcess(name, command, self._directory, self._reaper, inside=[*inside, "env", f"PYTHONPATH={ROOT}"])
        return ForkedProcess(self._nursery, name, command, self._directory, self._reaper, inside=inside)


# ── what is seen of a cluster ────────────────────────────────────────────────────────────────────────────────────────


def wait_until(fact: Callable[[], Any], *, limit_s: float = 30.0, every_s: float = 0.02, told: Callable[[], object] = lambda: "") -> Any:
    """Wait for a fact, never for time: asks again until it holds, and returns it.

    Args:
        told: what to say of the matter if it does not come to hold.
    """
    pause = threading.Event()
    for _ in range(int(limit_s / every_s)):
        if found := fact():
            return found
        pause.wait(every_s)
    raise AssertionError(f"what was waited for did not happen within {limit_s:g} s; {told()}")


def workers_of(status: StatusReport) -> dict[str, WorkerRecord]:
    return {worker.worker_id: worker for worker in status.workers}


def states(client: adapt.Client) -> dict[str, str]:
    return {worker.worker_id: worker.state for worker in client.status().workers}


def counter(client: adapt.Client, name: str) -> int:
    return int(client.status().counters.get(name, 0))


def wait_for_state(client: adapt.Client, worker: str, state: str, *, limit_s: float = 30.0) -> None:
    wait_until(lambda: states(client).get(worker) == state, limit_s=limit_s, told=lambda: states(client))


def log_lines(process: LocalProcess, words: str) -> list[str]:
    """Lines of its log with these words."""
    return [line for line in process.log.read_text().splitlines() if words in line]
