"""F4, F5, F6, F7: workers stand still, hang in a model, or are slow."""

from __future__ import annotations

import dataclasses
import statistics
import time

import pytest

import adapt
from adapt.config import WorkerConfig
from adapt.emulation.parse import parse
from tests.faults.clusters import HEDGING, FaultDevices, counter, states, wait_for_state, wait_until, workers_of
from tests.faults.traffic import Traffic, assert_clean

pytestmark = pytest.mark.timeout(240)
HAS_WATCHDOG = "hang_timeout_s" in {field.name for field in dataclasses.fields(WorkerConfig)}


def test_f4_a_freeze_shorter_than_the_silence_that_is_borne(cluster_of, workload):
    """Nobody is suspected; what it held is answered by itself when it goes on, once."""
    cluster = cluster_of(3, dispatcher={"silence": 20, "lease_ttl": 20, "grace": 20, "attempt_timeout": 20, "min_attempt_timeout": 20})
    with adapt.Client(cluster.address) as client:
        model = workload.deploy(client, stages=3)
        mark = cluster.mishaps.plan("hold", stage=model.record.stages[1].artifact, times=1)
        x = workload.marked(mark)
        future = model.submit(x)
        (sleeper,) = wait_until(lambda: cluster.mishaps.happened(mark))
        cluster.worker(sleeper).stop()
        cluster.mishaps.release(mark)
        with pytest.raises(TimeoutError):
            future.result(1.0)
        cluster.worker(sleeper).resume()
        assert future.result(30).equal(workload.expect(x))
        assert future.outcome.attempts == 3
        assert (counter(client, "evictions"), counter(client, "requests_ok")) == (0, 1)


def test_f4_the_late_answer_of_a_worker_that_slept_is_dropped_and_counted(cluster_of, workload):
    cluster = cluster_of(3, dispatcher={"lease_ttl": 30, "grace": 30})
    with adapt.Client(cluster.address) as client:
        model = workload.deploy(client, stages=3)
        mark = cluster.mishaps.plan("hold", stage=model.record.stages[1].artifact, times=1)
        with Traffic(cluster.address, workload) as traffic:
            x = workload.marked(mark)
            future = model.submit(x)
            (sleeper,) = wait_until(lambda: cluster.mishaps.happened(mark))
            cluster.worker(sleeper).stop()
            assert future.result(30).equal(workload.expect(x))  # by another
            cluster.worker(sleeper).resume()
            cluster.mishaps.release(mark)
            wait_for_state(client, sleeper, "ready")
            traffic.until_more(30)
        wait_until(lambda: client.status().counters["requests_live"] == 0)
        assert counter(client, "requests_ok") == traffic.asked + 1
    assert_clean(traffic)


def test_a_device_that_has_become_slow_is_relieved_of_a_stage_that_only_it_had(cluster_of, workload):
    """It sends heartbeats, and each answer comes in time: only the seconds that its tasks take tell. Another gets its stage too."""
    cluster = cluster_of(3, dispatcher={"relief": 0.5})
    with adapt.Client(cluster.address) as client:
        model = workload.deploy(client, stages=3)
        (slow,) = model.record.stages[1].workers
        with Traffic(cluster.address, workload) as traffic:
            traffic.until_more(50)
            cluster.mishaps.slow(slow, 0.1)
            wait_until(lambda: counter(client, "stages_copied") >= 1)
            (deployment,) = client.status().deployments
            assert slow in deployment.stages[1].workers and len(deployment.stages[1].workers) == 2
            traffic.until_more(200)
        assert counter(client, "evictions") == 0
    assert_clean(traffic)


def test_f5_a_freeze_longer_than_the_lease(cluster_of, workload):
    """It is out of the plan, its tasks are done elsewhere, and when it wakes it is a member again with nobody's help."""
    cluster = cluster_of(3)
    with adapt.Client(cluster.address) as client:
        workload.deploy(client, stages=3)
        with Traffic(cluster.address, workload) as traffic:
            traffic.until_ended(30)
            cluster.workers[0].stop()
            wait_for_state(client, "w1", "lost")
            traffic.until_more(30)
            cluster.workers[0].resume()
            wait_for_state(client, "w1", "ready")
            assert counter(client, "evictions") == 1
            for worker in cluster.workers[1:]:
                worker.kill()
            traffic.until_more(30)  # by the one that slept, alone
    assert_clean(traffic)


def test_f6_a_model_that_hangs_is_answered_elsewhere(cluster_of, workload):
    """Its worker still sends heartbeats: only the attempt's timeout can tell."""
    cluster = cluster_of(3, dispatcher={"min_attempt_timeout": 1})
    with adapt.Client(cluster.address) as client:
        model = workload.deploy(client, stages=2)
        mark = cluster.mishaps.plan("hang", stage=model.record.stages[1].artifact, times=1)
        with Traffic(cluster.address, workload) as traffic:
            traffic.until_ended(30)
            x = workload.marked(mark)
            assert model(x).equal(workload.expect(x))
            traffic.until_more(30)
        assert len(cluster.mishaps.happened(mark)) == 1
        assert counter(client, "attempt_timeouts") >= 1
    assert_clean(traffic)


@pytest.mark.skipif(not HAS_WATCHDOG, reason="workers have no hang watchdog yet")
def test_f6_a_worker_that_hangs_is_recycled(cluster_of, workload):
    cluster = cluster_of(3, dispatcher={"min_attempt_timeout": 1}, worker={"hang_timeout": 2})
    with adapt.Client(cluster.address) as client:
        model = workload.deploy(client, stages=2)
        mark = cluster.mishaps.plan("hang", stage=model.record.stages[1].artifact, times=1)
        x = workload.marked(mark)
        assert model(x).equal(workload.expect(x))
        (hung,) = cluster.mishaps.happened(mark)
        wait_until(lambda: not cluster.worker(hung).is_alive or _lives(cluster.worker(hung)) > 1)
        if not cluster.worker(hung).is_alive:
            assert cluster.worker(hung).wait() != 0
            cluster.worker(hung).begin_again()
        wait_for_state(client, hung, "ready")
        assert model(workload.inputs[0]).equal(workload.expect(workload.inputs[0]))


def _lives(process) -> int:
    """How often it has begun, by its log: a new incarnation opens its first session again."""
    return process.log.read_text().count("session opened")


def test_f7_a_slow_worker_gets_less(cluster_of, workload):
    """One stage on three workers, one of whom takes 50 ms longer for each task."""
    cluster = cluster_of(3)
    cluster.mishaps.slow("w2", 0.05)
    with adapt.Client(cluster.address) as client:
        workload.deploy(client, stages=1)
        with Traffic(cluster.address, workload, count=600) as traffic:
            traffic.until_ended(600)
        done = {name: record.tasks_done for name, record in workers_of(client.status()).items()}
        assert done["w2"] < sum(done.values()) / 6, done  # half of an equal share
    assert_clean(traffic)


TRIO = """
[[device]]
name = "pi"
count = 3
cores = 0.4
memory = "64MiB"
"""


def test_f7_a_device_that_becomes_slow_gets_less(isolated, nursery, workload, tmp_path):
    with FaultDevices(nursery, parse(TRIO, name="trio"), directory=tmp_path) as cluster, adapt.Client(cluster.address) as client:
        workload.deploy(client, stages=1)
        with Traffic(cluster.address, workload) as traffic:
            traffic.until_ended(100)
            cluster.device("pi-1").slow(0.01)
            before = {name: record.tasks_done for name, record in workers_of(client.status()).items()}
            traffic.until_more(400, limit_s=60)
            after = {name: record.tasks_done - before[name] for name, record in workers_of(client.status()).items()}
            cluster.device("pi-1").slow(0.4)
        assert after["pi-1"] < sum(after.values()) / 6, after
        assert set(states(client).values()) == {"ready"}
    assert_clean(traffic)


@pytest.mark.timing
def test_f7_one_slow_worker_does_not_double_the_99th_percentile(cluster_of, workload):
    cluster = cluster_of(3, dispatcher=HEDGING)
    with adapt.Client(cluster.address) as client:
        model = workload.deploy(client, stages=1)
        _times_s(model, workload, count=200)
        healthy = _percentile_s(_times_s(model, workload))
        asked, hedges = (counter(client, name) for name in ("requests_accepted", "hedges"))
        cluster.mishaps.slow("w2", 0.05)
        assert _percentile_s(_times_s(model, workload)) <= 2 * healthy
        assert counter(client, "hedges") - hedges <= 0.05 * (counter(client, "requests_accepted") - asked)


def test_a_frozen_worker_makes_nobody_wait_for_its_silence(cluster_of, workload):
    """What it held when it stopped, an idle worker tries too: all are answered although the silence that would tell is for ever."""
    cluster = cluster_of(3, dispatcher={"hedge_share": 0.5, "silence": 100, "lease_ttl": 200, "grace": 100, "min_attempt_timeout": 100})
    with adapt.Client(cluster.address) as client:
        model = workload.deploy(client, stages=1)
        for _ in model.map([workload.inputs[0]] * 200):  # so that everybody is known
            pass
        mark = cluster.mishaps.plan("hold", times=1)
        x = workload.marked(mark)
        future = model.submit(x)
        (sleeper,) = wait_until(lambda: cluster.mishaps.happened(mark))
        cluster.worker(sleeper).stop()
        assert future.result(30).equal(workload.expect(x))
        assert (counter(client, "evictions"), counter(client, "attempt_timeouts")) == (0, 0)
        assert counter(client, "hedges") >= 1
        cluster.worker(sleeper).resume()
        cluster.mishaps.release(mark)


def _times_s(model, workload, *, count: int = 1000) -> list[float]:
    """Of so many requests, one after the other; each answer is checked."""
    took = []
    for number in range(count):
        x = workload.inputs[number % len(workload.inputs)]
        began = time.monotonic()
        answer = model(x)
        took.append(time.monotonic() - began)
        assert answer.equal(workload.expect(x))
    return took


def _percentile_s(took: list[float]) -> float:
    return statistics.quantiles(took, n=100)[-1]
