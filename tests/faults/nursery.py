"""Starts processes of a cluster in a tenth of a second: forks of one process that has imported what they need.

    test ──Nursery.fork(command, ...)──▶ this file, run as a program ──fork──▶ the product's own door, in a process of its own

They are real processes, with signals, exit statuses and process ids; only the import of torch is shared. An import takes seconds on a
busy machine, and a test of faults starts dozens of workers. What is started says nothing of this: see `ForkedProcess`.

Whoever is forked dies when the nursery ends, and that ends with its test process, however this ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import weakref
from pathlib import Path
from typing import IO, NoReturn

ROOT = Path(__file__).resolve().parents[2]
WORKER, DISPATCHER = "adapt.interfaces.cli.worker", "adapt.interfaces.cli.dispatcher"
UNLUCKY, CLIENT = "tests.faults.worker_door", "tests.faults.client_process"
FORK_TIMEOUT_S = 120.0  # the first one waits for the import of torch
MAX_ORDER_BYTES = 1 << 16


class Nursery:
    """The test's side. The process starts at once, and imports when it is first asked."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {key: value for key, value in os.environ.items() if not key.startswith("ADAPT_")}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__)), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=environment,
                cwd=ROOT,
                process_group=0,
            )

    def fork(self, command: list[str], log: Path, inside: list[str]) -> Forked:
        """Start a module's `main` with its arguments, in that place; its standard error goes to the log."""
        output, its_output = os.pipe()
        end, its_end = os.pipe()
        order = json.dumps({"command": command, "log": str(log), "inside": inside}).encode()
        try:
            socket.send_fds(self._socket, [order], [its_output, its_end])
        finally:
            os.close(its_output)
            os.close(its_end)
        if not select.select([self._socket], [], [], FORK_TIMEOUT_S)[0]:
            raise TimeoutError(f"the nursery has not forked within {FORK_TIMEOUT_S:g} s")
        answer = self._socket.recv(MAX_ORDER_BYTES)
        if not answer:
            raise RuntimeError("the nursery has died")
        return Forked(int(answer), command, os.fdopen(output, "rb", buffering=0), end)

    def close(self) -> None:
        """End it, and with it all that it has forked."""
        self._socket.close()
        self._process.wait()


class Forked:
    """What `subprocess.Popen` is to its user, of a process that is the nursery's child."""

    def __init__(self, pid: int, args: list[str], stdout: IO[bytes], end: int) -> None:
        self.pid, self.args, self.stdout, self.returncode = pid, args, stdout, None
        self._end, self._reading = os.fdopen(end, "rb", buffering=0), threading.Lock()  # several threads may wait
        weakref.finalize(self, self._end.close)

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0.0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._end], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            with self._reading:
                if self.returncode is None:
                    self.returncode = int(self._end.read() or -signal.SIGKILL)  # nothing: the nursery itself was killed
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


# ── the program ──────────────────────────────────────────────────────────────────────────────────────────────────────


class _Room:
    """The nursery itself: forks as it is told, and passes on how each child has ended."""

    def __init__(self, orders: socket.socket) -> None:
        self._orders = orders
        self._ends: dict[int, int] = {}  # where to write the exit status, by process id
        self._woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        os.set_blocking(wake, False)
        self._wake = wake
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)

    def serve(self) -> None:
        while True:
            ready, _, _ = select.select([self._orders, self._woken], [], [])
            if self._woken in ready:
                os.read(self._woken, 4096)
                self._reap()
            if self._orders in ready:
                order, descriptors, _, _ = socket.recv_fds(self._orders, MAX_ORDER_BYTES, 2)
                if not order:
                    break
                self._fork(json.loads(order), *descriptors)
        for pid in self._ends:
            os.kill(pid, signal.SIGKILL)

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                pid, status = found
                if (end := self._ends.pop(pid, None)) is not None:
                    with contextlib.suppress(BrokenPipeError):  # nobody wants to know
                        os.write(end, str(os.waitstatus_to_exitcode(status)).encode())
                    os.close(end)

    def _fork(self, order: dict[str, object], output: int, end: int) -> None:
        _import(order["command"][0])  # type: ignore[index]
        pid = os.fork()
        if pid:
            os.close(output)
            self._ends[pid] = end
            self._orders.send(str(pid).encode())
            return
        for descriptor in (self._orders.fileno(), self._woken, self._wake, end, *self._ends.values()):
            os.close(descriptor)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _live(order, output)


def _import(module: str) -> object:
    """All that the children need is imported before they are made, but nothing computed: threads do not survive a fork."""
    import importlib

    if module in (WORKER, UNLUCKY):
        importlib.import_module("adapt.runtime.worker")
    return importlib.import_module(module)


def _live(order: dict[str, object], output: int) -> NoReturn:
    """The child, to its end."""
    status = 1
    try:
        os.setpgid(0, 0)
        log = os.open(str(order["log"]), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        null = os.open(os.devnull, os.O_RDONLY)
        for number, descriptor in enumerate((null, output, log)):
            os.dup2(descriptor, number)
            os.close(descriptor)
        _enter(order["inside"])  # type: ignore[arg-type]
        module, *arguments = order["command"]  # type: ignore[misc]
        status = _import(module).main(arguments)  # type: ignore[attr-defined]
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _enter(inside: list[str]) -> None:
    """Go to the machine that a command like `enter.py ... --` names. `ulimit N`: no more open files than N."""
    import resource

    if inside[:1] == ["ulimit"]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (int(inside[1]), int(inside[1])))
    elif inside:
        from adapt.emulation import enter

        place = next(index for index, word in enumerate(inside) if word.endswith("enter.py"))
        network, groups, _ = enter.parse([*inside[place + 1 :], "nothing"])
        for group in groups:
            enter.join_group(group)
        if network is not None:
            enter.enter_network(os.open(network, os.O_RDONLY | os.O_CLOEXEC))


def _main() -> None:
    sys.path.insert(0, str(ROOT))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal is the test's to deal with
    _Room(socket.socket(fileno=int(sys.argv[1]))).serve()
    limit = time.monotonic() + 5.0
    with contextlib.suppress(ChildProcessError):
        while time.monotonic() < limit:
            os.waitpid(-1, 0)


if __name__ == "__main__":
    _main()
