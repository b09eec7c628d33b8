"""F13, F14, F15, F16: cables are pulled, lose one direction, are slow, late, or damage what they carry."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

import adapt
from adapt.emulation.parse import parse
from tests.faults.clusters import FaultDevices, counter, log_lines, states, wait_for_state, wait_until, workers_of
from tests.faults.traffic import Traffic, assert_clean, one_thread

pytestmark = pytest.mark.timeout(300)

TRIO = """
[[device]]
name = "pi"
count = 3
cores = 0.5
rate = "100 Mbit/s"
"""


@pytest.fixture
def devices_of(isolated, nursery, tmp_path: Path) -> Iterator[Callable[..., FaultDevices]]:
    clusters = []

    def start(text: str = TRIO, **settings: object) -> FaultDevices:
        cluster = FaultDevices(nursery, parse(text, name="test"), directory=tmp_path, **settings)  # type: ignore[arg-type]
        clusters.append(cluster)
        cluster.start()
        return cluster

    yield start
    for cluster in clusters:
        cluster.close()


@pytest.mark.parametrize("direction", ["both", "up", "down"])
def test_f13_f14_a_cable_is_pulled_and_put_back(devices_of, workload, direction):
    """Or loses one direction only: such a worker is not healthy by half. Nobody has to do anything when it is back."""
    cluster = devices_of()
    with adapt.Client(cluster.address) as client:
        workload.deploy(client, stages=3)
        with Traffic(cluster.address, workload) as traffic:
            traffic.until_ended(30)
            cluster.device("pi-2").cut(direction)
            wait_for_state(client, "pi-2", "lost")
            traffic.until_more(30)
            cluster.device("pi-2").restore()
            wait_for_state(client, "pi-2", "ready")
            cluster.device("pi-1").kill()
            cluster.device("pi-3").kill()
            traffic.until_more(30)  # by this one alone
    assert_clean(traffic)


def test_f13_all_cables_are_pulled_at_once(devices_of, workload):
    """For longer than any patience with workers: requests wait, and are answered when the cables are back."""
    cluster = devices_of()
    with adapt.Client(cluster.address) as client:
        workload.deploy(client, stages=2)
        with Traffic(cluster.address, workload) as traffic:
            traffic.until_ended(30)
            for device in cluster.devices:
                device.cut()
            wait_until(lambda: set(states(client).values()) == {"lost"})
            for device in cluster.devices:
                device.restore()
            traffic.until_more(30)
        wait_until(lambda: set(states(client).values()) == {"ready"})
    assert_clean(traffic)


def test_f15_a_link_that_becomes_slow_is_no_death(devices_of, workload):
    """Bytes still flow, heartbeats among them: the worker stays a member, and work goes where it is done sooner."""
    wide = Wide(4096)
    cluster = devices_of(dispatcher={"attempt_timeout": 20})
    with adapt.Client(cluster.address) as client:
        model = client.deploy(wide, example_inputs=(torch.ones(1, 8),), stages=1, name="wide")
        with one_thread():
            inputs = torch.randn(60, 1, 8, generator=torch.Generator().manual_seed(1))
            truth = [wide(x) for x in inputs]
        assert all(map(torch.equal, model.map(iter(inputs), in_flight=4), truth))
        cluster.device("pi-1").rate(1e6 / 8, 1e6 / 8)
        before = {name: record.tasks_done for name, record in workers_of(client.status()).items()}
        assert all(map(torch.equal, model.map(iter(inputs), in_flight=4, deadline_s=60.0), truth))
        after = {name: record.tasks_done - before[name] for name, record in workers_of(client.status()).items()}
        assert after["pi-1"] < sum(after.values()) / 4, after
        assert counter(client, "evictions") == 0
        assert not log_lines(cluster.dispatcher, "session ended")


class Wide(torch.nn.Module):
    """Each number becomes many: what comes out is much larger than what goes in."""

    def __init__(self, width: int, is_summed: bool = False) -> None:
        super().__init__()
        self.weights = torch.nn.Parameter(torch.randn(8, width, generator=torch.Generator().manual_seed(0)))
        self.is_summed = is_summed
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.unsqueeze(-1) * self.weights
        return y.sum(-1) if self.is_summed else y


SLOW_UPLINK = """
[[device]]
name = "far"
up = "1 Mbit/s"
down = "200 Mbit/s"
"""


@pytest.mark.slow
def test_f15_a_large_activation_passes_a_slow_link(devices_of):
    """3.2 MB at 1 Mbit/s: half a minute in which heartbeats pass, nobody is suspected, and nothing is sent twice."""
    module = Wide(100_000, is_summed=True)
    cluster = devices_of(SLOW_UPLINK, dispatcher={"attempt_timeout": 60})
    x = torch.randn(1, 8, generator=torch.Generator().manual_seed(1))
    with adapt.Client(cluster.address) as client:
        model = client.deploy(module, example_inputs=(x,), stages=3, name="wide")  # cut wherever it can be
        with one_thread():
            assert model(x, deadline_s=200.0).equal(module(x))
        status = client.status().counters
        assert status["link_raw_bytes.raw"] > 6_400_000  # from the second stage, and to the third
        assert status.get("workers_suspected", 0) == status.get("evictions", 0) == status.get("strangers", 0) == 0
        assert (status["tasks_dispatched"], status.get("retries", 0)) == (3, 0)
    assert not log_lines(cluster.dispatcher, "session ended")
    assert not log_lines(cluster.device("far").process, "session lost")


def test_f16_a_link_that_is_late_and_uneven(devices_of, workload):
    """200 ms, and up to 100 more, both ways: beyond the rate of heartbeats, within what is borne."""
    cluster = devices_of(proxied=["pi-1"])
    with adapt.Client(cluster.address) as client:
        workload.deploy(client, stages=2)
        with Traffic(cluster.address, workload) as traffic:
            traffic.until_ended(30)
            cluster.device("pi-1").delay(0.2, 0.1)
            traffic.until_more(60)
        assert counter(client, "evictions") == 0
    assert_clean(traffic)


def test_f16_a_link_that_stalls_with_open_connections(devices_of, workload):
    cluster = devices_of(proxied=["pi-1"])
    with adapt.Client(cluster.address) as client:
        workload.deploy(client, stages=3)
        with Traffic(cluster.address, workload) as traffic:
            traffic.until_ended(30)
            cluster.device("pi-1").stall()
            wait_until(lambda: states(client)["pi-1"] != "ready")
            traffic.until_more(30)
            cluster.device("pi-1").restore()
            wait_for_state(client, "pi-1", "ready")
            traffic.until_more(30)
    assert_clean(traffic)


def test_f16_a_connection_is_reset_in_the_middle_of_a_message(devices_of):
    """Messages of half a MB in pieces; whatever is cut off is sent again."""
    wide = Wide(16384)
    cluster = devices_of(proxied=["pi-1", "pi-2", "pi-3"])
    with adapt.Client(cluster.address) as client:
        model = client.deploy(wide, example_inputs=(torch.ones(1, 8),), stages=1, name="wide")
        with one_thread():
            inputs = torch.randn(60, 1, 8, generator=torch.Generator().manual_seed(1))
            truth = [wide(x) for x in inputs]
        for number, (y, expected) in enumerate(zip(model.map(iter(inputs), in_flight=6), truth, strict=True)):
            assert y.equal(expected)
            if number % 5 == 0:
                cluster.devices[number // 5 % 3].reset()


@pytest.mark.slow
def test_f16_a_thousand_resets_leave_nothing_behind(devices_of, workload):
    cluster = devices_of(proxied=["pi-1"])
    dispatcher = psutil.Process(cluster.dispatcher.pid)
    with adapt.Client(cluster.address) as client:
        workload.deploy(client, stages=2)
        worker = psutil.Process(cluster.device("pi-1").pid)
        with Traffic(cluster.address, workload, clients=1, in_flight=2) as traffic:
            figures = []
            for number in range(1000):
                sessions = len(log_lines(cluster.device("pi-1").process, "session opened"))
                cluster.device("pi-1").reset()
                wait_until(lambda count=sessions: len(log_lines(cluster.device("pi-1").process, "session opened")) > count)
                if number in (199, 999):
                    figures.append(
                        [(process.memory_info().rss, process.num_fds(), process.num_threads()) for process in (dispatcher, worker)]
                    )
        wait_for_state(client, "pi-1", "ready")
    for before, after in zip(*figures, strict=True):
        assert after[0] - before[0] < 16 << 20, figures
        assert after[1] <= before[1] + 8, figures
        assert after[2] <= before[2] + 4, figures
    assert_clean(traffic)


def test_f16_a_link_that_damages_what_it_carries(devices_of, workload):
    """About one byte in 20 kB, both ways: every answer is right all the same."""
    cluster = devices_of(proxied=["pi-1"])
    with adapt.Client(cluster.address) as client:
        workload.deploy(client, stages=2)
        with Traffic(cluster.address, workload) as traffic:
            traffic.until_ended(30)
            cluster.device("pi-1").corrupt(50)
            wait_until(lambda: _damages(cluster, "pi-1") >= 2)
            traffic.until_more(100)
            cluster.device("pi-1").restore()
            traffic.until_more(30)
    assert_clean(traffic)


def _damages(cluster: FaultDevices, name: str) -> int:
    """How often one of its two sides has seen that a message was damaged."""
    words = "does not match its checksum", "do not match their checksum", "could not be read"
    logs = cluster.dispatcher, cluster.device(name).process
    return sum(len(log_lines(log, word)) for log in logs for word in words)
