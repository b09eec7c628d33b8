"""What an emulated cluster is: devices, links, events. Plain facts; `parse` makes them of TOML, `schedule` plays the events.

Rates are bytes per second, moments and durations seconds, sizes bytes; None is "as this machine has it".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

HOST = "host"  # where the dispatcher runs unless a device does it
ETCD = "etcd"  # runs beside the dispatcher, in a cluster that has one; of it, too, events say what happens


class Kind(StrEnum):
    """What may happen to a device; the last three, to etcd."""

    CRASH = "crash"  # SIGKILL of its worker
    JOIN = "join"  # its worker starts: a device that was absent, has crashed or has left
    LEAVE = "leave"  # SIGTERM: its worker drains and leaves
    STOP = "stop"  # SIGSTOP
    CONTINUE = "continue"  # SIGCONT
    SLOW = "slow"  # another CPU share: `cores`
    CUT = "cut"  # its cable is pulled
    CUT_UP = "cut-up"  # what it sends gets lost; what is sent to it arrives
    CUT_DOWN = "cut-down"  # the other way round
    RATE = "rate"  # other link rates: `up_bytes_per_s`, `down_bytes_per_s`
    DELAY = "delay"  # other `latency_s` and `jitter_s` of each direction
    STALL = "stall"  # its connections stay open, and no byte moves
    RESET = "reset"  # its connections are reset; new ones are taken
    CORRUPT = "corrupt"  # bytes are changed on the way, `corrupt_per_mib` in each direction
    RESTORE = "restore"  # link and speed are again what they are in the description, but for what remains in force
    CRASH_ETCD = "crash-etcd"  # SIGKILL; leases and leaders are on its disk
    START_ETCD = "start-etcd"  # it comes back with them
    RESTART_ETCD = "restart-etcd"  # both, one after the other


OF_ETCD = frozenset({Kind.CRASH_ETCD, Kind.START_ETCD, Kind.RESTART_ETCD})


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """One machine.

    Attributes:
        cores: CPU share in cores of this machine, 0.25 is a quarter of one.
        memory_bytes: stage budget of its worker.
        up_bytes_per_s, down_bytes_per_s: of its link, sent and received.
        latency_s, jitter_s: added to each direction: latency and, on top, between nothing and jitter.
        threads: of its worker, within one operator.
        accelerator: "cpu", "cuda:0", for the worker.
        is_present: its worker starts with the cluster; else a `join` starts it.
        has_worker: false for a machine that only runs the dispatcher.
        board: which real board this stands for, in words.
    """

    name: str
    cores: float | None = None
    memory_bytes: int | None = None
    up_bytes_per_s: float | None = None
    down_bytes_per_s: float | None = None
    latency_s: float = 0.0
    jitter_s: float = 0.0
    threads: int = 1
    accelerator: str = "cpu"
    is_present: bool = True
    has_worker: bool = True
    board: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSpec:
    """The link of one pair of devices, where it differs from what their ports allow. Both directions have this rate."""

    between: tuple[str, str]
    bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happens to one device, or to `ETCD`, at one moment after the start of the schedule.

    Attributes:
        remaining: of a `restore`: what stays in force, in the order in which it began.
    """

    at_s: float
    kind: Kind
    device: str
    cores: float | None = None
    up_bytes_per_s: float | None = None
    down_bytes_per_s: float | None = None
    latency_s: float | None = None
    jitter_s: float | None = None
    corrupt_per_mib: float | None = None
    remaining: tuple[Event, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EventSpec:
    """An event as it is described. `for_s`: after so long it is undone, by the event that undoes its kind."""

    event: Event
    for_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomSpec:
    """Events drawn from the seed: gaps are exponential with mean `every_s`, kind and device uniform, each undone after `for_s`.

    Attributes:
        templates: one for each kind; moment and device are drawn.
        devices: names.
        for_s: least and most; uniform between.
        from_s, until_s: events begin within this span, and have been undone by its end.
        spared: so many of `devices` are undisturbed at any moment.
    """

    templates: tuple[Event, ...]
    devices: tuple[str, ...]
    every_s: float
    for_s: tuple[float, float]
    from_s: float = 0.0
    until_s: float
    spared: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """A whole cluster.

    Attributes:
        about: one line for people.
        dispatcher: HOST or the name of a device.
        has_etcd: a real etcd, beside the dispatcher, keeps the leases; else the dispatcher itself does.
        dispatcher_settings, worker_settings: further flags of the processes, as {"lease_ttl": 2}.
        time_scale: compute, links and moments are this many times slower than described; see `scaled`.
    """

    name: str
    devices: tuple[DeviceSpec, ...]
    about: str = ""
    dispatcher: str = HOST
    has_etcd: bool = False
    links: tuple[LinkSpec, ...] = ()
    events: tuple[EventSpec, ...] = ()
    random: tuple[RandomSpec, ...] = ()
    seed: int = 0
    dispatcher_settings: dict[str, object] = field(default_factory=dict)
    worker_settings: dict[str, object] = field(default_factory=dict)
    time_scale: float = 1.0

    def device(self, name: str) -> DeviceSpec:
        """The device of that name. Raises KeyError."""
        return next((device for device in self.devices if device.name == name), None) or _no_such(name)


def _no_such(name: str) -> DeviceSpec:
    raise KeyError(name)
