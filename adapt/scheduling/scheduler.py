"""The one state machine of the dispatcher: events and `now` in, actions out. It knows no socket, no clock, no torch.

The life of a request:

    arrived ──admitted──▶ queued ──dispatched──▶ in flight ──answered──▶ queued for the next stage ... ──last stage──▶ ended
       │                    ▲                        │
       └─refused            └── lost, failed, timed out while another worker can run it

Rules that the rest follows from:

* A timeout ends the waiting, not the slot. A slot is free when the worker says so, or when its session ends.
* The first valid answer of any attempt of the current stage wins; every later one is counted and dropped.
* A loss (session ended, attempt not listed in the hello) costs the request nothing and is dispatched again at once.
* A failure is tried elsewhere; on the same worker only if no other can run the stage and the earlier attempt has ended (of a canary that
  came out wrong: no other that can tell whether it is right, see canaries.py). It costs a token, which delays it if there is none, and its
  worker a penalty (see qos.py) if that is to blame.
* A task that was drawn to be verified goes on when two workers have come to the same, or nobody is left who could tell (see verification.py).
* A request in whose hands workers die that otherwise succeed is not tried for ever: three deaths are its own doing. Where several may have
  been the cause, each is tried again with nothing behind it, so that another death speaks against one alone.
* Later stages first, then the earlier deadline, then the earlier arrival.
* The plan's own workers run a stage; if none of them can, any worker with memory for it, after loading.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from itertools import islice
from operator import attrgetter
from random import Random
from typing import TypeAlias

from adapt.errors import (
    AdaptError,
    AttemptTimeoutError,
    CanaryError,
    DeadlineExceededError,
    DisagreementError,
    ModelError,
    OverloadedError,
    PoisonError,
    StageNotResidentError,
    WireError,
    WorkerLostError,
)
from adapt.planning.placement import WorkerOffer
from adapt.protocol.ids import AttemptId, ClientId, Digest, RequestId, WorkerId
from adapt.protocol.messages import Leaf
from adapt.scheduling import events as ev
from adapt.scheduling.admission import Admission, AdmissionLimits
from adapt.scheduling.canaries import BUDGET_S, OWN_CLIENT, Run
from adapt.scheduling.choice import Choice
from adapt.scheduling.deadlines import Deadlines, earliest
from adapt.scheduling.liveness import Liveness, Verdict
from adapt.scheduling.policies import POLICIES
from adapt.scheduling.qos import Breaker
from adapt.scheduling.queues import Entry, StageKey, StageQueues
from adapt.scheduling.requests import POISONED, Attempt, Ended, EndedRequests, Request
from adapt.scheduling.residency import REFUSED_S, SPARELESS_S, Residency
from adapt.scheduling.roster import Member, Roster, Slot
from adapt.scheduling.settings import SchedulerSettings
from adapt.scheduling.suspicion import Isolation, suspects
from adapt.scheduling.tokens import RetryTokens
from adapt.scheduling.verification import Check, Told, is_drawn
from adapt.scheduling.versions import LiveVersion

STORY_LENGTH = 200
ACCEPT_S = 0.5  # a request that was answered sooner is not accepted besides; less than a client's patience
REMEMBER_S = 5.0  # how long a request's id is remembered, beyond its deadline or the acknowledgement of its answer
EARLY_CANCEL_S = 120.0  # how long a cancel that has overtaken its request is remembered
MEMBER_MEMORY_S = 600.0  # how long a lost worker is shown
CENSORED = 2.0  # an attempt that was given up is learned from as if it had taken so many times as long
PATIENCE = 2.0  # times what is usual, before another worker is asked
MOST_HEDGES = 10.0  # at once, after a time without any
WORTH_S = 0.01  # a better worker is waited for if that saves more than this
RESERVE = 2.0  # times what the stages that follow should take: so much time is left to them when an answer is to be verified
RESERVE_SHARE = 0.1  # of a request's budget: the least that is
LOOK_AGAIN_S = 0.01  # the least pause before looking whether a busy worker is still worth waiting for


# What can fall due, as a key of the deadline heap: "deadline", "attempt", "hedge", "retry", "forget", "client", "member", "load", "look",
# "breaker", "cooldown", "room", "verify" or "relief", and of whom.
_Due: TypeAlias = tuple[str, RequestId | AttemptId | ClientId | WorkerId]


_RELIEF: _Due = ("relief", WorkerId(""))
_NOTHING = ev.Activation((), ())


class Scheduler:
    """See the head of this file. `now`: seconds, monotonic, never going back.

    Args:
        generation: each start of a request gets the next one. A random one for each reign: an answer to an earlier start, or in an
            earlier reign, which a worker may still have, must not be taken for one to the attempt that has its number now.
    """

    def __init__(self, settings: SchedulerSettings | None = None, *, random: Random | None = None, generation: int = 0) -> None:
        self.settings = settings or SchedulerSettings()
        self._generation = generation
        self.counters: Counter[str] = Counter()
        self.story: deque[tuple[float, str, object]] = deque(maxlen=STORY_LENGTH)
        self.roster = Roster(self.settings.qos)
        self._tokens, self._hedges = RetryTokens(self.settings.tokens), 0.0  # hedges that may be made now
        self._liveness = Liveness(silence_s=self.settings.silence_s, grace_s=self.settings.grace_s)
        limits = AdmissionLimits(max_requests=self.settings.max_requests, max_retained_bytes=self.settings.max_retained_bytes)
        self._admission = Admission(limits, random=random or Random(0))
        self._requests: dict[RequestId, Request] = {}
        self._ended = EndedRequests(max_kept_bytes=self.settings.max_kept_bytes)
        self._queues = StageQueues()
        self._due: Deadlines[_Due] = Deadlines()
        self._unaccepted: deque[tuple[float, Request]] = deque()  # until when they may be answered without an acceptance, in that order
        self._acknowledged: deque[tuple[float, RequestId]] = deque()  # until when they are remembered, in that order
        self._arrivals = 0
        self._is_draining = False
        self._actions: list[ev.Action] = []
        self._residency = Residency(
            self.roster,
            self._actions,
            woken=self._queues.wake_all,
            load_timeout_s=self.settings.load_timeout_s,
            spares=self.settings.spares,
        )
        self._isolation = Isolation()
        self._choice = Choice(self.roster, self._residency, POLICIES[self.settings.policy])

    # ── the doors ────────────────────────────────────────────────────────────────────────────────────────────────────

    def handle(self, event: ev.Event, now: float) -> list[ev.Action]:
        """Take note of one fact, and decide."""
        self.note(event, now)
        return self.decide(now)

    def note(self, event: ev.Event, now: float) -> None:
        """Take note of one fact; `decide` has to follow before the next `tick`, and may follow many."""
        self.story.append((now, type(event).__name__, _subject(event)))
        self._note(event, now)

    def decide(self, now: float) -> list[ev.Action]:
        """What follows from all that was noted since."""
        if self._residency.has_trials_to_tend:
            self._tend_trials(now)
        if self._residency.has_spares_to_tend:
            self._residency.tend_spares(now)
        self._pump(now)
        actions = self._actions.copy()
        self._actions.clear()
        return actions

    def excuse(self, by_s: float) -> None:
        """The dispatcher itself stood still: workers and their attempts have so much longer. Requests have not."""
        self._liveness.excuse(by_s)
        self._due.postpone(by_s, concerns=lambda due: due[0] == "attempt")

    def tick(self, now: float) -> list[ev.Action]:
        """Do what has fallen due."""
        for worker_id in self._liveness.tick(now):
            self._verdict_changed(self.roster.member(worker_id), now)
        for worker_id, artifact in self._residency.tick(now):
            error = AttemptTimeoutError(worker_id, timeout_s=self.settings.load_timeout_s)
            self._load_failed(self.roster.member(worker_id), artifact, error, now)
        for due in self._due.take_due(now):
            self._fell_due(due, now)
        self._accept_slow(now)
        self._forget_acknowledged(now)
        return self.decide(now)

    def _fell_due(self, due: _Due, now: float) -> None:
        match due:
            case "deadline", RequestId() as request_id:
                self._deadline_passed(request_id, now)
            case "attempt", AttemptId() as attempt:
                self._attempt_timed_out(attempt, now)
            case "hedge", AttemptId() as attempt:
                self._hedge(attempt, now)
            case "forget", RequestId() as request_id:
                self._ended.forget(request_id)
            case "client", bytes() as client_id:
                self._client_gone(ClientId(client_id), now)
            case "member", str() as worker_id:
                self._liveness.forget(WorkerId(worker_id))
                self.roster.forget(WorkerId(worker_id))
            case "retry", RequestId() as request_id:
                self._retry(request_id, now)
            case "verify", RequestId() as request_id:
                if (request := self._requests.get(request_id)) is not None and request.is_answered:
                    self._weigh(request, now)
            case "load", str():
                self._residency.has_spares_to_tend = True
                self._queues.wake_all()
            case "room", str():
                self._residency.has_spares_to_tend = True
            case "relief", _:
                self._relieve(now)
            case "cooldown", str() as worker_id:
                rested = self.roster.member(WorkerId(worker_id))
                rested.is_resting = False
                self._wake(rested)
            case (("look" | "breaker"), str() as worker_id):
                if (member := self.roster.get(WorkerId(worker_id))) is not None:
                    self._wake(member)

    def next_wakeup(self) -> float | None:
        """The moment of the next `tick`; after `tick(now)` it is later than `now`."""
        return earliest(self._liveness.next_wakeup(), self._residency.next_wakeup(), self._due.next_wakeup(), self._first_unaccepted())

    def offers(self, *, with_copies: bool = False) -> list[WorkerOffer]:
        """What the workers that are ready have to give; `with_copies`: if copies of stages that others have too gave way, as they do."""
        offer = self._residency.copies.offer if with_copies else self._residency.offer
        return [offer(member) for member in self.roster if member.is_ready]

    def work_of(self, attempt: AttemptId, worker_id: WorkerId) -> tuple[Digest, Sequence[Leaf]] | None:
        """The stage of an attempt and the input that it was given; None if its answer comes too late to be used."""
        request = self._wanted(attempt, worker_id)
        return None if request is None else (request.need.artifact, request.activation.leaves)

    @property
    def live_requests(self) -> int:
        return len(self._requests)

    def oldest(self, count: int) -> list[Request]:
        """Of the requests that live, those that came first."""
        return list(islice(self._requests.values(), count))

    @property
    def reserved_bytes(self) -> int:
        return self._admission.reserved_bytes

    @property
    def kept_bytes(self) -> int:
        return self._ended.kept_bytes

    @property
    def unacknowledged(self) -> int:
        """Outcomes that their clients have not acknowledged yet."""
        return self._ended.kept

    def moves(self) -> dict[str, int]:
        """What has been done about stages since the start of the reign."""
        residency = self._residency
        return {
            "stages_moved": residency.stages_moved,
            "stages_copied": residency.stages_copied,
            "copies_dropped": residency.copies_dropped,
            "versions_recut": residency.versions_recut,
            "spares_used": residency.spares_used,
            "spares_dropped": residency.spares_dropped,
        }

    def versions(self) -> Iterator[tuple[ev.Version, bool]]:
        """Every version that takes requests, and whether all its stages are resident somewhere."""
        for live in self._residency.current():
            yield live.version, live.is_ready

    # ── events ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _note(self, event: ev.Event, now: float) -> None:
        match event:
            case ev.WorkerHeard():
                self._heard(event, now)
            case ev.StageFinished():
                self._stage_finished(event, now)
            case ev.StageBegun():
                self._stage_begun(event, now)
            case ev.RequestArrived():
                self._request_arrived(event, now)
            case ev.OutcomeAcknowledged():
                self._outcome_acknowledged(event.request_id, now)
            case ev.RequestCancelled():
                self._request_cancelled(event.request_id, now)
            case ev.AttemptFailed():
                self._attempt_failed(event, now)
            case ev.AttemptCancelled():
                self._attempt_cancelled(event, now)
            case ev.DispatchRefused():
                self._dispatch_refused(event, now)
            case ev.StageResident():
                self._residency.resident(self.roster.member(event.worker_id), event.artifact)
            case ev.LoadProgressed():
                self._residency.progressed(self.roster.member(event.worker_id), event.artifact, now)
            case ev.StageRefused():
                self._load_failed(self.roster.member(event.worker_id), event.artifact, event.error, now)
            case _:
                self._note_membership(event, now)

    def _note_membership(self, event: ev.Event, now: float) -> None:
        match event:
            case ev.WorkerExpected():
                self.roster.member(event.worker_id)
                self._liveness.expected(event.worker_id, now)
            case ev.WorkerJoined():
                self._worker_joined(event, now)
            case ev.WorkerDisconnected():
                self._liveness.disconnected(event.worker_id, now)
                self._session_ended(event.worker_id, event.reason, now, is_intended=event.is_intended)
            case ev.LeaseEnded():
                self._liveness.lease_ended(event.worker_id)
                self._verdict_changed(self.roster.member(event.worker_id), now)
            case ev.LeaseRenewed():
                self._liveness.lease_renewed(event.worker_id)
                self._verdict_changed(self.roster.member(event.worker_id), now)
            case ev.WorkerDraining():
                self._worker_draining(event, now)
            case ev.RoomWanted():
                self._residency.without_spares(event.worker_id, now)
                self._due.set(("room", event.worker_id), now + SPARELESS_S)
            case ev.WorkerLeft():
                self._worker_left(event.worker_id, now)
            case ev.ClientArrived():
                self._due.clear(("client", event.client_id))
            case ev.ClientDisconnected():
                self._due.set(("client", event.client_id), now + self.settings.client_grace_s)
            case ev.ClientLeft():
                self._due.clear(("client", event.client_id))
                self._client_gone(event.client_id, now)
            case ev.VersionDeployed():
                self._residency.deploy(event.version, now, is_restored=event.is_restored, canaries=event.canaries)
            case ev.VersionWithdrawn():
                self._residency.withdraw((event.deployment, event.number, event.cut))
            case ev.CanaryJudged():
                self._canary_judged(event)
            case ev.Undeployed():
                self._residency.undeploy(event.deployment)
            case ev.DrainBegun():
                self._is_draining = True
            case _:
                raise AssertionError(f"unknown event {event!r}")

    # ── requests arrive and end ──────────────────────────────────────────────────────────────────────────────────────

    def _request_arrived(self, event: ev.RequestArrived, now: float) -> None:
        if (ended := self._ended.get(event.request_id)) is not None and not self._must_run_again(ended, event):
            return
        if (live := self._requests.get(event.request_id)) is not None:
            if live.fingerprint == event.fingerprint:
                self._accept(live)
            else:
                self._actions.append(ev.Fail(request_id=event.request_id, error=_id_used_twice(event.request_id)))
            return
        try:
            self._admit(event, now)
        except AdaptError as error:
            self.counters["requests_refused"] += 1
            self._actions.append(ev.Fail(request_id=event.request_id, error=error))

    def _must_run_again(self, ended: Ended, event: ev.RequestArrived) -> bool:
        """Answer a request that has ended already from what is kept; True if nothing is kept that its client still wants."""
        self.counters["duplicate_requests"] += 1
        if ended.is_final:
            return False
        if ended.fingerprint != event.fingerprint:
            self._actions.append(ev.Fail(request_id=event.request_id, error=_id_used_twice(event.request_id)))
            return False
        if ended.outcome is None:
            return True
        self._actions.append(ended.outcome)
        return False

    def _admit(self, event: ev.RequestArrived, now: float) -> None:
        live = self._residency.find(event.deployment, event.version, event.program, event.interface)
        if self._is_draining:
            raise OverloadedError("the dispatcher is draining", retry_after_s=1.0)
        if event.budget_s <= 0.0:
            raise DeadlineExceededError(event.budget_s)
        version = live.version
        is_exact = event.exact or version.exact
        peak_bytes = int(event.input.size_bytes * (max(version.peak_ratio, 1.0) + is_exact))  # an exact one keeps its input
        self._admission.admit(event.request_id, peak_bytes, predicted_wait_s=lambda: self._predicted_wait_s(live))
        budget_s = min(event.budget_s, self.settings.max_budget_s)
        self._arrivals += 1
        request = Request(
            request_id=event.request_id,
            version=version,
            fingerprint=event.fingerprint,
            exact=is_exact,
            deadline=now + budget_s,
            budget_s=budget_s,
            arrival=self._arrivals,
            activation=event.input,
            generation=self._generation + self._arrivals,
        )
        self._ended.forget(event.request_id)
        self._due.clear(("forget", event.request_id))
        self._requests[event.request_id] = request
        self._due.set(("deadline", event.request_id), request.deadline)
        if _RELIEF not in self._due:
            self._due.set(_RELIEF, now + self.settings.relief_s)
        self._residency.request_began(live)
        self.counters["requests_accepted"] += 1
        self._tokens.earn()
        self._unaccepted.append((now + ACCEPT_S, request))
        self._enqueue(request)

    def _first_unaccepted(self) -> float | None:
        """When the first request that lives and was not accepted yet has to be."""
        waiting = self._unaccepted
        while waiting and self._requests.get(waiting[0][1].request_id) is not waiting[0][1]:
            waiting.popleft()
        return waiting[0][0] if waiting else None

    def _accept_slow(self, now: float) -> None:
        """An answer that comes soon says all that an acceptance would. When one has to be said, those that follow soon go with it."""
        if (due := self._first_unaccepted()) is None or due > now:
            return
        while (moment := self._first_unaccepted()) is not None and moment <= now + ACCEPT_S / 2:
            self._accept(self._unaccepted.popleft()[1])

    def _outcome_acknowledged(self, request_id: RequestId, now: float) -> None:
        """Its client asks no more: what it has sent before can still come, and only that has to be known again."""
        ended = self._ended.get(request_id)
        if ended is not None and not ended.is_final:
            self._ended.bury(request_id)
            self._due.clear(("forget", request_id))
            self._acknowledged.append((now + REMEMBER_S, request_id))
        self._forget_acknowledged(now)

    def _forget_acknowledged(self, now: float) -> None:
        while self._acknowledged and self._acknowledged[0][0] <= now:
            self._ended.forget(self._acknowledged.popleft()[1])

    def _predicted_wait_s(self, live: LiveVersion) -> float:
        return live.requests * max(need.cost_s / max(len(at), 1) for need, at in zip(live.plan.stages, live.plan.places, strict=True))

    def _accept(self, request: Request) -> None:
        version = request.version
        accept = ev.Accept(request_id=request.request_id, deployment=version.deployment, version=version.number, program=version.program)
        self._actions.append(accept)

    def _end(self, request: Request, outcome: ev.Answer | ev.Fail, now: float) -> None:
        """The request's one outcome."""
        self._release(request, now)
        if request.run is not None:
            self._run_ended(request, request.run, outcome)
            return
        self._ended.keep(request.request_id, request.fingerprint, outcome)
        self._actions.append(outcome)
        self.counters["requests_ok" if isinstance(outcome, ev.Answer) else "requests_failed"] += 1

    def _count(self, name: str, request: Request) -> None:
        """What becomes of clients' requests. A canary is no client's."""
        self.counters[name] += request.run is None

    def _fail(self, request: Request, error: AdaptError, now: float) -> None:
        self._end(request, ev.Fail(request_id=request.request_id, error=error), now)

    def _release(self, request: Request, now: float) -> None:
        """Stop all work for a request and remember its id for a while."""
        del self._requests[request.request_id]
        self._unqueue(request)
        request.activation, request.input = _NOTHING, None  # its place in a queue may outlive it; the bytes are reserved no more
        self._due.clear(("deadline", request.request_id))
        self._due.clear(("retry", request.request_id))
        if request.check is not None:
            self._due.clear(("verify", request.request_id))
            request.check = None
        if request.run is None:
            self._due.set(("forget", request.request_id), max(request.deadline, now) + REMEMBER_S)
        self._admission.release(request.request_id)
        self._call_off(request)
        self._residency.request_ended(request.version)

    def _call_off(self, request: Request) -> None:
        """Cancel every attempt of the current stage that still holds a slot."""
        for number, attempt in request.attempts.items():
            attempt_id = request.attempt_id(number)
            self._due.clear(("attempt", attempt_id))
            member = self.roster.get(attempt.worker_id)
            if member is not None and attempt_id in member.slots:
                self._actions.append(ev.Cancel(worker_id=attempt.worker_id, attempt=attempt_id))

    def _deadline_passed(self, request_id: RequestId, now: float) -> None:
        request = self._requests.get(request_id)
        if request is None:  # it ended at this very moment
            return
        self._count("deadlines_exceeded", request)
        self._fail(request, DeadlineExceededError(request.budget_s, attempts=request.history), now)

    def _request_cancelled(self, request_id: RequestId, now: float) -> None:
        request = self._requests.get(request_id)
        if request is not None and request.run is not None:  # it is nobody's to cancel
            return
        if request is not None:
            self.counters["requests_cancelled"] += 1
            self._release(request, now)
        elif self._ended.get(request_id) is None:  # the cancel has overtaken its request
            self._due.set(("forget", request_id), now + EARLY_CANCEL_S)
        self._ended.bury(request_id)

    def _client_gone(self, client_id: ClientId, now: float) -> None:
        for request_id in [rid for rid in self._requests if rid.client == client_id]:
            self._request_cancelled(request_id, now)

    # ── canaries ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _tend_trials(self, now: float) -> None:
        """Begin what is to be tried, and end what is not any more."""
        for live, run in self._residency.take_runs():
            if not live.is_retired:  # as it may have been since
                self._begin_run(live, run, now)
        for live in self._residency.take_abandoned():
            for request in [request for request in self._requests.values() if request.run is not None and request.run.trial is live.trial]:
                self._release(request, now)

    def _begin_run(self, live: LiveVersion, run: Run, now: float) -> None:
        """A request of our own, which nobody refuses."""
        given, version = live.canaries[run.canary].input, live.version
        self._arrivals += 1
        while RequestId(OWN_CLIENT, self._arrivals) in self._requests:  # a client that calls itself so
            self._arrivals += 1
        request = Request(
            request_id=RequestId(OWN_CLIENT, self._arrivals),
            version=version,
            fingerprint=0,
            exact=version.exact,
            deadline=now + BUDGET_S,
            budget_s=BUDGET_S,
            arrival=self._arrivals,
            activation=given,
            generation=self._generation + self._arrivals,
            run=run,
        )
        self._admission.reserve(request.request_id, int(given.size_bytes * (max(version.peak_ratio, 1.0) + version.exact)))
        self._requests[request.request_id] = request
        self._due.set(("deadline", request.request_id), request.deadline)
        self._residency.request_began(live)
        self.counters["canary_runs"] += 1
        self._enqueue(request)

    def _agrees(self, request: Request, run: Run, member: Member, digest: bytes) -> bool:
        return run.trial.agrees(run, request.stage, request.numeric_classes | {member.numeric_class}, digest)

    def _came_out_wrong(self, request: Request, member: Member, attempt: AttemptId, now: float) -> None:
        """Another worker shall try: what two give, or one of which there is no second, is the version's own output."""
        if request.attempts.pop(attempt.attempt, None) is None:
            return
        assert request.run is not None
        self.counters["wrong_outputs"] += 1
        kind = "another output"
        request.note(member.worker_id, attempt.attempt, kind)
        who = [str(note["worker"]) for note in request.history if isinstance(note, dict) and note["outcome"] == kind]
        stages = len(request.version.plan.stages)
        error = CanaryError(
            f"canary {request.run.canary}: stage {request.stage + 1} of {stages} gives another output than where the model was exported, "
            f"bit for bit, on {' and on '.join(dict.fromkeys(who))}",
            canary=request.run.canary,
            stage=request.stage,
        )
        is_final, request.model_error = kind == request.model_error, kind
        self._failed(request, member, error, now, is_final=is_final)

    def _run_ended(self, request: Request, run: Run, outcome: ev.Answer | ev.Fail) -> None:
        """A canary has come out: right, to be judged, or wrong."""
        live = self._residency.get(request.version.key)
        if live is None:  # given up meanwhile
            return
        if isinstance(outcome, ev.Fail):
            error = outcome.error
            if not isinstance(error, CanaryError):
                error = CanaryError(
                    f"canary {run.canary}: {error.code}: {error}", canary=run.canary, stage=request.stage, is_deviation=False
                )
            self._residency.run_failed(live, error)
        elif run.trial.is_comparable(run, request.numeric_classes):
            self._residency.run_passed(live, run.number)
        else:
            judge = ev.JudgeCanary(
                version=live.version, run=run.number, canary=run.canary, output=outcome.output, numeric_classes=outcome.numeric_classes
            )
            self._actions.append(judge)

    def _canary_judged(self, event: ev.CanaryJudged) -> None:
        live = self._residency.get((event.deployment, event.number, event.cut))
        if live is None:
            return
        if event.error is None:
            self._residency.run_passed(live, event.run)
        else:
            self._residency.run_failed(live, event.error)

    # ── attempts ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _stage_begun(self, event: ev.StageBegun, now: float) -> None:
        """It waits no longer: from now on it has as long as running takes."""
        member = self.roster.member(event.worker_id)
        slot = member.slots.get(event.attempt)
        if slot is None or slot.begun_at is not None:
            return
        slot.begun_at = now
        request = self._wanted(event.attempt, event.worker_id)
        attempt = None if request is None else request.attempts.get(event.attempt.attempt)
        if attempt is not None and not attempt.is_expired and (limits := member.limits_s(slot.artifact, slot.size_bytes, now)) is not None:
            attempt.timeout_s = self._patience_s(limits[1])
            self._due.set(("attempt", event.attempt), now + attempt.timeout_s)
            self._watch(event.attempt, limits[1], now)

    def _stage_finished(self, event: ev.StageFinished, now: float) -> None:
        member = self.roster.member(event.worker_id)
        slot = self._free(member, event.attempt, now)
        request = self._wanted(event.attempt, event.worker_id)
        is_wrong = request is not None and request.run is not None and not self._agrees(request, request.run, member, event.digest)
        if slot is not None:  # an answer that comes too late is learned from too
            member.learn(slot, event.times, now)
            if is_wrong:
                member.qos.returned()
            else:
                member.qos.succeeded(now)
            self._trouble(member, now)
        self._actions.append(ev.Acknowledge(worker_id=event.worker_id, attempt=event.attempt))
        if request is not None and request.run is not None:
            request.run.trial.tried.add((request.stage, member.worker_id))
        if is_wrong and request is not None:
            self._came_out_wrong(request, member, event.attempt, now)
            return
        if request is None:
            self.counters["late_answers"] += 1
        elif request.check is not None:
            self._compare(request, request.check, member, event, now)
        else:
            self._go_on(request, event.output, member.numeric_class, now)

    def _go_on(self, request: Request, output: ev.Activation, numeric_class: str, now: float) -> None:
        """The current stage has come to this: the next one has its turn, or the client its answer."""
        request.numeric_classes.add(numeric_class)
        if request.exact:  # it may have been let go of its class since this attempt was made
            request.numeric_class = numeric_class
        self.counters["tasks_done"] += 1
        self._blame(request, now)
        if request.stage + 1 == len(request.version.plan.stages):
            answer = ev.Answer(
                request_id=request.request_id,
                output=output,
                attempts=request.attempts_made,
                numeric_classes=request.version.classes(request.numeric_classes),
                unverified=request.unverified,
            )
            self._end(request, answer, now)
        else:
            self._call_off(request)
            if request.check is not None:
                self._due.clear(("verify", request.request_id))
            self._set_free(request)
            request.advance(output)
            self._admission.grow(request.request_id, request.retained_bytes)
            self._enqueue(request)

    def _wanted(self, attempt: AttemptId, worker_id: WorkerId) -> Request | None:
        """The request that an answer to `attempt` by this worker can still advance."""
        request = self._requests.get(attempt.request)
        if request is None or not request.is_current(attempt) or request.issued[attempt.attempt] != worker_id:
            return None
        if request.check is not None and worker_id in request.check.answers:  # said again, or by a second attempt of the same worker
            return None
        return request

    def _free(self, member: Member, attempt: AttemptId, now: float) -> Slot | None:
        """Free the attempt's slot; what waits for this worker may go now."""
        self._due.clear(("attempt", attempt))
        self._due.clear(("hedge", attempt))
        self._wake(member)
        slot = member.free(attempt, now)
        if not member.slots:  # however the one task of a half-open breaker has ended, another may be tried
            member.qos.returned()
        return slot

    def _attempt_failed(self, event: ev.AttemptFailed, now: float) -> None:
        member = self.roster.member(event.worker_id)
        self._free(member, event.attempt, now)
        self._actions.append(ev.Acknowledge(worker_id=event.worker_id, attempt=event.attempt))
        request = self._wanted(event.attempt, event.worker_id)
        if request is None or (tried := request.attempts.pop(event.attempt.attempt, None)) is None:
            return
        request.note(event.worker_id, event.attempt.attempt, f"{event.error.code}: {event.error}")
        match event.error:
            case StageNotResidentError() | OverloadedError():  # neutral: our picture of the worker was wrong
                self.counters["neutral_answers"] += 1
                member.qos.returned()
                if isinstance(event.error, StageNotResidentError):
                    self._residency.absent(member, request.need.artifact, now)
                self._again(request, event.error, now, is_check=tried.is_check, is_lost=True)
            case ModelError():  # perhaps this worker was short of memory; the same kind of error twice is the model's own
                kind = str(event.error).partition(":")[0]
                is_final, request.model_error = kind == request.model_error, kind
                self._failed(request, member, event.error, now, is_final=is_final, is_check=tried.is_check)
            case _:
                self._failed(request, member, event.error, now, is_final=not event.error.retryable, is_check=tried.is_check)

    def _failed(self, request: Request, member: Member, error: AdaptError, now: float, *, is_final: bool, is_check: bool = False) -> None:
        """An attempt failed by itself: try elsewhere, or give the error to the client."""
        self._count("attempts_failed", request)
        member.tally.tasks_failed += 1
        request.failed_on.add(member.worker_id)
        if isinstance(error, CanaryError):  # whose doing it was shows when another worker has tried
            request.deviants.add(member.worker_id)
        elif isinstance(error, ModelError):
            request.accused.add(member.worker_id)
        else:
            self._penalize(member, now)
        if is_final and not request.is_answered:
            self._fail(request, error, now)
        else:
            self._again(request, error, now, is_check=is_check)

    def _again(
        self, request: Request, error: AdaptError, now: float, *, is_free: bool = False, is_check: bool = False, is_lost: bool = False
    ) -> None:
        """Queue the current stage once more, unless it has failed too often or another attempt is still waited for."""
        if request.is_answered:  # it was asked only whether that is right
            self._weigh(request, now, is_lost=is_lost)
            return
        request.failures += not (is_free or is_check)
        if request.failures >= self.settings.max_failures:
            self._fail(request, error, now)
        elif is_free:
            self._resume(request, now)
        else:
            self._retry(request.request_id, now)

    def _retry(self, request_id: RequestId, now: float) -> None:
        """Another attempt after a failure: it costs a token, and waits for one if need be."""
        request = self._requests.get(request_id)
        if request is None or request.is_waited_for or request.ticket != 0:
            return
        if request.is_answered:
            self._weigh(request, now)
        elif request.run is not None or self._tokens.take(now):  # tokens are clients'
            self._due.clear(("retry", request_id))
            self._enqueue(request)
        else:
            self.counters["retries_delayed"] += 1
            self._due.set(("retry", request_id), self._tokens.next_at(now))

    def _resume(self, request: Request, now: float) -> None:
        """Queue the current stage at once, unless an attempt is waited for or it is queued already."""
        if request.is_answered:
            self._weigh(request, now, is_lost=True)
        elif not request.is_waited_for and request.ticket == 0:
            self._due.clear(("retry", request.request_id))
            self._enqueue(request)

    def _penalize(self, member: Member, now: float) -> None:
        """A failure is this worker's doing."""
        member.qos.failed(now)
        self._trouble(member, now)

    def _blame(self, request: Request, now: float) -> None:
        """A stage has succeeded: where the model raised on other workers, or came to another output than it should, it was their doing."""
        for worker_id in sorted(request.accused):
            if (member := self.roster.get(worker_id)) is not None:
                self._penalize(member, now)
        request.accused.clear()
        if request.deviants and request.run is not None and request.run.trial.is_comparable(request.run, request.numeric_classes):
            for worker_id in sorted(request.deviants):
                self._convict(worker_id, request.need.artifact, now)
        request.deviants.clear()  # of bits that cannot be compared nothing follows

    def _convict(self, worker_id: WorkerId, artifact: Digest, now: float) -> None:
        """What this worker has made of the stage was wrong: another one shows it."""
        if (member := self.roster.get(worker_id)) is not None:
            self._penalize(member, now)
            self.counters["wrong_workers"] += 1
            self._residency.distrust(member, artifact, now)

    def _trouble(self, member: Member, now: float) -> None:
        """Note whether its breaker is closed, and look again when it half-opens."""
        if member.qos.breaker(now) is Breaker.CLOSED:
            if member.worker_id in self._choice.troubled:
                self._choice.troubled.discard(member.worker_id)
                self._due.clear(("breaker", member.worker_id))
                self._wake(member)
            return
        if member.worker_id not in self._choice.troubled:
            self.counters["breakers_opened"] += 1
            self._choice.troubled.add(member.worker_id)
            self._wake(member)  # who rather waited for it than go elsewhere
        if (moment := member.qos.next_wakeup()) is not None:
            self._due.set(("breaker", member.worker_id), moment)

    def _attempt_cancelled(self, event: ev.AttemptCancelled, now: float) -> None:
        member = self.roster.member(event.worker_id)
        if (slot := member.slots.get(event.attempt)) is not None and _is_first(member, event.attempt):
            member.learn_outrun(slot, now - slot.since)  # computing cannot be interrupted: it was done, for nothing
        self._free(member, event.attempt, now)
        member.qos.returned()
        self._actions.append(ev.Acknowledge(worker_id=event.worker_id, attempt=event.attempt))
        request = self._wanted(event.attempt, event.worker_id)
        if request is not None and request.attempts.pop(event.attempt.attempt, None) is not None:
            self._resume(request, now)

    def _attempt_timed_out(self, attempt: AttemptId, now: float) -> None:
        request = self._requests.get(attempt.request)
        if request is None or not request.is_current(attempt) or attempt.attempt not in request.attempts:
            return
        self._count("attempt_timeouts", request)
        tried = request.attempts[attempt.attempt]
        request.note(tried.worker_id, attempt.attempt, str(AttemptTimeoutError(tried.worker_id, timeout_s=tried.timeout_s)))
        member = self.roster.get(tried.worker_id)
        if member is not None and not tried.is_expired and (slot := member.slots.get(attempt)) is not None and _is_first(member, attempt):
            # It ran, or nothing else of ours was before it: the worker is slower than it was. Behind others it only waited.
            member.learn_at_least(slot, CENSORED * tried.timeout_s)
            self._penalize(member, now)
        self._stop_waiting(request, attempt, now)

    def _stop_waiting(self, request: Request, attempt_id: AttemptId, now: float) -> None:
        """Look for another worker; the attempt keeps its slot, and its answer still counts. Without another, wait on."""
        attempt = request.attempts[attempt_id.attempt]
        if attempt.is_expired or request.ticket != 0:
            return
        attempt.is_expired = True
        if request.is_waited_for:
            return
        if request.is_answered:
            self._weigh(request, now, is_lost=True)
        elif self._has_alternative(request, now):
            self._actions.append(ev.Cancel(worker_id=attempt.worker_id, attempt=attempt_id))
            self._retry(request.request_id, now)
        else:
            attempt.is_expired = False
            self._due.set(("attempt", attempt_id), now + attempt.timeout_s)

    def _has_alternative(self, request: Request, now: float) -> bool:
        """Whether another worker can run the request's stage now, or will be able to after loading it."""
        return bool(self._choice.eligible(request, now)) or self._is_coming(request, now)

    def _dispatch_refused(self, event: ev.DispatchRefused, now: float) -> None:
        """The attempt never started; the worker's connection is doubtful and gets no more until it says hello."""
        slot = self._free(self.roster.member(event.worker_id), event.attempt, now)
        request = self._wanted(event.attempt, event.worker_id)
        if request is not None and request.attempts.pop(event.attempt.attempt, None) is not None:
            request.attempts_made -= 1
        self._liveness.disconnected(event.worker_id, now)
        self._session_ended(event.worker_id, "the socket refused a message", now, refused_since=now if slot is None else slot.since)
        if request is not None and request.request_id in self._requests and request.is_current(event.attempt):
            self._resume(request, now)

    # ── verification ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _check_too(self, request: Request, member: Member, now: float) -> None:
        """Of a task that was drawn another worker of the same class computes the same, if one has room; else one does later."""
        if request.check is None:
            if request.run is not None or not is_drawn(request.task, self.settings.verify_share):
                return
            request.check = Check()
        if request.is_doubtful:
            return
        able = [
            other
            for other in self._choice.eligible(request, now)
            if other.has_room and other.numeric_class == member.numeric_class and other.worker_id not in request.failed_on
        ]
        if able:
            self._dispatch(request, self._choice.best(request, able, {}, now)[0], now, is_check=True)

    def _compare(self, request: Request, check: Check, member: Member, event: ev.StageFinished, now: float) -> None:
        """An answer to a task that was drawn: it is held until it is known to be right."""
        request.attempts.pop(event.attempt.attempt, None)
        was_split = check.is_split
        if not check.hear(member.worker_id, member.numeric_class, event.output, event.digest):
            self.counters["late_answers"] += 1
        elif check.is_split and not was_split:
            self.counters["disagreements"] += 1
        if len(check.answers) == 1:
            check.take_at = max(request.deadline - self._reserve_s(request), now)
            self._due.set(("verify", request.request_id), check.take_at)
        self._admission.grow(request.request_id, request.retained_bytes)
        self._unqueue(request)  # whether somebody else is to compute it is asked anew
        self._weigh(request, now)

    def _weigh(self, request: Request, now: float, *, is_lost: bool = False) -> None:
        """Go on with what two have come to; else wait for who may still tell, or ask somebody; without anybody, take what there is if it is not
        split.

        Args:
            is_lost: somebody who was asked will not tell.
        """
        check = request.check
        assert check is not None
        if (agreed := check.agreed) is not None:
            self._verified(request, check, agreed, now)
            return
        is_due = not check.is_split and now >= check.take_at
        if not is_due and (request.ticket or self._is_told_soon(request, check)):
            return
        check.is_given_up |= is_lost
        may_wait = check.is_split or not (is_due or check.is_given_up)
        if may_wait and self._choice.eligible(request, now):
            for attempt in request.attempts.values():
                attempt.is_expired = True
            self._due.clear(("retry", request.request_id))
            self._enqueue(request)
        elif check.is_split:
            self._split(request, check, now)
        else:
            self.counters["unverified"] += 1
            request.unverified += 1
            (told,) = check.answers.values()
            self._go_on(request, told.output, check.numeric_class, now)

    def _is_told_soon(self, request: Request, check: Check) -> bool:
        """Whether an attempt is waited for whose answer can be compared."""
        members = [self.roster.get(attempt.worker_id) for attempt in request.attempts.values() if not attempt.is_expired]
        return any(member is not None and member.numeric_class == check.numeric_class for member in members)

    def _verified(self, request: Request, check: Check, agreed: Told, now: float) -> None:
        """Two have come to the same. Whoever has come to something else was wrong, and loses the stage."""
        self.counters["verified"] += 1
        for worker_id in check.dissenters(agreed):
            if (member := self.roster.get(worker_id)) is not None:
                member.tally.tasks_failed += 1
            self._convict(worker_id, request.need.artifact, now)
        self._go_on(request, agreed.output, check.numeric_class, now)

    def _split(self, request: Request, check: Check, now: float) -> None:
        """They differ, and nobody can tell who is right: the client gets none of these answers."""
        for worker_id in sorted(check.answers):
            if (member := self.roster.get(worker_id)) is not None:
                self._penalize(member, now)
        self._fail(request, DisagreementError(request.stage, workers=sorted(check.answers)), now)

    def _reserve_s(self, request: Request) -> float:
        """How much time is to be left to a request when an answer is held no longer: for the stages that follow, and the way to the client."""
        plan = self._residency.live(request.version).plan
        rest_s = 0.0
        for need, workers in islice(zip(plan.stages, plan.places, strict=True), request.stage + 1, None):
            members = [self.roster.member(worker_id) for worker_id in workers if self.roster.has(worker_id, need.artifact)]
            rest_s += min((sum(member.expect(need.artifact, need.cost_s)) for member in members), default=need.cost_s)
        return max(RESERVE * rest_s, RESERVE_SHARE * request.budget_s)

    # ── the queue ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _enqueue(self, request: Request) -> None:
        self._queues.push((*request.version.key, request.stage), request)

    def _unqueue(self, request: Request) -> None:
        """It waits for a worker no longer."""
        request.ticket = 0
        self._set_free(request)

    def _set_free(self, request: Request) -> None:
        """No worker is kept for the request any more."""
        if self._isolation and (member := self._isolation.release(request.request_id)) is not None:
            self._wake(member)

    def _wake(self, member: Member) -> None:
        """The worker may have credit again: look at every queue of a stage that it can run."""
        self._queues.wake(lambda key: member.worker_id in self._residency.places(key))

    def _pump(self, now: float) -> None:
        """Dispatch what can be dispatched, later stages first, but before all what a worker was kept for: nobody else has that worker."""
        for request in map(self._requests.__getitem__, self._isolation.waiting()):
            if not self._isolate(request, self._choice.eligible(request, now), now):
                self._enqueue(request)
        while (key := self._queues.next_awake()) is not None:
            self._pump_stage(key, now)

    def _pump_stage(self, key: StageKey, now: float) -> None:
        turn_ends = self._queues.turn_ends(key)
        put_back: list[Entry] = []
        waiting_s: dict[WorkerId, float] = {}  # backlog of those in this queue that rather wait for a better worker
        usual: list[Member] | None = None  # whoever may run a request that is not choosy
        while (entry := self._queues.pop(key)) is not None:
            request = entry[3]
            if entry[:2] > turn_ends and not put_back:  # else it would have its turn for ever
                put_back.append(entry)
                self._queues.wake_again(key)
                break
            is_choosy = request.is_choosy
            if is_choosy:
                eligible = self._choice.eligible(request, now)
            else:
                eligible = usual = self._choice.eligible(request, now) if usual is None else usual
            if eligible and request.is_doubtful:
                if not self._isolate(request, eligible, now):
                    put_back.append(entry)
                continue
            if any(member.has_room for member in eligible):
                if not self._place(request, eligible, waiting_s, now):
                    put_back.append(entry)
                if self._choice.troubled:  # one of them may have got its only task
                    usual = None
                continue
            if eligible or self._wait_for_worker(request, now):
                put_back.append(entry)
            if not is_choosy:  # else the next one may go all the same
                break
        self._queues.put_back(key, put_back)

    def _place(self, request: Request, eligible: list[Member], waiting_s: dict[WorkerId, float], now: float) -> bool:
        """Dispatch the request where it should be finished first. False: that is where there is no room yet, and worth the wait."""
        chosen, finish_s = self._choice.best(request, eligible, waiting_s, now)
        if not chosen.has_room:
            second, later_s = self._choice.best(request, [member for member in eligible if member.has_room], waiting_s, now)
            if later_s - finish_s > WORTH_S:
                service_s = self._choice.expect(request, chosen)[0]
                # It may be late; then look again whether it is still worth waiting for.
                self._due.set(("look", chosen.worker_id), now + max(chosen.backlog_s(now), service_s, LOOK_AGAIN_S))
                waiting_s[chosen.worker_id] = waiting_s.get(chosen.worker_id, 0.0) + service_s
                return False
            chosen = second
        self._dispatch(request, chosen, now)
        return True

    def _isolate(self, request: Request, eligible: list[Member], now: float) -> bool:
        """Dispatch the request to a worker that it has for itself, or keep for it the one that should be empty first. False: there is none."""
        mine = self._isolation.of(request.request_id)
        if empty := [
            member for member in eligible if not member.slots and not member.is_resting and (member is mine or not member.is_kept)
        ]:
            self._dispatch(request, self._choice.best(request, empty, {}, now)[0], now)
            return True
        chosen = self._isolation.choose(mine, eligible, now)
        if chosen is not mine:
            self._set_free(request)
            if chosen is not None:
                self._isolation.keep(request.request_id, chosen)
        return chosen is not None

    def _wait_for_worker(self, request: Request, now: float) -> bool:
        """Nobody can run the request now: whether it stays in the queue. Asks a worker to load the stage if that would help."""
        if request.is_answered:  # nobody can tell any more whether that is right
            self._unqueue(request)
            self._weigh(request, now)
            return False
        if self._is_coming(request, now):
            return True
        if request.attempts:  # nobody else will: wait on for the attempts there are
            self._unqueue(request)
            for number, attempt in request.attempts.items():
                attempt.is_expired = False
                self._due.set(("attempt", request.attempt_id(number)), now + attempt.timeout_s)
            return False
        if request.numeric_class and not self._has_class(request.numeric_class):
            self._start_again(request)
            return False
        return True

    def _has_class(self, numeric_class: str) -> bool:
        """Whether a worker of that class is there, or may come back."""
        return any(member.verdict is not Verdict.LOST and member.numeric_class == numeric_class for member in self.roster)

    def _start_again(self, request: Request) -> None:
        """Nobody is left of the class that an exact request began in: from its input on, in another. No earlier answer counts for it."""
        if request.stage > 0:
            self._count("restarts", request)
            self._arrivals += 1
            self._set_free(request)
            request.start_again(self._generation + self._arrivals)
        request.numeric_class = ""
        self._enqueue(request)

    def _dispatch(self, request: Request, member: Member, now: float, *, is_hedge: bool = False, is_check: bool = False) -> None:
        need = request.need
        is_check = is_check or (request.check is not None and request.is_answered)
        number = len(request.issued) + 1
        attempt_id = request.attempt_id(number)
        self._unqueue(request)
        request.issued[number] = member.worker_id
        limits = member.limits_s(need.artifact, request.activation.size_bytes, now)
        timeout_s = self.settings.attempt_timeout_s if limits is None else self._patience_s(limits[0])
        request.attempts[number] = Attempt(member.worker_id, timeout_s, is_check=is_check)
        request.attempts_made += 1
        if request.run is not None:
            request.run.trial.give(request.run, request.stage, member.worker_id)
        if request.exact and not request.numeric_class:
            request.numeric_class = member.numeric_class
        member.take(attempt_id, need.artifact, need.cost_s, now, request.activation.size_bytes, is_alone=request.is_doubtful)
        member.qos.given(now)
        if self.settings.cooldown_s:
            member.is_resting = True
            self._due.set(("cooldown", member.worker_id), now + self.settings.cooldown_s)
        self._due.set(("attempt", attempt_id), now + timeout_s)
        self.counters["tasks_dispatched"] += 1
        if number > 1:
            self._count("hedges" if is_hedge else "checks" if is_check else "retries", request)
        if limits is not None and not is_hedge and not is_check and request.run is None:
            self._hedges = min(self._hedges + self.settings.hedge_share, MOST_HEDGES)
            self._watch(attempt_id, limits[0], now)
        dispatch = ev.Dispatch(
            worker_id=member.worker_id,
            attempt=attempt_id,
            artifact=need.artifact,
            budget_s=max(request.deadline - now, 0.0),
            codec=request.version.codec,
            tolerance=request.version.tolerance,
            input=request.activation,
        )
        self._actions.append(dispatch)
        if self.settings.verify_share and not is_check:
            self._check_too(request, member, now)

    def _watch(self, attempt: AttemptId, usual_s: float, now: float) -> None:
        """Look whether a second worker should try as well, when the first has taken longer than it usually does."""
        if self.settings.hedge_share:
            self._due.set(("hedge", attempt), now + usual_s)

    def _hedge(self, attempt: AttemptId, now: float) -> None:
        """A worker that has nothing to do tries as well, and the first answer wins. After Dean and Barroso (2013): The tail at scale."""
        request = self._requests.get(attempt.request)
        if request is None or not request.is_current(attempt) or list(request.attempts) != [attempt.attempt] or request.ticket:
            return
        # Of what is verified, two are asked anyway.
        if request.is_doubtful or request.run is not None or request.check is not None:
            return
        has_idle = any(not member.slots for member in self.roster)  # most often nobody has nothing to do, which is soon told
        idle = [member for member in self._choice.eligible(request, now) if not member.slots and member.has_room] if has_idle else []
        if idle and self._hedges >= 1.0:
            self._hedges -= 1.0
            self._dispatch(request, self._choice.best(request, idle, {}, now)[0], now, is_hedge=True)
        else:  # somebody may have nothing to do a little later
            first = self.roster.member(request.attempts[attempt.attempt].worker_id)
            self._due.set(("hedge", attempt), now + max(self._choice.expect(request, first)[0], LOOK_AGAIN_S))

    def _patience_s(self, usual_s: float) -> float:
        """How long an attempt is waited for before another worker is asked."""
        return min(max(PATIENCE * usual_s, self.settings.min_attempt_timeout_s), self.settings.attempt_timeout_s)

    def _is_coming(self, request: Request, now: float) -> bool:
        """Whether another worker is loading the request's stage; asks one to if that would help."""
        taken = {attempt.worker_id for attempt in request.attempts.values()}
        live = self._residency.live(request.version)
        return self._residency.is_coming(
            live, request.stage, lambda member: member.worker_id not in taken and request.suits(member.numeric_class), now
        )

    # ── workers come and go ──────────────────────────────────────────────────────────────────────────────────────────

    def _worker_joined(self, event: ev.WorkerJoined, now: float) -> None:
        member = self.roster.member(event.worker_id)
        if event.incarnation and event.incarnation == member.incarnation:  # only its connection was lost
            for request in self._requests.values():
                self._absolve(request, member)
        member.incarnation = event.incarnation
        lost = set(member.slots) - event.held - event.finished
        self._residency.session_ended(member)
        member.join(
            numeric_class=event.numeric_class,
            stage_budget_bytes=event.stage_budget_bytes,
            credit=event.credit,
            resident=event.resident,
        )
        self._liveness.connected(event.worker_id, now)
        for attempt in sorted(lost):
            self._loss(member, attempt, "it was not listed in the worker's hello", now)
        for attempt in sorted(event.held | event.finished):
            self._reconcile(member, attempt, now, is_held=attempt in event.held)
        self._due.clear(("member", event.worker_id))
        self._verdict_changed(member, now)
        self._residency.joined(member, now)

    def _reconcile(self, member: Member, attempt: AttemptId, now: float, *, is_held: bool) -> None:
        """The worker says that it has this attempt. Keep it if its answer can still be used, else call it off."""
        request = self._wanted(attempt, member.worker_id)
        if request is None:
            if is_held:
                if attempt not in member.slots:
                    member.take(attempt, Digest(""), 0.0, now)
                self._actions.append(ev.Cancel(worker_id=member.worker_id, attempt=attempt))
            else:
                self._free(member, attempt, now)
            return
        self._absolve(request, member)
        need = request.need
        if attempt not in member.slots:
            member.take(attempt, need.artifact, need.cost_s, now, request.activation.size_bytes)
        request.attempts.setdefault(attempt.attempt, Attempt(member.worker_id, self.settings.attempt_timeout_s)).is_expired = False
        self._unqueue(request)  # no second attempt while this one is there
        self._due.set(("attempt", attempt), now + self.settings.attempt_timeout_s)

    def _absolve(self, request: Request, member: Member) -> None:
        """The worker lives: its connection was lost."""
        request.absolve(member.worker_id)
        if not request.is_doubtful and request.request_id in self._isolation:
            self._set_free(request)
            self._enqueue(request)

    def _relieve(self, now: float) -> None:
        """A worker may have become slow, and be alone with its stage: neither heartbeats nor time limits tell."""
        self._residency.relieve(now)
        if self._requests:
            self._due.set(_RELIEF, now + self.settings.relief_s)

    def _load_failed(self, member: Member, artifact: Digest, error: AdaptError, now: float) -> None:
        """It may be asked again after a while: perhaps its disk was full for a moment."""
        self._residency.refused(member, artifact, error, now)
        self._due.set(("load", member.worker_id), now + REFUSED_S)

    def _heard(self, event: ev.WorkerHeard, now: float) -> None:
        self._liveness.heard(event.worker_id, now)
        member = self.roster.get(event.worker_id)
        if member is None:
            return
        member.memory_percent, member.resident_bytes = event.memory_percent, event.resident_bytes
        if member.verdict is not Verdict.READY:
            self._verdict_changed(member, now)

    def _verdict_changed(self, member: Member, now: float) -> None:
        """Act on a new verdict about the worker, if it is new."""
        before, member.verdict = member.verdict, self._liveness.verdict(member.worker_id)
        if before is member.verdict:
            return
        if before is Verdict.READY and not member.is_draining:
            self._penalize(member, now)
        match member.verdict:
            case Verdict.READY:
                if not member.is_draining:
                    self._residency.recovered(member, now)
                    self._actions.append(ev.Trust(worker_id=member.worker_id))
                self._queues.wake_all()
            case Verdict.SUSPECT:
                self.counters["workers_suspected"] += 1
                self._actions.append(ev.Suspect(worker_id=member.worker_id, reason=self._liveness.reason(member.worker_id)))
                self._doubt(member, now)
            case Verdict.LOST:
                self.counters["evictions"] += 1
                reason = self._liveness.reason(member.worker_id)
                self._session_ended(member.worker_id, reason, now)
                self._lost(member, now)
                self._actions.append(ev.Evict(worker_id=member.worker_id, reason=reason))

    def _doubt(self, member: Member, now: float) -> None:
        """A suspect's tasks get another attempt, and its stages other workers if somebody waits for them."""
        for attempt in list(member.slots):
            request = self._requests.get(attempt.request)
            if request is not None and request.is_current(attempt) and attempt.attempt in request.attempts:
                self._stop_waiting(request, attempt, now)
        self._queues.wake_all()

    def _session_ended(
        self, worker_id: WorkerId, reason: str, now: float, *, is_intended: bool = False, refused_since: float = math.inf
    ) -> None:
        """What the worker held is nowhere now: dispatch it again at once, at nobody's cost but of what was running.

        Args:
            is_intended: by its worker: then nothing that it held has killed it.
            refused_since: what was sent from this moment on did not reach it.
        """
        member = self.roster.get(worker_id)
        if member is None:
            return
        suspected = set() if is_intended else suspects(member, now, refused_since)
        for attempt in list(member.slots):
            self._loss(member, attempt, reason, now, suspects=len(suspected) if attempt in suspected else 0)
        self._residency.session_ended(member)
        self._verdict_changed(member, now)

    def _loss(self, member: Member, attempt: AttemptId, reason: str, now: float, *, suspects: int = 0) -> None:
        """The attempt is gone with its worker. Only one that was running can have been the cause, and only then does it count.

        Args:
            suspects: how many may have been running, if this one may; 1: this one was.
        """
        slot = self._free(member, attempt, now)
        request = self._wanted(attempt, member.worker_id)
        if request is None or (tried := request.attempts.pop(attempt.attempt, None)) is None:
            return
        self.counters["tasks_lost"] += 1
        error = WorkerLostError(member.worker_id, reason)
        request.note(member.worker_id, attempt.attempt, str(error))
        is_sound = self._is_sound(member)
        if tried.is_expired and slot is not None and slot.since < request.blamed_at:  # it had fallen silent, perhaps with others
            suspects = 0
        if suspects and is_sound and not tried.is_check:
            request.blamed_at = now
            (request.deaths if suspects == 1 else request.suspected).append(member.worker_id)
        if suspects == 1 and is_sound:
            request.failed_on.add(member.worker_id)
        if request.is_poison and not request.is_answered:
            self._count("poisonous_requests", request)
            self._fail(request, _poison(request), now)
        else:
            # A worker may die so soon that it is never known that nothing else was running: that has an end too.
            costs = not is_sound if suspects == 1 else suspects > 1 and len(request.suspected) >= POISONED
            self._again(request, error, now, is_free=tried.is_check or not costs, is_lost=True)

    def _is_sound(self, member: Member) -> bool:
        """Whether it succeeds otherwise: then a death in the hands of a request speaks against the request. At first nobody has succeeded."""
        return member.tally.tasks_done > 0 or not any(other.tally.tasks_done for other in self.roster)

    def _worker_draining(self, event: ev.WorkerDraining, now: float) -> None:
        member = self.roster.member(event.worker_id)
        member.is_draining = self._residency.has_spares_to_tend = True
        for attempt in sorted(event.handed_back):
            self._loss(member, attempt, "it is draining and has handed the task back", now)
        self._queues.wake_all()

    def _worker_left(self, worker_id: WorkerId, now: float) -> None:
        """Ended by intent: out of the plan at once, and not counted as an eviction."""
        member = self.roster.member(worker_id)
        self._liveness.forget(worker_id)
        member.verdict = Verdict.LOST
        self._session_ended(worker_id, "it has left", now, is_intended=True)
        self._lost(member, now)

    def _lost(self, member: Member, now: float) -> None:
        """Out of every plan, and forgotten after a while."""
        self._residency.left(member, now)
        self._due.set(("member", member.worker_id), now + MEMBER_MEMORY_S)


def _is_first(member: Member, attempt: AttemptId) -> bool:
    return member.slots[attempt].begun_at is not None or next(iter(member.slots)) == attempt


def _poison(request: Request) -> PoisonError:
    who = ", ".join([*request.suspected, *request.deaths])
    return PoisonError(f"stage {request.stage}: workers that otherwise succeed died while they ran it: {who}", attempts=request.history)


def _subject(event: ev.Event) -> object:
    """What the story says of an event: an id, never a tensor."""
    kind = type(event)
    subject_of = _SUBJECTS.get(kind)
    if subject_of is None:
        names = ("attempt", "request_id", "worker_id", "client_id", "deployment", "version")
        subject_of = _SUBJECTS[kind] = attrgetter(next((name for name in names if hasattr(event, name)), "__class__"))
    return subject_of(event)


_SUBJECTS: dict[type, attrgetter[object]] = {}


def _id_used_twice(request_id: RequestId) -> AdaptError:
    return WireError(f"request id {request_id} was used before for another input")
