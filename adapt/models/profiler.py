"""Seconds per operator, from time stamps of straight runs of the real executor.

Stamps after every operator of one run agree with the time of a stage to within 5 % where it takes 10 ms or more;
hooks on modules miss what is not a module, and floating point operations do not predict time.

`operator_costs_s` is the quick profile of who exports a model. `Profiler` measures a program for a plan: on a worker, beside its work and
within its memory.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import median
from time import perf_counter, thread_time
from typing import Any, NamedTuple

import torch

from adapt.config import counted
from adapt.errors import PlanError
from adapt.models.compressing import Compressing
from adapt.models.cut import Window, legal_cuts, window
from adapt.models.interpreter import Leaf, PausedRun, Stage
from adapt.models.layers import profile_model
from adapt.models.operators import DTYPES
from adapt.models.program import Program, SizeSpec, ValueSpec, size_at
from adapt.models.workspace import measured_workspace
from adapt.planning.model import MEBIBYTE, CodecProfile

SLICE_S = 0.01  # as long as a task that comes may have to wait; one operator may take longer
LEAST_RUNS = 3
ENOUGH_S = 20.0  # of timed runs of one window; a slow device makes fewer


def operator_costs_s(stage: Stage, inputs: Sequence[Leaf], repetitions: int) -> list[float]:
    """Median seconds of each operator over `repetitions` runs at one thread, after one run to warm up."""
    runs = []
    with single_thread():
        stage.run(inputs)
        for _ in range(repetitions):
            runs.append(_timed_run(stage, inputs))
    return [median(times) for times in zip(*runs, strict=True)]


def profile_file(
    path: Path | str, *, batch: int = 1, repetitions: int = 3, device: torch.device | str = "cpu", verify: bool = True
) -> list[float]:
    """Seconds per operator of the program or stage in a file, on made-up inputs; errors as `Stage.load` and `Stage.run`."""
    stage = Stage.load(path, device=device, verify=verify)
    return operator_costs_s(stage, example_inputs(stage.inputs, batch), repetitions)


class _Lap(NamedTuple):
    """One operator in one run: by the clock, and of this thread on the processor."""

    clock_s: float
    cpu_s: float


class _Look(NamedTuple):
    """What crosses a boundary: numbers of the program's values. `is_cut`: and no end of the program, where nothing is permuted."""

    boundary: int
    crossing: tuple[int, ...]
    is_cut: bool = True


class Profiler:
    """Measures a program on this device, a slice at a time, and never holds more than it is given room for.

    A *window* is a run of layers, between two legal cuts, whose weights and activations fit into the room: all of the program, if it does.
    It runs as the stage that it could be, once to warm up and then `repetitions` times on inputs of batch 1: made-up ones for the first
    window, after that what the window before has computed. Then its weights go. Times are differences of medians of prefix times, and so add
    up to what a run takes. In the run to warm up the operators' workspace is measured (workspace.py), and codecs are tried on what crosses each
    boundary (compressing.py).

    Where a quota cuts the CPU off and gives it back every few milliseconds, pauses are longer than most operators, and fall anywhere. There the
    processor's clock is read instead, and what it says divided by the quota: that much longer it takes, as the kernel sees to.

    Args:
        device: where stages run.
        cores: that a control group allows this process, if that is less than the one thread which computes would use; 0: it is not.
        room_bytes: what may be held now; asked before each window.

    Attributes:
        costs_s: median seconds of each operator; None where the room did not suffice for its layer.
        workspace_bytes: the most that each operator took besides its inputs and its result; None there, and where nobody can tell.
        held_bytes: the most that the present window needs.
    """

    def __init__(
        self,
        program: Program,
        *,
        device: torch.device | str = "cpu",
        repetitions: int = 9,
        room_bytes: Callable[[], int] = lambda: 1 << 62,
        cores: float = 0.0,
    ) -> None:
        self._program, self._device, self._room_bytes = program, torch.device(device), room_bytes
        self._repetitions, self._cores = repetitions, cores
        self._operators = len(program.graph.operators)
        self._model = profile_model("", program, [0.0] * self._operators)
        self._cuts = legal_cuts(program)
        self._compressing = Compressing(len(self._model.layers) + 1)
        self.costs_s: list[float | None] = [None] * self._operators
        self.workspace_bytes: list[int | None] = [None] * self._operators
        self.held_bytes = 0
        self._done = 0.0  # operators, those of the present window in part
        self._work = self._measure()

    @property
    def share(self) -> float:
        """How much is done, 0 to 1."""
        return self._done / self._operators if self._operators else 1.0

    @property
    def codecs(self) -> tuple[CodecProfile, ...]:
        """What codecs make of what crosses each boundary, and their speeds on a whole core; where the room did not suffice, as elsewhere."""
        return self._compressing.profiles()

    def step(self) -> bool:
        """Work for about `SLICE_S`, on any thread that computes; not on two at a time. Whether there is more to do.

        Raises:
            PlanError: there is not even room for one layer; says for which and how much.
            WireError, ModelError: the program cannot be run.
            OSError: its file cannot be read.
        """
        until = perf_counter() + SLICE_S
        with torch.inference_mode():
            for _ in self._work:
                if perf_counter() >= until:
                    return True
        return False

    def _measure(self) -> Iterator[None]:
        """Pauses after each operator."""
        begin, count = 0, len(self._model.layers)
        values: list[Leaf] | None = None  # at the beginning of the window; None: to be made up
        while begin < count:
            end = self._window_end(begin)
            if end > begin:
                values = yield from self._measure_window(begin, end, values)
            else:  # no worker of so little memory will run this layer; what follows may still fit
                end, values = begin + 1, None
            begin, self._done = end, float(self._model.layers[end - 1].end)
        self.held_bytes = 0
        if count and all(cost is None for cost in self.costs_s):
            raise PlanError(self._what_is_missing())

    def _window_end(self, begin: int) -> int:
        room_bytes, end = self._room_bytes(), begin
        while end < len(self._model.layers) and self._model.memory_bytes(begin, end + 1) <= room_bytes:
            end += 1
        self.held_bytes = self._model.memory_bytes(begin, end) if end > begin else 0
        return end

    def _measure_window(self, begin: int, end: int, values: list[Leaf] | None) -> Generator[None, None, list[Leaf]]:
        """Returns what crosses at its end."""
        before, after = (self._cuts[number - 1] if 0 < number < len(self._model.layers) else None for number in (begin, end))
        piece = window(self._program, before, after)
        stage = Stage.of(piece.graph, self._program.path, device=self._device, digest=self._program.digest)
        yield
        inputs = example_inputs(stage.inputs, 1) if values is None else values
        if begin == 0:
            self._compressing.take(0, dict(zip(self._program.graph.inputs, inputs, strict=True)))
        looks = self._looks(piece, begin, end, made_up=before.crossing if before is not None and values is None else ())
        first = self._model.layers[begin - 1].end if begin else 0
        operators = self._model.layers[end - 1].end - first
        runs: list[list[_Lap]] = []
        workspace: list[int | None] = []
        outputs: list[Leaf] = []

        def warm_up(run: PausedRun, position: int) -> None:
            workspace.append(_watched_step(stage, run, position))
            if (seen := looks.get(position)) is not None:
                self._compressing.take(seen.boundary, _crossing(stage, run, piece, seen))

        while len(runs) <= LEAST_RUNS or (len(runs) <= self._repetitions and _seconds(runs[1:]) < ENOUGH_S):
            worth = operators / (max(self._repetitions, LEAST_RUNS) + 1)
            self._done = first + worth * len(runs)
            times, outputs = yield from self._timed_run(stage, inputs, worth / max(len(stage), 1), stage.step if runs else warm_up)
            runs.append(times)
        self._keep(piece, runs[1:], workspace)
        return outputs

    def _looks(self, piece: Window, begin: int, end: int, made_up: Sequence[int]) -> dict[int, _Look]:
        """The boundaries of a window, each after the position of its operator at which it is reached, without the first one. What was made up
        says nothing of what crosses there."""
        place_of = {position: place for place, position in enumerate(piece.positions) if position >= 0}
        found = {}
        for boundary in range(begin + 1, min(end, len(self._cuts)) + 1):
            cut = self._cuts[boundary - 1]
            found[place_of[cut.position - 1]] = _Look(boundary, cut.crossing)
        if end == len(self._model.layers):
            found[len(piece.positions) - 1] = _Look(end, self._program.graph.outputs, is_cut=False)
        return {place: look for place, look in found.items() if not set(made_up) & set(look.crossing)}

    def _timed_run(
        self, stage: Stage, inputs: Sequence[Leaf], worth: float, step: Callable[[PausedRun, int], None]
    ) -> Generator[None, None, tuple[list[_Lap], list[Leaf]]]:
        """`worth`: of an operator, for `share`; on a slow device one run may take minutes. `step`: runs the operator of a position."""
        is_cuda = self._device.type == "cuda"
        run = stage.begin(inputs)
        times = []
        for position in range(len(stage)):
            began, used_s = perf_counter(), thread_time()
            step(run, position)
            if is_cuda:
                torch.cuda.synchronize(self._device)
            used_s = thread_time() - used_s
            times.append(_Lap(perf_counter() - began, used_s))
            self._done += worth
            yield
        return times, stage.finish(run)

    def _keep(self, piece: Window, runs: Sequence[Sequence[_Lap]], workspace: Sequence[int | None]) -> None:
        times = [[lap.cpu_s / self._cores if self._cores else lap.clock_s for lap in run] for run in runs]
        prefixes = [median(moments) for moments in zip(*(accumulate(run) for run in times), strict=True)]
        grown = list(accumulate(prefixes, max, initial=0.0))  # medians of two places may come from two runs
        for position, (before, after), taken_bytes in zip(piece.positions, pairwise(grown), workspace, strict=True):
            if position >= 0 and self.costs_s[position] is None:  # a constant is computed in each window that needs it
                self.costs_s[position], self.workspace_bytes[position] = after - before, taken_bytes

    def _what_is_missing(self) -> str:
        sizes = [self._model.memory_bytes(number, number + 1) for number in range(len(self._model.layers))]
        least = min(range(len(sizes)), key=sizes.__getitem__)
        return (
            f"no room to profile any of {counted(len(sizes), 'layer')}: the smallest, {self._model.layers[least].place}, needs "
            f"{sizes[least] / MEBIBYTE:.1f} MiB, and of the stage budget {self._room_bytes() / MEBIBYTE:.1f} MiB are free"
        )


def _watched_step(stage: Stage, run: PausedRun, position: int) -> int | None:
    """Run the operator, and tell its workspace in bytes. What it was the last one to need is held meanwhile: inputs that it frees would count."""
    held = list(run.slots)
    taken_bytes = measured_workspace(lambda: stage.step(run, position), stage.device)
    del held
    return taken_bytes


def _crossing(stage: Stage, run: PausedRun, piece: Window, seen: _Look) -> dict[int, Leaf]:
    """The values of the program that cross there, as they travel."""
    found: dict[int, Leaf] = {}
    for number in seen.crossing:
        for held in piece.held[number]:
            if (leaf := stage.value(run, held.number)) is not None:
                is_permuted = seen.is_cut and held.order is not None and isinstance(leaf, torch.Tensor)
                found[number] = leaf.permute(held.order) if is_permuted else leaf
    return found


def _seconds(runs: Sequence[Sequence[_Lap]]) -> float:
    """That all of them took."""
    return sum(lap.clock_s for run in runs for lap in run)


def example_inputs(specs: Sequence[ValueSpec], batch: int) -> list[Leaf]:
    """Inputs of the right dtypes and shapes: normal numbers, zeros for ints (a valid index anywhere), True for bools."""
    generator = torch.Generator().manual_seed(0)
    return [_example(spec, batch, generator) for spec in specs]


@contextmanager
def single_thread() -> Iterator[None]:
    """Run torch at one thread; the number of threads is a setting of the whole process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _timed_run(stage: Stage, inputs: Sequence[Leaf]) -> list[float]:
    is_cuda = stage.device.type == "cuda"
    moments = []

    def stamp(position: int, result: Any) -> None:
        if is_cuda:
            torch.cuda.synchronize(stage.device)
        moments.append(perf_counter())

    moments.append(perf_counter())
    stage.run(inputs, observe=stamp)
    return [after - before for before, after in pairwise(moments)]


def _example(spec: ValueSpec, batch: int, generator: torch.Generator) -> Leaf:
    if isinstance(spec, SizeSpec):
        return size_at(spec.size, batch)
    dtype, shape = DTYPES[spec.dtype], spec.shape_at(batch)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.ones(shape, dtype=dtype) if dtype is torch.bool else torch.zeros(shape, dtype=dtype)
