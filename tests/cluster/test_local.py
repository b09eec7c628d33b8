"""LocalCluster: real processes that die, stop, go on, come back, and never stay behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import adapt
from adapt.runtime import local

WAIT_S = 20.0


def wait_until(fact, what: str) -> None:
    limit = time.monotonic() + WAIT_S
    while not fact():
        assert time.monotonic() < limit, what
        time.sleep(0.02)


def states(client) -> dict[str, str]:
    return {worker.worker_id: worker.state for worker in client.status().workers}


def test_the_life_of_a_worker(tmp_path):
    with adapt.LocalCluster(workers=1, directory=tmp_path / "here", dispatcher={"silence": 1, "grace": 1}) as cluster:
        (first,) = cluster.workers
        assert first.name == "w1" and first.is_alive and f"pid={first.pid}" in first.ready
        with adapt.Client(cluster.address) as client:
            second = cluster.add_worker(memory_limit="64MiB")
            assert [worker.name for worker in cluster.workers] == ["w1", "w2"]
            budgets = {worker.worker_id: worker.stage_budget_bytes for worker in client.status().workers}
            assert budgets["w2"] == 64 << 20 != budgets["w1"]

            first.stop()
            wait_until(lambda: states(client)["w1"] != "ready", "a stopped worker is noticed")
            assert first.is_alive and psutil.Process(first.pid).status() == psutil.STATUS_STOPPED
            first.resume()
            wait_until(lambda: states(client)["w1"] == "ready", "it goes on")

            first.kill()
            assert not first.is_alive and first.wait() == -signal.SIGKILL
            wait_until(lambda: states(client)["w1"] == "lost", "a killed worker is noticed")
            for act in (first.kill, first.stop, first.resume, first.terminate):
                act()  # nothing happens
            first.restart()
            wait_until(lambda: states(client)["w1"] == "ready", "it is back under its name")

            second.terminate()
            assert second.wait(timeout_s=WAIT_S) == 0
            with pytest.raises(TimeoutError, match="w1"):
                first.wait(timeout_s=0.05)

            term = client.status().term
            cluster.dispatcher.kill()
            cluster.dispatcher.restart()
            assert f"listen={cluster.address} " in cluster.dispatcher.ready
            wait_until(lambda: states(client).get("w1") == "ready", "the worker finds the new dispatcher")
            assert client.status().term > term
            first.stop()  # closing copes with it
    assert not first.is_alive and not cluster.dispatcher.is_alive
    assert {path.name for path in (tmp_path / "here").iterdir()} >= {"w1.log", "w2.log", "dispatcher.log", "state", "cache"}
    assert "not running" in repr(cluster)


def test_after_work_everybody_leaves_by_itself_when_all_end_at_once():
    """Regression: workers waited for acknowledgements that a dispatcher had not said before it left, until they were killed."""
    torch = pytest.importorskip("torch")
    x = torch.ones(1, 4)
    with adapt.LocalCluster(workers=2) as cluster:
        with adapt.Client(cluster.address) as client:
            model = client.deploy(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()).eval(), example_inputs=(x,), name="net")
            for _ in range(3):
                model(x)
        processes = [cluster.dispatcher, *cluster.workers]
        for process in processes:
            process.terminate()
        assert [process.wait(WAIT_S) for process in processes] == [0, 0, 0]


def test_a_process_that_does_not_start_tells_why():
    cluster = adapt.LocalCluster(workers=0, dispatcher={"policy": "random"})
    with pytest.raises(adapt.AdaptError, match=r"(?s)dispatcher ended with status 2.*policy='random'"):
        cluster.start()
    assert not cluster.directory.exists()
    with adapt.LocalCluster(workers=0) as cluster, pytest.raises(adapt.AdaptError, match="--memory-limit"):
        cluster.add_worker(memory_limit="lots")


def test_a_process_that_hangs_is_given_up():
    with adapt.LocalCluster(workers=0) as cluster:
        late = local.LocalProcess("late", ["timeit", "-n", "1", "import time; time.sleep(60)"], cluster.directory, cluster._reaper)
        try:
            with pytest.raises(adapt.AdaptError, match=r"late was not ready within 0\.1 s"):
                late.wait_ready(timeout_s=0.1)
        finally:
            late.end()
        assert late.wait() == -signal.SIGTERM


@pytest.mark.parametrize("workers", [-1, True, 2.0, 1000])
def test_an_impossible_number_of_workers(workers):
    with pytest.raises(adapt.ConfigError, match="workers"):
        adapt.LocalCluster(workers=workers)


def test_settings_become_flags():
    settings = {"lease_ttl": 2, "insecure": True, "models_dir": None, "other": False, "cache_dir": Path("/x y")}
    assert local.as_flags(settings) == ["--lease-ttl", "2", "--insecure", "--cache-dir", "/x y"]


def test_variables_of_the_user_do_not_reach_the_processes(monkeypatch):
    monkeypatch.setenv("ADAPT_POLICY", "random")
    with adapt.LocalCluster(workers=0) as cluster, adapt.Client(cluster.address) as client:
        assert client.status().workers == []


SCRIPT = """
import os, sys, adapt
cluster = adapt.LocalCluster(workers=0, directory=sys.argv[1])
cluster.start()
late = adapt.runtime.local.LocalProcess("late", ["timeit", "-n", "1", "import time; time.sleep(600)"], cluster.directory, cluster._reaper)
late.stop()  # SIGTERM would not be enough
print(cluster.dispatcher.pid, late.pid, cluster._reaper._process.pid, flush=True)
if sys.argv[2] == "wait":
    sys.stdin.read()
"""


@pytest.mark.parametrize("end", ["killed", "interrupted", "forgotten"])
def test_no_process_outlives_its_parent(tmp_path, end):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), "wait" if end != "forgotten" else "end"]
    parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0)
    try:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 3
        if end == "killed":
            os.killpg(parent.pid, signal.SIGKILL)
        elif end == "interrupted":
            os.killpg(parent.pid, signal.SIGINT)  # as Ctrl-C in a terminal does
        parent.wait(WAIT_S)
        wait_until(lambda: not any(map(psutil.pid_exists, pids)), "all are gone")
        if end == "interrupted":
            assert b"KeyboardInterrupt" in parent.stderr.read()
    finally:
        parent.kill()
        parent.wait()
        for pipe in (parent.stdin, parent.stdout, parent.stderr):
            pipe.close()
