"""Which files under --models-dir are to be deployed now, and what became of them. Pure: told what lies there, and the time.

state      event                                     to
-          it is there                               waiting
waiting    it changes                                waiting, anew
waiting    unchanged for `settle_s`                  deploying: `look` names it
deploying  deployed, or found to be so already       deployed;  waiting, if it has changed meanwhile
deploying  refused                                   failed;    waiting, if it has changed meanwhile
deployed   it changes                                waiting
failed     it changes, or it is time to try again    waiting
any        it is gone                                -: what was deployed stays
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

SETTLE_S = 1.0


class Stamp(NamedTuple):
    """What changes when a file does."""

    size_bytes: int
    modified_ns: int
    inode: int


class State(StrEnum):
    WAITING = "waiting"
    DEPLOYING = "deploying"
    DEPLOYED = "deployed"
    FAILED = "failed"


@dataclass(slots=True)
class Shelved:
    """One file. `since`: when it was first seen as it is now."""

    stamp: Stamp
    since: float
    state: State = State.WAITING
    version: int = 0  # that was made of it last
    reason: str = ""  # why it failed
    again_at: float | None = None  # when it is tried once more


class Shelf:
    """See the head of this file."""

    def __init__(self, *, settle_s: float = SETTLE_S) -> None:
        self._settle_s = settle_s
        self.files: dict[str, Shelved] = {}

    def look(self, there: Mapping[str, Stamp], now: float) -> list[str]:
        """What lies there now; the files that are to be deployed, which are taken to be under way from now on."""
        self.files = {name: file for name, file in self.files.items() if name in there}
        due = []
        for name, stamp in sorted(there.items()):
            file = self.files.setdefault(name, Shelved(stamp, now))
            if file.stamp != stamp:
                file.stamp, file.since = stamp, now
                if file.state is not State.DEPLOYING:
                    file.state = State.WAITING
            if file.state is State.FAILED and file.again_at is not None and file.again_at <= now:
                file.state = State.WAITING
            if file.state is State.WAITING and now - file.since >= self._settle_s:
                file.state = State.DEPLOYING
                due.append(name)
        return due

    def stamp(self, name: str) -> Stamp:
        """As which it is to be deployed."""
        return self.files[name].stamp

    def deployed(self, name: str, stamp: Stamp, version: int) -> None:
        if (file := self.files.get(name)) is not None:
            file.version, file.reason, file.again_at = version, "", None
            file.state = State.DEPLOYED if file.stamp == stamp else State.WAITING

    def failed(self, name: str, stamp: Stamp, reason: str, *, again_at: float | None = None) -> None:
        """`again_at`: when it may succeed as it is; None: it has to change."""
        if (file := self.files.get(name)) is not None:
            file.reason, file.again_at = reason, again_at
            file.state = State.FAILED if file.stamp == stamp else State.WAITING
