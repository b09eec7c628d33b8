"""Who may run a request's stage now, and where it should be finished first."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from adapt.protocol.ids import WorkerId
from adapt.scheduling.policies import Candidate, Rank
from adapt.scheduling.qos import usable
from adapt.scheduling.requests import Request
from adapt.scheduling.residency import Residency
from adapt.scheduling.roster import Member, Roster

REGAINED_SHARE = 0.05  # a worker that rests is thought to be nearer by so much of its rest: else one bad moment would keep it resting


class Choice:
    """It decides nothing but this, and changes nothing.

    Attributes:
        troubled: workers whose breaker was not closed when the scheduler last looked; while there are none, nobody asks breakers.
    """

    def __init__(self, roster: Roster, residency: Residency, policy: Callable[[Candidate], Rank]) -> None:
        self._roster, self._residency, self._policy = roster, residency, policy
        self.troubled: set[WorkerId] = set()

    def eligible(self, request: Request, now: float) -> list[Member]:
        """The workers that may run the request's current stage now, whether or not they have credit."""
        artifact = request.need.artifact
        busy_with_it = {attempt.worker_id for attempt in request.attempts.values()}
        able = []
        for worker_id in self._residency.live(request.version).plan.places[request.stage]:
            member = self._roster.get(worker_id)
            if member is None or not member.is_ready or artifact not in member.resident or worker_id in busy_with_it:
                continue
            if request.suits(member.numeric_class):
                able.append(member)
        if (check := request.check) is not None and check.answers:  # only the same bits, or not, tell whether they are right
            able = [m for m in able if check.may_tell(m.worker_id, m.numeric_class) and m.worker_id not in request.failed_on]
        if request.deviants and (run := request.run) is not None:  # only the same bits, or not, tell who is wrong
            able = [member for member in able if run.trial.is_comparable(run, request.numeric_classes | {member.numeric_class})] or able
        able = [member for member in able if member.worker_id not in request.failed_on] or able
        if request.run is not None:
            untried = request.run.trial.untried(request.stage, [member.worker_id for member in able])
            able = [member for member in able if member.worker_id in untried]
        return self._usable(able, now) if self.troubled else able

    def best(self, request: Request, among: list[Member], waiting_s: Mapping[WorkerId, float], now: float) -> tuple[Member, float]:
        """The worker that the policy puts first, and the seconds after which the request should be finished there.

        Args:
            among: one at least.
            waiting_s: backlog of each worker that is not with it yet.
        """
        best: tuple[Rank, Member, float] | None = None
        for member in among:
            service_s, transfer_s = self.expect(request, member)
            transfer_s = max(transfer_s - REGAINED_SHARE * (now - member.last_used), 0.0)
            backlog_s = member.backlog_s(now) + waiting_s.get(member.worker_id, 0.0)
            penalty = member.qos.penalty(now)
            rank = self._policy(Candidate(member.worker_id, backlog_s, service_s, transfer_s, member.last_used, penalty, member.load))
            if best is None or rank < best[0]:
                best = (rank, member, backlog_s + service_s + transfer_s)
        assert best is not None
        return best[1], best[2]

    def expect(self, request: Request, member: Member) -> tuple[float, float]:
        """Seconds that the request's stage should keep the worker busy, and seconds on the way."""
        return member.expect(request.need.artifact, request.need.cost_s, request.activation.size_bytes)

    def _usable(self, able: list[Member], now: float) -> list[Member]:
        """Those whose breakers let them have a task; at least half of them, whatever the breakers say."""
        kept = {*usable({member.worker_id: member.qos for member in able}, [member.worker_id for member in able], now)}
        return [member for member in able if member.worker_id in kept]
