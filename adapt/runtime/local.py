"""A whole cluster on this machine: a dispatcher and workers as real processes, started by the same doors that users start."""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from adapt.errors import AdaptError, ConfigError

READY_TIMEOUT_S = 60.0  # importing torch on a busy small board takes its time
STOP_TIMEOUT_S = 15.0
LOG_TAIL = 2000


class LocalProcess:
    """One process of a cluster. Its standard error goes to a log file in the cluster's directory."""

    def __init__(self, name: str, command: Sequence[str], directory: Path, reaper: Reaper) -> None:
        self.name, self._command, self._reaper = name, list(command), reaper
        self.log = directory / f"{name}.log"
        self.ready = ""  # its ready line
        self._process: subprocess.Popen[str] | None = None
        self.start()

    def start(self) -> None:
        """Start it (again); `wait_ready` tells when it can be used."""
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *self._command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self._reaper.add(self._process.pid)

    @property
    def process(self) -> subprocess.Popen[str]:
        assert self._process is not None, "started in the constructor"
        return self._process

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def wait_ready(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Wait for its ready line. Raises AdaptError with the end of its log if it dies first or takes too long."""
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(timeout_s):
                raise AdaptError(f"{self.name} was not ready within {timeout_s:g} s; its log ends with:\n{self._log_tail()}")
        self.ready = self.process.stdout.readline().strip()
        if " ready " not in self.ready:
            status = self.wait(timeout_s=5.0)
            raise AdaptError(f"{self.name} ended with status {status} before it was ready; its log ends with:\n{self._log_tail()}")

    def kill(self) -> None:
        """SIGKILL: it dies at once, as by a pulled plug."""
        self._signal(signal.SIGKILL)
        self.wait()

    def stop(self) -> None:
        """SIGSTOP: it freezes, as a machine that hangs."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT: it goes on where it was stopped."""
        self._signal(signal.SIGCONT)

    def terminate(self) -> None:
        """SIGTERM: it finishes what it holds and leaves."""
        self._signal(signal.SIGTERM)

    def wait(self, timeout_s: float | None = STOP_TIMEOUT_S) -> int:
        """Wait for its end; returns its exit status, negative for a signal. Raises TimeoutError."""
        try:
            status = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{self.name} has not ended within {timeout_s} s") from None
        self._reaper.remove(self.pid)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return status

    def restart(self) -> None:
        """End it, if it lives, and start it anew with the same settings."""
        if self.is_alive:
            self.terminate()
        self.wait()
        self.start()
        self.wait_ready()

    def _signal(self, number: signal.Signals) -> None:
        if self.is_alive:
            self.process.send_signal(number)

    def _log_tail(self) -> str:
        return self.log.read_text(errors="replace")[-LOG_TAIL:].strip() or "(nothing)"


class Reaper:
    """Sees to it that no process outlives this one; see reaper.py."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, "-m", "adapt.runtime.reaper"], stdin=subprocess.PIPE, text=True)

    def add(self, pid: int) -> None:
        self._tell(f"+{pid}")

    def remove(self, pid: int) -> None:
        self._tell(f"-{pid}")

    def close(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.wait()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()


class LocalCluster:
    """A dispatcher and workers on this machine, for notebooks, demos and tests. Use it as a context manager.

    Args:
        workers: how many to begin with; they are called w1, w2, ...
        threads: of each worker, within one operator.
        memory_limit: stage budget of each worker, as "512MiB"; by default a share of this machine's memory.
        device: of each worker: "cpu", "cuda:0", "auto".
        models_dir: where the dispatcher looks for weights that are named.
        dispatcher: further settings of adapt-dispatcher, as {"lease_ttl": 2}.
        worker: further settings of adapt-worker.
        directory: for state, caches and logs; by default a temporary one that goes with the cluster.

    Raises:
        AdaptError: a process ended or hung before it was ready; the message has the end of its log.
    """

    def __init__(
        self,
        workers: int = 3,
        *,
        threads: int = 1,
        memory_limit: str | None = None,
        device: str = "cpu",
        models_dir: str | os.PathLike[str] | None = None,
        dispatcher: Mapping[str, object] | None = None,
        worker: Mapping[str, object] | None = None,
        directory: str | os.PathLike[str] | None = None,
    ) -> None:
        if workers < 0:
            raise ConfigError(f"workers={workers}: expected 0 or more")
        self._count = workers
        self._dispatcher_settings = {"models_dir": models_dir, **(dispatcher or {})}
        self._worker_settings = {"threads": threads, "memory_limit": memory_limit, "device": device, **(worker or {})}
        self._given_directory = None if directory is None else Path(directory)
        self._is_started = False
        self.workers: list[LocalProcess] = []

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def start(self) -> None:
        """Start everything and wait until it is ready. Entering the context manager does this."""
        if self._is_started:
            return
        self._is_started = True
        self.directory = self._given_directory or Path(tempfile.mkdtemp(prefix="adapt-cluster-"))
        self._reaper = Reaper()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            settings = {"listen": "tcp://127.0.0.1:0", "state_dir": self.directory / "state", **self._dispatcher_settings}
            self.dispatcher = self._launch("dispatcher", settings, name="dispatcher")
            self.dispatcher.wait_ready()
            self.address = _field(self.dispatcher.ready, "listen")
            self.dispatcher._command += ["--listen", self.address]  # a restart comes back where it was
            for _ in range(self._count):
                self._begin_worker()
            for process in self.workers:
                process.wait_ready()
        except BaseException:
            self.close()
            raise

    def add_worker(self, *, name: str | None = None, **settings: object) -> LocalProcess:
        """Start one more worker and wait until it is ready. `settings` as for the cluster's `worker`."""
        process = self._begin_worker(name, **settings)
        process.wait_ready()
        return process

    def artifact(self, digest: str) -> Path:
        """Where the dispatcher keeps the file of a stage or program."""
        return self.directory / "state" / "artifacts" / f"{digest}.safetensors"

    def close(self) -> None:
        """End every process, first by SIGTERM. Closing twice is nothing."""
        if not self._is_started:
            return
        self._is_started = False
        processes = [*self.workers, *([self.dispatcher] if hasattr(self, "dispatcher") else [])]
        for process in processes:
            process.resume()
            process.terminate()
        limit = time.monotonic() + STOP_TIMEOUT_S
        for process in processes:
            try:
                process.wait(timeout_s=max(limit - time.monotonic(), 0.1))
            except TimeoutError:
                process.kill()
        self._reaper.close()
        if self._given_directory is None:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _begin_worker(self, name: str | None = None, **settings: object) -> LocalProcess:
        name = name or f"w{len(self.workers) + 1}"
        given = {"dispatcher": self.address, "cache_dir": self.directory / "cache", **self._worker_settings, **settings}
        process = self._launch("worker", {"name": name, **given}, name=name)
        self.workers.append(process)
        return process

    def _launch(self, door: str, settings: Mapping[str, object], *, name: str) -> LocalProcess:
        flags = [
            part for key, value in settings.items() if value is not None for part in (f"--{key.replace('_', '-')}", str(value))
        ]
        return LocalProcess(name, [f"adapt.interfaces.cli.{door}", "--log-level", "info", *flags], self.directory, self._reaper)


def _field(line: str, key: str) -> str:
    """The value of `key=value` in a ready line."""
    return next(word.removeprefix(f"{key}=") for word in line.split() if word.startswith(f"{key}="))
