"""The small decisions of the client."""

from __future__ import annotations

import concurrent.futures
from pathlib import Path

import pytest

from adapt.errors import ConfigError, ExportError, UnknownModelError
from adapt.protocol.ids import RequestId
from adapt.runtime import calls
from adapt.runtime.conversation import InferFuture


class Net:
    pass


class Größe:
    pass


@pytest.mark.parametrize(
    ("model", "name", "expected"),
    [
        ("torchvision/resnet50", None, "resnet50"),
        ("resnet50", None, "resnet50"),
        ("torchvision/resnet50", "mine", "mine"),
        (Net(), None, "Net"),
        (Größe(), None, "model"),
        (Net(), "a.b-c_1", "a.b-c_1"),
        ("models/mine.v2.pt2", None, "mine.v2"),
        ("models/mine.pt2", "other", "other"),
    ],
)
def test_a_deployment_is_named_after_its_model(model, name, expected):
    assert calls.deployment_name(model, name) == expected


@pytest.mark.parametrize("name", ["", "a b", "-a", "x" * 65, 5, "ü"])
def test_an_impossible_name_is_a_config_error(name):
    with pytest.raises(ConfigError, match="name="):
        calls.deployment_name("torchvision/resnet50", name)


def test_a_model_without_a_name_is_unknown():
    with pytest.raises(UnknownModelError):
        calls.deployment_name("torchvision/", None)


def order(model, **options):
    plain = dict.fromkeys(("example_inputs", "tolerance", "numerics", "weights", "seed", "model_args", "input_shape", "name", "version"))
    usual = {**plain, "stages": "auto", "codec": "auto", "optimize": "none", "canaries": None, "canary_tolerance": 0.0}
    return calls.DeployOrder(model=model, **(usual | options))


def test_the_path_of_a_file_of_torch_is_a_model_of_this_machine(tmp_path):
    path = tmp_path / "mine.pt2"
    for model in (path, str(path)):
        assert order(model).is_file and order(model).is_exported_here
    assert not order("torchvision/resnet50").is_file and not order(Net()).is_file


@pytest.mark.parametrize(
    ("model", "options", "error", "words"),
    [
        ("gone.pt2", {}, ExportError, r"there is no file gone\.pt2 here, in /.*--models-dir"),
        ("folder.pt2", {}, ExportError, r"there is no file folder\.pt2"),
        ("https://models.example/mine.pt2", {}, ExportError, "never from the network"),
        ("a b.pt2", {}, ConfigError, "name='a b'"),
        ("mine.pt2", {"weights": "w.safetensors"}, ConfigError, r"weights=w\.safetensors: for models by name; mine\.pt2 brings its own"),
        ("mine.pt2", {"seed": 0}, ConfigError, "seed=0: for models by name"),
        ("mine.pt2", {"model_args": {"n": 1}}, ConfigError, "model_args="),
        ("mine.pt2", {"input_shape": [1, 4]}, ConfigError, "input_shape="),
        ("mine.pt2", {"example_inputs": (1,)}, ConfigError, r"a \.pt2 brings its own"),
        ("mine.pth", {}, ConfigError, r"model='mine\.pth': expected a \.pt2 file.*weights="),
        (Path("mine"), {}, ConfigError, r"expected a \.pt2 file"),
        (Path("resnet18"), {}, ConfigError, r"expected a \.pt2 file"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_before_anything_is_started(tmp_path, monkeypatch, model, options, error, words):
    monkeypatch.chdir(tmp_path)
    for name in ("mine.pt2", "mine.pth", "mine", "a b.pt2"):
        (tmp_path / name).write_bytes(b"no model")
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(error, match=words):
        order(model, **options).call(None)


def test_a_file_does_not_hide_a_model_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resnet18").write_bytes(b"notes")
    assert order("resnet18").call(None).message.named.model == "resnet18"


@pytest.mark.parametrize(("stages", "count"), [("auto", 0), (1, 1), (7, 7)])
def test_stages(stages, count):
    assert calls.stage_count(stages) == count


@pytest.mark.parametrize("stages", [0, -1, True, 1.0, "3", None])
def test_impossible_stages(stages):
    with pytest.raises(ConfigError, match="stages="):
        calls.stage_count(stages)


def test_suggestions_are_like_what_was_asked_for():
    names = ["resnet18", "resnet50", "vgg16"]
    assert set(calls.closest("resnet", names)) == set(names[:2])
    assert calls.closest("zzz", names) == names
    assert calls.closest("resnet", []) == []


def test_a_future_tells_of_its_cancelling_at_once_and_others_by_delivery():
    told, delivered = [], []
    future = InferFuture(RequestId(bytes(16), 1), delivered.append)
    future.on_cancel(told.append)
    future.add_done_callback(lambda future: told.append(future.cancelled()))
    assert future.cancel()
    assert told == [RequestId(bytes(16), 1)]
    assert concurrent.futures.wait([future], timeout=0).done == {future}
    (work,) = delivered
    work()
    assert told[1:] == [True]
