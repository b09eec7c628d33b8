"""What a fork of this process must not keep: ends of pipes whose closing says that this process has ended, and locks.

A program that uses multiprocessing forks by default, and then what waits for such an end would wait for the fork as well.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Forgetful(Protocol):
    def forget(self) -> None:
        """Called in a fork: close what is the owner's alone. No locks may be taken: who held them is not there."""


_kept: weakref.WeakSet[Forgetful] = weakref.WeakSet()
_registered: list[bool] = []


def forget_in_forks(thing: Forgetful) -> None:
    """From now on, as long as it exists, it is asked in every fork to forget."""
    if not _registered:
        os.register_at_fork(after_in_child=_forget_all)
        _registered.append(True)
    _kept.add(thing)


def _forget_all() -> None:
    for thing in list(_kept):
        thing.forget()
