"""bench/prediction.py: what a prediction rests on, that it is written before it is tested, how it is judged, and, slowly, that it runs."""

from __future__ import annotations

import csv
import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")

from adapt.emulation import ownership
from adapt.planning.model import Handling, LayerProfile, MeasuredCosts, ModelProfile, typical_codecs
from bench import prediction as bench
from bench.harness.sealed import predict, seal

ROOT = Path(__file__).resolve().parents[3]
CORES = {"w1": 0.5, "w2": 0.25}
HANDLING = Handling(0.001, 1e-9)


def profile(handling: Handling = HANDLING) -> ModelProfile:
    """Three layers of two operators; 10 ms each on w1, 20 on w2. A megabyte crosses each cut."""
    layers = tuple(
        LayerProfile(place=f"l{n}", cost_s=0.005, weight_bytes=10, peak_bytes=0, output_bytes=1_000_000 if n < 2 else 0, end=2 * n + 2)
        for n in range(3)
    )
    measured = tuple(
        MeasuredCosts(device_class=name, workers=(name,), threads=1, cores=CORES[name], costs_s=(cost,) * 3, handling=handling)
        for name, cost in (("w1", 0.01), ("w2", 0.02))
    )
    return ModelProfile("torchvision/m", 500_000, layers, typical_codecs(), measured=measured)


def predicted(*operators: int, workers=(("w1",), ("w2",)), codec: str = "raw", model: ModelProfile | None = None):
    return predict(model or profile(), plan="2", codec=codec, operators=operators, workers=workers, cores=CORES)


def test_a_stage_takes_what_its_layers_and_the_handling_take_at_the_workers_share():
    foreseen = predicted(4, 2)
    first_s, second_s = 0.02 + (0.001 + 1.5e-3) / 0.5, 0.02 + (0.001 + 1e-3) / 0.25
    assert foreseen.stage_s == pytest.approx((first_s, second_s))
    assert foreseen.rate_per_s == pytest.approx(1 / second_s) and foreseen.limiting == ("w2",)
    assert foreseen.computing_rate_per_s == pytest.approx(50)
    assert predicted(6, workers=(("w1", "w2"),), model=profile(Handling())).rate_per_s == pytest.approx(1 / 0.03 + 1 / 0.06)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"operators": (3, 3)}, "none of a program of 6"),
        ({"operators": (2, 2)}, "none of a program of 6"),
        ({"operators": (4, 2), "workers": (("w1",), ("w9",))}, "not measured on w9"),
        ({"operators": (4, 2), "codec": "zfp"}, "nothing is known of codec zfp"),
    ],
)
def test_what_cannot_be_predicted_is_named(changes, told):
    with pytest.raises(ValueError, match=told):
        predicted(*changes.pop("operators"), **changes)


def test_a_prediction_is_sealed_by_the_digest_of_its_file(tmp_path):
    foreseen = predicted(4, 2)
    digest = seal(foreseen, path := tmp_path / "p.json")
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest() == seal(predicted(4, 2), path)
    assert json.loads(path.read_text())["rate_per_s"] == foreseen.rate_per_s
    assert seal(predicted(2, 4), path) != digest
    assert foreseen.profile_digest == hashlib.sha256(profile().to_json().encode()).hexdigest()


def sample(window: int, measured_per_s: float, *, plan: str = "2", round: int = 1, predicted_per_s: float = 10.0) -> bench.Sample:
    return bench.Sample(
        model="m",
        plan=plan,
        stages="w1 | w2",
        digest="d",
        round=round,
        window=window,
        predicted_per_s=predicted_per_s,
        computing_per_s=12.0,
        measured_per_s=measured_per_s,
        images=40,
        limiting="w2",
        busiest="w2",
        busiest_share=0.99,
        cpu_s=0.02,
        loop_s=0.001,
        compute_s=0.09,
        others_cores=0.2,
    )


def test_a_prediction_is_held_against_the_windows_of_its_own_round():
    """The machine was twice as slow in the second round, when it was profiled and when it was measured."""
    halved = [sample(1, 4.0, round=2, predicted_per_s=5.0), sample(2, 5.0, round=2, predicted_per_s=5.0)]
    error = bench.error_of([sample(1, 8.0), sample(2, 10.0), *halved])
    assert (error.low, error.median, error.high) == pytest.approx((0.0, 0.125, 0.25))


def test_errors_are_those_of_the_windows():
    error = bench.error_of([sample(1, 8.0), sample(2, 9.5), sample(3, 12.5)])
    assert error.median == pytest.approx(10 / 9.5 - 1) and (error.low, error.high) == (pytest.approx(-0.2), pytest.approx(0.25))
    assert [len(group) for group in bench.by_plan([sample(1, 8.0), sample(2, 9.0), sample(1, 9.0, plan="auto")])] == [2, 1]


def test_a_rate_does_not_count_the_cut_off_ends_of_a_window():
    assert bench.rate([3.0, 1.0, 2.0]) == 1.0
    assert bench.rate([1.0]) != bench.rate([1.0])  # NaN: nobody knows


def test_files_and_picture(tmp_path):
    samples = [sample(1, 8.0), sample(2, 9.5), replace(sample(1, 20.0), model="n", plan="auto")]
    bench.write(tmp_path / "x.csv", samples, {"cpu": "none"})
    with (tmp_path / "x.csv").open(newline="") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    assert [float(row["error"]) for row in rows] == pytest.approx([0.25, 10 / 9.5 - 1, -0.5])
    pytest.importorskip("matplotlib")
    bench.draw(tmp_path / "x.png", samples, "here")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_devices_are_unequal_and_leave_room_for_the_rest():
    assert len(set(bench.CORES.values())) == len(bench.CORES) and sum(bench.CORES.values()) <= 1.6
    assert all(len(names) == count and {*names} <= {*bench.CORES} for count, names in bench.DEVICES.items())


def test_a_wrong_command_line_is_status_2(capsys):
    for arguments in (["--windows", "0"], ["--rounds", "0"], ["--scale", "-2"], ["--model", "nobody"]):
        with pytest.raises(SystemExit) as stopped:
            bench.main(arguments)
        assert stopped.value.code == 2


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.skipif(bool(ownership.missing_rights()), reason="no namespaces and groups here")
def test_it_runs_and_writes_its_files(tmp_path):
    """How far predictions are off is a figure of a quiet machine, not a test."""
    command = [sys.executable, "bench/prediction.py", "--quick", "--scale", "0.4", "--plan", "auto", "--plan", "2", "--out", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=190)
    assert ended.returncode == 0, ended.stderr + ended.stdout
    assert "lost, answered twice or wrong: 0" in ended.stdout
    for plan in ("auto", "2"):
        paths = list(tmp_path.glob(f"prediction-*-mobilenet_v2-*-{plan}.json"))
        assert len(paths) == bench.QUICK_ROUNDS
        for path in paths:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            assert ended.stdout.index(digest) < ended.stdout.index("measured", ended.stdout.index(digest))
    (csv_path,) = tmp_path.glob("prediction-*.csv")
    with csv_path.open(newline="") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    assert {(row["plan"], row["round"]) for row in rows} == {("auto", "1"), ("auto", "2"), ("2", "1"), ("2", "2")} and all(
        float(row["measured_per_s"]) > 0 for row in rows
    )
    assert len(list(tmp_path.glob("prediction-*.png"))) == 1
