"""A worker's or client's two connections to the dispatcher, kept in one session: what runtime/link.py does, without sockets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from adapt.protocol.ids import routing_ids
from adapt.protocol.messages import Attach, ClientHello, Message, Refused, Welcome, WorkerHello
from adapt.protocol.wire import Blob, Envelope
from adapt.scheduling.session import PeerSession, Step
from adapt.simulation.network import RECONNECT_S, Connection, Damaged, Item, Network, Wire
from adapt.simulation.story import Story
from adapt.simulation.timeline import Process

CONTROL_BYTES = 64 << 10  # a message with more goes on bulk
_ATTACH = Attach()


class Owner(Protocol):
    """What a link tells the worker or client that it belongs to."""

    def hello(self, highest_term: int) -> WorkerHello | ClientHello: ...

    def opened(self, welcome: Welcome, term: int) -> None: ...

    def lost(self) -> None: ...

    def refused(self, refused: Refused) -> None: ...

    def received(self, message: Message, blobs: tuple[Blob, ...]) -> None: ...

    def turned(self) -> None: ...


class PeerLink:
    """One life of a peer. It is told of its connections as `network.Peer`.

    Args:
        arm: sets the process's alarm for the session's next moment.
    """

    def __init__(
        self, network: Network, process: Process, owner: Owner, wire: Wire, story: Story, *, incarnation: int, arm: Callable[[], None]
    ) -> None:
        self.process, self.wire, self.story = process, wire, story
        self._life = process.life
        self.network, self._owner, self._arm = network, owner, arm
        self.session = PeerSession()
        self._routing_ids = routing_ids(process.name, incarnation)
        self._has_met = False  # a session was open before
        self._bulk_stands = False
        self.hellos = 0

    def start(self) -> None:
        self._control = self._connect(beats=True)
        self._bulk = self._connect(beats=False)

    def _connect(self, *, beats: bool, delay_s: float = 0.0) -> Connection:
        connection = Connection(self.network, self, self._routing_ids[0 if beats else 1], self.wire, beats=beats)
        self.network.dial(connection, delay_s=delay_s)
        return connection

    @property
    def is_open(self) -> bool:
        return self.session.is_open

    def send(self, message: Message, blobs: tuple[Blob, ...] = ()) -> bool:
        """Within the open session. False: there is none, or bulk is full; say it again when one opens."""
        if not self.session.is_open:
            return False
        envelope = Envelope(message, self.session.session, self.session.term, blobs)
        is_bulk = sum(blob.size for blob in blobs) > CONTROL_BYTES if blobs else False
        self.story.add(self.network.timeline.now, self.process.name, "says", envelope)
        if not is_bulk:
            if not self._control.send(envelope):  # the runtime keeps it and tries again
                self.process.later(0.05, self._send_again, envelope)
            return True
        return self._bulk.send(envelope)

    def _send_again(self, envelope: Envelope) -> None:
        is_wanted = self.session.is_open and self.session.session == envelope.session
        if is_wanted and not self._control.send(envelope):
            self.process.later(0.05, self._send_again, envelope)

    def tear(self) -> None:
        """Something was lost on the way, or could not be read."""
        self._take(self.session.torn(self.process.clock()), None)

    def next_wakeup(self) -> float | None:
        return self.session.next_wakeup()

    def tick(self, now: float) -> None:
        self._take(self.session.tick(now), None)

    # ── what connections tell ────────────────────────────────────────────────────────────────────────────────────────

    def came(self, connection: Connection, item: Item) -> None:
        if connection.is_dropped or not self._is_ours():
            return
        if isinstance(item, Damaged):
            self.story.add(self.network.timeline.now, self.process.name, "cannot read", item.envelope)
            self.tear()
        else:
            self._take(self.session.received(item, self.process.clock()), item)
        self._owner.turned()

    def _is_ours(self) -> bool:
        """Whether the process still lives the life that this link was made in."""
        return self.process.life == self._life

    def stands(self, connection: Connection) -> None:
        if not self._is_ours():
            return
        if connection is self._control:
            self._take(self.session.connected(self.process.clock()), None)
        elif connection is self._bulk:
            self._bulk_stands = True
        self._owner.turned()

    def broke(self, connection: Connection) -> None:
        if not self._is_ours():
            return
        if connection is self._control:
            self._control = self._connect(beats=True, delay_s=self.process.random.uniform(*RECONNECT_S))
            self._control.take_back(connection.give_back())
            self._take(self.session.disconnected(), None)
        elif connection is self._bulk:
            stood, self._bulk_stands = self._bulk_stands, False
            self._bulk = self._connect(beats=False, delay_s=self.process.random.uniform(*RECONNECT_S))
            if stood:
                self.tear()
        self._owner.turned()

    # ── what the session says ────────────────────────────────────────────────────────────────────────────────────────

    def _take(self, steps: list[Step], item: Envelope | None) -> None:
        for step in steps:
            match step:
                case Step.SAY_HELLO:
                    self._say_hello()
                case Step.ATTACH:
                    assert item is not None and isinstance(item.message, Welcome)
                    if self._has_met:
                        self._renew_bulk()
                    self._has_met = True
                    self._bulk.send(Envelope(_ATTACH, self.session.session, self.session.term))
                    self._owner.opened(item.message, self.session.term)
                case Step.DELIVER:
                    assert item is not None
                    self._owner.received(item.message, item.blobs)
                case Step.LOST:
                    self._renew_bulk()
                    self._owner.lost()
                case Step.GIVE_UP:
                    assert item is not None and isinstance(item.message, Refused)
                    self._owner.refused(item.message)
        if Step.DELIVER not in steps or len(steps) > 1:
            self._arm()

    def _say_hello(self) -> None:
        self.hellos += 1
        envelope = Envelope(self._owner.hello(self.session.highest_term), 0, 0)
        self.story.add(self.network.timeline.now, self.process.name, "says", envelope)
        self._control.send(envelope)

    def _renew_bulk(self) -> None:
        self._bulk_stands = False
        self.network.drop(self._bulk)
        self._bulk = self._connect(beats=False)
