"""The whole conversation on one page: every message, who says it to whom, and in which order.

    peer (worker or client)                      dispatcher
    ───────────────────────                      ──────────
    WorkerHello | ClientHello   ── control ──▶             versions are compared here and only here
                                ◀── control ── Welcome     names session and term (in the envelope), or
                                ◀── control ── Refused     the reason; the peer gives up
    Attach                      ──── bulk ───▶             ties the second connection to the session
    (its unacknowledged answers, or its open requests, again)

    Every later message carries session and term in its envelope. A message of a foreign session or an older term
    changes nothing and is answered with `SayHello`. libzmq reconnects silently: a peer says hello again after each
    reconnection, after `SayHello`, and never otherwise.

    client                                       dispatcher                                     worker
    InferRequest ────────────────────────────▶
                 ◀──────────────────── Accepted
                                                 RunStage ─────────────────────────────────────▶
                                                          ◀──────────────────────── Begun
                                                          ◀──────────────────────── StageDone | StageFailed | StageCancelled
                                                 StageAck ─────────────────────────────────────▶   (it keeps the answer until then)
                 ◀──────────── Reply | RequestFailed
    ReplyAck ────────────────────────────────▶   (it keeps the result until then)
    CancelRequest ───────────────────────────▶   CancelStage ──────────────────────────────────▶

    Profile ─────────────────────────────────▶   ProfileProgram ───────────────────────────────▶   (on one worker of each kind)
                 ◀──────────────────── Progress           ◀──────────────────────── ProfileProgress
                 ◀──────────────────── Profiled           ◀──────────────────────── ProgramProfiled | ProfileFailed

    Artifacts are pulled, two pieces in flight: whoever lacks a file says `Fetch`, whoever has it answers `ArtifactPiece`
    (worker from dispatcher: stages, and programs to profile; dispatcher from client: programs).

Messages whose frames exceed `CONTROL_BYTES` travel on bulk, cut into `Piece`s; see pieces.py. Times are budgets in
seconds, never moments: the clocks of two devices do not agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, TypeAlias

import msgspec
from msgspec import Struct, field

from adapt.protocol.codecs import TensorHeader
from adapt.protocol.ids import AttemptId, Natural, RequestId

PROTOCOL_VERSION = 1
MOST_BOUNDARIES = 3 << 16  # of a program, for each of which something is told; all of it has to fit into one header

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]
Seconds = Annotated[float, msgspec.Meta(ge=0.0, le=1e9)]
Ratio = Annotated[float, msgspec.Meta(ge=0.0, le=1e9)]
BytesPerSecond = Annotated[float, msgspec.Meta(ge=0.0, le=1e18)]
Text = Annotated[str, msgspec.Meta(max_length=4096)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z")]
Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
Named = Annotated[str, msgspec.Meta(max_length=64)]  # a name or digest that is only looked up; a pattern would cost half a microsecond
Address = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
PieceBytes = Annotated[int, msgspec.Meta(ge=4096, le=1 << 20)]
Facts: TypeAlias = dict[str, Any]  # plain values, of which msgpack has no others; an error's attributes, a constructor's arguments
Cores = Annotated[float, msgspec.Meta(ge=0.0, le=1e6)]  # that the control group of a worker allows it; 0: no limit
Share = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
Attempts = Annotated[list[AttemptId], msgspec.Meta(max_length=4096)]

# One leaf of a model's or stage's inputs or outputs: a tensor (its bytes are the next payload frame) or a plain number.
Leaf: TypeAlias = TensorHeader | int | float | bool | None
Leaves = Annotated[list[Leaf], msgspec.Meta(max_length=256)]


# ── sessions ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class DeviceFacts(Struct, frozen=True, kw_only=True, gc=False):
    """What a worker runs on. `numeric_class` names all that the bits of a result depend on besides the model."""

    device: Text  # "cpu", "cuda:0"
    device_name: Text
    threads: Count
    numeric_class: Text


class WorkerHello(Struct, frozen=True, kw_only=True, gc=False):
    """Worker -> dispatcher, first on control: who I am and what I hold. Ends any earlier session of this name."""

    KIND: ClassVar[bytes] = b"WH"
    protocol_version: Natural
    worker_id: Name
    incarnation: Natural
    highest_term: Natural  # the highest term this process has met; the dispatcher's must be higher or the same reign
    software: Text
    device: DeviceFacts
    cores: Cores = 0.0
    stage_budget_bytes: Natural  # memory for stages, above the floor of the runtime
    credit: Count  # tasks it accepts at a time: running and waiting
    resident: Annotated[list[Sha256], msgspec.Meta(max_length=4096)]  # stages that are loaded
    held: Attempts  # accepted and not finished
    finished: Attempts  # finished, answer not acknowledged yet; the answers follow on their own


class ClientHello(Struct, frozen=True, kw_only=True, gc=False):
    """Client -> dispatcher, first on control. Its open requests follow on their own."""

    KIND: ClassVar[bytes] = b"CH"
    protocol_version: Natural
    client_id: Address
    incarnation: Natural
    highest_term: Natural
    software: Text


class Welcome(Struct, frozen=True, kw_only=True, gc=False):
    """Dispatcher -> peer: you are known under the session and term of this envelope."""

    KIND: ClassVar[bytes] = b"WE"
    software: Text
    heartbeat_s: Seconds  # how often a worker says `Heartbeat`
    piece_bytes: PieceBytes  # size of the pieces in which big messages travel
    max_message_bytes: Natural
    max_budget_s: Seconds  # longest deadline that a request may have


class Refused(Struct, frozen=True, kw_only=True, gc=False):
    """Dispatcher -> peer: no session; the error says why. Trying again as it is would not help."""

    KIND: ClassVar[bytes] = b"RF"
    code: Text
    message: Text
    fields: Facts


class SayHello(Struct, frozen=True, kw_only=True, gc=False):
    """Dispatcher -> peer: the session of this envelope, which you named, is none of this reign; say hello again."""

    KIND: ClassVar[bytes] = b"SH"


class Attach(Struct, frozen=True, kw_only=True, gc=False):
    """Peer -> dispatcher, first on bulk: this connection belongs to the session of the envelope."""

    KIND: ClassVar[bytes] = b"AT"


class Goodbye(Struct, frozen=True, kw_only=True, gc=False):
    """Either way, on control: this session ends by intent; nothing more will come."""

    KIND: ClassVar[bytes] = b"GB"
    reason: Text


class Piece(Struct, frozen=True, kw_only=True, gc=False):
    """Either way, on bulk: one piece of a message too big for control; see pieces.py."""

    KIND: ClassVar[bytes] = b"PI"
    transfer: Natural  # grows with every transfer of a connection
    index: Natural
    count: Natural
    piece_bytes: PieceBytes


# ── requests: client and dispatcher ──────────────────────────────────────────────────────────────────────────────────


class InferRequest(Struct, frozen=True, kw_only=True, gc=False):
    """Client -> dispatcher: run a deployed model on the leaves whose tensors follow. Sent again on every new session."""

    KIND: ClassVar[bytes] = b"IR"
    request_id: RequestId
    deployment: Named
    version: Natural  # 0 until `Accepted` has named it
    program: Named | None  # None until `Accepted` has named it; another program never answers
    interface: Named = ""  # digest of the inputs and outputs that the client knows; a version with others never answers. "": any
    budget_s: Seconds  # time left
    numerics: Text  # "exact" (one numeric class for the whole request) or "close"
    leaves: Leaves


class Accepted(Struct, frozen=True, kw_only=True, gc=False):
    """Dispatcher -> client: the request is let in and pinned to this version."""

    KIND: ClassVar[bytes] = b"AC"
    request_id: RequestId
    deployment: Name
    version: Natural
    program: Sha256


class Reply(Struct, frozen=True, kw_only=True, gc=False):
    """Dispatcher -> client: the result; its tensors follow. Kept until `ReplyAck`."""

    KIND: ClassVar[bytes] = b"RP"
    request_id: RequestId
    leaves: Leaves
    attempts: Count  # tries that all stages took together
    numeric_classes: Annotated[list[Text], msgspec.Meta(max_length=256)]


class RequestFailed(Struct, frozen=True, kw_only=True, gc=False):
    """Dispatcher -> client: the request ended in this error. Kept until `ReplyAck`."""

    KIND: ClassVar[bytes] = b"RE"
    request_id: RequestId
    code: Text
    message: Text
    fields: Facts


class ReplyAck(Struct, frozen=True, kw_only=True, gc=False):
    """Client -> dispatcher: these outcomes have arrived; forget what you keep of them."""

    KIND: ClassVar[bytes] = b"RA"
    request_ids: Annotated[list[RequestId], msgspec.Meta(max_length=4096)]


class CancelRequest(Struct, frozen=True, kw_only=True, gc=False):
    """Client -> dispatcher: nobody waits for this any more. May overtake the request it cancels."""

    KIND: ClassVar[bytes] = b"CR"
    request_id: RequestId


# ── deployments and questions: client and dispatcher; `call` pairs question and answer ───────────────────────────────


class NamedSource(Struct, frozen=True, kw_only=True, gc=False):
    """A model that the dispatcher's side can build by itself."""

    model: Text  # "torchvision/resnet50"
    weights: Text | None = None  # None: random; "DEFAULT" or an enum's name; a file under the dispatcher's --models-dir
    seed: int | None = None
    model_args: Facts = field(default_factory=dict)
    input_shape: list[Natural] | None = None
    optimize: Text = "none"  # or "fold": batch norms folded, convolutions channels last


class ProgramSource(Struct, frozen=True, kw_only=True, gc=False):
    """A program that the client has exported, and offers for `Fetch`."""

    program: Sha256
    file_bytes: Natural
    operator_costs_s: Annotated[list[Seconds], msgspec.Meta(max_length=1 << 20)]


class CanarySource(Struct, frozen=True, kw_only=True, gc=False):
    """A file of canaries (see models/canaries.py) that the client has made beside its program, and offers for `Fetch`."""

    file: Sha256
    file_bytes: Natural
    tolerance: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]  # where bits cannot agree: of the largest magnitude of an output


class Deploy(Struct, frozen=True, kw_only=True, gc=False):
    """Client -> dispatcher: make a model available. Exactly one of `named` and `uploaded` is given."""

    KIND: ClassVar[bytes] = b"DP"
    call: Natural
    name: Name
    stages: Count  # 0: one per worker
    codec: Text
    tolerance: float | None
    numerics: Text
    named: NamedSource | None = None
    uploaded: ProgramSource | None = None
    version: Natural = 0  # above all that there were; 0: the next
    canaries: CanarySource | None = None  # only with `uploaded`


class Rollback(Struct, frozen=True, kw_only=True, gc=False):
    """Client -> dispatcher: deploy once more, as the next version, what an earlier version of this deployment was. Answered as `Deploy` is."""

    KIND: ClassVar[bytes] = b"RO"
    call: Natural
    name: Name
    version: Natural = 0  # which; 0: the one before the present one


class StagePlace(Struct, frozen=True, kw_only=True, gc=False):
    """One stage of a plan: which file, how big, on which workers."""

    artifact: Sha256
    file_bytes: Natural
    cost_s: Seconds  # predicted seconds for one item, by the quick profile
    workers: list[Name]


class DeploymentRecord(Struct, frozen=True, kw_only=True, gc=False):
    """A deployment as users see it. `interface` is the program's inputs and outputs as JSON (see models/program.py)."""

    name: Name
    version: Natural
    program: Sha256
    epoch: Natural
    codec: Text
    tolerance: float | None
    numerics: Text
    stages: list[StagePlace]
    interface: Annotated[str, msgspec.Meta(max_length=1 << 20)]
    again: Natural = 0  # the earlier version that this one repeats; 0: none
    earlier: list[Natural] = []  # versions that can be rolled back to, newest last
    arithmetic: Text = "contiguous"  # what its program adds to the numeric class of results: "contiguous", or what was changed to be faster


class Deployed(Struct, frozen=True, kw_only=True, gc=False):
    """Dispatcher -> client: the deployment is ready: every stage is resident."""

    KIND: ClassVar[bytes] = b"DD"
    call: Natural
    deployment: DeploymentRecord


class Undeploy(Struct, frozen=True, kw_only=True, gc=False):
    """Client -> dispatcher: take no new requests for this deployment; unload it when its last request has ended."""

    KIND: ClassVar[bytes] = b"UD"
    call: Natural
    name: Name


class CancelCall(Struct, frozen=True, kw_only=True, gc=False):
    """Client -> dispatcher: nobody waits for this call any more. A deployment that is not ready yet is given up."""

    KIND: ClassVar[bytes] = b"CC"
    call: Natural


class Progress(Struct, frozen=True, kw_only=True, gc=False):
    """Dispatcher -> client: how far a long call has come, in words."""

    KIND: ClassVar[bytes] = b"PG"
    call: Natural
    step: Text
    share: Share | None = None  # that is done of this step, if that is known


class Profile(Struct, frozen=True, kw_only=True, gc=False):
    """Client -> dispatcher: have a model measured on a worker of each kind. Exactly one of `named` and `uploaded` is given."""

    KIND: ClassVar[bytes] = b"PR"
    call: Natural
    name: Name  # what it is called in the answer
    device_class: Text  # part of the names of the kinds to measure; empty: all
    repetitions: Annotated[int, msgspec.Meta(ge=1, le=1000)]
    again: bool  # also where there is a profile already
    named: NamedSource | None = None
    uploaded: ProgramSource | None = None


class Profiled(Struct, frozen=True, kw_only=True, gc=False):
    """Dispatcher -> client: the model as planning sees it, with the seconds on each kind of device (see planning/model.py), as JSON."""

    KIND: ClassVar[bytes] = b"PF"
    call: Natural
    profile: Annotated[str, msgspec.Meta(max_length=4 << 20)]


class CallDone(Struct, frozen=True, kw_only=True, gc=False):
    """Dispatcher -> client: done, with nothing to tell."""

    KIND: ClassVar[bytes] = b"CD"
    call: Natural


class CallFailed(Struct, frozen=True, kw_only=True, gc=False):
    """Dispatcher -> client: the call ended in this error and changed nothing."""

    KIND: ClassVar[bytes] = b"CF"
    call: Natural
    code: Text
    message: Text
    fields: Facts


class StatusQuery(Struct, frozen=True, kw_only=True, gc=False):
    """Client -> dispatcher: how are things?"""

    KIND: ClassVar[bytes] = b"SQ"
    call: Natural


class LinkRecord(Struct, frozen=True, kw_only=True, gc=False):
    """What was measured between the dispatcher and a worker; rates are bytes per second to the worker and from it."""

    latency_s: Seconds  # of one direction
    down_bytes_per_s: float
    up_bytes_per_s: float


class WorkerRecord(Struct, frozen=True, kw_only=True, gc=False):
    """A worker as users see it."""

    worker_id: Name
    state: Text  # "ready", "suspect", "lost", "draining"; lost workers are remembered for a while
    device: DeviceFacts
    memory_percent: float
    stage_budget_bytes: Natural
    resident: list[Sha256]
    credit: Count
    running: Count
    tasks_done: Natural
    tasks_failed: Natural
    compute_s: Seconds  # summed over all tasks
    load: float = 0.0  # percent of memory in use: of its host, or of its stage budget if that is more
    penalty: float = 0.0  # for its failures
    breaker: Text = "closed"  # "open": it gets nothing for a while; "half-open": one task at a time
    link: LinkRecord | None = None  # not measured yet


class RequestRecord(Struct, frozen=True, kw_only=True, gc=False):
    """A request that has no answer yet, as users see it."""

    request: Text  # as logs call it
    deployment: Name
    version: Natural
    stage: Natural  # zero-based
    age_s: Seconds
    left_s: Seconds  # until its deadline
    is_queued: bool  # else it is waited for, or for the moment of its next attempt
    workers: list[Name]  # that have its stage in hand
    attempts: Natural  # so far, over all stages


class ModelFileRecord(Struct, frozen=True, kw_only=True, gc=False):
    """A file under --models-dir that is, or should be, a deployment, as users see it."""

    file: Text
    deployment: Text
    state: Text  # "waiting" (it changes still), "deploying", "deployed", "failed", "removed" (the deployment, by somebody)
    version: Natural  # that was made of it last; 0: none
    reason: Text = ""  # why it failed


class StatusReport(Struct, frozen=True, kw_only=True, gc=False):
    """Dispatcher -> client: workers, deployments and counters, and the oldest requests. Counter names carry units."""

    KIND: ClassVar[bytes] = b"ST"
    call: Natural
    term: Natural
    uptime_s: Seconds
    workers: list[WorkerRecord]
    deployments: list[DeploymentRecord]
    counters: dict[str, float]
    requests: list[RequestRecord] = []  # the oldest first, not all
    files: list[ModelFileRecord] = []  # under --models-dir


# ── tasks: dispatcher and worker ─────────────────────────────────────────────────────────────────────────────────────


class RunStage(Struct, frozen=True, kw_only=True, gc=False):
    """Dispatcher -> worker: run one stage on the activation in the frames that follow."""

    KIND: ClassVar[bytes] = b"RS"
    attempt: AttemptId
    artifact: Named  # which stage; refused only if not resident
    budget_s: Seconds
    codec: Text  # for the output
    tolerance: float | None
    leaves: Leaves


class CancelStage(Struct, frozen=True, kw_only=True, gc=False):
    """Dispatcher -> worker: nobody waits for this attempt. May overtake the `RunStage` it cancels."""

    KIND: ClassVar[bytes] = b"CS"
    attempt: AttemptId


class Begun(Struct, frozen=True, kw_only=True, gc=False):
    """Worker -> dispatcher: this attempt has begun to compute."""

    KIND: ClassVar[bytes] = b"BG"
    attempt: AttemptId


class StageTimes(Struct, frozen=True, kw_only=True, gc=False):
    """Where one task's time went on the worker, in seconds."""

    wait_s: Seconds
    decode_s: Seconds
    compute_s: Seconds
    encode_s: Seconds


class StageDone(Struct, frozen=True, kw_only=True, gc=False):
    """Worker -> dispatcher: the output; its tensors follow. Kept by the worker until `StageAck`.

    Digests are xxh3-128 over type, shape and xxh3-64 of the bytes of each tensor as it was before the codec: two attempts of one numeric
    class and one input must agree."""

    KIND: ClassVar[bytes] = b"SD"
    attempt: AttemptId
    leaves: Leaves
    times: StageTimes
    input_digest: Annotated[bytes, msgspec.Meta(max_length=16)]
    output_digest: Annotated[bytes, msgspec.Meta(max_length=16)]
    begun: AttemptId | None = None  # the attempt that the worker has begun next: saves a `Begun`


class StageFailed(Struct, frozen=True, kw_only=True, gc=False):
    """Worker -> dispatcher: this attempt ended in an error. Kept by the worker until `StageAck`."""

    KIND: ClassVar[bytes] = b"SF"
    attempt: AttemptId
    code: Text
    message: Text
    fields: Facts


class StageCancelled(Struct, frozen=True, kw_only=True, gc=False):
    """Worker -> dispatcher: a cancelled attempt has left its slot. Kept by the worker until `StageAck`."""

    KIND: ClassVar[bytes] = b"SC"
    attempt: AttemptId


class StageAck(Struct, frozen=True, kw_only=True, gc=False):
    """Dispatcher -> worker: these answers have arrived; forget them."""

    KIND: ClassVar[bytes] = b"SA"
    attempts: Attempts


class Heartbeat(Struct, frozen=True, kw_only=True, gc=False):
    """Worker -> dispatcher: I live, and so far my executor has come (`progress` grows with every step it takes)."""

    KIND: ClassVar[bytes] = b"HB"
    progress: Natural
    memory_percent: float  # of the host
    resident_bytes: Natural  # of stages
    cores: Cores = 0.0


class Draining(Struct, frozen=True, kw_only=True, gc=False):
    """Worker -> dispatcher: I take nothing new; of what I held I give back what I have not begun."""

    KIND: ClassVar[bytes] = b"DR"
    handed_back: Attempts


# ── links ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class LinkProbe(Struct, frozen=True, kw_only=True, gc=False):
    """Dispatcher -> worker: answer at once, with so many bytes. The bytes of the one payload frame mean nothing."""

    KIND: ClassVar[bytes] = b"LP"
    number: Natural
    answer_bytes: Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]


class LinkEcho(Struct, frozen=True, kw_only=True, gc=False):
    """Worker -> dispatcher: the answer to the `LinkProbe` of this number; so many bytes are the one payload frame."""

    KIND: ClassVar[bytes] = b"LE"
    number: Natural


# ── profiles: dispatcher and worker ──────────────────────────────────────────────────────────────────────────────────


class ProfileProgram(Struct, frozen=True, kw_only=True, gc=False):
    """Dispatcher -> worker: measure this program when you have nothing else to do; fetch it unless it is in your cache."""

    KIND: ClassVar[bytes] = b"PP"
    program: Sha256
    file_bytes: Natural
    repetitions: Annotated[int, msgspec.Meta(ge=1, le=1000)]


class CancelProfile(Struct, frozen=True, kw_only=True, gc=False):
    """Dispatcher -> worker: nobody waits for this profile any more."""

    KIND: ClassVar[bytes] = b"CP"
    program: Sha256


class ProfileProgress(Struct, frozen=True, kw_only=True, gc=False):
    """Worker -> dispatcher: so far this profile has come."""

    KIND: ClassVar[bytes] = b"PS"
    program: Sha256
    step: Text
    share: Share


class CodecMeasured(Struct, frozen=True, kw_only=True, gc=False):
    """What a codec, a lossy one at a tolerance of 0.1, makes of what a program sends: bytes of the tensors per byte sent over all boundaries
    and at each (the input, every legal cut, the output), and bytes of the tensors per CPU second of one thread."""

    name: Named
    ratio: Ratio
    ratios: Annotated[list[Ratio], msgspec.Meta(max_length=MOST_BOUNDARIES)]
    encode_bytes_per_s: BytesPerSecond
    decode_bytes_per_s: BytesPerSecond


class ProgramProfiled(Struct, frozen=True, kw_only=True, gc=False):
    """Worker -> dispatcher: seconds of each operator for a batch of 1; None where the stage budget had no room for its layer. And what a task
    takes of its processor besides: CPU seconds for each, and for each byte received or sent; None: that could not be measured now. And what
    codecs make of what crosses; None: that was not measured. And the bytes that each operator's kernel takes besides its inputs and its result;
    None: not measured, of this operator or of any."""

    KIND: ClassVar[bytes] = b"PD"
    program: Sha256
    costs_s: Annotated[list[Seconds | None], msgspec.Meta(max_length=1 << 20)]
    task_s: Seconds | None = None
    byte_s: Seconds | None = None
    codecs: Annotated[list[CodecMeasured], msgspec.Meta(max_length=8)] | None = None
    workspace_bytes: Annotated[list[Natural | None], msgspec.Meta(max_length=1 << 20)] | None = None


class ProfileFailed(Struct, frozen=True, kw_only=True, gc=False):
    """Worker -> dispatcher: this program is not profiled here."""

    KIND: ClassVar[bytes] = b"PX"
    program: Sha256
    code: Text
    message: Text
    fields: Facts


# ── artifacts ────────────────────────────────────────────────────────────────────────────────────────────────────────


class LoadStage(Struct, frozen=True, kw_only=True, gc=False):
    """Dispatcher -> worker: make this stage resident; fetch it unless it is in your cache."""

    KIND: ClassVar[bytes] = b"LS"
    artifact: Sha256
    file_bytes: Natural


class StageLoaded(Struct, frozen=True, kw_only=True, gc=False):
    """Worker -> dispatcher: this stage is resident."""

    KIND: ClassVar[bytes] = b"SL"
    artifact: Sha256
    resident_bytes: Natural
    load_s: Seconds


class LoadFailed(Struct, frozen=True, kw_only=True, gc=False):
    """Worker -> dispatcher: this stage cannot be made resident here."""

    KIND: ClassVar[bytes] = b"LF"
    artifact: Sha256
    code: Text
    message: Text
    fields: Facts


class UnloadStage(Struct, frozen=True, kw_only=True, gc=False):
    """Dispatcher -> worker: this stage is needed no more; its file may stay in the cache."""

    KIND: ClassVar[bytes] = b"US"
    artifact: Sha256


class Fetch(Struct, frozen=True, kw_only=True, gc=False):
    """Worker -> dispatcher, or dispatcher -> client: send me this part of a file. At most two unanswered per file."""

    KIND: ClassVar[bytes] = b"FE"
    artifact: Sha256
    offset: Natural
    length: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]


class ArtifactPiece(Struct, frozen=True, kw_only=True, gc=False):
    """The answer to `Fetch`, always on bulk: the bytes are the one payload frame, shorter than asked only at the end."""

    KIND: ClassVar[bytes] = b"AP"
    artifact: Sha256
    offset: Natural
    file_bytes: Natural


class ArtifactMissing(Struct, frozen=True, kw_only=True, gc=False):
    """The answer to `Fetch` of a file that is not there (any more)."""

    KIND: ClassVar[bytes] = b"AM"
    artifact: Sha256


ToDispatcher: TypeAlias = (
    WorkerHello | ClientHello | Attach | Goodbye
    | InferRequest | ReplyAck | CancelRequest | Deploy | Rollback | Profile | CancelCall | Undeploy | StatusQuery
    | Begun | StageDone | StageFailed | StageCancelled | Heartbeat | Draining
    | StageLoaded | LoadFailed | Fetch | ArtifactPiece | ArtifactMissing
    | ProfileProgress | ProgramProfiled | ProfileFailed | LinkEcho
)  # fmt: skip
ToWorker: TypeAlias = (
    Welcome | Refused | SayHello | Goodbye
    | RunStage | CancelStage | StageAck | LoadStage | UnloadStage | ArtifactPiece | ArtifactMissing
    | ProfileProgram | CancelProfile | LinkProbe
)  # fmt: skip
ToClient: TypeAlias = (
    Welcome | Refused | SayHello | Goodbye
    | Accepted | Reply | RequestFailed | Deployed | Profiled | Progress | CallDone | CallFailed | StatusReport | Fetch
)  # fmt: skip
Message: TypeAlias = ToDispatcher | ToWorker | ToClient | Piece

HELLOS = (WorkerHello, ClientHello)


def _kinds() -> Iterator[tuple[bytes, type]]:
    for kind in Message.__args__:
        yield kind.KIND, kind


BY_KIND: dict[bytes, type] = dict(_kinds())
assert len(BY_KIND) == len(set(Message.__args__)), "two messages share a kind"
