"""Who is believed: the dispatcher's table of sessions, and a peer's own side of one. Pure state machines.

A peer's side:

    state          event                       to             does
    DISCONNECTED   control connected           GREETING       says hello
    GREETING       welcome                     OPEN           attaches its bulk connection
    GREETING       no welcome in time          GREETING       says hello again
    GREETING       refused                     REFUSED        gives up
    OPEN           say-hello                   GREETING       says hello, in a moment if the session is young
    OPEN           something was lost          GREETING       says hello in a moment
    OPEN           goodbye                     GREETING       says hello if it still stands connected after a while
    OPEN           refused                     REFUSED        gives up
    OPEN           welcome of a later hello    OPEN           attaches again
    any            control connected           GREETING       says hello: libzmq reconnects without telling the other side
    any            control disconnected        DISCONNECTED

REFUSED is left by nothing. Whoever leaves OPEN says that the session is lost. A hello is said in the row above or by the clock, so that
the other side never has two to answer without one of these reasons.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from adapt.protocol.ids import Incarnation, RoutingId, SessionId, bulk_of
from adapt.protocol.messages import Goodbye, Refused, SayHello, Welcome
from adapt.protocol.wire import Envelope

GREETING_TIMEOUT_S = 2.0  # after which a hello counts as lost
RENEWAL_S = 0.2  # pause before the hello that replaces a torn session: often the control connection is about to close as well
RENEWAL_MAX_S = 5.0
ATTACH_S = 10.0  # from a welcome until the bulk connection stands, at most
MET_LIMIT = 100_000  # processes that a dispatcher remembers to have welcomed
SETTLED_S = 10.0  # a session that lasted so long was a good one; before, each torn session doubles the pause


# ── the dispatcher's side ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class Session:
    """One connection of a worker or client under this term."""

    number: SessionId
    routing_id: RoutingId  # of the control connection
    role: str  # "worker" or "client"
    name: str
    incarnation: Incarnation
    welcomed_at: float = 0.0
    is_attached: bool = False

    def is_overdue(self, now: float) -> bool:
        """Whether its bulk connection should stand long since: what was to attach it is lost, and only another session will say it again."""
        return not self.is_attached and now - self.welcomed_at > ATTACH_S


class Sessions:
    """The sessions of one dispatcher, each under a number of its own. At most one per role and name.

    Args:
        first: the first number. A random one, so that a dispatcher that has lost its memory, and reigns under a number that was used
            before, does not give out the same sessions again: what its predecessor still has on the way would be believed.
    """

    def __init__(self, first: int = 1) -> None:
        self._sessions: dict[int, Session] = {}
        self._by_name: dict[tuple[str, str], Session] = {}
        self._by_route: dict[RoutingId, Session] = {}  # both connections
        self._last = first - 1
        self._met: dict[tuple[str, str, int], None] = {}  # who was ever welcomed, the latest last

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._sessions.values()))

    def __len__(self) -> int:
        return len(self._sessions)

    def welcome(self, routing_id: RoutingId, role: str, name: str, incarnation: int, now: float = 0.0) -> Session:
        """A new session; whatever session this name or address had before is over."""
        for earlier in (self._by_name.get((role, name)), self._by_route.get(routing_id)):
            if earlier is not None:
                self.end(earlier.number)
        self._remember((role, name, incarnation))
        self._last += 1
        session = Session(SessionId(self._last), routing_id, role, name, Incarnation(incarnation), now)
        self._sessions[session.number] = self._by_name[role, name] = session
        self._by_route[routing_id] = self._by_route[bulk_of(routing_id)] = session
        return session

    def has_met(self, role: str, name: str, incarnation: int) -> bool:
        """Whether this process was ever welcomed here; of very many, only the latest are remembered. See `Reign.hello`."""
        return (role, name, incarnation) in self._met

    def _remember(self, peer: tuple[str, str, int]) -> None:
        self._met.pop(peer, None)
        self._met[peer] = None
        if len(self._met) > MET_LIMIT:
            del self._met[next(iter(self._met))]

    def attach(self, routing_id: RoutingId, number: int) -> None:
        """The bulk connection stands. Raises KeyError for a session that is over, or of another connection."""
        session = self._sessions[number]
        if routing_id != bulk_of(session.routing_id):
            raise KeyError(f"session {number} has another bulk connection")
        session.is_attached = True

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


_OF_SESSIONS = frozenset((Welcome, Refused, SayHello, Goodbye))  # messages that may change one; all others are for those above


class PeerSession:
    """One side of a session. `now`: seconds, monotonic."""

    def __init__(self) -> None:
        self.state = PeerState.DISCONNECTED
        self.session = 0
        self.term = 0
        self.highest_term = 0  # that any welcome has named
        self._greet_at: float | None = None  # while greeting: when to say hello (again)
        self._opened_at = 0.0
        self._pause_s = 0.0  # before the next renewal

    @property
    def is_open(self) -> bool:
        return self.state is PeerState.OPEN

    def connected(self, now: float) -> list[Step]:
        """The control connection stands (again)."""
        if self.state is PeerState.REFUSED:
            return []
        return [*self._leave(), *self._greet(now)]

    def disconnected(self) -> list[Step]:
        """The control connection is closed."""
        if self.state is PeerState.REFUSED:
            return []
        lost = self._leave()
        self.state, self._greet_at = PeerState.DISCONNECTED, None
        return lost

    def torn(self, now: float) -> list[Step]:
        """Something was lost on the way or could not be read: in a new session both sides say again what the other may have missed."""
        return self._renew(now, RENEWAL_S) if self.is_open else []

    def received(self, envelope: Envelope, now: float) -> list[Step]:
        """Judge a message. Of a foreign session or an older term nothing is believed."""
        is_known = self.is_open and envelope.session == self.session and envelope.term == self.term
        if is_known and type(envelope.message) not in _OF_SESSIONS:
            return [Step.DELIVER]
        if self.state in (PeerState.REFUSED, PeerState.DISCONNECTED):
            return []
        match envelope.message:
            case Welcome():
                return self._welcomed(envelope, now)
            case Refused():
                lost = self._leave()
                self.state, self._greet_at = PeerState.REFUSED, None
                return [*lost, Step.GIVE_UP]
        if not is_known:
            return []  # about an earlier session; the hello that ends all doubts is on its way
        if isinstance(envelope.message, SayHello):
            return self._renew(now, 0.0)
        return [Step.DELIVER, *self._leave(now + GREETING_TIMEOUT_S)]  # a goodbye: it will be back, or another in its place; keep knocking

    def tick(self, now: float) -> list[Step]:
        """It is time to say hello, or no welcome came to the last one."""
        if self._greet_at is None or self._greet_at > now:
            return []
        return self._greet(now)

    def next_wakeup(self) -> float | None:
        return self._greet_at

    def _welcomed(self, envelope: Envelope, now: float) -> list[Step]:
        if envelope.term < self.highest_term or (envelope.term == self.term and envelope.session <= self.session):
            return []
        lost = self._leave()
        self.state, self._greet_at, self._opened_at = PeerState.OPEN, None, now
        self.session, self.term, self.highest_term = envelope.session, envelope.term, envelope.term
        return [*lost, Step.ATTACH]

    def _renew(self, now: float, pause_s: float) -> list[Step]:
        """Leave the open session for a new one; not at once if the last ones were short, lest two sides that disagree do nothing else."""
        if now - self._opened_at >= SETTLED_S:
            self._pause_s = 0.0
        pause_s = max(pause_s, self._pause_s)
        self._pause_s = min(max(2 * self._pause_s, RENEWAL_S), RENEWAL_MAX_S)
        return self._leave(now + pause_s) if pause_s else [*self._leave(), *self._greet(now)]

    def _leave(self, greet_at: float | None = None) -> list[Step]:
        lost = [Step.LOST] if self.is_open else []
        self.state, self._greet_at = PeerState.GREETING, greet_at
        return lost

    def _greet(self, now: float) -> list[Step]:
        self.state, self._greet_at = PeerState.GREETING, now + GREETING_TIMEOUT_S
        return [Step.SAY_HELLO]
