"""Looks after a computation that may never end. A thread cannot be ended, so the process has to be.

On a thread of its own: what hangs may be the loop itself, where short stages run.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Protocol

log = logging.getLogger(__name__)

LOOKS = 8  # within the time after which something hangs


class Hanging(Protocol):
    def hanging_s(self, limit_s: float) -> float | None:
        """How long something has been computing that nobody waits for any more, if that is more than the limit. On any thread."""


class Watchdog:
    """Calls `on_hang`, once and on its own thread, when a computation hangs.

    Args:
        limit_s: what takes less does not hang.
        on_hang: is given what to say of it; it does not return, or the watching ends.
    """

    def __init__(self, executor: Hanging, *, limit_s: float, on_hang: Callable[[str], None]) -> None:
        self._executor, self._limit_s, self._on_hang = executor, limit_s, on_hang
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="adapt-watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._is_over.set()

    def _watch(self) -> None:
        while not self._is_over.wait(self._limit_s / LOOKS):
            took_s = self._executor.hanging_s(self._limit_s)
            if took_s is not None:
                words = f"a stage has been computing for {took_s:.0f} s, and nobody waits for it any more: this worker begins anew"
                log.error(words)
                self._on_hang(words)
                return
