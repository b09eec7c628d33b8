"""Workers are killed, stopped, woken and started in mid-run: every request ends right, once."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import adapt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from reference import expected

pytestmark = pytest.mark.timeout(180)
COUNT = 48


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(5)
    return [rng.standard_normal((1, 3, 128, 128), dtype=np.float32) for _ in range(COUNT)]


@pytest.fixture(scope="module")
def truth(inputs, tmp_path_factory):
    outputs = expected(tmp_path_factory.mktemp("truth"), "resnet18", inputs)
    assert len({y.tobytes() for y in outputs}) == COUNT, "equal answers would hide a swap"
    return outputs


def counters(client) -> dict[str, float]:
    return client.status().counters


def states(client) -> dict[str, str]:
    return {worker.worker_id: worker.state for worker in client.status().workers}


def wait_until(fact, *, limit_s: float = 30.0) -> None:
    """Wait for a fact, never for time: asks again until it holds."""
    pause = threading.Event()
    for _ in range(int(limit_s / 0.05)):
        if fact():
            return
        pause.wait(0.05)
    raise AssertionError("what was waited for did not happen")


def run(model, inputs, truth, *, at: dict[int, object]) -> None:
    """Stream all inputs; after the given numbers of answers do what `at` says. Every answer is checked."""
    answers = 0
    for y, expected_y in zip(model.map(inputs, in_flight=8, deadline_s=60), truth, strict=True):
        assert np.array_equal(y, expected_y)
        answers += 1
        if (act := at.get(answers)) is not None:
            act()
    assert answers == len(truth)


def test_a_killed_and_a_stopped_worker_change_no_answer(inputs, truth):
    with adapt.LocalCluster(workers=4) as cluster, adapt.Client(cluster.address) as client:
        model = client.deploy("torchvision/resnet18", stages=4, seed=0, input_shape=(1, 3, 128, 128))
        run(model, inputs, truth, at={10: cluster.workers[1].kill, 20: cluster.workers[2].stop})
        wait_until(lambda: list(states(client).values()).count("lost") == 2)
        assert counters(client)["requests_ok"] == COUNT

        before = counters(client).get("late_answers", 0)
        cluster.workers[2].resume()  # it wakes with its old attempts
        wait_until(lambda: states(client)[cluster.workers[2].name] == "ready")
        run(model, inputs, truth, at={})
        after = counters(client)
        assert after["requests_ok"] == 2 * COUNT
        assert after.get("late_answers", 0) >= before


def test_a_stage_that_a_dead_worker_had_is_ready_elsewhere(inputs, truth):
    with adapt.LocalCluster(workers=3) as cluster, adapt.Client(cluster.address) as client:
        model = client.deploy("torchvision/resnet18", stages=3, seed=0, input_shape=(1, 3, 128, 128))
        stages = model.record.stages

        def is_twice(artifact: str) -> bool:
            return sum(artifact in worker.resident for worker in client.status().workers) == 2

        wait_until(lambda: all(is_twice(stage.artifact) for stage in stages))
        (victim,) = (worker for worker in cluster.workers if worker.name in stages[1].workers)
        run(model, inputs, truth, at={10: victim.kill})
        assert (counters(client)["spares_used"], counters(client)["stages_moved"]) == (1, 1)


def test_a_worker_that_starts_in_mid_run_takes_work(inputs, truth):
    with adapt.LocalCluster(workers=2) as cluster, adapt.Client(cluster.address) as client:
        model = client.deploy("torchvision/resnet18", stages=4, seed=0, input_shape=(1, 3, 128, 128))
        newcomers = []
        run(model, inputs, truth, at={8: lambda: newcomers.append(cluster.add_worker())})
        wait_until(lambda: any(w.worker_id == newcomers[0].name and w.resident for w in client.status().workers))
        run(model, inputs, truth, at={})
        done = {worker.worker_id: worker.tasks_done for worker in client.status().workers}
        assert done[newcomers[0].name] > 0


def test_a_restarted_dispatcher_is_found_again(inputs, truth):
    with adapt.LocalCluster(workers=3) as cluster, adapt.Client(cluster.address) as client:
        model = client.deploy("torchvision/resnet18", stages=3, seed=0, input_shape=(1, 3, 128, 128))
        first_term = client.status().term

        def restart() -> None:
            cluster.dispatcher.kill()
            cluster.dispatcher.restart()

        run(model, inputs, truth, at={12: restart})
        assert client.status().term > first_term


def test_a_drained_worker_hands_its_work_on_and_leaves_with_status_0(inputs, truth):
    with adapt.LocalCluster(workers=3) as cluster, adapt.Client(cluster.address) as client:
        model = client.deploy("torchvision/resnet18", stages=3, seed=0, input_shape=(1, 3, 128, 128))
        leaver = cluster.workers[0]
        run(model, inputs, truth, at={10: leaver.terminate})
        assert leaver.wait(timeout_s=30) == 0
        assert counters(client).get("evictions", 0) == 0


def test_a_worker_that_was_cut_off_and_comes_back_loses_nothing(inputs, truth):
    """Stopped for less than the grace: what it answers afterwards may be used or dropped, never believed twice."""
    with adapt.LocalCluster(workers=2) as cluster, adapt.Client(cluster.address) as client:
        model = client.deploy("torchvision/resnet18", stages=2, seed=0, input_shape=(1, 3, 128, 128))
        sleeper = cluster.workers[0]
        wake = threading.Timer(1.0, sleeper.resume)

        def doze() -> None:
            sleeper.stop()
            wake.start()

        run(model, inputs, truth, at={10: doze})
        wake.join()
