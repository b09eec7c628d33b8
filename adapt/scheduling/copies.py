"""Which stages of a worker are copies: others have them too, so that they may give way to what nobody has. It reads, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from adapt.planning.placement import StageNeed, WorkerOffer
from adapt.protocol.ids import Digest
from adapt.scheduling.roster import Member, Roster
from adapt.scheduling.versions import Wanted


class Copies:
    """See the head of this file.

    Args:
        wanting: all that have an artifact. offer: what a worker has to give besides what plans take.
    """

    def __init__(self, roster: Roster, wanting: Callable[[Digest], Iterable[Wanted]], offer: Callable[[Member], WorkerOffer]) -> None:
        self._roster, self._wanting, self._offer = roster, wanting, offer

    def enough(self, member: Member, missing_bytes: int) -> list[StageNeed] | None:
        """As few of the worker's copies as make so much room; None: there are not enough."""
        dropped: list[StageNeed] = []
        for need in sorted(self._of(member), key=lambda need: (-need.memory_bytes, need.artifact)):
            if missing_bytes > 0:
                dropped.append(need)
                missing_bytes -= need.memory_bytes
        return dropped if missing_bytes <= 0 else None

    def offer(self, member: Member) -> WorkerOffer:
        """What the worker has to give if its copies gave way; of each stage the first worker by name keeps it."""
        offer = self._offer(member)
        return replace(
            offer, free_bytes=offer.free_bytes + sum(n.memory_bytes for n in self._of(member) if not self._keeps(member, n.artifact))
        )

    def _of(self, member: Member) -> list[StageNeed]:
        """What the worker has, and every version that wants it there can do without."""
        found = []
        for artifact in sorted(member.resident):
            wanted = [item for item in self._wanting(artifact) if member.worker_id in item.workers]
            if wanted and all(self._is_elsewhere(item, member) for item in wanted):
                found.append(wanted[0].need)
        return found

    def _is_elsewhere(self, item: Wanted, member: Member) -> bool:
        """Whether another can run it: where requests stay in one numeric class, one of the same."""
        numeric_class = member.numeric_class if item.live.version.exact else None
        return any(self._roster.has(other, item.need.artifact, numeric_class) for other in item.workers if other != member.worker_id)

    def _keeps(self, member: Member, artifact: Digest) -> bool:
        holders = [worker for item in self._wanting(artifact) for worker in item.workers if self._roster.has(worker, artifact)]
        return member.worker_id == min(holders, default=member.worker_id)
