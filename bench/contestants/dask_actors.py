"""Dask: a scheduler, and two workers with one thread each, all processes of their own. Each worker has an actor, asked in turn."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from bench.harness.contest import Array, Run, windowed

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 5.0
NO_DASHBOARD = "--no-dashboard"


class DaskActors:
    """A local Dask without nannies or dashboards."""

    name = "dask"

    def __init__(self, *, workers: int = 2) -> None:
        self._count = workers

    def __enter__(self) -> Self:
        from distributed import Client

        with contextlib.ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-dask-")))
            where = directory / "scheduler.json"
            ends = ["--host", "127.0.0.1", "--port", "0"]
            self._processes = {"scheduler": _start(stack, "scheduler", [*ends, NO_DASHBOARD, "--scheduler-file", str(where)], directory)}
            client = stack.enter_context(
                Client(scheduler_file=str(where), timeout=START_TIMEOUT_S, direct_to_workers=True)
            )  # the default one: its actors need that
            for number in range(1, self._count + 1):
                flags = ["--host", "127.0.0.1", "--nthreads", "1", "--no-nanny", NO_DASHBOARD, "--scheduler-file", str(where)]
                self._processes[f"worker {number}"] = _start(stack, "worker", flags, directory)
            client.wait_for_workers(self._count, timeout=START_TIMEOUT_S)
            self._actors = [_actor(client, address) for address in client.scheduler_info(n_workers=-1)["workers"]]
            self.run([np.zeros((1, 8), np.uint8)] * 8, in_flight=4)
            stack.callback(self._actors.clear)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def processes(self) -> dict[str, int]:
        return {"client": os.getpid()} | {name: process.pid for name, process in self._processes.items()}

    def run(self, inputs: Sequence[Array], *, in_flight: int) -> Run:
        turns = itertools.cycle(self._actors)
        return windowed(inputs, in_flight=in_flight, submit=lambda value: next(turns).echo(value), result=lambda future: future.result())


def _start(stack: contextlib.ExitStack, part: str, flags: Sequence[str], directory: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", f"distributed.cli.dask_{part}", *flags]
    process = subprocess.Popen(command, cwd=directory, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    stack.callback(_end, process)
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _actor(client: Any, address: str) -> Any:
    # Defined in here, it is pickled whole: Dask's processes need not find this module.
    class Echo:
        def echo(self, value: Any) -> Any:
            return value

    return client.submit(Echo, actor=True, workers=[address], pure=False).result()
