"""Dask: a worker process for each stage of a pipe, or for each copy of the whole model; tasks are tied to the workers that have their stage.

Futures are handed on, and workers fetch what they need from each other; the scheduler lives in a thread of this process, as in any script.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.contestants.stages import loaded
from bench.harness.contest import Array, Run, windowed

# Dask has its workers give memory back at once, and torch would have it zeroed again for every operator: half the rate. In place of that,
# what ADAPT's own worker asks of the allocator.
ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}


class DaskStages:
    """A local cluster, one thread in each worker.

    Args:
        files: of the stages, in order.
        copies: how many workers have each of them.
    """

    def __init__(self, files: Sequence[Path], *, copies: int = 1) -> None:
        import dask
        import distributed

        self._dask, self._distributed = dask, distributed
        self.name = "dask-pipe" if copies == 1 else "dask-parallel"
        self._files, self._copies = [str(file) for file in files], copies

    def __enter__(self) -> Self:
        count = self._copies * len(self._files)
        settings = {"threads_per_worker": 1, "processes": True, "dashboard_address": None, "silence_logs": "ERROR"}
        with self._dask.config.set({"distributed.nanny.pre-spawn-environ": ENVIRONMENT}):
            self._cluster = self._distributed.LocalCluster(n_workers=count, memory_limit=0, **settings)
        self._client = self._distributed.Client(self._cluster)
        self._client.wait_for_workers(count, timeout=60)
        workers = sorted(self._client.scheduler_info(n_workers=-1)["workers"])
        places = [workers[index : index + self._copies] for index in range(0, count, self._copies)]
        for file, theirs in zip(self._files, places, strict=True):
            self._client.run(_load, file, workers=theirs)
        pids = self._client.run(os.getpid)
        self._pids = {"client": os.getpid()} | {f"worker {index}": pid for index, pid in enumerate(pids.values(), start=1)}
        self._turns = [itertools.cycle(theirs) for theirs in places]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._client.close()
        self._cluster.close()

    def run(self, inputs: Sequence[Array], *, in_flight: int) -> Run:
        return windowed(inputs, in_flight=in_flight, submit=self._submit, result=lambda future: future.result()[0])

    def _submit(self, value: Array) -> Any:
        passed: Any = [value]
        for file, turns in zip(self._files, self._turns, strict=True):
            passed = self._client.submit(_run, file, passed, workers=[next(turns)], pure=False, allow_other_workers=False)
        return passed

    def processes(self) -> dict[str, int]:
        return dict(self._pids)


def _run(file: str, values: Sequence[Any]) -> list[Any]:
    return loaded(file)(values)


def _load(file: str) -> None:
    loaded(file)
