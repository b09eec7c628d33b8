"""A peer's two connections kept in one session, whatever happens to the dispatcher, to the network, or to one of the two alone."""

from __future__ import annotations

import asyncio
import random
import re
import signal
import time
from collections.abc import Callable

import pytest

from adapt.errors import ConfigError, ConnectError, VersionError
from adapt.protocol import messages as msg
from adapt.protocol.wire import encode
from adapt.runtime.endpoint import Disconnected, Malformed, Received
from adapt.runtime.link import LinkReceived, LinkRefused, PeerLink, SessionLost, SessionOpened
from adapt.scheduling.session import GREETING_TIMEOUT_S
from tests.cluster.ends import (
    LIMIT_BYTES,
    PIECE_BYTES,
    WELCOME,
    Caller,
    Echo,
    Process,
    calling,
    echoing,
    on_loop,
    process,
    proxied,
)

BIG = 40 * PIECE_BYTES


# ── opening ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@on_loop
async def test_a_link_greets_opens_and_attaches_its_bulk_connection():
    async with echoing(term=3) as echo, calling(echo.address) as caller:
        session = await echo.attached()
        assert caller.events == [SessionOpened(WELCOME, session.number, 3)]
        assert (caller.link.is_open, caller.link.session, caller.link.term) == (True, session.number, 3)
        assert caller.link.address == echo.address
        assert caller.terms == [0]


@on_loop
async def test_nothing_is_sent_before_there_is_a_session():
    async with echoing() as echo:
        echo.welcomes = False
        async with calling(echo.address) as caller:
            await echo.until(lambda: echo.messages(msg.ClientHello))
            assert not caller.link.is_open
            assert not caller.send(10)[0]
            assert not caller.send(1_000_000)[0]
        assert [type(arrival.envelope.message) for arrival in echo.all(Received)] == [msg.ClientHello]


@on_loop
async def test_a_dispatcher_that_comes_later_is_found():
    async with echoing() as echo:
        address = echo.address
    async with calling(address) as caller:
        assert caller.events == []
        async with echoing(address):
            await caller.echo(10)


@pytest.mark.parametrize("address", ["", "tcp://127.0.0.1", "tcp://127.0.0.1:99999", "ftp://127.0.0.1:80", "127.0.0.1:80", "tcp://:x"])
@on_loop
async def test_what_is_no_address_is_named_and_the_link_can_still_be_closed(address):
    caller = Caller(address)
    with pytest.raises(ConfigError, match=re.escape(f"dispatcher={address!r}: not an address")):
        caller.link.start()
    await caller.link.close()


@on_loop
async def test_a_link_that_was_never_started_can_be_closed_and_one_that_is_closed_too():
    caller = Caller("tcp://127.0.0.1:1")
    await caller.link.close()
    async with echoing() as echo, calling(echo.address) as caller:
        await caller.echo(10)
        await caller.link.close()
        assert not caller.link.is_open
        assert not caller.send(10)[0]


@on_loop
async def test_refused_is_told_with_its_reason_and_nothing_follows():
    async with echoing() as echo:
        echo.welcomes = False
        async with calling(echo.address) as caller:
            await echo.until(lambda: echo.messages(msg.ClientHello))
            code, message, fields = ConnectError(echo.address, "the name is taken").to_wire()
            refusal = msg.Refused(code=code, message=message, fields=fields)
            echo.endpoint.send(echo.arrivals[0].routing_id, refusal, session=0, term=1)
            await caller.until(lambda: caller.events)
            (refused,) = caller.events
            assert isinstance(refused, LinkRefused)
            assert isinstance(refused.error, ConnectError)
            assert str(refused.error) == f"dispatcher at {echo.address}: the name is taken"
            assert refused.error.address == echo.address
            assert not caller.link.is_open


@on_loop
async def test_versions_that_differ_are_both_named_at_the_peer():
    async with echoing() as echo:
        events = asyncio.Queue()
        old = PeerLink(
            echo.address,
            name=bytes(16).hex(),
            incarnation=1,
            hello=lambda term: msg.ClientHello(protocol_version=0, client_id=bytes(16), incarnation=1, highest_term=term, software=""),
            receive=events.put_nowait,
            limit_bytes=LIMIT_BYTES,
        )
        old.start()
        try:
            await echo.until(lambda: echo.all(Malformed))
            (malformed,) = echo.all(Malformed)
            code, message, fields = malformed.error.to_wire()
            echo.endpoint.send(malformed.routing_id, msg.Refused(code=code, message=message, fields=fields), session=0, term=1)
            error = (await events.get()).error
            assert isinstance(error, VersionError)
            assert (error.theirs, error.ours) == (0, msg.PROTOCOL_VERSION)
        finally:
            await old.close()


@pytest.mark.slow
@on_loop
async def test_a_hello_that_is_not_answered_is_said_again_and_only_then():
    async with echoing() as echo:
        echo.welcomes = False
        async with calling(echo.address) as caller:
            await echo.until(lambda: echo.messages(msg.ClientHello))
            first = time.monotonic()
            await echo.until(lambda: len(echo.messages(msg.ClientHello)) == 2)
            assert time.monotonic() - first == pytest.approx(GREETING_TIMEOUT_S, abs=0.5)
            echo.welcomes = True
            await caller.echo(10)
            assert len(caller.terms) == 3


# ── many messages in one turn ────────────────────────────────────────────────────────────────────────────────────────


def calls(echo: Echo) -> list[int]:
    return [query.call for query in echo.messages(msg.StatusQuery)]


@on_loop
async def test_what_is_said_in_one_turn_leaves_together_and_in_order():
    async with echoing() as echo, calling(echo.address) as caller:
        await echo.attached()
        parcels = echo.endpoint.parcels_in
        for number in range(100):
            assert caller.link.send(msg.StatusQuery(call=number))
        await echo.until(lambda: len(calls(echo)) == 100)
        assert calls(echo) == list(range(100))
        assert echo.endpoint.parcels_in - parcels <= 10
        with caller.link.turn():
            for number in range(100, 110):
                assert caller.link.send(msg.StatusQuery(call=number))
        await echo.until(lambda: len(calls(echo)) == 110)
        assert calls(echo) == list(range(110))
        assert echo.endpoint.parcels_in - parcels <= 11


def refusing(caller: Caller, refused: Callable[[int], bool]) -> list[int]:
    """Let control refuse some of the parcels of requests, by their number; hellos pass. Returns where the numbers gather."""
    numbers: list[int] = []
    send = caller.link._control.send

    def sieve(frames: list[bytes]) -> bool:
        if bytes(frames[0][:2]) == msg.ClientHello.KIND:
            return send(frames)
        numbers.append(len(numbers))
        caller.happened()
        return not refused(numbers[-1]) and send(frames)

    caller.link._control.send = sieve
    return numbers


@pytest.mark.parametrize("refused", [{0}, {1}, {0, 1, 2}, {1, 3}, {2}], ids=str)
@on_loop
async def test_what_the_socket_does_not_take_is_given_to_it_again_once_and_in_order(refused):
    """Half of the messages are alike: what has left is not told by its looks."""
    async with echoing() as echo, calling(echo.address) as caller:
        await echo.attached()
        refusing(caller, lambda number: number in refused)
        for number in range(100):
            assert caller.link.send(msg.Goodbye(reason="x" * 3000) if number % 2 else msg.StatusQuery(call=number))
        await echo.until(lambda: len(calls(echo)) >= 50)
        assert caller.link.send(msg.StatusQuery(call=100))
        await echo.until(lambda: 100 in calls(echo))
        assert calls(echo) == [*range(0, 100, 2), 100]
        assert len(echo.messages(msg.Goodbye)) == 50
        assert not caller.all(SessionLost)


@on_loop
async def test_what_was_to_be_said_in_a_session_is_not_said_in_the_next():
    async with echoing() as echo, calling(echo.address) as caller:
        session = await echo.attached()
        is_stuck = True
        numbers = refusing(caller, lambda number: is_stuck)
        assert caller.link.send(msg.StatusQuery(call=1))
        await caller.until(lambda: numbers)
        echo.sessions.end(session.number)
        echo.endpoint.send(session.routing_id, msg.SayHello(), session=session.number, term=1)
        await caller.until(lambda: len(caller.all(SessionOpened)) == 2)
        is_stuck = False
        assert caller.link.send(msg.StatusQuery(call=2))
        await echo.until(lambda: 2 in calls(echo))
        await caller.echo(10)
        assert calls(echo) == [2]


# ── sessions that end ────────────────────────────────────────────────────────────────────────────────────────────────


@on_loop
async def test_say_hello_leads_to_a_new_session():
    async with echoing() as echo, calling(echo.address) as caller:
        await caller.echo(BIG)
        echo.sessions.end(caller.link.session)
        await caller.echo(BIG)
        await caller.echo(10)
        assert [type(event) for event in caller.events if not isinstance(event, LinkReceived)] == [
            SessionOpened,
            SessionLost,
            SessionOpened,
        ]
        assert caller.all(SessionLost)[0].reason == "the dispatcher asked for a new session"
        assert caller.terms == [0, 1]
        assert not echo.all(Malformed)


@on_loop
async def test_what_belongs_to_another_session_is_not_delivered():
    async with echoing(term=2) as echo, calling(echo.address) as caller:
        session = await echo.attached()
        for number, term in ((session.number + 1, 2), (session.number - 1, 2), (session.number, 1), (session.number, 3), (0, 0)):
            echo.endpoint.send(session.routing_id, msg.CallDone(call=1), session=number, term=term)
            echo.endpoint.send(session.routing_id, msg.SayHello(), session=number, term=term)
        echo.endpoint.send(session.routing_id, msg.CallDone(call=2), session=session.number, term=2)
        await caller.until(lambda: caller.received(msg.CallDone))
        assert caller.received(msg.CallDone) == [msg.CallDone(call=2)]
        assert len(caller.all(SessionOpened)) == 1


@on_loop
async def test_a_message_that_cannot_be_read_is_made_up_for_by_a_new_session():
    async with echoing() as echo, calling(echo.address) as caller:
        session = await echo.attached()
        frames = encode(msg.CallDone(call=1), session=session.number, term=1)
        echo.endpoint._watched.send([session.routing_id, frames[0], frames[1][:-1] + b"\x09"])
        await caller.until(lambda: caller.all(SessionLost))
        assert "could not be read: kind and header do not match" in caller.all(SessionLost)[0].reason
        await caller.echo(10)


@on_loop
async def test_goodbye_is_delivered_and_the_next_dispatcher_found():
    async with echoing() as echo:
        address = echo.address
        async with calling(address) as caller:
            session = await echo.attached()
            echo.endpoint.send(session.routing_id, msg.Goodbye(reason="drained"), session=session.number, term=1)
            await caller.until(lambda: caller.received(msg.Goodbye))
            assert caller.all(SessionLost) == [SessionLost("the dispatcher said goodbye")]
            echo.close()
            async with echoing(address, term=2):
                await caller.echo(10)
                assert caller.link.term == 2


@on_loop
async def test_a_dispatcher_started_again_is_found_again():
    async with echoing() as echo:
        address = echo.address
        async with calling(address) as caller:
            await caller.echo(BIG)
            for term in (2, 3):
                echo.close()
                await caller.until(lambda: not caller.link.is_open)
                async with echoing(address, term=term) as after:
                    await caller.echo(BIG)
                    assert (caller.link.term, caller.terms[-1]) == (term, term - 1)
                    assert not after.all(Malformed)
                    echo = after


@on_loop
async def test_a_callback_may_close_the_link():
    async with echoing() as echo:
        caller = Caller(echo.address)
        closing = []
        caller.tell = lambda text: closing.append(asyncio.ensure_future(caller.link.close())) if text.startswith("opened") else None
        caller.link.start()
        await caller.until(lambda: closing)
        await closing[0]
        await echo.until(lambda: echo.all(Disconnected))
        assert not caller.link.is_open


# ── one connection of the two ────────────────────────────────────────────────────────────────────────────────────────


@on_loop
async def test_control_that_is_cut_is_connected_again_in_a_new_session():
    async with echoing() as echo, proxied(echo.address) as proxy, calling(proxy.address) as caller:
        await caller.echo(10)
        proxy.cut("c")
        await caller.until(lambda: caller.all(SessionLost))
        assert caller.all(SessionLost) == [SessionLost("the connection was closed")]
        await caller.echo(10)
        await caller.echo(BIG)


@on_loop
async def test_bulk_that_is_cut_is_replaced_with_its_session_because_nobody_knows_what_was_lost():
    async with echoing() as echo, proxied(echo.address) as proxy, calling(proxy.address) as caller:
        await caller.echo(BIG)
        proxy.cut("b")
        await caller.until(lambda: caller.all(SessionLost))
        assert caller.all(SessionLost) == [SessionLost("the bulk connection was closed")]
        await caller.echo(BIG)
        assert not echo.all(Malformed)
        assert len(caller.terms) == 2


@on_loop
async def test_a_message_that_is_cut_in_the_middle_arrives_whole_in_the_next_session():
    async with echoing() as echo, proxied(echo.address) as proxy, calling(proxy.address) as caller:
        await caller.echo(10)
        for round_ in range(3):
            passed = proxy.passed["b"]
            echoed = asyncio.ensure_future(caller.echo(8 * BIG + round_))
            await proxy.until(lambda passed=passed: proxy.passed["b"] > passed + BIG)
            proxy.cut("b")
            await echoed
        assert len(caller.all(SessionLost)) == 3
        assert not echo.all(Malformed)


@on_loop
async def test_the_rest_of_a_big_message_does_not_hurt_the_dispatcher_that_comes_next():
    """libzmq keeps what it could not send and hands it to whoever is there later, before anything of the new session."""
    async with echoing() as echo, proxied(echo.address) as proxy, calling(proxy.address) as caller:
        await caller.echo(10)
        passed = proxy.passed["b"]
        echoed = asyncio.ensure_future(caller.echo(20 * BIG))
        await proxy.until(lambda: proxy.passed["b"] > passed + BIG)
        echo.close()
        async with echoing(echo.address, term=2) as after:
            await echoed
            await caller.echo(10)
            assert not after.all(Malformed)
            assert not caller.all(LinkRefused)


@on_loop
async def test_a_new_session_does_not_wait_for_what_the_last_one_had_to_say():
    """A slow line with 20 seconds of an old session in its queue: the new one begins at once, over a connection of its own."""
    async with echoing() as echo, proxied(echo.address) as proxy, calling(proxy.address) as caller:
        await echo.attached()
        proxy.bytes_per_s["b"] = 2_000_000
        assert caller.send(40_000_000)[0]
        passed = proxy.passed["b"]
        await proxy.until(lambda: proxy.passed["b"] > passed)
        echo.sessions.end(caller.link.session)
        began = time.monotonic()
        await caller.echo(10)
        await echo.attached(2)
        assert time.monotonic() - began < 5.0
        await caller.echo(BIG)
        assert not echo.all(Malformed)


@pytest.mark.slow
@on_loop
async def test_a_slow_bulk_line_does_not_cost_the_session():
    """Four seconds of bulk, nearly three times what heartbeats are given: control passes by, as do they."""
    async with echoing() as echo, proxied(echo.address) as proxy, calling(proxy.address) as caller:
        await echo.attached()
        proxy.bytes_per_s["b"] = 1_000_000
        began = time.monotonic()
        big = asyncio.ensure_future(caller.echo(4_000_000))
        while not big.done():
            await caller.echo(100)
            assert caller.all(SessionLost) == []
        await big
        assert time.monotonic() - began > 3.0


# ── processes ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def _ready(dispatcher: Process) -> str:
    return (await dispatcher.told("ready")).removeprefix("ready ")


@on_loop
async def test_a_killed_dispatcher_is_noticed_at_once_and_its_successor_found():
    with process("dispatcher", "tcp://127.0.0.1:*", "1") as first:
        address = await _ready(first)
        async with calling(address) as caller:
            await caller.echo(BIG)
            killed = time.monotonic()
            first.signal(signal.SIGKILL)
            await caller.until(lambda: caller.all(SessionLost))
            assert time.monotonic() - killed < 1.0
            with process("dispatcher", address, "2") as second:
                await _ready(second)
                await caller.echo(BIG)
                assert caller.link.term == 2
                assert [line for line in second.lines if line.startswith("malformed")] == []


@on_loop
async def test_a_dispatcher_killed_in_the_middle_of_a_message_gets_it_again_from_the_start():
    with process("dispatcher", "tcp://127.0.0.1:*", "1") as first:
        address = await _ready(first)
        async with proxied(address) as proxy, calling(proxy.address) as caller:
            await caller.echo(10)
            passed = proxy.passed["b"]
            echoed = asyncio.ensure_future(caller.echo(20 * BIG))
            await proxy.until(lambda: proxy.passed["b"] > passed + BIG)
            first.signal(signal.SIGKILL)
            await caller.until(lambda: caller.all(SessionLost))
            with process("dispatcher", address, "2") as second:
                await echoed
                assert caller.link.term == 2
                assert [line for line in second.lines if line.startswith("malformed")] == []


@pytest.mark.slow
@pytest.mark.parametrize("stopped_s", [0.3, 4.0])
@on_loop
async def test_a_stopped_dispatcher_is_noticed_and_served_by_when_it_goes_on(stopped_s):
    """Shorter than heartbeats bear nothing happens; longer, a new session; in both everything is answered."""
    with process("dispatcher", "tcp://127.0.0.1:*", "1") as dispatcher:
        address = await _ready(dispatcher)
        async with calling(address) as caller:
            await caller.echo(BIG)
            dispatcher.signal(signal.SIGSTOP)
            stopped = time.monotonic()
            echoed = asyncio.ensure_future(caller.echo(BIG))
            if stopped_s > 1.5:
                await caller.until(lambda: caller.all(SessionLost))
                assert time.monotonic() - stopped < 3.5
            await asyncio.sleep(max(0.0, stopped + stopped_s - time.monotonic()))  # the length of the stop is the test's subject
            dispatcher.signal(signal.SIGCONT)
            await echoed
            await caller.echo(10)
            assert len(caller.all(SessionLost)) == (0 if stopped_s < 1 else len(caller.all(SessionOpened)) - 1)
            assert [line for line in dispatcher.lines if line.startswith("malformed")] == []


@pytest.mark.slow
@on_loop
async def test_a_link_bears_everything_at_random():
    """Cuts at random moments of random connections, sessions that end, dispatchers that change: every echo is right, and none is lost."""
    chance = random.Random(7)
    async with echoing() as echo, proxied(echo.address) as proxy, calling(proxy.address) as caller:
        address, done = echo.address, 0
        work = asyncio.ensure_future(_echo_on(caller, chance, 20))
        while not work.done():
            before = len(caller.events)
            match chance.randrange(5):
                case 0:
                    proxy.cut("c")
                case 1:
                    proxy.cut("b")
                case 2:
                    proxy.cut("c")
                    proxy.cut("b")
                case 3:
                    for session in echo.sessions:
                        echo.sessions.end(session.number)
                case 4:
                    echo.close()
                    done += 1
                    echo = Echo(address, term=done + 1)
            more = asyncio.ensure_future(caller.until(lambda before=before: len(caller.events) >= before + 4))
            await asyncio.wait([work, more], return_when=asyncio.FIRST_COMPLETED)
            more.cancel()
        await work
        assert not caller.all(LinkRefused)
        echo.close()


async def _echo_on(caller: Caller, chance, count: int) -> None:
    for _ in range(count):
        await caller.echo(chance.choice([10, 1000, 100_000, BIG, 3 * BIG]))
