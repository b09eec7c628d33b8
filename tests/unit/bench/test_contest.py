"""bench/harness/contest.py and rounds.py: who is measured when, how often, and what happens to whoever answers wrongly."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.harness.contest import Array, Run, WrongAnswerError, measure, same, windowed
from bench.harness.rounds import STRETCH_BYTES, Setting, contest, measure_cell, order, stretch_length

TASK_S = 1e-3
POOL = list(np.arange(12, dtype=np.float32).reshape(6, 1, 2))


class Scripted:
    """Answers each input after a made-up millisecond, and writes down what happens to it."""

    def __init__(self, name: str, log: list[str], *, spoil: Any = None, task_s: float = TASK_S) -> None:
        self.name, self._log, self._spoil, self._task_s = name, log, spoil, task_s
        self.asked: list[int] = []

    def __enter__(self) -> Self:
        self._log.append(f"open {self.name}")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._log.append(f"close {self.name}")

    def run(self, inputs: Sequence[Array], *, in_flight: int) -> Run:
        self.asked.append(len(inputs))
        outputs = list(inputs) if self._spoil is None else self._spoil(list(inputs))
        return Run(self._task_s * len(inputs), [self._task_s] * len(inputs), outputs)

    def processes(self) -> dict[str, int]:
        return {}


class Tally:
    """A meter of the calls to itself."""

    def __init__(self) -> None:
        self.stretches = 0

    def begin(self, contestant: Any) -> None:
        self.stretches += 1

    def end(self, contestant: Any) -> None:
        pass

    def figures(self, tasks: int) -> dict[str, float]:
        return {"stretches": float(self.stretches), "seen": float(tasks)}


def missing() -> Any:
    raise ImportError("no module named peer")


def broken() -> Any:
    raise OSError("it does not start")


def test_turns_are_reversed_in_every_second_round():
    assert [order("abc", round) for round in (1, 2, 3)] == [["a", "b", "c"], ["c", "b", "a"], ["a", "b", "c"]]


def test_each_turn_opens_measures_every_setting_and_closes():
    log: list[str] = []
    openers = {name: lambda name=name: Scripted(name, log) for name in ("a", "b")}
    settings = [Setting("s", POOL, 2, cell_s=0.02), Setting("t", POOL, 1, cell_s=0.02)]
    result = contest(openers, settings, rounds=2)
    taken = [(sample.round, sample.contestant, sample.setting) for sample in result.samples]
    assert taken == [(round, name, setting) for round, names in ((1, "ab"), (2, "ba")) for name in names for setting in "st"]
    assert log == ["open a", "close a", "open b", "close b", "open b", "close b", "open a", "close a"]
    assert all(sample.rate_per_s == pytest.approx(1 / TASK_S) and sample.p99_s == TASK_S for sample in result.samples)


def test_those_who_are_kept_open_are_opened_once_and_closed_at_the_end():
    log: list[str] = []
    openers = {name: lambda name=name: Scripted(name, log) for name in ("a", "b")}
    contest(openers, [Setting("s", POOL, 2, cell_s=0.02)], rounds=3, is_kept_open=True)
    assert log == ["open a", "open b", "close b", "close a"]


@pytest.mark.parametrize("is_kept_open", [False, True])
def test_who_is_not_installed_or_breaks_does_not_stop_the_others(is_kept_open):
    openers = {"absent": missing, "broken": broken, "a": lambda: Scripted("a", [])}
    result = contest(openers, [Setting("s", POOL, 2, cell_s=0.02)], rounds=2, is_kept_open=is_kept_open)
    assert [sample.contestant for sample in result.samples] == ["a", "a"]
    assert "no module named peer" in result.absent["absent"] and "bench-peers" in result.absent["absent"]
    assert "it does not start" in result.failed["broken"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda values: values[:-1],
        lambda values: [values[-1], *values[1:]],
        lambda values: [value.astype(np.float64) for value in values],
        lambda values: [value.reshape(2) for value in values],
        lambda values: [value + np.float32(1) for value in values],
    ],
)
def test_a_wrong_answer_ends_the_contest(spoil):
    with pytest.raises(WrongAnswerError, match="liar"):
        contest({"liar": lambda: Scripted("liar", [], spoil=spoil)}, [Setting("s", POOL, 2, cell_s=0.02)], rounds=1)


def test_an_echo_is_compared_bit_by_bit():
    zero, negative, nan = (np.array([value], np.float32) for value in (0.0, -0.0, np.nan))
    assert same(nan, nan.copy()) and not same(zero, negative)


@given(st.integers(1, 40), st.sampled_from([0.005, 0.02, 0.1]), st.sampled_from([1, 4]))
def test_a_cell_is_as_long_as_asked_within_its_bounds(least, cell_s, in_flight):
    contestant = Scripted("a", [])
    sample = measure_cell(contestant, Setting("s", POOL, in_flight, cell_s=cell_s, least=least), round=1)
    wanted = max(round(cell_s / TASK_S), least)
    assert wanted - 1 <= sample.extra["tasks"] <= wanted + 1


def test_answers_that_would_fill_the_memory_are_taken_in_several_stretches():
    big = [np.zeros((1, 8 << 20), np.uint8)] * 2
    setting = Setting("s", big, 2, cell_s=0.1)
    contestant, tally = Scripted("a", []), Tally()
    sample = measure_cell(contestant, setting, round=1, meters=[tally])
    assert max(contestant.asked) == STRETCH_BYTES // big[0].nbytes
    assert sample.extra["stretches"] > 1 and sample.extra["seen"] == sample.extra["tasks"] >= 100


@given(st.integers(1, 200), st.integers(1, 100_000), st.integers(1, 1 << 31))
def test_a_stretch_fills_the_window_twice_or_takes_everything(in_flight, count, size):
    pool = [np.broadcast_to(np.uint8(0), (size,))]
    length = stretch_length(Setting("s", pool, in_flight), count)
    assert 1 <= length <= count
    assert length in (count, 2 * in_flight) or length * size <= STRETCH_BYTES


@given(st.integers(1, 50))
def test_a_setting_repeats_its_pool_in_order(count):
    inputs = Setting("s", POOL, 1).inputs(count)
    assert len(inputs) == count and all(value is POOL[index % len(POOL)] for index, value in enumerate(inputs))


@given(st.integers(1, 30), st.integers(1, 8))
def test_a_window_never_holds_more_than_it_should_and_keeps_the_order(count, in_flight):
    open_now, most = set[int](), 0

    def submit(value: Array) -> int:
        nonlocal most
        open_now.add(int(value))
        most = max(most, len(open_now))
        return int(value)

    def result(future: int) -> Array:
        open_now.remove(future)
        return np.array(future)

    moments = iter(range(10_000))
    run = windowed(
        [np.array(value) for value in range(count)], in_flight=in_flight, submit=submit, result=result, clock=lambda: next(moments)
    )
    assert [int(value) for value in run.outputs] == list(range(count))
    assert most == min(count, in_flight) and not open_now
    assert len(run.latencies_s) == count and min(run.latencies_s) > 0


def test_percentiles_are_those_of_all_stretches_together():
    class Uneven(Scripted):
        def run(self, inputs: Sequence[Array], *, in_flight: int) -> Run:
            self.asked.append(len(inputs))
            latency_s = float(len(self.asked))
            return Run(latency_s, [latency_s] * len(inputs), list(inputs))

    sample = measure(Uneven("a", []), POOL, in_flight=1, setting="s", round=1, check=same, stretches=3)
    assert (sample.p50_s, sample.rate_per_s) == (2.0, 3 * len(POOL) / (1 + 2 + 3))
