"""The dispatcher's socket against real connections: good ones, bad ones, garbage, and those that end in every way."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import re
import selectors
import signal
import socket
import struct
import time

import pytest
import xxhash
import zmq

from adapt.errors import ConfigError, VersionError
from adapt.protocol import messages as msg
from adapt.protocol.codecs import TensorHeader
from adapt.protocol.ids import RequestId, RoutingId, routing_ids
from adapt.protocol.pieces import split
from adapt.protocol.wire import INLINE_BYTES, Blob, encode, encode_head
from adapt.runtime import endpoint as endpoint_module
from adapt.runtime.endpoint import (
    DRAIN_LIMIT,
    MAX_PARTS,
    TURN_MESSAGES,
    Disconnected,
    Malformed,
    Received,
    RouterEndpoint,
    Undelivered,
    WatchedSocket,
)
from adapt.runtime.link import LinkReceived
from tests.cluster.ends import LIMIT_BYTES, PIECE_BYTES, WAIT_S, Echo, calling, echoing, on_loop, process, proxied

CLIENT = bytes(range(16))


def _has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as plug:
        plug.bind(("::1", 0))
        return True
    return False


def hello(incarnation: int = 1, **changes) -> msg.ClientHello:
    facts = {
        "protocol_version": msg.PROTOCOL_VERSION,
        "client_id": CLIENT,
        "incarnation": incarnation,
        "highest_term": 0,
        "software": "test",
    }
    return msg.ClientHello(**facts | changes)


@contextlib.contextmanager
def dealer(address: str, identity: bytes = b""):
    """A bare socket that sends what it likes."""
    context = zmq.Context()
    plug = context.socket(zmq.DEALER)
    plug.set(zmq.LINGER, 0)
    if identity:
        plug.set(zmq.IDENTITY, identity)
    plug.connect(address)
    try:
        yield plug
    finally:
        context.destroy(linger=0)


def greet(plug, incarnation: int = 1) -> None:
    plug.send_multipart(encode(hello(incarnation), session=0, term=0))


CONTROL, BULK = routing_ids(CLIENT.hex(), 1)


# ── binding ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@on_loop
async def test_the_address_is_the_one_that_was_really_bound():
    async with echoing("tcp://127.0.0.1:*") as echo:
        port = int(re.fullmatch(r"tcp://127\.0\.0\.1:(\d+)", echo.address)[1])
        assert port > 0
        async with echoing("tcp://127.0.0.1:0") as other:
            assert other.address not in (echo.address, "tcp://127.0.0.1:0")


@on_loop
async def test_a_taken_port_is_named():
    async with echoing() as echo:
        with pytest.raises(ConfigError, match=re.escape(f"listen={echo.address}: cannot be bound: it is in use")):
            Echo(echo.address)
        async with calling(echo.address) as caller:
            await caller.echo(10)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "tcp://",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:port",
        "tcp://127.0.0.1:99999",
        "tcp://127.0.0.1:-1",
        "http://127.0.0.1:80",
        "127.0.0.1:80",
    ],
)
@on_loop
async def test_what_is_no_address_is_named(address):
    with pytest.raises(ConfigError, match=re.escape(f"listen={address}: cannot be bound")):
        Echo(address)


@on_loop
async def test_a_closed_endpoint_leaves_its_port():
    async with echoing() as echo:
        address = echo.address
    async with echoing(address), calling(address) as caller:
        await caller.echo(10)


@pytest.mark.skipif(not _has_ipv6(), reason="this machine has no IPv6 loopback")
@on_loop
async def test_an_address_of_the_other_internet_protocol_serves_as_well():
    async with echoing("tcp://[::1]:*") as echo:
        assert re.fullmatch(r"tcp://\[::1\]:\d+", echo.address)
        async with calling(echo.address) as caller:
            await caller.echo(300_000)


@on_loop
async def test_a_socket_of_the_file_system_serves_as_well(tmp_path):
    async with echoing(f"ipc://{tmp_path}/s") as echo, calling(echo.address) as caller:
        await caller.echo(300_000)
        await caller.link.close()
        await echo.until(lambda: echo.all(Disconnected))


# ── sending ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@on_loop
async def test_what_is_sent_to_nobody_comes_back():
    async with echoing() as echo:
        nobody = RoutingId(b"nobody.c")
        small = [msg.CallDone(call=number) for number in range(3)]
        for message in small:
            echo.endpoint.send(nobody, message, session=1, term=1)
        assert not echo.all(Undelivered), "not while it is sent: whoever sends may be in the middle of something"
        await echo.until(lambda: echo.all(Undelivered))
        assert echo.all(Undelivered) == [Undelivered(nobody, tuple(small))]
        big = msg.ArtifactPiece(artifact="a" * 64, offset=0, file_bytes=1)
        echo.endpoint.send(nobody, big, session=1, term=1, blobs=(Blob.of(b"x"),))
        await echo.until(lambda: len(echo.all(Undelivered)) == 2)
        assert echo.all(Undelivered)[1] == Undelivered(nobody, (big,))


@on_loop
async def test_what_comes_back_is_followed_by_a_turn():
    """Else nobody would look at it before the next message arrives."""
    happened: list[object] = []
    told = asyncio.Event()
    undelivered = Undelivered(CONTROL, (msg.CallDone(call=1),))

    def turned() -> None:
        if undelivered in happened:
            told.set()

    endpoint = RouterEndpoint("tcp://127.0.0.1:*", receive=happened.append, turned=turned, limit_bytes=LIMIT_BYTES, piece_bytes=PIECE_BYTES)
    try:
        endpoint.send(CONTROL, msg.CallDone(call=1), session=1, term=1)
        async with asyncio.timeout(WAIT_S):
            await told.wait()
        assert happened == [undelivered]
    finally:
        endpoint.close()


@on_loop
async def test_what_is_sent_while_things_are_received_leaves_after_the_turn():
    """One bundle for all that a turn has to say to a peer, however many messages it has answered."""
    order: list[object] = []

    def receive(arrival) -> None:
        order.append(type(arrival.envelope.message))
        endpoint.send(CONTROL, msg.CallDone(call=len(order)), session=1, term=1)

    endpoint = RouterEndpoint(
        "tcp://127.0.0.1:*",
        receive=receive,
        turned=lambda: order.append(endpoint.parcels_out),
        limit_bytes=LIMIT_BYTES,
        piece_bytes=PIECE_BYTES,
    )
    try:
        with dealer(endpoint.address, CONTROL) as plug:
            plug.send_multipart(bundled(*[encode(msg.StatusQuery(call=number), session=1, term=1) for number in range(5)]))
            assert await asyncio.to_thread(plug.poll, 5000)
            assert plug.recv_multipart()[0][:2] == b"BU"
            asked = order.index(msg.StatusQuery)
            assert order[asked : asked + 6] == [msg.StatusQuery] * 5 + [0], "it leaves after `turned`"
            assert endpoint.parcels_out == 1 and endpoint.messages_out == 5
    finally:
        endpoint.close()


@on_loop
async def test_what_is_sent_to_a_peer_that_has_gone_comes_back():
    async with echoing() as echo:
        with dealer(echo.address, CONTROL) as plug:
            greet(plug)
            await echo.until(lambda: echo.messages(msg.ClientHello))
        await echo.until(lambda: echo.all(Disconnected))
        echo.endpoint.send(CONTROL, msg.CallDone(call=1), session=1, term=1)
        await echo.until(lambda: echo.all(Undelivered))
        assert echo.all(Undelivered) == [Undelivered(CONTROL, (msg.CallDone(call=1),))]


@on_loop
async def test_what_is_sent_in_one_turn_arrives_in_order_and_in_few_parcels():
    async with echoing() as echo, calling(echo.address) as caller:
        session = await echo.attached()
        before = echo.endpoint.counters()
        for number in range(10 * TURN_MESSAGES):
            echo.endpoint.send(session.routing_id, msg.CallDone(call=number), session=session.number, term=1)
        await caller.until(lambda: len(caller.received(msg.CallDone)) == 10 * TURN_MESSAGES)
        assert [done.call for done in caller.received(msg.CallDone)] == list(range(10 * TURN_MESSAGES))
        after = echo.endpoint.counters()
        assert after["messages_out"] - before["messages_out"] == 10 * TURN_MESSAGES
        assert after["parcels_out"] - before["parcels_out"] == 10


@on_loop
async def test_what_peers_say_at_a_time_is_answered_at_a_time():
    async with echoing() as echo, calling(echo.address) as caller, calling(echo.address) as other:
        await caller.echo(10)
        await other.echo(10)
        before = echo.endpoint.counters()
        requests = [(one, one.send(100 + number)) for number in range(3 * TURN_MESSAGES) for one in (caller, other)]
        for one, (sent, sequence, data) in requests:
            assert sent
            reply = await one.until(lambda one=one, sequence=sequence: one.reply(sequence))
            assert bytes(reply.blobs[0].contiguous()) == data
        for one in (caller, other):
            order = [reply.request_id.sequence for reply in one.received(msg.Reply)]
            assert order == sorted(order)
        after = echo.endpoint.counters()
        assert after["messages_in"] - before["messages_in"] == after["messages_out"] - before["messages_out"] == len(requests)
        assert 2 <= after["parcels_in"] - before["parcels_in"] <= 6
        assert after["parcels_out"] - before["parcels_out"] <= 12


@on_loop
async def test_messages_of_all_sizes_in_one_turn_come_back_the_same():
    sizes = [0, 1, INLINE_BYTES, INLINE_BYTES + 1, 30_000, 60_000, 65_536, 65_537, 200_000, 10] * 4
    async with echoing() as echo, calling(echo.address) as caller:
        await echo.attached()
        requests = [caller.send(size) for size in sizes]
        for sent, sequence, data in requests:
            assert sent
            reply = await caller.until(lambda sequence=sequence: caller.reply(sequence))
            assert bytes(reply.blobs[0].contiguous()) == data
        assert not echo.all(Malformed) and len(caller.received(msg.Reply)) == len(sizes)


@on_loop
async def test_a_small_message_that_follows_a_big_one_does_not_wait_for_it():
    async with echoing() as echo, calling(echo.address) as caller:
        session = await echo.attached()
        data = random.Random(1).randbytes(20_000_000)
        header = TensorHeader(dtype="uint8", shape=(len(data),), codec="raw", payload_bytes=len(data))
        big = msg.Reply(request_id=RequestId(CLIENT, 1), leaves=[header], attempts=1, numeric_classes=[])
        echo.endpoint.send(session.routing_id, big, session=session.number, term=1, blobs=(Blob.of(data),))
        echo.endpoint.send(session.routing_id, msg.CallDone(call=1), session=session.number, term=1)
        await caller.until(lambda: caller.received(msg.Reply))
        assert [type(event.message) for event in caller.all(LinkReceived)] == [msg.CallDone, msg.Reply]
        assert bytes(caller.all(LinkReceived)[1].blobs[0].contiguous()) == data


@on_loop
async def test_sending_to_a_peer_that_does_not_read_is_refused_and_others_are_served(monkeypatch):
    monkeypatch.setattr(endpoint_module, "SEND_QUEUE", 10)
    async with echoing() as echo:
        context = zmq.Context()
        plug = context.socket(zmq.DEALER)
        plug.set(zmq.IDENTITY, CONTROL)
        plug.set(zmq.RCVHWM, 1)
        plug.set(zmq.LINGER, 0)
        plug.connect(echo.address)
        try:
            greet(plug)
            await echo.until(lambda: echo.messages(msg.ClientHello))
            sent = 0
            while not echo.all(Undelivered):
                echo.endpoint.send(CONTROL, msg.CallFailed(call=sent, code="x", message="x" * 4000, fields={}), session=1, term=1)
                sent += 1
                assert sent < 20_000
                if sent % 10 == 0:
                    await asyncio.sleep(0)  # its queue empties into the buffers of the system, until they are full
            refused = [message.call for message in echo.all(Undelivered)[0].messages]
            assert refused == list(range(refused[0], refused[0] + len(refused))) and refused[-1] < sent
            async with calling(echo.address) as caller:
                await caller.echo(10)
                await caller.echo(200_000)
        finally:
            context.destroy(linger=0)


@pytest.mark.parametrize("size", [0, 1, 1000, 60_000, 65_536, 65_537, 1_000_000, 5 * PIECE_BYTES])
@on_loop
async def test_a_message_of_any_size_comes_back_the_same(size):
    async with echoing() as echo, calling(echo.address) as caller:
        await echo.attached()
        await caller.echo(size)
        assert not echo.all(Malformed)


@on_loop
async def test_small_messages_are_not_held_up_by_big_ones():
    async with echoing() as echo, calling(echo.address) as caller:
        await echo.attached()
        requests = [caller.send(20_000_000), *(caller.send(100) for _ in range(3))]
        assert all(sent for sent, _, _ in requests)
        await caller.until(lambda: all(caller.reply(sequence) for _, sequence, _ in requests))
        order = [event.message.request_id.sequence for event in caller.events[1:]]
        assert order == [2, 3, 4, 1]


@on_loop
async def test_what_arrived_in_parts_is_forwarded_in_parts():
    async with echoing() as echo, calling(echo.address) as caller:
        await echo.attached()
        await caller.echo(10 * PIECE_BYTES + 5)
        request = next(
            arrival.envelope for arrival in echo.arrivals if isinstance(getattr(arrival, "envelope", None).message, msg.InferRequest)
        )
        assert [len(part) for part in request.blobs[0].parts] == [PIECE_BYTES] * 10 + [5]


@on_loop
async def test_bulk_messages_wait_for_the_bulk_connection():
    async with echoing() as echo:
        with dealer(echo.address, CONTROL) as plug:
            greet(plug)
            await echo.until(lambda: echo.messages(msg.ClientHello))
            piece = msg.ArtifactPiece(artifact="a" * 64, offset=0, file_bytes=1)
            echo.endpoint.send(CONTROL, piece, session=1, term=1, blobs=(Blob.of(b"x"),))
            await echo.until(lambda: echo.all(Undelivered))
            assert echo.all(Undelivered) == [Undelivered(CONTROL, (piece,))]


# ── what is no message ───────────────────────────────────────────────────────────────────────────────────────────────


def bundled(*messages: list[bytes]) -> list[bytes]:
    """A bundle with a right checksum, whatever is in it."""
    body = b"".join(struct.pack(">2sI", frames[0][:2], len(frames[1])) + frames[1] for frames in messages)
    return [b"BU" + xxhash.xxh3_64_digest(body) + body]


GOOD = encode(msg.StatusQuery(call=1), session=1, term=1)
HUGE = encode_head(msg.StatusQuery(call=1), session=1, term=1)[0]
BAD = {
    "empty": ([b""], "2 to 258 frames, this one 1"),
    "one frame": ([GOOD[0]], "this one 1"),
    "a delimiter first": ([b"", *GOOD], "first frame has 0 bytes"),
    "too many frames": ([*GOOD, *[b"x"] * MAX_PARTS], f"message of {MAX_PARTS + 2} frames"),
    "very many frames": ([*GOOD, *[b"x"] * 200_001], "message of 200003 frames"),
    "a spoilt header": ([GOOD[0], GOOD[1][:-1] + b"\xff"], "checksum"),
    "an unknown kind": ([b"??" + GOOD[0][2:], GOOD[1]], "checksum"),
    "surplus payload": ([*GOOD, b"x"], "names 0 payload frames, 1 came"),
    "a piece of nothing": ([b"PI"], "a piece has 3 or 4 frames"),
    "a spoilt piece": ([b"PI" + bytes(8), b"\x80", b""], "checksum"),
    "an empty bundle": ([b"BU" + xxhash.xxh3_64_digest(b"")], "a bundle of 0 messages"),
    "a spoilt bundle": ([b"BU" + bytes(8) + b"\x80"], "checksum"),
    "half a bundle": ([b"BU"], "checksum"),
    "a hello in a bundle": (bundled(encode(hello(), session=0, term=0)), "ClientHello does not travel in a bundle"),
    "a bundle in a bundle": (bundled([b"BU", b"\x80"]), "unknown kind"),
    "a spoilt message in a bundle": (bundled(GOOD, [GOOD[0], GOOD[1][:-1]]), "not one msgpack value"),
    "another version": (encode(hello(protocol_version=99), session=0, term=0), "protocol version 99 was spoken, this side speaks 1"),
    "another's hello": (encode(hello(client_id=bytes(16)), session=0, term=0), "does not come from the control connection"),
    "another life's hello": (encode(hello(incarnation=2), session=0, term=0), "does not come from the control connection"),
    "attach on control": (encode(msg.Attach(), session=1, term=1), "should come over the bulk connection"),
}


@pytest.mark.parametrize("frames, told", BAD.values(), ids=BAD)
@on_loop
async def test_a_bad_message_is_told_once_and_disturbs_nobody(frames, told):
    async with echoing() as echo, calling(echo.address) as caller:
        await caller.echo(10)
        with dealer(echo.address, CONTROL) as plug:
            plug.send_multipart(frames)
            await echo.until(lambda: echo.all(Malformed))
            (malformed,) = echo.all(Malformed)
            assert malformed.routing_id == CONTROL
            assert re.search(told, str(malformed.error))
            assert isinstance(malformed.error, VersionError) == ("version" in told)
            greet(plug)  # the connection itself is as good as before
            await echo.until(lambda: len(echo.messages(msg.ClientHello)) == 2)
        await caller.echo(10)
        await caller.echo(300_000)
        assert len(echo.all(Malformed)) == 1


@on_loop
async def test_a_hello_over_the_bulk_connection_is_none():
    async with echoing() as echo:
        with dealer(echo.address, BULK) as plug:
            greet(plug)
            await echo.until(lambda: echo.all(Malformed))
            assert echo.messages(msg.ClientHello) == []


@on_loop
async def test_a_frame_beyond_the_limit_ends_its_connection_and_no_other():
    async with echoing() as echo, calling(echo.address) as caller:
        await caller.echo(10)
        with dealer(echo.address, CONTROL) as plug:
            greet(plug)
            await echo.until(lambda: len(echo.messages(msg.ClientHello)) == 2)
            plug.send_multipart([*GOOD, bytes(LIMIT_BYTES + 1)])
            await echo.until(lambda: Disconnected(CONTROL) in echo.arrivals)
            greet(plug)  # libzmq connects again
            await echo.until(lambda: len(echo.messages(msg.ClientHello)) == 3)
        await caller.echo(10)
        assert not echo.all(Malformed)


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\xff" * 100,
        bytes(100),
        random.Random(1).randbytes(5000),
        random.Random(2).randbytes(5000),
        b"\x03\x00ab" + b"\x02\x00x" * 50,
        b"\xff\0\0\0\0\0\0\0\x01\x7f\x03",
        b"",
    ],
    ids=["http", "ones", "zeros", "random", "more random", "first protocol of zmq", "half a greeting", "nothing"],
)
@on_loop
async def test_garbage_on_the_port_reaches_nobody(garbage):
    """What does not begin with 0xff may be ZMTP 1.0, an identity and frames, and so come as far as being malformed."""
    async with echoing() as echo, calling(echo.address) as caller:
        await caller.echo(10)
        plugs = [socket.create_connection(("127.0.0.1", int(echo.address.rsplit(":", 1)[1]))) for _ in range(5)]
        for plug in plugs:
            plug.sendall(garbage)
        await caller.echo(10)
        for plug in plugs:
            plug.close()
        await caller.echo(100_000)
        ours = routing_ids(caller.client_id.hex(), 9)
        assert {arrival.routing_id for arrival in echo.arrivals if isinstance(arrival, Received)} == set(ours)
        assert not {arrival.routing_id for arrival in echo.all(Malformed)} & set(ours)
        assert not echo.all(Disconnected)


@on_loop
async def test_a_stranger_without_a_name_is_heard_and_not_mistaken():
    async with echoing() as echo:
        with dealer(echo.address) as plug:
            greet(plug)
            await echo.until(lambda: echo.all(Malformed))
            plug.send_multipart(GOOD)
            await echo.until(lambda: echo.messages(msg.StatusQuery))


@on_loop
async def test_pieces_before_any_hello_are_answered_and_not_put_together():
    """A dispatcher that has just been started hears the rest of what its predecessor was sent."""
    async with echoing() as echo:
        blob = Blob.of(bytes(3 * PIECE_BYTES))
        piece = msg.ArtifactPiece(artifact="a" * 64, offset=0, file_bytes=1)
        with dealer(echo.address, CONTROL) as control, dealer(echo.address, BULK) as bulk:
            control.send_multipart(encode(msg.StatusQuery(call=1), session=4, term=1))  # its answer says that the route stands
            assert await asyncio.to_thread(control.poll, 5000)
            control.recv_multipart()
            for frames in split(piece, session=4, term=1, blobs=(blob,), transfer=1, piece_bytes=PIECE_BYTES):
                bulk.send_multipart(frames)
            await echo.until(lambda: echo.messages(msg.Piece))
            assert len(echo.arrivals) == 2
            assert await asyncio.to_thread(control.poll, 5000)
            assert control.recv_multipart()[0][:2] == msg.SayHello.KIND
            assert not echo.all(Malformed)


@on_loop
async def test_an_error_of_whoever_is_told_makes_nobody_deaf():
    """Nothing else would make the socket look again: its descriptor has told already, and nothing new arrives here."""
    errors, reads, looked_again = [], [], asyncio.Event()
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: errors.append(context["exception"]))

    def stumble():
        reads.append(1)
        if len(reads) == 1:
            raise KeyError("a bug")
        looked_again.set()

    with zmq.Context() as context:
        watched = WatchedSocket(context, zmq.ROUTER, read=stumble, noticed=lambda event, descriptor: None, limit_bytes=LIMIT_BYTES)
        try:
            async with asyncio.timeout(WAIT_S):
                await looked_again.wait()
        finally:
            watched.close()
    assert [repr(error) for error in errors] == ["KeyError('a bug')"]


# ── many messages ────────────────────────────────────────────────────────────────────────────────────────────────────


@on_loop
async def test_everything_is_read_though_the_descriptor_tells_but_once():
    async with echoing() as echo:
        with dealer(echo.address, CONTROL) as plug:
            for number in range(20 * DRAIN_LIMIT):
                plug.send_multipart(encode(msg.StatusQuery(call=number), session=1, term=1))
            await echo.until(lambda: len(echo.messages(msg.StatusQuery)) == 20 * DRAIN_LIMIT)
        assert [query.call for query in echo.messages(msg.StatusQuery)] == list(range(20 * DRAIN_LIMIT))


@on_loop
async def test_others_have_their_turn_while_much_arrives():
    async with echoing() as echo:
        turns = [0]

        def turn():
            turns.append(len(echo.arrivals))
            asyncio.get_running_loop().call_soon(turn)

        with dealer(echo.address, CONTROL) as plug:
            for _ in range(10 * DRAIN_LIMIT):
                plug.send_multipart(GOOD)
            turn()
            await echo.until(lambda: len(echo.arrivals) == 10 * DRAIN_LIMIT)
        assert (
            max(later - earlier for earlier, later in itertools.pairwise(turns)) <= 3 * DRAIN_LIMIT
        )  # told by the descriptor, the monitor, and itself


@on_loop
async def test_a_loop_that_was_late_can_read_everything_at_once():
    async with echoing() as echo:
        with dealer(echo.address, CONTROL) as plug:
            greet(plug)
            await echo.until(lambda: echo.messages(msg.ClientHello))
            for _ in range(10 * DRAIN_LIMIT):
                plug.send_multipart(GOOD)
            with selectors.DefaultSelector() as selector:  # the network is another thread's work, the loop stands still meanwhile
                selector.register(echo.endpoint._watched.socket.fileno(), selectors.EVENT_READ)
                echo.endpoint.drain()
                while len(echo.arrivals) < 1 + 10 * DRAIN_LIMIT and selector.select(WAIT_S):
                    echo.endpoint.drain()
            assert len(echo.arrivals) == 1 + 10 * DRAIN_LIMIT


# ── connections that end ─────────────────────────────────────────────────────────────────────────────────────────────


@on_loop
async def test_the_end_of_a_greeted_control_connection_is_told_once_and_of_no_other():
    async with echoing() as echo:
        for incarnation in range(1, 30):  # descriptors are used again at once
            control, bulk = routing_ids(CLIENT.hex(), incarnation)
            with dealer(echo.address, control) as plug, dealer(echo.address, bulk) as other, dealer(echo.address, b"silent") as silent:
                silent.send_multipart(GOOD)
                other.send_multipart(encode(msg.Attach(), session=1, term=1))
                greet(plug, incarnation)
                await echo.until(lambda count=incarnation: len(echo.messages(msg.ClientHello)) == count)
                await echo.until(lambda count=incarnation: len(echo.messages(msg.Attach)) == count)
            await echo.until(lambda count=incarnation: len(echo.all(Disconnected)) == count)
            assert echo.all(Disconnected)[-1] == Disconnected(control)


@on_loop
async def test_a_peer_that_came_back_over_a_new_connection_is_not_ended_by_the_old_one():
    async with echoing() as echo:
        with dealer(echo.address, CONTROL) as first:
            greet(first)
            await echo.until(lambda: len(echo.messages(msg.ClientHello)) == 1)
            with dealer(echo.address, CONTROL) as second:
                greet(second)
                await echo.until(lambda: len(echo.messages(msg.ClientHello)) == 2)
                first.close()
                with dealer(echo.address, routing_ids(CLIENT.hex(), 5)[0]) as third:  # once this one's end is told, that one's was long ago
                    greet(third, 5)
                    await echo.until(lambda: len(echo.messages(msg.ClientHello)) == 3)
                await echo.until(lambda: echo.all(Disconnected))
                assert echo.all(Disconnected) == [Disconnected(routing_ids(CLIENT.hex(), 5)[0])]
                echo.endpoint.send(CONTROL, msg.SayHello(), session=1, term=1)
                assert await asyncio.to_thread(second.poll, 5000)
                assert not echo.all(Undelivered)
            await echo.until(lambda: Disconnected(CONTROL) in echo.arrivals)


@on_loop
async def test_a_killed_process_is_noticed_at_once():
    async with echoing() as echo:
        with process("client", echo.address) as client:
            session = await echo.attached()
            await client.told("opened")
            killed = time.monotonic()
            client.signal(signal.SIGKILL)
            await echo.until(lambda: echo.all(Disconnected))
            assert time.monotonic() - killed < 1.0
            assert echo.all(Disconnected) == [Disconnected(session.routing_id)]
            assert len(echo.sessions) == 0


@pytest.mark.slow
@on_loop
async def test_a_stopped_process_is_noticed_and_greets_again_when_it_goes_on():
    """By its heartbeats, from its first one on, which comes half a second after it has connected: that one says how long to wait for the next."""
    async with echoing() as echo, proxied(echo.address) as proxy:
        with process("client", proxy.address) as client:
            await echo.attached()
            await client.told("opened 1")
            passed = proxy.passed["c"]
            await proxy.until(lambda: proxy.passed["c"] > passed)
            stopped = time.monotonic()
            client.signal(signal.SIGSTOP)
            await echo.until(lambda: echo.all(Disconnected))
            assert time.monotonic() - stopped < 4.0  # heartbeats end after 1.5 s
            client.signal(signal.SIGCONT)
            await client.told("lost")
            await client.told("opened 2")
            await echo.attached(2)
        assert not echo.all(Malformed)


@on_loop
async def test_closing_with_much_to_send_takes_no_time():
    heard = asyncio.Event()
    endpoint = RouterEndpoint("tcp://127.0.0.1:*", receive=lambda arrival: heard.set(), limit_bytes=LIMIT_BYTES, piece_bytes=PIECE_BYTES)
    with dealer(endpoint.address, CONTROL) as plug:
        greet(plug)
        await heard.wait()
        for _ in range(1000):
            endpoint.send(CONTROL, msg.Goodbye(reason="x" * 4000), session=1, term=1)
        began = time.monotonic()
        endpoint.close()
        assert time.monotonic() - began < 2.0
