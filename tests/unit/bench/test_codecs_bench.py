"""bench/codecs.py: when a codec pays, what is checked, and that the whole runs."""

from __future__ import annotations

import csv
import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapt.protocol.codecs import CODECS
from bench import codecs as bench
from bench.codecs import RAW, Speed, Wish, best, gain, tried, wishes
from bench.harness.contest import WrongAnswerError

ROOT = Path(__file__).resolve().parents[3]
RATES = st.floats(1e3, 1e11)
SPEEDS = st.builds(Speed, ratio=st.floats(0.5, 100), encode_per_s=st.floats(1e6, 1e10), decode_per_s=st.floats(1e6, 1e10))


def test_a_worked_example():
    speed = Speed(ratio=4.0, encode_per_s=300e6, decode_per_s=600e6)
    assert speed.serial_break_even == pytest.approx(0.75 * 200e6)
    assert speed.pipelined_break_even == 300e6
    assert speed.serial_s(100e6) == pytest.approx(1 / 300e6 + 1 / 400e6 + 1 / 600e6)
    assert gain(speed, 50e6, is_serial=False) == pytest.approx(4.0)  # the link still is the slowest
    assert gain(speed, 150e6, is_serial=True) == pytest.approx(1.0)


@given(SPEEDS, RATES)
def test_a_codec_pays_exactly_below_its_break_even(speed, rate):
    for is_serial, even in ((True, speed.serial_break_even), (False, speed.pipelined_break_even)):
        if math.isclose(rate, even, rel_tol=1e-6):
            continue
        pays = gain(speed, rate, is_serial=is_serial) > 1 + 1e-9
        assert not pays or rate < even
        if rate < even * 0.999 and speed.ratio > 1.001:
            assert pays


@given(st.floats(0.01, 1.0), RATES)
def test_what_does_not_shrink_never_pays(ratio, rate):
    speed = Speed(ratio, 1e9, 1e9)
    assert speed.serial_break_even == speed.pipelined_break_even == 0
    assert best({"x": speed}, rate, is_serial=True) == "raw"


@given(st.dictionaries(st.sampled_from("abc"), SPEEDS), RATES, st.booleans())
def test_the_best_is_no_worse_than_any_other(speeds, rate, is_serial):
    chosen = best(speeds, rate, is_serial=is_serial)
    reached = gain(speeds.get(chosen, RAW), rate, is_serial=is_serial)
    assert reached >= max((gain(speed, rate, is_serial=is_serial) for speed in speeds.values()), default=1.0)
    assert reached >= 1


def test_every_codec_takes_part_once_for_each_tolerance_that_it_needs():
    names = [wish.name for wish in wishes()]
    assert len(set(names)) == len(names)
    assert {wish.codec for wish in wishes()} == set(CODECS)
    assert "raw" in names and "zfp 0.03" in names


def test_a_trial_tells_sizes_and_errors():
    array = np.maximum(np.random.default_rng(0).standard_normal((1, 4, 16, 16), np.float32), 0)
    lossless, lossy = tried(Wish("lz4", None), array, "here"), tried(Wish("zfp", 0.1), array, "here")
    assert lossless.error_share == 0 and lossless.sent_bytes < array.nbytes
    assert 0 < lossy.error_share <= 0.1


def test_a_broken_bound_is_no_figure(monkeypatch):
    monkeypatch.setattr(bench, "decode", lambda header, payload, limit_bytes: np.zeros(header.shape, np.float32))
    for wish in (Wish("raw", None), Wish("zfp", 0.01)):
        with pytest.raises(WrongAnswerError, match="promised"):
            tried(wish, np.arange(64, dtype=np.float32).reshape(1, 8, 8), "here")


def test_an_unknown_codec_is_a_wrong_command_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--only", "gzip"])
    assert stopped.value.code == 2


@pytest.mark.slow
def test_the_bench_runs_and_leaves_its_files(tmp_path):
    for needed in ("sklearn", "matplotlib"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"needs {needed}: pip install -e .[bench]")
    command = [sys.executable, "-m", "bench.codecs", "--quick", "--scale", "0.1", "--rounds", "2", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert "64 px, wide: 786 kB" in done.stdout
    assert {path.suffix for path in tmp_path.iterdir()} == {".csv", ".json", ".png"}
    with next(tmp_path.glob("*.csv")).open(newline="") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    assert len(rows) == 8 * len(wishes()) * 2  # cuts of both sizes, codecs, rounds
    assert all(float(row["largest_error_std"]) <= 0.1 for row in rows)
    assert all(float(row["agreement"]) == 1 for row in rows if row["contestant"] in ("raw", "lz4"))
