"""Penalty and breaker: the published rule, and what was added so that no worker is locked out for ever."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapt.errors import ConfigError
from adapt.protocol.ids import WorkerId
from adapt.scheduling.qos import Breaker, Qos, QosSettings, usable

SETTINGS = QosSettings()


def after(failures: int, now: float = 0.0) -> Qos:
    qos = Qos(SETTINGS)
    for _ in range(failures):
        qos.failed(now)
    return qos


def test_the_fifth_failure_in_a_row_opens_the_breaker():
    assert [after(count).breaker(0.0) for count in (1, 4, 5)] == [Breaker.CLOSED, Breaker.CLOSED, Breaker.OPEN]
    assert [after(count).penalty(0.0) for count in (0, 1, 4, 5)] == [0.0, 50.0, 200.0, 250.0]


def test_a_success_wears_the_penalty_down_to_nothing():
    qos, penalties = after(1), []
    while qos.penalty(0.0):
        qos.succeeded(0.0)
        penalties.append(qos.penalty(0.0))
    assert penalties[0] == 40.0
    assert penalties[-2] >= SETTINGS.forgotten_below
    assert penalties[-1] == 0.0


def test_an_open_breaker_decays_and_half_opens_for_one_task():
    qos = after(5)
    opens_at = qos.next_wakeup()
    assert opens_at == pytest.approx(math.log(200 / 250) / math.log(0.9))
    assert qos.penalty(1.0) == pytest.approx(225.0)
    assert not qos.takes(opens_at - 1e-6)
    assert qos.takes(opens_at)
    assert qos.breaker(opens_at) is Breaker.HALF_OPEN
    qos.given(opens_at)
    assert not qos.takes(opens_at)
    qos.succeeded(opens_at + 1)
    assert qos.breaker(opens_at + 1) is Breaker.CLOSED
    assert qos.takes(opens_at + 1)
    assert qos.next_wakeup() is None


def test_a_probe_that_fails_opens_it_again():
    qos = after(5)
    moment = qos.next_wakeup()
    qos.given(moment)
    qos.failed(moment + 1)
    assert qos.breaker(moment + 1) is Breaker.OPEN
    assert qos.penalty(moment + 1) == 250.0


def test_a_probe_that_comes_back_unused_leaves_room_for_the_next():
    qos = after(5)
    moment = qos.next_wakeup()
    qos.given(moment)
    qos.returned()
    assert qos.takes(moment)


def test_a_late_success_may_close_an_open_breaker():
    qos = after(5)
    qos.succeeded(0.0)
    assert qos.breaker(0.0) is Breaker.CLOSED
    qos = after(7)
    qos.succeeded(0.0)
    assert qos.breaker(0.0) is Breaker.OPEN
    assert qos.penalty(0.0) == 280.0


@given(st.lists(st.tuples(st.sampled_from(["failed", "succeeded", "given", "returned"]), st.integers(0, 4))))
def test_it_never_stays_open_for_ever_and_is_never_below_nothing(steps):
    qos, now = Qos(SETTINGS), 0.0
    for step, wait_s in steps:
        now += wait_s
        getattr(qos, step)(*(() if step == "returned" else (now,)))
        assert 0.0 <= qos.penalty(now) < math.inf
        assert (qos.breaker(now) is Breaker.OPEN) == (qos.next_wakeup() is not None)
        if (moment := qos.next_wakeup()) is not None:
            assert moment > now
            assert qos.penalty(now) > SETTINGS.open_above
    qos.returned()
    assert qos.takes(max(now, qos.next_wakeup() or 0.0))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9))
def test_at_most_half_are_kept_out_and_the_best_of_them_go_on(failures):
    records = {WorkerId(f"w{place}"): after(count) for place, count in enumerate(failures)}
    names = list(records)
    left = usable(records, names, 0.0)
    assert left == [name for name in names if name in left]
    assert len(left) >= math.ceil(len(names) / 2)
    assert {name for name in names if records[name].takes(0.0)} <= {*left}
    out = [records[name].penalty(0.0) for name in names if name not in left]
    saved = [records[name].penalty(0.0) for name in left if not records[name].takes(0.0)]
    assert not out or not saved or min(out) >= max(saved)
    assert not saved or len(out) == len(names) // 2


@pytest.mark.parametrize("wrong", [{"success_factor": 1.0}, {"decay_per_s": 0.0}, {"failure_penalty": 0.0}, {"open_above": math.inf}])
def test_settings_that_would_lock_a_worker_out_for_ever_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        QosSettings(**wrong)
