"""A contest: several systems answer the same inputs, in turns, so that a machine that drifts drifts for all of them.

    round 1:  A B C ... for each setting      round 2:  A B C ...      the figure: the median over rounds, beside its spread

A contestant is a running system. It is opened once, measured many times, and closed. It answers a stream of arrays and keeps a number of
them in flight; the clock stops at the last answer, and only then are the answers compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Run:
    """One stretch of answers.

    Attributes:
        elapsed_s: from the first submission to the last answer.
        latencies_s: of each input, in the order of the inputs.
        outputs: of each input, in their order.
    """

    elapsed_s: float
    latencies_s: list[float]
    outputs: list[Array]


class Contestant(Protocol):
    """A system under measurement. A context manager: inside it the system runs and has answered at least one input."""

    name: str

    def __enter__(self) -> Self: ...
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...

    def run(self, inputs: Sequence[Array], *, in_flight: int) -> Run:
        """Answer all inputs, at most `in_flight` at a time."""
        ...

    def processes(self) -> dict[str, int]:
        """Role -> pid of every process that takes part, this one too, as "client"."""
        ...


@dataclass(slots=True)
class Sample:
    """What one contestant has shown under one setting, in one round."""

    contestant: str
    setting: str
    round: int
    rate_per_s: float
    p50_s: float
    p99_s: float
    extra: dict[str, float] = field(default_factory=dict)  # further figures, units in their names


class Meter(Protocol):
    """Something that is read before and after a contestant runs, and adds up the difference."""

    def begin(self, contestant: Contestant) -> None: ...
    def end(self, contestant: Contestant) -> None: ...

    def figures(self, tasks: int) -> dict[str, float]:
        """What was counted since the last call, with units in the names; `tasks` were answered meanwhile."""
        ...


Check: TypeAlias = Callable[[Array, Array], bool]  # input, output: whether the answer is right


class WrongAnswerError(Exception):
    """A contestant has answered wrongly; a rate of wrong answers is no figure."""


def same(sent: Array, came: Array) -> bool:
    """Whether an echo is one, bit for bit."""
    return came.dtype == sent.dtype and came.shape == sent.shape and came.tobytes() == sent.tobytes()


def measure(
    contestant: Contestant,
    inputs: Sequence[Array],
    *,
    in_flight: int,
    setting: str,
    round: int,
    check: Check,
    stretches: int = 1,
    meters: Sequence[Meter] = (),
) -> Sample:
    """All inputs, as often as there are stretches. Answers are checked after each stretch, while no clock runs and no meter counts.

    Raises:
        WrongAnswerError: an answer is wrong, or missing.
    """
    elapsed_s, latencies = 0.0, list[float]()
    for _ in range(stretches):
        for meter in meters:
            meter.begin(contestant)
        run = contestant.run(inputs, in_flight=in_flight)
        for meter in meters:
            meter.end(contestant)
        _check(contestant.name, setting, inputs, run, check)
        elapsed_s += run.elapsed_s
        latencies += run.latencies_s
    p50_s, p99_s = np.percentile(np.asarray(latencies), [50, 99])
    tasks = len(inputs) * stretches
    extra = {name: value for meter in meters for name, value in meter.figures(tasks).items()}
    return Sample(contestant.name, setting, round, tasks / elapsed_s, float(p50_s), float(p99_s), {"tasks": float(tasks), **extra})


def _check(name: str, setting: str, inputs: Sequence[Array], run: Run, check: Check) -> None:
    if len(run.outputs) != len(inputs):
        raise WrongAnswerError(f"{name}: {len(run.outputs)} answers to {len(inputs)} inputs ({setting})")
    wrong = sum(not check(sent, came) for sent, came in zip(inputs, run.outputs, strict=True))
    if wrong:
        raise WrongAnswerError(f"{name}: {wrong} of {len(inputs)} answers are wrong ({setting})")


def windowed(
    inputs: Sequence[Array],
    *,
    in_flight: int,
    submit: Callable[[Array], Any],
    result: Callable[[Any], Array],
    clock: Callable[[], float] = time.perf_counter,
) -> Run:
    """Run a system with futures: the oldest is waited for when the window is full. Latency ends when its turn to be read has come."""
    outputs: list[Array] = []
    latencies: list[float] = []
    under_way: list[tuple[Any, float]] = []
    read = 0
    began = clock()
    for value in inputs:
        if len(under_way) - read >= in_flight:
            future, submitted = under_way[read]
            outputs.append(result(future))
            latencies.append(clock() - submitted)
            under_way[read] = (None, 0.0)
            read += 1
        submitted = clock()
        under_way.append((submit(value), submitted))
    for future, submitted in under_way[read:]:
        outputs.append(result(future))
        latencies.append(clock() - submitted)
    return Run(clock() - began, latencies, outputs)
