"""The floor with duties: the relay in its faster idiom, and what ADAPT does for a task whatever its sockets, threads and sessions are.

    client   an id, the array's bytes and their checksum, InferRequest; Reply, the array; with the next task that it has arrived
    relay    InferRequest, the scheduler, RunStage; StageDone, the scheduler, Reply
    worker   RunStage, a tensor, the operator of the identity model, StageDone

By ADAPT's own functions. No heartbeats, no sessions, nothing is said again, no thread hands over to another. `relay-messages` leaves scheduler and
operator out. One task at a time cannot go through ADAPT faster, as long as its messages and its scheduler are what they are; many can, as its
messages travel together.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from adapt.planning.placement import Plan, StageNeed
from adapt.protocol import codecs
from adapt.protocol import messages as msg
from adapt.protocol.ids import AttemptId, ClientId, Digest, Epoch, RequestId, WorkerId
from adapt.protocol.wire import MAX_BUNDLE_BYTES, Blob, Envelope, Letter, bundles, decode, decode_bundle, encode_header, is_bundle
from adapt.runtime.tensors import from_wire, to_wire
from adapt.scheduling import events as ev
from adapt.scheduling import translation
from adapt.scheduling.scheduler import Scheduler
from bench.contestants.relay import Clerk, Frames, Relay
from bench.harness.contest import Array

MODEL, ARTIFACT, PROGRAM = "identity", Digest("a" * 64), Digest("b" * 64)
BUDGET_S = 60.0
BEAT_S = 0.5
LIMIT_BYTES = 1 << 30
SESSION = TERM = 1
CREDIT = 32
Said = tuple[msg.Message, Sequence[Blob]]


def duties(*, with_scheduler: bool, workers: int = 2) -> Relay:
    """`relay-duties`, or `relay-messages` without the scheduler and the operator."""
    client = _Client()
    make_clerk: Callable[[], Clerk] = partial(_Scheduling, workers) if with_scheduler else _Rewriting
    make_work = partial(_Worker, computes=with_scheduler)
    return Relay(
        "drain",
        name="relay-duties" if with_scheduler else "relay-messages",
        stages=[[make_work] * workers],
        write=client.ask,
        read=client.understand,
        make_clerk=make_clerk,
    )


def _packed(said: Iterable[Said]) -> Frames:
    letters = [Letter(message, encode_header(message, session=SESSION, term=TERM, blobs=blobs), tuple(blobs)) for message, blobs in said]
    ((_, frames),) = bundles(letters)
    return frames


def _read(payload: Sequence[Any]) -> list[Envelope]:
    if is_bundle(payload):
        return decode_bundle(payload, limit_bytes=LIMIT_BYTES)
    return [decode(payload, limit_bytes=LIMIT_BYTES)]


class _Client:
    """In the process that asks."""

    def __init__(self) -> None:
        self._id, self._asked = ClientId(os.urandom(16)), 0
        self._arrived: list[RequestId] = []

    def ask(self, array: Array) -> Frames:
        self._asked += 1
        leaves, blobs = to_wire([array], codec="raw")
        request = msg.InferRequest(
            request_id=RequestId(self._id, self._asked),
            deployment=MODEL,
            version=0,
            program=None,
            interface="",
            budget_s=BUDGET_S,
            numerics="close",
            leaves=leaves,
        )
        said: list[Said] = [(request, blobs)]
        if self._arrived and array.nbytes <= MAX_BUNDLE_BYTES // 2:  # else it would travel by itself: that is left out as well
            said.append((msg.ReplyAck(request_ids=self._arrived), ()))
            self._arrived = []
        return _packed(said)

    def understand(self, _: Array, *payload: Any) -> Array:
        (envelope,) = _read(payload)
        reply: Any = envelope.message
        self._arrived.append(reply.request_id)
        (array,) = from_wire(reply.leaves, envelope.blobs, as_torch=False, limit_bytes=LIMIT_BYTES)
        return array


class _Rewriting(Clerk):
    """Each message is read, and another written."""

    def task(self, client: Any, number: Any, *payload: Any) -> list[Frames]:
        envelope, *_ = _read(payload)
        request: Any = envelope.message
        order = msg.RunStage(
            attempt=AttemptId(request.request_id, 1, 0, 1),
            artifact=ARTIFACT,
            budget_s=request.budget_s,
            codec="raw",
            tolerance=None,
            leaves=request.leaves,
        )
        return [[client, number, *_packed([(order, envelope.blobs)])]]

    def answer(self, client: Any, number: Any, *payload: Any) -> tuple[list[Frames], list[Frames]]:
        (envelope,) = _read(payload)
        done: Any = envelope.message
        reply = msg.Reply(request_id=done.attempt.request, leaves=done.leaves, attempts=1, numeric_classes=["any"])
        return [[client, number, *_packed([(reply, envelope.blobs)])]], []


class _Scheduling(Clerk):
    """The scheduler decides, with all that it keeps of requests and workers. (Which worker the relay sends it to does not matter.)"""

    def __init__(self, workers: int) -> None:
        self._scheduler, self._clock = Scheduler(), time.monotonic
        self._workers = [WorkerId(f"w{number}") for number in range(1, workers + 1)]
        self._given: dict[AttemptId, WorkerId] = {}
        self._from: dict[RequestId, tuple[Any, Any]] = {}
        self._beat_at = 0.0
        for worker_id in self._workers:
            joined = ev.WorkerJoined(
                worker_id=worker_id,
                numeric_class="any",
                stage_budget_bytes=1 << 30,
                credit=CREDIT,
                resident=frozenset(),
                held=frozenset(),
                finished=frozenset(),
            )
            self._scheduler.handle(joined, self._clock())
        stages = (StageNeed(artifact=ARTIFACT, memory_bytes=0, cost_s=1e-5),)
        plan = Plan(program=PROGRAM, epoch=Epoch(1), stages=stages, places=(tuple(self._workers),))
        version = ev.Version(
            deployment=MODEL, number=1, program=PROGRAM, codec="raw", tolerance=None, exact=False, peak_ratio=1.0, plan=plan
        )
        self._scheduler.handle(ev.VersionDeployed(version=version), self._clock())
        for worker_id in self._workers:
            self._scheduler.handle(ev.StageResident(worker_id=worker_id, artifact=ARTIFACT), self._clock())

    def task(self, client: Any, number: Any, *payload: Any) -> list[Frames]:
        now = self._clock()
        if now >= self._beat_at:
            self._beat(now)
        envelope, *others = _read(payload)
        request: Any = envelope.message
        for other in others:
            self._acknowledge(other.message, now)
        self._from[request.request_id] = client, number
        event = translation.arrived(request, envelope.blobs, fingerprint=envelope.blobs[0].checksum)
        return self._said(self._scheduler.handle(event, now))[1]

    def answer(self, client: Any, number: Any, *payload: Any) -> tuple[list[Frames], list[Frames]]:
        (envelope,) = _read(payload)
        done: Any = envelope.message
        event = translation.finished(self._given.pop(done.attempt), done, envelope.blobs)
        return self._said(self._scheduler.handle(event, self._clock()))

    def _said(self, actions: Iterable[ev.Action]) -> tuple[list[Frames], list[Frames]]:
        """Answers and tasks; all else that it decides is left out."""
        answers: list[Frames] = []
        tasks: list[Frames] = []
        for action in actions:
            if isinstance(action, ev.Dispatch):
                self._given[action.attempt] = action.worker_id
                order = (translation.order(action), action.input.blobs)
                tasks.append([*self._from[action.attempt.request], *_packed([order])])
            elif isinstance(action, ev.Answer):
                answers.append([*self._from.pop(action.request_id), *_packed([translation.said_to_client(action)])])
        return answers, tasks

    def _acknowledge(self, message: Any, now: float) -> None:
        for request_id in message.request_ids:
            self._scheduler.handle(ev.OutcomeAcknowledged(request_id=request_id), now)

    def _beat(self, now: float) -> None:
        self._beat_at = now + BEAT_S
        for worker_id in self._workers:
            self._scheduler.handle(ev.WorkerHeard(worker_id=worker_id), now)
        self._scheduler.tick(now)


class _Worker:
    """The work of a worker's process; made there."""

    def __init__(self, *, computes: bool) -> None:
        import torch

        torch.set_num_threads(1)
        torch.autograd.set_grad_enabled(False)
        self._operator: Callable[[Any], Any] = torch.ops.aten.alias if computes else _as_it_is

    def __call__(self, frames: Frames) -> Frames:
        (envelope,) = _read(frames)
        order: Any = envelope.message
        came = time.perf_counter()
        (tensor,) = from_wire(order.leaves, envelope.blobs, as_torch=True, limit_bytes=LIMIT_BYTES)
        began = time.perf_counter()
        output = self._operator(tensor)
        ended = time.perf_counter()
        header, data = codecs.encode(output.numpy(), codec="raw")
        blob = Blob.of(bytes(data))
        times = msg.StageTimes(wait_s=0.0, decode_s=began - came, compute_s=ended - began, encode_s=0.0)
        done = msg.StageDone(attempt=order.attempt, leaves=[header], times=times, input_digest=b"", output_digest=b"")
        return _packed([(done, (blob,))])


def _as_it_is(tensor: Any) -> Any:
    return tensor
