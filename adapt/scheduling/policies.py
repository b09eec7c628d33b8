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
    penalty: float = 0.0  # for its failures, see qos.py
    load: float = 0.0  # percent of memory in use


Rank: TypeAlias = tuple[float | WorkerId, ...]  # the least is chosen; a policy's ranks are all of one shape
Policy: TypeAlias = Callable[[Candidate], Rank]


PENALTY_THAT_DOUBLES = 100.0  # what a worker promises is believed the less, the more it has failed


def earliest_finish(candidate: Candidate) -> tuple[float, float, WorkerId]:
    """Where the task would be finished first, penalties being a factor; of equals, the one that has rested longest."""
    finish_s = candidate.backlog_s + candidate.service_s + candidate.transfer_s
    return (finish_s * (1.0 + candidate.penalty / PENALTY_THAT_DOUBLES), candidate.last_used, candidate.worker_id)


def lowest_memory(candidate: Candidate) -> tuple[float, float, float, WorkerId]:
    """The published rule: least memory in use plus penalty; of equals, the shorter backlog, then the one that has rested longest."""
    return (candidate.load + candidate.penalty, candidate.backlog_s, candidate.last_used, candidate.worker_id)


POLICIES: dict[str, Policy] = {"earliest-finish": earliest_finish, "lowest-memory": lowest_memory}
