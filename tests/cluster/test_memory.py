"""Models larger than any one worker: they run on several, and what cannot run is told what is missing."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

import adapt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from reference import expected

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

MIB = 1 << 20


def images(count):
    rng = np.random.default_rng(3)
    return [rng.standard_normal((1, 3, 224, 224), dtype=np.float32) for _ in range(count)]


@pytest.mark.parametrize(("model", "workers", "budget_mib"), [("resnet50", 4, 40), ("vgg16", 3, 450)])
def test_a_model_larger_than_any_worker_runs(tmp_path, model, workers, budget_mib):
    inputs = images(3)
    truth = expected(tmp_path, model, inputs)
    with adapt.LocalCluster(workers=workers, memory_limit=f"{budget_mib}MiB") as cluster, adapt.Client(cluster.address) as client:
        deployed = client.deploy(f"torchvision/{model}", seed=0, timeout_s=200)
        stages = deployed.record.stages
        assert len(stages) > 1 and sum(stage.file_bytes for stage in stages) > budget_mib * MIB
        for answer, right in zip(deployed.map(inputs, in_flight=2), truth, strict=True):
            assert np.array_equal(answer, right)
        status = client.status()
        budgets = {worker.worker_id: worker.stage_budget_bytes for worker in status.workers}
        for worker, budget in budgets.items():
            held = sum(stage.file_bytes for stage in stages if worker in stage.workers)
            assert held <= budget == budget_mib * MIB


def test_what_no_worker_can_hold_is_named_with_its_size():
    with adapt.LocalCluster(workers=2, memory_limit="250MiB") as cluster, adapt.Client(cluster.address) as client:
        with pytest.raises(
            adapt.PlanError, match=r"classifier\.0 alone has 392\.\d MiB of weights.*the largest stage budget is 249\.\d MiB"
        ) as caught:
            client.deploy("torchvision/vgg16", seed=0, timeout_s=200)
        needed = float(re.search(r"one worker with ([\d.]+) MiB or more is needed", str(caught.value))[1])
        assert 392 < needed < 420
        with pytest.raises(adapt.PlanError, match=r"no worker has memory for stage \d of 4: it needs [45]\d\d\.\d MiB"):
            client.deploy("torchvision/vgg16", seed=0, stages=4, timeout_s=200)
        assert client.status().deployments == []


def test_a_cluster_with_too_little_memory_is_told_how_much_more_would_do():
    with adapt.LocalCluster(workers=2, memory_limit="40MiB") as cluster, adapt.Client(cluster.address) as client:
        with pytest.raises(
            adapt.PlanError,
            match=r"stage budgets add up to 79\.\d MiB.*(\d+) more workers? with 39\.\d MiB would do, or (\d+)\.0 MiB on each",
        ) as caught:
            client.deploy("torchvision/resnet50", seed=0, timeout_s=200)
        count, each = map(int, re.search(r"(\d+) more workers? .*or (\d+)\.0 MiB on each", str(caught.value)).groups())
        assert 1 <= count <= 2 and 48 < each < 80
        for _ in range(count):  # it is true
            cluster.add_worker()
        answer = client.deploy("torchvision/resnet50", seed=0, timeout_s=200)(images(1)[0])
        assert answer.shape == (1, 1000)
