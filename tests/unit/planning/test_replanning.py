"""When a plan is given up for another: twice in a row better, by more than noise, and never back."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapt.planning.choose import plan
from adapt.planning.cost import StageLayout, forecast
from adapt.planning.devices import ClusterProfile, DeviceProfile
from adapt.planning.model import LayerProfile, ModelProfile
from adapt.planning.replanning import (
    ALIKE,
    HOLDS,
    MOST_LOOKS,
    WORTH,
    Figures,
    Patience,
    as_their_kind,
    bottleneck_s,
    gain,
    looks_after,
)
from tests.unit.planning import brute

SECONDS = {name: float(seconds) for name, seconds in zip("abcdef", (100, 95, 80, 70, 65, 20), strict=True)}


def looked(patience: Patience[str], present: str, best: str | None, seconds=SECONDS) -> str | None:
    return patience.look(seconds[present], best, seconds.__getitem__)


# ── patience ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_plan_is_changed_when_two_looks_say_so():
    patience = Patience[str]()
    assert looked(patience, "a", "c") is None and patience.is_waiting
    assert looked(patience, "a", "d") == "d", "the best by now"
    assert not patience.is_waiting


@pytest.mark.parametrize("between", ["b", None])
def test_a_look_that_sees_nothing_better_begins_again(between):
    patience = Patience[str]()
    assert looked(patience, "a", "c") is None
    assert looked(patience, "a", between) is None
    assert looked(patience, "a", "c") is None


def test_what_was_better_and_is_no_more_is_not_believed_when_something_else_seems_to_be():
    patience = Patience[str]()
    assert looked(patience, "a", "f") is None
    later = SECONDS | {"f": math.inf}
    assert looked(patience, "a", "c", later) is None
    assert looked(patience, "a", "c", later) == "c"


def test_a_plan_that_can_answer_nothing_is_left_for_any():
    patience = Patience[str]()
    assert patience.look(math.inf, "a", SECONDS.__getitem__) is None
    assert patience.look(math.inf, "a", SECONDS.__getitem__) == "a"
    assert patience.look(math.inf, "a", lambda plan: math.inf) is None


@given(
    st.dictionaries(st.integers(0, 5), st.floats(0.001, 1000.0), min_size=2),
    st.lists(st.integers(0, 5) | st.none(), max_size=60),
)
def test_while_nothing_changes_no_plan_comes_back_and_it_ends(seconds, proposed):
    """Whatever the planner calls the best."""
    plans = sorted(seconds)
    present, patience, had = plans[0], Patience[int](), {plans[0]}
    for number in proposed:
        best = None if number is None else plans[number % len(plans)]
        chosen = patience.look(seconds[present], best, seconds.__getitem__)
        if chosen is not None:
            assert seconds[present] > (1 + WORTH) * seconds[chosen] and chosen not in had
            present = chosen
            had.add(chosen)
    for _ in range(2 * len(plans)):  # and the best is found in the end
        best = min(plans, key=seconds.__getitem__)
        present = patience.look(seconds[present], best, seconds.__getitem__) or present
    assert seconds[present] <= (1 + WORTH) * min(seconds.values()) * (1 + 1e-9)


@given(st.lists(st.tuples(st.floats(0.96, 1.04), st.floats(0.96, 1.04)), max_size=50))
def test_noise_below_the_threshold_does_nothing(noise):
    patience = Patience[str]()
    for first, second in noise:
        assert patience.look(first, "other", lambda plan, s=second: s) is None


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=40))
def test_nothing_is_changed_on_one_look_alone(looks):
    """Better at one look, worse at the next, in any order: a change comes only after two in a row."""
    patience, run = Patience[str](), 0
    for is_better, has_plan in looks:
        run = run + 1 if is_better and has_plan else 0
        chosen = patience.look(1.0, "x" if has_plan else None, lambda plan, s=0.5 if is_better else 1.0: s)
        assert (chosen is not None) == (run == 2)
        run = 0 if chosen is not None else run


def test_it_rests_after_a_change_each_time_for_longer():
    assert [looks_after(changes) for changes in (0, 1, 2, 5, 6, 7, 1000)] == [0, 2, 4, 32, MOST_LOOKS, MOST_LOOKS, MOST_LOOKS]
    patience = Patience[str]()
    assert not patience.is_resting()
    patience.rest(2)
    assert [patience.is_resting() for _ in range(4)] == [True, True, False, False]


def test_gains():
    assert gain(2.0, 1.0) == 1.0 and gain(1.0, 2.0) == -0.5
    assert gain(1.0, math.inf) == gain(math.inf, math.inf) == -1.0 and gain(math.inf, 1.0) == math.inf


# ── figures ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.floats(1e-3, 1e3), st.lists(st.floats(1.01 / HOLDS, HOLDS / 1.01)))
def test_a_figure_is_held_while_it_only_trembles(value, trembling):
    figures = Figures[str]()
    assert figures.hold("x", value) == value
    assert all(figures.hold("x", value * factor) == value for factor in trembling)
    assert figures.hold("x", value * HOLDS * 1.01) == value * HOLDS * 1.01
    assert figures.hold("y", 0.0) == 0.0 and figures.hold("y", value) == value


def test_a_worker_that_is_nearly_as_slow_as_its_kind_is_as_slow():
    slowness = {"a": 1.0, "b": 1.3, "c": 1.1, "slow": 3.0, "fast": 0.5, "other": 4.0, "unknown": 1.2}
    kinds = dict.fromkeys(("a", "b", "c", "slow", "fast"), "pi") | {"other": "xeon"}
    assert as_their_kind(slowness, kinds) == slowness | {"a": 1.1, "b": 1.1, "c": 1.1}
    assert as_their_kind({"a": 1.0, "b": ALIKE}, {"a": 1, "b": 1}) == {"a": 1.0, "b": ALIKE}
    assert as_their_kind({"a": 0.0, "b": 1e300}, {"a": 1, "b": 1, "gone": 2}) == {"a": 0.0, "b": 1e300}


# ── the present plan ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_plan_as_it_was_made_takes_what_was_forecast():
    draw = random.Random(5)
    for _ in range(60):
        model = brute.drawn_model(draw, layers=6)
        cluster = brute.drawn_cluster(draw, devices=4, layers=6)
        numbers = draw.sample(range(4), 4)
        layout = plan(model, ClusterProfile(tuple(DeviceProfile(name=str(number)) for number in range(4))), "equal").layout
        stages = tuple(StageLayout(s.begin, s.end, (numbers[n],)) for n, s in enumerate(layout.stages[:3]))
        stages = (*stages, *(StageLayout(s.begin, s.end, tuple(numbers[3:])) for s in layout.stages[3:]))
        found = bottleneck_s(model, cluster, stages)
        assert found == pytest.approx(forecast(model, cluster, type(layout)(stages, layout.codecs)).bottleneck_s)


def chain(*costs_s: float) -> ModelProfile:
    layers = [
        LayerProfile(place="", cost_s=cost_s, weight_bytes=0, peak_bytes=0, output_bytes=1, end=number)
        for number, cost_s in enumerate(costs_s, 1)
    ]
    return ModelProfile("m", 1, tuple(layers))


def cluster(*speeds: float) -> ClusterProfile:
    return ClusterProfile(tuple(DeviceProfile(name=f"w{number}", speed=speed) for number, speed in enumerate(speeds)))


@pytest.mark.parametrize(
    ("speeds", "places", "seconds"),
    [
        ((1, 1), [(0,), (0,)], 2.0),  # one has both
        ((1, 1), [(0, 1), (0,)], 1.0),  # the other takes the first
        ((1, 1), [(0, 1), (0, 1)], 1.0),
        ((3, 1), [(0, 1), (0, 1)], 0.5),
        ((1, 1, 1), [(0, 1), (1, 2)], 2 / 3),
        ((1, 1), [(0,), ()], math.inf),  # nobody has the second
    ],
)
def test_workers_with_several_stages_divide_the_requests_well(speeds, places, seconds):
    stages = [StageLayout(number, number + 1, place) for number, place in enumerate(places)]
    assert bottleneck_s(chain(1.0, 1.0), cluster(*speeds), stages) == pytest.approx(seconds)


@given(
    st.lists(st.floats(0.1, 10.0), min_size=1, max_size=4),
    st.lists(st.floats(0.1, 10.0), min_size=1, max_size=4),
    st.data(),
)
def test_it_is_never_less_than_all_work_on_all_workers_and_a_copy_more_does_no_harm(costs_s, speeds, data):
    """Where workers differ in speed alone, dividing stage after stage finds the best division."""
    some = st.sets(st.integers(0, len(speeds) - 1), min_size=1)
    places = [data.draw(some) for _ in costs_s]
    model, workers = chain(*costs_s), cluster(*speeds)

    def seconds(places) -> float:
        return bottleneck_s(model, workers, [StageLayout(n, n + 1, tuple(sorted(place))) for n, place in enumerate(places)])

    used = set().union(*places)
    found = seconds(places)
    assert found >= sum(costs_s) / sum(speeds[worker] for worker in used) * (1 - 1e-9)
    assert found >= max(cost / sum(speeds[w] for w in place) for cost, place in zip(costs_s, places, strict=True)) * (1 - 1e-9)
    stage, worker = data.draw(st.integers(0, len(places) - 1)), data.draw(st.integers(0, len(speeds) - 1))
    more = [place | {worker} if number == stage else place for number, place in enumerate(places)]
    assert seconds(more) <= found * 1.01
