"""What the scheduler is told (events, past tense) and what it asks for (actions, imperative)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from msgspec import Struct

from adapt.errors import AdaptError
from adapt.planning.placement import Plan
from adapt.protocol.ids import AttemptId, ClientId, Digest, RequestId, WorkerId
from adapt.protocol.messages import Leaf, StageTimes
from adapt.protocol.wire import Blob


class Activation(Struct, frozen=True):
    """The tensors between two stages, or at an end of the model, as they came: headers read, bytes unopened."""

    leaves: Sequence[Leaf]
    blobs: tuple[Blob, ...]

    @property
    def size_bytes(self) -> int:
        blobs = self.blobs
        return blobs[0].size if len(blobs) == 1 else sum([blob.size for blob in blobs])  # asked for several times a task


VersionKey: TypeAlias = tuple[str, int, int]  # deployment, number, cut


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """One version of a deployment, as it has been cut: the unit that requests are pinned to. Users see its number; another cut of the same
    number is the same program in other stages."""

    deployment: str
    number: int
    cut: int = 0  # how often it had been cut anew before
    program: Digest
    codec: str
    tolerance: float | None
    exact: bool  # each request stays within one numeric class
    peak_ratio: float = 1.0  # the most a request retains, in units of its input's bytes
    interface: str = ""  # digest of its inputs and outputs; a request may insist on it
    arithmetic: str = ""  # what the program adds to the numeric class of its results
    plan: Plan = field(compare=False)

    @property
    def key(self) -> VersionKey:
        return (self.deployment, self.number, self.cut)

    @property
    def is_lossless(self) -> bool:
        return not self.codec.startswith("zfp")

    def classes(self, of_workers: Iterable[str]) -> tuple[str, ...]:
        """The numeric classes of a result that workers of these have computed."""
        return tuple(sorted([f"{name}/{self.arithmetic}" if self.arithmetic else name for name in of_workers]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Canary:
    """An input of which is known what a version has to make of it.

    Attributes:
        numeric_class: in which that was computed, as `Version.classes` names it.
        digests: of each stage's output, as workers of that class digest it (`StageDone`).
    """

    input: Activation
    numeric_class: str
    digests: tuple[bytes, ...]


# ── events: workers ──────────────────────────────────────────────────────────────────────────────────────────────────


class WorkerExpected(Struct, frozen=True, kw_only=True):
    """The worker served an earlier reign of this dispatcher and may come back."""

    worker_id: WorkerId


class WorkerJoined(Struct, frozen=True, kw_only=True):
    """A worker has said hello and attached; this ends whatever session it had before."""

    worker_id: WorkerId
    incarnation: int = 0  # of its process; 0: unknown
    numeric_class: str
    stage_budget_bytes: int
    credit: int
    resident: frozenset[Digest]
    held: frozenset[AttemptId]
    finished: frozenset[AttemptId]


class WorkerHeard(Struct, frozen=True, kw_only=True):
    worker_id: WorkerId
    memory_percent: float = 0.0  # of its host
    resident_bytes: int = 0  # of stages


class WorkerDisconnected(Struct, frozen=True, kw_only=True):
    """The worker's session has ended; what it held is nowhere now. `is_intended`: the worker has said so."""

    worker_id: WorkerId
    reason: str
    is_intended: bool = False


class LeaseEnded(Struct, frozen=True, kw_only=True):
    worker_id: WorkerId


class LeaseRenewed(Struct, frozen=True, kw_only=True):
    """A lease that had ended is in force again."""

    worker_id: WorkerId


class WorkerDraining(Struct, frozen=True, kw_only=True):
    """The worker takes nothing new and has handed back what it had not begun."""

    worker_id: WorkerId
    handed_back: frozenset[AttemptId]


class RoomWanted(Struct, frozen=True, kw_only=True):
    """The worker is about to measure a program: the room that spares take there is wanted."""

    worker_id: WorkerId


class WorkerLeft(Struct, frozen=True, kw_only=True):
    """The worker has ended by intent."""

    worker_id: WorkerId


class StageBegun(Struct, frozen=True, kw_only=True):
    worker_id: WorkerId
    attempt: AttemptId


class StageFinished(Struct, frozen=True, kw_only=True):
    worker_id: WorkerId
    attempt: AttemptId
    output: Activation
    times: StageTimes
    digest: bytes = b""  # of the output before the codec


class AttemptFailed(Struct, frozen=True, kw_only=True):
    worker_id: WorkerId
    attempt: AttemptId
    error: AdaptError


class AttemptCancelled(Struct, frozen=True, kw_only=True):
    """A cancelled attempt has left its slot."""

    worker_id: WorkerId
    attempt: AttemptId


class DispatchRefused(Struct, frozen=True, kw_only=True):
    """The socket did not take the `Dispatch`: the attempt never started."""

    worker_id: WorkerId
    attempt: AttemptId


class StageResident(Struct, frozen=True, kw_only=True):
    worker_id: WorkerId
    artifact: Digest


class LoadProgressed(Struct, frozen=True, kw_only=True):
    """The worker has asked for another piece of the artifact."""

    worker_id: WorkerId
    artifact: Digest


class StageRefused(Struct, frozen=True, kw_only=True):
    """The worker cannot make the stage resident."""

    worker_id: WorkerId
    artifact: Digest
    error: AdaptError


# ── events: clients and deployments ──────────────────────────────────────────────────────────────────────────────────


class ClientArrived(Struct, frozen=True, kw_only=True):
    client_id: ClientId


class ClientDisconnected(Struct, frozen=True, kw_only=True):
    client_id: ClientId


class ClientLeft(Struct, frozen=True, kw_only=True):
    """The client has ended by intent; nobody waits for its requests."""

    client_id: ClientId


class RequestArrived(Struct, frozen=True, kw_only=True):
    request_id: RequestId
    deployment: str
    version: int  # 0: the newest
    program: Digest | None
    interface: str = ""  # digest of the inputs and outputs that the client expects; "": any
    budget_s: float
    exact: bool
    fingerprint: int  # of everything that makes it this request; a second use of the id must agree
    input: Activation


class RequestCancelled(Struct, frozen=True, kw_only=True):
    request_id: RequestId


class OutcomeAcknowledged(Struct, frozen=True, kw_only=True):
    request_id: RequestId


class VersionDeployed(Struct, frozen=True, kw_only=True):
    """A version's stages are made resident; when they are, and all canaries came out as they should, it takes the requests of its deployment.
    Another cut of a version that takes them already does so under a later epoch.

    `is_restored`: it did so already in an earlier reign, and does from now on; its workers may come back with its stages."""

    version: Version
    is_restored: bool = False
    canaries: tuple[Canary, ...] = ()


class CanaryJudged(Struct, frozen=True, kw_only=True):
    """The answer to `JudgeCanary`. `error`: why the output is not what it should be; None: it is."""

    deployment: str
    number: int
    cut: int = 0
    run: int
    error: AdaptError | None


class VersionWithdrawn(Struct, frozen=True, kw_only=True):
    """Who asked for the version does not wait for it any more."""

    deployment: str
    number: int
    cut: int = 0


class Undeployed(Struct, frozen=True, kw_only=True):
    deployment: str


class DrainBegun(Struct, frozen=True, kw_only=True):
    """Take no new requests; what lives is finished."""


Event: TypeAlias = (
    WorkerExpected | WorkerJoined | WorkerHeard | WorkerDisconnected | LeaseEnded | LeaseRenewed | WorkerDraining | RoomWanted | WorkerLeft
    | StageBegun | StageFinished | AttemptFailed | AttemptCancelled | DispatchRefused
    | StageResident | LoadProgressed | StageRefused
    | ClientArrived | ClientDisconnected | ClientLeft | RequestArrived | RequestCancelled | OutcomeAcknowledged
    | VersionDeployed | VersionWithdrawn | CanaryJudged | Undeployed | DrainBegun
)  # fmt: skip


# ── actions ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Dispatch(Struct, frozen=True, kw_only=True):
    """Send the attempt with this input to the worker."""

    worker_id: WorkerId
    attempt: AttemptId
    artifact: Digest
    budget_s: float
    codec: str
    tolerance: float | None
    input: Activation


class Cancel(Struct, frozen=True, kw_only=True):
    worker_id: WorkerId
    attempt: AttemptId


class Acknowledge(Struct, frozen=True, kw_only=True):
    worker_id: WorkerId
    attempt: AttemptId


class Load(Struct, frozen=True, kw_only=True):
    worker_id: WorkerId
    artifact: Digest


class Unload(Struct, frozen=True, kw_only=True):
    worker_id: WorkerId
    artifact: Digest


class Accept(Struct, frozen=True, kw_only=True):
    """Tell the client which version its request is pinned to."""

    request_id: RequestId
    deployment: str
    version: int
    program: Digest


class Answer(Struct, frozen=True, kw_only=True):
    """Send the result. The same action again answers a re-submission."""

    request_id: RequestId
    output: Activation
    attempts: int
    numeric_classes: tuple[str, ...]
    unverified: int = 0  # stages that were to be verified, and could not


class Fail(Struct, frozen=True, kw_only=True):
    request_id: RequestId
    error: AdaptError


class Evict(Struct, frozen=True, kw_only=True):
    """The worker is lost: end its session and its lease."""

    worker_id: WorkerId
    reason: str


class Suspect(Struct, frozen=True, kw_only=True):
    """For the log: the worker gets nothing new until it is heard again."""

    worker_id: WorkerId
    reason: str


class Trust(Struct, frozen=True, kw_only=True):
    """For the log: the worker, new or a suspect so far, is heard, and gets work."""

    worker_id: WorkerId


class PlanChanged(Struct, frozen=True, kw_only=True):
    """The version's plan has a new epoch; remember it."""

    version: Version


class JudgeCanary(Struct, frozen=True, kw_only=True):
    """A canary has come out where bits need not agree: compare it with what is expected, and tell `CanaryJudged`."""

    version: Version
    run: int
    canary: int  # which one
    output: Activation
    numeric_classes: tuple[str, ...]


class VersionReady(Struct, frozen=True, kw_only=True):
    """Every stage of the version is resident on a worker, and its canaries came out as they should: it takes the requests of its deployment."""

    version: Version


class VersionFailed(Struct, frozen=True, kw_only=True):
    """The version cannot be made resident, or does not give the outputs that it should; it takes no requests."""

    version: Version
    error: AdaptError


class VersionReleased(Struct, frozen=True, kw_only=True):
    """The last request of a replaced or removed version has ended; its artifacts are needed no more."""

    version: Version


Action: TypeAlias = (
    Dispatch | Cancel | Acknowledge | Load | Unload | Accept | Answer | Fail | Evict | Suspect | Trust
    | PlanChanged | JudgeCanary | VersionReady | VersionFailed | VersionReleased
)  # fmt: skip
