"""What the scheduler is told (events, past tense) and what it asks for (actions, imperative)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from adapt.errors import AdaptError
from adapt.planning.placement import Plan
from adapt.protocol.ids import AttemptId, ClientId, Digest, RequestId, WorkerId
from adapt.protocol.messages import Leaf, StageTimes
from adapt.protocol.wire import Blob


@dataclass(frozen=True, slots=True)
class Activation:
    """The tensors between two stages, or at an end of the model, as they came: headers read, bytes unopened."""

    leaves: Sequence[Leaf]
    blobs: tuple[Blob, ...]

    @property
    def size_bytes(self) -> int:
        return sum(blob.size for blob in self.blobs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """One version of a deployment: the unit that requests are pinned to."""

    deployment: str
    number: int
    program: Digest
    codec: str
    tolerance: float | None
    exact: bool  # each request stays within one numeric class
    peak_ratio: float = 1.0  # the most a request retains, in units of its input's bytes
    plan: Plan = field(compare=False)


# ── events: workers ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerExpected:
    """The worker served an earlier reign of this dispatcher and may come back."""

    worker_id: WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerJoined:
    """A worker has said hello and attached; this ends whatever session it had before."""

    worker_id: WorkerId
    numeric_class: str
    stage_budget_bytes: int
    credit: int
    resident: frozenset[Digest]
    held: frozenset[AttemptId]
    finished: frozenset[AttemptId]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerHeard:
    worker_id: WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerDisconnected:
    """The worker's session has ended; what it held is nowhere now."""

    worker_id: WorkerId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseEnded:
    worker_id: WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRenewed:
    """A lease that had ended is in force again."""

    worker_id: WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerDraining:
    """The worker takes nothing new and has handed back what it had not begun."""

    worker_id: WorkerId
    handed_back: frozenset[AttemptId]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLeft:
    """The worker has ended by intent."""

    worker_id: WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class StageBegun:
    worker_id: WorkerId
    attempt: AttemptId


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFinished:
    worker_id: WorkerId
    attempt: AttemptId
    output: Activation
    times: StageTimes


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptFailed:
    worker_id: WorkerId
    attempt: AttemptId
    error: AdaptError


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptCancelled:
    """A cancelled attempt has left its slot."""

    worker_id: WorkerId
    attempt: AttemptId


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchRefused:
    """The socket did not take the `Dispatch`: the attempt never started."""

    worker_id: WorkerId
    attempt: AttemptId


@dataclass(frozen=True, slots=True, kw_only=True)
class StageResident:
    worker_id: WorkerId
    artifact: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadProgressed:
    """The worker has asked for another piece of the artifact."""

    worker_id: WorkerId
    artifact: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRefused:
    """The worker cannot make the stage resident."""

    worker_id: WorkerId
    artifact: Digest
    error: AdaptError


# ── events: clients and deployments ──────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientArrived:
    client_id: ClientId


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientDisconnected:
    client_id: ClientId


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientLeft:
    """The client has ended by intent; nobody waits for its requests."""

    client_id: ClientId


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestArrived:
    request_id: RequestId
    deployment: str
    version: int  # 0: the newest
    program: Digest | None
    budget_s: float
    exact: bool
    fingerprint: int  # of everything that makes it this request; a second use of the id must agree
    input: Activation


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestCancelled:
    request_id: RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class OutcomeAcknowledged:
    request_id: RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionDeployed:
    """A version's stages are made resident; when they are, it takes the requests of its deployment.

    `is_restored`: it did so already in an earlier reign, and does from now on; its workers may come back with its stages."""

    version: Version
    is_restored: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionWithdrawn:
    """Who asked for the version does not wait for it any more."""

    deployment: str
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Undeployed:
    deployment: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainBegun:
    """Take no new requests; what lives is finished."""


Event: TypeAlias = (
    WorkerExpected | WorkerJoined | WorkerHeard | WorkerDisconnected | LeaseEnded | LeaseRenewed | WorkerDraining | WorkerLeft
    | StageBegun | StageFinished | AttemptFailed | AttemptCancelled | DispatchRefused
    | StageResident | LoadProgressed | StageRefused
    | ClientArrived | ClientDisconnected | ClientLeft | RequestArrived | RequestCancelled | OutcomeAcknowledged
    | VersionDeployed | VersionWithdrawn | Undeployed | DrainBegun
)  # fmt: skip


# ── actions ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispatch:
    """Send the attempt with this input to the worker."""

    worker_id: WorkerId
    attempt: AttemptId
    artifact: Digest
    budget_s: float
    codec: str
    tolerance: float | None
    input: Activation


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    worker_id: WorkerId
    attempt: AttemptId


@dataclass(frozen=True, slots=True, kw_only=True)
class Acknowledge:
    worker_id: WorkerId
    attempt: AttemptId


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    worker_id: WorkerId
    artifact: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Unload:
    worker_id: WorkerId
    artifact: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Accept:
    """Tell the client which version its request is pinned to."""

    request_id: RequestId
    deployment: str
    version: int
    program: Digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Send the result. The same action again answers a re-submission."""

    request_id: RequestId
    output: Activation
    attempts: int
    numeric_classes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fail:
    request_id: RequestId
    error: AdaptError


@dataclass(frozen=True, slots=True, kw_only=True)
class Evict:
    """The worker is lost: end its session and its lease."""

    worker_id: WorkerId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanChanged:
    """The version's plan has a new epoch; remember it."""

    version: Version


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionReady:
    """Every stage of the version is resident on a worker."""

    version: Version


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionFailed:
    """The version can not be made resident; it takes no requests."""

    version: Version
    error: AdaptError


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionReleased:
    """The last request of a replaced or removed version has ended; its artifacts are needed no more."""

    version: Version


Action: TypeAlias = (
    Dispatch | Cancel | Acknowledge | Load | Unload | Accept | Answer | Fail | Evict
    | PlanChanged | VersionReady | VersionFailed | VersionReleased
)  # fmt: skip
