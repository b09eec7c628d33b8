"""The client's one answer: for each request the first of reply, error, cancel and its own deadline, and no other. Pure.

    submitted ──▶ pending ──reply, error, cancel, deadline: whichever is first──▶ decided
                    │ ▲
                    └─┘ said again in every new session, with what `Accepted` has pinned it to

Whatever the dispatcher says of a decided request is acknowledged, so that it can forget it, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from adapt.protocol.ids import Digest, RequestId
from adapt.scheduling.deadlines import Deadlines


@dataclass(slots=True)
class Pending:
    """A request that has no outcome yet."""

    deadline: float
    version: int = 0  # 0 until it was accepted
    program: Digest | None = None


class Outcomes:
    """See the head of this file. `now`: seconds, monotonic."""

    def __init__(self) -> None:
        self._pending: dict[RequestId, Pending] = {}
        self._due: Deadlines[RequestId] = Deadlines()
        self._acks: list[RequestId] = []

    def __len__(self) -> int:
        return len(self._pending)

    def __iter__(self) -> Iterator[tuple[RequestId, Pending]]:
        """What has to be said (again), oldest first."""
        return iter(list(self._pending.items()))

    def submitted(self, request_id: RequestId, deadline: float) -> Pending:
        self._pending[request_id] = pending = Pending(deadline)
        self._due.set(request_id, deadline)
        return pending

    def accepted(self, request_id: RequestId, version: int, program: Digest) -> None:
        """The dispatcher has pinned the request; it is said again with this, so that no other version answers."""
        pending = self._pending.get(request_id)
        if pending is not None:
            pending.version, pending.program = version, program

    def answered(self, request_id: RequestId) -> bool:
        """A reply or an error has come. Whether it decides; it is acknowledged in any case."""
        self._acks.append(request_id)
        return self._decide(request_id)

    def cancelled(self, request_id: RequestId) -> bool:
        """The user does not want it any more. Whether that decides: then the dispatcher must be told."""
        return self._decide(request_id)

    def take_overdue(self, now: float) -> list[RequestId]:
        """The requests that their deadline has just decided; the dispatcher must be told to cancel them."""
        return [request_id for request_id in self._due.take_due(now) if self._decide(request_id)]

    def take_acks(self) -> list[RequestId]:
        acks, self._acks = self._acks, []
        return acks

    def next_wakeup(self) -> float | None:
        return self._due.next_wakeup()

    def _decide(self, request_id: RequestId) -> bool:
        self._due.clear(request_id)
        return self._pending.pop(request_id, None) is not None
