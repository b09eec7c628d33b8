"""F26, F27: clients die in mid-request, and ask the same request again."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest

import adapt
from adapt.emulation.proxy_control import LinkProxy
from adapt.simulation.history import check
from tests.faults import client_process
from tests.faults.clusters import FaultCluster, counter, log_lines, wait_until, workers_of
from tests.faults.traffic import Traffic, assert_clean

pytestmark = pytest.mark.timeout(300)
IN_FLIGHT = 8


def kill_clients(cluster: FaultCluster, workload, count: int, *, deadline_s: float) -> None:
    """So many clients ask, get some answers, and are killed; what they saw until then was right."""
    for number in range(count):
        journal = cluster.directory / f"journal-{len(list(cluster.directory.glob('journal-*')))}"
        process = cluster.add_client("client", str(journal), "0", str(IN_FLIGHT), str(deadline_s))
        process.wait_ready()
        process.kill()
        findings = check(*client_process.read(journal, workload))
        assert not findings.violations, (number, findings)


def test_f26_the_work_of_a_client_that_dies_is_cancelled(cluster_of, workload):
    """Long before its deadline. Both what runs and what waits: the workers are held until it has been called off."""
    cluster = cluster_of(2)
    with adapt.Client(cluster.address) as client:
        model = workload.deploy(client, stages=2)
        for worker in cluster.workers:
            cluster.mishaps.slow(worker.name, 1.0)
        kill_clients(cluster, workload, 1, deadline_s=600.0)
        wait_until(lambda: client.status().counters["requests_live"] == 0)
        for worker in cluster.workers:
            cluster.mishaps.slow(worker.name, 0.0)
        assert counter(client, "requests_cancelled") >= IN_FLIGHT - 1
        wait_until(lambda: all(record.running == 0 for record in workers_of(client.status()).values()))
        assert client.status().counters["reserved_bytes"] == 0
        assert model(workload.inputs[0]).equal(workload.expect(workload.inputs[0]))


@pytest.mark.slow
def test_f26_a_hundred_clients_die_and_leave_nothing(cluster_of, workload):
    cluster = cluster_of(3)
    dispatcher = psutil.Process(cluster.dispatcher.pid)
    with adapt.Client(cluster.address) as client:
        workload.deploy(client, stages=3)
        with Traffic(cluster.address, workload, clients=1, in_flight=2) as traffic:
            kill_clients(cluster, workload, 10, deadline_s=2.0)
            before, files = dispatcher.memory_info().rss, dispatcher.num_fds()
            kill_clients(cluster, workload, 90, deadline_s=2.0)
            traffic.until_more(20)
        wait_until(lambda: client.status().counters["requests_live"] == 0)
        wait_until(lambda: client.status().counters["kept_bytes"] < 100_000, limit_s=30)  # until deadline + 5 s
        assert client.status().counters["reserved_bytes"] == 0
        assert dispatcher.memory_info().rss - before < 24 << 20
        assert dispatcher.num_fds() <= files + 8
    assert_clean(traffic)


@pytest.fixture
def line() -> Iterator[LinkProxy]:
    """Between a client and the dispatcher."""
    proxy = LinkProxy(seed=1)
    proxy.start()
    yield proxy
    proxy.close()


def through(line: LinkProxy, cluster: FaultCluster) -> str:
    """The dispatcher's address beyond the line."""
    host, _, port = cluster.address.removeprefix("tcp://").rpartition(":")
    return "tcp://{}:{}".format(*line.add("client", namespace=None, target=(host, int(port))))


def test_f27_a_request_that_is_asked_again_while_it_runs_is_run_once(cluster_of, workload, line):
    cluster = cluster_of(2, dispatcher={"attempt_timeout": 60, "client_grace": 60})
    with adapt.Client(through(line, cluster)) as client, adapt.Client(cluster.address) as watcher:
        model = workload.deploy(client, stages=2)
        mark = cluster.mishaps.plan("hold", stage=model.record.stages[0].artifact)
        x = workload.marked(mark)
        future = model.submit(x)
        wait_until(lambda: cluster.mishaps.happened(mark))
        line.reset("client")  # it connects again, and asks again
        client.status()
        assert not future.done()
        cluster.mishaps.release(mark)
        assert future.result(30).equal(workload.expect(x))
        assert future.outcome.attempts == 2
        assert len(cluster.mishaps.happened(mark)) == 1
        assert (counter(watcher, "requests_accepted"), counter(watcher, "tasks_dispatched")) == (1, 2)


def test_f27_a_request_that_is_asked_again_when_it_has_ended_is_answered_from_memory(cluster_of, workload, line):
    """Its answer was lost on the way."""
    cluster = cluster_of(2, dispatcher={"client_grace": 60})
    with adapt.Client(through(line, cluster)) as client, adapt.Client(cluster.address) as watcher:
        model = workload.deploy(client, stages=2)
        mark = cluster.mishaps.plan("hold", stage=model.record.stages[1].artifact)
        x = workload.marked(mark)
        future = model.submit(x)
        wait_until(lambda: cluster.mishaps.happened(mark))
        line.cut("client", "down")
        cluster.mishaps.release(mark)
        wait_until(lambda: counter(watcher, "requests_ok") == 1)
        assert not future.done()
        line.reset("client")
        line.restore("client")
        assert future.result(30).equal(workload.expect(x))
        assert len(cluster.mishaps.happened(mark)) == 1
        status = watcher.status().counters
        assert (status["requests_accepted"], status["requests_ok"], status["tasks_dispatched"]) == (1, 1, 2)
        assert status["duplicate_requests"] >= 1


def test_f27_clients_whose_connections_break_all_the_time(cluster_of, workload, line):
    cluster = cluster_of(3)
    address = through(line, cluster)
    with adapt.Client(cluster.address) as client:
        workload.deploy(client, stages=3)
        with Traffic(address, workload) as traffic:
            for _ in range(8):
                traffic.until_more(15)
                line.reset("client")
        status = client.status().counters
        assert status["requests_accepted"] == status["requests_ok"] == traffic.asked
        assert not log_lines(cluster.dispatcher, "Traceback")
    assert_clean(traffic)
