"""An installation without torch: a dispatcher and a client that send numpy arrays to a model which another client deployed."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import adapt

ROOT = Path(__file__).resolve().parents[2]
PLAIN = ROOT / ".venv-plain"

CLIENT = """
import sys
import numpy as np
import adapt
with adapt.Client(sys.argv[1]) as client:
    model = client.model("tiny")
    y = model(np.ones((2, 4), np.float32))
    assert type(y) is np.ndarray and y.shape == (2, 3) and y.dtype == np.float32, y
    try:
        model(np.ones((2, 4), np.float64))
    except adapt.InputMismatchError as error:
        assert "float32" in str(error) and "float64" in str(error)
    else:
        raise SystemExit("a wrong dtype was let through")
    for model in ("torchvision/resnet18", sys.argv[2]):
        try:
            client.deploy(model)
        except adapt.ExportUnavailableError:
            pass
        else:
            raise SystemExit("a model was exported without torch")
assert "torch" not in sys.modules
print("plain", float(y.sum()))
"""


@pytest.fixture(scope="module")
def plain_python():
    """A virtual environment with ADAPT and without torch; kept in the checkout, so that the next run needs no network."""
    python = PLAIN / "bin" / "python"
    stamp = PLAIN / "installed"
    wanted = (ROOT / "setup.cfg").read_text() + (ROOT / "constraints.txt").read_text()
    if not stamp.exists() or stamp.read_text() != wanted:
        venv.create(PLAIN, with_pip=True, clear=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt"), "-e", str(ROOT)]
        subprocess.run(install, check=True, timeout=600)
        stamp.write_text(wanted)
    assert subprocess.run([str(python), "-c", "import torch"], capture_output=True).returncode != 0, "it should have no torch"
    return python


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_dispatcher_and_client_work_without_torch(plain_python, tmp_path):
    import torch

    bin_directory = plain_python.parent
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("ADAPT_", "PYTHONPATH"))}
    dispatcher = subprocess.Popen(
        [str(bin_directory / "adapt-dispatcher"), "--listen", "tcp://127.0.0.1:0", "--state-dir", str(tmp_path / "state")],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    worker = None
    try:
        ready = dispatcher.stdout.readline()
        address = next(word.removeprefix("listen=") for word in ready.split() if word.startswith("listen="))
        worker = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "adapt.interfaces.cli.worker",
                "--dispatcher",
                address,
                "--name",
                "w1",
                "--cache-dir",
                str(tmp_path / "c"),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert worker.stdout.readline().startswith("adapt-worker ready")
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).eval()
        torch.export.save(torch.export.export(module, (torch.ones(2, 4),)), file := tmp_path / "tiny.pt2")
        with adapt.Client(address) as client:
            client.deploy(module, example_inputs=(torch.ones(2, 4),), name="tiny", stages=2)
            result = subprocess.run(
                [str(plain_python), "-c", CLIENT, address, str(file)], capture_output=True, text=True, timeout=120, env=environment
            )
        assert result.returncode == 0, result.stderr
        with torch.inference_mode():
            assert float(result.stdout.split()[1]) == pytest.approx(float(module(torch.ones(2, 4)).sum()))
    finally:
        for process in (worker, dispatcher):
            if process is not None:
                process.terminate()
                assert process.wait(timeout=30) == 0
                process.stdout.close()
