"""What else the machine of the tests does: how long it let nobody run, and what its own host took from it."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

STOLEN, STALLED = 0.01, 0.01  # shares of the time from which on a measured time says little: one core's stolen, all threads' stood still


class HostStall:
    """How long this machine let nobody run: a thread that sleeps a little, and sees how late it wakes."""

    STEP_S, FREE_S = 0.005, 0.02

    def __init__(self) -> None:
        self._lates: list[tuple[float, float]] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="host-stall", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._is_over.wait(self.STEP_S):
            now = time.monotonic()
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
    """From its making on, whether times that are measured say something about us, or about this machine's neighbours."""

    def __init__(self) -> None:
        self._stall, self._began, self._stolen_s = HostStall(), time.monotonic(), _stolen_s()

    def was_disturbed(self) -> bool:
        now = time.monotonic()
        took_s = now - self._began
        return _stolen_s() - self._stolen_s > STOLEN * took_s or self._stall.between(self._began, now) > STALLED * took_s

    def close(self) -> None:
        self._stall.close()


def _stolen_s() -> float:
    """Seconds of all cores that the host gave to other machines, since this one has started."""
    of_all = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    return int(of_all[8]) / os.sysconf("SC_CLK_TCK")
