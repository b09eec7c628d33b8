"""What is kept of versions that were replaced."""

from __future__ import annotations

import json

import pytest

from adapt.errors import ConfigError
from adapt.protocol.ids import Digest
from adapt.runtime.recipes import CanaryFile, Earlier, ProfiledProgram, Recipe


def recipe(number: int, *, again: int = 0, canaries: bool = False) -> Recipe:
    return Recipe(
        number=number,
        again=again,
        stages=2,
        codec="zfp",
        tolerance=0.1,
        numerics="auto",
        program=ProfiledProgram(Digest(f"p{again or number}"), [0.5, 0.25]),
        canaries=CanaryFile(Digest(f"c{number}"), 0.01) if canaries else None,
    )


def test_a_recipe_is_the_same_after_it_was_written_down():
    for one in (recipe(3), recipe(4, again=1, canaries=True), recipe(3, again=1).repeated(3)):
        assert Recipe.from_plain(json.loads(json.dumps(one.to_plain()))) == one
    with pytest.raises(ConfigError, match="recipe"):
        Recipe.from_plain({"number": 1})


def test_a_few_are_kept_and_the_files_of_the_others_are_given_up():
    earlier = Earlier(2)
    assert earlier.replaced("m", [recipe(1)], recipe(2)) == set()
    assert earlier.replaced("m", [recipe(2)], recipe(3)) == set()
    assert earlier.numbers("m") == [1, 2]
    assert earlier.replaced("m", [recipe(3)], recipe(4)) == {"p1"}
    assert earlier.numbers("m") == [2, 3] and earlier.files == {"p2", "p3"}
    assert earlier.forget("m") == {"p2", "p3"} and earlier.numbers("m") == []


def test_rolling_back_and_back_again_keeps_both():
    earlier = Earlier(2)
    earlier.replaced("m", [recipe(1)], recipe(2))
    assert (earlier.find("m", 1).repeated().number, earlier.find("m", 1).repeated().again) == (0, 1)
    third = recipe(3, again=1)
    earlier.replaced("m", [recipe(2)], third)
    assert earlier.numbers("m") == [2]
    earlier.replaced("m", [third], recipe(4, again=2))
    assert earlier.numbers("m") == [3]
    assert earlier.find("m", 1) == earlier.find("m", 3) == third, "by its own number and by that of the first"
    with pytest.raises(ConfigError, match="version=2: version 3 of m can be rolled back to"):
        earlier.find("m", 2)


def test_none_may_be_kept():
    earlier = Earlier(0)
    assert earlier.replaced("m", [recipe(1, canaries=True)], recipe(2)) == {"p1", "c1"}
    with pytest.raises(ConfigError, match="none is kept"):
        earlier.find("m", 1)


def test_what_has_lost_its_files_is_not_restored():
    earlier, again = Earlier(3), Earlier(3)
    for number in (1, 2, 3):
        earlier.replaced("m", [recipe(number)], recipe(number + 1))
    again.restore(json.loads(json.dumps(earlier.to_plain())), is_there=lambda digest: digest != "p2")
    assert again.numbers("m") == [1, 3]
