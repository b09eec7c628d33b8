"""The library object in a user's program: deploy models, run them, ask how things are. Works without torch.

What is asked is put together in calls.py and handle.py, which async_client.py shares; this door waits for it on the user's threads.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from adapt.models.canaries import TOLERANCE as CANARY_TOLERANCE
from adapt.planning.model import ModelProfile
from adapt.protocol import messages as msg
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
from adapt.runtime.conversation import Call, Conversation, InferFuture
from adapt.runtime.handle import DEADLINE_S, Handle, Stream, check_in_flight, progress_bar
from adapt.runtime.threads import LoopThread

if TYPE_CHECKING:
    from torch.nn import Module


class Client:
    """A connection to a dispatcher. Every thread may use it; a process forked from this one has to make its own.

    Its sockets live on a thread of their own, which user code cannot block. Use it as a context manager, or `close` it. One that is
    forgotten closes itself, at the latest when the interpreter ends.

    Args:
        address: of the dispatcher, "tcp://HOST:PORT"; by default `ADAPT_DISPATCHER` or tcp://127.0.0.1:5570.
        connect_timeout_s: how long to wait for it to answer.

    Raises:
        ConnectError: nobody answers there, or the dispatcher refuses.
        VersionError: the dispatcher speaks another version of the protocol.
        ConfigError: the address is none.
    """

    def __init__(self, address: str | None = None, *, connect_timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        self.address = calls.address_of(address)
        check_seconds("connect_timeout_s", connect_timeout_s)
        self._process = os.getpid()
        io = LoopThread("adapt-client")
        try:
            self._conversation = io.run(Conversation.opened(self.address, connect_timeout_s))
        except BaseException:
            io.close(_nothing())
            raise
        self._finalizer = weakref.finalize(self, _close, io, self._conversation, self._process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<adapt client of {self.address}{'' if self._finalizer.alive else ', closed'}>"

    def close(self) -> None:
        """Cancel what is open and disconnect. Closing twice is nothing."""
        self._finalizer()

    # ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def deploy(
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
    ) -> Model:
        """Cut a model into stages, load them on the workers, and make it available to every client.

        Args:
            model: a torchvision model by name ("torchvision/resnet50"); an `nn.Module`, which is exported in this process; or the path of a
                `.pt2` file, which torch.export.save wrote. To read such a file is to run what is in it, so it has to be one that you trust, on this
                machine; it is exported in a child process here. It brings its weights and example inputs.
            example_inputs: for an `nn.Module`: the positional arguments of a call, as a tuple. A single tensor input may be given as its
                shape, `input_shape`, instead.
            stages: how many, of about equal cost; "auto": as many, with as many copies of each, as should be fastest on the workers
                there are. A model that each of them can hold is not cut: all of them run the whole.
            codec: of what travels between stages: "raw", "lz4", "zfp", "zfp+lz4", or "auto": lossless while no tolerance is given.
            tolerance: largest error on each link, as a share of the tensor's standard deviation; for zfp.
            numerics: "exact" keeps each request within one numeric class; "close" allows mixtures; None: "close".
            optimize: "none": the module's own bits; "fold": batch norms are folded into convolutions, and convolutional models are laid out
                channels last. Faster; results differ by about 1e-6 of the largest number in them, and name a numeric class of their own.
            weights: None for random ones, "DEFAULT" or a name for torchvision's own, or a file: safetensors or a state dict. A path that
                exists here is read here, and the model exported here; any other is looked for under the dispatcher's --models-dir.
            seed: of random weights, as `torch.manual_seed(seed)` before the constructor.
            model_args: further arguments of the model's constructor, such as num_classes.
            input_shape: of one input, with its batch or, for images, without; where it differs from the usual (1, 3, 224, 224).
            name: of the deployment; by default the model's. Deploying under a name again replaces it: the new version is loaded beside
                the old one, takes the requests that come from when it is ready, and the old one is unloaded when its last has ended.
            version: its number, above all that there were; by default the next.
            canaries: inputs (tuples of them for a model with several), at most 16. The model is then exported on this machine, which also
                computes what comes out and what goes from stage to stage. Every worker has to come to the same before the version takes
                a request: bit for bit behind lossless codecs in the numeric class of this machine's processor with one thread, elsewhere
                within `canary_tolerance`. If it does not, this raises CanaryError, and the version before goes on as if nothing were.
            canary_tolerance: the largest deviation of an output, as a share of its largest magnitude.
            timeout_s: the longest wait.
            progress: called with a few words at each step, on a thread of the client's own; True: they are printed on standard error.

        Raises:
            UnknownModelError: no model has this name.
            ExportError: the model cannot be exported; the message says why and what to do.
            ExportUnavailableError: it would have to be exported where torch is missing.
            PlanError: more stages than the model allows, no workers, or none with memory for a stage.
            CanaryError: workers came to something else than this process; says which canary, at which stage, on whom.
            ConfigError: an option is impossible.
            ConnectError: no answer within `timeout_s`.
        """
        check_seconds("timeout_s", timeout_s)
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
        call = order.call(calls.teller(progress))
        return Model(self, self._answer(call, timeout_s).deployment)

    def profile(
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
        """Measure a model on the cluster's own devices, on one worker of each kind, while these have nothing else to do.

        The dispatcher keeps what was measured, and plans deployments with `stages="auto"` by it. A kind is measured once; weights may change.

        Args:
            model, example_inputs, weights, seed, model_args, input_shape: as for `deploy`.
            device_class: part of the names of the kinds to measure; "": all. See `MeasuredCosts.device_class` in the answer.
            repetitions: runs of which the median counts, after one to warm up.
            again: measure also where there is a profile already.
            timeout_s: the longest wait.
            progress: called with a few words and the share that is done, or None where it is not known,
                on a thread of the client's own.

        Returns:
            Layers between all legal cuts, with their seconds on each kind, bytes of weights and activations, and what crosses each cut; for
            `adapt plan` as JSON: `to_json()`.

        Raises:
            PlanError: no worker is there, or none of them could measure it.
            ConfigError, ConnectError, UnknownModelError, ExportError, ExportUnavailableError: as for `deploy`.
        """
        check_seconds("timeout_s", timeout_s)
        order = ProfileOrder.of(
            model, example_inputs, weights, seed, model_args, input_shape, device_class=device_class, repetitions=repetitions, again=again
        )
        return ModelProfile.from_json(self._answer(order.call(progress), timeout_s).profile)

    def model(self, name: str) -> Model:
        """A model that somebody has deployed under this name. Raises UnknownModelError, with the names there are."""
        return Model(self, calls.record_of(name, self.status()))

    def rollback(
        self, name: str, *, version: int | None = None, timeout_s: float = DEPLOY_TIMEOUT_S, progress: Told | bool = False
    ) -> Model:
        """Deploy an earlier version again, as the next one: loaded beside the present one, tried on its canaries, and then switched to.

        Args:
            version: one of `model.record.earlier`; by default the one before the present one. A second roll-back returns from the first.
            timeout_s, progress: as for `deploy`.

        Raises:
            UnknownModelError: no deployment has this name.
            ConfigError: no such version is kept.
            PlanError, CanaryError, ConnectError: as for `deploy`.
        """
        check_seconds("timeout_s", timeout_s)
        call = Call(calls.rollback_to(name, self.status(), version), progress=calls.without_share(calls.teller(progress)))
        return Model(self, self._answer(call, timeout_s).deployment)

    def undeploy(self, name: str) -> None:
        """Take no new requests for a deployment; it is unloaded when its last request has ended. Raises UnknownModelError."""
        self._answer(Call(msg.Undeploy(call=0, name=name)), CALL_TIMEOUT_S)

    def status(self) -> msg.StatusReport:
        """Workers, deployments and counters as the dispatcher sees them now."""
        report: msg.StatusReport = self._answer(Call(msg.StatusQuery(call=0)), CALL_TIMEOUT_S)
        return report

    def _answer(self, call: Call, timeout_s: float) -> Any:
        """What the dispatcher answers; waits through lost sessions and restarts."""
        conversation = self._usable()
        future = conversation.call(call)
        try:
            return future.result(timeout_s)
        except TimeoutError:
            raise calls.unanswered(self.address, call, timeout_s) from None
        finally:
            if not future.done():
                conversation.withdraw(call)

    def _usable(self) -> Conversation:
        if os.getpid() != self._process:
            raise calls.forked(self.address)
        return self._conversation  # a closed one answers with an error itself


def _close(io: LoopThread, conversation: Conversation, process: int) -> None:
    """Also called for a client that was forgotten; so it must not hold one."""
    if os.getpid() == process:  # a fork has no such thread, and the sockets are its parent's
        io.close(conversation.close())


async def _nothing() -> None:
    pass


class Model(Handle):
    """A deployed model. Call it as the module it was made of.

    It asks whatever version is the present one, as long as that has the inputs and outputs that it was made for; with one that has others,
    requests end in InputMismatchError, and `client.model(name)` gives a new handle.

    Attributes:
        record: name, version, stages with their workers, as they were when this handle was made.
    """

    def __init__(self, client: Client, record: msg.DeploymentRecord) -> None:
        super().__init__(record)
        self._client = client

    def __call__(self, *args: Any, deadline_s: float = DEADLINE_S, **kwargs: Any) -> Any:
        """The model's output, nested as the module's own: torch tensors (on the CPU) if any input is one, else numpy arrays.

        Args:
            args, kwargs: inputs as the module takes them; the batch is their first dimension.
            deadline_s: seconds after which `DeadlineExceededError` is raised.

        Raises:
            InputMismatchError: an input does not fit; nothing was sent.
            DeadlineExceededError, OverloadedError, ModelError, ...: see errors.py.
        """
        future = self.submit(*args, deadline_s=deadline_s, **kwargs)
        try:
            return future.result()
        except BaseException:  # Ctrl-C: nobody waits for it any more
            future.cancel()
            raise

    def submit(self, *args: Any, deadline_s: float = DEADLINE_S, **kwargs: Any) -> InferFuture:
        """As a call, but returns at once. Inputs may be written to as soon as it has returned.

        Returns:
            The answer to come; its `cancel()` reaches the cluster, its `outcome` tells attempts and numeric classes.

        Raises:
            InputMismatchError: an input does not fit; nothing was sent.
            ConfigError: the deadline is no positive number, or longer than the dispatcher allows.
        """
        conversation = self._client._usable()
        return self._asking(args, kwargs, deadline_s).ask(conversation)

    def map(self, inputs: Iterable[Any], *, in_flight: int = 8, deadline_s: float = DEADLINE_S, progress: bool = False) -> Iterator[Any]:
        """The outputs for many inputs, in their order, at most `in_flight` unanswered at a time.

        Args:
            inputs: one input each, or a tuple of inputs for a model with several. Taken as they are needed.
            in_flight: keep at least twice as many as there are stages, or workers will idle. Behind a slow answer up to four times as
                many are held, most of them answered, so that it keeps nobody waiting but you.
            deadline_s: for each input, from the moment it is taken.
            progress: show a progress bar on standard error.

        Yields:
            As a call returns. If the generator is closed early, what is under way is cancelled.

        Raises:
            As a call, at the place of the input concerned. An overloaded dispatcher is asked again until the deadline.
        """
        check_in_flight(in_flight)
        check_seconds("deadline_s", deadline_s)
        outputs = self._map(inputs, in_flight, deadline_s)
        return _with_progress(outputs, inputs, self.name) if progress else outputs

    def _map(self, inputs: Iterable[Any], in_flight: int, deadline_s: float) -> Iterator[Any]:
        answers: SimpleQueue[int] = SimpleQueue()
        stream = Stream(
            in_flight=in_flight,
            prepare=lambda value: self._asking(self._arguments(value), {}, deadline_s),
            ask=lambda asking: asking.ask(self._client._usable()),
            tell=answers.put,
        )
        try:
            for value in inputs:
                stream.add(value)
                _settle(stream, answers)
                if stream.is_filled and stream.is_ready:  # one out for one in; only the slow ones let the window grow
                    yield stream.take()
                while not stream.has_room:
                    yield from _next_output(stream, answers)
            while not stream.is_empty:
                yield from _next_output(stream, answers)
        finally:
            stream.cancel()


def _next_output(stream: Stream, answers: SimpleQueue[int]) -> Iterator[Any]:
    """One, or none after a wait that has changed something."""
    if stream.is_ready:
        yield stream.take()
        _settle(stream, answers)
        return
    with contextlib.suppress(Empty):  # then something is due to be asked again
        stream.settle(answers.get(timeout=stream.pause_s()))
    _settle(stream, answers)


def _settle(stream: Stream, answers: SimpleQueue[int]) -> None:
    """Do what can be done without waiting."""
    while not answers.empty():
        stream.settle(answers.get())
    stream.ask_again()


def _with_progress(outputs: Iterator[Any], inputs: Iterable[Any], name: str) -> Iterator[Any]:
    total = len(inputs) if isinstance(inputs, Sized) else None
    with contextlib.closing(outputs), progress_bar(name, total) as advance:  # type: ignore[type-var]  # it is a generator
        for output in outputs:
            yield output
            advance()
