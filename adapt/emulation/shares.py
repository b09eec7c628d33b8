"""The CPU share of one machine, and that it does not count while its worker starts."""

from __future__ import annotations

import threading

from adapt.emulation.groups import Group


class CpuShare:
    """What share the group of a machine has. For several threads: the schedule, who waits until a worker is ready, and the user.

    state       what the group has          left by
    hurried     what `hurry` says           `settle`; in it a machine begins, without any limit
    settled     what is wanted              `hurry`

    Args:
        cores: what is wanted at first; None: no limit.
    """

    def __init__(self, group: Group, cores: float | None) -> None:
        self._group, self._wanted = group, cores
        self._is_hurried = True
        self._given: float | None = None
        self._lock = threading.Lock()

    def want(self, cores: float | None) -> None:
        """From now on this is its share; while it is hurried, as soon as it is not."""
        with self._lock:
            self._wanted = cores
            if not self._is_hurried:
                self._give(cores)

    def hurry(self, cores: float | None) -> None:
        """Until `settle` it has this."""
        with self._lock:
            self._is_hurried = True
            self._give(cores)

    def settle(self) -> None:
        """From now on it has the share that is wanted."""
        with self._lock:
            self._is_hurried = False
            self._give(self._wanted)

    def _give(self, cores: float | None) -> None:
        if cores != self._given:  # to write it again would let the machine run free for a moment
            self._group.limit_cores(cores)
            self._given = cores
