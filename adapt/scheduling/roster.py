"""The workers as the scheduler knows them: slots, what is resident, how fast each has proved to be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from msgspec import Struct

from adapt.protocol.ids import AttemptId, Digest, WorkerId
from adapt.protocol.messages import StageTimes
from adapt.scheduling.liveness import Verdict
from adapt.scheduling.qos import Qos, QosSettings

STEADY = 2  # tasks that a worker is given whatever they take: one runs, one waits
AHEAD_S = 0.01  # it is given more, up to its credit, while all that it holds takes less than this: the way there and back takes as long
LEARNING_RATE = 0.25  # weight of the newest sample in every moving average
SAID_S = 0.01  # of what should take longer, a worker says that it has begun
OUTRUN = 4.0  # times what was expected: the most that is believed of a task that was called off
ENOUGH_SAMPLES = 4  # before a limit is learnt from them
DEVIATIONS = 4  # above the average, of what is still usual; as in TCP (Jacobson and Karels, 1988: Congestion avoidance and control)


@dataclass(slots=True)
class Service:
    """How long one stage takes on one worker; moving averages, in seconds."""

    busy_s: float  # decode, compute, encode
    transfer_s: float = 0.0  # input there, output back, and everything else between dispatch and answer that is not waiting
    busy_deviation_s: float = 0.0  # mean absolute deviation
    transfer_deviation_s: float = 0.0
    size_bytes: float = 0.0  # of the input
    samples: int = 1
    latest_compute_s: float = 0.0  # of the newest sample; by this its worker decides whether it says that it begins

    def learn(self, busy_s: float, transfer_s: float, size_bytes: float) -> None:
        self.size_bytes += LEARNING_RATE * (size_bytes - self.size_bytes) if self.size_bytes else size_bytes
        self.busy_deviation_s += LEARNING_RATE * (abs(busy_s - self.busy_s) - self.busy_deviation_s)
        self.transfer_deviation_s += LEARNING_RATE * (abs(transfer_s - self.transfer_s) - self.transfer_deviation_s)
        self.busy_s += LEARNING_RATE * (busy_s - self.busy_s)
        self.transfer_s += LEARNING_RATE * (transfer_s - self.transfer_s)
        self.samples += 1

    def learn_at_least(self, waited_s: float) -> None:
        """It takes longer than was waited: else a device that has become slow would be late for ever."""
        if waited_s > self.busy_s + self.transfer_s:
            self.learn(waited_s - self.transfer_s, self.transfer_s, self.size_bytes)

    def scale(self, size_bytes: int) -> float:
        """How much more than usual a task with so large an input is: a batch of more takes longer."""
        return max(size_bytes / self.size_bytes, 1.0) if self.size_bytes else 1.0

    @property
    def usual_busy_s(self) -> float:
        """What it seldom exceeds."""
        return self.busy_s + DEVIATIONS * self.busy_deviation_s

    @property
    def usual_transfer_s(self) -> float:
        return self.transfer_s + DEVIATIONS * self.transfer_deviation_s


class Slot(Struct):
    """One task of the credit in use: from its dispatch until the worker says that it is done, failed or cancelled."""

    artifact: Digest
    since: float
    busy_s: float  # expected
    predicted_s: float  # by the quick profile
    size_bytes: int = 0  # of its input
    begun_at: float | None = None  # when its worker was heard to have begun it
    is_short: bool = False  # so that its worker may not say that it has begun
    is_alone: bool = False  # nothing is sent behind it


@dataclass(slots=True)
class Tally:
    """What a worker has done in all its sessions."""

    tasks_done: int = 0
    tasks_failed: int = 0
    compute_s: float = 0.0


@dataclass(slots=True)
class Member:
    """One worker. Invariant: `len(slots) <= credit`, except for what it listed in its hello beyond its own offer."""

    worker_id: WorkerId
    incarnation: int = 0  # of its process
    numeric_class: str = ""
    stage_budget_bytes: int = 0
    credit: int = 0
    verdict: Verdict = Verdict.SUSPECT
    is_draining: bool = False
    is_resting: bool = False  # of its last task, for the cooldown
    is_kept: bool = False  # for a request that nothing may run beside
    slots: dict[AttemptId, Slot] = field(default_factory=dict)
    alone: int = 0  # of the slots, those behind which nothing is sent
    resident: set[Digest] = field(default_factory=set)
    loading: set[Digest] = field(default_factory=set)
    spares: dict[Digest, int] = field(default_factory=dict)  # of these, what no plan has it for, and its bytes
    spareless_until: float = 0.0
    refused: dict[Digest, float] = field(default_factory=dict)  # stages that it could not load, until when it is not asked again
    services: dict[Digest, Service] = field(default_factory=dict)
    slowness: float = 1.0  # measured seconds per predicted second, over all stages
    held_s: float = 0.0  # expected of all that it holds
    busy_until: float = 0.0  # moment at which it should have finished all it holds
    last_used: float = 0.0
    memory_percent: float = 0.0  # of its host
    resident_bytes: int = 0  # of stages
    tally: Tally = field(default_factory=Tally)
    qos: Qos = field(default_factory=lambda: Qos(QosSettings()))

    @property
    def load(self) -> float:
        """Percent of memory in use: its host's, or its own of the stage budget if that is more."""
        own = 100.0 * self.resident_bytes / self.stage_budget_bytes if self.stage_budget_bytes else 0.0
        return max(self.memory_percent, own)

    @property
    def is_ready(self) -> bool:
        """Whether it may get something new."""
        return self.verdict is Verdict.READY and not self.is_draining

    @property
    def has_room(self) -> bool:
        """Whether it has credit, neither rests nor is kept, and is better off with one more task there than here."""
        held = len(self.slots)
        return held < self.credit and not (self.alone or self.is_resting or self.is_kept) and (held < STEADY or self.held_s < AHEAD_S)

    def backlog_s(self, now: float) -> float:
        """Seconds until it has finished what it holds. If it should have finished already, it is expected to be late by as much again."""
        return abs(self.busy_until - now) if self.slots else 0.0

    def join(self, *, numeric_class: str, stage_budget_bytes: int, credit: int, resident: frozenset[Digest]) -> None:
        """Begin a session. What was learnt of it stays."""
        self.numeric_class, self.stage_budget_bytes, self.credit = numeric_class, stage_budget_bytes, credit
        self.resident = set(resident)
        self.is_draining = False
        self.loading.clear()
        self.refused.clear()

    def at_work(self, artifact: Digest) -> int:
        """How many of its tasks use the stage."""
        return sum(slot.artifact == artifact for slot in self.slots.values())

    def refuses(self, artifact: Digest, now: float) -> bool:
        """Whether it could not load the stage a while ago."""
        return self.refused.get(artifact, now) > now

    def expect(self, artifact: Digest, predicted_s: float, size_bytes: int = 0) -> tuple[float, float]:
        """Seconds that the stage should keep it busy, and seconds on the way; `predicted_s` comes from the quick profile."""
        service = self.services.get(artifact)
        if service is None:
            return predicted_s * self.slowness, 0.0
        scale = service.scale(size_bytes)
        return service.busy_s * scale, service.transfer_s * scale

    def limits_s(self, artifact: Digest, size_bytes: int, now: float) -> tuple[float, float] | None:
        """What a new task seldom exceeds until its answer, and while it runs; None before enough was measured."""
        service = self.services.get(artifact)
        if service is None or service.samples < ENOUGH_SAMPLES:
            return None
        running_s = (service.usual_busy_s + service.usual_transfer_s) * service.scale(size_bytes)
        return self.backlog_s(now) + running_s, running_s

    def take(
        self, attempt: AttemptId, artifact: Digest, predicted_s: float, now: float, size_bytes: int = 0, *, is_alone: bool = False
    ) -> None:
        """Occupy a slot. `is_alone`: nothing else is sent there until it is free again."""
        busy_s, _ = self.expect(artifact, predicted_s, size_bytes)
        self.slots[attempt] = Slot(
            artifact, now, busy_s, predicted_s, size_bytes, is_short=self._may_be_short(artifact, busy_s), is_alone=is_alone
        )
        self.alone += is_alone
        self.held_s += busy_s
        self.busy_until = max(self.busy_until, now) + busy_s
        self.last_used = now

    def _may_be_short(self, artifact: Digest, busy_s: float) -> bool:
        """Whether a task computes for so little that its worker may not say when it begins."""
        service = self.services.get(artifact)
        return busy_s < SAID_S or (service is not None and service.latest_compute_s < SAID_S)

    def free(self, attempt: AttemptId, now: float) -> Slot | None:
        """Vacate the slot, if the attempt had one."""
        slot = self.slots.pop(attempt, None)
        if slot is not None:
            self.alone -= slot.is_alone
            self.held_s = self.held_s - slot.busy_s if self.slots else 0.0
            self.busy_until = now + self.held_s
        return slot

    def learn(self, slot: Slot, times: StageTimes, now: float) -> None:
        """Take the measured times of a finished task into account, also of one whose answer came too late to be used."""
        busy_s = times.decode_s + times.compute_s + times.encode_s
        transfer_s = max(now - slot.since - times.wait_s - busy_s, 0.0)
        service = self.services.get(slot.artifact)
        if service is None:
            service = self.services[slot.artifact] = Service(busy_s, transfer_s, size_bytes=slot.size_bytes)
        else:
            service.learn(busy_s, transfer_s, slot.size_bytes)
        service.latest_compute_s = times.compute_s
        if slot.predicted_s > 0.0:
            self.slowness += LEARNING_RATE * (busy_s / slot.predicted_s - self.slowness)
        self.tally.tasks_done += 1
        self.tally.compute_s += times.compute_s

    def learn_at_least(self, slot: Slot, waited_s: float) -> None:
        """A task was given up: its answer would have taken at least so long."""
        if (service := self.services.get(slot.artifact)) is not None:
            service.learn_at_least(waited_s)

    def learn_outrun(self, slot: Slot, took_s: float) -> None:
        """A task came back without an answer, as another worker was quicker. Of a long time only a part is believed: it may have stood still."""
        if (service := self.services.get(slot.artifact)) is not None:
            service.learn_at_least(min(took_s, OUTRUN * (service.busy_s + service.transfer_s)))


class Roster:
    """All workers that are or may come back, by id."""

    def __init__(self, qos: QosSettings | None = None) -> None:
        self._members: dict[WorkerId, Member] = {}
        self._qos = qos or QosSettings()

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members.values())

    def __contains__(self, worker_id: WorkerId) -> bool:
        return worker_id in self._members

    def get(self, worker_id: WorkerId) -> Member | None:
        return self._members.get(worker_id)

    def has(self, worker_id: WorkerId, artifact: Digest, numeric_class: str | None = None) -> bool:
        """Whether the worker can run the stage now, and is of that class if one is given."""
        member = self._members.get(worker_id)
        is_there = member is not None and member.is_ready and artifact in member.resident
        return is_there and (numeric_class is None or self._members[worker_id].numeric_class == numeric_class)

    def member(self, worker_id: WorkerId) -> Member:
        """The worker of this id, made if it is new."""
        member = self._members.get(worker_id)
        if member is None:
            member = self._members[worker_id] = Member(worker_id, qos=Qos(self._qos))
        return member

    def forget(self, worker_id: WorkerId) -> None:
        self._members.pop(worker_id, None)
