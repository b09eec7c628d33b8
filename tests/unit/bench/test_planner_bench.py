"""bench/planner.py: its settings, what is a ratio, and that its tables come out."""

from __future__ import annotations

import csv
import io
import math
import random

import pytest
from rich.console import Console

from adapt.planning.model import LayerProfile, ModelProfile
from bench import planner as bench

MIB = 1 << 20


def chain(count=8, size=20):
    draw = random.Random(0)
    layers = tuple(
        LayerProfile(
            place=f"l{n}", cost_s=0.01, weight_bytes=size * MIB, peak_bytes=0, output_bytes=draw.randrange(10_000, 800_000), end=n + 1
        )
        for n in range(count)
    )
    return ModelProfile("chain", 600_000, layers)


def test_rates_are_those_of_the_published_area():
    cluster = bench.area(20, 64, random.Random(0))
    rates = [rate * 8 / 1e6 for row in cluster.pairs for rate in row if rate < math.inf]
    assert len(rates) == 20 * 19 and min(rates) > 3.5 and 5 < sum(rates) / len(rates) < 8
    assert all(cluster.pairs[a][b] == cluster.pairs[b][a] for a in range(20) for b in range(20))


@pytest.mark.parametrize("count", [5, 15])
def test_nobody_beats_the_reference(count):
    trials = [trial for number in range(3) for trial in bench.in_area(bench.without_compute(chain()), "real", count, 64, number)]
    known = [trial.ratio for trial in trials if not math.isnan(trial.ratio)]
    assert min(known) >= 1 - 1e-9 and len(known) >= 6
    assert all(trial.ratio < 1 + 1e-9 for trial in trials if trial.strategy == bench.EXACT and trial.reference == "optimum")


def test_what_cannot_be_is_counted_apart():
    trials = list(bench.in_area(bench.without_compute(chain(size=100)), "real", 5, 64, 0))
    assert {trial.reference for trial in trials} == {"none"} and all(math.isnan(trial.ratio) for trial in trials)
    console = Console(file=io.StringIO(), width=200)
    bench.show(console, "seifer", "title", trials)
    assert "greedy" in console.file.getvalue()


def test_files_have_every_trial(tmp_path):
    trials = list(bench.on_unequal(chain(), 4, 2, 0))
    assert {trial.strategy for trial in trials} == set(bench.STRATEGIES)
    bench.write(tmp_path / "x.csv", trials, {"cpu": "none"})
    with (tmp_path / "x.csv").open(newline="") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    assert [row["strategy"] for row in rows] == list(bench.STRATEGIES)
    pytest.importorskip("matplotlib")
    bench.draw(tmp_path / "x.png", trials, "here")
    assert (tmp_path / "x.png").stat().st_size > 10_000
