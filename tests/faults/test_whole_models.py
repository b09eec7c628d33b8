"""A model of real size under everything at once: ResNet-18 on small images, in four stages, while workers die, sleep and come back."""

from __future__ import annotations

import pytest
import torch

import adapt
from adapt.models.vision import import_torchvision
from tests.faults.clusters import states, wait_until
from tests.faults.traffic import Traffic, Workload, assert_clean

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def resnet() -> Workload:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = import_torchvision().models.resnet18().eval()
    return Workload(module, torch.randn(48, 1, 3, 64, 64, generator=torch.Generator().manual_seed(1)))


def test_resnet18_while_workers_die_sleep_and_come_back(cluster_of, resnet):
    cluster = cluster_of(4, is_lucky=True)
    with adapt.Client(cluster.address) as client:
        resnet.deploy(client, name="resnet18")
        with Traffic(cluster.address, resnet, name="resnet18", clients=2, in_flight=6) as traffic:
            traffic.until_ended(20)
            cluster.workers[0].kill()
            traffic.until_more(20)
            cluster.workers[1].stop()
            traffic.until_more(20)
            cluster.workers[0].begin_again()
            cluster.workers[0].wait_ready()
            cluster.workers[2].terminate()
            traffic.until_more(20)
            cluster.workers[1].resume()
            assert cluster.workers[2].wait(30) == 0
            cluster.dispatcher.kill()
            cluster.dispatcher.begin_again()
            cluster.dispatcher.wait_ready()
            traffic.until_more(20)
        wait_until(lambda: sum(state == "ready" for state in states(client).values()) == 3)
    assert_clean(traffic)
