"""CLUSTER.toml to a `ClusterSpec`. All that is wrong is a ConfigError: file, place, key, value, what is expected.

name, about, seed                 of the cluster
dispatcher, membership            where it runs; "etcd": who keeps the leases
[settings.dispatcher], .worker    further flags of adapt-dispatcher and adapt-worker
[[device]]                        one machine, or `count` alike
[[link]]                          a pair whose link differs from what their ports allow
[[event]]                         what happens at a moment, perhaps undone after `for`
[[random]]                        what happens at moments drawn from the seed

home.toml: device 2 ("pi"): rate=20: its unit is missing; expected a rate such as "20 Mbit/s", ...
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NoReturn, TypeVar

from adapt.config import EMBEDDED, MAX_DURATION_S, MEBIBYTE, DispatcherConfig, WorkerConfig
from adapt.emulation import ready
from adapt.emulation.description import ETCD, HOST, OF_ETCD, ClusterSpec, DeviceSpec, Event, EventSpec, Kind, LinkSpec, RandomSpec
from adapt.emulation.schedule import UNDONE_BY
from adapt.emulation.values import (
    MIN_CORES,
    NAME,
    WrongValueError,
    hint,
    listed,
    read_accelerator,
    read_choice,
    read_cores,
    read_count,
    read_duration,
    read_durations,
    read_line,
    read_list,
    read_memory,
    read_moment,
    read_name,
    read_number,
    read_rate,
    read_switch,
    shown,
)
from adapt.errors import ConfigError

T = TypeVar("T")
D = TypeVar("D")

MAX_DEVICES = 64
MAX_DRAWS = 10_000  # of one [[random]]
MAX_TIME_SCALE = 1000.0
KEPT_CORES = 0.4  # for dispatcher, proxy, client

_TOP_KEYS = ("name", "about", "seed", "dispatcher", "membership", "settings", "device", "link", "event", "random")
_DEVICE_KEYS = (
    "name", "count", "cores", "memory", "rate", "up", "down", "latency", "jitter", "threads", "accelerator", "present", "worker", "board",
)  # fmt: skip
_LINK_KEYS = ("between", "rate")
_PARAMETERS: dict[Kind, tuple[str, ...]] = {
    Kind.SLOW: ("cores",),
    Kind.RATE: ("rate", "up", "down"),
    Kind.DELAY: ("latency", "jitter"),
    Kind.CORRUPT: ("per_mib",),
}
_ALL_PARAMETERS = tuple(key for keys in _PARAMETERS.values() for key in keys)
_EVENT_KEYS = ("at", "kind", "device", "devices", "for", *_ALL_PARAMETERS)
_RANDOM_KEYS = ("kinds", "devices", "every", "for", "from", "until", "spare")
_EXAMPLES = {
    "name": '"pi"', "rate": '"20 Mbit/s"', "up": '"5 Mbit/s"', "down": '"20 Mbit/s"', "between": '["pi-1", "pi-2"]', "at": '"10 s"',
    "kind": '"crash"', "cores": "0.05", "latency": '"50 ms"', "per_mib": "1", "kinds": '["crash", "stop"]', "every": '"20 s"',
    "for": '"5 s"', "until": '"120 s"',
}  # fmt: skip
_OF_A_WORKER = frozenset({Kind.CRASH, Kind.JOIN, Kind.LEAVE, Kind.STOP, Kind.CONTINUE, Kind.SLOW})
OF_A_CONNECTION = frozenset({Kind.DELAY, Kind.STALL, Kind.RESET, Kind.CORRUPT})  # to the dispatcher; the proxy does them
_DRAWN = tuple(kind for kind in Kind if kind in UNDONE_BY or kind in (Kind.RESET, Kind.RESTART_ETCD))
_TAKEN_NAMES = (HOST, "hub", "dispatcher", ETCD)  # machines of the emulation itself
_TEMPLATE = ""  # the device of an event that has none yet

# Settings that the emulation gives, and where a description says them
_GIVEN = {
    "dispatcher": {"listen": "", "insecure": "", "state_dir": ""},
    "worker": {
        "dispatcher": "",
        "via": "",
        "cache_dir": "",
        "name": "name",
        "device": "accelerator",
        "threads": "threads",
        "memory_limit": "memory",
    },
}


# ── doors ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def load(source: str | os.PathLike[str]) -> ClusterSpec:
    """The cluster of a TOML file, or a ready one by its name: `load("pi3")`.

    Raises:
        ConfigError: it cannot be read, or is not what a description may be.
    """
    if source in ready.AREAS:
        return ready.seifer(ready.AREAS[str(source)])
    if source in ready.FILES:
        return parse(ready.text(str(source)), name=f"{source}.toml")
    path = Path(source).expanduser()
    try:
        return parse(path.read_text(encoding="utf-8"), name=str(path))
    except FileNotFoundError:
        known = [*ready.FILES, *ready.AREAS]
        raise ConfigError(f"{path}: there is no such file and no ready cluster of that name; {hint(path.name, known)}") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; expected a TOML file") from error
    except ValueError as error:  # bytes that are no text, a path that can be none
        raise ConfigError(f"{path}: {error}; expected a TOML file") from error


def parse(text: str, *, name: str) -> ClusterSpec:
    """The cluster that the text describes.

    Args:
        name: of the file, for complaints; its stem is the cluster's name unless the text has one.

    Raises:
        ConfigError: the text is not TOML, or not what a description may be.
    """
    try:
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a TOMLDecodeError is the former, but so is a number of 5,000 digits
        raise ConfigError(f"{name}: not TOML: {error}") from error
    top = _Table(content, name, _TOP_KEYS)
    devices = _devices(top)
    dispatcher = _dispatcher(top, devices)
    has_etcd = top.get("membership", read_choice([EMBEDDED, ETCD]), EMBEDDED) == ETCD
    settings = _Table(top.get("settings", _read_table, {}), f"{name}: settings", ("dispatcher", "worker"))
    return ClusterSpec(
        name=top.get("name", read_name, re.sub(r"[^a-z0-9-]+", "-", Path(name).stem.lower()).strip("-")[:31] or "cluster"),
        about=top.get("about", read_line, ""),
        seed=top.get("seed", read_count(0, 2**63 - 1), 0),
        devices=tuple(devices.values()),
        dispatcher=dispatcher,
        has_etcd=has_etcd,
        links=tuple(_links(top, devices)),
        events=tuple(
            event for table in top.tables("event", _EVENT_KEYS) for event in _events(table, devices, dispatcher, has_etcd=has_etcd)
        ),
        random=tuple(_random(table, devices, dispatcher, has_etcd=has_etcd) for table in top.tables("random", _RANDOM_KEYS)),
        dispatcher_settings=_settings(settings, "dispatcher", has_etcd=has_etcd),
        worker_settings=_settings(settings, "worker", has_etcd=has_etcd),
    )


# ── speed ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def scaled(spec: ClusterSpec, k: float) -> ClusterSpec:
    """The same cluster, slower by `k`: CPU shares and rates divided by it; latencies, moments and the processes' timeouts, also those not
    written, times it. A device without a share gets 1 / k: as if one core had been written. Memory stays, unlimited rates too.

    Raises:
        ConfigError: k is below 1, or above 1000.
    """
    if isinstance(k, bool) or not isinstance(k, int | float) or not 1 <= k <= MAX_TIME_SCALE:
        raise ConfigError(f"time scale {shown(k)}: expected a number from 1 to {MAX_TIME_SCALE:g}: how many times slower")
    if k == 1:
        return spec
    return replace(
        spec,
        devices=tuple(_slower_device(device, k) for device in spec.devices),
        links=tuple(replace(link, bytes_per_s=link.bytes_per_s / k) for link in spec.links),
        events=tuple(replace(item, event=_slower_event(item.event, k), for_s=_times(item.for_s, k)) for item in spec.events),
        random=tuple(_slower_random(item, k) for item in spec.random),
        dispatcher_settings=_slower_settings(DispatcherConfig, spec.dispatcher_settings, k),
        worker_settings=_slower_settings(WorkerConfig, spec.worker_settings, k),
        time_scale=spec.time_scale * k,
    )


def _slower_device(device: DeviceSpec, k: float) -> DeviceSpec:
    return replace(
        device,
        cores=(1.0 if device.cores is None else device.cores) / k,
        up_bytes_per_s=_over(device.up_bytes_per_s, k),
        down_bytes_per_s=_over(device.down_bytes_per_s, k),
        latency_s=device.latency_s * k,
        jitter_s=device.jitter_s * k,
    )


def _slower_event(event: Event, k: float) -> Event:
    return replace(
        event,
        at_s=event.at_s * k,
        cores=_over(event.cores, k),
        up_bytes_per_s=_over(event.up_bytes_per_s, k),
        down_bytes_per_s=_over(event.down_bytes_per_s, k),
        latency_s=_times(event.latency_s, k),
        jitter_s=_times(event.jitter_s, k),
    )


def _slower_random(item: RandomSpec, k: float) -> RandomSpec:
    return replace(
        item,
        templates=tuple(_slower_event(event, k) for event in item.templates),
        every_s=item.every_s * k,
        for_s=(item.for_s[0] * k, item.for_s[1] * k),
        from_s=item.from_s * k,
        until_s=item.until_s * k,
    )


def _slower_settings(cls: type[DispatcherConfig] | type[WorkerConfig], settings: dict[str, object], k: float) -> dict[str, object]:
    """All durations, times k: a lease of 10 s is short where everything takes ten times as long."""
    slower = dict(settings)
    for item in dataclasses.fields(cls):
        if item.name.endswith("_s"):
            key = item.name.removesuffix("_s")
            slower[key] = min(float(str(settings.get(key, item.default))) * k, MAX_DURATION_S)
    return slower


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _over(value: float | None, divisor: float) -> float | None:
    return None if value is None else value / divisor


def check_speed(spec: ClusterSpec, host_cores: int) -> None:
    """Whether a machine with that many cores can be all these devices at once. A device without a share counts as one core; one that an event
    makes faster counts as it is then.

    Raises:
        ConfigError: it cannot; with the arithmetic, and how many times slower it can. Or a share is too small for the kernel.
    """
    _check_least_shares(spec)
    shares = [_largest_share(spec, device) for device in spec.devices]
    allowed = host_cores - KEPT_CORES
    excess = sum(shares) / allowed
    if excess <= 1 + 1e-9:
        return
    counted = " + ".join(f"{count} × {share:g}" for share, count in sorted(Counter(shares).items(), reverse=True))
    raise ConfigError(
        f"cluster {spec.name} needs {counted} = {sum(shares):.4g} cores; this machine has {host_cores}, of which {KEPT_CORES:g} are kept for "
        f"dispatcher and client: {allowed:g} are left; expected {_remedy(spec, _rounded_up(excess * spec.time_scale))}"
    )


def _remedy(spec: ClusterSpec, enough: float) -> str:
    """What to do where a time scale of `enough` would do."""
    most, words = min(((_largest_scale(spec, cores), words) for words, cores in _shares(spec)), default=(MAX_TIME_SCALE, ""))
    if enough <= min(most, MAX_TIME_SCALE):
        return f"smaller shares, or everything slower alike: --time-scale {enough:g}"
    why = f": {words} would have less than the {MIN_CORES:g} cores that the kernel gives at least" if most < MAX_TIME_SCALE else ""
    return f"smaller shares or fewer devices. It cannot be made slower by the {enough:g} that it would take{why}"


def _check_least_shares(spec: ClusterSpec) -> None:
    """The kernel does not give less than so much; a large time scale may ask for that."""
    for words, cores in _shares(spec):
        if cores < MIN_CORES * (1 - 1e-9):
            scale = f"with time scale {spec.time_scale:g} " if spec.time_scale != 1 else ""
            most = _largest_scale(spec, cores)
            remedy = f"; the largest possible time scale is {most:g}" if most >= 1 else ""
            raise ConfigError(
                f"cluster {spec.name}: {scale}{words} has {cores:.3g} cores; expected at least {MIN_CORES:g}, what the kernel gives at "
                f"least{remedy}"
            )


def _largest_scale(spec: ClusterSpec, cores: float) -> float:
    """With which the kernel can give a share that is this one with the scale of now. To two decimals, rounded down."""
    return math.floor(cores * spec.time_scale / MIN_CORES * 100 + 1e-6) / 100


def _shares(spec: ClusterSpec) -> Iterator[tuple[str, float]]:
    """All CPU shares that are asked for, and who asks."""
    for device in spec.devices:
        if device.cores is not None:
            yield f"device {device.name}", device.cores
    for number, item in enumerate(spec.events, 1):
        if item.event.cores is not None:
            yield f"event {number}, the slow of {item.event.device} at {item.event.at_s:g} s,", item.event.cores
    for number, drawn in enumerate(spec.random, 1):
        for event in drawn.templates:
            if event.cores is not None:
                yield f"a slow of random {number}", event.cores


def _largest_share(spec: ClusterSpec, device: DeviceSpec) -> float:
    """The device's share, or what an event makes of it."""
    shares = [1.0 if device.cores is None else device.cores]
    shares += [item.event.cores for item in spec.events if item.event.device == device.name and item.event.cores is not None]
    shares += [event.cores for item in spec.random if device.name in item.devices for event in item.templates if event.cores is not None]
    return max(shares)


def _rounded_up(number: float) -> float:
    """To two digits: 2.34 to 2.4, 234 to 240."""
    unit = 10.0 ** (math.floor(math.log10(number)) - 1)
    return round(math.ceil(number / unit - 1e-9) * unit, 6)


# ── a table ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Table:
    """One table of the file, read key by key."""

    def __init__(self, content: object, place: str, known: Collection[str]) -> None:
        if not isinstance(content, dict):
            raise ConfigError(f"{place}: {shown(content)}: expected a table")
        self._content, self.place = content, place
        for key in content:
            if key not in known:
                raise ConfigError(f"{place}: {key}={shown(content[key])}: there is no such key; {hint(key, known)}")

    def __contains__(self, key: str) -> bool:
        return key in self._content

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __getitem__(self, key: str) -> object:
        return self._content[key]

    def get(self, key: str, read: Callable[[object], T], default: D) -> T | D:
        return self.need(key, read) if key in self._content else default

    def need(self, key: str, read: Callable[[object], T]) -> T:
        if key not in self._content:
            raise ConfigError(f"{self.place}: {key} is missing; expected it, as {key} = {_EXAMPLES[key]}")
        try:
            return read(self._content[key])
        except WrongValueError as error:
            self.refuse(key, str(error))

    def refuse(self, key: str, expected: str) -> NoReturn:
        raise ConfigError(f"{self.place}: {key}={shown(self._content[key])}: {expected}")

    def tables(self, key: str, known: Collection[str]) -> list[_Table]:
        """The tables [[key]]; each is a place."""
        found = self._content.get(key, [])
        if not isinstance(found, list):
            self.refuse(key, f"expected tables under [[{key}]], with double brackets")
        return [_Table(content, f"{self.place}: {key} {number}{_name_in(content)}", known) for number, content in enumerate(found, 1)]


def _name_in(content: object) -> str:
    name = content.get("name") if isinstance(content, dict) else None
    return f' ("{name}")' if isinstance(name, str) and name.isprintable() and len(name) <= 40 else ""


def _read_table(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise WrongValueError("expected a table")
    return value


# ── devices, links ───────────────────────────────────────────────────────────────────────────────────────────────────


def _devices(top: _Table) -> dict[str, DeviceSpec]:
    """All devices by their names, in order."""
    devices: dict[str, DeviceSpec] = {}
    for table in top.tables("device", _DEVICE_KEYS):
        for device in _alike(table):
            if device.name in devices:
                table.refuse("name", f"there is a device {device.name} before it; expected another name")
            devices[device.name] = device
        if len(devices) > MAX_DEVICES:
            raise ConfigError(f"{table.place}: with it there are {len(devices)} devices; expected at most {MAX_DEVICES}")
    if not any(device.has_worker for device in devices.values()):
        raise ConfigError(f"{top.place}: no device has a worker; expected at least one [[device]] without worker = false")
    return devices


def _alike(table: _Table) -> list[DeviceSpec]:
    """The device of one table, or all `count` of them."""
    name = table.need("name", read_name)
    up_bytes_per_s, down_bytes_per_s = _rates(table)
    device = DeviceSpec(
        name=name,
        cores=table.get("cores", read_cores, None),
        memory_bytes=table.get("memory", read_memory, None),
        up_bytes_per_s=up_bytes_per_s,
        down_bytes_per_s=down_bytes_per_s,
        latency_s=table.get("latency", read_moment, 0.0),
        jitter_s=table.get("jitter", read_moment, 0.0),
        threads=table.get("threads", read_count(1, 1024), 1),
        accelerator=table.get("accelerator", read_accelerator, "cpu"),
        is_present=table.get("present", read_switch, True),
        has_worker=table.get("worker", read_switch, True),
        board=table.get("board", read_line, ""),
    )
    count = table.get("count", read_count(1, MAX_DEVICES), 1)
    names = [name] if count == 1 else [f"{name}-{number}" for number in range(1, count + 1)]
    if not NAME.fullmatch(names[-1]):
        table.refuse("name", f"expected a shorter name: {names[-1]} has more than 31 letters")
    if name in _TAKEN_NAMES and count == 1:
        table.refuse("name", f"expected another name: {listed(_TAKEN_NAMES)} is a machine of the emulation itself")
    return [replace(device, name=name) for name in names]


def _rates(table: _Table) -> tuple[float | None, float | None]:
    """Up and down, in bytes per second."""
    if "rate" not in table:
        return table.get("up", read_rate, None), table.get("down", read_rate, None)
    for key in ("up", "down"):
        if key in table:
            table.refuse(key, "expected rate, for both directions, or up and down; not both")
    both = table.need("rate", read_rate)
    return both, both


def _dispatcher(top: _Table, devices: dict[str, DeviceSpec]) -> str:
    where = top.get("dispatcher", read_choice([HOST, *devices]), HOST)
    for device in devices.values():
        if not device.has_worker and device.name != where:
            raise ConfigError(
                f"{top.place}: device {device.name}: worker=false: it does not run the dispatcher either, which is on {where}; expected "
                f'dispatcher = "{device.name}", or worker = true'
            )
        if device.name == where and (device.latency_s or device.jitter_s):
            raise ConfigError(
                f"{top.place}: device {device.name}: latency and jitter are added to connections to the dispatcher, which runs on {where} "
                "itself; expected them on the other devices"
            )
    return where


def _links(top: _Table, devices: dict[str, DeviceSpec]) -> Iterator[LinkSpec]:
    seen: dict[frozenset[str], str] = {}
    for table in top.tables("link", _LINK_KEYS):
        between = table.need("between", read_list(read_choice(devices), _EXAMPLES["between"]))
        if len(between) != 2 or between[0] == between[1]:
            table.refuse("between", "expected two different devices")
        pair = frozenset(between)
        if pair in seen:
            table.refuse("between", f"this link is described already, in {seen[pair]}; expected each pair once")
        seen[pair] = table.place.removeprefix(f"{top.place}: ")
        yield LinkSpec(between=(between[0], between[1]), bytes_per_s=table.need("rate", read_rate))


# ── events ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _events(table: _Table, devices: dict[str, DeviceSpec], dispatcher: str, *, has_etcd: bool) -> list[EventSpec]:
    """One for each device that it names; one of etcd."""
    event = _template(table, table.need("kind", _read_kind))
    event = replace(event, at_s=table.need("at", read_moment))
    for_s = table.get("for", read_duration, None)
    if for_s is not None and event.kind not in UNDONE_BY:
        table.refuse("for", f"a {event.kind} is not undone; expected no such key, which is for {listed([*UNDONE_BY])}")
    if _is_of_etcd(table, "kind", [event.kind], has_etcd=has_etcd):
        return [EventSpec(event=replace(event, device=ETCD), for_s=for_s)]
    if "device" in table and "devices" in table:
        table.refuse("devices", "expected device or devices; not both")
    if "devices" not in table and "device" not in table:
        raise ConfigError(f'{table.place}: device is missing; expected device = "pi-1" or devices = ["pi-*"]')
    key = "device" if "device" in table else "devices"
    names = [table.need("device", read_choice(devices))] if key == "device" else _matching(table, devices)
    _check_workers(table, key, names, [event.kind], devices)
    _check_connections(table, key, names, [event.kind], dispatcher)
    return [EventSpec(event=replace(event, device=name), for_s=for_s) for name in names]


def _is_of_etcd(table: _Table, key: str, kinds: Sequence[Kind], *, has_etcd: bool) -> bool:
    """Whether it happens to etcd, of which there has to be one, and not to devices."""
    mine = [kind for kind in kinds if kind in OF_ETCD]
    if not mine:
        return False
    if not has_etcd:
        table.refuse(key, f'a {mine[0]} needs an etcd, which this cluster has not; expected membership = "etcd" at the top of the file')
    if other := [kind for kind in kinds if kind not in OF_ETCD]:
        table.refuse(key, f"a {mine[0]} happens to etcd, a {other[0]} to a device; expected two tables")
    for about in ("device", "devices", "spare"):
        if about in table:
            table.refuse(about, f"a {mine[0]} happens to etcd, of which there is one; expected no such key")
    return True


def _template(table: _Table, kind: Kind) -> Event:
    """The event without moment and device; its parameters are those of its kind."""
    taken = _PARAMETERS.get(kind, ())
    for key in _ALL_PARAMETERS:
        if key in table and key not in taken:
            table.refuse(key, f"a {kind} event does not take it; expected {f'only {listed(taken)}' if taken else 'no parameter'}")
    if kind == Kind.RATE and "rate" not in table and not ("up" in table and "down" in table):
        raise ConfigError(f'{table.place}: rate is missing; expected rate = "5 Mbit/s", or both up and down')
    up_bytes_per_s, down_bytes_per_s = _rates(table)
    return Event(
        at_s=0.0,
        kind=kind,
        device=_TEMPLATE,
        cores=table.need("cores", read_cores) if kind == Kind.SLOW else None,
        up_bytes_per_s=up_bytes_per_s,
        down_bytes_per_s=down_bytes_per_s,
        latency_s=table.need("latency", read_moment) if kind == Kind.DELAY else None,
        jitter_s=table.get("jitter", read_moment, 0.0) if kind == Kind.DELAY else None,
        corrupt_per_mib=table.need("per_mib", read_number(1e-6, MEBIBYTE)) if kind == Kind.CORRUPT else None,
    )


def _random(table: _Table, devices: dict[str, DeviceSpec], dispatcher: str, *, has_etcd: bool) -> RandomSpec:
    """By default for all devices that have a worker and to which all its kinds can happen."""
    templates = _templates(table)
    kinds = [event.kind for event in templates]
    is_of_etcd = _is_of_etcd(table, "kinds", kinds, has_etcd=has_etcd)
    if is_of_etcd:
        names = [ETCD]
    elif "devices" in table:
        names = _matching(table, devices)
        _check_workers(table, "devices", names, kinds, devices)
        _check_connections(table, "devices", names, kinds, dispatcher)
    else:
        left_out = dispatcher if OF_A_CONNECTION.intersection(kinds) else None
        names = [device.name for device in devices.values() if device.has_worker and device.name != left_out]
    spared = 0 if is_of_etcd else table.get("spare", read_count(0, MAX_DEVICES), 1)
    if spared >= len(names):
        left = f"spare={spared}: expected less than the number of devices, {len(names)}"
        raise ConfigError(f"{table.place}: {left}{'' if 'spare' in table else '; 1 is the default'}")
    item = RandomSpec(
        templates=templates,
        devices=tuple(names),
        every_s=table.need("every", read_duration),
        for_s=table.need("for", read_durations),
        from_s=table.get("from", read_moment, 0.0),
        until_s=table.need("until", read_duration),
        spared=spared,
    )
    if item.until_s <= item.from_s:
        table.refuse("until", f"expected a moment after from, {item.from_s:g} s")
    span_s = item.until_s - item.from_s
    if item.for_s[0] >= span_s:
        table.refuse("for", f"expected less than what is between from and until, {span_s:g} s")
    if span_s / item.every_s > MAX_DRAWS:
        table.refuse("every", f"that is {span_s / item.every_s:.3g} events until {item.until_s:g} s; expected at most {MAX_DRAWS}")
    return item


def _templates(table: _Table) -> tuple[Event, ...]:
    """One event for each of `kinds`, which are words or tables."""
    templates = []
    for number, item in enumerate(table.need("kinds", read_list(lambda value: value, _EXAMPLES["kinds"])), 1):
        content = {"kind": item} if isinstance(item, str) else item
        inner = _Table(content, f"{table.place}: kinds {number}", ("kind", *_ALL_PARAMETERS))
        kind = inner.need("kind", _read_kind)
        if kind not in _DRAWN:
            inner.refuse("kind", f"it is what undoes others; expected {listed(_DRAWN)}")
        templates.append(_template(inner, kind))
    return tuple(templates)


def _read_kind(value: object) -> Kind:
    return Kind(read_choice([kind.value for kind in Kind])(value))


def _matching(table: _Table, devices: dict[str, DeviceSpec]) -> list[str]:
    """The devices that one of `devices` names or, with * and ?, means; in their order."""
    patterns = table.need("devices", read_list(read_line, '["pi-*"]'))
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in devices):
            table.refuse("devices", f"no device is called {pattern}; {hint(pattern, [*devices])}")
    return [name for name in devices if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _check_workers(table: _Table, key: str, names: Sequence[str], kinds: Sequence[Kind], devices: dict[str, DeviceSpec]) -> None:
    """What happens to workers happens only where there is one."""
    if affecting := [kind for kind in kinds if kind in _OF_A_WORKER]:
        for name in names:
            if not devices[name].has_worker:
                table.refuse(key, f"{name} has no worker, which a {affecting[0]} is about; expected a device with one")


def _check_connections(table: _Table, key: str, names: Sequence[str], kinds: Sequence[Kind], dispatcher: str) -> None:
    """What happens to connections to the dispatcher happens only to those of other devices."""
    if dispatcher in names and (affecting := [kind for kind in kinds if kind in OF_A_CONNECTION]):
        table.refuse(
            key,
            f"a {affecting[0]} is about connections to the dispatcher, which runs on {dispatcher} itself; expected only the other devices",
        )


# ── settings ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _settings(settings: _Table, door: str, *, has_etcd: bool) -> dict[str, object]:
    """Further flags of a process, checked as it will check them itself."""
    cls = DispatcherConfig if door == "dispatcher" else WorkerConfig
    fields = {item.name.removesuffix("_bytes").removesuffix("_s"): item for item in dataclasses.fields(cls)}
    table = _Table(settings.get(door, _read_table, {}), f"{settings.place}.{door}", fields)
    for key in table:
        if key in _GIVEN[door]:
            instead = _GIVEN[door][key]
            table.refuse(key, "the emulation sets this itself" + (f"; expected {instead} in each [[device]]" if instead else ""))
        if has_etcd and key == "membership":
            table.refuse(key, 'the cluster has an etcd of its own: membership = "etcd" at the top of the file; expected one or the other')
    try:
        values = {fields[key].name: fields[key].metadata["kind"].parse(table[key], key) for key in table}
        if door == "dispatcher":
            DispatcherConfig(**{"state_dir": Path(), **values})
        else:
            WorkerConfig(**{"name": "worker", "memory_limit_bytes": MEBIBYTE, "cache_dir": Path(), **values})
    except ConfigError as error:
        raise ConfigError(f"{table.place}: {error}") from error
    except OverflowError:  # a number of hundreds of digits
        raise ConfigError(
            f"{table.place}: a number is too large; expected at most {MAX_DURATION_S:g} seconds, and sizes that exist"
        ) from None
    return {key: table[key] for key in table}
