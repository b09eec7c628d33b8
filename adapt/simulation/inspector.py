"""Watches the scheduler at work: the invariants of the design after each step, and how often the rare paths are taken.

The one module here that looks inside the scheduler. What it asks of its inside stands in `_Inside`, so that a scheduler that keeps its
books otherwise needs a change in one place only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from adapt.errors import CanaryError, OverloadedError
from adapt.protocol.ids import AttemptId, Digest, RequestId, WorkerId
from adapt.protocol.messages import Leaf
from adapt.scheduling import events as ev
from adapt.scheduling.liveness import Verdict
from adapt.scheduling.qos import Breaker
from adapt.scheduling.requests import Ended, Request
from adapt.scheduling.roster import Member
from adapt.scheduling.scheduler import REMEMBER_S, Scheduler
from adapt.scheduling.term import Reign
from adapt.scheduling.verification import Check

_Telling: TypeAlias = tuple[int, str, tuple[Leaf, ...]]  # generation, numeric class, and what the worker has come to

LOOK_AT_QUEUES_EVERY = 16  # turns: to ask who could run what waits costs more than all else


class Violation(Exception):
    """Something happened that never may; of one request, if `request_id` is given."""

    def __init__(self, what: str, request_id: RequestId | None = None) -> None:
        super().__init__(what if request_id is None else f"{what} (request {request_id})")
        self.request_id = request_id


class _Inside:
    """What is asked of a scheduler's inside."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def requests(self) -> Iterator[Request]:
        return iter(self._scheduler._requests.values())

    def request(self, request_id: RequestId) -> Request | None:
        return self._scheduler._requests.get(request_id)

    def ended(self, request_id: RequestId) -> Ended | None:
        return self._scheduler._ended.get(request_id)

    def is_due(self, kind: str, of: RequestId | AttemptId) -> bool:
        return (kind, of) in self._scheduler._due

    def is_wanted(self, attempt: AttemptId, worker_id: WorkerId) -> bool:
        return self._scheduler._wanted(attempt, worker_id) is not None

    def places(self, request: Request) -> tuple[WorkerId, ...]:
        """Who has the request's current stage, by the plan that is in force now."""
        return self._scheduler._residency.live(request.version).plan.places[request.stage]

    def uncounted(self, member: Member) -> set[Digest]:
        """What it has or loads though no plan wants it there, nor is it a spare: nobody knows of its bytes."""
        residency = self._scheduler._residency
        return {
            artifact for artifact in member.resident | member.loading if not residency._is_placed(member, artifact)
        } - member.spares.keys()

    def eligible(self, request: Request, now: float) -> list[Member]:
        return self._scheduler._choice.eligible(request, now)

    def admitted(self) -> int:
        return len(self._scheduler._admission)

    def residency_counters(self) -> dict[str, int]:
        residency = self._scheduler._residency
        return {
            "stage moved": residency.stages_moved,
            "stage copied": residency.stages_copied,
            "copy gave way": residency.copies_dropped,
            "spare used": residency.spares_used,
            "spare gave way": residency.spares_dropped,
            "stage refused by a worker": residency.loads_failed,
        }


class Inspector:
    """One for a whole run, through all reigns. Raises `Violation`.

    Attributes:
        counters: rare paths by name, as seen from outside; `rare_paths` adds what the schedulers have counted.
        unread: the workers of whom something has arrived and was not read yet.
        unverified: requests that were answered though some stage was to be verified, and could not be.
    """

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter()
        self.unread: Callable[[], set[str]] = set
        self.unverified: set[RequestId] = set()
        self._earlier: Counter[str] = Counter()  # counted by the schedulers of earlier reigns
        self._scheduler: Scheduler | None = None
        self._terms: list[int] = []
        self._given_up: set[tuple[WorkerId, Digest]] = set()  # stages that are unloaded by what is decided and not done yet
        self._replanned: set[ev.VersionKey] = set()  # versions whose places are changed by what is decided, before some of it or after
        self._turns = 0

    def reign_begins(self, scheduler: Scheduler, reign: Reign) -> None:
        if self._scheduler is not None:
            self._earlier += self._counted()
            self.counters["another reign"] += 1
        self._scheduler, self._inside = scheduler, _Inside(scheduler)
        self._reign = reign
        self._highest_term = 0
        self._latest: dict[tuple[RequestId, int, int], int] = {}  # task -> number of its latest attempt
        self._live: dict[RequestId, int] = {}  # admitted, without an outcome -> its number among arrivals
        self._again: set[RequestId] = set()  # of these, whose earlier outcome is about to be seen: both were noted together
        self._programs: dict[tuple[RequestId, int], str] = {}  # of each generation that was dispatched
        self._seen: set[RequestId] = set()
        self._early_cancels: set[RequestId] = set()
        self._deadlines: dict[RequestId, float] = {}
        self._outcomes: dict[RequestId, ev.Answer | ev.Fail] = {}
        self._cancelled: set[RequestId] = set()
        self._remembered: dict[RequestId, float] = {}  # until when
        self._called_off: dict[WorkerId, set[AttemptId]] = {}
        self._first_class: dict[RequestId, str] = {}
        self._verdicts: dict[WorkerId, Verdict] = {}
        self._listed: dict[WorkerId, int] = {}  # how many attempts its last hello named
        self._deaths: dict[RequestId, int] = {}  # of workers, while they ran it
        self._late = 0
        self._ready: dict[str, ev.VersionKey] = {}  # of each deployment, what became ready last
        self._epochs: dict[ev.VersionKey, int] = {}
        self._told: dict[RequestId, dict[int, dict[_Telling, set[WorkerId]]]] = {}  # what has come of each stage, and from whom

    # ── before and after each fact ───────────────────────────────────────────────────────────────────────────────────

    def notes(self, event: ev.Event, now: float) -> None:
        """It is about to be noted."""
        assert self._scheduler is not None
        match event:
            case ev.StageFinished(worker_id=worker_id, attempt=attempt):
                self._late = self._scheduler.counters["late_answers"]
                telling = (attempt.generation, self._scheduler.roster.member(worker_id).numeric_class, tuple(event.output.leaves))
                self._told.setdefault(attempt.request, {}).setdefault(attempt.stage, {}).setdefault(telling, set()).add(worker_id)
                request = self._inside.request(attempt.request)
                if request is not None and request.accused and self._inside.is_wanted(attempt, worker_id):
                    self.counters["model raised on other workers only"] += 1
            case ev.RequestArrived(request_id=request_id):
                if request_id in self._early_cancels:
                    self.counters["cancel overtook its request"] += 1
                ended = self._inside.ended(request_id)
                is_dropped = ended is not None and ended.outcome is None and not ended.is_final
                if is_dropped:
                    self.counters["kept result dropped"] += 1
                    self._outcomes.pop(request_id, None)
                    self._remembered.pop(request_id, None)
                if request_id in self._seen:
                    self.counters["request came again"] += 1
                self._seen.add(request_id)
            case ev.RequestCancelled(request_id=request_id):
                if request_id not in self._seen:
                    self._early_cancels.add(request_id)
            case ev.WorkerJoined(worker_id=worker_id):
                member = self._scheduler.roster.get(worker_id)
                if member is not None and set(member.slots) - event.held - event.finished:
                    self.counters["unlisted attempt at hello"] += 1
                self._called_off.pop(worker_id, None)
                self._listed[worker_id] = len(event.held | event.finished)
                for attempt in event.held | event.finished:
                    request = self._inside.request(attempt.request)
                    if request is not None and worker_id in request.deaths and self._inside.is_wanted(attempt, worker_id):
                        self.counters["death retracted"] += 1
            case ev.DispatchRefused():
                self.counters["dispatch refused"] += 1
            case ev.WorkerDraining(handed_back=handed_back) if handed_back:
                self.counters["task handed back"] += 1

    def noted(self, event: ev.Event, now: float) -> None:
        """It was noted, and nothing decided on it yet."""
        assert self._scheduler is not None
        match event:
            case ev.StageFinished(attempt=attempt):
                if self._scheduler.counters["late_answers"] > self._late:
                    self.counters["late answer dropped"] += 1
                elif attempt.attempt < self._latest.get(attempt[:3], 0):
                    self.counters["late answer accepted"] += 1
            case ev.RequestArrived(request_id=request_id):
                self._request_noted(request_id, now)
            case ev.RequestCancelled(request_id=request_id):
                self._decided(request_id, self._deadlines.get(request_id, now) + REMEMBER_S)
            case ev.OutcomeAcknowledged(request_id=request_id):
                if request_id in self._outcomes and request_id not in self._cancelled:
                    self._remembered[request_id] = now + REMEMBER_S
                    self._cancelled.add(request_id)
            case ev.ClientLeft(client_id=client_id):
                for request_id in [request_id for request_id in self._deadlines if request_id.client == client_id]:
                    self._decided(request_id, self._deadlines[request_id] + REMEMBER_S)
            case ev.WorkerJoined():
                self._hello_noted(event)

    def _decided(self, request_id: RequestId, remembered_until: float) -> None:
        """Its client waits for it no more."""
        if request_id not in self._cancelled and self._inside.request(request_id) is None:
            self._live.pop(request_id, None)
            self._cancelled.add(request_id)
            self._remembered[request_id] = remembered_until

    def _request_noted(self, request_id: RequestId, now: float) -> None:
        request = self._inside.request(request_id)
        if request is None or self._live.get(request_id) == request.arrival:
            return
        if request_id in self._live:
            self._again.add(request_id)
        if now < self._remembered.get(request_id, now):
            raise Violation("it has ended, its id should be known, and it runs again", request_id)
        self._outcomes.pop(request_id, None)
        self._cancelled.discard(request_id)
        self._deadlines[request_id] = request.deadline
        self._live[request_id] = request.arrival

    def _hello_noted(self, event: ev.WorkerJoined) -> None:
        """The two sides agree on what the worker holds."""
        assert self._scheduler is not None
        slots = set(self._scheduler.roster.member(event.worker_id).slots)
        if not event.held <= slots <= event.held | event.finished:
            raise Violation(f"after the hello of {event.worker_id} it holds {sorted(event.held)}, and is thought to hold {sorted(slots)}")
        for attempt in event.held:
            if self._inside.is_wanted(attempt, event.worker_id):
                self.counters["reconciled attempt"] += 1

    # ── each action ──────────────────────────────────────────────────────────────────────────────────────────────────

    def decides(self, actions: Sequence[ev.Action]) -> None:
        """All of them have been decided, and none is done yet."""
        self._given_up = {(action.worker_id, action.artifact) for action in actions if isinstance(action, ev.Unload)}
        self._replanned = {action.version.key for action in actions if isinstance(action, ev.PlanChanged)}

    def acts(self, action: ev.Action, now: float) -> None:
        match action:
            case ev.Unload(worker_id=worker_id, artifact=artifact):
                self._given_up.discard((worker_id, artifact))
            case ev.Dispatch():
                self._dispatches(action)
            case ev.Cancel(worker_id=worker_id, attempt=attempt):
                self._called_off.setdefault(worker_id, set()).add(attempt)
            case ev.Answer() | ev.Fail():
                self._ends(action, now)
            case ev.Accept(request_id=request_id):
                if self._inside.request(request_id) is None and self._inside.ended(request_id) is None:
                    raise Violation("it is accepted, and lives not", request_id)
            case ev.Evict():
                self.counters["eviction"] += 1
            case ev.PlanChanged(version=version):
                self._epochs[version.key] = version.plan.epoch
            case ev.VersionReady(version=version):
                self._version_ready(version)
            case ev.JudgeCanary():
                self.counters["canary judged"] += 1
            case ev.VersionFailed(error=error):
                self.counters["version failed"] += 1
                self.counters["version failed on a canary"] += isinstance(error, CanaryError)
            case ev.VersionReleased():
                self.counters["version released"] += 1

    def _version_ready(self, version: ev.Version) -> None:
        if version.cut:
            self.counters["version cut anew"] += 1
        elif version.number > 1:
            self.counters["version switched"] += 1
        before = self._ready.get(version.deployment)
        if before is not None and before[:2] == version.key[:2] and self._epochs[before] >= version.plan.epoch:
            raise Violation(f"{version.key} is ready under epoch {version.plan.epoch}, and the cut before it had {self._epochs[before]}")
        self._ready[version.deployment] = version.key
        self._epochs[version.key] = version.plan.epoch

    def _dispatches(self, action: ev.Dispatch) -> None:
        assert self._scheduler is not None
        attempt = action.attempt
        request_id = attempt.request
        request = self._inside.request(request_id)
        if request is None:
            raise Violation("it has ended, and is dispatched", request_id)
        member = self._scheduler.roster.member(action.worker_id)
        is_there = action.artifact in member.resident or (action.worker_id, action.artifact) in self._given_up
        if not member.is_ready or not is_there:
            raise Violation(f"{action.worker_id} is {member.verdict}, and is sent {attempt}", request_id)
        if len(member.slots) > max(member.credit, self._listed.get(action.worker_id, 0)):
            raise Violation(f"{action.worker_id} has a credit of {member.credit}, and {len(member.slots)} slots taken", request_id)
        if action.artifact != request.version.plan.stages[attempt.stage].artifact:
            raise Violation("it is sent to a stage of another version", request_id)
        if self._programs.setdefault((request_id, attempt.generation), request.version.program) != request.version.program:
            raise Violation("its version has changed", request_id)
        if attempt.stage > 0 and not request.unverified and request.run is None:
            self._goes_on(request_id, attempt.stage - 1, action.input)
        if attempt.attempt > 1:
            self._tries_again(request, action)
        self._latest[attempt[:3]] = attempt.attempt
        if request.exact and attempt.stage == 0:
            first = self._first_class.setdefault(request_id, member.numeric_class)
            if first != member.numeric_class:
                self.counters["numeric re-pin"] += 1
                self._first_class[request_id] = member.numeric_class

    def _goes_on(self, request_id: RequestId, stage: int, output: ev.Activation) -> None:
        """With what a stage has come to. Where everything is verified, two workers of one class have to have come to it."""
        assert self._scheduler is not None
        if self._scheduler.settings.verify_share < 1.0:
            return
        tellings = self._told.get(request_id, {}).get(stage, {})
        if not any(len(workers) > 1 and leaves == tuple(output.leaves) for (_, _, leaves), workers in tellings.items()):
            raise Violation(f"what stage {stage} came to was to be verified, is said to be, and is not", request_id)

    def _tries_again(self, request: Request, action: ev.Dispatch) -> None:
        assert self._scheduler is not None
        worker_id = action.worker_id
        if worker_id != request.issued[action.attempt.attempt - 1]:
            self.counters["retry elsewhere"] += 1
        busy = {attempt.worker_id for number, attempt in request.attempts.items() if number != action.attempt.attempt}
        if worker_id in busy:
            raise Violation(f"{worker_id} has it already", request.request_id)
        if worker_id not in request.failed_on or request.version.key in self._replanned:
            return
        for other in self._inside.places(request):
            member = self._scheduler.roster.get(other)
            if member is None or not member.is_ready or action.artifact not in member.resident:
                continue
            is_suited = not request.numeric_class or member.numeric_class == request.numeric_class
            run = request.run if request.deviants else None  # of its output it has to be told whether it is right
            can_tell = run is None or run.trial.is_comparable(run, request.numeric_classes | {member.numeric_class})
            if other not in busy and other not in request.failed_on and is_suited and can_tell:
                raise Violation(f"it failed on {worker_id}, is tried there again, and {other} could run it", request.request_id)

    def _ends(self, action: ev.Answer | ev.Fail, now: float) -> None:
        request_id = action.request_id
        before = self._outcomes.get(request_id)
        is_forgotten = request_id not in self._live and now >= self._remembered.get(request_id, now)
        if before is not None and not is_forgotten:
            if before is action:
                self.counters["answered from the table"] += 1
                return
            raise Violation("it has a second outcome", request_id)
        if request_id in self._cancelled and request_id in self._deadlines and not is_forgotten:
            raise Violation("it was cancelled, and has an outcome", request_id)
        if request_id not in self._live:
            self.counters["refused at the door"] += 1
            return
        if request_id in self._again:
            self._again.remove(request_id)
            return
        del self._live[request_id]
        self._outcomes[request_id] = action
        self._remembered[request_id] = self._deadlines[request_id] + REMEMBER_S
        if isinstance(action, ev.Answer):
            if action.unverified:
                self.unverified.add(request_id)
            else:
                self._goes_on(request_id, max(self._told.get(request_id, {}), default=0), action.output)
        if isinstance(action, ev.Fail):
            if isinstance(action.error, OverloadedError):
                raise Violation("it was let in, and refused later", request_id)
            self.counters[f"ended in {action.error.code}"] += 1

    # ── each turn of the loop ────────────────────────────────────────────────────────────────────────────────────────

    def ticked(self, now: float) -> None:
        """What was due is done."""
        assert self._scheduler is not None
        again = self._scheduler.next_wakeup()
        if again is not None and again <= now:
            raise Violation(f"after the tick at {now} the next is due at {again}: the loop would spin")
        unread: set[str] | None = None
        for member in self._scheduler.roster:
            before = self._verdicts.get(member.worker_id, Verdict.LOST)
            if before is not member.verdict and member.verdict is not Verdict.READY:
                unread = self.unread() if unread is None else unread
                if member.worker_id in unread:
                    raise Violation(f"{member.worker_id} is {member.verdict}, and what it has said was not read")

    def turned(self, now: float) -> None:
        """All that has come was noted, what was due is done, and everything decided."""
        self._turns += 1
        self._look_at_requests(now)
        self._look_at_members(now)
        term = self._reign.term
        if term < self._highest_term:
            raise Violation(f"the term fell from {self._highest_term} to {term}")
        self._highest_term = term

    def _look_at_requests(self, now: float) -> None:
        assert self._scheduler is not None
        inside, roster = self._inside, self._scheduler.roster
        retained_bytes = count = 0
        looks_at_queues = self._turns % LOOK_AT_QUEUES_EVERY == 0
        for request in inside.requests():
            request_id = request.request_id
            count += 1
            retained_bytes += request.activation.size_bytes
            if request.check is not None and request.check.answers:
                retained_bytes += request.check.held_bytes
                self._look_at_check(request_id, request.check, now)
            if len(request.deaths) > self._deaths.get(request_id, 0):
                self.counters["death while it ran"] += 1
            if request.deaths or request_id in self._deaths:
                self._deaths[request_id] = len(request.deaths)
            is_waited_for = has_alarm = False
            for number, attempt in request.attempts.items():
                attempt_id = request.attempt_id(number)
                member = roster.get(attempt.worker_id)
                if member is None or attempt_id not in member.slots:
                    raise Violation(f"attempt {number} is in flight, and has no slot", request_id)
                if not attempt.is_expired:
                    is_waited_for = True
                    has_alarm = has_alarm or inside.is_due("attempt", attempt_id)
            if request.ticket and is_waited_for:
                raise Violation("it is queued and waited for", request_id)
            if not (request.ticket or is_waited_for or inside.is_due("retry", request_id)):
                raise Violation("it waits for nothing", request_id)
            if is_waited_for and not has_alarm:
                raise Violation("an attempt is waited for, and nothing will end the waiting", request_id)
            if request.deadline <= now or not inside.is_due("deadline", request_id):
                raise Violation("its deadline will not end it", request_id)
            if looks_at_queues and request.ticket:
                eligible = inside.eligible(request, now)
                if eligible and all(member.has_room and member.qos.breaker(now) is Breaker.CLOSED for member in eligible):
                    raise Violation("it waits, though everybody who may run it has room", request_id)
        if retained_bytes > self._scheduler.reserved_bytes or count != inside.admitted():
            raise Violation(
                f"{retained_bytes} bytes are retained by {count}, {self._scheduler.reserved_bytes} reserved by {inside.admitted()}"
            )

    def _look_at_check(self, request_id: RequestId, check: Check, now: float) -> None:
        if check.agreed is not None:
            raise Violation("two have come to the same, and it does not go on", request_id)
        if not check.is_split and (check.take_at <= now or not self._inside.is_due("verify", request_id)):
            raise Violation("an answer is held, and nothing will end that", request_id)

    def _look_at_members(self, now: float) -> None:
        assert self._scheduler is not None
        for member in self._scheduler.roster:
            worker_id, verdict = member.worker_id, member.verdict
            if self._turns % LOOK_AT_QUEUES_EVERY == 0 and (uncounted := self._inside.uncounted(member)):
                raise Violation(f"{worker_id} has {sorted(uncounted)}, and no plan wants it there")
            if member.slots:
                self._look_at_slots(member)
            elif member.qos.breaker(now) is Breaker.HALF_OPEN and not member.qos.takes(now):
                raise Violation(f"{worker_id} is tried out with one task, and holds none")
            before = self._verdicts.get(worker_id)
            if before is not verdict:
                self._verdicts[worker_id] = verdict
                if before is Verdict.SUSPECT and verdict is Verdict.READY:
                    self.counters["suspect and back"] += 1

    def _look_at_slots(self, member: Member) -> None:
        if member.verdict is Verdict.LOST:
            raise Violation(f"{member.worker_id} is lost, and holds something")
        if len(member.slots) > max(member.credit, self._listed.get(member.worker_id, 0)):
            raise Violation(f"{member.worker_id} has a credit of {member.credit}, and {len(member.slots)} slots taken")
        called_off = self._called_off.get(member.worker_id, ())
        for attempt in member.slots:
            if attempt in called_off:
                continue
            request = self._inside.request(attempt.request)
            if request is None or not request.is_current(attempt) or attempt.attempt not in request.attempts:
                raise Violation(f"{attempt} on {member.worker_id} is for nobody, and was not called off", attempt.request)

    # ── the end ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def rare_paths(self) -> Counter[str]:
        """Everything that was counted."""
        return self.counters + self._earlier + self._counted()

    def _counted(self) -> Counter[str]:
        if self._scheduler is None:
            return Counter()
        counted = Counter({name.replace("_", " "): count for name, count in self._scheduler.counters.items()})
        return counted + Counter(self._inside.residency_counters())
