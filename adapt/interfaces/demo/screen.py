"""What the demo shows: live progress on a terminal, plain lines elsewhere, and the tables at the end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from adapt.interfaces.demo.figures import Figures, WorkerFigures
from adapt.interfaces.demo.links import Link
from adapt.interfaces.tables import print_table

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

    def _table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        print_table(self._console, title, columns, rows, indent=2)
        self.line()

    # --- the end ------------------------------------------------------------------------------------------------------

    def report(self, figures: Figures) -> None:
        """The tables."""
        self.line()
        self._table("speed", ("", "images/s>", "latency p50>", "latency p99>"), _speed(figures))
        self._table("workers", ("name", "pid>", "stages", "tasks>", "computing>", "state"), [_worker(worker) for worker in figures.workers])
        codecs = [(row.codec, _megabytes(row.raw_bytes), _megabytes(row.sent_bytes), f"{row.ratio:.2f}") for row in figures.codecs]
        self._table("tensors between dispatcher and workers, by codec", ("codec", "before>", "sent>", "ratio>"), codecs)
        if figures.links:
            title = f"error on each link, every tensor measured; promised: {figures.tolerance:g} of the tensor's standard deviation"
            columns = ("from", "travelled as", "ratio>", "largest error>", "its bound>", "share>", "in std>")
            self._table(title, columns, [_link(link) for link in figures.links])
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
        rows = []
        photographs = list(dict.fromkeys(names))
        for photograph in photographs[:LABELS_SHOWN]:
            seen = Counter(label for name, label in zip(names, labels, strict=True) if name == photograph)
            label, count = seen.most_common(1)[0]
            rows.append((escape(photograph), escape(label), f"{count} of {seen.total()}"))
        self._table("labels", ("photograph", "label", "crops>"), rows)
        if len(photographs) > LABELS_SHOWN:
            self.line(f"  and {len(photographs) - LABELS_SHOWN} more")


def _speed(figures: Figures) -> list[tuple[str, ...]]:
    alone = figures.single_process_images_per_s
    rows = [("one process, eager", f"{alone:.1f}", f"{1 / alone:.3f} s", "")]
    if figures.images_per_s_before_faults is not None:
        rows.append(("cluster, until the first fault", f"{figures.images_per_s_before_faults:.1f}", "", ""))
    whole = f"cluster, {figures.in_flight} in flight" + (", faults included" if figures.workers_expected_lost else "")
    rows.append((whole, f"{figures.images_per_s:.1f}", f"{figures.latency_p50_s:.3f} s", f"{figures.latency_p99_s:.3f} s"))
    return rows


def _worker(worker: WorkerFigures) -> tuple[str, ...]:
    state = f"[red]{escape(worker.state)}[/red]: {escape(worker.fault)}" if worker.fault else f"[green]{escape(worker.state)}[/green]"
    stages = ", ".join(map(str, worker.stages)) or "none"
    return (escape(worker.name), str(worker.pid), stages, str(worker.tasks), f"{worker.compute_s:.1f} s", state)


def _link(link: Link) -> tuple[str, ...]:
    return (f"stage {link.stage}", ", ".join(link.codecs), f"{link.raw_bytes / max(link.sent_bytes, 1):.2f}", *_errors(link))


def _errors(link: Link) -> tuple[str, str, str, str]:
    if not link.lossy_tensors:
        return ("0", "0", "", "0")
    return (f"{link.worst_error:.3g}", f"{link.worst_bound:.3g}", f"{link.worst_share:.0%}", f"{link.worst_std_share:.4f}")


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB"


def _in_spite(figures: Figures) -> str:
    lost = figures.workers_lost
    return f", although {lost} of {len(figures.workers)} workers were lost on the way" if lost else ""
