"""What the way to a worker is like: probes of bounded size while nothing else is on it, and what its tasks tell meanwhile. Pure.

    series of probes     three without payload give the latency; then payloads down, then up, each four times the one before as long as that should
                         take `QUICK_S` at most, and the largest three times: the best counts. At most 1.7 MB both ways together
    tasks                a task that was alone on its worker and did not wait there tells how long its tensors took; both rates follow slowly

Only an idle worker is probed, one probe at a time; what was answered while it was not idle any more is asked again.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

FIRST_BYTES, MOST_BYTES = 16 << 10, 256 << 10
GROWTH = 4
TRIES = 3
QUICK_S = 0.05
SETTLED_S = 1.0  # after a worker has joined
AGAIN_S = 120.0  # from one series to the next
LOST_S = 30.0  # without an answer
LEAST_S = 20e-6  # what clocks and loops can tell apart
TOLD_BYTES = 64 << 10  # a task with less tells nothing about rates
MOSTLY = 0.5  # share of its way that its payload must have taken, for a task to raise rates
LEAST_RATE, MOST_RATE = 1e2, 1e10  # that tasks may lead to, bytes per second
FOLLOWS, MOST_RATIO = 0.25, 4.0  # weight of one task, and the most that is believed of it


@dataclass(frozen=True, slots=True)
class Link:
    """Between the dispatcher and a worker. Rates from the dispatcher, and to it."""

    latency_s: float  # of one direction
    down_bytes_per_s: float
    up_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Ask:
    """A probe to be sent: its payload, and that of its answer."""

    number: int
    down_bytes: int
    up_bytes: int


class LinkMeter:
    """Of one worker, over all its sessions. `now`: seconds, monotonic."""

    def __init__(self) -> None:
        self.link: Link | None = None
        self._next_at = float("inf")  # before the first session
        self._left: deque[tuple[int, int]] = deque()  # payloads down and up of the probes to come in this series
        self._ask: Ask | None = None  # under way
        self._asked_at = 0.0
        self._numbers = 0
        self._round_trip_s = float("inf")
        self._best: dict[bool, tuple[int, float, int]] = {}  # is it down -> payload, best rate, tries

    def begin(self, now: float) -> None:
        """A session has begun: what was under way in the last one is lost."""
        self._ask = None
        self._left.clear()
        self._next_at = now + SETTLED_S

    def ask(self, now: float, *, is_idle: bool) -> Ask | None:
        """The probe to send now, if one is due."""
        if self._ask is not None and now - self._asked_at > LOST_S:
            self._ask = None
            self._left.clear()
        if not is_idle or self._ask is not None or (not self._left and now < self._next_at):
            return None
        if not self._left:
            self._next_at = now + AGAIN_S
            self._round_trip_s, self._best = float("inf"), {}
            self._left.extend([(0, 0)] * TRIES + [(FIRST_BYTES, 0), (0, FIRST_BYTES)])
        self._numbers += 1
        self._ask, self._asked_at = Ask(self._numbers, *self._left[0]), now
        return self._ask

    def echoed(self, number: int, now: float, *, is_idle: bool) -> None:
        """A probe has been answered. `is_idle`: and nothing else was on its way."""
        if self._ask is None or self._ask.number != number:
            return
        ask, self._ask = self._ask, None
        if not is_idle:
            return
        self._left.popleft()
        took_s = now - self._asked_at
        size = ask.down_bytes or ask.up_bytes
        if not size:
            self._round_trip_s = min(self._round_trip_s, took_s)
            return
        self._learn(size, max(took_s - self._round_trip_s, LEAST_S), is_down=ask.down_bytes > 0)
        if not self._left:
            self._conclude()

    def travelled(self, seconds: float, *, down_bytes: int, up_bytes: int) -> None:
        """A task was alone on its way there and back, which took so long besides what the worker says it took."""
        if self.link is None or down_bytes + up_bytes < TOLD_BYTES:
            return
        link = self.link
        payload_s = down_bytes / link.down_bytes_per_s + up_bytes / link.up_bytes_per_s
        expected_s = 2 * link.latency_s + payload_s
        if seconds < expected_s and payload_s < MOSTLY * expected_s:  # what was saved may be latency; rates would rise without end
            return
        ratio = min(max(seconds / expected_s, 1 / MOST_RATIO), MOST_RATIO)
        faster = ratio**-FOLLOWS
        down, up = (min(max(rate * faster, LEAST_RATE), MOST_RATE) for rate in (link.down_bytes_per_s, link.up_bytes_per_s))
        self.link = Link(link.latency_s, down, up)

    def _learn(self, size: int, seconds: float, *, is_down: bool) -> None:
        largest, best, tries = self._best.get(is_down, (0, 0.0, 0))
        rate = size / seconds
        best, tries = (max(best, rate), tries + 1) if size == largest else (rate, 1)
        self._best[is_down] = (size, best, tries)
        larger = size * GROWTH
        if larger <= MOST_BYTES and larger / rate <= QUICK_S:
            self._then(larger, is_down=is_down)
        elif tries < TRIES and size > FIRST_BYTES:
            self._then(size, is_down=is_down)

    def _then(self, size: int, *, is_down: bool) -> None:
        self._left.appendleft((size, 0) if is_down else (0, size))

    def _conclude(self) -> None:
        self.link = Link(self._round_trip_s / 2, self._best[True][1], self._best[False][1])
