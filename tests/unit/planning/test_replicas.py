"""Replicas: the exact search and the search by orders against a look at every plan."""

from __future__ import annotations

import math
from itertools import permutations

import pytest

from adapt.planning import exact, replicas, tables
from adapt.planning.bounds import Capacity, bound_s
from adapt.planning.cost import fits, forecast
from adapt.planning.devices import ClusterProfile
from adapt.planning.replicas import by_orders, improve
from tests.unit.planning import brute


def test_the_search_with_replicas_equals_a_look_at_every_plan():
    checked = 0
    for model, cluster in brute.instances(100, seed=3, layers=6, codecs=2):
        best_s, _ = brute.best_layout(model, cluster, has_replicas=True)
        costs = tables.build(model, cluster)
        first = exact.solve(costs)
        if first is None:
            assert best_s == math.inf
            continue
        first_s = forecast(model, cluster, first).bottleneck_s
        below_s = bound_s(costs, Capacity.of(model, cluster, costs), has_replicas=True)
        assert below_s <= best_s * (1 + 1e-9)
        layout, found_s, is_proven = improve(costs, first, first_s, below_s, Capacity.of(model, cluster, costs))
        assert is_proven and fits(model, cluster, layout)
        assert forecast(model, cluster, layout).bottleneck_s == pytest.approx(best_s, rel=2e-9)
        assert found_s == pytest.approx(best_s, rel=2e-9)
        checked += 1
    assert checked > 60


def test_all_orders_together_have_the_best_plan():
    for model, cluster in brute.instances(40, seed=4, layers=5, codecs=2, devices=3):
        cluster = ClusterProfile(cluster.devices, is_overlapped=cluster.is_overlapped)
        best_s, _ = brute.best_layout(model, cluster, has_replicas=True)
        layout, found_s = by_orders(tables.build(model, cluster), list(permutations(range(len(cluster.devices)))))
        assert (layout is None) == (best_s == math.inf)
        assert found_s == pytest.approx(best_s, rel=1e-8)


def test_work_grows_with_devices():
    model, cluster = next(brute.instances(1, seed=5))
    more = cluster.with_more(cluster.devices[0], 3)
    assert replicas.work(tables.build(model, more)) > replicas.work(tables.build(model, cluster))
