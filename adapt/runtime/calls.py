"""What clients ask of a dispatcher besides inference, put together and checked. `Client` and `AsyncClient` add only the waiting."""

from __future__ import annotations

import difflib
import math
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeAlias

from adapt.config import check_address, dispatcher_address
from adapt.errors import ConfigError, ConnectError, ExportError, ExportUnavailableError, UnknownModelError
from adapt.models.canaries import TOLERANCE as CANARY_TOLERANCE
from adapt.models.program import check_optimize
from adapt.protocol import messages as msg
from adapt.protocol.codecs import resolve_codec
from adapt.protocol.ids import Digest, is_name
from adapt.runtime import builder
from adapt.runtime.conversation import Call
from adapt.runtime.threads import LoopThread

if TYPE_CHECKING:
    from torch.nn import Module

CONNECT_TIMEOUT_S = 5.0
DEPLOY_TIMEOUT_S = 600.0
CALL_TIMEOUT_S = 10.0
PROFILE_TIMEOUT_S = 3600.0
REPETITIONS, MOST_REPETITIONS = 9, 1000  # of a profile
NUMERICS = ("close", "exact")

Told: TypeAlias = Callable[[str], None]
ToldShare: TypeAlias = Callable[[str, float | None], None]  # words, and the share that is done of what they say, if that is known

_exporting = threading.Lock()  # torch.export changes settings of the whole process while it works


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeployOrder:
    """The options of `Client.deploy`, where they are explained. Raises ConfigError or UnknownModelError for impossible ones."""

    model: str | os.PathLike[str] | Module
    example_inputs: Sequence[Any] | None
    stages: int | str
    codec: str
    tolerance: float | None
    numerics: str | None
    optimize: str
    weights: str | os.PathLike[str] | None
    seed: int | None
    model_args: Mapping[str, Any] | None
    input_shape: Sequence[int] | None
    name: str | None
    version: int | None
    canaries: Sequence[Any] | None
    canary_tolerance: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", name_or_module(self.model))
        resolve_codec(self.codec, self.tolerance)
        if self.numerics not in (None, *NUMERICS):
            raise ConfigError(f"numerics={self.numerics!r}: expected one of {', '.join(NUMERICS)}, or None")
        check_optimize(self.optimize)
        stage_count(self.stages)
        deployment_name(self.model, self.name)
        version_number(self.version)
        check_canaries(self.canaries, self.canary_tolerance)
        if self.is_file and self.example_inputs is not None:
            raise ConfigError("example_inputs are for modules; a .pt2 brings its own")
        if not self.is_exported_here and self.example_inputs is not None:
            raise ConfigError("example_inputs are for modules; give a named model its input_shape")

    @property
    def is_file(self) -> bool:
        """Whether the model is a file of this machine."""
        return isinstance(self.model, str) and builder.is_model_file(self.model)

    @property
    def is_exported_here(self) -> bool:
        """Whether `call` takes its time, and torch."""
        return not isinstance(self.model, str) or self.is_file or _is_local_file(self.weights) or self.canaries is not None

    def call(self, told: Told | None) -> Call:
        """The question to the dispatcher. What was exported for it lies in a folder that goes with it.

        Raises:
            ExportError, ExportUnavailableError, ConfigError: see `Client.deploy`.
        """
        source = self._source()
        if not self.is_exported_here:
            return Call(self._message(named=source), progress=without_share(told))
        file = builder.model_file(source) if self.is_file else None
        if told is not None:
            told("exporting the model in this process" if file is None else f"exporting {file.name} in a child process")
        directory = tempfile.mkdtemp(prefix="adapt-export-")
        try:
            if file is not None:
                uploaded, canaries, files = _export_file(self, file, Path(directory), told)
            else:
                with _exporting:
                    uploaded, canaries, files = _export(self, source, Path(directory), told)
            call = Call(self._message(uploaded=uploaded, canaries=canaries), progress=without_share(told), offered=files)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        # Not a block that its reader has to leave: a task that was cancelled leaves the thread alone that exports for it.
        weakref.finalize(call, shutil.rmtree, directory, ignore_errors=True)
        return call

    def _source(self) -> msg.NamedSource:
        return msg.NamedSource(
            model=self.model if isinstance(self.model, str) else "",
            weights=None if self.weights is None else os.fspath(self.weights),
            seed=self.seed,
            model_args=dict(self.model_args or {}),
            input_shape=None if self.input_shape is None else [int(size) for size in self.input_shape],
            optimize=self.optimize,
        )

    def _message(
        self,
        *,
        named: msg.NamedSource | None = None,
        uploaded: msg.ProgramSource | None = None,
        canaries: msg.CanarySource | None = None,
    ) -> msg.Deploy:
        return msg.Deploy(
            call=0,
            name=deployment_name(self.model, self.name),
            stages=stage_count(self.stages),
            codec=self.codec,
            tolerance=self.tolerance,
            numerics=self.numerics or "auto",
            named=named,
            uploaded=uploaded,
            version=self.version or 0,
            canaries=canaries,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ProfileOrder:
    """The options of `Client.profile`, where they are explained. Raises ConfigError or UnknownModelError for impossible ones."""

    model: DeployOrder  # it is found, and exported if need be, as for a deployment
    device_class: str
    repetitions: int
    again: bool

    def __post_init__(self) -> None:
        if not isinstance(self.repetitions, int) or isinstance(self.repetitions, bool) or not 1 <= self.repetitions <= MOST_REPETITIONS:
            raise ConfigError(f"repetitions={self.repetitions!r}: expected 1 to {MOST_REPETITIONS}")

    def call(self, told: ToldShare | None) -> Call:
        """The question to the dispatcher; see `DeployOrder.call`."""
        call = self.model.call(None if told is None else lambda words: told(words, None))
        asked = call.message
        assert isinstance(asked, msg.Deploy)
        call.progress = told
        call.message = msg.Profile(
            call=0,
            name=asked.name,
            device_class=self.device_class,
            repetitions=self.repetitions,
            again=self.again,
            named=asked.named,
            uploaded=asked.uploaded,
        )
        return call

    @classmethod
    def of(
        cls,
        model: str | os.PathLike[str] | Module,
        example_inputs: Sequence[Any] | None,
        weights: str | os.PathLike[str] | None,
        seed: int | None,
        model_args: Mapping[str, Any] | None,
        input_shape: Sequence[int] | None,
        *,
        device_class: str,
        repetitions: int,
        again: bool,
    ) -> Self:
        order = DeployOrder(
            model=model,
            example_inputs=example_inputs,
            stages="auto",
            codec="auto",
            tolerance=None,
            numerics=None,
            optimize="none",
            weights=weights,
            seed=seed,
            model_args=model_args,
            input_shape=input_shape,
            name=None,
            version=None,
            canaries=None,
            canary_tolerance=CANARY_TOLERANCE,
        )
        return cls(model=order, device_class=device_class, repetitions=repetitions, again=again)


def without_share(told: Told | None) -> ToldShare | None:
    return None if told is None else lambda words, share: told(words)


def _export(
    order: DeployOrder, source: msg.NamedSource, directory: Path, told: Told | None
) -> tuple[msg.ProgramSource, msg.CanarySource | None, dict[Digest, Path]]:
    """Build if need be, and export into `directory`, with canaries if there are any; what has been written, by digest.

    The only place of a client that needs torch, but for its child."""
    model: Any = order.model
    example_inputs = order.example_inputs
    try:
        import torch

        from adapt.models.export import export_module, inference_copy
        from adapt.models.rehearsal import rehearse
        from adapt.models.sources import build_named_model
    except ImportError as error:
        raise ExportUnavailableError(f"this process has no torch to export the model with: {error}") from None
    if isinstance(model, str):
        weights = Path(source.weights) if source.weights is not None and _is_local_file(source.weights) else source.weights
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
    exported = export_module(model, tuple(example_inputs), directory=directory, optimize=source.optimize)
    uploaded = msg.ProgramSource(program=exported.digest, file_bytes=exported.file_bytes, operator_costs_s=list(exported.operator_costs_s))
    files = {Digest(exported.digest): Path(exported.path)}
    if order.canaries is None:
        return uploaded, None, files
    if told is not None:
        told("running the canaries in this process")
    path, digest, file_bytes = rehearse(
        inference_copy(model), exported.path, order.canaries, directory=directory, tolerance=order.canary_tolerance
    )
    files[Digest(digest)] = path
    return uploaded, msg.CanarySource(file=digest, file_bytes=file_bytes, tolerance=order.canary_tolerance), files


def _export_file(
    order: DeployOrder, file: Path, directory: Path, told: Told | None
) -> tuple[msg.ProgramSource, msg.CanarySource | None, dict[Digest, Path]]:
    """As `_export`, of a `.pt2` file: in a child process, as to read one is to run what is in it."""
    loop = LoopThread("adapt-export")  # not asyncio.run: the caller's thread may have a loop that runs, as in a notebook
    try:
        built = loop.run(
            builder.build_file(
                file,
                directory=directory,
                optimize=order.optimize,
                canaries=order.canaries,
                tolerance=order.canary_tolerance,
                progress=told,
            )
        )
    finally:
        loop.close(_nothing())
    uploaded = msg.ProgramSource(program=built.digest, file_bytes=built.file_bytes, operator_costs_s=built.operator_costs_s)
    if built.canaries is None:
        return uploaded, None, {built.digest: built.path}
    path = directory / f"{built.canaries}.safetensors"
    canaries = msg.CanarySource(file=built.canaries, file_bytes=path.stat().st_size, tolerance=order.canary_tolerance)
    return uploaded, canaries, {built.digest: built.path, built.canaries: path}


async def _nothing() -> None:
    pass


def _is_local_file(weights: str | os.PathLike[str] | None) -> bool:
    return weights is not None and os.path.isfile(weights)  # False also for what is no path


def name_or_module(model: Any) -> Any:
    """A path as text; all else as it is. Raises ConfigError for the path of another file than a `.pt2`."""
    path = os.fspath(model) if isinstance(model, os.PathLike) else model
    if not isinstance(path, str):
        return path
    is_file = path is not model or (Path(path).suffix != "" and os.path.isfile(path))
    if is_file and not builder.is_model_file(path):
        raise ConfigError(
            f"model={path[:200]!r}: expected a {builder.TORCH_FILE} file, which torch.export.save writes; "
            "a file of weights goes with the name of a model: weights="
        )
    return path


def stage_count(stages: int | str) -> int:
    if stages == "auto":
        return 0
    if isinstance(stages, int) and not isinstance(stages, bool) and stages >= 1:
        return stages
    raise ConfigError(f"stages={stages!r}: expected a number of at least 1, or 'auto'")


def version_number(version: int | None) -> int:
    """0 for the next."""
    if version is None:
        return 0
    if isinstance(version, int) and not isinstance(version, bool) and 1 <= version < 1 << 63:
        return version
    raise ConfigError(f"version={version!r}: expected a number of at least 1, or None for the next")


def check_canaries(canaries: Sequence[Any] | None, tolerance: float) -> None:
    """Raises ConfigError unless they may be inputs, and the tolerance is one."""
    if canaries is not None and (isinstance(canaries, str | bytes) or not hasattr(canaries, "__len__") or len(canaries) == 0):
        raise ConfigError(f"canaries={type(canaries).__name__}: expected a list of inputs, at least one")
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0.0 <= tolerance <= 1.0:
        raise ConfigError(f"canary_tolerance={tolerance!r}: expected a share from 0 to 1")


def rollback_to(name: str, report: msg.StatusReport, version: int | None) -> msg.Rollback:
    """What asks for an earlier version: that one, or the one before the present.

    Raises:
        UnknownModelError: no deployment has this name.
        ConfigError: that version is not kept, or none is.
    """
    version_number(version)
    earlier = record_of(name, report).earlier
    if not earlier:
        raise ConfigError(f"no earlier version of {name} is kept; the dispatcher's --keep-versions says how many are")
    chosen = earlier[-1] if version is None else version
    if chosen not in earlier:
        raise ConfigError(f"version={chosen}: version {' and '.join(map(str, earlier))} of {name} can be rolled back to")
    return msg.Rollback(call=0, name=name, version=chosen)


def deployment_name(model: Any, name: str | None) -> str:
    if name is None and isinstance(model, str) and builder.is_model_file(model):
        name = Path(model).stem
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


def record_of(name: str, report: msg.StatusReport) -> msg.DeploymentRecord:
    """The deployment of this name. Raises UnknownModelError, with the names there are."""
    deployments = {record.name: record for record in report.deployments}
    if name not in deployments:
        raise UnknownModelError(name, suggestions=closest(name, deployments))
    return deployments[name]


def closest(name: str, names: Iterable[str]) -> list[str]:
    """The names that this one may have meant; without a likeness the first of all."""
    known = sorted(names)
    return difflib.get_close_matches(str(name), known, n=3, cutoff=0.5) or known[:5]


def address_of(address: str | None) -> str:
    """Where the dispatcher is. Raises ConfigError."""
    return dispatcher_address(os.environ) if address is None else check_address(address, key="address", is_listening=False)


def check_seconds(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise ConfigError(f"{key}={value!r}: expected a positive number of seconds")


def unanswered(address: str, call: Call, timeout_s: float) -> ConnectError:
    return ConnectError(address, f"no answer to {type(call.message).__name__} within {timeout_s:g} s")


def forked(address: str) -> ConnectError:
    return ConnectError(address, "this client belongs to the process that this one was forked from; make another")


def teller(progress: Told | bool) -> Told | None:
    """What calls `progress`; True prints."""
    if not progress:
        return None
    if callable(progress):
        return progress
    from rich.console import Console

    console = Console(stderr=True)
    return lambda words: console.print(f"{words} ...", style="dim", highlight=False, markup=False)
