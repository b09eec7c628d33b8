from __future__ import annotations

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from adapt.errors import PlanError
from adapt.planning.placement import MEBIBYTE, WORTH_A_COPY, Plan, StageNeed, WorkerOffer, addition, place, place_apart, relief, substitute
from adapt.protocol.ids import Digest, Epoch, WorkerId

MIB = MEBIBYTE
NEEDS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4)), min_size=1, max_size=6)
OFFERS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4), st.sampled_from([0.5, 1.0, 2.0])), min_size=1, max_size=4)


def needs_of(pairs) -> list[StageNeed]:
    return [StageNeed(artifact=Digest(f"s{i}"), memory_bytes=memory * MIB, cost_s=cost) for i, (memory, cost) in enumerate(pairs)]


def offers_of(triples) -> list[WorkerOffer]:
    return [
        WorkerOffer(worker_id=WorkerId(f"w{i}"), free_bytes=free * MIB, load_s=load, slowness=slowness)
        for i, (free, load, slowness) in enumerate(triples)
    ]


def plan_of(needs: list[StageNeed], places) -> Plan:
    return Plan(program=Digest("p"), epoch=Epoch(1), stages=tuple(needs), places=tuple(tuple(WorkerId(w) for w in at) for at in places))


# ── place ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(NEEDS, OFFERS)
def test_every_stage_has_a_worker_and_no_worker_more_than_its_memory(pairs, triples):
    needs, offers = needs_of(pairs), offers_of(triples)
    free = {offer.worker_id: offer.free_bytes for offer in offers}
    try:
        places = place(needs, offers)
    except PlanError as error:
        match = re.search(r"stage (\d+) of (\d+): it needs ([\d.]+) MiB, .* is (-?[\d.]+) MiB \((\w+)\)", str(error))
        assert match is not None, f"stage, need and best offer are named: {error}"
        index, count, need_mib, best_mib, worker_id = match.groups()
        assert int(count) == len(needs)
        assert float(need_mib) == needs[int(index)].memory_bytes / MIB > float(best_mib), "it truly does not fit"
        assert float(best_mib) * MIB <= free[WorkerId(worker_id)]
        return
    assert len(places) == len(needs)
    stages_of = {worker_id: [index for index, at in enumerate(places) if worker_id in at] for worker_id in free}
    for need, workers in zip(needs, places, strict=True):
        assert 1 <= len(workers) == len(set(workers))
        assert all(len(stages_of[worker]) == 1 for worker in workers[1:]), "only who has nothing else relieves"
        for worker in workers:
            free[worker] -= need.memory_bytes
    assert all(left >= 0 for left in free.values())
    least = min(need.memory_bytes for need in needs)
    assert all(stages or free[worker_id] < least for worker_id, stages in stages_of.items()), "nobody with room for a stage is left idle"


@given(NEEDS, OFFERS, st.randoms(use_true_random=False))
def test_the_order_of_the_offers_does_not_matter(pairs, triples, random):
    needs, offers = needs_of(pairs), offers_of(triples)
    try:
        expected = place(needs, offers)
    except PlanError:
        assume(False)
    assert place(needs, random.sample(offers, len(offers))) == expected


@given(NEEDS, st.integers(1, 4))
def test_equal_workers_with_room_share_the_work(pairs, workers):
    """Each stage goes where the load is least, shared with whoever has none: the busiest stands above the idlest by one stage at most."""
    needs = needs_of(pairs)
    load_s = {f"w{i}": 0.0 for i in range(workers)}
    places = place(needs, offers_of([(99, 0, 1.0)] * workers))
    for need, at in zip(needs, places, strict=True):
        for worker_id in at:
            load_s[worker_id] += need.cost_s / len(at)
    assert max(load_s.values()) - min(load_s.values()) <= max(need.cost_s for need in needs)
    assert {worker_id for at in places for worker_id in at} == load_s.keys()


@given(st.integers(1, 4), st.integers(1, 3))
def test_stages_of_equal_cost_have_as_many_workers_each(stages, times):
    places = place(needs_of([(1, 2)] * stages), offers_of([(9, 0, 1.0)] * (stages * times)))
    assert [len(at) for at in places] == [times] * stages


def test_who_is_left_over_relieves_the_busiest_that_it_has_room_to_relieve():
    needs = needs_of([(6, 4), (2, 3), (1, 1)])
    offers = offers_of([(6, 0, 1.0), (2, 0, 1.0), (9, 0, 1.0), (2, 1, 1.0), (0, 1, 1.0)])
    assert place(needs, offers) == (("w2",), ("w0", "w3"), ("w1",)), "w3 has no room for the costliest, w4 for none"


def test_of_numeric_classes_each_gets_all_stages_or_none():
    needs = [StageNeed(artifact=Digest(name), memory_bytes=10, cost_s=1.0) for name in "abc"]
    offers = [
        WorkerOffer(worker_id=WorkerId(f"{kind}{number}"), free_bytes=room, numeric_class=kind)
        for kind, room, count in (("x", 10, 3), ("y", 30, 1), ("z", 10, 2))
        for number in range(count)
    ]
    places = place_apart(needs, offers)
    assert {frozenset(worker[0] for worker in workers) for workers in places} == {frozenset("xy")}
    assert all(len([worker for worker in workers if worker[0] == "x"]) == 1 for workers in places)
    with pytest.raises(PlanError, match="stage"):
        place_apart(needs, [offer for offer in offers if offer.numeric_class == "z"])
    with pytest.raises(PlanError, match="no worker is connected"):
        place_apart(needs, [])


def test_no_worker_at_all_says_how_to_start_one():
    with pytest.raises(PlanError, match="adapt-worker --dispatcher"):
        place(needs_of([(1, 1)]), [])


def test_the_error_says_what_would_have_been_enough():
    with pytest.raises(PlanError, match=r"stage 1 of 2: it needs 5\.0 MiB, .* 4\.0 MiB \(w1\); raise --memory-limit"):
        place(needs_of([(1, 1), (5, 1)]), offers_of([(2, 0, 1.0), (4, 0, 1.0)]))


def test_a_stage_that_fits_exactly_fits():
    assert place(needs_of([(4, 1)]), offers_of([(4, 0, 1.0)])) == (("w0",),)


def test_a_tight_fit_is_not_spoilt_by_a_loose_one():
    """By cost alone the small stage would take the only worker with room for the large one."""
    assert place(needs_of([(2, 4), (6, 1)]), offers_of([(2, 0, 1.0), (6, 0, 0.5)])) == (("w0",), ("w1",))


def test_a_slow_or_busy_worker_is_given_less():
    assert place(needs_of([(1, 2)]), offers_of([(9, 0, 2.0), (9, 0, 1.0)])) == (("w1", "w0"),)  # the other one relieves it
    assert place(needs_of([(1, 2)]), offers_of([(9, 3, 1.0), (9, 0, 1.0)])) == (("w1", "w0"),)
    assert place(needs_of([(1, 2)]), offers_of([(9, 1, 1.0), (9, 0, 2.0)])) == (("w0", "w1"),)  # 1 + 2 before 0 + 4
    assert place(needs_of([(1, 2)] * 3), offers_of([(9, 0, 2.0), (9, 0, 1.0)])) == (("w1",), ("w0",), ("w1",))


# ── substitute ───────────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.integers(0, 6), st.integers(0, 4), OFFERS)
def test_a_substitute_has_the_memory_and_finishes_first(memory, cost, triples):
    need, offers = needs_of([(memory, cost)])[0], {offer.worker_id: offer for offer in offers_of(triples)}
    chosen = substitute(need, list(offers.values()))
    fitting = [offer for offer in offers.values() if offer.free_bytes >= need.memory_bytes]
    if chosen is None:
        assert not fitting
        return
    assert offers[chosen] in fitting
    finish = {offer.worker_id: offer.load_s + need.cost_s * offer.slowness for offer in fitting}
    assert finish[chosen] == min(finish.values())
    assert chosen == min(worker for worker in finish if finish[worker] == finish[chosen])


def test_nobody_substitutes_where_nobody_is():
    assert substitute(needs_of([(0, 0)])[0], []) is None


# ── relief ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@st.composite
def plans(draw):
    needs = needs_of(draw(NEEDS))
    workers = st.lists(st.sampled_from(["a", "b", "c"]), unique=True, max_size=3)
    return plan_of(needs, [draw(workers) for _ in needs])


@given(plans(), st.integers(0, 8))
def test_a_newcomer_relieves_the_busiest_worker_it_has_room_to_relieve(plan, free):
    newcomer = WorkerOffer(worker_id=WorkerId("new"), free_bytes=free * MIB)
    chosen = relief(plan, newcomer)
    share_s = [need.cost_s / max(len(at), 1) for need, at in zip(plan.stages, plan.places, strict=True)]
    fitting = [i for i, need in enumerate(plan.stages) if need.memory_bytes <= newcomer.free_bytes and plan.places[i]]
    if chosen is None:
        assert not fitting
        return
    assert chosen in fitting, "never above memory, and nobody is relieved where nobody works"
    load_s = {worker: sum(s for s, at in zip(share_s, plan.places, strict=True) if worker in at) for at in plan.places for worker in at}
    helped = max(load_s[worker] for worker in plan.places[chosen])
    assert helped == max(load_s[worker] for i in fitting for worker in plan.places[i]), "the busiest of those it can help"
    assert any(
        load_s[worker] == helped and share_s[chosen] == max(share_s[i] for i in fitting if worker in plan.places[i])
        for worker in plan.places[chosen]
    ), "by its costliest stage"


def test_a_worker_of_the_plan_is_no_newcomer():
    plan = plan_of(needs_of([(1, 1), (1, 3)]), [["a"], ["b"]])
    assert relief(plan, WorkerOffer(worker_id=WorkerId("a"), free_bytes=9 * MIB)) is None


def test_replicas_count_by_their_share():
    plan = plan_of(needs_of([(1, 4), (1, 3)]), [["a", "b"], ["c"]])  # 2 each, and 3
    assert relief(plan, WorkerOffer(worker_id=WorkerId("new"), free_bytes=9 * MIB)) == 1


def test_without_room_for_the_costliest_the_next_is_taken():
    plan = plan_of(needs_of([(5, 4), (1, 1), (1, 2)]), [["a"], ["a"], ["b"]])
    assert relief(plan, WorkerOffer(worker_id=WorkerId("new"), free_bytes=1 * MIB)) == 1
    assert relief(plan, WorkerOffer(worker_id=WorkerId("new"), free_bytes=0)) is None


# ── help for a slow worker ───────────────────────────────────────────────────────────────────────────────────────────

TWO = plan_of(needs_of([(1, 2), (1, 2)]), [["w0"], ["w1"]])
IDLE = WorkerOffer(worker_id=WorkerId("idle"), free_bytes=MIB)


def seconds(**facts: float) -> dict[tuple[int, WorkerId], float]:
    """`w0_1=3.0`: stage 1 takes worker w0 three seconds."""
    return {(int(name.partition("_")[2]), WorkerId(name.partition("_")[0])): taken for name, taken in facts.items()}


def test_a_worker_that_has_become_slow_gets_help_from_who_is_idle():
    assert addition(TWO, seconds(w0_0=20.0, w1_1=2.0), [IDLE]) == (0, "idle")
    assert addition(TWO, seconds(w0_0=20.0, w1_1=2.0), offers_of([(9, 0, 1), (9, 0, 1)])) == (0, "w1"), (
        "or from who is busy, but not so much"
    )


def test_of_two_that_are_equally_slow_one_is_helped_after_the_other():
    assert addition(TWO, seconds(w0_0=20.0, w1_1=20.0), [IDLE]) == (1, "idle")
    helped, idle = TWO.added(1, WorkerId("idle")), WorkerOffer(worker_id=WorkerId("idle"), free_bytes=MIB)
    assert addition(helped, seconds(w0_0=20.0, w1_1=20.0, idle_1=2.0), [idle]) == (0, "idle")


def test_of_equal_workers_nobody_needs_help():
    assert addition(TWO, seconds(w0_0=2.0, w1_1=2.1), offers_of([(9, 0, 1), (9, 0, 1)])) is None
    assert addition(TWO, seconds(w0_0=2.0), [IDLE]) is None, "a stage that nobody has is another matter"
    assert addition(TWO, seconds(w0_0=20.0, w1_1=2.0), [WorkerOffer(worker_id=WorkerId("idle"), free_bytes=MIB - 1)]) is None, "no room"


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 20)), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, 9), st.just(0), st.sampled_from([0.5, 1.0, 2.0])), min_size=1, max_size=4),
    st.data(),
)
def test_a_copy_is_made_only_where_it_is_worth_it_and_copying_ends(needs, triples, data):
    offers = offers_of(triples)
    names = [offer.worker_id for offer in offers]
    plan = plan_of(needs_of(needs), [[data.draw(st.sampled_from(names))] for _ in needs])
    taken = {(stage, at[0]): data.draw(st.integers(1, 100)) * 0.5 for stage, at in enumerate(plan.places)}
    before = busy_s(plan, taken)
    for _ in range(len(needs) * len(names)):
        found = addition(plan, taken, offers)
        if found is None:
            break
        stage, worker = found
        offer = next(offer for offer in offers if offer.worker_id == worker)
        assert worker not in plan.places[stage] and offer.free_bytes >= plan.stages[stage].memory_bytes
        plan, taken = plan.added(stage, worker), {**taken, found: plan.stages[stage].cost_s * offer.slowness}
        after = busy_s(plan, taken)
        busiest = max(before, key=lambda name: (before[name], name))
        assert after[busiest] * (1 + WORTH_A_COPY) < before[busiest] and after[worker] < before[busiest]
        before = after
    assert addition(plan, taken, offers) is None


def busy_s(plan: Plan, taken) -> dict[WorkerId, float]:
    busy = dict.fromkeys({worker for _, worker in taken}, 0.0)
    for stage, at in enumerate(plan.places):
        for worker in at:
            busy[worker] += 1 / sum(1 / taken[stage, other] for other in at)
    return busy


# ── the plan ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(plans(), st.sampled_from(["a", "b", "c", "d"]))
def test_a_plan_is_never_changed_but_followed_by_the_next_epoch(plan, worker):
    before, worker_id = plan.places, WorkerId(worker)
    removed = plan.removed(worker_id)
    if any(worker_id in at for at in before):
        assert removed.epoch == plan.epoch + 1
        assert removed.places == tuple(tuple(w for w in at if w != worker_id) for at in before)
    else:
        assert removed is plan, "nothing has changed"
    added = plan.added(0, worker_id)
    assert (added.epoch, added.places) == (plan.epoch + 1, ((*before[0], worker_id), *before[1:]))
    dropped = added.dropped(0, worker_id)
    assert (dropped.epoch, dropped.places[1:]) == (plan.epoch + 2, before[1:])
    assert worker_id not in dropped.places[0]
    assert plan.places == before and plan.stages == dropped.stages
