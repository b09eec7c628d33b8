"""Ray: one actor for each stage of a pipe, or for each copy of the whole model. References are handed on; the driver never sees what is
between two stages."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.harness.contest import Array, Run, windowed

OBJECT_STORE_BYTES = 512 << 20


class RayStages:
    """Actors on this machine, with one core each.

    Args:
        files: of the stages, in order.
        copies: how many actors have each of them.
    """

    def __init__(self, files: Sequence[Path], *, copies: int = 1) -> None:
        import ray

        self._ray = ray
        self.name = "ray-pipe" if copies == 1 else "ray-parallel"
        self._files, self._copies = [str(file) for file in files], copies

    def __enter__(self) -> Self:
        ray = self._ray
        settings = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
        ray.init(num_cpus=self._copies * len(self._files), object_store_memory=OBJECT_STORE_BYTES, **settings)
        actor = ray.remote(_Actor)
        stages = [[actor.remote(file) for _ in range(self._copies)] for file in self._files]
        pids = ray.get([one.pid.remote() for copies in stages for one in copies])  # also waits until all are loaded
        self._pids = {"client": os.getpid()} | {f"worker {index}": pid for index, pid in enumerate(pids, start=1)}
        self._turns = [itertools.cycle(copies) for copies in stages]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ray.shutdown()

    def run(self, inputs: Sequence[Array], *, in_flight: int) -> Run:
        return windowed(inputs, in_flight=in_flight, submit=self._submit, result=lambda reference: self._ray.get(reference)[0])

    def _submit(self, value: Array) -> Any:
        passed: Any = [value]
        for turns in self._turns:
            passed = next(turns).run.remote(passed)
        return passed

    def processes(self) -> dict[str, int]:
        return dict(self._pids)


class _Actor:
    def __init__(self, file: str) -> None:
        from bench.contestants.stages import ArrayStage

        self._stage = ArrayStage(file)

    def run(self, values: Sequence[Any]) -> list[Any]:
        return self._stage(values)

    def pid(self) -> int:
        return os.getpid()
