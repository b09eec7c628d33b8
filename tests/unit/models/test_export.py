from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from adapt.errors import ExportError
from adapt.models.export import export_module
from adapt.models.profiler import profile_file
from adapt.models.tensorfile import read_tensor_file

X = torch.randn(1, 4)


class Plain(nn.Module):
    """Its forward is a function given to it."""

    def __init__(self, function):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def test_the_users_module_is_left_as_it_was(tmp_path):
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)).train()
    module[2].eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    storages = [parameter.data_ptr() for parameter in module.parameters()]
    export_module(module, (X,), directory=tmp_path)
    assert [part.training for part in module] == [True, True, False]
    assert storages == [parameter.data_ptr() for parameter in module.parameters()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert torch.get_num_threads() == 1 and torch.is_grad_enabled()


def test_tied_weights_are_stored_once_and_unused_ones_not_at_all(make_case, tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode, self.decode, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(500, 500)
            self.decode.weight = self.encode.weight

        def forward(self, x):
            return self.decode(self.encode(x).relu())

    case = make_case(Tied(), X)
    assert len(read_tensor_file(case.program.path).tensors) == 3
    case.check([], tmp_path)


def test_costs_are_seconds_for_each_operator(make_case):
    case = make_case(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), X)
    assert len(case.exported.operator_costs_s) == len(case.program.graph.operators) == 2
    assert all(0 < cost_s < 1 for cost_s in case.exported.operator_costs_s)
    assert len(profile_file(case.program.path, batch=2, repetitions=2)) == 2


def test_numpy_examples_are_taken(tmp_path):
    exported = export_module(nn.Linear(4, 2), (np.ones((1, 4), np.float32),), directory=tmp_path)
    assert exported.is_exact and exported.is_batched


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: {"a": [m.linear(x), None], "b": (x, 3, "text")},
        lambda m, x: (x, x),  # an input is an output, twice
        lambda m, x: (m.linear.weight, x * 2),
        lambda m, x: x.clone().relu_().mul_(2).add_(x),
        lambda m, x: m.linear(x).view(-1, 2, 2).transpose(1, 2).reshape(x.shape[0], 4),
        lambda m, x: nn.functional.dropout(m.linear(x), 0.5, m.training),
        lambda m, x: x + torch.arange(x.shape[0] * 2)[: x.shape[0], None],
        lambda m, x: torch.where(x > 0, x, float("-inf")).softmax(1),
    ],
)
def test_what_a_model_returns_is_returned(make_case, tmp_path, function):
    case = make_case(Plain(function), X)
    assert case.exported.is_exact and case.exported.is_batched
    case.check([], tmp_path)


def test_a_view_that_is_read_after_a_write_sees_it(make_case, tmp_path):
    def write_through_a_view(module, x):
        y = x.clone()
        y[:, :2] += 1
        view = y[0]
        y.mul_(2)
        return y, view

    case = make_case(Plain(write_through_a_view), X)
    assert case.exported.is_exact
    case.check([], tmp_path)


def test_regions_without_gradients_or_autocast_are_part_of_the_model(make_case, tmp_path):
    def regions(module, x):
        with torch.no_grad():
            y = module.linear(x)
        with torch.autocast("cpu", enabled=False):
            return module.linear(y) + x

    make_case(Plain(regions), X).check([], tmp_path)

    def region_and_write(module, x):
        with torch.no_grad():
            y = module.linear(x).clone()
        y[:, :2] += 1
        return y

    make_case(Plain(region_and_write), X).check([], tmp_path)


def test_a_model_that_fixes_its_batch_has_fixed_shapes(make_case):
    def fixed(module, x):
        return x * 2 if x.shape[0] < 3 else x

    case = make_case(Plain(fixed), X)
    assert not case.exported.is_batched and case.program.batch_limit is None
    case.check([], case.program.path.parent, batches=(1,))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda m, x: x + 1 if x.sum() > 0 else x, r"cannot trace Plain: .*data-dependent.*torch\.where"),
        (lambda m, x: x + torch.rand_like(x), r"aten\.rand_like\.default, used in the model itself \(Plain\).*random"),
        (lambda m, x: nn.functional.dropout(x, 0.5), "random"),
        (
            lambda m, x: nn.functional.batch_norm(x, torch.zeros(4), torch.ones(4), training=True),
            "pass `training=self.training`",
        ),
        (lambda m, x: torch.fft.fft(x).abs(), "fft"),
        (lambda m, x: x[x > 0], r"aten\.index\.Tensor, used in the model itself \(Plain\).*depends on the values"),
        (lambda m, x: torch.masked_select(x, x > 0), r"aten\.masked_select\.default, used in the model itself \(Plain\)"),
        (lambda m, x: x.nonzero(), r"aten\.nonzero\.default, used in the model itself \(Plain\)"),
        (lambda m, x: torch.unique(x), r"aten\._unique2\.default, used in the model itself \(Plain\)"),
        (
            lambda m, x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)),
            r"operator cond, used in the model itself \(Plain\).*torch\.where",
        ),
        (lambda m, x: x * x.sum().item(), r"aten\.item\.default, used in the model itself \(Plain\).*keep it a tensor"),
        (lambda m, x: x[: int(x.sum().item())], "cannot trace Plain: .*data-dependent"),
        (lambda m, x: torch.linalg.inv(x.T @ x + torch.eye(4)), r"aten\.linalg_inv\.default"),
        (lambda m, x: x.reshape(3, 4), "fails on the example"),
        (lambda m, x: {(1, 2): x}, "dict with keys"),
    ],
)
def test_what_cannot_be_exported_says_where_and_what_to_do(tmp_path, function, message):
    with pytest.raises(ExportError, match=message):
        export_module(Plain(function), (X.repeat(2, 1),), directory=tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_operator_is_named_with_its_place_in_the_model(tmp_path):
    module = nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"noise": Plain(lambda m, x: torch.bernoulli(x.sigmoid()))})["noise"])
    with pytest.raises(ExportError, match=r"used in 1 \(Plain\)"):
        export_module(module, (X,), directory=tmp_path)


def test_state_that_changes_is_refused(tmp_path):
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return x + self.calls

    counter = Counter()
    with pytest.raises(ExportError, match="writes to its own calls"):
        export_module(counter, (X,), directory=tmp_path)
    assert counter.calls == 0  # the user's own has not been called
