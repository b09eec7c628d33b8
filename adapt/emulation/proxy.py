"""Carries TCP connections, late and damaged as it is told: the links of emulated devices.

    python -I -S proxy.py SEED

Run as a file, without site-packages: it needs nothing of ADAPT, and should cost nothing; `proxy_control.py` starts and steers it.
Commands are JSON lines on standard input, each is answered by one on standard output, and when the input ends, so does it.

    device ── 127.0.0.1:PORT [ Line ] ── target        both sockets belong to the device's network namespace

There is one `Line` for each device, in it a `Connection` for each that it has taken, and in that a `Flow` for each direction, "up" from
the device and "down" to it. There are no background tasks, only callbacks, so what is closed is gone.

    of a flow                 what becomes of it
    bytes                     are read, perhaps changed, and wait as a piece until they are due; then they are written, in order
    end of its source         waits its turn among the pieces, then half of the connection is closed: the other direction goes on
    its source is reset       waits its turn too, then both sides are reset
    its sink takes no more    its source is not read; who sends has to wait, as before a link that is full
    it is held                nothing is read or written, no connection is made, nothing is lost

A stall holds both directions, a cut those it names. What a cut held back arrives after it: TCP promises every byte in order, and after
a real cut would send again what was lost. To swallow bytes and go on with later ones would be a mishap that no network has.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import heapq
import json
import math
import os
import random
import resource
import signal
import socket
import struct
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import count
from typing import Any, Literal

Direction = Literal["up", "down"]
DIRECTIONS: tuple[Direction, ...] = ("up", "down")
Address = tuple[str, int]

MEBIBYTE = 1 << 20
READ_BYTES = 256 * 1024
MAX_WAITING_BYTES = 4 * MEBIBYTE  # of a flow: enough for 80 MB/s at 50 ms
PIECE_BYTES = 256  # what a piece costs besides its bytes; many small ones must not fill the memory either
BACKLOG = 256
PAUSE_S = 0.1  # when no descriptor is left
RARE = 1e-15  # a share of changed bytes that nobody will live to see
CLONE_NEWNET = 0x40000000
ABSOLUTE = 1  # TFD_TIMER_ABSTIME
RESET_ON_CLOSE = struct.pack("ii", 1, 0)

_library = ctypes.CDLL(None, use_errno=True)  # setns is in Python from 3.12 on, timerfd from 3.13
_buffer = memoryview(bytearray(READ_BYTES))  # one for all: it is emptied before the next read


def corruptions(seed: int, device: str, direction: Direction, connection: int, per_mib: float) -> Iterator[tuple[int, int]]:
    """Which bytes of a stream are changed, and how: offset and what the byte is XORed with, never 0. Each byte is as likely as any other.

    Args:
        connection: number of the connection among those of the device, from 0.
        per_mib: so many per MiB on average, at most all of them.
    """
    draw = random.Random(f"adapt link proxy: seed {seed}, {device} {direction}, connection {connection}")
    share, offset = per_mib / MEBIBYTE, -1
    while share > RARE:
        # the gaps between successes of independent trials are geometric
        offset += 1 if share >= 1 else 1 + int(math.log(1.0 - draw.random()) / math.log1p(-share))
        yield offset, draw.randrange(1, 256)


# --- what the kernel does for us --------------------------------------------------------------------------------------


def _called(result: int, name: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


@contextlib.contextmanager
def inside(namespace: int | None, home: int) -> Iterator[None]:
    """What is made within belongs to that network namespace; both are open files. None: it stays at home."""
    if namespace is None:
        yield
        return
    _called(_library.setns(namespace, CLONE_NEWNET), "setns")
    try:
        yield
    finally:
        _called(_library.setns(home, CLONE_NEWNET), "setns")


class Alarm:
    """Calls at moments of the monotonic clock, exact to some 0.1 ms. The timers of an event loop on epoll are late by up to 1 ms."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        flags = os.O_NONBLOCK | os.O_CLOEXEC
        self._file = _called(_library.timerfd_create(time.CLOCK_MONOTONIC, flags), "timerfd_create")
        self._calls: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._set_for = math.inf
        loop.add_reader(self._file, self._ring)

    def call_at(self, moment: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._calls, (moment, next(self._numbers), call))
        if moment < self._set_for:
            self._set(moment)

    def _ring(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._file, 8)
        now = time.monotonic()
        due = []
        while self._calls and self._calls[0][0] <= now:
            due.append(heapq.heappop(self._calls)[2])
        self._set_for = math.inf
        if self._calls:
            self._set(self._calls[0][0])
        for call in due:
            call()

    def _set(self, moment: float) -> None:
        self._set_for = moment
        nanoseconds = max(math.ceil(moment * 1e9), 1)  # nothing would switch it off
        value = (ctypes.c_long * 4)(0, 0, nanoseconds // 10**9, nanoseconds % 10**9)  # struct itimerspec, without an interval
        _called(_library.timerfd_settime(self._file, ABSOLUTE, value, None), "timerfd_settime")


@dataclass(frozen=True, slots=True)
class Place:
    """What all lines share."""

    loop: asyncio.AbstractEventLoop
    alarm: Alarm
    home: int  # open file of our own network namespace
    seed: int


# --- what is carried --------------------------------------------------------------------------------------------------


class End(Enum):
    """How a flow ends; waits among its pieces."""

    CLOSED = "closed"
    RESET = "reset"


class Flow:
    """One direction of one connection. It belongs to the connection, which says when it may move; see the table above."""

    def __init__(self, connection: Connection, direction: Direction, source: socket.socket, sink: socket.socket) -> None:
        self._connection, self._line, self._direction = connection, connection.line, direction
        self._source, self._sink = source, sink
        self._pieces: deque[tuple[float, memoryview | End]] = deque()  # moment when due, never going back
        self._waiting_bytes, self._read_bytes = 0, 0
        self._end: End | None = None  # has come from the source; perhaps still waits
        self._last_due = 0.0
        self._is_reading = self._is_writing = self._is_alarmed = False
        self.is_over = False
        self._jitter = random.Random(f"adapt link proxy: jitter, {self._stream}")
        self._changes: Iterator[tuple[int, int]] = iter(())
        self._next_change: tuple[int, int] | None = None
        self.begin_changes()

    @property
    def _stream(self) -> tuple[int, str, Direction, int]:
        return self._line.place.seed, self._line.device, self._direction, self._connection.number

    @property
    def _is_held(self) -> bool:
        return self._direction in self._line.held

    def begin_changes(self) -> None:
        """From here on bytes are changed as the line says; offsets count from here."""
        begin = self._read_bytes
        self._changes = ((begin + offset, mask) for offset, mask in corruptions(*self._stream, self._line.per_mib))
        self._next_change = next(self._changes, None)

    def detach(self) -> None:
        """Both sockets will be closed, or are another's business from now on."""
        self.is_over = True
        self._pieces.clear()
        self._watch()

    def end(self, how: End) -> None:
        """Nothing more comes from the source. A reset may still follow a close."""
        if self._end is not how and self._end is not End.RESET:
            self._end, self.is_over = how, False
            self._pieces.append((self._due(), how))
        self.deliver()

    def _readable(self) -> None:
        try:
            size = self._source.recv_into(_buffer)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._connection.lost(self._source)
            return
        if not size:
            self.end(End.CLOSED)
            return
        piece = _buffer[:size]
        self._change(piece)
        if not self._pieces and not self._line.is_late:
            piece = piece[self._write(piece) :]
        if piece and not self.is_over:
            self._pieces.append((self._due(), memoryview(bytes(piece))))
            self._waiting_bytes += len(piece) + PIECE_BYTES
            self.deliver()

    def _change(self, piece: memoryview) -> None:
        begin, self._read_bytes = self._read_bytes, self._read_bytes + len(piece)
        while self._next_change is not None and self._next_change[0] < self._read_bytes:
            offset, mask = self._next_change
            piece[offset - begin] ^= mask
            self._line.corrupted_bytes[self._direction] += 1
            self._next_change = next(self._changes, None)

    def _due(self) -> float:
        late_s = self._line.latency_s
        if self._line.jitter_s:
            late_s += self._jitter.uniform(0.0, self._line.jitter_s)
        self._last_due = max(self._last_due, time.monotonic() + late_s)
        return self._last_due

    def _alarmed(self) -> None:
        self._is_alarmed = False
        self.deliver()

    def deliver(self) -> None:
        """Write the pieces that are due, as far as the sink takes them, and wait for what comes next. Also called when the line has changed."""
        now, is_full = time.monotonic(), False
        while self._pieces and not self._is_held and not is_full and not self.is_over:
            due, piece = self._pieces[0]
            if due > now:
                self._alarm(due)
                break
            if isinstance(piece, End):
                self._pieces.popleft()
                self._deliver_end(piece)
            else:
                is_full = self._deliver_piece(due, piece)
        self._watch(is_full=is_full)

    def _alarm(self, due: float) -> None:
        if not self._is_alarmed:  # else it rings sooner
            self._is_alarmed = True
            self._line.place.alarm.call_at(due, self._alarmed)

    def _deliver_piece(self, due: float, piece: memoryview) -> bool:
        """Returns whether the sink is full."""
        size = self._write(piece)
        if self.is_over:  # the sink was lost
            return False
        self._waiting_bytes -= size
        if size < len(piece):
            self._pieces[0] = (due, piece[size:])
            return True
        self._pieces.popleft()
        self._waiting_bytes -= PIECE_BYTES
        return False

    def _deliver_end(self, how: End) -> None:
        if how is End.RESET:
            self._connection.reset()
            return
        with contextlib.suppress(OSError):  # it is gone already
            self._sink.shutdown(socket.SHUT_WR)
        self.is_over = True
        self._connection.flow_ended()

    def _write(self, piece: memoryview) -> int:
        try:
            size = self._sink.send(piece)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:
            self._connection.lost(self._sink)
            return 0
        self._line.carried_bytes[self._direction] += size
        return size

    def _watch(self, *, is_full: bool = False) -> None:
        """Be called when the source has something, if that is wanted, and when the sink takes something, if it is full."""
        loop = self._line.place.loop
        may_move = not self.is_over and not self._is_held
        reads = may_move and not is_full and self._end is None and self._waiting_bytes < MAX_WAITING_BYTES
        if reads != self._is_reading:
            self._is_reading = reads
            if reads:
                loop.add_reader(self._source, self._readable)
            else:
                loop.remove_reader(self._source)
        writes = may_move and is_full
        if writes != self._is_writing:
            self._is_writing = writes
            if writes:
                loop.add_writer(self._sink, self.deliver)
            else:
                loop.remove_writer(self._sink)


class Connection:
    """One connection of a device, from when it was taken until both directions have ended or it is reset.

    Attributes:
        number: among those of the device, from 0.
    """

    def __init__(self, line: Line, number: int, near: socket.socket) -> None:
        self.line, self.number = line, number
        self._near = near
        self._far: socket.socket | None = None  # until nothing is held
        self._flows: tuple[Flow, ...] = ()  # until it is connected on

    def settle(self) -> None:
        """To be called when the line has changed. A connection taken while anything is held is made when nothing is."""
        if self._far is None and not self.line.held:
            self._connect()
        for flow in self._flows:
            flow.deliver()

    def begin_changes(self) -> None:
        for flow in self._flows:
            flow.begin_changes()

    def _connect(self) -> None:
        try:
            self._far = self.line.new_socket()
        except OSError:
            self.reset()
            return
        if self._far.connect_ex(self.line.target) in (0, errno.EINPROGRESS):
            self.line.place.loop.add_writer(self._far, self._connected)
        else:
            self.reset()

    def _connected(self) -> None:
        assert self._far is not None
        self.line.place.loop.remove_writer(self._far)
        if self._far.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or self._is_to_itself():
            self.reset()  # too late to refuse it
            return
        self._flows = (Flow(self, "up", self._near, self._far), Flow(self, "down", self._far, self._near))
        self.settle()

    def _is_to_itself(self) -> bool:
        """A connection to a free port of one's own machine may by chance come from that port, and then is one."""
        assert self._far is not None
        with contextlib.suppress(OSError):
            return bool(self._far.getsockname() == self._far.getpeername())
        return True  # it has gone again

    def lost(self, broken: socket.socket) -> None:
        """One side has reset it. What goes there is gone; the other side learns of it after what was sent before."""
        up, down = self._flows
        coming, going = (up, down) if broken is self._near else (down, up)
        going.detach()
        coming.end(End.RESET)

    def flow_ended(self) -> None:
        if all(flow.is_over for flow in self._flows):
            self._close()

    def reset(self) -> None:
        """RST to both sides; what was on the way is gone."""
        for side in (self._near, self._far):
            if side is not None:
                with contextlib.suppress(OSError):
                    side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        self._close()

    def _close(self) -> None:
        for flow in self._flows:
            flow.detach()
        self.line.connections.discard(self)
        if self._far is not None:
            self.line.place.loop.remove_writer(self._far)  # if it was still to be made
            self._far.close()
        self._near.close()


class Line:
    """The way of one device to its target.

    Attributes:
        held: directions in which nothing moves.
        latency_s, jitter_s: of each direction.
        per_mib: so many bytes are changed in each direction.
        carried_bytes, corrupted_bytes: by direction, of all its connections: delivered; changed.
    """

    def __init__(self, place: Place, device: str, namespace: str | None, target: Address, latency_s: float, jitter_s: float) -> None:
        self.place, self.device = place, device
        self._usual = _checked_delay(latency_s, jitter_s)
        self.latency_s, self.jitter_s = self._usual
        self.target = _checked_target(target)
        self.held: frozenset[Direction] = frozenset()
        self.per_mib = 0.0
        self.carried_bytes: dict[Direction, int] = dict.fromkeys(DIRECTIONS, 0)
        self.corrupted_bytes: dict[Direction, int] = dict.fromkeys(DIRECTIONS, 0)
        self.connections: set[Connection] = set()
        self._numbers = count()
        self._namespace = None if namespace is None else os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._listener = self.new_socket()
            self._listener.bind(("127.0.0.1", 0))
            self._listener.listen(BACKLOG)
        except OSError:
            if self._namespace is not None:
                os.close(self._namespace)
            raise
        place.loop.add_reader(self._listener, self._take)

    @property
    def address(self) -> Address:
        host, port = self._listener.getsockname()
        return host, port

    @property
    def is_late(self) -> bool:
        return self.latency_s > 0 or self.jitter_s > 0

    def new_socket(self) -> socket.socket:
        """In the device's namespace, never blocking."""
        with inside(self._namespace, self.place.home):
            made = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return made

    def set_target(self, target: Address) -> None:
        self.target = _checked_target(target)

    def delay(self, latency_s: float, jitter_s: float) -> None:
        self.latency_s, self.jitter_s = _checked_delay(latency_s, jitter_s)

    def hold(self, *directions: Direction) -> None:
        """From now on these are held, too."""
        self.held |= frozenset(directions)
        self._settle()

    def corrupt(self, per_mib: float) -> None:
        if not 0 <= per_mib <= MEBIBYTE:
            raise ValueError(f"per_mib={per_mib!r}: expected a number from 0 to {MEBIBYTE}")
        self.per_mib = float(per_mib)
        for connection in self.connections:
            connection.begin_changes()

    def reset(self) -> None:
        for connection in list(self.connections):
            connection.reset()

    def restore(self, late: tuple[float, float] | None, held: frozenset[Direction], per_mib: float) -> None:
        """All is as it was when the line was made, but for the target and what remains: latency and jitter, what is held, what is changed."""
        self.latency_s, self.jitter_s = self._usual if late is None else _checked_delay(*late)
        if per_mib != self.per_mib:  # else it goes on where it is
            self.corrupt(per_mib)
        self.held = held
        self._settle()

    def _settle(self) -> None:
        for connection in list(self.connections):
            connection.settle()

    def _take(self) -> None:
        """Take all that wait."""
        while True:
            try:
                near, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self.place.loop.remove_reader(self._listener)
                    self.place.loop.call_later(PAUSE_S, self.place.loop.add_reader, self._listener, self._take)
                    return
                continue  # it went before it was taken
            near.setblocking(False)
            near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = Connection(self, next(self._numbers), near)
            self.connections.add(connection)
            connection.settle()


def _checked_delay(latency_s: float, jitter_s: float) -> tuple[float, float]:
    for name, value in (("latency_s", latency_s), ("jitter_s", jitter_s)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}={value!r}: expected seconds, 0 or more")
    return float(latency_s), float(jitter_s)


def _checked_target(target: Address) -> Address:
    host, port = target
    try:
        socket.inet_pton(socket.AF_INET, host)
    except OSError:
        raise ValueError(f"target host {host!r}: expected an IPv4 address, as 10.0.0.1") from None
    if not 0 < port < 65536:
        raise ValueError(f"target port {port!r}: expected a number from 1 to 65535")
    return host, port


# --- what it is told --------------------------------------------------------------------------------------------------


class Proxy:
    """All lines, and the conversation about them."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._lines: dict[str, Line] = {}
        self._heard = b""

    def listen(self) -> None:
        """Commands have come, or the end of them. Called by the loop."""
        data = os.read(0, 65536)
        if not data:
            self._place.loop.stop()
            return
        *commands, self._heard = (self._heard + data).split(b"\n")
        for command in commands:
            answer = json.dumps(self._answer(json.loads(command))) + "\n"
            os.write(1, answer.encode())  # short; who asks waits for it

    def _answer(self, command: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"is": self._obey(**command)}
        except (ValueError, OSError) as error:
            return {"error": str(error)}

    def _obey(self, do: str, device: str = "", **facts: Any) -> Any:
        if do == "counters":
            return self._counters()
        if do == "add":
            return self._add(device, **facts)
        line = self._lines.get(device)
        if line is None:
            raise ValueError(f"no link of a device {device!r}")
        match do:
            case "set_target":
                line.set_target((facts["host"], facts["port"]))
            case "delay":
                line.delay(**facts)
            case "hold":
                line.hold(*facts["directions"])
            case "reset":
                line.reset()
            case "corrupt":
                line.corrupt(**facts)
            case "restore":
                late = facts["late"]
                line.restore(None if late is None else (late[0], late[1]), frozenset(facts["held"]), facts["per_mib"])
            case _:
                raise ValueError(f"no command {do!r}")
        return None

    def _add(self, device: str, namespace: str | None, host: str, port: int, latency_s: float, jitter_s: float) -> Address:
        if device in self._lines:
            raise ValueError(f"there is a link of device {device!r} already")
        line = self._lines[device] = Line(self._place, device, namespace, (host, port), latency_s, jitter_s)
        return line.address

    def _counters(self) -> list[tuple[str, Direction, int, int]]:
        return [
            (name, direction, line.carried_bytes[direction], line.corrupted_bytes[direction])
            for name, line in self._lines.items()
            for direction in DIRECTIONS
        ]


def _die(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """A bug: better no links than links of which nobody knows what they do. The one who steers us reads standard error."""
    error = context.get("exception")
    print(f"link proxy: {context['message']}", file=sys.stderr)
    if error is not None:
        traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(1)


def main(arguments: list[str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal is for the one who steers us
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(_die)
    home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    proxy = Proxy(Place(loop, Alarm(loop), home, int(arguments[0])))
    loop.add_reader(0, proxy.listen)
    loop.run_forever()
    os._exit(0)  # the kernel closes what is open, faster than we


if __name__ == "__main__":
    main(sys.argv[1:])
