"""What every bench can be told on its command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

Opener = TypeVar("Opener")
RESULTS = Path("bench-results")  # git ignores it
ROUNDS = 5
QUICK_ROUNDS = 3
CELL_S = 3.0
QUICK_CELL_S = 0.8


@dataclass(frozen=True, slots=True)
class Options:
    """A bench's settings, of a command line or of a test.

    Attributes:
        rounds: how often every contestant has its turn.
        cell_s: how long one contestant is measured under one setting in one round, about.
        only: names of contestants; empty: all.
        out: folder for files.
        is_plotting: whether pictures are drawn.
        is_kept_open: whether all contestants run all the time, rather than each in its turn.
    """

    rounds: int = ROUNDS
    cell_s: float = CELL_S
    only: tuple[str, ...] = ()
    out: Path = RESULTS
    is_plotting: bool = True
    is_kept_open: bool = False


def build_parser(module: str, question: str, contestants: Iterable[str]) -> argparse.ArgumentParser:
    """The parser of `python bench/x.py` for the module `bench.x`; a bench may add to it before `read_options`."""
    parser = argparse.ArgumentParser(
        prog=f"python {module.replace('.', '/')}.py", description=question, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.epilog = f"contestants: {', '.join(contestants)}. What is not installed takes no part."
    parser.add_argument("--quick", action="store_true", help=f"under three minutes: {QUICK_ROUNDS} rounds of {QUICK_CELL_S:g} s per figure")
    parser.add_argument("--rounds", type=_positive, metavar="N", help=f"how often everybody has a turn ({ROUNDS}; quick: {QUICK_ROUNDS})")
    parser.add_argument("--only", type=_names, default=(), metavar="NAME,...", help="these contestants alone")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help=f"folder for files ({RESULTS})")
    parser.add_argument("--no-plot", action="store_true", help="write figures, but no pictures")
    parser.add_argument("--scale", type=float, default=1.0, metavar="X", help="measure X times as long (1)")
    parser.add_argument("--keep-open", action="store_true", help="let all contestants run all the time, instead of each in its turn")
    return parser


def read_options(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> tuple[Options, argparse.Namespace]:
    """The shared options, and all that was given, for a bench with more of its own."""
    given = parser.parse_args(argv)
    if not 0 < given.scale < float("inf"):
        parser.error(f"--scale {given.scale}: expected a positive number")
    options = Options(
        rounds=given.rounds or (QUICK_ROUNDS if given.quick else ROUNDS),
        cell_s=(QUICK_CELL_S if given.quick else CELL_S) * given.scale,
        only=given.only,
        out=given.out,
        is_plotting=not given.no_plot,
        is_kept_open=given.keep_open,
    )
    return options, given


def choose(openers: Mapping[str, Opener], only: Sequence[str]) -> dict[str, Opener]:
    """The contestants that were asked for, in the order of the bench. Exits with status 2 for a name that is none."""
    unknown = [name for name in only if name not in openers]
    if unknown:
        print(f"no contestant is called {', '.join(unknown)}; there are {', '.join(openers)}", file=sys.stderr)
        raise SystemExit(2)
    return {name: opener for name, opener in openers.items() if not only or name in only}


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 1")
    return number
