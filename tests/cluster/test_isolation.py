"""What a worker needs, and what it holds: no code of the model, and no weights but its own stages'."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest

import adapt

MEBIBYTE = 1 << 20
ALLOWED_BYTES = 50 * MEBIBYTE

SCRIPT = '''
import sys
import numpy as np
import torch
import adapt

class Own(torch.nn.Module):
    """A class that exists in this script alone."""
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.second = torch.nn.Conv2d(8, 8, 3, padding=1)
        self.head = torch.nn.Linear(8, 5)

    def forward(self, x, scale):
        y = torch.relu(self.first(x))
        y = torch.relu(self.second(y) + y)
        return {"logits": self.head(y.mean((2, 3))) * scale, "map": (y, x.sum())}

torch.manual_seed(3)
torch.set_num_threads(1)
module = Own().eval()
x, scale = torch.randn(2, 3, 16, 16), torch.randn(2, 5)
with adapt.Client(sys.argv[1]) as client:
    model = client.deploy(module, example_inputs=(x, scale), stages=3, name="own")
    got = model(x, scale)
with torch.inference_mode():
    expected = module(x, scale)
assert torch.equal(got["logits"], expected["logits"]) and torch.equal(got["map"][0], expected["map"][0])
assert torch.equal(got["map"][1], expected["map"][1]) and type(got["map"]) is tuple
assert len(model.record.stages) == 3
print("equal")
'''


def test_a_class_that_only_the_client_knows_runs_on_the_workers(tmp_path):
    script = tmp_path / "own.py"
    script.write_text(SCRIPT)
    with adapt.LocalCluster(workers=3) as cluster:
        result = subprocess.run([sys.executable, str(script), cluster.address], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("equal")


def anonymous_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


def mapped_artifacts(pid: int) -> set[str]:
    return {Path(entry.path).name.partition(".")[0] for entry in psutil.Process(pid).memory_maps() if entry.path.endswith(".safetensors")}


def settled_growth(pid: int, before: int) -> int:
    """Anonymous bytes above `before`, once they are no more than is allowed: what much has gathered, a heartbeat or two later is given back."""
    pause = threading.Event()
    for _ in range(100):
        if (grown := anonymous_bytes(pid) - before) <= ALLOWED_BYTES:
            break
        pause.wait(0.1)
    return grown


@pytest.mark.timeout(180)
def test_a_worker_holds_only_its_own_stage():
    """ResNet-50 in 4 stages, after 20 inferences of batch 1: at most 50 MiB more of anonymous memory, and one file mapped; without spares."""
    with adapt.LocalCluster(workers=4, dispatcher={"relief": 3600, "spares": 0}) as cluster, adapt.Client(cluster.address) as client:
        before = {worker.name: anonymous_bytes(worker.pid) for worker in cluster.workers}
        model = client.deploy("torchvision/resnet50", stages=4, seed=0)
        x = np.zeros((1, 3, 224, 224), np.float32)
        for _ in model.map([x] * 20, in_flight=8):
            pass
        stages = {stage.workers[0]: stage.artifact for stage in model.record.stages}
        assert len(stages) == 4
        for worker in cluster.workers:
            grown = settled_growth(worker.pid, before[worker.name])
            assert grown <= ALLOWED_BYTES, f"{worker.name} grew by {grown / MEBIBYTE:.1f} MiB"
            assert mapped_artifacts(worker.pid) == {stages[worker.name]}
