"""What operators need: enough that nothing harmful passes, and no more than ordinary models have on small devices."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adapt.errors import WireError
from adapt.models.needs import Shape, _named, check_call, check_need, most_elements
from adapt.models.operators import OPERATORS

GIB = 1 << 30
ROW, COLUMN = torch.ones(1, 64), torch.ones(64, 1)


def binary():
    """The operators that can be called with two tensors and nothing else."""
    for name, call in sorted(OPERATORS.items()):
        if not isinstance(call, torch._ops.OpOverload):
            continue
        needed = [argument for argument in call._schema.arguments if not argument.has_default_value()]
        if [str(argument.type) for argument in needed] == ["Tensor", "Tensor"] and not any(argument.kwarg_only for argument in needed):
            yield name


@pytest.mark.parametrize("name", list(binary()))
def test_no_operator_makes_more_of_two_tensors_than_is_reckoned(name):
    """Regression: `max.other` broadcasts, and was taken for a reduction."""
    call = OPERATORS[name]
    for dtype in (torch.float32, torch.int64, torch.bool):
        for args in ((ROW, COLUMN), (COLUMN, ROW), (ROW[0], COLUMN), (ROW, ROW)):
            given = [arg.to(dtype) for arg in args]
            try:
                result = call(*given)
            except (RuntimeError, IndexError):
                continue  # not for these
            sizes = [item.numel() for item in (result if isinstance(result, (tuple, list)) else [result])]
            assert max(sizes) <= most_elements(name, _named(call, [Shape(arg.shape) for arg in args], {}))


def convolve(image, weight, *, stride=1, padding=0, dilation=1, dtype=torch.float32, limit_bytes):
    given = {"input": Shape.of(image, dtype), "weight": Shape.of(weight, dtype), "bias": None}
    given |= {"stride": [stride] * 2, "padding": [padding] * 2, "dilation": [dilation] * 2, "groups": 1}
    check_need("aten.conv2d.default", given, limit_bytes, "here")


def test_ordinary_convolutions_run_on_small_devices():
    """Regression: all columns of an image were counted, with eight bytes each."""
    convolve((1, 2048, 65, 65), (512, 2048, 3, 3), padding=1, limit_bytes=GIB // 2)  # the head of fcn_resnet50, half of 1 GiB
    convolve((1, 64, 1024, 1024), (64, 64, 3, 3), padding=1, limit_bytes=4 * GIB)
    convolve((1, 3, 1024, 1024), (64, 3, 7, 7), stride=2, padding=3, limit_bytes=GIB // 4)
    convolve((1, 64, 1024, 1024), (64, 64, 3, 3), padding=1, limit_bytes=300 << 20)  # 256 MiB come out


def test_convolutions_that_make_too_much_are_refused():
    with pytest.raises(WireError, match=r"may take 0\.3 GiB"):
        convolve((1, 64, 1024, 1024), (64, 64, 3, 3), padding=1, limit_bytes=200 << 20)
    with pytest.raises(WireError, match=r"may take 0\.5 GiB"):
        convolve((1, 64, 1024, 1024), (64, 64, 3, 3), padding=1, dtype=torch.float64, limit_bytes=300 << 20)
    with pytest.raises(WireError, match="may take"):  # a kernel of a thousand by a thousand: its columns are a million times the image
        convolve((1, 1, 2000, 2000), (1, 1, 1000, 1000), limit_bytes=4 * GIB)


def test_narrow_numbers_count_as_what_kernels_compute_with():
    half = torch.ones(64, 64, dtype=torch.bfloat16)
    check_call(OPERATORS["aten.mm.default"], "aten.mm.default", [half, half], {}, 4 * 64 * 64)
    with pytest.raises(WireError, match="may take"):
        check_call(OPERATORS["aten.mm.default"], "aten.mm.default", [half, half], {}, 3 * 64 * 64)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"bidirectional": True, "num_layers": 2}, {"bias": False}])
def test_a_projected_lstm_runs_as_it_does_eagerly(make_case, tmp_path, options):
    """Regression: its states are of two widths, and were refused."""
    torch.manual_seed(0)
    case = make_case(nn.LSTM(8, 16, proj_size=4, batch_first=True, **options).eval(), torch.randn(2, 5, 8), repetitions=0)
    case.check([], tmp_path)
