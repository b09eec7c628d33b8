"""From samples to figures: medians with their spread, a table, a CSV of every sample, a JSON summary.

The ratio to a reference is taken within each round, where both have met the same state of the machine, and then the median of these.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.markup import escape

from adapt.interfaces.tables import print_table
from bench.harness.contest import Sample
from bench.harness.machine import Facts, lines
from bench.harness.rounds import Result


@dataclass(frozen=True, slots=True)
class Figure:
    """A number over rounds: the median, beside the lowest and the highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Figure:
        known = [value for value in values if not math.isnan(value)]
        return cls(median(known), min(known), max(known)) if known else cls(math.nan, math.nan, math.nan)

    def __mul__(self, factor: float) -> Figure:
        """The same in another unit."""
        return Figure(self.median * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True, slots=True)
class Row:
    """One contestant under one setting, over all rounds.

    Attributes:
        ratio: of its rate to the reference's in the same rounds; NaN without one.
        extra: of each further figure.
    """

    contestant: str
    setting: str
    rounds: int
    rate_per_s: Figure
    p50_s: Figure
    p99_s: Figure
    ratio: Figure
    extra: dict[str, Figure] = field(default_factory=dict)


def summarize(samples: Sequence[Sample], *, reference: str | None = None) -> list[Row]:
    """One row for each contestant and setting, in the order of the settings, and within one in the order of first appearance."""
    grouped: dict[tuple[str, str], list[Sample]] = {}
    for setting in dict.fromkeys(sample.setting for sample in samples):
        for sample in samples:
            if sample.setting == setting:
                grouped.setdefault((sample.contestant, setting), []).append(sample)
    references = {(sample.setting, sample.round): sample.rate_per_s for sample in samples if sample.contestant == reference}
    return [_row(group, references) for group in grouped.values()]


def _row(group: list[Sample], references: Mapping[tuple[str, int], float]) -> Row:
    extras = dict.fromkeys(name for sample in group for name in sample.extra)
    return Row(
        contestant=group[0].contestant,
        setting=group[0].setting,
        rounds=len(group),
        rate_per_s=Figure.of(sample.rate_per_s for sample in group),
        p50_s=Figure.of(sample.p50_s for sample in group),
        p99_s=Figure.of(sample.p99_s for sample in group),
        ratio=Figure.of(sample.rate_per_s / references.get((sample.setting, sample.round), math.nan) for sample in group),
        extra={name: Figure.of(sample.extra.get(name, math.nan) for sample in group) for name in extras},
    )


# ── tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table: its head, with ">" at the end for numbers, and what a row says there."""

    head: str
    text: Callable[[Row], str]


def number(value: float) -> str:
    """Three digits that count; a dash where there is none."""
    if math.isnan(value):
        return "-"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def spread(figure: Figure) -> str:
    return "-" if math.isnan(figure.low) else f"{number(figure.low)} – {number(figure.high)}"


def rate_columns(unit: str, factor: Callable[[Row], float] = lambda row: 1.0, *, reference: str | None = None) -> list[Column]:
    """Rate, its spread, latencies and, with a reference, the ratio to it. `factor` turns answers per second into `unit`."""
    columns = [
        Column("contestant", lambda row: escape(row.contestant)),
        Column(f"{unit}>", lambda row: f"[bold]{number((row.rate_per_s * factor(row)).median)}[/bold]"),
        Column("lowest – highest>", lambda row: spread(row.rate_per_s * factor(row))),
        Column("p50 us>", lambda row: number(row.p50_s.median * 1e6)),
        Column("p99 us>", lambda row: number(row.p99_s.median * 1e6)),
    ]
    return columns if reference is None else [*columns, Column(f"x {reference}>", lambda row: number(row.ratio.median))]


def others_column() -> Column:
    """How many cores other work on the machine kept busy, see `cpu.OthersMeter`: the most of all rounds."""
    return Column("others' cores>", lambda row: number(row.extra["others_cores"].high) if "others_cores" in row.extra else "-")


def show(console: Console, rows: Sequence[Row], columns: Sequence[Column], *, titles: Mapping[str, str] | None = None) -> None:
    """A table for each setting, in which the fastest comes first."""
    for setting in dict.fromkeys(row.setting for row in rows):
        chosen = sorted((row for row in rows if row.setting == setting), key=lambda row: -row.rate_per_s.median)
        console.print()
        print_table(
            console,
            (titles or {}).get(setting, setting),
            [column.head for column in columns],
            [[column.text(row) for column in columns] for row in chosen],
        )


def show_absent(console: Console, result: Result) -> None:
    """Who is missing in the tables, and why."""
    for name, why in result.absent.items():
        console.print(f"[dim]{escape(f'{name} took no part: {why}')}[/dim]", highlight=False, soft_wrap=True)
    for name, why in result.failed.items():
        console.print(f"[red]{escape(f'{name} dropped out: {why}')}[/red]", highlight=False, soft_wrap=True)


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────

FIRST_COLUMNS = ("contestant", "setting", "round", "rate_per_s", "p50_s", "p99_s")


def file_name(directory: Path, bench: str, moment: datetime, ending: str) -> Path:
    """Where a file of a bench goes; the moment keeps earlier results."""
    directory.mkdir(parents=True, exist_ok=True)
    return directory / f"{bench}-{moment:%Y%m%d-%H%M%S}{ending}"


def write_csv(path: Path, samples: Sequence[Sample], facts: Facts) -> None:
    """Every sample, one a line, after the facts as comments."""
    extras = list(dict.fromkeys(name for sample in samples for name in sample.extra))
    with path.open("w", newline="", encoding="utf-8") as file:
        file.writelines(f"# {line}\n" for line in lines(facts))
        writer = csv.writer(file)
        writer.writerow([*FIRST_COLUMNS, *extras])
        for sample in samples:
            first = [getattr(sample, name) for name in FIRST_COLUMNS]
            writer.writerow([*first, *(sample.extra.get(name, "") for name in extras)])


def read_csv(path: Path) -> list[Sample]:
    """What `write_csv` has written, without the facts."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        return [_sample(row) for row in rows]


def _sample(row: dict[str, str]) -> Sample:
    extra = {name: float(value) for name, value in row.items() if name not in FIRST_COLUMNS and value}
    rate_per_s, p50_s, p99_s = (float(row[name]) for name in FIRST_COLUMNS[3:])
    return Sample(row["contestant"], row["setting"], int(row["round"]), rate_per_s, p50_s, p99_s, extra)


def write_json(path: Path, bench: str, rows: Sequence[Row], result: Result, facts: Facts, *, reference: str | None = None) -> None:
    """The summary, for scripts that watch how figures change. Numbers that are none become null."""
    content = {
        "bench": bench,
        "machine": facts,
        "reference": reference,
        "absent": result.absent,
        "failed": result.failed,
        "figures": [_plain(row) for row in rows],
    }
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _plain(row: Row) -> dict[str, object]:
    figures = {"rate_per_s": row.rate_per_s, "p50_s": row.p50_s, "p99_s": row.p99_s, "ratio": row.ratio, **row.extra}
    named = {name: [_or_none(figure.median), _or_none(figure.low), _or_none(figure.high)] for name, figure in figures.items()}
    return {"contestant": row.contestant, "setting": row.setting, "rounds": row.rounds, "median_low_high": named}


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
