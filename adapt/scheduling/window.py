"""Which inputs of a `map` are under way, and whose turn it is to be yielded. Pure.

    state     event                                 to        does
    -         begun                                 ASKED     takes a slot
    ASKED     answered, with a result or an error   ANSWERED  frees its slot
    ASKED     overloaded, with time left            PAUSED    keeps its slot
    PAUSED    its pause is over                     ASKED     is asked again
    ANSWERED  taken, when all before it were        -         makes room

Slots bound what the cluster has to do, so one slow answer leaves the others to work; the room bounds what waits behind it in memory.
"""

from __future__ import annotations

from adapt.scheduling.deadlines import Deadlines
from adapt.scheduling.outcome import RETRY_PAUSES_S

ROOM_PER_SLOT = 4


class Window:
    """See the head of this file. Items are numbered from 0, as they are begun. `now`: seconds, monotonic, never going back."""

    def __init__(self, in_flight: int) -> None:
        self._slots, self._room = in_flight, ROOM_PER_SLOT * in_flight
        self._begun = self._taken = 0
        self._answered: set[int] = set()  # and not taken
        self._pauses: Deadlines[int] = Deadlines()

    @property
    def unanswered(self) -> int:
        return self._begun - self._taken - len(self._answered)

    @property
    def has_room(self) -> bool:
        """Whether another item may begin."""
        return self.unanswered < self._slots and self._begun - self._taken < self._room

    @property
    def is_filled(self) -> bool:
        """Whether as many are held, answered or not, as may be under way."""
        return self._begun - self._taken >= self._slots

    @property
    def is_ready(self) -> bool:
        """Whether `take` has something to give."""
        return self._taken in self._answered

    @property
    def is_empty(self) -> bool:
        return self._begun == self._taken

    def begin(self) -> int:
        """The number of the next item. Only while there is room."""
        assert self.has_room
        self._begun += 1
        return self._begun - 1

    def answered(self, number: int) -> None:
        self._answered.add(number)

    def overloaded(self, number: int, *, retry_after_s: float, deadline: float, now: float) -> bool:
        """The dispatcher took the item not. False: it has no time for another attempt; this is its answer."""
        least, most = RETRY_PAUSES_S
        moment = now + min(max(least, retry_after_s), most)  # in this order a NaN becomes the least
        if moment >= deadline:
            self.answered(number)
            return False
        self._pauses.set(number, moment)
        return True

    def take(self) -> int:
        """The first item, whose turn it is. Only while one is ready."""
        self._answered.remove(self._taken)
        self._taken += 1
        return self._taken - 1

    def take_due(self, now: float) -> list[int]:
        """The items that are to be asked again now."""
        return self._pauses.take_due(now)

    def next_wakeup(self) -> float | None:
        """When an item is to be asked again; after `take_due(now)` it is later than `now`."""
        return self._pauses.next_wakeup()
