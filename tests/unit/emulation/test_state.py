"""What a machine is like while several mishaps are in force."""

from __future__ import annotations

from adapt.emulation.description import DeviceSpec, Event, Kind
from adapt.emulation.state import BOTH, State, state_of

PI = DeviceSpec(name="pi", cores=0.25, latency_s=0.01, jitter_s=0.002)


def event(kind, **parameters):
    return Event(at_s=1.0, kind=kind, device="pi", **parameters)


def test_without_mishaps_it_is_as_described():
    assert state_of(PI) == State(cores=0.25, latency_s=0.01, jitter_s=0.002)


def test_mishaps_of_different_kinds_add_up():
    cuts = [event(Kind.CUT_UP), event(Kind.STALL), event(Kind.SLOW, cores=0.1), event(Kind.RATE, up_bytes_per_s=5.0)]
    assert state_of(PI, cuts) == State(
        cores=0.1, rates=(5.0, None), lost=frozenset(["up"]), latency_s=0.01, jitter_s=0.002, is_stalled=True
    )
    assert state_of(PI, [event(Kind.CUT_UP), event(Kind.CUT_DOWN)]).lost == state_of(PI, [event(Kind.CUT)]).lost == BOTH


def test_of_two_of_a_kind_the_later_counts():
    late = [event(Kind.DELAY, latency_s=0.5), event(Kind.DELAY, latency_s=0.1, jitter_s=0.2), event(Kind.CORRUPT, corrupt_per_mib=3.0)]
    state = state_of(PI, late)
    assert (state.latency_s, state.jitter_s, state.corrupt_per_mib) == (0.1, 0.2, 3.0)
