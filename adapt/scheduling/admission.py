"""What is let in, at whose cost: bounds on how many requests live and how many bytes they may retain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from adapt.errors import OverloadedError
from adapt.protocol.ids import RequestId


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionLimits:
    max_requests: int
    max_retained_bytes: int


class Admission:
    """Reserves for each request the most that it will ever retain, so that a later activation is never refused for memory.

    Invariant: reserved >= retained; both are zero when no request lives.
    """

    def __init__(self, limits: AdmissionLimits, *, random: Random) -> None:
        self._limits, self._random = limits, random
        self._reserved: dict[RequestId, int] = {}
        self._own: set[RequestId] = set()  # of these, those of the dispatcher itself, which take nothing of what clients may have
        self.reserved_bytes = 0
        self._own_bytes = 0

    def __len__(self) -> int:
        return len(self._reserved)

    def admit(self, request_id: RequestId, peak_bytes: int, *, predicted_wait_s: Callable[[], float]) -> None:
        """Let the request in, or raise OverloadedError, at once, with a jittered `retry_after_s`."""
        limits = self._limits
        count, reserved_bytes = len(self._reserved) - len(self._own), self.reserved_bytes - self._own_bytes
        if count >= limits.max_requests:
            raise self._refusal(f"{limits.max_requests} requests are in flight, the most that this dispatcher allows", predicted_wait_s())
        if count and reserved_bytes + peak_bytes > limits.max_retained_bytes:
            raise self._refusal(
                f"the request may retain {peak_bytes} bytes, and {reserved_bytes} of {limits.max_retained_bytes} are reserved",
                predicted_wait_s(),
            )
        self._add(request_id, peak_bytes)

    def reserve(self, request_id: RequestId, peak_bytes: int) -> None:
        """Let in what is not refused: the dispatcher's own."""
        self._own.add(request_id)
        self._add(request_id, peak_bytes)

    def grow(self, request_id: RequestId, retained_bytes: int) -> None:
        """The request retains more than was predicted (a codec that expanded, say): reserve it, for it is there already."""
        more = retained_bytes - self._reserved[request_id]
        if more > 0:
            self._add(request_id, more)

    def release(self, request_id: RequestId) -> None:
        size_bytes = self._reserved.pop(request_id)
        self.reserved_bytes -= size_bytes
        if request_id in self._own:
            self._own.discard(request_id)
            self._own_bytes -= size_bytes

    def _add(self, request_id: RequestId, more_bytes: int) -> None:
        self._reserved[request_id] = self._reserved.get(request_id, 0) + more_bytes
        self.reserved_bytes += more_bytes
        if request_id in self._own:
            self._own_bytes += more_bytes

    def _refusal(self, message: str, wait_s: float) -> OverloadedError:
        # The jitter keeps those who were refused together from coming back together.
        return OverloadedError(message, retry_after_s=round(max(wait_s, 0.05) * self._random.uniform(0.5, 1.5), 3))
