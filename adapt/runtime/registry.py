"""Membership behind two narrow interfaces: who has the right to belong to the cluster, whose reign it is, and where to find it.

    Registry     what a dispatcher asks      EmbeddedRegistry, here           EtcdRegistry, in registry_etcd.py
    Membership   what a worker asks          EmbeddedMembership, here         EtcdMembership, in membership_etcd.py

*Embedded*: the dispatcher itself keeps the leases, renewed by its workers' heartbeats, and counts its reigns in its state directory;
workers are told its address. Nothing has to be installed for it.

*etcd*: a worker keeps its own lease in etcd, and finds its dispatcher there; reigns are counted there too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from adapt.clock import Clock
from adapt.config import DispatcherConfig, WorkerConfig
from adapt.errors import ConfigError
from adapt.protocol.ids import Term, WorkerId
from adapt.runtime.state import StateDirectory
from adapt.scheduling.deadlines import Deadlines


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """Whom a registry tells what. Everything is called on the loop.

    Attributes:
        ended: a lease has ended without being revoked.
        renewed: one that had ended is in force again.
        surpassed: some other dispatcher has reigned with this term, and does no more; ours has to be higher.
        deposed: another dispatcher reigns now; the text says which.
    """

    ended: Callable[[WorkerId], None]
    renewed: Callable[[WorkerId], None]
    surpassed: Callable[[Term], None] = lambda term: None
    deposed: Callable[[str], None] = lambda reason: None


class Registry(Protocol):
    """What the dispatcher asks of membership, on its loop; nothing here waits but `campaign` and `close`. `now`: seconds, monotonic."""

    async def campaign(self) -> Term:
        """Begin a reign: a term higher than every earlier one. May wait until another dispatcher's has ended."""
        ...

    def announce(self, address: str) -> None:
        """The dispatcher listens here."""
        ...

    def raise_term(self, term: Term) -> None:
        """Remember a higher term, because somebody has met a higher one than ours."""
        ...

    def register(self, worker_id: WorkerId, now: float) -> None: ...

    def refresh(self, worker_id: WorkerId, now: float) -> None:
        """A heartbeat has come."""
        ...

    def revoke(self, worker_id: WorkerId) -> None:
        """The worker has left or is lost; it is of no interest until it registers again."""
        ...

    def watch(self, listener: Listener) -> None: ...

    def excuse(self, by_s: float) -> None:
        """The dispatcher itself stood still for so long, and could hear nobody."""
        ...

    def tick(self, now: float) -> None: ...

    def next_wakeup(self) -> float | None: ...

    def counters(self) -> Mapping[str, float]:
        """What users see of it in the dispatcher's status."""
        ...

    async def close(self) -> None: ...


class Membership(Protocol):
    """What a worker asks of membership, on its loop."""

    async def find(self) -> str:
        """The dispatcher's address. May wait until there is one."""
        ...

    def watch(self, moved: Callable[[], None]) -> None:
        """Call `moved` whenever `address` has changed."""
        ...

    @property
    def address(self) -> str:
        """The dispatcher's, as far as is known now."""
        ...

    def join(self, incarnation: int) -> None:
        """The dispatcher has welcomed us: hold a lease from now on. Again and again is as good as once."""
        ...

    def beat(self, now: float) -> None:
        """The worker's loop turns. Without this the lease is not renewed."""
        ...

    async def leave(self) -> None:
        """Give the lease back, and end."""
        ...


def open_registry(config: DispatcherConfig, state: StateDirectory, clock: Clock) -> Registry:
    """The one that the configuration names."""
    etcd = config.etcd
    if etcd is None:
        return EmbeddedRegistry(state, lease_ttl_s=config.lease_ttl_s)
    from adapt.runtime.registry_etcd import EtcdRegistry  # brings gRPC along

    return EtcdRegistry(etcd, state, lease_ttl_s=config.lease_ttl_s, advertise=config.advertise, clock=clock)


def open_membership(config: WorkerConfig, clock: Clock) -> Membership:
    """The one that the configuration names."""
    etcd = config.etcd
    if etcd is None:
        return EmbeddedMembership(config.dispatcher)
    from adapt.runtime.membership_etcd import EtcdMembership

    return EtcdMembership(etcd, WorkerId(config.name), via=config.via, clock=clock)


class EmbeddedRegistry:
    """Leases kept by the dispatcher itself, of `lease_ttl_s` seconds each."""

    def __init__(self, state: StateDirectory, *, lease_ttl_s: float) -> None:
        self._state, self._lease_ttl_s = state, lease_ttl_s
        self._leases: Deadlines[WorkerId] = Deadlines()
        self._listener = Listener(ended=lambda worker_id: None, renewed=lambda worker_id: None)

    async def campaign(self) -> Term:
        term = Term(self._state.read_term() + 1)
        write_term(self._state, term)
        return term

    def announce(self, address: str) -> None:
        pass  # workers are told by whoever starts them

    def raise_term(self, term: Term) -> None:
        self._state.write_term(term)

    def register(self, worker_id: WorkerId, now: float) -> None:
        self._leases.set(worker_id, now + self._lease_ttl_s)

    def refresh(self, worker_id: WorkerId, now: float) -> None:
        has_ended = worker_id not in self._leases
        self._leases.set(worker_id, now + self._lease_ttl_s)
        if has_ended:
            self._listener.renewed(worker_id)

    def revoke(self, worker_id: WorkerId) -> None:
        self._leases.clear(worker_id)

    def watch(self, listener: Listener) -> None:
        self._listener = listener

    def excuse(self, by_s: float) -> None:
        self._leases.postpone(by_s)

    def tick(self, now: float) -> None:
        for worker_id in self._leases.take_due(now):
            self._listener.ended(worker_id)

    def next_wakeup(self) -> float | None:
        return self._leases.next_wakeup()

    def counters(self) -> Mapping[str, float]:
        return {}

    async def close(self) -> None:
        pass


class EmbeddedMembership:
    """The worker is told where its dispatcher is; its heartbeats are all that its lease needs."""

    def __init__(self, address: str) -> None:
        self.address = address

    async def find(self) -> str:
        return self.address

    def watch(self, moved: Callable[[], None]) -> None:
        pass

    def join(self, incarnation: int) -> None:
        pass

    def beat(self, now: float) -> None:
        pass

    async def leave(self) -> None:
        pass


def write_term(state: StateDirectory, term: Term) -> None:
    """At the beginning of a reign. Raises ConfigError: the state directory cannot be written."""
    try:
        state.write_term(term)
    except OSError as error:
        raise ConfigError(f"state_dir={state.directory}: cannot be written: {error.strerror}") from error
