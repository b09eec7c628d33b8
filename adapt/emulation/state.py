"""What a machine and its cable are like while mishaps are in force: all of them together, as one state. Pure.

When one of several ends, its machine goes over to what the others make of it at once: to restore all and begin the others again would
let them go for a moment, and what a stall has held back would be gone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from adapt.emulation.description import DeviceSpec, Event, Kind

Direction = Literal["up", "down"]
BOTH: frozenset[Direction] = frozenset(("up", "down"))
LOSES: dict[Kind, frozenset[Direction]] = {Kind.CUT: BOTH, Kind.CUT_UP: frozenset(("up",)), Kind.CUT_DOWN: frozenset(("down",))}


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """One moment of one machine.

    Attributes:
        cores: its CPU share.
        rates: up and down, where they are others than described.
        lost: what is sent this way gets lost.
        latency_s, jitter_s: of each direction.
        is_stalled: its connections stay open, and nothing moves.
        corrupt_per_mib: so many bytes are changed.
    """

    cores: float | None
    rates: tuple[float | None, float | None] | None = None
    lost: frozenset[Direction] = frozenset()
    latency_s: float = 0.0
    jitter_s: float = 0.0
    is_stalled: bool = False
    corrupt_per_mib: float = 0.0


def state_of(device: DeviceSpec, in_force: Iterable[Event] = ()) -> State:
    """What the device is like under these events, which are in the order in which they began: of two of a kind the later counts."""
    kinds = {event.kind: event for event in in_force}
    slow, rate, delay, corrupt = (kinds.get(kind) for kind in (Kind.SLOW, Kind.RATE, Kind.DELAY, Kind.CORRUPT))
    return State(
        cores=device.cores if slow is None else slow.cores,
        rates=None if rate is None else (rate.up_bytes_per_s, rate.down_bytes_per_s),
        lost=frozenset(way for kind, ways in LOSES.items() if kind in kinds for way in ways),
        latency_s=device.latency_s if delay is None else delay.latency_s or 0.0,
        jitter_s=device.jitter_s if delay is None else delay.jitter_s or 0.0,
        is_stalled=Kind.STALL in kinds,
        corrupt_per_mib=0.0 if corrupt is None else corrupt.corrupt_per_mib or 0.0,
    )
