"""Where to cut a model into a given number of stages: exact, for stages on equal devices.

A stage's cost is the sum of its operators' costs, and what its worker does with the bytes that come and leave at its cuts; the pipeline is as
slow as its slowest stage. Two passes of dynamic programming over the legal cuts:

1. the smallest possible maximum:  best[k][j] = min over i < j of max(best[k-1][i], cost(i, j))
2. among the partitions within that maximum and a little more (`slack`), the fewest crossing bytes in all; then the earliest cuts.

One pass over pairs (maximum, bytes) would be wrong: a prefix with the smaller maximum but more bytes would win,
although a later stage sets the maximum anyway. O(stages * cuts^2), with numpy for the inner two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt

from adapt.errors import PlanError
from adapt.planning.profiles import CutPoint

Floats = npt.NDArray[np.float64]


def partition(costs_s: Sequence[float], cuts: Sequence[CutPoint], stages: int, *, byte_s: float = 0.0, slack: float = 0.0) -> list[int]:
    """Choose `stages - 1` cuts that minimise the cost of the slowest stage.

    Args:
        costs_s: seconds of each operator.
        cuts: legal cuts, positions rising; each strictly inside the list of operators.
        stages: how many stages, at least 1.
        byte_s: seconds of each of the two workers for a byte that crosses between them.
        slack: how much slower the slowest stage may be, as a share, if fewer bytes cross then.

    Returns:
        The positions of the chosen cuts, rising: stage k runs the operators from position k-1 to position k.

    Raises:
        PlanError: there are fewer legal cuts than needed; the message names the largest number of stages.
        ValueError: costs or cuts are not as described.
    """
    _check(costs_s, cuts, byte_s)
    if not 0.0 <= slack < math.inf:
        raise ValueError(f"slack {slack!r}: expected a share of at least 0")
    if stages < 1:
        raise PlanError(f"a model cannot be cut into {stages} stages; at least 1 is needed")
    if stages > len(cuts) + 1:
        raise PlanError(f"{stages} stages were asked for, but the legal cuts allow at most {len(cuts) + 1}")
    crossing_bytes = np.array([0.0, *(cut.crossing_bytes for cut in cuts), 0.0])
    times = _stage_times(costs_s, cuts, byte_s * crossing_bytes)
    limit = _smallest_maximum(times, stages) * (1.0 + slack)
    chosen = _fewest_bytes(times <= limit, crossing_bytes, stages)
    return [cuts[boundary - 1].position for boundary in chosen]


def stage_costs_s(costs_s: Sequence[float], positions: Sequence[int]) -> list[float]:
    """Seconds of each stage when cut at `positions`."""
    prefix = [0.0, *accumulate(costs_s)]
    return [prefix[end] - prefix[begin] for begin, end in zip((0, *positions), (*positions, len(costs_s)), strict=True)]


def _check(costs_s: Sequence[float], cuts: Sequence[CutPoint], byte_s: float) -> None:
    if not all(math.isfinite(cost) and cost >= 0 for cost in (*costs_s, byte_s)):
        raise ValueError("costs must be finite and not negative")
    positions = [0, *(cut.position for cut in cuts), len(costs_s)]
    if cuts and any(before >= after for before, after in pairwise(positions)):
        raise ValueError(f"cuts must rise strictly inside 0..{len(costs_s)}, got {positions[1:-1]}")


def _stage_times(costs_s: Sequence[float], cuts: Sequence[CutPoint], handling_s: Floats) -> Floats:
    """times[i, j]: what a stage from boundary i to boundary j takes, with the handling of what crosses both; infinite for j <= i.

    Boundary 0 is the start, len(cuts) + 1 the end, the cuts lie between.
    """
    prefix = np.array([0.0, *accumulate(costs_s)])
    at_boundary = prefix[[0, *(cut.position for cut in cuts), len(costs_s)]]
    times: Floats = at_boundary[None, :] - at_boundary[:, None] + handling_s[:, None] + handling_s[None, :]
    times[np.tri(len(at_boundary), dtype=bool)] = np.inf
    return times


def _smallest_maximum(times: Floats, stages: int) -> float:
    best = times[0]
    for _ in range(stages - 1):
        best = np.maximum(best[:, None], times).min(axis=0)
    return float(best[-1])


def _fewest_bytes(is_allowed: npt.NDArray[np.bool_], crossing_bytes: Floats, stages: int) -> list[int]:
    """Boundaries of the allowed partition with the fewest crossing bytes; of equal ones the earliest cuts.

    `rest[k][i]`: fewest bytes that still cross when k stages follow boundary i. Walking forward from the start
    then takes, at each step, the earliest boundary that keeps the optimum. (Bytes below 2**53 add exactly.)
    """
    allowed_bytes = np.where(is_allowed, crossing_bytes[None, :], np.inf)
    rest = [np.full(len(crossing_bytes), np.inf)]
    rest[0][-1] = 0.0
    for _ in range(stages):
        rest.append((allowed_bytes + rest[-1][None, :]).min(axis=1))
    chosen, boundary = [], 0
    for left in range(stages - 1, 0, -1):
        boundary = int(np.argmin(allowed_bytes[boundary] + rest[left]))
        chosen.append(boundary)
    return chosen
