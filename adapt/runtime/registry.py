"""Membership behind one narrow interface: who has the right to belong to the cluster, and whose reign it is.

One implementation so far: *embedded*, where the dispatcher itself keeps the leases, renewed by its workers' heartbeats, and counts
its reigns in its state directory. Nothing has to be installed for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from adapt.errors import ConfigError
from adapt.protocol.ids import Term, WorkerId
from adapt.runtime.state import StateDirectory
from adapt.scheduling.deadlines import Deadlines


class Registry(Protocol):
    """What the dispatcher asks of membership. `now`: seconds, monotonic."""

    def campaign(self) -> Term:
        """Begin a reign: a term higher than every earlier one."""
        ...

    def raise_term(self, term: Term) -> None:
        """Remember a higher term, because somebody has met a higher one than ours."""
        ...

    def register(self, worker_id: WorkerId, now: float) -> None: ...

    def refresh(self, worker_id: WorkerId, now: float) -> None: ...

    def revoke(self, worker_id: WorkerId) -> None: ...

    def watch(self, *, ended: Callable[[WorkerId], None], renewed: Callable[[WorkerId], None]) -> None:
        """Call `ended` whenever a lease has ended without being revoked, `renewed` when one that had ended is in force again."""
        ...

    def tick(self, now: float) -> None: ...

    def next_wakeup(self) -> float | None: ...


class EmbeddedRegistry:
    """Leases kept by the dispatcher itself, of `lease_ttl_s` seconds each."""

    def __init__(self, state: StateDirectory, *, lease_ttl_s: float) -> None:
        self._state, self._lease_ttl_s = state, lease_ttl_s
        self._leases: Deadlines[WorkerId] = Deadlines()
        self._ended: Callable[[WorkerId], None] = lambda worker_id: None
        self._renewed: Callable[[WorkerId], None] = lambda worker_id: None

    def campaign(self) -> Term:
        term = Term(self._state.read_term() + 1)
        try:
            self._state.write_term(term)
        except OSError as error:
            raise ConfigError(f"state_dir={self._state.directory}: cannot be written: {error.strerror}") from error
        return term

    def raise_term(self, term: Term) -> None:
        self._state.write_term(term)

    def register(self, worker_id: WorkerId, now: float) -> None:
        self._leases.set(worker_id, now + self._lease_ttl_s)

    def refresh(self, worker_id: WorkerId, now: float) -> None:
        has_ended = worker_id not in self._leases
        self._leases.set(worker_id, now + self._lease_ttl_s)
        if has_ended:
            self._renewed(worker_id)

    def revoke(self, worker_id: WorkerId) -> None:
        self._leases.clear(worker_id)

    def watch(self, *, ended: Callable[[WorkerId], None], renewed: Callable[[WorkerId], None]) -> None:
        self._ended, self._renewed = ended, renewed

    def tick(self, now: float) -> None:
        for worker_id in self._leases.take_due(now):
            self._ended(worker_id)

    def next_wakeup(self) -> float | None:
        return self._leases.next_wakeup()
