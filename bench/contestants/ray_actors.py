"""Ray: two actors with one CPU each, asked in turn; large arrays travel through its shared memory."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
import psutil

from bench.harness.contest import Array, Run, windowed

OBJECT_STORE_BYTES = 512 << 20
# The roles of Ray's own processes; the actors are told apart by their pids.
SERVICES = {"gcs_server": "gcs", "raylet": "raylet"}


class RayActors:
    """A local Ray, begun and ended with this contestant."""

    name = "ray"

    def __init__(self, *, workers: int = 2) -> None:
        self._count = workers

    def __enter__(self) -> Self:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when it is imported
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray

        self._ray = ray
        ray.init(
            num_cpus=self._count,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=OBJECT_STORE_BYTES,
        )
        self._actors = [_actor(ray) for _ in range(self._count)]
        self._pids = ray.get([actor.pid.remote() for actor in self._actors])
        self.run([np.zeros((1, 8), np.uint8)] * 8, in_flight=4)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._actors.clear()
        self._ray.shutdown()

    def processes(self) -> dict[str, int]:
        known = {"client": os.getpid()} | {f"worker {index + 1}": pid for index, pid in enumerate(self._pids)}
        for child in psutil.Process().children(recursive=True):
            if child.pid not in self._pids:
                known[_service(child, len(known))] = child.pid
        return known

    def run(self, inputs: Sequence[Array], *, in_flight: int) -> Run:
        turns = itertools.cycle(self._actors)
        return windowed(inputs, in_flight=in_flight, submit=lambda value: next(turns).echo.remote(value), result=self._ray.get)


def _actor(ray: Any) -> Any:
    # Defined in here, it is pickled whole: Ray's processes need not find this module.
    class Echo:
        def echo(self, value: Any) -> Any:
            return value

        def pid(self) -> int:
            return os.getpid()

    return ray.remote(num_cpus=1)(Echo).remote()


def _service(process: psutil.Process, number: int) -> str:
    try:
        return SERVICES.get(process.name(), f"ray other {number}")
    except psutil.Error:
        return f"ray other {number}"
