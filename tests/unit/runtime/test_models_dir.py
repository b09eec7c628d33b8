"""What becomes of files under --models-dir that cannot be deployed now, and of those whose deployment was removed. Nothing is exported."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from adapt import errors
from adapt.planning.placement import Plan
from adapt.protocol.ids import Digest, Epoch
from adapt.runtime.artifacts import ArtifactStore
from adapt.runtime.deployments import Blueprint, Deployments
from adapt.runtime.models_dir import AGAIN_S, MOST_AGAIN_S, ModelsDir, list_models
from adapt.runtime.recipes import ProfiledProgram, Recipe
from adapt.runtime.shelf import SETTLE_S
from adapt.runtime.state import StateDirectory
from adapt.scheduling.events import Version

FILE, NAME = "mine.pt2", "mine"


class Shelf:
    """A directory of models, and a dispatcher that deploys them at once, unless `fails` says otherwise."""

    def __init__(self, tmp_path: Path) -> None:
        self.directory = tmp_path / "models"
        self.directory.mkdir(exist_ok=True)
        self.state_path, self.now, self.tries = tmp_path / "state", 0.0, 0
        self.fails: Exception | None = None
        self.begin()

    def begin(self) -> None:
        self.state = StateDirectory(self.state_path)
        store = ArtifactStore(self.state.artifacts)
        self.deployments = Deployments(self.state, store)
        self.deployments.restore()
        self.models = ModelsDir(self.directory, store, self.deployments, self._bring_up, clock=lambda: self.now)
        self.models._program = self._program

    def end(self) -> None:
        self.state.close()

    async def _program(self, copy: Path) -> tuple[ProfiledProgram, None]:
        return ProfiledProgram(Digest("a" * 64), [1.0]), None

    async def _bring_up(self, name, recipe: Recipe, say):
        self.tries += 1
        if self.fails is not None:
            raise self.fails
        number = self.deployments.next_number(name)
        plan = Plan(program=recipe.program.digest, epoch=Epoch(1), stages=(), places=())
        self.version = Version(
            deployment=name, number=number, program=plan.program, codec="raw", tolerance=None, exact=False, plan=plan
        )  # fmt: skip
        self.deployments.put(self.version, Blueprint("[]", "auto", (), replace(recipe, number=number)))
        self.deployments.ready(self.version)
        return self.deployments.record(self.version)

    def remove(self) -> None:
        """Somebody undeploys it."""
        self.deployments.removed(NAME)
        self.deployments.drop(self.version)

    def put(self, content: str) -> None:
        (self.directory / FILE).write_text(content)

    def look(self, *, after_s: float = 0.0) -> tuple[str, int]:
        """State and version of the file when it has been looked at, and was not changed for a while."""

        async def turn() -> None:
            for pause_s in (after_s, SETTLE_S):
                self.now += pause_s
                for name in self.models._shelf.look(list_models(self.directory), self.now):
                    await self.models._deploy(name)

        asyncio.run(turn())
        (record,) = self.models.records()
        return record.state, record.version


@pytest.fixture
def shelf(tmp_path):
    shelf = Shelf(tmp_path)
    yield shelf
    shelf.end()


@pytest.mark.parametrize(
    ("error", "is_its_own"),
    [
        (errors.ExportError("a loop"), True),
        (errors.ExportUnavailableError("no torch"), True),
        (errors.WireError("no program"), True),
        (errors.ConfigError("another file has its name"), True),
        (errors.CanaryError("another output", canary=0), True),
        (errors.CanaryError("no answer", canary=0, is_deviation=False), False),
        (errors.ExportInterruptedError("killed"), False),
        (errors.WorkerLostError("w1", "it left while it was loading a stage"), False),
        (errors.PlanError("no workers"), False),
        (errors.AttemptTimeoutError("w1", timeout_s=60.0), False),
        (errors.AdaptError("replaced before it was ready"), False),
        (OSError("disk full"), False),
        (RuntimeError("a bug of ours"), False),
    ],
)
def test_what_is_not_the_files_own_failure_is_tried_again(shelf, error, is_its_own):
    shelf.put("1")
    shelf.fails = error
    assert shelf.look() == ("failed", 0)
    shelf.fails = None
    assert shelf.look(after_s=AGAIN_S) == (("failed", 0) if is_its_own else ("deployed", 1))
    shelf.put("changed")
    assert shelf.look() == ("deployed", 1 if is_its_own else 2)


def test_the_pauses_grow_until_the_file_changes(shelf):
    shelf.put("1")
    shelf.fails = errors.PlanError("no workers")
    shelf.look()
    tried = []
    while len(tried) < 9:
        before = shelf.tries
        shelf.look(after_s=AGAIN_S - SETTLE_S)
        tried += [shelf.now] * (shelf.tries - before)
    pauses = [second - first for first, second in pairwise(tried)]
    assert pauses[:3] == [2 * AGAIN_S, 4 * AGAIN_S, 8 * AGAIN_S] and pauses[-1] == MOST_AGAIN_S
    shelf.put("changed")
    shelf.look()
    before = shelf.tries
    shelf.look(after_s=AGAIN_S)
    assert shelf.tries == before + 1


def test_what_somebody_has_removed_stays_so_until_its_file_changes(shelf):
    """Regression: it came back when the dispatcher was started again."""
    shelf.put("1")
    assert shelf.look() == ("deployed", 1)
    shelf.remove()
    assert shelf.look(after_s=1.0) == ("removed", 1)
    shelf.end()
    shelf.begin()
    assert shelf.look() == ("removed", 0) and shelf.tries == 1
    shelf.put("changed")
    assert shelf.look() == ("deployed", 2)
    shelf.end()
    shelf.begin()
    assert shelf.look() == ("deployed", 2) and shelf.tries == 2


def test_what_is_removed_while_it_is_brought_up_is_not_tried_again(shelf):
    shelf.put("1")
    bring_up = shelf.models._bring_up

    async def removed(name, recipe, say):
        await bring_up(name, recipe, say)
        shelf.remove()
        raise errors.AdaptError("version 1 of mine was undeployed before it was ready")

    shelf.models._bring_up = removed
    assert shelf.look() == ("removed", 0)
    assert shelf.look(after_s=AGAIN_S) == ("removed", 0) and shelf.tries == 1
