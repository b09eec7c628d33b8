"""Acknowledgements against their rule: on the next task, or a little later, and each once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from adapt.protocol.ids import AttemptId, RequestId, WorkerId
from adapt.scheduling.acknowledgements import ACK_S, Acknowledgements

W1, W2 = WorkerId("w1"), WorkerId("w2")


def attempt(number: int) -> AttemptId:
    return AttemptId(RequestId(bytes(16), number), 1, 0, 1)


def test_they_ride_on_the_next_task():
    acks = Acknowledgements()
    acks.owe(W1, attempt(1))
    acks.owe(W2, attempt(2))
    assert acks.end_turn(0.0) == []
    acks.owe(W1, attempt(3))
    acks.addressed(W1)
    assert acks.end_turn(0.01) == [(W1, [attempt(1), attempt(3)])]
    assert acks.next_wakeup() == ACK_S
    assert acks.end_turn(ACK_S) == [(W2, [attempt(2)])]
    assert acks.next_wakeup() is None


def test_a_task_says_nothing_of_what_comes_after_its_turn():
    acks = Acknowledgements()
    acks.addressed(W1)
    assert acks.end_turn(0.0) == []
    acks.owe(W1, attempt(1))
    assert acks.end_turn(0.0) == []


def test_the_last_do_not_wait():
    acks = Acknowledgements()
    acks.owe(W1, attempt(1))
    assert acks.end_turn(0.0, is_last=True) == [(W1, [attempt(1)])]


@given(st.lists(st.tuples(st.sampled_from(["owe", "address", "turn"]), st.sampled_from([W1, W2]), st.sampled_from([0.0, 0.03, 0.2]))))
def test_each_is_said_once_and_none_waits_longer(steps):
    acks, now, owed, since = Acknowledgements(), 0.0, [], {}
    for number, (step, worker, pause_s) in enumerate(steps):
        match step:
            case "owe":
                acks.owe(worker, attempt(number))
                owed.append((worker, attempt(number)))
            case "address":
                acks.addressed(worker)
            case "turn":
                now += pause_s
                for to, attempts in acks.end_turn(now):
                    for one in attempts:
                        owed.remove((to, one))
                        since.pop(one, None)
                for _, one in owed:
                    since.setdefault(one, now)
                assert all(now < begin + ACK_S + 1e-9 for begin in since.values())
                assert (acks.next_wakeup() is None) == (not owed)
    assert sorted(one for _, attempts in acks.end_turn(now, is_last=True) for one in attempts) == sorted(one for _, one in owed)
