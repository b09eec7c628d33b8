"""The dispatcher's side of membership in etcd: it watches its workers' leases, and holds the seat of the one that reigns.

A lease is in force as long as its key stands in etcd, *or* the worker's last heartbeat is younger than a lease. So

- a worker that etcd has forgotten, and that is heard, belongs: an etcd that was stopped, wiped or filled removes nobody;
- while etcd is away heartbeats alone decide, by the same rule as in the embedded registry;
- a worker that is frozen, and whose connection is still held open, is lost when etcd ends its lease.

The seat is a key under the dispatcher's own lease, beside a number that only grows. Both change in one transaction:

    CANDIDATE   nobody sits there, or an earlier life of ours   term = 1 + the highest known   → LEADING
    CANDIDATE   another dispatcher sits there                                                  (waits until it is gone)
    CANDIDATE   etcd does not answer for as long as a lease     term = 1 + our own highest     → LEADING
    LEADING     nobody sits there: our lease had ended          sit down again
    LEADING     our loop has not turned for most of a lease     let the lease end: who hangs reigns over nobody
    LEADING     the number has outgrown our term                the term is raised
    LEADING     another dispatcher sits there                                                  → DEPOSED
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any

import psutil

from adapt.clock import Clock, monotonic
from adapt.config import EtcdSettings
from adapt.errors import AdaptError, ConfigError
from adapt.protocol.ids import Term, WorkerId
from adapt.protocol.messages import PROTOCOL_VERSION
from adapt.runtime import etcd_layout
from adapt.runtime.etcd_keeper import HeldLease, Keeper
from adapt.runtime.etcd_layout import Layout, LeaderRecord, encode_record, read_leader, read_worker
from adapt.runtime.etcd_link import Entry, EtcdFullError, EtcdLink, EtcdRefusedError, Put, Snapshot, load_etcd3
from adapt.runtime.registry import Listener, write_term
from adapt.runtime.state import StateDirectory
from adapt.scheduling.deadlines import Deadlines

log = logging.getLogger(__name__)

HANGS_SHARE = 0.6  # of a lease: a loop that does not turn for so long hangs; leases are tended every third


class EtcdRegistry:
    """See the head of this file. Made on the running loop, or before it.

    Args:
        lease_ttl_s: of the dispatcher's own lease, of its workers', and of what stands for them while etcd is away.
        advertise: the address that workers are told; None: where the dispatcher listens.

    Raises:
        ConfigError: the package etcd3 is missing.
    """

    def __init__(
        self, etcd: EtcdSettings, state: StateDirectory, *, lease_ttl_s: float, advertise: str | None = None, clock: Clock = monotonic
    ) -> None:
        load_etcd3()  # said now, and not by a thread
        self._state, self._lease_ttl_s, self._advertise = state, lease_ttl_s, advertise
        self._layout = Layout(etcd.cluster)
        self._listener = Listener(ended=lambda worker_id: None, renewed=lambda worker_id: None)
        self._seat = _Seat(self._layout, state.owner(), tell=self._tell, registry=self, lease_ttl_s=lease_ttl_s, clock=clock)
        self._keeper = Keeper(etcd, self._seat, ttl_s=lease_ttl_s, looks_for_room=True, clock=clock)
        self._seat.wake = self._keeper.wake
        self._clock = clock
        self._loop: asyncio.AbstractEventLoop | None = None
        self._won: asyncio.Future[Term] | None = None
        self._is_well = self._was_met = False  # as far as the loop has heard
        self._keys: set[WorkerId] = set()  # that stand in etcd
        self._heard_until: dict[WorkerId, float] = {}  # of those who have registered: when a lease counted from the last heartbeat ends
        self._due: Deadlines[WorkerId] = Deadlines()  # of those who have nothing but their heartbeats
        self._lapsed: set[WorkerId] = set()  # whose end was told
        self._ignored = 0  # entries that could not be read
        self._ended = 0  # leases

    # ── reigns ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def campaign(self) -> Term:
        self._loop = asyncio.get_running_loop()
        self._won = self._loop.create_future()
        self._seat.run_for(Term(self._state.read_term()))
        self._keeper.start()
        term = await self._elected()
        write_term(self._state, term)
        return term

    async def _elected(self) -> Term:
        """Wait for the seat. With an etcd that does not answer wait no longer than a lease: whoever sat there before is deaf as well. Nor with
        one that is full: it can give the seat to nobody.

        Raises:
            ConfigError: etcd answers, and will not have us.
        """
        assert self._won is not None
        while True:
            with contextlib.suppress(TimeoutError):
                return await asyncio.wait_for(asyncio.shield(self._won), self._lease_ttl_s)
            is_free = not self._was_met or (self._keeper.is_full and not self._seat.is_taken)
            if is_free and (term := self._seat.assume()) is not None:
                how = "is full" if self._was_met else "does not answer"
                log.warning(f"etcd {how}; the reign begins without it", extra={"term": term})
                return term

    def announce(self, address: str) -> None:
        addresses = (self._advertise,) if self._advertise else reachable(address)
        self._seat.announce(addresses)

    def raise_term(self, term: Term) -> None:
        self._state.write_term(term)
        self._seat.raise_term(term)

    # ── leases ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def register(self, worker_id: WorkerId, now: float) -> None:
        self._heard_until[worker_id] = now + self._lease_ttl_s
        self._lapsed.discard(worker_id)
        self._judge(worker_id)

    def refresh(self, worker_id: WorkerId, now: float) -> None:
        if worker_id in self._heard_until:
            self._heard_until[worker_id] = now + self._lease_ttl_s
            self._judge(worker_id)

    def revoke(self, worker_id: WorkerId) -> None:
        self._heard_until.pop(worker_id, None)
        self._lapsed.discard(worker_id)
        self._due.clear(worker_id)

    def watch(self, listener: Listener) -> None:
        self._listener = listener

    def excuse(self, by_s: float) -> None:
        self._heard_until = {worker_id: until + by_s for worker_id, until in self._heard_until.items()}
        self._due.postpone(by_s)

    def tick(self, now: float) -> None:
        for worker_id in self._due.take_due(now):
            self._lapsed.add(worker_id)
            self._ended += 1
            self._listener.ended(worker_id)

    def next_wakeup(self) -> float | None:
        return self._due.next_wakeup()

    def _judge(self, worker_id: WorkerId) -> None:
        """A key that is seen to stand keeps the lease in force; without one, heartbeats do."""
        until = self._heard_until.get(worker_id)
        if until is None:
            return
        has_key = self._is_well and worker_id in self._keys
        if has_key:
            self._due.clear(worker_id)
        elif worker_id not in self._lapsed or until > self._clock():
            self._due.set(worker_id, until)
        if worker_id in self._lapsed and (has_key or until > self._clock()):
            self._lapsed.discard(worker_id)
            self._listener.renewed(worker_id)

    def _judge_all(self) -> None:
        for worker_id in self._heard_until:
            self._judge(worker_id)
        self.tick(self._clock())

    # ── what the keeper's thread tells ───────────────────────────────────────────────────────────────────────────────

    def _tell(self, what: Callable[..., None], *values: Any) -> None:
        """Called on the keeper's thread."""
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody wants to know
            self._loop.call_soon_threadsafe(what, *values)

    def seen(self, entries: dict[str, Entry]) -> None:
        """All that stands there; etcd is well."""
        self._keys.clear()
        for key, entry in entries.items():
            self._note(key, entry)
        self._is_well = self._was_met = True
        self._judge_all()

    def changed(self, key: str, entry: Entry | None) -> None:
        worker_id = self._note(key, entry)
        if worker_id is not None:
            self._judge(worker_id)
            self.tick(self._clock())

    def _note(self, key: str, entry: Entry | None) -> WorkerId | None:
        worker_id = self._layout.worker_of(key)
        if worker_id is not None and read_worker(entry) is not None:
            self._keys.add(worker_id)
            return worker_id
        if entry is not None:
            self._ignored += 1
            log.warning("an entry in etcd cannot be read, and is ignored", extra={"key": key[:200]})
        if worker_id is not None:
            self._keys.discard(worker_id)
        return worker_id

    def away(self, error: AdaptError) -> None:
        self._is_well = False
        is_refused = isinstance(error, (EtcdRefusedError, ConfigError))
        if is_refused and self._won is not None and not self._won.done():
            self._won.set_exception(ConfigError(f"membership: {error}"))
        self._judge_all()

    def won(self, term: Term) -> None:
        if self._won is not None and not self._won.done():
            self._won.set_result(term)

    def surpassed(self, term: Term) -> None:
        self._listener.surpassed(term)

    def deposed(self, record: LeaderRecord) -> None:
        where = ", ".join(record.addresses) or "somewhere"
        self._listener.deposed(f"another dispatcher reigns at {where}, with term {record.term}")

    # ── the rest ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def counters(self) -> Mapping[str, float]:
        keeper = self._keeper
        return {
            "etcd_is_well": float(keeper.is_well),
            "etcd_is_full": float(keeper.is_full),
            "etcd_outages": float(keeper.outages),
            "etcd_resyncs": float(keeper.resyncs),
            "etcd_workers": float(len(self._keys)),
            "etcd_entries_ignored": float(self._ignored),
            "leases_ended": float(self._ended),
        }

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self._keeper.close)


class _Stage(StrEnum):
    IDLE = "idle"
    CANDIDATE = "candidate"
    LEADING = "leading"
    DEPOSED = "deposed"


class _Seat:
    """The dispatcher's role on the keeper's thread. What the loop sets is behind a lock."""

    def __init__(
        self, layout: Layout, owner: str, *, tell: Callable[..., None], registry: EtcdRegistry, lease_ttl_s: float, clock: Clock
    ) -> None:
        self._layout, self._owner, self._tell, self._registry, self._lease_ttl_s = layout, owner, tell, registry, lease_ttl_s
        self._clock = clock
        self._asked_at: float | None = None  # when the loop was asked for a sign of life that it has not given yet
        self._is_told_hanging = False
        self.wake: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        self._stage = _Stage.IDLE
        self._term = Term(0)  # ours while leading, else the highest of earlier reigns
        self._addresses: tuple[str, ...] = ()
        self._lease = HeldLease()
        self.is_taken = False  # another dispatcher sits there

    # ── from the loop ────────────────────────────────────────────────────────────────────────────────────────────────

    def run_for(self, highest: Term) -> None:
        with self._lock:
            self._stage, self._term = _Stage.CANDIDATE, highest

    def assume(self) -> Term | None:
        """Reign without having been elected; None: the election was won just now."""
        with self._lock:
            if self._stage is not _Stage.CANDIDATE:
                return None
            self._stage, self._term = _Stage.LEADING, Term(self._term + 1)
            return self._term

    def announce(self, addresses: tuple[str, ...]) -> None:
        with self._lock:
            self._addresses = addresses
        self.wake()

    def raise_term(self, term: Term) -> None:
        with self._lock:
            self._term = max(self._term, term)
        self.wake()

    # ── the role ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def places(self) -> tuple[str, ...]:
        return (self._layout.workers, self._layout.leader)

    def resynced(self, snapshot: Snapshot) -> None:
        entries = {key: entry for key, entry in snapshot.entries.items() if key != self._layout.leader}
        self._tell(self._registry.seen, entries)

    def changed(self, key: str, entry: Entry | None) -> None:
        if key != self._layout.leader:
            self._tell(self._registry.changed, key, entry)
        elif (record := read_leader(entry)) is None or record.owner != self._owner:
            self.wake()

    def went_away(self, error: AdaptError) -> None:
        self._tell(self._registry.away, error)

    def leave(self, link: EtcdLink) -> None:
        self._lease.revoke(link)

    def tend(self, link: EtcdLink) -> None:
        with self._lock:
            stage, term, addresses = self._stage, self._term, self._addresses
        if stage in (_Stage.IDLE, _Stage.DEPOSED) or (stage is _Stage.LEADING and not self._loop_turns()):
            return
        lease = self._renewed(link) if stage is _Stage.LEADING else None  # first: the reads may take long
        seat, number = link.read(self._layout.leader), link.read(self._layout.term)
        record, counted = read_leader(seat), etcd_layout.read_term(number)
        if record is not None and record.owner != self._owner:
            self._taken(record)
            return
        self.is_taken = False
        if stage is _Stage.CANDIDATE:
            term = Term(max(term, counted, record.term if record else 0) + 1)
        elif counted > term:
            self._tell(self._registry.surpassed, counted)
            return
        lease = lease or self._lease.hold(link, self._lease_ttl_s)
        ours = LeaderRecord(owner=self._owner, term=term, addresses=addresses, lease_ttl_s=self._lease_ttl_s, protocol=PROTOCOL_VERSION)
        value = encode_record(ours)
        if seat is None or (seat.value, seat.lease) != (value, lease) or counted != term:
            self._sit_down(link, term, Put(self._layout.leader, value, lease), seat, number)

    def _loop_turns(self) -> bool:
        now = self._clock()
        asked_at = self._asked_at  # the loop may answer at any moment
        if asked_at is None:
            self._asked_at = asked_at = now
            self._tell(self._turned)
        is_turning = now - asked_at < HANGS_SHARE * self._lease_ttl_s
        if not is_turning and not self._is_told_hanging:
            log.error("the dispatcher's loop stands still; its seat is given up", extra={"for_s": round(now - asked_at, 1)})
        self._is_told_hanging = not is_turning
        return is_turning

    def _turned(self) -> None:
        """On the loop."""
        self._asked_at = None

    def _renewed(self, link: EtcdLink) -> int | None:
        """The lease of now; None if etcd has no room for a new one, which must not keep us from seeing who sits there."""
        with contextlib.suppress(EtcdFullError):
            return self._lease.hold(link, self._lease_ttl_s)
        return None

    def _sit_down(self, link: EtcdLink, term: Term, put: Put, seat: Entry | None, number: Entry | None) -> None:
        expected = {self._layout.leader: seat.revision if seat else 0, self._layout.term: number.revision if number else 0}
        if not link.write(put, Put(self._layout.term, str(term).encode()), expected=expected):
            self.wake()  # somebody was quicker: look again
            return
        with self._lock:
            is_elected = self._stage is _Stage.CANDIDATE
            if is_elected:
                self._stage, self._term = _Stage.LEADING, term
        if is_elected:
            self._tell(self._registry.won, term)

    def _taken(self, record: LeaderRecord) -> None:
        """Another dispatcher sits there."""
        with self._lock:
            is_deposed = self._stage is _Stage.LEADING
            if is_deposed:
                self._stage = _Stage.DEPOSED
        if is_deposed:
            self._tell(self._registry.deposed, record)
        elif not self.is_taken:
            log.info("another dispatcher reigns; waiting for its end", extra={"addresses": ",".join(record.addresses), "term": record.term})
        self.is_taken = True


def reachable(address: str) -> tuple[str, ...]:
    """The addresses under which others reach a socket that listens there: of a wildcard, all of this machine, loopback last."""
    scheme, _, rest = address.partition("://")
    host, _, port = rest.rpartition(":")
    if scheme != "tcp" or host not in ("*", "0.0.0.0", "[::]"):
        return (address,)
    found = [item.address for items in psutil.net_if_addrs().values() for item in items if item.family == socket.AF_INET]
    found.sort(key=lambda text: text.startswith("127."))
    return tuple(f"tcp://{text}:{port}" for text in found)
