"""A dispatcher that says what the test tells it to, and a worker beside it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import torch

from adapt.config import WorkerConfig
from adapt.models.export import export_module
from adapt.protocol import codecs
from adapt.protocol import messages as msg
from adapt.protocol.ids import AttemptId, RequestId, RoutingId
from adapt.protocol.wire import Blob
from adapt.runtime.artifacts import ArtifactStore
from adapt.runtime.endpoint import Arrival, Disconnected, Malformed, Received, RouterEndpoint
from adapt.runtime.worker import Worker

WAIT_S = 20.0
LIMIT_BYTES = 64 << 20
BATCH = 3


class ScriptedDispatcher:
    """Greets whoever says hello and serves files; all else is the test's. Everything that arrives is in `got`, in order."""

    def __init__(self, address: str = "tcp://127.0.0.1:*", *, term: int = 1, files: Path | None = None, heartbeat_s: float = 0.05) -> None:
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
        self.endpoint.send(self.worker, message, session=self.session, term=self.term, blobs=blobs)

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

    def run_stage(self, sequence: int, array=None, *, number=1, artifact=None, budget_s=60.0, codec="raw", tolerance=None) -> None:
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


def run(test, *args, **options):
    asyncio.run(test(*args, **options))


def output(dispatcher, done) -> np.ndarray:
    return codecs.decode(done.leaves[0], dispatcher.blobs[id(done)][0].contiguous(), limit_bytes=LIMIT_BYTES)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 300), torch.nn.Linear(300, 5)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def export_net(files: Path):
    """A small module, and its program among `files`."""
    torch.manual_seed(0)
    module = Net().eval()
    return module, export_module(module, [torch.zeros(2, 4)], directory=files, profile_repetitions=0)
