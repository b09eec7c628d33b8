"""Virtual time, and processes that stop and go on."""

from __future__ import annotations

from random import Random

import pytest

from adapt.simulation.inspector import Violation
from adapt.simulation.timeline import LATE_S, Process, Timeline


class Sleeper(Process):
    def __init__(self, timeline: Timeline, *, rate: float = 1.0, offset: float = 0.0, seed: int = 0) -> None:
        super().__init__("sleeper", timeline, Random(seed), rate=rate, offset=offset)
        self.seen: list[object] = []

    def woken(self) -> None:
        self.seen.append(("woken", self.clock()))


def test_things_happen_in_order_and_those_of_one_moment_in_an_order_of_the_seed():
    def order(seed: int) -> list[int]:
        timeline, seen = Timeline(Random(seed)), []
        for number in range(8):
            timeline.at(1.0 if number < 7 else 0.5, seen.append, number)
        timeline.run_until(2.0)
        assert timeline.now == 2.0 and timeline.events == 8
        return seen

    assert order(1) == order(1) and order(1)[0] == 7
    assert len({tuple(order(seed)) for seed in range(20)}) > 10


def test_a_grain_makes_moments_equal_and_none_earlier():
    timeline, seen = Timeline(Random(0), grain_s=0.5), []
    for moment in (0.1, 0.4, 0.5, 0.6):
        timeline.at(moment, lambda asked: seen.append((timeline.now, asked)), moment)
    timeline.run_until(9.0)
    assert {moment for moment, _ in seen} == {0.5, 1.0} and all(moment >= asked for moment, asked in seen)


def test_whoever_goes_round_in_circles_is_found():
    timeline = Timeline(Random(0))

    def again() -> None:
        timeline.after(1e-7, again)

    again()
    with pytest.raises(Violation, match="circles"):
        timeline.run_until(1.0)


def test_an_alarm_rings_just_after_its_moment_by_a_clock_that_drifts():
    timeline = Timeline(Random(0))
    sleeper = Sleeper(timeline, rate=1.02, offset=500.0)
    sleeper.set_alarm(510.2)
    sleeper.set_alarm(505.1)
    timeline.run_until(4.9)
    assert sleeper.seen == []
    timeline.run_until(99.0)
    ((_, moment),) = sleeper.seen
    assert 505.1 <= moment <= 505.1 + 2 * LATE_S, "the later one was set in vain: who is woken sets it again"


def test_what_comes_while_it_stands_still_waits_in_order_within_each_source():
    merged = set()
    for seed in range(30):
        timeline = Timeline(Random(0))
        sleeper = Sleeper(timeline, seed=seed)
        sleeper.stop(is_frozen=True)
        for number in range(4):
            for source in ("a", "b"):
                sleeper.hand(source, sleeper.seen.append, f"{source}{number}")
        timeline.run_until(3.0)
        assert sleeper.seen == [] and sleeper.is_frozen
        sleeper.go_on()
        for source in ("a", "b"):
            assert [item for item in sleeper.seen if item[0] == source] == [f"{source}{number}" for number in range(4)]
        assert sleeper.stopped_s == 3.0 and not sleeper.is_stopped
        merged.add(tuple(sleeper.seen))
    assert len(merged) > 10


def test_an_alarm_that_would_have_rung_meanwhile_rings_when_it_goes_on():
    timeline = Timeline(Random(0))
    sleeper = Sleeper(timeline)
    sleeper.set_alarm(1.0)
    sleeper.stop(is_frozen=False)
    timeline.run_until(2.0)
    sleeper.go_on()
    assert ("woken", 2.0) in sleeper.seen


def test_what_was_meant_for_an_earlier_life_is_void():
    timeline = Timeline(Random(0))
    sleeper = Sleeper(timeline)
    sleeper.later(1.0, sleeper.seen.append, "old")
    sleeper.set_alarm(1.0)
    sleeper.end_life()
    sleeper.hand("a", sleeper.seen.append, "while dead")
    sleeper.begin_life()
    sleeper.later(1.5, sleeper.seen.append, "new")
    timeline.run_until(5.0)
    assert sleeper.seen == ["new"]
