"""The deadline heap against a dictionary that is searched from end to end."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from adapt.scheduling import deadlines as deadlines_module
from adapt.scheduling.deadlines import Deadlines

KEYS = st.sampled_from("abcd")
STEPS = st.lists(
    st.tuples(st.just("set"), KEYS, st.integers(0, 9))
    | st.tuples(st.just("clear"), KEYS, st.just(0))
    | st.tuples(st.just("wait"), st.just(""), st.integers(0, 4)),
    max_size=60,
)


@given(STEPS)
def test_what_is_due_is_taken_once_in_order_and_nothing_else(steps):
    deadlines: Deadlines[str] = Deadlines()
    moments: dict[str, tuple[int, int]] = {}  # key -> its moment, and how many were set before it
    now = 0
    for count, (step, key, number) in enumerate(steps):
        match step:
            case "set":
                deadlines.set(key, now + number)
                moments[key] = (now + number, count)
            case "clear":
                deadlines.clear(key)
                moments.pop(key, None)
            case _:
                now += number
                due = sorted((set_for, key) for key, set_for in moments.items() if set_for[0] <= now)
                assert deadlines.take_due(now) == [key for _, key in due]
                for _, key in due:
                    del moments[key]
        assert len(deadlines) == len(moments)
        assert all((key in deadlines) == (key in moments) for key in "abcd")
        assert deadlines.next_wakeup() == min((moment for moment, _ in moments.values()), default=None)


def test_what_is_due_now_is_due_and_a_tie_keeps_its_order():
    deadlines: Deadlines[str] = Deadlines()
    for key in ("late", "second", "first"):
        deadlines.set(key, 5)
    deadlines.set("second", 5)  # set anew: it goes behind
    deadlines.set("late", 6)
    assert deadlines.take_due(4) == []
    assert deadlines.take_due(5) == ["first", "second"]
    assert deadlines.take_due(5) == []
    assert deadlines.next_wakeup() == 6


def test_keys_that_cannot_be_compared_may_tie():
    deadlines: Deadlines[object] = Deadlines()
    keys = [object(), object(), ("a", 1), b"bytes"]
    for key in keys:
        deadlines.set(key, 1)
    assert deadlines.take_due(1) == keys


@given(st.integers(1, 5), st.integers(100, 400))
def test_moving_one_moment_often_fills_no_memory(waiting, moves):
    deadlines: Deadlines[int] = Deadlines()
    for key in range(waiting):
        deadlines.set(key, 1000 + key)
    for move in range(moves):
        deadlines.set(0, 10_000 - move)
        assert len(deadlines._heap) <= 2 * waiting + deadlines_module._SLACK
    assert deadlines.take_due(20_000) == [*range(1, waiting), 0]


@given(st.dictionaries(st.integers(0, 9), st.integers(0, 50)), st.integers(1, 20))
def test_some_can_be_postponed(moments, by_s):
    deadlines: Deadlines[int] = Deadlines()
    for key, moment in moments.items():
        deadlines.set(key, -1)  # an earlier moment, which counts no more
        deadlines.set(key, moment)
    deadlines.postpone(by_s, concerns=lambda key: key % 2 == 0)
    later = {key: moment + by_s * (key % 2 == 0) for key, moment in moments.items()}
    assert deadlines.next_wakeup() == min(later.values(), default=None)
    for now in range(80):
        assert sorted(deadlines.take_due(now)) == sorted(key for key, moment in later.items() if moment == now)
