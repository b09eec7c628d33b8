"""One timer set again and again: it never rings too late, and seldom in vain."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapt.runtime import alarm as alarm_module
from adapt.runtime.alarm import Alarm


class Handle:
    def __init__(self, moment: float, callback: Callable[[], None]) -> None:
        self.moment, self.callback, self.is_cancelled = moment, callback, False

    def cancel(self) -> None:
        self.is_cancelled = True


class Time:
    """A loop and its clock: time passes when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0
        self.handles: list[Handle] = []
        self.made = 0

    def clock(self) -> float:
        return self.now

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Handle:
        assert delay_s >= 0.0
        self.made += 1
        self.handles.append(Handle(self.now + delay_s, callback))
        return self.handles[-1]

    @property
    def pending(self) -> list[float]:
        return sorted(handle.moment for handle in self.handles if not handle.is_cancelled)

    def pass_to(self, end: float) -> None:
        while self.pending and self.pending[0] <= end:
            handle = min((one for one in self.handles if not one.is_cancelled), key=lambda one: one.moment)
            self.handles.remove(handle)
            self.now = max(self.now, handle.moment)
            handle.callback()
        self.now = max(self.now, end)


@pytest.fixture
def time(monkeypatch):
    time = Time()
    monkeypatch.setattr(alarm_module.asyncio, "get_running_loop", lambda: time)
    return time


def test_it_rings_once_at_its_moment(time):
    rung = []
    alarm = Alarm(lambda: rung.append(time.now), time.clock)
    alarm.set(105.0)
    time.pass_to(104.0)
    assert rung == []
    time.pass_to(200.0)
    assert rung == [105.0] and time.pending == []


def test_a_moment_that_has_passed_rings_at_once(time):
    rung = []
    Alarm(lambda: rung.append(time.now), time.clock).set(3.0)
    time.pass_to(100.0)
    assert rung == [100.0]


def test_an_earlier_moment_replaces_a_later_one_and_a_later_one_leaves_the_earlier(time):
    rung = []
    alarm = Alarm(lambda: rung.append(time.now), time.clock)
    for moment in (109.0, 105.0, 107.0, 105.0):
        alarm.set(moment)
        assert len(time.pending) == 1
    time.pass_to(200.0)
    assert rung == [105.0], "whoever is woken sets it again"


def test_that_nothing_is_due_costs_nothing(time):
    alarm = Alarm(lambda: None, time.clock)
    alarm.set(None)
    assert time.pending == []
    alarm.set(105.0)
    alarm.set(None)
    assert time.pending == [105.0], "it rings in vain"


def test_what_is_cancelled_does_not_ring_and_can_be_set_again(time):
    rung = []
    alarm = Alarm(lambda: rung.append(time.now), time.clock)
    alarm.cancel()
    alarm.set(105.0)
    alarm.cancel()
    time.pass_to(110.0)
    assert rung == []
    alarm.set(115.0)
    time.pass_to(120.0)
    assert rung == [115.0]


def test_it_can_be_set_while_it_rings(time):
    rung = []

    def ring() -> None:
        rung.append(time.now)
        if len(rung) < 4:
            alarm.set(time.now + 2.0)

    alarm = Alarm(ring, time.clock)
    alarm.set(101.0)
    time.pass_to(200.0)
    assert rung == [101.0, 103.0, 105.0, 107.0]


def test_an_error_of_who_is_rung_leaves_it_ready(time):
    def ring() -> None:
        raise KeyError("a bug")

    alarm = Alarm(ring, time.clock)
    alarm.set(101.0)
    with pytest.raises(KeyError):
        time.pass_to(102.0)
    alarm.set(103.0)
    assert time.pending == [103.0]


@given(st.lists(st.tuples(st.integers(0, 3), st.none() | st.integers(0, 6)), max_size=40))
def test_nothing_that_is_due_is_overslept(steps):
    """Whatever is due is known to whoever is rung, as in the dispatcher: it looks, and sets the alarm for what comes next."""
    with pytest.MonkeyPatch.context() as patch:
        time = Time()
        patch.setattr(alarm_module.asyncio, "get_running_loop", lambda: time)
        due: float | None = None
        vain = 0

        def ring() -> None:
            nonlocal due, vain
            assert due is None or time.now <= due, "overslept"
            if due is not None and due <= time.now:
                due = None
            else:
                vain += 1
            alarm.set(due)

        alarm = Alarm(ring, time.clock)
        earlier = 0
        for wait_s, after_s in steps:
            time.pass_to(time.now + wait_s)
            before, due = due, None if after_s is None else time.now + after_s
            earlier += before is not None and (due is None or due > before)
            alarm.set(due)
            assert len(time.pending) <= 1
            assert due is None or time.pending[0] <= due
        time.pass_to(time.now + 100)
        assert due is None and vain <= earlier, "in vain at most once for each moment that was given up"
