"""The requests that wait for a worker, by stage, and the stages that deserve a look."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

from adapt.scheduling.requests import Request

StageKey: TypeAlias = tuple[str, int, int, int]  # deployment, number and cut of its version, stage
_LAST = (math.inf, 0)
Entry: TypeAlias = tuple[float, int, int, Request]  # deadline, arrival, ticket, request


class StageQueues:
    """One heap per stage: earlier deadline first, then earlier arrival.

    A request is in its queue while it carries the ticket of its entry; taking the ticket away takes it out. Stages are *awake* when
    something may be dispatched for them.
    """

    def __init__(self) -> None:
        self._heaps: dict[StageKey, list[Entry]] = {}
        self._awake: set[StageKey] = set()
        self._looked_at: StageKey | None = None  # its requests may be in other hands, and are to be woken all the same
        self._tickets = 0

    def push(self, key: StageKey, request: Request) -> None:
        self._tickets += 1
        request.ticket = self._tickets
        heapq.heappush(self._heaps.setdefault(key, []), (request.deadline, request.arrival, request.ticket, request))
        self._awake.add(key)

    def pop(self, key: StageKey) -> Entry | None:
        """Remove and return the first entry of the stage that is still valid."""
        heap = self._heaps.get(key, [])
        while heap:
            entry = heapq.heappop(heap)
            if entry[3].ticket == entry[2]:
                return entry
        self._heaps.pop(key, None)
        return None

    def put_back(self, key: StageKey, entries: Iterable[Entry]) -> None:
        """Return entries that `pop` gave, unless they have become invalid meanwhile."""
        for entry in entries:
            if entry[3].ticket == entry[2]:
                heapq.heappush(self._heaps.setdefault(key, []), entry)
        self._looked_at = None

    def wake(self, concerned: Callable[[StageKey], bool]) -> None:
        self._awake.update(key for key in self._waiting() if concerned(key))

    def wake_all(self) -> None:
        self._awake.update(self._waiting())

    def next_awake(self) -> StageKey | None:
        """The stage to look at next, which sleeps from now on: later stages first, of those alike the one whose first request is. It is looked
        at until `put_back`."""
        if len(self._awake) < 2:
            self._looked_at = self._awake.pop() if self._awake else None
        else:
            self._looked_at = min(self._awake, key=lambda k: (-k[-1], self._first(k), k))
            self._awake.discard(self._looked_at)
        return self._looked_at

    def turn_ends(self, key: StageKey) -> tuple[float, int]:
        """The place in line, deadline and arrival, from which on another awake stage as late as this one comes first."""
        return min((self._first(other) for other in self._awake if other[-1] == key[-1] and other != key), default=_LAST)

    def wake_again(self, key: StageKey) -> None:
        """The stage has more for whoever has room; others come first."""
        self._awake.add(key)

    def _waiting(self) -> Iterator[StageKey]:
        """The stages for which somebody may wait."""
        yield from self._heaps
        if self._looked_at is not None:
            yield self._looked_at

    def _first(self, key: StageKey) -> tuple[float, int]:
        """The place in line of the stage's first request."""
        heap = self._heaps.get(key, [])
        while heap and heap[0][3].ticket != heap[0][2]:
            heapq.heappop(heap)
        return heap[0][:2] if heap else _LAST
