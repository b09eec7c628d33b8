"""The machines under an emulated cluster: where its processes run, and what can be done to a machine and its cable.

                 IsolatedMachines                        PlainMachines: nothing is set up, nothing is limited
a process runs   in a network namespace and two groups   like any other
CPU, memory      quota, limit                            not limited
rate of a link   tbf at both ends                        not limited
cut              the interface goes down                 the proxy holds everything back
latency, stall, reset, corruption                        by the proxy, in both
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import psutil

from adapt.emulation.description import HOST, ClusterSpec, DeviceSpec
from adapt.emulation.groups import Group, Groups
from adapt.emulation.lines import DISPATCHER, DeviceLines
from adapt.emulation.network import Network, PairLink, Port
from adapt.emulation.observation import Reading
from adapt.emulation.ownership import Claim, claim
from adapt.emulation.proxy import DIRECTIONS
from adapt.emulation.proxy_control import LinkProxy
from adapt.emulation.shares import CpuShare
from adapt.emulation.state import State
from adapt.errors import AdaptError

FLOOR_BYTES = 220 << 20  # of a process that has imported torch: what its memory may be above the stage budget
DISPATCHER_MACHINE = "dispatcher"  # of its own, if no device runs it
DISPATCHER_PORT = 5570
ENTER = str(Path(__file__).with_name("enter.py"))


class Machines(Protocol):
    """What an emulated cluster needs of its machines. Names are those of devices; errors are AdaptErrors."""

    is_isolated: bool

    def inside(self, name: str) -> list[str]:
        """The command that runs the rest of its line on that machine."""

    @property
    def host(self) -> str:
        """The address of the machine that the dispatcher runs on."""

    @property
    def listen(self) -> str:
        """Where the dispatcher is to listen; port 0: where it likes."""

    def connect(self, name: str, address: str, *, what: str = DISPATCHER) -> str:
        """The address at which that machine finds what listens at that one; `what` it is, DISPATCHER or ETCD."""

    def limit(self, name: str, cores: float | None) -> None:
        """From now on its CPU share is this, None: no limit; while it is hurried, as soon as it is not."""

    def hurry(self, name: str) -> None:
        """Until `settle` it has what the others leave: a worker starts, and to import torch is not the test."""

    def settle(self, name: str) -> None:
        """From now on it has the CPU share that it should have."""

    def rate(self, name: str, up_bytes_per_s: float | None, down_bytes_per_s: float | None) -> None:
        """From now on its link has these rates; None: no limit."""

    def cut(self, name: str, direction: Literal["both", "up", "down"]) -> None:
        """Its cable is pulled ("both"), or what goes "up" or "down" gets lost."""

    def lines_of(self, name: str) -> DeviceLines:
        """What delays, stalls, resets and corrupts its connections."""

    def restore(self, name: str, state: State) -> None:
        """Its link and CPU share become this, in one step."""

    def read(self, pids: Mapping[str, int]) -> dict[str, Reading]:
        """What the machines use now. `pids`: of the workers that live."""

    def memory_kills(self) -> dict[str, MemoryKills]:
        """Of the machines with a memory limit."""

    def close(self) -> None:
        """Leave nothing behind."""


@dataclass(frozen=True, slots=True)
class MemoryKills:
    """How many processes of a machine have been killed since its beginning because together they exceeded its limit."""

    count: int
    limit_bytes: int


class IsolatedMachines:
    """One network namespace and one control group for each device.

    Args:
        proxied: devices whose connections go through the proxy, besides those with latency.
        directory: of the emulation, if it is to be removed after it has been killed.
    """

    is_isolated = True

    def __init__(self, spec: ClusterSpec, proxied: Iterable[str], directory: Path | None = None) -> None:
        self._spec, self._proxied = spec, {*proxied, *(device.name for device in spec.devices if device.latency_s or device.jitter_s)}
        self._lines: dict[str, DeviceLines] = {}  # of devices that are connected through the proxy
        self._groups_of: dict[str, Group] = {}
        self._shares: dict[str, CpuShare] = {}
        self._has_begun = False  # shares are in force
        with contextlib.ExitStack() as stack:
            self._claim: Claim = stack.enter_context(contextlib.closing(claim(directory)))
            self._network = stack.enter_context(contextlib.closing(Network(self._claim.tag, self._claim.subnet)))
            self._network.build(self._ports(), [PairLink(*link.between, link.bytes_per_s) for link in spec.links])
            self._groups = stack.enter_context(contextlib.closing(Groups(self._claim.tag)))
            for device in spec.devices:
                self._make_group(device)
            self._proxy: LinkProxy | None = None
            if self._proxied:
                self._proxy = stack.enter_context(contextlib.closing(LinkProxy(spec.seed)))
                self._proxy.start()
            self._stack = stack.pop_all()

    def _ports(self) -> list[Port]:
        ports = [Port(device.name, device.up_bytes_per_s, device.down_bytes_per_s) for device in self._spec.devices]
        return ports if self._spec.dispatcher != HOST else [Port(DISPATCHER_MACHINE, None, None), *ports]

    def _make_group(self, device: DeviceSpec) -> None:
        group = self._groups.make(device.name, cores=device.cores, memory_bytes=_limit_bytes(device))
        self._groups_of[device.name], self._shares[device.name] = group, CpuShare(group, device.cores)

    @property
    def _dispatcher_machine(self) -> str:
        return DISPATCHER_MACHINE if self._spec.dispatcher == HOST else self._spec.dispatcher

    def inside(self, name: str) -> list[str]:
        name = self._dispatcher_machine if name == HOST else name
        command = [sys.executable, "-I", "-S", ENTER, "--netns", str(self._network.namespace(name))]
        if name in self._groups_of:
            command += ["--procs", *map(str, self._groups_of[name].procs)]
        return [*command, "--"]

    @property
    def listen(self) -> str:
        return f"tcp://{self.host}:{DISPATCHER_PORT}"

    @property
    def host(self) -> str:
        return self._network.address(self._dispatcher_machine)

    def connect(self, name: str, address: str, *, what: str = DISPATCHER) -> str:
        if self._proxy is None or name not in self._proxied:
            return address
        lines = self._lines.setdefault(name, DeviceLines(self._proxy, self._spec.device(name), self._network.namespace(name)))
        return lines.add(what, address)

    def limit(self, name: str, cores: float | None) -> None:
        self._shares[name].want(cores)

    def hurry(self, name: str) -> None:
        """At the beginning there are no shares yet to be respected."""
        own, others = self._spec.device(name).cores, [device.cores or 0.0 for device in self._spec.devices if device.name != name]
        left = len(os.sched_getaffinity(0)) - sum(others)
        self._shares[name].hurry(max(own, left) if own is not None and self._has_begun else None)

    def settle(self, name: str) -> None:
        self._shares[name].settle()
        self._has_begun = True

    def rate(self, name: str, up_bytes_per_s: float | None, down_bytes_per_s: float | None) -> None:
        self._network.shape(name, up_bytes_per_s, down_bytes_per_s)

    def cut(self, name: str, direction: Literal["both", "up", "down"]) -> None:
        if direction == "both":
            self._network.cut(name)
        else:
            self._network.cut_one_way(name, direction)

    def restore(self, name: str, state: State) -> None:
        self._network.restore(name, rates=state.rates, lost=state.lost)
        self.limit(name, state.cores)
        if name in self._lines:
            self._lines[name].restore(state, lost=frozenset())

    def lines_of(self, name: str) -> DeviceLines:
        if name not in self._lines:
            raise AdaptError(f"the link of {name} has no proxy, which this needs: give it a latency, or name it in `proxied`")
        return self._lines[name]

    def read(self, pids: Mapping[str, int]) -> dict[str, Reading]:
        moved = self._network.counters()
        readings = {}
        for name, group in self._groups_of.items():
            usage, (sent_bytes, received_bytes) = group.usage(), moved.get(name, (0, 0))
            readings[name] = Reading(usage.cpu_s, usage.memory_bytes, sent_bytes, received_bytes, name in pids)
        return readings

    def memory_kills(self) -> dict[str, MemoryKills]:
        limits = {device.name: _limit_bytes(device) for device in self._spec.devices}
        return {
            name: MemoryKills(self._groups_of[name].out_of_memory_kills(), limit_bytes)
            for name, limit_bytes in limits.items()
            if limit_bytes is not None
        }

    def close(self) -> None:
        self._stack.close()


class PlainMachines:
    """This machine, as it is: every worker an ordinary process, behind the proxy."""

    is_isolated = False

    def __init__(self, spec: ClusterSpec) -> None:
        self._spec = spec
        self._proxy = LinkProxy(spec.seed)
        self._proxy.start()
        self._lines: dict[str, DeviceLines] = {}
        # of all its workers' lives. A device without one is no machine here: nothing of its own runs on it
        self._cpu_s: dict[str, dict[int, float]] = {device.name: {} for device in spec.devices if device.has_worker}

    def inside(self, name: str) -> list[str]:
        return []

    host = "127.0.0.1"
    listen = f"tcp://{host}:0"

    def connect(self, name: str, address: str, *, what: str = DISPATCHER) -> str:
        return self._lines.setdefault(name, DeviceLines(self._proxy, self._spec.device(name), None)).add(what, address)

    def limit(self, name: str, cores: float | None) -> None:
        raise AdaptError("the CPU share of a device cannot be changed without isolation")

    def hurry(self, name: str) -> None:
        """It has no share."""

    settle = hurry

    def rate(self, name: str, up_bytes_per_s: float | None, down_bytes_per_s: float | None) -> None:
        raise AdaptError("the rate of a link cannot be changed without isolation")

    def cut(self, name: str, direction: Literal["both", "up", "down"]) -> None:
        self.lines_of(name).cut(direction)

    def lines_of(self, name: str) -> DeviceLines:
        if name not in self._lines:
            raise AdaptError(f"{name} has no connection: it has no worker")
        return self._lines[name]

    def restore(self, name: str, state: State) -> None:
        if name in self._lines:
            self._lines[name].restore(state, lost=state.lost)

    def read(self, pids: Mapping[str, int]) -> dict[str, Reading]:
        moved = self._proxy.counters()
        readings = {}
        for name, lives in self._cpu_s.items():
            memory_bytes, pid = 0, pids.get(name)
            if pid is not None:
                with contextlib.suppress(psutil.Error):  # it has just ended
                    process = psutil.Process(pid)
                    memory_bytes, times = process.memory_info().rss, process.cpu_times()
                    lives[pid] = times.user + times.system
            lines = self._lines[name].names if name in self._lines else []
            sent_bytes, received_bytes = (sum(moved[line, way].carried_bytes for line in lines) for way in DIRECTIONS)
            readings[name] = Reading(sum(lives.values()), memory_bytes, sent_bytes, received_bytes, pid is not None)
        return readings

    def memory_kills(self) -> dict[str, MemoryKills]:
        return {}

    def close(self) -> None:
        self._proxy.close()


def _limit_bytes(device: DeviceSpec) -> int | None:
    return None if device.memory_bytes is None else device.memory_bytes + FLOOR_BYTES
