"""The queues of the stages against a list that is sorted for every question."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from adapt.scheduling.queues import StageQueues

KEYS = [("a", 1, 0, 0), ("a", 1, 0, 1), ("b", 1, 0, 0)]


@dataclass(eq=False)
class Waiting:
    """As much of a request as a queue looks at. It cannot be compared: no tie may come to that."""

    deadline: int
    arrival: int
    ticket: int = 0


def first_of(waiting: list[Waiting]) -> tuple[float, int]:
    return min(((one.deadline, one.arrival) for one in waiting), default=(math.inf, 0))


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["push", "push", "push", "pop", "look", "give up", "wake", "next"]),
        st.sampled_from(KEYS),
        st.integers(0, 3),
    ),
    max_size=60,
)


@given(STEPS)
def test_what_waits_comes_out_once_in_order(steps):
    queues = StageQueues()
    waiting: dict[tuple, list[Waiting]] = {key: [] for key in KEYS}
    awake: set[tuple] = set()
    arrivals = 0
    for step, key, number in steps:
        expected = sorted(waiting[key], key=lambda one: (one.deadline, one.arrival))
        match step:
            case "push":
                arrivals += 1
                one = Waiting(deadline=number, arrival=arrivals // 2)  # two of one arrival: the ticket decides
                queues.push(key, one)
                waiting[key].append(one)
                awake.add(key)
            case "pop":
                entry = queues.pop(key)
                assert (entry and entry[3]) is (expected[0] if expected else None)
                if entry is not None:
                    entry[3].ticket = 0
                    waiting[key].remove(entry[3])
            case "look":
                """Take some out, let one of them go, put all back: the others stand where they stood."""
                entries = [entry for _ in range(number + 1) if (entry := queues.pop(key)) is not None]
                assert [entry[3] for entry in entries] == expected[: number + 1]
                if entries:
                    entries[0][3].ticket = 0
                    waiting[key].remove(entries[0][3])
                queues.put_back(key, entries)
            case "give up" if expected:
                one = expected[number % len(expected)]
                one.ticket = 0
                waiting[key].remove(one)
            case "wake":
                queues.wake(lambda asked, key=key: asked == key)
                awake |= {key} if waiting[key] else set()
            case "next":
                last = min(awake, key=lambda asked: (-asked[-1], first_of(waiting[asked]), asked), default=None)
                found = queues.next_awake()
                while found != last:  # a queue may be looked at in vain, never be overlooked
                    assert found is not None and not waiting[found]
                    found = queues.next_awake()
                awake.discard(last)
    queues.wake_all()
    seen = set()
    while (key := queues.next_awake()) is not None:
        seen.add(key)
    assert seen >= {key for key in KEYS if waiting[key]}


def test_later_stages_come_first():
    queues = StageQueues()
    for key in KEYS:
        queues.push(key, Waiting(1, 1))
    assert [queues.next_awake() for _ in range(4)] == [KEYS[1], KEYS[0], KEYS[2], None]


def test_of_stages_alike_the_one_whose_first_request_is_first_comes_first():
    queues = StageQueues()
    queues.push(KEYS[0], Waiting(3, 1))
    queues.push(KEYS[2], Waiting(2, 2))
    queues.push(KEYS[0], Waiting(5, 3))
    assert queues.next_awake() == KEYS[2]
    assert queues.turn_ends(KEYS[2]) == (3, 1)
    assert queues.turn_ends(KEYS[1]) == (math.inf, 0), "no other stage is as late as this"


def test_a_request_that_is_queued_again_has_one_place():
    queues, one = StageQueues(), Waiting(5, 1)
    queues.push(KEYS[0], one)
    queues.push(KEYS[0], one)
    assert queues.pop(KEYS[0])[3] is one
    assert queues.pop(KEYS[0]) is None


def test_a_stage_is_woken_while_it_is_looked_at_and_its_requests_are_in_other_hands():
    queues, one = StageQueues(), Waiting(deadline=1, arrival=1)
    queues.push(KEYS[0], one)
    assert queues.next_awake() == KEYS[0]
    entry = queues.pop(KEYS[0])
    assert queues.pop(KEYS[0]) is None
    queues.wake(lambda key: True)
    queues.put_back(KEYS[0], [entry])
    assert queues.next_awake() == KEYS[0] and queues.pop(KEYS[0]) == entry and queues.pop(KEYS[0]) is None
    queues.put_back(KEYS[0], [])
    queues.wake_all()
    assert queues.next_awake() is None, "nobody waits there any more"
