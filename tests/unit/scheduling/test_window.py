"""The window of a `map`: bounded, in order, and never idle without need."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapt.scheduling.outcome import RETRY_PAUSES_S
from adapt.scheduling.window import ROOM_PER_SLOT, Window

STEPS = st.lists(
    st.tuples(st.sampled_from(["begin", "begin", "answer", "overload", "take", "wait"]), st.integers(0, 99), st.integers(0, 3)),
    max_size=200,
)


class Model:
    """The same, as slowly as it can be said."""

    def __init__(self, slots: int) -> None:
        self.window, self.slots, self.now = Window(slots), slots, 0
        self.states: list[str] = []  # of every item that ever was
        self.paused_until: dict[int, float] = {}
        self.deadlines: list[int] = []

    def those(self, *states: str) -> list[int]:
        return [number for number, state in enumerate(self.states) if state in states]

    def step(self, what: str, choice: int, wait: int) -> None:
        asked = self.those("asked")
        match what:
            case "begin" if self.window.has_room:
                assert self.window.begin() == len(self.states)
                self.states.append("asked")
                self.deadlines.append(self.now + choice)
            case "answer" if asked:
                self.answer(asked[choice % len(asked)])
            case "overload" if asked:
                self.overload(asked[choice % len(asked)], retry_after_s=wait)
            case "take" if self.window.is_ready:
                self.take()
            case "wait":
                self.wait(wait)

    def answer(self, number: int) -> None:
        self.window.answered(number)
        self.states[number] = "answered"

    def overload(self, number: int, *, retry_after_s: int) -> None:
        moment = self.now + max(retry_after_s, RETRY_PAUSES_S[0])
        deadline = self.deadlines[number]
        is_paused = self.window.overloaded(number, retry_after_s=retry_after_s, deadline=deadline, now=self.now)
        assert is_paused == (moment < deadline)
        self.states[number] = "paused" if is_paused else "answered"
        if is_paused:
            self.paused_until[number] = moment

    def take(self) -> None:
        number = self.window.take()
        assert self.states[number] == "answered"
        assert all(state == "taken" for state in self.states[:number])  # in order, and nothing is left out
        self.states[number] = "taken"

    def wait(self, wait: int) -> None:
        self.now += wait
        for number in self.window.take_due(self.now):
            assert self.paused_until.pop(number) <= self.now
            self.states[number] = "asked"
        assert all(moment > self.now for moment in self.paused_until.values())

    def check(self) -> None:
        unanswered, outstanding = len(self.those("asked", "paused")), len(self.those("asked", "paused", "answered"))
        assert self.window.unanswered == unanswered <= self.slots
        assert outstanding <= ROOM_PER_SLOT * self.slots
        assert self.window.has_room == (unanswered < self.slots and outstanding < ROOM_PER_SLOT * self.slots)
        assert self.window.is_filled == (outstanding >= self.slots)
        first = next(iter(self.those("asked", "paused", "answered")), None)
        assert self.window.is_empty == (first is None)
        assert self.window.is_ready == (first is not None and self.states[first] == "answered")
        assert self.window.next_wakeup() == min(self.paused_until.values(), default=None)


@given(st.integers(1, 4), STEPS)
def test_it_keeps_order_and_bounds_and_loses_nothing(slots, steps):
    model = Model(slots)
    for step in steps:
        model.step(*step)
        model.check()
    model.wait(1000)
    for number in model.those("asked"):
        model.answer(number)
    while model.window.is_ready:
        model.take()
    assert model.window.is_empty


def test_a_stalled_first_item_stops_the_others_only_where_memory_ends():
    window = Window(2)
    first = window.begin()
    others = 0
    while window.has_room:
        window.answered(window.begin())
        others += 1
    assert others == ROOM_PER_SLOT * 2 - 1 and window.unanswered == 1 and not window.is_ready
    window.answered(first)
    assert [window.take() for _ in range(others + 1)] == list(range(others + 1))


@pytest.mark.parametrize(("wish_s", "pause_s"), [(math.nan, RETRY_PAUSES_S[0]), (-1.0, RETRY_PAUSES_S[0]), (math.inf, RETRY_PAUSES_S[1])])
def test_an_impossible_pause_is_a_possible_one(wish_s, pause_s):
    window = Window(1)
    assert window.overloaded(window.begin(), retry_after_s=wish_s, deadline=100.0, now=0.0)
    assert window.next_wakeup() == pause_s
