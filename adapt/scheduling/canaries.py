"""Canaries: inputs of which is known what a version has to make of them. It takes no requests before they have come out right.

    loading ──resident──▶ on trial ──all runs right──▶ ready, and takes the requests of its deployment
       │                     └─a run is wrong, or has no answer in time──▶ failed; whoever had the requests keeps them
       └─refused by all──▶ failed

Each canary is run as often as some stage has holders, and each run goes, stage by stage, to a holder that has not tried that stage yet:
so every worker that is to take requests has been seen to be right. A run is a request of the dispatcher's own. It fails on one worker and
is tried on another as any request is, so what differs is known: two workers that give another output than the exporting process, or one of
which there is no second, speak against the version; one that is alone with it speaks against itself, and loses the stage.

Bits can only agree with what was computed in the same numeric class, and behind lossless codecs. There every stage's output is compared, by
its digest. Elsewhere the final output is, within a tolerance: by the runtime, for that takes its bytes (`JudgeCanary`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from adapt.protocol.ids import ClientId, WorkerId
from adapt.scheduling.events import Canary, Version

OWN_CLIENT = ClientId(bytes(16))  # under whose name the dispatcher asks
BUDGET_S = 60.0  # for each run
MOST_RUNS = 64  # of one version: with very many workers some are not tried


@dataclass(slots=True)
class Run:
    """One canary on its way through the stages."""

    number: int
    canary: int  # which one
    trial: Trial


@dataclass(slots=True)
class Trial:
    """A version that is tried. `left`: runs that have not come out right yet, or have not come out."""

    version: Version
    canaries: tuple[Canary, ...]
    left: dict[int, Run] = field(default_factory=dict)
    tried: set[tuple[int, WorkerId]] = field(default_factory=set)  # (stage, worker) that got one

    def begin(self, holders: Sequence[int]) -> list[Run]:
        """The runs, for stages with so many holders each."""
        times = max(min(max(holders), MOST_RUNS // len(self.canaries)), 1)
        runs = [Run(number, number % len(self.canaries), self) for number in range(times * len(self.canaries))]
        self.left = {run.number: run for run in runs}
        return runs

    def untried(self, stage: int, workers: Sequence[WorkerId]) -> set[WorkerId]:
        """Those of the workers that have not tried the stage; all, if none is left."""
        fresh = {worker_id for worker_id in workers if (stage, worker_id) not in self.tried}
        return fresh or set(workers)

    def is_comparable(self, run: Run, numeric_classes: set[str]) -> bool:
        """Whether what workers of these classes have made of it has to have the same bits."""
        return self.version.is_lossless and self.version.classes(numeric_classes) == (self.canaries[run.canary].numeric_class,)

    def agrees(self, run: Run, stage: int, numeric_classes: set[str], digest: bytes) -> bool:
        """Whether a stage's output is what it has to be, as far as its bits tell."""
        return not self.is_comparable(run, numeric_classes) or digest == self.canaries[run.canary].digests[stage]

    def passed(self, number: int) -> bool:
        """This run has come out right. Whether that was the last one."""
        self.left.pop(number, None)
        return not self.left
