"""Virtual time, and processes that live in it: each with a clock of its own, one that can be stopped and go on."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from random import Random
from typing import Any, TypeAlias

from adapt.simulation.inspector import Violation

Call: TypeAlias = Callable[..., None]

BUSY_EVENTS, BUSY_S = 50_000, 0.1  # so many events within less time: somebody goes round in circles
LATE_S = 1e-6  # a timer rings so much after its moment: a clock that drifts must not come out just before it


class Timeline:
    """What will happen, in order of its moments; things of one moment happen in an order that the seed draws.

    Args:
        grain_s: moments are rounded up to a multiple of it, so that many are equal; 0: not at all.
    """

    def __init__(self, random: Random, *, grain_s: float = 0.0) -> None:
        self.now = 0.0
        self.events = 0  # that have happened
        self._draw, self._grain_s = random.random, grain_s
        self._heap: list[tuple[float, float, int, Call, tuple[Any, ...]]] = []
        self._count = 0
        self._looked_at = (BUSY_EVENTS, -math.inf)  # number of the event at which to look again, and when the last look was

    def at(self, moment: float, call: Call, *args: Any) -> None:
        if self._grain_s:
            moment = max(math.ceil(moment / self._grain_s) * self._grain_s, moment)
        self._count += 1
        heapq.heappush(self._heap, (max(moment, self.now), self._draw(), self._count, call, args))

    def after(self, delay_s: float, call: Call, *args: Any) -> None:
        self.at(self.now + delay_s, call, *args)

    def run_until(self, end: float) -> None:
        heap = self._heap
        while heap and heap[0][0] <= end:
            self.now, _, _, call, args = heapq.heappop(heap)
            self.events += 1
            if self.events >= self._looked_at[0]:
                self._look()
            call(*args)
        self.now = end

    def _look(self) -> None:
        if self.now - self._looked_at[1] < BUSY_S:
            raise Violation(f"{BUSY_EVENTS} events within {self.now - self._looked_at[1]:.3g} s: somebody goes round in circles")
        self._looked_at = (self.events + BUSY_EVENTS, self.now)


class Process:
    """One process. Whatever reaches it comes as a call that is `handed`; while it is stopped, calls wait, in order within each source.

    Args:
        rate: seconds of its clock per second of true time.
        offset: of its clock; monotonic clocks of two machines have nothing to do with each other.
    """

    def __init__(self, name: str, timeline: Timeline, random: Random, *, rate: float = 1.0, offset: float = 0.0) -> None:
        self.name, self.timeline, self.random, self.rate, self.offset = name, timeline, random, rate, offset
        self.is_alive = True
        self.is_stopped = False
        self.is_frozen = False  # it is stopped, and its connections with it: no heartbeat is answered
        self.life = 0  # grows with each start: what was meant for an earlier life is void
        self.stopped_s = 0.0  # in all, by its own clock
        self._stopped_at = 0.0
        self._waiting: deque[tuple[object, Call, tuple[Any, ...]]] = deque()
        self._alarm: float | None = None  # the moment by its own clock at which it is to be woken

    def clock(self) -> float:
        return self.offset + self.rate * self.timeline.now

    def true_moment(self, moment: float) -> float:
        """When its clock shows `moment`."""
        return (moment - self.offset) / self.rate

    # ── what comes ───────────────────────────────────────────────────────────────────────────────────────────────────

    def hand(self, source: object, call: Call, *args: Any) -> None:
        """Something has arrived from `source`: a connection, a timer, a thread."""
        if not self.is_alive:
            return
        if self.is_stopped:
            self._waiting.append((source, call, args))
        else:
            call(*args)

    def later(self, delay_s: float, call: Call, *args: Any) -> None:
        """After so many seconds of its own clock, if it still lives the same life."""
        self.timeline.after(delay_s / self.rate, self._in_life, self.life, call, args)

    def _in_life(self, life: int, call: Call, args: tuple[Any, ...]) -> None:
        if life == self.life:
            self.hand(call, call, *args)

    # ── its timer ────────────────────────────────────────────────────────────────────────────────────────────────────

    def set_alarm(self, moment: float | None) -> None:
        """Call `woken` at this moment of its own clock, or sooner; an earlier alarm stays, and rings in vain."""
        if moment is None or (self._alarm is not None and self._alarm <= moment):
            return
        self._alarm = moment
        self.timeline.at(self.true_moment(moment) + LATE_S, self._ring, moment, self.life)

    def _ring(self, moment: float, life: int) -> None:
        if moment == self._alarm and life == self.life and not self.is_stopped:
            self._alarm = None
            self.woken()

    def woken(self) -> None:
        """Its timer has rung: to be defined by those who set it."""
        raise NotImplementedError

    # ── life ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def begin_life(self) -> None:
        self.life += 1
        self.is_alive, self.is_stopped, self.is_frozen, self._alarm = True, False, False, None
        self._waiting.clear()

    def end_life(self) -> None:
        self.go_on(is_dying=True)
        self.life += 1
        self.is_alive, self._alarm = False, None
        self._waiting.clear()

    def stop(self, *, is_frozen: bool) -> None:
        """As SIGSTOP does; or, not frozen, a lock that is not given back: then libzmq's threads go on."""
        if self.is_alive and not self.is_stopped:
            self.is_stopped, self.is_frozen, self._stopped_at = True, is_frozen, self.clock()

    def go_on(self, *, is_dying: bool = False) -> None:
        """What has come meanwhile is there at once, sources mixed at random; the timer may come first or last."""
        if not self.is_stopped:
            return
        self.is_stopped = self.is_frozen = False
        self.stopped_s += self.clock() - self._stopped_at
        if is_dying:
            return
        life, alarm = self.life, self._alarm
        self._alarm = None
        if self.random.random() < 0.5 and self.may_tick_first:
            self.woken()
        for _, call, args in self._mixed():
            if self.life != life:
                return
            self.hand(call, call, *args)
        self._caught_up()
        if self.life == life and not self.is_stopped and alarm is not None:
            self.woken()

    may_tick_first = True  # whether its timer may ring before it has read what lies there

    def _caught_up(self) -> None:
        """After a stop, all that had come has been handed over."""

    def _mixed(self) -> list[tuple[object, Call, tuple[Any, ...]]]:
        queues: dict[int, deque[tuple[object, Call, tuple[Any, ...]]]] = {}
        for item in self._waiting:
            queues.setdefault(id(item[0]), deque()).append(item)
        self._waiting.clear()
        mixed = []
        left = list(queues.values())
        while left:
            queue = left[int(self.random.random() * len(left))]
            mixed.append(queue.popleft())
            if not queue:
                left.remove(queue)
        return mixed
