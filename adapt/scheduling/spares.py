"""Warm spares: stages that a worker has ready although no plan sends it their tasks, so that the loss of who runs them costs no load time.

They are loaded one at a time, when nothing else is, and take room from nobody: what plans want comes first, and spares give way. It
reads, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from adapt.planning.placement import StageNeed, WorkerOffer
from adapt.scheduling.roster import Member, Roster
from adapt.scheduling.versions import LiveVersion


class Spares:
    """See the head of this file.

    Args:
        offer: what a worker has to give besides what plans take.
        wanted: workers that have each stage ready besides the one that is lost; 0: no spares.
    """

    def __init__(self, roster: Roster, offer: Callable[[Member], WorkerOffer], *, wanted: int) -> None:
        self._roster, self._offer, self._wanted = roster, offer, wanted

    @property
    def are_wanted(self) -> bool:
        return self._wanted > 0

    def room_bytes(self, member: Member) -> int:
        """What neither plans nor spares take of its stage budget; below 0: spares have to give way."""
        return self._offer(member).free_bytes - sum(member.spares.values())

    def next(self, versions: Iterable[LiveVersion], now: float) -> tuple[Member, StageNeed] | None:
        """The spare to load now: of what fewest have, what takes longest to load, where most room is left."""
        if not self._wanted or any(member.loading for member in self._roster if member.is_ready):
            return None
        room_bytes = {member.worker_id: self.room_bytes(member) for member in self._roster if _may_have_any(member, now)}
        for _, need, numeric_class in sorted(
            self._lacking(versions), key=lambda found: (found[0], -found[1].memory_bytes, found[1].artifact)
        ):
            able = [
                member
                for member in self._roster
                if room_bytes.get(member.worker_id, -1) >= need.memory_bytes
                and need.artifact not in member.resident
                and numeric_class in (None, member.numeric_class)
                and not member.refuses(need.artifact, now)
            ]
            if able:
                return min(able, key=lambda member: (-room_bytes[member.worker_id], member.worker_id)), need
        return None

    def _lacking(self, versions: Iterable[LiveVersion]) -> Iterator[tuple[int, StageNeed, str | None]]:
        """Stages that too few workers have ready: how many, and the numeric class that they have to be of, where that matters."""
        for live in versions:
            if live.is_retired or not live.is_ready:
                continue
            for need in live.plan.stages:
                having = [member for member in self._roster if member.is_ready and need.artifact in member.resident]
                classes: set[str | None] = {member.numeric_class for member in having} if live.version.exact else {None}
                for numeric_class in classes:
                    count = sum(numeric_class in (None, member.numeric_class) for member in having)
                    if 0 < count <= self._wanted:  # of what nobody has, no plan waits for a spare
                        yield count, need, numeric_class


def _may_have_any(member: Member, now: float) -> bool:
    return member.is_ready and member.spareless_until <= now
