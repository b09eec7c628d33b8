"""A cluster of unequal, unreliable machines on this one: what `LocalCluster` is, with devices and links that have limits and mishaps."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from signal import SIGKILL
from time import monotonic
from types import TracebackType
from typing import Any, Literal, Self

import psutil

from adapt.emulation.description import HOST, ClusterSpec, DeviceSpec, Event, Kind
from adapt.emulation.machines import IsolatedMachines, Machines, PlainMachines
from adapt.emulation.observation import EventRecord, Facts, Observation, Observer, Reading
from adapt.emulation.ownership import missing_rights
from adapt.emulation.parse import check_speed, load, scaled
from adapt.emulation.schedule import expand
from adapt.errors import AdaptError, ConfigError
from adapt.runtime.local import LocalProcess, Reaper, as_flags, ready_field

log = logging.getLogger(__name__)

SAMPLE_S = 0.25
NEEDS_PROXY = frozenset({Kind.DELAY, Kind.STALL, Kind.RESET, Kind.CORRUPT})


class EmulatedDevice:
    """One machine of the cluster with its worker: a `LocalProcess` to who handles it as one, and its machine and cable besides.

    Attributes:
        spec: what it is described as.
        process: its worker's; None before the first one starts.
    """

    def __init__(self, spec: DeviceSpec, machines: Machines, start: Callable[[], LocalProcess]) -> None:
        self.spec, self._machines, self._start = spec, machines, start
        self.process: LocalProcess | None = None

    def __repr__(self) -> str:
        return f"<adapt emulated device {self.name}: {self.process or 'no worker yet'}>"

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def pid(self) -> int:
        """Of its worker. Raises AdaptError if there has been none."""
        return self._worker.pid

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.is_alive

    @property
    def log(self) -> Path:
        return self._worker.log

    @property
    def _worker(self) -> LocalProcess:
        if self.process is None:
            raise AdaptError(f"no worker has been started on device {self.name}")
        return self.process

    # ── its worker ───────────────────────────────────────────────────────────────────────────────────────────────────

    def begin(self) -> None:
        """Start its worker, if none lives; it is not ready yet."""
        if not self.is_alive:
            self._machines.hurry(self.name)
        if self.process is None:
            self.process = self._start()
        elif not self.process.is_alive:
            self.process.wait()
            self.process.begin_again()

    def settle(self) -> None:
        """Wait until its worker is ready; from then on it has its CPU share. Before, it has all that the others leave."""
        self._worker.wait_ready()
        self._machines.settle(self.name)

    def restart(self) -> None:
        """End its worker, if it lives, and start it anew."""
        if self.is_alive:
            self._worker.end()
        self.begin()
        self.settle()

    def kill(self) -> None:
        """SIGKILL: its worker dies at once, as by a pulled plug. Waits for that."""
        self._worker.kill()

    def stop(self) -> None:
        """SIGSTOP: its worker freezes."""
        self._worker.stop()

    def resume(self) -> None:
        """SIGCONT: its worker goes on."""
        self._worker.resume()

    def terminate(self) -> None:
        """SIGTERM: its worker finishes what it holds and leaves."""
        self._worker.terminate()

    def wait(self, timeout_s: float | None = 10.0) -> int:
        """Wait for its worker's end; returns the exit status, negative for a signal. Raises TimeoutError."""
        return self._worker.wait(timeout_s)

    # ── its machine and its cable ────────────────────────────────────────────────────────────────────────────────────

    def slow(self, cores: float | None) -> None:
        """From now on this is its CPU share; None: no limit."""
        self._machines.limit(self.name, cores)

    def rate(self, up_bytes_per_s: float | None, down_bytes_per_s: float | None) -> None:
        """From now on its link has these rates; None: no limit."""
        self._machines.rate(self.name, up_bytes_per_s, down_bytes_per_s)

    def cut(self, direction: Literal["both", "up", "down"] = "both") -> None:
        """Pull its cable; or lose only what it sends ("up") or what is sent to it ("down")."""
        self._machines.cut(self.name, direction)

    def delay(self, latency_s: float, jitter_s: float = 0.0) -> None:
        """Each direction takes so much longer, plus between nothing and the jitter."""
        self._machines.proxy_of(self.name).delay(self.name, latency_s, jitter_s)

    def stall(self) -> None:
        """Its connections stay open, and nothing moves."""
        self._machines.proxy_of(self.name).stall(self.name)

    def reset(self) -> None:
        """Its connections are reset."""
        self._machines.proxy_of(self.name).reset(self.name)

    def corrupt(self, per_mib: float) -> None:
        """So many bytes per MiB are changed on the way, in each direction."""
        self._machines.proxy_of(self.name).corrupt(self.name, per_mib)

    def restore(self) -> None:
        """Link and CPU share are again as described."""
        self._machines.restore(self.name)

    def perform(self, event: Event) -> None:
        """Do what the event says; whether its worker is ready again is not waited for."""
        match event.kind:
            case Kind.CRASH:
                self.kill()
            case Kind.JOIN:
                self.begin()
            case Kind.LEAVE:
                self.terminate()
            case Kind.STOP:
                self.stop()
            case Kind.CONTINUE:
                self.resume()
            case Kind.SLOW:
                self.slow(event.cores)
            case Kind.CUT:
                self.cut()
            case Kind.CUT_UP:
                self.cut("up")
            case Kind.CUT_DOWN:
                self.cut("down")
            case Kind.RATE:
                self.rate(event.up_bytes_per_s, event.down_bytes_per_s)
            case Kind.DELAY:
                self.delay(event.latency_s or 0.0, event.jitter_s or 0.0)
            case Kind.STALL:
                self.stall()
            case Kind.RESET:
                self.reset()
            case Kind.CORRUPT:
                self.corrupt(event.corrupt_per_mib or 0.0)
            case Kind.RESTORE:
                self.restore()


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
        address: for `Client`.
        dispatcher: its process.
        devices: all of them. workers: those that have a worker.

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
        self._proxied = {*proxied, *(event.device for event in self.events if event.kind in NEEDS_PROXY)}
        if unknown := sorted(self._proxied - {device.name for device in self.spec.devices}):
            raise ConfigError(f"proxied={unknown[0]!r}: expected the name of a device of {self.spec.name}")
        if is_isolated:
            _check_rights()
            check_speed(self.spec, psutil.cpu_count() or 1)
        self._given_directory = None if directory is None else Path(directory)
        self._finalizer: weakref.finalize[Any, Any] | None = None
        self.devices: list[EmulatedDevice] = []
        self.workers: list[EmulatedDevice] = []

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
        self.directory = self._given_directory or Path(tempfile.mkdtemp(prefix="adapt-emulation-"))
        self.directory.mkdir(parents=True, exist_ok=True)
        self._processes: list[LocalProcess] = []
        self._reaper = Reaper()
        self._ending = ExitStack()  # of callbacks that do not hold the cluster, or it could not be forgotten
        if self._given_directory is None:
            self._ending.callback(shutil.rmtree, self.directory, ignore_errors=True)
        self._ending.callback(self._reaper.close)
        self._finalizer = weakref.finalize(self, _end, os.getpid(), self._ending)
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        machines: Machines = IsolatedMachines(self.spec, self._proxied) if self.is_isolated else PlainMachines(self.spec)
        self._ending.callback(machines.close)
        self._ending.callback(_switch_off, self._processes)
        self._begin_dispatcher(machines)
        self.devices = [self._device(spec, machines) for spec in self.spec.devices]
        self.workers = [device for device in self.devices if device.spec.has_worker]
        present = [device for device in self.workers if device.spec.is_present]
        for device in present:
            device.begin()
        for device in present:
            device.settle()
        if self.spec.dispatcher != HOST:
            machines.settle(self.spec.dispatcher)
        self._observer = Observer(
            partial(_read, machines, self.workers),
            facts=Facts.of(self.spec, is_isolated=self.is_isolated),
            clock=monotonic,
            every_s=SAMPLE_S,
        )
        self._ending.callback(self._observer.close)
        self._player: threading.Thread | None = None
        self._settler = ThreadPoolExecutor(1, thread_name_prefix="adapt-settler")
        self._ending.callback(self._settler.shutdown, wait=False, cancel_futures=True)
        self._is_over = threading.Event()
        self._ending.callback(self._is_over.set)

    def _begin_dispatcher(self, machines: Machines) -> None:
        settings = {
            "listen": machines.listen,
            "insecure": machines.is_isolated,  # its machines are of our own making
            "state_dir": self.directory / "state",
            **self.spec.dispatcher_settings,
        }
        self.dispatcher = self._launch("dispatcher", settings, name="dispatcher", inside=machines.inside(self.spec.dispatcher))
        self.dispatcher.wait_ready()
        self.address = ready_field(self.dispatcher.ready, "listen")
        self.dispatcher.always("--listen", self.address)  # a restart comes back where it was

    def _device(self, spec: DeviceSpec, machines: Machines) -> EmulatedDevice:
        if not spec.has_worker:
            return EmulatedDevice(spec, machines, partial(_start_nothing, spec.name))
        settings = {
            "name": spec.name,
            "dispatcher": machines.connect(spec.name, self.address),
            "threads": spec.threads,
            "device": spec.accelerator,
            "memory_limit": spec.memory_bytes,
            "cache_dir": self.directory / "cache" / spec.name,  # a machine has its own disk
            **self.spec.worker_settings,
        }
        return EmulatedDevice(spec, machines, lambda: self._launch("worker", settings, name=spec.name, inside=machines.inside(spec.name)))

    def _launch(self, door: str, settings: dict[str, object], *, name: str, inside: Sequence[str]) -> LocalProcess:
        command = [f"adapt.interfaces.cli.{door}", "--log-level", "info", *as_flags(settings)]
        process = LocalProcess(name, command, self.directory, self._reaper, inside=inside)
        self._processes.append(process)
        return process

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

    def play(self) -> None:
        """Begin the schedule: its moments count from now. Once only."""
        if self._player is not None:
            raise AdaptError("the schedule of this cluster is being played or has been")
        self._player = threading.Thread(target=self._play, name="adapt-schedule", daemon=True)
        self._player.start()

    def wait_played(self, timeout_s: float | None = None) -> bool:
        """Wait until all events have happened; whether they have."""
        if self._player is None:
            raise AdaptError("the schedule of this cluster has not begun: call play()")
        self._player.join(timeout_s)
        return not self._player.is_alive()

    def observation(self) -> Observation:
        """What was seen so far: samples of each device, events with what they took."""
        return self._observer.observation()

    def _play(self) -> None:
        began = monotonic()
        self._observer.count_from(began)
        for event in self.events:
            if self._is_over.wait(max(began + event.at_s - monotonic(), 0.0)):
                return
            self._perform(event, began)

    def _perform(self, event: Event, began: float) -> None:
        at, words = monotonic(), None
        try:
            device = self.device(event.device)
            device.perform(event)
        except Exception as error:  # one mishap that fails must not end the schedule
            words = str(error) or type(error).__name__
            log.warning("event failed", extra={"kind": event.kind, "device": event.device, "reason": words})
        else:
            if event.kind is Kind.JOIN:
                self._settler.submit(self._settle, device)
        self._observer.note(
            EventRecord(
                at_s=event.at_s,
                kind=str(event.kind),
                device=event.device,
                detail=details(event),
                began_s=at - began,
                took_s=monotonic() - at,
                error=words,
            )
        )

    def _settle(self, device: EmulatedDevice) -> None:
        try:
            device.settle()
        except (AdaptError, OSError) as error:  # it was killed again, or the cluster ends
            log.info("a device that joined was not ready", extra={"device": device.name, "reason": str(error)})


def details(event: Event) -> dict[str, Any]:
    """The parameters of an event, without moment, kind and device."""
    return {key: value for key, value in asdict(event).items() if value is not None and key not in ("at_s", "kind", "device")}


def _check_rights() -> None:
    if missing := missing_rights():
        raise ConfigError(
            f"devices cannot be isolated here: {'; '.join(missing)}. Without limits of CPU, memory and links it goes with "
            "--no-isolation (is_isolated=False)"
        )


def _start_nothing(name: str) -> LocalProcess:
    raise AdaptError(f"device {name} has no worker: it is described so")


def _read(machines: Machines, devices: Sequence[EmulatedDevice]) -> dict[str, Reading]:
    return machines.read({device.name: device.pid for device in devices if device.is_alive})


def _switch_off(processes: Sequence[LocalProcess]) -> None:
    """All at once: to drain at a tenth of a core, behind a cable that is pulled, would take its time."""
    for process in processes:
        process.send_signal(SIGKILL)
    for process in processes:
        process.wait()


def _end(owner: int, ending: ExitStack) -> None:
    """Also called for a cluster that was forgotten. A fork of the owner owns nothing."""
    if os.getpid() == owner:
        ending.close()
