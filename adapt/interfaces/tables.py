"""Tables for terminals, all alike: a title line, dim headers, two spaces between columns, no frames."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def print_table(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, indent: int = 0) -> None:
    """Print rows of markup. Columns whose name ends in ">" are aligned to the right.

    The title is a line of its own: as a part of the table it would be broken to the table's width.
    """
    console.print(f"{' ' * indent}[bold]{escape(title)}[/bold]", highlight=False, soft_wrap=True)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim", show_edge=False)
    if indent:
        table.add_column("", width=max(indent - 2, 0))
    for column in columns:
        table.add_column(column.removesuffix(">"), justify="right" if column.endswith(">") else "left", no_wrap=column.endswith(">"))
    for row in rows:
        table.add_row(*([""] if indent else []), *row)
    console.print(table, highlight=False)
