"""What users see of a dispatcher: its workers as records, its counters as numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from adapt.protocol.codecs import DTYPES, TensorHeader
from adapt.protocol.ids import WorkerId
from adapt.protocol.messages import Heartbeat, Leaf, WorkerHello, WorkerRecord
from adapt.protocol.wire import Blob
from adapt.scheduling.liveness import Verdict
from adapt.scheduling.roster import Member
from adapt.scheduling.scheduler import Scheduler


def count_tensors(counters: Counter[str], leaves: Sequence[Leaf], blobs: Sequence[Blob]) -> None:
    """Count tensors on the links to and from workers, by codec: as they were before and as they travel."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, TensorHeader)]
    for header, blob in zip(tensors, blobs, strict=True):
        counters[f"link_bytes.{header.codec}"] += blob.size
        counters[f"link_raw_bytes.{header.codec}"] += math.prod(header.shape) * DTYPES[header.dtype].itemsize


def counters(scheduler: Scheduler) -> dict[str, float]:
    """What has been counted, and how much there is of what comes and goes. Names carry units."""
    counted = {name: float(value) for name, value in sorted(scheduler.counters.items())}
    return counted | {
        "requests_live": float(scheduler.live_requests),
        "reserved_bytes": float(scheduler.reserved_bytes),
        "kept_bytes": float(scheduler.kept_bytes),
    }


def worker_records(
    members: Iterable[Member], hellos: Mapping[WorkerId, WorkerHello], heartbeats: Mapping[str, Heartbeat | None]
) -> list[WorkerRecord]:
    """The workers that have said hello in this reign. Of one that has not come back from an earlier one, no device is known."""
    return [_record(member, hellos[member.worker_id], heartbeats.get(member.worker_id)) for member in members if member.worker_id in hellos]


def _record(member: Member, hello: WorkerHello, heartbeat: Heartbeat | None) -> WorkerRecord:
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
    )
