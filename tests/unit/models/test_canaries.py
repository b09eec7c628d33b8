"""What is written down of canaries is what the stages make of them, at every legal cut; and files of them are not believed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from adapt.errors import ConfigError, ExportError, InputMismatchError, WireError
from adapt.models.canaries import COUNT_LIMIT, KEY, check_fits, deviation, read_canaries
from adapt.models.cut import legal_cuts, write_stages
from adapt.models.export import export_file, export_module, inference_copy
from adapt.models.interpreter import Stage
from adapt.models.program import read_program
from adapt.models.rehearsal import rehearse
from adapt.models.tensorfile import canonical_json, parse_json, read_tensor_file, write_tensor_file
from adapt.runtime.executor import _encoded


class Skipping(torch.nn.Module):
    """A skip connection in channels-last, a size that crosses cuts, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        y = torch.relu(self.first(x)).to(memory_format=torch.channels_last)
        z = self.second(y) + y
        return z.reshape(x.shape[0], -1).sum(1), z.to(torch.bfloat16)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    directory = tmp_path_factory.mktemp("canaries")
    torch.manual_seed(0)
    module = Skipping().eval()
    program = export_module(module, (torch.randn(2, 3, 6, 6),), directory=directory, profile_repetitions=0)
    inputs = [torch.randn(1, 3, 6, 6), np.random.default_rng(0).standard_normal((3, 3, 6, 6)).astype(np.float32)]
    path, _, _ = rehearse(inference_copy(module), program.path, inputs, directory=directory, tolerance=1e-3)
    return module, read_program(program.path), read_canaries(path), directory, path


def test_stages_come_to_the_digests_that_were_foretold(made):
    _, program, known, directory, _ = made
    check_fits(known, program.digest, program.graph)
    for cut in legal_cuts(program):
        paths = [artifact.path for artifact in write_stages(program, [cut.position], directory)]
        for number, canary in enumerate(known.canaries):
            foretold = known.stage_digests(number, [cut.crossing], len(program.graph.values))
            values = [torch.from_numpy(leaf[1].copy()) for leaf in canary.inputs]
            for path, digest in zip(paths, foretold, strict=True):
                values = Stage.load(path).run(values)
                assert _encoded(values, "raw", None, 1 << 20)[2] == digest


def test_of_a_folded_model_the_folded_values_are_foretold(tmp_path):
    torch.manual_seed(0)
    layers = [part for _ in range(2) for part in (torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.ReLU())]
    module = torch.nn.Sequential(*layers)
    for _ in range(3):
        module(torch.randn(4, 8, 6, 6) + 1)  # batch norms learn what is not trivial
    module.eval()
    x = torch.randn(2, 8, 6, 6)
    exported = export_module(module, (x,), directory=tmp_path, profile_repetitions=0, optimize="fold")
    program = read_program(exported.path)
    assert "fold" in program.changes
    path, _, _ = rehearse(inference_copy(module), exported.path, [x], directory=tmp_path, tolerance=1e-3)
    known = read_canaries(path)
    assert (known.program, known.numeric_class.endswith(f"/{program.arithmetic}")) == (program.digest, True)
    check_fits(known, program.digest, program.graph)
    for cut in legal_cuts(program):
        values = [x]
        foretold = known.stage_digests(0, [cut.crossing], len(program.graph.values))
        for artifact, digest in zip(write_stages(program, [cut.position], tmp_path), foretold, strict=True):
            values = Stage.load(artifact.path).run(values)
            assert _encoded(values, "raw", None, 1 << 20)[2] == digest


def test_the_outputs_are_the_modules_own(made):
    module, _, known, _, _ = made
    for canary in known.canaries:
        x = torch.from_numpy(canary.inputs[0][1].copy())
        with torch.inference_mode():
            sums, z = module(x)
        assert np.array_equal(canary.outputs[0][1], sums.numpy())
        assert canary.outputs[1][0] == "bfloat16" and np.array_equal(
            canary.outputs[1][1], z.contiguous().view(torch.int16).numpy().view(np.uint16)
        )


def test_what_does_not_fit_is_refused(made, tmp_path):
    module, program, _, _, _ = made
    copied = inference_copy(module)
    with pytest.raises(InputMismatchError):
        rehearse(copied, program.path, [torch.randn(1, 4, 6, 6)], directory=tmp_path, tolerance=0.0)
    with pytest.raises(ConfigError, match=f"1 to {COUNT_LIMIT}"):
        rehearse(copied, program.path, [torch.randn(1, 3, 6, 6)] * (COUNT_LIMIT + 1), directory=tmp_path, tolerance=0.0)
    torch.manual_seed(1)
    with pytest.raises(ExportError, match="deviates from the module's own"):
        rehearse(Skipping().eval(), program.path, [torch.randn(1, 3, 6, 6)], directory=tmp_path, tolerance=1e-3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda document: document.update(format=2), "not what this version"),
        (lambda document: document.update(canaries=[]), "0 canaries"),
        (lambda document: document["canaries"][0].update(inputs=["nowhere"]), "is no tensor"),
        (lambda document: document["canaries"][0]["values"].__setitem__(0, "xx"), "is no mark"),
        (lambda document: document["canaries"][0].pop("outputs"), "has not inputs"),
    ],
)
def test_a_file_is_not_believed(made, tmp_path, change, words):
    path = made[4]
    document = parse_json(read_tensor_file(path).metadata[KEY], "it")
    for canary in document["canaries"]:
        canary.update(inputs=[], outputs=[])  # no tensors are needed for what is wrong here
    change(document)
    bad, _, _ = write_tensor_file(tmp_path, {KEY: canonical_json(document)}, [])
    with pytest.raises(WireError, match=words):
        read_canaries(bad)


def test_canaries_of_another_program_are_refused(made):
    _, program, known, _, _ = made
    with pytest.raises(WireError, match="are for program"):
        check_fits(known, "0" * 64, program.graph)


def test_deviation_is_a_share_of_the_largest_magnitude():
    def of(*values: float):
        return "float32", np.array(values, np.float32)

    assert deviation(of(1, 2), of(1, 2)) == 0.0
    assert deviation(of(1, 2.5), of(1, 2)) == pytest.approx(0.25)
    assert deviation(of(np.nan, 1), of(np.nan, 1)) == deviation(of(np.inf), of(np.inf)) == 0.0
    for wrong in (of(np.nan, 2), of(1), of(np.inf, 2), 7, ("float64", np.array([1.0, 2.0]))):
        assert deviation(wrong, of(1, 2)) == math.inf
    assert deviation(3, 3) == 0.0 and deviation(3, 4) == math.inf
    assert deviation(of(0.5), of(0)) == math.inf


def test_a_file_of_torch_becomes_the_program_of_its_model(made, tmp_path):
    module = made[0]
    x = torch.randn(2, 3, 6, 6)
    saved = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},))
    torch.export.save(saved, tmp_path / "m.pt2")
    exported, same, args = export_file(tmp_path / "m.pt2", directory=tmp_path, profile_repetitions=1)
    assert exported.is_exact and exported.is_batched and len(exported.operator_costs_s) > 3 and args is not None and args[0].equal(x)
    stage = Stage.load(exported.path)
    for batch in (x, x[:1]):
        with torch.inference_mode():
            assert all(a.equal(b) for a, b in zip(stage.run([batch]), module(batch), strict=True))
            assert all(a.equal(b) for a, b in zip(same(batch), module(batch), strict=True))


def test_a_broken_file_of_torch_is_refused_by_name(tmp_path):
    (tmp_path / "m.pt2").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(ExportError, match="is no model that torch"):
        export_file(tmp_path / "m.pt2", directory=tmp_path)
