"""torch.distributed.rpc: two workers, asked in turn, straight from this process. On one machine it moves tensors through shared memory.

It has no relay, no retries, and no way for a worker to come or go: a floor of another kind.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import socket
import threading
import warnings
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np

from bench.harness.contest import Array, Run, windowed

RPC_THREADS = 4  # of each end; what they run holds the interpreter's lock anyway


def echo(value: Any) -> Any:
    return value


class TorchRpc:
    """Rank 0 is this process; it leaves the group when the contestant is closed, and may found another."""

    name = "torch-rpc"

    def __init__(self, *, workers: int = 2) -> None:
        self._count = workers

    def __enter__(self) -> Self:
        from torch.distributed import rpc

        self._rpc = rpc
        spawn = multiprocessing.get_context("spawn")
        port, ranks = _free_port(), self._count + 1
        self._names = [_name(rank, port) for rank in range(ranks)]
        self._processes = [spawn.Process(target=_serve, args=(rank, ranks, port), daemon=True) for rank in range(1, ranks)]
        for process in self._processes:
            process.start()
        _join(0, ranks, port)
        self.run([np.zeros((1, 8), np.uint8)] * 8, in_flight=4)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._rpc.shutdown(graceful=False)  # a graceful one waits for ever when it is the second of this process
        for process in self._processes:
            process.kill()
            process.join()

    def processes(self) -> dict[str, int]:
        return {"client": os.getpid()} | {f"worker {index + 1}": process.pid for index, process in enumerate(self._processes)}

    def run(self, inputs: Sequence[Array], *, in_flight: int) -> Run:
        import torch

        turns, rpc_async = itertools.cycle(self._names[1:]), self._rpc.rpc_async

        def submit(value: Array) -> Any:
            return rpc_async(next(turns), echo, args=(torch.from_numpy(value),))

        return windowed(inputs, in_flight=in_flight, submit=submit, result=lambda future: future.wait().numpy())


def _serve(rank: int, ranks: int, port: int) -> None:
    import torch

    torch.set_num_threads(1)
    _join(rank, ranks, port)
    threading.Event().wait()  # until it is killed


def _join(rank: int, ranks: int, port: int) -> None:
    from torch.distributed import rpc

    options = rpc.TensorPipeRpcBackendOptions(num_worker_threads=RPC_THREADS, init_method=f"tcp://127.0.0.1:{port}", rpc_timeout=60)
    rpc._init_counter = 0  # private: a process counts its groups, and would wait for newcomers under the number of its own next one
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it announces its retirement
        rpc.init_rpc(_name(rank, port), rank=rank, world_size=ranks, rpc_backend_options=options)


def _name(rank: int, port: int) -> str:
    """Unlike that in any earlier group: a process numbers its barriers by the names of the members, and newcomers begin at nought."""
    return f"rank-{rank}-at-{port}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
