"""A lease service as the dispatcher meets it: late, sometimes silent, sometimes without memory.

Without a lag it is the embedded registry: leases kept where heartbeats arrive. With one it stands for a service beside the dispatcher.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from adapt.protocol.ids import WorkerId
from adapt.simulation.timeline import Timeline


class LeaseService:
    """Leases of `ttl_s` seconds, in true time: who asks and who watches hears of everything `lag_s` later, in order.

    Args:
        ended: called when a lease has ended without being revoked.
        renewed: called when one that had ended is in force again.
    """

    def __init__(
        self, timeline: Timeline, *, ttl_s: float, lag_s: float, ended: Callable[[WorkerId], None], renewed: Callable[[WorkerId], None]
    ) -> None:
        self._timeline, self._ttl_s, self._lag_s, self._ended, self._renewed = timeline, ttl_s, lag_s, ended, renewed
        self._leases: dict[WorkerId, float] = {}  # -> when it ends
        self._lapsed: dict[WorkerId, None] = {}  # ended, and the watcher was told
        self._news: deque[tuple[Callable[[WorkerId], None], WorkerId]] = deque()  # on its way to the watcher
        self._looks_at: float | None = None
        self.is_up = True
        self.term = 0  # the highest that was written down

    # ── what is asked of it ──────────────────────────────────────────────────────────────────────────────────────────

    def refresh(self, worker_id: WorkerId) -> None:
        """Hold the lease from now on, whether or not it was held before."""
        self._ask(self._refreshed, worker_id)

    def revoke(self, worker_id: WorkerId) -> None:
        self._ask(self._revoked, worker_id)

    def campaign(self) -> int:
        """The highest term that it remembers. An election waits until the service is there."""
        return self.term

    def write_term(self, term: int) -> None:
        self.term = max(self.term, term)

    def _ask(self, call: Callable[[WorkerId], None], worker_id: WorkerId) -> None:
        if not self.is_up:
            return
        if self._lag_s:
            self._timeline.after(self._lag_s, call, worker_id)
        else:
            call(worker_id)

    def _refreshed(self, worker_id: WorkerId) -> None:
        if not self.is_up:
            return
        self._leases[worker_id] = self._timeline.now + self._ttl_s
        if worker_id in self._lapsed:
            del self._lapsed[worker_id]
            self._tell(self._renewed, worker_id)
        self._look_later()

    def _revoked(self, worker_id: WorkerId) -> None:
        self._leases.pop(worker_id, None)
        self._lapsed.pop(worker_id, None)

    # ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _look_later(self) -> None:
        if self._leases and self._looks_at is None:
            self._looks_at = min(self._leases.values())
            self._timeline.at(self._looks_at, self._look)

    def _look(self) -> None:
        self._looks_at = None
        if not self.is_up:
            return
        now = self._timeline.now
        for worker_id in [worker_id for worker_id, end in self._leases.items() if end <= now]:
            self._lapse(worker_id)
        self._look_later()

    def _lapse(self, worker_id: WorkerId) -> None:
        del self._leases[worker_id]
        self._lapsed[worker_id] = None
        self._tell(self._ended, worker_id)

    def _tell(self, call: Callable[[WorkerId], None], worker_id: WorkerId) -> None:
        self._news.append((call, worker_id))
        self._timeline.after(self._lag_s, self._tell_next)

    def _tell_next(self) -> None:
        call, worker_id = self._news.popleft()
        call(worker_id)

    # ── faults ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def stop(self) -> None:
        """It answers nothing, and no lease ends."""
        self.is_up = False

    def start(self, *, forgives: bool) -> None:
        """It is back. Either every lease has its full time again, or all that have run out end together."""
        self.is_up = True
        if forgives:
            self._leases = dict.fromkeys(self._leases, self._timeline.now + self._ttl_s)
        self._look_later()

    def wipe(self) -> None:
        """All that it knew is gone: every lease ends at once, and the term is forgotten."""
        self.term = 0
        for worker_id in list(self._leases):
            self._lapse(worker_id)
