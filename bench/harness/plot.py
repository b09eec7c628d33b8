"""Pictures of figures: bars with their spread for rates, lines for sizes. PNG files; no display is needed."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.harness.report import Figure, number

OURS, FLOOR, PEER, LIMIT = "#d1495b", "#30638e", "#8d99ae", "#adb5a0"
OTHERS = ("#30638e", "#4aa3c7", "#6a4c93", "#8d99ae", "#b08968", "#5f7f4f", "#c2a83e", "#222222")  # of lines; none is near ours
MARKS = "osD^vP*X"
DASHES = ("-", "--", ":", "-.")  # of our own variants


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar: what it is called, how long it is, and what stands behind it."""

    name: str
    figure: Figure
    note: str = ""


@dataclass(frozen=True, slots=True)
class Group:
    """Bars under one title, longest first if more is better."""

    title: str
    unit: str
    bars: Sequence[Bar]
    is_more_better: bool = True
    is_logarithmic: bool = False


def color_of(name: str) -> str:
    """ADAPT red, the floors blue, limits green, everybody else grey."""
    if name.startswith("adapt"):
        return OURS
    if name.startswith("relay"):
        return FLOOR
    return LIMIT if name.startswith(("tcp", "limit")) else PEER


def bars(path: Path, question: str, groups: Sequence[Group], *, foot: str = "") -> None:
    """Horizontal bars, one panel for each group; whiskers reach from the lowest to the highest round."""
    most = max(len(group.bars) for group in groups)
    figure, panels = _figure(len(groups), width=5.6 * len(groups), height=1.7 + 0.42 * most)
    for panel, group in zip(panels, groups, strict=True):
        _draw_bars(panel, group)
    _finish(figure, path, question, foot)


def _draw_bars(panel: Any, group: Group) -> None:
    shown = sorted(group.bars, key=lambda bar: bar.figure.median, reverse=not group.is_more_better)
    for place, bar in enumerate(shown):
        whiskers = [[bar.figure.median - bar.figure.low], [bar.figure.high - bar.figure.median]]
        panel.barh(place, bar.figure.median, xerr=whiskers, height=0.62, color=color_of(bar.name), ecolor="#333333", capsize=3)
        label = number(bar.figure.median) + (f"  {bar.note}" if bar.note else "")
        panel.annotate(label, (bar.figure.high, place), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9)
    panel.set_yticks(range(len(shown)), [bar.name for bar in shown])
    longest = max(bar.figure.high for bar in shown)
    if group.is_logarithmic:
        panel.set_xscale("log")
        panel.set_xlim(min(bar.figure.low for bar in shown) / 2, longest * 6)
    else:
        panel.set_xlim(0, longest * 1.4)
    panel.set_title(group.title, fontsize=11)
    panel.set_xlabel(f"{group.unit} ({'more' if group.is_more_better else 'less'} is better)")
    panel.grid(axis="x", alpha=0.3)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


@dataclass(frozen=True, slots=True)
class Lines:
    """Curves under one title: name -> (x, figure) in the order of x."""

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, Sequence[tuple[float, Figure]]]
    is_logarithmic: bool = False  # in y; x always is if its values span a decade


def lines(path: Path, question: str, groups: Sequence[Lines], *, foot: str = "") -> None:
    """Curves with their spread as whiskers, one panel for each group; one legend beside them all."""
    figure, panels = _figure(len(groups), width=5.0 * len(groups) + 1.8, height=5.0)
    names = list(dict.fromkeys(name for group in groups for name in group.series))
    for panel, group in zip(panels, groups, strict=True):
        _draw_lines(panel, group, names)
    handles: dict[str, Any] = {}
    for panel in panels:
        handles |= {label: handle for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False, handlelength=3.2)
    _finish(figure, path, question, foot)


def _draw_lines(panel: Any, group: Lines, names: Sequence[str]) -> None:
    ours = [name for name in names if name.startswith("adapt")]
    others = [name for name in names if name not in ours]
    for name, points in group.series.items():
        y = [point.median for _, point in points]
        whiskers = [[point.median - point.low for _, point in points], [point.high - point.median for _, point in points]]
        mark = MARKS[names.index(name) % len(MARKS)]
        if name in ours:
            color, style = OURS, {"linewidth": 2.2, "zorder": 3, "linestyle": DASHES[ours.index(name) % len(DASHES)]}
        else:
            color, style = OTHERS[others.index(name) % len(OTHERS)], {"linewidth": 1.4}
        panel.errorbar([x for x, _ in points], y, yerr=whiskers, label=name, marker=mark, color=color, capsize=3, **style)
    xs = sorted({x for points in group.series.values() for x, _ in points})
    if xs[0] > 0 and xs[-1] / xs[0] >= 10:
        panel.set_xscale("log")
    panel.set_xticks(xs, [f"{x:g}" for x in xs])
    panel.minorticks_off()
    if group.is_logarithmic:
        panel.set_yscale("log")
    else:
        panel.set_ylim(bottom=0)
    panel.set_title(group.title, fontsize=11)
    panel.set_xlabel(group.x_label)
    panel.set_ylabel(group.y_label)
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)


@dataclass(frozen=True, slots=True)
class Errors:
    """How far a prediction was off: its error as a share, least and most."""

    name: str
    figure: Figure


def draw_errors(path: Path, question: str, rows: Sequence[Errors], *, goal: float, foot: str = "") -> None:
    """A dot for each prediction, from above down, beside the band in which it should be."""
    figure, (panel,) = _figure(1, width=8.5, height=1.9 + 0.36 * len(rows))
    panel.axvspan(-100 * goal, 100 * goal, color=LIMIT, alpha=0.25, linewidth=0, zorder=0)
    panel.axvline(0, color="#333333", linewidth=1)
    for place, row in enumerate(reversed(rows)):
        middle, low, high = (100 * value for value in (row.figure.median, row.figure.low, row.figure.high))
        panel.errorbar(middle, place, xerr=[[middle - low], [high - middle]], fmt="o", color=OURS, capsize=3, zorder=3)
        panel.annotate(f"{middle:+.1f} %", (high, place), xytext=(7, 0), textcoords="offset points", va="center", fontsize=9)
    panel.set_yticks(range(len(rows)), [row.name for row in reversed(rows)])
    panel.set_ylim(-0.7, len(rows) - 0.3)
    furthest = max(abs(value) for row in rows for value in (row.figure.low, row.figure.high))
    reach = 100 * max(1.3 * furthest, 1.5 * goal)
    panel.set_xlim(-reach, 1.1 * reach)
    panel.set_xlabel(f"predicted above measured, % (band: {100 * goal:.0f} %)")
    panel.grid(axis="x", alpha=0.3)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    _finish(figure, path, question, foot)


def _figure(columns: int, *, width: float, height: float) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(max(width, 7.5), height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _finish(figure: Any, path: Path, question: str, foot: str) -> None:
    figure.suptitle(question, fontsize=13, fontweight="bold")
    if foot:
        figure.supxlabel("\n".join(textwrap.wrap(foot, int(figure.get_figwidth() * 14))), fontsize=7.5, color="#555555")
    figure.savefig(path, dpi=140)
