"""Models in `.pt2` files: what `ExportedProgram.module()` computes, wherever it is cut; and what is wrong with a file, in words."""

from __future__ import annotations

import json
import zipfile

import pytest
import torch
from torch import nn
from torch.export import Dim

from adapt.errors import ConfigError, ExportError, InputMismatchError
from adapt.models.cut import legal_cuts, write_stages
from adapt.models.export import export_file
from adapt.models.interface import Interface
from adapt.models.interpreter import Stage
from adapt.models.program import read_program, unflatten
from adapt.models.saved import read_saved

UP_TO_64 = ({0: Dim("batch", max=64)},)


class Chooser(nn.Module):
    """Tokens by position, a mask by name, a dict out."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, tokens, *, mask):
        x = self.layer(self.words(tokens), src_key_padding_mask=~mask)
        return {"last": x, "length": mask.sum(1)}


class Net(nn.Module):
    def __init__(self, function=torch.relu):
        super().__init__()
        self.inner, self.function = nn.Linear(4, 4), function

    def forward(self, x):
        return self.function(self.inner(x))


def save(path, module, args, kwargs=None, **options):
    torch.manual_seed(0)
    torch.export.save(torch.export.export(module.eval(), args, kwargs, **options), path)
    return path


def saved_net(path, function=torch.relu, *, batch=2, shapes=UP_TO_64):
    return save(path, Net(function), (torch.randn(batch, 4),), dynamic_shapes=shapes)


def check(path, directory, calls):
    """Whatever it is cut at, it answers what torch's own module of the file answers."""
    exported, _, _ = export_file(path, directory=directory, profile_repetitions=1)
    program, reference = read_program(exported.path), torch.export.load(path).module()
    assert exported.is_exact
    for positions in [[], *([cut.position] for cut in legal_cuts(program)[::3])]:
        stages = [Stage.load(artifact.path) for artifact in write_stages(program, positions, directory)]
        for args, kwargs in calls:
            values = Interface.of(program).match(args, kwargs)
            for stage in stages:
                values = stage.run([value.clone() if isinstance(value, torch.Tensor) else value for value in values])
            with torch.inference_mode():
                expected = reference(*args, **kwargs)
            torch.testing.assert_close(unflatten(program.output_structure, values), expected, rtol=0, atol=0, equal_nan=True)
    return exported


def test_a_saved_model_is_exact(tmp_path):
    def given(batch):
        return (torch.randint(0, 20, (batch, 5)),), {"mask": torch.arange(5).expand(batch, 5) < 4}

    batch = {0: Dim("batch", min=1, max=9)}
    path = save(tmp_path / "m.pt2", Chooser(), *given(2), dynamic_shapes={"tokens": batch, "mask": batch})
    exported = check(path, tmp_path, [given(1), given(3)])
    interface = Interface.of(read_program(exported.path))
    assert exported.is_batched and interface.batch_limit == 9 and interface.parameters == ("tokens", "mask")
    with pytest.raises(InputMismatchError, match="a batch of 10: expected 1 to 9"):
        interface.match(*given(10))


@pytest.mark.parametrize("shapes", [({0: Dim.DYNAMIC},), ({0: Dim.AUTO},), ({0: Dim("batch", max=4)},)])
def test_a_batch_that_torch_calls_two_or_more_may_be_one(tmp_path, shapes):
    exported = check(saved_net(tmp_path / "m.pt2", batch=3, shapes=shapes), tmp_path, [((torch.randn(n, 4),), {}) for n in (1, 4)])
    assert exported.is_batched


def test_the_batch_may_be_another_dimension_than_the_first(tmp_path):
    module = nn.TransformerEncoderLayer(8, 2, 16)  # (length, batch, features)
    path = save(tmp_path / "m.pt2", module, (torch.randn(5, 2, 8),), dynamic_shapes=({1: Dim("batch", max=64)},))
    assert check(path, tmp_path, [((torch.randn(5, n, 8),), {}) for n in (1, 3)]).is_batched


def test_without_a_varying_size_shapes_are_fixed(tmp_path):
    path = saved_net(tmp_path / "m.pt2", shapes=None)
    assert not check(path, tmp_path, [((torch.randn(2, 4),), {})]).is_batched


def test_what_writes_through_a_view_is_decomposed(tmp_path):
    def write(x):
        y = x.clone()
        y[:, :2] += 1
        view = y[:, 1:]
        y.mul_(2)
        return y, view

    check(saved_net(tmp_path / "m.pt2", write), tmp_path, [((torch.randn(n, 4),), {}) for n in (1, 3)])


def test_a_saved_model_is_folded(tmp_path):
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    path = save(tmp_path / "m.pt2", module, (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: Dim("batch", max=7)},))
    exported, _, _ = export_file(path, directory=tmp_path, optimize="fold")
    program = read_program(exported.path)
    assert not any("batch_norm" in operator.name for operator in program.graph.operators) and program.batch_limit == 7
    with pytest.raises(ConfigError, match="optimize"):
        export_file(path, directory=tmp_path, optimize="press")


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(path, words):
    with pytest.raises(ExportError, match=words) as caught:
        export_file(path, directory=path.parent, profile_repetitions=0)
    assert path.name in str(caught.value)
    assert not list(path.parent.glob("*.safetensors"))


def test_a_file_that_is_not_there(tmp_path):
    refused(tmp_path / "m.pt2", "there is no file")
    (tmp_path / "n.pt2").mkdir()
    refused(tmp_path / "n.pt2", "there is no file")


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 and no more"])
def test_a_file_that_is_no_archive(tmp_path, content):
    (tmp_path / "m.pt2").write_bytes(content)
    refused(tmp_path / "m.pt2", "is no model that torch.export.save has written, or a broken one")


def test_an_archive_of_something_else(tmp_path):
    torch.save(Net().state_dict(), tmp_path / "m.pt2")
    refused(tmp_path / "m.pt2", "a pickle that torch.save wrote; weights go with the name of a model")
    with pytest.warns(DeprecationWarning):
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(tmp_path / "m.pt2"))
    refused(tmp_path / "m.pt2", "it is TorchScript; export the module with torch.export.export")
    with zipfile.ZipFile(tmp_path / "m.pt2", "w") as archive:
        archive.writestr("a/models/left.json", "{}")
    refused(tmp_path / "m.pt2", r"it holds left\.json instead of one model")
    with zipfile.ZipFile(tmp_path / "m.pt2", "w") as archive:
        archive.writestr("a/letter", "")
    refused(tmp_path / "m.pt2", "an archive without a model")


def changed(path, change):
    """The file with another description of its model."""
    with zipfile.ZipFile(path) as archive:
        entries = [(entry, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for entry, data in entries:
            if entry.filename.endswith("models/model.json"):
                document = json.loads(data)
                change(document)
                data = json.dumps(document).encode()
            archive.writestr(entry, data)


def test_a_file_of_another_torch_that_cannot_be_read(tmp_path):
    path = saved_net(tmp_path / "m.pt2")

    def age(document):
        document["schema_version"]["major"], document["torch_version"] = 99, "9.1.0"

    changed(path, age)
    refused(
        path, rf"was saved by torch 9\.1\.0, and torch {torch.__version__.split('+')[0]}.* cannot read it: .*schema version.*save it again"
    )


def test_a_file_of_another_torch_that_can_be_read(tmp_path):
    path = saved_net(tmp_path / "m.pt2")
    changed(path, lambda document: document.update(torch_version="2.99.0"))
    assert export_file(path, directory=tmp_path)[0].is_exact


def test_an_operator_that_torch_does_not_know(tmp_path):
    path = saved_net(tmp_path / "m.pt2")

    def rename(document):
        (node,) = [node for node in document["graph_module"]["graph"]["nodes"] if "linear" in node["target"]]
        node["target"] = "torch.ops.mine.linear.default"

    changed(path, rename)
    refused(path, r"operator mine\.linear\.default, used in inner \(Linear\), is unknown here; ADAPT runs torch's own operators only")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: torch.fft.fft(x).abs(), r"operator aten\.fft_fft\.default, used in the model itself \(Net\), is not supported"),
        (lambda x: x + torch.rand_like(x), r"aten\.rand_like\.default.*random numbers"),
        (lambda x: nn.functional.dropout(x, 0.5), r"aten\.dropout\.default.*call eval\(\) before it is exported"),
        (lambda x: x[x > 0], r"depends on the values"),
    ],
)
def test_an_operator_that_stages_may_not_have(tmp_path, function, words):
    refused(saved_net(tmp_path / "m.pt2", function), words)


def test_sizes_that_vary_in_more_ways_than_one(tmp_path):
    x = torch.randn(2, 5, 4)
    save(tmp_path / "m.pt2", Net(), (x,), dynamic_shapes=({0: Dim("batch", max=64), 1: Dim("length", max=64)},))
    refused(tmp_path / "m.pt2", r"vary in more ways than by one batch \(dimension 0 of input x is \w+, dimension 1 of input x is \w+\)")
    save(tmp_path / "m.pt2", Net(), (torch.randn(6, 4),), dynamic_shapes=({0: 2 * Dim("half", max=64)},))
    refused(tmp_path / "m.pt2", r"dimension 0 of input x is 2\*")


def test_a_batch_that_may_not_be_one(tmp_path):
    saved_net(tmp_path / "m.pt2", batch=5, shapes=({0: Dim("batch", min=4, max=8)},))
    refused(tmp_path / "m.pt2", r"dimension 0 of input x may be 4 to 8; export it with torch\.export\.Dim\(\.\.\., min=1\)")


def test_a_number_that_varies(tmp_path):
    class Times(nn.Module):
        def forward(self, x, times: int):
            return x * times

    save(tmp_path / "m.pt2", Times(), (torch.randn(2, 4), 3), dynamic_shapes=({0: Dim.DYNAMIC}, Dim.DYNAMIC))
    refused(tmp_path / "m.pt2", "input times is a number that varies")


def test_a_file_without_its_example(tmp_path):
    program = torch.export.export(Net().eval(), (torch.randn(2, 4),))
    program.example_inputs = None
    torch.export.save(program, tmp_path / "m.pt2")
    with pytest.raises(ExportError, match="has no example inputs"):
        read_saved(tmp_path / "m.pt2")
