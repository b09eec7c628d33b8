"""How close to the optimum do planners come, and how long do they think?

seifer     The published settings of SEIFER (2210.12218): devices strewn over 150 m x 150 m, each pair with log2(1 + 283230 / d^2) Mbit/s, all with
           one memory; only what is sent counts. Bottleneck of each strategy, relative to the optimum or, where that is not known, to a bound that
           is proven for the instance: the strategy is at most so far from the best. Twice: with the published accounting (8 bytes for each
           element / 1.44; memory = bytes of all activations + number of parameters) and with real bytes (float32 as it is; weights and the
           activations that are alive at once).
tight      The same area with 16 and 32 MiB. With 64 and more, ResNet-50 ends in so few stages that most planners find the best; here the order
           of devices matters.
unequal    Devices of unequal speed, memory and links in ADAPT's star, replicas included: all strategies relative to the optimum, or to the bound
           that `auto` leaves.
pipeedge   The same devices in PipeEdge's network (2110.14895): a worker sends to the next one, at the slower of their two rates.
time       Seconds to plan.

    python bench/planner.py --quick
"""

from __future__ import annotations

import csv
import math
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from statistics import mean, median
from time import perf_counter

from rich.console import Console
from rich.markup import escape

from adapt.errors import PlanError
from adapt.interfaces.measure import measured
from adapt.interfaces.tables import print_table
from adapt.models.cut import legal_cuts
from adapt.models.layers import profile_model
from adapt.models.program import Program, ValueRef
from adapt.planning import exact, pairwise, tables
from adapt.planning.choose import AUTO, BASELINES, EXACT, STRATEGIES, plan
from adapt.planning.cost import Layout, fits, forecast
from adapt.planning.devices import ClusterProfile, DeviceProfile, between_ports
from adapt.planning.model import MEBIBYTE, RAW, CodecProfile, LayerProfile, ModelProfile, typical_codecs
from adapt.planning.strategies.seifer import seifer
from adapt.protocol.messages import NamedSource

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python bench/planner.py` too

from bench.harness.arguments import build_parser, read_options
from bench.harness.machine import Facts, facts, in_words
from bench.harness.machine import lines as fact_lines
from bench.harness.plot import Lines, lines
from bench.harness.present import wide_console
from bench.harness.report import Figure, file_name, number

QUESTION = "How close to the optimum do planners come?"
AREA_M = 150.0
ELEMENT_BYTES, PUBLISHED_BYTES, PUBLISHED_RATIO = 4, 8, 1.44
COUNTS = (5, 10, 15, 20, 50)
BUDGETS_MIB = (64, 128, 256, 512)
TIGHT_MIB = (16, 32)
MODELS = ("resnet50", "vgg16", "vgg19", "inception_v3")
QUICK_MODELS = ("resnet50", "vgg16")
SUBSETS = 10  # devices up to which the table over all subsets is the reference
IN_AREA = ("random", "greedy", "seifer", EXACT)
TRIALS, QUICK_TRIALS = 50, 3
UNEQUAL_TRIALS, QUICK_UNEQUAL_TRIALS = 20, 4
PUBLISHED_MEAN = 1.092


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One strategy on one instance.

    Attributes:
        reference: "optimum", "bound" or "none", which is what `ratio` is relative to.
        ratio: NaN if there is no plan.
    """

    part: str
    model: str
    accounting: str
    devices: int
    budget_mib: int
    trial: int
    strategy: str
    reference: str
    bottleneck_s: float
    reference_s: float
    ratio: float
    solve_s: float


# ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def profiles(name: str) -> dict[str, ModelProfile]:
    """accounting -> profile."""
    with measured(NamedSource(model=f"torchvision/{name}", seed=0)) as (program, costs_s):
        real = profile_model(name, program, costs_s, codecs=typical_codecs())
        return {"real": real, "published": published(real, program)}


def published(real: ModelProfile, program: Program) -> ModelProfile:
    """As SEIFER counts: only cuts that one tensor crosses; see the head of this file."""
    single = {cut.position for cut in legal_cuts(program) if len(cut.crossing) == 1} | {real.layers[-1].end}
    layers, begin = list[LayerProfile](), 0
    for layer in real.layers:
        if layer.end in single:
            layers.append(_published_layer(program, begin, layer))
            begin = layer.end
    codec = CodecProfile(name="published", ratio=PUBLISHED_RATIO)
    return ModelProfile(real.name, real.input_bytes // ELEMENT_BYTES * PUBLISHED_BYTES, tuple(layers), (codec,))


def _published_layer(program: Program, begin: int, layer: LayerProfile) -> LayerProfile:
    graph, operators = program.graph, program.graph.operators[begin : layer.end]
    activations = sum(graph.values[output].bytes_at(1) for operator in operators for output in operator.outputs if output is not None)
    weights = {ref.index for operator in operators for ref in _references(operator.args) if not isinstance(ref, ValueRef)}
    parameters = sum(graph.weights[index].stored.size_bytes for index in weights) // ELEMENT_BYTES
    return replace(
        layer,
        cost_s=0.0,
        weight_bytes=activations + parameters,
        peak_bytes=0,
        output_bytes=layer.output_bytes // ELEMENT_BYTES * PUBLISHED_BYTES,
    )


def _references(arguments: Sequence[object]) -> Iterator[object]:
    from adapt.models.program import references

    for argument in arguments:
        yield from references(argument)  # type: ignore[arg-type]


def without_compute(model: ModelProfile) -> ModelProfile:
    """SEIFER counts links only; neither do codecs cost anything there."""
    layers = tuple(replace(layer, cost_s=0.0) for layer in model.layers)
    return replace(model, layers=layers, codecs=(model.codecs[0] if model.codecs[0].ratio != 1 else RAW,))


# ── the published settings ───────────────────────────────────────────────────────────────────────────────────────────


def area(count: int, budget_mib: int, draw: random.Random) -> ClusterProfile:
    places = [(draw.uniform(0, AREA_M), draw.uniform(0, AREA_M)) for _ in range(count)]
    rates = [[math.inf if a is b else _rate(math.dist(a, b)) for b in places] for a in places]
    devices = [DeviceProfile(name=f"edge-{number}", budget_bytes=budget_mib * MEBIBYTE) for number in range(1, count + 1)]
    return ClusterProfile(tuple(devices), pairs=tuple(tuple(row) for row in rates))


def _rate(distance_m: float) -> float:
    return math.log2(1 + 283230 / max(distance_m, 1.0) ** 2) * 1e6 / 8


def in_area(model: ModelProfile, accounting: str, count: int, budget_mib: int, trial: int) -> Iterator[Trial]:
    """All strategies on one draw."""
    cluster = area(count, budget_mib, random.Random(f"{count} {trial}"))
    costs = tables.build(model, cluster)
    timed = {name: _timed(model, cluster, name) for name in ("random", "greedy", "seifer")}
    began = perf_counter()
    found = pairwise.search(costs)
    timed[EXACT] = found.layout, perf_counter() - began
    reference_s, is_optimum = found.bound_s, found.is_proven
    if count <= SUBSETS and found.layout is not None:
        right = exact.solve(costs)
        assert right is not None
        reference_s, is_optimum = forecast(model, cluster, right).bottleneck_s, True
        assert not found.is_proven or math.isclose(reference_s, found.bottleneck_s, rel_tol=1e-9), "two exact solvers disagree"
    kind = "none" if found.layout is None else "optimum" if is_optimum else "bound"
    part = "tight" if budget_mib in TIGHT_MIB else "seifer"
    for name, (layout, solve_s) in timed.items():
        time_s = math.nan if layout is None else forecast(model, cluster, layout).bottleneck_s
        yield Trial(
            part=part,
            model=model.name,
            accounting=accounting,
            devices=count,
            budget_mib=budget_mib,
            trial=trial,
            strategy=name,
            reference=kind,
            bottleneck_s=time_s,
            reference_s=reference_s,
            ratio=_ratio(time_s, reference_s),
            solve_s=solve_s,
        )


def _timed(model: ModelProfile, cluster: ClusterProfile, name: str) -> tuple[Layout | None, float]:
    strategy, began = (seifer if name == "seifer" else BASELINES[name]), perf_counter()
    layout = strategy(model, cluster)
    assert layout is None or fits(model, cluster, layout)
    return layout, perf_counter() - began


def _ratio(time_s: float, reference_s: float) -> float:
    return 1.0 if time_s == reference_s else time_s / reference_s if reference_s > 0 else math.nan


# ── unequal devices ──────────────────────────────────────────────────────────────────────────────────────────────────


def unequal(count: int, kinds: int, draw: random.Random) -> ClusterProfile:
    """Boards from a Raspberry Pi Zero to a small GPU, with links from slow wireless to Gigabit; so many of so many kinds."""
    made = [
        DeviceProfile(
            name=f"kind{number}",
            speed=2 ** draw.uniform(-4, 1),
            budget_bytes=draw.choice(BUDGETS_MIB) * MEBIBYTE,
            down_bytes_per_s=10 ** draw.uniform(0.8, 3) * 1e6 / 8,
            up_bytes_per_s=10 ** draw.uniform(0.8, 3) * 1e6 / 8,
            latency_s=draw.choice((0.0005, 0.005)),
        )
        for number in range(kinds)
    ]
    return ClusterProfile(tuple(replace(made[number % kinds], name=f"d{number}") for number in range(count)))


def on_unequal(model: ModelProfile, count: int, kinds: int, trial: int, *, is_direct: bool = False) -> Iterator[Trial]:
    cluster = unequal(count, kinds, random.Random(f"{count} {kinds} {trial}"))
    if is_direct:
        cluster = replace(cluster, pairs=between_ports(cluster.devices))
    results, solve_s = {}, {}
    for name in STRATEGIES:
        began = perf_counter()
        with suppress(PlanError):
            results[name] = plan(model, cluster, name)
        solve_s[name] = perf_counter() - began
    best = results.get(AUTO)
    reference_s = math.nan if best is None else best.forecast.bottleneck_s if best.is_optimal else best.bound_s
    kind = "none" if best is None else "optimum" if best.is_optimal else "bound"
    for name in STRATEGIES:
        time_s = results[name].forecast.bottleneck_s if name in results else math.nan
        yield Trial(
            part="pipeedge" if is_direct else "unequal",
            model=model.name,
            accounting="real",
            devices=count,
            budget_mib=0,
            trial=trial,
            strategy=name,
            reference=kind,
            bottleneck_s=time_s,
            reference_s=reference_s,
            ratio=_ratio(time_s, reference_s),
            solve_s=solve_s[name],
        )


# ── showing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def show(console: Console, part: str, title: str, trials: Sequence[Trial]) -> None:
    """A row for each number of devices and strategy."""
    chosen = [trial for trial in trials if trial.part == part]
    rows = []
    for count in sorted({trial.devices for trial in chosen}):
        for name in dict.fromkeys(trial.strategy for trial in chosen):
            rows.append(_row(count, name, [trial for trial in chosen if (trial.devices, trial.strategy) == (count, name)]))
    heads = [
        "devices>",
        "strategy",
        "mean ratio>",
        "median>",
        "worst>",
        "no plan>",
        "impossible>",
        "of trials>",
        "reference known>",
        "solve ms>",
        "slowest ms>",
    ]
    console.print()
    print_table(console, title, heads, rows)


def _row(count: int, name: str, trials: Sequence[Trial]) -> list[str]:
    possible = [trial for trial in trials if trial.reference != "none"]
    ratios = [trial.ratio for trial in possible if not math.isnan(trial.ratio)]
    known = sum(trial.reference == "optimum" for trial in possible)
    figures = [f"{function(ratios):.3f}" for function in (mean, median, max)] if ratios else ["-"] * 3
    times = [trial.solve_s * 1e3 for trial in possible] or [math.nan]
    return [
        str(count),
        name,
        *figures,
        str(len(possible) - len(ratios)),
        str(len(trials) - len(possible)),
        str(len(trials)),
        f"{known} optima, {len(possible) - known} bounds",
        number(median(times)),
        number(max(times)),
    ]


def draw(path: Path, trials: Sequence[Trial], machine: str) -> None:
    groups = []
    titles = {
        "seifer": "SEIFER's area",
        "tight": "the same, 16 and 32 MiB, real bytes",
        "unequal": "unequal devices in a star",
        "pipeedge": "the same in PipeEdge's network",
    }
    for part, accounting in (("seifer", "published"), ("seifer", "real"), ("tight", "real"), ("unequal", "real"), ("pipeedge", "real")):
        chosen = [trial for trial in trials if (trial.part, trial.accounting) == (part, accounting) and not math.isnan(trial.ratio)]
        if chosen:
            title = titles[part] + (f", {accounting} bytes" if part == "seifer" else "")
            groups.append(Lines(title, "devices", "bottleneck / optimum or bound", _series(chosen), is_logarithmic=True))
    foot = f"Means; whiskers from the smallest ratio to the 90th percentile. Published mean ratio of SEIFER: {PUBLISHED_MEAN}, over another measure. {machine}"
    lines(path, QUESTION, groups, foot=foot)


def _series(trials: Sequence[Trial]) -> Mapping[str, Sequence[tuple[float, Figure]]]:
    series: dict[str, list[tuple[float, Figure]]] = {}
    for name in dict.fromkeys(trial.strategy for trial in trials):
        for count in sorted({trial.devices for trial in trials}):
            ratios = sorted(trial.ratio for trial in trials if (trial.strategy, trial.devices) == (name, count))
            if ratios:
                high = ratios[min(int(0.9 * len(ratios)), len(ratios) - 1)]
                middle = mean(ratios)
                label = f"adapt {name}" if name in (EXACT, AUTO) else name
                series.setdefault(label, []).append((count, Figure(middle, min(ratios[0], middle), max(high, middle))))
    return series


def write(path: Path, trials: Sequence[Trial], known: Facts) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        file.writelines(f"# {line}\n" for line in fact_lines(known))
        writer = csv.DictWriter(file, [field.name for field in fields(Trial)])
        writer.writeheader()
        writer.writerows(asdict(trial) for trial in trials)


# ── the door ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def measure(models: Mapping[str, Mapping[str, ModelProfile]], counts: tuple[int, int], console: Console) -> list[Trial]:
    """All trials: so many of the area, and of unequal devices."""
    trials: list[Trial] = []
    for name, accountings in models.items():
        for accounting, model in accountings.items():
            began, links_only = perf_counter(), without_compute(model)
            for count in COUNTS:
                for budget_mib in (*TIGHT_MIB, *BUDGETS_MIB):
                    for trial in range(counts[0]):
                        trials += in_area(links_only, accounting, count, budget_mib, trial)
            console.print(f"[dim]{name}, {accounting} bytes: {perf_counter() - began:.0f} s[/dim]", highlight=False)
    model = next(iter(models.values()))["real"]
    for count, kinds in ((4, 4), (8, 3), (16, 4), (20, 5)):
        for trial in range(counts[1]):
            trials += on_unequal(model, count, kinds, trial)
            trials += on_unequal(model, count, kinds, trial, is_direct=True)
    return trials


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0; 2 for a wrong command line."""
    parser = build_parser("bench.planner", QUESTION, STRATEGIES)
    parser.add_argument("--models", default="", metavar="NAME,...", help=f"torchvision models ({','.join(MODELS)})")
    options, given = read_options(parser, argv)
    names = [name for name in given.models.split(",") if name] or (QUICK_MODELS if given.quick else MODELS)
    sizes = (QUICK_TRIALS, QUICK_UNEQUAL_TRIALS) if given.quick else (TRIALS, UNEQUAL_TRIALS)
    counts = (max(round(sizes[0] * given.scale), 1), max(round(sizes[1] * given.scale), 1))
    console, known = wide_console(), facts()
    console.print(f"[bold]{QUESTION}[/bold]\n[dim]{escape(in_words(known))}[/dim]", highlight=False, soft_wrap=True)
    models = {name: profiles(name) for name in names}
    trials = measure(models, counts, console)
    for part, sizes_mib in (("seifer", BUDGETS_MIB), ("tight", TIGHT_MIB)):
        for accounting in ("published", "real"):
            chosen = [trial for trial in trials if trial.accounting == accounting]
            show(console, part, f"SEIFER's area, {sizes_mib[0]} to {sizes_mib[-1]} MiB, {accounting} bytes", chosen)
    show(console, "unequal", f"{names[0]} on unequal devices in a star", trials)
    show(console, "pipeedge", f"{names[0]} on the same devices in PipeEdge's network", trials)
    now = datetime.now()  # noqa: DTZ005 - of the person who looks for the file
    paths = [file_name(options.out, "planner", now, ".csv")]
    write(paths[0], trials, known)
    if options.is_plotting:
        try:
            draw(picture := file_name(options.out, "planner", now, ".png"), trials, in_words(known))
            paths.append(picture)
        except ImportError as error:
            console.print(f"[dim]no picture: {error}; pip install -e .\\[bench][/dim]", highlight=False, soft_wrap=True)
    console.print(f"\n[dim]written: {escape(', '.join(map(str, paths)))}[/dim]", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
