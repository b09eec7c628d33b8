"""One machine of an emulated cluster, as its users and the schedule handle it."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

from adapt.emulation.description import DeviceSpec, Event, Kind
from adapt.emulation.machines import Machines
from adapt.emulation.processes import Processes
from adapt.emulation.state import state_of
from adapt.errors import AdaptError
from adapt.runtime.etcd_server import EtcdServer
from adapt.runtime.local import READY_TIMEOUT_S, Life, LocalProcess

log = logging.getLogger(__name__)

LEAVE_WITHIN_S = 3.0  # for a worker that is told to leave and then to join: the schedule waits for it


class EmulatedDevice:
    """One machine of the cluster with its worker: a `LocalProcess` to who handles it as one, and its machine and cable besides. For several
    threads.

    Attributes:
        spec: what it is described as.
        process: its worker's; None before the first one starts.

    Args:
        start: starts its worker for the first time; None for a device without one.
    """

    def __init__(self, spec: DeviceSpec, machines: Machines, processes: Processes, start: Callable[[], LocalProcess] | None) -> None:
        self.spec, self._machines, self._processes, self._start = spec, machines, processes, start
        self.process: LocalProcess | None = None
        self._leaving: Life | None = None  # has been told to leave
        self._starting = threading.RLock()

    def __repr__(self) -> str:
        return f"<adapt emulated device {self.name}: {self.process or 'no worker yet'}>"

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def pid(self) -> int:
        """Of its worker. Raises AdaptError if there has been none."""
        return self._worker.pid

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.is_alive

    @property
    def log(self) -> Path:
        return self._worker.log

    @property
    def _worker(self) -> LocalProcess:
        if self.process is None:
            raise AdaptError(f"no worker has been started on device {self.name}")
        return self.process

    # ── its worker ───────────────────────────────────────────────────────────────────────────────────────────────────

    def begin(self) -> Life | None:
        """Start its worker, if none lives; it is not ready yet. One that is about to leave gets `LEAVE_WITHIN_S` for it, then it is killed.

        Returns:
            What can be settled; None if its worker lives already.

        Raises:
            AdaptError: the cluster has been closed, or the device has no worker.
        """
        with self._starting:
            self._processes.check()
            if self._start is None:
                raise AdaptError(f"device {self.name} has no worker: it is described so")
            is_leaving = self.process is not None and self.process.life is self._leaving
            if self.is_alive and not is_leaving:
                return None
            self._machines.hurry(self.name)
            if self.is_alive:
                self._let_leave(self._worker)
            if self.process is None:
                self.process = self._start()
            else:
                self._processes.again(self.process)
            return self.process.life

    def _let_leave(self, worker: LocalProcess) -> None:
        worker.resume()
        try:
            worker.wait(LEAVE_WITHIN_S)
        except TimeoutError:
            log.info("a worker that was leaving had to be killed: it shall join again", extra={"worker_id": self.name})
            worker.kill()

    def settle(self, life: Life | None = None, *, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Wait until its worker is ready; from then on it has its CPU share. Before, it has all that the others leave.

        Args:
            life: what `begin` returned: if that ends and another begins, it is that one's business to settle. By default the one of now.
        """
        worker = self._worker
        life = life or worker.life
        worker.wait_ready(timeout_s, life=life)
        with self._starting:
            if worker.life is life:
                self._machines.settle(self.name)

    def join(self) -> None:
        """Start its worker, if none lives, and let it settle when it is ready, however long that takes; returns at once."""
        if (life := self.begin()) is not None:
            threading.Thread(target=self._settle_later, args=(life,), name=f"adapt-join-{self.name}", daemon=True).start()

    def _settle_later(self, life: Life) -> None:
        try:
            self.settle(life, timeout_s=math.inf)
        except (AdaptError, OSError) as error:  # it has ended again
            log.info("a device that joined was not ready", extra={"worker_id": self.name, "reason": str(error)})

    def restart(self) -> None:
        """End its worker, if it lives, and start it anew. Raises AdaptError."""
        self._processes.check()
        if self.is_alive:
            self._worker.end()
        self.begin()
        self.settle()

    def kill(self) -> None:
        """SIGKILL: its worker dies at once, as by a pulled plug. Waits for that."""
        self._worker.kill()

    def stop(self) -> None:
        """SIGSTOP: its worker freezes."""
        self._worker.stop()

    def resume(self) -> None:
        """SIGCONT: its worker goes on."""
        self._worker.resume()

    def terminate(self) -> None:
        """SIGTERM: its worker finishes what it holds and leaves."""
        self._leaving = self._worker.life
        self._worker.terminate()

    def wait(self, timeout_s: float | None = 10.0) -> int:
        """Wait for its worker's end; returns the exit status, negative for a signal. Raises TimeoutError."""
        return self._worker.wait(timeout_s)

    # ── its machine and its cable ────────────────────────────────────────────────────────────────────────────────────

    def slow(self, cores: float | None) -> None:
        """From now on this is its CPU share, None: no limit; if its worker starts just now, as soon as that is ready."""
        self._machines.limit(self.name, cores)

    def rate(self, up_bytes_per_s: float | None, down_bytes_per_s: float | None) -> None:
        """From now on its link has these rates; None: no limit."""
        self._machines.rate(self.name, up_bytes_per_s, down_bytes_per_s)

    def cut(self, direction: Literal["both", "up", "down"] = "both") -> None:
        """Pull its cable; or lose only what it sends ("up") or what is sent to it ("down")."""
        self._machines.cut(self.name, direction)

    def delay(self, latency_s: float, jitter_s: float = 0.0) -> None:
        """Each direction takes so much longer, plus between nothing and the jitter."""
        self._machines.lines_of(self.name).delay(latency_s, jitter_s)

    def stall(self) -> None:
        """Its connections stay open, and nothing moves."""
        self._machines.lines_of(self.name).stall()

    def reset(self) -> None:
        """Its connections are reset."""
        self._machines.lines_of(self.name).reset()

    def corrupt(self, per_mib: float) -> None:
        """So many bytes per MiB are changed on the way, in each direction."""
        self._machines.lines_of(self.name).corrupt(per_mib)

    def restore(self, remaining: Iterable[Event] = ()) -> None:
        """Link and CPU share are again as described, but for the events that remain in force."""
        self._machines.restore(self.name, state_of(self.spec, remaining))

    def perform(self, event: Event) -> None:
        """Do what the event says; whether its worker is ready again is not waited for."""
        match event.kind:
            case Kind.CRASH:
                self.kill()
            case Kind.JOIN:
                self.join()
            case Kind.LEAVE:
                self.terminate()
            case Kind.STOP:
                self.stop()
            case Kind.CONTINUE:
                self.resume()
            case Kind.SLOW:
                self.slow(event.cores)
            case Kind.CUT:
                self.cut()
            case Kind.CUT_UP:
                self.cut("up")
            case Kind.CUT_DOWN:
                self.cut("down")
            case Kind.RATE:
                self.rate(event.up_bytes_per_s, event.down_bytes_per_s)
            case Kind.DELAY:
                self.delay(event.latency_s or 0.0, event.jitter_s or 0.0)
            case Kind.STALL:
                self.stall()
            case Kind.RESET:
                self.reset()
            case Kind.CORRUPT:
                self.corrupt(event.corrupt_per_mib or 0.0)
            case Kind.RESTORE:
                self.restore(event.remaining)


class EmulatedEtcd:
    """The etcd of a cluster, as the schedule handles it. It comes back with what it had on its disk."""

    def __init__(self, process: EtcdServer, processes: Processes) -> None:
        self.process, self._processes = process, processes

    def perform(self, event: Event) -> None:
        """Do what the event says; whether it serves again is not waited for. Raises AdaptError if the cluster has been closed."""
        if event.kind in (Kind.CRASH_ETCD, Kind.RESTART_ETCD) and self.process.is_alive:
            self.process.kill()
        if event.kind in (Kind.START_ETCD, Kind.RESTART_ETCD) and not self.process.is_alive:
            self._processes.again(self.process)
