"""A cluster of unequal, unreliable machines on this one: what `LocalCluster` is, with devices and links that have limits and mishaps."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any, Self

from adapt.config import ETCD_SCHEME
from adapt.emulation.description import ETCD, HOST, ClusterSpec, DeviceSpec
from adapt.emulation.device import EmulatedDevice, EmulatedEtcd
from adapt.emulation.lines import DISPATCHER, SCHEME
from adapt.emulation.machines import IsolatedMachines, Machines, PlainMachines
from adapt.emulation.observation import Facts, Observation, Observer, Reading
from adapt.emulation.ownership import DIRECTORY_PREFIX, missing_rights
from adapt.emulation.parse import OF_A_CONNECTION, check_speed, load, scaled
from adapt.emulation.player import Performer, Player
from adapt.emulation.processes import Processes, Watch, command_of
from adapt.emulation.schedule import expand
from adapt.errors import AdaptError, ConfigError
from adapt.runtime.etcd_server import EtcdServer
from adapt.runtime.local import LocalProcess, ready_field

SAMPLE_S = 0.25


class EmulatedCluster:
    """A dispatcher and devices as they are described; see the README for how. A context manager; its schedule begins with `play`.

    Nothing of it outlives this process, unless this one is killed by SIGKILL: then its processes die, and `adapt emulate --clean` removes
    the rest.

    Args:
        source: a TOML file, the name of a ready cluster ("pi3"), or a description.
        seed: instead of the description's.
        time_scale: everything takes so many times as long, so that more devices fit on this machine.
        is_isolated: False: ordinary processes without limits of CPU, memory and rate; needs no rights.
        proxied: devices whose connections go through a proxy in any case, for `delay`, `stall`, `reset` and `corrupt`.
        dispatcher, worker: further settings of the processes, over the description's.
        directory: for state, caches and logs; by default a temporary one that goes with the cluster.

    Attributes:
        spec: the description, scaled.
        events: all that `play` will do, in order.
        devices: all of them. workers: those that have a worker.
        etcd: its process, in a cluster that has one.

    Raises:
        ConfigError: a wrong description; more speed than this machine has; missing rights, with what to do.
        AdaptError: a process ended or hung before it was ready.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | ClusterSpec,
        *,
        seed: int | None = None,
        time_scale: float = 1.0,
        is_isolated: bool = True,
        proxied: Iterable[str] = (),
        dispatcher: dict[str, object] | None = None,
        worker: dict[str, object] | None = None,
        directory: str | os.PathLike[str] | None = None,
    ) -> None:
        spec = source if isinstance(source, ClusterSpec) else load(source)
        spec = scaled(spec, time_scale) if time_scale != 1.0 else spec
        self.spec = replace(
            spec,
            seed=spec.seed if seed is None else seed,
            dispatcher_settings={**spec.dispatcher_settings, **(dispatcher or {})},
            worker_settings={**spec.worker_settings, **(worker or {})},
        )
        self.events = expand(self.spec)
        self.is_isolated = is_isolated
        self._proxied = {*proxied, *(event.device for event in self.events if event.kind in OF_A_CONNECTION)}
        if unknown := sorted(self._proxied - {device.name for device in self.spec.devices}):
            raise ConfigError(f"proxied={unknown[0]!r}: expected the name of a device of {self.spec.name}")
        if without := sorted(name for name in self._proxied if not self.spec.device(name).has_worker):
            raise ConfigError(f"proxied={without[0]!r}: it has no worker, and so no connection; expected the name of a device with one")
        if is_isolated:
            _check_rights()
            check_speed(self.spec, len(os.sched_getaffinity(0)))
        self._given_directory = None if directory is None else Path(directory)
        self._finalizer: weakref.finalize[Any, Any] | None = None
        self._run: _Run | None = None
        self.devices: list[EmulatedDevice] = []
        self.workers: list[EmulatedDevice] = []
        self.etcd: EtcdServer | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # ── from start to end ────────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        """Set up the machines, start everything and wait until it is ready. Entering the context manager does this."""
        if self._finalizer is not None and self._finalizer.alive:
            return
        self._run = None
        self.directory = self._given_directory or Path(tempfile.mkdtemp(prefix=DIRECTORY_PREFIX))
        ending = ExitStack()  # of callbacks that do not hold the cluster, or it could not be forgotten
        self._finalizer = weakref.finalize(self, _end, os.getpid(), ending)
        try:
            if self._given_directory is None:
                ending.callback(shutil.rmtree, self.directory, ignore_errors=True)
            self.directory.mkdir(parents=True, exist_ok=True)
            self._begin(ending)
        except BaseException:
            self.close()
            raise

    def _begin(self, ending: ExitStack) -> None:
        processes = self._processes()
        ending.callback(processes.close)
        machines = self._machines()
        ending.callback(machines.close)
        ending.callback(processes.end)
        self.etcd = self._begin_etcd(machines, processes) if self.spec.has_etcd else None
        dispatcher = self._begin_dispatcher(machines, processes)
        address = ready_field(dispatcher.ready, "listen")
        dispatcher.always("--listen", address)  # a restart comes back where it was
        self.devices = [self._device(spec, machines, processes, address) for spec in self.spec.devices]
        self.workers = [device for device in self.devices if device.spec.has_worker]
        self._begin_devices(machines)
        observer = Observer(
            partial(_read, machines, self.workers),
            facts=Facts.of(self.spec, is_isolated=self.is_isolated),
            clock=monotonic,
            every_s=SAMPLE_S,
            look=Watch(machines, processes).look,
        )
        ending.callback(observer.close)
        performers: dict[str, Performer] = {device.name: device for device in self.devices}
        if self.etcd is not None:
            performers[ETCD] = EmulatedEtcd(self.etcd, processes)
        player = Player(self.events, performers, observer)
        ending.callback(player.close)
        self._run = _Run(address, dispatcher, observer, player)

    def _processes(self) -> Processes:
        return Processes(self.directory)

    def _command(self, door: str, settings: Mapping[str, object]) -> list[str]:
        return command_of(door, settings)

    def _machines(self) -> Machines:
        if not self.is_isolated:
            return PlainMachines(self.spec)
        return IsolatedMachines(self.spec, self._proxied, None if self._given_directory else self.directory)

    def _begin_etcd(self, machines: Machines, processes: Processes) -> EtcdServer:
        etcd = processes.launch_etcd(host=machines.host, inside=machines.inside(self.spec.dispatcher))
        etcd.wait_ready()
        return etcd

    def _begin_dispatcher(self, machines: Machines, processes: Processes) -> LocalProcess:
        settings = {
            "listen": machines.listen,
            "insecure": machines.is_isolated,  # its machines are of our own making
            "state_dir": self.directory / "state",
            "membership": None if self.etcd is None else self.etcd.membership,
            **self.spec.dispatcher_settings,
        }
        dispatcher = processes.launch("dispatcher", self._command("dispatcher", settings), inside=machines.inside(self.spec.dispatcher))
        dispatcher.wait_ready()
        return dispatcher

    def _begin_devices(self, machines: Machines) -> None:
        present = [device for device in self.workers if device.spec.is_present]
        for device in present:
            device.begin()
        for device in present:
            device.settle()
        if self.spec.dispatcher != HOST:
            machines.settle(self.spec.dispatcher)

    def _device(self, spec: DeviceSpec, machines: Machines, processes: Processes, address: str) -> EmulatedDevice:
        if not spec.has_worker:
            return EmulatedDevice(spec, machines, processes, None)
        settings = {
            "name": spec.name,
            **self._ways(spec, machines, address),
            "threads": spec.threads,
            "device": spec.accelerator,
            "memory_limit": spec.memory_bytes,
            "cache_dir": self.directory / "cache" / spec.name,  # a machine has its own disk
            **self.spec.worker_settings,
        }
        start = partial(processes.launch, spec.name, self._command("worker", settings), inside=machines.inside(spec.name))
        return EmulatedDevice(spec, machines, processes, start)

    def _ways(self, spec: DeviceSpec, machines: Machines, address: str) -> dict[str, object]:
        """How a worker finds its dispatcher, and etcd if there is one. What etcd tells it would not lead through the proxy."""
        found = machines.connect(spec.name, address, what=DISPATCHER)
        if self.etcd is None:
            return {"dispatcher": found}
        endpoint = machines.connect(spec.name, f"{SCHEME}{self.etcd.endpoint}", what=ETCD).removeprefix(SCHEME)
        return {"membership": f"{ETCD_SCHEME}{endpoint}", "via": None if found == address else found}

    def close(self) -> None:
        """End and remove everything. Closing twice is nothing."""
        if self._finalizer is not None:
            self._finalizer()

    def device(self, name: str) -> EmulatedDevice:
        """The device of that name. Raises AdaptError."""
        for device in self.devices:
            if device.name == name:
                return device
        raise AdaptError(f"cluster {self.spec.name} has no device {name!r}; there are {', '.join(device.name for device in self.devices)}")

    # ── the schedule, and what is seen ───────────────────────────────────────────────────────────────────────────────

    @property
    def address(self) -> str:
        """Of the dispatcher, for `Client`. Raises AdaptError before the start."""
        return self._started.address

    @property
    def dispatcher(self) -> LocalProcess:
        """Its process. Raises AdaptError before the start."""
        return self._started.dispatcher

    def play(self) -> None:
        """Begin the schedule: its moments count from now. Once only. Raises AdaptError."""
        self._started.player.start()

    def wait_played(self, timeout_s: float | None = None) -> bool:
        """Wait until all events have happened; whether they have. Raises AdaptError."""
        return self._started.player.wait(timeout_s)

    def observation(self) -> Observation:
        """What was seen so far: samples of each device, events with what they took. Also after the end. Raises AdaptError before the start."""
        return self._started.observer.observation()

    @property
    def _started(self) -> _Run:
        if self._run is None:
            raise AdaptError(f"cluster {self.spec.name} does not run: it has not been started")
        return self._run


@dataclass(frozen=True, slots=True)
class _Run:
    """What there is from a start on."""

    address: str
    dispatcher: LocalProcess
    observer: Observer
    player: Player


def _check_rights() -> None:
    if missing := missing_rights():
        raise ConfigError(
            f"devices cannot be isolated here: {'; '.join(missing)}. Without limits of CPU, memory and links it goes with "
            "--no-isolation (is_isolated=False)"
        )


def _read(machines: Machines, devices: Sequence[EmulatedDevice]) -> dict[str, Reading]:
    return machines.read({device.name: device.pid for device in devices if device.is_alive})


def _end(owner: int, ending: ExitStack) -> None:
    """Also called for a cluster that was forgotten. A fork of the owner owns nothing."""
    if os.getpid() == owner:
        ending.close()
