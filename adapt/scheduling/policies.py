"""Ways to choose a worker. A policy orders candidates and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from adapt.protocol.ids import WorkerId


class Candidate(NamedTuple):
    """A worker that could run a task, as a policy sees it."""

    worker_id: WorkerId
    backlog_s: float  # until it has finished what it holds
    service_s: float  # decode, compute and encode of this task
    transfer_s: float  # its input there and its output back
    last_used: float  # moment of its latest dispatch


Policy: TypeAlias = Callable[[Candidate], tuple[float, float, WorkerId]]


def earliest_finish(candidate: Candidate) -> tuple[float, float, WorkerId]:
    """Where the task would be finished first; of equals, the one that has rested longest."""
    finish_s = candidate.backlog_s + candidate.service_s + candidate.transfer_s
    return (finish_s, candidate.last_used, candidate.worker_id)


POLICIES: dict[str, Policy] = {"earliest-finish": earliest_finish}
