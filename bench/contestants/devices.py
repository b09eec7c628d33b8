"""A cluster whose devices can be disturbed by name: with CPU shares where this machine and its user allow that, else plain processes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import adapt
from adapt.emulation.description import ClusterSpec, DeviceSpec
from adapt.emulation.machines import IsolatedMachines
from adapt.runtime.local import LocalProcess

CORES = 0.15  # of each device: all of them together leave most of two cores to dispatcher, client and whoever else is on this machine


def described(present: int, spare: int) -> ClusterSpec:
    """Devices w1, w2, ...; the last ones are not there at first."""
    names = [f"w{number}" for number in range(1, present + spare + 1)]
    devices = [DeviceSpec(name=name, cores=CORES, is_present=place < present) for place, name in enumerate(names)]
    return ClusterSpec(name="faults", devices=tuple(devices))


class Devices(Protocol):
    """What a disturbance needs of a cluster."""

    address: str
    is_isolated: bool

    def kill(self, name: str) -> None: ...
    def begin(self, name: str) -> None:
        """Start it, for the first time or again, and wait until it is ready."""
        ...

    def stop(self, name: str) -> None: ...
    def resume(self, name: str) -> None: ...
    def slow(self, name: str, share: float) -> None:
        """From now on it is so much slower than described."""
        ...

    def restore(self, name: str) -> None: ...
    def pids(self) -> dict[str, int]:
        """Of all processes that live."""
        ...

    def inside(self) -> AbstractContextManager[Callable[[str], list[str]]]:
        """Devices of the same kind once more, for others: name -> the command that runs the rest of its line there."""
        ...

    def close(self) -> None: ...


class IsolatedDevices:
    """An emulated cluster: each device has its CPU share and an address of its own."""

    is_isolated = True

    def __init__(self, present: int, spare: int, directory: Path) -> None:
        self._cluster = adapt.EmulatedCluster(described(present, spare), directory=directory)
        self._cluster.start()
        self.address = self._cluster.address

    def kill(self, name: str) -> None:
        self._cluster.device(name).kill()

    def begin(self, name: str) -> None:
        device = self._cluster.device(name)
        device.begin()
        device.settle()

    def stop(self, name: str) -> None:
        self._cluster.device(name).stop()

    def resume(self, name: str) -> None:
        self._cluster.device(name).resume()

    def slow(self, name: str, share: float) -> None:
        self._cluster.device(name).slow(CORES * share)

    def restore(self, name: str) -> None:
        self._cluster.device(name).restore()

    def pids(self) -> dict[str, int]:
        living = {f"worker {device.name}": device.pid for device in self._cluster.workers if device.is_alive}
        return {"dispatcher": self._cluster.dispatcher.pid, **living}

    @contextlib.contextmanager
    def inside(self) -> Iterator[Callable[[str], list[str]]]:
        machines = IsolatedMachines(self._cluster.spec, ())
        with contextlib.closing(machines):
            for device in self._cluster.spec.devices:
                machines.settle(device.name)
            yield machines.inside

    def close(self) -> None:
        self._cluster.close()


class PlainDevices:
    """A local cluster: processes that share this machine. None of them can be slowed."""

    is_isolated = False

    def __init__(self, present: int, spare: int, directory: Path) -> None:
        self._cluster = adapt.LocalCluster(workers=present, directory=directory)
        self._cluster.start()
        self.address = self._cluster.address

    def _process(self, name: str) -> LocalProcess | None:
        return next((process for process in self._cluster.workers if process.name == name), None)

    def _existing(self, name: str) -> LocalProcess:
        process = self._process(name)
        assert process is not None
        return process

    def kill(self, name: str) -> None:
        self._existing(name).kill()

    def begin(self, name: str) -> None:
        process = self._process(name)
        if process is None:
            self._cluster.add_worker(name=name)
        else:
            process.restart()

    def stop(self, name: str) -> None:
        self._existing(name).stop()

    def resume(self, name: str) -> None:
        self._existing(name).resume()

    def slow(self, name: str, share: float) -> None:
        raise NotImplementedError("a process without a CPU share cannot be slowed")

    restore = resume

    def pids(self) -> dict[str, int]:
        living = {f"worker {process.name}": process.pid for process in self._cluster.workers if process.is_alive}
        return {"dispatcher": self._cluster.dispatcher.pid, **living}

    @contextlib.contextmanager
    def inside(self) -> Iterator[Callable[[str], list[str]]]:
        yield lambda name: []

    def close(self) -> None:
        self._cluster.close()
