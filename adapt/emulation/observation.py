"""What an emulated cluster was seen to do: CPU, memory and bytes of each device over time, and the events that happened to them.

Moments are seconds since the observer was told to count, durations and rates are measured: with a time scale they are as slow as the
cluster is. What a device has used is kept as sums, and rates are made of them at the end, so a sample that is left out falsifies none.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from adapt.clock import Clock
from adapt.emulation.description import ClusterSpec, DeviceSpec
from adapt.errors import AdaptError

log = logging.getLogger(__name__)

KILLED_BY_MEMORY, ENDED = "killed-by-memory", "ended"
MAX_ROWS = 2048  # of readings of all devices; then every second one goes: 8 minutes at 0.25 s, 17 at 0.5 s, ...


@dataclass(frozen=True, slots=True)
class Reading:
    """What a device has used until now: CPU time and bytes since its beginning, memory at this moment."""

    cpu_s: float
    memory_bytes: int
    sent_bytes: int
    received_bytes: int
    is_alive: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A device in the `span_s` seconds before `at_s`: means of CPU and rates, the most memory.

    Attributes:
        cores: CPU used, in cores of this machine.
        up_bytes_per_s, down_bytes_per_s: sent and received by the device.
        is_alive: its worker lived whenever this was read.
    """

    at_s: float
    span_s: float
    cores: float
    memory_bytes: int
    up_bytes_per_s: float
    down_bytes_per_s: float
    is_alive: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRecord:
    """One event: `at_s`, `kind`, `device` and `detail` as planned, which is the seed's doing; the rest as measured.

    Attributes:
        began_s: when it really began.
        took_s: how long it took to bring about.
        error: why it failed; None if it did not.
        is_planned: false for what nobody ordered: KILLED_BY_MEMORY, ENDED. Then `at_s` is when it was seen.
    """

    at_s: float
    kind: str
    device: str
    detail: dict[str, Any] = field(default_factory=dict)
    began_s: float
    took_s: float
    error: str | None = None
    is_planned: bool = True


@dataclass(frozen=True, slots=True)
class Mishap:
    """What has happened and nobody has ordered: to a device, or to the dispatcher."""

    kind: str
    device: str
    detail: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What has to be known of a cluster to judge what it was seen to do. Shares and rates of `devices` hold only where it is isolated."""

    cluster: str
    seed: int
    time_scale: float
    is_isolated: bool
    devices: tuple[DeviceSpec, ...]

    @classmethod
    def of(cls, spec: ClusterSpec, *, is_isolated: bool) -> Self:
        return cls(cluster=spec.name, seed=spec.seed, time_scale=spec.time_scale, is_isolated=is_isolated, devices=spec.devices)

    def cores(self, device: str) -> float | None:
        """The CPU share that a device was held to; None: it had no limit."""
        shares = {spec.name: spec.cores for spec in self.devices}
        return shares.get(device) if self.is_isolated else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """All that was seen, by device and moment."""

    facts: Facts
    samples: Mapping[str, tuple[Sample, ...]]
    events: tuple[EventRecord, ...]


class Track:
    """Readings over time in bounded number. Pure.

    Args:
        limit: of moments; when there are more, neighbours become one, and from then on `stride` is twice what it was.

    Attributes:
        stride: how many times rarer than at first it is enough to add.
    """

    def __init__(self, limit: int = MAX_ROWS) -> None:
        self._limit, self.stride = limit, 1
        self._rows: list[tuple[float, Mapping[str, Reading]]] = []

    @property
    def last_s(self) -> float | None:
        return self._rows[-1][0] if self._rows else None

    def add(self, at_s: float, readings: Mapping[str, Reading]) -> None:
        """`at_s` is later than the one before."""
        self._rows.append((at_s, dict(readings)))
        if len(self._rows) > self._limit:
            self._halve()

    def samples(self) -> dict[str, tuple[Sample, ...]]:
        """Of each device, from its second reading on: the first is what the others are counted from."""
        found: dict[str, list[Sample]] = defaultdict(list)
        before: dict[str, tuple[float, Reading]] = {}
        for at_s, readings in self._rows:
            for name, reading in readings.items():
                if name in before:
                    found[name].append(_between(*before[name], at_s, reading))
                before[name] = (at_s, reading)
        return {name: tuple(found[name]) for name in before}

    def _halve(self) -> None:
        """The first stays: it is where counting began."""
        first, *rest = self._rows
        pairs = zip(rest[::2], rest[1::2], strict=False)
        odd = rest[-1:] if len(rest) % 2 else []
        self._rows = [first, *((later, _joined(a, b)) for (_, a), (later, b) in pairs), *odd]
        self.stride *= 2


def _between(earlier_s: float, earlier: Reading, at_s: float, reading: Reading) -> Sample:
    span_s = at_s - earlier_s

    def rate(before: float, now: float) -> float:
        return max(now - before, 0) / span_s  # a counter that began anew says nothing

    return Sample(
        at_s=at_s,
        span_s=span_s,
        cores=rate(earlier.cpu_s, reading.cpu_s),
        memory_bytes=reading.memory_bytes,
        up_bytes_per_s=rate(earlier.sent_bytes, reading.sent_bytes),
        down_bytes_per_s=rate(earlier.received_bytes, reading.received_bytes),
        is_alive=reading.is_alive,
    )


def _joined(earlier: Mapping[str, Reading], later: Mapping[str, Reading]) -> dict[str, Reading]:
    """Sums are those of the later one; a peak of memory and a death are not forgotten."""
    joined = {**earlier, **later}
    for name in earlier.keys() & later.keys():
        a, b = earlier[name], later[name]
        joined[name] = replace(b, memory_bytes=max(a.memory_bytes, b.memory_bytes), is_alive=a.is_alive and b.is_alive)
    return joined


class Observer:
    """Reads all devices again and again, in a thread of its own; for hours, too, at a growing pause. For several threads.

    Args:
        read: what each device has used until now. If it fails with AdaptError or OSError, that moment is left out.
        facts: of the cluster.
        every_s: pause between two samples; one that is late does not make the next ones hurry.
        look: what has happened, without being ordered, since it was called last.
    """

    def __init__(
        self,
        read: Callable[[], Mapping[str, Reading]],
        *,
        facts: Facts,
        clock: Clock,
        every_s: float = 0.25,
        look: Callable[[], Iterable[Mishap]] = tuple,
    ) -> None:
        self._read, self._facts, self._clock, self._every_s, self._look = read, facts, clock, every_s, look
        self._track, self._events = Track(), list[EventRecord | tuple[float, Mishap]]()  # a mishap with its moment of the clock
        self._zero = clock()
        self._lock, self._is_over = threading.Lock(), threading.Event()
        self._has_failed = False
        self._sample()
        self._thread = threading.Thread(target=self._run, name="adapt-observer", daemon=True)
        self._thread.start()

    def count_from(self, moment: float) -> None:
        """That moment of the clock is 0 s, as when the schedule begins; until then it is when the observer was made."""
        with self._lock:
            self._zero = moment

    def note(self, event: EventRecord) -> None:
        with self._lock:
            self._events.append(event)

    def observation(self) -> Observation:
        """What has been seen so far."""
        if not self._is_over.is_set():
            self._sample()
        with self._lock:
            samples = {name: self._counted(seen) for name, seen in self._track.samples().items()}
            events = tuple(event if isinstance(event, EventRecord) else self._recorded(*event) for event in self._events)
            return Observation(facts=self._facts, samples=samples, events=events)

    def close(self) -> Observation:
        """Look a last time and end. Closing twice gives the same again."""
        if not self._is_over.is_set():
            self._sample()
            self._is_over.set()
            if self._thread is not threading.current_thread():  # a cluster may be forgotten anywhere
                self._thread.join()
        return self.observation()

    def _recorded(self, moment: float, seen: Mishap) -> EventRecord:
        at_s = moment - self._zero
        return EventRecord(at_s=at_s, kind=seen.kind, device=seen.device, detail=seen.detail, began_s=at_s, took_s=0.0, is_planned=False)

    def _counted(self, samples: tuple[Sample, ...]) -> tuple[Sample, ...]:
        return tuple(replace(sample, at_s=sample.at_s - self._zero) for sample in samples)

    def _run(self) -> None:
        due = self._clock()
        while True:
            pause_s = self._every_s * self._track.stride
            due += pause_s
            if (late_s := self._clock() - due) > 0:
                due += (late_s // pause_s + 1) * pause_s  # on the old grid, later: what was missed is left out
            if self._is_over.wait(due - self._clock()):
                return
            self._sample()

    def _sample(self) -> None:
        with self._lock:
            now, last = self._clock(), self._track.last_s
            try:
                self._events += [(now, seen) for seen in self._look()]
                if last is None or now - last >= self._every_s / 4:  # a rate over a shorter time would be noise
                    self._track.add(now, self._read())
            except (AdaptError, OSError) as error:
                if not self._has_failed:
                    log.warning("devices cannot be read; the moment is left out", extra={"reason": str(error)})
                self._has_failed = True
