"""Machines that are namespaces and groups, made for real: what reaches whom, what is limited, and that nothing stays behind."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from adapt.emulation import enter, groups, network, ownership
from adapt.emulation.groups import Groups
from adapt.emulation.network import Network, PairLink, Port
from adapt.errors import AdaptError

MISSING = ownership.missing_rights()
pytestmark = pytest.mark.skipif(bool(MISSING), reason="; ".join(MISSING))

WAIT_S = 20.0
ABSENT_S = 0.2  # what has not arrived by then does not arrive: nothing here has latency
REMOVED_WITHIN_S = 5.0
ENTER = [sys.executable, "-I", "-S", enter.__file__]
MIB = 1 << 20


@pytest.fixture
def held():
    """A claim; when it is closed nothing of it remains."""
    with ownership.claim() as one:
        yield one
    assert things_of(one.tag) == []


@pytest.fixture
def three(held):
    """Machines a, b and c; a and b have a cable of their own, but for the hub."""
    with contextlib.closing(Network(held.tag, held.subnet)) as net:
        net.build([Port("a"), Port("b"), Port("c")], [PairLink("a", "b", 125e6)])
        yield net


def things_of(tag: str) -> list[str]:
    """All that carries the tag."""
    found = [str(path) for path in (*Path("/run/netns").glob(f"*{tag}*"), *ownership.RECORDS.glob(f"*{tag}*"))]
    found += [name for _, name in socket.if_nameindex() if tag in name]
    found += [f"{place}/{name}" for place, names, _ in os.walk("/sys/fs/cgroup") for name in names if tag in name]
    found += [f"process {process}" for process in network.processes(tag) | groups.processes(tag)]
    routes = subprocess.run(["ip", "route", "show", "table", "all"], capture_output=True, text=True, check=True).stdout
    return found + [line for line in routes.splitlines() if tag in line]


def wait_until(fact, what: str) -> None:
    limit = time.monotonic() + WAIT_S
    while not fact():
        assert time.monotonic() < limit, what
        time.sleep(0.01)


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class Ends:
    """A datagram socket on each machine and on the host."""

    def __init__(self, net: Network, names: str) -> None:
        self._sockets = {"h": self._make(net.host_address)}
        for name in names:
            with network.inside(net.namespace(name)):
                self._sockets[name] = self._make(net.address(name))
        self._numbers = itertools.count()

    @staticmethod
    def _make(address: str) -> socket.socket:
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.bind((address, 0))
        return made

    def ways(self, hoped: set[str]) -> set[str]:
        """Ways that a datagram sent now takes, as "ab" from machine a to machine b; the host is h. Waits long for those hoped for only."""
        data = b"%d" % next(self._numbers)
        for (name, near), (_, far) in itertools.permutations(self._sockets.items(), 2):
            near.sendto(name.encode() + data, far.getsockname())
        found: set[str] = set()
        with selectors.DefaultSelector() as selector:
            for name, end in self._sockets.items():
                selector.register(end, selectors.EVENT_READ, name)
            limit = time.monotonic() + WAIT_S
            while found < hoped and (ready := selector.select(max(limit - time.monotonic(), 0))):
                found |= self._taken(ready, data)
            while ready := selector.select(ABSENT_S):
                found |= self._taken(ready, data)
        return found

    @staticmethod
    def _taken(ready, data: bytes) -> set[str]:
        arrived = [(key.fileobj.recv(100), key.data) for key, _ in ready]
        return {chr(sent[0]) + name for sent, name in arrived if sent[1:] == data}  # else of an earlier round

    def close(self) -> None:
        for one in self._sockets.values():
            one.close()


ALL_WAYS = {a + b for a, b in itertools.permutations("abch", 2)}


@contextlib.contextmanager
def connected(net: Network, sender: str, receiver: str):
    """Both ends of a TCP connection."""
    with network.inside(net.namespace(receiver)):
        listener = socket.create_server((net.address(receiver), 0))
    with listener, network.inside(net.namespace(sender)):
        near = socket.create_connection(listener.getsockname(), timeout=WAIT_S)
        far, _ = listener.accept()
    far.settimeout(WAIT_S)
    with near, far:
        yield near, far


def carry(near: socket.socket, far: socket.socket, count: int) -> None:
    """Send and receive so many bytes."""
    sending = threading.Thread(target=near.sendall, args=(bytes(count),))
    sending.start()
    assert len(receive(far, count)) == count
    sending.join()


def receive(end: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (more := end.recv(1 << 20)):
        data += more
    return data


def queue_of(net: Network, name: str, interface: str = "eth0") -> str:
    command = ["tc", "-n", net.namespace(name).name, "qdisc", "show", "dev", interface]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_everything_is_there_for_root():
    assert MISSING == []


def test_machines_and_host_reach_each_other(three, held):
    with contextlib.closing(Ends(three, "abc")) as ends:
        assert ends.ways(ALL_WAYS) == ALL_WAYS
    addresses = [three.host_address, *(three.address(name) for name in "abc")]
    assert addresses == [str(held.subnet[number]) for number in (1, 2, 3, 4)]
    for sender, receiver in ("ac", "ab", "ba"):
        with connected(three, sender, receiver) as (near, far):
            near.sendall(b"there")
            assert receive(far, 5) == b"there"
            far.sendall(b"back")
            assert receive(near, 4) == b"back"
    outside = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with outside, network.inside(three.namespace("a")), pytest.raises(OSError, match="unreachable"):
        socket.create_connection(("192.0.2.77", 9), timeout=1)  # no way out of the subnet


def test_a_pair_has_its_own_cable(three):
    assert "rate 1Gbit" in queue_of(three, "a", "to3") and "rate 1Gbit" in queue_of(three, "b", "to2")
    assert queue_of(three, "a") == "qdisc noqueue 0: root refcnt 2 \n"
    with connected(three, "a", "b") as (near, far), network.inside(three.namespace("a")):
        carry(near, far, MIB)
        sent = {line.split(":")[0].strip(): int(line.split()[9]) for line in Path("/proc/thread-self/net/dev").read_text().splitlines()[2:]}
    assert sent["to3"] > MIB > 1000 > sent["eth0"]


def test_a_cut_and_its_repair(three):
    with contextlib.closing(Ends(three, "abc")) as ends:
        three.cut("a")
        assert ends.ways(hoped := {way for way in ALL_WAYS if "a" not in way}) == hoped
        three.cut("a")
        three.cut_one_way("b", "down")
        assert ends.ways(hoped := {way for way in ALL_WAYS if "a" not in way and way[1] != "b"}) == hoped
        three.restore("a")
        assert ends.ways(hoped := {way for way in ALL_WAYS if way[1] != "b"}) == hoped, "the pair's cable is still cut at the other end"
        three.restore("b")
        assert ends.ways(ALL_WAYS) == ALL_WAYS


@pytest.mark.parametrize(("direction", "place"), [("up", 0), ("down", 1)])
def test_a_cut_in_one_direction_leaves_the_other(three, direction, place):
    with contextlib.closing(Ends(three, "abc")) as ends:
        three.cut_one_way("a", direction)
        assert ends.ways(hoped := {way for way in ALL_WAYS if way[place] != "a"}) == hoped
        three.cut_one_way("a", "down" if direction == "up" else "up")
        assert ends.ways(hoped := {way for way in ALL_WAYS if "a" not in way}) == hoped
        three.restore("a")
        assert ends.ways(ALL_WAYS) == ALL_WAYS


@pytest.mark.parametrize("receiver", ["b", "c"])
def test_a_connection_outlives_a_cut(three, receiver):
    with connected(three, "a", receiver) as (near, far):
        three.cut("a")
        near.sendall(b"late")
        far.settimeout(ABSENT_S)
        with pytest.raises(TimeoutError):
            far.recv(4)
        three.restore("a")
        far.settimeout(WAIT_S)
        assert receive(far, 4) == b"late"


def test_a_rate_holds_until_it_is_restored(three):
    three.shape("a", 1e5, 2e5)
    assert "rate 800Kbit" in queue_of(three, "a")
    assert "rate 800Kbit" in queue_of(three, "a", "to3") and "rate 1600Kbit" in queue_of(three, "b", "to2"), "pair links too"
    for other in "bc":
        with connected(three, "a", other) as (near, far):
            begin = time.monotonic()
            carry(near, far, 50_000)
            assert time.monotonic() - begin > 0.4
            begin = time.monotonic()
            carry(far, near, 50_000)
            assert time.monotonic() - begin > 0.2
    three.shape("a", 2e5, None)
    assert "rate 1600Kbit" in queue_of(three, "a", "to3") and "rate 1Gbit" in queue_of(three, "b", "to2")
    three.cut("a")
    assert "blackhole" in queue_of(three, "a")
    three.restore("a")
    assert "noqueue" in queue_of(three, "a") and "rate 1Gbit" in queue_of(three, "a", "to3")
    with connected(three, "a", "c") as (near, far):
        carry(near, far, MIB)  # it would take ten seconds


def test_what_moves_is_counted(three):
    before = three.counters()
    assert sorted(before) == ["a", "b", "c"]
    for receiver in "bc":
        with connected(three, "a", receiver) as (near, far):
            carry(near, far, MIB)
    moved = {name: tuple(now - then for now, then in zip(counts, before[name], strict=True)) for name, counts in three.counters().items()}
    assert 2 * MIB < moved["a"][0] < 2.3 * MIB and moved["a"][1] < 0.3 * MIB
    for name in "bc":
        assert moved[name][0] < 0.15 * MIB and MIB < moved[name][1] < 1.2 * MIB


def test_a_machine_that_comes_later(three):
    three.add(Port("later", 1e6, 1e6))
    with contextlib.closing(Ends(three, "abc")) as ends:
        assert ends.ways(ALL_WAYS) == ALL_WAYS
    for sender, receiver in (("later", "a"), ("a", "later")):
        with connected(three, sender, receiver) as (near, far):
            near.sendall(b"hello")
            assert receive(far, 5) == b"hello"
    assert "rate 8Mbit" in queue_of(three, "later") and "later" in three.counters()


def test_wrong_machines_are_refused(three):
    with pytest.raises(AdaptError, match="'nobody'"):
        three.cut("nobody")
    with pytest.raises(AdaptError, match="two machines are called 'a'"):
        three.add(Port("a"))


def test_there_is_no_ipv6(three):
    with network.inside(three.namespace("a")):
        assert Path("/proc/thread-self/net/if_inet6").read_text() == ""


def test_a_process_enters_and_stays_the_same(three, held):
    made = Groups(held.tag)
    group = made.make("a", cores=0.5, memory_bytes=64 * MIB)
    command = [*ENTER, "--netns", str(three.namespace("a")), "--procs", *map(str, group.procs), "--"]
    with subprocess.Popen([*command, "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"x")
        process.stdin.flush()
        assert process.stdout.read(1) == b"x"
        assert os.stat(f"/proc/{process.pid}/ns/net").st_ino == three.namespace("a").stat().st_ino
        assert groups.processes(held.tag) == {process.pid} == network.processes(held.tag)
        assert all(procs.read_text() == f"{process.pid}\n" for procs in group.procs)
        assert Path(f"/proc/{process.pid}/comm").read_text() == "cat\n"
        process.stdin.close()
    assert process.returncode == 0
    assert subprocess.run([*command, "sh", "-c", "exit 7"]).returncode == 7
    made.close()


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["--", "adapt-no-such-command"], 127, "adapt-no-such-command"),
        (["--netns", "/run/netns/adapt-none", "--", "true"], 125, "/run/netns/adapt-none cannot be entered"),
        (["--netns", "/dev/null", "--", "true"], 125, "setns"),
        (["--procs", "/nowhere/cgroup.procs", "--", "true"], 125, "/nowhere/cgroup.procs cannot be entered"),
        (["--"], 125, "usage"),
        (["true"], 125, "usage"),
        (["--cpu", "1", "--", "true"], 125, "usage"),
    ],
)
def test_what_cannot_be_entered_is_said(arguments, status, text):
    done = subprocess.run([*ENTER, *arguments], capture_output=True, text=True)
    assert done.returncode == status and text in done.stderr


HOLD = "import sys; held = bytearray(int(sys.argv[1])); print('ready', flush=True); sys.stdin.read()"


def hold(group: groups.Group, size_bytes: int) -> subprocess.Popen[bytes]:
    """A process in the group that holds so much memory until its standard input closes."""
    command = [*ENTER, "--procs", *map(str, group.procs), "--", sys.executable, "-I", "-S", "-c", HOLD, str(size_bytes)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def test_who_exceeds_the_memory_is_killed_and_nobody_else(held):
    made = Groups(held.tag)
    group, another = made.make("m1", memory_bytes=64 * MIB), made.make("m2", memory_bytes=64 * MIB)
    with hold(group, 8 * MIB) as modest, hold(another, 32 * MIB) as beside:
        assert modest.stdout.readline() == beside.stdout.readline() == b"ready\n"
        assert 8 * MIB < group.usage().memory_bytes < 32 * MIB < another.usage().memory_bytes < 64 * MIB
        with hold(group, 200 * MIB) as greedy:
            assert greedy.stdout.readline() == b""
        assert greedy.returncode == -signal.SIGKILL
        assert (group.out_of_memory_kills(), another.out_of_memory_kills()) == (1, 0)
        assert modest.poll() is None and beside.poll() is None
    assert modest.returncode == beside.returncode == 0
    made.close()


SPIN = "import time, sys; end = time.process_time() + 0.1\nwhile time.process_time() < end: pass\nprint('done')"


def test_the_share_begins_when_it_is_asked_for(held):
    made = Groups(held.tag)
    group = made.make("m1", cores=0.1)
    command = [*ENTER, "--procs", *map(str, group.procs), "--", sys.executable, "-I", "-S", "-c", SPIN]
    times = {}
    for state in ("free", "limited", "freed"):
        if state == "limited":
            group.begin_limit()
        elif state == "freed":
            group.limit_cores(None)
        before_s, begin = group.usage().cpu_s, time.monotonic()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times[state] = (group.usage().cpu_s - before_s) / (time.monotonic() - begin)  # cores it got
    assert times["limited"] < 0.13  # however busy the machine is
    assert min(times["free"], times["freed"]) > 1.3 * times["limited"]
    made.close()


def test_a_group_with_a_process_in_it_is_not_removed(held, monkeypatch):
    monkeypatch.setattr(groups, "EMPTY_WITHIN_S", 0.05)
    made = Groups(held.tag)
    group = made.make("m1", memory_bytes=64 * MIB)
    with hold(group, MIB) as process:
        assert process.stdout.readline() == b"ready\n"
        with pytest.raises(AdaptError, match=f"its processes: {process.pid}"):
            made.close()
    made.close()


@pytest.fixture
def foreign():
    """Things that are not ours, some with names much like ours; whatever is removed, they stay."""
    mark = secrets.token_hex(3)
    names, interface = [f"adaptx{mark}", f"adapt-{mark}-mine"], f"adapt-x{mark}"
    folders = [root / name for root in groups.find_hierarchies().roots for name in names]
    with contextlib.ExitStack() as stack:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True)
            stack.callback(subprocess.run, ["ip", "netns", "del", name], check=True)
        subprocess.run(["ip", "link", "add", "name", interface, "type", "veth", "peer", "name", "inner", "netns", names[0]], check=True)
        stack.callback(subprocess.run, ["ip", "link", "del", interface], check=True)
        for folder in folders:
            folder.mkdir()
            stack.callback(wait_until, lambda folder=folder: _is_removed(folder), "an empty group can be removed")
        procs = [str(folder / "cgroup.procs") for folder in folders[:: len(names)]]
        command = [*ENTER, "--netns", f"/run/netns/{names[0]}", "--procs", *procs, "--", "cat"]
        with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
            stack.callback(process.kill)
            wait_until(lambda: Path(f"/proc/{process.pid}/comm").read_text() == "cat\n", "it has entered")
            yield
            assert process.poll() is None
        assert all(folder.exists() for folder in folders)
        assert all(Path("/run/netns", name).exists() for name in names)
        assert interface in dict(socket.if_nameindex()).values()


def _is_removed(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        folder.rmdir()
    return not folder.exists()


OWNER = """
import json, subprocess, sys
from adapt.emulation import enter, ownership
from adapt.emulation.groups import Groups
from adapt.emulation.network import Network, PairLink, Port
names = [f"m{number}" for number in range(int(sys.argv[1]))]
sleepers = []
with ownership.claim() as held:
    net, made = Network(held.tag, held.subnet), Groups(held.tag)
    net.build([Port(name, 1e6, 1e6) for name in names], [PairLink(names[0], names[1], 1e6)])
    for name in names:
        group = made.make(name, cores=0.5, memory_bytes=64 << 20)
        group.begin_limit()
        command = [sys.executable, "-I", "-S", enter.__file__, "--netns", str(net.namespace(name)), "--procs", *map(str, group.procs), "--"]
        command += ["sh", "-c", "trap '' HUP; echo; exec sleep 1000"]  # the kernel hangs up on those who are stopped when their parent dies
        sleepers.append(subprocess.Popen(command, stdout=subprocess.PIPE, process_group=0))
    for process in sleepers:
        process.stdout.readline()
    print(json.dumps({"tag": held.tag, "pids": [process.pid for process in sleepers]}), flush=True)
    sys.stdin.read()
for process in sleepers:
    process.wait()
"""


@contextlib.contextmanager
def owner(machines: int):
    """A process that owns an emulation with a sleeper on each machine, its tag, and the sleepers."""
    command = [sys.executable, "-c", OWNER, str(machines)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        facts = json.loads(process.stdout.readline())
        try:
            yield process, facts["tag"], facts["pids"]
        finally:
            process.kill()
            process.wait()
            ownership.clean(facts["tag"])


def test_of_a_killed_owner_nothing_stays_but_for_others(foreign, three, held):
    with owner(2) as (process, tag, pids):
        assert tag not in ownership.leftovers()
        with pytest.raises(AdaptError, match="alive"):
            ownership.clean(tag)
        process.kill()
        process.wait()
        os.kill(pids[0], signal.SIGSTOP)
        assert tag in ownership.leftovers() and held.tag not in ownership.leftovers()
        assert not any(gone(pid) for pid in pids)
        ownership.clean(tag)
        assert things_of(tag) == [] and tag not in ownership.leftovers()
        wait_until(lambda: all(gone(pid) for pid in pids), "its processes end")
        ownership.clean(tag)
    with contextlib.closing(Ends(three, "abc")) as ends:
        assert ends.ways(ALL_WAYS) == ALL_WAYS


def test_closing_ends_what_still_runs_and_leaves_others_alone(foreign, three):
    with owner(2) as (process, tag, pids):
        process.stdin.close()
        assert process.wait(WAIT_S) == 0
        assert things_of(tag) == []
    assert all(gone(pid) for pid in pids)


DIES = "import os, signal; from adapt.emulation import ownership; print(ownership.claim().tag, flush=True); os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize("half", ["a record", "a namespace", "a file for a namespace", "an interface", "a group"])
def test_half_made_things_are_cleaned(half):
    """As its owner left them when it was killed in the middle of it."""
    tag = subprocess.run([sys.executable, "-c", DIES], capture_output=True, text=True).stdout.strip()
    match half:
        case "a namespace":
            subprocess.run(["ip", "netns", "add", f"adapt-{tag}-m1"], check=True)
        case "a file for a namespace":
            Path("/run/netns").mkdir(exist_ok=True)
            Path(f"/run/netns/adapt-{tag}-m1").touch()
        case "an interface":
            subprocess.run(["ip", "link", "add", "name", f"adapt-{tag}", "type", "veth", "peer", "name", f"peer-{tag}"], check=True)
        case "a group":
            (groups.find_hierarchies().cpu / f"adapt-{tag}" / "m1").mkdir(parents=True)
    assert tag in ownership.leftovers() and things_of(tag)
    ownership.clean(tag)
    assert things_of(tag) == []


def test_two_emulations_at_once_do_not_meet(three, held):
    with owner(2) as (_, tag, _), ownership.claim() as here:
        assert len({tag, held.tag, here.tag}) == 3
        with contextlib.closing(Network(here.tag, here.subnet)) as net:
            net.build([Port("a"), Port("b"), Port("c")])
            for one in (net, three):
                with contextlib.closing(Ends(one, "abc")) as ends:
                    assert ends.ways(ALL_WAYS) == ALL_WAYS
            with network.inside(net.namespace("a")), pytest.raises(OSError, match="unreachable"):
                socket.create_connection((three.address("a"), 9), timeout=1)
        assert things_of(tag)
    assert things_of(here.tag) == things_of(tag) == []


def test_twenty_machines_are_soon_removed():
    with owner(20) as (process, tag, pids):
        assert len(network.processes(tag)) == len(pids) == 20
        begin = time.monotonic()
        process.stdin.close()
        assert process.wait(WAIT_S) == 0
        assert time.monotonic() - begin < REMOVED_WITHIN_S
        assert things_of(tag) == []


def test_an_interrupt_cleans_up():
    with owner(2) as (process, tag, pids):
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT_S) == -signal.SIGINT
        assert things_of(tag) == []
        wait_until(lambda: all(gone(pid) for pid in pids), "its processes end")
