"""The library object in a user's program: deploy models, run them, ask how things are. Works without torch."""

from __future__ import annotations

import contextlib
import difflib
import math
import os
import tempfile
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeAlias

from adapt.clock import monotonic
from adapt.config import check_address, dispatcher_address
from adapt.errors import (
    ConfigError,
    ConnectError,
    ExportError,
    ExportUnavailableError,
    OverloadedError,
    UnknownModelError,
)
from adapt.models.interface import Interface
from adapt.models.structure import Node
from adapt.protocol import messages as msg
from adapt.protocol.codecs import resolve_codec
from adapt.protocol.ids import Digest, is_name
from adapt.protocol.wire import Blob
from adapt.runtime.conversation import LIMIT_BYTES, Call, Conversation, InferFuture
from adapt.runtime.tensors import from_wire, is_torch, to_wire
from adapt.runtime.threads import LoopThread
from adapt.scheduling.outcome import Question

if TYPE_CHECKING:
    from torch.nn import Module

CONNECT_TIMEOUT_S = 5.0
DEADLINE_S = 60.0
DEPLOY_TIMEOUT_S = 600.0
CALL_TIMEOUT_S = 10.0
LEAST_PAUSE_S = 0.01  # before an overloaded dispatcher is asked again
NUMERICS = ("close", "exact")

Told: TypeAlias = Callable[[str], None]


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
        self.address = dispatcher_address(os.environ) if address is None else check_address(address, key="address", is_listening=False)
        _check_seconds("connect_timeout_s", connect_timeout_s)
        self._process = os.getpid()
        io = LoopThread("adapt-client")
        try:
            self._conversation = io.run(_opened(self.address, connect_timeout_s))
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
        model: str | Module,
        *,
        example_inputs: Sequence[Any] | None = None,
        stages: int | str = "auto",
        codec: str = "auto",
        tolerance: float | None = None,
        numerics: str | None = None,
        weights: str | os.PathLike[str] | None = None,
        seed: int | None = None,
        model_args: Mapping[str, Any] | None = None,
        input_shape: Sequence[int] | None = None,
        name: str | None = None,
        timeout_s: float = DEPLOY_TIMEOUT_S,
        progress: Told | bool = False,
    ) -> Model:
        """Cut a model into stages, load them on the workers, and make it available to every client.

        Args:
            model: a torchvision model by name ("torchvision/resnet50"), or an `nn.Module`, which is exported in this process.
            example_inputs: for an `nn.Module`: the positional arguments of a call, as a tuple. A single tensor input may be given as its
                shape, `input_shape`, instead.
            stages: how many; "auto": one per worker.
            codec: of what travels between stages: "raw", "lz4", "zfp", "zfp+lz4", or "auto": lossless while no tolerance is given.
            tolerance: largest error on each link, as a share of the tensor's standard deviation; for zfp.
            numerics: "exact" keeps each request within one numeric class; "close" allows mixtures; None: "close".
            weights: None for random ones, "DEFAULT" or a name for torchvision's own, or a file: safetensors or a state dict. A path that
                exists here is read here, and the model exported here; any other is looked for under the dispatcher's --models-dir.
            seed: of random weights, as `torch.manual_seed(seed)` before the constructor.
            model_args: further arguments of the model's constructor, such as num_classes.
            input_shape: of one input, with its batch or, for images, without; where it differs from the usual (1, 3, 224, 224).
            name: of the deployment; by default the model's. Deploying under a name again replaces it once the new one is ready.
            timeout_s: the longest wait.
            progress: called with a few words at each step, on a thread of the client's own; True: they are printed on standard error.

        Raises:
            UnknownModelError: no model has this name.
            ExportError: the model cannot be exported; the message says why and what to do.
            ExportUnavailableError: it would have to be exported where torch is missing.
            PlanError: more stages than the model allows, no workers, or none with memory for a stage.
            ConfigError: an option is impossible.
            ConnectError: no answer within `timeout_s`.
        """
        resolve_codec(codec, tolerance)
        if numerics not in (None, *NUMERICS):
            raise ConfigError(f"numerics={numerics!r}: expected one of {', '.join(NUMERICS)}, or None")
        told = _teller(progress)
        source = msg.NamedSource(
            model=model if isinstance(model, str) else "",
            weights=None if weights is None else os.fspath(weights),
            seed=seed,
            model_args=dict(model_args or {}),
            input_shape=None if input_shape is None else [int(size) for size in input_shape],
        )
        order = msg.Deploy(
            call=0,
            name=_deployment_name(model, name),
            stages=_stage_count(stages),
            codec=codec,
            tolerance=tolerance,
            numerics=numerics or "auto",
            named=source,
        )
        if isinstance(model, str) and not _is_local_file(weights):
            if example_inputs is not None:
                raise ConfigError("example_inputs are for modules; give a named model its input_shape")
            return Model(self, self._answer(Call(order, progress=told), timeout_s).deployment)
        with tempfile.TemporaryDirectory(prefix="adapt-export-") as directory:  # until the dispatcher has fetched it
            if told is not None:
                told("exporting the model in this process")
            uploaded, path = _export(model, example_inputs, source, Path(directory))
            call = Call(replace(order, named=None, uploaded=uploaded), progress=told, offered=(Digest(uploaded.program), path))
            return Model(self, self._answer(call, timeout_s).deployment)

    def model(self, name: str) -> Model:
        """A model that somebody has deployed under this name. Raises UnknownModelError, with the names there are."""
        deployments = {record.name: record for record in self.status().deployments}
        if name not in deployments:
            raise UnknownModelError(name, suggestions=_closest(name, deployments))
        return Model(self, deployments[name])

    def undeploy(self, name: str) -> None:
        """Take no new requests for a deployment; it is unloaded when its last request has ended. Raises UnknownModelError."""
        self._answer(Call(msg.Undeploy(call=0, name=name)), CALL_TIMEOUT_S)

    def status(self) -> msg.StatusReport:
        """Workers, deployments and counters as the dispatcher sees them now."""
        report: msg.StatusReport = self._answer(Call(msg.StatusQuery(call=0)), CALL_TIMEOUT_S)
        return report

    def _answer(self, call: Call, timeout_s: float) -> Any:
        """What the dispatcher answers; waits through lost sessions and restarts."""
        _check_seconds("timeout_s", timeout_s)
        conversation = self._usable()
        future = conversation.call(call)
        try:
            return future.result(timeout_s)
        except TimeoutError:
            raise ConnectError(self.address, f"no answer to {type(call.message).__name__} within {timeout_s:g} s") from None
        finally:
            if not future.done():
                conversation.withdraw(call)

    def _usable(self) -> Conversation:
        if os.getpid() != self._process:
            raise ConnectError(self.address, "this client belongs to the process that this one was forked from; make another")
        return self._conversation  # a closed one answers with an error itself


async def _opened(address: str, timeout_s: float) -> Conversation:
    conversation = Conversation(address)
    try:
        await conversation.open(timeout_s)
    except BaseException:
        await conversation.close()
        raise
    return conversation


def _close(io: LoopThread, conversation: Conversation, process: int) -> None:
    """Also called for a client that was forgotten; so it must not hold one."""
    if os.getpid() == process:  # a fork has no such thread, and the sockets are its parent's
        io.close(conversation.close())


async def _nothing() -> None:
    pass


class Model:
    """A deployed model. Call it as the module it was made of.

    It answers for the program that it was made for: when another one is deployed under its name, requests end in UnknownModelError.

    Attributes:
        record: name, version, stages with their workers, as they were when this handle was made.
    """

    def __init__(self, client: Client, record: msg.DeploymentRecord) -> None:
        self._client = client
        self.record = record
        self._interface = Interface.from_json(record.interface)
        # What is between stages may be rounded by choice; what the user gives goes in as it is.
        self._codec = "raw" if record.codec == "raw" else "lz4"

    @property
    def name(self) -> str:
        return self.record.name

    def __repr__(self) -> str:
        inputs = ", ".join(map(str, self._interface.inputs))
        return f"<adapt model {self.name!r} version {self.record.version}: {inputs}; {len(self.record.stages)} stages>"

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
        _check_seconds("deadline_s", deadline_s)
        deadline = monotonic() + deadline_s
        values = self._interface.match(args, kwargs)
        leaves, blobs = to_wire(values, codec=self._codec)
        question = Question(
            deployment=self.name,
            program=Digest(self.record.program),
            numerics="exact" if self.record.numerics == "exact" else "close",
            leaves=leaves,
            blobs=blobs,
            budget_s=deadline_s,
            deadline=deadline,
        )
        interface, as_torch = self._interface, any(map(is_torch, values))

        def decode(leaves: list[msg.Leaf], blobs: tuple[Blob, ...]) -> Any:
            return interface.assemble(from_wire(leaves, blobs, as_torch=as_torch, limit_bytes=LIMIT_BYTES))

        return self._client._usable().submit(question, decode)

    def map(self, inputs: Iterable[Any], *, in_flight: int = 8, deadline_s: float = DEADLINE_S, progress: bool = False) -> Iterator[Any]:
        """The outputs for many inputs, in their order, at most `in_flight` under way at a time.

        Args:
            inputs: one input each, or a tuple of inputs for a model with several. Taken as they are needed.
            in_flight: keep at least twice as many as there are stages, or workers will idle.
            deadline_s: for each input, from the moment it is submitted.
            progress: show a progress bar on standard error.

        Yields:
            As a call returns. If the generator is closed early, what is under way is cancelled.

        Raises:
            As a call, at the place of the input concerned. An overloaded dispatcher is asked again until the deadline.
        """
        if isinstance(in_flight, bool) or not isinstance(in_flight, int) or in_flight < 1:
            raise ConfigError(f"in_flight={in_flight!r}: expected a number of at least 1")
        _check_seconds("deadline_s", deadline_s)
        outputs = self._map(inputs, in_flight, deadline_s)
        return _with_progress(outputs, inputs, self.name) if progress else outputs

    def _map(self, inputs: Iterable[Any], in_flight: int, deadline_s: float) -> Iterator[Any]:
        under_way: deque[_Item] = deque()
        try:
            for value in inputs:
                if len(under_way) >= in_flight:
                    yield self._result(under_way)
                under_way.append(_Item(self, value, deadline_s))
            while under_way:
                yield self._result(under_way)
        finally:
            for item in under_way:
                item.future.cancel()

    def _result(self, under_way: deque[_Item]) -> Any:
        """Of the first; it counts as under way until it has come."""
        result = under_way[0].result()
        under_way.popleft()
        return result

    def _submit_item(self, value: Any, deadline_s: float) -> InferFuture:
        is_many = isinstance(value, tuple) and _count_arguments(self._interface) > 1
        return self.submit(*value, deadline_s=deadline_s) if is_many else self.submit(value, deadline_s=deadline_s)


class _Item:
    """One input of a `map` on its way."""

    def __init__(self, model: Model, value: Any, deadline_s: float) -> None:
        self._model, self._value, self._deadline = model, value, monotonic() + deadline_s
        self.future = model._submit_item(value, deadline_s)

    def result(self) -> Any:
        while True:
            try:
                return self.future.result()
            except OverloadedError as error:
                pause_s = max(error.retry_after_s, LEAST_PAUSE_S)
                if monotonic() + pause_s >= self._deadline:
                    raise
                time.sleep(pause_s)  # on the user's own thread, who asked to wait for outputs
                self.future = self._model._submit_item(self._value, max(self._deadline - monotonic(), 1e-3))


def _export(model: Any, example_inputs: Sequence[Any] | None, source: msg.NamedSource, directory: Path) -> tuple[msg.ProgramSource, Path]:
    """Build if need be, and export into `directory`. The only place of this file that needs torch."""
    try:
        import torch

        from adapt.models.export import export_module
        from adapt.models.sources import build_named_model
    except ImportError as error:
        raise ExportUnavailableError(f"this process has no torch to export the model with: {error}") from None
    if isinstance(model, str):
        weights = None if source.weights is None else Path(source.weights)
        named = build_named_model(model, weights=weights, seed=source.seed, model_args=source.model_args, input_shape=source.input_shape)
        model, example_inputs = named.module, (named.example_input,)
    elif not isinstance(model, torch.nn.Module):
        raise ExportError(f"model: expected the name of a model or an nn.Module, got {type(model).__name__}")
    elif source.weights is not None or source.seed is not None or source.model_args:
        raise ConfigError("weights, seed and model_args are for named models; a module brings its own weights")
    if example_inputs is None:
        if source.input_shape is None:
            raise ExportError("example_inputs are needed to export a module: give a tuple of tensors as a call would have them")
        example_inputs = (torch.rand(source.input_shape, generator=torch.Generator().manual_seed(0)),)
    elif isinstance(example_inputs, torch.Tensor) or hasattr(example_inputs, "__array_interface__"):
        example_inputs = (example_inputs,)  # else its batch would be taken for the arguments
    exported = export_module(model, tuple(example_inputs), directory=directory)
    uploaded = msg.ProgramSource(program=exported.digest, file_bytes=exported.file_bytes, operator_costs_s=list(exported.operator_costs_s))
    return uploaded, Path(exported.path)


def _is_local_file(weights: str | os.PathLike[str] | None) -> bool:
    return weights is not None and os.path.isfile(weights)  # False also for what is no path


def _stage_count(stages: int | str) -> int:
    if stages == "auto":
        return 0
    if isinstance(stages, int) and not isinstance(stages, bool) and stages >= 1:
        return stages
    raise ConfigError(f"stages={stages!r}: expected a number of at least 1, or 'auto'")


def _deployment_name(model: Any, name: str | None) -> str:
    if name is None and isinstance(model, str):
        chosen = model.rpartition("/")[2]
        if not is_name(chosen):
            raise UnknownModelError(model)
        return chosen
    chosen = type(model).__name__ if name is None else name
    if name is None and not is_name(chosen):
        return "model"
    if not isinstance(chosen, str) or not is_name(chosen):
        raise ConfigError(f"name={str(chosen)[:80]!r}: expected 1 to 64 letters, digits, dots, dashes or underscores")
    return chosen


def _closest(name: str, names: Iterable[str]) -> list[str]:
    """The names that this one may have meant; without a likeness the first of all."""
    known = sorted(names)
    return difflib.get_close_matches(str(name), known, n=3, cutoff=0.5) or known[:5]


def _check_seconds(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise ConfigError(f"{key}={value!r}: expected a positive number of seconds")


def _count_arguments(interface: Interface) -> int:
    match interface.input_structure:
        case Node(items=(Node(items=positional), Node(items=named))):
            return len(positional) + len(named)
    return 1


def _teller(progress: Told | bool) -> Told | None:
    if not progress:
        return None
    if callable(progress):
        return progress
    from rich.console import Console

    console = Console(stderr=True)
    return lambda words: console.print(f"{words} ...", style="dim", highlight=False, markup=False)


def _with_progress(outputs: Iterator[Any], inputs: Iterable[Any], name: str) -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import track

    total = len(inputs) if isinstance(inputs, Sized) else None
    with contextlib.closing(outputs):  # type: ignore[type-var]  # it is a generator
        yield from track(outputs, description=name, total=total, console=Console(stderr=True))
