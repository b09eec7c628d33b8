"""Terms grow, whatever is forgotten."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from adapt.scheduling.term import Reign


def test_a_reign_begins_above_what_was_written_down():
    reign = Reign()
    assert reign.begin(0) == reign.term == 1
    assert Reign().begin(41) == 42


def test_a_peer_that_has_met_this_reign_or_an_older_one_changes_nothing():
    reign = Reign()
    reign.begin(4)
    assert not any(reign.hello(met) for met in (0, 4, 5))
    assert reign.term == 5


def test_a_peer_that_has_met_a_later_reign_raises_ours_above_it_once():
    reign = Reign()
    reign.begin(0)
    assert reign.hello(9)
    assert reign.term == 10
    assert not reign.hello(9)
    assert not reign.hello(10)


def test_another_reign_of_the_same_number_is_left_behind():
    """A dispatcher whose memory is wiped before every start would begin at 1 each time."""
    reign = Reign()
    reign.begin(0)
    assert reign.hello(1, has_met_us=False)
    assert reign.term == 2
    assert not reign.hello(1, has_met_us=False)
    assert not reign.hello(2, has_met_us=True)


@given(st.lists(st.tuples(st.integers(0, 60), st.lists(st.integers(0, 2), max_size=5))))
def test_no_peer_meets_two_reigns_under_one_term(reigns):
    """Dispatchers follow each other, each with more or less of a memory; three peers meet them in any order."""
    highest, written = [0, 0, 0], 0
    for memory, visitors in reigns:
        reign, met = Reign(), set()
        reign.begin(min(memory, written))
        for visitor in visitors:
            before = reign.term
            if reign.hello(highest[visitor], has_met_us=visitor in met):
                assert reign.term > before
            assert reign.term > highest[visitor] or visitor in met
            assert reign.term >= before
            highest[visitor] = reign.term
            met.add(visitor)
        written = max(written, reign.term)
