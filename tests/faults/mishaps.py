"""What is to go wrong inside a model, said by a test and done by the worker door (worker_door.py).

    test                                                   worker, when a stage is given an input with that mark
    mark = mishaps.plan("abort", stage=digest, times=1)    reads <mark>.json; takes a ticket, <mark>.<number>, if there is one left
    model(x with x[0, 0] = mark)                           does it; without a ticket it computes as always
    mishaps.happened(mark) -> ["w2"]                       the ticket's text says who took it

A mark is a small whole number above 0 in the first place of the input, which the layers of `traffic.Layers` carry through all stages.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ALWAYS = 1000
# hold: until `release`. The last three spoil the answer: another shape, another type, another value.
KINDS = ("hang", "abort", "raise", "hold", "slow", "allocate", "shape", "dtype", "value")


class Mishap(NamedTuple):
    """`stage`: the digest of the only stage that it happens in, or None; `only`: the only worker; `seconds`: of "slow", and before "abort"."""

    what: str
    stage: str | None = None
    only: str | None = None
    times: int = ALWAYS
    seconds: float = 0.0
    size_bytes: int = 0


class Mishaps:
    """A directory that a test and the workers of its cluster share."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._marks = itertools.count(1)
        self._gates: list[int] = []  # open files
        weakref.finalize(self, _close_all, self._gates)

    # ── the test's side ──────────────────────────────────────────────────────────────────────────────────────────────

    def plan(self, what: str, **facts: Any) -> int:
        """The mark of an input with which this happens."""
        assert what in KINDS
        mark = next(self._marks)
        os.mkfifo(self._gate(mark))
        (self.directory / f"{mark}.json").write_text(json.dumps(Mishap(what, **facts)._asdict()))
        return mark

    def happened(self, mark: int) -> list[str]:
        """The workers to whom it has happened, in order."""
        tickets = sorted(self.directory.glob(f"{mark}.[0-9]*"), key=lambda path: int(path.suffix[1:]))
        return [path.read_text() for path in tickets]

    def release(self, mark: int) -> None:
        """Whoever is held with this mark goes on, and nobody is any more: a fifo that somebody holds open for writing lets readers in."""
        self._gates.append(os.open(self._gate(mark), os.O_RDWR))

    def slow(self, worker: str, seconds: float) -> None:
        """From now on each task takes that worker so much longer."""
        (self.directory / f"slow-{worker}.part").write_text(str(seconds))
        (self.directory / f"slow-{worker}.part").rename(self.directory / f"slow-{worker}")

    # ── the worker's side ────────────────────────────────────────────────────────────────────────────────────────────

    def claim(self, mark: int, *, stage: str, worker: str) -> Mishap | None:
        """The mishap that is to happen now, if one is."""
        try:
            mishap = Mishap(**json.loads((self.directory / f"{mark}.json").read_text()))
        except FileNotFoundError:
            return None
        if mishap.stage not in (None, stage) or mishap.only not in (None, worker):
            return None
        for number in range(mishap.times):
            if self._take(self.directory / f"{mark}.{number}", worker):
                return mishap
        return None

    def slowness_s(self, worker: str) -> float:
        with contextlib.suppress(FileNotFoundError):
            return float((self.directory / f"slow-{worker}").read_text())
        return 0.0

    def hold(self, mark: int) -> None:
        """Until it is released; a reader of a fifo waits for its writer."""
        os.close(os.open(self._gate(mark), os.O_RDONLY))

    def _gate(self, mark: int) -> Path:
        return self.directory / f"{mark}.gate"

    @staticmethod
    def _take(ticket: Path, worker: str) -> bool:
        """Whole at once, so that who sees it can read it."""
        draft = ticket.with_name(f"draft-{ticket.name}-{worker}-{os.getpid()}")
        draft.write_text(worker)
        try:
            os.link(draft, ticket)
        except FileExistsError:
            return False
        finally:
            draft.unlink()
        return True


def _close_all(files: list[int]) -> None:
    for file in files:
        os.close(file)


def mark_of(inputs: Sequence[Any]) -> int:
    """The mark in a stage's inputs; 0: none."""
    for value in inputs:
        if getattr(value, "ndim", 0) == 2:
            first = float(value[0, 0])
            return int(first) if first >= 1.0 and first.is_integer() else 0
    return 0
