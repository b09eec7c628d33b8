"""What users see of a dispatcher: its workers as records, its counters as numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict

from adapt.protocol.codecs import DTYPES, TensorHeader
from adapt.protocol.ids import WorkerId
from adapt.protocol.messages import Heartbeat, Leaf, LinkRecord, RequestRecord, WorkerHello, WorkerRecord
from adapt.protocol.wire import Blob
from adapt.scheduling.links import Link
from adapt.scheduling.liveness import Verdict
from adapt.scheduling.requests import Request
from adapt.scheduling.roster import Member
from adapt.scheduling.scheduler import Scheduler


class LinkTally:
    """Counts tensors on the links to and from workers, by codec: as they were before and as they travel."""

    def __init__(self) -> None:
        self._sent_bytes: dict[str, int] = {}
        self._raw_bytes: dict[str, int] = {}

    def count(self, leaves: Sequence[Leaf], blobs: Sequence[Blob]) -> None:
        sizes = iter(blobs)
        for leaf in leaves:
            if type(leaf) is TensorHeader:
                sent = next(sizes).size
                raw = sent if leaf.codec == "raw" else math.prod(leaf.shape) * DTYPES[leaf.dtype].itemsize
                self._sent_bytes[leaf.codec] = self._sent_bytes.get(leaf.codec, 0) + sent
                self._raw_bytes[leaf.codec] = self._raw_bytes.get(leaf.codec, 0) + raw

    def counters(self) -> dict[str, float]:
        sent = {f"link_bytes.{codec}": float(count) for codec, count in self._sent_bytes.items()}
        return sent | {f"link_raw_bytes.{codec}": float(count) for codec, count in self._raw_bytes.items()}


def counters(scheduler: Scheduler) -> dict[str, float]:
    """What has been counted, and how much there is of what comes and goes. Names carry units."""
    counted = {name: float(value) for name, value in sorted((scheduler.counters | scheduler.moves()).items())}
    return counted | {
        "requests_live": float(scheduler.live_requests),
        "reserved_bytes": float(scheduler.reserved_bytes),
        "kept_bytes": float(scheduler.kept_bytes),
    }


def worker_records(
    members: Iterable[Member],
    hellos: Mapping[WorkerId, WorkerHello],
    heartbeats: Mapping[str, Heartbeat | None],
    links: Mapping[WorkerId, Link],
    now: float,
) -> list[WorkerRecord]:
    """The workers that have said hello in this reign. Of one that has not come back from an earlier one, no device is known."""
    return [
        _record(member, hellos[member.worker_id], heartbeats.get(member.worker_id), links.get(member.worker_id), now)
        for member in members
        if member.worker_id in hellos
    ]


def request_records(requests: Iterable[Request], now: float) -> list[RequestRecord]:
    return [_request_record(request, max(request.deadline - now, 0.0)) for request in requests]


def _request_record(request: Request, left_s: float) -> RequestRecord:
    return RequestRecord(
        request=str(request.request_id),
        deployment=request.version.deployment,
        version=request.version.number,
        stage=request.stage,
        age_s=max(request.budget_s - left_s, 0.0),
        left_s=left_s,
        is_queued=request.ticket != 0,
        workers=sorted({attempt.worker_id for attempt in request.attempts.values()}),
        attempts=request.attempts_made,
    )


def _record(member: Member, hello: WorkerHello, heartbeat: Heartbeat | None, link: Link | None, now: float) -> WorkerRecord:
    return WorkerRecord(
        worker_id=member.worker_id,
        state="draining" if member.is_draining and member.verdict is Verdict.READY else member.verdict.value,
        device=hello.device,
        memory_percent=0.0 if heartbeat is None else heartbeat.memory_percent,
        stage_budget_bytes=member.stage_budget_bytes,
        resident=sorted(member.resident),
        credit=member.credit,
        running=len(member.slots),
        tasks_done=member.tally.tasks_done,
        tasks_failed=member.tally.tasks_failed,
        compute_s=member.tally.compute_s,
        load=member.load,
        penalty=member.qos.penalty(now),
        breaker=member.qos.breaker(now).value,
        link=None if link is None else LinkRecord(**asdict(link)),
    )
