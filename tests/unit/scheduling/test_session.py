"""Who is believed: a peer that goes through anything greets again and never hears the past; the table of the other side never mixes two up."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from adapt.protocol import messages as msg
from adapt.protocol.ids import RoutingId, bulk_of, routing_ids
from adapt.protocol.wire import Envelope
from adapt.scheduling.session import (
    ATTACH_S,
    GREETING_TIMEOUT_S,
    RENEWAL_MAX_S,
    RENEWAL_S,
    SETTLED_S,
    PeerSession,
    PeerState,
    Sessions,
    Step,
)
from adapt.scheduling.term import Reign

WELCOME = msg.Welcome(software="test", heartbeat_s=0.5, piece_bytes=4096, max_message_bytes=1 << 20, max_budget_s=60.0)
NEWS = msg.StageAck(attempts=[])  # stands for whatever is meant for those above
REFUSED = msg.Refused(code="connect", message="no", fields={})


def said(message: msg.Message, session: int = 0, term: int = 0) -> Envelope:
    return Envelope(message, session, term)


def opened(session: int = 1, term: int = 1, now: float = 0.0) -> PeerSession:
    peer = PeerSession()
    assert peer.connected(now) == [Step.SAY_HELLO]
    assert peer.received(said(WELCOME, session, term), now) == [Step.ATTACH]
    return peer


# ── a peer, event by event ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_peer_greets_when_it_is_connected_and_opens_when_it_is_welcome():
    peer = PeerSession()
    assert (peer.state, peer.next_wakeup()) == (PeerState.DISCONNECTED, None)
    assert peer.connected(10.0) == [Step.SAY_HELLO]
    assert (peer.state, peer.next_wakeup()) == (PeerState.GREETING, 10.0 + GREETING_TIMEOUT_S)
    assert peer.received(said(WELCOME, 3, 2), 10.1) == [Step.ATTACH]
    assert (peer.session, peer.term, peer.highest_term, peer.next_wakeup()) == (3, 2, 2, None)
    assert peer.received(said(NEWS, 3, 2), 10.2) == [Step.DELIVER]


def test_without_a_welcome_it_greets_again_when_the_time_has_come_and_not_before():
    peer = PeerSession()
    peer.connected(0.0)
    assert peer.tick(GREETING_TIMEOUT_S - 0.01) == []
    assert peer.tick(GREETING_TIMEOUT_S) == [Step.SAY_HELLO]
    assert peer.tick(GREETING_TIMEOUT_S) == []


def test_a_new_connection_needs_a_new_session_even_if_the_end_of_the_old_one_was_not_noticed():
    peer = opened()
    assert peer.connected(1.0) == [Step.LOST, Step.SAY_HELLO]
    assert peer.received(said(NEWS, 1, 1), 1.0) == []
    assert peer.received(said(WELCOME, 2, 1), 1.0) == [Step.ATTACH]


def test_a_closed_connection_ends_the_session_and_nothing_is_said_into_it():
    peer = opened()
    assert peer.disconnected() == [Step.LOST]
    assert peer.disconnected() == []
    assert peer.next_wakeup() is None
    assert peer.received(said(WELCOME, 2, 1), 1.0) == []  # of the connection that has closed
    assert peer.connected(2.0) == [Step.SAY_HELLO]


def test_say_hello_is_obeyed_at_once_if_it_is_about_this_session():
    peer = opened(session=4, term=2)
    assert peer.received(said(msg.SayHello(), 3, 2), 1.0) == []
    assert peer.received(said(msg.SayHello(), 4, 1), 1.0) == []
    assert peer.received(said(msg.SayHello(), 4, 2), 1.0) == [Step.LOST, Step.SAY_HELLO]
    assert peer.received(said(msg.SayHello(), 4, 2), 1.0) == []  # a hello is on its way


def test_two_hellos_lead_to_the_later_session():
    peer = PeerSession()
    peer.connected(0.0)
    peer.tick(GREETING_TIMEOUT_S)
    assert peer.received(said(WELCOME, 1, 1), 2.1) == [Step.ATTACH]
    assert peer.received(said(WELCOME, 2, 1), 2.1) == [Step.LOST, Step.ATTACH]
    assert peer.received(said(msg.SayHello(), 1, 1), 2.2) == []
    assert peer.received(said(NEWS, 1, 1), 2.2) == []
    assert peer.received(said(NEWS, 2, 1), 2.2) == [Step.DELIVER]
    assert peer.received(said(WELCOME, 2, 1), 2.3) == []
    assert peer.received(said(WELCOME, 1, 1), 2.3) == []


def test_an_older_reign_is_not_believed():
    peer = opened(session=9, term=5)
    peer.disconnected()
    peer.connected(1.0)
    assert peer.received(said(WELCOME, 10, 4), 1.0) == []
    assert peer.received(said(WELCOME, 1, 6), 1.0) == [Step.ATTACH]  # numbers of sessions start afresh with a reign
    assert (peer.session, peer.term) == (1, 6)


@pytest.mark.parametrize("is_open", [False, True])
def test_refused_is_the_end(is_open):
    peer = opened() if is_open else PeerSession()
    if not is_open:
        peer.connected(0.0)
    assert peer.received(said(REFUSED), 1.0) == [Step.LOST] * is_open + [Step.GIVE_UP]
    assert peer.connected(2.0) == peer.disconnected() == peer.torn(3.0) == peer.tick(99.0) == []
    assert peer.received(said(WELCOME, 7, 7), 4.0) == []
    assert (peer.state, peer.next_wakeup()) == (PeerState.REFUSED, None)


def test_after_goodbye_it_waits_for_a_connection_and_knocks_if_the_old_one_stands():
    peer = opened()
    assert peer.received(said(msg.Goodbye(reason="drained"), 1, 1), 1.0) == [Step.DELIVER, Step.LOST]
    assert peer.tick(1.0 + GREETING_TIMEOUT_S - 0.01) == []
    assert peer.tick(1.0 + GREETING_TIMEOUT_S) == [Step.SAY_HELLO]


def test_goodbye_of_another_session_is_nothing():
    assert opened(session=2).received(said(msg.Goodbye(reason="x"), 1, 1), 1.0) == []


def test_a_torn_session_is_replaced_after_a_moment_once():
    peer = opened()
    assert peer.torn(1.0) == [Step.LOST]
    assert peer.torn(1.0) == []
    assert peer.tick(1.0) == []
    assert peer.tick(1.0 + RENEWAL_S) == [Step.SAY_HELLO]


def test_sides_that_disagree_about_everything_do_not_spin():
    """Whatever is said right after the welcome that ends the session: in the long run it costs a hello in some seconds."""
    for end in (lambda peer, now: peer.torn(now), lambda peer, now: peer.received(said(msg.SayHello(), peer.session, 1), now)):
        peer, now, hellos = PeerSession(), 0.0, 1
        peer.connected(now)
        while now < 100.0:
            peer.received(said(WELCOME, peer.session + 1, 1), now)
            steps = end(peer, now)
            if Step.SAY_HELLO not in steps:
                now = peer.next_wakeup()
                assert peer.tick(now) == [Step.SAY_HELLO]
            hellos += 1
        assert hellos <= 100.0 / RENEWAL_MAX_S + 10


def test_a_session_that_lasted_makes_the_next_renewal_quick_again():
    peer = opened()
    now = 0.0
    for number in range(2, 8):
        peer.torn(now)
        now = peer.next_wakeup()
        peer.tick(now)
        peer.received(said(WELCOME, number, 1), now)
    now += SETTLED_S + 1.0
    assert peer.received(said(msg.SayHello(), 7, 1), now) == [Step.LOST, Step.SAY_HELLO]


# ── a peer, its dispatchers, and a network that fails ────────────────────────────────────────────────────────────────


class Greeting(RuleBasedStateMachine):
    """One peer against a line of dispatchers. Both queues are of one connection: what is in them is lost with it, or comes late."""

    @initialize()
    def begin(self):
        self.now = 0.0
        self.peer = PeerSession()
        self.is_connected = False
        self.up: deque[Envelope | None] = deque()  # None: a hello
        self.down: deque[Envelope] = deque()
        self.persisted, self.dispatcher = 0, 0
        self.reigns: dict[tuple[int, int], int] = {}  # (term, session) -> who gave it
        self.restart()
        self.lost_and_found: list[Step] = []
        self.hello_at: float | None = None  # the last one that has no reason to be repeated yet

    # what steps mean

    def take(self, steps: list[Step], *, cause: bool, envelope: Envelope | None = None):
        for step in steps:
            match step:
                case Step.SAY_HELLO:
                    if not cause and self.hello_at is not None:
                        assert self.now - self.hello_at >= GREETING_TIMEOUT_S - 1e-6
                    self.hello_at = self.now
                    self.up.append(None)
                case Step.ATTACH | Step.LOST:
                    assert [step] != self.lost_and_found[-1:], "opened or lost twice"
                    if not self.lost_and_found:
                        assert step is Step.ATTACH
                    self.lost_and_found.append(step)
                    self.hello_at = None
                case Step.DELIVER:
                    assert envelope is not None
                    # a session number is of the dispatcher that welcomed it; nothing older is believed
                    assert (envelope.session, envelope.term) == (self.peer.session, self.peer.term)
                    assert envelope.term == self.peer.highest_term
                    assert self.lost_and_found[-1] is Step.ATTACH

    # the network

    @precondition(lambda self: not self.is_connected)
    @rule()
    def connect(self):
        self.is_connected = True
        self.take(self.peer.connected(self.now), cause=True)

    @precondition(lambda self: self.is_connected)
    @rule(is_noticed=st.booleans())
    def cut(self, is_noticed):
        """What was under way is gone; the peer may learn of it only from the next connection."""
        self.up.clear()
        self.down.clear()
        self.is_connected = False
        for session in self.table:
            self.table.end(session.number)
        if is_noticed:
            self.take(self.peer.disconnected(), cause=True)

    @precondition(lambda self: self.down)
    @rule()
    def hear(self):
        envelope = self.down.popleft()
        self.take(self.peer.received(envelope, self.now), cause=isinstance(envelope.message, msg.SayHello), envelope=envelope)

    @precondition(lambda self: self.is_connected)
    @rule(
        session=st.integers(0, 6).map(lambda number: 1000 + number),
        term=st.integers(0, 6),
        message=st.sampled_from([NEWS, msg.SayHello(), WELCOME, msg.Goodbye(reason="")]),
    )
    def hear_a_ghost(self, session, term, message):
        """Something from a dispatcher that reigns no more."""
        if term < self.reign.term:
            highest = self.peer.highest_term
            envelope = said(message, session, term)
            steps = self.peer.received(envelope, self.now)
            if term < highest:
                assert steps == []
            self.take(steps, cause=isinstance(message, msg.SayHello), envelope=envelope)

    @rule()
    def tear(self):
        self.take(self.peer.torn(self.now), cause=False)

    @rule(wait_s=st.sampled_from([0.0, 0.1, RENEWAL_S, GREETING_TIMEOUT_S, SETTLED_S]))
    def wait(self, wait_s):
        self.now += wait_s
        self.take(self.peer.tick(self.now), cause=False)

    # the dispatcher

    @precondition(lambda self: self.up)
    @rule()
    def listen(self):
        envelope = self.up.popleft()
        if envelope is None:
            if self.reign.hello(self.peer.highest_term, has_met_us=self.table.has_met("worker", "w1", 1)):
                for session in self.table:
                    self.table.end(session.number)
            self.persisted = max(self.persisted, self.reign.term)
            session = self.table.welcome(CONTROL, "worker", "w1", 1)
            dispatcher = self.reigns.setdefault((self.reign.term, session.number), self.dispatcher)
            assert dispatcher == self.dispatcher, "two reigns under one number"
            self.down.append(said(WELCOME, session.number, self.reign.term))
        elif self.table.find(CONTROL, envelope.session) is None or envelope.term != self.reign.term:
            self.down.append(said(msg.SayHello(), envelope.session, envelope.term))

    @precondition(lambda self: self.is_connected and self.peer.is_open)
    @rule()
    def speak(self):
        self.up.append(said(NEWS, self.peer.session, self.peer.term))

    @rule()
    def answer(self):
        session = self.table.greeted("worker", "w1")
        if session is not None and self.is_connected:
            self.down.append(said(NEWS, session.number, self.reign.term))

    @rule()
    def end_the_session(self):
        session = self.table.greeted("worker", "w1")
        if session is not None:
            self.table.end(session.number)
            if self.is_connected:
                self.down.append(said(msg.Goodbye(reason="evicted"), session.number, self.reign.term))

    @rule()
    def restart(self, forgets: bool = False):
        self.dispatcher += 1
        self.reign, self.table = Reign(), Sessions(1000 * self.dispatcher)  # as random ones differ
        self.persisted = self.reign.begin(0 if forgets else self.persisted)

    @rule()
    def restart_without_memory(self):
        self.restart(forgets=True)

    # what holds

    @invariant()
    def terms_never_fall(self):
        assert self.peer.term == self.peer.highest_term

    @invariant()
    def whoever_waits_will_wake(self):
        """No limbo: an open session, a closed connection, or a moment at which it greets."""
        assert (self.peer.state is PeerState.GREETING) == (self.peer.next_wakeup() is not None)
        assert self.peer.is_open == (self.lost_and_found[-1:] == [Step.ATTACH])

    def teardown(self):
        """When the network holds and the dispatcher answers, the session is open soon, and both mean the same one."""
        if not hasattr(self, "peer"):
            return
        if not self.is_connected:
            self.connect()
        for _ in range(4):  # hellos are enough, whatever was before
            while self.up or self.down:
                self.listen() if self.up else self.hear()
            if self.peer.is_open:
                self.speak()
                if self.table.find(CONTROL, self.peer.session) is not None and self.peer.term == self.reign.term:
                    break
            else:
                self.now = self.peer.next_wakeup()
                self.take(self.peer.tick(self.now), cause=False)
        assert self.peer.is_open
        assert self.table.find(CONTROL, self.peer.session) is not None
        assert self.peer.term == self.reign.term


CONTROL = routing_ids("w1", 1)[0]
TestGreeting = Greeting.TestCase
TestGreeting.settings = settings(max_examples=150, stateful_step_count=40)


# ── the dispatcher's table ───────────────────────────────────────────────────────────────────────────────────────────

PEERS = [("worker", "w1", 1), ("worker", "w1", 2), ("worker", "w2", 1), ("client", "w1", 1), ("client", "c1", 7)]
ROUTES = {peer: routing_ids(f"{peer[0]}-{peer[1]}", peer[2])[0] for peer in PEERS}


@given(
    st.lists(
        st.tuples(st.just("welcome"), st.sampled_from(PEERS))
        | st.tuples(st.just("attach"), st.sampled_from(PEERS))
        | st.tuples(st.just("end"), st.integers(0, 12))
    )
)
def test_the_table_agrees_with_a_plain_list(steps):
    """The model: every session that was ever welcomed, in order; it lives while nobody of its name came later and it was not ended."""
    table, model = Sessions(), []
    for step, about in steps:
        if step == "welcome":
            role, name, incarnation = about
            model = [entry for entry in model if (entry["role"], entry["name"]) != (role, name)]
            session = table.welcome(ROUTES[about], role, name, incarnation)
            assert (session.role, session.name, session.incarnation, session.is_attached) == (role, name, incarnation, False)
            model.append({"number": session.number, "role": role, "name": name, "route": ROUTES[about], "attached": False})
        elif step == "attach":
            for entry in model:
                if entry["route"] == ROUTES[about]:
                    table.attach(bulk_of(ROUTES[about]), entry["number"])
                    entry["attached"] = True
        else:
            known = any(entry["number"] == about for entry in model)
            assert (table.end(about) is not None) == known
            model = [entry for entry in model if entry["number"] != about]
        assert [(session.number, session.is_attached) for session in table] == [(entry["number"], entry["attached"]) for entry in model]
        assert len(table) == len(model)
        for peer, route in ROUTES.items():
            mine = next((entry for entry in model if entry["route"] == route), None)
            named = next((entry for entry in model if (entry["role"], entry["name"]) == peer[:2]), None)
            for address in (route, bulk_of(route)):
                assert number_of(table.routed(address)) == (mine and mine["number"])
                for number in range(14):
                    assert number_of(table.find(address, number)) == (number if mine and mine["number"] == number else None)
            assert number_of(table.greeted(*peer[:2])) == (named and named["number"])
            assert number_of(table.named(*peer[:2])) == (named["number"] if named and named["attached"] else None)


def number_of(session):
    return None if session is None else session.number


def test_numbers_of_sessions_are_never_used_again():
    table = Sessions()
    numbers = []
    for _ in range(3):
        session = table.welcome(ROUTES[PEERS[0]], *PEERS[0])
        numbers.append(session.number)
        table.end(session.number)
    assert numbers == [1, 2, 3]


def test_a_table_knows_whom_it_has_ever_welcomed(monkeypatch):
    monkeypatch.setattr("adapt.scheduling.session.MET_LIMIT", 2)
    table = Sessions()
    first, second, third = PEERS[:3]
    for peer in (first, second, first):
        table.end(table.welcome(ROUTES[peer], *peer).number)
        assert table.has_met(*peer)
    table.welcome(ROUTES[third], *third)
    assert [table.has_met(*peer) for peer in (first, second, third)] == [True, False, True]


def test_only_its_own_bulk_connection_can_be_attached_to_a_session():
    table = Sessions()
    session = table.welcome(ROUTES[PEERS[0]], *PEERS[0])
    for stranger in (ROUTES[PEERS[0]], bulk_of(ROUTES[PEERS[1]]), RoutingId(b"x")):
        with pytest.raises(KeyError):
            table.attach(stranger, session.number)
    with pytest.raises(KeyError):
        table.attach(bulk_of(ROUTES[PEERS[0]]), session.number + 1)
    assert table.named("worker", "w1") is None


def test_an_address_that_comes_under_another_name_ends_what_it_was():
    table = Sessions()
    first = table.welcome(ROUTES[PEERS[0]], "worker", "w1", 1)
    second = table.welcome(ROUTES[PEERS[0]], "worker", "w9", 1)
    assert [session.number for session in table] == [second.number]
    assert table.find(ROUTES[PEERS[0]], first.number) is None


def test_the_table_may_change_while_it_is_walked_through():
    table = Sessions()
    for peer in PEERS[1:]:
        table.welcome(ROUTES[peer], *peer)
    for session in table:
        table.end(session.number)
    assert len(table) == 0


def test_a_session_whose_bulk_connection_does_not_come_is_overdue_after_a_while():
    sessions = Sessions()
    control = routing_ids("w1", 1)[0]
    session = sessions.welcome(control, "worker", "w1", 1, now=100.0)
    assert not session.is_overdue(100.0 + ATTACH_S)
    assert session.is_overdue(100.1 + ATTACH_S)
    sessions.attach(bulk_of(control), session.number)
    assert not session.is_overdue(1000.0)
