"""The client process: what runtime/conversation.py does around Outcomes, without sockets, threads and futures."""

from __future__ import annotations

from random import Random

from adapt.errors import AdaptError, InputMismatchError
from adapt.protocol import messages as msg
from adapt.protocol.ids import ClientId, Digest, RequestId
from adapt.protocol.wire import Blob
from adapt.scheduling.deadlines import earliest
from adapt.scheduling.outcome import Action, Outcomes, Question, Resolve, Say
from adapt.simulation.arithmetic import Nature, leaves, understood
from adapt.simulation.history import CANCELLED, RESULT, End, Ended, History, Operation
from adapt.simulation.inspector import Violation
from adapt.simulation.link import PeerLink
from adapt.simulation.network import Network, Wire
from adapt.simulation.story import Story
from adapt.simulation.timeline import Process, Timeline
from adapt.simulation.worker import LEAVES

LINGER_S = 0.01  # for a goodbye to leave


class Client(Process):
    """One user's process through all its lives; each has a client id of its own, as a process that is started again has."""

    def __init__(
        self, name: str, timeline: Timeline, random: Random, network: Network, story: Story, history: History, *, wire: Wire, rate: float
    ) -> None:
        super().__init__(name, timeline, random, rate=rate, offset=random.uniform(0.0, 1e5))
        self.wire = wire
        self._network, self._story, self._history = network, story, history
        self.is_alive = False

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        if self.is_alive:
            return
        self.begin_life()
        self.client_id = ClientId(self.random.randbytes(16))
        self._incarnation = self.random.getrandbits(48)
        self._sequence = 0
        self.outcomes = Outcomes()
        self._open: dict[RequestId, tuple[Operation, float]] = {}  # and how long we had stood still when it was asked
        self.link = PeerLink(
            self._network, self, self, self.wire, self._story, incarnation=self._incarnation, arm=lambda: self.set_alarm(self.next_wakeup())
        )
        self._tell("starts", f"as {self.client_id.hex()[:8]}")
        self.link.start()

    def crash(self, *, is_clean: bool) -> None:
        """It dies, and nobody sees what its requests come to."""
        if not self.is_alive:
            return
        self._tell("dies", "")
        for operation, _ in self._open.values():
            operation.client_died = True
        self._open.clear()
        self.end_life()
        self._network.peer_ended(self.wire, is_clean=is_clean)

    def close(self) -> None:
        """Cancel what is open, say goodbye, end."""
        if not self.is_alive:
            return
        for request_id in list(self._open):
            self.cancel(request_id)
        self._act(self.outcomes.take_acks(self.clock(), is_last=True))
        self.link.send(msg.Goodbye(reason="the client was closed"))
        self.later(LINGER_S, self._gone)

    def _gone(self) -> None:
        self.crash(is_clean=True)

    def _tell(self, verb: str, what: str) -> None:
        self._story.add(self.timeline.now, self.name, verb, what)

    # ── what the user does ───────────────────────────────────────────────────────────────────────────────────────────

    def ask(self, *, deployment: str, value: int, nature: Nature, size_bytes: int, budget_s: float, exact: bool) -> RequestId:
        """Submit a request; only while it lives. Returns its id."""
        now = self.clock()
        self._sequence += 1
        request_id = RequestId(self.client_id, self._sequence)
        operation = self._history.operations[request_id] = Operation(request_id, self.timeline.now, now + budget_s)
        self._open[request_id] = (operation, self.stopped_s)
        question = Question(
            deployment=deployment,
            program=None,
            numerics="exact" if exact else "close",
            leaves=leaves(value, 0, nature),
            blobs=(Blob(size_bytes, 1, ()),),
            budget_s=budget_s,
            deadline=now + budget_s,
        )
        self._act(self.outcomes.submit(request_id, question, now))
        self.turned()
        return request_id

    def cancel(self, request_id: RequestId) -> None:
        if request_id in self._open:
            self._act(self.outcomes.cancel(request_id))
            self._end(request_id, CANCELLED)

    # ── session ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def hello(self, highest_term: int) -> msg.ClientHello:
        return msg.ClientHello(
            protocol_version=msg.PROTOCOL_VERSION,
            client_id=self.client_id,
            incarnation=self._incarnation,
            highest_term=highest_term,
            software="adapt simulated",
        )

    def opened(self, welcome: msg.Welcome, term: int) -> None:
        self._act(self.outcomes.opened(term, limit_bytes=welcome.max_message_bytes, now=self.clock()))

    def lost(self) -> None:
        self.outcomes.lost()

    def refused(self, refused: msg.Refused) -> None:
        """Everything ends in the error; its user starts another."""
        error = AdaptError.from_wire(refused.code, refused.message, refused.fields)
        self._tell("is refused", str(error))
        self._act(self.outcomes.give_up(error))
        self.later(0.0, self._again)

    def _again(self) -> None:
        self.crash(is_clean=True)
        self.start()

    def received(self, message: msg.Message, blobs: tuple[Blob, ...]) -> None:
        match message:
            case msg.Reply():
                self._act(self.outcomes.replied(message, blobs))
            case msg.Accepted():
                self.outcomes.accepted(message)
                self._pinned(message.request_id, message.program)
            case msg.RequestFailed():
                self._act(self.outcomes.failed(message, self.clock()))
            case msg.Goodbye():
                pass
            case other:
                raise AssertionError(f"a dispatcher does not say {other!r} to a client")

    def _pinned(self, request_id: RequestId, program: str) -> None:
        if request_id in self._open and self._history.pinned.setdefault(request_id, Digest(program)) != program:
            raise Violation("it was pinned to one program, and now runs another", request_id)

    # ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def turned(self) -> None:
        now = self.clock()
        self._act(self.outcomes.tick(now))
        self._act(self.outcomes.take_acks(now))
        self.set_alarm(self.next_wakeup())

    def next_wakeup(self) -> float | None:
        return earliest(self.outcomes.next_wakeup(), self.link.next_wakeup())

    def woken(self) -> None:
        self.link.tick(self.clock())
        self.turned()

    # ── what is decided is done ──────────────────────────────────────────────────────────────────────────────────────

    def _act(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Say(message=message, blobs=blobs):
                    if not self.link.send(message, blobs) and isinstance(message, msg.InferRequest):
                        self.outcomes.unsaid(message.request_id, self.clock())
                case Resolve(request_id=request_id, outcome=msg.Reply() as reply):
                    self._replied(request_id, reply)
                case Resolve(request_id=request_id, outcome=AdaptError() as error):
                    self._end(request_id, error.code)

    def _replied(self, request_id: RequestId, reply: msg.Reply) -> None:
        if len(reply.leaves) != LEAVES:
            self._end(request_id, InputMismatchError.code)
            return
        value, classes, _ = understood(reply.leaves)
        named = sum(1 << int(name.removeprefix("class ")) for name in reply.numeric_classes)
        if named != classes:
            raise Violation(f"it was computed in classes {classes:b}, and is said to be of {named:b}", request_id)
        self._end(request_id, RESULT, value, classes)

    def _end(self, request_id: RequestId, outcome: str, value: int | None = None, classes: int = 0) -> None:
        entry = self._open.pop(request_id, None)
        operation = self._history.operations[request_id]
        stopped_s = self.stopped_s - entry[1] if entry is not None else 0.0
        operation.ends.append(End(self.clock(), self.timeline.now, outcome, value, stopped_s, classes))
        self._story.add(self.timeline.now, self.name, "sees", Ended(request_id, outcome))

    @property
    def is_idle(self) -> bool:
        """Whether every request has its outcome."""
        return not self.is_alive or not len(self.outcomes)
