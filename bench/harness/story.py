"""A story of mishaps: what was done when, what was asked and answered meanwhile, and what each phase cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.harness.ledger import Request
from bench.harness.timeline import longest_gap_s, lowest_rate, mean_rate, percentile_s, recovery_s, settled_rate
from bench.harness.watch import Seen, first_sign

PAST = {
    "steady": "steady",
    "kill": "killed",
    "restart": "restarted",
    "stop": "stopped",
    "continue": "continued",
    "slow": "slowed to 1/5",
    "restore": "restored",
    "add": "added",
}


@dataclass(frozen=True, slots=True)
class Step:
    """One phase: what is done to whom, and how long it lasts from the moment when that is done."""

    action: str
    device: str
    length_s: float

    @property
    def words(self) -> str:
        return f"{self.device} {PAST[self.action]}".strip()


@dataclass(frozen=True, slots=True)
class Phase:
    """A step that was performed. Moments are seconds since the story began.

    Attributes:
        at_s, until_s: from its action to the next.
        held: the stages of its device before, counted from 0.
        others_cores: that something else kept busy meanwhile.
    """

    step: Step
    at_s: float
    until_s: float
    held: tuple[int, ...] = ()
    others_cores: float = math.nan


@dataclass(slots=True)
class Story:
    """One round: what was done, what was asked, what the dispatcher knew."""

    round: int
    phases: list[Phase] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    looks: list[Seen] = field(default_factory=list)
    chain: list[Request] = field(default_factory=list)
    chain_killed_s: float = math.nan

    @property
    def end_s(self) -> float:
        return self.phases[-1].until_s


@dataclass(frozen=True, slots=True)
class Cost:
    """What one phase cost. A line of the file of faults; rates are answers per second, shares those of the steady rate."""

    round: int
    action: str
    device: str
    stages_held: str
    at_s: float
    until_s: float
    noticed_s: float
    noticed_by: str
    rate_per_s: float
    settled_per_s: float
    lowest_share: float
    settled_share: float
    recovered_s: float
    gap_s: float
    p50_s: float
    p99_s: float
    answered: int
    lost: int
    duplicated: int
    wrong: int
    others_cores: float


def moments(requests: Sequence[Request]) -> list[float]:
    """When the right answers came."""
    return sorted(request.ended_s for request in requests if request.answers and request.is_right)


def costs(story: Story) -> list[Cost]:
    came = moments(story.requests)
    steady_per_s = mean_rate(came, story.phases[0].at_s, story.phases[0].until_s)
    return [_cost(story, phase, came, steady_per_s) for phase in story.phases]


def _cost(story: Story, phase: Phase, came: Sequence[float], steady_per_s: float) -> Cost:
    span = (phase.at_s, phase.until_s)
    mine = [request for request in story.requests if counts_for(request, phase, story)]
    latencies = [request.latency_s for request in mine if request.answers]
    sign = first_sign(story.looks, phase.step.device, *span) if phase.step.device else None
    settled = settled_rate(came, *span)
    return Cost(
        round=story.round,
        action=phase.step.action,
        device=phase.step.device,
        stages_held=" ".join(str(stage + 1) for stage in phase.held),
        at_s=phase.at_s,
        until_s=phase.until_s,
        noticed_s=sign.at_s - phase.at_s if sign else math.nan,
        noticed_by=sign.words if sign else "",
        rate_per_s=mean_rate(came, *span),
        settled_per_s=settled,
        lowest_share=lowest_rate(came, *span) / steady_per_s if steady_per_s else math.nan,
        settled_share=settled / steady_per_s if steady_per_s else math.nan,
        recovered_s=recovery_s(came, *span),
        gap_s=longest_gap_s(came, *span),
        p50_s=percentile_s(latencies, 50),
        p99_s=percentile_s(latencies, 99),
        answered=len(latencies),
        lost=sum(request.is_lost for request in mine),
        duplicated=sum(request.answers > 1 for request in mine),
        wrong=sum(not request.is_right for request in mine),
        others_cores=phase.others_cores,
    )


def counts_for(request: Request, phase: Phase, story: Story) -> bool:
    """A request counts where it ended; what came after the last phase, for that; what never did, where it was asked."""
    moment = min(request.ended_s, story.end_s - 1e-9) if request.has_ended else request.asked_s
    return phase.at_s <= moment < phase.until_s
