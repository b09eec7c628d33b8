"""What a worker's failures cost it: a penalty that failures raise and successes wear down, and a circuit breaker on it.

    failure   penalty += 50
    success   penalty *= 0.8; below 1 it is 0
    breaker   closed ──penalty above 200──▶ open ──decayed to 200, by 0.9 a second──▶ half-open ──success──▶ closed
                                             ▲                                            │ one task at a time
                                             └──────────────────failure───────────────────┘

Only what a worker is to blame for counts as a failure. The rule of penalty and breaker is the published ADAPT system's; that an open
breaker decays, half-opens and never takes the last workers away is ours: there it stayed open until a success that could not come.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from adapt.errors import ConfigError
from adapt.protocol.ids import WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class QosSettings:
    """Penalties have no unit; with these numbers the fifth failure in a row opens the breaker."""

    failure_penalty: float = 50.0
    success_factor: float = 0.8
    forgotten_below: float = 1.0
    open_above: float = 200.0
    decay_per_s: float = 0.9  # factor, while the breaker is open

    def __post_init__(self) -> None:
        for name in ("success_factor", "decay_per_s"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise ConfigError(f"{name}={getattr(self, name):g}: expected a factor between 0 and 1")
        for name in ("failure_penalty", "open_above"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name}={getattr(self, name):g}: expected a number above 0")


class Breaker(StrEnum):
    """Whether a worker gets tasks."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class Qos:
    """The record of one worker. `now`: seconds, monotonic, never going back."""

    __slots__ = ("_breaker", "_is_probed", "_penalty", "_settings", "_since")

    def __init__(self, settings: QosSettings) -> None:
        self._settings = settings
        self._penalty = 0.0
        self._since = 0.0  # moment at which the penalty was that, while the breaker is open
        self._breaker = Breaker.CLOSED
        self._is_probed = False

    def breaker(self, now: float) -> Breaker:
        if self._breaker is Breaker.OPEN and now >= self._half_open_at():
            self._breaker, self._penalty, self._is_probed = Breaker.HALF_OPEN, self._settings.open_above, False
        return self._breaker

    def penalty(self, now: float) -> float:
        if self.breaker(now) is Breaker.OPEN:
            return self._penalty * math.pow(self._settings.decay_per_s, now - self._since)
        return self._penalty

    def failed(self, now: float) -> None:
        """It is to blame for a failure."""
        self._penalty = self.penalty(now) + self._settings.failure_penalty
        self._since = now
        self._is_probed = False
        if self._penalty > self._settings.open_above:
            self._breaker = Breaker.OPEN

    def succeeded(self, now: float) -> None:
        """It has done a task."""
        was_open = self.breaker(now) is Breaker.OPEN
        penalty = self.penalty(now) * self._settings.success_factor
        self._penalty = penalty if penalty >= self._settings.forgotten_below else 0.0
        self._since = now
        self._is_probed = False
        if not was_open or self._penalty <= self._settings.open_above:
            self._breaker = Breaker.CLOSED

    def takes(self, now: float) -> bool:
        """Whether it may get a task: always when closed, one at a time when half-open."""
        match self.breaker(now):
            case Breaker.CLOSED:
                return True
            case Breaker.HALF_OPEN:
                return not self._is_probed
            case Breaker.OPEN:
                return False

    def given(self, now: float) -> None:
        """It gets a task; half-open, it gets no other before that one has ended."""
        self._is_probed = self.breaker(now) is Breaker.HALF_OPEN

    def returned(self) -> None:
        """A task that it was given has ended and says nothing about it: cancelled, handed back, never sent."""
        self._is_probed = False

    def next_wakeup(self) -> float | None:
        """When an open breaker half-opens."""
        return self._half_open_at() if self._breaker is Breaker.OPEN else None

    def _half_open_at(self) -> float:
        return self._since + math.log(self._settings.open_above / self._penalty) / math.log(self._settings.decay_per_s)


def usable(records: Mapping[WorkerId, Qos], among: Sequence[WorkerId], now: float) -> list[WorkerId]:
    """Those of `among` that may get a task, in the same order. At most half of them are kept out: beyond, the least penalised may go on."""
    kept_out = [worker_id for worker_id in among if not records[worker_id].takes(now)]
    if not kept_out:
        return list(among)
    kept_out.sort(key=lambda worker_id: (-records[worker_id].penalty(now), worker_id))
    out = {*kept_out[: len(among) // 2]}
    return [worker_id for worker_id in among if worker_id not in out]
