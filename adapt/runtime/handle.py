"""What a handle on a deployed model does besides waiting. `Model` and `AsyncModel` are its two doors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from msgspec import Struct

from adapt.clock import monotonic
from adapt.errors import AdaptError, ConfigError, OverloadedError
from adapt.models.interface import Interface, interface_digest
from adapt.models.structure import Node
from adapt.protocol import messages as msg
from adapt.protocol.wire import Blob
from adapt.runtime.calls import check_seconds
from adapt.runtime.conversation import INLINE_BYTES, LIMIT_BYTES, Conversation, Decode, Encode, InferFuture
from adapt.runtime.tensors import from_wire, is_torch, to_wire
from adapt.scheduling.outcome import Question
from adapt.scheduling.window import Window

DEADLINE_S = 60.0


class Asking(Struct, frozen=True):
    """A call that fits the model, and shares no memory with its inputs. It may be asked again."""

    question: Question
    decode: Decode
    encode: Encode | None  # what makes the question's tensors, where that may not be done at once

    def ask(self, conversation: Conversation) -> InferFuture:
        """Raises ConfigError: the dispatcher allows no such deadline."""
        return conversation.submit(self.question, self.decode, encode=self.encode)


class Handle:
    """A deployed model, as somebody saw it deployed.

    Attributes:
        record: name, version, stages with their workers, as they were when this handle was made.
    """

    def __init__(self, record: msg.DeploymentRecord) -> None:
        self.record = record
        self._interface = Interface.from_json(record.interface)
        self._digest = interface_digest(record.interface)
        # What is between stages may be rounded by choice; what the user gives goes in as it is.
        self._codec = "raw" if record.codec == "raw" else "lz4"
        self._decoders = self._decoder(as_torch=False), self._decoder(as_torch=True)

    @property
    def name(self) -> str:
        return self.record.name

    def __repr__(self) -> str:
        inputs = ", ".join(map(str, self._interface.inputs))
        return f"<adapt model {self.name!r} version {self.record.version}: {inputs}; {len(self.record.stages)} stages>"

    def _asking(self, args: Sequence[Any], kwargs: Mapping[str, Any], deadline_s: float, *, may_block: bool = True) -> Asking:
        """What these inputs ask. Unless it may block, it copies large inputs and leaves their compression for later.

        Raises:
            InputMismatchError: an input does not fit.
            ConfigError: the deadline is no positive number.
        """
        check_seconds("deadline_s", deadline_s)
        deadline = monotonic() + deadline_s
        values = self._interface.match(args, kwargs)
        encode: Encode | None = None
        if may_block or self._codec == "raw" or _size_bytes(values) <= INLINE_BYTES:  # to send raw is to copy
            leaves, blobs = to_wire(values, codec=self._codec)
        else:
            leaves, blobs, encode = [], (), partial(to_wire, list(map(_copy, values)), codec=self._codec)
        question = Question(
            deployment=self.name,
            program=None,  # whatever version is the present one
            interface=self._digest,
            numerics="exact" if self.record.numerics == "exact" else "close",
            leaves=leaves,
            blobs=blobs,
            budget_s=deadline_s,
            deadline=deadline,
        )
        return Asking(question, self._decoders[any(map(is_torch, values))], encode)

    def _decoder(self, *, as_torch: bool) -> Decode:
        interface = self._interface

        def decode(leaves: list[msg.Leaf], blobs: tuple[Blob, ...]) -> Any:
            return interface.assemble(from_wire(leaves, blobs, as_torch=as_torch, limit_bytes=LIMIT_BYTES))

        return decode

    def _arguments(self, value: Any) -> tuple[Any, ...]:
        """Of the call that is meant by one input of a `map`."""
        is_many = isinstance(value, tuple) and _count_arguments(self._interface) > 1
        return value if is_many else (value,)


def _size_bytes(values: Sequence[Any]) -> int:
    return sum(getattr(value, "nbytes", 0) for value in values)


def _copy(value: Any) -> Any:
    if is_torch(value):
        return value.detach().to("cpu", copy=True)
    return np.array(value) if hasattr(value, "shape") else value


def _count_arguments(interface: Interface) -> int:
    match interface.input_structure:
        case Node(items=(Node(items=positional), Node(items=named))):
            return len(positional) + len(named)
    return 1


def check_in_flight(in_flight: Any) -> None:
    if isinstance(in_flight, bool) or not isinstance(in_flight, int) or in_flight < 1:
        raise ConfigError(f"in_flight={in_flight!r}: expected a number of at least 1")


@dataclass(slots=True)
class _Item:
    """One input of a `map` on its way."""

    asking: Asking | None = None  # none: it did not fit
    future: InferFuture | None = None  # of its last attempt
    error: Exception | None = None

    def output(self) -> Any:
        """What has come of it."""
        if self.error is not None:
            raise self.error
        assert self.future is not None
        return self.future.result(0)


class Stream:
    """One `map` under way: inputs in, outputs out in the same order, within a window. For one thread.

    Args:
        prepare: what an input asks; `ask` asks it.
        tell: called with the number of an item when its answer has come, by whichever thread that is on; pass it on to `settle`.
    """

    def __init__(
        self, *, in_flight: int, prepare: Callable[[Any], Asking], ask: Callable[[Asking], InferFuture], tell: Callable[[int], None]
    ) -> None:
        self._window = Window(in_flight)
        self._prepare, self._ask_one, self._tell = prepare, ask, tell
        self._items: dict[int, _Item] = {}

    @property
    def has_room(self) -> bool:
        return self._window.has_room

    @property
    def is_filled(self) -> bool:
        return self._window.is_filled

    @property
    def is_ready(self) -> bool:
        return self._window.is_ready

    @property
    def is_empty(self) -> bool:
        return self._window.is_empty

    def add(self, value: Any) -> None:
        """Ask the next input. Only while there is room. An input that does not fit is an error when its turn comes."""
        number = self._window.begin()
        item = self._items[number] = _Item()
        try:
            item.asking = self._prepare(value)
        except Exception as error:  # ours, or of what the value is
            self._end(number, error)
            return
        self._ask(number)

    def settle(self, number: int) -> None:
        """The answer to this item has come."""
        item = self._items.get(number)
        if item is None or item.future is None or item.asking is None:
            return
        error = None if item.future.cancelled() else item.future.exception(0)
        if isinstance(error, OverloadedError):
            deadline = item.asking.question.deadline
            self._window.overloaded(number, retry_after_s=_seconds(error.retry_after_s), deadline=deadline, now=monotonic())
        else:
            self._window.answered(number)

    def ask_again(self) -> None:
        """Ask what an overloaded dispatcher did not take, once that is due."""
        for number in self._window.take_due(monotonic()):
            self._ask(number)

    def pause_s(self) -> float | None:
        """How long until something is due to be asked again; None: nothing is."""
        moment = self._window.next_wakeup()
        return None if moment is None else max(moment - monotonic(), 0.0)

    def take(self) -> Any:
        """The next output, or the error that came instead. Only if one is ready."""
        return self._items.pop(self._window.take()).output()

    def cancel(self) -> None:
        """Nobody wants the rest."""
        items, self._items = self._items, {}
        for item in items.values():
            if item.future is not None:
                item.future.cancel()

    def _ask(self, number: int) -> None:
        item = self._items.get(number)
        if item is None or item.asking is None:  # cancelled
            return
        try:
            item.future = self._ask_one(item.asking)
        except AdaptError as error:
            self._end(number, error)
            return
        item.future.on_done(lambda _: self._tell(number))

    def _end(self, number: int, error: Exception) -> None:
        self._items[number].error = error
        self._window.answered(number)


def _seconds(value: object) -> float:
    return value if isinstance(value, (int, float)) else 0.0  # it came over a wire


@contextmanager
def progress_bar(name: str, total: int | None) -> Iterator[Callable[[], None]]:
    """A bar on standard error while the block runs; what it gives moves it on by one."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=total)
        yield lambda: bar.advance(task)
