"""Canaries: inputs of which is known what a version has to make of them. It takes no requests before they have come out right.

    loading ──resident──▶ on trial ──all runs right──▶ ready, and takes the requests of its deployment
       │                     └─a run is wrong, or has no answer in time──▶ failed; whoever had the requests keeps them
       └─refused by all──▶ failed

Each canary is run as often as some stage has holders, and each run goes, stage by stage, to a holder that has not tried that stage yet:
so every worker that is to take requests has been seen to be right. A few run at a time, so that none waits long for another and clients
have their workers. A run is a request of the dispatcher's own. It fails on one worker and
is tried on another as any request is, so what differs is known: two workers that give another output than the exporting process, or one of
which there is no second whose bits can be compared, speak against the version; one that is alone with it speaks against itself, and loses
the stage.

Bits can only agree with what was computed in the same numeric class, and behind lossless codecs. There every stage's output is compared, by
its digest. Elsewhere the final output is, within a tolerance: by the runtime, for that takes its bytes (`JudgeCanary`).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from adapt.protocol.ids import ClientId, WorkerId
from adapt.scheduling.events import Canary, Version

OWN_CLIENT = ClientId(bytes(16))  # under whose name the dispatcher asks
BUDGET_S = 60.0  # for each run, from when it begins
MOST_RUNS = 64  # of one version: with very many workers some are not tried
MOST_AT_ONCE = 4  # of these
MOST_ASKED = 2  # how often a worker that does not answer is preferred, because it has not been tried


@dataclass(slots=True)
class Run:
    """One canary on its way through the stages."""

    number: int
    canary: int  # which one
    trial: Trial
    at: tuple[int, WorkerId] | None = None  # the stage, and the worker that was asked last


@dataclass(slots=True)
class Trial:
    """A version that is tried."""

    version: Version
    canaries: tuple[Canary, ...]
    waiting: deque[Run] = field(default_factory=deque)  # runs that have not begun
    begun: dict[int, Run] = field(default_factory=dict)  # runs that have, and have not come out right yet
    asked: Counter[tuple[int, WorkerId]] = field(default_factory=Counter)  # how often (stage, worker) was given one
    at_once: int = 1
    tried: set[tuple[int, WorkerId]] = field(default_factory=set)  # (stage, worker) that has answered one

    def begin(self, holders: Sequence[int]) -> list[Run]:
        """The first runs, for stages with so many holders each: one for each holder of the narrowest, where one would wait for another."""
        times = max(min(max(holders), MOST_RUNS // len(self.canaries)), 1)
        self.waiting.extend(Run(number, number % len(self.canaries), self) for number in range(times * len(self.canaries)))
        self.at_once = max(min(*holders, MOST_AT_ONCE), 1)
        return self._next()

    def _next(self) -> list[Run]:
        """Those that are to begin now."""
        runs = []
        while self.waiting and len(self.begun) < self.at_once:
            runs.append(run := self.waiting.popleft())
            self.begun[run.number] = run
        return runs

    def untried(self, stage: int, workers: Sequence[WorkerId]) -> set[WorkerId]:
        """Those of the workers that have not tried the stage, nor are about to; all, if none is left."""
        known = self.tried | {run.at for run in self.begun.values()}
        fresh = {worker_id for worker_id in workers if (stage, worker_id) not in known and self.asked[stage, worker_id] < MOST_ASKED}
        return fresh or set(workers)

    def give(self, run: Run, stage: int, worker_id: WorkerId) -> None:
        """The run goes there."""
        run.at = (stage, worker_id)
        self.asked[stage, worker_id] += 1

    def is_comparable(self, run: Run, numeric_classes: set[str]) -> bool:
        """Whether what workers of these classes have made of it has to have the same bits."""
        return self.version.is_lossless and self.version.classes(numeric_classes) == (self.canaries[run.canary].numeric_class,)

    def agrees(self, run: Run, stage: int, numeric_classes: set[str], digest: bytes) -> bool:
        """Whether a stage's output is what it has to be, as far as its bits tell."""
        return not self.is_comparable(run, numeric_classes) or digest == self.canaries[run.canary].digests[stage]

    def passed(self, number: int) -> list[Run]:
        """This run has come out right; those that are to begin after it."""
        self.begun.pop(number, None)
        return self._next()

    @property
    def has_passed(self) -> bool:
        """Whether all runs have come out right."""
        return not self.begun and not self.waiting
