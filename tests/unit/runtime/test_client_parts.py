"""The small decisions of the client."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import zmq
from msgspec.structs import replace

from adapt.errors import ConfigError, ExportError, UnknownModelError
from adapt.protocol.codecs import TensorHeader
from adapt.protocol.ids import RequestId
from adapt.protocol.wire import Blob
from adapt.runtime import calls
from adapt.runtime.async_client import AsyncInferFuture
from adapt.runtime.conversation import INLINE_BYTES, InferFuture, Outcome, is_at_hand
from adapt.runtime.endpoint import ZERO_COPY_BYTES, copied, sendable


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
    future = InferFuture(RequestId(bytes(16), 1), delivered.append, told.append)
    future.add_done_callback(lambda future: told.append(future.cancelled()))
    assert future.cancel()
    assert told == [RequestId(bytes(16), 1)]
    assert concurrent.futures.wait([future], timeout=0).done == {future}
    (work,) = delivered
    work()
    assert told[1:] == [True]
    assert future.cancel()  # once more: nobody has to be told again
    assert len(told) == 2


def test_the_cluster_hears_of_a_cancelling_before_users_functions_do():
    told = []
    future = InferFuture(RequestId(bytes(16), 1), lambda work: work(), lambda request_id: told.append("cluster"))

    def look(future):
        told.append("user")
        assert concurrent.futures.wait([future], timeout=0).done == {future}

    future.add_done_callback(look)
    assert future.cancel()
    assert told == ["cluster", "user"]


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def _future() -> InferFuture:
    return InferFuture(RequestId(bytes(16), 1), lambda work: work(), lambda request_id: None)


@pytest.mark.parametrize("ends", [lambda future: future.set_result(1), lambda future: future.cancel()], ids=["answered", "cancelled"])
def test_a_future_is_freed_without_the_collector(no_collector, ends):
    future, told = _future(), []
    future.add_done_callback(lambda future: told.append(future.done()))
    ends(future)
    assert told == [True]
    left = weakref.ref(future)
    del future
    assert left() is None


@pytest.mark.parametrize("ends", [lambda asked: asked.set_result(1), lambda asked: asked.cancel()], ids=["answered", "cancelled"])
def test_a_future_of_asyncio_is_freed_without_the_collector(no_collector, ends):
    async def left() -> list[weakref.ref]:
        asked = _future()
        future = AsyncInferFuture(asked)
        ends(asked)
        assert future.done() and future.request_id == asked.request_id
        return [weakref.ref(asked), weakref.ref(future)]

    async def freed() -> bool:
        references = await left()
        await asyncio.sleep(0)  # what the loop still had to do with them
        return all(reference() is None for reference in references)

    assert asyncio.run(freed())


def test_a_future_of_asyncio_is_answered_from_any_thread_and_tells_what_is_known():
    async def answered(end):
        asked = _future()
        future = AsyncInferFuture(asked)
        asked.outcome = Outcome(attempts=2, numeric_classes=("x",))
        await asyncio.to_thread(end, asked)
        return future, (await asyncio.wait_for(asyncio.gather(future, return_exceptions=True), 10))[0]

    future, result = asyncio.run(answered(lambda asked: asked.set_result(7)))
    assert result == 7 and future.outcome == Outcome(2, ("x",))
    future, error = asyncio.run(answered(lambda asked: asked.set_exception(ConfigError("no"))))
    assert isinstance(error, ConfigError) and future.outcome is None


def test_a_future_of_asyncio_that_is_cancelled_cancels_what_was_asked():
    async def test():
        asked = _future()
        future = AsyncInferFuture(asked)
        assert future.cancel() and asked.cancelled() and not future.cancel()
        with pytest.raises(asyncio.CancelledError):
            await future

    asyncio.run(test())


def test_a_frame_that_came_is_sent_to_two_and_arrives_whole_at_both():
    context = zmq.Context()
    try:
        pairs = []
        for name in ("from", "one", "other"):
            left, right = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
            left.bind(f"inproc://{name}")
            right.connect(f"inproc://{name}")
            pairs.append((left, right))
        data = bytes(range(256)) * 1000
        pairs[0][0].send(data)
        came = pairs[0][1].recv(copy=False).buffer
        assert isinstance(sendable(came), zmq.Frame)
        for left, right in pairs[1:]:
            left.send(sendable(came), copy=False)
            assert right.recv() == data
        assert bytes(came) == data
    finally:
        context.destroy(linger=0)


def test_what_is_all_of_a_frame_is_sent_as_that_frame():
    frame = zmq.Frame(bytes(range(256)) * 300, copy=True)
    view = frame.buffer
    assert sendable(view) is frame
    assert sendable(memoryview(view)) is frame
    for part in (view[1:], view[:-1], bytes(view), memoryview(bytes(view))):
        assert sendable(part) is part


@pytest.mark.parametrize("size", [0, 1, ZERO_COPY_BYTES - 1, ZERO_COPY_BYTES, 1 << 20])
def test_what_is_copied_shares_no_memory_and_large_copies_are_frames(size):
    data = np.arange(size, dtype=np.uint8)
    before, copy = data.tobytes(), copied(data.data)
    data += 1
    assert bytes(copy) == before
    assert isinstance(sendable(copy), zmq.Frame) == (size >= ZERO_COPY_BYTES)
    left = weakref.ref(data)
    del data
    assert left() is None, "the copy keeps the original"


@pytest.mark.parametrize(
    ("size", "codec", "parts", "expected"),
    [
        (10, "lz4", 1, True),
        (INLINE_BYTES, "raw", 1, True),
        (INLINE_BYTES, "lz4", 1, False),
        (INLINE_BYTES, "raw", 2, False),
    ],
)
def test_answers_are_decoded_on_the_loop_only_where_that_is_next_to_nothing(size, codec, parts, expected):
    header = TensorHeader(dtype="uint8", shape=(2 * size,), codec=codec, payload_bytes=2 * size, zfp_bytes=0, bound=0.0)
    blob = Blob(2 * size, 0, (bytearray(2 * size // parts),) * parts)
    assert is_at_hand([header, 3], [blob]) is expected
    if size == INLINE_BYTES:
        assert not is_at_hand([header], [Blob(2 * size, 0, tuple(map(bytes, blob.parts)))]), "it will have to be copied"
        assert not is_at_hand([replace(header, dtype="bfloat16")], [blob]), "it may have to be widened"
