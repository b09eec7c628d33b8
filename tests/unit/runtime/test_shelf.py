"""Which files are deployed when: clock and files are made up."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from adapt.runtime.shelf import Shelf, Stamp, State

SETTLE_S = 1.0


def stamp(number: int) -> Stamp:
    return Stamp(number, number, 1)


def test_a_file_is_taken_when_it_has_not_changed_for_a_while():
    shelf = Shelf(settle_s=SETTLE_S)
    assert shelf.look({"m": stamp(1)}, 0.0) == []
    assert shelf.look({"m": stamp(2)}, 0.75) == [], "it grows"
    assert shelf.look({"m": stamp(2)}, 1.5) == []
    assert shelf.look({"m": stamp(2)}, 1.75) == ["m"]
    assert shelf.look({"m": stamp(2)}, 9.0) == [], "it is under way"
    shelf.deployed("m", stamp(2), 1)
    assert shelf.look({"m": stamp(2)}, 10.0) == []
    assert shelf.look({"m": stamp(3)}, 11.0) == [] and shelf.files["m"].version == 1
    assert shelf.look({"m": stamp(3)}, 12.0) == ["m"]


def test_what_changes_while_it_is_deployed_is_deployed_again():
    shelf = Shelf(settle_s=SETTLE_S)
    shelf.look({"m": stamp(1)}, 0.0)
    assert shelf.look({"m": stamp(1)}, 1.0) == ["m"]
    shelf.look({"m": stamp(2)}, 2.0)
    shelf.deployed("m", stamp(1), 1)
    assert shelf.look({"m": stamp(2)}, 2.5) == [] and shelf.look({"m": stamp(2)}, 3.0) == ["m"]


def test_a_broken_file_is_tried_again_when_it_changes_and_one_without_workers_after_a_while():
    shelf = Shelf(settle_s=SETTLE_S)
    there = {"a": stamp(1), "b": stamp(1)}
    shelf.look(there, 0.0)
    assert shelf.look(there, 1.0) == ["a", "b"]
    shelf.failed("a", stamp(1), "broken")
    shelf.failed("b", stamp(1), "no workers", again_at=11.0)
    assert shelf.look(there, 10.0) == [] and shelf.files["a"].reason == "broken"
    assert shelf.look(there, 11.0) == ["b"]
    shelf.look({**there, "a": stamp(2)}, 12.0)
    assert shelf.look({**there, "a": stamp(2)}, 13.0) == ["a"]


def test_what_is_gone_is_forgotten():
    shelf = Shelf(settle_s=SETTLE_S)
    shelf.look({"m": stamp(1)}, 0.0)
    shelf.look({"m": stamp(1)}, 1.0)
    shelf.look({}, 2.0)
    shelf.deployed("m", stamp(1), 1)  # it had been under way
    shelf.failed("m", stamp(1), "or not")
    assert shelf.files == {}


@given(st.lists(st.tuples(st.integers(0, 3), st.none() | st.integers(1, 3), st.sampled_from(["", "deployed", "failed"])), max_size=40))
def test_only_what_has_settled_is_taken_and_never_twice_at_once(steps):
    shelf, now, seen, since, taken = Shelf(settle_s=2), 0, None, 0, None
    for wait, number, outcome in steps:
        now += wait
        there = {} if number is None else {"m": stamp(number)}
        if there.get("m") != seen:
            seen, since = there.get("m"), now
        due = shelf.look(there, now)
        if due:
            assert taken is None or "m" not in shelf.files or shelf.files["m"].state is State.DEPLOYING
            assert now - since >= 2
            taken = seen
        if "m" not in shelf.files:
            taken = None
        if taken is not None and outcome == "deployed":
            shelf.deployed("m", taken, 1)
            taken = None
        elif taken is not None and outcome == "failed":
            shelf.failed("m", taken, "so")
            taken = None
