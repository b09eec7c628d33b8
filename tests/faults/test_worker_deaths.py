"""F1, F2, F3, F8, F10, F11, F12, F28: workers die, are told to leave, come back, and take others' names."""

from __future__ import annotations

import itertools
import random
import signal

import pytest

import adapt
from adapt.emulation.parse import parse
from tests.faults.clusters import FaultDevices, counter, log_lines, states, wait_for_state, wait_until, workers_of
from tests.faults.traffic import Traffic, assert_clean, one_thread

pytestmark = pytest.mark.timeout(240)


def test_f1_a_worker_that_dies_idle_is_noticed_and_costs_nothing(cluster_of, workload):
    cluster = cluster_of(3)
    with adapt.Client(cluster.address) as client:
        model = workload.deploy(client, stages=3)
        cluster.workers[1].kill()
        wait_until(lambda: states(client)["w2"] != "ready")
        with Traffic(cluster.address, workload, count=60) as traffic:
            traffic.until_ended(60)
        wait_for_state(client, "w2", "lost")
        assert model(workload.inputs[0]).equal(workload.expect(workload.inputs[0]))
    assert_clean(traffic)


def test_f1_all_but_one_of_the_workers_die_in_traffic(cluster_of, workload):
    cluster = cluster_of(4)
    with adapt.Client(cluster.address) as client:
        workload.deploy(client)
        with Traffic(cluster.address, workload, count=300) as traffic:
            for number, worker in enumerate(cluster.workers[1:], 1):
                traffic.until_ended(60 * number)
                worker.kill()
        assert counter(client, "requests_ok") == traffic.asked
    assert_clean(traffic)


@pytest.mark.parametrize("stage", range(4))
def test_f2_a_worker_dies_while_it_runs_a_stage(cluster_of, workload, stage):
    cluster = cluster_of(4)
    with adapt.Client(cluster.address) as client:
        model = workload.deploy(client)
        mark = cluster.mishaps.plan("hold", stage=model.record.stages[stage].artifact, times=1)
        with Traffic(cluster.address, workload, count=80) as traffic:
            x = workload.marked(mark)
            future = model.submit(x)
            (victim,) = wait_until(lambda: cluster.mishaps.happened(mark))
            cluster.worker(victim).kill()
            assert future.result(30).equal(workload.expect(x))
        assert future.outcome.attempts >= 5  # four stages, one of them twice
    assert_clean(traffic)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(20))
def test_f2_any_worker_at_any_moment(cluster_of, workload, seed, number):
    draw = random.Random(f"{seed} {number}")
    cluster = cluster_of(3)
    with adapt.Client(cluster.address) as client:
        workload.deploy(client, stages=draw.randint(1, 3))
        with Traffic(cluster.address, workload, count=150, in_flight=draw.randint(1, 12)) as traffic:
            traffic.until_ended(draw.randint(1, 100))
            draw.choice(cluster.workers).kill()
    assert_clean(traffic)


def test_f3_a_worker_that_is_told_to_leave_finishes_its_task_first(cluster_of, workload):
    cluster = cluster_of(3)
    with adapt.Client(cluster.address) as client:
        model = workload.deploy(client, stages=3)
        mark = cluster.mishaps.plan("hold", stage=model.record.stages[1].artifact, times=1)
        x = workload.marked(mark)
        future = model.submit(x)
        (leaver,) = wait_until(lambda: cluster.mishaps.happened(mark))
        cluster.worker(leaver).terminate()
        wait_until(lambda: states(client)[leaver] == "draining")
        with Traffic(cluster.address, workload, count=60) as traffic:
            traffic.until_ended(60)
        assert cluster.worker(leaver).is_alive  # its task runs still
        cluster.mishaps.release(mark)
        assert future.result(30).equal(workload.expect(x))
        assert cluster.worker(leaver).wait() == 0
        assert counter(client, "evictions") == 0
        assert len(cluster.mishaps.happened(mark)) == 1
    assert_clean(traffic)


def test_f3_a_cluster_that_is_ended_right_after_an_answer_ends_at_once(cluster_of, workload):
    """Also the acknowledgements that the dispatcher had not sent yet: a worker waits for them."""
    cluster = cluster_of(3)
    with adapt.Client(cluster.address) as client:
        model = workload.deploy(client, stages=3)
        for x in workload.inputs[:20]:
            model(x)
    for process in (cluster.dispatcher, *cluster.workers):
        process.terminate()
    assert [process.wait(timeout_s=8.0) for process in (cluster.dispatcher, *cluster.workers)] == [0, 0, 0, 0]


SMALL_MEMORIES = """
[[device]]
name = "small"
count = 3
memory = "64MiB"
cores = 0.5
"""


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 1000])
def test_f8_a_worker_that_the_kernel_kills_for_its_memory(isolated, workload, tmp_path, times):
    """Once: the request is answered by another. Each time: it is the request's doing, and three have died of it."""
    with FaultDevices(None, parse(SMALL_MEMORIES, name="small"), directory=tmp_path) as cluster, adapt.Client(cluster.address) as client:
        for device in cluster.devices:
            cluster.mishaps.slow(device.name, 0.02)  # long enough to be said to have begun, as what takes much memory is
        model = workload.deploy(client, stages=2)
        mark = cluster.mishaps.plan("allocate", times=times, size_bytes=1 << 30)
        x = workload.marked(mark)
        with Traffic(cluster.address, workload, count=60) as traffic:
            traffic.until_ended(20)  # they succeed otherwise
            if times == 1:
                assert model(x).equal(workload.expect(x))
            else:
                with pytest.raises(adapt.PoisonError):
                    model(x)
            dead = cluster.mishaps.happened(mark)
            assert len(dead) == len(set(dead)) == min(times, 3)
            for name in dead:
                assert cluster.device(name).wait() == -signal.SIGKILL
                cluster.device(name).restart()
    assert_clean(traffic)


def test_f10_a_poisonous_request_kills_three_workers_and_no_more(cluster_of, workload):
    """It computes for a while before it kills: the workers have said that it has begun. Other requests are under way all the time."""
    cluster = cluster_of(5)
    for worker in cluster.workers:
        cluster.mishaps.slow(worker.name, 0.02)
    with adapt.Client(cluster.address) as client:
        model = workload.deploy(client, stages=2)
        mark = cluster.mishaps.plan("abort", stage=model.record.stages[1].artifact, seconds=0.2)
        with Traffic(cluster.address, workload, deadline_s=30.0) as traffic:
            traffic.until_ended(40)
            # What was sent less than a millisecond before a death is not suspected of it: then there is one more.
            _meet_poison(cluster, client, model, workload.marked(mark), mark, at_most=4)
            traffic.until_more(20)
    assert_clean(traffic)


def test_f10_a_poisonous_request_that_is_alone_kills_three_workers_at_once(cluster_of, workload):
    cluster = cluster_of(4)
    with adapt.Client(cluster.address) as client:
        model = workload.deploy(client, stages=2)
        for x in workload.inputs[:20]:
            model(x)
        mark = cluster.mishaps.plan("abort", stage=model.record.stages[1].artifact)
        _meet_poison(cluster, client, model, workload.marked(mark), mark)
        assert model(workload.inputs[0]).equal(workload.expect(workload.inputs[0]))


def test_f10_a_poisonous_request_that_kills_at_once_among_others(cluster_of, workload):
    cluster = cluster_of(5)
    with adapt.Client(cluster.address) as client:
        model = workload.deploy(client, stages=2)
        mark = cluster.mishaps.plan("abort", stage=model.record.stages[1].artifact)
        with Traffic(cluster.address, workload, deadline_s=10.0) as traffic:
            traffic.until_ended(40)
            _meet_poison(cluster, client, model, workload.marked(mark), mark)
            traffic.until_more(20)
    assert_clean(traffic)


def _meet_poison(cluster, client, model, x, mark: int, *, at_most: int = 3) -> None:
    """Three workers die of it, it ends in its own error, and somebody is left."""
    with pytest.raises(adapt.PoisonError) as caught:
        model(x, deadline_s=20.0)
    dead = cluster.mishaps.happened(mark)
    assert 3 <= len(dead) == len(set(dead)) <= at_most
    assert {cluster.worker(name).wait() for name in dead} == {-signal.SIGABRT}
    assert {name for name, state in states(client).items() if state == "ready"} == {worker.name for worker in cluster.workers} - set(dead)
    assert len(caught.value.attempts) >= 3
    assert counter(client, "poisonous_requests") == 1


def test_f11_a_worker_that_dies_again_and_again_costs_no_answer(cluster_of, workload):
    cluster = cluster_of(3)
    with adapt.Client(cluster.address) as client:
        workload.deploy(client, stages=2)
        with Traffic(cluster.address, workload) as traffic:
            for _ in range(6):
                traffic.until_more(30)
                cluster.workers[0].kill()
                cluster.workers[0].begin_again()
                cluster.workers[0].wait_ready()
            traffic.until_more(60)
            wait_for_state(client, "w1", "ready")
        assert len(log_lines(cluster.dispatcher, "worker joined  worker_id=w1")) == 7
    assert_clean(traffic)


def test_f12_a_second_worker_of_the_same_name_is_refused(cluster_of, workload):
    cluster = cluster_of(2)
    with adapt.Client(cluster.address) as client:
        workload.deploy(client, stages=2)
        with Traffic(cluster.address, workload) as traffic:
            traffic.until_ended(20)
            with pytest.raises(adapt.AdaptError, match="a worker named w1 is connected already; choose another --name"):
                cluster.add_worker(name="w1")
            assert cluster.workers[2].wait() == 1
            traffic.until_more(20)
        assert states(client) == {"w1": "ready", "w2": "ready"}
        assert counter(client, "tasks_lost") == 0
    assert_clean(traffic)


def test_f12_a_new_life_takes_its_name_over_at_once(cluster_of, workload):
    """No lease has to end first: the name's earlier owner has been seen to die."""
    cluster = cluster_of(2, dispatcher={"lease_ttl": 60, "grace": 60})
    with adapt.Client(cluster.address) as client:
        workload.deploy(client, stages=2)
        with Traffic(cluster.address, workload) as traffic:
            traffic.until_ended(20)
            cluster.workers[0].kill()
            cluster.workers[0].begin_again()
            cluster.workers[0].wait_ready()
            wait_for_state(client, "w1", "ready")
            traffic.until_more(20)
    assert_clean(traffic)


def test_f28_all_workers_die_and_come_back(cluster_of, workload):
    """Meanwhile requests wait, up to the limit; beyond it they are refused at once."""
    cluster = cluster_of(2, dispatcher={"max_requests": 40})
    with adapt.Client(cluster.address) as client:
        model = workload.deploy(client, stages=2)
        for worker in cluster.workers:
            worker.kill()
        wait_until(lambda: set(states(client).values()) == {"lost"})
        waiting = [model.submit(x, deadline_s=60.0) for x in itertools.islice(workload.inputs, 40)]
        wait_until(lambda: client.status().counters["requests_live"] == 40)
        with pytest.raises(adapt.OverloadedError):
            model.submit(workload.inputs[40], deadline_s=5.0).result(4)
        for worker in cluster.workers:
            worker.begin_again()
        for worker in cluster.workers:
            worker.wait_ready()
        with one_thread():
            assert all(future.result(30).equal(workload.module(x)) for future, x in zip(waiting, workload.inputs, strict=False))
        assert model(workload.inputs[41]).equal(workload.expect(workload.inputs[41]))
        wait_until(lambda: client.status().counters["requests_live"] == 0)
        assert all(record.state == "ready" for record in workers_of(client.status()).values())
