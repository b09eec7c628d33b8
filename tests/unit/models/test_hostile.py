"""Stage files that mean harm are refused before anything of them runs, or fail by a typed error; a worker outlives them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from adapt.errors import ModelError, WireError
from adapt.models.cut import write_stages
from adapt.models.interpreter import Stage
from adapt.models.operators import OPERATORS
from adapt.models.program import Affine, Graph, Operator, SizeSpec, TensorSpec, ValueRef, ValueSpec, stage_to_metadata
from adapt.models.tensorfile import write_tensor_file

HOSTILE = Path(__file__).with_name("hostile.py")
X, LIMIT_BYTES = ValueRef(0), 64 << 20
VECTOR = TensorSpec("float32", (4,), (0,))
IMAGE = TensorSpec("float32", (1, 4, 8, 8), (0, 1, 2, 3))
KERNEL = TensorSpec("float32", (4, 4, 3, 3), (0, 1, 2, 3))


def crafted(directory, operators, *, inputs=(VECTOR,), values=(), output=None):
    """A stage of these operators, each (name, args) or (name, args, kwargs); each defines the next value, `values` says as what."""
    specs: list[ValueSpec] = [*inputs, *(values or [VECTOR] * len(operators))]
    made = [Operator(name, args, rest[0] if rest else {}, (len(inputs) + place,)) for place, (name, args, *rest) in enumerate(operators)]
    outputs = (len(inputs) + len(operators) - 1 if output is None else output,)
    graph = Graph(tuple(made), tuple(specs), (), tuple(range(len(inputs))), outputs)
    return write_tensor_file(directory, stage_to_metadata(graph), [])[0]


def load(path):
    return Stage.load(path, limit_bytes=LIMIT_BYTES)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("zeros.default", ((2**40,),)), ("full.default", ((2**20, 2**20), 1.0)), ("new_zeros.default", (X, (2**62, 2**62))),
        ("eye.default", (2**31,)), ("eye.m", (1, 2**40)), ("arange.default", (2.0**60,)), ("arange.start_step", (0, 1, 1e-12)),
        ("linspace.default", (0, 1, 2**40)), ("one_hot.default", (X, 2**40)), ("one_hot.default", (X, -1)),
        ("repeat.default", (X, (2**40,))), ("tile.default", (X, (2**20, 2**20))), ("repeat_interleave.self_int", (X, 2**40)),
        ("constant_pad_nd.default", (X, (0, 2**40))), ("pad.default", (X, (2**40, 0))), ("adaptive_avg_pool1d.default", (X, (2**40,))),
        ("expand.default", (X, (2**40, 4))), ("chunk.default", (X, 2**40)), ("tensor_split.sections", (X, 2**40)),
        ("einsum.default", ("a,b,c,d,e,f,g,h,i,j,k,l,m,n->", (X,) * 14)),
    ],
)  # fmt: skip
def test_what_asks_for_too_much_is_refused_before_it_runs(tmp_path, name, args):
    claimed = [TensorSpec("float32", (2**40, 4), None)] if name.startswith("expand") else []
    with pytest.raises(WireError, match=r"may take|depends on values|for one item"):
        load(crafted(tmp_path, [(f"aten.{name}", args)], values=claimed))


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("conv2d.default", (X, ValueRef(1), None, (1, 1), (2**20, 2**20))), ("conv2d.default", (X, ValueRef(1), None, 1, 2**30)),
        ("conv_transpose2d.input", (X, ValueRef(1), None, (2**20, 2**20))),
        ("upsample_nearest2d.default", (X, (2**20, 2**20))), ("upsample_bilinear2d.vec", (X, None, False, (2.0**20, 2.0**20))),
        ("adaptive_avg_pool2d.default", (X, (2**20, 2**20))), ("reflection_pad2d.default", (X, (2**20, 2**20, 2**20, 2**20))),
    ],
)  # fmt: skip
def test_layers_that_make_much_of_little_are_refused(tmp_path, name, args):
    with pytest.raises(WireError, match="may take"):
        load(crafted(tmp_path, [(f"aten.{name}", args)], inputs=(IMAGE, KERNEL)))


def test_a_broadcast_of_two_long_vectors_is_refused(tmp_path):
    row, column = TensorSpec("float32", (1, 2**20), (0, 1)), TensorSpec("float32", (2**20, 1), (0, 1))
    for name in ("add.Tensor", "where.self", "mul.Tensor", "matmul.default", "pow.Tensor_Tensor", "max.other", "min.other"):
        args = (ValueRef(1), X) if name == "matmul.default" else (X, ValueRef(1))
        args = (X, *args) if name == "where.self" else args
        with pytest.raises(WireError, match="may take"):
            load(crafted(tmp_path, [(f"aten.{name}", args)], inputs=(row, column)))


@pytest.mark.parametrize(
    "spec",
    [
        TensorSpec("float32", (2**40,), (0,)), TensorSpec("float64", (Affine(2**30, 0), 2**20), (0, 1)), TensorSpec("bool", (-1,), (0,)),
        TensorSpec("float32", (Affine(-1, 5),), (0,)), TensorSpec("float32", (2**62, 2**62, 2**62), (0, 1, 2)),
    ],
)  # fmt: skip
def test_claims_beyond_all_memory_are_refused(tmp_path, spec):
    with pytest.raises(WireError, match=r"for one item|negative"):
        load(crafted(tmp_path, [("aten.relu.default", (X,))], values=[spec]))


def test_a_lie_about_a_shape_is_found_before_it_does_harm(tmp_path):
    """The vector becomes a column, which the file denies; a sum of both would have 2**40 elements."""
    vector = TensorSpec("float32", (2**20,), (0,))
    operators = [("aten.unsqueeze.default", (X, 1)), ("aten.add.Tensor", (X, ValueRef(1)))]
    stage = load(crafted(tmp_path, operators, inputs=(vector,), values=[vector, vector]))
    with pytest.raises(ModelError, match=r"operators\[0\]: aten\.unsqueeze\.default: gives float32 \(1048576, 1\), the file claims"):
        stage.run([torch.zeros(2**20)])
    batched = TensorSpec("float32", (Affine(1, 0), 2**20), (0, 1))  # of a batch of one shapes may differ
    operators = [("aten.view.default", (X, (-1, 1))), ("aten.add.Tensor", (X, ValueRef(1)))]
    stage = load(crafted(tmp_path, operators, inputs=(batched,), values=[batched, batched]))
    with pytest.raises(ModelError, match=r"operators\[1\]: aten\.add\.Tensor: may take 8,192.0 GiB"):
        stage.run([torch.zeros(1, 2**20)])


@pytest.mark.parametrize("result", [TensorSpec("float64", (4,), (0,)), TensorSpec("float32", (5,), (0,)), SizeSpec(4)])
def test_another_result_than_claimed_is_an_error(tmp_path, result):
    with pytest.raises(ModelError, match=r"gives float32 \(4,\), the file claims"):
        load(crafted(tmp_path, [("aten.relu.default", (X,))], values=[result])).run([torch.ones(4)])


@pytest.mark.parametrize(
    "operators",
    [
        [("operator.mul", ("a", 2**40))], [("operator.mod", ("%999999999d", 1))], [("operator.mul", ((1, 2), 2**40))],
        [("operator.mul", (2**62, 2**62))], [("operator.mul", (ValueRef(1), ValueRef(1)))], [("operator.floordiv", (ValueRef(1), 0))],
        [("operator.mod", (ValueRef(1), 2))], [("operator.add", (ValueRef(1), 1.5))], [("operator.add", (ValueRef(1),))],
        [("operator.add", (ValueRef(1), X))], [("aten.sym_size.int", (ValueRef(1), 0))], [("aten.sym_size.int", (X, 9))],
        [("operator.add", (ValueRef(1), 2))],
    ],
)  # fmt: skip
def test_sizes_are_computed_as_claimed_or_refused(tmp_path, operators):
    inputs = (TensorSpec("float32", (Affine(1, 0), 4), (0, 1)), SizeSpec(Affine(1, 0)))
    with pytest.raises(WireError, match="is not a size that the batch decides"):
        load(crafted(tmp_path, operators, inputs=inputs, values=[SizeSpec(Affine(1, 1))]))


def test_sizes_that_grow_without_end_are_refused(tmp_path):
    """Each is the square of the one before: after sixty the number would not fit into any memory."""
    operators = [("operator.mul", (ValueRef(max(place, 0)), ValueRef(max(place, 0)))) for place in range(60)]
    values = [SizeSpec(2 ** min(2**place, 62)) for place in range(1, 61)]
    with pytest.raises(WireError, match="is not a size"):
        load(crafted(tmp_path, operators, inputs=(SizeSpec(2),), values=values))


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("batch_norm.default", (X, None, None, ValueRef(1), ValueRef(1), True, 0.1, 1e-5, False)),
        ("instance_norm.default", (X, None, None, ValueRef(1), ValueRef(1), True, 0.1, 1e-5, False)),
        ("scaled_dot_product_attention.default", (X, X, X, None, 0.5)),
    ],
)  # fmt: skip
def test_training_writes_to_weights_and_is_refused(tmp_path, name, args):
    with pytest.raises(WireError, match="compute the same whenever they run"):
        load(crafted(tmp_path, [(f"aten.{name}", args)], inputs=(IMAGE, VECTOR), values=[IMAGE]))


def test_a_recurrent_layer_whose_parts_do_not_fit_is_refused(tmp_path):
    """Regression: its kernel wrote outside of its memory when states were of another batch than the input."""
    specs = [(5, 12, 8), (1, 1, 16), (1, 1, 16), (64, 8), (64, 16), (64,), (64,)]
    inputs = tuple(TensorSpec("float32", shape, tuple(range(len(shape)))) for shape in specs)
    x, h, c, *weights = map(ValueRef, range(7))
    args = (x, (h, c), tuple(weights), True, 1, 0.0, False, False, True)
    with pytest.raises(WireError, match="the states do not fit the input"):
        load(crafted(tmp_path, [("aten.lstm.input", args)], inputs=inputs))
    args = (h, (h, c), tuple(weights), True, 1, 0.0, False, False, True)
    with pytest.raises(WireError, match="the weights do not fit the input"):
        load(crafted(tmp_path, [("aten.lstm.input", args)], inputs=inputs))
    projected = (5, 12, 8), (1, 5, 4), (1, 5, 16), (64, 8), (64, 4), (64,), (64,), (5, 16)
    inputs = tuple(TensorSpec("float32", shape, tuple(range(len(shape)))) for shape in projected)
    args = (x, (h, c), (*weights, ValueRef(7)), True, 1, 0.0, False, False, True)
    with pytest.raises(WireError, match="the weights do not fit the input"):
        load(crafted(tmp_path, [("aten.lstm.input", args)], inputs=inputs))


def test_an_index_that_is_a_mask_is_refused(tmp_path):
    mask = TensorSpec("bool", (4,), (0,))
    with pytest.raises(WireError, match="depends on values"):
        load(crafted(tmp_path, [("aten.index.Tensor", (X, (ValueRef(1),)))], inputs=(VECTOR, mask)))
    assert not {name for name in OPERATORS if "masked_select" in name or "nonzero" in name}


@pytest.mark.parametrize("argument", [ValueRef(1), ValueRef(2), ValueRef(9)])
def test_cycles_and_references_ahead_are_refused(tmp_path, argument):
    operators = [("aten.add.Tensor", (X, argument)), ("aten.relu.default", (ValueRef(1),))]
    with pytest.raises(WireError, match="used before it is defined"):
        load(crafted(tmp_path, operators))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.lstm = nn.Embedding(50, 8), nn.LSTM(8, 16, batch_first=True)
        self.conv, self.norm = nn.Conv1d(16, 4, 3, padding=1), nn.GroupNorm(2, 4)

    def forward(self, tokens):
        return self.norm(self.conv(self.lstm(self.table(tokens))[0].transpose(1, 2)))


def tried(path, count, seed):
    """In a process of its own: a hole may be a crash."""
    done = subprocess.run([sys.executable, str(HOSTILE), str(path), str(count), str(seed)], capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, f"seed {seed}: status {done.returncode}: {done.stderr[-2000:]}"
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["refused"] > count / 4 and counts["failed"] and counts["ran"]
    assert counts["more_bytes"] < 1 << 30
    return counts


def test_changed_files_give_typed_errors_only(branches, tmp_path):
    (stage,) = write_stages(branches.program, [], tmp_path)
    tried(stage.path, 500, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("model", ["words", "encoder"])
def test_many_changed_files_give_typed_errors_only(make_case, tmp_path, model, seed):
    torch.manual_seed(0)
    if model == "words":
        case = make_case(Words().eval(), torch.zeros(1, 12, dtype=torch.long))
    else:
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        case = make_case(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval(), torch.randn(1, 6, 16))
    (stage,) = write_stages(case.program, [], tmp_path)
    tried(stage.path, 2000, seed)
