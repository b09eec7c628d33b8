"""The commands against real processes: ready lines, exit statuses, signals, `adapt deploy` and `adapt status`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from adapt.runtime.client import Client
from adapt.runtime.local import LocalCluster

TIMEOUT_S = 60.0
SMALL = "torchvision/squeezenet1_1"


def adapt(*argv, address=None):
    """The finished process of `adapt ARGV`."""
    environ = os.environ | ({"ADAPT_DISPATCHER": address} if address else {})
    return subprocess.run(
        [sys.executable, "-m", "adapt.interfaces.cli.main", *argv], capture_output=True, text=True, env=environ, timeout=TIMEOUT_S
    )


@pytest.fixture
def started(tmp_path):
    """Starts a door as a process and gives it with its ready line; ends it afterwards."""
    processes = []

    def start(door, *argv):
        command = [sys.executable, "-m", f"adapt.interfaces.cli.{door}", *argv]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        processes.append(process)
        return process, process.stdout.readline()

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def start_dispatcher(started, tmp_path, *argv):
    process, ready = started("dispatcher", "--listen", "tcp://127.0.0.1:0", "--state-dir", str(tmp_path / "state"), *argv)
    fields = dict(word.split("=", 1) for word in ready.split()[2:])
    return process, ready, fields


def test_a_dispatcher_says_that_it_is_ready_and_drains(started, tmp_path):
    process, ready, fields = start_dispatcher(started, tmp_path)
    assert ready.startswith("adapt-dispatcher ready listen=tcp://127.0.0.1:")
    assert fields["pid"] == str(process.pid)
    assert fields["term"] == "1"
    process.send_signal(signal.SIGTERM)
    assert process.wait(TIMEOUT_S) == 0
    assert start_dispatcher(started, tmp_path)[2]["term"] == "2"


def test_a_taken_port_and_a_taken_state_directory_are_status_2(started, tmp_path):
    _, _, fields = start_dispatcher(started, tmp_path)
    for argv, words in (
        (["--listen", fields["listen"], "--state-dir", str(tmp_path / "other")], "in use"),
        (["--listen", "tcp://127.0.0.1:0", "--state-dir", str(tmp_path / "state")], "another dispatcher uses it"),
    ):
        process, ready = started("dispatcher", *argv)
        assert process.wait(TIMEOUT_S) == 2
        error = process.stderr.read()
        assert ready == ""
        assert error.startswith("adapt-dispatcher: ") and words in error and error.count("\n") == 1


def test_a_worker_says_that_it_is_ready_and_drains(started, tmp_path):
    _, _, fields = start_dispatcher(started, tmp_path)
    flags = ["--dispatcher", fields["listen"], "--name", "w1", "--cache-dir", str(tmp_path / "cache"), "--memory-limit", "64MiB"]
    process, ready = started("worker", *flags)
    words = dict(word.split("=", 1) for word in ready.split()[2:])
    assert ready.startswith("adapt-worker ready name=w1 dispatcher=")
    assert words["stage_budget_bytes"] == str(64 << 20)
    assert int(words["floor_bytes"]) > 0
    assert words["pid"] == str(process.pid)
    report = json.loads(adapt("status", "--json", address=fields["listen"]).stdout)
    assert [(worker["worker_id"], worker["state"]) for worker in report["workers"]] == [("w1", "ready")]
    process.send_signal(signal.SIGINT)
    assert process.wait(TIMEOUT_S) == 0


def test_nobody_at_the_address_is_status_1():
    result = adapt("status", "--timeout", "0.5", address="tcp://127.0.0.1:9")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("adapt: ") and "tcp://127.0.0.1:9" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_model_is_deployed_and_seen():
    with LocalCluster(workers=2) as cluster:
        deployed = adapt("deploy", SMALL, "--seed", "0", "--name", "small", address=cluster.address)
        assert deployed.returncode == 0, deployed.stderr
        assert deployed.stdout.startswith("deployed small version 1 in 1 stage (1: w1, w2)")
        assert "exporting torchvision/squeezenet1_1 ..." in deployed.stderr

        seen = adapt("status", address=cluster.address)
        assert seen.returncode == 0
        assert "2 of 2 workers ready" in seen.stdout and "small version 1" in seen.stdout

        again = adapt("deploy", SMALL, "--seed", "1", "--name", "small", "--version", "5", address=cluster.address)
        assert again.stdout.startswith("deployed small version 5 in 1 stage"), again.stderr
        back = adapt("rollback", "small", address=cluster.address)
        assert back.stdout.startswith("deployed small version 6, which is version 1 again, in 1 stage"), back.stderr
        seen = adapt("status", address=cluster.address)
        assert "small version 6 (1 again), before it 5" in " ".join(seen.stdout.split())

        for argv, status, words in (
            (["squeezenet"], 1, "did you mean torchvision/squeezenet"),
            ([SMALL, "--stages", "4000"], 1, "stages"),
            ([SMALL, "--weights", "secret.pth"], 2, "--models-dir"),
            ([SMALL, "--codec", "zfp"], 2, "needs a tolerance"),
            ([SMALL, "--name", "small", "--version", "5"], 2, "small has had version 6"),
        ):
            refused = adapt("deploy", *argv, address=cluster.address)
            error = refused.stderr.splitlines()[-1]
            assert (refused.returncode, refused.stdout) == (status, ""), refused.stderr
            assert error.startswith("adapt: ") and words in error


@pytest.mark.slow
def test_a_file_is_deployed_measured_and_planned_for(tmp_path):
    import torch

    file, other = tmp_path / "mine.pt2", tmp_path / "other.pt2"
    module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).eval()
    batch = {0: torch.export.Dim("batch", max=64)}
    torch.export.save(torch.export.export(module, (torch.ones(2, 4),), dynamic_shapes=(batch,)), file)
    other.write_bytes(b"no archive")
    with LocalCluster(workers=1) as cluster:
        deployed = adapt("deploy", str(file), "--stages", "2", address=cluster.address)
        assert deployed.returncode == 0, deployed.stderr
        assert deployed.stdout.startswith("deployed mine version 1 in 2 stages")
        assert "exporting mine.pt2 in a child process ..." in deployed.stderr
        with Client(cluster.address) as client, torch.inference_mode():
            x = torch.randn(3, 4)
            assert torch.equal(client.model("mine")(x), module(x))
        profiled = adapt("profile", str(file), "--repetitions", "3", address=cluster.address)
        assert profiled.returncode == 0 and "w1" in profiled.stdout, profiled.stderr
        for command in ("deploy", "profile"):
            refused = adapt(command, str(other), address=cluster.address)
            assert refused.returncode == 1, refused.stderr
            assert refused.stderr.splitlines()[-1].startswith("adapt: other.pt2 is no model that torch.export.save has written")
    here = adapt("profile", str(file), "--here", "--repetitions", "3")
    assert here.returncode == 0 and "this-machine" in here.stdout, here.stderr
    planned = adapt("plan", str(file), "--cluster", "pi3", "--optimize", "fold")
    assert planned.returncode == 0 and "requests/s" in planned.stdout, planned.stderr
    refused = adapt("plan", str(file), "--cluster", "pi3", "--seed", "1")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1) and "seed=1: for models by name" in refused.stderr
    refused = adapt("plan", "gone.pt2", "--cluster", "pi3")
    assert refused.returncode == 1 and "there is no file gone.pt2 here" in refused.stderr
