"""What it takes to deploy a version once more: its program and its options, written down with it; and the earlier versions of which that is
kept."""

from __future__ import annotations

import base64
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from adapt.errors import ConfigError
from adapt.protocol.ids import Digest

KEPT = 2  # earlier versions of each deployment, unless the setting says otherwise


@dataclass(frozen=True, slots=True)
class ProfiledProgram:
    """A program in the store, with the seconds that each of its operators took on the machine that exported it."""

    digest: Digest
    operator_costs_s: Sequence[float]


@dataclass(frozen=True, slots=True)
class CanaryFile:
    """A file of canaries in the store. `tolerance`: where bits cannot agree, see `models.canaries.deviation`."""

    digest: Digest
    tolerance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """See the head of this file.

    Attributes:
        number: of the version; 0: it has none yet. again: of the earlier version that it repeats; 0: none. asked: of the version that was
            asked to be repeated, which may have been a repetition itself.
        source: digest of the order for a named model; "": it was a program.
        stages: 0: as many as is best.
        codec: resolved; numerics: as the client said it.
    """

    number: int = 0
    again: int = 0
    asked: int = 0
    source: str = ""
    stages: int
    codec: str
    tolerance: float | None
    numerics: str
    program: ProfiledProgram
    canaries: CanaryFile | None = None

    @property
    def original(self) -> int:
        """The version that was the first to be deployed by it."""
        return self.again or self.number

    @property
    def is_exact(self) -> bool:
        """Whether each request stays in one numeric class."""
        return self.numerics == "exact"

    @property
    def files(self) -> set[Digest]:
        return {self.program.digest} | ({self.canaries.digest} if self.canaries is not None else set())

    def repeated(self, asked: int = 0) -> Recipe:
        """For another version; `asked`: by which number this one was asked for."""
        return replace(self, number=0, again=self.original, asked=asked, source="")

    def to_plain(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "again": self.again,
            "asked": self.asked,
            "source": self.source,
            "stages": self.stages,
            "codec": self.codec,
            "tolerance": self.tolerance,
            "numerics": self.numerics,
            "program": self.program.digest,
            "operator_costs_s": base64.b64encode(array("f", self.program.operator_costs_s).tobytes()).decode(),
            "canaries": None if self.canaries is None else [self.canaries.digest, self.canaries.tolerance],
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Recipe:
        """Raises ConfigError: it is not what `to_plain` gave."""
        try:
            costs_s = array("f", base64.b64decode(plain["operator_costs_s"]))
            canaries = plain["canaries"]
            return cls(
                number=plain["number"],
                again=plain["again"],
                asked=plain.get("asked", 0),
                source=plain.get("source", ""),
                stages=plain["stages"],
                codec=plain["codec"],
                tolerance=plain["tolerance"],
                numerics=plain["numerics"],
                program=ProfiledProgram(Digest(plain["program"]), costs_s.tolist()),
                canaries=None if canaries is None else CanaryFile(Digest(canaries[0]), canaries[1]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"deployments.json has a recipe that cannot be read ({error!r}); remove the file to start afresh") from error


class Earlier:
    """The recipes of versions that have been replaced, a few of each deployment; of each recipe only the last version."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._recipes: dict[str, list[Recipe]] = {}  # newest last

    def replaced(self, deployment: str, recipes: Sequence[Recipe], present: Recipe | None) -> set[Digest]:
        """`present` is the version that takes requests now, and these it has replaced; the files of those that are not kept any more."""
        before = self._recipes.get(deployment, [])
        last = {recipe.original: recipe for recipe in sorted([*before, *recipes], key=lambda recipe: recipe.number)}
        if present is not None:
            last.pop(present.original, None)
        kept = sorted(last.values(), key=lambda recipe: recipe.number)[-self._keep :] if self._keep else []
        self._recipes[deployment] = kept
        return _files([*before, *recipes]) - _files(kept)

    def forget(self, deployment: str) -> set[Digest]:
        """It was removed; the files that it had."""
        return _files(self._recipes.pop(deployment, []))

    def numbers(self, deployment: str) -> list[int]:
        """Versions that can be deployed again, newest last."""
        return [recipe.number for recipe in self._recipes.get(deployment, [])]

    def find(self, deployment: str, number: int) -> Recipe:
        """Raises ConfigError: no such version is kept."""
        for recipe in self._recipes.get(deployment, []):
            if number in (recipe.number, recipe.again):
                return recipe
        known = " and ".join(map(str, self.numbers(deployment)))
        raise ConfigError(f"version={number}: " + (f"version {known} of {deployment} can be rolled back to" if known else "none is kept"))

    @property
    def files(self) -> set[Digest]:
        return _files([recipe for recipes in self._recipes.values() for recipe in recipes])

    def to_plain(self) -> dict[str, Any]:
        return {name: [recipe.to_plain() for recipe in recipes] for name, recipes in self._recipes.items() if recipes}

    def restore(self, plain: dict[str, Any], *, is_there: Any) -> None:
        """What `to_plain` gave; those whose files are gone are dropped."""
        for name, recipes in plain.items():
            found = [Recipe.from_plain(recipe) for recipe in recipes]
            self._recipes[name] = (
                [recipe for recipe in found if all(is_there(file) for file in recipe.files)][-self._keep :] if self._keep else []
            )


def _files(recipes: Sequence[Recipe]) -> set[Digest]:
    return set().union(*(recipe.files for recipe in recipes))
