"""How fast do tensors go to a worker and back?

One client, two workers with one thread each, asked in turn; a task echoes one float32 tensor, without compression, and each answer is
compared with what was sent. MB/s counts every tensor twice, once there and once back; a relay or dispatcher between moves each of them
once more, which is not counted. MB are 10^6 bytes. `tcp` is the limit: one raw connection to one process that does nothing else.

    python bench/transfer.py --quick
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python bench/transfer.py` too

from bench.contestants.echoes import REFERENCE, Shape, openers
from bench.harness.arguments import build_parser, read_options
from bench.harness.contest import Array
from bench.harness.cpu import CpuMeter, OthersMeter
from bench.harness.plot import Lines, lines
from bench.harness.present import run_bench
from bench.harness.report import Column, Row, number, others_column, rate_columns
from bench.harness.rounds import Setting

QUESTION = "How fast do tensors go to a worker and back?"
SHAPES: tuple[Shape, ...] = ((1, 50_000), (1, 200_000), (1, 800_000))  # 0.2, 0.8, 3.2 MB of float32
IN_FLIGHT = (1, 8)
POOL_BYTES = 32 << 20  # of different inputs for one size
CELL_PART = 0.6  # there are six settings
LEAST = 16
QUICK_ROUNDS = 2  # or it would take more than three minutes


def megabytes(shape: Shape) -> float:
    return int(np.prod(shape)) * 4 / 1e6


def name(shape: Shape, in_flight: int) -> str:
    return f"{megabytes(shape):g} MB, {in_flight} in flight"


def settings(cell_s: float) -> list[Setting]:
    return [Setting(name(shape, k), pool(shape), k, cell_s=CELL_PART * cell_s, least=LEAST) for shape in SHAPES for k in IN_FLIGHT]


def pool(shape: Shape) -> list[Array]:
    """All different, and more than are in flight, so that answers cannot be mistaken for each other."""
    count = max(int(POOL_BYTES / (megabytes(shape) * 1e6)), 2 * max(IN_FLIGHT))
    return list(np.random.default_rng(0).random((count, *shape), dtype=np.float32))


def mb_per_task(row: Row) -> float:
    """Both ways."""
    return 2 * float(row.setting.partition(" ")[0])


def columns() -> list[Column]:
    return [
        *rate_columns("MB/s", mb_per_task, reference=REFERENCE),
        Column("CPU us per task>", lambda row: number(row.extra["cpu_us total"].median)),
        others_column(),
    ]


def draw(path: Path, rows: Sequence[Row], machine: str) -> None:
    panels = [_panel(f"{k} in flight", [row for row in rows if row.setting.endswith(f" {k} in flight")]) for k in IN_FLIGHT]
    foot = f"2 workers; every tensor is counted twice, there and back. Whiskers: lowest and highest round. {machine}"
    lines(path, QUESTION, [panel for panel in panels if panel.series], foot=foot)


def _panel(title: str, rows: Iterable[Row]) -> Lines:
    series: dict[str, list[tuple[float, object]]] = {}
    for row in rows:
        series.setdefault(row.contestant, []).append((mb_per_task(row) / 2, row.rate_per_s * mb_per_task(row)))
    return Lines(title, "size of the tensor, MB (float32)", "MB/s (more is better)", series)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: see `run_bench`; 2 for a wrong command line."""
    contestants = openers(SHAPES, with_limit=True, with_duties=True)
    options, given = read_options(build_parser("bench.transfer", QUESTION, contestants), argv)
    if given.quick and not given.rounds:
        options = replace(options, rounds=QUICK_ROUNDS)
    return run_bench(
        "transfer",
        QUESTION,
        contestants,
        settings(options.cell_s),
        options,
        columns=columns(),
        reference=REFERENCE,
        meters=lambda: [CpuMeter(), OthersMeter()],
        draw=draw,
    )


if __name__ == "__main__":
    sys.exit(main())
