"""Versions as the scheduler knows them, and their stages by what is wanted where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from adapt.planning.placement import Plan, StageNeed
from adapt.protocol.ids import WorkerId
from adapt.scheduling import events as ev
from adapt.scheduling.canaries import Trial


@dataclass(slots=True)
class LiveVersion:
    """A version and what the scheduler keeps with it."""

    version: ev.Version
    is_ready: bool = False
    is_retired: bool = False
    requests: int = 0  # that live and are pinned to it
    canaries: tuple[ev.Canary, ...] = ()  # that have to come out right before it takes requests
    trial: Trial | None = None  # from when it is resident, if it has canaries

    @property
    def plan(self) -> Plan:
        return self.version.plan

    @property
    def key(self) -> ev.VersionKey:
        return self.version.key

    @property
    def is_untried(self) -> bool:
        """Whether nobody may ask for it yet: its canaries have not come out."""
        return bool(self.canaries) and not self.is_ready


class Wanted(NamedTuple):
    """A stage of a version, and the workers that the plan in force names for it."""

    live: LiveVersion
    stage: int
    need: StageNeed
    workers: tuple[WorkerId, ...]
