"""What happens when: a description's events, written and drawn, as one list with all that undoes them. Pure.

kind                                 undone by
crash, leave                         join
crash-etcd                           start-etcd
stop                                 continue
slow, cut, cut-up, cut-down,
rate, delay, stall, corrupt          restore
reset, restart-etcd                  nothing: it is over at once
join, continue, restore, start-etcd  are what undoes
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from adapt.emulation.description import ClusterSpec, Event, EventSpec, Kind, RandomSpec

UNDONE_BY: dict[Kind, Kind] = {
    Kind.CRASH: Kind.JOIN,
    Kind.LEAVE: Kind.JOIN,
    Kind.CRASH_ETCD: Kind.START_ETCD,
    Kind.STOP: Kind.CONTINUE,
    Kind.SLOW: Kind.RESTORE,
    Kind.CUT: Kind.RESTORE,
    Kind.CUT_UP: Kind.RESTORE,
    Kind.CUT_DOWN: Kind.RESTORE,
    Kind.RATE: Kind.RESTORE,
    Kind.DELAY: Kind.RESTORE,
    Kind.STALL: Kind.RESTORE,
    Kind.CORRUPT: Kind.RESTORE,
}

# What comes first of what has the same moment: what ends at a moment has ended when something else begins.
_UNDOING, _BEGINNING = range(2)


@dataclass(frozen=True, slots=True)
class _Span:
    """A disturbance of a device, from its event to what ends it; infinite if nothing does."""

    event: Event
    end_s: float

    @property
    def undoing(self) -> Kind | None:
        return UNDONE_BY.get(self.event.kind)

    def meets(self, start_s: float, end_s: float) -> bool:
        return self.event.at_s <= end_s and start_s <= self.end_s


def expand(spec: ClusterSpec, *, seed: int | None = None) -> tuple[Event, ...]:
    """All events, by moment; of one moment first what undoes, then in the order of the description. The same seed gives the same events.

    Events of one device may overlap: a restore that ends one says what remains of the others; a join or continue waits for the last one.

    Args:
        seed: instead of the description's.
    """
    written = _written_spans(spec.events)
    spans = [*written, *_absences(spec)]
    ranked = [(item.event.at_s, _BEGINNING, item.event) for item in spec.events]
    for item, span in zip(spec.events, written, strict=True):
        if item.for_s is not None:
            ranked += _undoing(item.event.at_s + item.for_s, span, written)
    for index, template in enumerate(spec.random):
        draw = random.Random(f"adapt emulation: seed {spec.seed if seed is None else seed}, random {index}")
        drawn = list(_drawn_spans(template, draw, spans, spec.random))
        for span in drawn:
            ranked.append((span.event.at_s, _BEGINNING, span.event))
            if span.undoing is not None:
                ranked += _undoing(span.end_s, span, ())
        spans += drawn
    return tuple(event for _, _, event in sorted(ranked, key=lambda item: item[:2]))  # stable: the order of the description


# ── written events ───────────────────────────────────────────────────────────────────────────────────────────────────


def _written_spans(items: Sequence[EventSpec]) -> list[_Span]:
    """For each event its span: to its end, or an earlier event that undoes it."""
    spans = []
    for item in items:
        event, undoing = item.event, UNDONE_BY.get(item.event.kind)
        if undoing is None:
            spans.append(_Span(event, event.at_s))
            continue
        until_s = math.inf if item.for_s is None else event.at_s + item.for_s
        spans.append(_Span(event, min(until_s, _next(items, undoing, event.device, event.at_s))))
    return spans


def _absences(spec: ClusterSpec) -> Iterator[_Span]:
    """The devices that are not there at the start, until they join."""
    for device in spec.devices:
        if device.has_worker and not device.is_present:
            away = Event(at_s=0.0, kind=Kind.LEAVE, device=device.name)
            yield _Span(away, _next(spec.events, Kind.JOIN, device.name, 0.0))


def _next(items: Iterable[EventSpec], kind: Kind, device: str, from_s: float) -> float:
    """When such an event is written next; infinite if never."""
    moments = (item.event.at_s for item in items if item.event.kind == kind and item.event.device == device)
    return min((moment for moment in moments if moment >= from_s), default=math.inf)


def _undoing(at_s: float, ended: _Span, spans: Iterable[_Span]) -> Iterator[tuple[float, int, Event]]:
    """What undoes a disturbance at that moment, given others of its device that may still be in force."""
    undoing, device = UNDONE_BY[ended.event.kind], ended.event.device
    in_force = [
        span
        for span in spans
        if span is not ended and span.event.device == device and span.undoing == undoing and span.event.at_s < at_s < span.end_s
    ]
    if undoing == Kind.RESTORE:
        remaining = tuple(span.event for span in sorted(in_force, key=lambda span: span.event.at_s))
        yield at_s, _UNDOING, Event(at_s=at_s, kind=undoing, device=device, remaining=remaining)
    elif not in_force:
        yield at_s, _UNDOING, Event(at_s=at_s, kind=undoing, device=device)


# ── drawn events ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _drawn_spans(template: RandomSpec, draw: random.Random, others: Sequence[_Span], specs: Sequence[RandomSpec]) -> Iterator[_Span]:
    """Draws of one description. What would last too long, or finds no device that may be disturbed, does not happen."""
    ahead, now_s = list(others), template.from_s
    while (now_s := now_s + draw.expovariate(1.0 / template.every_s)) < template.until_s:
        # always the same number of draws, so that what does not happen changes nothing of what follows
        event, end_s, pick = draw.choice(template.templates), now_s + draw.uniform(*template.for_s), draw.random()
        ahead = [span for span in ahead if span.end_s >= now_s]
        free = _free(template.devices, now_s, end_s, ahead, specs)
        if end_s <= template.until_s and free:
            span = _Span(replace(event, at_s=now_s, device=free[int(pick * len(free))]), end_s)
            ahead.append(span)
            yield span


def _free(devices: Iterable[str], start_s: float, end_s: float, spans: Iterable[_Span], specs: Iterable[RandomSpec]) -> list[str]:
    """Those that are undisturbed all that time, and whose disturbance leaves enough others undisturbed, by every description."""
    disturbed = {span.event.device for span in spans if span.meets(start_s, end_s)}
    full = [spec.devices for spec in specs if len(disturbed.intersection(spec.devices)) >= len(spec.devices) - spec.spared]
    return [device for device in devices if device not in disturbed and not any(device in group for group in full)]
