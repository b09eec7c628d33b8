"""The small decisions of the client."""

from __future__ import annotations

import concurrent.futures

import pytest

from adapt.errors import ConfigError, UnknownModelError
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
