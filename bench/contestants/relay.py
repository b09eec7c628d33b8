"""The floor: a bare relay over ZeroMQ, without ids, deadlines, checksums or retries. It loses whatever is lost.

    client DEALER ──▶ ROUTER relay ROUTER ──▶ worker DEALER (two of them, in turn), TCP on loopback, each a process of its own
                                   ROUTER ◀── worker DEALER; then on to a worker of the next stage, or back to the client

Two ways to write it: `aio` with the futures of zmq.asyncio, as most would, and `drain` with plain sockets whose descriptors the loop
watches. Frames of 64 KiB and more are not copied.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

import numpy as np
import zmq
import zmq.asyncio

from bench.harness.contest import Array, Run

COPY_BELOW_BYTES = 64 << 10
DRAIN_LIMIT = 64
START_TIMEOUT_S = 30.0
Frames = list[Any]
Work = Callable[[Frames], Frames]
MakeWork = Callable[[], Work]
Read = Callable[..., Array]  # what was sent, frames of the answer's payload -> the answer
Write = Callable[[Array], Frames]  # payload of a task


def echo(frames: Frames) -> Frames:
    return frames


def make_echo() -> Work:
    return echo


def like(sent: Array, payload: Any) -> Array:
    """An echo, as the array that was sent."""
    return np.frombuffer(payload, sent.dtype).reshape(sent.shape)


def as_bytes(array: Array) -> Frames:
    return [array.data]


class Clerk:
    """What the relay does with tasks and answers on their way, each [client, number, frames of the payload]: nothing, here."""

    def task(self, client: Any, number: Any, *payload: Any) -> list[Frames]:
        """The tasks that may go to a worker now."""
        return [[client, number, *payload]]

    def answer(self, client: Any, number: Any, *payload: Any) -> tuple[list[Frames], list[Frames]]:
        """The answers that may go to their clients now, and tasks."""
        return [[client, number, *payload]], []


class Relay:
    """A relay with its workers, and its client in this process.

    Args:
        idiom: "aio" or "drain".
        workers: how many, all of one stage.
        stages: more than one, or other work than echoes: for each stage what makes the work of each of its workers, in their processes. A
            task passes one worker of each stage.
        write, read: an array -> the frames of its task's payload; those of an answer -> its array.
        make_clerk: made in the relay's process; sees the payloads of tasks and of answers.
        warm_up: what is asked first, unmeasured.
    """

    def __init__(
        self,
        idiom: str,
        *,
        workers: int = 2,
        stages: Sequence[Sequence[MakeWork]] | None = None,
        name: str = "",
        write: Write = as_bytes,
        read: Read = like,
        make_clerk: Callable[[], Clerk] = Clerk,
        warm_up: Sequence[Array] = (np.zeros(8, np.uint8),) * 8,
    ) -> None:
        self.name = name or f"relay-{idiom}"
        self._loop_of = {"aio": _AioPort, "drain": _DrainPort}[idiom]
        self._stages = [[make_echo] * workers] if stages is None else stages
        self._write, self._read, self._make_clerk, self._warm_up = write, read, make_clerk, warm_up
        self._pids: dict[str, int] = {"client": os.getpid()}
        self._processes: list[Any] = []

    def __enter__(self) -> Self:
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe()
        works = [(stage, make) for stage, makes in enumerate(self._stages) for make in makes]
        self._start(spawn, "relay", _serve, self._loop_of, len(works), theirs, self._make_clerk)
        self._address, back = _told(ours)
        for index, (stage, make) in enumerate(works, start=1):
            self._start(spawn, f"worker {index}", _work, self._loop_of, back, stage, make)
        _told(ours)  # every worker has said hello
        self.run(self._warm_up, in_flight=4)
        return self

    def _start(self, spawn: Any, role: str, *call: Any) -> None:
        process = spawn.Process(target=call[0], args=call[1:], daemon=True)
        process.start()
        self._processes.append(process)
        self._pids[role] = process.pid

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def processes(self) -> dict[str, int]:
        return dict(self._pids)

    def run(self, inputs: Sequence[Array], *, in_flight: int) -> Run:
        runs: list[Run] = []  # not returned by the coroutine: asyncio.run ends with the repr of its task, all answers spelt out
        asyncio.run(self._run(inputs, in_flight, runs))
        return runs[0]

    async def _run(self, inputs: Sequence[Array], in_flight: int, runs: list[Run]) -> None:
        with zmq.Context() as context, _socket(context, zmq.DEALER) as plain:
            plain.connect(self._address)
            port = self._loop_of(plain)
            runs.append(await _ask(port, inputs, in_flight, self._write, self._read))


async def _ask(port: _Port, inputs: Sequence[Array], in_flight: int, write: Write, read: Read) -> Run:
    outputs: list[Array] = [np.empty(0)] * len(inputs)
    latencies, submitted = [0.0] * len(inputs), [0.0] * len(inputs)
    clock = time.perf_counter
    began, asked = clock(), 0
    for answered in range(len(inputs)):
        while asked < len(inputs) and asked - answered < in_flight:
            submitted[asked] = clock()
            await port.send([asked.to_bytes(8, "big"), *write(inputs[asked])])
            asked += 1
        number, *payload = await port.receive()
        index = int.from_bytes(bytes(number), "big")
        outputs[index] = read(inputs[index], *payload)
        latencies[index] = clock() - submitted[index]
    elapsed_s = clock() - began
    port.close()
    return Run(elapsed_s, latencies, outputs)


# ── the other processes ──────────────────────────────────────────────────────────────────────────────────────────────


def _serve(port_of: type[_Port], workers: int, tell: Connection, make_clerk: Callable[[], Clerk]) -> None:
    asyncio.run(_relay(port_of, workers, tell, make_clerk()))


async def _relay(port_of: type[_Port], workers: int, tell: Connection, clerk: Clerk) -> None:
    context = zmq.Context()
    front, back = _socket(context, zmq.ROUTER), _socket(context, zmq.ROUTER)
    front.bind("tcp://127.0.0.1:*")
    back.bind("tcp://127.0.0.1:*")
    tell.send((front.get_string(zmq.LAST_ENDPOINT), back.get_string(zmq.LAST_ENDPOINT)))
    towards_clients, towards_workers = port_of(front), port_of(back)
    places = _Places()
    for _ in range(workers):
        route, stage = await towards_workers.receive()
        places.add(bytes(route), int(bytes(stage)))
    tell.send(None)
    async with asyncio.TaskGroup() as group:
        group.create_task(_forward_tasks(towards_clients, towards_workers, places, clerk), name="tasks")
        group.create_task(_forward_answers(towards_workers, towards_clients, places, clerk), name="answers")


class _Places:
    """Which workers have which stage; each stage's take turns."""

    def __init__(self) -> None:
        self._stage_of: dict[bytes, int] = {}
        self._turns: dict[int, Iterator[bytes]] = {}

    def add(self, route: bytes, stage: int) -> None:
        self._stage_of[route] = stage
        self._turns[stage] = itertools.cycle([other for other, its in self._stage_of.items() if its == stage])

    def first(self) -> bytes:
        return next(self._turns[0])

    def after(self, route: bytes) -> bytes | None:
        """Whose turn it is after this worker; None: its stage was the last."""
        turns = self._turns.get(self._stage_of[route] + 1)
        return None if turns is None else next(turns)


async def _forward_tasks(clients: _Port, workers: _Port, places: _Places, clerk: Clerk) -> None:
    while True:
        for frames in clerk.task(*await clients.receive()):
            await workers.send([places.first(), *frames])


async def _forward_answers(workers: _Port, clients: _Port, places: _Places, clerk: Clerk) -> None:
    while True:
        route, *frames = await workers.receive()
        following = places.after(bytes(route))
        if following is not None:
            await workers.send([following, *frames])
            continue
        answers, tasks = clerk.answer(*frames)
        for answer in answers:
            await clients.send(answer)
        for task in tasks:
            await workers.send([places.first(), *task])


def _work(port_of: type[_Port], address: str, stage: int, make: MakeWork) -> None:
    asyncio.run(_work_for_ever(port_of, address, stage, make()))


async def _work_for_ever(port_of: type[_Port], address: str, stage: int, work: Work) -> None:
    context = zmq.Context()
    socket = _socket(context, zmq.DEALER)
    socket.connect(address)
    port = port_of(socket)
    await port.send([str(stage).encode()])
    while True:
        client, number, *payload = await port.receive()
        await port.send([client, number, *work(payload)])


def _told(connection: Connection) -> Any:
    if not connection.poll(START_TIMEOUT_S):
        raise TimeoutError("the relay did not start")
    return connection.recv()


# ── two ways to wait for a socket ────────────────────────────────────────────────────────────────────────────────────


class _Port:
    """A socket whose messages one waits for."""

    def __init__(self, socket: zmq.Socket[Any]) -> None: ...

    async def send(self, frames: Frames) -> None: ...

    async def receive(self) -> Frames:
        raise NotImplementedError

    def close(self) -> None: ...


class _AioPort(_Port):
    """zmq.asyncio: a future for each wait."""

    def __init__(self, socket: zmq.Socket[Any]) -> None:
        self._socket = zmq.asyncio.Socket.shadow(socket)

    async def send(self, frames: Frames) -> None:
        await self._socket.send_multipart(frames, copy=_is_small(frames))

    async def receive(self) -> Frames:
        frames = await self._socket.recv_multipart(copy=False)
        return [frame.bytes if len(frame) < COPY_BELOW_BYTES else frame.buffer for frame in frames]


class _DrainPort(_Port):
    """The descriptor on the loop, and everything that has arrived taken at once."""

    def __init__(self, socket: zmq.Socket[Any]) -> None:
        self._socket = socket
        self._inbox: asyncio.Queue[Frames] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._is_looked_at_soon = False
        self._loop.add_reader(socket.fileno(), self._drain)
        self._drain_soon()

    def _drain_soon(self) -> None:
        """The descriptor is edge-triggered: after a send, or a full drain, nobody tells."""
        if not self._is_looked_at_soon:
            self._is_looked_at_soon = True
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        self._is_looked_at_soon = False
        for _ in range(DRAIN_LIMIT):
            try:
                frames = self._socket.recv_multipart(_NOBLOCK, copy=False)
            except zmq.Again:
                return
            self._inbox.put_nowait([frame.bytes if len(frame) < COPY_BELOW_BYTES else frame.buffer for frame in frames])
        self._drain_soon()

    async def send(self, frames: Frames) -> None:
        self._socket.send_multipart(frames, _NOBLOCK, copy=_is_small(frames))
        self._drain_soon()

    async def receive(self) -> Frames:
        return await self._inbox.get()

    def close(self) -> None:
        self._loop.remove_reader(self._socket.fileno())


_NOBLOCK = int(zmq.NOBLOCK)


def _is_small(frames: Frames) -> bool:
    return sum(len(frame) for frame in frames) < COPY_BELOW_BYTES


def _socket(context: zmq.Context[Any], kind: int) -> Any:
    socket = context.socket(kind)
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.SNDHWM, 0)
    socket.set(zmq.RCVHWM, 0)
    with contextlib.suppress(zmq.ZMQError):
        socket.set(zmq.ROUTER_MANDATORY, 1)
    return socket
