"""What retries may cost in all: a token bucket, so that a cluster in trouble is not buried under second attempts.

After gRPC's retry throttling (proposal A6) and Finagle's retry budgets: requests earn tokens, each attempt after a failure costs one. An
empty bucket delays, it never fails a request; so that a delay ends where no requests arrive, tokens come with time too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from adapt.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSettings:
    """A token is the right to one attempt after a failure."""

    most: float = 20.0  # also at the start
    per_request: float = 0.2
    per_s: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("most", 1.0), ("per_request", 0.0)):
            if not least <= getattr(self, name) < math.inf:
                raise ConfigError(f"retry tokens: {name}={getattr(self, name):g}: expected a number from {least:g}")
        if not 0.0 < self.per_s < math.inf:
            raise ConfigError(f"retry tokens: per_s={self.per_s:g}: expected a number above 0, or a delayed attempt would wait for ever")


class RetryTokens:
    """`now`: seconds, monotonic, never going back."""

    def __init__(self, settings: TokenSettings) -> None:
        self._settings, self._tokens, self._at = settings, settings.most, 0.0

    def earn(self) -> None:
        """A request was accepted."""
        self._tokens = min(self._tokens + self._settings.per_request, self._settings.most)

    def take(self, now: float) -> bool:
        """Pay for one attempt. False: there is no token; see `next_at`."""
        self._refill(now)
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True

    def next_at(self, now: float) -> float:
        """The moment from which there is one, if none is taken until then; later than `now` if there is none."""
        self._refill(now)
        wait_s = max(1.0 - self._tokens, 0.0) / self._settings.per_s
        return now if wait_s == 0.0 else max(now + wait_s, math.nextafter(now, math.inf))

    def _refill(self, now: float) -> None:
        self._tokens = min(self._tokens + max(now - self._at, 0.0) * self._settings.per_s, self._settings.most)
        self._at = max(self._at, now)
