"""Which codec pays at which link rate?

    encode ──▶ link of B bytes/s ──▶ decode        for one message of S bytes, ratio r, encoder E and decoder D bytes/s:

    one after the other   S/E + S/(r B) + S/D   <   S/B        iff   B  <  (1 - 1/r) / (1/E + 1/D)      what a single request waits for
    all at once           max(S/E, S/(r B), S/D)   <   S/B     iff   r > 1 and B < min(E, D)            what limits a stream of requests

E and D are bytes of the tensor, not of what travels, per second of one thread. The tensors are the activations of a network that is trained
here, in seconds, on handwritten digits (see workloads/digits.py); each test image is one message of each cut, and all codecs have their turn
with it before the next one comes. How much of the network's judgement survives is told by running the rest of it on what was decoded.

Every decoded tensor is checked: lossless ones bit for bit, lossy ones against the bound in their header.
"""

from __future__ import annotations

import math
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.markup import escape

from adapt.errors import ConfigError
from adapt.interfaces.tables import print_table
from adapt.protocol.codecs import CODECS, decode, encode, resolve_codec

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python bench/codecs.py` too

from bench.harness.arguments import build_parser, choose, read_options
from bench.harness.contest import Array, Sample, WrongAnswerError, same
from bench.harness.machine import Facts, facts, in_words
from bench.harness.plot import Lines, lines
from bench.harness.report import Figure, Row, file_name, number, summarize, write_csv, write_json
from bench.harness.rounds import Result, order

if TYPE_CHECKING:
    from bench.workloads.digits import Cut

QUESTION = "Which codec pays at which link rate?"
TOLERANCES = (0.01, 0.03, 0.1)
MEGABYTE = 1e6
LINK_RATES = tuple(bits * 1e6 / 8 for bits in (10, 100, 1000, 10_000))  # bytes/s: 10 Mbit/s to 10 Gbit/s
PLOTTED_RATES = (0.3e6, 1e6, 3e6, 10e6, 30e6, 100e6, 300e6, 1e9, 3e9)


@dataclass(frozen=True, slots=True)
class Size:
    """Images of one size, and how long to train on them."""

    side: int
    trained_images: int
    epochs: int


FULL = (Size(16, 1437, 4), Size(64, 1437, 2))
QUICK = (Size(16, 1437, 2), Size(64, 500, 2))
TEST_IMAGES, QUICK_TEST_IMAGES = 360, 90


# ── arithmetic ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Speed:
    """What a codec does to one kind of tensor: how much smaller it gets, and bytes per second of each direction."""

    ratio: float
    encode_per_s: float
    decode_per_s: float

    def serial_s(self, link_per_s: float) -> float:
        """Seconds per byte if encoder, link and decoder wait for each other."""
        return 1 / self.encode_per_s + 1 / (self.ratio * link_per_s) + 1 / self.decode_per_s

    def pipelined_s(self, link_per_s: float) -> float:
        """Seconds per byte if all three work at once on different tensors."""
        return max(1 / self.encode_per_s, 1 / (self.ratio * link_per_s), 1 / self.decode_per_s)

    @property
    def serial_break_even(self) -> float:
        """Below this link rate a single tensor arrives sooner than raw; 0 if never."""
        return max((1 - 1 / self.ratio) / (1 / self.encode_per_s + 1 / self.decode_per_s), 0.0)

    @property
    def pipelined_break_even(self) -> float:
        """Below this link rate a stream of tensors is faster than raw; 0 if never."""
        return min(self.encode_per_s, self.decode_per_s) if self.ratio > 1 else 0.0


RAW = Speed(1.0, math.inf, math.inf)  # nothing is done to it


def gain(speed: Speed, link_per_s: float, *, is_serial: bool) -> float:
    """How many times sooner than raw."""
    seconds = Speed.serial_s if is_serial else Speed.pipelined_s
    return seconds(RAW, link_per_s) / seconds(speed, link_per_s)


def best(speeds: Mapping[str, Speed], link_per_s: float, *, is_serial: bool) -> str:
    """The name of the codec with the largest gain; "raw" where none has one."""
    gains = {"raw": 1.0} | {name: gain(speed, link_per_s, is_serial=is_serial) for name, speed in speeds.items() if name != "raw"}
    return max(gains, key=gains.__getitem__)


# ── measuring ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked of `encode`."""

    codec: str
    tolerance: float | None

    @property
    def name(self) -> str:
        return self.codec if self.tolerance is None else f"{self.codec} {self.tolerance:g}"


def wishes() -> list[Wish]:
    """All codecs that the protocol has, with every tolerance where they need one."""
    return [Wish(codec, tolerance) for codec in CODECS for tolerance in (TOLERANCES if _needs_tolerance(codec) else (None,))]


def _needs_tolerance(codec: str) -> bool:
    try:
        resolve_codec(codec, None)
    except ConfigError:
        return True
    return False


@dataclass(frozen=True, slots=True)
class Trial:
    """One tensor there and back."""

    encode_s: float
    decode_s: float
    sent_bytes: int
    error_share: float  # largest error, in standard deviations of the tensor
    decoded: Array


def tried(wish: Wish, array: Array, where: str) -> Trial:
    """Raises WrongAnswerError: what came back is not what the header promises."""
    began = perf_counter()
    header, payload = encode(array, codec=wish.codec, tolerance=wish.tolerance)
    encoded = perf_counter()
    decoded = decode(header, payload, limit_bytes=array.nbytes)
    ended = perf_counter()
    error = float(np.abs(decoded - array).max())
    if not same(array, decoded) if header.bound == 0 else not error <= header.bound:
        raise WrongAnswerError(f"{wish.name}: an error of {error:g} where {header.bound:g} is promised ({where})")
    return Trial(encoded - began, ended - encoded, header.payload_bytes, error / float(array.std() or 1.0), decoded)


def measure_cut(cut: Cut, chosen: Sequence[Wish], rounds: int) -> list[Sample]:
    """All codecs on all messages of one cut, `rounds` times."""
    samples, named = list[Sample](), {wish.name: wish for wish in chosen}
    right = cut.top1(cut.activations)
    for round in range(1, rounds + 1):
        trials: dict[str, list[Trial]] = {name: [] for name in named}
        for turn, array in enumerate(cut.activations, start=round):
            for name in order(list(named), turn):  # forwards and backwards in turn
                trials[name].append(tried(named[name], array, cut.name))
        samples += [_sample(name, cut, right, its, round) for name, its in trials.items()]
    return samples


def _sample(name: str, cut: Cut, right: Array, trials: Sequence[Trial], round: int) -> Sample:
    """Its rate is in messages there and back per second; all that matters here is among the extra figures."""
    digits = cut.top1([trial.decoded for trial in trials])
    both_s = np.array([trial.encode_s + trial.decode_s for trial in trials])
    speed = Speed(
        ratio=cut.message_bytes * len(trials) / sum(trial.sent_bytes for trial in trials),
        encode_per_s=cut.message_bytes / median(trial.encode_s for trial in trials),
        decode_per_s=cut.message_bytes / median(trial.decode_s for trial in trials),
    )
    extra = {
        "message_bytes": float(cut.message_bytes),
        "ratio": speed.ratio,
        "encode_bytes_per_s": speed.encode_per_s,
        "decode_bytes_per_s": speed.decode_per_s,
        "largest_error_std": max(trial.error_share for trial in trials),
        "agreement": float(np.mean(digits == right)),
        "accuracy": float(np.mean(digits == cut.labels)),
        "serial_break_even_bytes_per_s": speed.serial_break_even,
        "pipelined_break_even_bytes_per_s": speed.pipelined_break_even,
    }
    p50_s, p99_s = np.percentile(both_s, [50, 99])
    return Sample(name, cut.name, round, 1 / float(p50_s), float(p50_s), float(p99_s), extra)


def speed_of(row: Row) -> Speed:
    return Speed(*(row.extra[key].median for key in ("ratio", "encode_bytes_per_s", "decode_bytes_per_s")))


# ── showing ──────────────────────────────────────────────────────────────────────────────────────────────────────────

HEADS = ["codec", "ratio>", "enc>", "dec>", "err/std>", "agree>", "right>", "serial>", "piped>"]
LEGEND = (
    "enc, dec: MB/s of the tensor. err/std: the largest error, in standard deviations. agree, right: % of images with the same digit as "
    "without codec, with the right digit. serial, piped: MB/s of the link below which the codec pays."
)


def show_cut(console: Console, name: str, rows: Sequence[Row]) -> None:
    size = rows[0].extra["message_bytes"].median
    console.print()
    print_table(console, f"{name}: {size / 1e3:,.0f} kB per message", HEADS, [_cells(row) for row in rows])


def _cells(row: Row) -> list[str]:
    def cell(key: str, factor: float = 1.0) -> str:
        return number(row.extra[key].median * factor)

    rates = ["-", "-"] if row.contestant == "raw" else [cell("encode_bytes_per_s", 1e-6), cell("decode_bytes_per_s", 1e-6)]
    error = row.extra["largest_error_std"].median
    shares = [number(100 * row.extra[key].median) for key in ("agreement", "accuracy")]
    even = ["-", "-"] if row.contestant == "raw" else [_even(row, "serial"), _even(row, "pipelined")]
    return [row.contestant, cell("ratio"), *rates, "0" if error == 0 else f"{error:.4f}", *shares, *even]


def _even(row: Row, way: str) -> str:
    value = row.extra[f"{way}_break_even_bytes_per_s"].median
    return number(value / MEGABYTE) if value > 0 else "never"


def show_best(console: Console, rows: Sequence[Row]) -> None:
    """The best codec for some link rates, lossless ones and all."""
    for is_serial, way in ((True, "one request"), (False, "a stream")):
        table = []
        for cut in dict.fromkeys(row.setting for row in rows):
            speeds = {row.contestant: speed_of(row) for row in rows if row.setting == cut}
            table.append([cut, *(_best_cell(speeds, rate, is_serial) for rate in LINK_RATES)])
        console.print()
        heads = [way, *(f"{rate * 8 / 1e6:,.0f} Mbit/s" for rate in LINK_RATES)]
        print_table(console, f"Fastest codec for {way}, and how many times as fast as raw", heads, table)


def _best_cell(speeds: Mapping[str, Speed], rate: float, is_serial: bool) -> str:
    name = best(speeds, rate, is_serial=is_serial)
    return "raw" if name == "raw" else f"{name} {gain(speeds[name], rate, is_serial=is_serial):.1f}x"


def draw(path: Path, rows: Sequence[Row], machine: str) -> None:
    """For each cut of the largest images: how many times sooner than raw a message arrives, over the rate of the link."""
    last = rows[-1].setting.partition(",")[0]
    cuts = [cut for cut in dict.fromkeys(row.setting for row in rows) if cut.startswith(f"{last},")]
    groups = [_curves(cut, [row for row in rows if row.setting == cut]) for cut in (cuts[0], cuts[-1])]
    foot = f"One message, encoder, link and decoder one after the other; above 1 a codec pays. {machine}"
    lines(path, QUESTION, groups, foot=foot)


def _curves(cut: str, rows: Sequence[Row]) -> Lines:
    size = rows[0].extra["message_bytes"].median
    series = {}
    for row in rows:
        if row.contestant == "raw" or row.contestant.startswith("zfp+lz4"):  # as zfp, within the width of a line
            continue
        speed = speed_of(row)
        series[row.contestant] = [(rate / MEGABYTE, _exactly(gain(speed, rate, is_serial=True))) for rate in PLOTTED_RATES]
    series["raw"] = [(rate / MEGABYTE, _exactly(1.0)) for rate in PLOTTED_RATES]
    return Lines(f"{cut} ({size / 1e3:,.0f} kB)", "link, MB/s", "times as fast as raw", series, is_logarithmic=True)


def _exactly(value: float) -> Figure:
    return Figure(value, value, value)


# ── the door ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def parser(names: Iterable[str]) -> ArgumentParser:
    return build_parser("bench.codecs", QUESTION, names)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0; 1 if something decoded is not what was promised; 2 for a wrong command line."""
    openers = {wish.name: wish for wish in wishes()}
    options, given = read_options(parser(openers), argv)
    chosen = list(choose(openers, options.only).values())
    count = max(int((QUICK_TEST_IMAGES if given.quick else TEST_IMAGES) * min(given.scale, 1.0)), 2)
    console, known = Console(), facts()
    console.print(f"[bold]{QUESTION}[/bold]\n[dim]{escape(in_words(known))}[/dim]", highlight=False, soft_wrap=True)
    result = Result()
    try:
        for size in QUICK if given.quick else FULL:
            for cut in trained_cuts(size, count, given.scale, console.print):
                result.samples += measure_cut(cut, chosen, options.rounds)
                show_cut(console, cut.name, [row for row in summarize(result.samples) if row.setting == cut.name])
    except WrongAnswerError as error:
        print(f"bench.codecs: {error}", file=sys.stderr)
        return 1
    except ImportError as error:
        print(f"bench.codecs: {error}; pip install -e .[bench]", file=sys.stderr)
        return 1
    rows = summarize(result.samples)
    console.print(f"\n[dim]{LEGEND}[/dim]", highlight=False)
    show_best(console, rows)
    paths = write(options.out, result, rows, known, is_plotting=options.is_plotting)
    console.print(f"\n[dim]written: {escape(', '.join(map(str, paths)))}[/dim]", highlight=False, soft_wrap=True)
    return 0


def trained_cuts(size: Size, count: int, scale: float, say: Callable[[str], Any]) -> list[Cut]:
    """Train, and return what crosses each cut for `count` test images. A scale below 1 trains on fewer images."""
    import torch

    from bench.workloads import digits

    torch.set_num_threads(1)  # so that training gives the same network again
    learned, tested = digits.digits(size.side)
    kept = max(int(size.trained_images * min(scale, 1.0)), digits.BATCH)
    began = perf_counter()
    model = digits.trained(digits.Split(learned.images[:kept], learned.labels[:kept]), epochs=size.epochs)
    say(f"\n{size.side} x {size.side} pixels: trained on {kept} digits, {size.epochs} times ({perf_counter() - began:.1f} s)")
    return digits.cuts_of(model, digits.Split(tested.images[:count], tested.labels[:count]), size.side)


def write(out: Path, result: Result, rows: Sequence[Row], known: Facts, *, is_plotting: bool) -> list[Path]:
    now = datetime.now()  # noqa: DTZ005 - of the person who looks for the file
    paths = [file_name(out, "codecs", now, ending) for ending in (".csv", ".json")]
    write_csv(paths[0], result.samples, known)
    write_json(paths[1], "codecs", rows, result, known)
    if is_plotting:
        paths.append(file_name(out, "codecs", now, ".png"))
        draw(paths[-1], rows, in_words(known))
    return paths


if __name__ == "__main__":
    sys.exit(main())
