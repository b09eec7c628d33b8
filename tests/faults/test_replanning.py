"""A deployment that is cut anew under load: requests go on being answered, and nobody but the status tells."""

from __future__ import annotations

import time

import pytest
import torch

import adapt
from adapt.protocol.messages import DeploymentRecord
from tests.faults.clusters import counter, log_lines, states, wait_until
from tests.faults.traffic import Traffic, Workload, assert_clean

pytestmark = pytest.mark.timeout(240)

WIDTH, LAYERS = 512, 8  # a layer has a mebibyte
DAY_S = 86400.0


@pytest.fixture(scope="module")
def wide() -> Workload:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh()) for _ in range(LAYERS)]
    inputs = 4.0 * torch.randn(64, 1, WIDTH, generator=torch.Generator().manual_seed(0))
    inputs[:, :, 0] = 0.0  # no mark
    return Workload(torch.nn.Sequential(*layers).eval(), inputs)


def deploy(client: adapt.Client, workload: Workload, **options: object) -> adapt.Model:
    return client.deploy(workload.module, example_inputs=(workload.inputs[0],), **options)


@pytest.mark.slow
def test_a_deployment_is_cut_anew_under_load_and_comes_back_so(cluster_of, wide):
    """Cut for workers that have little room; then there is room, and one of them has become slow."""
    settings = {"replan_interval": 0.5, "relief": 1000}
    cluster = cluster_of(3, memory_limit="16MiB", dispatcher=settings)
    with adapt.Client(cluster.address) as client:
        client.deploy(torch.nn.Linear(1600, 1600).eval(), example_inputs=(torch.zeros(1, 1600),), stages=1, name="ballast")
        first = deploy(client, wide, stages="auto", name="wide")
        assert len(first.record.stages) > 1
        with Traffic(cluster.address, wide, name="wide") as traffic:
            traffic.until_ended(20)
            cluster.mishaps.slow("w3", 0.02)
            client.undeploy("ballast")
            wait_until(lambda: present(client).epoch > first.record.epoch and len(present(client).stages) == 1, limit_s=60)
            now = present(client)
            wait_until(lambda: all(set(worker.resident) <= {now.stages[0].artifact} for worker in client.status().workers))
            until = time.monotonic()
            traffic.until_more(40)
        begin_s = since_midnight(log_lines(cluster.dispatcher, "cutting anew")[-1])
        ends = [operation.ends[0].at for operation in traffic.operations.values()]
        assert any((moment_s(at) - begin_s) % DAY_S < DAY_S / 2 for at in ends if at < until), "it never stood still"
        assert (now.version, now.earlier, now.program) == (1, [], first.record.program)
        assert counter(client, "versions_recut") >= 1
        assert set(states(client).values()) == {"ready"}
        cluster.dispatcher.kill()
        cluster.dispatcher.begin_again()
        cluster.dispatcher.wait_ready()
        assert all(first(x).equal(wide.expect(x)) for x in wide.inputs[:4])
        assert [stage.artifact for stage in present(client).stages] == [now.stages[0].artifact] and present(client).version == 1
        second = deploy(client, wide, stages=2, name="wide", version=2)
        assert (second.record.version, second.record.earlier) == (2, [1])
    assert_clean(traffic)


def present(client: adapt.Client) -> DeploymentRecord:
    return next(record for record in client.status().deployments if record.name == "wide")


def since_midnight(line: str) -> float:
    """Seconds, of a line of a log."""
    hours, minutes, seconds = line.split()[0].split(":")
    return 3600.0 * int(hours) + 60.0 * int(minutes) + float(seconds)


def moment_s(at: float) -> float:
    """Seconds since midnight, of a moment of the monotonic clock."""
    wall = time.localtime(moment := time.time() - time.monotonic() + at)
    return 3600.0 * wall.tm_hour + 60.0 * wall.tm_min + wall.tm_sec + moment % 1.0
