"""Processes of our own that compute side by side: the limits, which send nothing, and whoever brings a transport of his own.

    parent ──pipe──▶ members: learn this input (once, before any clock runs) ... run these ──▶ all start at a barrier ──▶ laps

The clock stops when the last member has finished. All clocks are one: CLOCK_MONOTONIC is the machine's.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Protocol, Self, TypeAlias

import numpy as np

from bench.harness.contest import Array, Run

TIMEOUT_S = 300.0
Made = Callable[["Shared"], "Member"]


@dataclass(frozen=True, slots=True)
class Shared:
    """What members share: a barrier to start at, and a number."""

    barrier: Any
    number: Any

    def take(self) -> int:
        """The number, which grows by one."""
        with self.number.get_lock():
            value = int(self.number.value)
            self.number.value += 1
        return value


@dataclass(slots=True)
class Lap:
    """What one member did in one run; answers by their place among the inputs, each with its seconds."""

    began: float
    ended: float
    answers: dict[int, tuple[Array, float]] = field(default_factory=dict)


class Member(Protocol):
    """What one process does; made inside it."""

    def learn(self, value: Array) -> None:
        """Prepare one more input. Inputs are counted from 0."""
        ...

    def run(self, chosen: Sequence[int], in_flight: int) -> Lap:
        """Answer these inputs, or this member's part of them. Waits at the barrier before its clock starts."""
        ...


Order: TypeAlias = tuple[str, Any]


class Gang:
    """A contestant made of such processes.

    Args:
        makers: one for each member; sent to its process and called there.
    """

    def __init__(self, name: str, makers: Sequence[Made]) -> None:
        self.name, self._makers = name, list(makers)
        self._members: list[tuple[Any, Connection]] = []
        self._known: dict[int, tuple[int, Array]] = {}  # id -> place, and the array, so that the id stays its own

    def __enter__(self) -> Self:
        spawn = multiprocessing.get_context("spawn")
        self._shared = Shared(spawn.Barrier(len(self._makers)), spawn.Value("q", 0))
        for make in self._makers:
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_obey, args=(make, self._shared, theirs), daemon=True)
            process.start()
            theirs.close()
            self._members.append((process, ours))
        self._told()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process, connection in self._members:
            process.kill()
            process.join()
            connection.close()
        self._members.clear()

    def processes(self) -> dict[str, int]:
        return {"client": os.getpid()} | {f"worker {index}": process.pid for index, (process, _) in enumerate(self._members, start=1)}

    def run(self, inputs: Sequence[Array], *, in_flight: int) -> Run:
        for value in inputs:
            if id(value) not in self._known:
                self._known[id(value)] = (len(self._known), value)
                self._tell("learn", value)
        self._shared.number.value = 0
        laps: list[Lap] = self._tell("run", ([self._known[id(value)][0] for value in inputs], in_flight))
        answers = {place: answer for lap in laps for place, answer in lap.answers.items()}
        found = [answers[place] for place in sorted(answers)]
        elapsed_s = max(lap.ended for lap in laps) - min(lap.began for lap in laps)
        return Run(elapsed_s, [seconds for _, seconds in found], [output for output, _ in found])

    def _tell(self, word: str, what: Any) -> list[Any]:
        for _, connection in self._members:
            connection.send((word, what))
        return self._told()

    def _told(self) -> list[Any]:
        answers = []
        for _, connection in self._members:
            if not connection.poll(TIMEOUT_S):
                raise TimeoutError(f"{self.name}: a member has not answered for {TIMEOUT_S:g} s")
            answers.append(connection.recv())  # EOFError: it died; its own words are on standard error
        return answers


def _obey(make: Made, shared: Shared, connection: Connection) -> None:
    member = make(shared)
    connection.send("ready")
    while True:
        try:
            word, what = connection.recv()
        except EOFError:
            return
        connection.send(member.learn(what) if word == "learn" else member.run(*what))


# ── the limits ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Eager:
    """The user's own module in a plain loop. Several members share one list of inputs: whoever is free takes the next."""

    model: str
    threads: int

    def __call__(self, shared: Shared) -> Member:
        return _Eager(self, shared)


class _Eager:
    def __init__(self, what: Eager, shared: Shared) -> None:
        import torch

        from adapt.runtime import heap
        from bench.workloads.vision import eager

        heap.keep_freed(heap.ALL_BYTES)
        torch.set_num_threads(what.threads)
        self._torch, self._module, self._shared = torch, eager(what.model), shared
        self._inputs: list[Any] = []

    def learn(self, value: Array) -> None:
        self._inputs.append(self._torch.from_numpy(value))

    def run(self, chosen: Sequence[int], in_flight: int) -> Lap:
        self._shared.barrier.wait()
        lap = Lap(began=time.perf_counter(), ended=0.0)
        with self._torch.inference_mode():
            while (place := self._shared.take()) < len(chosen):
                began = time.perf_counter()
                output = self._module(self._inputs[chosen[place]]).numpy()
                lap.answers[place] = (output, time.perf_counter() - began)
        lap.ended = time.perf_counter()
        return lap


@dataclass(frozen=True, slots=True)
class IdealStage:
    """One stage in a loop over inputs that were computed beforehand. A pipe whose transport is free is as fast as the slowest of these.

    A member that has finished goes on computing until all have: else the slowest would end with a machine of its own.
    """

    files: tuple[str, ...]
    stage: int

    def __call__(self, shared: Shared) -> Member:
        return _IdealStage(self, shared)


class _IdealStage:
    def __init__(self, what: IdealStage, shared: Shared) -> None:
        from bench.contestants.stages import ArrayStage

        self._before = [ArrayStage(file) for file in what.files[: what.stage]]
        self._stage = ArrayStage(what.files[what.stage])
        self._is_last, self._members = what.stage == len(what.files) - 1, len(what.files)
        self._shared = shared
        self._inputs: list[list[Any]] = []

    def learn(self, value: Array) -> None:
        values: list[Any] = [value]
        for stage in self._before:
            values = stage(values)
        self._inputs.append([value if isinstance(value, int) else np.ascontiguousarray(value) for value in values])

    def run(self, chosen: Sequence[int], in_flight: int) -> Lap:
        self._shared.barrier.wait()
        lap = Lap(began=time.perf_counter(), ended=0.0)
        for place, index in enumerate(chosen):
            began = time.perf_counter()
            outputs = self._stage(self._inputs[index])
            if self._is_last:
                lap.answers[place] = (outputs[0], time.perf_counter() - began)
        lap.ended = time.perf_counter()
        self._shared.take()
        while self._shared.number.value < self._members:
            self._stage(self._inputs[chosen[0]])
        return lap
