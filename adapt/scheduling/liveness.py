"""Who still answers: lease x heartbeat x connection gives one of three verdicts about a worker.

    lease   heartbeat  connection   verdict   because
    live    heard      up           ready
    live    heard      down         suspect   perhaps a cable, perhaps its death: the grace decides
    live    silent     up           suspect   hung or stopped; its connection may still be held open by its kernel
    live    silent     down         suspect
    ended   heard      up           ready     a stalled registry removes nobody who works
    ended   heard      down         lost
    ended   silent     up           lost
    ended   silent     down         lost

A connection that stays down longer than the grace makes a worker lost whatever its lease says. A *suspect* gets nothing new and its
tasks get another attempt; a *lost* worker is out of the plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from adapt.protocol.ids import WorkerId
from adapt.scheduling.deadlines import Deadlines

LAG_S = 0.25  # a dispatcher's loop that comes this late has been standing still itself: it reads its sockets before it judges anybody


class Verdict(StrEnum):
    READY = "ready"
    SUSPECT = "suspect"
    LOST = "lost"


TABLE: dict[tuple[bool, bool, bool], Verdict] = {
    # (lease live, heard, connected)
    (True, True, True): Verdict.READY,
    (True, True, False): Verdict.SUSPECT,
    (True, False, True): Verdict.SUSPECT,
    (True, False, False): Verdict.SUSPECT,
    (False, True, True): Verdict.READY,
    (False, True, False): Verdict.LOST,
    (False, False, True): Verdict.LOST,
    (False, False, False): Verdict.LOST,
}


@dataclass(slots=True)
class _Signs:
    """What is known of one worker."""

    lease_live: bool
    heard: bool
    connected: bool
    out_of_grace: bool = False

    @property
    def verdict(self) -> Verdict:
        if self.out_of_grace:
            return Verdict.LOST
        return TABLE[self.lease_live, self.heard, self.connected]


class Liveness:
    """The verdicts, from facts and the passing of time. `now`: seconds, monotonic, never going back."""

    def __init__(self, *, silence_s: float, grace_s: float) -> None:
        self._silence_s, self._grace_s = silence_s, grace_s
        self._signs: dict[WorkerId, _Signs] = {}
        self._due: Deadlines[tuple[str, WorkerId]] = Deadlines()

    def verdict(self, worker_id: WorkerId) -> Verdict:
        """A worker that was never heard of is lost."""
        signs = self._signs.get(worker_id)
        return Verdict.LOST if signs is None else signs.verdict

    def reason(self, worker_id: WorkerId) -> str:
        """Why a worker is suspect or lost, in words."""
        signs = self._signs.get(worker_id)
        if signs is None:
            return "it has left"
        if signs.out_of_grace:
            return f"it has had no connection for {self._grace_s:g} s"
        what = f"it has been silent for {self._silence_s:g} s" if signs.connected else "its connection is down"
        return what if signs.lease_live else f"its lease has ended, and {what}"

    def expected(self, worker_id: WorkerId, now: float) -> None:
        """The worker belonged to an earlier reign; it has the grace to come back."""
        self._signs[worker_id] = _Signs(lease_live=True, heard=False, connected=False)
        self._due.set(("grace", worker_id), now + self._grace_s)

    def connected(self, worker_id: WorkerId, now: float) -> None:
        self._signs[worker_id] = _Signs(lease_live=True, heard=True, connected=True)
        self._due.clear(("grace", worker_id))
        self._due.set(("silence", worker_id), now + self._silence_s)

    def heard(self, worker_id: WorkerId, now: float) -> None:
        """A sign of life. Only a connection can carry one, so this changes nothing for a worker that has none."""
        signs = self._signs.get(worker_id)
        if signs is not None and signs.connected:
            signs.heard = True
            self._due.set(("silence", worker_id), now + self._silence_s)

    def disconnected(self, worker_id: WorkerId, now: float) -> None:
        signs = self._signs.get(worker_id)
        if signs is not None and signs.connected:
            signs.connected = False
            self._due.set(("grace", worker_id), now + self._grace_s)

    def lease_renewed(self, worker_id: WorkerId) -> None:
        if worker_id in self._signs:
            self._signs[worker_id].lease_live = True

    def lease_ended(self, worker_id: WorkerId) -> None:
        if worker_id in self._signs:
            self._signs[worker_id].lease_live = False

    def forget(self, worker_id: WorkerId) -> None:
        self._signs.pop(worker_id, None)
        self._due.clear(("grace", worker_id))
        self._due.clear(("silence", worker_id))

    def excuse(self, by_s: float) -> None:
        """It was we who heard nobody for so long."""
        self._due.postpone(by_s)

    def tick(self, now: float) -> list[WorkerId]:
        """Note what has fallen due; returns the workers concerned, whose verdict may have changed."""
        touched = []
        for kind, worker_id in self._due.take_due(now):
            signs = self._signs[worker_id]
            if kind == "silence":
                signs.heard = False
            else:
                signs.out_of_grace = True
            touched.append(worker_id)
        return touched

    def next_wakeup(self) -> float | None:
        return self._due.next_wakeup()
