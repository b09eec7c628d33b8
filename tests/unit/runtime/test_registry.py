"""Leases and terms that the dispatcher keeps itself."""

from __future__ import annotations

import asyncio

import pytest

from adapt.errors import ConfigError
from adapt.protocol.ids import WorkerId
from adapt.runtime.registry import EmbeddedRegistry, Listener
from adapt.runtime.state import StateDirectory
from adapt.scheduling import events as ev
from adapt.scheduling.liveness import Verdict
from adapt.scheduling.scheduler import Scheduler
from adapt.scheduling.settings import SchedulerSettings

W1, W2 = WorkerId("w1"), WorkerId("w2")


@pytest.fixture
def state(tmp_path):
    state = StateDirectory(tmp_path / "state")
    yield state
    state.close()


def test_a_lease_ends_when_it_is_not_refreshed_and_comes_back_when_it_is(state):
    registry, heard = EmbeddedRegistry(state, lease_ttl_s=3), []
    registry.watch(Listener(ended=lambda worker: heard.append(("ended", worker)), renewed=lambda worker: heard.append(("renewed", worker))))
    registry.register(W1, 0)
    registry.register(W2, 0)
    registry.refresh(W2, 2)
    assert registry.next_wakeup() == 3
    registry.tick(3)
    assert heard == [("ended", W1)]
    registry.refresh(W1, 4)
    registry.refresh(W1, 5)
    assert heard == [("ended", W1), ("renewed", W1)]
    registry.revoke(W2)
    registry.tick(7)
    assert heard[2:] == [], "a lease that was revoked does not end"


def test_a_worker_whose_lease_was_renewed_is_suspect_when_it_falls_silent_and_not_lost():
    """With a lease shorter than the silence that makes a suspect, leases end and come back between two heartbeats."""
    scheduler = Scheduler(SchedulerSettings(silence_s=5, grace_s=9))
    joined = ev.WorkerJoined(
        worker_id=W1,
        numeric_class="x",
        stage_budget_bytes=1,
        credit=1,
        resident=frozenset(),
        held=frozenset(),
        finished=frozenset(),
    )
    scheduler.handle(joined, 0)
    scheduler.handle(ev.LeaseEnded(worker_id=W1), 1)
    assert scheduler.roster.member(W1).verdict is Verdict.READY, "it is heard: a stalled registry removes nobody"
    scheduler.handle(ev.LeaseRenewed(worker_id=W1), 2)
    scheduler.tick(5)
    assert scheduler.roster.member(W1).verdict is Verdict.SUSPECT


def test_every_reign_has_a_higher_term_than_the_one_before(state):
    first = asyncio.run(EmbeddedRegistry(state, lease_ttl_s=1).campaign())
    EmbeddedRegistry(state, lease_ttl_s=1).raise_term(first + 7)
    assert asyncio.run(EmbeddedRegistry(state, lease_ttl_s=1).campaign()) == first + 8


def test_a_state_directory_is_for_one_dispatcher(state):
    with pytest.raises(ConfigError, match="another dispatcher"):
        StateDirectory(state.directory)
