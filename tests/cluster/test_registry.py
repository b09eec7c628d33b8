"""What membership promises, over both implementations: embedded, and etcd with a real server. Then what only etcd has to promise."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from adapt.errors import ConfigError
from adapt.protocol.ids import WorkerId
from adapt.runtime.etcd_layout import Layout, read_leader, read_worker
from adapt.runtime.membership_etcd import EtcdMembership
from adapt.runtime.registry import EmbeddedMembership, EmbeddedRegistry, Listener, Membership, Registry
from adapt.runtime.registry_etcd import EtcdRegistry, reachable
from adapt.runtime.state import StateDirectory
from tests.faults.etcd import Etcd, Put, needs_etcd, running_etcd

pytestmark = pytest.mark.timeout(120)
W1, W2 = WorkerId("w1"), WorkerId("w2")
ADDRESS = "tcp://127.0.0.1:5999"
WAIT_S = 20.0
TURN_S = 0.02
_clusters = (f"cluster{number}" for number in itertools.count())


@dataclass
class Reign:
    """One dispatcher's registry, and what it has told."""

    registry: Registry
    state: StateDirectory
    term: int = 0
    told: list[tuple[str, object]] = field(default_factory=list)

    def listener(self) -> Listener:
        def note(what):
            return lambda fact: self.told.append((what, fact))

        return Listener(ended=note("ended"), renewed=note("renewed"), surpassed=note("surpassed"), deposed=note("deposed"))

    def of(self, worker_id) -> list[str]:
        return [what for what, fact in self.told if fact == worker_id]


class World:
    """Opens registries and memberships of one kind, and turns their loops. A worker that `is_heard` sends heartbeats."""

    ttl_s: float

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.reign: Reign | None = None  # that workers speak to
        self.heard: dict[WorkerId, Membership] = {}

    def open_registry(self, state: StateDirectory) -> Registry:
        raise NotImplementedError

    def open_membership(self, worker_id: WorkerId) -> Membership:
        raise NotImplementedError

    @contextlib.asynccontextmanager
    async def reigning(self, directory: str = "state", *, address: str = ADDRESS) -> AsyncIterator[Reign]:
        """A dispatcher's reign, from its campaign to its end."""
        async with self.running(directory) as reign:
            await self.crowned(reign, address=address)
            yield reign

    @contextlib.asynccontextmanager
    async def running(self, directory: str) -> AsyncIterator[Reign]:
        state = StateDirectory(self.directory / directory)
        registry = self.open_registry(state)
        reign = Reign(registry, state)
        registry.watch(reign.listener())
        turning = asyncio.create_task(self._turn(reign), name="turn")
        try:
            yield reign
        finally:
            turning.cancel()
            await asyncio.wait([turning])
            await registry.close()
            state.close()

    async def crowned(self, reign: Reign, *, address: str = ADDRESS) -> None:
        reign.term = await reign.registry.campaign()
        reign.registry.announce(address)
        self.reign = reign

    async def _turn(self, reign: Reign) -> None:
        while True:
            now = time.monotonic()
            for worker_id, membership in self.heard.items():
                membership.beat(now)
                if self.reign is reign:
                    reign.registry.refresh(worker_id, now)
            due = reign.registry.next_wakeup()
            if due is not None and due <= now:
                reign.registry.tick(now)
                later = reign.registry.next_wakeup()
                assert later is None or later > now, "the loop would spin"
            await asyncio.sleep(TURN_S)

    @contextlib.asynccontextmanager
    async def worker(self, worker_id: WorkerId) -> AsyncIterator[Membership]:
        """A worker that has found its dispatcher and was welcomed."""
        membership = self.open_membership(worker_id)
        try:
            assert await membership.find() == ADDRESS
            self.welcome(worker_id, membership)
            yield membership
        finally:
            self.heard.pop(worker_id, None)
            await membership.leave()

    def welcome(self, worker_id: WorkerId, membership: Membership) -> None:
        self.heard[worker_id] = membership
        assert self.reign is not None
        self.reign.registry.register(worker_id, time.monotonic())
        membership.join(incarnation=7)

    def silence(self, worker_id: WorkerId) -> Membership:
        """Its loop freezes."""
        return self.heard.pop(worker_id)


class EmbeddedWorld(World):
    ttl_s = 0.4

    def open_registry(self, state):
        return EmbeddedRegistry(state, lease_ttl_s=self.ttl_s)

    def open_membership(self, worker_id):
        return EmbeddedMembership(ADDRESS)


class EtcdWorld(World):
    ttl_s = 2.0

    def __init__(self, directory, etcd: Etcd) -> None:
        super().__init__(directory)
        self.etcd, self.cluster = etcd, next(_clusters)
        self.layout = Layout(self.cluster)

    def open_registry(self, state):
        return EtcdRegistry(self.etcd.settings(cluster=self.cluster), state, lease_ttl_s=self.ttl_s)

    def open_membership(self, worker_id):
        return EtcdMembership(self.etcd.settings(cluster=self.cluster), worker_id)

    def entry(self, key):
        with self.etcd.link() as link:
            return link.read(key)

    def leader(self):
        return read_leader(self.entry(self.layout.leader))

    async def stands(self, worker_id) -> None:
        """Its key is there. The registry hears of it at the same time."""
        await until(lambda: read_worker(self.entry(self.layout.worker(worker_id))) is not None)

    async def gone(self, worker_id) -> None:
        await until(lambda: self.entry(self.layout.worker(worker_id)) is None)


async def until(fact) -> None:
    async with asyncio.timeout(WAIT_S):
        while not fact():  # noqa: ASYNC110  what is waited for happens in another process
            await asyncio.sleep(TURN_S)


@pytest.fixture(scope="module")
def etcd(tmp_path_factory):
    with running_etcd(tmp_path_factory.mktemp("etcd")) as running:
        yield running


@pytest.fixture(params=["embedded", pytest.param("etcd", marks=needs_etcd)])
def world(request, tmp_path):
    if request.param == "embedded":
        return EmbeddedWorld(tmp_path)
    return EtcdWorld(tmp_path, request.getfixturevalue("etcd"))


@pytest.fixture
def etcd_world(tmp_path, etcd):
    return EtcdWorld(tmp_path, etcd)


# ── over both ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_lease_ends_with_the_worker_and_is_in_force_again_when_it_speaks(world):
    async def test():
        async with world.reigning() as reign, world.worker(W1), world.worker(W2):
            frozen = world.silence(W1)
            await until(lambda: reign.of(W1) == ["ended"])
            world.heard[W1] = frozen
            await until(lambda: reign.of(W1) == ["ended", "renewed"])
            world.silence(W1)
            await until(lambda: len(reign.of(W1)) == 3)
            assert reign.of(W1) == ["ended", "renewed", "ended"], "it is told again, and once"
            assert reign.of(W2) == [], "who is heard all the time keeps its lease"

    asyncio.run(test())


def test_a_lease_that_was_revoked_does_not_end(world):
    async def test():
        async with world.reigning() as reign, world.worker(W1):
            async with world.worker(W2):
                world.silence(W1)
                world.silence(W2)
                reign.registry.revoke(W2)
            await until(lambda: reign.of(W1) == ["ended"])
            assert reign.of(W2) == []

    asyncio.run(test())


def test_a_worker_that_registers_again_has_a_lease_again(world):
    async def test():
        async with world.reigning() as reign, world.worker(W1):
            membership = world.silence(W1)
            await until(lambda: reign.of(W1) == ["ended"])
            reign.registry.revoke(W1)
            world.welcome(W1, membership)
            async with world.worker(W2):
                world.silence(W2)
                await until(lambda: reign.of(W2) == ["ended"])
            assert reign.of(W1) == ["ended"], "registered, it did not end while another's did"

    asyncio.run(test())


def test_a_reign_has_a_higher_term_than_all_before(world):
    async def test():
        terms = []
        for _ in range(3):
            async with world.reigning() as reign:
                terms.append(reign.term)
        assert terms == [1, 2, 3]
        async with world.reigning() as reign:
            reign.registry.raise_term(40)
        async with world.reigning() as reign:
            assert reign.term == 41
            assert reign.state.read_term() == 41
            assert reign.told == []

    asyncio.run(test())


def test_a_dispatcher_that_cannot_write_its_term_does_not_begin(world):
    async def test():
        async with world.running("state") as reign:

            def refuse(term):
                raise PermissionError(13, "Permission denied")

            reign.state.write_term = refuse
            with pytest.raises(ConfigError, match="cannot be written: Permission denied"):
                await reign.registry.campaign()

    asyncio.run(test())


# ── over etcd ────────────────────────────────────────────────────────────────────────────────────────────────────────


@needs_etcd
def test_what_stands_in_etcd(etcd_world):
    async def test():
        async with etcd_world.reigning() as reign, etcd_world.worker(W1):
            await etcd_world.stands(W1)
            await until(lambda: etcd_world.leader() is not None)
            record = etcd_world.leader()
            assert (record.term, record.addresses, record.lease_ttl_s) == (reign.term, (ADDRESS,), 2.0)
            entry = etcd_world.entry(etcd_world.layout.worker(W1))
            assert read_worker(entry).incarnation == 7 and entry.lease
            assert etcd_world.entry(etcd_world.layout.term).lease == 0, "the number outlives its dispatcher"
        await etcd_world.gone(W1)
        assert etcd_world.leader() is None, "who leaves gives its lease back"

    asyncio.run(test())


@needs_etcd
def test_a_worker_waits_for_a_dispatcher_and_follows_it(etcd_world):
    async def test():
        moved = []
        membership = etcd_world.open_membership(W1)
        membership.watch(lambda: moved.append(membership.address))
        finding = asyncio.create_task(membership.find())
        try:
            async with etcd_world.reigning():
                assert await finding == ADDRESS
            async with etcd_world.reigning("another", address="tcp://127.0.0.1:6001"):
                await until(lambda: moved == ["tcp://127.0.0.1:6001"])
        finally:
            finding.cancel()
            await membership.leave()

    asyncio.run(test())


@needs_etcd
def test_of_several_addresses_a_worker_takes_one_that_answers(etcd_world):
    async def test():
        server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with etcd_world.reigning() as reign:
            reign.registry._seat.announce(("tcp://127.0.0.1:1", "not an address", f"tcp://127.0.0.1:{port}"))
            await until(lambda: len(etcd_world.leader().addresses) == 3)
            membership = etcd_world.open_membership(W1)
            try:
                assert await membership.find() == f"tcp://127.0.0.1:{port}"
            finally:
                await membership.leave()
        server.close()
        await server.wait_closed()

    asyncio.run(test())


@needs_etcd
def test_a_worker_behind_a_tunnel_goes_its_own_way_to_whoever_reigns(etcd_world):
    async def test():
        membership = EtcdMembership(etcd_world.etcd.settings(cluster=etcd_world.cluster), W1, via="tcp://127.0.0.1:7001")
        try:
            async with etcd_world.reigning():
                assert await membership.find() == "tcp://127.0.0.1:7001"
        finally:
            await membership.leave()

    asyncio.run(test())


def test_of_a_wildcard_all_addresses_are_told():
    assert reachable("tcp://127.0.0.1:5570") == ("tcp://127.0.0.1:5570",)
    found = reachable("tcp://0.0.0.0:5570")
    assert found[-1].startswith("tcp://127.") and all(address.endswith(":5570") for address in found)


@needs_etcd
def test_a_second_dispatcher_waits_until_the_first_has_gone(etcd_world):
    async def test():
        async with etcd_world.running("second") as second:
            async with etcd_world.reigning("first") as first:
                waiting = asyncio.create_task(second.registry.campaign())
                await until(lambda: second.registry.counters()["etcd_is_well"])
                first.registry.raise_term(9)
                await until(lambda: etcd_world.leader().term == 9)
                assert not waiting.done()
            assert await waiting == 10
            assert first.told == second.told == []

    asyncio.run(test())


@needs_etcd
def test_a_dispatcher_whose_seat_was_taken_is_deposed(etcd_world):
    async def test():
        async with etcd_world.reigning("first") as first, etcd_world.running("second") as second:
            keeper, first.registry._seat.tend = first.registry._seat.tend, lambda link: None  # it sleeps
            campaign = asyncio.create_task(second.registry.campaign())
            assert await campaign == first.term + 1
            first.registry._seat.tend = keeper
            await until(lambda: [what for what, _ in first.told] == ["deposed"])
            assert f"with term {first.term + 1}" in first.told[0][1]

    asyncio.run(test())


@needs_etcd
@pytest.mark.slow
def test_a_dispatcher_that_hangs_gives_up_its_seat(etcd_world):
    """Its thread stays in touch with etcd all the time; its loop does not turn."""
    reigns, end, told = threading.Event(), threading.Event(), []

    async def hang():
        async with etcd_world.reigning("first") as first:
            reigns.set()
            assert end.wait(WAIT_S)  # on the loop
            await until(lambda: first.told)
            told.extend(what for what, _ in first.told)

    async def succeed():
        async with etcd_world.running("second") as second:
            await asyncio.to_thread(reigns.wait, WAIT_S)
            assert await asyncio.wait_for(second.registry.campaign(), WAIT_S) == 2
            end.set()
            await asyncio.to_thread(hanging.join, WAIT_S)

    hanging = threading.Thread(target=lambda: asyncio.run(hang()))
    hanging.start()
    asyncio.run(succeed())
    assert told == ["deposed"]


@needs_etcd
def test_a_term_that_was_surpassed_is_raised(etcd_world):
    """Another dispatcher has reigned meanwhile and gone."""

    async def test():
        async with etcd_world.reigning() as reign:
            with etcd_world.etcd.link() as link:
                link.write(Put(etcd_world.layout.term, b"30"))
            await until(lambda: ("surpassed", 30) in reign.told)
            reign.registry.raise_term(31)
            await until(lambda: etcd_world.leader().term == 31)

    asyncio.run(test())


@needs_etcd
@pytest.mark.parametrize(
    "value", [b"", b"{", b"[]", b'{"incarnation": "x"}', b"\xff\xfe", b"x" * (1 << 20)], ids=lambda value: repr(value[:12])
)
def test_what_others_write_is_ignored_unless_it_can_be_read(etcd_world, value):
    async def test():
        async with etcd_world.reigning() as reign, etcd_world.worker(W1):
            await etcd_world.stands(W1)
            with etcd_world.etcd.link() as link:
                link.write(Put(etcd_world.layout.worker(W2), value))
                link.write(Put(etcd_world.layout.workers + "no name/at all", value))
                link.write(Put(etcd_world.layout.worker(W1), value))  # its own key: it writes it again
            await until(lambda: read_worker(etcd_world.entry(etcd_world.layout.worker(W1))) is not None)
            await until(lambda: reign.registry.counters()["etcd_entries_ignored"] >= 3)
            await until(lambda: reign.registry.counters()["etcd_workers"] == 1)
            assert reign.told == []

    asyncio.run(test())


@needs_etcd
@pytest.mark.parametrize("value", [b"x", b"-5", b"99999999999999999999999999", b"1e9"])
def test_a_term_that_cannot_be_read_counts_as_none(etcd_world, value):
    async def test():
        with etcd_world.etcd.link() as link:
            link.write(Put(etcd_world.layout.term, value), Put(etcd_world.layout.leader, b"{nonsense"))
        async with etcd_world.reigning() as reign:
            assert reign.term == 1

    asyncio.run(test())


@needs_etcd
def test_the_lease_is_as_long_as_the_dispatcher_says(etcd_world):
    """And a worker that has lost it takes another, without being asked."""

    async def test():
        etcd_world.ttl_s = 5.0
        async with etcd_world.reigning(), etcd_world.worker(W1):
            await etcd_world.stands(W1)
            before = etcd_world.entry(etcd_world.layout.worker(W1)).lease
            with etcd_world.etcd.link() as link:
                assert link._client.get_lease_info(before).grantedTTL == 5
                link.revoke(before)
            await etcd_world.stands(W1)
            assert etcd_world.entry(etcd_world.layout.worker(W1)).lease != before

    asyncio.run(test())
