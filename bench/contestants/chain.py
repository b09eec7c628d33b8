"""A static chain: one process for each stage, and nobody who looks after them. What is lost stays lost.

    client PUSH ──▶ PULL stage 0 PUSH ──▶ PULL stage 1 PUSH ──▶ ... ──▶ PULL client

Unix sockets: whatever this costs, TCP would cost more. The stage files are ADAPT's own; the number of a request goes ahead of its frames.

    python -m bench.contestants.chain STAGE_FILE FROM TO
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import zmq

from adapt.runtime.local import Reaper
from bench.harness.ledger import Ledger

ROOT = Path(__file__).resolve().parents[2]
POLL_MS = 50


class Chain:
    """The processes. Inside the block all of them have loaded their stages.

    Args:
        files: of the stages, in their order.
        inside: for each stage the command that runs the rest of its line on that stage's device.
    """

    def __init__(self, files: Sequence[Path], directory: Path, *, inside: Sequence[Sequence[str]] | None = None) -> None:
        self._files, self._directory = list(files), directory
        self._inside = inside or [()] * len(self._files)
        self.processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        self._directory.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            self._reaper = Reaper()
            stack.callback(self._reaper.close)
            stack.callback(self._end)
            for stage, (file, inside) in enumerate(zip(self._files, self._inside, strict=True)):
                command = [*inside, sys.executable, "-m", "bench.contestants.chain", str(file), self._at(stage), self._at(stage + 1)]
                process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
                self._reaper.add(process.pid)
                self.processes.append(process)
            for process in self.processes:
                assert process.stdout is not None
                if process.stdout.readline().strip() != "ready":
                    raise RuntimeError("a stage of the chain did not start; its own words are on standard error")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def _end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            self._reaper.remove(process.pid)
            if process.stdout is not None:
                process.stdout.close()

    def kill(self, stage: int) -> None:
        """SIGKILL."""
        self.processes[stage].kill()
        self.processes[stage].wait()

    @property
    def first(self) -> str:
        return self._at(0)

    @property
    def last(self) -> str:
        return self._at(len(self._files))

    def _at(self, place: int) -> str:
        return f"ipc://{self._directory}/{place}"


class ChainStream:
    """Keeps so many requests in flight through a chain, on a thread, and notes what comes back. `stop` ends it."""

    def __init__(self, chain: Chain, ledger: Ledger, in_flight: int) -> None:
        self._chain, self._ledger, self._in_flight = chain, ledger, in_flight
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="chain-stream", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        with zmq.Context() as context, context.socket(zmq.PULL) as results, context.socket(zmq.PUSH) as first:
            first.linger = results.linger = 0
            results.bind(self._chain.last)
            first.connect(self._chain.first)
            for _ in range(self._in_flight):
                self._ask(first)
            while not self._is_over.is_set():
                if results.poll(POLL_MS):
                    number, payload = results.recv_multipart()
                    output = np.frombuffer(payload, np.float32).reshape(1, -1)
                    self._ledger.answered(int.from_bytes(number, "little"), output, time.monotonic())
                    self._ask(first)

    def _ask(self, first: zmq.Socket[bytes]) -> None:
        number, value = self._ledger.ask(time.monotonic())
        with contextlib.suppress(zmq.Again):  # a queue that nobody empties: what would be sent is lost as well
            first.send_multipart([number.to_bytes(8, "little"), value.reshape(-1).view(np.uint8).data], zmq.NOBLOCK)


def serve(file: Path, source: str, target: str) -> None:
    """One stage, for ever."""
    from bench.contestants.stages import MakeFrameWork

    work = MakeFrameWork(file)()
    context = zmq.Context()
    pull, push = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    push.connect(target)
    pull.bind(source)
    print("ready", flush=True)
    while True:
        number, *frames = pull.recv_multipart()
        push.send_multipart([number, *work(frames)])


if __name__ == "__main__":
    serve(Path(sys.argv[1]), *sys.argv[2:4])
