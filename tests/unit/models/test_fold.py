"""Folding: nearly the module's numbers, and of the folded program every cut gives the same bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from adapt.errors import ConfigError, ExportError
from adapt.models.cut import legal_cuts, write_stages
from adapt.models.export import export_module
from adapt.models.fold import NHWC
from adapt.models.interpreter import Stage
from adapt.models.optimize import optimize_program
from adapt.models.program import read_program
from adapt.models.sources import build_named_model

BOUND = 5e-6  # of the largest number in an output; seen were 2e-7 to 3e-6
SMALL = ["mobilenet_v2"]
FAMILIES = [
    "resnet18", "resnet50", "densenet121", "efficientnet_b0", "regnet_y_400mf", "shufflenet_v2_x0_5", "squeezenet1_1", "googlenet", "mnasnet0_5",
    "mobilenet_v3_small", "resnext50_32x4d", "vgg11_bn", "inception_v3", "maxvit_t",
]  # fmt: skip


def as_trained(module, seed=0):
    """With statistics as training leaves them: of a new batch norm, 0 and 1, folding would change nothing."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.running_mean.normal_(0, 0.1, generator=generator)
            part.running_var.uniform_(0.5, 1.5, generator=generator)
            if part.affine:
                nn.init.uniform_(part.weight, 0.7, 1.3, generator=generator)
                nn.init.normal_(part.bias, 0, 0.1, generator=generator)
    return module.eval()


def folded(module, x, directory):
    exported = export_module(module, (x,), directory=directory, profile_repetitions=0, optimize="fold")
    return exported, read_program(exported.path)


def names(program):
    return [operator.name for operator in program.graph.operators]


def deviation(module, program, x):
    """Of the loaded file from the user's eager module, as a share of the largest number."""
    with torch.inference_mode():
        expected = module(x)
    (actual,) = Stage.load(program.path).run([x])
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())


def check_cuts(program, x, directory, step=1):
    """However it is cut, the folded program gives its own bits."""
    expected = Stage.load(program.path).run([x])
    cuts = legal_cuts(program)
    for cut in cuts[::step]:
        values = [x]
        for artifact in write_stages(program, [cut.position], directory):
            values = Stage.load(artifact.path).run([value.clone() if isinstance(value, torch.Tensor) else value for value in values])
        assert all(torch.equal(one, other) for one, other in zip(values, expected, strict=True)), f"cut at {cut.position}"
    return len(cuts)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.late = nn.Sequential(nn.Conv2d(8, 8, 3, padding="same", groups=8), nn.BatchNorm2d(8, affine=False), nn.Hardswish())
        self.skip, self.norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8 * 16, 5)

    def forward(self, x):
        x = self.stem(x)
        y = self.late(x)
        skip = self.skip(x)
        y = y + self.norm(skip) + skip  # read twice: stays
        return self.head(nn.functional.max_pool2d(y, 2).view(x.shape[0], -1))


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    torch.manual_seed(0)
    module, x = as_trained(Net()), torch.randn(2, 3, 8, 8)
    return module, x, folded(module, x, tmp_path_factory.mktemp("folded"))


def test_batch_norms_are_gone_and_weights_lie_channels_last(net):
    module, _, (exported, program) = net
    assert names(program).count("aten.batch_norm.default") == 1
    assert "aten.view.default" not in names(program)  # which refuses what lies channels last
    assert program.changes == ("channels_last", "fold") and program.arithmetic == "channels_last/fold"
    orders = {weight.stored.key: weight.order for weight in program.graph.weights}
    assert orders["stem.0.weight"] == orders["late.0.weight"] == orders["skip.weight"] == NHWC and orders["head.weight"] is None
    assert {"stem.0.bias", "late.0.bias"} <= set(orders) and not any("running" in key and "norm" not in key for key in orders)
    assert 0 < exported.deviation < BOUND and not exported.is_exact and exported.is_batched
    for batch in (1, 2, 5):
        assert deviation(module, program, torch.randn(batch, 3, 8, 8)) < BOUND


def test_the_folded_program_is_cut_without_changing_a_bit(net, tmp_path):
    _, _, (_, program) = net
    for batch in (1, 3):
        assert check_cuts(program, torch.randn(batch, 3, 8, 8), tmp_path) >= 8


def test_the_same_model_gives_the_same_file(net, tmp_path):
    module, x, (exported, _) = net
    again, _ = folded(module, x, tmp_path)
    assert again.digest == exported.digest
    assert [path.name for path in tmp_path.iterdir()] == [again.path.name]  # not the program as it was exported


def test_what_has_nothing_to_fold_stays_as_it_is(tmp_path):
    module, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()).eval(), torch.randn(2, 4)
    plain = export_module(module, (x,), directory=tmp_path, profile_repetitions=0)
    exported, program = folded(module, x, tmp_path)
    assert exported.digest == plain.digest and exported.is_exact and exported.deviation == 0
    assert program.changes == () and program.arithmetic == "contiguous"


def test_a_model_of_matrix_products_is_folded_but_not_laid_out_anew(tmp_path):
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 4, 2, stride=2), nn.BatchNorm2d(4), nn.Flatten(2), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 3)]
    _, program = folded(as_trained(nn.Sequential(*body)), torch.randn(1, 3, 8, 8), tmp_path)
    assert program.changes == ("fold",)


def test_a_convolution_that_is_used_twice_becomes_two(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.one, self.other = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.other(self.conv(self.one(self.conv(x))))

    torch.manual_seed(0)
    module, x = as_trained(Twice()), torch.randn(2, 3, 4, 4)
    _, program = folded(module, x, tmp_path)
    assert "aten.batch_norm.default" not in names(program)
    assert {weight.stored.key for weight in program.graph.weights} == {"conv.weight", "conv.bias", "conv.weight+2", "conv.bias+2"}
    assert deviation(module, program, x) < BOUND


@pytest.mark.parametrize("variance", [0.0, 1e-30, float("inf"), float("nan"), -1.0])
def test_what_would_not_stay_finite_is_not_folded(tmp_path, variance):
    """With eps of 0 a channel that never varied would have an infinite weight; the module's own answer is kept, whatever it is."""
    module = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2, eps=0.0)).eval()
    module[1].running_var[0] = variance
    module[1].weight.data[0] = 1e30
    x = torch.randn(1, 3, 4, 4)
    _, program = folded(module, x, tmp_path)
    is_kept = "aten.batch_norm.default" in names(program)
    assert is_kept == (variance != float("inf"))  # which makes a weight of 0
    (actual,) = Stage.load(program.path).run([x])
    with torch.inference_mode():
        assert torch.allclose(actual, module(x), equal_nan=True)


def test_weights_that_are_computed_are_not_folded(tmp_path):
    class Standardized(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            weight = self.conv.weight - self.conv.weight.mean((1, 2, 3), keepdim=True)
            return self.norm(nn.functional.conv2d(x, weight, self.conv.bias))

    module, x = as_trained(Standardized()), torch.randn(1, 3, 6, 6)
    _, program = folded(module, x, tmp_path)
    assert "aten.batch_norm.default" in names(program) and deviation(module, program, x) < BOUND


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=12)
@given(
    dims=st.integers(1, 3), groups=st.sampled_from([1, 2, 4]), kernel=st.integers(1, 3), bias=st.booleans(), affine=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), batch=st.integers(1, 3), seed=st.integers(0, 9),
)  # fmt: skip
def test_any_convolution_and_norm(tmp_path, dims, groups, kernel, bias, affine, dtype, batch, seed):
    torch.manual_seed(seed)
    conv, norm = (getattr(nn, f"{kind}{dims}d") for kind in ("Conv", "BatchNorm"))
    module = as_trained(nn.Sequential(conv(4, 8, kernel, groups=groups, bias=bias), norm(8, affine=affine), nn.ReLU()), seed).to(dtype)
    x = torch.randn(batch, 4, *[5] * dims, dtype=dtype)
    _, program = folded(module, x, tmp_path)
    is_folded = dtype is not torch.bfloat16  # which would lose more than a last bit
    assert ("aten.batch_norm.default" in names(program)) != is_folded
    assert deviation(module, program, x) < (BOUND if is_folded else 1e-2)


def test_only_what_is_known_can_be_asked_for(net, tmp_path):
    module, x, (exported, _) = net
    with pytest.raises(ConfigError, match="optimize='int8': expected one of none, fold"):
        export_module(module, (x,), directory=tmp_path, optimize="int8")
    with pytest.raises(ExportError, match="optimized before"):
        optimize_program(exported.path, tmp_path)


@pytest.mark.parametrize("name", [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES)])
def test_a_family_deviates_by_its_last_bits_only(tmp_path, name):
    module, x = build_named_model(name, seed=0)
    as_trained(module)
    exported, program = folded(module, x, tmp_path)
    assert "fold" in program.changes or name == "squeezenet1_1"  # which has nothing to fold
    x = torch.randn(2, *x.shape[1:], generator=torch.Generator().manual_seed(1))
    measured = max(deviation(module, program, x[:1]), deviation(module, program, x))
    print(f"{name}: {measured:.1e} of the largest output, {exported.deviation:.1e} on the example")
    assert measured < BOUND
    cuts = legal_cuts(program)
    check_cuts(program, x, tmp_path, step=max(len(cuts) // 3, 1))
