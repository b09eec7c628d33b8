"""`Client` for programs that run on asyncio. What is asked is put together in calls.py and handle.py; this door awaits it.

    the user's loop    sockets, small inputs and answers, copies of large inputs: all that is quick
    encoding thread    compresses large inputs     decoding thread    large answers, unless raw     a thread of asyncio's    exports a module

Large inputs are copied by `submit` and compressed after it has returned, so a small request may overtake a large one that was submitted
before it, and what only the encoding finds is told by the future. Nothing here waits for another request.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import threading
import warnings
import weakref
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Mapping, Sequence, Sized
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from adapt.errors import ConnectError
from adapt.models.canaries import TOLERANCE as CANARY_TOLERANCE
from adapt.planning.model import ModelProfile
from adapt.protocol import messages as msg
from adapt.protocol.ids import RequestId
from adapt.runtime import calls
from adapt.runtime.calls import (
    CALL_TIMEOUT_S,
    CONNECT_TIMEOUT_S,
    DEPLOY_TIMEOUT_S,
    PROFILE_TIMEOUT_S,
    REPETITIONS,
    DeployOrder,
    ProfileOrder,
    Told,
    ToldShare,
    check_seconds,
)
from adapt.runtime.conversation import Call, Conversation, InferFuture, Outcome
from adapt.runtime.handle import DEADLINE_S, Asking, Handle, Stream, check_in_flight, progress_bar

if TYPE_CHECKING:
    from torch.nn import Module


class AsyncClient:
    """A connection to a dispatcher that lives on the running loop. `Client`, awaited: same arguments, results and errors.

    Use it as `async with AsyncClient(address) as client`, or as `client = await AsyncClient(address).connect()` and `close` it. It belongs
    to the loop, the thread and the process that it was connected in; anywhere else it raises ConnectError. One that is forgotten is
    disconnected, with a ResourceWarning.

    Args:
        address: of the dispatcher, "tcp://HOST:PORT"; by default `ADAPT_DISPATCHER` or tcp://127.0.0.1:5570.
        connect_timeout_s: how long to wait for it to answer.

    Raises:
        ConfigError: the address is none.
    """

    def __init__(self, address: str | None = None, *, connect_timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        check_seconds("connect_timeout_s", connect_timeout_s)
        self.address = calls.address_of(address)
        self._connect_timeout_s = connect_timeout_s
        self._conversation: Conversation | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._state = "not connected"
        self._process = os.getpid()
        self._finalizer: weakref.finalize[Any, Any] | None = None

    async def __aenter__(self) -> Self:
        return await self.connect()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<adapt async client of {self.address}, {self._state}>"

    async def connect(self) -> Self:
        """Say hello to the dispatcher, once. Entering `async with` does this.

        Raises:
            ConnectError: nobody answers there, or the dispatcher refuses; or this client was connected or closed before.
            VersionError: the dispatcher speaks another version of the protocol.
        """
        if self._state != "not connected":
            raise ConnectError(self.address, f"this client is {self._state}; make another")
        self._state = "connecting"
        try:
            self._conversation = await Conversation.opened(self.address, self._connect_timeout_s)
        except BaseException:
            if self._state == "connecting":
                self._state = "not connected"  # it may be tried again
            raise
        if self._state == "closed":
            await self._conversation.close()
            raise ConnectError(self.address, "this client was closed while it connected")
        self._state, self._loop = "connected", asyncio.get_running_loop()
        self._finalizer = weakref.finalize(self, _abandon, self._conversation, self._loop, self._process, self.address)
        return self

    async def close(self) -> None:
        """Cancel what is open and disconnect. Closing twice is nothing; a `connect()` under way fails when it has its answer.

        Raises:
            ConnectError: not on the loop that it belongs to.
        """
        if self._state == "connecting":
            self._state = "closed"
        if self._state == "connected":
            conversation = self._usable()
            self._state = "closed"
            assert self._finalizer is not None
            self._finalizer.detach()
            await conversation.close()

    # ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def deploy(
        self,
        model: str | os.PathLike[str] | Module,
        *,
        example_inputs: Sequence[Any] | None = None,
        stages: int | str = "auto",
        codec: str = "auto",
        tolerance: float | None = None,
        numerics: str | None = None,
        optimize: str = "none",
        weights: str | os.PathLike[str] | None = None,
        seed: int | None = None,
        model_args: Mapping[str, Any] | None = None,
        input_shape: Sequence[int] | None = None,
        name: str | None = None,
        version: int | None = None,
        canaries: Sequence[Any] | None = None,
        canary_tolerance: float = CANARY_TOLERANCE,
        timeout_s: float = DEPLOY_TIMEOUT_S,
        progress: Told | bool = False,
    ) -> AsyncModel:
        """Cut a model into stages, load them on the workers, and make it available to every client.

        Arguments and errors are those of `Client.deploy`, but for these:

        Args:
            model: an `nn.Module` is exported on another thread, one at a time; leave it as it is until then. That thread goes on if this is
                cancelled, as torch cannot be interrupted, but nothing comes of it; so does a child that exports a file.
            progress: called on the loop.
        """
        check_seconds("timeout_s", timeout_s)
        self._usable()
        order = DeployOrder(
            model=model,
            example_inputs=example_inputs,
            stages=stages,
            codec=codec,
            tolerance=tolerance,
            numerics=numerics,
            optimize=optimize,
            weights=weights,
            seed=seed,
            model_args=model_args,
            input_shape=input_shape,
            name=name,
            version=version,
            canaries=canaries,
            canary_tolerance=canary_tolerance,
        )
        told = calls.teller(_on_loop(progress) if callable(progress) else progress)
        call = await asyncio.to_thread(order.call, told) if order.is_exported_here else order.call(told)
        return AsyncModel(self, (await self._answer(call, timeout_s)).deployment)

    async def profile(
        self,
        model: str | os.PathLike[str] | Module,
        *,
        example_inputs: Sequence[Any] | None = None,
        weights: str | os.PathLike[str] | None = None,
        seed: int | None = None,
        model_args: Mapping[str, Any] | None = None,
        input_shape: Sequence[int] | None = None,
        device_class: str = "",
        repetitions: int = REPETITIONS,
        again: bool = False,
        timeout_s: float = PROFILE_TIMEOUT_S,
        progress: ToldShare | None = None,
    ) -> ModelProfile:
        """Measure a model on the cluster's own devices; arguments, answer and errors are those of `Client.profile`.

        Args:
            progress: called on the loop.
        """
        check_seconds("timeout_s", timeout_s)
        self._usable()
        order = ProfileOrder.of(
            model, example_inputs, weights, seed, model_args, input_shape, device_class=device_class, repetitions=repetitions, again=again
        )
        told = None if progress is None else _on_loop(progress)
        call = await asyncio.to_thread(order.call, told) if order.model.is_exported_here else order.call(told)
        return ModelProfile.from_json((await self._answer(call, timeout_s)).profile)

    async def model(self, name: str) -> AsyncModel:
        """A model that somebody has deployed under this name. Raises UnknownModelError, with the names there are."""
        return AsyncModel(self, calls.record_of(name, await self.status()))

    async def rollback(
        self, name: str, *, version: int | None = None, timeout_s: float = DEPLOY_TIMEOUT_S, progress: Told | bool = False
    ) -> AsyncModel:
        """Deploy an earlier version again, as the next one. Arguments and errors are those of `Client.rollback`."""
        check_seconds("timeout_s", timeout_s)
        told = calls.teller(_on_loop(progress) if callable(progress) else progress)
        call = Call(calls.rollback_to(name, await self.status(), version), progress=calls.without_share(told))
        return AsyncModel(self, (await self._answer(call, timeout_s)).deployment)

    async def undeploy(self, name: str) -> None:
        """Take no new requests for a deployment; it is unloaded when its last request has ended. Raises UnknownModelError."""
        await self._answer(Call(msg.Undeploy(call=0, name=name)), CALL_TIMEOUT_S)

    async def status(self) -> msg.StatusReport:
        """Workers, deployments and counters as the dispatcher sees them now."""
        report: msg.StatusReport = await self._answer(Call(msg.StatusQuery(call=0)), CALL_TIMEOUT_S)
        return report

    async def _answer(self, call: Call, timeout_s: float) -> Any:
        """What the dispatcher answers; waits through lost sessions and restarts."""
        conversation = self._usable()
        future = asyncio.wrap_future(conversation.call(call))
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError:
            raise calls.unanswered(self.address, call, timeout_s) from None
        finally:
            if future.cancelled():
                conversation.withdraw(call)

    def _usable(self) -> Conversation:
        if os.getpid() != self._process:
            raise calls.forked(self.address)
        if self._conversation is None or self._state != "connected":
            hint = "; enter `async with`, or await its connect()" if self._conversation is None else ""
            raise ConnectError(self.address, f"this client is {self._state}{hint}")
        if _running_loop() is not self._loop:
            raise ConnectError(self.address, "this client belongs to another event loop; make one for each")
        return self._conversation


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _on_loop(progress: Callable[..., None]) -> Callable[..., None]:
    """`progress`, to be called from any thread."""
    loop = asyncio.get_running_loop()

    def tell(*told: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(progress, *told)

    return tell


def _abandon(conversation: Conversation, loop: asyncio.AbstractEventLoop, process: int, address: str) -> None:
    """For a client that was forgotten; so it must not hold one. On any thread, at the latest when the interpreter ends."""
    if os.getpid() != process:
        return
    with contextlib.suppress(RuntimeError):  # the loop has ended at this moment
        if loop.is_running():  # in a moment: it may be collected in the midst of the conversation's own work
            loop.call_soon_threadsafe(conversation.abandon)
        else:
            conversation.abandon()
    warnings.warn(f"an adapt.AsyncClient of {address} was not closed", ResourceWarning, stacklevel=2)


class AsyncInferFuture(asyncio.Future[Any]):
    """The answer to one request, to come: a future of asyncio.

    `cancel()` reaches the cluster, and so does cancelling the task that awaits it.

    Attributes:
        request_id: what logs call the request.
        outcome: attempts and numeric classes; None until there is a result.
    """

    def __init__(self, asked: InferFuture) -> None:
        super().__init__()
        self.request_id: RequestId = asked.request_id
        self.outcome: Outcome | None = None
        self._asked: InferFuture | None = asked  # until it has ended: it knows of us, and would keep us and the answer
        self._thread_id = threading.get_ident()
        asked.on_done(self._answered)

    def cancel(self, msg: Any | None = None) -> bool:
        is_cancelled = super().cancel(msg)
        if self._asked is not None:
            self._asked.cancel()  # nothing happens if it has its answer
        return is_cancelled

    def _answered(self, asked: concurrent.futures.Future[Any]) -> None:
        loop = self.get_loop()
        if threading.get_ident() == self._thread_id and not loop.is_closed():
            self._take()
            return
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(self._take)

    def _take(self) -> None:
        asked, self._asked = self._asked, None
        if asked is None or self.done():
            return
        try:
            error = asked.exception(0)
        except concurrent.futures.CancelledError:
            super().cancel()
            return
        if error is not None:
            self.set_exception(error)
        else:
            self.outcome = asked.outcome
            self.set_result(asked.result(0))


class AsyncModel(Handle):
    """A deployed model, to be awaited. See `Model`."""

    def __init__(self, client: AsyncClient, record: msg.DeploymentRecord) -> None:
        super().__init__(record)
        self._client = client

    async def __call__(self, *args: Any, deadline_s: float = DEADLINE_S, **kwargs: Any) -> Any:
        """The model's output, nested as the module's own: torch tensors (on the CPU) if any input is one, else numpy arrays.

        Cancelling the task that awaits it, also by `asyncio.timeout`, cancels the request in the cluster.

        Args:
            args, kwargs: inputs as the module takes them; the batch is their first dimension.
            deadline_s: seconds after which `DeadlineExceededError` is raised.

        Raises:
            InputMismatchError: an input does not fit; nothing was sent.
            DeadlineExceededError, OverloadedError, ModelError, ...: see errors.py.
        """
        return await self.submit(*args, deadline_s=deadline_s, **kwargs)

    def submit(self, *args: Any, deadline_s: float = DEADLINE_S, **kwargs: Any) -> AsyncInferFuture:
        """As a call, but returns at once. Inputs may be written to as soon as it has returned.

        Returns:
            The answer to come, as a future of the running loop; its `cancel()` reaches the cluster, its `outcome` tells attempts and
            numeric classes.

        Raises:
            InputMismatchError: an input does not fit; nothing was sent.
            ConfigError: the deadline is no positive number, or longer than the dispatcher allows.
            ConnectError: the client is closed, or belongs to another loop.
        """
        return AsyncInferFuture(self._ask(args, kwargs, deadline_s))

    def _ask(self, args: Sequence[Any], kwargs: Mapping[str, Any], deadline_s: float) -> InferFuture:
        conversation = self._client._usable()
        return self._asking(args, kwargs, deadline_s, may_block=False).ask(conversation)

    def map(
        self, inputs: Iterable[Any] | AsyncIterable[Any], *, in_flight: int = 8, deadline_s: float = DEADLINE_S, progress: bool = False
    ) -> AsyncGenerator[Any, None]:
        """The outputs for many inputs, in their order, at most `in_flight` unanswered at a time.

        Args:
            inputs: as for `Model.map`, or an async iterable. They are taken by a task of their own, while you work with the outputs, and
                no more than four times `in_flight` ahead of you. A source that blocks should be an async one.
            in_flight, deadline_s, progress: as for `Model.map`.

        Yields:
            As a call returns. If the generator is closed early, what is under way is cancelled; `contextlib.aclosing` does that at once
            where a loop is left by `break`.

        Raises:
            As a call, at the place of the input concerned; so does what the inputs themselves raise. An overloaded dispatcher is asked
            again until the deadline.
        """
        check_in_flight(in_flight)
        check_seconds("deadline_s", deadline_s)
        outputs = self._map(inputs, in_flight, deadline_s)
        return _with_progress(outputs, inputs, self.name) if progress else outputs

    async def _map(self, inputs: Any, in_flight: int, deadline_s: float) -> AsyncGenerator[Any, None]:
        flow = _Flow(
            in_flight=in_flight,
            prepare=lambda value: self._asking(self._arguments(value), {}, deadline_s, may_block=False),
            ask=lambda asking: asking.ask(self._client._usable()),
        )
        # No TaskGroup: it would cancel whichever task runs this generator, and that may be anywhere when the inputs fail.
        feeding = asyncio.create_task(flow.feed(inputs), name=f"adapt map {self.name}")
        try:
            while not (feeding.done() and flow.is_empty):
                if flow.is_ready:
                    yield flow.take()
                else:
                    await flow.wait()
            feeding.result()  # the inputs may have failed
        finally:
            flow.cancel()
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)


class _Flow(Stream):
    """A `Stream` with three who wait for one another: the task that takes inputs, the cluster, and the user who takes outputs."""

    def __init__(self, *, in_flight: int, prepare: Callable[[Any], Asking], ask: Callable[[Asking], InferFuture]) -> None:
        super().__init__(in_flight=in_flight, prepare=prepare, ask=ask, tell=self._tell_loop)
        self._loop, self._thread_id = asyncio.get_running_loop(), threading.get_ident()
        self._news, self._room = asyncio.Event(), asyncio.Event()  # for the user, for the task
        self._again: asyncio.TimerHandle | None = None  # for what an overloaded dispatcher did not take

    def _tell_loop(self, number: int) -> None:
        """On any thread."""
        if threading.get_ident() == self._thread_id:
            self.settle(number)
            return
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self.settle, number)

    def settle(self, number: int) -> None:
        super().settle(number)
        self._room.set()
        self._news.set()
        self._set_timer()

    def cancel(self) -> None:
        super().cancel()
        if self._again is not None:
            self._again.cancel()

    def _set_timer(self) -> None:
        pause_s = self.pause_s()
        if pause_s is not None and self._again is None:
            self._again = self._loop.call_later(pause_s, self._ask_again)

    def _ask_again(self) -> None:
        self._again = None
        self.ask_again()
        self._set_timer()

    def take(self) -> Any:
        self._room.set()
        try:
            return super().take()
        except concurrent.futures.CancelledError:  # the client was closed
            raise asyncio.CancelledError from None

    async def wait(self) -> None:
        """Until something has come."""
        self._news.clear()
        await self._news.wait()

    async def feed(self, inputs: Iterable[Any] | AsyncIterable[Any]) -> None:
        """Ask all inputs, as there is room."""
        try:
            async with contextlib.aclosing(_each(inputs)) as values:
                async for value in values:
                    self.add(value)
                    self._news.set()
                    while not self.has_room:
                        self._room.clear()
                        await self._room.wait()
        finally:
            self._news.set()


async def _each(inputs: Iterable[Any] | AsyncIterable[Any]) -> AsyncGenerator[Any, None]:
    if isinstance(inputs, AsyncIterable):
        async for value in inputs:
            yield value
        return
    for value in inputs:
        yield value
        await asyncio.sleep(0)  # others want the loop as well


async def _with_progress(outputs: AsyncGenerator[Any, None], inputs: object, name: str) -> AsyncGenerator[Any, None]:
    total = len(inputs) if isinstance(inputs, Sized) else None
    async with contextlib.aclosing(outputs):
        with progress_bar(name, total) as advance:
            async for output in outputs:
                yield output
                advance()
