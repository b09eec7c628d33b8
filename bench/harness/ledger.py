"""Which requests were asked and what came of each: none may be lost, answered twice, or answered wrongly.

A plain dictionary from the number of a request to what happened to it. Inputs go round in a pool that is larger than what is in flight, so
an answer that belongs to another request is a wrong one.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from bench.harness.contest import Array, same

NEVER = math.nan


@dataclass(frozen=True, slots=True)
class Request:
    """One request and its end.

    Attributes:
        asked_s, ended_s: moments; `ended_s` is NEVER for one that has not ended.
        answers: how many came; more than one is a duplicate.
        is_right: whether all of them are right.
        error: what it ended in instead, in words.
    """

    number: int
    asked_s: float
    ended_s: float = NEVER
    answers: int = 0
    is_right: bool = True
    error: str = ""

    @property
    def has_ended(self) -> bool:
        return not math.isnan(self.ended_s)

    @property
    def is_lost(self) -> bool:
        """No answer ever came; an error is none."""
        return self.answers == 0

    @property
    def latency_s(self) -> float:
        return self.ended_s - self.asked_s


class Ledger:
    """Every request of one stream. For any thread."""

    def __init__(self, pool: Sequence[Array], expected: Sequence[Array]) -> None:
        self._pool, self._expected = pool, expected
        self._requests: dict[int, Request] = {}
        self._lock = threading.Lock()

    def ask(self, now: float) -> tuple[int, Array]:
        """The number and input of a new request."""
        with self._lock:
            number = len(self._requests)
            self._requests[number] = Request(number, now)
        return number, self._pool[number % len(self._pool)]

    def answered(self, number: int, output: Array, now: float) -> None:
        is_right = same(self._expected[number % len(self._expected)], output)
        with self._lock:
            before = self._requests[number]
            ended_s = before.ended_s if before.has_ended else now
            self._requests[number] = Request(
                number, before.asked_s, ended_s, before.answers + 1, before.is_right and is_right, before.error
            )

    def failed(self, number: int, error: str, now: float) -> None:
        with self._lock:
            before = self._requests[number]
            self._requests[number] = Request(number, before.asked_s, now, before.answers, before.is_right, error)

    def requests(self) -> list[Request]:
        """All, in the order in which they were asked."""
        with self._lock:
            return list(self._requests.values())

    @property
    def open_count(self) -> int:
        """How many have not ended."""
        with self._lock:
            return sum(not request.has_ended for request in self._requests.values())
