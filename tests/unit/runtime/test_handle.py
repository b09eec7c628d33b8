"""What both doors share: questions that are the user's no more, and the stream of a `map`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adapt.errors import ConfigError, InputMismatchError, ModelError, OverloadedError
from adapt.models.interface import Interface
from adapt.models.program import Affine, TensorSpec
from adapt.models.structure import Leaf, Node
from adapt.protocol import messages as msg
from adapt.protocol.ids import RequestId
from adapt.runtime.conversation import InferFuture
from adapt.runtime.handle import Handle, Stream
from adapt.runtime.tensors import from_wire

WIDTH = 40_000  # beyond what is encoded at once


def handle(*, codec: str = "lz4", parameters: tuple[str, ...] = ("x",)) -> Handle:
    spec = TensorSpec("float32", (Affine(1, 0), WIDTH), (0, 1))
    arguments = Node("tuple", (Node("tuple", tuple(Leaf() for _ in parameters)), Node("dict", ())))
    interface = Interface(parameters, (spec,) * len(parameters), arguments, (spec,), Leaf(), 64)
    record = msg.DeploymentRecord(
        name="net", version=1, program="ab" * 32, epoch=1, codec=codec, tolerance=None, numerics="auto", stages=[],
        interface=interface.to_json(),
    )  # fmt: skip
    return Handle(record)


def sent(leaves, blobs) -> np.ndarray:
    return from_wire(leaves, blobs, as_torch=False, limit_bytes=1 << 30)[0]


@pytest.mark.parametrize(("codec", "may_block", "is_later"), [("lz4", True, False), ("lz4", False, True), ("raw", False, False)])
def test_inputs_are_the_users_again_at_once(codec, may_block, is_later):
    x = np.zeros((1, WIDTH), np.float32)
    asking = handle(codec=codec)._asking((x,), {}, 1.0, may_block=may_block)
    x[:] = 7
    assert (asking.encode is not None) == is_later
    for _ in range(2):  # it may be asked again
        leaves, blobs = asking.encode() if asking.encode else (asking.question.leaves, asking.question.blobs)
        assert np.array_equal(sent(leaves, blobs), np.zeros((1, WIDTH)))


@pytest.mark.parametrize("layout", ["plain", "expanded", "transposed", "gradient"])
def test_so_are_tensors_of_every_layout(layout):
    torch = pytest.importorskip("torch")
    x = {
        "plain": lambda: torch.zeros(2, WIDTH),
        "expanded": lambda: torch.zeros(1, WIDTH).expand(2, WIDTH),
        "transposed": lambda: torch.zeros(WIDTH, 2).t(),
        "gradient": lambda: torch.zeros(2, WIDTH, requires_grad=True),
    }[layout]()
    asking = handle()._asking((x,), {}, 1.0, may_block=False)
    with torch.no_grad():
        (x[:1] if layout == "expanded" else x).fill_(7)
    assert np.array_equal(sent(*asking.encode()), np.zeros((2, WIDTH)))


def test_what_does_not_fit_is_told_at_once():
    with pytest.raises(InputMismatchError):
        handle()._asking((np.zeros((1, 3), np.float32),), {}, 1.0, may_block=False)
    with pytest.raises(ConfigError, match="deadline_s"):
        handle()._asking((np.zeros((1, WIDTH), np.float32),), {}, -1.0)


def test_a_tuple_is_several_inputs_where_a_model_takes_several():
    assert handle()._arguments((1, 2)) == ((1, 2),)
    assert handle(parameters=("x", "y"))._arguments((1, 2)) == (1, 2)
    assert handle(parameters=("x", "y"))._arguments([1, 2]) == ([1, 2],)


class Asked:
    """Stands for the cluster: futures that the test settles."""

    def __init__(self) -> None:
        self.futures: list[InferFuture] = []
        self.told: list[int] = []
        self.stream = Stream(in_flight=2, prepare=self.prepare, ask=self.ask, tell=self.told.append)

    def prepare(self, value):
        return handle()._asking((value,), {}, 5.0)

    def ask(self, asking):
        self.futures.append(InferFuture(RequestId(bytes(16), len(self.futures)), lambda work: work()))
        return self.futures[-1]

    def settle_all(self) -> None:
        for number in self.told:
            self.stream.settle(number)
        self.told.clear()


def test_a_stream_gives_outputs_and_errors_in_the_order_of_inputs():
    x, asked = np.zeros((1, WIDTH), np.float32), Asked()
    stream = asked.stream
    for value in (x, x[0]):
        stream.add(value)
    assert stream.has_room and not stream.is_ready and len(asked.futures) == 1  # what does not fit holds no slot
    stream.add(x)
    assert not stream.has_room
    asked.futures[1].set_exception(ModelError("no"))
    asked.settle_all()
    assert stream.has_room and not stream.is_ready
    asked.futures[0].set_result("first")
    asked.settle_all()
    assert stream.take() == "first"
    with pytest.raises(InputMismatchError):
        stream.take()
    with pytest.raises(ModelError):
        stream.take()
    assert stream.is_empty


def test_an_input_that_fails_in_its_own_way_is_an_error_of_its_place():
    """A tensor without data raises what torch raises."""
    x, asked = np.zeros((1, WIDTH), np.float32), Asked()
    stream = asked.stream
    stream.add(x)
    stream.add(torch.zeros(1, WIDTH, device="meta"))
    asked.futures[0].set_result("first")
    asked.settle_all()
    assert stream.take() == "first"
    with pytest.raises((NotImplementedError, RuntimeError, InputMismatchError)):
        stream.take()


def test_a_stream_asks_again_after_a_pause_and_not_when_it_was_cancelled():
    x, asked = np.zeros((1, WIDTH), np.float32), Asked()
    stream = asked.stream
    for _ in range(2):
        stream.add(x)
    for future in asked.futures:
        future.set_exception(OverloadedError("full", retry_after_s=0.01))
    asked.settle_all()
    assert not stream.has_room and not stream.is_ready
    assert 0 <= stream.pause_s() <= 0.01
    while stream.pause_s():
        pass
    stream.ask_again()
    assert len(asked.futures) in (3, 4)  # the second may be due a moment later
    stream.cancel()
    assert all(future.cancelled() for future in asked.futures[2:])
    asked.settle_all()
    count = len(asked.futures)
    stream.ask_again()
    assert len(asked.futures) == count


def test_an_overload_ends_an_item_that_has_no_time_left():
    asked = Asked()
    asked.stream.add(np.zeros((1, WIDTH), np.float32))
    asked.futures[0].set_exception(OverloadedError("full", retry_after_s=100.0))  # asked for: five seconds at most, and it has five
    asked.settle_all()
    with pytest.raises(OverloadedError):
        asked.stream.take()
