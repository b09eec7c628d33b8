"""Machines with links of their own on one machine: a network namespace each, joined by a bridge, rates by `tc tbf`.

    machine's namespace          hub's namespace                    host
    eth0 ── tbf: up ───────────── p<N> ── tbf: down ─┐
    to<M> ── tbf ── to<N> of another machine         br ── host ─── adapt-<tag>

A pair link is a cable of its own between two machines: its addresses are point to point, so its route beats the bridge. Whoever
sends owns the queue in which it waits, so a rate or a loss is one queueing discipline at that end of the cable: `tbf`, or
`blackhole`, which loses everything without telling the sender.

Who has which hardware address is written down in every namespace, for good. With ARP a machine whose cable is cut in one direction
would soon not be sent to in the other, and a full queue would hold up the answers.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from adapt.emulation.enter import enter_network
from adapt.emulation.state import Direction
from adapt.errors import AdaptError
from adapt.runtime.forks import forget_in_forks

NAMESPACES = Path("/run/netns")  # where `ip netns` keeps them
HUB = "_hub"  # no machine's name: those begin with a letter or digit
HOST_NUMBER, FIRST_NUMBER = 1, 2  # last byte of the address
FRAME_BYTES = 1514
# The bucket lets this much pass at once after a pause. Small, for a message's sake; yet a timer that is late by a millisecond, as on a
# busy machine, must not let it run over. Two frames at least.
BURST_S, MIN_BURST_BYTES = 0.001, 2 * FRAME_BYTES + 172
# What waits behind the bucket; the rest is lost. More, and a heartbeat waits for ever behind a tensor; less, and no connection gets going.
QUEUE_S, MIN_QUEUE_BYTES = 0.2, 32 * 1024
LOST = "blackhole"

End = tuple[str, str]  # namespace and interface


@dataclass(frozen=True, slots=True)
class Port:
    """A machine's cable to the hub. Rates: sent, received; None is as fast as this machine can."""

    name: str
    up_bytes_per_s: float | None = None
    down_bytes_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class PairLink:
    """A cable between two machines; each direction has this rate."""

    a: str
    b: str
    bytes_per_s: float


@dataclass(slots=True, eq=False)
class _Machine:
    """A machine and the state of its cables."""

    port: Port
    number: int
    namespace: str
    up: float | None
    down: float | None
    is_shaped: bool = False  # other rates than described: then its pair links are no faster either
    lost: set[Direction] = field(default_factory=set)
    pairs: dict[int, tuple[_Machine, float]] = field(default_factory=dict)  # number of the other -> it, rate
    counters: IO[bytes] | None = None


class Network:
    """The network of one emulation. Not for several threads at once, but for `counters`.

    Args:
        tag: of the emulation; all that is made here carries it.
        subnet: a /24 that is free.
    """

    def __init__(self, tag: str, subnet: ipaddress.IPv4Network) -> None:
        self.subnet, self._tag = subnet, tag
        self._hub, self._interface = namespace_of(tag, HUB), interface_of(tag)
        self._machines: dict[str, _Machine] = {}
        self._is_closed = False
        self._queues: dict[End, str] = {}  # what each end has; nothing for an end without
        self._files = contextlib.ExitStack()  # `counters` of all machines
        forget_in_forks(self)

    @property
    def host_address(self) -> str:
        return self._address(HOST_NUMBER)

    def address(self, name: str) -> str:
        """Of a machine, on all its cables."""
        return self._address(self._machine(name).number)

    def namespace(self, name: str) -> Path:
        """Of a machine, for `enter.py --netns` and `inside`."""
        return NAMESPACES / self._machine(name).namespace

    def build(self, ports: Sequence[Port], links: Sequence[PairLink] = ()) -> None:
        """Make hub, machines and pair links. Raises AdaptError; what has been made by then goes with `close`."""
        run_batch("ip", None, [f"netns add {self._hub}"])
        _quieten(NAMESPACES / self._hub)
        hub = ["link set dev lo up", "link add name br type bridge stp_state 0 mcast_snooping 0", "link set dev br up"]
        run_batch("ip", self._hub, hub)
        run_batch("ip", None, [f"link add name {self._interface} address {_mac(HOST_NUMBER)} type veth peer name host netns {self._hub}"])
        with contextlib.suppress(OSError):  # without IPv6 there is none to silence
            Path(f"/proc/sys/net/ipv6/conf/{self._interface}/disable_ipv6").write_text("1")
        run_batch(
            "ip",
            None,
            [f"addr add {self.host_address}/{self.subnet.prefixlen} dev {self._interface}", f"link set dev {self._interface} up"],
        )
        run_batch("ip", self._hub, ["link set dev host master br up"])
        run_batch("bridge", self._hub, [f"fdb replace {_mac(HOST_NUMBER)} dev host master static"])
        self._join(ports, links)

    def add(self, port: Port) -> None:
        """One more machine."""
        self._join([port], [])

    def shape(self, name: str, up: float | None, down: float | None) -> None:
        """Other rates, bytes per second; None is no limit. Its pair links are then no faster than these."""
        machine = self._machine(name)
        machine.up, machine.down, machine.is_shaped = up, down, True
        self._settle([machine])

    def cut(self, name: str) -> None:
        """Pull its cables: what it sends and what is sent to it is lost, on pair links too."""
        machine = self._machine(name)
        machine.lost = {"up", "down"}
        self._settle([machine])

    def cut_one_way(self, name: str, direction: Direction) -> None:
        """From now on all that it sends ("up") or that is sent to it ("down") is lost. The other direction stays as it is."""
        machine = self._machine(name)
        machine.lost.add(direction)
        self._settle([machine])

    def restore(
        self, name: str, *, rates: tuple[float | None, float | None] | None = None, lost: frozenset[Direction] = frozenset()
    ) -> None:
        """Its cables are again as they were described, but for what remains: rates up and down as `shape` takes them, and what gets lost."""
        machine = self._machine(name)
        machine.up, machine.down = rates or (machine.port.up_bytes_per_s, machine.port.down_bytes_per_s)
        machine.is_shaped, machine.lost = rates is not None, set(lost)
        self._settle([machine])

    def counters(self) -> dict[str, tuple[int, int]]:
        """Bytes that each machine has sent and received on all its cables, frame headers included, lost ones not. Not after `close`."""
        return {name: _count(machine.counters) for name, machine in list(self._machines.items()) if machine.counters is not None}

    def close(self) -> None:
        """Remove everything; what still runs inside goes on without a network. Closing twice is nothing."""
        if not self._is_closed:
            self._files.close()  # an open file of a namespace keeps it
            remove(self._tag)
            self._is_closed = True

    def forget(self) -> None:
        """In a fork: the open files would keep the namespaces."""
        self._files.close()

    def _machine(self, name: str) -> _Machine:
        try:
            return self._machines[name]
        except KeyError:
            raise AdaptError(f"no machine {name!r} in this network") from None

    def _address(self, number: int) -> str:
        return str(self.subnet[number])

    def _join(self, ports: Sequence[Port], links: Sequence[PairLink]) -> None:
        new = [self._enrol(port) for port in ports]
        run_batch("ip", None, [f"netns add {machine.namespace}" for machine in new])
        for machine in new:
            _quieten(NAMESPACES / machine.namespace)
        run_batch("ip", self._hub, [line for machine in new for line in _plug(machine)])
        run_batch("bridge", self._hub, [f"fdb replace {_mac(machine.number)} dev p{machine.number} master static" for machine in new])
        for link in links:
            self._pair(link)
        for machine in new:  # both ends of all cables, before any of them gets an address
            cables = [
                (other, _pair_mac(machine, other), _pair_mac(other, machine))
                for other, _ in machine.pairs.values()
                if other.number > machine.number
            ]
            run_batch("ip", machine.namespace, [
                f"link add name to{other.number} address {mine} type veth peer name to{machine.number} address {its} netns {other.namespace}"
                for other, mine, its in cables
            ])  # fmt: skip
        for machine in new:
            run_batch("ip", machine.namespace, [*self._addresses(machine), *self._neighbours(machine, self._machines.values())])
        known = [machine for machine in self._machines.values() if machine not in new]
        for machine in known:
            run_batch("ip", machine.namespace, list(self._neighbours(machine, new)))
        run_batch("ip", None, [self._neighbour(machine.number, self._interface, _mac(machine.number)) for machine in new])
        for machine in new:
            with inside(NAMESPACES / machine.namespace):
                machine.counters = self._files.enter_context(_open_counters())
        self._settle(new)

    def _enrol(self, port: Port) -> _Machine:
        number = FIRST_NUMBER + len(self._machines)
        if port.name in self._machines:
            raise AdaptError(f"two machines are called {port.name!r}")
        if number >= self.subnet.num_addresses - 1:
            raise AdaptError(f"{self.subnet} has no address left for {port.name!r}")
        machine = _Machine(port, number, namespace_of(self._tag, port.name), port.up_bytes_per_s, port.down_bytes_per_s)
        self._machines[port.name] = machine
        return machine

    def _pair(self, link: PairLink) -> None:
        a, b = self._machine(link.a), self._machine(link.b)
        if a is b or b.number in a.pairs:
            raise AdaptError(f"a link between {link.a!r} and {link.b!r}: expected two machines, and one link for each pair")
        a.pairs[b.number], b.pairs[a.number] = (b, link.bytes_per_s), (a, link.bytes_per_s)

    def _addresses(self, machine: _Machine) -> Iterator[str]:
        own = self._address(machine.number)
        yield "link set dev lo up"
        yield f"addr add {own}/{self.subnet.prefixlen} dev eth0"
        yield "link set dev eth0 up"
        for number, (other, _) in machine.pairs.items():
            yield f"addr add {own} peer {self._address(number)} dev to{number}"
            yield f"link set dev to{number} up"
            yield self._neighbour(number, f"to{number}", _pair_mac(other, machine))

    def _neighbours(self, machine: _Machine, others: Iterable[_Machine]) -> Iterator[str]:
        yield self._neighbour(HOST_NUMBER, "eth0", _mac(HOST_NUMBER))
        for other in others:
            if other is not machine:
                yield self._neighbour(other.number, "eth0", _mac(other.number))

    def _neighbour(self, number: int, interface: str, mac: str) -> str:
        return f"neigh replace {self._address(number)} lladdr {mac} dev {interface} nud permanent"

    def _settle(self, machines: Iterable[_Machine]) -> None:
        """Make the queues of all ends of these machines' cables what they should be."""
        wanted = {end: queue for machine in machines for end, queue in self._wanted(machine)}
        lines: dict[str, list[str]] = defaultdict(list)
        for (namespace, interface), queue in wanted.items():
            before = self._queues.get((namespace, interface), "")
            if queue and queue != before:
                lines[namespace].append(f"qdisc replace dev {interface} root {queue}")
            elif before and not queue:
                lines[namespace].append(f"qdisc del dev {interface} root")
        for namespace, batch in lines.items():
            run_batch("tc", namespace, batch)
            self._queues.update((end, queue) for end, queue in wanted.items() if end[0] == namespace)

    def _wanted(self, machine: _Machine) -> Iterator[tuple[End, str]]:
        yield (machine.namespace, "eth0"), LOST if "up" in machine.lost else _tbf(machine.up)
        yield (self._hub, f"p{machine.number}"), LOST if "down" in machine.lost else _tbf(machine.down)
        for other, rate in machine.pairs.values():
            yield (machine.namespace, f"to{other.number}"), _pair_queue(machine, other, rate)
            yield (other.namespace, f"to{machine.number}"), _pair_queue(other, machine, rate)


@contextlib.contextmanager
def inside(namespace: Path) -> Iterator[None]:
    """The calling thread is in that network namespace meanwhile; sockets and open files of it that are made there stay its."""
    with open("/proc/thread-self/ns/net", "rb") as home, open(namespace, "rb") as there:
        try:
            enter_network(there.fileno())
            yield
        finally:
            enter_network(home.fileno())


def run_batch(tool: str, namespace: str | None, lines: Sequence[str]) -> None:
    """Run lines of `ip`, `tc` or `bridge` within a namespace. Raises AdaptError with what the tool says."""
    if not lines:
        return
    command = [tool, *(["-n", namespace] if namespace else []), "-batch", "-"]
    try:
        done = subprocess.run(command, input="\n".join(lines) + "\n", capture_output=True, text=True)
    except OSError as error:
        raise AdaptError(f"`{tool}` cannot be run: {error.strerror}; install iproute2") from error
    if done.returncode:
        raise AdaptError(f"{' '.join(command)} failed: {done.stderr.strip()}; the lines began with {lines[0]!r}")


def namespace_of(tag: str, machine: str) -> str:
    return f"adapt-{tag}-{machine}"


def interface_of(tag: str) -> str:
    """The host's."""
    return f"adapt-{tag}"


def is_used(tag: str) -> bool:
    """Whether there is a namespace or interface with this tag."""
    return bool(_tagged(tag)) or _has_interface(tag)


def processes(tag: str) -> set[int]:
    """Who is in the namespaces with this tag."""
    places = set()
    for path in _tagged(tag):
        with contextlib.suppress(OSError):
            places.add(_identity(path))
    found = set()
    for entry in os.scandir("/proc") if places else ():
        with contextlib.suppress(OSError):  # it has just ended
            if entry.name.isdigit() and _identity(Path(entry.path, "ns/net")) in places:
                found.add(int(entry.name))
    return found


def remove(tag: str) -> None:
    """Remove the host's interface and the namespaces with this tag. Raises AdaptError if something stays."""
    if _has_interface(tag):
        with contextlib.suppress(AdaptError):  # it goes by itself as soon as the hub is gone
            run_batch("ip", None, [f"link del dev {interface_of(tag)}"])
    for path in _tagged(tag):
        with contextlib.suppress(AdaptError):
            run_batch("ip", None, [f"netns del {path.name}"])
    if is_used(tag):
        left = [path.name for path in _tagged(tag)] + [interface_of(tag)] * _has_interface(tag)
        raise AdaptError(f"cannot be removed: {', '.join(left)}")


def _tagged(tag: str) -> list[Path]:
    return sorted(NAMESPACES.glob(namespace_of(tag, "*")))


def _has_interface(tag: str) -> bool:
    try:
        socket.if_nametoindex(interface_of(tag))
    except OSError:
        return False
    return True


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _quieten(namespace: Path) -> None:
    """No IPv6, and no doubts about where a packet came from: the way back may be another cable."""
    with inside(namespace):
        for scope in ("all", "default"):
            with contextlib.suppress(OSError):  # a kernel without IPv6
                Path(f"/proc/sys/net/ipv6/conf/{scope}/disable_ipv6").write_text("1")
            Path(f"/proc/sys/net/ipv4/conf/{scope}/rp_filter").write_text("0")


def _plug(machine: _Machine) -> Iterator[str]:
    yield f"link add name p{machine.number} type veth peer name eth0 address {_mac(machine.number)} netns {machine.namespace}"
    yield f"link set dev p{machine.number} master br up"


def _mac(number: int) -> str:
    return f"02:ad:00:00:00:{number:02x}"


def _pair_mac(machine: _Machine, other: _Machine) -> str:
    """Of the end at `machine` of its cable to `other`."""
    return f"02:ad:01:00:{machine.number:02x}:{other.number:02x}"


def _pair_queue(sender: _Machine, receiver: _Machine, rate: float) -> str:
    if "up" in sender.lost or "down" in receiver.lost:
        return LOST
    caps = [sender.up if sender.is_shaped else None, receiver.down if receiver.is_shaped else None]
    return _tbf(min(rate, *(cap for cap in caps if cap is not None)) if any(cap is not None for cap in caps) else rate)


def _tbf(bytes_per_s: float | None) -> str:
    """Token bucket with a tail-drop queue behind it."""
    if bytes_per_s is None:
        return ""
    burst, queue = max(MIN_BURST_BYTES, bytes_per_s * BURST_S), max(MIN_QUEUE_BYTES, bytes_per_s * QUEUE_S)
    return f"tbf rate {max(round(bytes_per_s * 8), 8)}bit burst {round(burst)}b limit {round(queue)}b"


def _open_counters() -> IO[bytes]:
    """Of the namespace in which the calling thread is, also when it has left it."""
    return open("/proc/thread-self/net/dev", "rb", buffering=0)


def _count(counters: IO[bytes]) -> tuple[int, int]:
    """Sent and received bytes of one namespace; see /proc/net/dev."""
    sent = received = 0
    for line in os.pread(counters.fileno(), 1 << 20, 0).splitlines()[2:]:
        name, _, numbers = line.partition(b":")
        if name.strip() != b"lo":
            values = numbers.split(None, 9)
            received, sent = received + int(values[0]), sent + int(values[8])
    return sent, received
