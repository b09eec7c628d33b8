"""How close to the ideal does ADAPT come with real models?

    adapt-pipe, relay-pipe, ...          as many stages as workers          beside  limit-pipe: each stage looping alone, the slowest counts
    adapt-parallel, relay-parallel, ...  every worker has the whole model   beside  limit-processes: as many processes that send nothing

Everybody runs the stage files of ADAPT's own plan, at one thread per worker, on the same inputs, one image each; every answer is compared,
bit for bit, with the user's own eager module at the same number of threads. k is the number of inputs in flight. Limits have no k: they are
measured with each, so that every ratio is taken between neighbours in time.

A figure counts from the first submission to the last answer: a pipe of s stages loses (s - 1) of some 50 steps to being filled, which
its limit does not. With more workers than cores the limit of a pipe is no limit: its stages all compute all the time, which those of a real
pipe do not, and the slowest of them suffers for it.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import psutil
from rich.console import Console
from rich.markup import escape

from adapt.interfaces.tables import print_table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python bench/pipeline.py` too

from bench.contestants.adapt_model import AdaptModel, BusyMeter
from bench.contestants.gang import Eager, Gang, IdealStage
from bench.contestants.relay import Relay
from bench.contestants.stages import MakeFrameWork
from bench.harness.arguments import Options, build_parser, choose, read_options
from bench.harness.contest import Array, Contestant, Run, Sample, WrongAnswerError, same
from bench.harness.cpu import use_of
from bench.harness.machine import Facts, facts, in_words
from bench.harness.plot import Bar, Group, Lines, bars, lines
from bench.harness.report import Column, Row, file_name, number, show, show_absent, summarize, write_csv, write_json
from bench.harness.rounds import Opener, Result, Setting, contest
from bench.workloads.vision import answers, images

QUESTION = "How close to the ideal does ADAPT come with real models?"
POOL = 8  # different inputs
SHOWN_IN_FLIGHT = 8  # the k of tables and bars
LIMITS = {"of_pipe": "limit-pipe", "of_processes": "limit-processes", "of_relay": "relay-pipe", "of_one": "limit-1-thread"}

OURS = ("adapt-pipe", "limit-pipe", "adapt-parallel", "limit-processes")  # neighbours, for the sake of their ratios
FLOORS = ("relay-pipe", "limit-1-thread")
PEERS = ("limit-2-threads", "relay-parallel", "torch-pipelining", "ray-pipe", "ray-parallel", "dask-pipe", "dask-parallel")
CONTESTANTS = (*OURS, *FLOORS, *PEERS)


@dataclass(frozen=True, slots=True)
class Grid:
    """One model on one number of workers: who takes part, under which numbers in flight, with at least how many inputs."""

    model: str
    workers: int
    in_flight: tuple[int, ...]
    names: tuple[str, ...]
    least: int = 32

    @property
    def title(self) -> str:
        return f"{self.model}, {self.workers} worker{'s' if self.workers > 1 else ''}"

    def setting(self, in_flight: int) -> str:
        return f"{self.title}, k={in_flight}"

    @property
    def shown(self) -> str:
        """The setting of tables and bars."""
        return self.setting(min(self.in_flight, key=lambda k: abs(k - SHOWN_IN_FLIGHT)))


EVERY_K = (1, 2, 4, 8, 16)
FULL = (
    Grid("resnet50", 2, EVERY_K, CONTESTANTS),
    Grid("resnet50", 1, EVERY_K, ("adapt-pipe", "limit-1-thread", "relay-pipe")),
    Grid("resnet50", 4, EVERY_K, (*OURS, *FLOORS, "relay-parallel")),
    Grid("mobilenet_v2", 2, (1, 8), (*OURS, *FLOORS)),
    Grid("vgg16", 2, (1, 8), (*OURS, *FLOORS), least=16),
)
QUICK = (Grid("resnet50", 2, (SHOWN_IN_FLIGHT,), (*OURS, *FLOORS)),)


# ── who takes part ───────────────────────────────────────────────────────────────────────────────────────────────────


class Judged:
    """A contestant whose answers are compared, after its clock has stopped, with those of the eager module at its number of threads.

    Args:
        is_open: it runs already, and goes on running.
    """

    def __init__(self, inner: Contestant, expected: Mapping[int, Array], *, is_open: bool = False) -> None:
        self.inner, self.name, self._expected, self._is_open = inner, inner.name, expected, is_open

    def __enter__(self) -> Self:
        if not self._is_open:
            self.inner.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._is_open:
            self.inner.__exit__(kind, error, trace)

    def processes(self) -> dict[str, int]:
        return self.inner.processes()

    def run(self, inputs: Sequence[Array], *, in_flight: int) -> Run:
        run = self.inner.run(inputs, in_flight=in_flight)
        wrong = sum(not same(self._expected[id(sent)], came) for sent, came in zip(inputs, run.outputs, strict=True))
        if wrong:
            raise WrongAnswerError(f"{self.name}: {wrong} of {len(inputs)} answers differ from the eager module's")
        return run


def _judged_already(sent: Array, came: Array) -> bool:
    return True


class Field:
    """What everybody of one grid is given: inputs, the right answers, and the stage files of ADAPT's plans.

    ADAPT's own clusters run as long as the field is open: another export may cut elsewhere, and a worker that leaves changes the plan. Idle,
    each of their processes takes 0.3 % of a core.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid, self.pool = grid, images(POOL)
        self._adapt: dict[str, AdaptModel] = {}

    def __enter__(self) -> Self:
        threads = (1, 2) if "limit-2-threads" in self.grid.names else (1,)
        self._expected = {count: self._answers(count) for count in threads}
        with contextlib.ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-pipeline-")))
            for ending in ("pipe", "parallel"):
                if any(name.endswith(ending) for name in self.grid.names):
                    cluster = AdaptModel(
                        self.grid.model, workers=self.grid.workers, is_parallel=ending == "parallel", directory=directory / ending
                    )
                    self._adapt[f"adapt-{ending}"] = stack.enter_context(cluster)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def _answers(self, threads: int) -> dict[int, Array]:
        expected = answers(self.grid.model, self.pool, threads=threads)
        return {id(sent): came for sent, came in zip(self.pool, expected, strict=True)}

    @property
    def pipe(self) -> list[Path]:
        """Stage files of the pipe."""
        return self._adapt["adapt-pipe"].stage_files()

    @property
    def whole(self) -> list[Path]:
        """The one stage file of the whole model."""
        return self._adapt["adapt-parallel"].stage_files()

    def openers(self) -> dict[str, Opener]:
        return {name: self._opener(name) for name in self.grid.names}

    def _opener(self, name: str) -> Opener:
        if (cluster := self._adapt.get(name)) is not None:
            return lambda: Judged(cluster, self._expected[1], is_open=True)
        threads = 2 if name == "limit-2-threads" else 1
        return lambda: Judged(self._contestant(name), self._expected[threads])

    def _contestant(self, name: str) -> Contestant:
        model, workers = self.grid.model, self.grid.workers
        make: dict[str, Callable[[], Contestant]] = {
            "limit-pipe": lambda: Gang(name, [IdealStage(tuple(map(str, self.pipe)), stage) for stage in range(workers)]),
            "limit-processes": lambda: Gang(name, [Eager(model, threads=1)] * workers),
            "limit-1-thread": lambda: Gang(name, [Eager(model, threads=1)]),
            "limit-2-threads": lambda: Gang(name, [Eager(model, threads=2)]),
            "relay-pipe": lambda: self._relay([[MakeFrameWork(file)] for file in self.pipe]),
            "relay-parallel": lambda: self._relay([[MakeFrameWork(file)] * workers for file in self.whole]),
            "torch-pipelining": self._torch_pipelining,
            "ray-pipe": lambda: self._ray(self.pipe, copies=1),
            "ray-parallel": lambda: self._ray(self.whole, copies=workers),
            "dask-pipe": lambda: self._dask(self.pipe, copies=1),
            "dask-parallel": lambda: self._dask(self.whole, copies=workers),
        }
        return make[name]()

    def _relay(self, stages: Sequence[Sequence[MakeFrameWork]]) -> Contestant:
        return Relay("drain", stages=stages, read=_logits, warm_up=self.pool)

    def _torch_pipelining(self) -> Contestant:
        from bench.contestants.torch_pipelining import TorchPipelining

        return TorchPipelining(self.pipe)

    def _ray(self, files: Sequence[Path], *, copies: int) -> Contestant:
        from bench.contestants.ray_stages import RayStages

        return RayStages(files, copies=copies)

    def _dask(self, files: Sequence[Path], *, copies: int) -> Contestant:
        from bench.contestants.dask_stages import DaskStages

        return DaskStages(files, copies=copies)


def _logits(sent: Array, payload: Any) -> Array:
    return np.frombuffer(payload, np.float32).reshape(len(sent), -1)


# ── measuring ────────────────────────────────────────────────────────────────────────────────────────────────────────


class OthersMeter:
    """How many cores the rest of the machine kept busy: a figure taken beside a busy neighbour is none. Figure: `others_cores`."""

    def __init__(self) -> None:
        self._others_s = self._elapsed_s = 0.0

    def begin(self, contestant: Contestant) -> None:
        self._began, self._busy_s, self._own_s = time.monotonic(), _busy_s(), _own_s(contestant)

    def end(self, contestant: Contestant) -> None:
        self._elapsed_s += time.monotonic() - self._began
        self._others_s += (_busy_s() - self._busy_s) - (_own_s(contestant) - self._own_s)

    def figures(self, tasks: int) -> dict[str, float]:
        return {"others_cores": max(self._others_s / self._elapsed_s, 0.0)}


def _busy_s() -> float:
    """CPU seconds that the machine has worked, for whomever."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - times.iowait - times.guest - times.guest_nice  # guests are in user and nice already


def _own_s(contestant: Contestant) -> float:
    return sum(use_of(contestant.processes()).values())


def measure_grid(grid: Grid, options: Options, console: Console) -> Result:
    """Everybody of one grid, in turns."""
    console.print(f"\n[bold]{grid.title}[/bold]: exporting, cutting, and the eager module's answers ...", highlight=False)
    with Field(grid) as field:
        settings = [
            Setting(grid.setting(k), field.pool, k, check=_judged_already, cell_s=options.cell_s, least=grid.least) for k in grid.in_flight
        ]
        result = contest(
            choose(field.openers(), [name for name in options.only if name in grid.names]),
            settings,
            rounds=options.rounds,
            meters=lambda: (BusyMeter(), OthersMeter()),
            is_kept_open=options.is_kept_open,
            console=console,
        )
    for sample in result.samples:
        sample.extra |= shares_of_limits(sample, result.samples)
    return result


def shares_of_limits(sample: Sample, samples: Iterable[Sample]) -> dict[str, float]:
    """The sample's rate as share of each limit's, in the same round and setting."""
    rates = {other.contestant: other.rate_per_s for other in samples if (other.setting, other.round) == (sample.setting, sample.round)}
    return {key: sample.rate_per_s / rates[limit] for key, limit in LIMITS.items() if limit in rates}


def joined(results: Sequence[Result]) -> Result:
    whole = Result()
    for result in results:
        whole.samples += result.samples
        whole.absent |= result.absent
        whole.failed |= result.failed
    return whole


# ── showing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


COLUMNS = [
    Column("contestant", lambda row: row.contestant),
    Column("img/s>", lambda row: f"[bold]{number(row.rate_per_s.median)}[/bold]"),
    Column("low>", lambda row: number(row.rate_per_s.low)),
    Column("high>", lambda row: number(row.rate_per_s.high)),
    Column("ms>", lambda row: number(row.p50_s.median * 1e3)),
    Column("pipe>", lambda row: _percent(row, "of_pipe")),
    Column("procs>", lambda row: _percent(row, "of_processes")),
    Column("relay>", lambda row: _percent(row, "of_relay")),
    Column("idle>", lambda row: _percent(row, "idle_share")),
    Column("others>", lambda row: number(row.extra["others_cores"].median)),
]
LEGEND = (
    "ms: median latency. pipe, procs, relay: share of limit-pipe, limit-processes, relay-pipe, within each round. idle: the compute thread of the worker "
    "that computed most. others: cores that other work on this machine kept busy; above 0.1 the figures are those of a crowd."
)


def _percent(row: Row, key: str) -> str:
    figure = row.extra.get(key)
    return "-" if figure is None or np.isnan(figure.median) else f"{100 * figure.median:.1f}%"


def show_grid(console: Console, grid: Grid, rows: Sequence[Row]) -> None:
    """Rates by number in flight, and everything else for one of them."""
    by_setting = {(row.contestant, row.setting): row for row in rows}
    show(console, [row for row in rows if row.setting == grid.shown], COLUMNS)
    console.print(f"[dim]{LEGEND}[/dim]", highlight=False, soft_wrap=True)
    if len(grid.in_flight) < 2:
        return
    table = [
        [name, *(_rate(by_setting.get((name, grid.setting(k)))) for k in grid.in_flight)]
        for name in grid.names
        if (name, grid.shown) in by_setting
    ]
    console.print()
    print_table(console, f"{grid.title}: images/s by inputs in flight", ["contestant", *(f"k={k}>" for k in grid.in_flight)], table)


def _rate(row: Row | None) -> str:
    return "-" if row is None else number(row.rate_per_s.median)


def draw(path: Path, grids: Sequence[Grid], rows: Sequence[Row], machine: str) -> list[Path]:
    """Bars for all, a picture for each model; lines over the number in flight where there is more than one."""
    paths = []
    for model in dict.fromkeys(grid.model for grid in grids):
        groups = [Group(grid.shown, "images/s", _bars(grid, rows)) for grid in grids if grid.model == model]
        if any(group.bars for group in groups):
            paths.append(path.with_stem(f"{path.stem}-{model}"))
            foot = f"In brackets: share of limit-pipe, or of limit-processes where every worker has the whole model. {machine}"
            bars(paths[-1], QUESTION, [group for group in groups if group.bars], foot=foot)
    curves = [Lines(grid.title, "inputs in flight (k)", "images/s", _series(grid, rows)) for grid in grids if len(grid.in_flight) > 2]
    if curves:
        paths.append(path.with_stem(f"{path.stem}-in-flight"))
        lines(paths[-1], QUESTION, curves, foot=machine)
    return paths


def _bars(grid: Grid, rows: Sequence[Row]) -> list[Bar]:
    return [Bar(row.contestant, row.rate_per_s, _note(row)) for row in rows if row.setting == grid.shown]


def _note(row: Row) -> str:
    key = "of_processes" if row.contestant.endswith("parallel") else "of_pipe"
    return "" if row.contestant.startswith("limit") or key not in row.extra else f"({_percent(row, key)})"


def _series(grid: Grid, rows: Sequence[Row]) -> dict[str, list[tuple[float, Any]]]:
    by_setting = {(row.contestant, row.setting): row for row in rows}
    chosen = [name for name in (*OURS, *FLOORS, "relay-parallel") if (name, grid.shown) in by_setting]
    return {name: [(k, by_setting[name, grid.setting(k)].rate_per_s) for k in grid.in_flight] for name in chosen}


# ── the door ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def parser() -> ArgumentParser:
    built = build_parser("bench.pipeline", QUESTION, CONTESTANTS)
    built.add_argument("--model", choices=sorted({grid.model for grid in FULL}), help="this model alone")
    built.add_argument("--workers", type=int, choices=sorted({grid.workers for grid in FULL}), help="this number of workers alone")
    built.add_argument("--in-flight", type=int, choices=EVERY_K, help="this number in flight alone")
    return built


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0; 1 if an answer was wrong or somebody dropped out; 2 for a wrong command line."""
    door = parser()
    options, given = read_options(door, argv)
    grids = [
        replace(grid, in_flight=tuple(k for k in grid.in_flight if given.in_flight in (None, k)))
        for grid in (QUICK if given.quick else FULL)
        if given.model in (None, grid.model)
        and given.workers in (None, grid.workers)
        and given.in_flight in (None, *grid.in_flight)
        and (not options.only or {*options.only} & {*grid.names})
    ]
    if not grids or {*options.only} - {*CONTESTANTS}:
        door.error("nothing of the sort is measured here; see --help for contestants, models and numbers of workers")
    console, known = Console(), facts()
    console.print(f"[bold]{QUESTION}[/bold]\n[dim]{escape(in_words(known))}[/dim]", highlight=False, soft_wrap=True)
    try:
        result = joined([measure_grid(grid, options, console) for grid in grids])
    except WrongAnswerError as error:
        print(f"bench.pipeline: {error}", file=sys.stderr)
        return 1
    _present(grids, result, options, known, console)
    return 0 if result.samples and not result.failed else 1


def _present(grids: Sequence[Grid], result: Result, options: Options, known: Facts, console: Console) -> None:
    rows = summarize(result.samples)
    for grid in grids:
        show_grid(console, grid, rows)
    show_absent(console, result)
    if not rows:
        return
    now = datetime.now()  # noqa: DTZ005 - of the person who looks for the file
    paths = [file_name(options.out, "pipeline", now, ending) for ending in (".csv", ".json")]
    write_csv(paths[0], result.samples, known)
    write_json(paths[1], "pipeline", rows, result, known)
    if options.is_plotting:
        paths += draw(file_name(options.out, "pipeline", now, ".png"), grids, rows, in_words(known))
    console.print(f"\n[dim]written: {escape(', '.join(map(str, paths)))}[/dim]", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
