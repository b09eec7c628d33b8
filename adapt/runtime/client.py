"""The library object in a user's program: deploy models, run them, ask how things are. Works without torch."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Self

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
from adapt.protocol import messages as msg
from adapt.protocol.codecs import resolve_codec
from adapt.protocol.ids import Digest, is_name
from adapt.runtime.conversation import LIMIT_BYTES, Call, Conversation, InferFuture, Submission
from adapt.runtime.tensors import from_wire, is_torch, to_wire

DEADLINE_S = 60.0
DEPLOY_TIMEOUT_S = 600.0
CALL_TIMEOUT_S = 10.0
NUMERICS = ("close", "exact")


class Client:
    """A connection to a dispatcher. Safe to use from several threads; not across a fork.

    Its sockets live on a thread of their own, which user code cannot block. Use it as a context manager, or `close` it.

    Args:
        address: of the dispatcher, "tcp://HOST:PORT"; by default `ADAPT_DISPATCHER` or tcp://127.0.0.1:5570.
        connect_timeout_s: how long to wait for it to answer.

    Raises:
        ConnectError: nobody answers there.
        VersionError: the dispatcher speaks another version of the protocol.
        ConfigError: the address is none.
    """

    def __init__(self, address: str | None = None, *, connect_timeout_s: float = 5.0) -> None:
        self.address = dispatcher_address(os.environ) if address is None else check_address(address, key="address", is_listening=False)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="adapt-client", daemon=True)
        self._thread.start()
        self._is_closed = False
        try:
            self._conversation = self._do(self._open(connect_timeout_s))
        except BaseException:
            self._stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is open and disconnect. Closing twice is nothing."""
        if not self._is_closed:
            self._is_closed = True
            with contextlib.suppress(RuntimeError):
                self._do(self._conversation.close())
            self._stop()

    # ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def deploy(
        self,
        model: Any,
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
        progress: Callable[[str], None] | None = None,
    ) -> Model:
        """Cut a model into stages, load them on the workers, and make it available to every client.

        Args:
            model: a torchvision model by name ("torchvision/resnet50"), or an `nn.Module`, which is exported in this process.
            example_inputs: the positional arguments of a call, as a tuple; needed for an `nn.Module`.
            stages: how many; "auto": one per worker.
            codec: "raw", "lz4", "zfp", "zfp+lz4", or "auto": lossless while no tolerance is given.
            tolerance: largest error on each link, as a share of the tensor's standard deviation; for zfp.
            numerics: "exact" keeps each request within one numeric class; "close" allows mixtures; None: "close".
            weights: None for random ones, "DEFAULT" or a name for torchvision's own, or a file: safetensors or a state dict. A path
                that exists here is read here, any other is looked for under the dispatcher's --models-dir.
            seed: of random weights, as `torch.manual_seed(seed)` before the constructor.
            model_args: further arguments of the model's constructor, such as num_classes.
            input_shape: of one input with its batch dimension, where it differs from the usual (1, 3, 224, 224).
            name: of the deployment; by default the model's. Deploying under a name again replaces it once the new one is ready.
            timeout_s: the longest wait.
            progress: called with a few words at each step.

        Raises:
            UnknownModelError: no model has this name.
            ExportError: the model cannot be exported; the message says why and what to do.
            ExportUnavailableError: it would have to be exported where torch is missing.
            PlanError: more stages than the model allows, no workers, or none with memory for a stage.
            ConfigError: an option is impossible.
        """
        call = self._deploy_call(
            model, example_inputs, _stage_count(stages), codec, tolerance, numerics, weights, seed, model_args, input_shape, name, progress
        )
        call.progress = progress
        deployed = self._answer(call, timeout_s)
        return Model(self, deployed.deployment)

    def model(self, name: str) -> Model:
        """A model that somebody has deployed under this name. Raises UnknownModelError."""
        deployments = {record.name: record for record in self.status().deployments}
        if name not in deployments:
            raise UnknownModelError(name, suggestions=sorted(deployments)[:5])
        return Model(self, deployments[name])

    def undeploy(self, name: str) -> None:
        """Take no new requests for a deployment; it is unloaded when its last request has ended. Raises UnknownModelError."""
        self._answer(Call(msg.Undeploy(call=0, name=name), Future()), CALL_TIMEOUT_S)

    def status(self) -> msg.StatusReport:
        """Workers, deployments and counters as the dispatcher sees them now."""
        report: msg.StatusReport = self._answer(Call(msg.StatusQuery(call=0), Future()), CALL_TIMEOUT_S)
        return report

    def _deploy_call(
        self,
        model: Any,
        example_inputs: Sequence[Any] | None,
        stages: int,
        codec: str,
        tolerance: float | None,
        numerics: str | None,
        weights: str | os.PathLike[str] | None,
        seed: int | None,
        model_args: Mapping[str, Any] | None,
        input_shape: Sequence[int] | None,
        name: str | None,
        progress: Callable[[str], None] | None,
    ) -> Call:
        resolve_codec(codec, tolerance)
        if numerics not in (None, *NUMERICS):
            raise ConfigError(f"numerics={numerics!r}: expected one of {', '.join(NUMERICS)}, or None")
        name = _deployment_name(model, name)
        source = msg.NamedSource(
            model=model if isinstance(model, str) else "",
            weights=None if weights is None else os.fspath(weights),
            seed=seed,
            model_args=dict(model_args or {}),
            input_shape=None if input_shape is None else [int(size) for size in input_shape],
        )
        deploy = msg.Deploy(
            call=0, name=name, stages=stages, codec=codec, tolerance=tolerance, numerics=numerics or "auto", named=source
        )
        if isinstance(model, str) and not (weights is not None and Path(weights).is_file()):
            return Call(deploy, Future())
        if progress is not None:
            progress("exporting the model in this process")
        return self._export(model, example_inputs, deploy, source)

    def _export(self, model: Any, example_inputs: Sequence[Any] | None, deploy: msg.Deploy, source: msg.NamedSource) -> Call:
        """Export here, and offer the program to the dispatcher. The only place of this file that needs torch."""
        try:
            from adapt.models.export import export_module
            from adapt.models.sources import build_named_model
        except ImportError as error:
            raise ExportUnavailableError(f"this process has no torch to export the model with: {error}") from None
        if isinstance(model, str):
            named = build_named_model(
                model, weights=source.weights, seed=source.seed, model_args=source.model_args, input_shape=source.input_shape
            )
            model, example_inputs = named.module, (named.example_input,)
        if example_inputs is None:
            raise ExportError("example_inputs are needed to export a module: give a tuple of tensors as a call would have them")
        self._exports = getattr(self, "_exports", None) or tempfile.TemporaryDirectory(prefix="adapt-export-")
        exported = export_module(model, tuple(example_inputs), directory=Path(self._exports.name))
        uploaded = msg.ProgramSource(
            program=exported.digest, file_bytes=exported.file_bytes, operator_costs_s=list(exported.operator_costs_s)
        )
        message = msg.Deploy(
            call=0,
            name=deploy.name,
            stages=deploy.stages,
            codec=deploy.codec,
            tolerance=deploy.tolerance,
            numerics=deploy.numerics,
            uploaded=uploaded,
        )
        return Call(message, Future(), offered=(Digest(exported.digest), Path(exported.path)))

    # ── the I/O thread ───────────────────────────────────────────────────────────────────────────────────────────────

    def submit(self, submission: Submission) -> InferFuture:
        """For `Model`: hand a request to the I/O thread."""
        if self._is_closed:
            raise ConnectError(self.address, "this client was closed")
        return self._conversation.submit(submission)

    def _answer(self, call: Call, timeout_s: float) -> Any:
        if self._is_closed:
            raise ConnectError(self.address, "this client was closed")
        try:
            return self._conversation.call(call).result(timeout_s)
        except TimeoutError:
            raise ConnectError(self.address, f"no answer to {type(call.message).__name__} within {timeout_s:g} s") from None

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.close()

    async def _open(self, timeout_s: float) -> Conversation:
        conversation = Conversation(self.address)
        try:
            await conversation.open(timeout_s)
        except BaseException:
            await conversation.close()
            raise
        return conversation

    def _do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _stop(self) -> None:
        self._is_closed = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


class Model:
    """A deployed model. Call it as the module it was made of."""

    def __init__(self, client: Client, record: msg.DeploymentRecord) -> None:
        self._client = client
        self.record = record  # name, version, stages with their workers, as they were when this handle was made
        self._interface = Interface.from_json(record.interface)
        self._codec = resolve_codec(record.codec, record.tolerance)

    @property
    def name(self) -> str:
        return self.record.name

    def __repr__(self) -> str:
        inputs = ", ".join(map(str, self._interface.inputs))
        return f"<adapt model {self.name!r} version {self.record.version}: {inputs}; {len(self.record.stages)} stages>"

    def __call__(self, *args: Any, deadline_s: float = DEADLINE_S, **kwargs: Any) -> Any:
        """The model's output, nested as the module's own: torch tensors if any input is one, else numpy arrays.

        Args:
            args, kwargs: inputs as the module takes them; the batch is their first dimension.
            deadline_s: seconds after which `DeadlineExceededError` is raised.

        Raises:
            InputMismatchError: an input does not fit; nothing was sent.
            DeadlineExceededError, OverloadedError, ModelError, ...: see errors.py.
        """
        return self.submit(*args, deadline_s=deadline_s, **kwargs).result()

    def submit(self, *args: Any, deadline_s: float = DEADLINE_S, **kwargs: Any) -> InferFuture:
        """As a call, but returns at once. Inputs may be written to as soon as it has returned.

        Returns:
            The answer to come; its `cancel()` reaches the cluster.

        Raises:
            InputMismatchError: an input does not fit; nothing was sent.
            ConfigError: the deadline is no positive number.
        """
        if not deadline_s > 0:
            raise ConfigError(f"deadline_s={deadline_s!r}: expected a positive number of seconds")
        deadline = monotonic() + deadline_s
        values = self._interface.match(args, kwargs)
        leaves, blobs = to_wire(values, codec=self._codec, tolerance=self.record.tolerance)
        as_torch = any(map(is_torch, values))

        def finish(leaves: list[msg.Leaf], blobs: tuple[Any, ...]) -> Any:
            return self._interface.assemble(from_wire(leaves, blobs, as_torch=as_torch, limit_bytes=LIMIT_BYTES))

        submission = Submission(
            deployment=self.name,
            numerics=self.record.numerics,
            leaves=leaves,
            blobs=blobs,
            deadline=deadline,
            budget_s=deadline_s,
            finish=finish,
        )
        return self._client.submit(submission)

    def map(self, inputs: Iterable[Any], *, in_flight: int = 8, deadline_s: float = DEADLINE_S, progress: bool = False) -> Iterator[Any]:
        """The outputs for many inputs, in their order, at most `in_flight` under way at a time.

        Args:
            inputs: one input each, or a tuple of inputs for a model with several.
            in_flight: keep at least twice as many as there are stages, or workers will idle.
            deadline_s: for each input, from the moment it is submitted.
            progress: show a progress bar on standard error.

        Yields:
            As a call returns. If the generator is closed early, what is under way is cancelled.

        Raises:
            As a call, at the place of the input concerned. An overloaded dispatcher is asked again until the deadline.
        """
        if in_flight < 1:
            raise ConfigError(f"in_flight={in_flight}: expected at least 1")
        outputs = self._map(inputs, in_flight, deadline_s)
        return _with_progress(outputs, inputs, self.name) if progress else outputs

    def _map(self, inputs: Iterable[Any], in_flight: int, deadline_s: float) -> Iterator[Any]:
        under_way: deque[tuple[Any, InferFuture, float]] = deque()
        try:
            for item in inputs:
                if len(under_way) >= in_flight:
                    yield self._result(*under_way.popleft())
                under_way.append((item, self._submit_item(item, deadline_s), monotonic() + deadline_s))
            while under_way:
                yield self._result(*under_way.popleft())
        finally:
            for _, future, _ in under_way:
                future.cancel()

    def _submit_item(self, item: Any, deadline_s: float) -> InferFuture:
        is_many = isinstance(item, tuple) and len(self._interface.inputs) > 1
        return self.submit(*item, deadline_s=deadline_s) if is_many else self.submit(item, deadline_s=deadline_s)

    def _result(self, item: Any, future: InferFuture, deadline: float) -> Any:
        while True:
            try:
                return future.result()
            except OverloadedError as error:
                if monotonic() + error.retry_after_s >= deadline:
                    raise
                time.sleep(error.retry_after_s)  # on the user's own thread, as he asked to wait for outputs
                future = self._submit_item(item, deadline - monotonic())


def _stage_count(stages: int | str) -> int:
    if stages == "auto":
        return 0
    if isinstance(stages, int) and not isinstance(stages, bool) and stages >= 1:
        return stages
    raise ConfigError(f"stages={stages!r}: expected a number of at least 1, or 'auto'")


def _deployment_name(model: Any, name: str | None) -> str:
    chosen = name or (model.rpartition("/")[2] if isinstance(model, str) else type(model).__name__)
    if name is None and not is_name(chosen):
        if isinstance(model, str):
            raise UnknownModelError(model)
        chosen = "model"
    if not is_name(chosen):
        raise ConfigError(f"name={chosen[:80]!r}: expected 1 to 64 letters, digits, dots, dashes or underscores")
    return chosen


def _with_progress(outputs: Iterator[Any], inputs: Iterable[Any], name: str) -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import track

    total = len(inputs) if hasattr(inputs, "__len__") else None
    yield from track(outputs, description=name, total=total, console=Console(stderr=True))

