from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from adapt.errors import ExportError, UnknownModelError
from adapt.models.sources import build_named_model, model_names
from adapt.models.vision import import_torchvision

TEN = {"num_classes": 10}


def states_equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_seed_gives_what_the_user_gets_from_torchvision():
    module, example = build_named_model("torchvision/squeezenet1_1", seed=0)
    torch.manual_seed(0)
    assert states_equal(module, import_torchvision().models.squeezenet1_1(weights=None).eval())
    assert not module.training and example.shape == (1, 3, 224, 224)


def test_the_callers_random_numbers_are_not_disturbed():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    build_named_model("shufflenet_v2_x0_5", seed=1)
    build_named_model("shufflenet_v2_x0_5")
    assert torch.equal(torch.rand(3), expected)


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(UnknownModelError, match="torchvision/resnet50") as caught:
        build_named_model("resnet_50")
    assert "torchvision/resnet50" in caught.value.suggestions
    assert "torchvision/vit_b_16" in model_names() and "torchvision/inception_v3" in model_names()


def test_arguments_and_shapes_are_passed_on():
    module, example = build_named_model("squeezenet1_1", model_args=TEN, input_shape=(3, 64, 64))
    assert example.shape == (1, 3, 64, 64) and module(example).shape == (1, 10)
    with pytest.raises(ExportError, match="does not build"):
        build_named_model("squeezenet1_1", model_args={"colour": "red"})


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_come_from_a_file(tmp_path, suffix):
    source, _ = build_named_model("squeezenet1_1", seed=3, model_args=TEN)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(source.state_dict(), path)
    else:
        torch.save({"state_dict": source.state_dict()}, path)
    assert states_equal(build_named_model("squeezenet1_1", weights=path, model_args=TEN).module, source)
    with pytest.raises(ExportError, match=r"do not fit the model: of another shape are classifier\.1\.weight"):
        build_named_model("squeezenet1_1", weights=str(path))
    with pytest.raises(ExportError, match=r"it lacks .*; it also has"):
        build_named_model("resnet18", weights=str(path))


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('the pickle ran')",))


def test_pickles_and_code_are_refused(tmp_path):
    evil = tmp_path / "evil.pth"
    torch.save({"weight": Evil()}, evil)
    with pytest.raises(ExportError, match="holds no weights that can be read safely"):
        build_named_model("squeezenet1_1", weights=evil)
    with pytest.raises(ExportError, match="is code"):
        build_named_model("squeezenet1_1", weights=tmp_path / "model.pt2")
    script = tmp_path / "script.pt"
    with pytest.warns(DeprecationWarning):
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(script))
    with pytest.raises(ExportError, match="holds no weights"):
        build_named_model("squeezenet1_1", weights=script)


def test_missing_files_and_unknown_weights_are_named(tmp_path):
    with pytest.raises(ExportError, match="there is no file"):
        build_named_model("squeezenet1_1", weights=tmp_path / "missing.safetensors")
    with pytest.raises(ExportError, match="it has IMAGENET1K_V1, DEFAULT"):
        build_named_model("squeezenet1_1", weights="NEWEST")
