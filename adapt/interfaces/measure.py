"""A model by its name, exported and timed on this machine, in a child process: torch is imported there only."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from adapt.models.program import Program, read_program
from adapt.protocol.messages import NamedSource
from adapt.runtime.builder import build

BUILD_TIMEOUT_S = 600.0


@contextmanager
def measured(source: NamedSource, *, progress: Callable[[str], None] | None = None) -> Iterator[tuple[Program, Sequence[float]]]:
    """The program and the seconds of its operators for a batch of one, at one thread; its file lives as long as the context. Errors as
    `builder.build`."""
    with tempfile.TemporaryDirectory(prefix="adapt-measure-") as directory:
        built = asyncio.run(build(source, directory=Path(directory), models_dir=None, timeout_s=BUILD_TIMEOUT_S, progress=progress))
        yield read_program(built.path), built.operator_costs_s
