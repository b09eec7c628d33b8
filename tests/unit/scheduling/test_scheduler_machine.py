"""The scheduler against a model of the cluster: any order of events, and the invariants of the design after each.

Workers and the network are modelled as they really behave: a worker answers only what it was sent, keeps its answers until they are
acknowledged, lists in its hello what it holds; messages to a worker without a session are lost. Time moves in whole seconds, so that
ties happen. The number that an activation carries tells which stage made it of which request: a mix-up is seen at once.

The dispatcher is modelled too: facts about tasks may gather before anything is decided, every other fact is preceded by a decision, and
what acknowledges a worker's answers may leave later.

In some runs all tasks are verified, or half of them. Where all are, one worker may lie: no answer may come of that, unless it says that it
could not be verified.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import takewhile

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from adapt.errors import AdaptError, ModelError, OverloadedError, PoisonError, StageNotResidentError, WireError, WorkerLostError
from adapt.planning.placement import Plan, StageNeed, place
from adapt.protocol.ids import AttemptId, ClientId, Digest, Epoch, RequestId, WorkerId
from adapt.protocol.messages import StageTimes
from adapt.protocol.wire import Blob
from adapt.scheduling import events as ev
from adapt.scheduling.liveness import Verdict
from adapt.scheduling.requests import POISONED, Request
from adapt.scheduling.roster import AHEAD_S, STEADY, Slot
from adapt.scheduling.scheduler import ACCEPT_S, REMEMBER_S, Scheduler
from adapt.scheduling.settings import SchedulerSettings
from adapt.scheduling.suspicion import REACHED_S, SPENT
from adapt.scheduling.tokens import TokenSettings

WORKERS = [WorkerId(name) for name in ("w1", "w2", "w3", "w4")]
CLIENTS = [ClientId(bytes([n]) * 16) for n in (1, 2)]
CREDIT = dict(zip(WORKERS, (2, 5, 3, 1), strict=True))
COST_S = {"a": 1.0, "b": AHEAD_S / 4}  # of each stage of a deployment
STAGES = 3
LIAR = WORKERS[1]
BLOBS = (Blob.of(bytes(7)),)
OF_TASKS = (ev.RequestArrived, ev.OutcomeAcknowledged, ev.StageBegun, ev.StageFinished)  # facts that may gather
SETTINGS = SchedulerSettings(
    silence_s=3,
    grace_s=2,
    attempt_timeout_s=5,
    load_timeout_s=10,
    client_grace_s=6,
    hedge_share=0.4,
    max_failures=4,
    tokens=TokenSettings(most=2, per_request=0.2, per_s=0.5),
    max_requests=12,
    max_retained_bytes=1000,
    max_kept_bytes=50,
)


def artifact(deployment: str, number: int, stage: int, cut: int = 0) -> Digest:
    return Digest(f"{deployment}.{number}.{stage}.{cut}")


@dataclass
class ModelWorker:
    """A worker as the scheduler's messages find it."""

    worker_id: WorkerId
    incarnation: int = 0
    is_up: bool = False  # the process lives
    is_connected: bool = False
    resident: set[Digest] = field(default_factory=set)
    asked: set[Digest] = field(default_factory=set)  # to load
    held: dict[AttemptId, ev.Dispatch] = field(default_factory=dict)
    cancelled: set[AttemptId] = field(default_factory=set)
    finished: dict[AttemptId, ev.Event] = field(default_factory=dict)  # kept until acknowledged
    is_draining: bool = False


class Cluster(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.scheduler = Scheduler(SETTINGS)
        self.workers = {worker_id: ModelWorker(worker_id) for worker_id in WORKERS}
        self.sequence = 0
        self.submitted: dict[RequestId, ev.RequestArrived] = {}
        self.admitted: dict[RequestId, float] = {}  # and when
        self.accepted: set[RequestId] = set()
        self.asked_twice: set[RequestId] = set()  # while they lived
        self.outcomes: dict[RequestId, ev.Answer | ev.Fail] = {}
        self.decided: set[RequestId] = set()  # cancelled or acknowledged by the client
        self.remembered_until: dict[RequestId, float] = {}  # of those that were acknowledged
        self.is_gathering = False
        self.acks: dict[WorkerId, list[AttemptId]] = {worker_id: [] for worker_id in WORKERS}  # not said yet
        self.numbers = {"a": 0, "b": 0}
        self.cuts = 0
        self.dispatched: set[AttemptId] = set()
        self.share = 0.0  # of tasks that are verified
        self.told: dict[tuple[RequestId, int, int], dict[WorkerId, object]] = {}  # what each worker has come to, by task

    # ── delivering actions ───────────────────────────────────────────────────────────────────────────────────────────

    def tell(self, event: ev.Event) -> None:
        is_gathered = self.is_gathering and isinstance(event, OF_TASKS)
        if isinstance(event, ev.StageFinished):
            self.told.setdefault(event.attempt[:3], {})[event.worker_id] = event.output.leaves[0]
        if not is_gathered:
            self.settle()
        was_live = isinstance(event, ev.RequestArrived) and event.request_id in self.scheduler._requests
        actions: list[ev.Action] = []
        if is_gathered:
            self.scheduler.note(event, self.now)
        else:
            actions = self.scheduler.handle(event, self.now)
        if isinstance(event, ev.RequestArrived) and event.request_id in self.scheduler._requests:
            if was_live:
                self.asked_twice.add(event.request_id)
            else:
                self.admitted[event.request_id] = self.now
        self.perform(actions)

    def settle(self) -> None:
        """Decide on what was noted."""
        self.perform(self.scheduler.decide(self.now))

    @rule()
    def gather(self) -> None:
        self.is_gathering = True

    @rule()
    def decide(self) -> None:
        self.is_gathering = False
        self.settle()

    @rule(worker_id=st.sampled_from(WORKERS))
    def say_acks(self, worker_id: WorkerId) -> None:
        attempts, self.acks[worker_id] = self.acks[worker_id], []
        if self.workers[worker_id].is_connected:
            for attempt in attempts:
                self.workers[worker_id].finished.pop(attempt, None)

    def perform(self, actions: list[ev.Action]) -> None:
        for action in actions:
            match action:
                case ev.Dispatch():
                    self.deliver(action)
                case ev.Cancel():
                    worker = self.workers[action.worker_id]
                    if worker.is_connected and action.attempt in worker.held:
                        worker.cancelled.add(action.attempt)
                case ev.Acknowledge():
                    self.acks[action.worker_id].append(action.attempt)
                case ev.Load():
                    worker = self.workers[action.worker_id]
                    if worker.is_connected:
                        worker.asked.add(action.artifact)
                case ev.Unload():
                    self.workers[action.worker_id].asked.discard(action.artifact)
                    if self.workers[action.worker_id].is_connected:
                        self.workers[action.worker_id].resident.discard(action.artifact)
                case ev.Evict():
                    self.workers[action.worker_id].is_connected = False
                case ev.Accept():
                    assert action.request_id not in self.outcomes and action.request_id not in self.decided
                    due = self.admitted[action.request_id] + ACCEPT_S / 2
                    assert action.request_id in self.asked_twice or due <= self.now, "an answer may come before"
                    self.accepted.add(action.request_id)
                case ev.Answer() | ev.Fail():
                    self.check_outcome(action)

    def deliver(self, action: ev.Dispatch) -> None:
        member = self.scheduler.roster.get(action.worker_id)
        worker = self.workers[action.worker_id]
        assert member is not None and member.is_ready, "only a ready worker gets something new"
        held_before = list(member.slots)[: list(member.slots).index(action.attempt)]  # while it is decided, nothing is freed
        assert len(held_before) < member.credit, "credit"
        held_s = sum(member.slots[attempt].busy_s for attempt in held_before)
        assert len(held_before) < STEADY or held_s < AHEAD_S + 1e-9, "beyond that only while what it holds is short"
        assert action.artifact in member.resident
        assert action.attempt.request not in self.outcomes, "nothing is dispatched for a request that has ended"
        assert action.attempt.request not in self.decided
        deployment = action.artifact.split(".")[0]
        assert deployment == self.submitted[action.attempt.request].deployment
        self.check_input(action)
        assert action.attempt not in self.dispatched, "no attempt has the name of an earlier one"
        self.dispatched.add(action.attempt)
        self.check_choice(action)
        if worker.is_connected:
            worker.held[action.attempt] = action
            self.say_acks(action.worker_id)

    def check_input(self, action: ev.Dispatch) -> None:
        """It is this stage's own, and where everything is verified, two have come to it."""
        request_id, generation, stage, _ = action.attempt
        request = self.scheduler._requests.get(request_id)
        if request is not None and request.unverified:  # it may be what a liar said
            return
        mark = self.mark(request_id, stage)
        assert action.input.leaves == [mark], "the input is this stage's"
        if stage > 0 and self.share == 1 and request is not None and request.stage == stage:
            self.check_told((request_id, generation, stage - 1), mark)

    def check_told(self, task: tuple[RequestId, int, int], mark: int) -> None:
        classes = [self.numeric_class(worker_id) for worker_id, told in self.told[task].items() if told == mark]
        assert len(classes) > len(set(classes)), "two of a class have come to it"

    def numeric_class(self, worker_id: WorkerId) -> str:
        """Where tasks are verified, three are of one class."""
        return "x" if worker_id in WORKERS[: 3 if self.share else 2] else "y"

    def check_choice(self, action: ev.Dispatch) -> None:
        """Where it has failed it is tried again only if nobody else can."""
        before = takewhile(lambda item: item[0] != action.attempt, self.scheduler.roster.member(action.worker_id).slots.items())
        assert not any(slot.is_alone for _, slot in before), "nothing is sent behind what may be poison"
        request = self.scheduler._requests.get(action.attempt.request)
        if request is not None and request.stage == action.attempt.stage and request.is_doubtful:
            assert [*self.scheduler.roster.member(action.worker_id).slots] == [action.attempt], "nor that behind anything"
        if request is None or request.stage != action.attempt.stage or action.worker_id not in request.failed_on:
            return
        for worker_id in self.scheduler._residency.live(request.version).plan.places[request.stage]:
            other = self.scheduler.roster.get(worker_id)
            could = other is not None and other.is_ready and action.artifact in other.resident and request.suits(other.numeric_class)
            has_it = any(attempt.worker_id == worker_id for attempt in request.attempts.values())
            assert not could or has_it or worker_id in request.failed_on, f"{worker_id} has not failed yet"

    def check_outcome(self, action: ev.Answer | ev.Fail) -> None:
        request_id = action.request_id
        if request_id not in self.admitted:
            assert isinstance(action, ev.Fail), "refused at the door"
            return
        if request_id in self.outcomes:
            assert action is self.outcomes[request_id], "one outcome, said again"
            return
        assert request_id not in self.decided, "nobody waits for it"
        self.outcomes[request_id] = action
        if isinstance(action, ev.Answer):
            if not action.unverified:
                assert action.output.leaves == [self.mark(request_id, STAGES)]
                last = [task for task in self.told if task[0] == request_id and task[2] == STAGES - 1]
                if self.share == 1:
                    self.check_told(max(last), self.mark(request_id, STAGES))
            assert len(action.numeric_classes) == 1 or not self.submitted[request_id].exact

    @staticmethod
    def mark(request_id: RequestId, stage: int) -> int:
        """What an activation before `stage` carries."""
        return request_id.sequence * 100 + request_id.client[0] * 10 + stage

    # ── deployments ──────────────────────────────────────────────────────────────────────────────────────────────────

    @initialize(share=st.sampled_from([0.0, 0.0, 0.5, 1.0, 1.0]))
    def three_workers_and_a_model(self, share: float) -> None:
        self.share = share
        self.scheduler = Scheduler(replace(SETTINGS, verify_share=share))
        for worker_id in WORKERS[:3]:
            self.start(worker_id)
        self.deploy("a")
        for worker_id in WORKERS[:3]:
            while self.workers[worker_id].asked:
                self.load(worker_id)

    @rule(deployment=st.sampled_from(["a", "b"]), is_recut=st.booleans())
    def deploy(self, deployment: str, is_recut: bool = False) -> None:
        """A new version, or the present one in other stages."""
        self.settle()
        offers = self.scheduler.offers()
        if not offers:
            return
        present = next((version for version, is_ready in self.scheduler.versions() if version.deployment == deployment and is_ready), None)
        if present is not None and is_recut:
            self.cuts += 1
            number, cut = present.number, self.cuts
        else:
            self.numbers[deployment] += 1
            number, cut = self.numbers[deployment], 0
        needs = tuple(
            StageNeed(artifact=artifact(deployment, number, s, cut), memory_bytes=10, cost_s=COST_S[deployment]) for s in range(STAGES)
        )
        try:
            places = place(needs, offers)
        except AdaptError:
            return
        if self.share:  # whoever has room has every stage
            roomy = [offer.worker_id for offer in offers if offer.free_bytes >= 10 * STAGES]
            places = tuple(tuple(dict.fromkeys((*workers, *roomy))) for workers in places)
        plan = Plan(program=Digest(f"{deployment}.{number}"), epoch=Epoch(1), stages=needs, places=places)
        version = ev.Version(
            deployment=deployment,
            number=number,
            cut=cut,
            program=plan.program,
            codec="raw",
            tolerance=None,
            exact=False,
            peak_ratio=2.0,
            plan=plan,
        )
        self.tell(ev.VersionDeployed(version=version))

    @rule(deployment=st.sampled_from(["b"]))
    def undeploy(self, deployment: str) -> None:
        self.tell(ev.Undeployed(deployment=deployment))

    # ── workers ──────────────────────────────────────────────────────────────────────────────────────────────────────

    @rule(worker_id=st.sampled_from(WORKERS))
    def start(self, worker_id: WorkerId) -> None:
        """A new life: it holds nothing."""
        worker = self.workers[worker_id]
        if worker.is_up:
            return
        self.workers[worker_id] = worker = ModelWorker(worker_id, worker.incarnation + 1, is_up=True)
        self.hello(worker)

    @rule(worker_id=st.sampled_from(WORKERS))
    def reconnect(self, worker_id: WorkerId) -> None:
        """It says hello again, whether or not its loss was noticed."""
        worker = self.workers[worker_id]
        if worker.is_up and not worker.is_draining:
            self.hello(worker)

    def hello(self, worker: ModelWorker) -> None:
        self.settle()
        worker.is_connected = True
        worker.asked.clear()
        worker.cancelled.clear()
        joined = ev.WorkerJoined(
            worker_id=worker.worker_id,
            numeric_class=self.numeric_class(worker.worker_id),
            stage_budget_bytes=100,
            credit=CREDIT[worker.worker_id],
            resident=frozenset(worker.resident),
            held=frozenset(worker.held),
            finished=frozenset(worker.finished),
        )
        said_again = list(worker.finished.values())  # before anything that this session brings can have come
        self.tell(joined)
        for answer in said_again:
            self.tell(answer)

    @rule(worker_id=st.sampled_from(WORKERS))
    def kill(self, worker_id: WorkerId) -> None:
        worker = self.workers[worker_id]
        if worker.is_up:
            worker.is_up = False
            self.disconnect(worker_id)
            worker.held.clear()
            worker.finished.clear()
            worker.resident.clear()

    @rule(worker_id=st.sampled_from(WORKERS))
    def disconnect(self, worker_id: WorkerId) -> None:
        """The connection goes; the process goes on."""
        worker = self.workers[worker_id]
        if worker.is_connected:
            worker.is_connected = False
            worker.asked.clear()
            self.settle()
            expected = self.costs_after_a_loss(worker_id)
            generations = {request_id: request.generation for request_id, request in self.scheduler._requests.items()}
            self.tell(ev.WorkerDisconnected(worker_id=worker_id, reason="test"))
            for request_id, (failures, deaths, suspected) in expected.items():
                request = self.scheduler._requests.get(request_id)
                is_poison = deaths > 0 and deaths + suspected >= POISONED
                if request is not None and request.generation != generations[request_id]:
                    assert request.exact and request.stage == 0, "only who has nobody left of its class begins anew"
                elif request is not None:
                    assert request.failures == failures < SETTINGS.max_failures
                    assert (len(request.deaths), len(request.suspected)) == (deaths, suspected) and not is_poison
                else:
                    kinds = (WorkerLostError,) * (failures == SETTINGS.max_failures) + (PoisonError,) * is_poison
                    assert isinstance(self.outcomes[request_id].error, kinds)

    def costs_after_a_loss(self, worker_id: WorkerId) -> dict[RequestId, tuple[int, int, int]]:
        """Failures, deaths and suspicions. It costs only what was running: what the worker said it had begun last, or was given first, and what
        stood behind that, if all before it may have ended."""
        member = self.scheduler.roster.member(worker_id)
        slots = list(member.slots.items())
        last = max((place for place, (_, slot) in enumerate(slots) if slot.begun_at is not None), default=0)
        suspects = [
            attempt
            for place, (attempt, _) in enumerate(slots)
            if place >= last and self.may_run([slot for _, slot in slots[last : place + 1]])
        ]
        is_sound = member.tally.tasks_done > 0 or all(other.tally.tasks_done == 0 for other in self.scheduler.roster)
        costs: dict[RequestId, tuple[int, int, int]] = {}
        for attempt in member.slots:
            request = self.scheduler._requests.get(attempt.request)
            if request is not None and request.is_current(attempt) and attempt.attempt in request.attempts:
                assert request.request_id not in costs, "no task is twice on one worker"
                if request.is_answered:
                    continue
                if request.attempts[attempt.attempt].is_check:
                    costs[request.request_id] = (request.failures, len(request.deaths), len(request.suspected))
                    continue
                was_beside = request.attempts[attempt.attempt].is_expired and member.slots[attempt].since < request.blamed_at
                is_named = attempt in suspects and not was_beside
                is_cause, is_suspect = is_named and len(suspects) == 1, is_named and len(suspects) > 1
                suspected = len(request.suspected) + (is_suspect and is_sound)
                failures = request.failures + (is_cause and not is_sound) + (is_suspect and suspected >= POISONED)
                costs[request.request_id] = (failures, len(request.deaths) + (is_cause and is_sound), suspected)
        return costs

    def may_run(self, slots: list[Slot]) -> bool:
        """Whether the last of these may be running, of which the first had begun or was the first of all."""
        *before, it = slots
        has_reached = it.begun_at is not None or self.now - it.since >= REACHED_S
        return has_reached and all(map(self.may_have_ended, before))

    def may_have_ended(self, slot: Slot) -> bool:
        if slot.begun_at is None:
            return slot.is_short and self.now - slot.since >= REACHED_S
        return slot.is_short or self.now - slot.begun_at >= SPENT * slot.busy_s

    @rule()
    def heartbeats(self) -> None:
        for worker in self.workers.values():
            if worker.is_connected:
                self.tell(ev.WorkerHeard(worker_id=worker.worker_id))

    @rule(worker_id=st.sampled_from(WORKERS))
    def lease_ends(self, worker_id: WorkerId) -> None:
        if worker_id in self.scheduler.roster:
            self.tell(ev.LeaseEnded(worker_id=worker_id))

    @rule(worker_id=st.sampled_from(WORKERS))
    def load(self, worker_id: WorkerId) -> None:
        worker = self.workers[worker_id]
        if worker.is_connected and worker.asked:
            loaded = worker.asked.pop()
            worker.resident.add(loaded)
            self.tell(ev.StageResident(worker_id=worker_id, artifact=loaded))

    @rule(worker_id=st.sampled_from(WORKERS))
    def refuse_load(self, worker_id: WorkerId) -> None:
        worker = self.workers[worker_id]
        if worker.is_connected and worker.asked:
            self.tell(ev.StageRefused(worker_id=worker_id, artifact=worker.asked.pop(), error=AdaptError("disk full")))

    @rule(worker_id=st.sampled_from(WORKERS))
    def drain(self, worker_id: WorkerId) -> None:
        self.settle()
        worker = self.workers[worker_id]
        if worker.is_connected and not worker.is_draining:
            worker.is_draining = True
            back = frozenset(list(worker.held)[1:])
            for attempt in back:
                del worker.held[attempt]
            self.tell(ev.WorkerDraining(worker_id=worker_id, handed_back=back))

    @rule(worker_id=st.sampled_from(WORKERS))
    def leave(self, worker_id: WorkerId) -> None:
        self.settle()
        worker = self.workers[worker_id]
        if worker.is_connected and worker.is_draining and not worker.held:
            worker.is_connected = worker.is_up = False
            self.tell(ev.WorkerDisconnected(worker_id=worker_id, reason="goodbye"))
            self.tell(ev.WorkerLeft(worker_id=worker_id))

    # ── attempts ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @rule(worker_id=st.sampled_from(WORKERS), how=st.sampled_from(["done", "done", "quick", "lie", "model", "wire", "absent", "full"]))
    def work(self, worker_id: WorkerId, how: str) -> None:
        """A worker ends what it has held longest. Without a connection the answer is kept for the next hello."""
        worker = self.workers[worker_id]
        if not worker.held:
            return
        attempt = next(iter(worker.held))
        run = worker.held.pop(attempt)
        answer = self.answer(worker, attempt, run, how)
        worker.finished[attempt] = answer
        if worker.is_connected:
            self.tell(answer)

    def answer(self, worker: ModelWorker, attempt: AttemptId, run: ev.Dispatch, how: str) -> ev.Event:
        if attempt in worker.cancelled:
            return ev.AttemptCancelled(worker_id=worker.worker_id, attempt=attempt)
        if how in ("done", "quick", "lie"):
            is_lie = how == "lie" and self.share == 1 and worker.worker_id == LIAR
            output = ev.Activation([self.mark(attempt.request, attempt.stage + 1) + is_lie * 1_000_000], BLOBS)
            times = StageTimes(wait_s=0.0, decode_s=0.0, compute_s=1.0 if how == "done" else AHEAD_S / 8, encode_s=0.0)
            return ev.StageFinished(worker_id=worker.worker_id, attempt=attempt, output=output, times=times)
        error: AdaptError
        match how:
            case "model":
                error = ModelError("RuntimeError: no")
            case "wire":
                error = WireError("flipped")
            case "absent":
                error = StageNotResidentError("gone")
                worker.resident.discard(run.artifact)
            case _:
                error = OverloadedError("full", retry_after_s=0.1)
        return ev.AttemptFailed(worker_id=worker.worker_id, attempt=attempt, error=error)

    @rule(hows=st.lists(st.sampled_from(["done", "quick", "quick", "lie", "model", "wire", "absent", "full"]), min_size=4, max_size=12))
    def bustle(self, hows: list[str]) -> None:
        """Every worker works, in turn: without this, random events seldom let a request get far."""
        for turn, how in enumerate(hows):
            self.work(WORKERS[turn % len(WORKERS)], how)
            self.load(WORKERS[turn % len(WORKERS)])

    @precondition(lambda self: self.share > 0)
    @rule(hows=st.lists(st.sampled_from(["done", "done", "done", "quick", "wire"]), min_size=6, max_size=12), is_lie=st.booleans())
    def agree(self, hows: list[str], is_lie: bool) -> None:
        """Everybody is well and has what was planned for it, and much is computed: without this, there is seldom a second, let alone a third."""
        for worker in list(self.workers.values()):
            if worker.is_draining:
                continue
            self.start(worker.worker_id)
            if not worker.is_connected:
                self.reconnect(worker.worker_id)
            while self.workers[worker.worker_id].asked:
                self.load(worker.worker_id)
        self.submit_many(CLIENTS[0], "a", 3, False)
        self.bustle(["lie" if is_lie and WORKERS[turn % len(WORKERS)] == LIAR else how for turn, how in enumerate(hows)])

    @rule(worker_id=st.sampled_from(WORKERS))
    def begin(self, worker_id: WorkerId) -> None:
        worker = self.workers[worker_id]
        if worker.is_connected and worker.held:
            self.tell(ev.StageBegun(worker_id=worker_id, attempt=next(iter(worker.held))))

    @rule(worker_id=st.sampled_from(WORKERS))
    def refuse_dispatch(self, worker_id: WorkerId) -> None:
        """The socket did not take the last message: the worker never got it."""
        self.settle()
        worker = self.workers[worker_id]
        if worker.is_connected and worker.held:
            attempt = list(worker.held)[-1]
            del worker.held[attempt]
            worker.is_connected = False
            self.tell(ev.DispatchRefused(worker_id=worker_id, attempt=attempt))

    # ── clients ──────────────────────────────────────────────────────────────────────────────────────────────────────

    @rule(client=st.sampled_from(CLIENTS), deployment=st.sampled_from(["a", "a", "b"]), budget_s=st.integers(0, 40), exact=st.booleans())
    def submit(self, client: ClientId, deployment: str, budget_s: int, exact: bool) -> None:
        self.sequence += 1
        request_id = RequestId(client, self.sequence)
        arrived = ev.RequestArrived(
            request_id=request_id,
            deployment=deployment,
            version=0,
            program=None,
            budget_s=float(budget_s),
            exact=exact,
            fingerprint=self.sequence,
            input=ev.Activation([self.mark(request_id, 0)], BLOBS),
        )
        self.submitted[request_id] = arrived
        self.tell(arrived)

    @rule(client=st.sampled_from(CLIENTS), deployment=st.sampled_from(["a", "b"]), count=st.integers(2, 10), exact=st.booleans())
    def submit_many(self, client: ClientId, deployment: str, count: int, exact: bool) -> None:
        for _ in range(count):
            self.submit(client, deployment, 40, exact)

    @precondition(lambda self: self.submitted)
    @rule(data=st.data())
    def submit_again(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.submitted)))
        if request_id not in self.decided and self.outcomes.get(request_id) is None and request_id in self.scheduler._requests:
            self.tell(self.submitted[request_id])

    @precondition(lambda self: self.outcomes)
    @rule(data=st.data())
    def ask_again(self, data: st.DataObject) -> None:
        """The reply was lost with its session: within the memory of the dispatcher, the same outcome comes again; one that was dropped for
        its size is computed anew."""
        request_id = data.draw(st.sampled_from(sorted(self.outcomes)))
        ended = self.scheduler._ended.get(request_id)
        if request_id in self.decided or ended is None:
            return
        if ended.outcome is None:
            del self.outcomes[request_id]
            self.accepted.discard(request_id)
        self.tell(self.submitted[request_id])

    @precondition(lambda self: self.submitted)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.settle()
        request_id = data.draw(st.sampled_from(sorted(self.submitted)))
        if request_id in self.admitted:
            self.decided.add(request_id)
            self.tell(ev.RequestCancelled(request_id=request_id))

    @rule(client=st.sampled_from(CLIENTS))
    def cancel_before_it_comes(self, client: ClientId) -> None:
        self.settle()
        self.sequence += 1
        request_id = RequestId(client, self.sequence)
        self.tell(ev.RequestCancelled(request_id=request_id))
        arrived = ev.RequestArrived(
            request_id=request_id,
            deployment="a",
            version=0,
            program=None,
            budget_s=9.0,
            exact=False,
            fingerprint=1,
            input=ev.Activation([0], ()),
        )
        assert self.scheduler.handle(arrived, self.now) == []

    @precondition(lambda self: self.outcomes)
    @rule(data=st.data(), was_said_twice=st.booleans())
    def acknowledge(self, data: st.DataObject, was_said_twice: bool) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.outcomes)))
        if self.scheduler._ended.get(request_id) is not None and request_id not in self.decided:
            self.remembered_until[request_id] = self.now + REMEMBER_S
        self.decided.add(request_id)
        self.tell(ev.OutcomeAcknowledged(request_id=request_id))
        if was_said_twice and request_id in self.remembered_until:
            self.come_late(request_id)

    @precondition(lambda self: self.remembered_until)
    @rule(data=st.data())
    def say_late(self, data: st.DataObject) -> None:
        self.come_late(data.draw(st.sampled_from(sorted(self.remembered_until))))

    def come_late(self, request_id: RequestId) -> None:
        """A request that was said twice, and answered at the first time: nothing follows from the second."""
        if self.now < self.remembered_until[request_id]:
            self.settle()
            assert self.scheduler.handle(self.submitted[request_id], self.now) == []

    @rule(client=st.sampled_from(CLIENTS), how=st.sampled_from(["away", "back", "left"]))
    def client_moves(self, client: ClientId, how: str) -> None:
        self.settle()
        match how:
            case "away":
                self.tell(ev.ClientDisconnected(client_id=client))
            case "back":
                self.tell(ev.ClientArrived(client_id=client))
            case _:
                self.decided |= {rid for rid in self.submitted if rid.client == client}
                self.tell(ev.ClientLeft(client_id=client))

    # ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    @rule(seconds=st.sampled_from([ACCEPT_S / 4, ACCEPT_S / 2, 1, 2, 3, 4]))
    def wait(self, seconds: float) -> None:
        """Time passes; whatever falls due is done at its moment. A client that is away too long has its requests cancelled."""
        self.settle()
        end = self.now + seconds
        while (due := self.scheduler.next_wakeup()) is not None and due <= end:
            self.now = max(due, self.now)
            before = set(self.scheduler._requests)
            self.perform(self.scheduler.tick(self.now))
            self.decided |= before - set(self.scheduler._requests) - set(self.outcomes)
            again = self.scheduler.next_wakeup()
            assert again is None or again > self.now, "the loop would spin"
        self.now = end

    @rule()
    def dawdle(self) -> None:
        """Workers are well, and take longer than anybody waits for an attempt."""
        for _ in range(6):
            self.heartbeats()
            self.wait(1)

    @rule(numeric_class=st.sampled_from("xy"))
    def a_class_dies(self, numeric_class: str) -> None:
        """All of one numeric class, for good: exact requests that began there have nobody left."""
        for worker_id in WORKERS:
            if self.numeric_class(worker_id) == numeric_class:
                self.kill(worker_id)
        for _ in range(4):
            self.heartbeats()
            self.wait(1)

    # ── invariants ───────────────────────────────────────────────────────────────────────────────────────────────────

    @invariant()
    def nobody_is_in_limbo(self) -> None:
        for request in self.scheduler._requests.values():
            is_delayed = ("retry", request.request_id) in self.scheduler._due
            assert request.ticket or request.is_waited_for or is_delayed, f"{request} waits for nothing"
            assert not (request.ticket and request.is_waited_for), "it is queued while an attempt is waited for"
            assert request.deadline >= self.now
            for number in request.attempts:
                attempt = request.attempts[number]
                member = self.scheduler.roster.get(attempt.worker_id)
                assert member is not None and request.attempt_id(number) in member.slots, "an attempt in flight has its slot"

    @invariant()
    def who_is_kept_is_kept_for_somebody(self) -> None:
        """Who waits for a worker of its own, and has no other, and has it as soon as it is empty."""
        kept = self.scheduler._isolation._kept
        for request_id in kept:
            request = self.scheduler._requests[request_id]
            assert request.ticket and request.is_doubtful
        assert len({id(member) for member in kept.values()}) == len(kept)
        for member in self.scheduler.roster:
            assert member.is_kept == any(member is other for other in kept.values())
            assert member.slots or not member.is_kept or self.is_gathering

    @invariant()
    def what_is_held_is_wanted_soon(self) -> None:
        """An answer is held no longer than until its request's time is needed; what is split, until its deadline."""
        for request in self.scheduler._requests.values():
            check = request.check
            if check is not None and check.answers:
                assert request.run is None and self.share > 0
                assert check.is_split or self.now < check.take_at < request.deadline
                assert check.is_split or ("verify", request.request_id) in self.scheduler._due
                assert check.agreed is None

    @invariant()
    def nobody_waits_without_reason(self) -> None:
        """Where everybody who may run it has room, nobody is worth waiting for; but nobody overtakes those before it either."""
        if not self.is_gathering:
            for request in self.scheduler._requests.values():
                if request.ticket and not self.is_behind_others(request):
                    eligible = self.scheduler._choice.eligible(request, float(self.now))
                    assert not eligible or not all(member.has_room for member in eligible)

    def is_behind_others(self, request: Request) -> bool:
        """Only with open breakers somebody choosy may have a worker that those before it, who are not, do not have."""
        place = (request.deadline, request.arrival)
        queue = [other for other in self.scheduler._requests.values() if other.ticket and other.stage == request.stage]
        return bool(self.scheduler._choice.troubled) and any(
            not other.is_choosy and other.version.key == request.version.key and (other.deadline, other.arrival) < place for other in queue
        )

    @invariant()
    def live_and_ended_are_apart(self) -> None:
        live = set(self.scheduler._requests)
        ending = {action.request_id for action in self.scheduler._actions if isinstance(action, ev.Answer | ev.Fail)}  # to be said
        assert live <= self.admitted.keys()
        assert not live & (self.outcomes.keys() | ending) - {r for r in live if self.scheduler._ended.get(r) is None}
        assert not live & self.decided
        assert self.admitted.keys() == live | {r for r in self.admitted if r in self.outcomes or r in self.decided or r in ending}

    @invariant()
    def what_lives_is_accepted_in_time(self) -> None:
        waking = self.scheduler.next_wakeup()
        for request_id in self.scheduler._requests.keys() - self.accepted:
            due = self.admitted[request_id] + ACCEPT_S
            assert self.now < due and waking is not None and waking <= due

    @invariant()
    def nothing_is_held_back(self) -> None:
        """Unless it is not decided yet."""
        if not self.is_gathering:
            assert not self.scheduler._actions

    @invariant()
    def credit_is_kept(self) -> None:
        for member in self.scheduler.roster:
            worker = self.workers[member.worker_id]
            assert len(member.slots) <= CREDIT[member.worker_id]
            assert abs(member.held_s - sum(slot.busy_s for slot in member.slots.values())) < 1e-6
            if member.verdict is Verdict.LOST:
                assert not member.slots, "a lost worker holds nothing"
            if worker.is_connected:
                assert set(worker.held) <= set(member.slots), "what the worker holds, the scheduler knows"
                assert set(member.slots) <= set(worker.held) | set(worker.finished), "what the scheduler counts, the worker has"

    @invariant()
    def bytes_are_reserved(self) -> None:
        if not self.scheduler._requests:
            assert self.scheduler.reserved_bytes == 0
        assert self.scheduler.kept_bytes <= SETTINGS.max_kept_bytes

    def teardown(self) -> None:
        """With healthy workers and time, everything ends, and nothing stays behind."""
        for worker_id in WORKERS:
            if self.workers[worker_id].is_draining:
                self.kill(worker_id)
            self.start(worker_id)
        for _ in range(30):
            for worker_id in WORKERS:
                self.reconnect(worker_id) if not self.workers[worker_id].is_connected else None
                while self.workers[worker_id].asked:
                    self.load(worker_id)
                while self.workers[worker_id].held:
                    self.work(worker_id, "done")
            self.heartbeats()
            self.wait(2)
        assert not self.scheduler._requests
        assert self.scheduler.reserved_bytes == 0
        assert all(not member.slots for member in self.scheduler.roster)


Cluster.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestCluster = Cluster.TestCase
