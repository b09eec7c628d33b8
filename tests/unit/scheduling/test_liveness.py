"""Who still answers: the eight states one by one, then every order of facts against a model that remembers all of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapt.protocol.ids import WorkerId
from adapt.scheduling.liveness import TABLE, Liveness, Verdict

SILENCE_S, GRACE_S = 3, 2
WORKERS = [WorkerId("w1"), WorkerId("w2")]
W1 = WORKERS[0]


def a_liveness() -> Liveness:
    return Liveness(silence_s=SILENCE_S, grace_s=GRACE_S)


# The table once more, by hand: lease, heartbeat, connection, and the verdict.
STATES = [
    ("live", "heard", "up", Verdict.READY),
    ("live", "heard", "down", Verdict.SUSPECT),
    ("live", "silent", "up", Verdict.SUSPECT),
    ("live", "silent", "down", Verdict.SUSPECT),
    ("ended", "heard", "up", Verdict.READY),
    ("ended", "heard", "down", Verdict.LOST),
    ("ended", "silent", "up", Verdict.LOST),
    ("ended", "silent", "down", Verdict.LOST),
]


@pytest.mark.parametrize(("lease", "heartbeat", "connection", "verdict"), STATES)
def test_the_eight_states(lease, heartbeat, connection, verdict):
    liveness = a_liveness()
    liveness.connected(W1, 0)
    if heartbeat == "silent":
        assert liveness.tick(SILENCE_S) == [W1]
    if connection == "down":
        liveness.disconnected(W1, SILENCE_S)
    if lease == "ended":
        liveness.lease_ended(W1)
    assert liveness.verdict(W1) is verdict
    assert TABLE[lease == "live", heartbeat == "heard", connection == "up"] is verdict


def test_the_table_has_no_ninth_state():
    assert len(TABLE) == len(STATES) == 8


def test_a_worker_that_was_never_heard_of_is_lost_and_facts_about_it_change_nothing():
    liveness = a_liveness()
    for fact in (liveness.heard, liveness.disconnected):
        fact(W1, 0)
    for forget in (liveness.lease_ended, liveness.lease_renewed, liveness.forget):
        forget(W1)
    assert liveness.verdict(W1) is Verdict.LOST
    assert liveness.next_wakeup() is None


def test_silence_makes_a_suspect_and_one_heartbeat_redeems_it():
    liveness = a_liveness()
    liveness.connected(W1, 0)
    assert liveness.tick(SILENCE_S - 1) == [] and liveness.verdict(W1) is Verdict.READY
    assert liveness.tick(SILENCE_S) == [W1] and liveness.verdict(W1) is Verdict.SUSPECT
    assert liveness.next_wakeup() is None  # nothing more will happen by itself: the lease decides
    liveness.heard(W1, SILENCE_S + 1)
    assert liveness.verdict(W1) is Verdict.READY
    assert liveness.next_wakeup() == 2 * SILENCE_S + 1


def test_a_connection_that_stays_down_loses_a_worker_whatever_its_lease_says():
    liveness = a_liveness()
    liveness.connected(W1, 0)
    liveness.disconnected(W1, 1)
    assert liveness.tick(1 + GRACE_S - 1) == [] and liveness.verdict(W1) is Verdict.SUSPECT
    assert W1 in liveness.tick(1 + GRACE_S) and liveness.verdict(W1) is Verdict.LOST
    liveness.lease_renewed(W1)
    liveness.heard(W1, 4)
    assert liveness.verdict(W1) is Verdict.LOST  # only a new connection brings it back
    assert liveness.tick(6) == [] and liveness.next_wakeup() is None
    liveness.connected(W1, 7)
    assert liveness.verdict(W1) is Verdict.READY


def test_the_grace_begins_with_the_first_loss_of_the_connection():
    liveness = a_liveness()
    liveness.connected(W1, 0)
    liveness.disconnected(W1, 0)
    liveness.disconnected(W1, 1)  # told twice
    assert liveness.tick(GRACE_S) == [W1]
    assert liveness.verdict(W1) is Verdict.LOST


def test_a_registry_that_stalls_removes_nobody_who_works():
    liveness = a_liveness()
    liveness.connected(W1, 0)
    liveness.lease_ended(W1)
    assert liveness.verdict(W1) is Verdict.READY
    liveness.tick(SILENCE_S)
    assert liveness.verdict(W1) is Verdict.LOST
    liveness.lease_renewed(W1)
    assert liveness.verdict(W1) is Verdict.SUSPECT


def test_a_worker_of_an_earlier_reign_has_the_grace_to_come_back():
    liveness = a_liveness()
    for worker_id in WORKERS:
        liveness.expected(worker_id, 0)
        assert liveness.verdict(worker_id) is Verdict.SUSPECT
    liveness.connected(W1, 1)
    assert liveness.tick(GRACE_S) == WORKERS[1:]
    assert [liveness.verdict(worker_id) for worker_id in WORKERS] == [Verdict.READY, Verdict.LOST]


FACTS = ["expected", "connected", "heard", "disconnected", "renewed", "ended", "forget"]


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(FACTS), st.sampled_from(WORKERS)), max_size=40))
def test_verdicts_follow_from_all_that_was_said(steps):
    """The model keeps only moments, and judges by the head of liveness.py."""
    liveness, now = a_liveness(), 0
    known: dict[WorkerId, dict] = {}
    for wait_s, fact, worker_id in steps:
        now += wait_s
        before = {one: liveness.verdict(one) for one in WORKERS}
        touched = liveness.tick(now)
        assert all(liveness.verdict(one) is before[one] for one in WORKERS if one not in touched), "a change is told"
        signs = known.get(worker_id)
        match fact:
            case "expected":
                if signs is not None:
                    continue  # said only at the start of a reign
                liveness.expected(worker_id, now)
                known[worker_id] = {"lease": True, "heard_at": -SILENCE_S, "down_at": now}
            case "connected":
                liveness.connected(worker_id, now)
                known[worker_id] = {"lease": True, "heard_at": now, "down_at": None}
            case "heard":
                liveness.heard(worker_id, now)
                if signs is not None and signs["down_at"] is None:
                    signs["heard_at"] = now
            case "disconnected":
                liveness.disconnected(worker_id, now)
                if signs is not None and signs["down_at"] is None:
                    signs["down_at"] = now
            case "renewed" | "ended":
                (liveness.lease_renewed if fact == "renewed" else liveness.lease_ended)(worker_id)
                if signs is not None:
                    signs["lease"] = fact == "renewed"
            case _:
                liveness.forget(worker_id)
                known.pop(worker_id, None)
        for one in WORKERS:
            assert liveness.verdict(one) is judge(known.get(one), now)
        assert (due := liveness.next_wakeup()) is None or due > now, "the loop would spin"


def judge(signs: dict | None, now: int) -> Verdict:
    if signs is None or (signs["down_at"] is not None and now - signs["down_at"] >= GRACE_S):
        return Verdict.LOST
    is_heard, is_up = now - signs["heard_at"] < SILENCE_S, signs["down_at"] is None
    if is_heard and is_up:
        return Verdict.READY
    return Verdict.SUSPECT if signs["lease"] else Verdict.LOST
