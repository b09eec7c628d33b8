"""What the planner is told of a program."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from adapt.errors import ConfigError
from adapt.models.cut import legal_cuts, write_stages
from adapt.models.layers import profile_model, with_workspace
from adapt.planning.model import ModelProfile


@pytest.fixture(scope="module")
def small(make_case):
    return make_case(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 100), nn.ReLU()), torch.randn(1, 4))


def test_layers_lie_between_legal_cuts(small):
    costs_s = [0.1 * (number + 1) for number in range(len(small.program.graph.operators))]
    model = profile_model("small", small.program, costs_s)
    cuts = legal_cuts(small.program)
    assert [layer.end for layer in model.layers] == [*(cut.position for cut in cuts), len(costs_s)]
    assert list(model.crossing_bytes) == [16, *(cut.crossing_bytes for cut in cuts), 400]
    assert model.seconds_before[-1] == pytest.approx(sum(costs_s))
    assert model.weights_before[-1] == small.program.graph.weight_bytes == 4 * (4 * 8 + 8 + 8 * 100 + 100)
    heaviest = max(model.layers, key=lambda layer: layer.weight_bytes)
    assert heaviest.place == "2" and heaviest.heaviest_bytes == 4 * 900
    assert heaviest.peak_bytes == 32 + 400


def test_a_stage_needs_what_a_worker_will_say(small, tmp_path):
    model = profile_model("small", small.program, [0.0] * len(small.program.graph.operators))
    for number, cut in enumerate(legal_cuts(small.program), start=1):
        first, second = write_stages(small.program, [cut.position], tmp_path)
        needed = [model.memory_bytes(0, number), model.memory_bytes(number, len(model.layers))]
        for bytes_needed, stage in zip(needed, (first, second), strict=True):
            assert bytes_needed >= stage.weight_bytes + sum(spec.bytes_at(1) for spec in (*stage.inputs, *stage.outputs))


def test_a_profile_survives_its_file(small):
    model = profile_model("small", small.program, [0.25] * len(small.program.graph.operators), reference="here")
    again = ModelProfile.from_json(model.to_json())
    assert again == model and again.reference == "here"


@given(st.data())
def test_a_layer_takes_the_most_that_one_of_its_operators_takes_on_any_device(branches, data):
    operators = len(branches.program.graph.operators)
    model = profile_model("branches", branches.program, [0.0] * operators)
    spans = list(pairwise([0, *(layer.end for layer in model.layers)]))
    assert max(end - begin for begin, end in spans) > 1, "or this would show less"
    told = data.draw(st.lists(st.tuples(*[st.none() | st.integers(0, 9)] * operators), max_size=3))
    expected = [max((device[place] or 0 for device in told for place in range(*span)), default=0) for span in spans]
    assert [layer.workspace_bytes for layer in with_workspace(model, told).layers] == expected


def test_each_layer_has_its_own_workspace(small):
    operators = len(small.program.graph.operators)
    model = profile_model("small", small.program, [0.0] * operators)
    found = with_workspace(model, [tuple(range(operators)), tuple(reversed(range(operators)))])
    assert len(model.layers) == operators == 4 and [layer.workspace_bytes for layer in found.layers] == [3, 2, 2, 3]


def test_seconds_of_another_program_are_refused(small):
    with pytest.raises(ConfigError, match="operators"):
        profile_model("small", small.program, [0.0])
