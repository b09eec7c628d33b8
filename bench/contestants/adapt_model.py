"""ADAPT with a real model: dispatcher and workers started by the doors that users start, and a client in this process.

pipe       as many stages as workers; each has one
parallel   one stage, which every worker has
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import adapt
from bench.harness.contest import Array, Contestant, Run, windowed
from bench.workloads.vision import SEED

ONE_EACH = {"relief": 3600}  # every worker keeps its one stage, as those of the other contestants do
RESIDENT_TIMEOUT_S = 60.0


class AdaptModel:
    """A cluster with one deployment.

    Args:
        model: of torchvision.
        workers: how many, with one thread each.
        is_parallel: every worker has the whole model.
        directory: for everything that the cluster keeps.
    """

    def __init__(self, model: str, *, workers: int, is_parallel: bool, directory: Path) -> None:
        self.name = "adapt-parallel" if is_parallel else "adapt-pipe"
        self._torchvision_name, self._count, self._is_parallel, self._directory = model, workers, is_parallel, directory

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._cluster = stack.enter_context(adapt.LocalCluster(workers=self._count, directory=self._directory, dispatcher=ONE_EACH))
            self._client = stack.enter_context(adapt.Client(self._cluster.address))
            self._model = self._deploy()
            self._wait_until_resident()
            self._stack = stack.pop_all()
        return self

    def _deploy(self) -> adapt.Model:
        stages = 1 if self._is_parallel else self._count
        name = self._torchvision_name
        return self._client.deploy(f"torchvision/{name}", seed=SEED, stages=stages, codec="raw", name=name)

    def _wait_until_resident(self) -> None:
        limit = time.monotonic() + RESIDENT_TIMEOUT_S
        while not self._is_resident():
            if time.monotonic() > limit:
                raise TimeoutError(f"{self.name}: not every worker has its stage after {RESIDENT_TIMEOUT_S:g} s")
            time.sleep(0.05)

    def _is_resident(self) -> bool:
        """Whether every worker has one stage, and together they have all."""
        stages = {stage.artifact for stage in self._model.record.stages}
        held = [set(worker.resident) for worker in self._client.status().workers if worker.state == "ready"]
        return len(held) == self._count and all(len(its) == 1 for its in held) and set().union(*held) == stages

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def run(self, inputs: Sequence[Array], *, in_flight: int) -> Run:
        return windowed(inputs, in_flight=in_flight, submit=self._model.submit, result=lambda future: future.result())

    def processes(self) -> dict[str, int]:
        workers = {f"worker {index}": process.pid for index, process in enumerate(self._cluster.workers, start=1)}
        return {"client": os.getpid(), "dispatcher": self._cluster.dispatcher.pid, **workers}

    @property
    def is_pipe(self) -> bool:
        return not self._is_parallel

    def stage_files(self) -> list[Path]:
        """Of the stages in their order; they stay as long as the directory."""
        return [self._cluster.artifact(stage.artifact) for stage in self._model.record.stages]

    def computed(self) -> dict[str, tuple[float, int]]:
        """Worker -> seconds on its compute thread and number of tasks, since it joined."""
        return {worker.worker_id: (worker.compute_s, worker.tasks_done) for worker in self._client.status().workers}


class BusyMeter:
    """How long the workers of ADAPT computed, as share of the time in which they could.

    A stage of a pipe has nothing to do before its first input has come through the stages before it, nor while the last one passes those
    behind it: that long is taken off, for each other stage its mean time. Figures: `idle_share` of the worker that computed most,
    `idle_share_most` of the idlest, and `compute_s` of the slowest stage per task.
    """

    def __init__(self) -> None:
        self._before: dict[str, tuple[float, int]] = {}
        self._began = self._elapsed_s = 0.0
        self._compute_s: dict[str, float] = {}
        self._tasks: dict[str, int] = {}
        self._is_pipe = False

    def begin(self, contestant: Contestant) -> None:
        inner = getattr(contestant, "inner", contestant)
        if isinstance(inner, AdaptModel):
            self._is_pipe = inner.is_pipe
            self._before = inner.computed()
            self._began = time.perf_counter()

    def end(self, contestant: Contestant) -> None:
        elapsed_s = time.perf_counter() - self._began
        inner = getattr(contestant, "inner", contestant)
        if isinstance(inner, AdaptModel):
            self._elapsed_s += elapsed_s
            for worker, (compute_s, tasks) in inner.computed().items():
                before_s, tasks_before = self._before.get(worker, (0.0, 0))
                self._compute_s[worker] = self._compute_s.get(worker, 0.0) + compute_s - before_s
                self._tasks[worker] = self._tasks.get(worker, 0) + tasks - tasks_before

    def figures(self, tasks: int) -> dict[str, float]:
        if not self._compute_s:
            return {}
        shares = idle_shares(self._compute_s, self._tasks, self._elapsed_s, is_pipe=self._is_pipe)
        slowest = max(self._compute_s, key=self._compute_s.__getitem__)
        return {
            "idle_share": shares[slowest],
            "idle_share_most": max(shares.values()),
            "compute_s": self._compute_s[slowest] / max(self._tasks[slowest], 1),
        }


def idle_shares(compute_s: dict[str, float], tasks: dict[str, int], elapsed_s: float, *, is_pipe: bool) -> dict[str, float]:
    """Worker -> share of its time in which its compute thread did not compute. Filling and draining a pipe are not its time."""
    mean_s = {worker: seconds / max(tasks[worker], 1) for worker, seconds in compute_s.items()}
    shares = {}
    for worker, seconds in compute_s.items():
        others_s = sum(mean_s[other] for other in mean_s if other != worker) if is_pipe else 0.0
        shares[worker] = 1.0 - seconds / (elapsed_s - others_s)
    return shares
