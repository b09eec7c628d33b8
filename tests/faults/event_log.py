"""One log of what a dispatcher does, as it writes it down itself, and of what a test does to its cluster; all by the machine's monotonic clock.

The dispatcher has to log JSON (`--log-format json`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tests.faults.clusters import wait_until


class EventLog:
    """What the dispatcher has logged in this file, and what is noted here."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._noted: list[dict[str, Any]] = []

    def note(self, event: str) -> float:
        """The test has done or seen this now; returns the moment."""
        moment = time.monotonic()
        self._noted.append({"monotonic_s": moment, "event": event})
        return moment

    def events(self) -> list[dict[str, Any]]:
        """All of them, in the order of their stamps."""
        return sorted([*self._noted, *self._logged()], key=lambda event: event["monotonic_s"])

    def first(self, events: Iterable[str], *, since_s: float, **fields: object) -> float | None:
        """When the first of these happened since then, with these fields."""
        names = frozenset(events)
        for event in self.events():
            if event["monotonic_s"] >= since_s and event["event"] in names and fields.items() <= event.items():
                return float(event["monotonic_s"])
        return None

    def await_first(self, events: Iterable[str], *, since_s: float, **fields: object) -> float:
        names = list(events)
        return float(
            wait_until(
                lambda: self.first(names, since_s=since_s, **fields), told=lambda: f"none of {names} with {fields} is in {self._file}"
            )
        )

    def _logged(self) -> Iterator[dict[str, Any]]:
        text = self._file.read_text()
        for line in text[: text.rfind("\n") + 1].splitlines():  # the last one may be half written
            if line.startswith("{"):  # and not the line that says where it listens
                yield json.loads(line)
