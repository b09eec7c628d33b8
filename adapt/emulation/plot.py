"""One picture of what an emulated cluster did: a lane for each device, moments from left to right.

    filled       CPU, as a share of what the device may have; above that it is cut off
    thin line    bytes per second, sent and received together; one scale for all lanes
    band         from an event to what undid it, with its word; an event that nothing undoes is a line. What befalls etcd befalls
                 all lanes; its word is in the first
    grey bar     at the foot: no worker lived

PNG, without a display and without touching the state of pyplot.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapt.emulation.description import ETCD, OF_ETCD, Kind
from adapt.emulation.observation import ENDED, KILLED_BY_MEMORY, EventRecord, Observation, Sample
from adapt.emulation.schedule import UNDONE_BY
from adapt.errors import ConfigError

WIDTH_IN, DPI = 12.0, 140
HEAD_IN, FOOT_IN, LEFT_IN, RIGHT_IN = 1.0, 0.6, 1.5, 0.95
MOST_LANE_IN, LEAST_LANE_IN, LANES_IN = 1.25, 0.56, 9.0  # few lanes are high; many are together about a page
GAP_IN, WORD_ROW_IN, LETTER_IN = 0.07, 0.15, 0.068  # between lanes; of the words above a lane, at WORD_SIZE
WORD_SIZE, SMALL, NORMAL, TITLE = 7.5, 8, 9.5, 14
MOST_SHARE = 1.04  # of CPU, that is drawn
INK, QUIET, FAINT, GONE = "#1f2328", "#6b7280", "#e3e6ea", "#9aa1ab"
CPU, CPU_EDGE, RATE = "#b9d3ea", "#5b8fc4", "#20262e"
DEAD, SLOWED, LINK, STORE = "#c0392b", "#d07a12", "#7a4fb0", "#2f7f6f"
CLASSES: dict[str, tuple[str, tuple[Kind, ...]]] = {
    "worker gone": (DEAD, (Kind.CRASH, Kind.LEAVE, Kind.JOIN)),
    "stopped or slow": (SLOWED, (Kind.STOP, Kind.CONTINUE, Kind.SLOW)),
    "etcd gone": (STORE, tuple(sorted(OF_ETCD))),
    "link disturbed": (LINK, (Kind.CUT, Kind.CUT_UP, Kind.CUT_DOWN, Kind.RATE, Kind.DELAY, Kind.STALL, Kind.RESET, Kind.CORRUPT)),
}
COLORS: dict[str, str] = {kind: color for color, kinds in CLASSES.values() for kind in kinds} | {KILLED_BY_MEMORY: DEAD, ENDED: DEAD}


@dataclass(frozen=True, slots=True)
class Span:
    """What disturbed a device: from its event to what undid it. `end_s` is None for a moment, infinite if nothing undid it."""

    begin_s: float
    end_s: float | None
    word: str
    color: str


def spans(events: Sequence[EventRecord], device: str) -> list[Span]:
    """What disturbed the device, by beginning. What remains when something else is undone goes on."""
    found: list[Span] = []
    open_ones: dict[str, EventRecord] = {}
    mine = sorted((event for event in events if event.device == device), key=lambda event: event.began_s)
    for event in mine:
        if event.error is not None:
            found.append(Span(event.began_s, None, f"{event.kind} failed", QUIET))
            continue
        remaining = event.detail.get("remaining", ())
        ended = [kind for kind in open_ones if UNDONE_BY[Kind(kind)] == event.kind]
        for kind in ended:
            if kind not in remaining:
                found.append(_span(open_ones.pop(kind), event.began_s))
        if event.kind in UNDONE_BY:
            open_ones.setdefault(event.kind, event)
        elif not ended and event.kind != Kind.RESTORE:
            found.append(_span(event, None))
    found += [_span(event, math.inf) for event in open_ones.values()]
    return sorted(found, key=lambda span: span.begin_s)


def _span(event: EventRecord, end_s: float | None) -> Span:
    return Span(event.began_s, end_s, event.kind, COLORS.get(event.kind, QUIET))


def draw(observation: Observation, path: Path) -> Path:
    """Draw to a PNG file. Raises ConfigError if matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError('a picture needs matplotlib, which is not installed: pip install "adapt-inference[plot]"') from None
    names = list(observation.samples)
    lane_in = min(MOST_LANE_IN, max(LEAST_LANE_IN, LANES_IN / max(len(names), 1)))
    height_in = HEAD_IN + FOOT_IN + lane_in * max(len(names), 1)
    figure = Figure(figsize=(WIDTH_IN, height_in))
    FigureCanvasAgg(figure)
    figure.subplots_adjust(
        left=LEFT_IN / WIDTH_IN,
        right=1 - RIGHT_IN / WIDTH_IN,
        top=1 - HEAD_IN / height_in,
        bottom=FOOT_IN / height_in,
        hspace=GAP_IN / (lane_in - GAP_IN),
    )
    lanes = list(figure.subplots(max(len(names), 1), 1, sharex=True, squeeze=False)[:, 0])
    sheet = _Sheet(observation, lane_in)
    for lane, name in zip(lanes, names, strict=False):
        sheet.draw_lane(lane, name)
    if not names:
        lanes[0].text(0.5, 0.5, "nothing was sampled", transform=lanes[0].transAxes, ha="center", va="center", color=QUIET)
        lanes[0].set_yticks([])
    sheet.finish(lanes)
    _write_head(figure, observation, sheet.top_rate, height_in)
    figure.savefig(path, dpi=DPI)
    return path


class _Sheet:
    """What all lanes have in common. Lanes are axes of matplotlib, which has no types.

    Attributes:
        top_rate: bytes per second at the height at which CPU is all that a device may have.
    """

    def __init__(self, observation: Observation, lane_in: float) -> None:
        self._seen = observation
        every = [sample for samples in observation.samples.values() for sample in samples]
        self._begin_s = min((sample.at_s - sample.span_s for sample in every), default=0.0)
        ends = [sample.at_s for sample in every] + [event.began_s + event.took_s for event in observation.events]
        self._end_s = max(*ends, self._begin_s + 1e-3) if ends else self._begin_s + 1.0
        self.top_rate = _rounded_up(max((_rate(sample) for sample in every), default=0.0))
        self._word_rows = 2 if lane_in >= 0.85 else 1
        words_in = self._word_rows * WORD_ROW_IN
        drawn_in = lane_in - GAP_IN
        self._unit_in = drawn_in - words_in - 0.03  # height of all a device may have
        self._top = drawn_in / self._unit_in
        self._s_per_in = (self._end_s - self._begin_s) / (WIDTH_IN - LEFT_IN - RIGHT_IN)

    def draw_lane(self, lane: Any, name: str) -> None:
        samples, may_have = self._seen.samples[name], self._seen.facts.cores(name)
        scale = may_have or max(1, math.ceil(max((sample.cores for sample in samples), default=1.0) - 0.05))
        for begin_s, end_s in _dead(samples):
            lane.axvspan(begin_s, end_s, ymax=0.05, color=GONE, linewidth=0)
        for span in [*spans(self._seen.events, name), *spans(self._seen.events, ETCD)]:
            if span.end_s is not None:
                lane.axvspan(span.begin_s, min(span.end_s, self._end_s), color=span.color, alpha=0.16, linewidth=0)
            lane.axvline(span.begin_s, color=span.color, linewidth=1.1, alpha=0.9)
        self._write_words(lane, name)
        if samples:
            edges = [samples[0].at_s - samples[0].span_s, *(sample.at_s for sample in samples)]
            shares = [min(sample.cores / scale, MOST_SHARE) for sample in samples]
            lane.fill_between(edges, [shares[0], *shares], step="pre", color=CPU, linewidth=0, alpha=0.95)
            lane.step(edges, [shares[0], *shares], where="pre", color=CPU_EDGE, linewidth=0.7)
            rates = [_rate(sample) / self.top_rate for sample in samples]
            lane.plot([sample.at_s - sample.span_s / 2 for sample in samples], rates, color=RATE, linewidth=0.8)
        lane.axhline(1.0, color=QUIET, linewidth=0.6, linestyle=(0, (1, 3)))
        held = f"of {scale:g} {'core' if scale == 1 else 'cores'}" + ("" if may_have else ", no limit")
        self._write_margins(lane, name, held, max((_rate(sample) for sample in samples), default=0.0))

    def finish(self, lanes: Sequence[Any]) -> None:
        """Axes, grid and the line at which the schedule begins."""
        for lane in lanes:
            lane.set_ylim(0, self._top)
            lane.set_yticks([])
            lane.set_xlim(self._begin_s, self._end_s)
            lane.grid(axis="x", color=FAINT, linewidth=0.7)
            lane.set_axisbelow(True)
            lane.tick_params(axis="x", length=0, labelsize=SMALL, labelcolor=INK)
            lane.spines[["left", "right", "top"]].set_visible(False)
            lane.spines["bottom"].set_color(GONE)
            if self._begin_s < -0.02 * (self._end_s - self._begin_s):
                lane.axvline(0.0, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        if self._begin_s < -0.02 * (self._end_s - self._begin_s):
            lanes[0].annotate(
                "schedule begins", (0.0, self._top), xytext=(3, 2), textcoords="offset points", fontsize=WORD_SIZE, color=INK, va="bottom"
            )
        k = self._seen.facts.time_scale
        slower = "" if k == 1 else f"   ({k:g} s here stand for 1 s: everything is {k:g} times as slow)"
        lanes[-1].set_xlabel(f"seconds{slower}", fontsize=NORMAL, color=INK, labelpad=6)

    def _write_words(self, lane: Any, name: str) -> None:
        """Above the lane, in the first row that has room; a word for which there is none is left out."""
        taken_s = [-math.inf] * self._word_rows
        for span in sorted(self._worded(name), key=lambda span: span.begin_s):
            width_s = (len(span.word) * LETTER_IN + 0.06) * self._s_per_in
            begin_s = min(span.begin_s, self._end_s - width_s)
            row = next((row for row, until_s in enumerate(taken_s) if until_s <= begin_s), None)
            if row is None:
                continue
            taken_s[row] = begin_s + width_s
            height = self._top - (row + 0.5) * WORD_ROW_IN / self._unit_in
            lane.annotate(
                span.word, (begin_s, height), xytext=(3, 0), textcoords="offset points", va="center", fontsize=WORD_SIZE, color=span.color
            )

    def _worded(self, name: str) -> list[Span]:
        is_first = name == next(iter(self._seen.samples))
        return spans(self._seen.events, name) + (spans(self._seen.events, ETCD) if is_first else [])

    def _write_margins(self, lane: Any, name: str, held: str, peak: float) -> None:
        left = {"xycoords": "axes fraction", "textcoords": "offset points", "annotation_clip": False, "va": "center"}
        middle = 0.5 / self._top
        lane.annotate(name, (0, middle), xytext=(-10, 6), ha="right", fontsize=NORMAL, fontweight="bold", color=INK, **left)
        lane.annotate(held, (0, middle), xytext=(-10, -6), ha="right", fontsize=WORD_SIZE, color=QUIET, **left)
        lane.annotate("at most", (1, middle), xytext=(8, 6), ha="left", fontsize=WORD_SIZE, color=QUIET, **left)
        lane.annotate(_rate_words(peak), (1, middle), xytext=(8, -5), ha="left", fontsize=SMALL, color=INK, **left)


def _write_head(figure: Any, seen: Observation, top_rate: float, height_in: float) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    facts, has_etcd = seen.facts, any(event.device == ETCD for event in seen.events)
    held = "isolated" if facts.is_isolated else "NOT isolated: CPU, memory and rates were not limited"
    left, top = 0.25 / WIDTH_IN, 1 - 0.2 / height_in
    figure.text(left, top, facts.cluster, fontsize=TITLE, fontweight="bold", color=INK, va="top")
    words = f"seed {facts.seed}, time scale {facts.time_scale:g}, {held}"
    figure.text(left, 1 - 0.5 / height_in, words, fontsize=NORMAL, color=INK if facts.is_isolated else DEAD, va="top")
    handles = [
        Patch(facecolor=CPU, edgecolor=CPU_EDGE, linewidth=0.7, label="CPU (dotted: all it may have)"),
        Line2D([], [], color=RATE, linewidth=0.9, label=f"sent and received (dotted: {_rate_words(top_rate)})"),
        *(Patch(facecolor=color, alpha=0.35, label=label) for label, (color, _) in CLASSES.items() if has_etcd or color != STORE),
        Patch(facecolor=GONE, label="no worker"),
    ]
    figure.legend(
        handles=handles, loc="upper right", bbox_to_anchor=(1 - 0.15 / WIDTH_IN, 1 - 0.12 / height_in), ncols=3, frameon=False,
        fontsize=SMALL, labelcolor=INK, handlelength=1.6, columnspacing=1.6, handletextpad=0.6,
    )  # fmt: skip


def _dead(samples: Sequence[Sample]) -> Iterator[tuple[float, float]]:
    """The times in which its worker did not live."""
    begin_s: float | None = None
    for sample in samples:
        if not sample.is_alive and begin_s is None:
            begin_s = sample.at_s - sample.span_s
        if sample.is_alive and begin_s is not None:
            yield begin_s, sample.at_s - sample.span_s
            begin_s = None
    if begin_s is not None:
        yield begin_s, samples[-1].at_s


def _rate(sample: Sample) -> float:
    return sample.up_bytes_per_s + sample.down_bytes_per_s


def _rounded_up(rate: float) -> float:
    """To a round number; at least 1 kB/s, so that silence looks silent."""
    power = 10.0 ** math.floor(math.log10(max(rate, 1e3)))
    return next(step * power for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10, 20) if step * power >= rate)


def _rate_words(rate: float) -> str:
    for unit, size in (("GB/s", 1e9), ("MB/s", 1e6), ("kB/s", 1e3)):
        if rate >= size:
            return f"{rate / size:.3g} {unit}"
    return f"{rate:.0f} B/s"
