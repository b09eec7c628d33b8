"""When a worker is told that its answers have come: with the next task that it gets, or a little later. Pure.

An answer is kept by its worker until then, so the wait is short; yet each acknowledgement by itself would be a message for every task.
"""

from __future__ import annotations

from adapt.protocol.ids import AttemptId, WorkerId

ACK_S = 0.1  # how long a worker may wait for an acknowledgement, if no task comes that it can ride on


class Acknowledgements:
    """Those that are owed. `now`: seconds, monotonic, never going back."""

    def __init__(self) -> None:
        self._owed: dict[WorkerId, list[AttemptId]] = {}
        self._due: float | None = None  # when the first of them has to be said
        self._addressed: set[WorkerId] = set()  # who gets a task in this turn

    def owe(self, worker_id: WorkerId, attempt: AttemptId) -> None:
        self._owed.setdefault(worker_id, []).append(attempt)

    def addressed(self, worker_id: WorkerId) -> None:
        """It is sent a task in this turn, on which its acknowledgements ride."""
        self._addressed.add(worker_id)

    def next_wakeup(self) -> float | None:
        return self._due

    def end_turn(self, now: float, *, is_last: bool = False) -> list[tuple[WorkerId, list[AttemptId]]]:
        """What is to be said now, to whom. `is_last`: nothing will be said later."""
        if self._due is None and self._owed:
            self._due = now + ACK_S
        is_due = is_last or (self._due is not None and self._due <= now)
        said = [(worker_id, self._owed.pop(worker_id)) for worker_id in list(self._owed) if is_due or worker_id in self._addressed]
        self._addressed.clear()
        if not self._owed:
            self._due = None
        return said
