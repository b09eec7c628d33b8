"""A worker's side of membership in etcd: it finds its dispatcher there, and keeps a lease of its own.

The lease is renewed on the keeper's thread, which a busy model does not hold up: torch computes without the interpreter's lock. But it is
renewed only while the worker's loop turns as well: a worker whose loop is frozen must not be kept alive by a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

from adapt.clock import Clock, monotonic
from adapt.config import EtcdSettings, check_address
from adapt.errors import AdaptError, ConfigError
from adapt.protocol.ids import WorkerId
from adapt.protocol.messages import PROTOCOL_VERSION
from adapt.runtime.etcd_keeper import HeldLease, Keeper
from adapt.runtime.etcd_layout import Layout, LeaderRecord, WorkerRecord, encode_record, read_leader
from adapt.runtime.etcd_link import Entry, EtcdLink, EtcdRefusedError, Put, Snapshot, load_etcd3
from adapt.version import VERSION

log = logging.getLogger(__name__)

FIRST_TTL_S = 2.0  # until a dispatcher says how long its workers' leases are: how often etcd is looked after
PROBE_S = 1.0  # for each of several addresses
SAID_EVERY_S = 10.0  # while there is no dispatcher


class EtcdMembership:
    """See the head of this file.

    Args:
        worker_id: under whose name the lease is kept.
        via: where the dispatcher is reached, instead of where it says.

    Raises:
        ConfigError: the package etcd3 is missing.
    """

    def __init__(self, etcd: EtcdSettings, worker_id: WorkerId, *, via: str | None = None, clock: Clock = monotonic) -> None:
        load_etcd3()
        self._member = _Member(Layout(etcd.cluster), worker_id, self, clock)
        self._keeper = Keeper(etcd, self._member, ttl_s=FIRST_TTL_S, clock=clock)
        self._member.keeper = self._keeper
        self._loop: asyncio.AbstractEventLoop | None = None
        self._endpoints = ",".join(etcd.endpoints)
        self._moved: Callable[[], None] = lambda: None
        self._leader: LeaderRecord | None = None
        self._changed = asyncio.Event()  # the leader, or that etcd refuses us
        self._refused: AdaptError | None = None
        self._search: asyncio.Task[None] | None = None
        self._via, self.address = via, ""

    async def find(self) -> str:
        self._loop = asyncio.get_running_loop()
        self._keeper.start()
        while not self.address:
            try:
                async with asyncio.timeout(SAID_EVERY_S):
                    await self._changed.wait()
            except TimeoutError:
                log.warning("no dispatcher is known to etcd yet", extra={"etcd": self._endpoints, "is_well": self._keeper.is_well})
                continue
            self._changed.clear()
            if self._refused is not None:
                raise ConfigError(f"membership: {self._refused}")
            if not await self._choose():
                self._look_on()
        return self.address

    def watch(self, moved: Callable[[], None]) -> None:
        self._moved = moved

    def join(self, incarnation: int) -> None:
        term = self._leader.term if self._leader else 0
        self._member.join(WorkerRecord(incarnation=incarnation, term=term, protocol=PROTOCOL_VERSION, software=f"adapt {VERSION}"))

    def beat(self, now: float) -> None:
        self._member.beat(now)

    async def leave(self) -> None:
        if self._search is not None:
            self._search.cancel()
        await asyncio.get_running_loop().run_in_executor(None, self._keeper.close)

    # ── what the keeper's thread tells ───────────────────────────────────────────────────────────────────────────────

    def tell(self, what: Callable[..., None], *values: Any) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(what, *values)

    def led(self, record: LeaderRecord | None) -> None:
        """Who reigns now. While nobody does, the last one known is still knocked at."""
        if record is None or not record.addresses or record == self._leader:
            return
        self._leader, self._refused = record, None
        self._changed.set()
        if self.address:  # `find` has ended; see whether it is the same place
            self._look_on()

    def refused(self, error: AdaptError) -> None:
        if not self.address:
            self._refused = error
            self._changed.set()

    def _look_on(self) -> None:
        if self._search is not None:
            self._search.cancel()
        self._search = asyncio.get_running_loop().create_task(self._look_again(), name="membership-search")

    async def _look_again(self) -> None:
        """Until an address is found that takes a connection, or another leader is told."""
        while True:
            before = self.address
            is_found = await self._choose()
            if self.address != before:
                self._moved()
            if is_found:
                return
            await asyncio.sleep(PROBE_S)

    async def _choose(self) -> bool:
        """Of several addresses the first that takes a connection; if none does, the first, and False."""
        if self._leader is None:
            return True
        if self._via is not None:
            self.address = self._via
            return True
        addresses = [address for address in self._leader.addresses if _is_address(address)]
        for address in addresses if len(addresses) > 1 else []:
            if await _answers(address):
                self.address = address
                return True
        self.address = addresses[0] if addresses else self.address
        return len(addresses) < 2


class _Member:
    """The worker's role on the keeper's thread. The loop sets `_record` and `_stamp`, each by one assignment."""

    def __init__(self, layout: Layout, worker_id: WorkerId, owner: EtcdMembership, clock: Clock) -> None:
        self._leader_key, self._key = layout.leader, layout.worker(worker_id)
        self._owner, self._clock = owner, clock
        self.keeper: Keeper | None = None
        self._record: WorkerRecord | None = None  # None: not joined yet
        self._stamp = clock()
        self._lease = HeldLease()
        self._is_lapsing = False  # the loop was found frozen

    # ── from the loop ────────────────────────────────────────────────────────────────────────────────────────────────

    def join(self, record: WorkerRecord) -> None:
        if record != self._record:
            self._record = record
            self._wake()

    def beat(self, now: float) -> None:
        self._stamp = now
        if self._is_lapsing:
            self._wake()

    def is_well(self) -> bool:
        """Whether the worker's loop has turned lately."""
        assert self.keeper is not None
        return self._clock() - self._stamp < max(self.keeper.ttl_s / 2, 1.0)

    # ── the role ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def places(self) -> tuple[str, ...]:
        return (self._leader_key, self._key)

    def resynced(self, snapshot: Snapshot) -> None:
        self._led(snapshot.entries.get(self._leader_key))

    def changed(self, key: str, entry: Entry | None) -> None:
        if key == self._leader_key:
            self._led(entry)
        elif key == self._key and entry is None and self._record is not None:
            self._wake()  # it was taken away; if we live it is put there again at once

    def went_away(self, error: AdaptError) -> None:
        if isinstance(error, (EtcdRefusedError, ConfigError)):
            self._owner.tell(self._owner.refused, error)

    def leave(self, link: EtcdLink) -> None:
        self._lease.revoke(link)

    def tend(self, link: EtcdLink) -> None:
        record = self._record
        if record is None:
            link.read(self._leader_key)  # is etcd still there? A watch does not tell
            return
        if not self._is_alive():
            return
        lease = self._lease.hold(link, self.keeper.ttl_s if self.keeper else FIRST_TTL_S)
        value, entry = encode_record(record), link.read(self._key)
        if entry is None or (entry.value, entry.lease) != (value, lease):
            link.write(Put(self._key, value, lease))

    def _is_alive(self) -> bool:
        is_well = self.is_well()
        if not is_well and not self._is_lapsing:
            log.warning("the worker's loop does not turn; its lease in etcd is not renewed until it does")
        self._is_lapsing = not is_well
        return is_well

    def _led(self, entry: Entry | None) -> None:
        record = read_leader(entry)
        if record is not None and self.keeper is not None:
            self.keeper.ttl_s = record.lease_ttl_s
        self._owner.tell(self._owner.led, record)

    def _wake(self) -> None:
        if self.keeper is not None:
            self.keeper.wake()


def _is_address(text: str) -> bool:
    with contextlib.suppress(ConfigError):
        check_address(text, key="address", is_listening=False)
        return True
    return False


async def _answers(address: str) -> bool:
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    try:
        async with asyncio.timeout(PROBE_S):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except (OSError, ValueError, TimeoutError):
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True
