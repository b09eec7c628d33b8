"""Connections between peers and the dispatcher, as TCP and libzmq really behave.

* Within one direction of one connection the order is kept; between connections there is none.
* A connection that breaks delivers a prefix of what was under way in each direction; the rest is lost, and nobody is told what.
  Of what a peer had handed over, the very last may leave over the next connection: libzmq keeps it.
* The ends notice a break at different times, the dispatcher's perhaps not before the peer has come back (handover).
* To a connection that is broken and not noticed everything can be sent. To one that is full or unknown nothing can: the send is refused.
* While a direction is cut, what is under way in it waits. If that takes longer than heartbeats allow, the connection breaks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import NamedTuple, Protocol, TypeAlias

from adapt.protocol.ids import RoutingId
from adapt.protocol.wire import Envelope
from adapt.simulation.timeline import Process, Timeline

HEARTBEAT_TIMEOUT_S = (1.4, 1.9)  # after so long a side that hears nothing closes its control connection
RECONNECT_S = (0.1, 1.0)
CLOSE_S = (0.001, 0.002)  # after which a side learns that the other has closed
HEADER_BYTES = 200  # of a message, besides its blobs


class Damaged(NamedTuple):
    """A message that cannot be read."""

    envelope: Envelope


Item: TypeAlias = Envelope | Damaged


@dataclass(slots=True)
class Quality:
    """Of the way between one peer and the dispatcher; both directions, both connections."""

    latency_s: float = 0.0005
    jitter_s: float = 0.0005
    bytes_per_s: float = 100e6
    queue_limit: int = 10_000  # messages that may wait in one direction of one connection
    damage: float = 0.0  # share of messages that come damaged


class Wire:
    """The way between one peer and the dispatcher, and which of its directions are cut."""

    def __init__(self, quality: Quality) -> None:
        self.quality = quality
        self.up_is_cut = self.down_is_cut = False
        self.connections: list[Connection] = []

    @property
    def is_cut(self) -> bool:
        return self.up_is_cut or self.down_is_cut


class Pipe:
    """One direction of one connection."""

    __slots__ = ("_deliver", "_free_at", "_items", "_last", "_random", "_timeline", "_wire", "is_held")

    def __init__(self, timeline: Timeline, random: Random, wire: Wire, deliver: Callable[[Item], None]) -> None:
        self._timeline, self._random, self._wire, self._deliver = timeline, random, wire, deliver
        self._items: deque[tuple[float, Item]] = deque()
        self._free_at = self._last = 0.0
        self.is_held = False

    def __len__(self) -> int:
        return len(self._items)

    @property
    def is_full(self) -> bool:
        return len(self._items) >= self._wire.quality.queue_limit

    def send(self, envelope: Envelope) -> None:
        quality, now = self._wire.quality, self._timeline.now
        size_bytes = HEADER_BYTES
        for blob in envelope.blobs:
            size_bytes += blob.size
        self._free_at = max(self._free_at, now) + size_bytes / quality.bytes_per_s
        item: Item = envelope
        if quality.damage and self._random.random() < quality.damage:
            item = Damaged(envelope)
        self._put(item)

    def _put(self, item: Item) -> None:
        quality = self._wire.quality
        arrival = self._free_at + quality.latency_s + quality.jitter_s * self._random.random() ** 4
        self._last = max(self._last, arrival)
        self._items.append((self._last, item))
        self._timeline.at(self._last, self._arrive)

    def _arrive(self) -> None:
        if self._items and not self.is_held and self._items[0][0] <= self._timeline.now:
            self._deliver(self._items.popleft()[1])

    def hold(self) -> None:
        self.is_held = True

    def release(self) -> None:
        """What was held comes, as if it had been sent now."""
        self.is_held = False
        items, self._items = self._items, deque()
        self._free_at = max(self._free_at, self._timeline.now)
        for _, item in items:
            self._put(item)

    def tear(self) -> list[Item]:
        """A prefix has left and arrives, now or when it would have; of the rest, the end is returned, which had not left yet."""
        items = list(self._items)
        self._items.clear()
        left = self._random.randint(0, 0 if self.is_held else len(items))
        kept = self._random.randint(left, len(items))
        is_prompt = self._random.random() < 0.5
        for moment, item in items[:left]:
            if is_prompt:
                self._deliver(item)
            else:
                self._items.append((moment, item))
                self._timeline.at(moment, self._arrive)
        return [item for _, item in items[kept:]]


class Peer(Protocol):
    """What a connection tells the process that made it."""

    process: Process

    def came(self, connection: Connection, item: Item) -> None: ...

    def stands(self, connection: Connection) -> None: ...

    def broke(self, connection: Connection) -> None: ...


class Router(Protocol):
    """What connections tell the dispatcher."""

    process: Process

    def came(self, connection: Connection, item: Item) -> None: ...

    def broke(self, connection: Connection) -> None: ...


class Connection:
    """One connection of a peer; another follows it, with the same routing id, when it has broken."""

    def __init__(self, network: Network, peer: Peer, routing_id: RoutingId, wire: Wire, *, beats: bool) -> None:
        timeline, random = network.timeline, network.random
        self.network, self.peer, self.routing_id, self.wire, self.beats = network, peer, routing_id, wire, beats
        self.is_open = self.is_dropped = False  # dropped: by the peer, for a fresh one
        self.has_greeted = False  # a hello has come over it
        self._unsent: list[Item] = []  # handed over before it stood
        self.up = Pipe(timeline, random, wire, self._came_up)
        self.down = Pipe(timeline, random, wire, self._came_down)

    def _came_up(self, item: Item) -> None:
        if self.network.is_superseded(self):
            return
        router = self.network.router
        router.process.hand(self, router.came, self, item)

    def _came_down(self, item: Item) -> None:
        if not self.is_dropped:
            self.peer.process.hand(self, self.peer.came, self, item)

    # ── the peer's side ──────────────────────────────────────────────────────────────────────────────────────────────

    def send(self, envelope: Envelope) -> bool:
        """False: its queue is full, and nothing was taken. What is sent over a broken one is lost, or goes over the next."""
        if not self.is_open:
            if len(self._unsent) >= self.wire.quality.queue_limit:
                return False
            self._unsent.append(envelope)
            return True
        if self.up.is_full:
            return False
        self.up.send(envelope)
        return True

    def give_back(self) -> list[Item]:
        """What was handed over and has not left."""
        unsent, self._unsent = self._unsent, []
        return unsent

    def take_back(self, items: list[Item]) -> None:
        """What had not left over the connection before."""
        self._unsent += items

    def opened(self) -> None:
        self.is_open = True
        self.up.is_held, self.down.is_held = self.wire.up_is_cut, self.wire.down_is_cut
        for item in self.give_back():
            self.up.send(item.envelope if isinstance(item, Damaged) else item)

    def tear(self) -> None:
        """It is no more, whoever knows it."""
        if self.is_open:
            self.is_open = False
            self.take_back(self.up.tear())
            self.down.tear()
        if self in self.wire.connections:
            self.wire.connections.remove(self)


class Network:
    """All connections, and the dispatcher's table of them."""

    def __init__(self, timeline: Timeline, random: Random) -> None:
        self.timeline, self.random = timeline, random
        self.router: Router
        self.log: Callable[[str, str], None] = lambda who, what: None
        self._routes: dict[RoutingId, Connection] = {}
        self.handovers = 0

    # ── connections come ─────────────────────────────────────────────────────────────────────────────────────────────

    def dial(self, connection: Connection, *, delay_s: float = 0.0) -> None:
        """Connect, now or as soon as that is possible."""
        connection.wire.connections.append(connection)
        self.timeline.after(delay_s + 3 * connection.wire.quality.latency_s, self._try, connection)

    def _try(self, connection: Connection) -> None:
        if connection.is_dropped or not connection.peer.process.is_alive:
            return
        router = self.router.process
        if connection.wire.is_cut or not router.is_alive or router.is_frozen or connection.peer.process.is_frozen:
            self.timeline.after(self.random.uniform(*RECONNECT_S), self._try, connection)
            return
        before = self._routes.get(connection.routing_id)
        if before is not None and before is not connection:
            self.handovers += before.beats
        self._routes[connection.routing_id] = connection
        connection.opened()
        connection.peer.process.hand(connection, connection.peer.stands, connection)

    # ── the dispatcher's side ────────────────────────────────────────────────────────────────────────────────────────

    def send(self, routing_id: RoutingId, envelope: Envelope) -> bool:
        """False: the connection is unknown or full."""
        connection = self._routes.get(routing_id)
        if connection is None or connection.down.is_full:
            return False
        if connection.is_open:
            connection.down.send(envelope)
        return True  # or is broken, and not known to be

    def is_superseded(self, connection: Connection) -> bool:
        """Whether a later one has its address: what it has brought and nobody read is dropped then."""
        now = self._routes.get(connection.routing_id)
        return now is not None and now is not connection

    def has_greeted_since(self, connection: Connection) -> bool:
        """Whether a later connection of the same address has brought a hello."""
        now = self._routes.get(connection.routing_id)
        return now is not None and now is not connection and now.has_greeted

    # ── connections go ───────────────────────────────────────────────────────────────────────────────────────────────

    def drop(self, connection: Connection) -> None:
        """The peer closes it, for a fresh one."""
        connection.tear()
        connection.is_dropped = True
        self._router_notices_later(connection, CLOSE_S)

    def break_up(self, connection: Connection, *, peer_after_s: float, router_after_s: float | None) -> None:
        """It breaks; `router_after_s` None: the dispatcher never notices by itself."""
        if not connection.is_open:
            return
        self.log(connection.peer.process.name, f"connection {connection.routing_id.decode()[-1]} breaks")
        connection.tear()
        self.timeline.after(peer_after_s, self._peer_notices, connection)
        if router_after_s is not None:
            self.timeline.after(router_after_s, self._router_notices, connection)

    def _peer_notices(self, connection: Connection) -> None:
        if not connection.is_dropped:
            connection.peer.process.hand(connection, connection.peer.broke, connection)

    def _router_notices_later(self, connection: Connection, within: tuple[float, float]) -> None:
        self.timeline.after(self.random.uniform(*within), self._router_notices, connection)

    def _router_notices(self, connection: Connection) -> None:
        router = self.router
        if self._routes.get(connection.routing_id) is connection:
            del self._routes[connection.routing_id]
        router.process.hand(connection, router.broke, connection)

    def peer_ended(self, wire: Wire, *, is_clean: bool) -> None:
        """A peer's process is gone, and its connections with it."""
        for connection in list(wire.connections):
            connection.tear()
            connection.is_dropped = True
            self._router_notices_later(connection, CLOSE_S if is_clean else HEARTBEAT_TIMEOUT_S)

    def router_ended(self, *, is_clean: bool) -> None:
        """The dispatcher's process is gone."""
        routes, self._routes = self._routes, {}
        for connection in routes.values():
            if connection.is_open:
                connection.tear()
                self.timeline.after(self.random.uniform(*(CLOSE_S if is_clean else HEARTBEAT_TIMEOUT_S)), self._peer_notices, connection)

    # ── the way itself ───────────────────────────────────────────────────────────────────────────────────────────────

    def cut(self, wire: Wire, *, up: bool, down: bool) -> None:
        """Nothing passes until `heal`. Heartbeats find out, on the side that hears nothing, sooner or later on the other."""
        wire.up_is_cut, wire.down_is_cut = up, down
        for connection in wire.connections:
            connection.up.is_held, connection.down.is_held = up, down
            if connection.beats and connection.is_open:
                self.timeline.after(self.random.uniform(*HEARTBEAT_TIMEOUT_S), self._heartbeats_missed, connection, self._hearing(wire))

    def heal(self, wire: Wire) -> None:
        wire.up_is_cut = wire.down_is_cut = False
        for connection in wire.connections:
            connection.up.release()
            connection.down.release()

    def frozen(self, wire: Wire) -> None:
        """The peer's process, or the dispatcher's, answers no heartbeat from now on."""
        for connection in wire.connections:
            if connection.beats and connection.is_open:
                self.timeline.after(self.random.uniform(*HEARTBEAT_TIMEOUT_S), self._heartbeats_missed, connection, self._hearing(wire))

    @staticmethod
    def _hearing(wire: Wire) -> bool:
        return wire.down_is_cut

    def _heartbeats_missed(self, connection: Connection, peer_hears_nothing: bool) -> None:
        wire = connection.wire
        is_dead = wire.is_cut or connection.peer.process.is_frozen or self.router.process.is_frozen
        if not is_dead or not connection.is_open:
            return
        late_s = self.random.uniform(0.0, 2.0)
        router_hears_nothing = wire.up_is_cut or connection.peer.process.is_frozen
        self.break_up(
            connection,
            peer_after_s=0.0 if peer_hears_nothing or not router_hears_nothing else late_s,
            router_after_s=0.0 if router_hears_nothing else late_s,
        )
