"""bench/pipeline.py: shares, idle time, and what is refused; no clusters here."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

from bench.contestants.adapt_model import idle_shares
from bench.contestants.relay import _Places
from bench.harness.contest import Run, Sample, WrongAnswerError
from bench.pipeline import CONTESTANTS, FULL, QUICK, Judged, main, shares_of_limits


def test_filling_and_draining_a_pipe_are_not_a_stages_idle_time():
    compute_s, tasks = {"w1": 4.0, "w2": 3.0}, {"w1": 10, "w2": 10}  # 0.4 and 0.3 s per task
    shares = idle_shares(compute_s, tasks, elapsed_s=4.3, is_pipe=True)
    assert shares["w1"] == pytest.approx(0.0)  # all of 4.3 s but the 0.3 in which the last task is with w2
    assert shares["w2"] == pytest.approx(1 - 3.0 / 3.9)
    assert idle_shares(compute_s, tasks, elapsed_s=5.0, is_pipe=False)["w1"] == pytest.approx(0.2)


def test_shares_are_taken_within_a_round():
    def sample(name: str, round: int, rate: float) -> Sample:
        return Sample(name, "s", round, rate, 0.0, 0.0)

    samples = [sample("adapt-pipe", 1, 9.0), sample("limit-pipe", 1, 10.0), sample("adapt-pipe", 2, 4.0), sample("limit-pipe", 2, 5.0)]
    assert [shares_of_limits(one, samples) for one in samples[::2]] == [{"of_pipe": 0.9}, {"of_pipe": 0.8}]


class Answering:
    """A contestant that answers the same to everything."""

    name = "answering"

    def __init__(self, answer: np.ndarray) -> None:
        self._answer = answer

    def run(self, inputs, *, in_flight):
        return Run(1.0, [0.0] * len(inputs), [self._answer] * len(inputs))


def test_an_answer_that_differs_in_one_bit_is_wrong():
    sent, right = np.zeros(3, np.float32), np.ones(3, np.float32)
    wrong = np.nextafter(right, np.float32(2))
    assert Judged(Answering(right), {id(sent): right}).run([sent], in_flight=1).outputs
    with pytest.raises(WrongAnswerError, match="1 of 1"):
        Judged(Answering(wrong), {id(sent): right}).run([sent], in_flight=1)


def test_a_relayed_task_passes_one_worker_of_each_stage():
    places = _Places()
    for route, stage in ((b"a", 0), (b"b", 1), (b"c", 0)):
        places.add(route, stage)
    assert [places.first() for _ in range(4)] == [b"a", b"c", b"a", b"c"]
    assert places.after(b"c") == b"b"
    assert places.after(b"b") is None


def test_every_grid_measures_its_limits():
    for grid in (*FULL, *QUICK):
        assert set(grid.names) <= set(CONTESTANTS)
        assert grid.workers == 1 or {"limit-pipe", "limit-processes"} <= set(grid.names)
        assert "adapt-pipe" in grid.names


def test_what_is_not_measured_is_a_wrong_command_line(capsys):
    for arguments in (["--only", "nobody"], ["--quick", "--model", "vgg16"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
