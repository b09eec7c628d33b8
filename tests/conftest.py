"""What holds for every test: no module of tests leaves a process or a thread behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
from hypothesis import settings

from tests.host import HostWatch

# Deadlines of single examples say more about the machine than about the code. A failure prints how to replay it.
settings.register_profile("adapt", deadline=None, print_blob=True)
settings.load_profile("adapt")

UNIT = Path(__file__).parent / "unit"
LEAVE_WITHIN_S = 5.0
MEASURED_AGAIN = 2  # times, where the machine was disturbed meanwhile: what its neighbours do passes, what our code has lost does not
WATCH = pytest.StashKey[HostWatch]()
# Python's own, started on first use and kept to the end
KEPT_BY_PYTHON = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A bound on measured time that was missed on a disturbed machine is measured again. What measures none, and starts nothing, may run beside
    others of its kind."""
    for item in items:
        if item.get_closest_marker("timing"):
            item.add_marker(pytest.mark.flaky(reruns=MEASURED_AGAIN, condition=partial(_was_disturbed, item)))
        elif UNIT in item.path.parents:
            item.add_marker(pytest.mark.apart)


def _was_disturbed(item: pytest.Item) -> bool:
    return WATCH in item.stash and item.stash[WATCH].was_disturbed()


@pytest.fixture(autouse=True)
def watched_host(request: pytest.FixtureRequest) -> Iterator[None]:
    """While times are measured."""
    if request.node.get_closest_marker("timing") is None:
        yield
        return
    watch = request.node.stash[WATCH] = HostWatch()
    yield
    watch.close()


def _children() -> dict[int, str]:
    found = {}
    for child in psutil.Process().children(recursive=True):
        try:
            command = " ".join(child.cmdline())
        except psutil.Error:
            continue
        if child.is_running() and not any(name in command for name in KEPT_BY_PYTHON):
            found[child.pid] = command or f"defunct {child.pid}"
    return found


def _threads() -> dict[int | None, str]:
    return {thread.ident: thread.name for thread in threading.enumerate() if not thread.daemon}


@pytest.fixture(scope="module", autouse=True)
def leaves_nothing_behind() -> Iterator[None]:
    """Processes and threads that a module of tests has started are gone soon after it ends."""
    before = _children().keys() | _threads().keys()
    yield
    limit = time.monotonic() + LEAVE_WITHIN_S
    while left := {key: name for key, name in (_children() | _threads()).items() if key not in before}:
        if time.monotonic() > limit:
            pytest.fail(f"left behind: {left}", pytrace=False)
        time.sleep(0.05)
