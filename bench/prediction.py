"""Does a cluster do what is predicted of it?

Four emulated devices of unequal CPU shares. `adapt profile` measures a model on them; then it is deployed as the planner has it ("auto") and in
four, three and two stages of about equal cost on so many of the devices. Of each plan that the dispatcher has made, the throughput is predicted
from that profile (`adapt.planning.cost.forecast`), written to a file, and the file's SHA-256 is printed. Only then is it measured: two
and more images in flight for each stage, every answer compared bit for bit with the user's own eager module. All of it in rounds, each with a
profile of its own: a shared machine may be a quarter slower some minutes after it was profiled.

    predicted   images per second, from the round's profile alone: seconds of the stage's layers on this kind of device, and what a worker does
                with a task besides, for each task and for each byte; median over rounds
    computing   the same, if computing were all that a worker does
    measured    median over the windows of all rounds
    error       of the predictions, as share of what was measured: each window against the prediction of its own round; median, and extremes
    busiest     the worker that used most of its CPU share, and how much of it: who limits
    others      cores that other work on this machine kept busy; above 0.1 the figures are those of a crowd

All settings are the defaults of ADAPT but for those that would change plans meanwhile, or load something: `--relief`, `--replan-interval` and
`--spares`. Needs root, for shares of the CPU.

    python bench/prediction.py --quick
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.markup import escape

import adapt
from adapt.emulation.description import ClusterSpec, DeviceSpec
from adapt.emulation.ownership import missing_rights
from adapt.interfaces.tables import print_table
from adapt.models.program import read_graph
from adapt.planning.model import ModelProfile
from adapt.protocol.messages import DeploymentRecord

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python bench/prediction.py` too

from bench.contestants.adapt_stream import AdaptStream
from bench.harness.arguments import RESULTS
from bench.harness.contest import Array
from bench.harness.cpu import OthersMeter, Use, use_of
from bench.harness.ledger import Ledger, Request
from bench.harness.machine import Facts, facts, in_words, lines
from bench.harness.plot import Errors, draw_errors
from bench.harness.present import wide_console
from bench.harness.report import Figure, file_name, number
from bench.harness.sealed import Prediction, digest_of, predict, seal
from bench.workloads.vision import SEED, answers, images

QUESTION = "Does a cluster do what is predicted of it?"
CORES = {"w1": 0.5, "w2": 0.35, "w3": 0.25, "w4": 0.2}  # the rest of two cores is for dispatcher, client and the others of this machine
DEVICES = {4: tuple(CORES), 3: ("w1", "w3", "w4"), 2: ("w1", "w4")}  # for so many stages
MODELS = ("mobilenet_v2", "resnet50", "vgg16")
AUTO = "auto"
PLANS = (AUTO, "4", "3", "2")
GOAL = 0.10  # of the prediction
POOL = 16  # different inputs
PER_WORKER = 3  # images in flight
REPETITIONS = 1000  # of the profile, or as many as a device makes in 20 s: for so long all of them measure at the same time
ROUNDS, QUICK_ROUNDS = 3, 2
WINDOWS = 2  # of each plan in a round
LEAST_S, QUICK_LEAST_S = 6.0, 3.0  # of a window
LEAST_IMAGES = 30  # in a window, as predicted
WARM_IMAGES = 2  # for each one in flight
WAIT_S = 120.0
HOLD_STILL = {"relief": 3600, "replan_interval": 0, "spares": 0}
CROWD_CORES = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One window of one plan.

    Attributes:
        digest: of the prediction of this round, as it was printed before.
        images: whose answers came.
        limiting: workers, as predicted.
        busiest: the worker that used most of its CPU share, and how much of it.
        cpu_s, loop_s: CPU seconds of the busiest for each of its tasks: of all its threads, and of its loop and ZeroMQ's thread.
        compute_s: seconds of its clock while it computes.
    """

    model: str
    plan: str
    stages: str
    digest: str
    round: int
    window: int
    predicted_per_s: float
    computing_per_s: float
    measured_per_s: float
    images: int
    limiting: str
    busiest: str
    busiest_share: float
    cpu_s: float
    loop_s: float
    compute_s: float
    others_cores: float

    @property
    def error(self) -> float:
        return self.predicted_per_s / self.measured_per_s - 1.0


# ── the cluster ──────────────────────────────────────────────────────────────────────────────────────────────────────


def described(names: Sequence[str]) -> ClusterSpec:
    return ClusterSpec(name="prediction", devices=tuple(DeviceSpec(name=name, cores=CORES[name]) for name in names))


def devices_of(plan: str) -> tuple[str, ...]:
    """All, or the most unequal ones."""
    return tuple(CORES) if plan == AUTO else DEVICES[int(plan)]


class Bench:
    """A cluster of these devices, with its client. A context manager; `name` and `processes` are for the meters.

    Workers have done nothing yet: one stage for each, as a dispatcher does not know who is slow. What was measured is in the directory.
    """

    name = "adapt"

    def __init__(self, directory: Path, names: Sequence[str]) -> None:
        self._directory, self._names = directory, names

    def __enter__(self) -> Bench:
        with contextlib.ExitStack() as stack:
            self.cluster = stack.enter_context(
                adapt.EmulatedCluster(described(self._names), directory=self._directory, dispatcher=dict[str, object](HOLD_STILL))
            )
            self.client = stack.enter_context(adapt.Client(self.cluster.address))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def processes(self) -> dict[str, int]:
        return {"client": os.getpid(), "dispatcher": self.cluster.dispatcher.pid, **self.workers()}

    def workers(self) -> dict[str, int]:
        """Process of each that lives."""
        return {device.name: device.pid for device in self.cluster.workers if device.is_alive}

    def record(self, name: str) -> DeploymentRecord | None:
        """Of a deployment, as the plan is now."""
        return next((one for one in self.client.status().deployments if one.name == name), None)

    def deploy(self, model: str, plan: str) -> adapt.Model:
        stages: int | str = AUTO if plan == AUTO else int(plan)
        deployed = self.client.deploy(f"torchvision/{model}", seed=SEED, stages=stages, codec="raw", name=f"{model}-{plan}")
        _until(lambda: self._is_settled(deployed.name), f"{deployed.name} is not resident")
        return deployed

    def _is_settled(self, name: str) -> bool:
        """Whether all stages are where the plan has them."""
        record = self.record(name)
        if record is None:
            return False
        resident = {worker.worker_id: set(worker.resident) for worker in self.client.status().workers if worker.state == "ready"}
        return all(stage.artifact in resident.get(worker, ()) for stage in record.stages for worker in stage.workers)

    def operators(self, record: DeploymentRecord) -> list[int]:
        """Of each stage, counted in its file."""
        folder = self._directory / "state" / "artifacts"
        return [len(read_graph(folder / f"{stage.artifact}.safetensors", verify=False).graph.operators) for stage in record.stages]

    def computed(self) -> dict[str, tuple[float, int]]:
        """Of each worker: seconds on its compute thread, and tasks."""
        return {worker.worker_id: (worker.compute_s, worker.tasks_done) for worker in self.client.status().workers}

    def cpu(self) -> dict[str, Use]:
        """Of each worker that lives."""
        return {name: use_of({name: pid}) for name, pid in self.workers().items()}


def _until(is_so: Callable[[], bool], otherwise: str) -> None:
    limit = time.monotonic() + WAIT_S
    while not is_so():
        if time.monotonic() > limit:
            raise TimeoutError(f"{otherwise} after {WAIT_S:g} s")
        time.sleep(0.05)


# ── one plan ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Task:
    """What is done with one model: inputs and right answers, its profile, and how long and where to."""

    model: str
    pool: Sequence[Array]
    expected: Sequence[Array]
    round: int
    profile: ModelProfile
    windows: int
    least_s: float
    out: Path
    moment: datetime

    def file(self, ending: str) -> Path:
        return file_name(self.out, "prediction", self.moment, f"-{self.model}-{self.round}{ending}")


def predicted(bench: Bench, task: Task, plan: str, record: DeploymentRecord) -> Prediction:
    return predict(
        task.profile,
        plan=plan,
        codec=record.codec,
        operators=bench.operators(record),
        workers=[sorted(stage.workers) for stage in record.stages],
        cores=CORES,
    )


def try_plan(bench: Bench, task: Task, plan: str, console: Console) -> tuple[list[Sample], list[Request]]:
    """Deploy, predict, and then measure. Raises RuntimeError: the plan did not hold still."""
    deployed = bench.deploy(task.model, plan)
    record = bench.record(deployed.name)
    assert record is not None
    foreseen = predicted(bench, task, plan, record)
    digest = seal(foreseen, path := task.file(f"-{plan}.json"))
    console.print(
        f"[bold]{task.model}, {_plan(plan)}[/bold]: {_in_words(foreseen.workers)}; predicted {number(foreseen.rate_per_s)} images/s, limited by "
        f"{'+'.join(foreseen.limiting)}\n  {path.name}  sha256 {digest}",
        highlight=False,
        soft_wrap=True,
    )
    ledger = Ledger(task.pool, task.expected)
    samples = measure(bench, deployed, ledger, task, foreseen, digest)
    after = bench.record(deployed.name)
    if after is None or _plan_of(after) != _plan_of(record):
        raise RuntimeError(f"{deployed.name}: the plan has changed while it was measured")
    rates = Figure.of(sample.measured_per_s for sample in samples)
    error = foreseen.rate_per_s / rates.median - 1
    console.print(
        f"  measured {number(rates.median)} ({number(rates.low)} – {number(rates.high)}), error {error:+.1%}; {samples[-1].busiest} used "
        f"{samples[-1].busiest_share:.0%} of its share: {1e3 * samples[-1].cpu_s:.2f} ms a task, {1e3 * samples[-1].loop_s:.2f} of them "
        "on its loop",
        highlight=False,
        soft_wrap=True,
    )
    bench.client.undeploy(deployed.name)
    return samples, ledger.requests()


def _plan_of(record: DeploymentRecord) -> list[tuple[str, list[str]]]:
    return [(stage.artifact, stage.workers) for stage in record.stages]


def measure(bench: Bench, deployed: adapt.Model, ledger: Ledger, task: Task, foreseen: Prediction, digest: str) -> list[Sample]:
    in_flight = PER_WORKER * sum(map(len, foreseen.workers))
    stream = AdaptStream(deployed, ledger, in_flight)
    try:
        _until(lambda: sum(one.has_ended for one in ledger.requests()) >= WARM_IMAGES * in_flight, "it is not warm")
        length_s = max(task.least_s, LEAST_IMAGES / foreseen.rate_per_s)
        places = [(task.round, window) for window in range(1, task.windows + 1)]
        return [_window(bench, ledger, foreseen, digest, place, length_s) for place in places]
    finally:
        stream.stop()


def _window(bench: Bench, ledger: Ledger, foreseen: Prediction, digest: str, place: tuple[int, int], length_s: float) -> Sample:
    meter, cpu, computed, began = OthersMeter(), bench.cpu(), bench.computed(), time.monotonic()
    meter.begin(bench)  # type: ignore[arg-type]  # of a contestant it needs its processes
    time.sleep(length_s)
    ended = time.monotonic()
    meter.end(bench)  # type: ignore[arg-type]
    used = {name: after - cpu[name] for name, after in bench.cpu().items()}
    busiest = max(used, key=lambda name: used[name].total() / CORES[name])
    loop_s = sum(seconds for (_, kind), seconds in used[busiest].items() if kind in ("main", "io"))
    compute_s, tasks = (after - before for after, before in zip(bench.computed()[busiest], computed[busiest], strict=True))
    moments = [one.ended_s for one in ledger.requests() if one.answers and began <= one.ended_s < ended]
    return Sample(
        model=foreseen.model.removeprefix("torchvision/"),
        plan=foreseen.plan,
        stages=_in_words(foreseen.workers),
        digest=digest,
        round=place[0],
        window=place[1],
        predicted_per_s=foreseen.rate_per_s,
        computing_per_s=foreseen.computing_rate_per_s,
        measured_per_s=rate(moments),
        images=len(moments),
        limiting="+".join(foreseen.limiting),
        busiest=busiest,
        busiest_share=used[busiest].total() / (ended - began) / CORES[busiest],
        cpu_s=used[busiest].total() / max(tasks, 1),
        loop_s=loop_s / max(tasks, 1),
        compute_s=compute_s / max(tasks, 1),
        others_cores=meter.figures(1)["others_cores"],
    )


def _in_words(workers: Sequence[Sequence[str]]) -> str:
    """Stage by stage."""
    return " | ".join("+".join(names) for names in workers)


def rate(moments: Sequence[float]) -> float:
    """Answers per second, from the first to the last: the ends of a window cut off parts of answers. NaN for fewer than two."""
    ordered = sorted(moments)
    return (len(ordered) - 1) / (ordered[-1] - ordered[0]) if len(ordered) > 1 and ordered[-1] > ordered[0] else float("nan")


def try_model(trials: Trials, model: str, plans: Sequence[str], given: argparse.Namespace, moment: datetime, console: Console) -> None:
    """In all rounds; what has come of each plan is added."""
    pool = images(POOL)
    console.print(f"\n[dim]{model}: the eager module's answers, a cluster, and its profile ...[/dim]", highlight=False)
    expected = answers(model, pool, threads=1)
    least_s = (QUICK_LEAST_S if given.quick else LEAST_S) * given.scale
    for round in range(1, (given.rounds or (QUICK_ROUNDS if given.quick else ROUNDS)) + 1):
        with tempfile.TemporaryDirectory(prefix="bench-prediction-") as name:  # where no profile is kept yet
            with Bench(Path(name), tuple(CORES)) as bench:
                profile = bench.client.profile(f"torchvision/{model}", seed=SEED, repetitions=REPETITIONS)
            task = Task(model, pool, expected, round, profile, given.windows, least_s, given.out, moment)
            (path := task.file("-profile.json")).write_text(profile.to_json(), encoding="utf-8")
            _tell_profile(profile, path, console)
            for plan in plans:
                with Bench(Path(name), devices_of(plan)) as bench:
                    trials.add(*try_plan(bench, task, plan, console))


class Trials:
    """What has come of all plans, in all rounds."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self.requests: list[Request] = []

    def add(self, samples: Sequence[Sample], requests: Sequence[Request]) -> None:
        self.samples += samples
        self.requests += requests

    @property
    def bad(self) -> int:
        """Requests that were lost, answered twice or wrongly."""
        return sum(one.answers != 1 or not one.is_right for one in self.requests)


def _tell_profile(profile: ModelProfile, path: Path, console: Console) -> None:
    for kind in profile.measured:
        handling = kind.handling
        console.print(
            f"  {'+'.join(kind.workers)} ({kind.cores:g} cores): {1e3 * sum(kind.costs_s):.1f} ms of computing an image; besides, "
            f"{1e3 * handling.task_s:.2f} ms of a whole core a task and {1e9 * handling.byte_s:.2f} ms a MB",
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"  {path.name}  sha256 {digest_of(profile.to_json())}", highlight=False, soft_wrap=True)


# ── showing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


HEADS = ("model", "plan", "workers", "computing>", "predicted>", "measured>", "error>", "limits: predicted", "busiest", "others>")


def by_plan(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """The windows of each plan of each model, of all rounds."""
    for key in dict.fromkeys((sample.model, sample.plan) for sample in samples):
        yield [sample for sample in samples if (sample.model, sample.plan) == key]


def error_of(samples: Sequence[Sample]) -> Figure:
    """Of each round's prediction against the windows of that round."""
    return Figure.of(sample.error for sample in samples)


def show(console: Console, samples: Sequence[Sample]) -> None:
    console.print()
    print_table(console, QUESTION, HEADS, [_row(group) for group in by_plan(samples)])
    errors = [abs(error_of(group).median) for group in by_plan(samples)]
    within = sum(error <= GOAL for error in errors)
    console.print(f"{within} of {len(errors)} predictions within {GOAL:.0%}; largest error {max(errors):.1%}", highlight=False)


def _row(group: Sequence[Sample]) -> list[str]:
    first, error = group[0], error_of(group)
    computing, foreseen, rates = (
        Figure.of(getattr(sample, name) for sample in group) for name in ("computing_per_s", "predicted_per_s", "measured_per_s")
    )
    busiest, share = max(((sample.busiest, sample.busiest_share) for sample in group), key=lambda item: item[1])
    others = max(sample.others_cores for sample in group)
    return [
        first.model,
        _plan(first.plan),
        _once(sample.stages for sample in group),
        number(computing.median),
        f"[bold]{number(foreseen.median)}[/bold] ({number(foreseen.low)} – {number(foreseen.high)})",
        f"[bold]{number(rates.median)}[/bold] ({number(rates.low)} – {number(rates.high)})",
        f"[{'bold' if abs(error.median) <= GOAL else 'red'}]{error.median:+.1%}[/] ({error.low:+.1%} to {error.high:+.1%})",
        _once(sample.limiting for sample in group),
        f"{busiest}, {share:.0%} of its share",
        number(others) if others <= CROWD_CORES else f"[red]{number(others)}[/red]",
    ]


def _once(words: Iterable[str]) -> str:
    """What several rounds agree on, or each that there was."""
    return " / ".join(dict.fromkeys(words))


def _plan(plan: str) -> str:
    return plan if plan == AUTO else f"{plan} stages"


def draw(path: Path, samples: Sequence[Sample], machine: str) -> None:
    rows = [Errors(f"{group[0].model}, {_plan(group[0].plan)}", error_of(group)) for group in by_plan(samples)]
    shares = ", ".join(f"{cores:g}" for cores in CORES.values())
    foot = f"Dots: median over the windows of all rounds, each against the prediction of its round; whiskers: extremes. Devices of {shares} cores. {machine}"
    draw_errors(path, QUESTION, rows, goal=GOAL, foot=foot)


def write(path: Path, samples: Sequence[Sample], known: Facts) -> None:
    """Every window, one a line, after the facts as comments."""
    with path.open("w", newline="", encoding="utf-8") as file:
        file.writelines(f"# {line}\n" for line in lines(known))
        writer = csv.DictWriter(file, [*(field.name for field in fields(Sample)), "error"])
        writer.writeheader()
        writer.writerows({**asdict(sample), "error": sample.error} for sample in samples)


# ── the door ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def parser() -> argparse.ArgumentParser:
    built = argparse.ArgumentParser(
        prog="python bench/prediction.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    built.add_argument("--quick", action="store_true", help=f"under three minutes: {MODELS[0]} alone, {QUICK_ROUNDS} rounds, short windows")
    built.add_argument("--model", choices=MODELS, help="this model alone")
    built.add_argument("--plan", choices=PLANS, action="append", help="this plan alone; may be repeated")
    built.add_argument("--rounds", type=int, metavar="N", help=f"how often all is done, profiles and all ({ROUNDS}; quick: {QUICK_ROUNDS})")
    built.add_argument("--windows", type=int, default=WINDOWS, metavar="N", help=f"how often each plan is measured in a round ({WINDOWS})")
    built.add_argument("--scale", type=float, default=1.0, metavar="X", help="windows last X times as long (1), or 30 images")
    built.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help=f"folder for files ({RESULTS})")
    built.add_argument("--no-plot", action="store_true", help="write figures, but no picture")
    return built


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0; 1 if an answer was wrong or missing, or a plan changed; 2 for a wrong command line, or without rights."""
    door = parser()
    given = door.parse_args(argv)
    if not 0 < given.scale < float("inf") or given.windows < 1 or (given.rounds is not None and given.rounds < 1):
        door.error("expected positive numbers of rounds and windows, and a positive scale")
    if missing := missing_rights():
        print(f"bench.prediction: no shares of the CPU here: {'; '.join(missing)}", file=sys.stderr)
        return 2
    models = (given.model,) if given.model else MODELS[:1] if given.quick else MODELS
    plans = [plan for plan in PLANS if given.plan is None or plan in given.plan]
    console, known, moment = wide_console(), facts(), datetime.now()  # noqa: DTZ005 - of the person who looks for the file
    console.print(f"[bold]{QUESTION}[/bold]\n[dim]{escape(in_words(known))}[/dim]", highlight=False, soft_wrap=True)
    whole, error = Trials(), None
    try:
        for model in models:
            try_model(whole, model, plans, given, moment, console)
    except (RuntimeError, TimeoutError) as caught:  # what was measured until then is shown all the same
        error = caught
        print(f"bench.prediction: {error}", file=sys.stderr)
    if whole.samples or error is None:
        _present(whole, given, moment, known, console)
    return 1 if whole.bad or error is not None else 0


def _present(whole: Trials, given: argparse.Namespace, moment: datetime, known: Facts, console: Console) -> None:
    show(console, whole.samples)
    console.print(f"{len(whole.requests)} images; lost, answered twice or wrong: {whole.bad}", highlight=False)
    paths = [file_name(given.out, "prediction", moment, ".csv")]
    write(paths[0], whole.samples, known)
    if not given.no_plot:
        try:
            draw(picture := file_name(given.out, "prediction", moment, ".png"), whole.samples, in_words(known))
            paths.append(picture)
        except ImportError as error:
            console.print(f"[dim]no picture: {error}; pip install -e .\\[bench][/dim]", highlight=False, soft_wrap=True)
    console.print(f"\n[dim]written: {escape(', '.join(map(str, paths)))}[/dim]", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
