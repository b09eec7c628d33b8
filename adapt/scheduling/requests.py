"""The requests as the scheduler knows them: those that live, and those whose end must be remembered for a while."""

from __future__ import annotations

from collections import OrderedDict

from msgspec import Struct

from adapt.errors import Plain
from adapt.planning.placement import StageNeed
from adapt.protocol.ids import AttemptId, RequestId, TaskId, WorkerId
from adapt.scheduling.canaries import Run
from adapt.scheduling.events import Activation, Answer, Fail, Version
from adapt.scheduling.verification import Check

POISONED = 3  # deaths of workers that make a request the cause
HISTORY_LIMIT = 32  # attempts of one request whose story is kept for its error


class Attempt(Struct):
    """One try that may still bring an answer."""

    worker_id: WorkerId
    timeout_s: float
    is_expired: bool = False  # its wait has ended; its slot has not, and its answer still counts
    is_check: bool = False  # made to verify another's answer: how it fails costs the request nothing


class Request(Struct, eq=False):
    """A request that lives. Invariant: it is queued, or an attempt is in flight for its current stage."""

    request_id: RequestId
    version: Version
    fingerprint: int
    exact: bool
    deadline: float
    budget_s: float
    arrival: int  # order among all requests
    activation: Activation  # input of the current stage
    generation: int = 1  # no other start of a request has it
    input: Activation | None = None  # kept by an exact request that has gone on to later stages
    stage: int = 0
    ticket: int = 0  # of its valid place in a queue; 0: not queued
    attempts: dict[int, Attempt] = {}  # of the current stage, by number
    issued: dict[int, WorkerId] = {}  # every number given for the current stage, and to whom
    failed_on: set[WorkerId] = set()  # for the current stage
    accused: set[WorkerId] = set()  # where the model raised in the current stage, perhaps by that worker's doing
    deviants: set[WorkerId] = set()  # where a canary came to another output in the current stage
    deaths: list[WorkerId] = []  # workers that died while they ran the current stage
    suspected: list[WorkerId] = []  # workers that died while they may have run it, or something else
    blamed_at: float = 0.0  # when the last of these deaths was known of
    failures: int = 0  # of the current stage, losses included
    model_error: str | None = None  # kind of the last error that the model raised in the current stage
    attempts_made: int = 0  # over all stages
    numeric_class: str = ""  # pinned by the first dispatch of an exact request
    numeric_classes: set[str] = set()
    run: Run | None = None  # it is no client's, but a canary's
    check: Check | None = None  # the current stage is to be verified
    unverified: int = 0  # stages that were to be, and could not
    history: list[Plain] = []

    @property
    def is_waited_for(self) -> bool:
        """Whether an attempt is in flight whose wait has not ended."""
        return any(not attempt.is_expired for attempt in self.attempts.values())

    @property
    def is_choosy(self) -> bool:
        """Whether it may refuse a worker that the next request in its queue would take."""
        return bool(self.attempts or self.failed_on or self.numeric_class or self.run or self.check or self.is_doubtful)

    @property
    def is_answered(self) -> bool:
        """Whether the current stage has an answer that is held until it is verified."""
        return self.check is not None and bool(self.check.answers)

    @property
    def need(self) -> StageNeed:
        """What its current stage takes. The stages of a version never change; only their places do."""
        return self.version.plan.stages[self.stage]

    def suits(self, numeric_class: str) -> bool:
        """Whether a worker of this class may run it: any, unless it is pinned to another."""
        return not self.exact or self.numeric_class in ("", numeric_class)

    @property
    def is_doubtful(self) -> bool:
        """Whether a worker may have died of its current stage: then no second one is asked beside the first, and nothing runs beside it."""
        return bool(self.deaths or self.suspected)

    @property
    def is_poison(self) -> bool:
        """Whether workers that succeed otherwise have died of it so often that it is the cause. Once at least nothing else can have been."""
        return bool(self.deaths) and len(self.deaths) + len(self.suspected) >= POISONED

    def absolve(self, worker_id: WorkerId) -> None:
        """The worker lives: its connection was lost."""
        for deaths in (self.deaths, self.suspected):
            if worker_id in deaths:
                deaths.remove(worker_id)

    @property
    def retained_bytes(self) -> int:
        """Of its activation, of its input if that is kept, and of answers that are held."""
        held_bytes = 0 if self.check is None else self.check.held_bytes
        return self.activation.size_bytes + (self.input.size_bytes if self.input is not None else 0) + held_bytes

    @property
    def task(self) -> TaskId:
        return TaskId(self.request_id, self.generation, self.stage)

    def attempt_id(self, number: int) -> AttemptId:
        return AttemptId(self.request_id, self.generation, self.stage, number)

    def is_current(self, attempt: AttemptId) -> bool:
        """Whether an answer to `attempt` can still advance this request."""
        _, generation, stage, number = attempt
        return stage == self.stage and generation == self.generation and number in self.issued and attempt.request == self.request_id

    def note(self, worker_id: WorkerId, number: int, outcome: str) -> None:
        """Add a line to the story that an error will tell."""
        if len(self.history) < HISTORY_LIMIT:
            self.history.append({"stage": self.stage, "attempt": number, "worker": worker_id, "outcome": outcome})

    def advance(self, activation: Activation) -> None:
        """Go on to the next stage with its input."""
        if self.exact and self.input is None:
            self.input = self.activation
        self._enter(self.stage + 1, activation)

    def start_again(self, generation: int) -> None:
        """From the input on; an exact request has kept it. What it was computed in so far is forgotten."""
        assert self.input is not None, "only exact requests keep their input"
        self.generation = generation
        self.numeric_classes.clear()
        self.unverified = 0
        self._enter(0, self.input)

    def _enter(self, stage: int, activation: Activation) -> None:
        self.activation, self.stage = activation, stage
        self.failures = 0
        self.model_error = None
        self.check = None
        self.ticket = 0
        self.attempts.clear()
        self.issued.clear()
        self.failed_on.clear()
        self.accused.clear()
        self.deviants.clear()
        self.deaths.clear()
        self.suspected.clear()
        self.blamed_at = 0.0


class Ended(Struct):
    """How a request ended, kept until its deadline and a little longer, so that a late duplicate is known as one."""

    fingerprint: int
    outcome: Answer | Fail | None  # None: acknowledged, cancelled, or dropped for its size
    is_final: bool  # the client has decided: it was acknowledged or cancelled


class EndedRequests:
    """The ends, with a limit on the bytes of kept results: the oldest results go first, the ids stay."""

    def __init__(self, *, max_kept_bytes: int) -> None:
        self._max_kept_bytes = max_kept_bytes
        self._ended: dict[RequestId, Ended] = {}
        self._kept: OrderedDict[RequestId, int] = OrderedDict()
        self.kept_bytes = 0

    def __len__(self) -> int:
        return len(self._ended)

    @property
    def kept(self) -> int:
        """How many outcomes may still be asked for again."""
        return len(self._kept)

    def get(self, request_id: RequestId) -> Ended | None:
        return self._ended.get(request_id)

    def keep(self, request_id: RequestId, fingerprint: int, outcome: Answer | Fail) -> None:
        self._ended[request_id] = Ended(fingerprint, outcome, is_final=False)
        size = outcome.output.size_bytes if isinstance(outcome, Answer) else 0
        self._kept[request_id] = size
        self.kept_bytes += size
        while self.kept_bytes > self._max_kept_bytes:
            oldest = next(iter(self._kept))
            self._ended[oldest].outcome = None
            self._drop(oldest)

    def bury(self, request_id: RequestId) -> None:
        """The client has decided: keep the id, drop the result. An id that was never seen gets its tombstone in advance."""
        fingerprint = self._ended[request_id].fingerprint if request_id in self._ended else 0
        self._ended[request_id] = Ended(fingerprint, None, is_final=True)
        self._drop(request_id)

    def forget(self, request_id: RequestId) -> None:
        self._drop(request_id)
        self._ended.pop(request_id, None)

    def _drop(self, request_id: RequestId) -> None:
        self.kept_bytes -= self._kept.pop(request_id, 0)
