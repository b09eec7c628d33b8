"""What a dispatcher knows, and since when: its status, asked again and again through a client of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import adapt

EVERY_S = 0.02  # how exact a moment is
SIGNS = ("attempt_timeouts", "breakers_opened", "retries")  # counters that say that somebody was thought too slow


@dataclass(frozen=True, slots=True)
class Seen:
    """One look.

    Attributes:
        at_s: when the answer had come.
        states: of each worker that the dispatcher knows.
        tasks: that each of them has done.
        places: the workers of each stage.
    """

    at_s: float
    states: Mapping[str, str]
    tasks: Mapping[str, int]
    places: Sequence[Sequence[str]]
    counters: Mapping[str, float]

    def stages_of(self, worker: str) -> list[int]:
        """Counted from 0."""
        return [stage for stage, workers in enumerate(self.places) if worker in workers]


@dataclass(frozen=True, slots=True)
class Sign:
    """The first thing that changed in the dispatcher after a fault."""

    at_s: float
    words: str


def first_sign(looks: Sequence[Seen], worker: str, at_s: float, until_s: float) -> Sign | None:
    """What the dispatcher first took note of between two moments: the worker's state, the plan, or a task that took too long."""
    before = next((seen for seen in reversed(looks) if seen.at_s <= at_s), None)
    if before is None:
        return None
    for seen in looks:
        if at_s < seen.at_s <= until_s and (words := _change(before, seen, worker)):
            return Sign(seen.at_s, words)
    return None


def _change(before: Seen, after: Seen, worker: str) -> str:
    if (state := after.states.get(worker)) != before.states.get(worker):
        return state or "gone"
    grown = next((name for name in SIGNS if after.counters.get(name, 0) > before.counters.get(name, 0)), None)
    if grown is not None:
        return grown.replace("_", " ")
    return "" if after.places == before.places else "plan changed"


class Watch:
    """Looks at a dispatcher every 20 ms, on a thread, while its block runs."""

    def __init__(self, address: str, deployment: str) -> None:
        self._address, self._deployment = address, deployment
        self._looks: list[Seen] = []
        self._is_over = threading.Event()

    def __enter__(self) -> Watch:
        self._client = adapt.Client(self._address)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        self._client.close()

    def looks(self) -> list[Seen]:
        return list(self._looks)

    def _run(self) -> None:
        while not self._is_over.wait(EVERY_S):
            try:
                report = self._client.status()
            except adapt.AdaptError:  # nothing was seen
                continue
            now = time.monotonic()
            record = next((one for one in report.deployments if one.name == self._deployment), None)
            places = () if record is None else tuple(tuple(stage.workers) for stage in record.stages)
            states = {one.worker_id: one.state for one in report.workers}
            self._looks.append(Seen(now, states, {one.worker_id: one.tasks_done for one in report.workers}, places, report.counters))
