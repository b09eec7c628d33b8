"""`auto` against a look at every plan, and against every strategy alone; what is said of clusters that are too small."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from adapt.errors import ConfigError, PlanError
from adapt.planning import exact
from adapt.planning.choose import AUTO, STRATEGIES, compare, plan, positions, to_plan
from adapt.planning.cost import fits, forecast
from adapt.planning.devices import ClusterProfile, DeviceProfile
from adapt.planning.model import LayerProfile, ModelProfile
from adapt.protocol.ids import Digest, Epoch
from tests.unit.planning import brute

MIB = 1 << 20


@pytest.mark.parametrize("is_direct", [False, True])
def test_auto_is_within_one_percent_of_every_plan(is_direct):
    count, equal, worst = (100 if is_direct else 300), 0, 1.0
    for model, cluster in brute.instances(count, seed=11 + is_direct, layers=7, codecs=3, is_direct=is_direct):
        best_s, _ = brute.best_layout(model, cluster, has_replicas=not is_direct)
        try:
            found = plan(model, cluster)
        except PlanError:
            assert best_s == math.inf
            continue
        assert fits(model, cluster, found.layout)
        assert found.bound_s <= best_s * (1 + 1e-9)
        ratio = found.forecast.bottleneck_s / best_s if best_s > 0 else 1.0
        worst, equal = max(worst, ratio), equal + (ratio < 1 + 1e-8)
        assert ratio <= 1.01
        assert not found.is_optimal or ratio < 1 + 1e-8
    assert equal > 0.5 * count and worst <= 1.01


@pytest.mark.parametrize("is_direct", [False, True])
def test_auto_is_never_worse_than_a_strategy_alone(is_direct):
    for model, cluster in brute.instances(40, seed=21, layers=12, devices=6, codecs=2, is_direct=is_direct):
        try:
            all_of_them = compare(model, cluster)
        except PlanError:
            continue
        best = all_of_them[AUTO].forecast
        for name, planned in all_of_them.items():
            assert best.bottleneck_s <= planned.forecast.bottleneck_s * (1 + 1e-9), name
            assert all_of_them[AUTO].bound_s <= planned.forecast.bottleneck_s * (1 + 1e-9), name
            assert planned.forecast == forecast(model, cluster, planned.layout)


def layer(place, *, cost_s=0.01, weights=10, output=1000, end=1, heaviest=0):
    return LayerProfile(
        place=place, cost_s=cost_s, weight_bytes=weights * MIB, peak_bytes=0, output_bytes=output, end=end, heaviest_bytes=heaviest * MIB
    )


def chain(*weights, cost_s=0.01):
    layers = tuple(layer(f"block{number}", weights=size, end=10 * number + 10, cost_s=cost_s) for number, size in enumerate(weights))
    return ModelProfile("chain", 1000, layers)


def devices(*budgets, **facts):
    return ClusterProfile(tuple(DeviceProfile(name=f"pi-{n}", budget_bytes=size * MIB, **facts) for n, size in enumerate(budgets, 1)))


def test_a_slow_stage_gets_replicas():
    layers = (layer("small"), layer("large", cost_s=0.04, weights=30, end=2), layer("last", end=3))
    model = ModelProfile("uneven", 1000, layers)
    found = plan(model, devices(45, 45, 45, 45, 45, 45))
    assert found.is_optimal
    assert found.forecast.bottleneck_s == pytest.approx(0.01)
    assert max(len(stage.devices) for stage in found.layout.stages) >= 4


def test_one_large_machine_runs_it_alone_and_many_equal_ones_share_the_requests():
    model = chain(10, 10, 10)
    one = plan(model, ClusterProfile((DeviceProfile(name="big", speed=100.0), DeviceProfile(name="pi", budget_bytes=MIB))))
    assert [stage.devices for stage in one.layout.stages] == [(0,)]
    many = plan(model, devices(100, 100, 100))
    assert many.forecast.throughput_per_s == pytest.approx(100.0) and many.is_optimal and many.gap == 0


def test_what_fits_nowhere_is_named_with_its_size():
    model = ModelProfile("vgg16", 600_000, (layer("features", weights=56), layer("classifier.0", weights=392, heaviest=392, end=2)))
    with pytest.raises(PlanError, match=r"classifier\.0 alone has 392\.0 MiB.*largest stage budget is 250\.0 MiB"):
        plan(model, devices(250, 250, 250))


def test_what_kernels_take_is_named_where_it_is_what_does_not_fit():
    greedy = replace(layer("conv", weights=1, end=1), workspace_bytes=300 * MIB)
    with pytest.raises(
        PlanError, match=r"its stage needs 30\d\.\d MiB, of which its kernels take 300\.0 MiB, the largest stage budget is 250\.0 MiB"
    ):
        plan(ModelProfile("m", 600_000, (greedy,)), devices(250))


def test_what_does_not_fit_together_is_counted():
    with pytest.raises(PlanError) as caught:
        plan(chain(30, 30, 30, 30, 30), devices(61, 61))
    said = str(caught.value)
    assert "150.0 MiB of weights" in said and "add up to 122.0 MiB" in said
    assert "1 more worker with 61.0 MiB would do" in said and "91.0 MiB on each of the 2" in said
    plan(chain(30, 30, 30, 30, 30), devices(61, 61, 61))
    plan(chain(30, 30, 30, 30, 30), devices(91, 91))
    with pytest.raises(PlanError):
        plan(chain(30, 30, 30, 30, 30), devices(90, 90))


def test_nobody_there_and_unknown_names():
    with pytest.raises(PlanError, match="no worker"):
        plan(chain(1), ClusterProfile(()))
    with pytest.raises(ConfigError, match="expected one of single"):
        plan(chain(1), devices(10), "best")


def test_a_strategy_that_finds_nothing_says_whether_another_does():
    with pytest.raises(PlanError, match="auto finds one"):
        plan(chain(30, 30), devices(40, 40), "single")


def test_more_of_these():
    model = chain(10, 10, 10, 10, cost_s=0.02)
    few = devices(25, 25)
    more = few.with_more(few.devices[0], 2)
    assert [device.name for device in more.devices] == ["pi-1", "pi-2", "pi-1+1", "pi-1+2"]
    assert plan(model, more).forecast.throughput_per_s == pytest.approx(2 * plan(model, few).forecast.throughput_per_s)


def test_a_layout_becomes_a_plan_of_the_runtime():
    model, cluster = chain(30, 30, 30), devices(70, 40)
    found = plan(model, cluster)
    cuts = positions(model, found.layout)
    assert cuts in ([10], [20])
    made = to_plan(model, cluster, found.layout, program=Digest("p"), artifacts=[Digest("a"), Digest("b")], epoch=Epoch(1))
    assert [need.artifact for need in made.stages] == ["a", "b"] and sorted(made.places) == [("pi-1",), ("pi-2",)]
    assert sum(need.cost_s for need in made.stages) == pytest.approx(0.03)


def test_every_strategy_has_a_plan_where_there_is_room():
    assert set(compare(chain(1, 1, 1), devices(10, 10))) == set(STRATEGIES)


@pytest.mark.parametrize("is_direct", [False, True])
def test_many_different_devices_are_searched_without_counting_subsets(monkeypatch, is_direct):
    """Where the table over subsets would be too large: the search over pairs, and bounds that hold for replicas too."""
    monkeypatch.setattr(exact, "WORK_LIMIT", 0)
    for model, cluster in brute.instances(60, seed=31, layers=6, codecs=2, is_direct=is_direct):
        best_s, _ = brute.best_layout(model, cluster, has_replicas=not is_direct)
        try:
            found = plan(model, cluster)
        except PlanError:
            assert best_s == math.inf
            continue
        assert found.bound_s <= best_s * (1 + 1e-9)
        assert found.forecast.bottleneck_s <= best_s * 1.01
