"""adapt plan on profiles: what it prints, and what it refuses. No model is built."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from adapt.interfaces.cli.main import main
from adapt.planning.model import RAW, CodecProfile, LayerProfile, MeasuredCosts, ModelProfile, typical_codecs

MIB = 1 << 20
HOME = """
about = "two Pis and a laptop"
[[device]]
name = "pi"
count = 2
cores = 0.25
memory = "60MiB"
rate = "20 Mbit/s"
latency = "2 ms"
[[device]]
name = "laptop"
memory = "80MiB"
rate = "100 Mbit/s"
"""


@pytest.fixture
def home(tmp_path):
    path = tmp_path / "home.toml"
    path.write_text(HOME, encoding="utf-8")
    return str(path)


@pytest.fixture
def profile(tmp_path):
    """A model of four blocks, 30 MiB each."""
    return save(tmp_path / "model.json", *(30,) * 4)


def save(path, *weights, names=()):
    layers = tuple(
        LayerProfile(
            place=names[number] if names else f"block{number}",
            cost_s=0.02,
            weight_bytes=size * MIB,
            peak_bytes=MIB,
            output_bytes=100_000,
            end=number + 1,
            heaviest_bytes=size * MIB,
        )
        for number, size in enumerate(weights)
    )
    path.write_text(ModelProfile("small", 200_000, layers, typical_codecs(), "a test").to_json(), encoding="utf-8")
    return str(path)


def test_a_plan_says_all_that_matters(capsys, home, profile):
    assert main(["plan", profile, "--cluster", home]) == 0
    said = capsys.readouterr().out
    for words in (
        "3 legal cuts",
        "120.0 MiB of weights",
        "3 workers of 2 kinds",
        "laptop",
        "requests/s",
        "latency",
        "bottleneck",
        "budget",
    ):
        assert words in said
    assert "no plan has a smaller bottleneck" in said


def test_all_strategies_side_by_side(capsys, home, profile):
    assert main(["plan", profile, "--cluster", home, "--strategy", "all"]) == 0
    said = capsys.readouterr().out
    assert "no plan that fits: single, all" in said
    for name in ("greedy", "exact", "auto"):
        assert f"\n{name}" in said


def test_what_if_there_were_more_or_fewer(capsys, home, profile):
    assert main(["plan", profile, "--cluster", home, "--what-if", "2xlaptop", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["what_if"]["throughput_per_s"] > 1.5 * plan["throughput_per_s"]
    assert {"laptop+1", "laptop+2"} & {worker for stage in plan["what_if"]["stages"] for worker in stage["workers"]}
    assert plan["is_optimal"] and sum(stage["memory_bytes"] for stage in plan["stages"]) >= 120 * MIB
    assert main(["plan", profile, "--cluster", home, "--what-if", "2xlaptop"]) == 0
    assert "times the throughput" in capsys.readouterr().out
    assert main(["plan", profile, "--cluster", home, "--what-if", "0xlaptop"]) == 1
    assert "2 stage budgets add up to 120.0 MiB" in capsys.readouterr().err


def test_an_operator_that_fits_nowhere_is_named_with_its_size(capsys, tmp_path):
    vgg = save(tmp_path / "vgg16.json", 56, 392, 64, 16, names=("features.28", "classifier.0", "classifier.3", "classifier.6"))
    cluster = tmp_path / "c.toml"
    cluster.write_text('[[device]]\nname = "pi"\ncount = 8\nmemory = "250MiB"\n', encoding="utf-8")
    assert main(["plan", vgg, "--cluster", str(cluster)]) == 1
    said = capsys.readouterr().err
    assert "classifier.0" in said and "392.0 MiB" in said and "250.0 MiB" in said


def test_without_overlap_it_is_slower(capsys, home, profile):
    rates = []
    for flags in ([], ["--no-overlap"]):
        assert main(["plan", profile, "--cluster", home, "--json", *flags]) == 0
        rates.append(json.loads(capsys.readouterr().out)["throughput_per_s"])
    assert rates[1] < rates[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--strategy", "best"], "expected one of single"),
        (["--what-if", "two"], "for instance 2xpi-1"),
        (["--what-if", "2xmoon"], "no worker is called moon; there are pi-1, pi-2, laptop"),
    ],
)
def test_a_wrong_wish_is_one_line(capsys, home, profile, arguments, said):
    assert main(["plan", profile, "--cluster", home, *arguments]) == 2
    complaint = capsys.readouterr().err
    assert said in complaint and complaint.count("\n") == 1


def test_a_file_that_is_no_profile(capsys, home, tmp_path):
    for text in ("", "[]", '{"version": 1}', '{"version": 2}'):
        path = tmp_path / "x.json"
        path.write_text(text, encoding="utf-8")
        assert main(["plan", str(path), "--cluster", home]) == 2
        assert "x.json" in capsys.readouterr().err
    assert main(["plan", str(tmp_path / "none.json"), "--cluster", home]) == 2
    assert "No such file" in capsys.readouterr().err


def test_devices_called_as_measured_workers_take_what_these_took(capsys, home, tmp_path):
    path = Path(save(tmp_path / "model.json", *(30,) * 4))
    model = ModelProfile.from_json(path.read_text())
    kind = MeasuredCosts(device_class="Pi", workers=("pi-1", "pi-2"), threads=1, cores=0.25, costs_s=(0.01, 0.01, 0.2, 0.2))
    path.write_text(replace(model, measured=(kind,)).to_json())
    assert main(["plan", str(path), "--cluster", home, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    (laptop,) = [stage for stage in plan["stages"] if stage["workers"] == ["laptop"]]
    assert laptop["stage_s"] == pytest.approx(0.04, rel=0.02), "the last two blocks, which are quick there"
    assert plan["stages"][-1] == laptop and plan["stages"][-2]["end"] == 2


def test_only_who_allows_an_error_gets_lossy_codecs(capsys, home, tmp_path):
    """A profile that was measured has both kinds; whoever names a tolerance below that of the measurement gets what is typical of it."""
    path = Path(save(tmp_path / "model.json", *(30,) * 4))
    speeds = {"encode_bytes_per_s": 1e9, "decode_bytes_per_s": 1e9}
    lz4, zfp = (CodecProfile(name=name, ratio=ratio, ratios=(ratio,) * 5, **speeds) for name, ratio in (("lz4", 2.0), ("zfp", 9.0)))
    model = replace(ModelProfile.from_json(path.read_text()), codecs=(RAW, lz4, zfp))
    path.write_text(model.to_json())
    Path(home).write_text(HOME.replace("20 Mbit/s", "1 Mbit/s").replace("100 Mbit/s", "2 Mbit/s"), encoding="utf-8")  # links decide
    kept = tmp_path / "kept.json"
    used, rates = {}, {}
    for tolerance in ((), ("--tolerance", "0.1"), ("--tolerance", "0.01")):
        for strategy in ("auto", "exact", "greedy"):
            options = ("--strategy", strategy, "--save-profile", str(kept), *tolerance)
            assert main(["plan", str(path), "--cluster", home, "--json", *options]) == 0
            plan = json.loads(capsys.readouterr().out)
            used.setdefault(tolerance[-1:], set()).update(stage["codec"] for stage in plan["stages"])
            if strategy == "auto":
                rates[tolerance[-1:]] = plan["throughput_per_s"]
        assert ModelProfile.from_json(kept.read_text()) == model, "as it was measured, whatever is planned with it"
    assert used[()] <= {"raw", "lz4"} and "zfp" in used["0.1",]
    assert rates[()] <= rates["0.01",] < rates["0.1",]


def test_codecs_within_a_tolerance():
    (layer,) = ModelProfile.from_json(ModelProfile("m", 1, (LAYER,)).to_json()).layers
    measured = CodecProfile(name="zfp", ratio=9.0, ratios=(9.0, 9.0))
    lossy, lossless = ModelProfile("m", 1, (layer,), (RAW, measured)), ModelProfile("m", 1, (layer,), (RAW,))
    assert lossy.within(None) == lossless == lossless.within(None)
    assert lossless.within(0.1).codecs == (RAW, typical_codecs(tolerance=0.1)[-1]), "nobody has measured any"
    integers = ModelProfile("m", 1, (layer,), (RAW, CodecProfile(name="lz4", ratio=2.0, ratios=(2.0, 2.0))))
    assert integers.within(0.1) is integers.within(0.01) is integers, "zfp was of no use"
    assert lossy.within(0.1) is lossy.within(0.5) is lossy
    assert lossy.within(0.01).codecs == (RAW, typical_codecs(tolerance=0.01)[-1])
    assert ModelProfile("m", 1, (layer,), (measured,)).within(None) == lossless


LAYER = LayerProfile(place="a", cost_s=0.1, weight_bytes=1, peak_bytes=1, output_bytes=1, end=1)
