"""The client against a dispatcher that says what the test tells it to."""

from __future__ import annotations

import concurrent.futures
import gc
import hashlib
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pytest

import adapt
from adapt.models.interface import interface_digest
from adapt.models.structure import Leaf, Node
from adapt.protocol import messages as msg

sys.path.insert(0, str(Path(__file__).resolve().parent))
from speaking import PROGRAM, WAIT_S, SpeakingDispatcher, deployment, interface

X = np.arange(8, dtype=np.float32).reshape(2, 4)


@pytest.fixture
def dispatcher():
    with SpeakingDispatcher() as dispatcher:
        yield dispatcher


@pytest.fixture
def client(dispatcher):
    with adapt.Client(dispatcher.address) as client:
        yield client


@pytest.fixture
def model(client):
    return client.model("double")


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


# ── what goes in and what comes out ──────────────────────────────────────────────────────────────────────────────────


def test_arrays_in_arrays_out(dispatcher, model):
    dispatcher.answer = dispatcher.doubles
    y = model(X)
    assert type(y) is np.ndarray and y.flags.writeable and np.array_equal(y, 2 * X)
    assert np.array_equal(model(x=X[:, ::-1]), 2 * X[:, ::-1])
    request = dispatcher.take(msg.InferRequest)
    assert (request.version, request.program, request.numerics) == (0, None, "close")
    assert request.interface == interface_digest(model.record.interface), "another version with these inputs and outputs may answer"


def test_what_is_sent_is_what_the_array_held_when_submit_returned(dispatcher, model):
    x = X.copy()
    future = model.submit(x)
    x[:] = -1
    request = dispatcher.take(msg.InferRequest)
    dispatcher.reply(request, dispatcher.input(request))
    assert np.array_equal(future.result(WAIT_S), X)


def test_a_large_answer_is_the_same(dispatcher):
    dispatcher.deployments = [deployment("wide", of=interface(width=300_000))]
    dispatcher.answer = dispatcher.doubles
    x = np.random.default_rng(0).standard_normal((2, 300_000), dtype=np.float32)
    with adapt.Client(dispatcher.address) as client:
        y = client.model("wide")(x)
    assert y.flags.writeable and np.array_equal(y, 2 * x)


def test_tensors_in_tensors_out(dispatcher, client, model):
    torch = pytest.importorskip("torch")
    dispatcher.answer = dispatcher.doubles
    y = model(torch.from_numpy(X).requires_grad_())
    assert isinstance(y, torch.Tensor) and torch.equal(y, torch.from_numpy(2 * X))


def test_bfloat16_goes_there_and_back_as_it_is(dispatcher, client):
    torch = pytest.importorskip("torch")
    dispatcher.deployments = [deployment("narrow", of=interface("bfloat16"))]
    dispatcher.answer = lambda m, b: isinstance(m, msg.InferRequest) and dispatcher.reply(m, dispatcher.input(m), dtype="bfloat16")
    x = torch.randn(2, 4).to(torch.bfloat16)
    assert torch.equal(client.model("narrow")(x), x)
    leaf = dispatcher.take(msg.InferRequest).leaves[0]
    assert (leaf.dtype, leaf.shape) == ("bfloat16", (2, 4))


def test_numpy_cannot_hold_bfloat16_and_gets_float32(dispatcher, client):
    bits = np.array([[0x3F80, 0xC000, 0x7F80, 0x0000]], np.uint16)  # 1, -2, infinity, 0

    def answer(message, blobs):
        if isinstance(message, msg.InferRequest):
            dispatcher.reply(message, bits, dtype="bfloat16")

    dispatcher.answer = answer
    y = client.model("double")(X)
    assert y.dtype == np.float32 and np.array_equal(y, [[1, -2, np.inf, 0]])


def test_outputs_are_nested_as_the_modules_own(dispatcher, client):
    structure = Node("dict", (Leaf(), Node("namedtuple", (Leaf(), Leaf()), ("mean", "std"), "Moments")), ("y", "moments"))
    dispatcher.deployments = [deployment("nested", of=interface(outputs=3, output_structure=structure))]
    dispatcher.answer = lambda m, b: isinstance(m, msg.InferRequest) and dispatcher.reply(m, X, X + 1, X + 2)
    result = client.model("nested")(X)
    assert list(result) == ["y", "moments"] and type(result["moments"]).__name__ == "Moments"
    assert np.array_equal(result["moments"].std, X + 2)


def test_a_wrong_input_is_told_before_anything_is_sent(dispatcher, model):
    for wrong, words in (
        (X.astype(np.float64), "expected float32 (batch, 4), got float64 (2, 4)"),
        (X[:, :3], "got float32 (2, 3)"),
        (X[0], "add the batch dimension"),
        ("x", "got str"),
    ):
        with pytest.raises(adapt.InputMismatchError) as caught:
            model(wrong)
        assert words in str(caught.value)
    with pytest.raises(adapt.InputMismatchError):
        model(X, X)
    assert not dispatcher.of(msg.InferRequest)


@pytest.mark.parametrize("deadline_s", [0, -1, float("nan"), float("inf"), 1e9, "soon", None, True])
def test_an_impossible_deadline_is_a_config_error(model, deadline_s):
    with pytest.raises(adapt.ConfigError, match="deadline_s"):
        model.submit(X, deadline_s=deadline_s)


def test_inputs_beyond_what_the_dispatcher_takes_are_refused_here(dispatcher):
    dispatcher.max_message_bytes = 16
    with adapt.Client(dispatcher.address) as client, pytest.raises(adapt.InputMismatchError, match=r"32 bytes.*up to 16"):
        client.model("double")(X)
    assert not dispatcher.of(msg.InferRequest)


# ── one outcome ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_deadline_ends_the_waiting_and_tells_the_cluster(dispatcher, model):
    began = time.monotonic()
    with pytest.raises(adapt.DeadlineExceededError) as caught:
        model(X, deadline_s=0.4)
    assert 0.4 <= time.monotonic() - began < 1.4
    assert caught.value.budget_s == 0.4
    request = dispatcher.take(msg.InferRequest)
    assert dispatcher.take(msg.CancelRequest).request_id == request.request_id
    dispatcher.reply(request, X)  # too late
    assert dispatcher.take(msg.ReplyAck).request_ids == [request.request_id]


def test_a_cancelled_future_reaches_the_cluster(dispatcher, model):
    future = model.submit(X)
    request = dispatcher.take(msg.InferRequest)
    assert future.cancel() and future.cancelled()
    assert dispatcher.take(msg.CancelRequest).request_id == request.request_id == future.request_id
    assert concurrent.futures.wait([future], timeout=WAIT_S).done == {future}
    with pytest.raises(CancelledError):
        future.result()
    dispatcher.reply(request, X)
    dispatcher.take(msg.ReplyAck)
    assert future.cancelled()


def test_the_first_answer_counts_and_every_one_is_acknowledged(dispatcher, model):
    future = model.submit(X)
    request = dispatcher.take(msg.InferRequest)
    dispatcher.reply(request, X)
    dispatcher.reply(request, X + 1)
    dispatcher.fail(request, adapt.ModelError("no"))
    assert np.array_equal(future.result(WAIT_S), X)
    assert (future.outcome.attempts, future.outcome.numeric_classes) == (3, ("c",))
    acks = dispatcher.until(lambda: [r for ack in dispatcher.of(msg.ReplyAck) for r in ack.request_ids][2:])
    assert acks == [request.request_id]
    assert not future.cancel()


def test_an_error_of_the_cluster_is_raised_as_what_it_is(dispatcher, model):
    errors = iter(
        [
            adapt.PoisonError("it killed w1, w2, w3"),
            adapt.OverloadedError("full", retry_after_s=0.5),
            adapt.UnknownModelError("double", suggestions=["treble"]),
        ]
    )
    dispatcher.answer = lambda m, b: isinstance(m, msg.InferRequest) and dispatcher.fail(m, next(errors))
    with pytest.raises(adapt.PoisonError, match="killed"):
        model(X)
    with pytest.raises(adapt.OverloadedError) as overloaded:
        model(X)
    assert overloaded.value.retry_after_s == 0.5
    with pytest.raises(adapt.UnknownModelError, match="treble") as unknown:
        model(X)
    assert "client.model('double')" in unknown.value.__notes__[0]


def test_an_answer_that_cannot_be_read_is_an_error_and_not_silence(dispatcher, model):
    def answer(message, blobs):
        if isinstance(message, msg.InferRequest):
            dispatcher.reply(message, X, X)  # the interface has one output

    dispatcher.answer = answer
    with pytest.raises(adapt.AdaptError, match="1 outputs, got 2"):
        model(X)


# ── sessions ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_after_say_hello_open_requests_are_said_again(dispatcher, model):
    dispatcher.answer = lambda m, b: isinstance(m, msg.InferRequest) and dispatcher.accept(m)  # else it is said again before long
    futures = [model.submit(X + n) for n in range(3)]
    dispatcher.take(msg.InferRequest, 3)
    dispatcher.send(msg.SayHello())
    dispatcher.take(msg.InferRequest, 6)
    ids = [request.request_id for request in dispatcher.of(msg.InferRequest)]
    assert ids[:3] == ids[3:] == [future.request_id for future in futures]
    for request in dispatcher.of(msg.InferRequest)[3:]:
        dispatcher.reply(request, dispatcher.input(request))
    for n, future in enumerate(futures):
        assert np.array_equal(future.result(WAIT_S), X + n)


def test_another_dispatcher_at_the_address_is_told_what_is_open(dispatcher, model):
    answered, future = model.submit(X), model.submit(X + 1)
    first, second = (dispatcher.request(one.request_id) for one in (answered, future))
    dispatcher.accept(second, version=7)
    dispatcher.reply(first, X)
    answered.result(WAIT_S)
    dispatcher.close()
    waiting = model.submit(X + 2)  # nobody is there: it waits
    with SpeakingDispatcher(dispatcher.address, term=2) as successor:
        again, late = (successor.request(one.request_id) for one in (future, waiting))
        assert answered.request_id not in {request.request_id for request in successor.of(msg.InferRequest)}
        assert (again.version, again.program) == (7, PROGRAM)
        assert again.budget_s < second.budget_s
        assert late.version == 0
        for request in (again, late):
            successor.reply(request, successor.input(request))
        assert np.array_equal(future.result(WAIT_S), X + 1)
        assert np.array_equal(waiting.result(WAIT_S), X + 2)
        model._client.close()


def test_a_request_that_meets_no_session_ends_by_its_deadline(dispatcher, model):
    dispatcher.close()
    began = time.monotonic()
    with pytest.raises(adapt.DeadlineExceededError):
        model(X, deadline_s=0.3)
    assert time.monotonic() - began < 1.3


def test_nobody_answers():
    address = free_address()
    began = time.monotonic()
    with pytest.raises(adapt.ConnectError, match=address):
        adapt.Client(address, connect_timeout_s=0.3)
    assert time.monotonic() - began < 2.0


def test_a_refusal_is_told_as_what_it_is(dispatcher):
    code, message, fields = adapt.VersionError(2, ours=1).to_wire()
    dispatcher.refusal = msg.Refused(code=code, message=message, fields=fields)
    with pytest.raises(adapt.VersionError, match="version 2") as caught:
        adapt.Client(dispatcher.address)
    assert (caught.value.theirs, caught.value.ours) == (2, 1)


def test_a_refusal_later_ends_everything(dispatcher, client, model):
    future = model.submit(X)
    dispatcher.take(msg.InferRequest)
    dispatcher.refusal = msg.Refused(code="wire", message="no more of this", fields={})
    dispatcher.send(msg.SayHello())
    with pytest.raises(adapt.WireError, match="no more of this"):
        future.result(WAIT_S)
    with pytest.raises(adapt.WireError):
        model(X)
    with pytest.raises(adapt.WireError):
        client.status()


def test_the_address_comes_from_the_environment(dispatcher, monkeypatch):
    monkeypatch.setenv("ADAPT_DISPATCHER", dispatcher.address)
    with adapt.Client() as client:
        assert client.address == dispatcher.address
        assert client.status().term == 1
    with pytest.raises(adapt.ConfigError, match="tcp://HOST:PORT"):
        adapt.Client("localhost")


# ── map ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_map_keeps_the_order_and_the_bound(dispatcher, model):
    held: dict = {}  # by id: on a slow machine a request that is not accepted within a second is said again
    answered: set = set()

    def answer(message, blobs):
        if isinstance(message, msg.InferRequest) and message.request_id not in answered:
            held[message.request_id] = message
            if len(held) == 3:  # the last first
                for request in reversed(held.values()):
                    dispatcher.reply(request, dispatcher.input(request))
                answered.update(held)
                held.clear()

    dispatcher.answer = answer
    outputs = list(model.map((X + n for n in range(9)), in_flight=3))
    assert all(np.array_equal(y, X + n) for n, y in enumerate(outputs)) and len(outputs) == 9
    assert len(held) == 0


def test_map_takes_no_more_inputs_than_it_needs_and_cancels_what_it_leaves(dispatcher, model):
    taken = []

    def answer(message, blobs):
        if isinstance(message, msg.InferRequest) and message.request_id.sequence == 1:
            dispatcher.doubles(message, blobs)

    dispatcher.answer = answer
    outputs = model.map((taken.append(n) or X for n in range(100)), in_flight=4)
    next(outputs)
    assert len(taken) in (4, 5)  # as the answer came after the fourth, or before it
    requests = dispatcher.until(
        lambda: len(ids := {one.request_id.sequence for one in dispatcher.of(msg.InferRequest)}) == len(taken) and ids
    )
    outputs.close()
    cancelled = dispatcher.until(lambda: len(dispatcher.of(msg.CancelRequest)) == len(requests) - 1 and dispatcher.of(msg.CancelRequest))
    assert {cancel.request_id.sequence for cancel in cancelled} == requests - {1}


def test_map_goes_on_behind_a_slow_answer_as_far_as_memory_allows(dispatcher, model):
    dispatcher.answer = lambda m, b: isinstance(m, msg.InferRequest) and dispatcher.input(m)[0, 0] and dispatcher.doubles(m, b)
    taken = []
    outputs = model.map((taken.append(n) or X + n for n in range(20)), in_flight=2)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(next, outputs)
        dispatcher.until(lambda: len({i for ack in dispatcher.of(msg.ReplyAck) for i in ack.request_ids}) == 7)
        assert taken == list(range(8)) and not first.done()
        slow = next(request for request in dispatcher.of(msg.InferRequest) if not dispatcher.input(request)[0, 0])
        dispatcher.reply(slow, X)
        assert np.array_equal(first.result(WAIT_S), X)
    assert [float(y[0, 0]) for y in outputs] == [2.0 * n for n in range(1, 20)]


def test_map_asks_an_overloaded_dispatcher_again(dispatcher, model):
    refused = set()

    def answer(message, blobs):
        if isinstance(message, msg.InferRequest):
            value = float(dispatcher.input(message)[0, 0])
            if value in refused:
                dispatcher.doubles(message, blobs)
            else:
                refused.add(value)
                dispatcher.fail(message, adapt.OverloadedError("full", retry_after_s=0.02))

    def reused():
        x = X.copy()
        for n in range(5):
            x[:] = X + n
            yield x

    dispatcher.answer = answer
    for n, y in enumerate(model.map(reused(), in_flight=2)):
        assert np.array_equal(y, 2 * (X + n))  # what was taken the first time
    dispatcher.answer = lambda m, b: (
        isinstance(m, msg.InferRequest) and dispatcher.fail(m, adapt.OverloadedError("full", retry_after_s=0.2))
    )
    with pytest.raises(adapt.OverloadedError):
        list(model.map([X], deadline_s=0.5))


def test_map_raises_where_an_input_fails(dispatcher, model):
    def answer(message, blobs):
        if isinstance(message, msg.InferRequest):
            is_bad = dispatcher.input(message)[0, 0] == 2
            dispatcher.fail(message, adapt.ModelError("two")) if is_bad else dispatcher.doubles(message, blobs)

    dispatcher.answer = answer
    came = []
    with pytest.raises(adapt.ModelError, match="two"):
        for y in model.map([X + n for n in range(5)], in_flight=2):
            came.append(y)
    assert len(came) == 2
    came.clear()
    with pytest.raises(adapt.InputMismatchError):
        came.extend(float(y[0, 0]) for y in model.map([X, X + 1, X[0], X]))
    assert came == [0, 2]


def test_map_shows_its_progress_if_asked(dispatcher, model, capfd):
    dispatcher.answer = dispatcher.doubles
    assert len(list(model.map([X] * 3, progress=True))) == 3
    assert "double" in capfd.readouterr().err
    with pytest.raises(adapt.ConfigError, match="in_flight"):
        model.map([X], in_flight=0)


# ── threads ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_many_threads_submit_at_once(dispatcher, model):
    dispatcher.answer = dispatcher.doubles

    def work(seed: int) -> bool:
        x = np.full((1, 4), seed, np.float32)
        return all(np.array_equal(future.result(WAIT_S), 2 * x) for future in [model.submit(x) for _ in range(25)])

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
    assert len({request.request_id for request in dispatcher.of(msg.InferRequest)}) == 200
    acked = dispatcher.until(lambda: len(ids := [r for ack in dispatcher.of(msg.ReplyAck) for r in ack.request_ids]) >= 200 and ids)
    assert len(acked) == len(set(acked)) == 200


def test_a_callback_that_blocks_stops_nobody(dispatcher, model):
    dispatcher.answer = dispatcher.doubles
    gate, entered = threading.Event(), threading.Event()
    future = model.submit(X)

    def block(_) -> None:
        entered.set()
        gate.wait(WAIT_S)

    future.add_done_callback(block)
    future.result(WAIT_S)
    if not entered.wait(0.5):  # it was done before: then it was called here, and has returned
        pytest.fail("the callback was not called")
    try:
        assert np.array_equal(model(X, deadline_s=WAIT_S), 2 * X)
        dispatcher.answer = lambda message, blobs: None
        with pytest.raises(adapt.DeadlineExceededError):
            model(X, deadline_s=0.2)
    finally:
        gate.set()


def test_a_callback_may_ask_again_and_may_close_the_client(dispatcher):
    dispatcher.deployments = [deployment("wide", of=interface(width=100_000))]  # decoded on another thread
    dispatcher.answer = dispatcher.doubles
    x, results, done = np.ones((1, 100_000), np.float32), [], threading.Event()
    client = adapt.Client(dispatcher.address)
    model = client.model("wide")

    def again(future) -> None:
        results.append(model(future.result()))
        client.close()
        done.set()

    model.submit(x).add_done_callback(again)
    assert done.wait(WAIT_S)
    assert np.array_equal(results[0], 4 * x)


# ── calls ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_deploying_a_named_model(dispatcher, client):
    steps = []

    def answer(message, blobs):
        if isinstance(message, msg.Deploy):
            for step in ("exporting", "cutting", "loading"):
                dispatcher.send(msg.Progress(call=message.call, step=step))
            dispatcher.send(msg.Deployed(call=message.call, deployment=deployment(message.name)))

    dispatcher.answer = answer
    model = client.deploy(
        "torchvision/resnet18", stages=3, codec="lz4", numerics="exact", seed=5, model_args={"num_classes": 7},
        input_shape=(3, 64, 64), weights="DEFAULT", progress=steps.append,
    )  # fmt: skip
    assert steps == ["exporting", "cutting", "loading"]  # all of them, before deploy returned
    assert model.name == "resnet18"
    deploy = dispatcher.take(msg.Deploy)
    assert (deploy.name, deploy.stages, deploy.codec, deploy.tolerance, deploy.numerics) == ("resnet18", 3, "lz4", None, "exact")
    assert deploy.uploaded is None
    assert deploy.named == msg.NamedSource(
        model="torchvision/resnet18", weights="DEFAULT", seed=5, model_args={"num_classes": 7}, input_shape=[3, 64, 64]
    )
    client.deploy("resnet18", progress=True)
    assert dispatcher.take(msg.Deploy, 2).stages == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stages": 0}, "stages"),
        ({"stages": "many"}, "stages"),
        ({"codec": "zip"}, "codec"),
        ({"codec": "zfp"}, "tolerance"),
        ({"tolerance": -1}, "tolerance"),
        ({"numerics": "fast"}, "numerics"),
        ({"name": "a b"}, "name"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"model_args": {"x": object()}}, "deploy"),
        ({"input_shape": (-1, 3)}, "input_shape"),
        ({"weights": "w" * 5000}, "weights"),
        ({"example_inputs": (X,)}, "example_inputs"),
    ],
)
def test_an_impossible_option_is_named(dispatcher, client, options, words):
    with pytest.raises(adapt.ConfigError, match=words):
        client.deploy("torchvision/resnet18", **options)
    assert not dispatcher.of(msg.Deploy)


def test_a_call_that_fails_raises_what_the_dispatcher_says(dispatcher, client):
    def answer(message, blobs):
        if isinstance(message, msg.Deploy | msg.Undeploy):
            code, text, fields = adapt.UnknownModelError("resnet", suggestions=["resnet18"]).to_wire()
            dispatcher.send(msg.CallFailed(call=message.call, code=code, message=text, fields=fields))

    dispatcher.answer = answer
    with pytest.raises(adapt.UnknownModelError) as caught:
        client.deploy("torchvision/resnet")
    assert caught.value.suggestions == ["resnet18"]
    with pytest.raises(adapt.UnknownModelError):
        client.undeploy("resnet")
    with pytest.raises(adapt.UnknownModelError, match="double"):
        client.model("duoble")


def test_a_call_waits_for_the_next_session_and_is_asked_again_under_another_number(dispatcher, client):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        deploying, removing = pool.submit(client.deploy, "torchvision/resnet18"), pool.submit(client.undeploy, "double")
        first, removal = dispatcher.take(msg.Deploy), dispatcher.take(msg.Undeploy)
        dispatcher.send(msg.SayHello())
        again, removal_again = dispatcher.take(msg.Deploy, 2), dispatcher.take(msg.Undeploy, 2)
        assert len({first.call, removal.call, again.call, removal_again.call}) == 4
        dispatcher.send(msg.Deployed(call=first.call, deployment=deployment("stale")))  # said to nobody
        dispatcher.send(msg.Deployed(call=again.call, deployment=deployment("resnet18")))
        assert deploying.result(WAIT_S).name == "resnet18"
        code, text, fields = adapt.UnknownModelError("double").to_wire()  # it was removed the first time, and the answer lost
        dispatcher.send(msg.CallFailed(call=removal_again.call, code=code, message=text, fields=fields))
        assert removing.result(WAIT_S) is None


def test_a_call_that_is_not_answered_in_time_is_not_asked_again(dispatcher, client):
    with pytest.raises(adapt.ConnectError, match=r"Deploy within 0\.2 s"):
        client.deploy("torchvision/resnet18", timeout_s=0.2)
    dispatcher.send(msg.SayHello())
    dispatcher.take(msg.Attach, 2)
    client.status()
    assert len(dispatcher.of(msg.Deploy)) == 1


def test_a_module_is_exported_here_and_fetched_from_here(dispatcher, client):
    torch = pytest.importorskip("torch")
    pieces: dict[int, bytes] = {}
    order: list[msg.Deploy] = []

    def answer(message, blobs):
        match message:
            case msg.Deploy(uploaded=msg.ProgramSource() as uploaded):
                order.append(message)
                dispatcher.send(msg.Fetch(artifact="0" * 64, offset=0, length=10))  # another file
                dispatcher.send(msg.Fetch(artifact=uploaded.program, offset=0, length=16384))
            case msg.ArtifactPiece(offset=offset, file_bytes=file_bytes):
                pieces[offset] = bytes(blobs[0].contiguous())
                came = sum(map(len, pieces.values()))
                if came < file_bytes:
                    dispatcher.send(msg.Fetch(artifact=message.artifact, offset=came, length=16384))
                else:
                    dispatcher.send(msg.Deployed(call=order[-1].call, deployment=deployment(order[-1].name)))

    dispatcher.answer = answer
    module = torch.nn.Sequential(torch.nn.Linear(4, 2000), torch.nn.ReLU())
    model = client.deploy(module, example_inputs=torch.ones(2, 4), name="net", stages=2)  # one tensor: no tuple needed
    assert model.name == "net" and module.training
    data = b"".join(pieces[offset] for offset in sorted(pieces))
    uploaded = order[0].uploaded
    assert hashlib.sha256(data).hexdigest() == uploaded.program and len(data) == uploaded.file_bytes
    assert len(uploaded.operator_costs_s) >= 2
    assert dispatcher.take(msg.ArtifactMissing).artifact == "0" * 64
    pieces.clear()
    client.deploy(module, input_shape=(1, 4))
    assert order[-1].name == "Sequential"
    for wrong, options, error in (
        (module, {}, adapt.ExportError),
        (42, {}, adapt.ExportError),
        (module, {"input_shape": (1, 4), "seed": 1}, adapt.ConfigError),
    ):
        with pytest.raises(error):
            client.deploy(wrong, **options)


# ── the end ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_closing_cancels_what_is_open_and_says_goodbye(dispatcher):
    client = adapt.Client(dispatcher.address)
    model = client.model("double")
    future = model.submit(X)
    dispatcher.take(msg.InferRequest)
    client.close()
    client.close()
    with pytest.raises(CancelledError):
        future.result(WAIT_S)
    dispatcher.take(msg.CancelRequest)
    dispatcher.take(msg.Goodbye)
    for use in (lambda: model(X), client.status, lambda: client.deploy("torchvision/resnet18")):
        with pytest.raises(adapt.ConnectError, match="closed"):
            use()
    assert "closed" in repr(client)
    assert not any(thread.name.startswith("adapt-client") for thread in threading.enumerate())


def test_a_forgotten_client_closes_itself(dispatcher):
    client = adapt.Client(dispatcher.address)
    client.status()
    del client
    gc.collect()
    dispatcher.take(msg.Goodbye)


def test_a_forked_process_has_to_make_its_own(dispatcher, client, model):
    child = os.fork()
    if child == 0:
        status = 1
        try:
            model.submit(X)
        except adapt.ConnectError as error:
            status = 0 if "forked" in str(error) else 2
        finally:
            client.close()  # nothing happens
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    dispatcher.answer = dispatcher.doubles
    assert np.array_equal(model(X), 2 * X)


SCRIPT = """
import sys
import numpy as np
import adapt
client = adapt.Client(sys.argv[1])
model = client.model("double")
futures = [model.submit(np.ones((1, 4), np.float32)) for _ in range(3)]
futures[0].add_done_callback(lambda future: None)
print("end")
"""


def test_a_program_may_end_without_closing_anything(dispatcher):
    result = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", SCRIPT, dispatcher.address], capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "end\n", "")
    dispatcher.take(msg.Goodbye)


def test_nothing_of_this_needs_torch():
    script = "import sys, adapt; adapt.Client, adapt.AsyncClient, adapt.LocalCluster; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0
    assert adapt.__version__ == "0.1.0"
