"""Makes the events of a schedule happen when they are due."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from time import monotonic
from typing import Any, Protocol

from adapt.emulation.description import Event
from adapt.emulation.observation import EventRecord, Observer
from adapt.errors import AdaptError

log = logging.getLogger(__name__)

END_WITHIN_S = 5.0  # an event that is being brought about


class Performer(Protocol):
    """What events happen to."""

    def perform(self, event: Event) -> None:
        """Do what the event says. Raises whatever keeps it from that."""


class Player:
    """Plays a schedule once, in a thread of its own. It holds no cluster, which then could not be forgotten."""

    def __init__(self, events: Sequence[Event], performers: Mapping[str, Performer], observer: Observer) -> None:
        self._events, self._performers, self._observer = events, performers, observer
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Moments count from now. Raises AdaptError the second time, and after `close`."""
        if self._is_over.is_set():
            raise AdaptError("the cluster does not run: it has been closed")
        if self._thread is not None:
            raise AdaptError("the schedule of this cluster is being played or has been")
        self._thread = threading.Thread(target=self._play, name="adapt-schedule", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until all events have happened; whether they have. Raises AdaptError before `start`."""
        if self._thread is None:
            raise AdaptError("the schedule of this cluster has not begun: call play()")
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def close(self) -> None:
        """Nothing more happens; what is happening just now is waited for, but not for ever."""
        self._is_over.set()
        thread = self._thread
        if (
            thread is not None and thread.is_alive() and thread is not threading.current_thread()
        ):  # alive: Ctrl-C may come before it has begun
            thread.join(END_WITHIN_S)

    def _play(self) -> None:
        began = monotonic()
        self._observer.count_from(began)
        for event in self._events:
            if self._is_over.wait(max(began + event.at_s - monotonic(), 0.0)):
                return
            self._perform(event, began)

    def _perform(self, event: Event, began: float) -> None:
        at, words = monotonic(), None
        try:
            self._performers[event.device].perform(event)
        except Exception as error:  # one mishap that fails must not end the schedule
            words = str(error) or type(error).__name__
            log.warning("event failed", extra={"kind": event.kind, "device": event.device, "reason": words})
        self._observer.note(
            EventRecord(
                at_s=event.at_s,
                kind=str(event.kind),
                device=event.device,
                detail=details(event),
                began_s=at - began,
                took_s=monotonic() - at,
                error=words,
            )
        )


def details(event: Event) -> dict[str, Any]:
    """The parameters of an event, without moment, kind and device; of what remains in force, only the kinds."""
    facts = {**asdict(event), "remaining": [str(other.kind) for other in event.remaining] or None}
    return {key: value for key, value in facts.items() if value is not None and key not in ("at_s", "kind", "device")}
