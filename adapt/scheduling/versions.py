"""Versions as the scheduler knows them, and their stages by what is wanted where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from adapt.planning.placement import Plan, StageNeed
from adapt.protocol.ids import WorkerId
from adapt.scheduling import events as ev


@dataclass(slots=True)
class LiveVersion:
    """A version and what the scheduler keeps with it."""

    version: ev.Version
    is_ready: bool = False
    is_retired: bool = False
    requests: int = 0  # that live and are pinned to it

    @property
    def plan(self) -> Plan:
        return self.version.plan

    @property
    def key(self) -> tuple[str, int]:
        return (self.version.deployment, self.version.number)


class Wanted(NamedTuple):
    """A stage of a version, and the workers that the plan in force names for it."""

    live: LiveVersion
    stage: int
    need: StageNeed
    workers: tuple[WorkerId, ...]
