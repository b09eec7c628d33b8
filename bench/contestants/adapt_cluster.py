"""ADAPT itself, through its public API: dispatcher and two workers started by the doors that users start, and a client in this process.

    client ──▶ dispatcher ──▶ one of two workers, both of which hold the only stage; TCP on loopback, tensors raw

The stage returns a copy of its input. A deployment of one stage on two workers is data-parallel: both have it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import Counter, deque
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

import adapt
from bench.harness.contest import Array, Contestant, Run, windowed

if TYPE_CHECKING:
    from torch import nn

WORKERS = 2
WARM_UP = 8
REPLICA_TIMEOUT_S = 60.0
Shape = tuple[int, ...]
MESSAGES = ("messages_in", "messages_out", "parcels_in", "parcels_out")  # of the dispatcher; a parcel holds one message or several


def identity() -> nn.Module:
    """A module whose output is its input, bit for bit."""
    from torch import nn

    class Identity(nn.Module):
        def forward(self, x: Any) -> Any:
            return x.clone()

    return Identity()


class AdaptCluster:
    """A cluster that echoes arrays of the given shapes; the first dimension of each is the batch."""

    name = "adapt"

    def __init__(self, shapes: Sequence[Shape], *, workers: int = WORKERS) -> None:
        self._shapes, self._count = list(shapes), workers
        self._models: dict[Shape, adapt.Model] = {}

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._cluster = stack.enter_context(adapt.LocalCluster(workers=self._count))
            self._client = stack.enter_context(adapt.Client(self._cluster.address))
            for shape in self._shapes:
                self._models[shape] = self._deploy(shape)
            self._wait_for_replicas()
            for shape in self._shapes:
                self.run([np.zeros(shape, np.float32)] * WARM_UP, in_flight=4)
            self._stack = stack.pop_all()
        return self

    def _deploy(self, shape: Shape) -> adapt.Model:
        return self._client.deploy(identity(), input_shape=shape, name=_name(shape), codec="raw", stages=1)

    def _wait_for_replicas(self) -> None:
        limit = time.monotonic() + REPLICA_TIMEOUT_S
        while not self._is_replicated():
            if time.monotonic() > limit:
                raise TimeoutError(f"not every stage is on all of {self._count} workers")
            time.sleep(0.05)

    def _is_replicated(self) -> bool:
        report = self._client.status()
        wanted = {stage.artifact for record in report.deployments for stage in record.stages}
        return len(report.workers) == self._count and all(wanted <= set(worker.resident) for worker in report.workers)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def run(self, inputs: Sequence[Array], *, in_flight: int) -> Run:
        model = self._models[inputs[0].shape]
        return windowed(inputs, in_flight=in_flight, submit=model.submit, result=lambda future: future.result())

    def processes(self) -> dict[str, int]:
        workers = {f"worker {index + 1}": process.pid for index, process in enumerate(self._cluster.workers)}
        return {"client": os.getpid(), "dispatcher": self._cluster.dispatcher.pid, **workers}

    def counters(self) -> dict[str, float]:
        """What the dispatcher has counted since it started."""
        return dict(self._client.status().counters)


class AdaptAsync(AdaptCluster):
    """The same cluster, asked by an AsyncClient: its sockets live on the loop of the program, which is run for each stretch."""

    name = "adapt-async"

    def run(self, inputs: Sequence[Array], *, in_flight: int) -> Run:
        runs: list[Run] = []  # not returned by the coroutine: asyncio.run ends with the repr of its task, all answers spelt out
        asyncio.run(self._run(inputs, in_flight, runs))
        return runs[0]

    async def _run(self, inputs: Sequence[Array], in_flight: int, runs: list[Run]) -> None:
        async with adapt.AsyncClient(self._cluster.address) as client:
            model = await client.model(_name(inputs[0].shape))
            runs.append(await _windowed(model, inputs, in_flight))


async def _windowed(model: adapt.AsyncModel, inputs: Sequence[Array], in_flight: int) -> Run:
    """As `contest.windowed`, awaited: the oldest answer is waited for when the window is full."""
    outputs: list[Array] = []
    latencies: list[float] = []
    under_way: deque[tuple[adapt.AsyncInferFuture, float]] = deque()
    clock = time.perf_counter

    async def take() -> None:
        future, submitted = under_way.popleft()
        outputs.append(await future)
        latencies.append(clock() - submitted)

    began = clock()
    for value in inputs:
        if len(under_way) >= in_flight:
            await take()
        submitted = clock()
        under_way.append((model.submit(value), submitted))
    while under_way:
        await take()
    return Run(clock() - began, latencies, outputs)


def _name(shape: Shape) -> str:
    return "echo-" + "x".join(map(str, shape))


class MessageMeter:
    """What the dispatcher of ADAPT received and sent, per task: "messages_in per task" and so on. Nothing for others.

    A question for the counters is itself a message in and one out, which is little among thousands.
    """

    def __init__(self) -> None:
        self._before: dict[str, float] = {}
        self._counted = Counter[str]()

    def begin(self, contestant: Contestant) -> None:
        self._before = contestant.counters() if isinstance(contestant, AdaptCluster) else {}

    def end(self, contestant: Contestant) -> None:
        if isinstance(contestant, AdaptCluster):
            after = contestant.counters()
            for name in MESSAGES:
                self._counted[name] += after.get(name, 0.0) - self._before.get(name, 0.0)

    def figures(self, tasks: int) -> dict[str, float]:
        counted = {f"{name} per task": count / tasks for name, count in self._counted.items() if count}
        self._counted.clear()
        return counted
