"""How many tasks that do nothing pass in a second, and how long does one take?

What is left of a system when its tasks cost nothing: ids, queues, wake-ups, copies of 100 bytes. One client, two workers with one thread
each, asked in turn; each answer is compared with what was sent. `64 in flight` shows the rate, `1 in flight` the time of one round trip.
The CPU time of each process says who is busy with it; see harness/cpu.py for the kinds of threads. `relay-messages` and `relay-duties` are
relays that do a part of ADAPT's work: how fast it could be if nothing else of it took any time; see contestants/duties.py.

    python bench/dispatch.py --quick
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from adapt.interfaces.tables import print_table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python bench/dispatch.py` too

from bench.contestants.adapt_cluster import MESSAGES, MessageMeter
from bench.contestants.echoes import REFERENCE, openers
from bench.harness.arguments import build_parser, read_options
from bench.harness.contest import Array, Meter
from bench.harness.cpu import CpuMeter, OthersMeter
from bench.harness.plot import Bar, Group, bars
from bench.harness.present import run_bench
from bench.harness.report import Column, Row, number, others_column, rate_columns
from bench.harness.rounds import Setting

QUESTION = "How many no-op tasks a second, and how long does one take?"
SHAPE = (1, 25)  # 100 bytes of float32
POOL = 1024  # different inputs: more than are in flight, so that answers cannot be mistaken for each other
MANY, ONE = "64 in flight", "1 in flight"
LATENCY_PART = 0.5  # a latency needs fewer tasks than a rate
LEAST = 32


def settings(cell_s: float) -> list[Setting]:
    inputs = pool()
    return [
        Setting(MANY, inputs, 64, cell_s=cell_s, least=LEAST),
        Setting(ONE, inputs, 1, cell_s=LATENCY_PART * cell_s, least=LEAST),
    ]


def pool() -> list[Array]:
    """All different."""
    return list(np.random.default_rng(0).random((POOL, *SHAPE), dtype=np.float32))


def meters() -> list[Meter]:
    return [CpuMeter(), OthersMeter(), MessageMeter()]


def show_cpu(console: Console, rows: Sequence[Row]) -> None:
    """A table of CPU time per task: who is busy, and which thread of it."""
    cells = [[row.contestant, row.setting, *_cpu_cells(row)] for row in rows]
    if cells:
        columns = ["contestant", "setting", "all us>", "client>", "between>", "workers>", "by thread"]
        console.print()
        print_table(console, "CPU microseconds per task (both workers together)", columns, cells)
        console.print(
            "[dim]between: dispatcher, relay, scheduler. See bench/harness/cpu.py for the kinds of threads.[/dim]", highlight=False
        )


def _cpu_cells(row: Row) -> list[str]:
    used = {name.removeprefix("cpu_us "): figure.median for name, figure in row.extra.items() if name.startswith("cpu_us ")}
    roles = {name: value for name, value in used.items() if "." not in name and name != "total"}
    between = sum(value for name, value in roles.items() if name not in ("client", "worker"))
    threads = sorted(((value, name) for name, value in used.items() if "." in name and value >= 1), reverse=True)
    detail = "  ".join(f"{name} {value:.0f}" for value, name in threads[:7])
    whole = [number(value) for value in (used.get("total", np.nan), roles.get("client", np.nan), between, roles.get("worker", np.nan))]
    return [*whole, detail]


def show_messages(console: Console, rows: Sequence[Row]) -> None:
    """What the dispatcher of ADAPT received and sent for each task."""
    for row in rows:
        known = [(name, row.extra[f"{name} per task"].median) for name in MESSAGES if f"{name} per task" in row.extra]
        if known:
            text = ", ".join(f"{name} {value:.2f}" for name, value in known)
            console.print(f"{row.contestant}, {row.setting}, of the dispatcher per task: {text}", highlight=False, soft_wrap=True)


def more(console: Console, rows: Sequence[Row]) -> None:
    show_cpu(console, rows)
    console.print()
    show_messages(console, rows)


def draw(path: Path, rows: Sequence[Row], machine: str) -> None:
    rates = [Bar(row.contestant, row.rate_per_s, _times(row)) for row in rows if row.setting == MANY]
    latencies = [Bar(row.contestant, row.p50_s * 1e6, f"(p99 {number(row.p99_s.median * 1e6)})") for row in rows if row.setting == ONE]
    groups = [Group(f"{MANY}: rate", "tasks/s", rates), Group(f"{ONE}: median latency", "us", latencies, is_more_better=False)]
    foot = f"2 workers, 100 bytes each way. Whiskers: lowest and highest round. In brackets: ratio to {REFERENCE}. {machine}"
    bars(path, QUESTION, groups, foot=foot)


def _times(row: Row) -> str:
    return "" if np.isnan(row.ratio.median) else f"(x {row.ratio.median:.2f})"


def columns() -> list[Column]:
    return [*rate_columns("tasks/s", reference=REFERENCE), others_column()]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: see `run_bench`; 2 for a wrong command line."""
    contestants = openers([SHAPE], with_duties=True)
    options, _ = read_options(build_parser("bench.dispatch", QUESTION, contestants), argv)
    return run_bench(
        "dispatch",
        QUESTION,
        contestants,
        settings(options.cell_s),
        options,
        columns=columns(),
        reference=REFERENCE,
        meters=meters,
        draw=draw,
        more=more,
    )


if __name__ == "__main__":
    sys.exit(main())
