"""The side that starts and steers the link proxy; see proxy.py for what that does."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from adapt.emulation.proxy import DIRECTIONS, Direction
from adapt.errors import AdaptError
from adapt.runtime.forks import forget_in_forks

ANSWER_TIMEOUT_S = 30.0  # it answers at once, but this machine may be busy
STOP_TIMEOUT_S = 5.0
LAST_WORDS = 2000


@dataclass(frozen=True, slots=True)
class Carried:
    """Bytes of one direction of a device's link: delivered; changed on the way."""

    carried_bytes: int
    corrupted_bytes: int


class LinkProxy:
    """The links of emulated devices, in a process of its own, which does not outlive this one. For several threads.

    Every call waits for its answer. It raises AdaptError, with the proxy's words, if that cannot do it or is gone.

    Args:
        seed: of jitter and corrupted bytes.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._heard = b""

    def start(self) -> None:
        """Start the process and wait until it answers."""
        with self._lock:
            if self._process is not None:
                raise AdaptError("the link proxy runs already")
            self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(Path(__file__).with_name("proxy.py")), str(self._seed)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                bufsize=0,
                process_group=0,  # what ends our group is for us, and we end it then
            )
            self._heard = b""
        forget_in_forks(self)
        self.counters()

    @property
    def pid(self) -> int:
        return self._running().pid

    def add(
        self, device: str, *, namespace: Path | None, target: tuple[str, int], latency_s: float = 0.0, jitter_s: float = 0.0
    ) -> tuple[str, int]:
        """A link for a device.

        Args:
            namespace: the device's network namespace; None for this process's.
            target: where its connections go, seen from there; an IPv4 address.
            latency_s, jitter_s: in each direction: latency and, on top, between nothing and jitter.

        Returns:
            Where the device is to connect, seen from there.
        """
        where = None if namespace is None else os.fspath(namespace)
        host, port = self._ask(
            "add", device=device, namespace=where, host=target[0], port=target[1], latency_s=latency_s, jitter_s=jitter_s
        )
        return host, port

    def set_target(self, device: str, target: tuple[str, int]) -> None:
        """Where new connections go."""
        self._ask("set_target", device=device, host=target[0], port=target[1])

    def delay(self, device: str, latency_s: float, jitter_s: float = 0.0) -> None:
        """What is sent from now on is so late. It does not overtake what was sent before."""
        self._ask("delay", device=device, latency_s=latency_s, jitter_s=jitter_s)

    def stall(self, device: str) -> None:
        """Nothing moves; connections stay open, and new ones are taken. Nothing is lost: it moves on after `restore`."""
        self.cut(device, "both")

    def cut(self, device: str, direction: str) -> None:
        """Nothing moves in this direction ("up", "down", "both"), as behind a stall; and no new connection is made in any."""
        if direction not in (*DIRECTIONS, "both"):
            raise AdaptError(f"direction={direction!r}: expected up, down or both")
        self._ask("hold", device=device, directions=DIRECTIONS if direction == "both" else (direction,))

    def reset(self, device: str) -> None:
        """Both sides of all its connections get an RST; what was on the way is gone. New connections are taken."""
        self._ask("reset", device=device)

    def corrupt(self, device: str, per_mib: float) -> None:
        """From now on so many bytes per MiB are changed in each direction: see `proxy.corruptions`, offsets count from now."""
        self._ask("corrupt", device=device, per_mib=per_mib)

    def restore(
        self, device: str, *, late: tuple[float, float] | None = None, held: Collection[Direction] = (), per_mib: float = 0.0
    ) -> None:
        """All but its target is as `add` said, in one step.

        Args:
            late, held, per_mib: what remains otherwise: latency and jitter, directions in which nothing moves, bytes that are changed.
        """
        self._ask("restore", device=device, late=late, held=sorted(held), per_mib=per_mib)

    def counters(self) -> dict[tuple[str, Direction], Carried]:
        """Of all links since they were added."""
        return {(device, direction): Carried(*figures) for device, direction, *figures in self._ask("counters")}

    def close(self) -> None:
        """End the process and with it all connections. Closing twice is nothing."""
        with self._lock:
            if self._process is not None:
                self._end(self._process)
                self._process = None
            if self._errors is not None:
                self._errors.close()
                self._errors = None

    def forget(self) -> None:
        """In a fork: its end of the pipe would keep the proxy alive."""
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise AdaptError("the link proxy does not run")
        return self._process

    def _ask(self, do: str, **facts: Any) -> Any:
        command = json.dumps({"do": do, **facts}).encode() + b"\n"
        with self._lock:
            process = self._running()
            assert process.stdin is not None
            try:
                process.stdin.write(command)  # short: a pipe takes it whole
            except OSError:
                raise AdaptError(self._obituary(process)) from None
            answer = json.loads(self._read_line(process))
        if "error" in answer:
            raise AdaptError(f"link proxy: {answer['error']}")
        return answer["is"]

    def _read_line(self, process: subprocess.Popen[bytes]) -> bytes:
        """Its answer. Raises AdaptError if there comes none; after a timeout nothing else is asked, as answers would be mixed up."""
        assert process.stdout is not None
        limit = time.monotonic() + ANSWER_TIMEOUT_S
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._heard:
                if not selector.select(max(limit - time.monotonic(), 0.0)):
                    process.kill()
                    raise AdaptError(f"the link proxy did not answer within {ANSWER_TIMEOUT_S:g} s, and was ended")
                data = os.read(process.stdout.fileno(), 65536)
                if not data:
                    raise AdaptError(self._obituary(process))
                self._heard += data
        line, _, self._heard = self._heard.partition(b"\n")
        return line

    def _obituary(self, process: subprocess.Popen[bytes]) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
        words = ""
        if self._errors is not None:
            self._errors.seek(0)
            words = self._errors.read().decode(errors="replace")[-LAST_WORDS:].strip()
        return f"the link proxy has ended with status {process.returncode}" + (f"; its last words:\n{words}" if words else "")
