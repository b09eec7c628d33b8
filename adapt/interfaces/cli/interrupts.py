"""Signals that ask adapt emulate to end, and the user's command beside it."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Self

from adapt.errors import ConfigError

PATIENCE_S = 10.0  # for a command that has been asked to end
INSISTENCE_S = 3.0  # for one that has been told to
POLL_S = 0.05
LOOK_S = 0.5


class Interrupts:
    """Within it the first SIGINT, SIGTERM or SIGHUP is a `KeyboardInterrupt`; the others are only counted, so that no impatience leaves half
    of something behind. A signal that was ignored before, as SIGHUP under nohup, stays ignored. In the main thread.

    Attributes:
        count: of those that came. last: the last of them.
    """

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.count, self.last = 0, signal.SIGINT
        self._is_armed = False

    def __enter__(self) -> Self:
        self._is_armed = True
        self._before = {number: signal.getsignal(number) for number in self.NUMBERS}
        for number, before in self._before.items():
            if before is not signal.SIG_IGN:
                signal.signal(number, self._came)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.ignore()
        for number, before in self._before.items():
            signal.signal(number, before or signal.SIG_DFL)  # None: it was not of Python's making

    def ignore(self) -> None:
        """From now on they are only counted."""
        self._is_armed = False

    @contextmanager
    def put_off(self) -> Iterator[None]:
        """What comes within it interrupts at its end."""
        was_armed, self._is_armed = self._is_armed, False
        before = self.count
        try:
            yield
        finally:
            self._is_armed = was_armed
        if was_armed and self.count > before:
            self._is_armed = False
            raise KeyboardInterrupt

    def _came(self, number: int, frame: FrameType | None) -> None:
        self.count, self.last = self.count + 1, signal.Signals(number)
        if self._is_armed:
            self._is_armed = False
            raise KeyboardInterrupt


def run_command(command: Sequence[str], environ: Mapping[str, str], interrupts: Interrupts, look: Callable[[], None]) -> int:
    """Run it to its end; returns its exit status, negative for a signal.

    Args:
        look: is called now and then meanwhile.

    Raises:
        ConfigError: it cannot be run.
        KeyboardInterrupt: we were interrupted; it has ended.
    """
    process: subprocess.Popen[bytes] | None = None
    try:
        with interrupts.put_off():
            process = _begin(command, environ)
        while True:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(LOOK_S)
            look()
    except KeyboardInterrupt:
        if process is not None:
            _end(process, interrupts)
        raise


def _begin(command: Sequence[str], environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(command, env=dict(environ))
    except OSError as error:
        raise ConfigError(f"{command[0]!r} cannot be run: {error.strerror}") from None


def _end(process: subprocess.Popen[bytes], interrupts: Interrupts) -> None:
    """Ctrl-C has reached it already: the terminal tells the whole group. Another interrupt, or our patience's end, and it has to go."""
    if interrupts.last is not signal.SIGINT:
        process.terminate()
    limit = time.monotonic() + PATIENCE_S
    while process.poll() is None and interrupts.count < 2 and time.monotonic() < limit:  # the second may have come before we are here
        time.sleep(POLL_S)
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(INSISTENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
