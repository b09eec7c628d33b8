from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from adapt.errors import InputMismatchError, ModelError, WireError
from adapt.models import interpreter
from adapt.models.cut import legal_cuts, write_stages
from adapt.models.interpreter import Stage
from adapt.models.operators import OPERATORS
from adapt.models.program import Graph, Operator, TensorSpec, ValueRef, stage_to_metadata
from adapt.models.tensorfile import write_tensor_file

VECTOR = TensorSpec("float32", (4,), (0,))
X = ValueRef(0)


def crafted(directory, name, args=(X,), **kwargs):
    """A stage file of one operator from one vector to another."""
    graph = Graph((Operator(name, args, kwargs, (1,)),), (VECTOR, VECTOR), (), (0,), (1,))
    return write_tensor_file(directory, stage_to_metadata(graph), [])[0]


@pytest.mark.parametrize(
    "name",
    [
        "aten.from_file.default", "aten.from_file", "os.system", "builtins.eval", "aten.rand_like.default", "aten.relu_.default",
        "aten.add.out", "aten.empty.memory_format", "aten.as_strided.default", "operator.attrgetter", "prims.inductor_seeds.default",
    ],
)  # fmt: skip
def test_what_is_not_on_the_list_is_refused(tmp_path, name):
    with pytest.raises(WireError, match="not an operator that stages may use"):
        Stage.load(crafted(tmp_path, name))


@pytest.mark.parametrize("name", ["", "aten", "aten..relu", "__import__('os')", "aten.relu.default; import os", "a.b.c.d", 5])
def test_what_is_no_name_of_an_operator_is_refused(tmp_path, name):
    with pytest.raises(WireError, match="not the name of an operator"):
        Stage.load(crafted(tmp_path, name))


def test_arguments_that_the_operator_does_not_take_are_refused(tmp_path):
    with pytest.raises(WireError, match="does not take"):
        Stage.load(crafted(tmp_path, "aten.relu.default", (ValueRef(0), 1, 2)))
    with pytest.raises(WireError, match="does not take"):
        Stage.load(crafted(tmp_path, "aten.relu.default", out=ValueRef(0)))


def test_no_operator_on_the_list_writes_into_an_argument():
    overloads = [call for call in OPERATORS.values() if isinstance(call, torch._ops.OpOverload)]
    assert len(overloads) > 200
    assert not [str(call) for call in overloads if call._schema.is_mutable]


def test_what_an_operator_raises_is_the_models_own_error(tmp_path):
    stage = Stage.load(crafted(tmp_path, "aten.softmax.int", (ValueRef(0), 7)))
    with pytest.raises(ModelError, match=r"aten\.softmax\.int"):
        stage.run([torch.ones(4)])


def test_a_result_that_is_no_list_cannot_be_unpacked(tmp_path):
    graph = Graph((Operator("aten.sum.default", (ValueRef(0),), {}, (1, 2), True),), (VECTOR,) * 3, (), (0,), (2,))
    stage = Stage.load(write_tensor_file(tmp_path, stage_to_metadata(graph), [])[0])
    with pytest.raises(ModelError, match="IndexError"):
        stage.run([torch.ones(4)])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "expected 1 inputs, got 0"),
        ([torch.ones(4), torch.ones(4)], "expected 1 inputs, got 2"),
        ([torch.ones(5)], r"expected float32 \(4,\), got float32 \(5,\)"),
        ([torch.ones(4, dtype=torch.float64)], r"got float64 \(4,\); convert with x.to\(torch.float32\)"),
        ([4], "got int"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(tmp_path, inputs, message):
    with pytest.raises(InputMismatchError, match=message):
        Stage.load(crafted(tmp_path, "aten.relu.default")).run(inputs)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)

    def forward(self, x):
        y = self.conv(x)
        y += x
        return torch.relu_(y).add_(1)


def test_a_retained_activation_is_not_written_to(make_case, tmp_path):
    """A retry starts again from the activation that the first attempt was given."""
    case = make_case(Residual(), torch.randn(1, 2, 4, 4))
    for cut in legal_cuts(case.program):
        first, second = (Stage.load(artifact.path) for artifact in write_stages(case.program, [cut.position], tmp_path))
        x = torch.randn(2, 2, 4, 4)
        before = x.clone()
        retained = first.run([x])
        copies = [value.clone() for value in retained]
        once, again = second.run(retained), second.run(retained)
        assert torch.equal(x, before)
        assert all(torch.equal(value, copy) for value, copy in zip(retained, copies, strict=True))
        assert torch.equal(once[0], again[0]) and torch.equal(once[0], case.eager((before,), {}))


def test_unaligned_and_strided_inputs_give_the_same_bits(named_case):
    case = named_case("mobilenet_v2")
    stage = Stage.load(case.program.path)
    x = case.batch_of(1)[0][0]
    memory = torch.empty(x.numel() + 1)
    unaligned = memory[1:].view(x.shape).copy_(x)
    strided = x.to(memory_format=torch.channels_last)
    expected = stage.run([x])[0]
    assert torch.equal(stage.run([unaligned])[0], expected)
    assert torch.equal(stage.run([strided])[0], expected)


def test_a_paused_run_is_watched_until_one_has_come_to_its_end(branches, monkeypatch):
    looked = []
    monkeypatch.setattr(interpreter, "check_call", lambda call, name, *_: looked.append(name))
    stage, (args, kwargs) = Stage.load(branches.program.path), branches.batch_of(2)

    def run(steps: int | None = None) -> int:
        looked.clear()
        with torch.inference_mode():
            paused = stage.begin([*args, *kwargs.values()])
            for position in range(len(stage))[:steps]:
                stage.step(paused, position)
            if steps is None:
                stage.finish(paused)
        return len(looked)

    assert run(steps=2) == 2 and run() == len(stage) > 2, "the first was given up"
    assert run() == 0
    stage.run([*args, *kwargs.values()])
    assert not looked


def test_a_stage_runs_on_several_threads_at_once(branches):
    stage = Stage.load(branches.program.path)
    batches = [branches.batch_of(batch) for batch in (1, 2, 3, 4)] * 4
    inputs = [[*args, *kwargs.values()] for args, kwargs in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(stage.run, inputs))
    for one, leaves in zip(together, inputs, strict=True):
        for ours, theirs in zip(one, stage.run(leaves), strict=True):
            assert ours == theirs if isinstance(ours, int) else torch.equal(ours, theirs)


def test_weights_stay_in_the_mapped_file(named_case):
    """Anonymous memory grows by far less than the weights, also after a run: it is what the kernel cannot drop."""
    path = named_case("alexnet").program.path
    code = f"""
import torch, re
from adapt.models.interpreter import Stage
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
torch.set_num_threads(1)
warm = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 11, 4), torch.nn.Flatten(), torch.nn.LazyLinear(10))
warm(torch.randn(1, 3, 224, 224)); del warm
before = anonymous()
stage = Stage.load({str(path)!r})
loaded = anonymous() - before
stage.run([torch.randn(1, 3, 224, 224)])
print(stage.weight_bytes, loaded, anonymous() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=100)
    weight_bytes, loaded_bytes, run_bytes = map(int, done.stdout.split())
    assert weight_bytes > 200e6
    assert loaded_bytes < 0.05 * weight_bytes
    assert run_bytes < 0.25 * weight_bytes
