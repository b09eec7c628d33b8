"""The worker process: what runtime/worker.py, executor.py and stages.py do around Holdings, without sockets, threads and files.

One task is computed at a time, in order of arrival. That a task has begun rides on the answer of the one before it; of a short one it is
not said. A process that dies is started again by its supervisor, on the same machine, under a new incarnation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random

from adapt.errors import AdaptError, DeadlineExceededError, InputMismatchError, ModelError, PlanError, StageNotResidentError
from adapt.planning.placement import StageNeed
from adapt.protocol import messages as msg
from adapt.protocol.ids import AttemptId, Digest
from adapt.protocol.wire import Blob
from adapt.scheduling.holdings import Answer, Holdings, Kept, Verdict
from adapt.simulation.arithmetic import Nature, computed, digest, growth, leaves, understood
from adapt.simulation.dispatcher import HEARTBEAT_S
from adapt.simulation.history import Execution, History
from adapt.simulation.inspector import Violation
from adapt.simulation.link import PeerLink
from adapt.simulation.network import Network, Wire
from adapt.simulation.story import Story
from adapt.simulation.timeline import Process, Timeline

SHORT_S = 0.002  # a stage that takes less is not said to have begun
PIECE_BYTES = 1 << 20  # of an artifact, asked for at a time
SLOWEST_S = 10.0  # longer takes no task, however slow the machine
LOADING_S = 0.05  # to make a stage ready whose file is there
DRAIN_S = 5.0  # the most that a drain may take
LINGER_S = 0.01  # for a goodbye to leave
RESTART_S = (0.2, 2.0)  # after which the supervisor starts a process again
LEAVES = 3  # of every activation


@dataclass(slots=True, kw_only=True)
class Machine:
    """What a worker runs on; it outlives every process.

    Attributes:
        kind: its numeric class, as a number.
        slowness: seconds it takes for one predicted second.
        drag: how many times slower than usual it is at the moment.
        raises: a fragile input makes the model raise here.
        spoils: share of its outputs that lack a leaf.
        lies: share of its outputs that are another number than they should be.
        loads: whether it can make stages ready; else its disk is full, say.
        files: of stages, and how many bytes of each have come.
    """

    name: str
    kind: int
    credit: int
    budget_bytes: int
    slowness: float
    drag: float = 1.0
    raises: bool = False
    spoils: float = 0.0
    lies: float = 0.0
    loads: bool = True
    files: dict[Digest, int] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Work:
    """One attempt on its way through the executor."""

    order: msg.RunStage
    blobs: tuple[Blob, ...]
    arrived_at: float
    began_at: float = 0.0
    compute_s: float = 0.0
    is_cancelled: bool = False


@dataclass(slots=True)
class _Resident:
    file_bytes: int
    users: int = 0
    is_unwanted: bool = False  # to be dropped when nobody uses it


@dataclass(slots=True, eq=False)
class _Loading:
    file_bytes: int
    is_pulled: bool = False


class Worker(Process):
    """One machine's worker through all its lives.

    Args:
        needs: of every stage that was ever deployed.
    """

    def __init__(
        self,
        timeline: Timeline,
        random: Random,
        network: Network,
        story: Story,
        history: History,
        *,
        machine: Machine,
        wire: Wire,
        needs: Mapping[Digest, StageNeed],
        rate: float,
    ) -> None:
        super().__init__(machine.name, timeline, random, rate=rate, offset=random.uniform(0.0, 1e5))
        self.machine, self.wire = machine, wire
        self._network, self._story, self._history, self._needs = network, story, history, needs
        self.is_alive = False
        self.is_supervised = True  # else nobody starts it again
        self.highest_term = 0

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        if self.is_alive:
            return
        self.begin_life()
        self.incarnation = self.random.getrandbits(48)
        self.holdings = Holdings(credit=self.machine.credit)
        self._works: dict[AttemptId, _Work] = {}
        self._waiting_works: deque[_Work] = deque()
        self._running: _Work | None = None
        self._resident: dict[Digest, _Resident] = {}
        self._loading: dict[Digest, _Loading] = {}
        self.is_draining = False
        self.link = PeerLink(
            self._network, self, self, self.wire, self._story, incarnation=self.incarnation, arm=lambda: self.set_alarm(self.next_wakeup())
        )
        self._tell("starts")
        self.link.start()
        self.later(HEARTBEAT_S * self.random.random(), self._beat)

    def crash(self, *, is_clean: bool) -> None:
        """It dies. `is_clean`: its system lives and closes the connections."""
        if not self.is_alive:
            return
        self._tell("dies")
        self._history.deaths.append(self.timeline.now)
        self.end_life()
        self._network.peer_ended(self.wire, is_clean=is_clean)
        if self.is_supervised:
            self.timeline.after(self.random.uniform(*RESTART_S), self.start)

    def drain(self) -> None:
        """Hand back what has not begun, finish and deliver what has, say goodbye, end."""
        if not self.is_alive or self.is_draining:
            return
        self.is_draining = True
        self._tell("drains")
        handed_back = [work.order.attempt for work in self._waiting_works]
        self._waiting_works.clear()
        for attempt in handed_back:
            self._let_go(attempt)
        self.holdings.hand_back(handed_back)
        self._stop_pulling()
        self.link.send(msg.Draining(handed_back=handed_back))
        self.later(DRAIN_S, self._end)
        self._end_if_drained()

    def _end_if_drained(self) -> None:
        if self.is_draining and self.holdings.is_empty:
            self._end()

    def _end(self) -> None:
        self.link.send(msg.Goodbye(reason="drained"))
        self.later(LINGER_S, self._gone)

    def _gone(self) -> None:
        self.crash(is_clean=True)

    def _tell(self, verb: str) -> None:
        self._story.add(self.timeline.now, self.name, verb, "")

    # ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def next_wakeup(self) -> float | None:
        return self.link.next_wakeup()

    def woken(self) -> None:
        self.link.tick(self.clock())
        self.set_alarm(self.next_wakeup())

    def _beat(self) -> None:
        self.later(HEARTBEAT_S, self._beat)
        if self.link.is_open:
            resident_bytes = self.resident_bytes
            percent = 100.0 * resident_bytes / self.machine.budget_bytes
            self.link.send(msg.Heartbeat(progress=0, memory_percent=percent, resident_bytes=resident_bytes))
            self._send_unsent()

    # ── session ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def hello(self, highest_term: int) -> msg.WorkerHello:
        device = msg.DeviceFacts(device="cpu", device_name="simulated", threads=1, numeric_class=f"class {self.machine.kind}")
        return msg.WorkerHello(
            protocol_version=msg.PROTOCOL_VERSION,
            worker_id=self.name,
            incarnation=self.incarnation,
            highest_term=highest_term,
            software="adapt simulated",
            device=device,
            stage_budget_bytes=self.machine.budget_bytes,
            credit=self.machine.credit,
            resident=self.resident,
            held=self.holdings.held,
            finished=self.holdings.finished,
        )

    def opened(self, welcome: msg.Welcome, term: int) -> None:
        self._stop_pulling()
        if self.is_draining:
            self.link.send(msg.Draining(handed_back=[]))
        for attempt in self.holdings.reopen(term):
            self._cancel_held(attempt)
        self._send_unsent()
        if self._running is not None:
            self.link.send(msg.Begun(attempt=self._running.order.attempt))

    def lost(self) -> None:
        self._stop_pulling()

    def refused(self, refused: msg.Refused) -> None:
        self.later(0.0, self._gone)

    def turned(self) -> None:
        pass

    def received(self, message: msg.Message, blobs: tuple[Blob, ...]) -> None:
        match message:
            case msg.RunStage():
                self._run_stage(message, blobs)
            case msg.StageAck(attempts=attempts):
                self.holdings.acknowledge(attempts)
                self._end_if_drained()
            case msg.CancelStage(attempt=attempt):
                self._cancel(attempt)
            case msg.LoadStage():
                self._load(message)
            case msg.UnloadStage(artifact=artifact):
                self._unload(Digest(artifact))
            case msg.Goodbye():
                self._stop_pulling()
            case other:
                raise AssertionError(f"a dispatcher does not say {other!r} to a worker")

    # ── attempts come and go ─────────────────────────────────────────────────────────────────────────────────────────

    def _run_stage(self, order: msg.RunStage, blobs: tuple[Blob, ...]) -> None:
        attempt = order.attempt
        match self.holdings.accept(attempt):
            case Verdict.ACCEPTED if self.is_draining:
                self.holdings.hand_back([attempt])
                self.link.send(msg.Draining(handed_back=[attempt]))
            case Verdict.ACCEPTED:
                entry = self._resident.get(Digest(order.artifact))
                if entry is None:
                    self._refuse(attempt, StageNotResidentError(f"stage {order.artifact[:12]} is not resident"))
                else:
                    entry.users += 1
                    self._submit(order, blobs)
            case Verdict.FULL:
                raise Violation(f"{self.name} is sent more than its credit", attempt.request)
            case Verdict.FINISHED:
                self._send_kept(self.holdings.kept(attempt))
            case _:  # held or cancelled already
                pass

    def _submit(self, order: msg.RunStage, blobs: tuple[Blob, ...]) -> None:
        work = self._works[order.attempt] = _Work(order, blobs, self.clock())
        self._waiting_works.append(work)
        if self._running is None:
            begun = self._begin_next()
            if begun is not None:
                self.link.send(msg.Begun(attempt=begun))

    def _cancel(self, attempt: AttemptId) -> None:
        match self.holdings.cancel(attempt):
            case Verdict.HELD:
                self._cancel_held(attempt)
            case Verdict.UNKNOWN:
                self._send_unsent()
            case _:  # finished: its answer is on its way
                pass

    def _cancel_held(self, attempt: AttemptId) -> None:
        work = self._works[attempt]
        work.is_cancelled = True
        if work is not self._running:
            self._waiting_works.remove(work)
            self._let_go(attempt)
            self._answer(attempt, msg.StageCancelled(attempt=attempt))

    # ── computing ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _begin_next(self) -> AttemptId | None:
        """Begin the next task. Returns the attempt if that has to be said."""
        while self._waiting_works:
            work = self._waiting_works.popleft()
            attempt, now = work.order.attempt, self.clock()
            if now - work.arrived_at >= work.order.budget_s:
                self._let_go(attempt)
                self._refuse(attempt, DeadlineExceededError(work.order.budget_s))
                continue
            usual_s = self._needs[Digest(work.order.artifact)].cost_s * self.machine.slowness
            work.began_at = now
            work.compute_s = min(usual_s * self.machine.drag, SLOWEST_S) * self.random.uniform(0.8, 1.2)
            self._running = work
            self._history.executions.append(Execution(attempt.request, attempt.stage, self.timeline.now))
            if _nature(work) is Nature.POISON:
                self.later(work.compute_s * self.random.random(), self._killed_by, work)
            else:
                self.later(work.compute_s, self._computed, work)
            return attempt if usual_s >= SHORT_S else None
        return None

    def _killed_by(self, work: _Work) -> None:
        self.crash(is_clean=True)

    def _computed(self, work: _Work) -> None:
        attempt = work.order.attempt
        self._running = None
        begun = self._begin_next()
        self._let_go(attempt)
        if work.is_cancelled:
            self._answer(attempt, msg.StageCancelled(attempt=attempt))
        elif (error := self._error(work)) is not None:
            self._refuse(attempt, error)
        else:
            done, blobs = self._done(work, begun)
            self._answer(attempt, done, blobs)
            begun = None
        if begun is not None:
            self.link.send(msg.Begun(attempt=begun))
        self._end_if_drained()

    def _error(self, work: _Work) -> AdaptError | None:
        if len(work.order.leaves) != LEAVES:
            return InputMismatchError(f"expected {LEAVES} inputs, got {len(work.order.leaves)}")
        nature = _nature(work)
        if nature is Nature.WRONG or (nature is Nature.FRAGILE and self.machine.raises):
            return ModelError("RuntimeError: an input like this one")
        return None

    def _done(self, work: _Work, begun: AttemptId | None) -> tuple[msg.StageDone, tuple[Blob, ...]]:
        value, classes, nature = understood(work.order.leaves)
        artifact = work.order.artifact
        value_after = computed(value, artifact)
        if self.machine.lies and self.random.random() < self.machine.lies:
            value_after = computed(value_after, "another")
        output = leaves(value_after, classes | 1 << self.machine.kind, nature)
        if self.machine.spoils and self.random.random() < self.machine.spoils:
            output.pop()
            self._history.spoilt.add(work.order.attempt.request)
        times = msg.StageTimes(
            wait_s=max(work.began_at - work.arrived_at, 0.0), decode_s=0.0, compute_s=max(self.clock() - work.began_at, 0.0), encode_s=0.0
        )
        done = msg.StageDone(
            attempt=work.order.attempt, leaves=output, times=times, input_digest=b"", output_digest=digest(value_after), begun=begun
        )
        return done, tuple(Blob(blob.size * growth(artifact), 0, ()) for blob in work.blobs)

    def _refuse(self, attempt: AttemptId, error: AdaptError) -> None:
        code, message, fields = error.to_wire()
        self._answer(attempt, msg.StageFailed(attempt=attempt, code=code, message=message, fields=fields))

    def _answer(self, attempt: AttemptId, answer: Answer, blobs: tuple[Blob, ...] = ()) -> None:
        self._send_kept(self.holdings.finish(attempt, answer, blobs))

    def _send_kept(self, kept: Kept) -> None:
        kept.is_sent = self.link.send(kept.answer, kept.blobs)

    def _send_unsent(self) -> None:
        for kept in self.holdings.unsent():
            self._send_kept(kept)

    def _let_go(self, attempt: AttemptId) -> None:
        artifact = Digest(self._works.pop(attempt).order.artifact)
        entry = self._resident[artifact]
        entry.users -= 1
        if entry.is_unwanted and not entry.users:
            del self._resident[artifact]

    # ── stages come and go ───────────────────────────────────────────────────────────────────────────────────────────

    @property
    def resident(self) -> list[str]:
        return sorted(artifact for artifact, entry in self._resident.items() if not entry.is_unwanted)

    @property
    def resident_bytes(self) -> int:
        return sum(entry.file_bytes for entry in self._resident.values())

    @property
    def staying_bytes(self) -> int:
        """Of stages that do not go with the last attempt that uses them."""
        return sum(entry.file_bytes for entry in self._resident.values() if not entry.is_unwanted)

    def _load(self, order: msg.LoadStage) -> None:
        artifact = Digest(order.artifact)
        entry = self._resident.get(artifact)
        if entry is not None:
            entry.is_unwanted = False
            self._say_loaded(artifact, entry.file_bytes)
        elif artifact not in self._loading:
            taken = self.staying_bytes + sum(loading.file_bytes for loading in self._loading.values())
            if taken + order.file_bytes > self.machine.budget_bytes:
                self._say_load_failed(artifact, PlanError(f"stage {artifact} has no room"))
                return
            self._loading[artifact] = loading = _Loading(order.file_bytes)
            self._go_on_loading(artifact, loading)

    def _go_on_loading(self, artifact: Digest, loading: _Loading) -> None:
        """Ask for the next piece, or make the stage ready when all have come."""
        if self._loading.get(artifact) is not loading:  # it was stopped
            return
        there = self.machine.files.get(artifact, 0)
        missing = loading.file_bytes - there
        loading.is_pulled = missing > 0
        if missing <= 0:
            self.later(LOADING_S * self.random.random(), self._loaded, artifact, loading)
            return
        length = min(PIECE_BYTES, missing)
        self.link.send(msg.Fetch(artifact=artifact, offset=there, length=length))
        self.later(self._piece_s(length), self._piece_came, artifact, loading, there + length)

    def _piece_s(self, length: int) -> float:
        quality = self.wire.quality
        return 2 * quality.latency_s + length / quality.bytes_per_s

    def _piece_came(self, artifact: Digest, loading: _Loading, there: int) -> None:
        if self._loading.get(artifact) is loading:
            if self.wire.is_cut:  # it comes when the way is free
                self.later(0.2, self._piece_came, artifact, loading, there)
                return
            self.machine.files[artifact] = there
            self._go_on_loading(artifact, loading)

    def _loaded(self, artifact: Digest, loading: _Loading) -> None:
        if self._loading.get(artifact) is loading:
            del self._loading[artifact]
            if not self.machine.loads:
                self._say_load_failed(artifact, PlanError(f"stage {artifact} cannot be loaded"))
                return
            self._resident[artifact] = _Resident(loading.file_bytes)
            self._say_loaded(artifact, loading.file_bytes)

    def _say_loaded(self, artifact: Digest, file_bytes: int) -> None:
        self.link.send(msg.StageLoaded(artifact=artifact, resident_bytes=file_bytes, load_s=0.0))

    def _say_load_failed(self, artifact: Digest, error: AdaptError) -> None:
        code, message, fields = error.to_wire()
        self.link.send(msg.LoadFailed(artifact=artifact, code=code, message=message, fields=fields))

    def _unload(self, artifact: Digest) -> None:
        self._loading.pop(artifact, None)
        entry = self._resident.get(artifact)
        if entry is None:
            return
        if entry.users:
            entry.is_unwanted = True
        else:
            del self._resident[artifact]

    def _stop_pulling(self) -> None:
        for artifact in [artifact for artifact, loading in self._loading.items() if loading.is_pulled]:
            del self._loading[artifact]

    def evict(self) -> bool:
        """Lose a stage that nobody uses, and say nothing of it. False: there is none."""
        unused = [artifact for artifact in sorted(self._resident) if not self._resident[artifact].users] if self.is_alive else []
        if unused:
            del self._resident[self.random.choice(unused)]
        return bool(unused)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is held, and every answer acknowledged."""
        return not self.is_alive or self.holdings.is_empty


def _nature(work: _Work) -> Nature:
    return Nature(int(work.order.leaves[2])) if len(work.order.leaves) == LEAVES else Nature.PLAIN  # type: ignore[arg-type]  # a number
