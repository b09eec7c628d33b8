from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapt.errors import PlanError
from adapt.planning.partition import partition, stage_costs_s
from adapt.planning.profiles import CutPoint


@st.composite
def problems(draw):
    costs = draw(st.lists(st.integers(0, 6), min_size=1, max_size=9))  # small whole numbers, so that ties happen
    positions = draw(st.sets(st.integers(1, len(costs) - 1))) if len(costs) > 1 else set()
    cuts = [CutPoint(position, draw(st.integers(0, 5))) for position in sorted(positions)]
    stages = draw(st.integers(1, len(cuts) + 1))
    return costs, cuts, stages, draw(st.sampled_from([0.0, 1.0]))


def judged(costs, chosen, byte_s):
    """What a partition is compared by: slowest stage, bytes in all, positions."""
    positions, crossing = [cut.position for cut in chosen], [0, *(cut.crossing_bytes for cut in chosen), 0]
    stages = zip(stage_costs_s(costs, positions), pairwise(crossing), strict=True)
    slowest = max(cost + byte_s * (comes + leaves) for cost, (comes, leaves) in stages)
    return slowest, sum(crossing), positions


@given(problems())
def test_a_partition_is_as_good_as_the_best_of_all(problem):
    costs, cuts, stages, byte_s = problem
    best = min(judged(costs, chosen, byte_s) for chosen in combinations(cuts, stages - 1))
    assert partition(costs, cuts, stages, byte_s=byte_s) == best[2]


def test_too_many_stages_name_the_largest_number():
    with pytest.raises(PlanError, match="at most 2"):
        partition([1.0, 1.0, 1.0], [CutPoint(1, 4)], 3)


def test_fewer_than_one_stage_is_refused():
    with pytest.raises(PlanError, match="at least 1"):
        partition([1.0], [], 0)


@pytest.mark.parametrize("positions", [[0], [3], [2, 1], [1, 1]])
def test_cuts_outside_or_out_of_order_are_a_mistake_of_the_caller(positions):
    with pytest.raises(ValueError, match="rise strictly"):
        partition([1.0, 1.0, 1.0], [CutPoint(position, 0) for position in positions], 2)


@pytest.mark.parametrize("cost", [-1.0, float("nan"), float("inf")])
def test_costs_that_are_no_durations_are_a_mistake_of_the_caller(cost):
    with pytest.raises(ValueError, match="finite"):
        partition([1.0, cost], [CutPoint(1, 0)], 2)


def test_what_workers_do_with_bytes_moves_the_cut_to_fewer():
    cuts = [CutPoint(1, 10), CutPoint(2, 1_000)]
    assert partition([1.0, 2.0, 3.0], cuts, 2) == [2]
    assert partition([1.0, 2.0, 3.0], cuts, 2, byte_s=0.001) == [2]
    assert partition([1.0, 2.0, 3.0], cuts, 2, byte_s=0.01) == [1]


def test_what_is_about_as_fast_is_chosen_by_its_bytes():
    costs_s, cuts = [1.0, 0.1, 0.95], [CutPoint(1, 500), CutPoint(2, 10)]  # stages of 1.0 and 1.05, or of 1.1 and 0.95
    assert partition(costs_s, cuts, 2) == partition(costs_s, cuts, 2, slack=0.04) == [1]
    assert partition(costs_s, cuts, 2, slack=0.05) == [2]
    with pytest.raises(ValueError, match="slack"):
        partition(costs_s, cuts, 2, slack=-0.1)
