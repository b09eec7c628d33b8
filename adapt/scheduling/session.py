"""Who is believed: the dispatcher's table of sessions, and a peer's own side of one. Pure state machines.

A peer's side:

    state          event                       to             does
    DISCONNECTED   control connected           GREETING       says hello
    GREETING       welcome                     OPEN           attaches its bulk connection
    GREETING       no welcome in time          GREETING       says hello again
    GREETING       refused                     REFUSED        gives up
    OPEN           say-hello                   GREETING       says hello
    OPEN           welcome of a later hello    OPEN           attaches again
    any            control connected           GREETING       says hello: libzmq reconnects without telling the other side
    any            control disconnected        DISCONNECTED
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from adapt.protocol.ids import Incarnation, RoutingId, SessionId, bulk_of
from adapt.protocol.messages import Goodbye, Refused, SayHello, Welcome
from adapt.protocol.wire import Envelope

GREETING_TIMEOUT_S = 2.0


# ── the dispatcher's side ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class Session:
    """One connection of a worker or client under this term."""

    number: SessionId
    routing_id: RoutingId  # of the control connection
    role: str  # "worker" or "client"
    name: str
    incarnation: Incarnation
    is_attached: bool = False


class Sessions:
    """The sessions of one dispatcher, each under a number of its own. At most one per role and name."""

    def __init__(self) -> None:
        self._sessions: dict[int, Session] = {}
        self._by_name: dict[tuple[str, str], Session] = {}
        self._by_route: dict[RoutingId, Session] = {}  # both connections
        self._last = 0

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._sessions.values()))

    def __len__(self) -> int:
        return len(self._sessions)

    def welcome(self, routing_id: RoutingId, role: str, name: str, incarnation: int) -> Session:
        """A new session; whatever session this name or address had before is over."""
        for earlier in (self._by_name.get((role, name)), self._by_route.get(routing_id)):
            if earlier is not None:
                self.end(earlier.number)
        self._last += 1
        session = Session(SessionId(self._last), routing_id, role, name, Incarnation(incarnation))
        self._sessions[session.number] = self._by_name[role, name] = session
        self._by_route[routing_id] = self._by_route[bulk_of(routing_id)] = session
        return session

    def attach(self, routing_id: RoutingId, number: int) -> None:
        """The bulk connection stands. Raises KeyError for a session that is over."""
        self._sessions[number].is_attached = True

    def find(self, routing_id: RoutingId, number: int) -> Session | None:
        """The session of a message that names `number` and came from `routing_id`; None if they do not belong together."""
        session = self._by_route.get(routing_id)
        return session if session is not None and session.number == number else None

    def routed(self, routing_id: RoutingId) -> Session | None:
        """The session of an address, whatever a message from there says."""
        return self._by_route.get(routing_id)

    def named(self, role: str, name: str) -> Session | None:
        """The session of a worker or client; None unless both its connections stand."""
        session = self._by_name.get((role, name))
        return session if session is not None and session.is_attached else None

    def greeted(self, role: str, name: str) -> Session | None:
        """The session of a worker or client, attached or not."""
        return self._by_name.get((role, name))

    def end(self, number: int) -> Session | None:
        """The session is over; nothing happens if it was already."""
        session = self._sessions.pop(number, None)
        if session is None:
            return None
        self._by_name.pop((session.role, session.name), None)
        self._by_route.pop(session.routing_id, None)
        self._by_route.pop(bulk_of(session.routing_id), None)
        return session


# ── a peer's side ────────────────────────────────────────────────────────────────────────────────────────────────────


class PeerState(StrEnum):
    DISCONNECTED = "disconnected"
    GREETING = "greeting"
    OPEN = "open"
    REFUSED = "refused"


class Step(StrEnum):
    """What a peer has to do next."""

    SAY_HELLO = "say hello"
    ATTACH = "attach"  # and from then on say what it has to say
    DELIVER = "deliver"  # the message is for those above
    GIVE_UP = "give up"
    LOST = "lost"  # the session is over; those above must know


class PeerSession:
    """One side of a session. `now`: seconds, monotonic."""

    def __init__(self) -> None:
        self.state = PeerState.DISCONNECTED
        self.session = 0
        self.term = 0
        self.highest_term = 0
        self._greet_again_at: float | None = None

    @property
    def is_open(self) -> bool:
        return self.state is PeerState.OPEN

    def connected(self, now: float) -> list[Step]:
        """The control connection stands (again)."""
        if self.state is PeerState.REFUSED:
            return []
        lost = [Step.LOST] if self.is_open else []
        return [*lost, *self._greet(now)]

    def disconnected(self) -> list[Step]:
        if self.state is PeerState.REFUSED:
            return []
        lost = [Step.LOST] if self.is_open else []
        self.state, self._greet_again_at = PeerState.DISCONNECTED, None
        return lost

    def received(self, envelope: Envelope, now: float) -> list[Step]:
        """Judge a message. Of a foreign session or an older term nothing is believed."""
        if self.state in (PeerState.REFUSED, PeerState.DISCONNECTED):
            return []
        match envelope.message:
            case Welcome():
                return self._welcomed(envelope)
            case Refused() if self.state is PeerState.GREETING or self.is_open:
                self.state, self._greet_again_at = PeerState.REFUSED, None
                return [Step.GIVE_UP]
            case SayHello():
                if not self._is_ours(envelope):
                    return []  # it is about an earlier session, or a hello is on its way
                return [Step.LOST, *self._greet(now)]
        if not self._is_ours(envelope):
            return []
        if isinstance(envelope.message, Goodbye):  # it will be back, or another in its place: keep knocking
            return [Step.DELIVER, Step.LOST, *self._greet(now)]
        return [Step.DELIVER]

    def _is_ours(self, envelope: Envelope) -> bool:
        return self.is_open and envelope.session == self.session and envelope.term == self.term

    def _welcomed(self, envelope: Envelope) -> list[Step]:
        if envelope.term < self.highest_term or (envelope.term == self.term and envelope.session <= self.session):
            return []
        lost = [Step.LOST] if self.is_open else []
        self.state, self._greet_again_at = PeerState.OPEN, None
        self.session, self.term, self.highest_term = envelope.session, envelope.term, envelope.term
        return [*lost, Step.ATTACH]

    def _greet(self, now: float) -> list[Step]:
        self.state, self._greet_again_at = PeerState.GREETING, now + GREETING_TIMEOUT_S
        return [Step.SAY_HELLO]

    def tick(self, now: float) -> list[Step]:
        """No welcome came: say hello again."""
        if self.state is PeerState.GREETING and self._greet_again_at is not None and self._greet_again_at <= now:
            return self._greet(now)
        return []

    def next_wakeup(self) -> float | None:
        return self._greet_again_at
