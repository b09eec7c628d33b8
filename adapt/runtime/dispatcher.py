"""The dispatcher process: it does what the scheduler decides.

Messages become events, events go to the scheduler, actions become messages. `_drive` is the only place where state changes; nothing in
it waits. What takes long (exporting, cutting, reading files) runs in background tasks that end in an event.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
from collections import deque
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import msgspec
import xxhash

from adapt.clock import Clock, monotonic
from adapt.config import DispatcherConfig
from adapt.errors import AdaptError, ConnectError, InputMismatchError, UnknownModelError, VersionError, WireError
from adapt.planning.placement import WorkerOffer
from adapt.protocol import messages as msg
from adapt.protocol.ids import ClientId, Digest, RoutingId, Term, WorkerId, control_of
from adapt.protocol.wire import Blob, Envelope
from adapt.runtime.alarm import Alarm
from adapt.runtime.artifacts import ArtifactStore
from adapt.runtime.deployer import Deployer
from adapt.runtime.deployments import Deployments
from adapt.runtime.endpoint import Arrival, Disconnected, Malformed, Received, RouterEndpoint, Undelivered
from adapt.runtime.models_dir import ModelsDir
from adapt.runtime.probing import Probing
from adapt.runtime.profiles import DeviceKind, ProfileStore
from adapt.runtime.registry import Listener, Registry, open_registry
from adapt.runtime.replanning import Replanner
from adapt.runtime.state import StateDirectory
from adapt.runtime.status import LinkTally, counters, request_records, worker_records
from adapt.scheduling import events as ev
from adapt.scheduling import translation
from adapt.scheduling.acknowledgements import Acknowledgements
from adapt.scheduling.deadlines import earliest
from adapt.scheduling.links import Link
from adapt.scheduling.liveness import LAG_S, Verdict
from adapt.scheduling.scheduler import Scheduler
from adapt.scheduling.session import Session, Sessions
from adapt.scheduling.settings import SchedulerSettings
from adapt.scheduling.term import Reign
from adapt.version import VERSION

log = logging.getLogger(__name__)

GOODBYE_S = 0.5  # how long the last messages may take to leave
LAST_ACKS_S = 2.0  # how long a draining dispatcher waits for clients to acknowledge the last answers
MALFORMED_LIMIT, MALFORMED_WINDOW_S = 3, 10.0  # so many unreadable messages of one client within so long, and it is refused
REQUESTS_SHOWN = 20  # in a status
EARLY_LIMIT = 4096  # messages that may come on control before bulk is attached
_OF_TASKS = {msg.InferRequest, msg.ReplyAck, msg.Begun, msg.StageDone}  # what comes often, and changes nothing but tasks


@dataclass(slots=True)
class _Peer:
    """What the dispatcher remembers of a session besides what the session table does."""

    hello: msg.WorkerHello | msg.ClientHello
    heartbeat: msg.Heartbeat | None = None
    early: list[Envelope] = field(default_factory=list)  # what came on control before bulk was attached


class Dispatcher:
    """Owns deployments, plan, scheduling, retries. `run` serves until a signal asks it to drain."""

    def __init__(self, config: DispatcherConfig, clock: Clock = monotonic) -> None:
        self._config, self._clock = config, clock
        self._state = StateDirectory(config.state_dir)
        self._store = ArtifactStore(self._state.artifacts)
        self._deployments = Deployments(self._state, self._store, keep_versions=config.keep_versions)
        self._registry: Registry = open_registry(config, self._state, clock)
        self._registry.watch(
            Listener(
                ended=lambda worker_id: self.tell(ev.LeaseEnded(worker_id=worker_id)),
                renewed=lambda worker_id: self.tell(ev.LeaseRenewed(worker_id=worker_id)),
                surpassed=lambda term: self._raise_term(term, "another dispatcher has reigned with a later term; ours is raised"),
                deposed=self._deposed,
            )
        )
        self._scheduler = Scheduler(SchedulerSettings.of(config), generation=secrets.randbelow(1 << 32))
        self._tally = LinkTally()
        self._probing = Probing(
            self._scheduler.roster, self.to_worker, is_profiling=lambda worker_id: self._deployer.profilers.is_asked(worker_id)
        )
        self._sessions = Sessions(1 + secrets.randbelow(1 << 32))
        self._reign = Reign()
        self._peers: dict[int, _Peer] = {}  # by session
        self._spoilt: dict[str, list[float]] = {}  # moments at which a peer's messages could not be read, lately
        self._acks = Acknowledgements()
        self._last_hello: dict[WorkerId, msg.WorkerHello] = {}  # also of workers that are gone, while the roster remembers them
        self._inbox: deque[Arrival | ev.Event] = deque()
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="artifacts")
        self._deployer = Deployer(
            self._store,
            self._deployments,
            self,
            profiles=ProfileStore(self._state.profiles),
            models_dir=config.models_dir,
            threads=self._threads,
            clock=clock,
        )
        self._replanner = Replanner(self._store, self._deployments, self._deployer, self, interval_s=config.replan_interval_s)
        self._models: ModelsDir | None = None
        if config.models_dir is not None:
            self._models = ModelsDir(config.models_dir, self._store, self._deployments, self._deployer.bring_up, clock=clock)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._alarm = Alarm(self._drive, clock)
        self._is_driven = False
        self._is_undecided = False  # something was noted, and nothing decided since
        self._now = clock()  # of this turn of the loop
        self._signals = 0
        self._stopping = asyncio.Event()
        self._turned = asyncio.Event()
        self._is_interrupted = False
        self._successor = ""  # who reigns now, if it is not we
        self._began = clock()

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT, then finish what lives. Exit status: 0 after a drain, 130 after a second SIGINT.

        Raises:
            ConfigError: the address cannot be bound, the state directory cannot be used, or the registry will not have us.
            AdaptError: another dispatcher has taken over.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)
        if not await self._open():
            return 0
        try:
            self._restore()
            if self._models is not None:
                self._spawn(self._models.run(), name="models-dir")
            if self._config.replan_interval_s:
                self._spawn(self._replanner.run(), name="replanning")
            print(f"adapt-dispatcher ready listen={self._endpoint.address} term={self._reign.term} pid={os.getpid()}", flush=True)
            await self._stopping.wait()
            status = await self._drain()
        finally:
            await self._close()
        if self._successor:
            raise AdaptError(self._successor)
        return status

    async def _open(self) -> bool:
        """Begin the reign, which may have to wait for the end of another, then listen. False: a signal came before that."""
        try:
            term = await self._elected()
            if term is None:
                await self._registry.close()
                self._threads.shutdown()
                self._state.close()
                return False
            self._reign.begin(term - 1)
            self._endpoint = RouterEndpoint(
                self._config.listen,
                receive=self._inbox.append,
                turned=self._drive,
                limit_bytes=self._config.max_message_bytes,
                piece_bytes=self._config.piece_bytes,
            )
        except BaseException:
            await self._registry.close()
            self._threads.shutdown()
            self._state.close()
            raise
        self._registry.announce(self._endpoint.address)
        return True

    async def _elected(self) -> Term | None:
        campaign = asyncio.ensure_future(self._registry.campaign())
        stopping = asyncio.ensure_future(self._stopping.wait())
        await asyncio.wait((campaign, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if campaign.done():
            return campaign.result()
        campaign.cancel()
        await asyncio.gather(campaign, return_exceptions=True)
        return None

    def _deposed(self, successor: str) -> None:
        log.error("deposed", extra={"reason": successor})
        self._successor = successor
        self._stopping.set()

    def _restore(self) -> None:
        """Take up the deployments of the last reign, and expect its workers."""
        now = self._clock()
        versions = self._deployments.restore()
        for worker_id in sorted({worker for version in versions for places in version.plan.places for worker in places}):
            self._act(self._scheduler.handle(ev.WorkerExpected(worker_id=worker_id), now))
        for version in versions:
            log.info("deployment restored", extra={"deployment": version.deployment, "version": version.number})
            self._act(self._scheduler.handle(ev.VersionDeployed(version=version, is_restored=True), now))
        self._arm_timer()

    def _signalled(self, number: int) -> None:
        self._signals += 1
        if self._signals > 1 and number == signal.SIGINT:
            self._is_interrupted = True
            self._turned.set()
        self._stopping.set()

    async def _drain(self) -> int:
        """Finish what lives, within the drain timeout. A second SIGINT ends it at once."""
        log.info("draining", extra={"requests": self._scheduler.live_requests})
        self.tell(ev.DrainBegun())
        try:
            async with asyncio.timeout(self._config.drain_timeout_s):
                while not self._is_interrupted and self._scheduler.live_requests:
                    await self._turn()
            async with asyncio.timeout(LAST_ACKS_S):
                while not self._is_interrupted and self._scheduler.unacknowledged:
                    await self._turn()
        except TimeoutError:
            log.warning("drained in part", extra={"requests": self._scheduler.live_requests})
        self._flush_acks(is_last=True)
        for session in self._sessions:
            self._send(session, msg.Goodbye(reason="the dispatcher has drained"))
        return 130 if self._is_interrupted else 0

    async def _turn(self) -> None:
        """Wait until the drive loop has turned once more, or a second SIGINT has come."""
        self._turned.clear()
        await self._turned.wait()

    async def _close(self) -> None:
        self._alarm.cancel()
        await self._deployer.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._alarm.cancel()  # once more: it may have been set meanwhile
        self._endpoint.close(linger_s=GOODBYE_S)
        await self._registry.close()
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._state.close()

    # ── the drive loop ───────────────────────────────────────────────────────────────────────────────────────────────

    def tell(self, event: ev.Event) -> None:
        """Called by background tasks: an event like any other."""
        self._inbox.append(event)
        self._wake()

    def _wake(self) -> None:
        if not self._is_driven:
            self._is_driven = True
            asyncio.get_running_loop().call_soon(self._drive)

    def _drive(self) -> None:
        """Handle what is in the inbox, then what is due; after a lag of the loop the sockets are read first."""
        self._is_driven = False
        try:
            self._turn_over()
        finally:  # a bug in one event must not stop the clock for all
            self._flush_acks()
            self._arm_timer()
            self._turned.set()
            if self._inbox:
                self._wake()

    def _turn_over(self) -> None:
        self._now = self._clock()
        self._empty_inbox()
        now = self._clock()
        if not self._alarm.may_be_due(now):
            return
        due = self._next_wakeup()
        if due is not None and due <= now:
            if now - due > LAG_S:  # we were late, not they
                self._scheduler.counters["loop_lags"] += 1
                self._registry.excuse(now - due)
                self._scheduler.excuse(now - due)
                self._endpoint.drain()
                self._empty_inbox()
            self._registry.tick(self._clock())
            self._empty_inbox()
            self._act(self._scheduler.tick(self._clock()))
            self._empty_inbox()
            self._now = self._clock()

    def _empty_inbox(self) -> None:
        """Take note of everything, and decide once for what the tasks of all peers have brought.

        Nor is anything decided before somebody's leaving is noted: after a stall several have left, and a task would go from one to the next."""
        self._decide()
        while self._inbox:
            item = self._inbox.popleft()
            if not (_is_of_tasks(item) or type(item) is Disconnected):
                self._decide()  # with those who are there, before that changes
            match item:
                case Received():
                    self._received(item)
                case Malformed():
                    self._malformed(item)
                case Disconnected():
                    self._disconnected(item.routing_id)
                case Undelivered():
                    self._undelivered(item)
                case _:
                    self._handle(item)
            if not self._inbox:
                self._decide()

    def _note(self, event: ev.Event) -> None:
        """Of tasks: what follows is decided when all that has come is known."""
        self._scheduler.note(event, self._clock())
        self._is_undecided = True

    def _decide(self) -> None:
        if self._is_undecided:
            self._is_undecided = False
            self._act(self._scheduler.decide(self._clock()))

    def _handle(self, event: ev.Event) -> None:
        self._is_undecided = False
        self._act(self._scheduler.handle(event, self._clock()))

    def _next_wakeup(self) -> float | None:
        return earliest(self._scheduler.next_wakeup(), self._registry.next_wakeup(), self._acks.next_wakeup())

    def _arm_timer(self) -> None:
        self._alarm.set(self._next_wakeup())

    # ── sessions ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _received(self, arrival: Received) -> None:
        envelope = arrival.envelope
        match envelope.message:
            case msg.WorkerHello() as hello:
                self._hello(arrival.routing_id, hello, "worker", hello.worker_id)
            case msg.ClientHello() as hello:
                self._hello(arrival.routing_id, hello, "client", hello.client_id.hex())
            case message:
                session = self._sessions.find(arrival.routing_id, envelope.session)
                if session is None or envelope.term != self._reign.term:
                    self._say_hello(arrival.routing_id, envelope.session, envelope.term)
                elif isinstance(message, msg.Attach):
                    self._attached(arrival.routing_id, session)
                elif not session.is_attached:
                    self._came_early(session, envelope)
                else:
                    self._heard(session, envelope)

    def _heard(self, session: Session, envelope: Envelope) -> None:
        if session.role == "worker":
            self._from_worker(session, envelope)
        else:
            self._from_client(session, envelope)

    def _came_early(self, session: Session, envelope: Envelope) -> None:
        """Control is faster than bulk: what it brings waits for the session to be whole, or its answers would find nobody."""
        early = self._peers[session.number].early
        early.append(envelope)
        if len(early) > EARLY_LIMIT:
            self._end_session(session, f"{EARLY_LIMIT} messages came before its second connection")
        elif session.is_overdue(self._clock()):
            self._end_session(session, "its second connection never came")
            self._say_hello(session.routing_id, session.number, self._reign.term)

    def _hello(self, routing_id: RoutingId, hello: msg.WorkerHello | msg.ClientHello, role: str, name: str) -> None:
        """Open a session; another living process of the same name keeps its own."""
        if self._reign.hello(hello.highest_term, has_met_us=self._sessions.has_met(role, name, hello.incarnation)):
            self._raised("a peer has met a later term; ours is raised")
        earlier = self._sessions.greeted(role, name)
        if earlier is not None and earlier.incarnation != hello.incarnation and self._is_alive(earlier):
            error = ConnectError(self._endpoint.address, f"a {role} named {name} is connected already; choose another --name")
            self._refuse(routing_id, error)
            return
        if earlier is not None:
            self._peers.pop(earlier.number, None)
            if role == "client":  # it asks for its deployments again
                self._deployer.client_gone(ClientId(bytes.fromhex(name)))
            else:
                self._deployer.profilers.worker_gone(WorkerId(name))
        session = self._sessions.welcome(routing_id, role, name, hello.incarnation, self._clock())
        self._peers[session.number] = _Peer(hello)
        welcome = msg.Welcome(
            software=f"adapt {VERSION}",
            heartbeat_s=self._config.heartbeat_s,
            piece_bytes=self._config.piece_bytes,
            max_message_bytes=self._config.max_message_bytes,
            max_budget_s=self._config.max_budget_s,
        )
        self._send(session, welcome)

    def _raise_term(self, above: int, reason: str) -> None:
        if self._reign.hello(above, has_met_us=False):
            self._raised(reason)

    def _raised(self, reason: str) -> None:
        self._registry.raise_term(self._reign.term)
        log.warning(reason, extra={"term": self._reign.term})
        for session in list(self._sessions):
            self._end_session(session, "the term was raised")

    def _is_alive(self, session: Session) -> bool:
        """Whether this is a worker that has been heard of lately."""
        member = self._scheduler.roster.get(WorkerId(session.name))
        return member is not None and member.verdict is Verdict.READY

    def _attached(self, routing_id: RoutingId, session: Session) -> None:
        """Both connections stand: the peer takes part from now on."""
        try:
            self._sessions.attach(routing_id, session.number)
        except KeyError:
            self._out_of_place(session, msg.Attach())
            return
        peer = self._peers[session.number]
        if isinstance(peer.hello, msg.ClientHello):
            self._handle(ev.ClientArrived(client_id=ClientId(peer.hello.client_id)))
        else:
            self._worker_joined(peer.hello)
        early, peer.early = peer.early, []
        for envelope in early:
            if self._sessions.find(session.routing_id, session.number) is session:  # a goodbye among them has ended it
                self._heard(session, envelope)

    def _worker_joined(self, hello: msg.WorkerHello) -> None:
        worker_id = WorkerId(hello.worker_id)
        log.info("worker joined", extra={"worker_id": worker_id, "device": hello.device.device, "resident": len(hello.resident)})
        self._registry.register(worker_id, self._clock())
        self._last_hello = {known: old for known, old in self._last_hello.items() if known in self._scheduler.roster}
        self._last_hello[worker_id] = hello
        self._handle(translation.joined(hello))
        self._probing.joined(worker_id, self._clock())

    def _malformed(self, arrival: Malformed) -> None:
        """One bad message never stops the others. A known sender starts afresh and sends again what was lost. A stubborn client is refused, lest its
        program waits for nothing; a worker, whose cable may be bad for a while, only begins anew less and less often (`PeerSession`)."""
        self._scheduler.counters["malformed_messages"] += 1
        log.warning("message dropped", extra={"sender": bytes(arrival.routing_id).hex(), "reason": str(arrival.error)})
        session = self._sessions.routed(arrival.routing_id)
        if session is None:
            if isinstance(arrival.error, VersionError):  # a damaged hello is said again; one of another version never will be right
                self._refuse(arrival.routing_id, arrival.error)
            return
        now = self._clock()
        self._spoilt = {name: moments for name, moments in self._spoilt.items() if moments[-1] > now - MALFORMED_WINDOW_S}
        moments = self._spoilt.setdefault(session.name, [])
        moments.append(now)
        self._end_session(session, f"a message could not be read: {arrival.error}")
        if len(moments) >= MALFORMED_LIMIT and session.role == "client":
            self._refuse(session.routing_id, arrival.error)
        else:
            self._say_hello(session.routing_id, session.number, self._reign.term)

    def _disconnected(self, routing_id: RoutingId) -> None:
        session = self._sessions.routed(routing_id)
        if session is not None:
            self._end_session(session, "its connection was closed")

    def _undelivered(self, item: Undelivered) -> None:
        """The connection takes nothing: its session is over, and the attempts among what was sent never started."""
        session = self._sessions.routed(item.routing_id)
        if session is None:
            return
        for message in item.messages:
            if isinstance(message, msg.RunStage):
                self._handle(ev.DispatchRefused(worker_id=WorkerId(session.name), attempt=message.attempt))
        self._end_session(session, "its connection takes nothing")

    def _end_session(self, session: Session, reason: str, *, is_intended: bool = False) -> None:
        self._sessions.end(session.number)
        peer = self._peers.pop(session.number, None)
        if peer is None:
            return
        if isinstance(peer.hello, msg.WorkerHello):
            log.info("worker session ended", extra={"worker_id": session.name, "reason": reason})
            self._deployer.profilers.worker_gone(WorkerId(session.name))
            self._note(ev.WorkerDisconnected(worker_id=WorkerId(session.name), reason=reason, is_intended=is_intended))
            self._wake()
            return
        client_id = ClientId(peer.hello.client_id)
        self._deployer.client_gone(client_id)
        self._handle(ev.ClientDisconnected(client_id=client_id))

    def _say_hello(self, routing_id: RoutingId, session: int, term: int) -> None:
        """The session that a message named is none of ours, or not any more."""
        self._scheduler.counters["strangers"] += 1
        self._endpoint.send(control_of(routing_id), msg.SayHello(), session=session, term=term)

    def _refuse(self, routing_id: RoutingId, error: AdaptError) -> None:
        code, message, fields = error.to_wire()
        refused = msg.Refused(code=code, message=message, fields=fields)
        self._endpoint.send(control_of(routing_id), refused, session=0, term=self._reign.term)

    def _send(self, session: Session, message: msg.Message, blobs: tuple[Blob, ...] = ()) -> None:
        self._endpoint.send(session.routing_id, message, session=session.number, term=self._reign.term, blobs=blobs)

    # ── messages become events ───────────────────────────────────────────────────────────────────────────────────────

    def _from_worker(self, session: Session, envelope: Envelope) -> None:
        worker_id = WorkerId(session.name)
        match envelope.message:
            case msg.Begun(attempt=attempt):
                self._note(ev.StageBegun(worker_id=worker_id, attempt=attempt))
            case msg.StageDone() as done:
                self._tally.count(done.leaves, envelope.blobs)
                self._probing.done(worker_id, done, envelope.blobs, self._clock())
                self._done(worker_id, done, envelope.blobs)
                if done.begun is not None:
                    self._note(ev.StageBegun(worker_id=worker_id, attempt=done.begun))
            case msg.Goodbye():
                self._goodbye(session)
            case msg.LinkEcho(number=number):
                self._probing.echoed(worker_id, number, self._clock())
            case msg.ProfileProgress() | msg.ProgramProfiled() | msg.ProfileFailed() as told:
                self._deployer.profilers.heard(worker_id, told)
            case message:
                self._from_worker_besides(session, worker_id, message)

    def _from_worker_besides(self, session: Session, worker_id: WorkerId, message: msg.Message) -> None:
        """All that is not said for every task."""
        fact = translation.fact(worker_id, message)
        if fact is None:
            self._out_of_place(session, message)
            return
        match message:
            case msg.Heartbeat():
                self._peers[session.number].heartbeat = message
                self._registry.refresh(worker_id, self._clock())
                self._probing.heard(worker_id, self._clock())
            case msg.Fetch():
                self._spawn(self._serve_piece(session, message), name=f"piece for {worker_id}")
            case msg.LoadFailed():
                log.warning("stage refused", extra={"worker_id": worker_id, "artifact": message.artifact[:12], "reason": message.message})
        self._handle(fact)

    def _from_client(self, session: Session, envelope: Envelope) -> None:
        match envelope.message:
            case msg.InferRequest() as request:
                self._request(session, request, envelope.blobs)
            case msg.ReplyAck(request_ids=request_ids):
                for request_id in request_ids:
                    if request_id.client == self._client_of(session):
                        self._note(ev.OutcomeAcknowledged(request_id=request_id))
            case msg.CancelRequest(request_id=request_id):
                if request_id.client == self._client_of(session):
                    self._handle(ev.RequestCancelled(request_id=request_id))
            case msg.Deploy() | msg.Rollback() | msg.Profile() as order:
                self._deployer.begin(ClientId(self._client_of(session)), order)
            case msg.CancelCall(call=call):
                self._deployer.cancel(ClientId(self._client_of(session)), call)
            case msg.Undeploy() as undeploy:
                self._undeploy(session, undeploy)
            case msg.StatusQuery(call=call):
                self._send(session, self._status(call))
            case msg.ArtifactPiece() as piece:
                self._deployer.piece_came(ClientId(self._client_of(session)), piece, envelope.blobs[0])
            case msg.ArtifactMissing(artifact=artifact):
                self._deployer.piece_missing(ClientId(self._client_of(session)), artifact)
            case msg.Goodbye():
                self._goodbye(session)
            case other:
                self._out_of_place(session, other)

    def _goodbye(self, session: Session) -> None:
        """The peer has ended by intent: no grace for its return."""
        self._end_session(session, "it said goodbye", is_intended=True)
        if session.role == "worker":
            self._registry.revoke(WorkerId(session.name))
            self._handle(ev.WorkerLeft(worker_id=WorkerId(session.name)))
        else:
            self._handle(ev.ClientLeft(client_id=ClientId(bytes.fromhex(session.name))))

    def _out_of_place(self, session: Session, message: msg.Message) -> None:
        """A message that a peer of this role does not say."""
        self._malformed(Malformed(session.routing_id, WireError(f"{type(message).__name__} is not for a {session.role} to say")))

    def _request(self, session: Session, request: msg.InferRequest, blobs: tuple[Blob, ...]) -> None:
        if request.request_id.client != self._client_of(session):
            self._out_of_place(session, request)
            return
        self._note(translation.arrived(request, blobs, fingerprint=_fingerprint(request, blobs)))

    def _client_of(self, session: Session) -> bytes:
        return self._peers[session.number].hello.client_id  # type: ignore[union-attr]  # of a client

    # ── actions become messages ──────────────────────────────────────────────────────────────────────────────────────

    def _act(self, actions: list[ev.Action]) -> None:
        for action in actions:
            match action:
                case ev.Dispatch():
                    self._dispatch(action)
                case ev.Acknowledge():
                    self._acks.owe(action.worker_id, action.attempt)
                case ev.Answer() | ev.Fail() | ev.Accept():
                    self.to_client(ClientId(action.request_id.client), *translation.said_to_client(action))
                case ev.Cancel():
                    self.to_worker(action.worker_id, msg.CancelStage(attempt=action.attempt))
                case _:
                    self._act_on_plan(action)

    def _act_on_plan(self, action: ev.Action) -> None:
        match action:
            case ev.Load():
                load = msg.LoadStage(artifact=action.artifact, file_bytes=self._deployments.file_bytes(action.artifact))
                self.to_worker(action.worker_id, load)
            case ev.Unload():
                self.to_worker(action.worker_id, msg.UnloadStage(artifact=action.artifact))
            case ev.Evict():
                log.warning("worker evicted", extra={"worker_id": action.worker_id, "reason": action.reason})
                self._registry.revoke(action.worker_id)
                self._deployer.profilers.worker_gone(action.worker_id)
                session = self._sessions.greeted("worker", action.worker_id)
                if session is not None:
                    self._sessions.end(session.number)
                    self._peers.pop(session.number, None)
            case ev.Suspect():
                log.warning("worker suspected", extra={"worker_id": action.worker_id, "reason": action.reason})
            case ev.Trust():
                log.info("worker ready", extra={"worker_id": action.worker_id})
            case ev.PlanChanged(version=version):
                log.info("plan changed", extra={"deployment": version.deployment, "epoch": version.plan.epoch})
                self._deployments.put(version)
            case ev.VersionReady(version=version):
                self._deployer.settled(version, None)
                self._deployments.ready(version)
            case ev.JudgeCanary():
                self._deployer.judge(action)
            case ev.VersionFailed(version=version, error=error):
                self._deployer.settled(version, error)
            case ev.VersionReleased(version=version):
                self._deployments.drop(version)
            case _:
                raise AssertionError(f"unknown action {action!r}")

    def _dispatch(self, action: ev.Dispatch) -> None:
        run = translation.order(action)
        self._tally.count(run.leaves, action.input.blobs)
        session = self._sessions.named("worker", action.worker_id)
        if session is not None:
            self._acks.addressed(action.worker_id)
            self._send(session, run, action.input.blobs)
            return
        # First of all: behind a new hello of this worker it would end that hello's session.
        self._inbox.appendleft(ev.DispatchRefused(worker_id=action.worker_id, attempt=action.attempt))
        self._wake()

    def _flush_acks(self, *, is_last: bool = False) -> None:
        for worker_id, attempts in self._acks.end_turn(self._now, is_last=is_last):
            self.to_worker(worker_id, msg.StageAck(attempts=attempts))

    def to_worker(self, worker_id: WorkerId, message: msg.Message, blobs: tuple[Blob, ...] = ()) -> bool:
        """False: it is not here. What is lost with a session is said again after the next hello."""
        session = self._sessions.named("worker", worker_id)
        if session is not None:
            self._send(session, message, blobs)
        return session is not None

    def links(self) -> dict[WorkerId, Link]:
        """To the workers, as far as they have been measured."""
        return self._probing.links()

    def to_client(self, client_id: ClientId, message: msg.Message, blobs: tuple[Blob, ...] = ()) -> bool:
        """To wherever the client is now. If it is away, it asks again when it is back."""
        session = self._sessions.named("client", client_id.hex())
        if session is not None:
            self._send(session, message, blobs)
        return session is not None

    # ── deployments and artifacts ────────────────────────────────────────────────────────────────────────────────────

    async def offers(self, *, wait_s: float, with_copies: bool = False) -> list[WorkerOffer]:
        """What the ready workers have to give, see `Scheduler.offers`; waits so long for a first one. What has been told before counts."""
        if self._inbox:
            await self._turn()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                while not self._scheduler.offers():
                    await self._turn()
        return self._scheduler.offers(with_copies=with_copies)

    def device_kinds(self) -> dict[WorkerId, DeviceKind]:
        """What the ready workers run on."""
        found: dict[WorkerId, DeviceKind] = {}
        for member in self._scheduler.roster:
            session = self._sessions.named("worker", member.worker_id)
            if member.is_ready and session is not None and member.worker_id in self._last_hello:
                hello = self._last_hello[member.worker_id]
                told = self._peers[session.number].heartbeat or hello
                found[member.worker_id] = DeviceKind.of(hello.device, told.cores)
        return found

    def present(self) -> list[ev.Version]:
        """The versions that take requests and are ready."""
        return [version for version, is_ready in self._scheduler.versions() if is_ready]

    def version(self, deployment: str, number: int) -> ev.Version:
        """A version that takes requests. Raises UnknownModelError: it was replaced or removed meanwhile."""
        for candidate, _ in self._scheduler.versions():
            if (candidate.deployment, candidate.number) == (deployment, number):
                return candidate
        raise UnknownModelError(deployment)

    def _undeploy(self, session: Session, undeploy: msg.Undeploy) -> None:
        names = [version.deployment for version, _ in self._scheduler.versions()]
        if undeploy.name not in names:
            code, message, fields = UnknownModelError(undeploy.name, suggestions=names[:5]).to_wire()
            self._send(session, msg.CallFailed(call=undeploy.call, code=code, message=message, fields=fields))
            return
        self._deployments.removed(undeploy.name)
        self._handle(ev.Undeployed(deployment=undeploy.name))
        self._send(session, msg.CallDone(call=undeploy.call))

    def _done(self, worker_id: WorkerId, done: msg.StageDone, blobs: tuple[Blob, ...]) -> None:
        """An answer, unless it is none that this stage can give: then the attempt has failed, and the worker is to blame."""
        work = self._scheduler.work_of(done.attempt, worker_id)
        try:
            if work is not None and (form := self._deployments.form(work[0])) is not None:
                form(work[1], done.leaves, task=done.attempt.task, witness=worker_id)
        except InputMismatchError as misfit:
            log.warning("answer of a wrong form", extra={"worker_id": worker_id, "attempt": str(done.attempt), "reason": str(misfit)})
            self._scheduler.counters["misfits"] += 1
            error = WireError(f"the answer of {worker_id} is none that stage {done.attempt.stage} can give: {misfit}")
            self._handle(ev.AttemptFailed(worker_id=worker_id, attempt=done.attempt, error=error))
            return
        self._note(translation.finished(worker_id, done, blobs))

    async def _serve_piece(self, session: Session, fetch: msg.Fetch) -> None:
        """Answer `Fetch`: read beside the loop, so that a slow disk delays no activation."""
        digest = Digest(fetch.artifact)
        loop = asyncio.get_running_loop()
        try:
            size = await loop.run_in_executor(self._threads, self._store.size_bytes, digest)
            data = await loop.run_in_executor(self._threads, self._store.read, digest, fetch.offset, fetch.length)
        except (OSError, AdaptError) as error:
            log.warning("artifact not served", extra={"artifact": digest[:12], "reason": str(error)})
            self._send(session, msg.ArtifactMissing(artifact=fetch.artifact))
            return
        self._scheduler.counters["artifact_bytes"] += len(data)
        piece = msg.ArtifactPiece(artifact=fetch.artifact, offset=fetch.offset, file_bytes=size)
        self._send(session, piece, (Blob.of(data),))

    def _spawn(self, work: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)
        return task

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("background task failed", extra={"task": task.get_name()}, exc_info=error)

    # ── what users see ───────────────────────────────────────────────────────────────────────────────────────────────

    def _status(self, call: int) -> msg.StatusReport:
        heartbeats = {session.name: self._peers[session.number].heartbeat for session in self._sessions if session.role == "worker"}
        return msg.StatusReport(
            call=call,
            term=self._reign.term,
            uptime_s=self._clock() - self._began,
            workers=worker_records(self._scheduler.roster, self._last_hello, heartbeats, self._probing.links(), self._clock()),
            deployments=[self._deployments.record(version) for version, _ in self._scheduler.versions()],
            counters=counters(self._scheduler) | self._tally.counters() | self._endpoint.counters() | dict(self._registry.counters()),
            requests=request_records(self._scheduler.oldest(REQUESTS_SHOWN), self._clock()),
            files=self._models.records() if self._models is not None else [],
        )


def _is_of_tasks(item: object) -> bool:
    return type(item) is Received and type(item.envelope.message) in _OF_TASKS


def _fingerprint(request: msg.InferRequest, blobs: tuple[Blob, ...]) -> int:
    """Of what makes a request this one: model and input. Budget, version and program may differ from one sending to the next."""
    return xxhash.xxh3_64_intdigest(
        _FINGERPRINT.encode((request.deployment, request.numerics, request.leaves, [blob.checksum for blob in blobs]))
    )


_FINGERPRINT = msgspec.msgpack.Encoder()
