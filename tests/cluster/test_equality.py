"""The distributed model answers, bit for bit, what the user's eager module answers."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import adapt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from reference import expected

SIX = ("mobilenet_v2", "inception_v3", "alexnet", "resnet18", "resnet50", "vgg16")
LIGHT = ("mobilenet_v2", "resnet18", "alexnet")


def images(model: str, *, seed: int = 1) -> list[np.ndarray]:
    side = 299 if model == "inception_v3" else 224
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((batch, 3, side, side), dtype=np.float32) for batch in (1, 3)]


@pytest.fixture(scope="module")
def cluster():
    with adapt.LocalCluster(workers=4) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def client(cluster):
    with adapt.Client(cluster.address) as client:
        yield client


def check(client, model, tmp_path, *, stages, codec):
    inputs = images(model)
    truth = expected(tmp_path, model, inputs)
    assert not np.array_equal(truth[0], truth[1][:1]), "different inputs must have different answers"
    for count in stages:
        deployed = client.deploy(f"torchvision/{model}", stages=count, seed=0, codec=codec, name=f"{model}-{count}-{codec}", timeout_s=300)
        assert len(deployed.record.stages) == count
        for x, y in zip(inputs, truth, strict=True):
            answer = deployed(x)
            assert answer.dtype == y.dtype and np.array_equal(answer, y), f"{model} in {count} stages, batch {len(x)}, {codec}"
        client.undeploy(deployed.name)


@pytest.mark.parametrize("model", LIGHT)
def test_a_model_in_four_stages_answers_what_it_answers_whole(client, model, tmp_path):
    check(client, model, tmp_path, stages=(4,), codec="lz4")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("codec", ["raw", "lz4"])
@pytest.mark.parametrize("model", SIX)
def test_every_cut_of_the_six_models_answers_what_they_answer_whole(client, model, codec, tmp_path):
    check(client, model, tmp_path, stages=(1, 2, 3, 4), codec=codec)
