"""The dispatcher's probes of its links to workers: `scheduling/links.py` decides, this sends and keeps the meters."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

from adapt.protocol.ids import WorkerId
from adapt.protocol.messages import LinkProbe, StageDone
from adapt.protocol.wire import Blob
from adapt.scheduling.links import Link, LinkMeter
from adapt.scheduling.roster import Roster

WAITED_S = 0.002  # a task that waited longer on its worker was not alone there


class Probing:
    """Lives on the dispatcher's loop.

    Args:
        send: a probe to a worker; False: it is not there.
        is_profiling: whether a worker has been asked for a profile, for which it fetches a program.
    """

    def __init__(
        self,
        roster: Roster,
        send: Callable[[WorkerId, LinkProbe, tuple[Blob, ...]], bool],
        *,
        is_profiling: Callable[[WorkerId], bool],
    ) -> None:
        self._roster, self._send, self._is_profiling = roster, send, is_profiling
        self._meters: dict[WorkerId, LinkMeter] = {}

    def joined(self, worker_id: WorkerId, now: float) -> None:
        self._meters = {known: meter for known, meter in self._meters.items() if known in self._roster}
        self._meters.setdefault(worker_id, LinkMeter()).begin(now)

    def heard(self, worker_id: WorkerId, now: float) -> None:
        """A heartbeat: the moment to probe, if the worker has nothing to do."""
        meter = self._meters.get(worker_id)
        if meter is None or (ask := meter.ask(now, is_idle=self._is_idle(worker_id))) is None:
            return
        self._send(worker_id, LinkProbe(number=ask.number, answer_bytes=ask.up_bytes), (payload(ask.down_bytes),))

    def echoed(self, worker_id: WorkerId, number: int, now: float) -> None:
        """The next probe leaves at once."""
        if (meter := self._meters.get(worker_id)) is not None:
            meter.echoed(number, now, is_idle=self._is_idle(worker_id))
            self.heard(worker_id, now)

    def done(self, worker_id: WorkerId, done: StageDone, blobs: tuple[Blob, ...], now: float) -> None:
        """A task's answer has come, and the scheduler does not know it yet."""
        member = self._roster.get(worker_id)
        if member is None or len(member.slots) != 1 or done.times.wait_s > WAITED_S or (slot := member.slots.get(done.attempt)) is None:
            return
        if self._is_profiling(worker_id):
            return
        if (meter := self._meters.get(worker_id)) is not None and meter.link is not None:
            times = done.times
            seconds = now - slot.since - times.wait_s - times.decode_s - times.compute_s - times.encode_s
            meter.travelled(seconds, down_bytes=slot.size_bytes, up_bytes=sum([blob.size for blob in blobs]))

    def links(self) -> dict[WorkerId, Link]:
        """Those that have been measured."""
        return {worker_id: meter.link for worker_id, meter in self._meters.items() if meter.link is not None}

    def _is_idle(self, worker_id: WorkerId) -> bool:
        member = self._roster.get(worker_id)
        is_free = member is not None and member.is_ready and not member.slots and not member.loading
        return is_free and not self._is_profiling(worker_id)


@functools.lru_cache(8)
def payload(size: int) -> Blob:
    """Bytes that nothing on the way could make fewer."""
    return Blob.of(os.urandom(size))
