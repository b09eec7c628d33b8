"""bench/dispatch.py and bench/transfer.py: their parts, and that they run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench import dispatch, transfer
from bench.contestants.adapt_cluster import MESSAGES, AdaptCluster, MessageMeter
from bench.contestants.relay import Relay
from bench.contestants.tcp import TcpEcho
from bench.harness.contest import Sample, same
from bench.harness.report import read_csv, summarize

ROOT = Path(__file__).resolve().parents[3]


def test_inputs_are_more_than_are_in_flight_and_all_different():
    for setting in [*dispatch.settings(1.0), *transfer.settings(1.0)]:
        assert len({value.tobytes() for value in setting.pool}) == len(setting.pool) >= 2 * setting.in_flight
        assert all(value.dtype == np.float32 and value.shape[0] == 1 for value in setting.pool)
    assert dispatch.pool()[0].nbytes == 100


def test_megabytes_are_counted_there_and_back():
    settings = transfer.settings(1.0)
    assert [setting.name for setting in settings[:3]] == ["0.2 MB, 1 in flight", "0.2 MB, 8 in flight", "0.8 MB, 1 in flight"]
    for setting in settings:
        (row,) = summarize([Sample("a", setting.name, 1, 1.0, 1.0, 1.0)])
        assert transfer.mb_per_task(row) == pytest.approx(2 * setting.pool[0].nbytes / 1e6)


class Counting(AdaptCluster):
    """A cluster without a cluster: only its counters."""

    def __init__(self) -> None:
        self.now = dict.fromkeys(MESSAGES[:2], 10.0)

    def counters(self) -> dict[str, float]:
        return dict(self.now)


def test_messages_are_counted_per_task_and_only_what_is_known():
    meter, cluster = MessageMeter(), Counting()
    meter.begin(cluster)
    cluster.now["messages_in"] += 30
    meter.end(cluster)
    assert meter.figures(tasks=10) == {"messages_in per task": 3.0}
    meter.begin(Relay("aio"))
    meter.end(Relay("aio"))
    assert meter.figures(tasks=10) == {}


@pytest.mark.parametrize(("bench", "name"), [(dispatch, "dispatch"), (transfer, "transfer")])
def test_pictures_do_with_whoever_was_measured(tmp_path, bench, name):
    extra = {"cpu_us total": 5.0, "cpu_us client": 2.0, "cpu_us relay.main": 3.0, "cpu_us relay": 3.0}
    samples = [Sample("adapt", setting.name, 1, 10.0, 0.1, 0.2, extra) for setting in bench.settings(1.0)]
    bench.draw(tmp_path / "x.png", summarize(samples, reference="relay-aio"), "a machine")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("in_flight", [1, 8])
@pytest.mark.parametrize("make", [TcpEcho, lambda: Relay("aio"), lambda: Relay("drain")])
def test_floors_and_limits_echo(make, in_flight):
    values = list(np.random.default_rng(1).random((24, 1, 70_000), dtype=np.float32))
    with make() as contestant:
        run = contestant.run(values, in_flight=in_flight)
    assert all(map(same, values, run.outputs)) and len(run.latencies_s) == 24 and 0 < run.elapsed_s < 60


def run_bench(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)


@pytest.mark.slow
def test_dispatch_runs_and_writes_its_files(tmp_path):
    only = "relay-aio,adapt,adapt-async"
    ended = run_bench("bench.dispatch", "--quick", "--only", only, "--rounds", "1", "--scale", "0.05", "--out", str(tmp_path))
    assert ended.returncode == 0, ended.stderr + ended.stdout
    (csv_path,) = tmp_path.glob("dispatch-*.csv")
    samples = read_csv(csv_path)
    assert {(sample.contestant, sample.setting) for sample in samples} == {
        (name, setting.name) for name in only.split(",") for setting in dispatch.settings(1.0)
    }
    assert all(sample.rate_per_s > 0 and sample.extra["cpu_us total"] > 0 for sample in samples)
    (summary,) = tmp_path.glob("dispatch-*.json")
    assert json.loads(summary.read_text())["reference"] == "relay-aio"
    assert len(list(tmp_path.glob("dispatch-*.png"))) == 1
    assert "written:" in ended.stdout and "adapt" in ended.stdout


def test_a_contestant_that_is_none_is_status_2(tmp_path):
    ended = run_bench("bench.dispatch", "--only", "nobody", "--out", str(tmp_path))
    assert ended.returncode == 2 and "relay-aio" in ended.stderr
