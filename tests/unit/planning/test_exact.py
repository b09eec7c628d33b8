"""The exact solver against a look at every plan."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from time import process_time

import pytest

from adapt.planning import bounds, exact, tables
from adapt.planning.choose import plan
from adapt.planning.cost import fits, forecast
from adapt.planning.devices import ClusterProfile, DeviceProfile
from tests.unit.planning import brute


@pytest.mark.parametrize(("is_direct", "count"), [(False, 350), (True, 150)])
def test_exact_equals_a_look_at_every_plan(is_direct, count):
    refused = 0
    for model, cluster in brute.instances(count, seed=1 + is_direct, is_direct=is_direct, layers=6, codecs=2):
        best_s, layout = brute.best_layout(model, cluster, has_replicas=False)
        costs = tables.build(model, cluster)
        found = exact.solve(costs)
        if found is None:
            assert best_s == math.inf
            refused += 1
            continue
        assert bounds.bound_s(costs, bounds.Capacity.of(model, cluster, costs), has_replicas=False) <= best_s * (1 + 1e-9)
        helped = exact.solve(costs, below_s=best_s, capacity=bounds.Capacity.of(model, cluster, costs))
        assert helped is not None and forecast(model, cluster, helped) == forecast(model, cluster, found)
        assert fits(model, cluster, found)
        assert forecast(model, cluster, found).bottleneck_s == pytest.approx(best_s, rel=1e-9)
        assert forecast(model, cluster, layout).bottleneck_s == pytest.approx(best_s, rel=1e-9)  # both count alike
    assert 0 < refused < count / 2


@pytest.mark.timing
@pytest.mark.parametrize("codecs", [1, 2])
def test_twenty_devices_of_five_classes_and_eighty_cuts_take_less_than_a_second(codecs):
    draw = random.Random(0)
    model = brute.drawn_model(draw, layers=81, codecs=codecs)
    kinds = [DeviceProfile(name="", speed=draw.uniform(0.2, 2), budget_bytes=draw.randrange(80, 400) * brute.MIB) for _ in range(5)]
    wired = [replace(kind, down_bytes_per_s=draw.uniform(2e6, 1e8), up_bytes_per_s=draw.uniform(2e6, 1e8)) for kind in kinds]
    cluster = ClusterProfile(tuple(replace(wired[number % 5], name=f"d{number}") for number in range(20)))
    began = process_time()
    found = plan(model, cluster, "exact")
    assert process_time() - began < 1.0
    assert len(found.layout.stages) > 3
