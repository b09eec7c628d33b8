from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from torch import nn

from adapt.errors import PlanError
from adapt.models.cut import legal_cuts, write_stages
from adapt.models.interpreter import Stage
from adapt.models.program import SizeSpec, TensorSpec
from adapt.models.tensorfile import digest_of, read_tensor_file


class Chain(nn.Module):
    """Two linear layers, and a table that no input decides."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)
        self.register_buffer("table", torch.arange(8.0))

    def forward(self, x):
        table = self.table.cos() * 2
        return self.second(self.first(x) + table) + table.sum()


@pytest.fixture(scope="module")
def chain(make_case):
    return make_case(Chain(), torch.randn(1, 4))


def test_bytes_of_a_cut_are_those_of_what_crosses(chain):
    by_operator = {chain.program.graph.operators[cut.position - 1].name: cut for cut in legal_cuts(chain.program)}
    assert by_operator["aten.add.Tensor"].crossing_bytes == 8 * 4
    assert by_operator["aten.linear.default"].crossing_bytes == 2 * 4  # of the second: the last one wins in the dict


def test_constants_cross_nothing_and_are_computed_where_they_are_needed(chain, tmp_path):
    for cut in legal_cuts(chain.program):
        first, second = write_stages(chain.program, [cut.position], tmp_path)
        assert len(cut.crossing) == len(first.outputs) == len(second.inputs) == 1
    names = [operator.name for operator in chain.program.graph.operators]
    assert names.count("aten.cos.default") == 1
    assert [step.operator.name for step in Stage.load(second.path)._steps].count("aten.cos.default") == 1
    chain.check([cut.position for cut in legal_cuts(chain.program)], tmp_path)


def test_a_stage_holds_its_own_weights_only(chain, tmp_path):
    position = next(cut.position for cut in legal_cuts(chain.program))
    first, second = write_stages(chain.program, [position], tmp_path)
    assert set(read_tensor_file(first.path).tensors) == {"first.weight", "first.bias"}
    assert set(read_tensor_file(second.path).tensors) == {"second.weight", "second.bias", "table"}
    assert first.weight_bytes == (4 * 8 + 8) * 4


def test_what_a_stage_has_no_use_for_passes_through(branches, tmp_path):
    cuts = legal_cuts(branches.program)
    artifacts = write_stages(branches.program, [cut.position for cut in cuts], tmp_path)
    for before, after in pairwise(artifacts):
        assert before.outputs == after.inputs
        assert all(isinstance(spec, SizeSpec) or spec.is_contiguous for spec in before.outputs)
    assert any(len(artifact.inputs) > 2 for artifact in artifacts)
    assert any(isinstance(spec, SizeSpec) for artifact in artifacts for spec in artifact.inputs)


def test_channels_last_activations_travel_permuted(branches):
    values = branches.program.graph.values
    crossing = {index for cut in legal_cuts(branches.program) for index in cut.crossing}
    orders = {values[index].order for index in crossing if isinstance(values[index], TensorSpec)}
    assert (0, 2, 3, 1) in orders


def test_tensors_with_gaps_do_not_cross(branches):
    graph = branches.program.graph
    chunks = next(operator for operator in graph.operators if operator.name == "aten.chunk.default").outputs
    assert all(graph.values[index].order is None for index in chunks)
    assert not any(set(chunks) & set(cut.crossing) for cut in legal_cuts(branches.program))


def test_files_are_named_by_their_digest_and_the_same_each_time(chain, tmp_path):
    position = legal_cuts(chain.program)[0].position
    once = write_stages(chain.program, [position], tmp_path / "once")
    again = write_stages(chain.program, [position], tmp_path / "again")
    assert [artifact.digest for artifact in once] == [artifact.digest for artifact in again]
    for artifact in once:
        assert artifact.path.name == f"{digest_of(artifact.path)}.safetensors"
        assert artifact.path.stat().st_size == artifact.file_bytes
    assert len(list((tmp_path / "once").iterdir())) == 2  # no temporary file is left


@pytest.mark.parametrize("positions", [[0], [10_000], [3, 2], [2, 2]])
def test_other_positions_than_legal_ones_are_refused(chain, tmp_path, positions):
    with pytest.raises(PlanError, match="legal cuts"):
        write_stages(chain.program, positions, tmp_path)


def test_safetensors_reads_our_files(chain):
    safetensors = pytest.importorskip("safetensors.torch")
    tensors = safetensors.load_file(chain.program.path)
    assert torch.equal(tensors["first.weight"], chain.module.first.weight)


def test_cutting_needs_no_torch(chain, tmp_path):
    code = (
        "import sys; from adapt.models.cut import *; from adapt.models.program import *\n"
        f"p = read_program({str(chain.program.path)!r}); write_stages(p, [legal_cuts(p)[0].position], {str(tmp_path)!r})\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert len(list(tmp_path.iterdir())) == 2
