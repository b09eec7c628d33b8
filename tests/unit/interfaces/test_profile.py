"""adapt profile on profiles that are there already: what it prints, draws and refuses. No model is built."""

from __future__ import annotations

from dataclasses import replace

import pytest

from adapt.interfaces.cli.main import main
from adapt.planning.model import RAW, CodecProfile, LayerProfile, MeasuredCosts, ModelProfile, typical_codecs

MIB = 1 << 20


def model_of(*places: str) -> ModelProfile:
    layers = tuple(
        LayerProfile(
            place=place, cost_s=0.001 * (number + 1), weight_bytes=MIB, peak_bytes=2 * MIB, output_bytes=100_000 - number, end=number + 1
        )
        for number, place in enumerate(places)
    )
    return ModelProfile("small", 200_000, layers, reference="a test")


@pytest.fixture
def saved(tmp_path):
    def save(model: ModelProfile) -> str:
        path = tmp_path / "model.json"
        path.write_text(model.to_json(), encoding="utf-8")
        return str(path)

    return save


def test_parts_are_as_fine_as_fits_on_a_page(capsys, saved):
    places = [f"block{block}.conv{conv}" for block in range(20) for conv in range(5)]
    assert main(["profile", saved(model_of(*places))]) == 0
    out = capsys.readouterr().out
    assert "small: 99 legal cuts, 100.0 MiB of weights" in out and "a test" in out
    rows = [line.split() for line in out.splitlines() if line.startswith("block")]
    assert [row[0] for row in rows] == [f"block{block}" for block in range(20)]
    assert rows[0][1:3] == ["5", "15.00"] and rows[-1][1] == "4", "the end of the model is no cut"
    assert main(["profile", saved(model_of(*places[:10]))]) == 0
    assert "block0.conv0" in capsys.readouterr().out
    assert main(["profile", saved(model_of(*(f"layer{number}" for number in range(100))))]) == 0
    assert "layer0 – layer3" in capsys.readouterr().out


def test_each_kind_of_device_has_a_column(capsys, saved):
    model = model_of("a", "b")
    kinds = [
        MeasuredCosts(device_class=name, workers=(worker,), threads=1, cores=0.0, costs_s=costs)
        for name, worker, costs in (("Pi", "pi-1", (0.5, 0.25)), ("Xeon", "pc", (0.05, 0.025)))
    ]
    assert main(["profile", saved(replace(model, measured=tuple(kinds)))]) == 0
    out = capsys.readouterr().out
    assert "A  Pi" in out and "B  Xeon" in out and "A ms" in out and "B ms" in out
    assert [line.split()[1:4] for line in out.splitlines() if line.startswith("a ")] == [["1", "500.00", "50.00"]]


def test_what_codecs_make_of_what_crosses_is_said_where_it_was_measured(capsys, saved):
    model = model_of("a", "b", "c")
    assert main(["profile", saved(replace(model, codecs=typical_codecs()))]) == 0
    assert "lz4" not in capsys.readouterr().out
    lz4 = CodecProfile(name="lz4", ratio=1.5, ratios=(1.0, 1.25, 2.5, 1.0), encode_bytes_per_s=6e8, decode_bytes_per_s=2.5e9)
    zfp = CodecProfile(name="zfp", ratio=4.0, ratios=(4.0, 3.5, 5.0, 1.0), encode_bytes_per_s=2e8, decode_bytes_per_s=1e8)
    assert main(["profile", saved(replace(model, codecs=(RAW, lz4, zfp)))]) == 0
    out = capsys.readouterr().out
    rows = [line.split()[-2:] for line in out.splitlines() if line.split()[:1] in (["a"], ["b"], ["c"])]
    assert rows == [["1.25", "3.50"], ["2.50", "5.00"], ["1.00", "1.00"]]
    assert "lz4: 1.50 times smaller over all, 1.25 to 2.50 at the cuts; one core encodes 600 MB/s, decodes 2,500 MB/s" in out
    assert "zfp (error up to 0.1 standard deviations): 4.00 times smaller over all" in out


def test_workspace_is_shown_where_it_was_measured(capsys, saved):
    model = model_of(*(f"block{number // 2}.{number}" for number in range(30)))
    assert main(["profile", saved(model)]) == 0
    assert "workspace" not in capsys.readouterr().out
    taken = tuple(replace(layer, workspace_bytes=number * MIB // 2) for number, layer in enumerate(model.layers))
    assert main(["profile", saved(replace(model, layers=taken))]) == 0
    out = capsys.readouterr().out
    rows = [line.split()[-5:-2] for line in out.splitlines() if line.startswith("block")]
    assert rows == [["2.0", "2.0", f"{block + 0.5:.1f}"] for block in range(15)], "the most that one of its layers takes"
    assert "activations and workspace (what kernels take besides)" in " ".join(out.split())


def test_it_is_drawn_and_kept(capsys, saved, tmp_path):
    model = replace(
        model_of(*(f"block{number // 3}.{number}" for number in range(12))),
        measured=tuple(
            MeasuredCosts(device_class=name, workers=("w",), threads=1, cores=0.0, costs_s=(0.01,) * 12) for name in ("Pi", "Xeon")
        ),
    )
    picture, kept = tmp_path / "p.png", tmp_path / "kept.json"
    assert main(["profile", saved(model), "--plot", str(picture), "--json", str(kept)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG") and ModelProfile.from_json(kept.read_text()) == model


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["missing.json"], "expected the profile of a model"),
        (["torchvision/resnet18", "--repetitions", "0"], "repetitions=0: expected 1 to 1000"),
        (["torchvision/resnet18", "--plot", "/nowhere/at/all.png"], "there is no directory /nowhere/at"),
        (["torchvision/resnet18", "--here", "--input-shape", "big"], "input-shape='big'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(capsys, argv, words):
    assert main(["profile", *argv]) == 2
    assert words in capsys.readouterr().err


def test_a_profile_with_seconds_of_other_layers_is_refused(capsys, saved):
    model = model_of("a", "b")
    text = replace(model, measured=(MeasuredCosts(device_class="Pi", workers=("w",), threads=1, cores=0.0, costs_s=(0.5, 0.25)),)).to_json()
    path = saved(model)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text.replace("0.25", "-1"))
    assert main(["profile", path]) == 2
    assert "Pi: expected the seconds of 2 layers" in capsys.readouterr().err
