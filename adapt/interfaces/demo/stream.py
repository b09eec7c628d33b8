"""Sends the images, a few in flight at a time, and lets workers die on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from adapt.clock import Clock, monotonic

OVERDUE_S = 5.0  # a request ends before its deadline + 1 s
Array = Any  # a numpy array


class Submits(Protocol):
    """What this needs of `adapt.Client`'s deployed model."""

    def submit(self, *args: Any, deadline_s: float | None = None) -> Future[Any]: ...


@dataclass(slots=True)
class Answer:
    """One image's way: moments on the monotonic clock, and what came."""

    sent_at: float
    answered_at: float = 0.0
    output: Array | None = None
    error: BaseException | None = None
    deliveries: int = 0  # more than one would be a duplicate

    @property
    def latency_s(self) -> float:
        return self.answered_at - self.sent_at


@dataclass(frozen=True, slots=True)
class Fault:
    """Something bad that is done once `after` answers have come."""

    after: int
    act: Callable[[], None]


def stream(
    model: Submits,
    images: Sequence[Array],
    *,
    in_flight: int,
    deadline_s: float,
    faults: Sequence[Fault] = (),
    answered: Callable[[int, list[Answer]], None] = lambda number, answers: None,
    clock: Clock = monotonic,
) -> list[Answer]:
    """The answers, in the order of the images, when the last one has come. One that never came has `deliveries` 0.

    Args:
        in_flight: how many images are under way at a time.
        deadline_s: of each request.
        answered: told after each answer how many have come, and of all that were sent; on this thread.
    """
    answers: list[Answer] = []
    ends: SimpleQueue[None] = SimpleQueue()

    def finish(answer: Answer, future: Future[Any]) -> None:  # on the client's thread
        answer.deliveries += 1
        if answer.deliveries == 1:
            answer.answered_at = clock()
            error = future.exception()
            answer.error, answer.output = error, None if error else future.result()
            ends.put(None)

    due = sorted(faults, key=lambda fault: fault.after)
    told = 0
    while told < len(images):
        while len(answers) < len(images) and len(answers) - told < in_flight:
            answer = Answer(clock())
            answers.append(answer)
            future = model.submit(images[len(answers) - 1], deadline_s=deadline_s)
            future.add_done_callback(partial(finish, answer))
        try:
            ends.get(timeout=deadline_s + OVERDUE_S)
        except Empty:
            break  # some request has not ended by its deadline, which is never right: the figures will say so
        told += 1
        while due and told >= due[0].after:
            due.pop(0).act()
        answered(told, answers)
    return answers
