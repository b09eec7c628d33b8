"""The schedule: what is undone when, and what holds for any drawn events."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapt.emulation.description import ClusterSpec, DeviceSpec, Event, EventSpec, Kind, RandomSpec
from adapt.emulation.schedule import UNDONE_BY, expand

NAMES = ("a", "b", "c", "d", "e")
AT_ONCE = (Kind.RESET, Kind.RESTART_ETCD)
DRAWN = (*UNDONE_BY, *AT_ONCE)


def cluster(*events, random=(), absent=(), seed=0):
    devices = tuple(DeviceSpec(name=name, is_present=name not in absent) for name in NAMES)
    return ClusterSpec(name="test", devices=devices, events=events, random=tuple(random), seed=seed)


def written(at_s, kind, device="a", for_s=None, **parameters):
    return EventSpec(event=Event(at_s=at_s, kind=kind, device=device, **parameters), for_s=for_s)


def drawn(*kinds, devices=NAMES, every_s=2.0, for_s=(1.0, 4.0), from_s=0.0, until_s=100.0, spared=1):
    templates = tuple(Event(at_s=0.0, kind=kind, device="") for kind in kinds)
    return RandomSpec(
        templates=templates, devices=tuple(devices), every_s=every_s, for_s=for_s, from_s=from_s, until_s=until_s, spared=spared
    )


def seen(spec):
    return [(event.at_s, event.kind.value, event.device) for event in expand(spec)]


# ── written events ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("kind", "undoing"),
    [(Kind.CRASH, Kind.JOIN), (Kind.LEAVE, Kind.JOIN), (Kind.STOP, Kind.CONTINUE), (Kind.CUT_UP, Kind.RESTORE), (Kind.STALL, Kind.RESTORE)],
)
def test_an_event_is_undone_by_what_undoes_its_kind(kind, undoing):
    assert expand(cluster(written(3, kind, for_s=2))) == (Event(at_s=3, kind=kind, device="a"), Event(at_s=5, kind=undoing, device="a"))


def test_every_kind_is_undone_or_undoes_or_is_over_at_once():
    assert set(Kind) == {*UNDONE_BY, *UNDONE_BY.values(), *AT_ONCE}


def test_an_event_without_end_is_not_undone():
    assert seen(cluster(written(3, Kind.CRASH))) == [(3, "crash", "a")]


def test_the_order_is_by_moment_then_undoing_first_then_as_described():
    spec = cluster(written(5, Kind.CUT, "b"), written(5, Kind.CUT, "a"), written(1, Kind.STOP, "c", for_s=4), written(2, Kind.RESET))
    assert seen(spec) == [(1, "stop", "c"), (2, "reset", "a"), (5, "continue", "c"), (5, "cut", "b"), (5, "cut", "a")]


def test_a_restore_says_what_remains_in_force():
    spec = cluster(written(1, Kind.SLOW, cores=0.1), written(2, Kind.CUT, for_s=3), written(4, Kind.STALL, "b", for_s=2))
    assert seen(spec) == [(1, "slow", "a"), (2, "cut", "a"), (4, "stall", "b"), (5, "restore", "a"), (6, "restore", "b")]
    assert [event.remaining for event in expand(spec)] == [(), (), (), (spec.events[0].event,), ()]


def test_what_a_written_restore_has_ended_does_not_begin_again():
    spec = cluster(written(1, Kind.SLOW, cores=0.1), written(2, Kind.CUT, for_s=3), written(3, Kind.RESTORE))
    assert seen(spec) == [(1, "slow", "a"), (2, "cut", "a"), (3, "restore", "a"), (5, "restore", "a")]


def test_a_device_comes_back_when_nothing_keeps_it_away():
    spec = cluster(
        written(1, Kind.STOP, for_s=9), written(2, Kind.STOP, for_s=3), written(3, Kind.CRASH, "b", for_s=2), written(4, Kind.LEAVE, "b")
    )
    assert seen(spec) == [(1, "stop", "a"), (2, "stop", "a"), (3, "crash", "b"), (4, "leave", "b"), (10, "continue", "a")]


# ── drawn events ─────────────────────────────────────────────────────────────────────────────────────────────────────

SPECS = st.builds(
    lambda kinds, devices, every_s, least_s, more_s, from_s, span_s, spared: drawn(
        *kinds,
        devices=devices,
        every_s=every_s,
        for_s=(least_s, least_s + more_s),
        from_s=from_s,
        until_s=from_s + span_s,
        spared=min(spared, len(devices) - 1),
    ),
    st.lists(st.sampled_from(DRAWN), min_size=1, max_size=4),
    st.lists(st.sampled_from(NAMES), min_size=1, unique=True),
    st.floats(0.1, 10),
    st.floats(0.01, 5),
    st.floats(0, 5),
    st.floats(0, 20),
    st.floats(1, 60),
    st.integers(0, 4),
)


@given(st.lists(SPECS, min_size=1, max_size=3), st.integers(0, 2**63))
def test_drawn_events_disturb_one_device_once_at_a_time_spare_enough_and_are_undone(specs, seed):
    events = expand(cluster(random=specs), seed=seed)
    assert events == expand(cluster(random=specs, seed=seed)), "the same seed, the same events"
    disturbed: dict[str, Event] = {}
    now_s = 0.0
    for event in events:
        assert event.at_s >= now_s
        now_s = event.at_s
        if event.kind in UNDONE_BY.values():
            begun = disturbed.pop(event.device)  # what was not disturbed is not undone
            assert UNDONE_BY[begun.kind] == event.kind
            lasted_s = event.at_s - begun.at_s
            assert any(
                begun.device in spec.devices
                and begun.kind in [template.kind for template in spec.templates]
                and spec.from_s <= begun.at_s < event.at_s <= spec.until_s
                and spec.for_s[0] - 1e-9 <= lasted_s <= spec.for_s[1] + 1e-9
                for spec in specs
            ), "some description allows it"
        elif event.kind in UNDONE_BY:
            assert event.device not in disturbed
            disturbed[event.device] = event
            for spec in specs:
                if event.device in spec.devices:
                    assert len(set(spec.devices) - disturbed.keys()) >= spec.spared
        else:
            assert event.kind in AT_ONCE
            assert event.device not in disturbed
    assert not disturbed


def test_another_seed_gives_other_events():
    spec = cluster(random=[drawn(Kind.CRASH, Kind.STOP)])
    assert len({expand(spec, seed=seed) for seed in range(10)}) == 10
    assert expand(spec, seed=3) == expand(replace(spec, seed=3))
    assert expand(spec, seed=0) == expand(spec)


def test_the_events_of_a_seed_stay_what_they_are():
    """A recorded seed must replay on another machine, and with another Python: if this changes, so does every published run."""
    events = expand(cluster(random=[drawn(Kind.CRASH, Kind.STOP, until_s=12.0)], seed=7))
    assert [(round(event.at_s, 6), event.kind.value, event.device) for event in events] == [
        (1.516814, "crash", "d"),
        (3.320407, "crash", "e"),
        (5.37153, "join", "e"),
        (5.407965, "join", "d"),
        (5.798884, "crash", "a"),
        (6.886033, "stop", "d"),
        (7.248802, "stop", "c"),
        (8.013524, "join", "a"),
        (8.174394, "continue", "d"),
        (10.707791, "continue", "c"),
    ]


def test_the_descriptions_draw_independently():
    first, second = drawn(Kind.CRASH, devices="ab", spared=0), drawn(Kind.STOP, devices="cd", spared=0)
    alone = [event for event in expand(cluster(random=[first])) if event.device in "ab"]
    both = [event for event in expand(cluster(random=[first, second])) if event.device in "ab"]
    assert alone == both


def test_the_mean_gap_is_as_described():
    spec = cluster(random=[drawn(Kind.RESET, every_s=5.0, for_s=(0.01, 0.01), until_s=20_000.0)])
    assert len(expand(spec)) == pytest.approx(4000, rel=0.1)


def test_all_kinds_and_devices_take_part():
    events = expand(cluster(random=[drawn(*DRAWN, until_s=2000.0)]))
    assert {event.kind for event in events} == set(Kind)
    assert {event.device for event in events} == set(NAMES)


def test_a_template_keeps_its_parameters():
    template = Event(at_s=0.0, kind=Kind.SLOW, device="", cores=0.05)
    events = expand(cluster(random=[replace(drawn(Kind.SLOW), templates=(template,))]))
    assert {event.cores for event in events if event.kind == Kind.SLOW} == {0.05}


def test_drawn_events_keep_away_from_what_written_ones_disturb():
    away = [
        written(0, Kind.LEAVE, "a"),
        written(20, Kind.CRASH, "b", for_s=40),
        written(50, Kind.STOP, "c"),
        written(70, Kind.CONTINUE, "c"),
    ]
    spec = cluster(*away, absent=["d"], random=[drawn(*DRAWN, every_s=0.5, spared=0)])
    spec = replace(spec, events=(*spec.events, written(30, Kind.JOIN, "d")))
    mine = {item.event for item in spec.events} | {Event(at_s=60, kind=Kind.JOIN, device="b")}
    others = [event for event in expand(spec) if event not in mine]
    for name, from_s, until_s in [("a", 0, 101), ("b", 20, 60), ("c", 50, 70), ("d", 0, 30)]:
        moments = [event.at_s for event in others if event.device == name]
        assert not [moment for moment in moments if from_s <= moment <= until_s]
        assert bool(moments) == (name != "a")
        before = [event.kind for event in others if event.device == name and event.at_s < from_s and event.kind not in AT_ONCE]
        assert not before or before[-1] not in UNDONE_BY, "undone before the written one begins"


def test_a_spared_device_is_one_that_nothing_disturbs():
    spec = cluster(*[written(0, Kind.CUT, name) for name in "abcd"], random=[drawn(Kind.CRASH, every_s=0.5)])
    assert len(expand(spec)) == 4, "the fifth is the spared one"
