"""What a disturbance costs, from the moments of answers alone.

rate ─────╮ at_s                   ╭──────────── settled: mean of the second half of the span; what the remaining workers can do
          │                ╭───────╯
          ╰──── lowest ────╯
          ├──── recovered ─┤                     until the first second whose rate is 90 % of the settled one
            ├─ longest gap ┤
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

LOWEST_WINDOW_S, RECOVERY_WINDOW_S, STEP_S = 0.5, 1.0, 0.05
RECOVERED_SHARE = 0.9


def rates(moments: Sequence[float], begin_s: float, end_s: float, *, window_s: float, step_s: float = STEP_S) -> list[tuple[float, float]]:
    """(beginning, answers per second) of every window that lies within the span. `moments` rise."""
    count = math.floor((end_s - begin_s - window_s) / step_s + 1e-9) + 1
    starts = [begin_s + place * step_s for place in range(max(count, 0))]
    return [(start, _count(moments, start, start + window_s) / window_s) for start in starts]


def mean_rate(moments: Sequence[float], begin_s: float, end_s: float) -> float:
    return _count(moments, begin_s, end_s) / (end_s - begin_s)


def settled_rate(moments: Sequence[float], begin_s: float, end_s: float) -> float:
    """Answers per second in the second half of the span."""
    return mean_rate(moments, (begin_s + end_s) / 2, end_s)


def lowest_rate(moments: Sequence[float], begin_s: float, end_s: float) -> float:
    """Of all windows of half a second."""
    return min((rate for _, rate in rates(moments, begin_s, end_s, window_s=LOWEST_WINDOW_S)), default=math.nan)


def recovery_s(moments: Sequence[float], begin_s: float, end_s: float) -> float:
    """From the beginning of the span until a whole second is back at 90 % of the settled rate; NaN if none is.

    0 if the very first one is: there was no dip below what the rate then settled at, high or low.
    """
    enough = RECOVERED_SHARE * settled_rate(moments, begin_s, end_s)
    windows = rates(moments, begin_s, end_s, window_s=RECOVERY_WINDOW_S)
    return next((start - begin_s for start, rate in windows if rate >= enough > 0), math.nan)


def longest_gap_s(moments: Sequence[float], begin_s: float, end_s: float) -> float:
    """Between two answers that follow each other, from the last one before the span to its end."""
    first = bisect_left(moments, begin_s)
    inside = [*moments[max(first - 1, 0) : bisect_left(moments, end_s)], end_s]
    return max((after - before for before, after in pairwise(inside)), default=end_s - begin_s)


def percentile_s(latencies: Sequence[float], percent: float) -> float:
    return float(np.percentile(np.asarray(latencies), percent)) if latencies else math.nan


def _count(moments: Sequence[float], begin_s: float, end_s: float) -> int:
    return bisect_left(moments, end_s) - bisect_left(moments, begin_s)
