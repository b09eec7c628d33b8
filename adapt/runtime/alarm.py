"""One timer that is set again and again, at the cost of few."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from adapt.clock import Clock


class Alarm:
    """Calls `ring` on the running loop at the moment set, or sooner: whoever is woken looks what is due, and sets it again.

    An earlier moment that is not needed any more is left to ring in vain: that is once, and to cancel it would be every time.
    """

    def __init__(self, ring: Callable[[], None], clock: Clock) -> None:
        self._ring, self._clock = ring, clock
        self._handle: asyncio.TimerHandle | None = None
        self._moment = 0.0

    def set(self, moment: float | None) -> None:
        """`moment` on the clock; None: nothing is due."""
        if moment is None or (self._handle is not None and self._moment <= moment):
            return
        self.cancel()
        self._moment = moment
        self._handle = asyncio.get_running_loop().call_later(max(moment - self._clock(), 0.0), self._rings)

    def may_be_due(self, now: float) -> bool:
        """Whether what it was set for may have come; if not, there is nothing to look for."""
        return self._handle is None or self._moment <= now

    def cancel(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _rings(self) -> None:
        self._handle = None
        self._ring()
