"""One picture of a model's profile: what each layer takes, and what crosses the cut after it.

    above    milliseconds of each layer, from left to right, for each kind of device, and how much of the first kind's time has gone by.
             Thin words: where the larger parts of the model begin
    below    bytes that cross each legal cut, on a logarithmic scale; the line is the input's

PNG, without a display and without touching the state of pyplot.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

from adapt.errors import ConfigError
from adapt.planning.model import MEBIBYTE, ModelProfile

SIZE_IN, DPI = (12.0, 6.2), 140
INK, QUIET, FAINT = "#1f2328", "#6b7280", "#e3e6ea"
KINDS = ("#3f78b5", "#d07a12", "#2f7f6f", "#7a4fb0", "#c0392b", "#5b6b7a")
CUT, FULL = "#2f7f6f", "#b9d3ea"
SMALL, NORMAL, TITLE = 8, 9.5, 14
MOST_WORDS, WORD_LETTERS = 16, 14  # of parts, that stand above the picture
APART = 0.035  # of the width, between two words
TITLE_LETTERS = 96


def draw(model: ModelProfile, path: Path) -> None:
    """Draw to a PNG file. Raises ConfigError if matplotlib is not installed, or the file cannot be written."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError('a picture needs matplotlib, which is not installed: pip install "adapt-inference[plot]"') from None
    figure = Figure(figsize=SIZE_IN)
    FigureCanvasAgg(figure)
    costs, cuts = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (3, 2), "hspace": 0.08})
    figure.subplots_adjust(left=0.07, right=0.94, top=0.83, bottom=0.09)
    _draw_costs(costs, model)
    _draw_cuts(cuts, model)
    _name_parts(costs, model)
    figure.text(0.07, 0.945, model.name, fontsize=TITLE, color=INK, weight="bold")
    words = f"{len(model.layers) - 1} legal cuts, {model.weights_before[-1] / MEBIBYTE:.1f} MiB of weights, a batch of one"
    figure.text(0.94, 0.945, words, fontsize=NORMAL, color=QUIET, ha="right")
    try:
        figure.savefig(path.expanduser(), dpi=DPI, format="png", facecolor="white")
    except OSError as error:
        raise ConfigError(f"plot={path}: {error.strerror}") from None


def _draw_costs(axes: Any, model: ModelProfile) -> None:
    kinds = [(f"{kind.device_class} on {kind.workers[0]}", kind.costs_s) for kind in model.measured if kind.workers]
    kinds = kinds or [(model.reference or "the reference device", tuple(layer.cost_s for layer in model.layers))]
    places = range(len(model.layers))
    for number, (title, costs_s) in enumerate(kinds):
        values, color = [cost * 1e3 for cost in costs_s], KINDS[number % len(KINDS)]
        label = f"{title[:TITLE_LETTERS]}: {sum(values):,.1f} ms"
        if number == 0:
            axes.bar(places, values, width=0.92, align="edge", color=FULL, edgecolor=color, linewidth=0.4, label=label)
        else:
            axes.stairs(values, range(len(values) + 1), color=color, linewidth=1.2, label=label)
    axes.set_ylabel("ms per layer", fontsize=NORMAL, color=INK)
    axes.set_xlim(0, len(model.layers))
    axes.set_ylim(0, 1.25 * max((cost * 1e3 for _, costs_s in kinds for cost in costs_s), default=1.0) or 1.0)
    _draw_share(axes.twinx(), kinds[0][1])
    axes.legend(fontsize=SMALL, frameon=False, loc="upper right", labelcolor=INK)
    _plain(axes)


def _draw_share(axes: Any, costs_s: Sequence[float]) -> None:
    total_s = sum(costs_s) or 1.0
    axes.plot(range(len(costs_s) + 1), [100 * gone / total_s for gone in accumulate(costs_s, initial=0.0)], color=QUIET, linewidth=0.9)
    axes.set_ylim(0, 125)
    axes.set_yticks((0, 25, 50, 75, 100))
    axes.set_ylabel("% of the time so far", fontsize=NORMAL, color=QUIET)
    _plain(axes)


def _draw_cuts(axes: Any, model: ModelProfile) -> None:
    crossing = [layer.output_bytes / 1e3 for layer in model.layers[:-1]]
    places = range(1, len(model.layers))
    axes.vlines(places, 1e-3, crossing, color=CUT, linewidth=max(0.5, min(2.0, 160 / max(len(crossing), 1))))
    axes.plot(places, crossing, linestyle="none", marker="o", markersize=2.4, color=CUT)
    axes.axhline(model.input_bytes / 1e3, color=QUIET, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.text(len(model.layers), model.input_bytes / 1e3, " the input", fontsize=SMALL, color=QUIET, ha="left", va="center")
    if any(crossing):
        axes.set_yscale("log")
        sizes = [size for size in (*crossing, model.input_bytes / 1e3) if size > 0]
        axes.set_ylim(min(sizes) / 2, max(sizes) * 3)
    axes.set_ylabel("kB across each cut", fontsize=NORMAL, color=INK)
    axes.set_xlabel("layers, in the order in which they run", fontsize=NORMAL, color=INK)
    _plain(axes)


def _name_parts(axes: Any, model: ModelProfile) -> None:
    """Above the picture: where the outermost parts of the model begin, as far as there is room for words."""
    depth, parts = 1, _parts(model, 1)
    while len(parts) < MOST_WORDS // 2 and depth < 4 and len(_parts(model, depth + 1)) <= MOST_WORDS:
        depth, parts = depth + 1, _parts(model, depth + 1)
    ends = [begin for begin, _ in parts[1:]] + [len(model.layers)]
    sizes = {begin: end - begin for (begin, _), end in zip(parts, ends, strict=True)}
    shown: list[int] = []
    for begin, word in sorted(parts, key=lambda part: -sizes[part[0]]):
        if any(abs(begin - other) < APART * len(model.layers) for other in shown) or len(shown) == MOST_WORDS:
            continue
        shown.append(begin)
        axes.axvline(begin, color=FAINT, linewidth=0.8, zorder=0)
        short = word if len(word) <= WORD_LETTERS else f"{word[: WORD_LETTERS - 1]}…"
        axes.text(
            begin, 1.02, short, transform=axes.get_xaxis_transform(), fontsize=SMALL, color=QUIET, rotation=35, ha="left", va="bottom"
        )


def _parts(model: ModelProfile, depth: int) -> list[tuple[int, str]]:
    begin, parts = 0, []
    for place, layers in groupby(".".join(layer.place.split(".")[:depth]) for layer in model.layers):
        parts.append((begin, place))
        begin += len(list(layers))
    return parts


def _plain(axes: Any) -> None:
    axes.tick_params(labelsize=SMALL, colors=QUIET, length=3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
