"""Whether emulated machines are as fast as they are said to be. Medians of five."""

from __future__ import annotations

import contextlib
import itertools
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from adapt.emulation import enter, network, ownership
from adapt.emulation.groups import Group, Groups
from adapt.emulation.network import Network, PairLink, Port

MISSING = ownership.missing_rights()
pytestmark = [pytest.mark.timing, pytest.mark.skipif(bool(MISSING), reason="; ".join(MISSING))]

ROUNDS, TURNS = 5, 3
MBIT = 125_000.0  # per second


@pytest.fixture
def held():
    with ownership.claim() as one:
        yield one


def rate_of(net: Network, sender: str, receiver: str, count: int) -> float:
    """Payload bytes per second of a new connection."""
    with network.inside(net.namespace(receiver)):
        listener = socket.create_server((net.address(receiver), 0))
    with listener, network.inside(net.namespace(sender)):
        near = socket.create_connection(listener.getsockname(), timeout=20)
        far, _ = listener.accept()
    with near, far:
        begin, left = time.monotonic(), count
        sending = threading.Thread(target=near.sendall, args=(bytes(count),))
        sending.start()
        while left:
            left -= len(far.recv(1 << 20))
        took_s = time.monotonic() - begin
        sending.join()
    return count / took_s


@pytest.mark.parametrize("described", [1, 20])
@pytest.mark.parametrize("cable", ["hub", "pair"])
def test_a_link_moves_what_it_is_said_to_move(held, cable, described):
    port = Port("a", described * MBIT, described * MBIT) if cable == "hub" else Port("a")
    with contextlib.closing(Network(held.tag, held.subnet)) as net:
        net.build([port, Port("b")], [PairLink("a", "b", described * MBIT)] if cable == "pair" else [])
        for sender, receiver in ("ab", "ba"):
            count = round(described * MBIT)  # a second's worth
            moved = statistics.median(rate_of(net, sender, receiver, count) for _ in range(ROUNDS)) / MBIT
            assert abs(moved - described) <= 0.075 * described, f"{sender} to {receiver}: {moved:.2f} Mbit/s"


JOB = """
import sys, time
def job():
    begin, total = time.monotonic(), 0
    for number in range(2_000_000):
        total += number * number
    return time.monotonic() - begin
print(flush=True)
for line in sys.stdin:
    print(job(), flush=True)
"""


@contextlib.contextmanager
def worker(group: Group | None = None):
    """A process that does the fixed job when asked; yields what asks it and returns the seconds that took."""
    place = ["--procs", *map(str, group.procs)] if group else []
    command = [sys.executable, "-I", "-S", enter.__file__, *place, "--", sys.executable, "-I", "-S", "-c", JOB]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def ask() -> float:
            process.stdin.write("\n")
            process.stdin.flush()
            return float(process.stdout.readline())

        assert process.stdout.readline() == "\n"
        yield ask
        process.stdin.close()


def share_of(limited: Callable[[], float], reference: Callable[[], float]) -> float:
    """In turns, so that what disturbs this machine for a moment disturbs both. Not in short jobs: after each pause some ms are free."""
    times = [(reference(), limited()) for _ in range(TURNS)]
    return sum(full for full, _ in times) / sum(slow for _, slow in times)


def test_a_machine_with_a_quarter_of_a_core_is_a_quarter_as_fast(held):
    made = Groups(held.tag)
    group = made.make("m1", cores=0.25)
    with worker() as reference, worker(group) as limited:
        group.begin_limit()
        share = statistics.median(share_of(limited, reference) for _ in range(ROUNDS))
    assert share == pytest.approx(0.25, abs=0.03)
    made.close()


@pytest.mark.parametrize("cores", [0.5, 0.25, 0.1, 0.05, 0.02])
def test_a_share_is_given_and_not_more(held, cores):
    """What the kernel's accounts say, whatever else this machine does."""
    made = Groups(held.tag)
    group = made.make("m1", cores=cores)
    shares = []
    with worker(group) as limited:
        group.begin_limit()
        for _ in range(ROUNDS):
            before_s, begin = group.usage().cpu_s, time.monotonic()
            limited()
            shares.append((group.usage().cpu_s - before_s) / (time.monotonic() - begin))
    assert statistics.median(shares) == pytest.approx(cores, rel=0.1)
    made.close()


def test_fifty_machines_and_all_their_pairs_are_soon_built(held):
    names = [f"m{number}" for number in range(50)]
    with contextlib.closing(Network(held.tag, held.subnet)) as net:
        begin = time.monotonic()
        net.build([Port(name, MBIT, MBIT) for name in names], [PairLink(a, b, MBIT) for a, b in itertools.combinations(names, 2)])
        built_s, begin = time.monotonic() - begin, time.monotonic()
        net.cut("m7")
        net.restore("m7")
        assert built_s < 10 and time.monotonic() - begin < 2
        begin = time.monotonic()
    assert time.monotonic() - begin < 5


def test_counting_is_cheap(held):
    with contextlib.closing(Network(held.tag, held.subnet)) as net:
        net.build([Port(f"m{number}") for number in range(20)])
        times = []
        for _ in range(ROUNDS):
            begin = time.monotonic()
            net.counters()
            times.append(time.monotonic() - begin)
    assert statistics.median(times) < 0.005
