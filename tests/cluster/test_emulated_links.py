"""The link proxy over real sockets: what is sent arrives, late or changed exactly as was said, and nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path

import psutil
import pytest

from adapt.emulation.proxy import MAX_WAITING_BYTES, MEBIBYTE, corruptions, inside
from adapt.emulation.proxy_control import LinkProxy
from adapt.errors import AdaptError

SEED = 7
WAIT_S = 20.0
BYTES = random.Random(1).randbytes(MEBIBYTE)
RESET_ON_CLOSE = struct.pack("ii", 1, 0)

namespaces = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: network namespaces are made")


class Link:
    """One device's link: `connect` gives both ends of a new connection through it, the device's first."""

    def __init__(self, proxy: LinkProxy, **delay: float) -> None:
        self._ends = contextlib.ExitStack()
        self.proxy = proxy
        self.target = self._ends.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.target.settimeout(WAIT_S)
        self.address = proxy.add("pi", namespace=None, target=self.target.getsockname(), **delay)

    def dial(self) -> socket.socket:
        return self._ends.enter_context(socket.create_connection(self.address, timeout=WAIT_S))

    def take(self) -> socket.socket:
        end = self._ends.enter_context(self.target.accept()[0])
        end.settimeout(WAIT_S)
        return end

    def connect(self) -> tuple[socket.socket, socket.socket]:
        return self.dial(), self.take()

    def settled(self) -> None:
        """What had reached the proxy has been dealt with: its loop has gone round since."""
        for _ in range(2):
            self.proxy.counters()

    def close(self) -> None:
        self._ends.close()


@pytest.fixture
def proxy() -> Iterator[LinkProxy]:
    made = LinkProxy(SEED)
    made.start()
    yield made
    made.close()


@pytest.fixture
def link(proxy: LinkProxy) -> Iterator[Link]:
    with contextlib.closing(Link(proxy)) as made:
        yield made


def receive(end: socket.socket, size: int) -> bytes:
    received = bytearray()
    while len(received) < size and (data := end.recv(MEBIBYTE)):
        received += data
    return bytes(received)


def exchange(device: socket.socket, target: socket.socket, up: bytes, down: bytes) -> tuple[bytes, bytes]:
    """Send both at once; what arrived at the target and at the device."""
    with ThreadPoolExecutor(4) as threads:
        sent = [threads.submit(device.sendall, up), threads.submit(target.sendall, down)]
        arrived = threads.submit(receive, target, len(up)), threads.submit(receive, device, len(down))
        for future in sent:
            future.result(WAIT_S)
        return arrived[0].result(WAIT_S), arrived[1].result(WAIT_S)


def has_something(end: socket.socket) -> bool:
    return bool(select.select([end], [], [], 0)[0])


def assert_reset(end: socket.socket) -> None:
    with pytest.raises(ConnectionResetError):
        while end.recv(MEBIBYTE):
            pass
        raise AssertionError("it was closed, not reset")


# --- what arrives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("latency_s", "jitter_s"), [(0.0, 0.0), (0.005, 0.0), (0.003, 0.01)])
def test_what_is_sent_arrives_both_ways_at_once(proxy, latency_s, jitter_s):
    with contextlib.closing(Link(proxy, latency_s=latency_s, jitter_s=jitter_s)) as link:
        device, target = link.connect()
        assert exchange(device, target, BYTES, BYTES[::-1]) == (BYTES, BYTES[::-1])
        carried = proxy.counters()
        assert [carried["pi", way].carried_bytes for way in ("up", "down")] == [len(BYTES)] * 2


def test_bytes_are_changed_exactly_as_predicted(link):
    link.proxy.corrupt("pi", 50.0)
    changed = {"up": 0, "down": 0}
    for number in range(2):
        device, target = link.connect()
        at_target, at_device = exchange(device, target, BYTES, BYTES)
        for direction, arrived in (("up", at_target), ("down", at_device)):
            expected = bytearray(BYTES)
            for offset, mask in takewhile(lambda change: change[0] < len(BYTES), corruptions(SEED, "pi", direction, number, 50.0)):
                expected[offset] ^= mask
                changed[direction] += 1
            assert arrived == expected and arrived != BYTES
    counters = link.proxy.counters()
    assert {direction: counters["pi", direction].corrupted_bytes for direction in changed} == changed


def test_what_is_sent_before_a_corruption_and_after_it_is_whole(link):
    device, target = link.connect()
    assert exchange(device, target, BYTES, BYTES) == (BYTES, BYTES)
    link.proxy.corrupt("pi", MEBIBYTE)
    at_target, _ = exchange(device, target, b"abcd", b"")
    masks = [mask for _, mask in takewhile(lambda change: change[0] < 4, corruptions(SEED, "pi", "up", 0, MEBIBYTE))]
    assert at_target == bytes(byte ^ mask for byte, mask in zip(b"abcd", masks, strict=True))
    link.proxy.restore("pi")
    assert exchange(device, target, BYTES, BYTES) == (BYTES, BYTES)


# --- how connections end ----------------------------------------------------------------------------------------------


def test_an_end_is_carried_over_and_the_other_direction_goes_on(link):
    device, target = link.connect()
    device.sendall(BYTES)
    device.shutdown(socket.SHUT_WR)
    assert receive(target, MEBIBYTE + 1) == BYTES  # until it ends
    target.sendall(BYTES)
    target.close()
    assert receive(device, MEBIBYTE + 1) == BYTES


@pytest.mark.parametrize("latency_s", [0.0, 0.01])
def test_a_reset_by_one_side_reaches_the_other_after_what_was_sent_before(link, latency_s):
    link.proxy.delay("pi", latency_s)
    device, target = link.connect()
    device.sendall(b"last words")
    link.settled()
    device.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    device.close()
    # whoever gets an RST may find that it has also lost what it had not read yet; that is TCP
    with contextlib.suppress(ConnectionResetError):
        assert target.recv(100) == b"last words"
    assert_reset_or_reported(target)


def assert_reset_or_reported(end: socket.socket) -> None:
    """An RST is told once; after that the connection has ended, and cannot be sent on."""
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        while end.recv(100):
            pass
        end.sendall(b"x")


def test_who_goes_on_sending_to_one_who_has_gone_is_reset(link):
    device, target = link.connect()
    target.close()
    assert device.recv(1) == b""
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        while True:
            device.sendall(BYTES)


def test_a_reset_is_seen_on_both_sides_and_new_connections_are_taken(link):
    ends = [end for _ in range(3) for end in link.connect()]
    link.proxy.reset("pi")
    for end in ends:
        assert_reset(end)
    device, target = link.connect()
    assert exchange(device, target, b"again", b"here") == (b"again", b"here")


def test_a_target_that_refuses_resets_the_device(link):
    link.target.close()
    with pytest.raises(ConnectionResetError):  # perhaps already while it connects
        link.dial().recv(1)


def test_new_connections_go_to_a_new_target(link):
    device, target = link.connect()
    with socket.create_server(("127.0.0.1", 0)) as other:
        link.proxy.set_target("pi", other.getsockname())
        with link.dial() as late, other.accept()[0] as there:
            assert exchange(late, there, b"new", b"") == (b"new", b"")
    assert exchange(device, target, b"old", b"") == (b"old", b"")


# --- what is held -----------------------------------------------------------------------------------------------------


def test_after_a_stall_nothing_is_missing(link):
    device, target = link.connect()
    link.proxy.stall("pi")
    late = link.dial()  # is taken, but leads nowhere yet
    with ThreadPoolExecutor(2) as threads:
        sent = [threads.submit(device.sendall, BYTES), threads.submit(target.sendall, BYTES[::-1])]
        late.sendall(b"late")
        link.settled()
        assert not any(has_something(end) for end in (device, target, link.target))
        link.proxy.restore("pi")
        assert receive(target, MEBIBYTE) == BYTES
        assert receive(device, MEBIBYTE) == BYTES[::-1]
        for future in sent:
            future.result(WAIT_S)
    assert receive(link.take(), 4) == b"late"


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_cut_holds_one_direction_only(link, direction):
    device, target = link.connect()
    sender, receiver = (device, target) if direction == "up" else (target, device)
    link.proxy.cut("pi", direction)
    sender.sendall(b"held")
    sender.shutdown(socket.SHUT_WR)
    receiver.sendall(b"moves")
    assert receive(sender, 5) == b"moves"
    late = link.dial()
    link.settled()
    assert not has_something(receiver) and not has_something(link.target)
    link.proxy.restore("pi")
    assert receive(receiver, 5) == b"held"
    link.take()
    late.close()


def test_what_remains_held_is_not_let_go_for_a_moment(link):
    """As when a delay ends during a stall."""
    device, target = link.connect()
    link.proxy.delay("pi", 0.01)
    link.proxy.stall("pi")
    device.sendall(b"held")
    for late in (None, (0.0, 0.0)):
        link.proxy.restore("pi", late=late, held=("up", "down"))
        link.settled()
        assert not select.select([target], [], [], 0.05)[0]
    link.proxy.restore("pi", held=("down",))
    assert receive(target, 4) == b"held"
    target.sendall(b"too")
    assert not select.select([device], [], [], 0.05)[0]
    link.proxy.restore("pi")
    assert receive(device, 3) == b"too"


def test_a_corruption_that_remains_goes_on_where_it_is(link):
    device, target = link.connect()
    link.proxy.corrupt("pi", 50_000.0)
    first, _ = exchange(device, target, BYTES, b"")
    link.proxy.restore("pi", per_mib=50_000.0)
    second, _ = exchange(device, target, BYTES, b"")
    expected = bytearray(BYTES * 2)
    for offset, mask in takewhile(lambda change: change[0] < len(expected), corruptions(SEED, "pi", "up", 0, 50_000.0)):
        expected[offset] ^= mask
    assert bytes(first) + bytes(second) == expected


def test_what_is_under_way_is_held_too(link):
    device, target = link.connect()
    link.proxy.delay("pi", 0.05)
    device.sendall(b"x")
    link.settled()
    link.proxy.stall("pi")
    link.proxy.delay("pi", 0.0)
    assert not select.select([target], [], [], 0.1)[0]
    link.proxy.restore("pi")
    assert receive(target, 1) == b"x"


def test_a_stalled_connection_can_be_reset(link):
    device, target = link.connect()
    link.proxy.stall("pi")
    late = link.dial()
    link.settled()
    link.proxy.reset("pi")
    for end in (device, target, late):
        assert_reset(end)


def test_whatever_holds_it_up_no_byte_is_lost_or_doubled(link):
    proxy, draw = link.proxy, random.Random(3)
    device, target = link.connect()
    data = BYTES * 8
    with ThreadPoolExecutor(1) as threads:
        exchanged = threads.submit(exchange, device, target, data, data[::-1])
        while not exchanged.done():
            draw.choice([
                lambda: proxy.stall("pi"),
                lambda: proxy.cut("pi", draw.choice(["up", "down"])),
                lambda: proxy.delay("pi", draw.uniform(0, 0.002), draw.choice([0.0, 0.002])),
                lambda: proxy.restore("pi"),
                lambda: proxy.restore("pi"),
            ])()  # fmt: skip
        assert exchanged.result() == (data, data[::-1])


@pytest.mark.slow
def test_it_survives_whatever_is_asked_in_any_order(link):
    """Connections come and go at both ends while everything is done to the link; then it works, and nothing is left."""
    proxy, draw = link.proxy, random.Random(4)
    process = psutil.Process(proxy.pid)
    files = process.num_fds()
    ends: list[socket.socket] = []
    acts = [
        lambda: ends.append(link.dial()),
        lambda: has_something(link.target) and ends.append(link.take()),
        lambda: ends and draw.choice(ends).setblocking(False),
        lambda: ends and draw.choice(ends).send(BYTES[: draw.randrange(1, 100_000)]),
        lambda: ends and draw.choice(ends).recv(100_000),
        lambda: ends and draw.choice(ends).shutdown(socket.SHUT_WR),
        lambda: ends and ends.pop(draw.randrange(len(ends))).close(),
        lambda: ends and draw.choice(ends).setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE),
        lambda: proxy.delay("pi", draw.uniform(0, 0.003), 0.001),
        lambda: proxy.corrupt("pi", draw.choice([0, 1, 1e5])),
        lambda: proxy.cut("pi", draw.choice(["up", "down", "both"])),
        lambda: proxy.restore("pi"),
        lambda: draw.random() < 0.2 and proxy.reset("pi"),
    ]
    for _ in range(20_000):
        with contextlib.suppress(OSError):
            for end in ends[-1:]:
                end.setblocking(False)
            draw.choice(acts)()
    proxy.restore("pi")
    proxy.reset("pi")
    while has_something(link.target):
        link.take().close()
    device, target = link.connect()
    assert exchange(device, target, BYTES, BYTES) == (BYTES, BYTES)
    proxy.reset("pi")
    assert process.num_fds() == files


# --- what it costs ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_thousand_resets_leave_nothing_behind(link):
    process = psutil.Process(link.proxy.pid)
    link.connect()
    link.proxy.reset("pi")
    files = process.num_fds()
    link.proxy.delay("pi", 0.001, 0.001)
    for number in range(1000):
        device, target = link.connect()
        device.sendall(b"x")
        if number % 2:
            link.proxy.reset("pi")
        else:
            device.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        device.close()
        if not number % 2:
            with contextlib.suppress(ConnectionResetError):  # carried over
                while target.recv(10):
                    pass
        target.close()
    link.settled()
    assert process.num_fds() == files


@pytest.mark.slow
def test_memory_is_bounded_however_much_is_sent(link):
    process = psutil.Process(link.proxy.pid)
    ends = [link.connect() for _ in range(4)]
    before = process.memory_info().rss
    link.proxy.delay("pi", 600.0)
    for device, _ in ends:
        device.settimeout(0.5)
        with pytest.raises(TimeoutError):
            while True:
                device.sendall(BYTES)
    assert process.memory_info().rss - before < len(ends) * (MAX_WAITING_BYTES + 2 * MEBIBYTE)


# --- how it is steered ------------------------------------------------------------------------------------------------


def test_what_cannot_be_done_is_said(proxy, link):
    target = link.target.getsockname()
    for words, call in [
        ("no link of a device 'nobody'", lambda: proxy.stall("nobody")),
        ("already", lambda: proxy.add("pi", namespace=None, target=target)),
        ("latency_s=-1", lambda: proxy.delay("pi", -1)),
        ("per_mib=-1", lambda: proxy.corrupt("pi", -1)),
        ("up, down or both", lambda: proxy.cut("pi", "left")),
        ("IPv4 address", lambda: proxy.set_target("pi", ("localhost", 5570))),
        ("port 0", lambda: proxy.set_target("pi", ("127.0.0.1", 0))),
        ("No such file", lambda: proxy.add("other", namespace=Path("/run/netns/no-such"), target=target)),
        ("runs already", proxy.start),
    ]:
        with pytest.raises(AdaptError, match=words):
            call()
    assert ("other", "up") not in proxy.counters()
    device, there = link.connect()
    assert exchange(device, there, b"still", b"well") == (b"still", b"well")


def test_a_proxy_that_is_gone_says_so(proxy):
    os.kill(proxy.pid, signal.SIGKILL)
    with pytest.raises(AdaptError, match="status -9"):
        proxy.counters()
    proxy.close()
    proxy.close()
    with pytest.raises(AdaptError, match="does not run"):
        proxy.counters()


def test_it_can_be_steered_from_several_threads(proxy, link):
    def steer(number: int) -> int:
        for _ in range(100):
            proxy.delay("pi", number / 1e6)
            proxy.counters()
        return number

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(steer, range(4))) == [0, 1, 2, 3]


@pytest.mark.slow
def test_it_does_not_outlive_who_started_it():
    program = "from adapt.emulation.proxy_control import LinkProxy; p = LinkProxy(1); p.start(); print(p.pid, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        proxy = psutil.Process(pid)
        owner.kill()
    with contextlib.suppress(psutil.NoSuchProcess):
        proxy.wait(WAIT_S)


# --- in a namespace of its own ----------------------------------------------------------------------------------------


@pytest.fixture
def namespace() -> Iterator[Path]:
    name = f"test-links-{uuid.uuid4().hex[:8]}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        yield Path("/run/netns", name)
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


@namespaces
def test_both_sides_of_a_link_belong_to_the_namespace(proxy, namespace):
    home, there = os.open("/proc/thread-self/ns/net", os.O_RDONLY), os.open(namespace, os.O_RDONLY)
    try:
        with inside(there, home):
            target = socket.create_server(("127.0.0.1", 0))
        address = proxy.add("pi", namespace=namespace, target=target.getsockname(), latency_s=0.001)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address, timeout=WAIT_S)
        with inside(there, home):
            device = socket.create_connection(address, timeout=WAIT_S)
        target.settimeout(WAIT_S)
        with target, device, target.accept()[0] as end:
            assert exchange(device, end, BYTES, BYTES) == (BYTES, BYTES)
    finally:
        os.close(home)
        os.close(there)


# --- measured times ---------------------------------------------------------------------------------------------------


def round_trip_s(device: socket.socket, target: socket.socket) -> float:
    began = time.monotonic()
    device.sendall(b"x")
    target.recv(1)
    target.sendall(b"y")
    device.recv(1)
    return time.monotonic() - began


@pytest.mark.timing
def test_latency_is_what_was_asked_for(link):
    ends = link.connect()
    reference_s = statistics.median(round_trip_s(*ends) for _ in range(5))
    link.proxy.delay("pi", 0.05)
    one_way_s = (statistics.median(round_trip_s(*ends) for _ in range(5)) - reference_s) / 2
    assert 0.045 <= one_way_s <= 0.055


@pytest.mark.timing
def test_without_latency_it_adds_little(link):
    assert statistics.median(round_trip_s(*link.connect()) for _ in range(5)) < 0.002
