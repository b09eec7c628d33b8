"""One run, drawn from one seed: a cluster is made, asked for inferences and plagued; then the plague ends, and everything has to come right.

deploying   until every deployment takes requests
load        requests come and faults happen
settling    all faults are over; every request ends, and slots, credit and bytes return to zero, within `SETTLE_S`
probing     what is asked now has to be answered
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

from adapt.planning.placement import StageNeed
from adapt.protocol.ids import Digest, RequestId
from adapt.protocol.wire import Blob
from adapt.scheduling import events as ev
from adapt.scheduling.qos import QosSettings
from adapt.scheduling.requests import POISONED
from adapt.scheduling.scheduler import Scheduler
from adapt.scheduling.settings import SchedulerSettings
from adapt.scheduling.tokens import TokenSettings
from adapt.simulation.arithmetic import Nature, digest, leaves, result
from adapt.simulation.client import Client
from adapt.simulation.dispatcher import Dispatcher, MakeScheduler
from adapt.simulation.faults import Faults, Kind, World, drawn
from adapt.simulation.history import RESULT, Expected, Findings, History, check
from adapt.simulation.inspector import Inspector, Violation
from adapt.simulation.network import Network, Quality, Wire
from adapt.simulation.story import Story
from adapt.simulation.timeline import Timeline
from adapt.simulation.worker import Machine, Worker

READY_S = 30.0  # until everything is deployed
LOAD_S_PER_REQUEST = 0.12
CALM_S = 3.0  # after the last fault, until everybody has noticed who is gone
SETTLE_S = 60.0  # beyond the longest budget
PROBE_S = 60.0  # budget of a probe
LOOK_S = 0.5  # between two looks whether all is done
KEEP_S = 1.0  # between two looks whether everything is deployed
WITHDRAW_S = 15.0  # nobody waits longer for a version
MEBIBYTE = 1 << 20
MAX_KEPT_BYTES = 256 * MEBIBYTE
BUDGETS_S = (0.5, 5.0, 10.0, 20.0)
SIZES_BYTES = (200, 5_000, 60_000, 300_000, 1_500_000)
NATURES = {Kind.POISON: Nature.POISON, Kind.WRONG: Nature.WRONG, Kind.FRAGILE: Nature.FRAGILE}


def make_scheduler(settings: SchedulerSettings, random: Random) -> Scheduler:
    return Scheduler(settings, random=random, generation=random.getrandbits(32))


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request as it was drawn."""

    deployment: str
    value: int
    nature: Nature
    exact: bool
    is_probe: bool = False


@dataclass(slots=True, kw_only=True)
class Report:
    """What a run has shown.

    Attributes:
        violation: why it ended before its time.
        rare: how often each rare path was taken.
        outcomes: how many requests had each outcome.
        events: that have happened.
    """

    seed: int
    kinds: frozenset[Kind]
    story: Story
    findings: Findings = field(default_factory=Findings)
    violation: Violation | None = None
    rare: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    events: int = 0

    @property
    def is_good(self) -> bool:
        return self.violation is None and not self.findings.violations

    def told(self) -> Iterator[str]:
        """Seed, faults, what was wrong, and the story of the first request that went wrong."""
        yield f"seed {self.seed}, faults: {', '.join(sorted(self.kinds)) or 'none'}"
        if self.violation is not None:
            yield f"violation: {self.violation}"
        for kind, request_id in self.findings.violations:
            yield f"{kind}: request {request_id}"
        wrong = [self.violation.request_id] if self.violation is not None else []
        wrong += [request_id for _, request_id in self.findings.violations]
        first = next((request_id for request_id in wrong if request_id is not None), None)
        if first is not None:
            yield from self.story.of(first)


class Simulation:
    """One run.

    Args:
        requests: that are asked, besides probes.
        kinds: of faults; drawn from the seed if not given.
    """

    def __init__(
        self, seed: int, *, requests: int = 100, kinds: Iterable[Kind] | None = None, make_scheduler: MakeScheduler = make_scheduler
    ) -> None:
        self.seed, self.requests = seed, requests
        self._random = self._stream("world")
        self.kinds = drawn(self._stream("kinds")) if kinds is None else frozenset(kinds)
        self.timeline = Timeline(self._stream("ties"), grain_s=self._random.choice((0.0, 0.0, 0.001, 0.01)))
        self.story, self.history, self.inspector = Story(), History(), Inspector()
        self.network = Network(self.timeline, self._stream("network"))
        self.network.log = lambda who, what: self.story.add(self.timeline.now, who, "", what)
        self._needs: dict[Digest, StageNeed] = {}
        self._stages: dict[str, list[StageNeed]] = {}  # of each deployment, whatever its version
        self._is_exact: dict[str, bool] = {}
        self._pending_until: dict[str, float] = {}  # nobody waits longer for the version that was deployed last
        self._asked: dict[RequestId, Asked] = {}
        self._removed: set[str] = set()  # deployments that were removed at some time
        self._bad: set[ev.VersionKey] = set()  # versions that are not what they should be
        self._canary_random, self._recut_random = self._stream("canaries"), self._stream("recuts")
        self._drift = self._random.choice((0.0, 0.0, 0.001, 0.02))
        self.dispatcher = self._dispatcher(make_scheduler)
        self.network.router = self.dispatcher
        kinds_of_device = self._random.randint(1, 3)
        self.workers = [self._worker(self._machine(number, kinds_of_device)) for number in range(self._random.randint(2, 6))]
        self.clients = [self._client(number) for number in range(self._random.randint(1, 3))]
        self._draw_deployments()
        world = World(
            timeline=self.timeline,
            network=self.network,
            story=self.story,
            dispatcher=self.dispatcher,
            workers=self.workers,
            clients=self.clients,
            another=self._worker,
            redeploy=self._redeploy,
            undeploy=self._undeploy,
            recut=self._recut,
        )
        self.faults = Faults(world, self._stream("faults"), self.kinds)

    def _stream(self, name: str) -> Random:
        return Random(f"{self.seed} {name}")

    # ── who there is ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _rate(self) -> float:
        return 1.0 + self._drift * self._random.uniform(-1.0, 1.0)

    def _wire(self) -> Wire:
        random = self._random
        return Wire(
            Quality(
                latency_s=random.choice((0.0002, 0.002, 0.02)),
                jitter_s=random.choice((0.0, 0.0005, 0.01)),
                bytes_per_s=random.choice((10e6, 100e6, 1e9)),
            )
        )

    def _dispatcher(self, make_scheduler: MakeScheduler) -> Dispatcher:
        random = self._random
        settings = SchedulerSettings(
            policy=random.choice(("earliest-finish", "earliest-finish", "lowest-memory")),
            attempt_timeout_s=random.choice((3.0, 6.0)),
            min_attempt_timeout_s=random.choice((0.3, 1.0)),
            load_timeout_s=random.choice((2.0, 8.0)),
            client_grace_s=random.choice((3.0, 6.0)),
            hedge_share=random.choice((0.0, 0.0, 0.05, 0.3)),
            verify_share=1.0 if Kind.WORKER_LIES in self.kinds else self._stream("verification").choice((0.0, 0.0, 0.0, 0.3, 1.0)),
            cooldown_s=random.choice((0.0, 0.0, 0.0, 0.05)),
            spares=self._stream("spares").choice((0, 1, 1, 2)),
            max_requests=random.choice((4096, 4096, 4096, 4096, 12)),
            max_retained_bytes=random.choice((2 << 30, 2 << 30, 2 << 30, 6_000_000)),
            max_kept_bytes=random.choice((MAX_KEPT_BYTES, MAX_KEPT_BYTES, 100_000)),
            qos=QosSettings(open_above=random.choice((200.0, 100.0))),
            tokens=TokenSettings(most=random.choice((20.0, 2.0))),
        )
        return Dispatcher(
            self.timeline,
            self._stream("dispatcher"),
            self.network,
            self.story,
            settings=settings,
            make_scheduler=make_scheduler,
            inspector=self.inspector,
            lease_ttl_s=random.choice((3.0, 8.0)),
            lease_lag_s=random.choice((0.0, 0.0, 0.05, 0.5)),
            rate=self._rate(),
        )

    def _machine(self, number: int, kinds: int) -> Machine:
        kind = number % kinds
        return Machine(
            name=f"w{number + 1}",
            kind=kind,
            credit=self._random.choice((1, 2, 4, 32)),
            budget_bytes=self._random.choice((12, 24, 64)) * MEBIBYTE,
            slowness=self._random.choice((0.5, 1.0, 3.0)),
            raises=kind == 0,
        )

    def _worker(self, machine: Machine) -> Worker:
        return Worker(
            self.timeline,
            Random(self._random.getrandbits(64)),
            self.network,
            self.story,
            self.history,
            machine=machine,
            wire=self._wire(),
            needs=self._needs,
            rate=self._rate(),
        )

    def _client(self, number: int) -> Client:
        name = f"c{number + 1}"
        return Client(name, self.timeline, self._stream(name), self.network, self.story, self.history, wire=self._wire(), rate=self._rate())

    def _peers(self) -> list[Worker | Client]:
        return [*self.workers, *self.clients]

    # ── deployments ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _draw_deployments(self) -> None:
        random = self._random
        for name in ("m", "n")[: random.randint(1, 2)]:
            self._is_exact[name] = random.random() < 0.2
            scale = random.choice((0.001, 0.01, 0.05, 0.3))
            self._stages[name] = [
                StageNeed(
                    artifact=Digest(f"{name}.{stage}"),
                    memory_bytes=random.choice((1, 2, 4)) * MEBIBYTE,
                    cost_s=scale * random.uniform(0.2, 2.0),
                )
                for stage in range(random.randint(1, 3))
            ]

    def _keep(self) -> None:
        """Every deployment that takes no requests is deployed, as users do."""
        for name in self._stages:
            dispatcher = self.dispatcher
            if dispatcher.is_alive and not dispatcher.is_stopped and dispatcher.current(name) is None and not self._is_pending(name):
                self._deploy(name)
        self.timeline.after(KEEP_S, self._keep)

    def _is_pending(self, name: str) -> bool:
        return self.timeline.now < self._pending_until.get(name, 0.0)

    def _deploy(self, name: str, *, is_bad: bool = False) -> None:
        number = self.dispatcher.numbers.get(name, 0) + 1
        needs = tuple(
            StageNeed(artifact=Digest(f"{need.artifact}.{number}"), memory_bytes=need.memory_bytes, cost_s=need.cost_s)
            for need in self._stages[name]
        )
        self._needs.update({need.artifact: need for need in needs})
        program = Digest(f"{name}.{number}")
        canaries, expected = self._canaries([need.artifact for need in needs], is_bad=is_bad)
        is_begun = self.dispatcher.deploy(
            name,
            needs,
            program,
            exact=self._is_exact[name],
            withdraw_after_s=WITHDRAW_S,
            canaries=canaries,
            expected=expected,
        )
        if is_begun:
            self._pending_until[name] = self.timeline.now + WITHDRAW_S
            if is_bad:
                self._bad.add((name, number, 0))

    def _canaries(self, artifacts: Sequence[Digest], *, is_bad: bool) -> tuple[tuple[ev.Canary, ...], tuple[int, ...]]:
        """Inputs and what should come out of them; of a bad version the workers make something else, from some stage on."""
        random = self._canary_random
        canaries, expected = [], []
        kinds = sorted({f"class {worker.machine.kind}" for worker in self.workers})
        for number in range(random.randint(1, 3) if is_bad or random.random() < 0.5 else 0):
            value = random.getrandbits(60)
            after = [result(value, artifacts[: count + 1]) for count in range(len(artifacts))]
            if is_bad and number == 0:  # what is wrong stays wrong
                first = random.randrange(len(after))
                after = [*after[:first], *(value + 1 for value in after[first:])]
            given = ev.Activation(leaves(value, 0, Nature.PLAIN), (Blob(random.choice(SIZES_BYTES), 0, ()),))
            numeric_class = random.choice([*kinds, "of the exporting process"])
            canaries.append(ev.Canary(input=given, numeric_class=numeric_class, digests=tuple(map(digest, after))))
            expected.append(after[-1])
        return tuple(canaries), tuple(expected)

    def _redeploy(self) -> None:
        """Now and then a version that is not what it should be: nobody may ever get an answer of it."""
        self._deploy(self._random.choice(sorted(self._stages)), is_bad=self._canary_random.random() < 0.3)

    def _recut(self) -> None:
        """The present version of a deployment in other stages, now and then in such as are not what they should be."""
        random, dispatcher = self._recut_random, self.dispatcher
        name, is_bad = random.choice(sorted(self._stages)), random.random() < 0.3
        if not dispatcher.is_alive or dispatcher.is_stopped or (present := dispatcher.current(name)) is None:
            return
        cost_s = sum(need.cost_s for need in self._stages[name])
        count, salt = random.randint(1, 3), random.getrandbits(32)
        needs = tuple(
            StageNeed(
                artifact=Digest(f"{name}.{stage}.{present.number}.{salt:x}"),
                memory_bytes=random.choice((1, 2, 4)) * MEBIBYTE,
                cost_s=cost_s / count,
            )
            for stage in range(count)
        )
        self._needs.update({need.artifact: need for need in needs})
        canaries, expected = self._canaries([need.artifact for need in needs], is_bad=is_bad)
        version = dispatcher.recut(present, needs, withdraw_after_s=WITHDRAW_S, canaries=canaries, expected=expected)
        if version is not None and is_bad:
            self._bad.add(version.key)

    def _undeploy(self) -> None:
        name = self._random.choice(sorted(self._stages))
        self._removed.add(name)
        self.dispatcher.undeploy(name)

    # ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _schedule_requests(self, begin: float, end: float) -> None:
        """Half of them any time, half in bursts."""
        random = self._stream("requests")
        bursts = [random.uniform(begin, end) for _ in range(4)]
        for _ in range(self.requests):
            moment = random.uniform(begin, end) if random.random() < 0.5 else random.choice(bursts) + random.random() * 0.05
            self.timeline.at(moment, self._request, random.choice(self.clients), Random(random.getrandbits(64)))

    def _request(self, client: Client, random: Random) -> None:
        if client.is_alive:
            client.hand(self, self._ask, client, random)

    def _ask(self, client: Client, random: Random) -> None:
        natures = [NATURES[kind] for kind in NATURES if kind in self.kinds]
        asked = Asked(
            deployment=random.choice(sorted(self._stages)),
            value=random.getrandbits(60),
            nature=random.choice(natures) if natures and random.random() < 0.1 else Nature.PLAIN,
            exact=random.random() < 0.1,
        )
        request_id = self._say(client, asked, size_bytes=random.choice(SIZES_BYTES), budget_s=random.choice(BUDGETS_S))
        if Kind.CANCEL in self.kinds and random.random() < 0.2:
            client.later(random.choice((0.0, 0.001, 0.02, 1.0)) * random.random(), client.cancel, request_id)

    def _say(self, client: Client, asked: Asked, *, size_bytes: int, budget_s: float) -> RequestId:
        request_id = client.ask(
            deployment=asked.deployment,
            value=asked.value,
            nature=asked.nature,
            size_bytes=size_bytes,
            budget_s=budget_s,
            exact=asked.exact,
        )
        self._asked[request_id] = asked
        return request_id

    # ── the run ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def run(self) -> Report:
        report = Report(seed=self.seed, kinds=self.kinds, story=self.story)
        try:
            self._run()
        except Violation as violation:
            report.violation = violation
        else:
            report.findings = check(self.history.operations.values(), self._truth(), self.history.executions)
        report.rare = self.inspector.rare_paths() + Counter({"handover": self.network.handovers})
        report.outcomes = Counter(end.outcome for operation in self.history.operations.values() for end in operation.ends)
        report.events = self.timeline.events
        return report

    def _run(self) -> None:
        self.dispatcher.start()
        for process in self._peers():
            process.start()
        self._keep()
        if not self._runs_until(self._is_deployed, READY_S):
            raise Violation("not everything could be deployed")
        begin = self.timeline.now
        end = begin + LOAD_S_PER_REQUEST * self.requests
        self._schedule_requests(begin, end)
        self.faults.schedule(begin, end)
        self.timeline.run_until(end + 0.1)
        self.faults.stop()
        self.timeline.run_until(self.timeline.now + CALM_S)
        if not self._runs_until(self._is_idle, max(BUDGETS_S) + SETTLE_S):
            raise Violation(f"it does not come to rest: {self._unrest()}")
        self._probe()

    def _runs_until(self, is_so: Callable[[], bool], limit_s: float) -> bool:
        end = self.timeline.now + limit_s
        while self.timeline.now < end:
            if is_so():
                return True
            self.timeline.run_until(self.timeline.now + LOOK_S)
        return is_so()

    def _is_deployed(self) -> bool:
        return self.dispatcher.is_alive and all(self.dispatcher.current(name) is not None for name in self._stages)

    def _is_idle(self) -> bool:
        return not self._unrest()

    def _unrest(self) -> str:
        """What is not at rest yet; empty if everything is."""
        scheduler = self.dispatcher.scheduler
        for who, is_idle in ((process.name, process.is_idle) for process in self._peers()):
            if not is_idle:
                return f"{who} holds something"
        for what, count in (
            ("requests", scheduler.live_requests),
            ("bytes reserved", scheduler.reserved_bytes),
            ("outcomes kept", scheduler.unacknowledged),
            ("bytes kept", scheduler.kept_bytes),
            ("slots", sum(len(member.slots) for member in scheduler.roster)),
        ):
            if count:
                return f"{count} {what}"
        return "" if self._is_deployed() else "a deployment takes no requests"

    def _probe(self) -> None:
        probes = []
        for client in self.clients:
            for name in self._answerable():
                asked = Asked(deployment=name, value=self._random.getrandbits(60), nature=Nature.PLAIN, exact=False, is_probe=True)
                probes.append(self._say(client, asked, size_bytes=1000, budget_s=PROBE_S))
        if not self._runs_until(self._is_idle, PROBE_S + SETTLE_S):
            raise Violation(f"it does not come to rest: {self._unrest()}")
        for request_id in probes:
            outcomes = [end.outcome for end in self.history.operations[request_id].ends]
            if outcomes != [RESULT]:
                raise Violation(f"all faults are over, and a probe has the outcomes {outcomes}", request_id)

    def _answerable(self) -> list[str]:
        """Deployments that can answer anything: stages are placed without regard to numeric classes."""
        is_uniform = len({worker.machine.kind for worker in self.workers}) == 1
        return [name for name in sorted(self._stages) if is_uniform or not self._is_exact[name]]

    # ── the truth ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _truth(self) -> dict[RequestId, Expected]:
        return {request_id: self._expected(request_id, asked) for request_id, asked in self._asked.items()}

    def _expected(self, request_id: RequestId, asked: Asked) -> Expected:
        ever = self.dispatcher.ever.items()
        versions = [version for key, version in ever if key[0] == asked.deployment and key not in self._bad]
        pinned = self.history.pinned.get(request_id)
        if pinned is not None and not self._drops_results():  # else it may have run twice, and the first answer counts
            versions = [version for version in versions if version.program == pinned]
        results = frozenset(result(asked.value, [need.artifact for need in version.plan.stages]) for version in versions)
        if asked.nature is Nature.WRONG:
            results = frozenset()
        is_exact = asked.exact or self._is_exact[asked.deployment]
        is_unverified = Kind.WORKER_LIES in self.kinds and request_id in self.inspector.unverified
        return Expected(results, frozenset(self._errors(request_id, asked)), one_class=is_exact, is_unverified=is_unverified)

    def _drops_results(self) -> bool:
        return self.dispatcher.settings.max_kept_bytes < MAX_KEPT_BYTES

    def _deaths(self, request_id: RequestId) -> int:
        """Of workers, while the request lived. Who computed what at its death is not always known: innocents may be condemned."""
        operation = self.history.operations[request_id]
        end = operation.ends[0].at if operation.ends else self.timeline.now
        return sum(operation.at <= moment <= end for moment in self.history.deaths)

    def _errors(self, request_id: RequestId, asked: Asked) -> Iterator[str]:
        """The errors that a request may end in, for what befell it and its cluster."""
        settings, kinds = self.dispatcher.settings, self.kinds
        yield "deadline-exceeded"
        if settings.max_requests < 4096 or settings.max_retained_bytes < 1 << 30 or Kind.DISPATCHER_DRAIN in kinds:
            yield "overloaded"
        if asked.nature in (Nature.WRONG, Nature.FRAGILE):
            yield "model"
        if asked.nature is Nature.POISON or self._deaths(request_id) >= POISONED:
            yield "poison"
        if asked.nature is Nature.POISON or self._deaths(request_id) >= settings.max_failures:
            yield "worker-lost"
        if request_id in self.history.spoilt:
            yield "input-mismatch"
        if request_id in self.history.spoilt or Kind.WORKER_LIES in kinds:
            yield "disagreement"
        if (
            kinds & {Kind.DISPATCHER_CRASH, Kind.DISPATCHER_DRAIN}
            or asked.deployment in self._removed
            or self.dispatcher.numbers[asked.deployment] > 1
        ):
            yield "unknown-model"
        if Kind.DAMAGE in kinds:
            yield "wire"
