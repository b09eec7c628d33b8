"""What planning knows of a model: the memory that stages need, and profiles in files, those of earlier versions too."""

from __future__ import annotations

import json
import math
import random

import pytest

from adapt.errors import ConfigError
from adapt.planning import tables
from adapt.planning.model import LayerProfile, ModelProfile
from tests.unit.planning import brute


def layer(number: int, *, peak: int, workspace: int = 0, weights: int = 0, output: int = 1) -> LayerProfile:
    return LayerProfile(
        place="", cost_s=0.1, weight_bytes=weights, peak_bytes=peak, output_bytes=output, end=number + 1, workspace_bytes=workspace
    )


def test_memory_is_weights_and_what_is_alive_while_the_worst_layer_runs_or_both_ends():
    layers = (layer(0, peak=10, workspace=5, weights=100), layer(1, peak=12, workspace=1, weights=200), layer(2, peak=1, output=40))
    model = ModelProfile("m", 3, layers)
    assert [model.memory_bytes(number, number + 1) for number in range(3)] == [115, 213, 41]
    assert model.memory_bytes(0, 2) == 315 and model.memory_bytes(0, 3) == 300 + 43


def test_tables_count_memory_as_the_model_does():
    draw = random.Random(3)
    for _ in range(20):
        model = brute.drawn_model(draw, layers=draw.randint(1, 8))
        assert any(layer.workspace_bytes for layer in model.layers) or len(model.layers) < 4
        found, count = tables.memory_bytes(model), len(model.layers)
        for begin in range(count):
            assert all(found[begin, end] == model.memory_bytes(begin, end) for end in range(begin + 1, count + 1))
        assert all(math.isinf(found[end, end]) for end in range(count))


def test_a_profile_from_before_workspace_was_measured_has_none():
    model = ModelProfile("m", 3, (layer(0, peak=10, workspace=5),))
    assert ModelProfile.from_json(model.to_json()) == model
    plain = json.loads(model.to_json())
    del plain["layers"][0]["workspace_bytes"]
    assert ModelProfile.from_json(json.dumps(plain)) == ModelProfile("m", 3, (layer(0, peak=10),))


@pytest.mark.parametrize("workspace", [-1, math.inf, math.nan, "much", None])
def test_a_workspace_that_cannot_be_is_refused(workspace):
    model = ModelProfile("m", 3, (layer(0, peak=10),))
    plain = json.loads(model.to_json())
    plain["layers"][0]["workspace_bytes"] = workspace
    with pytest.raises(ConfigError):
        ModelProfile.from_json(json.dumps(plain))
