"""What else the machine of the tests does: how long it let nobody run, and what its own host took from it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

DISTURBED_S = 0.02  # taken by the host, or let nobody run, within any one second: from there on a measured time says little


class HostStall:
    """How long this machine let nobody run: a thread that sleeps a little, and sees how late it wakes."""

    STEP_S, FREE_S = 0.005, 0.02

    def __init__(self, look: Callable[[float], object] = lambda now: None) -> None:
        self._look = look  # called all the time, with the moment
        self._lates: list[tuple[float, float]] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="host-stall", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._is_over.wait(self.STEP_S):
            now = time.monotonic()
            self._look(now)
            if (late_s := now - before - self.STEP_S) > self.FREE_S:
                self._lates.append((now, late_s))
            before = now

    def between(self, since: float, until: float) -> float:
        """Seconds of it between two moments."""
        return sum(late_s for at, late_s in self._lates if since <= at <= until + self.STEP_S)

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()


class HostWatch:
    """From its making on, whether times that are measured say something about us, or about this machine's neighbours.

    Args:
        stolen_s: seconds of all cores that the host has given to other machines since this one has started.
    """

    def __init__(self, stolen_s: Callable[[], float] | None = None) -> None:
        self._stolen_s = stolen_s or _stolen_s
        self._seen: list[tuple[float, float]] = []
        self._stall = HostStall(self._look)

    def was_disturbed(self) -> bool:
        self._seen.append((time.monotonic(), self._stolen_s()))
        return any(
            stolen_s - before_s > DISTURBED_S or self._stall.between(since, until) > DISTURBED_S
            for (since, before_s), (until, stolen_s) in pairwise(self._seen)
        )

    def close(self) -> None:
        self._stall.close()

    def _look(self, now: float) -> None:
        """Once a second."""
        if not self._seen or now - self._seen[-1][0] >= 1.0:
            self._seen.append((now, self._stolen_s()))


def _stolen_s() -> float:
    of_all = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    return int(of_all[8]) / os.sysconf("SC_CLK_TCK")
