"""A model by its name, or in a `.pt2` file, exported and timed on this machine, in a child process: torch is imported there only."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from adapt.models.program import Program, read_program
from adapt.protocol.messages import NamedSource
from adapt.runtime.builder import BuiltProgram, build, build_file, is_model_file, model_file


@contextmanager
def measured(source: NamedSource, *, progress: Callable[[str], None] | None = None) -> Iterator[tuple[Program, Sequence[float]]]:
    """The program and the seconds of its operators for a batch of one, at one thread; its file lives as long as the context. Errors as
    `builder.build` and, for a file, `builder.model_file` and `builder.build_file`."""
    with tempfile.TemporaryDirectory(prefix="adapt-measure-") as directory:
        built = asyncio.run(_build(source, Path(directory), progress))
        yield read_program(built.path), built.operator_costs_s


async def _build(source: NamedSource, directory: Path, progress: Callable[[str], None] | None) -> BuiltProgram:
    if is_model_file(source.model):
        return await build_file(model_file(source), directory=directory, optimize=source.optimize, canaries=None, progress=progress)
    return await build(source, directory=directory, models_dir=None, progress=progress)
