"""Clients that ask without pause and write down what they saw, held against the truth at the end.

    with Traffic(cluster.address, workload, count=400) as traffic:      asks from the first moment on
        traffic.until_ended(50)
        cluster.workers[1].kill()
    traffic.findings()                                                  raises nothing; `assert_clean` does

The truth is computed here, by the whole module, in the numeric class of a worker with one thread.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from typing import Any, Self

import torch

import adapt
from adapt.errors import AdaptError
from adapt.protocol.ids import RequestId
from adapt.simulation.history import CANCELLED, RESULT, End, Expected, Findings, Operation, check
from tests.faults.clusters import wait_until
from tests.host import HostStall

WIDTH = 64
POOL = 256  # distinct inputs; far more than are ever under way, so that a swap shows
DEADLINE_S = 60.0


class Layers(torch.nn.Sequential):
    """A few layers whose first feature passes all of them unchanged: it carries the mark of a mishap, see mishaps.py."""

    def __init__(self, count: int = 4, seed: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers = [torch.nn.Linear(WIDTH, WIDTH) for _ in range(count)]
        for layer in layers:
            with torch.no_grad():
                layer.weight[0], layer.weight[:, 0], layer.bias[0] = 0.0, 0.0, 0.0
                layer.weight[0, 0] = 1.0
        super().__init__(*(torch.nn.Sequential(layer, torch.nn.ReLU()) for layer in layers))
        self.eval()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """As the workers compute: sums of another number of threads may differ in their last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(before)


class Workload:
    """A module, a pool of distinct inputs, and what the module itself makes of them."""

    def __init__(self, module: torch.nn.Module, inputs: torch.Tensor) -> None:
        self.module, self.inputs = module, inputs
        with one_thread():
            self.truth = [_hash(module(x)) for x in inputs]
        assert len(set(self.truth)) == len(inputs), "equal answers would hide a swap"

    @classmethod
    def of_layers(cls, *, seed: int = 0, count: int = POOL) -> Self:
        inputs = torch.randn(count, 1, WIDTH, generator=torch.Generator().manual_seed(seed))
        inputs[:, :, 0] = 0.0  # no mark
        return cls(Layers(), inputs)

    def marked(self, mark: int, index: int = 0) -> torch.Tensor:
        """One of the inputs, with a mark."""
        x = self.inputs[index].clone()
        x[:, 0] = mark
        return x

    def expect(self, x: torch.Tensor) -> torch.Tensor:
        with one_thread():
            return self.module(x)

    def deploy(self, client: adapt.Client, *, stages: int = 4, name: str = "layers") -> adapt.Model:
        return client.deploy(self.module, example_inputs=(self.inputs[0],), stages=stages, name=name)


def _hash(value: Any) -> int:
    """Of all bits of an array or tensor, and of its form."""
    array = value.numpy() if isinstance(value, torch.Tensor) else value
    return int.from_bytes(hashlib.sha256(f"{array.dtype} {array.shape}".encode() + array.tobytes()).digest()[:8], "big")


class Traffic:
    """Clients, each on a thread of its own, that keep some requests under way until `count` were asked or it is ended.

    Args:
        count: of all requests together; None: until `end`.
        errors: codes that may end a request besides a right result.
        journal: is told of each operation and end as it happens; for a process that will be killed.
    """

    def __init__(
        self,
        address: str,
        workload: Workload,
        *,
        name: str = "layers",
        clients: int = 3,
        in_flight: int = 6,
        count: int | None = None,
        deadline_s: float = DEADLINE_S,
        errors: Sequence[str] = (),
        journal: Any = None,
    ) -> None:
        self._address, self._workload, self._name = address, workload, name
        self._in_flight, self._count, self._deadline_s = in_flight, count, deadline_s
        self._errors, self._journal = frozenset(errors), journal
        self._numbers, self._lock = itertools.count(), threading.Lock()
        self._is_over = threading.Event()
        self._classes: dict[str, int] = {}
        self.operations: dict[RequestId, Operation] = {}
        self.truth: dict[RequestId, Expected] = {}
        self.words: dict[RequestId, str] = {}  # of errors
        self.stall = HostStall()
        self._failures: list[BaseException] = []
        self._threads = [threading.Thread(target=self._run, name=f"traffic-{number}", daemon=True) for number in range(clients)]

    def __enter__(self) -> Self:
        self.begin()
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def begin(self) -> None:
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Ask no more than `count`, or no more at all without one; wait for what is open."""
        if self._count is None:
            self._is_over.set()
        for thread in self._threads:
            thread.join()
        self.stall.close()

    def stop(self) -> None:
        """Ask nothing more, whatever the count."""
        self._is_over.set()

    # ── what is seen meanwhile ───────────────────────────────────────────────────────────────────────────────────────

    @property
    def asked(self) -> int:
        return len(self.operations)

    @property
    def ended(self) -> int:
        with self._lock:
            return sum(bool(operation.ends) for operation in self.operations.values())

    def until_ended(self, count: int, *, limit_s: float = 60.0) -> None:
        """Wait until so many requests have ended."""
        wait_until(lambda: self.ended >= count or self._failures, limit_s=limit_s, told=lambda: f"{self.ended} of {self.asked} ended")
        assert not self._failures, self._failures

    def until_more(self, count: int, *, limit_s: float = 30.0) -> None:
        """Wait until so many more have ended than now."""
        self.until_ended(self.ended + count, limit_s=limit_s)

    def until_asked(self, count: int, *, limit_s: float = 60.0) -> None:
        wait_until(lambda: self.asked >= count or self._failures, limit_s=limit_s)
        assert not self._failures, self._failures

    def wait(self) -> None:
        """Until somebody else ends it."""
        self._is_over.wait()

    # ── one client ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        try:
            with adapt.Client(self._address, connect_timeout_s=30.0) as client:
                self._ask(client.model(self._name))
        except BaseException as error:
            self._failures.append(error)

    def _ask(self, model: adapt.Model) -> None:
        room = threading.Semaphore(self._in_flight)
        futures = []
        while not self._is_over.is_set():
            with self._lock:
                number = next(self._numbers)
            if self._count is not None and number >= self._count:
                break
            room.acquire()
            futures.append(self._submit(model, number % len(self._workload.inputs), room))
        limit = time.monotonic() + self._deadline_s + 10.0
        for future in futures:
            with contextlib.suppress(Exception, CancelledError):
                future.exception(max(limit - time.monotonic(), 0.0))

    def _submit(self, model: adapt.Model, index: int, room: threading.Semaphore) -> Any:
        at = time.monotonic()
        future = model.submit(self._workload.inputs[index], deadline_s=self._deadline_s)
        operation = Operation(request_id=future.request_id, at=at, deadline=at + self._deadline_s)
        with self._lock:
            self.operations[future.request_id] = operation
            self.truth[future.request_id] = Expected(results=frozenset({self._workload.truth[index]}), errors=self._errors, one_class=True)
        if self._journal is not None:
            self._journal.asked(operation, index)

        def ended(done: Any) -> None:
            self._note_end(operation, done)
            room.release()

        future.add_done_callback(ended)
        return future

    def _note_end(self, operation: Operation, future: Any) -> None:
        now = time.monotonic()
        outcome, result, classes = CANCELLED, None, 0
        if not future.cancelled():
            error = future.exception(0)
            if error is None:
                outcome, result = RESULT, _hash(future.result(0))
                classes = self._bits(future.outcome.numeric_classes)
            else:
                outcome = error.code if isinstance(error, AdaptError) else type(error).__name__
                self.words[operation.request_id] = str(error)
        end = End(moment=now, at=now, outcome=outcome, result=result, classes=classes, stopped_s=self.stall.between(operation.at, now))
        with self._lock:
            operation.ends.append(end)
        if self._journal is not None:
            self._journal.ended(operation, end)

    def _bits(self, names: Sequence[str]) -> int:
        with self._lock:
            return sum(1 << self._classes.setdefault(name, len(self._classes)) for name in set(names))

    # ── at the end ───────────────────────────────────────────────────────────────────────────────────────────────────

    def findings(self) -> Findings:
        return check(self.operations.values(), self.truth)

    def longest_s(self) -> float:
        """The longest that a request took, without what the machine itself stood still."""
        return max(operation.ends[0].at - operation.at - operation.ends[0].stopped_s for operation in self.operations.values())


def assert_clean(*traffics: Traffic) -> None:
    """0 lost, 0 duplicated, 0 wrong, 0 late; says what went wrong with whom."""
    for traffic in traffics:
        assert not traffic._failures, traffic._failures
        found = traffic.findings().violations
        shown = [
            f"{kind}: {request_id}: {traffic.operations[request_id].ends} {traffic.words.get(request_id, '')}" for kind, request_id in found
        ]
        assert not found, f"{len(found)} of {traffic.asked} requests: " + "\n".join(shown[:10])
        assert traffic.asked > 0
