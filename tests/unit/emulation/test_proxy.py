"""Which bytes a link changes: the same ones for the same seed, and as many as asked for."""

from __future__ import annotations

import math
from itertools import islice, takewhile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapt.emulation.proxy import DIRECTIONS, MEBIBYTE, corruptions

STREAMS = st.tuples(st.integers(0, 2**32), st.sampled_from(["pi-1", "far"]), st.sampled_from(DIRECTIONS), st.integers(0, 1000))
RATES = st.floats(1, MEBIBYTE)


@given(STREAMS, RATES)
def test_one_stream_is_always_changed_in_the_same_way_and_no_byte_twice(stream, per_mib):
    changes = list(islice(corruptions(*stream, per_mib), 50))
    assert changes == list(islice(corruptions(*stream, per_mib), 50))
    offsets = [offset for offset, _ in changes]
    assert offsets == sorted(set(offsets)) and offsets[0] >= 0
    assert all(1 <= mask <= 255 for _, mask in changes)


@given(STREAMS, RATES)
def test_so_many_bytes_are_changed_as_asked_for(stream, per_mib):
    share = per_mib / MEBIBYTE
    size = round(2000 / share)
    found = sum(1 for _ in takewhile(lambda change: change[0] < size, corruptions(*stream, per_mib)))
    assert abs(found - size * share) <= 7 * math.sqrt(size * share * (1 - share)) + 1  # one failure in 10^11


def test_each_stream_is_changed_in_its_own_way():
    streams = [(1, "a", "up", 0), (2, "a", "up", 0), (1, "b", "up", 0), (1, "a", "down", 0), (1, "a", "up", 1)]
    assert len({tuple(islice(corruptions(*stream, 10.0), 20)) for stream in streams}) == len(streams)


@pytest.mark.parametrize("per_mib", [0.0, 1e-300, 5e-324])
def test_nothing_is_changed_where_nothing_is_asked_for(per_mib):
    assert list(corruptions(1, "a", "up", 0, per_mib)) == []


def test_all_bytes_can_be_changed():
    assert [offset for offset, _ in islice(corruptions(1, "a", "up", 0, MEBIBYTE), 100)] == list(range(100))
