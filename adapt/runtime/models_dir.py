"""Deploys the model files that lie in --models-dir, and again when they change: each under its name without the ending.

    NAME.pt2            what torch.export.save wrote; exported in a child process, which also runs its example inputs: they are its canary
    NAME.safetensors    a program, as `export_module` writes it; a file of weights is passed over

A `.pt2` is code: whoever may write into the directory may run it here. A file is looked at again and again, and taken when it has not
changed for a second: by then it is whole, or it is found to be broken, and that it stays until it changes. What is not the file's own failure
(no workers, one that was lost, a child that was killed) is tried again, after longer and longer pauses. Work is done on a copy, so that a
file may change at any time. A changed file becomes the next version, with the options of the present one. A deployment that somebody has
removed stays so until its file changes.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

from adapt.clock import Clock
from adapt.errors import AdaptError, CanaryError, ConfigError, ExportError, ExportInterruptedError, WireError
from adapt.models.canaries import TOLERANCE
from adapt.models.layers import estimated_costs_s
from adapt.models.program import PROGRAM_KEY, read_program
from adapt.protocol.ids import Digest, is_name
from adapt.protocol.messages import DeploymentRecord, ModelFileRecord
from adapt.runtime import builder
from adapt.runtime.artifacts import ArtifactStore
from adapt.runtime.builder import TORCH_FILE
from adapt.runtime.deployments import Deployments
from adapt.runtime.recipes import CanaryFile, ProfiledProgram, Recipe
from adapt.runtime.shelf import Shelf, Shelved, Stamp, State

log = logging.getLogger(__name__)

BringUp: TypeAlias = Callable[[str, Recipe, Callable[[str], None]], Awaitable[DeploymentRecord]]  # `Deployer.bring_up`

POLL_S = 0.5
AGAIN_S, MOST_AGAIN_S = 10.0, 600.0  # after a failure that need not be the file's own; doubled each time
REASON_LENGTH = 1000  # of a failure, in a status
HEAD_BYTES = 64 << 10  # of a tensor file, in which a program says that it is one
COPY_BYTES = 1 << 20
TENSOR_FILE = ".safetensors"


class ModelsDir:
    """See the head of this file. Lives on the dispatcher's loop."""

    def __init__(self, directory: Path, store: ArtifactStore, deployments: Deployments, bring_up: BringUp, *, clock: Clock) -> None:
        self._directory, self._store, self._deployments, self._bring_up = directory, store, deployments, bring_up
        self._clock = clock
        self._shelf = Shelf()
        self._trouble = ""  # with the directory itself
        self._failures: dict[str, tuple[Stamp, int]] = {}  # file -> how often it has failed as it is, by no fault of its own

    async def run(self) -> None:
        """Look and deploy, until it is cancelled."""
        while True:
            try:
                there = await asyncio.to_thread(list_models, self._directory)
                self._trouble = ""
            except OSError as error:
                self._complain(error)
                there = {}
            for name in self._shelf.look(there, self._clock()):
                await self._deploy(name)
            await asyncio.sleep(POLL_S)

    def records(self) -> list[ModelFileRecord]:
        """As users see them."""
        return [self._record(name, file) for name, file in sorted(self._shelf.files.items())]

    def _record(self, name: str, file: Shelved) -> ModelFileRecord:
        deployment, state = _stem(name), file.state.value
        if file.state is State.DEPLOYED and self._deployments.was_removed(deployment):
            state = "removed"
        return ModelFileRecord(file=name, deployment=deployment, state=state, version=file.version, reason=file.reason)

    def _complain(self, error: OSError) -> None:
        if str(error) != self._trouble:  # once
            self._trouble = str(error)
            log.error("the models' directory cannot be read", extra={"directory": str(self._directory), "reason": self._trouble})

    async def _deploy(self, name: str) -> None:
        stamp = self._shelf.stamp(name)
        try:
            with self._deployments.under_way():
                number = await self._bring(name)
        except (AdaptError, OSError) as error:
            log.warning("model file not deployed", extra={"file": name, "reason": str(error)})
            self._shelf.failed(
                name, stamp, str(error)[:REASON_LENGTH], again_at=None if _is_its_own(error) else self._again_at(name, stamp)
            )
        except Exception as error:  # a bug of ours must not end the watch
            log.exception("model file not deployed", extra={"file": name})
            self._shelf.failed(name, stamp, f"{type(error).__name__}: {error}"[:REASON_LENGTH], again_at=self._again_at(name, stamp))
        else:
            self._failures.pop(name, None)
            self._shelf.deployed(name, stamp, number)

    def _again_at(self, name: str, stamp: Stamp) -> float:
        """When a file is tried once more."""
        before, count = self._failures.get(name, (stamp, 0))
        count = count if before == stamp else 0
        self._failures[name] = (stamp, count + 1)
        return self._clock() + min(AGAIN_S * 2.0 ** min(count, 16), MOST_AGAIN_S)

    async def _bring(self, name: str) -> int:
        """Deploy a file, unless it is what was deployed before; the version's number."""
        deployment = self._deployment(name)
        staging = Path(await asyncio.to_thread(partial(tempfile.mkdtemp, prefix=".build-", dir=self._store.directory)))
        try:
            copy = staging / name
            digest = await asyncio.to_thread(_copy, self._directory / name, copy)
            present = self._deployments.present(deployment)
            if digest == self._deployments.taken(name):
                if present is not None:
                    return present.number
                if self._deployments.was_removed(deployment):
                    log.info("model file passed over: its deployment was removed", extra={"file": name, "deployment": deployment})
                    return 0
            log.info("model file taken", extra={"file": name, "deployment": deployment})
            program, canaries = await self._program(copy)
            recipe = _recipe(present, program, canaries)
            if canaries is not None and recipe.canaries is None:
                self._deployments.discard([canaries.digest])
            was_removed = self._deployments.was_removed(deployment)
            try:
                record = await self._bring_up(deployment, recipe, partial(_say, name))
            except AdaptError:
                if was_removed or not self._deployments.was_removed(deployment):
                    raise
                self._deployments.take(name, digest)  # while it was brought up
                return 0
        finally:
            await asyncio.to_thread(shutil.rmtree, staging, ignore_errors=True)
        self._deployments.take(name, digest)
        return record.version

    def _deployment(self, name: str) -> str:
        stem = _stem(name)
        if not is_name(stem):
            raise ConfigError(
                f"{name}: the name without its ending names the deployment: 1 to 64 letters, digits, dots, dashes or underscores"
            )
        rivals = sorted(other for other in self._shelf.files if _stem(other) == stem)
        if rivals[0] != name:
            raise ConfigError(f"{name}: {rivals[0]} is deployed under this name; remove or rename one of the two")
        return stem

    async def _program(self, copy: Path) -> tuple[ProfiledProgram, CanaryFile | None]:
        if copy.suffix == TORCH_FILE or importlib.util.find_spec("torch") is not None:
            built = await builder.build_file(copy, directory=self._store.directory)
            canaries = None if built.canaries is None else CanaryFile(built.canaries, TOLERANCE)
            return ProfiledProgram(built.digest, built.operator_costs_s), canaries
        program = await asyncio.to_thread(read_program, copy)
        digest = await asyncio.to_thread(self._store.add, copy)
        return ProfiledProgram(Digest(digest), estimated_costs_s(program)), None


def list_models(directory: Path) -> dict[str, Stamp]:
    """The files that may be deployed. Blocks. Raises OSError: the directory cannot be read."""
    found = {}
    for entry in os.scandir(directory):
        path = Path(entry.path)
        if path.suffix not in (TORCH_FILE, TENSOR_FILE) or entry.name.startswith("."):
            continue
        try:
            status = entry.stat()
            if not stat.S_ISREG(status.st_mode) or (path.suffix == TENSOR_FILE and not _is_program(path)):
                continue
        except OSError:  # gone at this very moment, or not ours to read: that is told when it is there and settled
            continue
        found[entry.name] = Stamp(status.st_size, status.st_mtime_ns, status.st_ino)
    return found


def _is_program(path: Path) -> bool:
    """Whether it says so at its beginning: then it is one, perhaps a broken one."""
    with open(path, "rb") as file:
        return f'"{PROGRAM_KEY}"'.encode() in file.read(HEAD_BYTES)


def _copy(source: Path, target: Path) -> str:
    """The SHA-256 of what was copied."""
    sha = hashlib.sha256()
    with open(source, "rb") as reader, open(target, "wb") as writer:
        while data := reader.read(COPY_BYTES):
            sha.update(data)
            writer.write(data)
    return sha.hexdigest()


def _recipe(present: Recipe | None, program: ProfiledProgram, canaries: CanaryFile | None) -> Recipe:
    """With the options of the present version, if there is one."""
    if present is None:
        return Recipe(stages=0, codec="raw", tolerance=None, numerics="auto", program=program, canaries=canaries)
    if canaries is not None and present.canaries is not None:
        canaries = replace(canaries, tolerance=present.canaries.tolerance)
    elif present.codec.startswith("zfp"):  # nobody has said how far outputs may be off
        canaries = None
    return Recipe(
        stages=present.stages,
        codec=present.codec,
        tolerance=present.tolerance,
        numerics=present.numerics,
        program=program,
        canaries=canaries,
    )


def _say(name: str, step: str) -> None:
    log.info("model file", extra={"file": name, "step": step})


def _stem(name: str) -> str:
    return name.removesuffix(TORCH_FILE).removesuffix(TENSOR_FILE)


def _is_its_own(error: Exception) -> bool:
    """Whether a file fails in this way for as long as it is as it is."""
    if isinstance(error, CanaryError):
        return error.is_deviation
    return isinstance(error, (ExportError, WireError, ConfigError)) and not isinstance(error, ExportInterruptedError)
