"""What the demo shows: live progress on a terminal, plain lines elsewhere, and the tables at the end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from adapt.interfaces.demo.figures import Figures, WorkerFigures
from adapt.interfaces.demo.links import Link

PLAIN_WIDTH = 110
NAME_WIDTH = 11
PLAIN_LINES = 4  # a step of known length says in plain lines how far it is, so many times
LABELS_SHOWN = 12


class Step:
    """One step under way."""

    def __init__(self, console: Console, name: str, progress: Progress | None) -> None:
        self._console, self._name, self._progress = console, name, progress
        self._task: TaskID | None = None if progress is None else progress.add_task("", total=None, name=name, words="")
        self._told = 0
        self.result = ""  # what is left to read when it is over

    def update(self, words: str, share: float | None) -> None:
        """Say what is being done, and how much of it is done (0 to 1), if that is known."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, words=escape(words), completed=share or 0.0, total=None if share is None else 1.0)
        elif share is None:
            self._console.print(f"  {self._name:<{NAME_WIDTH}} {escape(words)} ...", highlight=False, soft_wrap=True)
        elif share < 1 and int(share * PLAIN_LINES) > self._told:
            self._told = int(share * PLAIN_LINES)
            self._console.print(f"  {self._name:<{NAME_WIDTH}} {escape(words)}", highlight=False, soft_wrap=True)

    def note(self, words: str) -> None:
        """A line that stays."""
        self._console.print(f"  {'':<{NAME_WIDTH}} [yellow]{escape(words)}[/yellow]", highlight=False, soft_wrap=True)


class Screen:
    """Where the demo prints."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        if not self._console.is_terminal:
            self._console = Console(file=self._console.file, width=PLAIN_WIDTH)

    def line(self, words: str = "", *, style: str | None = None) -> None:
        self._console.print(escape(words), style=style, highlight=False, soft_wrap=True)

    @contextmanager
    def step(self, name: str) -> Iterator[Step]:
        """A step: its progress while it lasts, and one line with its result and its time when it has gone well."""
        began = time.monotonic()
        if self._console.is_terminal:
            columns = (
                SpinnerColumn(),
                TextColumn(f"{{task.fields[name]:<{NAME_WIDTH}}}"),
                BarColumn(bar_width=28),
                TextColumn("{task.fields[words]}"),
                TimeElapsedColumn(),
            )
            with Progress(*columns, console=self._console, transient=True) as progress:
                step = Step(self._console, name, progress)
                yield step
        else:
            step = Step(self._console, name, None)
            yield step
        elapsed_s = time.monotonic() - began
        self._console.print(
            f"  [bold]{name:<{NAME_WIDTH}}[/bold] {escape(step.result)}  [dim]({elapsed_s:.1f} s)[/dim]", highlight=False, soft_wrap=True
        )

    # --- the end ------------------------------------------------------------------------------------------------------

    def report(self, figures: Figures) -> None:
        """The tables."""
        self.line()
        self._console.print(_speed(figures))
        self._console.print(_workers(figures.workers))
        self._console.print(_codecs(figures))
        if figures.links:
            self._console.print(_links(figures))
        self.line(
            f"  retries {figures.retries}, evictions {figures.evictions}, late answers dropped {figures.late_answers}, "
            f"workers lost {figures.workers_lost} of {len(figures.workers)}"
        )
        verdict = figures.verdict
        self.line(
            f"  requested {figures.requested}, answered {verdict.answered}, failed {verdict.failed}, wrong {verdict.wrong}, "
            f"duplicated {verdict.duplicated}"
        )
        for error, count in verdict.errors.items():
            self.line(f"  {count} x {error[:300]}", style="red")

    def verdict(self, figures: Figures) -> None:
        """The last lines: what the check against the eager model says."""
        verdict, requested = figures.verdict, figures.requested
        self.line()
        if figures.links:
            worst = max(link.worst_share for link in figures.links)
            self.line(f"  top-1 agreement with the eager model: {verdict.same_top1} of {verdict.answered}")
            self.line(f"  largest link error: {worst:.0%} of its bound; largest difference of an output: {verdict.largest_difference:.3g}")
        if figures.problems:
            for problem in figures.problems:
                self.line(f"  WRONG: {problem}", style="bold red")
        elif figures.links:
            self.line(
                f"  All {requested} answers are exactly what these stages give with {figures.codec}, and every link kept its bound"
                f"{_in_spite(figures)}.",
                style="bold green",
            )
        else:
            self.line(f"  All {requested} answers equal the eager model's, bit for bit{_in_spite(figures)}.", style="bold green")

    def labels(self, names: Sequence[str], labels: Sequence[str]) -> None:
        """What the model sees in each photograph: its most frequent label over the crops."""
        table = Table(title="labels", title_justify="left", box=None, padding=(0, 2), title_style="bold")
        table.add_column("photograph")
        table.add_column("label")
        table.add_column("crops", justify="right")
        photographs = list(dict.fromkeys(names))
        for photograph in photographs[:LABELS_SHOWN]:
            seen = Counter(label for name, label in zip(names, labels, strict=True) if name == photograph)
            label, count = seen.most_common(1)[0]
            table.add_row(escape(photograph), escape(label), f"{count} of {seen.total()}")
        self.line()
        self._console.print(table)
        if len(photographs) > LABELS_SHOWN:
            self.line(f"  and {len(photographs) - LABELS_SHOWN} more")


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2), header_style="dim")


def _speed(figures: Figures) -> Table:
    table = _table("speed")
    table.add_column("")
    table.add_column("images/s", justify="right")
    table.add_column("latency p50", justify="right")
    table.add_column("latency p99", justify="right")
    alone_s = 1 / figures.single_process_images_per_s
    table.add_row("one process, eager", f"{figures.single_process_images_per_s:.1f}", f"{alone_s:.3f} s", "")
    if figures.images_per_s_before_faults is not None:
        table.add_row("cluster, until the first fault", f"{figures.images_per_s_before_faults:.1f}", "", "")
    table.add_row(
        f"cluster, {figures.in_flight} in flight" + (", faults included" if figures.workers_expected_lost else ""),
        f"{figures.images_per_s:.1f}",
        f"{figures.latency_p50_s:.3f} s",
        f"{figures.latency_p99_s:.3f} s",
    )
    return table


def _workers(workers: Sequence[WorkerFigures]) -> Table:
    table = _table("workers")
    table.add_column("name")
    table.add_column("pid", justify="right")
    table.add_column("stages")
    table.add_column("tasks", justify="right")
    table.add_column("computing", justify="right")
    table.add_column("state")
    for worker in workers:
        state = f"[red]{escape(worker.state)}[/red]: {escape(worker.fault)}" if worker.fault else f"[green]{escape(worker.state)}[/green]"
        stages = ", ".join(map(str, worker.stages)) or "none"
        table.add_row(escape(worker.name), str(worker.pid), stages, str(worker.tasks), f"{worker.compute_s:.1f} s", state)
    return table


def _codecs(figures: Figures) -> Table:
    table = _table("bytes of tensors between dispatcher and workers, by codec")
    table.add_column("codec")
    table.add_column("before", justify="right")
    table.add_column("sent", justify="right")
    table.add_column("ratio", justify="right")
    for row in figures.codecs:
        table.add_row(row.codec, _megabytes(row.raw_bytes), _megabytes(row.sent_bytes), f"{row.ratio:.2f}")
    return table


def _links(figures: Figures) -> Table:
    table = _table(f"error on each link, tolerance {figures.tolerance:g} of a tensor's standard deviation (every image measured)")
    table.add_column("from")
    table.add_column("travelled as")
    table.add_column("ratio", justify="right")
    table.add_column("largest error", justify="right")
    table.add_column("its bound", justify="right")
    table.add_column("share", justify="right")
    table.add_column("in std", justify="right")
    for link in figures.links:
        table.add_row(
            f"stage {link.stage}" if link.stage else "the client",
            ", ".join(link.codecs),
            f"{link.raw_bytes / max(link.sent_bytes, 1):.2f}",
            *_errors(link),
        )
    return table


def _errors(link: Link) -> tuple[str, str, str, str]:
    if not link.lossy_tensors:
        return ("0", "0", "", "0")
    return (f"{link.worst_error:.3g}", f"{link.worst_bound:.3g}", f"{link.worst_share:.0%}", f"{link.worst_std_share:.4f}")


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB"


def _in_spite(figures: Figures) -> str:
    lost = figures.workers_lost
    return f", although {lost} of {len(figures.workers)} workers were lost on the way" if lost else ""
