"""What a worker holds: its attempts, from `RunStage` until `StageAck`. Pure.

    from         event                      to
    (unknown)    accept                     held
    (unknown)    cancel                     finished as cancelled, with a tombstone for the `RunStage` on its way
    held         finish                     finished: the answer is kept
    held         hand_back                  (unknown)
    finished     acknowledge                (unknown)
    finished     reopen under another term  finished as cancelled

An answer is kept until it is acknowledged, and sent again in every session. That is bounded: the dispatcher uses a slot
again only after the answer that freed it, and acknowledges an answer soon after, so besides `credit` answers on their
way there are only those whose acknowledgement is. Should a dispatcher not acknowledge, nothing new is accepted
from `KEPT_LIMIT` on.

A dispatcher of another term remembers no attempt, and may use the number of an earlier one for other work. So what was
accepted under another term is never answered but with `StageCancelled`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from adapt.protocol.ids import AttemptId
from adapt.protocol.messages import StageCancelled, StageDone, StageFailed
from adapt.protocol.wire import Blob

KEPT_LIMIT = 1024
TOMBSTONE_LIMIT = 4096

Answer: TypeAlias = StageDone | StageFailed | StageCancelled


class Verdict(StrEnum):
    ACCEPTED = "accepted"
    HELD = "held"  # it is held already
    FINISHED = "finished"  # it is finished: its answer is kept
    CANCELLED = "cancelled"  # it was cancelled before it came
    FULL = "full"  # the credit is used up
    UNKNOWN = "unknown"


@dataclass(slots=True)
class Kept:
    """An answer and whether it has left in this session."""

    answer: Answer
    blobs: tuple[Blob, ...]
    is_sent: bool = False


class Holdings:
    """See the table above. `credit`: how many attempts may be held at a time."""

    def __init__(self, *, credit: int) -> None:
        self._credit = credit
        self._term = 0
        self._held: dict[AttemptId, int] = {}  # -> the term under which it was accepted
        self._kept: dict[AttemptId, Kept] = {}  # in the order in which they finished
        self._tombstones: dict[AttemptId, None] = {}  # oldest first

    @property
    def held(self) -> list[AttemptId]:
        return list(self._held)

    @property
    def finished(self) -> list[AttemptId]:
        return list(self._kept)

    @property
    def is_empty(self) -> bool:
        return not self._held and not self._kept

    def accept(self, attempt: AttemptId) -> Verdict:
        """Judge a `RunStage`; ACCEPTED: the attempt is held now."""
        if attempt in self._tombstones:
            del self._tombstones[attempt]
            return Verdict.CANCELLED
        if attempt in self._held:
            return Verdict.HELD
        if attempt in self._kept:
            return Verdict.FINISHED
        if len(self._held) >= self._credit or len(self._kept) >= KEPT_LIMIT:
            return Verdict.FULL
        self._held[attempt] = self._term
        return Verdict.ACCEPTED

    def cancel(self, attempt: AttemptId) -> Verdict:
        """Judge a `CancelStage`. HELD: it is the caller's to stop it, and then to `finish` it. UNKNOWN: its answer is kept now."""
        if attempt in self._held:
            return Verdict.HELD
        if attempt in self._kept:
            return Verdict.FINISHED
        self._tombstones[attempt] = None
        if len(self._tombstones) > TOMBSTONE_LIMIT:
            del self._tombstones[next(iter(self._tombstones))]
        self.finish(attempt, StageCancelled(attempt=attempt))
        return Verdict.UNKNOWN

    def finish(self, attempt: AttemptId, answer: Answer, blobs: tuple[Blob, ...] = ()) -> Kept:
        """Keep an answer, also that to an attempt which was never accepted. Of an attempt of another term it becomes `StageCancelled`."""
        if self._held.pop(attempt, self._term) != self._term:
            answer, blobs = StageCancelled(attempt=attempt), ()
        kept = Kept(answer, blobs)
        if len(self._kept) < KEPT_LIMIT + self._credit:  # more would not fit into a hello; it is sent, and that is all
            self._kept[attempt] = kept
        return kept

    def hand_back(self, attempts: Iterable[AttemptId]) -> None:
        """Forget held attempts without an answer; the caller has told the dispatcher."""
        for attempt in attempts:
            del self._held[attempt]

    def acknowledge(self, attempts: Iterable[AttemptId]) -> None:
        for attempt in attempts:
            self._kept.pop(attempt, None)

    def kept(self, attempt: AttemptId) -> Kept:
        return self._kept[attempt]

    def unsent(self) -> list[Kept]:
        """Answers that have not left in this session, in the order in which they finished."""
        return [kept for kept in self._kept.values() if not kept.is_sent]

    def reopen(self, term: int) -> list[AttemptId]:
        """A session begins: every answer has to be sent again.

        Returns:
            Attempts held for another term, which nobody waits for: the caller's to stop and to `finish`.
        """
        self._tombstones.clear()  # a message of an earlier session is not believed any more
        changed, self._term = term != self._term, term
        for attempt, kept in self._kept.items():
            kept.is_sent = False
            if changed:
                kept.answer, kept.blobs = StageCancelled(attempt=attempt), ()
        return [attempt for attempt, accepted in self._held.items() if accepted != term]
