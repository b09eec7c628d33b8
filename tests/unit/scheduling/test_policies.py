from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from adapt.protocol.ids import WorkerId
from adapt.scheduling.policies import POLICIES, Candidate, earliest_finish

SECONDS = st.integers(0, 4)


@st.composite
def candidates(draw):
    return [
        Candidate(
            worker_id=WorkerId(f"w{number}"),
            backlog_s=draw(SECONDS),
            service_s=draw(SECONDS),
            transfer_s=draw(SECONDS),
            last_used=draw(SECONDS),
        )
        for number in draw(st.permutations(range(draw(st.integers(1, 5)))))
    ]


def finish_s(candidate: Candidate) -> float:
    return candidate.backlog_s + candidate.service_s + candidate.transfer_s


@given(candidates())
def test_earliest_finish_chooses_the_first_to_finish_then_the_most_rested_then_by_name(offered):
    chosen = min(offered, key=earliest_finish)
    assert all(finish_s(chosen) <= finish_s(other) for other in offered)
    equals = [other for other in offered if finish_s(other) == finish_s(chosen)]
    assert all(chosen.last_used <= other.last_used for other in equals)
    rested = [other for other in equals if other.last_used == chosen.last_used]
    assert chosen.worker_id == min(other.worker_id for other in rested)


@given(candidates(), st.sampled_from(sorted(POLICIES)), st.randoms(use_true_random=False))
def test_a_choice_does_not_depend_on_the_order_of_the_candidates(offered, name, random):
    shuffled = random.sample(offered, len(offered))
    assert min(offered, key=POLICIES[name]) == min(shuffled, key=POLICIES[name])


@given(candidates(), st.sampled_from(["backlog_s", "service_s", "transfer_s"]))
def test_a_worker_that_gets_slower_is_not_chosen_for_it(offered, what):
    chosen = min(offered, key=earliest_finish)
    slower = [one._replace(**{what: getattr(one, what) + 1}) if one is not chosen else one for one in offered]
    assert min(slower, key=earliest_finish) == chosen


def test_the_fast_worker_is_waited_for_only_while_that_ends_earlier():
    fast = Candidate(worker_id=WorkerId("fast"), backlog_s=2, service_s=1, transfer_s=0, last_used=0)
    slow = Candidate(worker_id=WorkerId("slow"), backlog_s=0, service_s=4, transfer_s=0, last_used=0)
    assert min([slow, fast], key=earliest_finish) is fast
    assert min([slow, fast._replace(backlog_s=4)], key=earliest_finish) is slow
