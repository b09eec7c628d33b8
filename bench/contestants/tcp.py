"""The limit: one raw TCP connection on loopback to one process that sends back what it has read. One array under way at a time, or several.

Each array goes behind its length. The other process reads it whole before it sends it back, as whoever computes with it would have to.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import struct
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

import numpy as np

from bench.harness.contest import Array, Run

START_TIMEOUT_S = 30.0
LENGTH = struct.Struct("!Q")


class TcpEcho:
    """A socket and a process at its other end."""

    name = "tcp"

    def __enter__(self) -> Self:
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        if not ours.poll(START_TIMEOUT_S):
            raise TimeoutError("the echo did not start")
        self._socket = _without_delay(socket.create_connection(("127.0.0.1", ours.recv())))
        self.run([np.zeros(8, np.uint8)] * 8, in_flight=4)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._socket.close()
        self._process.kill()
        self._process.join()

    def processes(self) -> dict[str, int]:
        assert self._process.pid is not None
        return {"client": os.getpid(), "echo": self._process.pid}

    def run(self, inputs: Sequence[Array], *, in_flight: int) -> Run:
        return self._alternating(inputs) if in_flight == 1 else self._overlapping(inputs, in_flight)

    def _alternating(self, inputs: Sequence[Array]) -> Run:
        clock = time.perf_counter
        outputs, latencies = [], []
        began = clock()
        for value in inputs:
            submitted = clock()
            _send(self._socket, value)
            outputs.append(_receive_like(self._socket, value))
            latencies.append(clock() - submitted)
        return Run(clock() - began, latencies, outputs)

    def _overlapping(self, inputs: Sequence[Array], in_flight: int) -> Run:
        """A second thread sends, because a full socket buffer blocks whoever writes to it, and only reading here empties it."""
        clock = time.perf_counter
        room, submitted = threading.Semaphore(in_flight), [0.0] * len(inputs)

        def send_all() -> None:
            for index, value in enumerate(inputs):
                room.acquire()
                submitted[index] = clock()
                _send(self._socket, value)

        outputs, latencies = [], []
        sender = threading.Thread(target=send_all, name="bench-tcp-send", daemon=True)
        began = clock()
        sender.start()
        for index, value in enumerate(inputs):
            outputs.append(_receive_like(self._socket, value))
            latencies.append(clock() - submitted[index])
            room.release()
        elapsed_s = clock() - began
        sender.join()
        return Run(elapsed_s, latencies, outputs)


def _serve(tell: Connection) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        tell.send(listening.getsockname()[1])
        connection, _ = listening.accept()
    with _without_delay(connection):
        while True:
            try:
                _send(connection, _receive(connection))
            except ConnectionError:
                return


def _send(connection: socket.socket, value: Any) -> None:
    data = memoryview(value).cast("B")
    sent = connection.sendmsg([LENGTH.pack(len(data)), data]) - LENGTH.size  # the length always fits: buffers are larger
    if sent < len(data):
        connection.sendall(data[sent:])


def _receive(connection: socket.socket) -> bytearray:
    length = bytearray(LENGTH.size)
    _fill(connection, length)
    data = bytearray(LENGTH.unpack(length)[0])
    _fill(connection, data)
    return data


def _receive_like(connection: socket.socket, value: Array) -> Array:
    return np.frombuffer(_receive(connection), value.dtype).reshape(value.shape)


def _fill(connection: socket.socket, buffer: bytearray) -> None:
    view = memoryview(buffer)
    while view:
        taken = connection.recv_into(view, len(view), socket.MSG_WAITALL)
        if taken == 0:
            raise ConnectionError("the other end has closed")
        view = view[taken:]


def _without_delay(connection: socket.socket) -> socket.socket:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection
