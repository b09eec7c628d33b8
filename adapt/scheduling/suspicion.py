"""Which tasks may have killed a worker, and how it is found out which of them has.

a worker dies     all that it may have been running is suspected: nobody may have lived to say which of it had begun, or ended
tried again       with nothing ahead of it and nothing behind: if that worker dies as well, it can have been nothing else
"""

from __future__ import annotations

import math

from adapt.protocol.ids import AttemptId, RequestId
from adapt.scheduling.roster import Member

REACHED_S = 0.001  # what was sent less than this ago has not reached its worker
SPENT = 0.5  # share of the time that a task was expected to take, after which it may have ended


def suspects(member: Member, now: float, refused_since: float = math.inf) -> set[AttemptId]:
    """What the worker may have been running when it died: the task that it said it had begun last, else the first that it was given, and what
    stood behind that, as far as each one before may have ended. What it said of that may have died with it.

    But not what was sent a moment ago: it had not left, or a stalled dispatcher would blame it for all deaths that it reads of. Nor what was
    sent when the connection had stopped taking anything, which is known from `refused_since` on."""
    found: set[AttemptId] = set()
    may_be_next = True
    for attempt, slot in member.slots.items():
        if slot.begun_at is not None:  # what came before has ended
            found, may_be_next = {attempt}, slot.is_short or now - slot.begun_at >= SPENT * slot.busy_s
        elif may_be_next and now - slot.since >= REACHED_S and slot.since < refused_since:
            found.add(attempt)
            may_be_next = slot.is_short  # else its worker would have said that it had begun
        else:
            may_be_next = False
    return found


class Isolation:
    """The workers that are kept for one request each: they finish what they hold, and get nothing else before it. Such a request is in no queue
    of its stage, where it would stand before others that can be served; it has a ticket all the same."""

    def __init__(self) -> None:
        self._kept: dict[RequestId, Member] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, request_id: RequestId) -> bool:
        """Whether a worker is kept for the request."""
        return request_id in self._kept

    def waiting(self) -> list[RequestId]:
        """For whom a worker is kept."""
        return list(self._kept)

    def of(self, request_id: RequestId) -> Member | None:
        """Who is kept for the request."""
        return self._kept.get(request_id)

    @staticmethod
    def choose(mine: Member | None, eligible: list[Member], now: float) -> Member | None:
        """Who should be empty first, of those that are kept for nobody else and do not run such a request now; None: nobody. `mine`, who is kept
        already, as long as it is not later by more than another would take: it may hang, but whoever is let go is filled again at once."""
        free = [member for member in eligible if member is not mine and not (member.is_kept or member.alone)]
        other = min(free, key=lambda member: (member.backlog_s(now), member.worker_id), default=None)
        if mine is None or not any(member is mine for member in eligible):
            return other
        is_better = other is not None and now - mine.busy_until > other.backlog_s(now)
        return other if is_better else mine

    def keep(self, request_id: RequestId, member: Member) -> None:
        self._kept[request_id] = member
        member.is_kept = True

    def release(self, request_id: RequestId) -> Member | None:
        """The worker that was kept for the request, if one was: it may get other work."""
        member = self._kept.pop(request_id, None)
        if member is not None:
            member.is_kept = False
        return member
