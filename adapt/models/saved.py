"""Models that come as `.pt2` files, as `torch.export.save` writes them.

Such a file is code: whoever reads one may run what it holds (pickles, guards, expressions written as text). So only a path that somebody has
named on their own machine is read, in a child process (runtime/builder.py). What can be told of a file without torch's reader is told first.
"""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.utils import _pytree as pytree

from adapt.errors import ExportError

MODEL_ENTRY, OLD_MODEL_ENTRY = "models/model.json", "serialized_exported_program.json"  # the latter until torch 2.7
REASON_LENGTH = 300
# What else lies in archives of this kind -> what it is, and what to do with it.
_OTHER_ARCHIVES = {
    "data/aotinductor/": "compiled for one kind of processor; save what torch.export.export gives",
    "code/": "TorchScript; export the module with torch.export.export",
    "data.pkl": "a pickle that torch.save wrote; weights go with the name of a model: weights=",
}


@dataclass(frozen=True, slots=True)
class SavedModel:
    """A model as it was read.

    Attributes:
        program: torch's own form of it.
        module: what computes as the model does, for all sizes.
        args, kwargs: the example call that was saved with it.
        places: of each tensor in that call, the dimensions that are the batch; none at all if shapes are fixed.
        batch_limit: the largest batch, if there is a largest.
    """

    program: torch.export.ExportedProgram
    module: Any
    args: Any
    kwargs: Any
    places: list[tuple[int, ...]]
    batch_limit: int | None

    def call_of_one(self) -> tuple[Any, Any]:
        """(args, kwargs) of the example with the first of its batch alone; the whole of it if shapes are fixed."""
        places = iter(self.places)

        def first(leaf: torch.Tensor) -> torch.Tensor:
            for place in next(places):
                leaf = leaf.narrow(place, 0, 1)
            return leaf.contiguous()

        alone: tuple[Any, Any] = pytree.tree_map_only(torch.Tensor, first, (self.args, self.kwargs))
        return alone


def read_saved(path: Path) -> SavedModel:
    """Read a `.pt2` file. This may run code in it.

    Raises:
        ExportError: it is no such file, a broken one, or one that torch does not read here; it was saved without example inputs; or its sizes
            vary in more ways than by one batch.
    """
    document = _document(path)
    program, module = _load(path, document)
    if program.example_inputs is None:
        raise ExportError(f"{path.name} has no example inputs; save what torch.export.export gives, with all that it has")
    args, kwargs = program.example_inputs
    places, batch_limit = _batch(program, pytree.tree_leaves((args, kwargs)), path.name)
    return SavedModel(program, module, args, kwargs, places, batch_limit)


# --- what is told without torch's reader ------------------------------------------------------------------------------


def _document(path: Path) -> dict[str, Any]:
    """The description of the model that lies in the archive, as JSON."""
    if not path.is_file():
        raise ExportError(f"there is no file {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            entry = next((name for name in names if name == OLD_MODEL_ENTRY or name.endswith(f"/{MODEL_ENTRY}")), None)
            if entry is None:
                raise ExportError(f"{path.name} is no model that torch.export.save has written: {_what_else(names)}")
            document = json.loads(archive.read(entry))
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        raise ExportError(f"{path.name} is no model that torch.export.save has written, or a broken one: {_shortened(error)}") from None
    return document if isinstance(document, dict) else {}


def _what_else(names: Sequence[str]) -> str:
    others = sorted({name.rpartition("models/")[2] for name in names if "/models/" in name})
    if others:
        return f"it holds {', '.join(others[:5])} instead of one model"
    for part, words in _OTHER_ARCHIVES.items():
        if any(f"/{part}" in name or name.startswith(part) for name in names):
            return f"it is {words}"
    return "it is an archive without a model"


# --- torch's reader ---------------------------------------------------------------------------------------------------


def _load(path: Path, document: dict[str, Any]) -> tuple[torch.export.ExportedProgram, Any]:
    with _listening() as heard:
        try:
            program = torch.export.load(path)
            return program, program.module(check_guards=False)
        except Exception as error:  # whatever a foreign file makes the reader raise
            reason = _shortened(heard[0] if heard else error)
    unknown = _unknown_operator(document)
    here = str(torch.__version__)
    saved_by = str(document.get("torch_version", here))
    if _release(saved_by) != _release(here):
        raise ExportError(
            f"{path.name} was saved by torch {saved_by[:40]}, and torch {here} cannot read it: {unknown or reason}; "
            "save it again with the torch that is here"
        )
    if unknown:
        raise ExportError(f"{path.name}: {unknown}; ADAPT runs torch's own operators only")
    raise ExportError(f"{path.name} is a broken model, or one that torch cannot read: {reason}")


@contextmanager
def _listening() -> Iterator[list[BaseException]]:
    """The errors that torch's reader logs and then forgets."""
    heard: list[BaseException] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.exc_info and record.exc_info[1] is not None:
                heard.append(record.exc_info[1])

    listener, log = Listener(), logging.getLogger("torch.export")
    log.addHandler(listener)
    try:
        yield heard
    finally:
        log.removeHandler(listener)


def _unknown_operator(document: dict[str, Any]) -> str:
    """The first operator that this torch does not have, and where it is used; "" if it has all."""
    match document:
        case {"graph_module": {"graph": {"nodes": list() as nodes}}}:
            pass
        case _:
            return ""
    for node in nodes:
        match node:
            case {"target": str() as target} if target.startswith("torch.ops.") and not _is_known(target):
                return f"operator {target.removeprefix('torch.ops.')}, used in {_where(node)}, is unknown here"
    return ""


def _is_known(target: str) -> bool:
    found: Any = torch
    for name in target.split(".")[1:]:
        found = getattr(found, name, None)
    return found is not None


def _where(node: dict[str, Any]) -> str:
    """The module, by torch's text for it: `key,path,class;key,path,class`, from the outside in."""
    metadata = node.get("metadata")
    stack = str(metadata.get("nn_module_stack", "")) if isinstance(metadata, dict) else ""
    parts = stack.rpartition(";")[2].split(",")
    return f"{parts[1] or 'the model itself'} ({parts[2].rpartition('.')[2]})" if len(parts) == 3 else "the model"


def _release(version: str) -> list[str]:
    return version.split("+")[0].split(".")[:2]


def _shortened(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:REASON_LENGTH].rstrip('. ')}" if lines else type(error).__name__


# --- the batch --------------------------------------------------------------------------------------------------------


def _batch(program: torch.export.ExportedProgram, leaves: Sequence[Any], file: str) -> tuple[list[tuple[int, ...]], int | None]:
    """Of each tensor in the example call the dimensions that vary, all of them by one size; and the most that this may be, if there is a
    limit."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    inputs = [spec.arg for spec in program.graph_signature.input_specs if spec.kind == InputKind.USER_INPUT]
    places: list[tuple[int, ...]] = []
    varying: dict[Any, str] = {}  # size -> where it was first met
    for argument, leaf in zip(inputs, leaves, strict=True):
        if isinstance(argument, ConstantArgument):
            continue
        if not isinstance(leaf, torch.Tensor):
            raise ExportError(f"{file}: input {argument.name} is a number that varies; make it a tensor, or export it with a fixed one")
        sizes = [_expression(size) for size in nodes[argument.name].meta["val"].shape]
        places.append(tuple(place for place, size in enumerate(sizes) if size is not None))
        for place in places[-1]:
            varying.setdefault(sizes[place], f"dimension {place} of input {argument.name}")
    if len(varying) > 1 or not all(size.is_Symbol for size in varying):
        met = ", ".join(f"{where} is {size}" for size, where in varying.items())
        raise ExportError(
            f"{file}: its sizes vary in more ways than by one batch ({met}); export it with the others fixed, or with one torch.export.Dim"
        )
    most = None
    for size, where in varying.items():
        most = _limit(program, size, where, file)
    return places, most


def _expression(size: int | torch.SymInt) -> Any:
    """By what a size varies; None: it does not."""
    expression = None if isinstance(size, int) else size.node.expr
    return None if expression is None or expression.is_number else expression


def _limit(program: torch.export.ExportedProgram, size: Any, where: str, file: str) -> int | None:
    """The most that the batch may be, if there is such a number."""
    bounds = program.range_constraints.get(size)
    least, most = (0, None) if bounds is None else (int(bounds.lower), int(bounds.upper) if bounds.upper.is_Integer else None)
    if least > 2 or (most is not None and most < 2):  # torch writes 2 where it means any number, and allows 1
        raise ExportError(f"{file}: {where} may be {least} to {most or 'any number'}; export it with torch.export.Dim(..., min=1)")
    return most
