"""Profiles on real clusters: measured by workers, kept by the dispatcher, used by deployments; and what `adapt profile` shows of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
import torch

import adapt
from adapt.planning.model import ModelProfile

TIMEOUT_S = 120.0
SMALL = "torchvision/squeezenet1_1"


class Wide(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(8)))

    def forward(self, x):
        return self.layers(x)


def test_a_module_is_measured_once_and_planned_by_it(tmp_path):
    """The worker's stage budget is less than half of the model: it is measured window by window, and then cut."""
    module, x = Wide().eval(), torch.randn(2, 512)
    told = []
    with (
        adapt.LocalCluster(workers=2, directory=tmp_path / "here", worker={"memory_limit": "6MiB"}) as cluster,
        adapt.Client(cluster.address) as client,
    ):
        model = client.profile(module, example_inputs=(x,), repetitions=3, progress=lambda words, share: told.append((words, share)))
        (kind,) = model.measured
        assert model.weights_before[-1] > 8 << 20 and set(kind.workers) == {"w1", "w2"}
        assert len(kind.costs_s) == len(model.layers) and all(cost > 0 for cost in kind.costs_s)
        raw, lz4, zfp = model.codecs
        assert (raw.name, lz4.name, zfp.name) == ("raw", "lz4", "zfp") and len(lz4.ratios) == len(zfp.ratios) == len(model.layers) + 1
        assert all(1 <= ratio < 1.2 for ratio in lz4.ratios) and all(1.2 < ratio < 10 for ratio in zfp.ratios), "of noise"
        assert all(1e6 < speed < 1e12 for speed in (lz4.encode_bytes_per_s, zfp.encode_bytes_per_s, zfp.decode_bytes_per_s))
        assert any("fetching" in words and share is not None for words, share in told)
        told.clear()
        torch.nn.init.normal_(module.layers[0].weight)  # other weights: the same form
        again = client.profile(module, example_inputs=(x,), progress=lambda words, share: told.append((words, share)))
        assert again.measured[0].costs_s == kind.costs_s and not any("measuring" in words for words, _ in told)
        assert again.codecs == model.codecs
        for forgotten in ("codecs", "workspace_bytes"):
            forget(tmp_path / "here", forgotten)
            anew = client.profile(module, example_inputs=(x,))
            assert [codec.name for codec in anew.codecs if codec.ratios] == ["lz4", "zfp"], (
                "measured once more: what is typical has no ratios"
            )
            assert all(type(taken) is int for kept in kept_profiles(tmp_path / "here") for taken in kept["workspace_bytes"])
        with pytest.raises(adapt.ConfigError, match="device-class='abacus'"):
            client.profile(module, example_inputs=(x,), device_class="abacus")
        with pytest.raises(adapt.ConfigError, match="has no operators"):  # it used to end one worker after the other
            client.profile(torch.nn.Identity(), example_inputs=(x,))
        deployed = client.deploy(module, example_inputs=(x,))
        assert len(deployed.record.stages) == 2
        with torch.inference_mode():
            assert torch.equal(deployed(x), module(x))
        with pytest.raises(adapt.PlanError, match="no room to profile"):  # beside the stages that are resident now
            client.profile(torch.nn.Linear(1100, 1100), example_inputs=(torch.zeros(1, 1100),))
        assert deployed(x).shape == (2, 512)
    kept = list((tmp_path / "here").rglob("profiles/*.json"))
    assert len(kept) == 1 and json.loads(kept[0].read_text())["version"] == 1


def kept_profiles(directory):
    (path,) = directory.rglob("profiles/*.json")
    return json.loads(path.read_text())["profiles"]


def forget(directory, key):
    """As profiles were kept before that was measured."""
    (path,) = directory.rglob("profiles/*.json")
    content = json.loads(path.read_text())
    for profile in content["profiles"]:
        del profile[key]
    path.write_text(json.dumps(content))


def command(*argv, address=None):
    environ = {key: value for key, value in os.environ.items() if key != "ADAPT_DISPATCHER"}
    environ |= {"ADAPT_DISPATCHER": address} if address else {}
    return subprocess.run(
        [sys.executable, "-m", "adapt.interfaces.cli.main", *argv], capture_output=True, text=True, env=environ, timeout=TIMEOUT_S
    )


@pytest.mark.slow
def test_the_command_on_a_cluster_and_on_this_machine(tmp_path):
    kept = tmp_path / "small.json"
    with adapt.LocalCluster(workers=1) as cluster:
        shown = command("profile", SMALL, "--seed", "0", "--json", str(kept), address=cluster.address)
        assert shown.returncode == 0, shown.stderr
        assert "w1" in shown.stdout and "features.0" in shown.stdout and "exporting" in shown.stderr
        model = ModelProfile.from_json(kept.read_text())
        assert model.measured[0].workers == ("w1",)
        assert max(model.codecs[1].ratios) > 1.2, "what squeezenet's rectifiers let through"
        assert "lz4: " in shown.stdout and "times smaller" in shown.stdout
        assert "workspace" in shown.stdout and max(layer.workspace_bytes for layer in model.layers) > 0
        assert "USDT" not in shown.stderr
    planned = command("plan", str(kept), "--cluster", "pi3")
    assert planned.returncode == 0 and "requests/s" in planned.stdout
    here = command("profile", SMALL, "--seed", "0", "--here", "--repetitions", "3", "--plot", str(tmp_path / "small.png"))
    assert here.returncode == 0, here.stderr
    assert "this-machine" in here.stdout and (tmp_path / "small.png").stat().st_size > 10_000


@pytest.mark.slow
def test_requests_are_answered_while_a_model_is_measured():
    """And none of them fails: the profile waits for them, or they for one slice."""
    x = torch.randn(1, 3, 64, 64)
    with adapt.LocalCluster(workers=1) as cluster, adapt.Client(cluster.address) as client, adapt.Client(cluster.address) as other:
        model = client.deploy(SMALL, seed=0, input_shape=(3, 64, 64))
        expected = model(x)
        with ThreadPoolExecutor(1) as threads:
            profiled = threads.submit(other.profile, "torchvision/resnet18", seed=0, repetitions=20)
            answers = 0
            while not wait([profiled], timeout=0.2).done:  # else it would wait for a quiet moment for ever
                for _ in range(5):
                    assert torch.equal(model(x), expected)
                answers += 5
            assert len(profiled.result().measured) == 1 and answers > 0
