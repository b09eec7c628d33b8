"""Which faults a seed draws, and when they come. `stop` ends them all: from then on everything has to come right within a bound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from random import Random
from typing import TypeVar

from adapt.simulation.client import Client
from adapt.simulation.dispatcher import Dispatcher
from adapt.simulation.network import Network, Quality, Wire
from adapt.simulation.story import Story
from adapt.simulation.timeline import Timeline
from adapt.simulation.worker import Machine, Worker

T = TypeVar("T")

AT_MOST = 5  # of one kind
OUTAGE_S = (0.1, 6.0)  # how long most of them last


class Kind(StrEnum):
    """`CANCEL` to `FRAGILE` are no moments but what the run is made of. New kinds come last: what seeds draw stays."""

    WORKER_CRASH = "a worker crashes"
    WORKER_STOP = "a worker stands still"
    WORKER_DRAIN = "a worker drains"
    WORKER_SLOW = "a worker is slow"
    WORKER_SPOILS = "a worker gives answers of a wrong form"
    WORKER_LOADS_NOT = "a worker cannot load stages"
    WORKER_TWICE = "another worker of a name"
    DISPATCHER_CRASH = "the dispatcher crashes"
    DISPATCHER_DRAIN = "the dispatcher drains"
    DISPATCHER_STOP = "the dispatcher stands still"
    CLIENT_CRASH = "a client crashes"
    CLIENT_CLOSE = "a client closes"
    CLIENT_STOP = "a client stands still"
    CONNECTION_BREAK = "a connection breaks"
    CUT = "a way is cut"
    SLOW_LINK = "a way is slow"
    FULL_QUEUES = "queues are full"
    DAMAGE = "messages are damaged"
    LEASES_STOP = "the lease service stands still"
    LEASES_WIPE = "the lease service forgets"
    EVICTION = "a stage is lost"
    SWITCH = "another version"
    UNDEPLOY = "a deployment is removed"
    CANCEL = "requests are cancelled"
    POISON = "inputs that kill"
    WRONG = "inputs that the model cannot take"
    FRAGILE = "inputs that one kind of worker cannot take"
    RECUT = "a version is cut anew"
    WORKER_LIES = "a worker comes to something else"  # always the same; everything is verified


@dataclass(slots=True, kw_only=True)
class World:
    """What faults may befall.

    Attributes:
        another: makes another process for a worker's machine.
        redeploy: deploys another version of some deployment.
        undeploy: removes some deployment.
        recut: cuts the present version of some deployment anew.
    """

    timeline: Timeline
    network: Network
    story: Story
    dispatcher: Dispatcher
    workers: list[Worker]
    clients: list[Client]
    another: Callable[[Machine], Worker]
    redeploy: Callable[[], None]
    undeploy: Callable[[], None]
    recut: Callable[[], None]

    @property
    def wires(self) -> list[Wire]:
        return [worker.wire for worker in self.workers] + [client.wire for client in self.clients]


def drawn(random: Random) -> frozenset[Kind]:
    """A subset of all kinds: often few, sometimes many, sometimes none."""
    share = random.choice((0.0, 0.1, 0.2, 0.35, 0.6))
    return frozenset(kind for kind in Kind if random.random() < share)


class Faults:
    """Those of one run. Moments are of true time."""

    def __init__(self, world: World, random: Random, kinds: frozenset[Kind]) -> None:
        self.world, self.kinds = world, kinds
        self._random = random
        self._is_over = False
        self._others: list[Worker] = []
        self._liar: Machine | None = None
        self._usual = {wire: replace(wire.quality) for wire in world.wires}
        self._deeds: dict[Kind, Callable[[], None]] = {
            Kind.WORKER_CRASH: lambda: self._one(world.workers).crash(is_clean=self._perhaps(0.7)),
            Kind.WORKER_STOP: lambda: self._stop(self._one(world.workers)),
            Kind.WORKER_DRAIN: self._drain,
            Kind.WORKER_SLOW: self._slow,
            Kind.WORKER_SPOILS: self._spoil,
            Kind.WORKER_LIES: self._lie,
            Kind.WORKER_LOADS_NOT: self._refuse_to_load,
            Kind.WORKER_TWICE: self._twice,
            Kind.DISPATCHER_CRASH: self._crash_dispatcher,
            Kind.DISPATCHER_DRAIN: self._drain_dispatcher,
            Kind.DISPATCHER_STOP: self._stop_dispatcher,
            Kind.CLIENT_CRASH: lambda: self._end_client(is_clean=self._perhaps(0.7)),
            Kind.CLIENT_CLOSE: lambda: self._end_client(is_clean=None),
            Kind.CLIENT_STOP: lambda: self._stop(self._one(world.clients)),
            Kind.CONNECTION_BREAK: self._break,
            Kind.CUT: self._cut,
            Kind.SLOW_LINK: self._slow_link,
            Kind.FULL_QUEUES: self._full_queues,
            Kind.DAMAGE: self._damage,
            Kind.LEASES_STOP: self._stop_leases,
            Kind.LEASES_WIPE: world.dispatcher.leases.wipe,
            Kind.EVICTION: self._evict,
            Kind.SWITCH: world.redeploy,
            Kind.UNDEPLOY: world.undeploy,
            Kind.RECUT: world.recut,
        }

    def schedule(self, begin: float, end: float) -> None:
        """Have each kind come a few times between these moments."""
        for kind in Kind:
            if kind in self.kinds and kind in self._deeds:
                for _ in range(self._random.randint(1, AT_MOST)):
                    self.world.timeline.at(self._random.uniform(begin, end), self._do, kind)

    def stop(self) -> None:
        """Undo everything: whoever stands still goes on, whoever is dead starts, every way is free."""
        world = self.world
        self._is_over = True
        self._tell("all faults are over")
        for other in self._others:
            other.is_supervised = False
            other.go_on()
            other.crash(is_clean=True)
        for wire in world.wires:
            self._restore(wire)
            world.network.heal(wire)
        if not world.dispatcher.leases.is_up:
            world.dispatcher.leases.start(forgives=True)
        if world.dispatcher.is_draining:
            world.dispatcher.crash(is_clean=True)
        if Kind.WORKER_LOADS_NOT in self.kinds:  # whoever has made room on a disk starts the worker again, to be asked again
            for worker in world.workers:
                worker.crash(is_clean=True)
        processes: list[Dispatcher | Worker | Client] = [world.dispatcher, *world.workers, *world.clients]
        for process in processes:
            process.go_on()
            if not process.is_alive:
                process.start()
        for worker in world.workers:
            worker.machine.drag, worker.machine.spoils, worker.machine.lies, worker.machine.loads = 1.0, 0.0, 0.0, True

    # ── the parts ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _do(self, kind: Kind) -> None:
        if not self._is_over:
            self._tell(kind.value)
            self._deeds[kind]()

    def _tell(self, what: str) -> None:
        self.world.story.add(self.world.timeline.now, "faults", "", what)

    def _perhaps(self, share: float) -> bool:
        return self._random.random() < share

    def _one(self, among: list[T]) -> T:
        return self._random.choice(among)

    def _later(self, call: Callable[[], None], *, within: tuple[float, float] = OUTAGE_S) -> None:
        """Undo something, unless all was undone before."""
        self.world.timeline.after(self._random.uniform(*within), self._unless_over, call)

    def _unless_over(self, call: Callable[[], None]) -> None:
        if not self._is_over:
            call()

    def _drain(self) -> None:
        worker = self._one(self.world.workers)
        if not worker.is_stopped:
            worker.drain()

    def _slow(self) -> None:
        machine = self._one(self.world.workers).machine
        machine.drag = self._random.choice((3.0, 20.0, 300.0))
        self._later(lambda: setattr(machine, "drag", 1.0))

    def _spoil(self) -> None:
        machine = self._one(self.world.workers).machine
        machine.spoils = self._random.uniform(0.05, 0.5)
        self._later(lambda: setattr(machine, "spoils", 0.0))

    def _lie(self) -> None:
        if self._liar is None:  # two that lie alike would be believed
            self._liar = self._one(self.world.workers).machine
        machine = self._liar
        machine.lies = self._random.choice((0.1, 0.5, 1.0))
        self._later(lambda: setattr(machine, "lies", 0.0))

    def _refuse_to_load(self) -> None:
        machine = self._one(self.world.workers).machine
        machine.loads = False
        self._later(lambda: setattr(machine, "loads", True))

    def _twice(self) -> None:
        other = self.world.another(self._one(self.world.workers).machine)
        other.is_supervised = False
        self._others.append(other)
        other.start()
        self._later(lambda: other.crash(is_clean=True))

    def _crash_dispatcher(self) -> None:
        dispatcher = self.world.dispatcher
        dispatcher.crash(is_clean=self._perhaps(0.7))
        if self._perhaps(0.3):
            dispatcher.leases.wipe()

        self._later(self._start_dispatcher, within=(0.05, 3.0))

    def _drain_dispatcher(self) -> None:
        self.world.dispatcher.drain()
        self._later(self._start_dispatcher, within=(4.0, 6.0))

    def _start_dispatcher(self) -> None:
        if not self.world.dispatcher.is_alive:
            self.world.dispatcher.start()

    def _stop(self, process: Worker | Client) -> None:
        if process.is_alive and not process.is_stopped:
            process.stop(is_frozen=self._perhaps(0.7))
            self.world.network.frozen(process.wire)
            self._later(process.go_on)

    def _stop_dispatcher(self) -> None:
        dispatcher = self.world.dispatcher
        if dispatcher.is_alive and not dispatcher.is_stopped:
            dispatcher.stop(is_frozen=self._perhaps(0.5))
            for wire in self.world.wires:
                self.world.network.frozen(wire)
            self._later(dispatcher.go_on)

    def _end_client(self, *, is_clean: bool | None) -> None:
        """None: it closes."""
        client = self._one(self.world.clients)
        if is_clean is not None:
            client.crash(is_clean=is_clean)
        elif not client.is_stopped:
            client.close()
        self._later(client.start)

    def _break(self) -> None:
        connections = self._one(self.world.wires).connections
        if connections:
            router_after_s = None if self._perhaps(0.3) else self._random.uniform(0.0, 2.0)
            connection = self._one(connections)
            self.world.network.break_up(connection, peer_after_s=self._random.uniform(0.0, 1.5), router_after_s=router_after_s)

    def _cut(self) -> None:
        wire = self._one(self.world.wires)
        up, down = self._one([(True, True), (True, False), (False, True)])
        self.world.network.cut(wire, up=up, down=down)
        self._later(lambda: self.world.network.heal(wire))

    def _slow_link(self) -> None:
        quality = self._changed()
        quality.bytes_per_s, quality.latency_s, quality.jitter_s = self._random.uniform(0.1e6, 2e6), 0.05, self._random.uniform(0.0, 0.3)

    def _full_queues(self) -> None:
        self._changed().queue_limit = self._random.randint(0, 3)

    def _damage(self) -> None:
        self._changed().damage = self._random.choice((0.01, 0.05, 0.3))

    def _changed(self) -> Quality:
        """Of some way, for a while."""
        wire = self._one(self.world.wires)
        self._later(lambda: self._restore(wire))
        return wire.quality

    def _restore(self, wire: Wire) -> None:
        wire.quality = replace(self._usual[wire])

    def _stop_leases(self) -> None:
        leases = self.world.dispatcher.leases
        if leases.is_up:
            leases.stop()
            forgives = self._perhaps(0.5)
            self._later(lambda: leases.start(forgives=forgives))

    def _evict(self) -> None:
        for _ in range(3):
            if self._one(self.world.workers).evict():
                return
