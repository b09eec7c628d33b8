"""The dispatcher process: what runtime/dispatcher.py does around the scheduler, without sockets, files and threads.

Messages become events, events go to the scheduler, actions become messages. What has come is noted, and decided on together; before
every fact that is not about tasks a decision is taken. Acknowledgements ride on the next task, or leave after a while. After a lag all
that has come is read before anything that is due is done.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import TypeAlias

from adapt.errors import AdaptError, CanaryError, ConnectError, WireError
from adapt.planning.placement import Plan, StageNeed, place
from adapt.protocol import messages as msg
from adapt.protocol.ids import ClientId, Digest, Epoch, RoutingId, WorkerId, bulk_of, control_of
from adapt.protocol.wire import Blob, Envelope
from adapt.scheduling import events as ev
from adapt.scheduling import translation
from adapt.scheduling.acknowledgements import Acknowledgements
from adapt.scheduling.deadlines import earliest
from adapt.scheduling.liveness import LAG_S, Verdict
from adapt.scheduling.scheduler import Scheduler
from adapt.scheduling.session import Session, Sessions
from adapt.scheduling.settings import SchedulerSettings
from adapt.scheduling.term import Reign
from adapt.simulation.inspector import Inspector
from adapt.simulation.leases import LeaseService
from adapt.simulation.link import CONTROL_BYTES
from adapt.simulation.network import Connection, Damaged, Item, Network
from adapt.simulation.story import Story
from adapt.simulation.timeline import Process, Timeline

HEARTBEAT_S = 0.5
MALFORMED_LIMIT, MALFORMED_WINDOW_S = 3, 10.0  # so many unreadable messages of one client within so long, and it is refused
TURN_S = 0.0004  # the most that lies between an arrival and the turn of the loop in which it is read
MAX_MESSAGE_BYTES = 256 << 20
DRAIN_S = 3.0  # the most that a drain may take
JUDGE_S = 0.05  # the most that a look at an output takes
LOOK_S = 0.1  # between two looks whether it is over
LINGER_S = 0.01  # for a goodbye to leave
_OF_TASKS = {msg.InferRequest, msg.ReplyAck, msg.Begun, msg.StageDone}

MakeScheduler: TypeAlias = Callable[[SchedulerSettings, Random], Scheduler]


@dataclass(frozen=True, slots=True)
class _Came:
    connection: Connection
    item: Item


@dataclass(frozen=True, slots=True)
class _Broke:
    connection: Connection


@dataclass(frozen=True, slots=True)
class _Undelivered:
    routing_id: RoutingId
    message: msg.Message


_Arrival: TypeAlias = "_Came | _Broke | _Undelivered | ev.Event"


@dataclass(slots=True)
class _Greeted:
    """What is remembered of a session besides what the session table does."""

    hello: msg.WorkerHello | msg.ClientHello
    early: list[Envelope] = field(default_factory=list)  # what came on control before bulk was attached


class Dispatcher(Process):
    """One dispatcher through all its reigns. What it has written down outlives them: versions, and in the lease service its term."""

    def __init__(
        self,
        timeline: Timeline,
        random: Random,
        network: Network,
        story: Story,
        *,
        settings: SchedulerSettings,
        make_scheduler: MakeScheduler,
        inspector: Inspector,
        lease_ttl_s: float,
        lease_lag_s: float,
        rate: float,
    ) -> None:
        super().__init__("dispatcher", timeline, random, rate=rate, offset=1000.0)
        self.process: Process = self
        self.settings, self._make_scheduler = settings, make_scheduler
        self.network, self.story, self.inspector = network, story, inspector
        self.leases = LeaseService(
            timeline,
            ttl_s=lease_ttl_s,
            lag_s=lease_lag_s,
            ended=lambda worker_id: self._lease_told(ev.LeaseEnded(worker_id=worker_id)),
            renewed=lambda worker_id: self._lease_told(ev.LeaseRenewed(worker_id=worker_id)),
        )
        self.numbers: dict[str, int] = {}  # deployment -> the highest number it ever had
        self.ever: dict[ev.VersionKey, ev.Version] = {}  # every version there ever was
        self._expected: dict[ev.VersionKey, tuple[int, ...]] = {}  # what has to come of each version's canaries
        self._stored: dict[ev.VersionKey, ev.Version] = {}  # versions as they are written down
        self._ready: set[ev.VersionKey] = set()  # those that have taken requests
        self.counters = inspector.counters
        self.is_alive = False
        inspector.unread = self._unread

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _unread(self) -> set[str]:
        """Whose messages have arrived and were not looked at."""
        sources = [item.connection for item in self._inbox if isinstance(item, _Came)]
        sources += [source for source, _, _ in self._waiting if isinstance(source, Connection)]
        return {connection.peer.process.name for connection in sources}

    def start(self) -> None:
        """Begin a reign."""
        self.begin_life()
        self.is_draining = False
        self.scheduler = self._make_scheduler(self.settings, Random(self.random.getrandbits(32)))
        self.sessions, self.reign = Sessions(1 + self.random.getrandbits(32)), Reign()
        self._greeted: dict[int, _Greeted] = {}
        self._spoilt: dict[str, list[float]] = {}
        self._acks = Acknowledgements()
        self._inbox: deque[_Arrival] = deque()
        self._is_driven = self._is_undecided = False
        self.leases.write_term(self.reign.begin(self.leases.campaign()))
        self.story.add(self.timeline.now, self.name, "starts", f"with term {self.reign.term}")
        self.inspector.reign_begins(self.scheduler, self.reign)
        self._restore()

    def _restore(self) -> None:
        newest = {key[0]: version for key, version in sorted(self._stored.items()) if key in self._ready}
        self._stored = {version.key: version for version in newest.values()}
        self._ready = set(self._stored)
        for worker_id in sorted({worker for version in newest.values() for places in version.plan.places for worker in places}):
            self._handle(ev.WorkerExpected(worker_id=worker_id))
        for version in newest.values():
            self._handle(ev.VersionDeployed(version=version, is_restored=True))
        self._arm()

    def crash(self, *, is_clean: bool) -> None:
        if self.is_alive:
            self.story.add(self.timeline.now, self.name, "dies", "")
            self.end_life()
            self.network.router_ended(is_clean=is_clean)

    def drain(self) -> None:
        """Take nothing new, finish what lives, say goodbye, end."""
        if self.is_alive and not self.is_stopped:
            self.counters["dispatcher drained"] += 1
            self.is_draining = True
            self.tell(ev.DrainBegun())
            self.later(LOOK_S, self._go_on_draining, self.clock() + DRAIN_S)

    def _go_on_draining(self, end: float) -> None:
        if self.clock() < end and (self.scheduler.live_requests or self.scheduler.unacknowledged):
            self.later(LOOK_S, self._go_on_draining, end)
            return
        self._flush_acks(is_last=True)
        for session in self.sessions:
            self._send(session, msg.Goodbye(reason="the dispatcher has drained"))
        self.later(LINGER_S, self._drained)

    def _drained(self) -> None:
        self.crash(is_clean=True)

    # ── the drive loop ───────────────────────────────────────────────────────────────────────────────────────────────

    may_tick_first = False

    def came(self, connection: Connection, item: Item) -> None:
        if not isinstance(item, Damaged) and isinstance(item.message, msg.HELLOS):
            connection.has_greeted = True
        self._put(_Came(connection, item))

    def broke(self, connection: Connection) -> None:
        if connection.has_greeted and not self.network.has_greeted_since(connection):
            self._put(_Broke(connection))

    def tell(self, event: ev.Event) -> None:
        self._put(event)

    def _lease_told(self, event: ev.Event) -> None:
        self.hand(self.leases, self.tell, event)

    def _put(self, arrival: _Arrival) -> None:
        self._inbox.append(arrival)
        self._wake()

    def _wake(self) -> None:
        if not self._is_driven:
            self._is_driven = True
            self.timeline.after(TURN_S * self.random.random(), self._drive, self.life)

    def _drive(self, life: int) -> None:
        if life == self.life and not self.is_stopped:
            self._turn_over()

    def woken(self) -> None:
        self._turn_over()

    def _caught_up(self) -> None:
        self._turn_over()

    def _turn_over(self) -> None:
        self._is_driven = False
        self._empty_inbox()
        now = self.clock()
        due = self._next_wakeup()
        if due is not None and due <= now:
            if now - due > LAG_S:  # we were late, not they
                self.counters["loop lag"] += 1
                self.scheduler.excuse(now - due)
            self._do_what_is_due(now)
        self._flush_acks()
        self._arm()
        if self._inbox:
            self._wake()
        self.inspector.turned(now)

    def _do_what_is_due(self, now: float) -> None:
        actions = self.scheduler.tick(now)
        self.inspector.ticked(now)
        self._act(actions)
        self._empty_inbox()

    def _empty_inbox(self) -> None:
        """Take note of everything, and decide once for what the tasks of all peers have brought."""
        self._decide()
        while self._inbox:
            item = self._inbox.popleft()
            is_of_tasks = type(item) is _Came and type(item.item) is Envelope and type(item.item.message) in _OF_TASKS
            if not (is_of_tasks or type(item) is _Broke):
                self._decide()
            match item:
                case _Came(connection, Damaged()):
                    self._malformed(connection.routing_id, WireError("a frame does not match its checksum"))
                case _Came(connection, Envelope() as envelope):
                    self._received(connection.routing_id, envelope)
                case _Broke(connection):
                    self._disconnected(connection.routing_id)
                case _Undelivered():
                    self._undelivered(item)
                case event:
                    self._handle(event)  # type: ignore[arg-type]  # nothing else is left
            if not self._inbox:
                self._decide()

    def _note(self, event: ev.Event) -> None:
        now = self.clock()
        self._tell(event, now)
        self.scheduler.note(event, now)
        self.inspector.noted(event, now)
        self._is_undecided = True

    def _decide(self) -> None:
        if self._is_undecided:
            self._is_undecided = False
            self._act(self.scheduler.decide(self.clock()))

    def _handle(self, event: ev.Event) -> None:
        self._is_undecided = False
        now = self.clock()
        self._tell(event, now)
        self.scheduler.note(event, now)
        self.inspector.noted(event, now)
        self._act(self.scheduler.decide(now))

    def _tell(self, event: ev.Event, now: float) -> None:
        if type(event) is not ev.WorkerHeard:
            self.story.add(self.timeline.now, self.name, "notes", event)
        self.inspector.notes(event, now)

    def _next_wakeup(self) -> float | None:
        return earliest(self.scheduler.next_wakeup(), self._acks.next_wakeup())

    def _arm(self) -> None:
        self.set_alarm(self._next_wakeup())

    # ── sessions ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _received(self, routing_id: RoutingId, envelope: Envelope) -> None:
        match envelope.message:
            case msg.WorkerHello() as hello:
                self._hello(routing_id, hello, "worker", hello.worker_id)
            case msg.ClientHello() as hello:
                self._hello(routing_id, hello, "client", hello.client_id.hex())
            case message:
                session = self._believed(routing_id, envelope)
                if session is None:
                    self._say_hello(routing_id, envelope.session, envelope.term)
                elif isinstance(message, msg.Attach):
                    self._attached(routing_id, session)
                elif session.is_overdue(self.clock()):
                    self.counters["bulk never came"] += 1
                    self._end_session(session, "its second connection never came")
                    self._say_hello(routing_id, envelope.session, envelope.term)
                elif not session.is_attached:
                    self._greeted[session.number].early.append(envelope)
                else:
                    self._heard(session, envelope)

    def _believed(self, routing_id: RoutingId, envelope: Envelope) -> Session | None:
        """The session of a message, if it is of this reign and comes from where it should."""
        session = self.sessions.find(routing_id, envelope.session)
        return session if session is not None and envelope.term == self.reign.term else None

    def _heard(self, session: Session, envelope: Envelope) -> None:
        if session.role == "worker":
            self._from_worker(session, envelope)
        else:
            self._from_client(session, envelope)

    def _hello(self, routing_id: RoutingId, hello: msg.WorkerHello | msg.ClientHello, role: str, name: str) -> None:
        if self.reign.hello(hello.highest_term, has_met_us=self.sessions.has_met(role, name, hello.incarnation)):
            self.counters["term raised"] += 1
            self.leases.write_term(self.reign.term)
            for session in list(self.sessions):
                self._end_session(session, "the term was raised")
        earlier = self.sessions.greeted(role, name)
        if earlier is not None and earlier.incarnation != hello.incarnation and self._is_alive(earlier):
            self.counters["another of this name refused"] += 1
            self._refuse(routing_id, ConnectError("dispatcher", f"a {role} named {name} is connected already"))
            return
        if earlier is not None:
            self.counters["hello without a farewell"] += 1
            self._greeted.pop(earlier.number, None)
        session = self.sessions.welcome(routing_id, role, name, hello.incarnation, self.clock())
        self._greeted[session.number] = _Greeted(hello)
        self._send(session, _WELCOME)

    def _is_alive(self, session: Session) -> bool:
        member = self.scheduler.roster.get(WorkerId(session.name))
        return member is not None and member.verdict is Verdict.READY

    def _attached(self, routing_id: RoutingId, session: Session) -> None:
        self.sessions.attach(routing_id, session.number)
        greeted = self._greeted[session.number]
        if isinstance(greeted.hello, msg.ClientHello):
            self._handle(ev.ClientArrived(client_id=ClientId(greeted.hello.client_id)))
        else:
            self._worker_joined(greeted.hello)
        early, greeted.early = greeted.early, []
        for envelope in early:
            self.counters["control came before bulk"] += 1
            if self.sessions.find(session.routing_id, session.number) is session:
                self._heard(session, envelope)

    def _worker_joined(self, hello: msg.WorkerHello) -> None:
        worker_id = WorkerId(hello.worker_id)
        self.leases.refresh(worker_id)
        self._handle(translation.joined(hello))

    def _malformed(self, routing_id: RoutingId, error: WireError) -> None:
        self.counters["malformed messages"] += 1
        session = self.sessions.routed(routing_id)
        if session is None:
            return
        now = self.clock()
        self._spoilt = {name: moments for name, moments in self._spoilt.items() if moments[-1] > now - MALFORMED_WINDOW_S}
        moments = self._spoilt.setdefault(session.name, [])
        moments.append(now)
        self._end_session(session, f"a message could not be read: {error}")
        if len(moments) >= MALFORMED_LIMIT and session.role == "client":
            self.counters["stubborn peer refused"] += 1
            self._refuse(session.routing_id, error)
        else:
            self._say_hello(session.routing_id, session.number, self.reign.term)

    def _disconnected(self, routing_id: RoutingId) -> None:
        session = self.sessions.routed(routing_id)
        if session is not None:
            self._end_session(session, "its connection was closed")

    def _undelivered(self, item: _Undelivered) -> None:
        session = self.sessions.routed(item.routing_id)
        if session is None:
            return
        if isinstance(item.message, msg.RunStage):
            self._handle(ev.DispatchRefused(worker_id=WorkerId(session.name), attempt=item.message.attempt))
        self._end_session(session, "its connection takes nothing")

    def _end_session(self, session: Session, reason: str, *, is_intended: bool = False) -> None:
        self.sessions.end(session.number)
        greeted = self._greeted.pop(session.number, None)
        if greeted is None:
            return
        if isinstance(greeted.hello, msg.WorkerHello):
            self._note(ev.WorkerDisconnected(worker_id=WorkerId(session.name), reason=reason, is_intended=is_intended))
            self._wake()
        else:
            self._handle(ev.ClientDisconnected(client_id=ClientId(greeted.hello.client_id)))

    def _say_hello(self, routing_id: RoutingId, session: int, term: int) -> None:
        self.counters["stranger asked for a hello"] += 1
        self._put_on_wire(control_of(routing_id), Envelope(msg.SayHello(), session, term))

    def _refuse(self, routing_id: RoutingId, error: AdaptError) -> None:
        code, message, fields = error.to_wire()
        self._put_on_wire(control_of(routing_id), Envelope(msg.Refused(code=code, message=message, fields=fields), 0, self.reign.term))

    def _send(self, session: Session, message: msg.Message, blobs: tuple[Blob, ...] = ()) -> None:
        is_bulk = sum(blob.size for blob in blobs) > CONTROL_BYTES if blobs else False
        route = bulk_of(session.routing_id) if is_bulk else session.routing_id
        self._put_on_wire(route, Envelope(message, session.number, self.reign.term, blobs))

    def _put_on_wire(self, route: RoutingId, envelope: Envelope) -> None:
        self.story.add(self.timeline.now, self.name, "says", envelope)
        if not self.network.send(route, envelope):
            self.counters["socket refused a message"] += 1
            self._put(_Undelivered(control_of(route), envelope.message))

    # ── messages become events ───────────────────────────────────────────────────────────────────────────────────────

    def _from_worker(self, session: Session, envelope: Envelope) -> None:
        worker_id = WorkerId(session.name)
        match envelope.message:
            case msg.Begun(attempt=attempt):
                self._note(ev.StageBegun(worker_id=worker_id, attempt=attempt))
            case msg.StageDone() as done:
                self._note(translation.finished(worker_id, done, envelope.blobs))
                if done.begun is not None:
                    self._note(ev.StageBegun(worker_id=worker_id, attempt=done.begun))
            case msg.Goodbye():
                self._end_session(session, "it said goodbye", is_intended=True)
                self.leases.revoke(worker_id)
                self._handle(ev.WorkerLeft(worker_id=worker_id))
            case message:
                if isinstance(message, msg.Heartbeat):
                    self.leases.refresh(worker_id)
                fact = translation.fact(worker_id, message)
                assert fact is not None, f"a worker does not say {message!r}"
                self._handle(fact)

    def _from_client(self, session: Session, envelope: Envelope) -> None:
        match envelope.message:
            case msg.InferRequest() as request:
                value = request.leaves[0]
                assert isinstance(value, int)
                self._note(translation.arrived(request, envelope.blobs, fingerprint=value))
            case msg.ReplyAck(request_ids=request_ids):
                for request_id in request_ids:
                    self._note(ev.OutcomeAcknowledged(request_id=request_id))
            case msg.CancelRequest(request_id=request_id):
                self._handle(ev.RequestCancelled(request_id=request_id))
            case msg.Goodbye():
                self._end_session(session, "it said goodbye")
                self._handle(ev.ClientLeft(client_id=ClientId(bytes.fromhex(session.name))))
            case other:
                raise AssertionError(f"a client does not say {other!r}")

    # ── actions become messages ──────────────────────────────────────────────────────────────────────────────────────

    def _act(self, actions: Sequence[ev.Action]) -> None:
        now = self.clock()
        self.inspector.decides(actions)
        for action in actions:
            self.inspector.acts(action, now)
            match action:
                case ev.Dispatch():
                    self._dispatch(action)
                case ev.Acknowledge():
                    self._acks.owe(action.worker_id, action.attempt)
                case ev.Answer() | ev.Fail() | ev.Accept():
                    self._to_client(action.request_id.client, *translation.said_to_client(action))
                case ev.Cancel():
                    self._to_worker(action.worker_id, msg.CancelStage(attempt=action.attempt))
                case _:
                    self.story.add(self.timeline.now, self.name, "decides", action)
                    self._act_on_plan(action)

    def _act_on_plan(self, action: ev.Action) -> None:
        match action:
            case ev.Load():
                self._to_worker(action.worker_id, msg.LoadStage(artifact=action.artifact, file_bytes=self._file_bytes(action.artifact)))
            case ev.Unload():
                self._to_worker(action.worker_id, msg.UnloadStage(artifact=action.artifact))
            case ev.Evict():
                self.leases.revoke(action.worker_id)
                session = self.sessions.greeted("worker", action.worker_id)
                if session is not None:
                    self.sessions.end(session.number)
                    self._greeted.pop(session.number, None)
            case ev.PlanChanged(version=version):
                if version.key in self._stored:
                    self._stored[version.key] = version
            case ev.VersionReady(version=version):
                self._ready.add(version.key)
            case ev.JudgeCanary():
                self.later(JUDGE_S * self.random.random(), self._judge, action)
            case ev.VersionFailed() | ev.Suspect() | ev.Trust():
                pass
            case ev.VersionReleased(version=version):
                self._stored.pop(version.key, None)
                self._ready.discard(version.key)
            case _:
                raise AssertionError(f"unknown action {action!r}")

    def _judge(self, action: ev.JudgeCanary) -> None:
        version = action.version
        error = None
        if action.output.leaves[0] != self._expected[version.key][action.canary]:
            error = CanaryError(f"canary {action.canary} came out wrong", canary=action.canary)
        deployment, number, cut = version.key
        self.tell(ev.CanaryJudged(deployment=deployment, number=number, cut=cut, run=action.run, error=error))

    def _file_bytes(self, artifact: Digest) -> int:
        for version in self._stored.values():
            for need in version.plan.stages:
                if need.artifact == artifact:
                    return need.memory_bytes
        raise KeyError(artifact)

    def _dispatch(self, action: ev.Dispatch) -> None:
        session = self.sessions.named("worker", action.worker_id)
        if session is not None:
            self._acks.addressed(action.worker_id)
            self._send(session, translation.order(action), action.input.blobs)
            return
        self._inbox.appendleft(ev.DispatchRefused(worker_id=action.worker_id, attempt=action.attempt))
        self._wake()

    def _flush_acks(self, *, is_last: bool = False) -> None:
        for worker_id, attempts in self._acks.end_turn(self.clock(), is_last=is_last):
            self._to_worker(worker_id, msg.StageAck(attempts=attempts))

    def _to_worker(self, worker_id: WorkerId, message: msg.Message) -> None:
        session = self.sessions.named("worker", worker_id)
        if session is not None:
            self._send(session, message)

    def _to_client(self, client_id: bytes, message: msg.Message, blobs: tuple[Blob, ...] = ()) -> None:
        session = self.sessions.named("client", client_id.hex())
        if session is not None:
            self._send(session, message, blobs)

    # ── deployments ──────────────────────────────────────────────────────────────────────────────────────────────────

    def deploy(
        self,
        name: str,
        needs: tuple[StageNeed, ...],
        program: Digest,
        *,
        exact: bool,
        withdraw_after_s: float,
        canaries: tuple[ev.Canary, ...] = (),
        expected: tuple[int, ...] = (),
    ) -> bool:
        """What the deployer does once a program has been cut. False: nobody has memory for it.

        Args:
            expected: what has to come out of each canary where bits need not agree.
        """
        if not self.is_alive or self.is_stopped:
            return False
        places = self._places(needs)
        if places is None:
            return False
        self.numbers[name] = number = self.numbers.get(name, 0) + 1
        plan = Plan(program=program, epoch=Epoch(1), stages=needs, places=places)
        version = ev.Version(
            deployment=name, number=number, program=program, codec="raw", tolerance=None, exact=exact, peak_ratio=1.0, plan=plan
        )
        self._begin(version, withdraw_after_s, canaries, expected)
        return True

    def recut(
        self,
        present: ev.Version,
        needs: tuple[StageNeed, ...],
        *,
        withdraw_after_s: float,
        canaries: tuple[ev.Canary, ...] = (),
        expected: tuple[int, ...] = (),
    ) -> ev.Version | None:
        """The same version in other stages, as `deploy`; None: nobody has memory for them."""
        places = self._places(needs)
        if places is None:
            return None
        cut = 1 + max(key[2] for key in self.ever if key[:2] == present.key[:2])
        plan = Plan(program=present.program, epoch=Epoch(present.plan.epoch + 1), stages=needs, places=places)
        version = replace(present, cut=cut, plan=plan)
        self._begin(version, withdraw_after_s, canaries, expected)
        return version

    def _begin(self, version: ev.Version, withdraw_after_s: float, canaries: tuple[ev.Canary, ...], expected: tuple[int, ...]) -> None:
        self._stored[version.key] = self.ever[version.key] = version
        self._expected[version.key] = expected
        self.tell(ev.VersionDeployed(version=version, canaries=canaries))
        deployment, number, cut = version.key
        self.later(withdraw_after_s, self.tell, ev.VersionWithdrawn(deployment=deployment, number=number, cut=cut))

    def _places(self, needs: tuple[StageNeed, ...]) -> tuple[tuple[WorkerId, ...], ...] | None:
        """Beside what is there; else copies of other stages give way."""
        for with_copies in (False, True):
            with contextlib.suppress(AdaptError):
                return place(needs, self.scheduler.offers(with_copies=with_copies))
        return None

    def undeploy(self, name: str) -> None:
        if self.is_alive and not self.is_stopped:
            self.tell(ev.Undeployed(deployment=name))

    def current(self, name: str) -> ev.Version | None:
        """The version that takes the requests of a deployment."""
        return next((version for version, is_ready in self.scheduler.versions() if version.deployment == name and is_ready), None)


_WELCOME = msg.Welcome(
    software="adapt simulated", heartbeat_s=HEARTBEAT_S, piece_bytes=1 << 20, max_message_bytes=MAX_MESSAGE_BYTES, max_budget_s=3600.0
)
