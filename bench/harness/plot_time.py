"""Pictures of what happened when: curves over time, dots below, bands for what was wrong. PNG files; no display is needed."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.harness.plot import OURS, PEER

INK, QUIET, FAINT = "#1f2328", "#6b7280", "#e3e6ea"
GONE, STALLED, WELL = "#c0392b", "#d07a12", "#2e7d4f"
WIDTH_IN, HEIGHT_IN, HEAD_IN, DPI = 13.0, 7.0, 0.75, 140
LEFT, RIGHT = 0.062, 0.985
WORDS_IN, ROW_PT = 0.92, 11.5  # room that a mark's words take


@dataclass(frozen=True, slots=True)
class Curve:
    """Answers per second over time.

    Attributes:
        is_ours: of ADAPT.
        ends_s: from there on it is zero for ever, which was not measured; `ends_in_words` says so.
    """

    name: str
    points: Sequence[tuple[float, float]]
    is_ours: bool = True
    ends_s: float | None = None
    ends_in_words: str = ""


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened to one device: a line at its moment, words above, and a band as long as it is wrong."""

    at_s: float
    title: str
    notes: Sequence[str]
    color: str
    until_s: float | None = None


def draw_timeline(
    path: Path,
    question: str,
    curves: Sequence[Curve],
    latencies: Sequence[tuple[float, float]],
    marks: Sequence[Mark],
    *,
    span_s: tuple[float, float],
    foot: str,
) -> None:
    """Rates above, the latency of every answer below, (moment, seconds)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN))
    FigureCanvasAgg(figure)
    tiered = list(_tiers(marks, (WIDTH_IN * (RIGHT - LEFT)) / (span_s[1] - span_s[0])))
    rows = sum(1.4 + max((len(mark.notes) for mark in marks), default=0) for _ in {tier for _, tier in tiered})
    top = 1 - (HEAD_IN + rows * ROW_PT / 72) / HEIGHT_IN
    figure.subplots_adjust(left=LEFT, right=RIGHT, top=top, bottom=0.13, hspace=0.09)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    _draw_rates(upper, curves, span_s)
    _draw_latencies(lower, latencies)
    for mark, tier in tiered:
        _draw_mark(upper, lower, mark, tier)
    for panel in (upper, lower):
        panel.set_xlim(*span_s)
        panel.grid(axis="y", color=FAINT, linewidth=0.7)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=9, labelcolor=INK, color=QUIET)
    lower.set_xlabel("seconds", fontsize=10, color=INK)
    figure.align_ylabels([upper, lower])
    figure.legend(loc="upper right", bbox_to_anchor=(0.985, 0.98), ncols=len(curves), frameon=False, fontsize=10, labelcolor=INK)
    figure.text(0.02, 0.967, question, fontsize=14, fontweight="bold", color=INK, va="top")
    figure.text(0.02, 0.015, "\n".join(textwrap.wrap(foot, 205)), fontsize=7.5, color=QUIET, va="bottom")
    figure.savefig(path, dpi=DPI)


def _draw_rates(panel: Any, curves: Sequence[Curve], span_s: tuple[float, float]) -> None:
    for curve in curves:
        color, width = (OURS, 1.8) if curve.is_ours else (PEER, 1.6)
        xs, ys = [x for x, _ in curve.points], [y for _, y in curve.points]
        panel.plot(xs, ys, color=color, linewidth=width, label=curve.name, zorder=3 if curve.is_ours else 2.5, solid_joinstyle="round")
        if curve.is_ours:
            panel.fill_between(xs, ys, color=color, alpha=0.10, linewidth=0)
        if curve.ends_s is not None and curve.ends_s < span_s[1]:
            panel.plot([curve.ends_s, span_s[1]], [0, 0], color=color, linewidth=width, linestyle=(0, (1, 1.5)), zorder=4)
            panel.annotate(
                curve.ends_in_words,
                (span_s[1], 0),
                xytext=(-4, 4),
                textcoords="offset points",
                ha="right",
                fontsize=8,
                color=QUIET,
                zorder=4,
            )
    highest = max((y for curve in curves for _, y in curve.points), default=1.0) or 1.0
    panel.set_ylim(-0.025 * highest, 1.08 * highest)
    panel.set_ylabel("answers per second", fontsize=10, color=INK)


def _draw_latencies(panel: Any, latencies: Sequence[tuple[float, float]]) -> None:
    panel.scatter([x for x, _ in latencies], [y for _, y in latencies], s=5, color=OURS, alpha=0.55, linewidths=0, zorder=3)
    panel.set_yscale("log")
    panel.set_ylabel("latency of each answer", fontsize=10, color=INK)
    lowest, highest = min((y for _, y in latencies), default=0.1), max((y for _, y in latencies), default=1.0)
    ticks = [tick for tick in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if lowest / 1.6 <= tick <= highest * 2]
    panel.set_yticks(ticks, [f"{tick:g} s" if tick >= 1 else f"{tick * 1e3:g} ms" for tick in ticks])
    panel.minorticks_off()
    panel.set_ylim(lowest / 1.3, highest * 1.3)


def _tiers(marks: Sequence[Mark], in_per_s: float) -> Iterator[tuple[Mark, int]]:
    """The words of a mark go up where those of the one before would be in their way."""
    free_at_s = [-math.inf, -math.inf]
    for mark in marks:
        tier = 0 if free_at_s[0] <= mark.at_s else 1
        free_at_s[tier] = mark.at_s + WORDS_IN / in_per_s
        yield mark, tier


def _draw_mark(upper: Any, lower: Any, mark: Mark, tier: int) -> None:
    for panel in (upper, lower):
        if mark.until_s is not None:
            panel.axvspan(mark.at_s, mark.until_s, color=mark.color, alpha=0.10, linewidth=0, zorder=0.5)
        panel.axvline(mark.at_s, color=mark.color, linewidth=1.1, alpha=0.9, zorder=1)
    base_pt = 4 + tier * (len(mark.notes) + 1.4) * ROW_PT
    title_pt = base_pt + len(mark.notes) * ROW_PT + 1
    words = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "bottom", "annotation_clip": False}
    for row, note in enumerate(reversed(mark.notes)):
        upper.annotate(note, (mark.at_s, 1.0), xytext=(4, base_pt + ROW_PT * row), fontsize=8, color=INK, **words)
    upper.annotate(mark.title, (mark.at_s, 1.0), xytext=(4, title_pt), fontsize=9, fontweight="bold", color=mark.color, **words)
    line = {"arrowstyle": "-", "color": mark.color, "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0}
    upper.annotate("", (mark.at_s, 1.0), xytext=(0, title_pt + 8), arrowprops=line, **words)
