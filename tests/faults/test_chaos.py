"""F33: everything at random, at once, by a seed that is printed. 0 lost, 0 duplicated, 0 wrong, 0 late, whatever happens.

ADAPT_SEED=7 pytest tests/faults/test_chaos.py        repeats the run of that seed, as far as real machines can be repeated
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

import adapt
from adapt.emulation.description import ETCD, Event, EventSpec, Kind, RandomSpec
from adapt.emulation.parse import parse
from adapt.emulation.report import troubles
from adapt.runtime.local import LocalProcess
from tests.faults.clusters import HEDGING, SHORT, FaultCluster, FaultDevices, states, wait_until
from tests.faults.etcd import needs_etcd
from tests.faults.traffic import Traffic, Workload, assert_clean

pytestmark = pytest.mark.timeout(900)


class Chaos:
    """Mishaps to the processes of a cluster, one after the other; a worker that one has befallen is well again after it.

    Always one worker at least is spared. The moments are drawn in answers, not in seconds: so a slow machine sees as many.
    """

    def __init__(self, cluster: FaultCluster, draw: random.Random) -> None:
        self._cluster, self._draw = cluster, draw
        self._ill: dict[str, str] = {}  # what has befallen a worker
        self.story: list[str] = []

    def step(self) -> None:
        """Something happens, or ends."""
        may_begin = len(self._ill) < len(self._cluster.workers) - 1
        if self._ill and (not may_begin or self._draw.random() < 0.5):
            self._cure(self._draw.choice(sorted(self._ill)))
        elif self._draw.random() < 0.1:
            self._restart_dispatcher()
        else:
            well = [worker.name for worker in self._cluster.workers if worker.name not in self._ill]
            self._befall(self._draw.choice(well), self._draw.choice(["kill", "stop", "slow", "leave"]))

    def cure_all(self) -> None:
        for name in sorted(self._ill):
            self._cure(name)

    def _befall(self, name: str, what: str) -> None:
        self.story.append(f"{what} {name}")
        self._ill[name] = what
        worker = self._cluster.worker(name)
        match what:
            case "kill":
                worker.kill()
            case "stop":
                worker.stop()
            case "slow":
                self._cluster.mishaps.slow(name, 0.05)
            case "leave":
                worker.terminate()

    def _cure(self, name: str) -> None:
        what = self._ill.pop(name)
        self.story.append(f"end of {what} {name}")
        worker = self._cluster.worker(name)
        match what:
            case "kill" | "leave":
                worker.wait(40.0)
                worker.begin_again()
                worker.wait_ready()
            case "stop":
                worker.resume()
            case "slow":
                self._cluster.mishaps.slow(name, 0.0)

    def _restart_dispatcher(self) -> None:
        self.story.append("dispatcher dies and comes back")
        crash_and_restart(self._cluster.dispatcher)


def crash_and_restart(process: LocalProcess) -> None:
    """By SIGKILL: a dispatcher that drains refuses what comes, and that is no fault."""
    process.kill()
    process.begin_again()
    process.wait_ready()


@contextmanager
def told(seed: int, story: list[str], client: adapt.Client | None = None) -> Iterator[None]:
    """A failure says how to have it again, what had happened, and where requests are that have no end."""
    try:
        yield
    except BaseException:
        print(f"repeat with: ADAPT_SEED={seed} pytest tests/faults/test_chaos.py\nwhat happened: {'; '.join(story)}")
        if client is not None:
            status = client.status()
            print(*status.requests, *status.workers, *status.deployments, status.counters, sep="\n")
        raise


def run_chaos(cluster: FaultCluster, workload: Workload, *, seed: int, count: int, every: int) -> None:
    """So many requests; after every so many answers, about, something happens."""
    draw = random.Random(f"adapt chaos: seed {seed}")
    chaos = Chaos(cluster, draw)
    with adapt.Client(cluster.address) as client, told(seed, chaos.story, client):
        workload.deploy(client, stages=draw.randint(2, 4))
        with Traffic(cluster.address, workload, clients=3, in_flight=8, count=count) as traffic:
            while traffic.asked < count:
                traffic.until_ended(min(traffic.ended + draw.randint(1, 2 * every), count))
                chaos.step()
            chaos.cure_all()
        assert traffic.asked == count
        assert_clean(traffic)
        assert {operation.ends[0].outcome for operation in traffic.operations.values()} == {"result"}
        wait_until(lambda: set(states(client).values()) == {"ready"} and len(states(client)) == len(cluster.workers))
        wait_until(lambda: client.status().counters["requests_live"] == 0)
        assert client.status().counters["reserved_bytes"] == 0


def test_chaos(cluster_of, workload, seed):
    run_chaos(cluster_of(4, dispatcher=HEDGING), workload, seed=seed, count=2000, every=60)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(6))
def test_more_chaos(cluster_of, workload, seed, number):
    run_chaos(cluster_of(4, dispatcher=HEDGING), workload, seed=1000 * seed + number, count=3000, every=100)


DEVICES = """
membership = "etcd"
[[device]]
name = "d"
count = 4
cores = 0.35
rate = "100 Mbit/s"
"""


@needs_etcd
@pytest.mark.slow
def test_chaos_of_machines_cables_and_etcd(isolated, nursery, workload, seed, tmp_path):
    """A schedule of the emulator: crashes, freezes, slowness, cables, slow, late, stalled and damaged links, one and two at a time; etcd
    restarts, and is away for longer than ten leases, in which the dispatcher dies too."""
    lasts_s, away_s = 90.0, 25.0
    assert away_s > 10 * float(str(SHORT["lease_ttl"]))
    kinds = [
        *(Event(at_s=0.0, kind=kind, device="") for kind in (Kind.CRASH, Kind.STOP, Kind.CUT, Kind.CUT_UP, Kind.CUT_DOWN, Kind.STALL)),
        Event(at_s=0.0, kind=Kind.SLOW, device="", cores=0.02),
        Event(at_s=0.0, kind=Kind.RATE, device="", up_bytes_per_s=125_000.0, down_bytes_per_s=125_000.0),
        Event(at_s=0.0, kind=Kind.DELAY, device="", latency_s=0.2, jitter_s=0.1),
        Event(at_s=0.0, kind=Kind.CORRUPT, device="", corrupt_per_mib=20.0),
        Event(at_s=0.0, kind=Kind.RESET, device=""),
    ]
    names = tuple(f"d-{number}" for number in range(1, 5))
    chaos = RandomSpec(templates=tuple(kinds), devices=names, every_s=1.5, for_s=(0.3, 5.0), until_s=lasts_s, spared=2)
    restarts = replace(chaos, templates=(Event(at_s=0.0, kind=Kind.RESTART_ETCD, device=""),), devices=(ETCD,), every_s=10.0, spared=0)
    away = EventSpec(event=Event(at_s=lasts_s / 2 - 5.0, kind=Kind.CRASH_ETCD, device=ETCD), for_s=away_s)
    spec = replace(parse(DEVICES, name="chaos"), events=(away,), random=(chaos, restarts))
    with (
        FaultDevices(nursery, spec, dispatcher=HEDGING, seed=seed, directory=tmp_path, proxied=names) as cluster,
        adapt.Client(cluster.address) as client,
    ):
        story = [f"{event.at_s:.1f} s {event.kind} {event.device}" for event in cluster.events]
        with told(seed, story):
            workload.deploy(client, stages=3)
            with Traffic(cluster.address, workload, clients=3, in_flight=6) as traffic:
                cluster.play()
                dispatcher = threading.Timer(lasts_s / 2, crash_and_restart, [cluster.dispatcher])
                dispatcher.start()
                assert cluster.wait_played(lasts_s + 60.0)
                dispatcher.join()
                traffic.until_more(100)
            assert traffic.asked >= 2000
            assert_clean(traffic)
            wait_until(
                lambda: set(states(client).values()) == {"ready"}, told=lambda: f"{states(client)}; {troubles(cluster.observation())}"
            )
