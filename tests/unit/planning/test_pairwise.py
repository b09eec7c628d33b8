"""Direct networks in which every pair has its own rate."""

from __future__ import annotations

import math

import pytest

from adapt.planning import exact, pairwise, tables
from adapt.planning.cost import fits, forecast
from tests.unit.planning import brute


def test_the_search_equals_a_look_at_every_plan():
    refused = 0
    for model, cluster in brute.instances(150, seed=6, is_direct=True, layers=6, codecs=2):
        best_s, _ = brute.best_layout(model, cluster, has_replicas=False)
        found = pairwise.search(tables.build(model, cluster))
        if found.layout is None:
            assert best_s == found.bottleneck_s == math.inf
            refused += 1
            continue
        assert found.is_proven and fits(model, cluster, found.layout)
        assert forecast(model, cluster, found.layout).bottleneck_s == pytest.approx(best_s, rel=1e-9)
        assert found.bottleneck_s == pytest.approx(best_s, rel=1e-9)
    assert 0 < refused < 75


def test_a_search_that_is_cut_short_still_has_a_true_bound():
    for model, cluster in brute.instances(60, seed=7, is_direct=True, layers=7, devices=6):
        costs = tables.build(model, cluster)
        right = exact.solve(costs)
        best_s = math.inf if right is None else forecast(model, cluster, right).bottleneck_s
        found = pairwise.search(costs, steps=4)
        assert found.bound_s <= best_s * (1 + 1e-9) <= found.bottleneck_s * (1 + 2e-9)
