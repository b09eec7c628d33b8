"""Verification: of a share of the tasks an answer is believed only when two workers of one numeric class have come to the same bits.

    drawn ──dispatched──▶ computed, by a second worker too if one has room ──first answer──▶ held ──the same bits──▶ verified, and goes on
                                                                               │
                       ┌──nobody is left who could tell, or no time───────────┤
                       ▼                                                       └──other bits──▶ split ──two agree──▶ verified; who differs
              goes on, unverified                                                                │                   was wrong
                                                                                                 └──nobody is left──▶ the request fails

Only workers of the class of the first answer, that have the stage, can tell; none is asked to load it. Of whom who was asked has died, has
timed out or could not answer, nobody is waited for any longer: verification delays an answer by one attempt at most, and never beyond the
moment from which on the rest of the request's time is wanted for its other stages. What is split is never believed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import msgspec

from adapt.protocol.ids import TaskId, WorkerId
from adapt.scheduling.events import Activation

_WHOLE = 1 << 64
_OF_REQUESTS, _OF_STAGES = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F  # odd; the first is 2^64 divided by the golden ratio

_encode = msgspec.msgpack.Encoder().encode


def is_drawn(task: TaskId, share: float) -> bool:
    """Whether the task is one of those that are verified: the same for every attempt and in every reign. Of the consecutive requests of a client
    their share is kept as evenly as can be (Weyl's sequence of the golden ratio), and each request has other stages drawn."""
    client, sequence = task.request
    place = int.from_bytes(client[:8], "big") + sequence * _OF_REQUESTS + task.stage * _OF_STAGES
    return place % _WHOLE < share * _WHOLE


@dataclass(frozen=True, slots=True)
class Told:
    """What a worker has come to. `bits`: equal if and only if all that it has sent is."""

    output: Activation
    bits: tuple[bytes, bytes, tuple[int, ...]]


@dataclass(slots=True)
class Check:
    """A task that was drawn, and what workers have answered.

    Attributes:
        numeric_class: of the first answer; "" before.
        take_at: the moment from which on a single answer is held no longer.
        is_given_up: somebody who was asked will not tell; nobody else is asked in the place of that.
    """

    numeric_class: str = ""
    answers: dict[WorkerId, Told] = field(default_factory=dict)
    take_at: float = math.inf
    is_given_up: bool = False

    def hear(self, worker_id: WorkerId, numeric_class: str, output: Activation, digest: bytes) -> bool:
        """Note an answer. False: its bits say nothing, as they are of another class."""
        if self.answers and numeric_class != self.numeric_class:
            return False
        self.numeric_class = numeric_class
        bits = (digest, _encode(list(output.leaves)), tuple([blob.checksum for blob in output.blobs]))
        self.answers[worker_id] = Told(output, bits)
        return True

    @property
    def agreed(self) -> Told | None:
        """What two have come to."""
        seen = set()
        for told in self.answers.values():
            if told.bits in seen:
                return told
            seen.add(told.bits)
        return None

    @property
    def is_split(self) -> bool:
        """Whether there are answers that differ, and nothing to tell which is right."""
        return len(self.answers) > 1 and self.agreed is None

    @property
    def held_bytes(self) -> int:
        return sum(told.output.size_bytes for told in self.answers.values())

    def may_tell(self, worker_id: WorkerId, numeric_class: str) -> bool:
        """Whether an answer of this worker would say something about those that there are."""
        return worker_id not in self.answers and numeric_class == self.numeric_class

    def dissenters(self, agreed: Told) -> list[WorkerId]:
        """Who has come to something else than what is right."""
        return sorted(worker_id for worker_id, told in self.answers.items() if told.bits != agreed.bits)
