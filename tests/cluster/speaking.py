"""A dispatcher on a thread of its own that says to clients what the test tells it to."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from adapt.models.interface import Interface
from adapt.models.program import Affine, TensorSpec
from adapt.models.structure import Leaf, Node
from adapt.protocol import codecs
from adapt.protocol import messages as msg
from adapt.protocol.ids import RequestId, RoutingId
from adapt.protocol.wire import Blob
from adapt.runtime.endpoint import Arrival, Malformed, Received, RouterEndpoint
from adapt.runtime.threads import LoopThread

WAIT_S = 15.0
LIMIT_BYTES = 8 << 20
PROGRAM = "ab" * 32


def interface(dtype: str = "float32", *, width: int = 4, outputs: int = 1, output_structure: Any = None) -> Interface:
    """Of a module that is called with one tensor of (batch, width)."""
    spec = TensorSpec(dtype, (Affine(1, 0), width), (0, 1))
    arguments = Node("tuple", (Node("tuple", (Leaf(),)), Node("dict", ())))
    return Interface(("x",), (spec,), arguments, (spec,) * outputs, output_structure or Leaf(), 64)


def deployment(name: str = "double", *, of: Interface | None = None, numerics: str = "auto", codec: str = "raw") -> msg.DeploymentRecord:
    return msg.DeploymentRecord(
        name=name, version=1, program=PROGRAM, epoch=1, codec=codec, tolerance=None, numerics=numerics, stages=[],
        interface=(of or interface()).to_json(),
    )  # fmt: skip


class SpeakingDispatcher:
    """Greets clients and answers status queries; `answer` is called with every other message, on the dispatcher's thread.

    All that arrives is in `got`, in order, from whichever session.
    """

    def __init__(self, address: str = "tcp://127.0.0.1:*", *, term: int = 1, sessions: int = 0, **records: msg.DeploymentRecord) -> None:
        self.term, self.session, self.client = term, sessions, RoutingId(b"")
        self.deployments = list(records.values()) or [deployment()]
        self.answer: Callable[[Any, tuple[Blob, ...]], None] = lambda message, blobs: None
        self.refusal: msg.Refused | None = None
        self.max_message_bytes, self.max_budget_s = LIMIT_BYTES, 600.0
        self.got: list[Any] = []
        self.inputs: dict[Any, tuple[Blob, ...]] = {}  # by request
        self._changed = threading.Condition()
        self._io = LoopThread("speaking-dispatcher")
        self.endpoint = self._io.run(self._bind(address))
        self.address = self.endpoint.address

    def __enter__(self) -> SpeakingDispatcher:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    async def _bind(self, address: str) -> RouterEndpoint:
        return RouterEndpoint(address, receive=self._receive, limit_bytes=4 * LIMIT_BYTES, piece_bytes=64 << 10)

    def close(self) -> None:
        """As a process that dies: nothing is said."""

        async def unbind() -> None:
            self.endpoint.close()

        self._io.close(unbind())

    def _receive(self, arrival: Arrival) -> None:
        assert not isinstance(arrival, Malformed), arrival.error
        if isinstance(arrival, Received):
            message, blobs = arrival.envelope.message, arrival.envelope.blobs
            match message:
                case msg.ClientHello():
                    self.client, self.session = arrival.routing_id, self.session + 1
                    self._send(self._greeting())
                case msg.StatusQuery(call=call):
                    self._send(
                        msg.StatusReport(call=call, term=self.term, uptime_s=1.0, workers=[], deployments=self.deployments, counters={})
                    )
                case msg.InferRequest():
                    self.inputs[message.request_id] = blobs
            with self._changed:
                self.got.append(message)
                self._changed.notify_all()
            if not isinstance(message, msg.ClientHello | msg.Attach | msg.StatusQuery):
                self.answer(message, blobs)

    def _greeting(self) -> msg.Message:
        return self.refusal or msg.Welcome(
            software="test", heartbeat_s=0.5, piece_bytes=64 << 10, max_message_bytes=self.max_message_bytes, max_budget_s=self.max_budget_s
        )

    def _send(self, message: msg.Message, *blobs: Blob) -> None:
        self.endpoint.send(self.client, message, session=self.session, term=self.term, blobs=blobs)

    def send(self, message: msg.Message, *blobs: Blob) -> None:
        """From any thread; to the client that said hello last."""

        async def act() -> None:
            self._send(message, *blobs)

        if self._io.is_current:
            self._send(message, *blobs)
        else:
            self._io.run(act())

    def until(self, condition: Callable[[], Any]) -> Any:
        """What `condition` says once that is true; it is asked after every arrival."""
        limit = time.monotonic() + WAIT_S
        with self._changed:
            while not (found := condition()):
                assert self._changed.wait(limit - time.monotonic()), f"did not come; got {self.got}"
        return found

    def of(self, kind: type) -> list[Any]:
        return [message for message in self.got if isinstance(message, kind)]

    def take(self, kind: type, count: int = 1) -> Any:
        """The last of so many messages of a kind, once they have come."""
        return self.until(lambda: len(self.of(kind)) >= count and self.of(kind)[count - 1])

    def request(self, request_id: RequestId) -> msg.InferRequest:
        """The request of this id, once it has come; it may come several times."""
        return self.until(lambda: next((one for one in self.of(msg.InferRequest) if one.request_id == request_id), None))

    def accept(self, request: msg.InferRequest, *, version: int = 1) -> None:
        self.send(msg.Accepted(request_id=request.request_id, deployment=request.deployment, version=version, program=PROGRAM))

    def reply(self, request: msg.InferRequest, *arrays: np.ndarray, dtype: str | None = None) -> None:
        encoded = [codecs.encode(array, dtype=dtype) for array in arrays]
        message = msg.Reply(request_id=request.request_id, leaves=[header for header, _ in encoded], attempts=3, numeric_classes=["c"])
        self.send(message, *(Blob.of(bytes(data)) for _, data in encoded))

    def fail(self, request: msg.InferRequest, error: Any) -> None:
        code, message, fields = error.to_wire()
        self.send(msg.RequestFailed(request_id=request.request_id, code=code, message=message, fields=fields))

    def input(self, request: msg.InferRequest) -> np.ndarray:
        (blob,) = self.inputs[request.request_id]
        return codecs.decode(request.leaves[0], blob.contiguous(), limit_bytes=LIMIT_BYTES)

    def doubles(self, message: Any, blobs: tuple[Blob, ...]) -> None:
        """An `answer`: every request is let in, and answered with twice its input."""
        if isinstance(message, msg.InferRequest):
            self.accept(message)
            self.reply(message, 2 * self.input(message))
