"""The door of a worker to whom things happen: as adapt-worker, but its stages look for marks in their inputs; see mishaps.py.

    python -m tests.faults.worker_door MISHAPS --dispatcher ADDRESS --name w1 ...

Only tests start it. All but the stages is the product's own.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from adapt.config import WorkerConfig
from adapt.interfaces.cli import logs
from adapt.interfaces.cli.doors import run_door
from adapt.interfaces.cli.worker import build_parser
from adapt.models.interpreter import Stage
from adapt.runtime.worker import Worker
from tests.faults.mishaps import Mishap, Mishaps, mark_of


class UnluckyStage:
    """A real stage, and around it what is to go wrong."""

    def __init__(self, path: Path, mishaps: Mishaps, worker: str) -> None:
        self._stage, self._digest = Stage.load(path, device="cpu", verify=False), path.stem
        self._mishaps, self._worker = mishaps, worker

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        if (pause_s := self._mishaps.slowness_s(self._worker)) > 0:
            time.sleep(pause_s)
        mark = mark_of(inputs)
        mishap = self._mishaps.claim(mark, stage=self._digest, worker=self._worker) if mark else None
        if mishap is None:
            return self._stage.run(inputs)
        _suffer(mishap, mark, self._mishaps)
        return [_spoilt(mishap.what, value) for value in self._stage.run(inputs)]


def _suffer(mishap: Mishap, mark: int, mishaps: Mishaps) -> None:
    """What happens before the stage is computed."""
    match mishap.what:
        case "hang":
            while True:
                pass
        case "abort":
            time.sleep(mishap.seconds)
            os.abort()
        case "raise":
            raise RuntimeError("the model has been told to raise")
        case "hold":
            mishaps.hold(mark)
        case "slow":
            time.sleep(mishap.seconds)
        case "allocate":
            torch.ones(mishap.size_bytes, dtype=torch.uint8)


def _spoilt(what: str, value: torch.Tensor) -> torch.Tensor:
    match what:
        case "shape":
            return value[:, :-1].contiguous()
        case "dtype":
            return value.to(torch.float64)
        case "value":
            return value + 1.0
    return value


def main(argv: Sequence[str]) -> int:
    """Exit status: as adapt-worker."""
    options = build_parser().parse_args(argv[1:])

    def serve() -> int:
        logs.set_up(options, os.environ)
        config, mishaps = WorkerConfig.load(options), Mishaps(Path(argv[0]))
        worker = Worker(config, load_stage=lambda path: UnluckyStage(path, mishaps, config.name), on_hang=lambda words: _begin_anew(argv))
        return asyncio.run(worker.run())

    return run_door("adapt-worker", serve)


def _begin_anew(argv: Sequence[str]) -> None:
    """As the product's own door does; but this process may have been forked, and then its command is not its own."""
    os.execv(sys.executable, [sys.executable, "-m", "tests.faults.worker_door", *argv])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
