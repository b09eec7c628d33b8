"""What a dispatcher's peers say, as events; what the scheduler decides, as messages. Pure: the same for real and for simulated dispatchers.

Only what needs nothing but the message itself: sessions, files, registry and counters are the dispatcher's own business.
"""

from __future__ import annotations

from adapt.errors import AdaptError
from adapt.protocol import messages as msg
from adapt.protocol.ids import Digest, WorkerId
from adapt.protocol.wire import Blob
from adapt.scheduling import events as ev


def joined(hello: msg.WorkerHello) -> ev.WorkerJoined:
    return ev.WorkerJoined(
        worker_id=WorkerId(hello.worker_id),
        incarnation=hello.incarnation,
        numeric_class=hello.device.numeric_class,
        stage_budget_bytes=hello.stage_budget_bytes,
        credit=hello.credit,
        resident=frozenset(Digest(digest) for digest in hello.resident),
        held=frozenset(hello.held),
        finished=frozenset(hello.finished),
    )


def arrived(request: msg.InferRequest, blobs: tuple[Blob, ...], *, fingerprint: int) -> ev.RequestArrived:
    return ev.RequestArrived(
        request_id=request.request_id,
        deployment=request.deployment,
        version=request.version,
        program=None if request.program is None else Digest(request.program),
        interface=request.interface,
        budget_s=request.budget_s,
        exact=request.numerics == "exact",
        fingerprint=fingerprint,
        input=ev.Activation(request.leaves, blobs),
    )


def finished(worker_id: WorkerId, done: msg.StageDone, blobs: tuple[Blob, ...]) -> ev.StageFinished:
    output = ev.Activation(done.leaves, blobs)
    return ev.StageFinished(worker_id=worker_id, attempt=done.attempt, output=output, times=done.times, digest=done.output_digest)


def fact(worker_id: WorkerId, message: msg.Message) -> ev.Event | None:
    """What a worker says of its attempts, its stages and itself; None for all else. `StageDone`: see `finished`."""
    match message:
        case msg.Heartbeat(memory_percent=percent, resident_bytes=resident_bytes):
            return ev.WorkerHeard(worker_id=worker_id, memory_percent=percent, resident_bytes=resident_bytes)
        case msg.StageFailed() as failed:
            return ev.AttemptFailed(worker_id=worker_id, attempt=failed.attempt, error=_error(failed))
        case msg.StageCancelled(attempt=attempt):
            return ev.AttemptCancelled(worker_id=worker_id, attempt=attempt)
        case msg.Fetch(artifact=artifact):
            return ev.LoadProgressed(worker_id=worker_id, artifact=Digest(artifact))
        case msg.StageLoaded(artifact=artifact):
            return ev.StageResident(worker_id=worker_id, artifact=Digest(artifact))
        case msg.LoadFailed() as failed:
            return ev.StageRefused(worker_id=worker_id, artifact=Digest(failed.artifact), error=_error(failed))
        case msg.Draining(handed_back=attempts):
            return ev.WorkerDraining(worker_id=worker_id, handed_back=frozenset(attempts))
        case _:
            return None


def _error(failed: msg.StageFailed | msg.LoadFailed) -> AdaptError:
    return AdaptError.from_wire(failed.code, failed.message, failed.fields)


def order(dispatch: ev.Dispatch) -> msg.RunStage:
    """Its blobs are those of the input."""
    return msg.RunStage(
        attempt=dispatch.attempt,
        artifact=dispatch.artifact,
        budget_s=dispatch.budget_s,
        codec=dispatch.codec,
        tolerance=dispatch.tolerance,
        leaves=list(dispatch.input.leaves),
    )


def said_to_client(action: ev.Answer | ev.Fail | ev.Accept) -> tuple[msg.Message, tuple[Blob, ...]]:
    match action:
        case ev.Answer(output=output):
            reply = msg.Reply(
                request_id=action.request_id,
                leaves=list(output.leaves),
                attempts=action.attempts,
                numeric_classes=list(action.numeric_classes),
            )
            return reply, output.blobs
        case ev.Fail(error=error):
            code, message, fields = error.to_wire()
            return msg.RequestFailed(request_id=action.request_id, code=code, message=message, fields=fields), ()
        case ev.Accept():
            accepted = msg.Accepted(
                request_id=action.request_id, deployment=action.deployment, version=action.version, program=action.program
            )
            return accepted, ()
