"""adapt plan: how a model would run on a cluster, before there is one."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from adapt.emulation.description import ClusterSpec
from adapt.emulation.facts import cluster_profile
from adapt.emulation.parse import load
from adapt.errors import ConfigError
from adapt.interfaces.cli.deploy import FILE_HELP, add_model_options, add_optimize, read_arguments, read_shape
from adapt.interfaces.cli.doors import OK
from adapt.interfaces.measure import measured
from adapt.interfaces.profile_files import PROFILE_SUFFIX, read_profile, save_profile
from adapt.interfaces.tables import print_table
from adapt.models.layers import profile_model
from adapt.planning.choose import AUTO, STRATEGIES, Planned, compare, plan
from adapt.planning.devices import ClusterProfile
from adapt.planning.model import MEBIBYTE, ModelProfile, typical_codecs
from adapt.protocol.codecs import resolve_codec
from adapt.protocol.messages import NamedSource

ALL = "all"
PLAIN_WIDTH = 140
ABOUT = """\
Say how a model would be cut and placed on a cluster, and how fast it would be. No cluster has to run. MODEL is a profile, a .json file; or a
torchvision model or a .pt2 file that you trust, which are exported and timed here first; seconds are those of a device with one core like this machine's. Devices that
are called as workers that adapt profile has measured take the seconds of these.
"""
EPILOG = """\
examples:
  adapt plan torchvision/resnet50 --cluster pi3 --save-profile resnet50.json
  adapt plan resnet50.json --cluster home.toml --strategy all
  adapt plan resnet50.json --cluster home.toml --what-if 2xpi-1       two more like pi-1
  adapt plan resnet50.json --cluster home.toml --what-if 0xpi-1       without pi-1
"""


def add_to(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "plan",
        help="how a model would run on a cluster",
        description=ABOUT,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", metavar="MODEL", help=f"a profile (.json), a torchvision model such as torchvision/resnet50, or {FILE_HELP}"
    )
    parser.add_argument("--cluster", metavar="CLUSTER", required=True, help="a TOML file, or a ready cluster; see adapt emulate --list")
    parser.add_argument("--strategy", default=AUTO, metavar="NAME", help=f"{', '.join(STRATEGIES)}, or {ALL} to compare (default: {AUTO})")
    parser.add_argument(
        "--what-if", metavar="NxDEVICE", action="append", default=[], help="N more like this device, 0 for without it; may be repeated"
    )
    parser.add_argument("--no-overlap", action="store_true", help="a worker does one thing at a time: receive, compute, send")
    parser.add_argument("--tolerance", type=float, help="allow lossy codecs, with this error as a share of the tensor's standard deviation")
    parser.add_argument("--save-profile", metavar="FILE", type=Path, help="keep the model's profile")
    parser.add_argument("--json", action="store_true", dest="is_json", help="print the plan for programs")
    add_optimize(parser)
    add_model_options(parser)
    return parser


def run(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    cluster = _overlapping(cluster_profile(spec := load(options.cluster)), is_overlapped=not options.no_overlap)
    wishes = [_wish(text, cluster) for text in options.what_if]
    resolve_codec("auto", options.tolerance)
    model = _model(options)
    cluster = _as_measured(cluster, model)
    if options.save_profile is not None:
        save_profile(options.save_profile, model, key="save-profile")
    model = model.within(options.tolerance)
    strategy = AUTO if options.strategy == ALL else options.strategy
    found = compare(model, cluster) if options.strategy == ALL else {strategy: plan(model, cluster, strategy)}
    changed = _changed(cluster, wishes)
    wished = plan(model, changed, strategy) if wishes else None
    if options.is_json:
        print(json.dumps(_plain(model, cluster, found[strategy], changed, wished), indent=1))
        return OK
    console = _console()
    _introduce(console, model, cluster, spec)
    if len(found) > 1:
        _show_strategies(console, found)
    _show(console, model, cluster, found[strategy], "plan")
    if wished is not None:
        _show(console, model, changed, wished, f"with {', '.join(options.what_if)}")
        times = wished.forecast.throughput_per_s / found[strategy].forecast.throughput_per_s
        console.print(f"\n[bold]{times:.2f} times the throughput[/bold] of the cluster as it is", highlight=False)
    return OK


# ── what is planned ──────────────────────────────────────────────────────────────────────────────────────────────────


def _model(options: argparse.Namespace) -> ModelProfile:
    path = Path(options.model)
    return read_profile(path) if path.suffix == PROFILE_SUFFIX else _measured(options)


def _measured(options: argparse.Namespace) -> ModelProfile:
    source = NamedSource(
        model=options.model,
        seed=options.seed,
        model_args=read_arguments(options.model_args),
        input_shape=read_shape(options.input_shape),
        optimize=options.optimize,
    )
    console = Console(stderr=True)

    def told(words: str) -> None:
        console.print(f"{words} ...", style="dim", highlight=False, markup=False)

    with measured(source, progress=told) as (program, costs_s):
        codecs = typical_codecs(tolerance=options.tolerance)
        return profile_model(options.model, program, costs_s, codecs=codecs, reference="one core of the machine that planned")


def _as_measured(cluster: ClusterProfile, model: ModelProfile) -> ClusterProfile:
    """Devices that are called as workers on whose kind the model was measured take the seconds that it took there."""
    devices = (replace(device, costs_s=model.costs_of(device.name), handling=model.handling_of(device.name)) for device in cluster.devices)
    return replace(cluster, devices=tuple(devices))


def _overlapping(cluster: ClusterProfile, *, is_overlapped: bool) -> ClusterProfile:
    return ClusterProfile(cluster.devices, port_bytes_per_s=cluster.port_bytes_per_s, is_overlapped=is_overlapped)


def _wish(text: str, cluster: ClusterProfile) -> tuple[int, str]:
    count, times, name = text.partition("x")
    names = [device.name for device in cluster.devices]
    if not times or not (count.isascii() and count.isdigit()) or int(count[:9]) > 1000:
        raise ConfigError(f"what-if={text!r}: expected how many and of which device, for instance 2x{names[0] if names else 'pi-1'}")
    if name not in names:
        raise ConfigError(f"what-if={text!r}: no worker is called {name}; there are {', '.join(names)}")
    return int(count), name


def _changed(cluster: ClusterProfile, wishes: Sequence[tuple[int, str]]) -> ClusterProfile:
    like = {device.name: device for device in cluster.devices}
    for count, name in wishes:
        cluster = cluster.with_more(like[name], count) if count else cluster.without(name)
    return cluster


# ── what is said ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=PLAIN_WIDTH)


def _introduce(console: Console, model: ModelProfile, cluster: ClusterProfile, spec: ClusterSpec) -> None:
    words = (
        f"{len(model.layers) - 1} legal cuts, {_mib(model.weights_before[-1])} of weights, {_ms(model.seconds_before[-1])} per request "
        f"on {model.reference or 'the reference device'}"
    )
    console.print(f"[bold]{escape(model.name)}[/bold]: {escape(words)}", highlight=False)
    workers = f"{len(cluster.devices)} workers of {len(cluster.classes)} kinds"
    console.print(f"[bold]{escape(spec.name)}[/bold]: {escape(f'{workers}; {spec.about}'.removesuffix('; '))}\n", highlight=False)


def _show_strategies(console: Console, found: Mapping[str, Planned]) -> None:
    best_s = min(planned.forecast.bottleneck_s for planned in found.values())
    columns = ["strategy", "stages>", "workers>", "bottleneck>", "requests/s>", "latency>", "of the best>", "limited by"]
    rows = [_strategy_row(name, planned, best_s) for name, planned in found.items()]
    print_table(console, "strategies", columns, rows)
    if missing := [name for name in STRATEGIES if name not in found]:
        console.print(f"[dim]no plan that fits: {', '.join(missing)}[/dim]", highlight=False)
    console.print()


def _strategy_row(name: str, planned: Planned, best_s: float) -> list[str]:
    judged, workers = planned.forecast, len(planned.forecast.busy_s)
    share = f"{best_s / judged.bottleneck_s:.0%}" if judged.bottleneck_s else "100%"
    cells = [str(len(planned.layout.stages)), str(workers), _ms(judged.bottleneck_s), _rate(judged.throughput_per_s), _ms(judged.latency_s)]
    style = "[bold]{}[/bold]" if name == AUTO else "{}"
    return [style.format(cell) for cell in (name, *cells, share, escape(judged.where))]


def _show(console: Console, model: ModelProfile, cluster: ClusterProfile, planned: Planned, title: str) -> None:
    judged = planned.forecast
    columns = ["stage>", "layers", "worker", "share>", "memory>", "budget>", "busy>", "sends"]
    rows = [row for number in range(len(planned.layout.stages)) for row in _stage_rows(model, cluster, planned, number)]
    print_table(console, f"{title}: {planned.strategy}", columns, rows)
    console.print(
        f"[bold]{_rate(judged.throughput_per_s)} requests/s[/bold], latency {_ms(judged.latency_s)}, bottleneck {_ms(judged.bottleneck_s)} "
        f"({escape(judged.where)})",
        highlight=False,
    )
    console.print(f"[dim]{_gap(planned)}[/dim]\n", highlight=False)


def _stage_rows(model: ModelProfile, cluster: ClusterProfile, planned: Planned, number: int) -> list[list[str]]:
    """A row for each worker of a stage; what they have in common stands in the first."""
    stage, judged = planned.layout.stages[number], planned.forecast
    codec, sent = model.codecs[planned.layout.codecs[number + 1]].name, model.wire_bytes(stage.end, planned.layout.codecs[number + 1])
    first, last = model.layers[stage.begin].place, model.layers[stage.end - 1].place
    rows = []
    for place, number_of_device in enumerate(stage.devices):
        device = cluster.devices[number_of_device]
        common = [str(number + 1), escape(first if first == last else f"{first} – {last}")] if place == 0 else ["", ""]
        busy = judged.busy_s[number_of_device] / judged.bottleneck_s if judged.bottleneck_s else 0.0
        rows.append(
            [
                *common,
                escape(device.name),
                f"{judged.shares[number_of_device]:.0%}",
                _mib(judged.memory_bytes[number_of_device]),
                "-" if device.budget_bytes is None else _mib(device.budget_bytes),
                f"{busy:.0%}",
                f"{sent / 1e3:,.0f} kB, {codec}" if place == 0 else "",
            ]
        )
    return rows


def _gap(planned: Planned) -> str:
    if planned.is_optimal:
        return "no plan has a smaller bottleneck: cuts, workers, replicas and codecs"
    if not math.isfinite(planned.gap):
        return "how far this is from the best plan is not known"
    return f"no plan has a bottleneck below {_ms(planned.bound_s)}: this one is at most {planned.gap:.1%} above the best"


def _plain(
    model: ModelProfile, cluster: ClusterProfile, planned: Planned, changed: ClusterProfile, wished: Planned | None
) -> dict[str, Any]:
    content = {"model": model.name, **_plain_plan(model, cluster, planned)}
    return content if wished is None else {**content, "what_if": _plain_plan(model, changed, wished)}


def _plain_plan(model: ModelProfile, cluster: ClusterProfile, planned: Planned) -> dict[str, Any]:
    judged = planned.forecast
    stages = [
        {
            "end": model.layers[stage.end - 1].end,
            "workers": [cluster.devices[device].name for device in stage.devices],
            "memory_bytes": model.memory_bytes(stage.begin, stage.end),
            "stage_s": seconds,
            "codec": model.codecs[codec].name,
        }
        for stage, seconds, codec in zip(planned.layout.stages, judged.stage_s, planned.layout.codecs[1:], strict=True)
    ]
    figures = {key: value for key, value in asdict(judged).items() if key in ("bottleneck_s", "where", "latency_s")}
    known = {"strategy": planned.strategy, "throughput_per_s": judged.throughput_per_s, **figures, "bound_s": planned.bound_s}
    return {**known, "is_optimal": planned.is_optimal, "stages": stages}


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms"


def _mib(size: float) -> str:
    return f"{size / MEBIBYTE:.1f} MiB"


def _rate(per_s: float) -> str:
    return f"{per_s:,.2f}" if math.isfinite(per_s) else "any number of"
