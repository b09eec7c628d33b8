"""adapt profile: what each part of a model takes, on a cluster's devices or on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from adapt.config import VARIABLE_PREFIX, counted
from adapt.errors import ConfigError, ConnectError, ExportUnavailableError
from adapt.interfaces.cli import clients
from adapt.interfaces.cli.deploy import FILE_HELP, add_model_options, read_arguments, read_shape
from adapt.interfaces.cli.doors import OK
from adapt.interfaces.measure import measured
from adapt.interfaces.profile_files import PROFILE_SUFFIX, read_profile, save_profile
from adapt.interfaces.tables import print_table
from adapt.planning.model import MEBIBYTE, STANDARD_TOLERANCE, CodecProfile, ModelProfile
from adapt.protocol.ids import WorkerId
from adapt.protocol.messages import NamedSource
from adapt.runtime import heap
from adapt.runtime.calls import MOST_REPETITIONS, REPETITIONS, ToldShare
from adapt.runtime.client import Client
from adapt.runtime.cores import allowed_cores
from adapt.runtime.profiles import DeviceKind, Measured, believed_codecs, believed_workspace, chosen, combined

PLAIN_WIDTH = 140
MOST_ROWS = 28
LOOK_S = 1.0  # for a dispatcher that nobody has named
HERE = WorkerId("this-machine")
BAR_WIDTH = 12
PLAIN_STEPS = 4  # a step of known length says in plain lines how far it is, so many times
ABOUT = """\
Measure what each part of a model takes. With a running cluster, one worker of each kind of device measures it while it has nothing else to
do; the dispatcher keeps that, and plans what is deployed without a number of stages by it. Without a cluster, this machine measures it.
MODEL is a torchvision model, a .pt2 file that you trust (it is exported here), or a profile (.json) to be shown again.
"""
EPILOG = """\
examples:
  adapt profile torchvision/resnet50                                      on the cluster at $ADAPT_DISPATCHER, or else here
  adapt profile torchvision/resnet50 --device-class cortex-a72            only where this is part of the kind's name
  adapt profile torchvision/resnet50 --here --json r50.json --plot r50.png
  adapt plan r50.json --cluster pi3
"""


def add_to(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "profile",
        help="what each part of a model takes",
        description=ABOUT,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", metavar="MODEL", help=f"a torchvision model such as torchvision/resnet50, a profile (.json), or {FILE_HELP}"
    )
    parser.add_argument("--here", action="store_true", help="measure on this machine, whatever cluster there is")
    parser.add_argument("--device-class", metavar="TEXT", default="", help="only kinds of devices with this in their name")
    parser.add_argument(
        "--repetitions", metavar="N", type=int, default=REPETITIONS, help=f"runs of which the median counts (default: {REPETITIONS})"
    )
    parser.add_argument("--again", action="store_true", help="measure also what the dispatcher has a profile of")
    parser.add_argument("--json", metavar="FILE", type=Path, help="keep the profile, for adapt plan")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw the cost along the model with its legal cuts (PNG)")
    add_model_options(parser)
    clients.add_options(parser)
    return parser


def run(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    if not 1 <= options.repetitions <= MOST_REPETITIONS:
        raise ConfigError(f"repetitions={options.repetitions}: expected 1 to {MOST_REPETITIONS}")
    for key, path in (("json", options.json), ("plot", options.plot)):
        if path is not None and not path.expanduser().parent.is_dir():  # before minutes of measuring
            raise ConfigError(f"{key}={path}: there is no directory {path.parent}")
    model = _profile(options, environ)
    console = Console()
    show(model, console if console.is_terminal else Console(width=PLAIN_WIDTH))
    if options.json is not None:
        save_profile(options.json, model, key="json")
    if options.plot is not None:
        from adapt.interfaces.profile_plot import draw  # matplotlib takes a while

        draw(model, options.plot)
    return OK


# ── what is measured ─────────────────────────────────────────────────────────────────────────────────────────────────


def _profile(options: argparse.Namespace, environ: Mapping[str, str]) -> ModelProfile:
    if Path(options.model).suffix == PROFILE_SUFFIX:
        return read_profile(Path(options.model))
    source = NamedSource(
        model=options.model,
        seed=options.seed,
        model_args=read_arguments(options.model_args),
        input_shape=read_shape(options.input_shape),
    )
    with _progress() as told, ExitStack() as stack:
        client = None if options.here else _client(stack, options, environ, told)
        if client is None:
            return _on_this_machine(options, source, told)
        return client.profile(
            source.model,
            seed=source.seed,
            model_args=source.model_args,
            input_shape=source.input_shape,
            device_class=options.device_class,
            repetitions=options.repetitions,
            again=options.again,
            progress=told,
        )


def _client(stack: ExitStack, options: argparse.Namespace, environ: Mapping[str, str], told: ToldShare) -> Client | None:
    """Of the dispatcher that was named; else of the one at the default address, if there is one."""
    if options.dispatcher or environ.get(f"{VARIABLE_PREFIX}DISPATCHER"):
        return stack.enter_context(clients.connected(options, environ))
    options.timeout = min(options.timeout, LOOK_S)
    try:
        return stack.enter_context(clients.connected(options, environ))
    except ConnectError as error:
        told(f"no dispatcher at {error.address}: profiling on this machine", None)
        return None


def _on_this_machine(options: argparse.Namespace, source: NamedSource, told: ToldShare) -> ModelProfile:
    with measured(source, progress=lambda words: told(words, None)) as (program, quick_s):
        try:
            from adapt.models import devices
            from adapt.models.profiler import Profiler
        except ImportError as error:
            raise ExportUnavailableError(f"this process has no torch to profile with: {error}") from None
        heap.share_one_heap()
        devices.limit_threads(1)
        devices.warm_up("cpu")
        kind = replace(DeviceKind.of(devices.device_facts("cpu", threads=1), allowed_cores()), workers=(HERE,))
        chosen([kind], options.device_class)
        profiler = Profiler(program, repetitions=options.repetitions, cores=kind.cores)
        while profiler.step():
            told("measuring on this machine", profiler.share)
        codecs, workspace = believed_codecs(profiler.codecs), believed_workspace(profiler.workspace_bytes, operators=len(quick_s))
        return combined(source.model, program, [(kind, Measured(profiler.costs_s, codecs=codecs, workspace_bytes=workspace))], quick_s)


@contextmanager
def _progress() -> Iterator[ToldShare]:
    """A bar on a terminal, a few lines elsewhere; on standard error."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _plain(console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        steps: dict[str, tuple[str, TaskID]] = {}  # of each worker, as several may measure at a time; "": before any of them does

        def told(words: str, share: float | None) -> None:
            who = "" if share is None else words.partition(": ")[0]
            if not who and steps.keys() - {""}:  # somebody could not
                bar.console.print(words, style="dim", highlight=False, markup=False, soft_wrap=True)
                return
            for name in {"", who} & steps.keys():
                if steps[name][0] != words:
                    bar.remove_task(steps.pop(name)[1])
            if who not in steps:
                steps[who] = words, bar.add_task(escape(words), total=None)
            bar.update(steps[who][1], completed=share or 0.0, total=None if share is None else 1.0)

        yield told


def _plain(console: Console) -> ToldShare:
    done: dict[str, int] = {}

    def told(words: str, share: float | None) -> None:
        if words not in done:
            done[words] = 0
            console.print(words if share == 1 else f"{words} ...", style="dim", highlight=False, markup=False, soft_wrap=True)
        elif share is not None and share < 1 and int(share * PLAIN_STEPS) > done[words]:
            done[words] = int(share * PLAIN_STEPS)
            console.print(f"{words}, {share:.0%} ...", style="dim", highlight=False, markup=False, soft_wrap=True)

    return told


# ── what is said ─────────────────────────────────────────────────────────────────────────────────────────────────────


def show(model: ModelProfile, console: Console) -> None:
    """The kinds of devices, and the model by its parts: as fine as it fits on a page."""
    words = f"{counted(len(model.layers) - 1, 'legal cut')}, {model.weights_before[-1] / MEBIBYTE:.1f} MiB of weights"
    console.print(f"[bold]{escape(model.name)}[/bold]: {words}", highlight=False)
    kinds = [(kind.device_class, ", ".join(kind.workers), kind.costs_s) for kind in model.measured]
    kinds = kinds or [(model.reference or "the reference device", "-", tuple(layer.cost_s for layer in model.layers))]
    names = [chr(ord("A") + number) if len(kinds) <= 26 else str(number + 1) for number in range(len(kinds))]
    rows = [(name, escape(title), escape(workers), _ms(sum(costs))) for name, (title, workers, costs) in zip(names, kinds, strict=True)]
    print_table(console, "per request, a batch of one", ("", "kind of device", "workers (the first was measured)", "ms>"), rows)
    parts, codecs = _parts(model), _measured_codecs(model)
    columns = [
        "part",
        "cuts>",
        *(f"{name} ms>" for name in names),
        f"share of {names[0]}",
        "weights>",
        "activations>",
        *(["workspace>"] if _has_workspace(model) else []),
        "crosses after it>",
        "least>",
        *(f"{codec.name}>" for codec in codecs),
    ]
    largest_s = max(sum(kinds[0][2][begin:end]) for _, begin, end in parts) or 1.0
    table = [_row(model, place, begin, end, [costs for _, _, costs in kinds], largest_s) for place, begin, end in parts]
    print_table(console, "parts", columns, table)
    console.print(
        "[dim]cuts: where the model may be cut within or after this part; least: what crosses the cheapest of them. "
        f"{_sizes_in_words(model)} in MiB, what crosses in kB{_of_codecs(codecs)}.[/dim]",
        highlight=False,
    )
    for codec in codecs:
        console.print(f"[dim]{_codec_in_words(codec)}[/dim]", highlight=False)


def _has_workspace(model: ModelProfile) -> bool:
    return any(layer.workspace_bytes for layer in model.layers)


def _sizes_in_words(model: ModelProfile) -> str:
    return "Weights, activations and workspace (what kernels take besides)" if _has_workspace(model) else "Weights and activations"


def _measured_codecs(model: ModelProfile) -> list[CodecProfile]:
    """Those of which it is known what they make of each boundary."""
    return [codec for codec in model.codecs if codec.ratios]


def _of_codecs(codecs: Sequence[CodecProfile]) -> str:
    names = " and ".join(codec.name for codec in codecs)
    return f"; {names}: how many times smaller that gets" if codecs else ""


def _codec_in_words(codec: CodecProfile) -> str:
    error = f" (error up to {STANDARD_TOLERANCE:g} standard deviations)" if codec.is_lossy else ""
    cuts = codec.ratios[1:-1]
    places = f" over all, {min(cuts):.2f} to {max(cuts):.2f} at the cuts" if cuts else ""
    speeds = [f"{speed / 1e6:,.0f} MB/s" for speed in (codec.encode_bytes_per_s, codec.decode_bytes_per_s)]
    return f"{codec.name}{error}: {codec.ratio:.2f} times smaller{places}; one core encodes {speeds[0]}, decodes {speeds[1]}"


def _parts(model: ModelProfile) -> list[tuple[str, int, int]]:
    """Consecutive layers whose places begin alike, by as many words as give `MOST_ROWS` parts at most: (place, begin, end)."""
    depth = max((len(layer.place.split(".")) for layer in model.layers), default=1)
    while True:
        begin, parts = 0, []
        for place, layers in groupby(layer.place.split(".")[:depth] for layer in model.layers):
            end = begin + len(list(layers))
            parts.append((".".join(place), begin, end))
            begin = end
        if len(parts) <= MOST_ROWS or depth <= 1:
            return parts if len(parts) <= MOST_ROWS else _merged(parts)
        depth -= 1


def _merged(parts: Sequence[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    step = -(-len(parts) // MOST_ROWS)
    groups = [parts[first : first + step] for first in range(0, len(parts), step)]
    return [(group[0][0] if len(group) == 1 else f"{group[0][0]} – {group[-1][0]}", group[0][1], group[-1][2]) for group in groups]


def _row(model: ModelProfile, place: str, begin: int, end: int, kinds: Sequence[Sequence[float]], largest_s: float) -> list[str]:
    layers, is_last = model.layers[begin:end], end == len(model.layers)
    seconds = sum(kinds[0][begin:end])
    share, length = seconds / (sum(kinds[0]) or 1.0), round(seconds / largest_s * BAR_WIDTH)
    cuts = layers[:-1] if is_last else layers
    return [
        escape(place),
        str(len(cuts)),
        *(_ms(sum(costs[begin:end])) for costs in kinds),
        f"{share:4.0%} {'█' * length or '▏'}",
        f"{sum(layer.weight_bytes for layer in layers) / MEBIBYTE:.1f}",
        f"{max(layer.peak_bytes for layer in layers) / MEBIBYTE:.1f}",
        *([f"{max(layer.workspace_bytes for layer in layers) / MEBIBYTE:.1f}"] if _has_workspace(model) else []),
        f"{layers[-1].output_bytes / 1e3:,.0f}",
        f"{min(layer.output_bytes for layer in cuts) / 1e3:,.0f}" if cuts else "-",
        *(f"{codec.ratio_at(end):.2f}" for codec in _measured_codecs(model)),
    ]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f}"
