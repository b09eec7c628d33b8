"""Connections between one peer and the dispatcher: what comes, what is lost, and who learns of it."""

from __future__ import annotations

from random import Random

import pytest

from adapt.protocol.ids import RoutingId
from adapt.protocol.messages import CancelRequest, SayHello
from adapt.protocol.wire import Blob, Envelope
from adapt.simulation.network import Connection, Damaged, Network, Quality, Wire
from adapt.simulation.timeline import Process, Timeline

ROUTE = RoutingId(b"w1.0.c")


def numbered(number: int, size_bytes: int = 0) -> Envelope:
    blobs = (Blob(size_bytes, 0, ()),) if size_bytes else ()
    return Envelope(CancelRequest(request_id=(bytes(16), number)), 1, 1, blobs)


class Side:
    """A peer, or the dispatcher."""

    def __init__(self, timeline: Timeline, name: str) -> None:
        self.process = Process(name, timeline, Random(0))
        self.got: list[int] = []
        self.damaged = 0
        self.told: list[str] = []
        self.at: list[float] = []

    def came(self, connection: Connection, item: Envelope | Damaged) -> None:
        if isinstance(item, Damaged):
            self.damaged += 1
            return
        self.got.append(item.message.request_id[1])
        self.at.append(self.process.clock())

    def stands(self, connection: Connection) -> None:
        self.told.append("stands")

    def broke(self, connection: Connection) -> None:
        self.told.append("broke")


class Pair:
    def __init__(self, seed: int = 0, **quality) -> None:
        self.timeline = Timeline(Random(seed))
        self.network = Network(self.timeline, Random(seed))
        self.router, self.peer = Side(self.timeline, "dispatcher"), Side(self.timeline, "w1")
        self.network.router = self.router
        self.wire = Wire(Quality(**quality))
        self.connection = self.dialled()

    def dialled(self, route: RoutingId = ROUTE, *, beats: bool = True) -> Connection:
        connection = Connection(self.network, self.peer, route, self.wire, beats=beats)
        self.network.dial(connection)
        self.timeline.run_until(self.timeline.now + 1.0 + 4 * self.wire.quality.latency_s)
        return connection

    def wait(self, delay_s: float) -> None:
        self.timeline.run_until(self.timeline.now + delay_s)


@pytest.mark.parametrize("seed", range(5))
def test_the_order_within_a_connection_is_kept_and_not_between_two(seed):
    pair = Pair(seed, jitter_s=0.5)
    other = pair.dialled(RoutingId(b"w1.0.b"), beats=False)
    for number in range(50):
        assert (pair.connection if number % 2 else other).send(numbered(number))
    pair.wait(5.0)
    assert [n for n in pair.router.got if n % 2] == list(range(1, 50, 2))
    assert [n for n in pair.router.got if not n % 2] == list(range(0, 50, 2))
    assert pair.router.got != list(range(50))


def test_size_takes_time():
    pair = Pair(latency_s=0.1, jitter_s=0.0, bytes_per_s=1e6)
    began = pair.timeline.now
    pair.network.send(ROUTE, numbered(1, size_bytes=2_000_000))
    pair.network.send(ROUTE, numbered(2))
    pair.wait(10.0)
    assert [moment - began for moment in pair.peer.at] == pytest.approx([2.1, 2.1], abs=0.01)


def test_what_a_break_loses_is_a_suffix_and_nobody_is_told_what():
    lengths = set()
    for seed in range(40):
        pair = Pair(seed, latency_s=0.5)
        for number in range(10):
            pair.network.send(ROUTE, numbered(number))
        pair.network.break_up(pair.connection, peer_after_s=1.0, router_after_s=None)
        pair.wait(5.0)
        assert pair.peer.got == list(range(len(pair.peer.got)))
        assert pair.peer.told == ["stands", "broke"] and pair.router.told == []
        lengths.add(len(pair.peer.got))
    assert {0, 10} < lengths


def test_to_a_broken_connection_that_nobody_noticed_everything_can_be_sent():
    pair = Pair()
    pair.network.break_up(pair.connection, peer_after_s=9.0, router_after_s=2.0)
    assert pair.network.send(ROUTE, numbered(1)), "it looks as if it stood"
    pair.wait(3.0)
    assert pair.router.told == ["broke"] and not pair.network.send(ROUTE, numbered(2)), "it is unknown now"
    assert pair.peer.got == []


def test_a_full_queue_takes_nothing():
    pair = Pair(queue_limit=2, latency_s=1.0)
    assert [pair.connection.send(numbered(number)) for number in range(3)] == [True, True, False]
    assert [pair.network.send(ROUTE, numbered(number)) for number in range(3)] == [True, True, False]
    pair.wait(3.0)
    assert pair.router.got == pair.peer.got == [0, 1]


def test_one_direction_can_be_cut_and_what_was_under_way_comes_after():
    pair = Pair()
    pair.network.cut(pair.wire, up=True, down=False)
    pair.connection.send(numbered(1))
    pair.network.send(ROUTE, numbered(2))
    pair.wait(1.0)
    assert (pair.router.got, pair.peer.got) == ([], [2])
    pair.network.heal(pair.wire)
    pair.wait(1.0)
    assert pair.router.got == [1] and pair.peer.told == ["stands"]


def test_heartbeats_find_a_cut_and_a_frozen_process_but_not_on_bulk():
    for is_cut in (True, False):
        pair = Pair()
        pair.dialled(RoutingId(b"w1.0.b"), beats=False)
        if is_cut:
            pair.network.cut(pair.wire, up=True, down=True)
        else:
            pair.peer.process.stop(is_frozen=True)
            pair.network.frozen(pair.wire)
        pair.wait(1.3)
        assert pair.router.told == []
        pair.wait(5.0)
        assert pair.router.told == ["broke"], "once: of control"


def test_a_connection_takes_over_the_address_of_one_that_is_not_known_to_be_broken():
    pair = Pair()
    pair.network.break_up(pair.connection, peer_after_s=0.0, router_after_s=None)
    again = pair.dialled()
    assert pair.network.handovers == 1
    pair.network.send(ROUTE, numbered(1))
    pair.wait(1.0)
    assert pair.peer.got == [1] and again.is_open
    assert pair.network.is_superseded(pair.connection) and not pair.network.is_superseded(again)


def test_a_dispatcher_that_dies_takes_all_connections_with_it_and_is_found_again():
    pair = Pair()
    pair.router.process.end_life()
    pair.network.router_ended(is_clean=True)
    pair.wait(0.1)
    assert pair.peer.told == ["stands", "broke"] and not pair.network.send(ROUTE, numbered(1))
    pair.network.dial(Connection(pair.network, pair.peer, ROUTE, pair.wire, beats=True))
    pair.wait(2.0)
    assert pair.peer.told[-1] == "broke"
    pair.router.process.begin_life()
    pair.wait(2.0)
    assert pair.peer.told[-1] == "stands" and pair.network.send(ROUTE, numbered(2))


def test_a_damaged_message_comes_as_one():
    pair = Pair(damage=1.0)
    pair.connection.send(Envelope(SayHello(), 1, 1))
    pair.wait(1.0)
    assert pair.router.damaged == 1 and pair.router.got == []
