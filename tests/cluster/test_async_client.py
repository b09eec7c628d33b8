"""The asyncio door: against a dispatcher that says what the test tells it to, and against a real cluster."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import itertools
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

import adapt
from adapt.protocol import messages as msg

sys.path.insert(0, str(Path(__file__).resolve().parent))
from ends import on_loop
from speaking import WAIT_S, SpeakingDispatcher, deployment, interface

X = np.arange(8, dtype=np.float32).reshape(2, 4)
WIDTH = 100_000  # large: encoded and decoded on other threads


@pytest.fixture
def dispatcher():
    with SpeakingDispatcher() as dispatcher:
        dispatcher.deployments = [deployment(), deployment("wide", of=interface(width=WIDTH), codec="lz4")]
        yield dispatcher


async def told(dispatcher: SpeakingDispatcher, kind: type, count: int = 1):
    """The dispatcher's `take`, which would block the loop that its client lives on."""
    return await asyncio.to_thread(dispatcher.take, kind, count)


async def until(dispatcher: SpeakingDispatcher, condition):
    return await asyncio.to_thread(dispatcher.until, condition)


def values(dispatcher: SpeakingDispatcher) -> list[float]:
    """What came to be computed, once each: on a slow machine a request that is not accepted within a second is said again."""
    requests = {request.request_id: request for request in dispatcher.of(msg.InferRequest)}
    return [float(dispatcher.input(request)[0, 0]) for request in requests.values()]


# ── one request ──────────────────────────────────────────────────────────────────────────────────────────────────────


@on_loop
async def test_a_call_is_awaited(dispatcher):
    dispatcher.answer = dispatcher.doubles
    async with adapt.AsyncClient(dispatcher.address) as client:
        model = await client.model("double")
        y = await model(X)
        assert type(y) is np.ndarray and y.flags.writeable and np.array_equal(y, 2 * X)
        future = model.submit(x=X)
        assert isinstance(future, asyncio.Future) and future.outcome is None
        assert np.array_equal(await future, 2 * X)
        assert (future.outcome.attempts, future.outcome.numeric_classes) == (3, ("c",))
        assert future.request_id == dispatcher.of(msg.InferRequest)[-1].request_id
        assert not future.cancel()
        assert "double" in repr(model) and "connected" in repr(client)
    assert "closed" in repr(client)
    await told(dispatcher, msg.Goodbye)


@on_loop
async def test_what_is_sent_is_what_the_array_held_when_submit_returned(dispatcher):
    dispatcher.answer = dispatcher.doubles
    rng = np.random.default_rng(0)
    async with adapt.AsyncClient(dispatcher.address) as client:
        for name, width in (("double", 4), ("wide", WIDTH)):
            model = await client.model(name)
            x = rng.integers(0, 4, (2, width)).astype(np.float32)  # lz4 finds something in it
            truth = 2 * x
            future = model.submit(x)
            x[:] = -1
            assert np.array_equal(await future, truth)
            assert dispatcher.of(msg.InferRequest)[-1].leaves[0].codec == ("raw" if name == "double" else "lz4")


@on_loop
async def test_large_tensors_come_back_as_tensors(dispatcher):
    torch = pytest.importorskip("torch")
    dispatcher.answer = dispatcher.doubles
    async with adapt.AsyncClient(dispatcher.address) as client:
        model = await client.model("wide")
        x = torch.zeros(2, WIDTH, requires_grad=True)
        future = model.submit(x)
        with torch.no_grad():
            x += 1
        assert torch.equal(await future, torch.zeros(2, WIDTH))


@on_loop
async def test_a_large_input_is_encoded_elsewhere_and_may_be_cancelled_until_then(dispatcher):
    async with adapt.AsyncClient(dispatcher.address) as client:
        model = await client.model("wide")
        gate, passed = threading.Event(), threading.Event()
        client._conversation._encoding.post(lambda: gate.wait(WAIT_S))
        future = model.submit(np.zeros((1, WIDTH), np.float32))
        await client.status()  # neither the loop nor the conversation waits for it
        assert future.cancel() and future.cancelled()
        gate.set()
        client._conversation._encoding.post(passed.set)
        assert await asyncio.to_thread(passed.wait, WAIT_S)
        await client.status()
        assert not dispatcher.of(msg.InferRequest)


@on_loop
async def test_what_cancels_the_waiting_cancels_the_request(dispatcher):
    async with adapt.AsyncClient(dispatcher.address) as client:
        model = await client.model("double")

        future = model.submit(X)
        await told(dispatcher, msg.InferRequest)
        assert future.cancel() and future.cancelled()
        assert (await told(dispatcher, msg.CancelRequest)).request_id == future.request_id

        task = asyncio.create_task(model(X))
        await until(dispatcher, lambda: len(values(dispatcher)) == 2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await told(dispatcher, msg.CancelRequest, 2)

        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await model(X)
        await client.status()  # said after it, and on the same connection
        cancelled = [cancel.request_id for cancel in dispatcher.of(msg.CancelRequest)]
        assert sorted({request.request_id for request in dispatcher.of(msg.InferRequest)}) == sorted(cancelled)


@on_loop
async def test_errors_are_those_of_the_other_door(dispatcher):
    errors = iter([adapt.PoisonError("it killed w1, w2, w3"), adapt.OverloadedError("full", retry_after_s=0.5)])
    dispatcher.answer = lambda m, b: isinstance(m, msg.InferRequest) and dispatcher.fail(m, next(errors))
    async with adapt.AsyncClient(dispatcher.address) as client:
        model = await client.model("double")
        with pytest.raises(adapt.InputMismatchError, match="add the batch dimension"):
            model.submit(X[0])
        with pytest.raises(adapt.ConfigError, match="deadline_s"):
            await model(X, deadline_s=0)
        with pytest.raises(adapt.ConfigError, match="--max-budget"):
            await model(X, deadline_s=1e9)
        with pytest.raises(adapt.PoisonError, match="killed"):
            await model(X)
        with pytest.raises(adapt.OverloadedError):
            await model(X)
        dispatcher.answer = lambda message, blobs: None
        with pytest.raises(adapt.DeadlineExceededError) as caught:
            await model(X, deadline_s=0.3)
        assert caught.value.budget_s == 0.3
        await told(dispatcher, msg.CancelRequest)
        with pytest.raises(adapt.UnknownModelError, match="double"):
            await client.model("duoble")


# ── map ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def slowly(inputs):
    for value in inputs:
        await asyncio.sleep(0)
        yield value


@pytest.mark.parametrize("source", [list, slowly])
@on_loop
async def test_map_keeps_the_order_and_the_bound(dispatcher, source):
    held: dict = {}  # by id: on a slow machine a request that is not accepted within a second is said again
    answered: set = set()
    most = 0

    def answer(message, blobs):
        nonlocal most
        if isinstance(message, msg.InferRequest) and message.request_id not in answered:
            held[message.request_id] = message
            most = max(most, len(held))
            if len(held) == 3:  # the last first
                for request in reversed(held.values()):
                    dispatcher.reply(request, dispatcher.input(request))
                answered.update(held)
                held.clear()

    dispatcher.answer = answer
    async with adapt.AsyncClient(dispatcher.address) as client:
        model = await client.model("double")
        outputs = [y async for y in model.map(source(X + n for n in range(9)), in_flight=3)]
    assert len(outputs) == 9 and all(np.array_equal(y, X + n) for n, y in enumerate(outputs))
    assert most == 3 and not held


@on_loop
async def test_map_goes_on_behind_a_slow_answer_as_far_as_memory_allows(dispatcher):
    dispatcher.answer = lambda m, b: isinstance(m, msg.InferRequest) and dispatcher.input(m)[0, 0] and dispatcher.doubles(m, b)
    async with adapt.AsyncClient(dispatcher.address) as client:
        model = await client.model("double")
        outputs = model.map((X + n for n in itertools.count()), in_flight=2)
        first = asyncio.create_task(anext(outputs))
        await until(dispatcher, lambda: len(values(dispatcher)) == 8)
        acks = await until(dispatcher, lambda: len(ids := {i for ack in dispatcher.of(msg.ReplyAck) for i in ack.request_ids}) == 7 and ids)
        await client.status()
        assert sorted(values(dispatcher)) == list(range(8)) and not first.done()
        slow = next(request for request in dispatcher.of(msg.InferRequest) if request.request_id not in acks)
        dispatcher.reply(slow, X)
        assert np.array_equal(await first, X)
        assert [float((await anext(outputs))[0, 0]) for _ in range(8)] == [2.0 * n for n in range(1, 9)]
        await outputs.aclose()


@on_loop
async def test_map_cancels_what_it_leaves(dispatcher):
    async def endless():
        for n in itertools.count():
            yield X + n

    def answer(message, blobs):
        if isinstance(message, msg.InferRequest) and message.request_id.sequence == 1:
            dispatcher.doubles(message, blobs)

    dispatcher.answer = answer
    async with adapt.AsyncClient(dispatcher.address) as client:
        model = await client.model("double")
        async with contextlib.aclosing(endless()) as source, contextlib.aclosing(model.map(source, in_flight=4)) as outputs:
            assert np.array_equal(await anext(outputs), 2 * X)
            await until(dispatcher, lambda: len(values(dispatcher)) == 5)
        cancelled = await until(dispatcher, lambda: len(dispatcher.of(msg.CancelRequest)) == 4 and dispatcher.of(msg.CancelRequest))
        assert {cancel.request_id.sequence for cancel in cancelled} == {2, 3, 4, 5}


@on_loop
async def test_map_asks_an_overloaded_dispatcher_again_what_it_was_given(dispatcher):
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
    async with adapt.AsyncClient(dispatcher.address) as client:
        model = await client.model("double")
        outputs = [y async for y in model.map(reused(), in_flight=2)]
        assert len(outputs) == 5 and all(np.array_equal(y, 2 * (X + n)) for n, y in enumerate(outputs))
        dispatcher.answer = lambda m, b: (
            isinstance(m, msg.InferRequest) and dispatcher.fail(m, adapt.OverloadedError("full", retry_after_s=0.2))
        )
        with pytest.raises(adapt.OverloadedError):
            [y async for y in model.map([X], deadline_s=0.5)]


@on_loop
async def test_map_asks_again_while_its_user_is_busy(dispatcher):
    refused = set()

    def answer(message, blobs):
        if isinstance(message, msg.InferRequest):
            value = float(dispatcher.input(message)[0, 0])
            if value == 1 and value not in refused:
                refused.add(value)
                dispatcher.fail(message, adapt.OverloadedError("full", retry_after_s=0.02))
            else:
                dispatcher.doubles(message, blobs)

    dispatcher.answer = answer
    async with adapt.AsyncClient(dispatcher.address) as client:
        model = await client.model("double")
        outputs = model.map((X + n for n in range(3)), in_flight=3)
        assert np.array_equal(await anext(outputs), 2 * X)
        await until(dispatcher, lambda: len(dispatcher.of(msg.InferRequest)) == 4)  # and nobody asks for the next
        assert [y[0, 0] async for y in outputs] == [2, 4]


@on_loop
async def test_map_raises_what_an_input_raises(dispatcher):
    torch = pytest.importorskip("torch")
    dispatcher.answer = dispatcher.doubles
    async with adapt.AsyncClient(dispatcher.address) as client:
        model = await client.model("double")
        outputs = model.map([X, torch.zeros(2, 4, device="meta"), X])
        assert np.array_equal(await anext(outputs), 2 * X)
        with pytest.raises((NotImplementedError, RuntimeError, adapt.AdaptError)):
            await anext(outputs)


@on_loop
async def test_map_raises_where_an_input_fails(dispatcher):
    dispatcher.answer = dispatcher.doubles

    def failing():
        yield from (X, X + 1)
        raise KeyError("no more")

    async with adapt.AsyncClient(dispatcher.address) as client:
        model = await client.model("double")
        for source, error in (([X, X + 1, X[0], X], adapt.InputMismatchError), (failing(), KeyError), (slowly(failing()), KeyError)):
            came = []
            with pytest.raises(error):
                async for y in model.map(source, in_flight=2):
                    came.append(y)
            assert len(came) == 2
        with pytest.raises(adapt.ConfigError, match="in_flight"):
            model.map([X], in_flight=0)
        with pytest.raises(TypeError):
            [y async for y in model.map(5)]
        assert [y async for y in model.map([])] == []


@on_loop
async def test_a_source_may_depend_on_the_outputs(dispatcher):
    dispatcher.answer = dispatcher.doubles
    fed: asyncio.Queue = asyncio.Queue()

    async def source():
        yield X
        for _ in range(4):
            yield await fed.get()

    async with adapt.AsyncClient(dispatcher.address) as client:
        model = await client.model("double")
        last = None
        async for y in model.map(source(), in_flight=3):
            last = y
            fed.put_nowait(y)
    assert np.array_equal(last, 32 * X)


def test_map_shows_its_progress_if_asked(dispatcher, capfd):
    dispatcher.answer = dispatcher.doubles

    async def work():
        async with adapt.AsyncClient(dispatcher.address) as client:
            model = await client.model("double")
            return [y async for y in model.map([X] * 3, progress=True)]

    assert len(asyncio.run(work())) == 3
    assert "double" in capfd.readouterr().err


# ── calls ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_both_doors_take_the_same_arguments():
    for one, other in (
        (adapt.Client, adapt.AsyncClient),
        (adapt.Client.deploy, adapt.AsyncClient.deploy),
        (adapt.Client.profile, adapt.AsyncClient.profile),
        (adapt.Client.model, adapt.AsyncClient.model),
        (adapt.Client.undeploy, adapt.AsyncClient.undeploy),
        (adapt.Model.__call__, adapt.AsyncModel.__call__),
        (adapt.Model.submit, adapt.AsyncModel.submit),
        (adapt.Model.map, adapt.AsyncModel.map),
    ):
        expected, got = inspect.signature(one).parameters.values(), inspect.signature(other).parameters.values()
        assert [(p.name, p.kind, p.default) for p in expected] == [(p.name, p.kind, p.default) for p in got]


@on_loop
async def test_deploying_a_named_model_tells_its_progress_on_the_loop(dispatcher):
    steps = []

    def answer(message, blobs):
        if isinstance(message, msg.Deploy):
            for step in ("exporting", "cutting", "loading"):
                dispatcher.send(msg.Progress(call=message.call, step=step))
            dispatcher.send(msg.Deployed(call=message.call, deployment=deployment(message.name)))

    dispatcher.answer = answer
    async with adapt.AsyncClient(dispatcher.address) as client:
        model = await client.deploy(
            "torchvision/resnet18", stages=3, seed=5, progress=lambda step: steps.append((step, asyncio.get_running_loop()))
        )
        here = asyncio.get_running_loop()
        assert steps == [("exporting", here), ("cutting", here), ("loading", here)]  # all of them, before deploy returned
        assert model.name == "resnet18" and dispatcher.of(msg.Deploy)[-1].named.seed == 5
        with pytest.raises(adapt.ConfigError, match="stages"):
            await client.deploy("torchvision/resnet18", stages=0)


@on_loop
async def test_a_call_that_nobody_waits_for_is_withdrawn(dispatcher):
    async with adapt.AsyncClient(dispatcher.address) as client:
        with pytest.raises(adapt.ConnectError, match=r"Deploy within 0\.1 s"):
            await client.deploy("torchvision/resnet18", timeout_s=0.1)
        deploying = asyncio.create_task(client.deploy("torchvision/resnet18"))
        second = await told(dispatcher, msg.Deploy, 2)
        deploying.cancel()
        with pytest.raises(asyncio.CancelledError):
            await deploying
        assert (await told(dispatcher, msg.CancelCall, 2)).call == second.call
        dispatcher.deployments = [replace(deployment(), version=2, earlier=[1])]
        rolling_back = asyncio.create_task(client.rollback("double"))
        asked = await told(dispatcher, msg.Rollback)
        rolling_back.cancel()
        assert (await told(dispatcher, msg.CancelCall, 3)).call == asked.call


# ── life ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@on_loop
async def test_closing_cancels_what_is_open(dispatcher):
    client = await adapt.AsyncClient(dispatcher.address).connect()
    model, wide = await client.model("double"), await client.model("wide")
    future, calling = model.submit(X), asyncio.create_task(client.undeploy("double"))
    mapping = asyncio.create_task(anext(model.map([X])))
    gate = threading.Event()
    client._conversation._encoding.post(lambda: gate.wait(WAIT_S))
    unsaid = wide.submit(np.zeros((1, WIDTH), np.float32))
    await told(dispatcher, msg.InferRequest, 2)
    await told(dispatcher, msg.Undeploy)
    await client.close()
    await client.close()
    for cancelled in (future, mapping):
        with pytest.raises(asyncio.CancelledError):
            await cancelled
    gate.set()
    for closed in (calling, unsaid, client.status(), model(X), client.connect()):
        with pytest.raises(adapt.ConnectError, match="closed"):
            await closed
    await told(dispatcher, msg.CancelRequest)
    await told(dispatcher, msg.Goodbye)


@on_loop
async def test_closing_while_it_connects_leaves_no_connection(dispatcher):
    client = adapt.AsyncClient(dispatcher.address)
    connecting = asyncio.create_task(client.connect())
    await asyncio.sleep(0)  # it begins
    assert "connecting" in repr(client)
    await client.close()
    with pytest.raises(adapt.ConnectError, match="closed while it connected"):
        await connecting
    await told(dispatcher, msg.Goodbye)
    assert "closed" in repr(client)


@on_loop
async def test_it_belongs_to_its_loop(dispatcher):
    client = adapt.AsyncClient(dispatcher.address)
    with pytest.raises(adapt.ConnectError, match="not connected"):
        await client.status()
    async with client:
        model = await client.model("double")

        async def elsewhere():
            await model(X)

        for use in (lambda: asyncio.run(elsewhere()), lambda: asyncio.run(client.close()), lambda: model.submit(X)):
            with pytest.raises(adapt.ConnectError, match="another event loop"):
                await asyncio.to_thread(use)
        with pytest.raises(adapt.ConnectError, match="connected"):
            await client.connect()
        assert (await client.status()).term == 1


@on_loop
async def test_who_is_not_let_in_is_told_why(dispatcher):
    with pytest.raises(adapt.ConfigError, match="tcp://HOST:PORT"):
        adapt.AsyncClient("localhost")
    code, message, fields = adapt.VersionError(2, ours=1).to_wire()
    dispatcher.refusal = msg.Refused(code=code, message=message, fields=fields)
    client = adapt.AsyncClient(dispatcher.address)
    with pytest.raises(adapt.VersionError, match="version 2"):
        await client.connect()
    dispatcher.refusal = None
    async with client:  # it may be tried again
        await client.status()
    dispatcher.close()
    with pytest.raises(adapt.ConnectError, match=dispatcher.address):
        await adapt.AsyncClient(dispatcher.address, connect_timeout_s=0.2).connect()


@on_loop
async def test_two_clients_on_one_loop(dispatcher):
    dispatcher.answer = dispatcher.doubles
    with SpeakingDispatcher() as other:
        other.answer = lambda m, b: isinstance(m, msg.InferRequest) and other.reply(m, other.input(m))
        async with adapt.AsyncClient(dispatcher.address) as one, adapt.AsyncClient(other.address) as two:
            doubled, same = await one.model("double"), await two.model("double")
            pairs = await asyncio.gather(*(asyncio.gather(doubled(X + n), same(X + n)) for n in range(20)))
            assert all(np.array_equal(y, 2 * (X + n)) and np.array_equal(z, X + n) for n, (y, z) in enumerate(pairs))
            await one.close()
            assert np.array_equal(await same(X), X)


@on_loop
async def test_a_forgotten_client_is_disconnected_and_warned_of(dispatcher):
    client = await adapt.AsyncClient(dispatcher.address).connect()
    future = (await client.model("double")).submit(X)
    await told(dispatcher, msg.InferRequest)
    with pytest.warns(ResourceWarning, match="AsyncClient"):
        del client
        gc.collect()
    await told(dispatcher, msg.Goodbye)
    with pytest.raises(asyncio.CancelledError):
        await future


SCRIPT = """
import asyncio, sys
import numpy as np
import adapt

async def main():
    global kept
    client = await adapt.AsyncClient(sys.argv[1]).connect()
    model = await client.model("double")
    future = model.submit(np.ones((1, 4), np.float32))
    if sys.argv[2] == "kept":
        kept = client, model, future
    print("end")

asyncio.run(main())
print("after")
"""


@pytest.mark.parametrize("what", ["dropped", "kept"])
def test_a_program_may_end_without_closing_anything(dispatcher, what):
    command = [sys.executable, "-X", "dev", "-c", SCRIPT, dispatcher.address, what]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, "end\nafter\n")
    assert "AsyncClient" in result.stderr and "Traceback" not in result.stderr and "Exception" not in result.stderr


# ── a real cluster ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def cluster():
    with adapt.LocalCluster(workers=2) as cluster:
        yield cluster


@pytest.fixture
def one_thread():
    """As the workers compute: the number of threads may change the last bits."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@on_loop
async def test_a_module_is_exported_beside_the_loop_and_answers_as_it_does_itself(cluster):
    import torch

    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3), torch.nn.BatchNorm2d(16), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(),
        torch.nn.Linear(256, 10),
    ).eval()  # fmt: skip
    inputs = [torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(n)) for n in range(12)]  # 216 KiB each: compressed
    with torch.inference_mode():
        truth = [module(x) for x in inputs]
    ticks, at_step = 0, {}

    async def tick():
        nonlocal ticks
        while True:
            await asyncio.sleep(0.005)
            ticks += 1

    async with adapt.AsyncClient(cluster.address) as client:
        ticking = asyncio.create_task(tick())
        model = await client.deploy(
            module, example_inputs=(inputs[0],), stages=2, codec="lz4", name="net", progress=lambda step: at_step.setdefault(step, ticks)
        )
        ticking.cancel()
        exporting, after, *_ = at_step.values()
        assert after - exporting >= 10, at_step  # an export takes seconds

        assert torch.equal(await model(inputs[0], deadline_s=30), truth[0])
        together = await asyncio.gather(*map(model, inputs))
        assert all(map(torch.equal, together, truth))
        streamed = [y async for y in model.map(inputs, in_flight=4)]
        assert len(streamed) == len(truth) and all(map(torch.equal, streamed, truth))
        arrays = [y async for y in model.map(slowly([x.numpy() for x in inputs]))]
        assert all(np.array_equal(y, z.numpy()) for y, z in zip(arrays, truth, strict=True))

        report = await client.status()
        assert [record.name for record in report.deployments] == ["net"] and len(report.workers) == 2
        await client.undeploy("net")
        with pytest.raises(adapt.UnknownModelError):
            await client.model("net")


@on_loop
async def test_an_export_that_nobody_waits_for_leaves_nothing(cluster, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    async with adapt.AsyncClient(cluster.address) as client:
        began = asyncio.Event()
        deploying = asyncio.create_task(
            client.deploy(torch.nn.Linear(4, 4), example_inputs=(torch.ones(1, 4),), progress=lambda _: began.set())
        )
        await began.wait()
        deploying.cancel()
        with pytest.raises(asyncio.CancelledError):
            await deploying
        assert (await client.status()).deployments == []
        await client.deploy(torch.nn.Linear(4, 4), example_inputs=(torch.ones(1, 4),), name="next")  # after it: one at a time
    assert list(tmp_path.glob("adapt-export-*")) == []
