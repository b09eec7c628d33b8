"""A thread that stays in touch with etcd, whatever etcd does, and lets nobody wait for it.

    AWAY   connect to the next member; read what is watched; watch from there on        → WELL
    WELL   every third of the lease, and whenever woken: let the role tend what it keeps
    WELL   a call fails or takes too long, the watch breaks, another history is met     → AWAY, after a pause
    any    stop                                                                         → the role takes its leave, if WELL

Each time everything is read anew, so nothing has to be known about what was missed: neither of compacted revisions nor of an etcd that
was wiped and has begun to count from one. A member that is stopped answers nothing and ends nothing; it is found by the calls that tend.

The pause grows to a second: etcd is met again soon after it is back, and a dispatcher without it does next to nothing more.
"""

from __future__ import annotations

import logging
import math
import random
import threading
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from typing import Protocol

from adapt.clock import Clock, monotonic
from adapt.config import EtcdSettings
from adapt.errors import AdaptError, ConfigError
from adapt.runtime.etcd_link import Entry, EtcdAwayError, EtcdError, EtcdFullError, EtcdLink, EtcdRefusedError, Lease, Snapshot

log = logging.getLogger(__name__)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0
SHORTEST_TIMEOUT_S, LONGEST_TIMEOUT_S = 1.0, 3.0
TENDED_PER_LEASE = 3
JOIN_S = 10.0  # more than the calls that may be under way take


class Role(Protocol):
    """What is to be done with the connection. Everything is called on the keeper's thread."""

    @property
    def places(self) -> tuple[str, ...]:
        """Keys, and prefixes of keys, that are read and watched."""
        ...

    def resynced(self, snapshot: Snapshot) -> None:
        """etcd is there (again), and this is all that stands there now."""
        ...

    def changed(self, key: str, entry: Entry | None) -> None: ...

    def tend(self, link: EtcdLink) -> None:
        """See that what should stand there does, and that the lease goes on."""
        ...

    def leave(self, link: EtcdLink) -> None: ...

    def went_away(self, error: AdaptError) -> None: ...


class Keeper:
    """See the head of this file.

    Args:
        ttl_s: of the leases that the role keeps; how often it tends them follows from it.
        looks_for_room: ask once a lease whether etcd is full. One process of a cluster is enough, and for all of them it is much.
    """

    def __init__(self, settings: EtcdSettings, role: Role, *, ttl_s: float, looks_for_room: bool = False, clock: Clock = monotonic) -> None:
        self._settings, self._role, self._looks_for_room, self._clock = settings, role, looks_for_room, clock
        self._tended = 0
        self.ttl_s = ttl_s
        self.is_well = self.is_full = False
        self._is_told_well = False  # the role believes that etcd is well
        self.outages = self.resyncs = 0
        self._endpoint = 0  # that is tried next
        self._failures = 0  # since it was last well
        self._stopping = threading.Event()
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="etcd-keeper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """Tend now. From any thread; while etcd is away it is tended as soon as it is back."""
        self._inbox.put(_nothing)

    def close(self) -> None:
        """Take leave, and end. Blocks for a few seconds at most."""
        self._stopping.set()
        self.wake()
        if self._thread.is_alive():
            self._thread.join(JOIN_S)

    # ── on the thread ────────────────────────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._stay_in_touch()
            except AdaptError as error:  # a ConfigError too: a certificate is being replaced, say
                self._lost(error)
            except Exception as error:  # foreign code: etcd3 and gRPC
                log.exception("the connection to etcd failed unexpectedly")
                self._lost(EtcdAwayError(f"{type(error).__name__}: {error}"))
            self._stopping.wait(self._pause_s())

    def _stay_in_touch(self) -> None:
        endpoint = self._settings.endpoints[self._endpoint % len(self._settings.endpoints)]
        self._endpoint += 1
        link = EtcdLink(self._settings, endpoint, timeout_s=self._timeout_s)
        try:
            self._follow(link)
            self._role.leave(link)
        except EtcdError as error:
            if not self._stopping.is_set():
                raise
            log.info("etcd does not hear our leave; the lease ends by itself", extra={"reason": str(error)})
        finally:
            link.close()

    def _follow(self, link: EtcdLink) -> None:
        inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._inbox = inbox
        snapshot = link.read_all(*self._role.places)
        link.watch(
            *self._role.places,
            after=snapshot.revision,
            changed=lambda key, entry: inbox.put(lambda: self._role.changed(key, entry)),
            broken=lambda error: inbox.put(lambda: _raise(error)),
        )
        self._is_told_well = True
        self._role.resynced(snapshot)
        began = self._clock()
        self._tend(link)
        self._met(link)
        while not self._stopping.is_set():
            due = began + self.ttl_s / TENDED_PER_LEASE  # from its beginning: slow calls must not make it rarer
            for item in _until(inbox, due, self._clock):
                item()
                if item is _nothing:
                    break
            began = self._clock()
            if not self._stopping.is_set():
                self._tend(link)

    def _tend(self, link: EtcdLink) -> None:
        """A full etcd is no reason to leave it: it can be read, and the leases that there are go on."""
        try:
            self._role.tend(link)
            if self._looks_for_room and self._tended % TENDED_PER_LEASE == 0:
                link.require_room()
                self._has_room()
            elif not self._looks_for_room:
                self._has_room()
            self._tended += 1
        except EtcdFullError as error:
            if not self.is_full:
                log.error("etcd is full and takes nothing new; leases that exist go on", extra={"reason": str(error)})
            self.is_full = True

    def _has_room(self) -> None:
        if self.is_full:
            log.info("etcd has room again")
        self.is_full = False

    def _met(self, link: EtcdLink) -> None:
        log.info("etcd is there", extra={"endpoint": link.endpoint, "attempts": self._failures + 1})
        self.is_well = True
        self._failures = 0
        self.resyncs += 1

    def _lost(self, error: AdaptError) -> None:
        self._failures += 1
        is_refused = isinstance(error, (EtcdRefusedError, ConfigError))
        if self.is_well or self._failures == 1:
            log.warning("etcd is away; heartbeats alone decide until it is back", extra={"reason": str(error)})
            self.outages += 1
        elif is_refused:
            log.warning("etcd refuses us", extra={"reason": str(error)})
        else:
            log.debug("etcd is still away", extra={"reason": str(error)})
        if self.is_well or self._is_told_well or is_refused or self._failures == 1:
            self._role.went_away(error)
        self.is_well = self._is_told_well = False

    def _pause_s(self) -> float:
        """The other members are tried at once, then all of them after a while."""
        rounds = self._failures // len(self._settings.endpoints)
        if self._failures % len(self._settings.endpoints):
            return 0.0
        return float(min(FIRST_PAUSE_S * 2 ** min(rounds, 10), LONGEST_PAUSE_S) * random.uniform(0.7, 1.0))

    @property
    def _timeout_s(self) -> float:
        return min(max(self.ttl_s / TENDED_PER_LEASE, SHORTEST_TIMEOUT_S), LONGEST_TIMEOUT_S)


class HeldLease:
    """A lease that is renewed as long as it lives, and replaced when it does not. For the keeper's thread."""

    def __init__(self) -> None:
        self._lease: Lease | None = None
        self.granted = 0  # how often there had to be a new one

    def hold(self, link: EtcdLink, ttl_s: float) -> int:
        """The number of a lease that is in force now."""
        if self._lease is not None and not link.refresh(self._lease.number):
            log.warning("the lease in etcd had ended; a new one is taken", extra={"lease": f"{self._lease.number:x}"})
            self._lease = None
        if self._lease is None:
            self._lease = link.grant(math.ceil(ttl_s))
            self.granted += 1
        return self._lease.number

    def revoke(self, link: EtcdLink) -> None:
        if self._lease is not None:
            lease, self._lease = self._lease, None
            link.revoke(lease.number)


def _until(inbox: SimpleQueue[Callable[[], None]], due: float, clock: Clock) -> Iterator[Callable[[], None]]:
    """What comes in until then; if that is past, what is there."""
    there = inbox.qsize()
    while there or due > clock():
        try:
            yield inbox.get(timeout=max(due - clock(), 0.0))
        except Empty:
            return
        there = max(there - 1, 0)


def _nothing() -> None:
    """Put in to wake the thread."""


def _raise(error: AdaptError) -> None:
    raise error
