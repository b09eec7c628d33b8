"""A whole worker against a dispatcher that says what the test tells it to."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch

from adapt.config import WorkerConfig
from adapt.errors import AdaptError
from adapt.models.export import export_module
from adapt.protocol import codecs
from adapt.protocol import messages as msg
from adapt.protocol.ids import AttemptId, RequestId, RoutingId, routing_ids
from adapt.protocol.wire import Blob
from adapt.runtime.artifacts import ArtifactStore
from adapt.runtime.endpoint import Arrival, Disconnected, Malformed, Received, RouterEndpoint
from adapt.runtime.worker import Worker

WAIT_S = 20.0
LIMIT_BYTES = 64 << 20
BATCH = 3


class ScriptedDispatcher:
    """Greets whoever says hello and serves files; all else is the test's. Everything that arrives is in `got`, in order."""

    def __init__(
        self, address: str = "tcp://127.0.0.1:*", *, term: int = 1, files: Path | None = None, heartbeat_s: float = 0.05
    ) -> None:
        self.term, self.session, self.worker = term, 0, RoutingId(b"")
        self.files = ArtifactStore(files) if files is not None else None
        self.answers_left = 10**9  # pieces that are still served
        self.greets = True
        self.heartbeat_s = heartbeat_s
        self.got: list[object] = []
        self.attached_session = 0
        self.worker_error: BaseException | None = None
        self.malformed: list[Malformed] = []
        self.blobs: dict[int, tuple[Blob, ...]] = {}  # by id of the message
        self._arrived = asyncio.Event()
        self.endpoint = RouterEndpoint(address, receive=self._receive, limit_bytes=LIMIT_BYTES, piece_bytes=64 << 10)
        self.address = self.endpoint.address

    def close(self) -> None:
        self.endpoint.close()

    def _receive(self, arrival: Arrival) -> None:
        match arrival:
            case Received(routing_id, envelope):
                self.got.append(envelope.message)
                if isinstance(envelope.message, msg.Attach):
                    self.attached_session = envelope.session
                self.blobs[id(envelope.message)] = envelope.blobs
                if isinstance(envelope.message, msg.WorkerHello) and self.greets:
                    self.worker, self.session = routing_id, self.session + 1
                    self.send(
                        msg.Welcome(
                            software="test",
                            heartbeat_s=self.heartbeat_s,
                            piece_bytes=64 << 10,
                            max_message_bytes=LIMIT_BYTES,
                            max_budget_s=60.0,
                        )
                    )
                elif isinstance(envelope.message, msg.Fetch) and self.files is not None and self.answers_left:
                    self.answers_left -= 1
                    self._serve(envelope.message)
            case Malformed():
                self.malformed.append(arrival)
            case Disconnected():
                self.got.append(arrival)
        self._arrived.set()

    def _serve(self, fetch: msg.Fetch) -> None:
        if not self.files.has(fetch.artifact):
            self.send(msg.ArtifactMissing(artifact=fetch.artifact))
            return
        data = self.files.read(fetch.artifact, fetch.offset, fetch.length)
        size = self.files.size_bytes(fetch.artifact)
        self.send(msg.ArtifactPiece(artifact=fetch.artifact, offset=fetch.offset, file_bytes=size), Blob.of(data))

    def send(self, message: msg.Message, *blobs: Blob) -> None:
        assert self.endpoint.send(self.worker, message, session=self.session, term=self.term, blobs=blobs)

    def worker_ended(self, task) -> None:
        self.worker_error = None if task.cancelled() else task.exception()
        self._arrived.set()

    async def until(self, condition) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():
                assert not self.malformed, self.malformed
                if self.worker_error is not None:
                    raise self.worker_error
                self._arrived.clear()
                await self._arrived.wait()

    async def take(self, kind, count: int = 1):
        """The next message of this kind, which `got` then holds no more."""
        await self.until(lambda: any(isinstance(message, kind) for message in self.got))
        message = next(message for message in self.got if isinstance(message, kind))
        self.got.remove(message)
        return message

    async def attached(self) -> msg.WorkerHello:
        """The hello, once the worker's session is complete."""
        hello = await self.take(msg.WorkerHello)
        await self.take(msg.Attach)
        return hello

    async def settled(self) -> None:
        """The worker is in the last session that it was welcomed to."""
        await self.until(lambda: self.attached_session == self.session)
        self.got = [message for message in self.got if not isinstance(message, msg.WorkerHello | msg.Attach)]

    async def quiet(self) -> None:
        """Whatever the worker had to say to what was sent before has come."""
        self.send(msg.CancelStage(attempt=attempt(10**6 + len(self.got))))
        probe = await self.take(msg.StageCancelled)
        self.send(msg.StageAck(attempts=[probe.attempt]))

    def of(self, *kinds) -> list[object]:
        return [message for message in self.got if isinstance(message, kinds)]


ANSWERS = (msg.StageDone, msg.StageFailed, msg.StageCancelled)


def attempt(sequence: int, number: int = 1) -> AttemptId:
    return AttemptId(RequestId(bytes(16), sequence), 1, 0, number)


class GatedStage:
    """Adds one. Stops in each run until the test lets it go on."""

    def __init__(self) -> None:
        self.entered: list[Future[None]] = [Future() for _ in range(8)]
        self.gates = [threading.Event() for _ in range(8)]
        self.runs = 0

    def run(self, inputs):
        run, self.runs = self.runs, self.runs + 1
        self.entered[run].set_result(None)
        assert self.gates[run].wait(WAIT_S)
        return [value + 1 for value in inputs]

    async def reached(self, run: int) -> None:
        await asyncio.wait_for(asyncio.wrap_future(self.entered[run]), WAIT_S)

    def open(self) -> None:
        for gate in self.gates:
            gate.set()


class Scene:
    """A dispatcher, a worker, and the stage file that they know."""

    def __init__(self, directory: Path, digest: str, file_bytes: int, files: Path) -> None:
        self.directory, self.digest, self.file_bytes, self.files = directory, digest, file_bytes, files
        self.stage = GatedStage()
        self.lines: list[str] = []

    def config(self, **changes) -> WorkerConfig:
        settings = {
            "dispatcher": self.dispatcher.address, "name": "w1", "device": "cpu", "memory_limit_bytes": 1 << 30,
            "cache_dir": self.directory / "cache", "drain_timeout_s": 10.0,
        }  # fmt: skip
        return WorkerConfig(**(settings | changes))

    @contextlib.asynccontextmanager
    async def open(self, *, gated: bool = False, load: bool = True, **changes):
        """Worker and dispatcher in session, the stage resident."""
        self.dispatcher = ScriptedDispatcher(files=self.files)
        load_stage = (lambda path: self.stage) if gated else None
        self.worker = Worker(self.config(**changes), load_stage=load_stage, announce=self.lines.append)
        self.running = asyncio.create_task(self.worker.run(signals=False), name="worker under test")
        # A worker that dies tells the test why at once, instead of by silence.
        self.running.add_done_callback(lambda task: self.dispatcher.worker_ended(task))
        try:
            self.hello = await self.dispatcher.attached()
            if load:
                self.dispatcher.send(msg.LoadStage(artifact=self.digest, file_bytes=self.file_bytes))
                await self.dispatcher.take(msg.StageLoaded)
            yield self.dispatcher
        finally:
            self.stage.open()
            self.running.cancel()
            await asyncio.wait([self.running])
            self.dispatcher.close()

    def run_stage(
        self, sequence: int, array=None, *, number=1, artifact=None, budget_s=60.0, codec="raw", tolerance=None
    ) -> None:
        array = np.full((BATCH, 4), sequence, np.float32) if array is None else array
        header, payload = codecs.encode(array)
        order = msg.RunStage(
            attempt=attempt(sequence, number),
            artifact=artifact or self.digest,
            budget_s=budget_s,
            codec=codec,
            tolerance=tolerance,
            leaves=[header],
        )
        self.dispatcher.send(order, Blob.of(bytes(payload)))

    async def replace_dispatcher(self, *, term: int, greets: bool = True) -> None:
        """Another dispatcher at the same address."""
        before = self.dispatcher
        before.close()
        self.dispatcher = ScriptedDispatcher(before.address, term=term, files=self.files)
        self.dispatcher.greets = greets
        self.dispatcher.session = before.session  # of one reign no two sessions have one number


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 300), torch.nn.Linear(300, 5)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    module = Net().eval()
    files = tmp_path_factory.mktemp("files")
    program = export_module(module, [torch.zeros(2, 4)], directory=files, profile_repetitions=0)
    return module, program, files


@pytest.fixture
def scene(tmp_path, exported):
    _, program, files = exported
    return Scene(tmp_path, program.digest, program.file_bytes, files)


def run(test, *args, **options):
    asyncio.run(test(*args, **options))


def output(dispatcher, done) -> np.ndarray:
    return codecs.decode(done.leaves[0], dispatcher.blobs[id(done)][0].contiguous(), limit_bytes=LIMIT_BYTES)


# --- the ordinary way ----------------------------------------------------------------------------------------------


def test_a_worker_says_who_it_is_and_when_it_is_ready(scene):
    async def test():
        async with scene.open(load=False, threads=1, credit=3):
            hello = scene.hello
            assert (hello.worker_id, hello.credit, hello.stage_budget_bytes) == ("w1", 3, 1 << 30)
            assert (hello.resident, hello.held, hello.finished) == ([], [], [])
            assert hello.device.device == "cpu" and torch.__version__ in hello.device.numeric_class
            (line,) = scene.lines
            assert line.startswith(
                f"adapt-worker ready name=w1 dispatcher={scene.dispatcher.address} device=cpu threads=1 "
            )
            floor = int(line.partition("floor_bytes=")[2].partition(" ")[0])
            assert floor > 1 << 20 and line.endswith(f"pid={os.getpid()}")

    run(test)


def test_a_stage_is_fetched_run_and_answered_with_the_modules_own_result(scene, exported):
    x = torch.randn(BATCH, 4)

    async def test():
        async with scene.open() as dispatcher:
            assert sum(fetch.length for fetch in dispatcher.of(msg.Fetch)) == scene.file_bytes
            scene.run_stage(1, x.numpy())
            done = await dispatcher.take(msg.StageDone)
            assert done.attempt == attempt(1)
            with torch.inference_mode():
                np.testing.assert_array_equal(output(dispatcher, done), exported[0](x).numpy())
            assert done.times.compute_s > 0 and len(done.input_digest) == len(done.output_digest) == 16
            scene.run_stage(2, x.numpy())
            again = await dispatcher.take(msg.StageDone)
            assert (again.input_digest, again.output_digest) == (done.input_digest, done.output_digest)

    run(test)


def test_big_activations_travel_both_ways(scene):
    array = np.random.default_rng(0).standard_normal((500, 1000), dtype=np.float32)

    async def test():
        async with scene.open(gated=True) as dispatcher:
            scene.stage.open()
            for sequence, (codec, tolerance) in enumerate([("raw", None), ("lz4", None), ("zfp+lz4", 0.1)]):
                scene.run_stage(sequence, array, codec=codec, tolerance=tolerance)
                done = await dispatcher.take(msg.StageDone)
                assert np.abs(output(dispatcher, done) - (array + 1)).max() <= done.leaves[0].bound

    run(test)


def test_a_heartbeat_tells_progress_and_memory(scene):
    async def test():
        async with scene.open() as dispatcher:
            first = await dispatcher.take(msg.Heartbeat)
            scene.run_stage(1)
            await dispatcher.take(msg.StageDone)
            dispatcher.got.clear()
            later = await dispatcher.take(msg.Heartbeat)
            assert later.progress > first.progress and 0 < later.memory_percent <= 100
            assert later.resident_bytes == scene.file_bytes

    run(test)


def test_the_begin_of_the_next_rides_on_the_answer(scene):
    async def test():
        async with scene.open(gated=True) as dispatcher:
            scene.run_stage(1)
            await scene.stage.reached(0)
            assert (await dispatcher.take(msg.Begun)).attempt == attempt(1)
            scene.run_stage(2)
            await dispatcher.quiet()
            scene.stage.gates[0].set()
            done = await dispatcher.take(msg.StageDone)
            assert done.attempt == attempt(1) and done.begun == attempt(2)
            assert not dispatcher.of(msg.Begun)

    run(test)


# --- stages --------------------------------------------------------------------------------------------------------


def test_loading_again_costs_nothing_and_the_cache_outlives_the_worker(scene):
    async def test():
        async with scene.open() as dispatcher:
            dispatcher.got.clear()
            scene.dispatcher.send(msg.LoadStage(artifact=scene.digest, file_bytes=scene.file_bytes))
            assert (await dispatcher.take(msg.StageLoaded)).load_s == 0
            assert not dispatcher.of(msg.Fetch)
        async with scene.open() as dispatcher:
            assert not dispatcher.of(msg.Fetch)

    run(test)


def test_two_orders_to_load_share_one_load(scene):
    async def test():
        async with scene.open(load=False) as dispatcher:
            for _ in range(2):
                dispatcher.send(msg.LoadStage(artifact=scene.digest, file_bytes=scene.file_bytes))
            await dispatcher.take(msg.StageLoaded)
            await dispatcher.quiet()
            assert sum(fetch.length for fetch in dispatcher.of(msg.Fetch)) == scene.file_bytes

    run(test)


def test_a_damaged_file_in_the_cache_is_fetched_anew(scene):
    cached = scene.directory / "cache" / f"{scene.digest}.safetensors"
    cached.parent.mkdir()
    cached.write_bytes(bytes(scene.file_bytes))

    async def test():
        async with scene.open() as dispatcher:
            assert dispatcher.of(msg.Fetch)
            scene.run_stage(1)
            await dispatcher.take(msg.StageDone)

    run(test)


def test_a_stage_beyond_the_budget_is_refused_with_the_numbers(scene):
    async def test():
        budget = scene.file_bytes + 100
        async with scene.open(memory_limit_bytes=budget) as dispatcher:
            dispatcher.send(msg.LoadStage(artifact="1" * 64, file_bytes=101))
            failed = await dispatcher.take(msg.LoadFailed)
            assert (failed.artifact, failed.code) == ("1" * 64, "plan")
            for part in (
                "needs 101 bytes",
                f"budget of {budget:,} bytes 100 are left",
                scene.digest[:12],
                f"{scene.file_bytes:,} bytes",
            ):
                assert part in failed.message
            dispatcher.send(msg.UnloadStage(artifact=scene.digest))
            dispatcher.send(msg.LoadStage(artifact=scene.digest, file_bytes=scene.file_bytes))
            await dispatcher.take(msg.StageLoaded)

    run(test)


def test_a_file_that_is_gone_or_no_stage_is_refused(scene):
    source = scene.directory / "source"
    source.write_bytes(b"no stage at all")

    async def test():
        async with scene.open() as dispatcher:
            dispatcher.send(msg.LoadStage(artifact="1" * 64, file_bytes=101))
            failed = await dispatcher.take(msg.LoadFailed)
            assert failed.code == "plan" and "does not have it" in failed.message
            dispatcher.send(msg.LoadStage(artifact=dispatcher.files.add(source), file_bytes=source.stat().st_size))
            assert (await dispatcher.take(msg.LoadFailed)).code == "wire"
            scene.run_stage(1)
            await dispatcher.take(msg.StageDone)

    run(test)


def test_a_stage_that_is_not_resident_is_a_neutral_answer(scene):
    async def test():
        async with scene.open(load=False) as dispatcher:
            scene.run_stage(1)
            assert (await dispatcher.take(msg.StageFailed)).code == "stage-not-resident"

    run(test)


def test_a_stage_in_use_is_unloaded_when_its_last_attempt_has_ended(scene):
    async def test():
        async with scene.open(gated=True) as dispatcher:
            scene.run_stage(1)
            await scene.stage.reached(0)
            dispatcher.send(msg.UnloadStage(artifact=scene.digest))
            await dispatcher.quiet()
            scene.stage.gates[0].set()
            await dispatcher.take(msg.StageDone)
            scene.run_stage(2)
            assert (await dispatcher.take(msg.StageFailed)).code == "stage-not-resident"

    run(test)


def test_a_download_goes_on_in_the_next_session(scene, exported, tmp_path):
    big = tmp_path / "big"
    big.write_bytes(os.urandom(3 << 20))

    async def test():
        async with scene.open(load=False) as dispatcher:
            digest = dispatcher.files.add(big)
            dispatcher.answers_left = 3
            dispatcher.send(msg.LoadStage(artifact=digest, file_bytes=big.stat().st_size))
            await dispatcher.until(lambda: len(dispatcher.of(msg.Fetch)) == 5)  # two are not answered
            asked = dispatcher.of(msg.Fetch)
            part = scene.directory / "cache" / f"{digest}.part"
            dispatcher.send(msg.SayHello())
            await dispatcher.attached()
            dispatcher.got.clear()
            dispatcher.answers_left = 10**9
            dispatcher.send(msg.LoadStage(artifact=digest, file_bytes=big.stat().st_size))
            await dispatcher.take(msg.LoadFailed)  # whole, but no stage
            assert dispatcher.of(msg.Fetch)[0].offset == asked[3].offset
            assert not part.exists() and (scene.directory / "cache" / f"{digest}.safetensors").exists()

    run(test)


# --- attempts that end otherwise -----------------------------------------------------------------------------------


def test_a_wrong_input_is_named_and_disturbs_nothing(scene):
    async def test():
        async with scene.open() as dispatcher:
            scene.run_stage(1, np.zeros((BATCH, 5), np.float32))
            failed = await dispatcher.take(msg.StageFailed)
            assert failed.code == "input-mismatch" and "expected float32 (batch, 4)" in failed.message
            scene.run_stage(2)
            await dispatcher.take(msg.StageDone)

    run(test)


def test_a_budget_that_is_spent_is_not_computed_for(scene):
    async def test():
        async with scene.open(gated=True) as dispatcher:
            scene.run_stage(1, budget_s=0.0)
            assert (await dispatcher.take(msg.StageFailed)).code == "deadline-exceeded"
            assert scene.stage.runs == 0

    run(test)


def test_more_than_the_credit_is_refused(scene):
    async def test():
        async with scene.open(gated=True, credit=2) as dispatcher:
            for sequence in (1, 2, 3):
                scene.run_stage(sequence)
            failed = await dispatcher.take(msg.StageFailed)
            assert (failed.attempt, failed.code) == (attempt(3), "overloaded")
            scene.stage.open()
            assert {(await dispatcher.take(msg.StageDone)).attempt for _ in range(2)} == {attempt(1), attempt(2)}

    run(test)


def test_cancelled_before_it_begins(scene):
    async def test():
        async with scene.open(gated=True) as dispatcher:
            scene.run_stage(1)
            await scene.stage.reached(0)
            scene.run_stage(2)
            dispatcher.send(msg.CancelStage(attempt=attempt(2)))
            assert (await dispatcher.take(msg.StageCancelled)).attempt == attempt(2)
            scene.run_stage(3)  # its slot is free
            scene.stage.open()
            assert [(await dispatcher.take(msg.StageDone)).attempt for _ in range(2)] == [attempt(1), attempt(3)]
            assert scene.stage.runs == 2

    run(test)


def test_cancelled_while_it_runs(scene):
    async def test():
        async with scene.open(gated=True) as dispatcher:
            scene.run_stage(1)
            await scene.stage.reached(0)
            dispatcher.send(msg.CancelStage(attempt=attempt(1)))
            await dispatcher.quiet()
            assert not dispatcher.of(*ANSWERS)  # it keeps its slot while it computes
            scene.stage.open()
            assert (await dispatcher.take(msg.StageCancelled)).attempt == attempt(1)
            await dispatcher.quiet()
            assert not dispatcher.of(msg.StageDone)

    run(test)


def test_cancelled_before_it_came(scene):
    async def test():
        async with scene.open(gated=True) as dispatcher:
            dispatcher.send(msg.CancelStage(attempt=attempt(1)))
            assert (await dispatcher.take(msg.StageCancelled)).attempt == attempt(1)
            scene.run_stage(1)
            await dispatcher.quiet()
            assert scene.stage.runs == 0 and not dispatcher.of(*ANSWERS)

    run(test)


def test_cancelled_after_it_was_done(scene):
    async def test():
        async with scene.open() as dispatcher:
            scene.run_stage(1)
            await dispatcher.take(msg.StageDone)
            dispatcher.send(msg.CancelStage(attempt=attempt(1)))
            await dispatcher.quiet()
            assert not dispatcher.of(*ANSWERS)

    run(test)


def test_an_order_that_comes_twice_runs_once(scene):
    async def test():
        async with scene.open(gated=True) as dispatcher:
            scene.run_stage(1)
            await scene.stage.reached(0)
            scene.run_stage(1)
            await dispatcher.quiet()
            scene.stage.gates[0].set()
            first = await dispatcher.take(msg.StageDone)
            scene.run_stage(1)
            again = await dispatcher.take(msg.StageDone)
            assert again == first and scene.stage.runs == 1
            np.testing.assert_array_equal(output(dispatcher, again), output(dispatcher, first))
            dispatcher.send(msg.StageAck(attempts=[attempt(1)]))
            scene.run_stage(1)  # forgotten: it is a new one
            await scene.stage.reached(1)

    run(test)


def test_malformed_frames_disturb_nothing(scene):
    async def test():
        async with scene.open() as dispatcher:
            socket = dispatcher.endpoint._watched.socket
            control, bulk = routing_ids("w1", scene.hello.incarnation)
            for frames in (
                [b""],
                [b"RSxxxxxxxx", b"\xc1"],
                [os.urandom(20)] * 4,
                [b"PI" + bytes(8), b"\x80", b"x" * 100],
            ):
                for routing_id in (control, bulk):
                    socket.send_multipart([routing_id, *frames])
            # What cannot be read may have been an order: the worker begins a new session, in which it would come again.
            await dispatcher.until(lambda: dispatcher.of(msg.Attach))
            await dispatcher.settled()
            scene.run_stage(1)
            await dispatcher.take(msg.StageDone)

    run(test)


# --- sessions ------------------------------------------------------------------------------------------------------


def test_a_new_dispatcher_of_this_reign_is_told_what_is_held_and_finished(scene):
    async def test():
        async with scene.open(gated=True) as dispatcher:
            for sequence in (1, 2):
                scene.run_stage(sequence)
            await scene.stage.reached(0)
            scene.stage.gates[0].set()
            first = await dispatcher.take(msg.StageDone)
            await scene.stage.reached(1)
            await scene.replace_dispatcher(term=1)
            dispatcher = scene.dispatcher
            hello = await dispatcher.attached()
            assert (hello.held, hello.finished, hello.resident) == ([attempt(2)], [attempt(1)], [scene.digest])
            assert hello.highest_term == 1 and hello.incarnation == scene.hello.incarnation
            again = await dispatcher.take(msg.StageDone)
            assert again.attempt == attempt(1) and again.output_digest == first.output_digest
            assert (await dispatcher.take(msg.Begun)).attempt == attempt(2)
            scene.stage.open()
            assert (await dispatcher.take(msg.StageDone)).attempt == attempt(2)
            dispatcher.send(msg.StageAck(attempts=[attempt(1)]))
            dispatcher.send(msg.SayHello())  # once more: what is acknowledged is not sent again, the rest is
            hello = await dispatcher.attached()
            assert (hello.held, hello.finished) == ([], [attempt(2)])
            assert (await dispatcher.take(msg.StageDone)).attempt == attempt(2)
            dispatcher.send(msg.StageAck(attempts=[attempt(2)]))
            dispatcher.send(msg.SayHello())
            assert (await dispatcher.attached()).finished == []
            await dispatcher.quiet()
            assert not dispatcher.of(msg.StageDone)
            assert len(scene.lines) == 1

    run(test)


def test_a_dispatcher_of_another_reign_never_gets_an_answer_of_an_earlier_one(scene):
    async def test():
        async with scene.open(gated=True) as dispatcher:
            for sequence in (1, 2):
                scene.run_stage(sequence)
            await scene.stage.reached(0)
            scene.stage.gates[0].set()
            await dispatcher.take(msg.StageDone)
            await scene.stage.reached(1)
            await scene.replace_dispatcher(term=2)
            dispatcher = scene.dispatcher
            hello = await dispatcher.attached()
            assert (hello.held, hello.finished) == ([attempt(2)], [attempt(1)])
            assert (await dispatcher.take(msg.StageCancelled)).attempt == attempt(1)
            scene.stage.open()
            assert (await dispatcher.take(msg.StageCancelled)).attempt == attempt(2)
            dispatcher.send(msg.StageAck(attempts=[attempt(1), attempt(2)]))
            scene.run_stage(1)  # the same number, perhaps for other work
            assert (await dispatcher.take(msg.StageDone)).attempt == attempt(1)

    run(test)


def test_a_refusal_ends_the_worker_with_its_reason(scene):
    async def test():
        async with scene.open() as dispatcher:
            dispatcher.send(msg.Refused(code="config", message="go away", fields={}))
            with pytest.raises(AdaptError, match="go away"):
                await asyncio.wait_for(asyncio.shield(scene.running), WAIT_S)

    run(test)


# --- drain ---------------------------------------------------------------------------------------------------------


def test_a_drain_hands_back_what_has_not_begun_and_finishes_what_has(scene):
    async def test():
        async with scene.open(gated=True) as dispatcher:
            for sequence in (1, 2):
                scene.run_stage(sequence)
            await scene.stage.reached(0)
            await dispatcher.quiet()
            scene.worker.drain()
            assert (await dispatcher.take(msg.Draining)).handed_back == [attempt(2)]
            scene.run_stage(3)  # it was on its way
            assert (await dispatcher.take(msg.Draining)).handed_back == [attempt(3)]
            scene.stage.open()
            assert (await dispatcher.take(msg.StageDone)).attempt == attempt(1)
            assert not scene.running.done() and not dispatcher.of(msg.Goodbye)
            dispatcher.send(msg.StageAck(attempts=[attempt(1)]))
            await dispatcher.take(msg.Goodbye)
            assert await asyncio.wait_for(asyncio.shield(scene.running), WAIT_S) == 0
            assert scene.stage.runs == 1

    run(test)


def test_a_drain_without_a_dispatcher_ends(scene):
    async def test():
        async with scene.open():
            await scene.replace_dispatcher(term=1, greets=False)
            await scene.dispatcher.take(msg.WorkerHello)
            scene.worker.drain()
            assert await asyncio.wait_for(asyncio.shield(scene.running), WAIT_S) == 0

    run(test)


def test_a_drain_whose_answer_nobody_takes_ends_by_its_timeout(scene):
    async def test():
        async with scene.open(gated=True, drain_timeout_s=0.2) as dispatcher:
            scene.run_stage(1)
            await scene.stage.reached(0)
            scene.stage.open()
            await dispatcher.take(msg.StageDone)
            scene.worker.drain()
            assert await asyncio.wait_for(asyncio.shield(scene.running), WAIT_S) == 0

    run(test)


WORKER_PROCESS = """
import asyncio, sys
from pathlib import Path
from adapt.config import WorkerConfig
from adapt.runtime.worker import Worker

class FifoStage:  # runs until somebody has written into the fifo
    def run(self, inputs):
        with open(sys.argv[3], "rb") as fifo:
            fifo.read()
        return inputs

config = WorkerConfig(dispatcher=sys.argv[1], name="w1", device="cpu", memory_limit_bytes=1 << 30, cache_dir=Path(sys.argv[2]))
sys.exit(asyncio.run(Worker(config, load_stage=lambda path: FifoStage()).run()))
"""


@contextlib.asynccontextmanager
async def worker_process(scene):
    """A real process whose stage runs until the test writes into a fifo; in session, with the stage resident."""
    os.mkfifo(scene.directory / "fifo")
    scene.dispatcher = dispatcher = ScriptedDispatcher(files=scene.files)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", WORKER_PROCESS, dispatcher.address, str(scene.directory / "cache"), str(scene.directory / "fifo"),
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(60):
            line = await process.stdout.readline()
        assert line.startswith(b"adapt-worker ready name=w1 ") and f"pid={process.pid}".encode() in line
        await dispatcher.attached()
        dispatcher.send(msg.LoadStage(artifact=scene.digest, file_bytes=scene.file_bytes))
        await dispatcher.take(msg.StageLoaded)
        yield process, dispatcher
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        dispatcher.close()


def test_sigterm_drains_a_real_process(scene):
    async def test():
        async with worker_process(scene) as (process, dispatcher):
            for sequence in (1, 2):
                scene.run_stage(sequence)
            await dispatcher.take(msg.Begun)
            await dispatcher.quiet()
            process.send_signal(signal.SIGTERM)
            assert (await dispatcher.take(msg.Draining)).handed_back == [attempt(2)]
            (scene.directory / "fifo").write_bytes(b"go on")
            assert (await dispatcher.take(msg.StageDone)).attempt == attempt(1)
            dispatcher.send(msg.StageAck(attempts=[attempt(1)]))
            await dispatcher.take(msg.Goodbye)
            assert await asyncio.wait_for(process.wait(), WAIT_S) == 0

    run(test)


def test_a_second_sigint_stops_a_real_process_at_once(scene):
    async def test():
        async with worker_process(scene) as (process, dispatcher):
            scene.run_stage(1)
            await dispatcher.take(msg.Begun)
            process.send_signal(signal.SIGINT)
            await dispatcher.take(msg.Draining)
            process.send_signal(signal.SIGINT)
            assert await asyncio.wait_for(process.wait(), WAIT_S) == 130

    run(test)
