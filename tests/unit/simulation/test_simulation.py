"""The scheduler in simulated clusters: many seeds, each a cluster, its requests and its faults; see adapt/simulation/simulation.py."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import pytest

from adapt.simulation.faults import Kind
from adapt.simulation.history import RESULT
from adapt.simulation.simulation import Report, Simulation

SEEDS, REQUESTS = 300, 100
MANY_SEEDS, MANY_REQUESTS = 1000, 300
SEEDS_AT_A_TIME = 125
DIGEST_SEEDS = (3, 8)

RARE_PATHS = {
    # what networks and processes do
    "handover", "hello without a farewell", "another reign", "term raised", "another of this name refused", "dispatcher drained",
    "malformed messages", "stubborn peer refused", "stranger asked for a hello", "control came before bulk", "socket refused a message",
    "dispatch refused", "suspect and back", "eviction",
    # requests
    "request came again", "answered from the table", "kept result dropped", "cancel overtook its request", "refused at the door",
    "requests cancelled", "ended in deadline-exceeded", "ended in model", "ended in poison", "ended in input-mismatch", "restarts",
    # attempts
    "retry elsewhere", "late answer accepted", "late answer dropped", "attempt timeouts", "retries delayed", "task handed back",
    "unlisted attempt at hello", "reconciled attempt", "death while it ran", "death retracted", "poisonous requests", "breakers opened", "hedges",
    "model raised on other workers only", "neutral answers", "numeric re-pin",
    # stages
    "stage moved", "stage copied", "copy gave way", "stage refused by a worker", "version switched", "version failed", "version released",
    "version cut anew", "spare used", "spare gave way",
    "canary runs", "canary judged", "wrong outputs", "version failed on a canary",
    # verification
    "checks", "verified", "unverified", "disagreements", "wrong workers", "ended in disagreement",
}  # fmt: skip


def story(report: Report) -> str:
    return "\n".join(report.told())


def run_all(seeds: range, requests: int) -> Counter[str]:
    """The rare paths of all runs together; each must be good."""
    rare: Counter[str] = Counter()
    for seed in seeds:
        report = Simulation(seed, requests=requests).run()
        assert report.is_good, story(report)
        rare += report.rare
    return rare


@pytest.mark.timeout(240)
def test_nothing_is_lost_doubled_wrong_or_late_whatever_fails():
    rare = run_all(range(SEEDS), REQUESTS)
    assert {path for path in RARE_PATHS if not rare[path]} == set(), "paths that no seed takes"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("since", range(SEEDS, SEEDS + MANY_SEEDS, SEEDS_AT_A_TIME))
def test_nothing_is_lost_doubled_wrong_or_late_in_longer_runs(since):
    run_all(range(since, since + SEEDS_AT_A_TIME), MANY_REQUESTS)


def test_without_faults_nothing_dies_and_nothing_is_said_twice():
    rare: Counter[str] = Counter()
    for seed in range(10):
        report = Simulation(seed, kinds=()).run()
        assert report.is_good, story(report)
        assert set(report.outcomes) <= {"result", "overloaded", "deadline-exceeded"} | ({"plan"} if report.outcomes["plan"] else set())
        rare += report.rare
    unheard_of = {"handover", "tasks lost", "workers suspected", "eviction", "poisonous requests", "stranger asked for a hello"}
    assert {path: rare[path] for path in unheard_of if rare[path]} == {}


def has_three_alike(simulation: Simulation) -> bool:
    """All workers are of one class, and can have every stage: there is always a second, and a third."""
    is_uniform = len({worker.machine.kind for worker in simulation.workers}) == 1
    return is_uniform and len(simulation.workers) >= 3 and all(len(stages) == 1 for stages in simulation._stages.values())


def test_where_three_have_a_stage_and_one_lies_nobody_gets_a_wrong_answer():
    rare: Counter[str] = Counter()
    for simulation in filter(has_three_alike, (Simulation(seed, kinds=[Kind.WORKER_LIES]) for seed in range(100))):
        report = simulation.run()
        assert report.is_good, story(report)
        truth = simulation._truth()
        for request_id, operation in simulation.history.operations.items():
            for end in operation.ends:
                assert end.outcome != RESULT or end.result in truth[request_id].results, (simulation.seed, request_id)
        assert not report.outcomes["disagreement"], "there is a third"
        rare += report.rare
    assert rare["wrong workers"] >= 5 and rare["verified"] > 10 * rare["unverified"]


@pytest.mark.parametrize("seed", DIGEST_SEEDS)
def test_a_seed_is_one_run(seed):
    first, again, other = (Simulation(number).run() for number in (seed, seed, seed + 1))
    assert first.story.digest() == again.story.digest()
    assert first.story.digest() != other.story.digest()
    assert (first.rare, first.outcomes, first.events) == (again.rare, again.outcomes, again.events)


def test_a_seed_is_one_run_in_every_process():
    program = (
        f"from adapt.simulation.simulation import Simulation\nfor seed in {DIGEST_SEEDS}: print(Simulation(seed).run().story.digest())"
    )
    digests = set()
    for hash_seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
        digests.add(done.stdout)
    digests.add("".join(Simulation(seed).run().story.digest() + "\n" for seed in DIGEST_SEEDS))
    assert len(digests) == 1


def test_faults_can_be_chosen():
    report = Simulation(1, requests=10, kinds=[Kind.WORKER_CRASH]).run()
    assert report.is_good and report.kinds == {Kind.WORKER_CRASH}
    assert any(Kind.WORKER_CRASH.value in line for line in report.story.all())
