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
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from adapt.errors import AdaptError, ConfigError
from adapt.runtime.forks import forget_in_forks

READY_TIMEOUT_S = 60.0  # importing torch on a busy small board takes its time
STOP_TIMEOUT_S = 10.0
REAPER_TIMEOUT_S = 2.0
LOOK_S = 0.2  # so often, who waits for a line looks whether the process still lives
ENDING = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGINT})
LOG_TAIL = 2000
MAX_WORKERS = 256


class Life:
    """One start of a `LocalProcess`, until that very process ends: what is awaited of it is not mixed up with a later one's. For several
    threads.

    Attributes:
        is_told_to_end: it was sent a signal that ends.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process, self.is_told_to_end = process, False
        self._said, self._reading = b"", threading.Lock()

    @property
    def is_alive(self) -> bool:
        """Whether the process exists, stopped or not."""
        return self.process.poll() is None

    def first_line(self, timeout_s: float) -> str | None:
        """Its first line of output, however often it is asked for; an unfinished one if it ended; None if nothing comes in time."""
        limit = time.monotonic() + timeout_s
        if not self._reading.acquire(timeout=min(timeout_s, threading.TIMEOUT_MAX)):
            return None
        try:
            is_all = self._read_line(limit)
        finally:
            self._reading.release()
        return self._said.decode(errors="replace").strip() if is_all else None

    def _read_line(self, limit: float) -> bool:
        """Whether all has been read of it that will come. In short waits: what else holds the pipe open must not keep us."""
        pipe = self.process.stdout
        assert pipe is not None
        if self._said.endswith(b"\n") or pipe.closed:
            return True
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while not self._said.endswith(b"\n"):
                has_ended, left_s = not self.is_alive, limit - time.monotonic()
                if not selector.select(0.0 if has_ended else max(min(left_s, LOOK_S), 0.0)):
                    if has_ended or left_s <= 0:
                        return has_ended
                    continue
                data = os.read(pipe.fileno(), 1)  # no more than this line; it is short
                if not data:
                    break
                self._said += data
        return True

    def close(self) -> None:
        """After its end."""
        with self._reading:
            if self.process.stdout is not None:
                self.process.stdout.close()


class LocalProcess:
    """One process of a cluster. Its standard error goes to a log file in the cluster's directory.

    Attributes:
        name: of the worker, or "dispatcher".
        log: the file; a restart goes on in it.
        life: since its last start.
        ready: its ready line; empty until that has come.

    Args:
        command: a module and its arguments.
        inside: a command that runs the rest of its line, with the same process id, in some other place.
    """

    def __init__(self, name: str, command: Sequence[str], directory: Path, reaper: Reaper, *, inside: Sequence[str] = ()) -> None:
        self.name, self._command, self._inside, self._reaper = name, list(command), list(inside), reaper
        self.log = directory / f"{name}.log"
        self.ready = ""
        self.life = self._start()

    def _start(self) -> Life:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("ADAPT_")}  # flags say it all
        with open(self.log, "ab") as log:
            process = subprocess.Popen(
                [*self._inside, *self._line()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                process_group=0,  # Ctrl-C in the terminal is for the user's program, which may want to go on
            )
        self._reaper.add(process.pid)
        return Life(process)

    def _line(self) -> list[str]:
        return [sys.executable, "-m", *self._command]

    def __repr__(self) -> str:
        state = "alive" if self.is_alive else f"ended with status {self.status}"
        return f"<adapt process {self.name}: pid {self.pid}, {state}>"

    @property
    def pid(self) -> int:
        return self.life.process.pid

    @property
    def is_alive(self) -> bool:
        """Whether the process exists, stopped or not."""
        return self.life.is_alive

    @property
    def status(self) -> int | None:
        """Exit status, negative for a signal; None while it lives."""
        return self.life.process.poll()

    def wait_ready(self, timeout_s: float = READY_TIMEOUT_S, *, life: Life | None = None) -> None:
        """Wait for its ready line.

        Args:
            life: the one that is waited for, even if it has been started anew since; by default the one of now.

        Raises:
            AdaptError: it dies first or takes too long; with the end of its log.
        """
        life = life or self.life
        line = life.first_line(timeout_s)
        if line is None:
            raise AdaptError(f"{self.name} was not ready within {timeout_s:g} s; its log ends with:\n{self.log_tail()}")
        if " ready " not in line:
            with contextlib.suppress(TimeoutError):
                self._wait(life, STOP_TIMEOUT_S)
            status = "alive" if life.is_alive else f"with status {life.process.returncode}"
            raise AdaptError(f"{self.name} ended {status} before it was ready; its log ends with:\n{self.log_tail()}")
        if life is self.life:
            self.ready = line

    def kill(self) -> None:
        """SIGKILL: it dies at once, as by a pulled plug. Waits for that."""
        self.send_signal(signal.SIGKILL)
        self.wait()

    def stop(self) -> None:
        """SIGSTOP: it freezes, as a machine that hangs."""
        self.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT: it goes on where it was stopped."""
        self.send_signal(signal.SIGCONT)

    def terminate(self) -> None:
        """SIGTERM: it finishes what it holds and leaves."""
        self.send_signal(signal.SIGTERM)

    def wait(self, timeout_s: float | None = STOP_TIMEOUT_S) -> int:
        """Wait for its end; returns its exit status, negative for a signal. Raises TimeoutError."""
        return self._wait(self.life, timeout_s)

    def _wait(self, life: Life, timeout_s: float | None) -> int:
        try:
            status = life.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{self.name} has not ended within {timeout_s} s") from None
        self._reaper.remove(life.process.pid)
        life.close()
        return status

    def restart(self) -> None:
        """End it, if it lives, and start it anew with the same settings; a dispatcher comes back at its address."""
        self.end()
        self.begin_again()
        self.wait_ready()

    def begin_again(self) -> None:
        """Start it anew after its end, with the same settings, and do not wait until it is ready."""
        self.ready = ""
        self.life = self._start()

    def always(self, *flags: str) -> None:
        """From its next start on it has these flags too; the last of a kind counts."""
        self._command += flags

    def end(self, *, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """End it however that can be done: SIGTERM, after `timeout_s` SIGKILL."""
        self.resume()
        self.terminate()
        try:
            self.wait(timeout_s)
        except TimeoutError:
            self.kill()

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal; one that has ended gets none."""
        life = self.life
        if number in ENDING and life.is_alive:
            life.is_told_to_end = True
        life.process.send_signal(number)

    def log_tail(self) -> str:
        """How its log ends."""
        with contextlib.suppress(OSError):
            return self.log.read_text(errors="replace")[-LOG_TAIL:].strip() or "(nothing)"
        return "(it cannot be read)"


class Reaper:
    """Sees to it that no process outlives this one, even if this one is killed; see reaper.py.

    A process rather than PR_SET_PDEATHSIG: that signal comes when the thread ends which started the child.
    """

    def __init__(self) -> None:
        # Run as a file, without site-packages: it needs nothing of ADAPT, and should cost nothing. In a group of its own, so that what
        # kills ours spares it. Without a buffer, so that a fork can close its end of the pipe and take no lock.
        command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("reaper.py"))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, process_group=0, bufsize=0)
        forget_in_forks(self)

    def add(self, pid: int) -> None:
        self._tell(f"+{pid}\n")

    def remove(self, pid: int) -> None:
        self._tell(f"-{pid}\n")

    def close(self) -> None:
        """End it; whatever is still listed dies with it."""
        self.forget()
        try:
            self._process.wait(REAPER_TIMEOUT_S)
        except subprocess.TimeoutExpired:  # somebody else holds its pipe: a process that was forked past Python
            self._process.kill()
            self._process.wait()

    def forget(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it is gone: somebody was thorough
            self._process.stdin.write(line.encode())  # short: a pipe takes it whole


class LocalCluster:
    """A dispatcher and workers on this machine, for notebooks, demos and tests. Use it as a context manager, or `start` and `close` it.

    Nothing of it outlives this process, however that ends.

    Args:
        workers: how many to begin with; they are called w1, w2, ...
        threads: of each worker, within one operator.
        memory_limit: stage budget of each worker, as "512MiB" or in bytes; by default a share of this machine's memory.
        device: of each worker: "cpu", "cuda:0", "auto".
        models_dir: where the dispatcher looks for weights that are named, and for models that it deploys by itself.
        dispatcher: further settings of adapt-dispatcher, as {"lease_ttl": 2}.
        worker: further settings of adapt-worker.
        directory: for state, caches and logs; by default a temporary one that goes with the cluster.

    Attributes:
        address: for `Client`.
        dispatcher, workers: the processes; also workers that have ended stay in the list.
        directory: where state, caches and logs are.

    Raises:
        AdaptError: a process ended or hung before it was ready; the message has the end of its log.
    """

    def __init__(
        self,
        workers: int = 3,
        *,
        threads: int = 1,
        memory_limit: str | int | None = None,
        device: str = "cpu",
        models_dir: str | os.PathLike[str] | None = None,
        dispatcher: Mapping[str, object] | None = None,
        worker: Mapping[str, object] | None = None,
        directory: str | os.PathLike[str] | None = None,
    ) -> None:
        if isinstance(workers, bool) or not isinstance(workers, int) or not 0 <= workers <= MAX_WORKERS:
            raise ConfigError(f"workers={workers!r}: expected a number from 0 to {MAX_WORKERS}")
        self._count = workers
        self._dispatcher_settings = {"models_dir": models_dir, **(dispatcher or {})}
        self._worker_settings = {"threads": threads, "memory_limit": memory_limit, "device": device, **(worker or {})}
        self._given_directory = None if directory is None else Path(directory)
        self._finalizer: weakref.finalize[Any, Any] | None = None
        self.workers: list[LocalProcess] = []

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._finalizer is None or not self._finalizer.alive:
            return "<adapt local cluster, not running>"
        return f"<adapt local cluster at {self.address}: {sum(worker.is_alive for worker in self.workers)} of {len(self.workers)} workers alive>"

    def start(self) -> None:
        """Start everything and wait until it is ready. Entering the context manager does this."""
        if self._finalizer is not None and self._finalizer.alive:
            return
        self.workers.clear()
        self.directory = self._given_directory or Path(tempfile.mkdtemp(prefix="adapt-cluster-"))
        self._reaper = Reaper()
        self._processes: list[LocalProcess] = []  # all, in the order in which they are to end
        goes_with_us = None if self._given_directory else self.directory
        self._finalizer = weakref.finalize(self, _end, os.getpid(), self._processes, self._reaper, goes_with_us)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            settings = {"listen": "tcp://127.0.0.1:0", "state_dir": self._state_directory, **self._dispatcher_settings}
            self.dispatcher = self._launch("dispatcher", settings, name="dispatcher")
            self.dispatcher.wait_ready()
            self.address = ready_field(self.dispatcher.ready, "listen")
            self.dispatcher.always("--listen", self.address)  # a restart comes back where it was
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
        return self._state_directory / "artifacts" / f"{digest}.safetensors"

    def close(self) -> None:
        """End every process, first by SIGTERM. Closing twice is nothing."""
        if self._finalizer is not None:
            self._finalizer()

    @property
    def _state_directory(self) -> Path:
        return Path(str(self._dispatcher_settings.get("state_dir", self.directory / "state")))

    def _begin_worker(self, name: str | None = None, **settings: object) -> LocalProcess:
        name = name or f"w{len(self.workers) + 1}"
        given = {"dispatcher": self.address, "cache_dir": self.directory / "cache", **self._worker_settings, **settings}
        process = self._launch("worker", {"name": name, **given}, name=name)
        self.workers.append(process)
        return process

    def _launch(self, door: str, settings: Mapping[str, object], *, name: str) -> LocalProcess:
        command = [f"adapt.interfaces.cli.{door}", "--log-level", "info", *as_flags(settings)]
        process = LocalProcess(name, command, self.directory, self._reaper)
        self._processes.append(process)
        return process


def _end(owner: int, processes: Sequence[LocalProcess], reaper: Reaper, directory: Path | None) -> None:
    """Also called for a cluster that was forgotten, at the latest when the interpreter ends. A fork of the owner owns nothing."""
    if os.getpid() != owner:
        return
    for process in processes:
        process.resume()
        process.terminate()
    limit = time.monotonic() + STOP_TIMEOUT_S
    for process in processes:
        process.end(timeout_s=max(limit - time.monotonic(), 0.1))
    reaper.close()
    if directory is not None:
        shutil.rmtree(directory, ignore_errors=True)


def as_flags(settings: Mapping[str, object]) -> list[str]:
    """{"lease_ttl": 2, "insecure": True} as --lease-ttl 2 --insecure; None and False are left out."""
    flags: list[str] = []
    for key, value in settings.items():
        if value is None or value is False:
            continue
        flags.append(f"--{key.replace('_', '-')}")
        if value is not True:
            flags.append(str(value))
    return flags


def ready_field(line: str, key: str) -> str:
    """The value of `key=value` in a ready line."""
    return next(word.removeprefix(f"{key}=") for word in line.split() if word.startswith(f"{key}="))
