"""The last part of every bench: what it found, on the terminal and in files."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TypeAlias

from rich.console import Console
from rich.markup import escape

from bench.harness.arguments import Options, choose
from bench.harness.contest import WrongAnswerError
from bench.harness.machine import Facts, facts, in_words
from bench.harness.report import Column, Row, file_name, show, show_absent, summarize, write_csv, write_json
from bench.harness.rounds import MakeMeters, Opener, Result, Setting, contest

Draw: TypeAlias = Callable[[Path, Sequence[Row], str], None]  # file, figures, a line about the machine
More: TypeAlias = Callable[[Console, Sequence[Row]], None]

FILE_WIDTH = 200


def run_bench(
    name: str,
    question: str,
    openers: Mapping[str, Opener],
    settings: Sequence[Setting],
    options: Options,
    *,
    columns: Sequence[Column],
    titles: Mapping[str, str] | None = None,
    reference: str | None = None,
    meters: MakeMeters = tuple,
    draw: Draw | None = None,
    more: More | None = None,
) -> int:
    """A whole bench: contest, tables, files, picture. Returns the exit status.

    Args:
        titles: setting -> title of its table.
        reference: the contestant to which ratios are taken.
        draw: makes the picture.
        more: prints what the tables do not show.

    Returns:
        0; 1 if an answer was wrong, somebody dropped out, or nobody was measured.
    """
    console = wide_console()
    known = facts()
    console.print(f"[bold]{escape(question)}[/bold]", highlight=False, soft_wrap=True)
    console.print(f"[dim]{escape(in_words(known))}[/dim]", highlight=False, soft_wrap=True)
    chosen = choose(openers, options.only)
    try:
        result = contest(chosen, settings, rounds=options.rounds, meters=meters, is_kept_open=options.is_kept_open, console=console)
    except WrongAnswerError as error:
        print(f"bench.{name}: {error}", file=sys.stderr)
        return 1
    rows = summarize(result.samples, reference=reference)
    show(console, rows, columns, titles=titles)
    if more is not None:
        more(console, rows)
    show_absent(console, result)
    if rows:
        _write(name, result, rows, known, options, reference, draw, console)
    return 0 if rows and not result.failed else 1


def wide_console() -> Console:
    """Of a terminal's own width; in a file or a pipe wide enough for every table."""
    console = Console()
    return console if console.is_terminal else Console(width=FILE_WIDTH)


def _write(
    name: str,
    result: Result,
    rows: Sequence[Row],
    known: Facts,
    options: Options,
    reference: str | None,
    draw: Draw | None,
    console: Console,
) -> None:
    now = datetime.now()  # noqa: DTZ005 - of the person who looks for the file
    csv_path, json_path, png_path = (file_name(options.out, name, now, ending) for ending in (".csv", ".json", ".png"))
    write_csv(csv_path, result.samples, known)
    write_json(json_path, name, rows, result, known, reference=reference)
    written = [csv_path, json_path]
    if options.is_plotting and draw is not None:
        try:
            draw(png_path, rows, in_words(known))
            written.append(png_path)
        except ImportError as error:
            console.print(f"[dim]no picture: {error}; pip install -e .\\[bench][/dim]", highlight=False, soft_wrap=True)
    console.print()
    console.print(f"[dim]written: {escape(', '.join(map(str, written)))}[/dim]", highlight=False, soft_wrap=True)
