"""Exports a model that was named, or that lies in a file, in a child process: the dispatcher itself never imports torch, and a `.pt2` file is code.

The program is written into a folder of its own beside the others and moved among them when it is whole, so that a killed child leaves
nothing behind. `build` and `build_file` are the parent's half and import no room with torch; the child's half does, inside its function. See
child.py for how the two talk. The parent is the dispatcher; or a client, for a file that its user has named.
"""

from __future__ import annotations

import asyncio
import difflib
import importlib.util
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapt.errors import ConfigError, ExportError, ExportInterruptedError, ExportUnavailableError
from adapt.models.canaries import TOLERANCE
from adapt.protocol.ids import Digest
from adapt.protocol.messages import NamedSource
from adapt.runtime import heap
from adapt.runtime.child import Progress, answer, ask

NICENESS = 5  # the dispatcher, and workers on its machine, come first
ELEMENT_LIMIT = 1 << 28  # of an example input
LISTED_FILES = 1000  # looked through for a suggestion
TIMEOUT_S = 600.0  # for most models some seconds are enough
TORCH_FILE = ".pt2"
CANARY_INPUTS = "canary-inputs.pt"
OWN_EXAMPLE = "own"  # of a `.pt2` file, as its canary

# Names of torchvision's own weights: "DEFAULT", "IMAGENET1K_V2". Everything else is a file under --models-dir.
_WEIGHTS_NAME = re.compile(r"[A-Z][A-Z0-9_]{0,63}")


@dataclass(frozen=True, slots=True)
class BuiltProgram:
    """A program in the store.

    Attributes:
        path: `<directory>/<digest>.safetensors`.
        operator_costs_s: seconds of each operator here, at one thread, for a batch of 1.
        canaries: a file in the store beside it, if there are any.
    """

    path: Path
    digest: Digest
    file_bytes: int
    operator_costs_s: list[float]
    canaries: Digest | None = None


# --- the parent's half ------------------------------------------------------------------------------------------------


async def build(
    source: NamedSource,
    *,
    directory: Path,
    models_dir: Path | None,
    timeout_s: float = TIMEOUT_S,
    progress: Callable[[str], None] | None = None,
) -> BuiltProgram:
    """Build and export the model that `source` names, in a child process. Cancelling kills the child.

    Args:
        directory: where the program is stored.
        models_dir: the only folder whose files `source.weights` may name; None: no file may be named.
        timeout_s: for the whole work, downloads of weights included.
        progress: told in words what the child does next.

    Raises:
        ExportUnavailableError: there is no torch here.
        ExportError: also where `source` names a `.pt2` file: these are opened where they are named, by `build_file`.
        ConfigError: `source.weights` names no file under `models_dir`, or `source.input_shape` is impossible.
        UnknownModelError: no model has this name.
        ExportError: the model cannot be exported; ExportInterruptedError: the child died or took too long.
    """
    if is_model_file(source.model):
        raise ExportError(
            f"{source.model[:200]} is code, and nobody opens code for another: a client exports a file of its own machine, and a dispatcher "
            "what lies in its --models-dir"
        )
    if importlib.util.find_spec("torch") is None:
        raise ExportUnavailableError(
            f"{source.model} would be exported by the dispatcher, which has no torch: install adapt-inference[worker] there, "
            "or deploy the model as an nn.Module object, which the client exports"
        )
    weights = resolve_weights(source.weights, models_dir)
    _check_shape(source.input_shape)
    staging = _staging(directory)
    request = {
        "model": source.model,
        "weights": None if weights is None else str(weights),
        "weights_is_file": isinstance(weights, Path),
        "seed": source.seed,
        "model_args": source.model_args,
        "input_shape": source.input_shape,
        "optimize": source.optimize,
        "directory": str(staging),
    }
    return await _ask(request, staging, directory, source.model, timeout_s, progress)


async def build_file(
    file: Path,
    *,
    directory: Path,
    timeout_s: float = TIMEOUT_S,
    optimize: str = "none",
    canaries: Sequence[Any] | str | None = OWN_EXAMPLE,
    tolerance: float = TOLERANCE,
    progress: Callable[[str], None] | None = None,
) -> BuiltProgram:
    """The program in a file that nobody writes to: of a `.pt2` (which is code), exported in a child process; a program itself, timed there.

    Args:
        file: an absolute path of one's own machine, and trusted: to read a `.pt2` is to run it.
        directory: where the program is stored.
        optimize: of a `.pt2`; see `export_module`.
        canaries: of a `.pt2`: inputs, as `rehearse` takes them; OWN_EXAMPLE: those that were saved with it, if a call takes no others than
            positional ones; None: none.
        tolerance: of the canaries.
        progress: told in words what the child does next.

    Raises:
        ExportError: it holds no model that can be turned into stages; ExportInterruptedError: the child died or took too long.
        ExportUnavailableError: there is no torch here.
        InputMismatchError, ConfigError: a canary does not fit the model.
        WireError: it should be a program, and is broken.
    """
    if importlib.util.find_spec("torch") is None:
        raise ExportUnavailableError(
            f"{file.name} would be exported by this machine, which has no torch: install adapt-inference[worker] here, "
            "or take the program that export_module makes of the model"
        )
    staging = _staging(directory)
    if canaries is not None and not isinstance(canaries, str):
        canaries = _hand_over(canaries, staging / CANARY_INPUTS)
    request = {"file": str(file), "directory": str(staging), "optimize": optimize, "canaries": canaries, "tolerance": tolerance}
    return await _ask(request, staging, directory, file.name, timeout_s, progress)


def is_model_file(model: str) -> bool:
    """Whether a model is named by the path of a `.pt2` file."""
    return model.endswith(TORCH_FILE)


def model_file(source: NamedSource) -> Path:
    """The file on this machine that `source` names.

    Raises:
        ExportError: there is none.
        ConfigError: it has options that only a model by name has.
    """
    path = Path(source.model)
    options = {"weights": source.weights, "seed": source.seed, "model_args": source.model_args, "input_shape": source.input_shape}
    for key, value in options.items():
        if value is not None and value != {}:
            raise ConfigError(f"{key}={str(value)[:80]}: for models by name; {path.name} brings its own weights and example inputs")
    if "://" in source.model:
        raise ExportError(
            f"{source.model[:200]}: a {TORCH_FILE} is code, and is taken from a path of this machine only, never from the network"
        )
    if not path.is_file():
        raise ExportError(
            f"there is no file {source.model[:200]} here, in {Path.cwd()}; what lies on the dispatcher's machine goes into its --models-dir"
        )
    return path.absolute()


def _hand_over(canaries: Sequence[Any], path: Path) -> str:
    """Write canaries for a child of ours; where."""
    import torch

    from adapt.models.export import as_tensors

    torch.save(as_tensors(list(canaries)), path)
    return str(path)


async def _ask(
    request: dict[str, Any], staging: Path, directory: Path, what: str, timeout_s: float, progress: Callable[[str], None] | None
) -> BuiltProgram:
    """What the child makes of it, in `directory`."""
    try:
        async with asyncio.timeout(timeout_s):
            built = await ask(
                "adapt.runtime.builder",
                request,
                about=f"the export of {what}",
                progress=None if progress is None else lambda step, _: progress(step),
            )
        return _store(built, staging, directory)
    except TimeoutError:
        raise ExportInterruptedError(f"the export of {what} took longer than {timeout_s:g} s and was ended") from None
    finally:
        await asyncio.to_thread(shutil.rmtree, staging, ignore_errors=True)  # a thread: the file may have gigabytes


def resolve_weights(weights: str | None, models_dir: Path | None) -> str | Path | None:
    """The file that `weights` means, or the name of torchvision's own weights, or None for random ones.

    Raises:
        ConfigError: it is a file that does not exist, or one outside `models_dir`, by whatever way.
    """
    if weights is None or _WEIGHTS_NAME.fullmatch(weights):
        return weights
    shown = f"weights={weights[:200]!r}"
    if models_dir is None:
        raise ConfigError(
            f"{shown}: this dispatcher opens no files; start it with --models-dir, or deploy the model from a client that has them"
        )
    named = Path(weights)
    if named.is_absolute() or ".." in named.parts or "\0" in weights:
        raise ConfigError(f"{shown}: expected a file under the dispatcher's --models-dir, named from there")
    base = models_dir.resolve()
    try:
        path = (base / named).resolve()
    except (OSError, RuntimeError):  # a circle of links
        path = base
    if not path.is_relative_to(base):  # a link leads out
        raise ConfigError(f"{shown}: expected a file under the dispatcher's --models-dir, and no link out of it")
    if not path.is_file():
        raise ConfigError(f"{shown}: there is no such file under the dispatcher's --models-dir{_suggestion(weights, base)}")
    return path


def _suggestion(weights: str, base: Path) -> str:
    names = [str(path.relative_to(base)) for path, _ in zip(base.rglob("*"), range(LISTED_FILES), strict=False) if path.is_file()]
    close = difflib.get_close_matches(weights, names, n=2, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _check_shape(shape: list[int] | None) -> None:
    if shape is not None and not (1 <= len(shape) <= 8 and 0 < math.prod(shape) <= ELEMENT_LIMIT):
        raise ConfigError(f"input_shape={shape[:9]}: expected 1 to 8 sizes above 0 with a product of at most {ELEMENT_LIMIT}")


def _staging(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=".build-", dir=directory.absolute()))


def _store(built: dict[str, Any], staging: Path, directory: Path) -> BuiltProgram:
    digest, file_bytes = Digest(built["digest"]), int(built["file_bytes"])
    path = directory / f"{digest}.safetensors"
    os.replace(staging / path.name, path)  # the same file system, and the file has been synced
    canaries = None
    if built.get("canaries") is not None:
        canaries = Digest(built["canaries"])
        os.replace(staging / f"{canaries}.safetensors", directory / f"{canaries}.safetensors")
    return BuiltProgram(path, digest, file_bytes, [float(cost) for cost in built["operator_costs_s"]], canaries)


def _export(request: dict[str, Any], say: Progress) -> dict[str, Any]:
    """The child's half."""
    os.nice(NICENESS)
    os.chdir(request["directory"])  # no file of the working directory can be named by accident
    say("loading torch", None)
    import torch

    from adapt.models.export import export_module
    from adapt.models.sources import build_named_model

    heap.share_one_heap()  # as the workers do, for whom operators are timed here
    torch.set_num_threads(1)
    if "file" in request:
        return _export_file(request, say)
    weights = request["weights"]
    say(f"building {request['model']}", None)
    named = build_named_model(
        request["model"],
        weights=Path(weights) if request["weights_is_file"] else weights,
        seed=request["seed"],
        model_args=request["model_args"],
        input_shape=request["input_shape"],
    )
    say(f"exporting and profiling {request['model']}", None)
    exported = export_module(named.module, [named.example_input], directory=request["directory"], optimize=request["optimize"])
    if exported.deviation:
        say(f"optimized {request['model']}: answers deviate by {exported.deviation:.1e} of the largest number in them", None)
    return {"digest": exported.digest, "file_bytes": exported.file_bytes, "operator_costs_s": exported.operator_costs_s}


def _export_file(request: dict[str, Any], say: Progress) -> dict[str, Any]:
    """The child's half of `build_file`."""
    from adapt.models.export import export_file
    from adapt.models.profiler import profile_file
    from adapt.models.program import read_program
    from adapt.models.rehearsal import rehearse

    file, directory = Path(request["file"]), Path(request["directory"])
    if not is_model_file(file.name):
        say(f"profiling {file.name}", None)
        digest = read_program(file).digest
        shutil.copyfile(file, path := directory / f"{digest}.safetensors")
        return {"digest": digest, "file_bytes": path.stat().st_size, "operator_costs_s": profile_file(path)}
    say(f"exporting and profiling {file.name}", None)
    exported, module, args = export_file(file, directory=directory, optimize=request["optimize"])
    inputs, canaries = _canary_inputs(request["canaries"], args), None
    if inputs:
        say(f"running the canaries of {file.name}", None)
        canaries = rehearse(module, exported.path, inputs, directory=directory, tolerance=request["tolerance"])[1]
    costs_s = exported.operator_costs_s
    return {"digest": exported.digest, "file_bytes": exported.file_bytes, "operator_costs_s": costs_s, "canaries": canaries}


def _canary_inputs(asked: str | None, own: tuple[Any, ...] | None) -> list[Any]:
    import torch

    if asked == OWN_EXAMPLE:
        return [] if own is None else [own]
    return [] if asked is None else list(torch.load(asked, weights_only=True))


if __name__ == "__main__":
    sys.exit(answer(_export))
