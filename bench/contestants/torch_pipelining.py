"""torch.distributed.pipelining over gloo: one rank for each stage, each with the same stage file as ADAPT's worker.

    rank 0: splits a batch of k inputs into k microbatches ──gloo──▶ rank 1 ...: the last one has the outputs

Its ways are not quite the others': nobody asks from outside, the inputs lie in rank 0 beforehand, and rank 0 does not wait for the others
between two batches, so that more than k may be under way. There is no time for a single input.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.contestants.gang import Gang, Lap, Member, Shared
from bench.harness.contest import Array, Run


class TorchPipelining(Gang):
    """Ranks as members of a gang."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="bench-gloo-")
        rendezvous = os.path.join(self._folder.name, "rendezvous")
        names = tuple(map(str, files))
        super().__init__("torch-pipelining", [_Rank(names, rank, rendezvous) for rank in range(len(names))])

    def run(self, inputs: Sequence[Array], *, in_flight: int) -> Run:
        """A last batch that is not full is filled up with the first inputs, whose answers do not count."""
        surplus = -len(inputs) % in_flight
        run = super().run([*inputs, *inputs[:surplus]], in_flight=in_flight)
        counted = len(inputs) / (len(inputs) + surplus)
        return Run(run.elapsed_s * counted, run.latencies_s[: len(inputs)], run.outputs[: len(inputs)])

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        super().__exit__(kind, error, trace)
        self._folder.cleanup()

    def __enter__(self) -> Self:
        super().__enter__()
        return self


class _Rank:
    """Makes a member; sent to its process."""

    def __init__(self, files: tuple[str, ...], rank: int, rendezvous: str) -> None:
        self._files, self._rank, self._rendezvous = files, rank, rendezvous

    def __call__(self, shared: Shared) -> Member:
        import torch.distributed as dist

        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", init_method=f"file://{self._rendezvous}", rank=self._rank, world_size=len(self._files))
        return _Piped(self._files, self._rank, shared)


class _Piped:
    def __init__(self, files: tuple[str, ...], rank: int, shared: Shared) -> None:
        import torch

        from adapt.models.interpreter import Stage
        from adapt.models.profiler import example_inputs
        from adapt.runtime import heap

        heap.keep_freed(heap.ALL_BYTES)
        torch.set_num_threads(1)
        self._torch, self._shared, self._rank, self._ranks = torch, shared, rank, len(files)
        stage = Stage.load(files[rank])
        self._module = _module(stage)
        self._examples = example_inputs(stage.inputs, 1)
        self._inputs: list[Any] = []
        self._schedules: dict[int, Any] = {}

    def learn(self, value: Array) -> None:
        self._inputs.append(self._torch.from_numpy(value) if self._rank == 0 else None)

    def run(self, chosen: Sequence[int], in_flight: int) -> Lap:
        schedule = self._schedules.get(in_flight) or self._schedule(in_flight)
        self._shared.barrier.wait()
        lap = Lap(began=time.perf_counter(), ended=0.0)
        for first in range(0, len(chosen), in_flight):
            self._step(schedule, chosen[first : first + in_flight], first, lap)
        lap.ended = time.perf_counter()
        return lap

    def _schedule(self, in_flight: int) -> Any:
        from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

        outputs = self._module(*self._examples)
        device = self._torch.device("cpu")
        stage = PipelineStage(self._module, self._rank, self._ranks, device, input_args=tuple(self._examples), output_args=outputs)
        self._schedules[in_flight] = ScheduleGPipe(stage, in_flight)
        return self._schedules[in_flight]

    def _step(self, schedule: Any, chosen: Sequence[int], first: int, lap: Lap) -> None:
        batch = [self._torch.cat([self._inputs[index] for index in chosen])] if self._rank == 0 else []
        with self._torch.no_grad():
            merged = schedule.eval(*batch)
        if self._rank == self._ranks - 1:
            output = merged[0] if isinstance(merged, (tuple, list)) else merged
            for place, row in enumerate(output.split(1), start=first):
                lap.answers[place] = (row.numpy(), math.nan)


def _module(stage: Any) -> Any:
    """The pipelining wants a module; this one has no parameters of its own."""
    from torch import nn

    class StageModule(nn.Module):
        def forward(self, *values: Any) -> Any:
            outputs = stage.run(list(values))
            return outputs[0] if len(outputs) == 1 else tuple(outputs)

    return StageModule()
