"""Moments at which something is due: a binary heap, lazily invalidated."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)

_SLACK = 64  # stale entries that are tolerated before the heap is rebuilt


def earliest(*moments: float | None) -> float | None:
    """The first of the moments that there are. (`min` over a generator takes three times as long, and is asked at every turn.)"""
    first: float | None = None
    for moment in moments:
        if moment is not None and (first is None or moment < first):
            first = moment
    return first


class Deadlines(Generic[Key]):
    """At most one moment per key. Ties fall due in the order in which they were set.

    Setting, clearing and taking cost O(log n); an entry that was moved or cleared stays in the heap until it comes up or until the
    stale ones outnumber the valid ones.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Key]] = []
        self._valid: dict[Key, int] = {}  # key -> ticket of its one valid entry
        self._tickets = 0

    def __len__(self) -> int:
        return len(self._valid)

    def __contains__(self, key: Key) -> bool:
        return key in self._valid

    def set(self, key: Key, moment: float) -> None:
        """Make `key` due at `moment`, whatever was set before."""
        self._tickets += 1
        self._valid[key] = self._tickets
        heapq.heappush(self._heap, (moment, self._tickets, key))
        if len(self._heap) > 2 * len(self._valid) + _SLACK:
            self._heap = [entry for entry in self._heap if self._valid.get(entry[2]) == entry[1]]
            heapq.heapify(self._heap)

    def clear(self, key: Key) -> None:
        """`key` is due no more; nothing happens if it was not."""
        self._valid.pop(key, None)

    def postpone(self, by_s: float, *, concerns: Callable[[Key], bool] = lambda key: True) -> None:
        """What is due of these keys is due so much later."""
        valid = [entry for entry in self._heap if self._valid.get(entry[2]) == entry[1]]
        self._heap = [(moment + by_s * concerns(key), ticket, key) for moment, ticket, key in valid]
        heapq.heapify(self._heap)

    def take_due(self, now: float) -> list[Key]:
        """Remove and return what is due at `now`, earliest first."""
        due = []
        while (entry := self._first()) is not None and entry[0] <= now:
            heapq.heappop(self._heap)
            del self._valid[entry[2]]
            due.append(entry[2])
        return due

    def next_wakeup(self) -> float | None:
        entry = self._first()
        return None if entry is None else entry[0]

    def _first(self) -> tuple[float, int, Key] | None:
        while self._heap:
            entry = self._heap[0]
            if self._valid.get(entry[2]) == entry[1]:
                return entry
            heapq.heappop(self._heap)
        return None
