"""Warm spares: what else is ready where, and that it is in nobody's way."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from adapt.planning.placement import Plan, StageNeed
from adapt.protocol.ids import Digest, Epoch, WorkerId
from adapt.scheduling import events as ev
from adapt.scheduling.liveness import Verdict
from adapt.scheduling.residency import SPARELESS_S, Residency
from adapt.scheduling.roster import Member, Roster

STAGE_BYTES = 10


class House:
    """A residency whose workers load at once what they are asked for. Stages are named `model.stage`."""

    def __init__(self, *workers: str, budget_bytes: int = 100, spares: int = 1) -> None:
        self.roster, self.actions, self.now = Roster(), [], 0.0
        self.residency = Residency(self.roster, self.actions, woken=lambda: None, load_timeout_s=10, spares=spares)
        self.done: list[ev.Action] = []
        for name in workers:
            self.join(name, budget_bytes=budget_bytes)

    def member(self, name: str) -> Member:
        return self.roster.member(WorkerId(name))

    def join(self, name: str, *resident: str, budget_bytes: int = 100, numeric_class: str = "x") -> None:
        member = self.member(name)
        self.residency.session_ended(member)
        member.join(numeric_class=numeric_class, stage_budget_bytes=budget_bytes, credit=2, resident=frozenset(map(Digest, resident)))
        member.verdict = Verdict.READY
        self.residency.joined(member, self.now)

    def lose(self, name: str) -> None:
        member = self.member(name)
        member.verdict = Verdict.LOST
        self.residency.session_ended(member)
        self.residency.left(member, self.now)

    def deploy(self, number: int, *places: str, model: str = "m", is_exact: bool = False) -> None:
        needs = tuple(StageNeed(artifact=Digest(f"{model}.{i}"), memory_bytes=STAGE_BYTES, cost_s=1.0) for i in range(len(places)))
        plan = Plan(program=Digest(model), epoch=Epoch(1), stages=needs, places=tuple(tuple(map(WorkerId, p.split())) for p in places))
        version = ev.Version(deployment="d", number=number, program=Digest(model), codec="raw", tolerance=None, exact=is_exact, plan=plan)
        self.residency.deploy(version, self.now)

    def settle(self) -> None:
        """Everything that is asked for is loaded, one after the other, until nothing more is."""
        while True:
            if self.residency.has_spares_to_tend:
                self.residency.tend_spares(self.now)
            actions, self.actions[:] = list(self.actions), []
            self.done += actions
            loads = [action for action in actions if isinstance(action, ev.Load)]
            for load in loads:
                self.residency.resident(self.member(load.worker_id), load.artifact)
            if not loads and not self.residency.has_spares_to_tend:
                return

    def is_coming(self, stage: int) -> bool:
        return self.residency.is_coming(self.residency.find("d", 0, None), stage, lambda member: True, self.now)

    def resident(self, name: str) -> set[str]:
        return set(self.member(name).resident)

    def places(self) -> tuple:
        return self.residency.find("d", 0, None).plan.places


def test_each_stage_is_ready_on_a_second_worker_and_no_task_goes_there():
    house = House("w1", "w2")
    house.deploy(1, "w1", "w2")
    house.settle()
    assert house.resident("w1") == house.resident("w2") == {"m.0", "m.1"}
    assert house.places() == (("w1",), ("w2",))
    assert (set(house.member("w1").spares), set(house.member("w2").spares)) == ({"m.1"}, {"m.0"})


def test_none_are_loaded_before_a_version_is_ready_nor_two_at_a_time():
    house = House("w1", "w2", "w3")
    house.deploy(1, "w1", "w2")
    house.residency.resident(house.member("w1"), Digest("m.0"))
    house.residency.tend_spares(house.now)
    assert not any(house.member(name).spares for name in ("w1", "w2", "w3"))
    house.residency.resident(house.member("w2"), Digest("m.1"))
    house.actions.clear()
    house.residency.tend_spares(house.now)
    house.residency.tend_spares(house.now)
    assert house.actions == [ev.Load(worker_id=WorkerId("w3"), artifact=Digest("m.0"))], "where most room is left"


def test_a_loss_costs_no_load():
    house = House("w1", "w2")
    house.deploy(1, "w1", "w2")
    house.settle()
    house.done.clear()
    house.lose("w1")
    assert house.places() == (("w2",), ("w2",)), "before its room can be given to something else"
    house.settle()
    assert not [action for action in house.done if isinstance(action, ev.Load)]
    assert house.residency.spares_used == 1 and not house.member("w2").spares


def test_a_stage_on_two_workers_needs_no_spare():
    house = House("w1", "w2", "w3")
    house.deploy(1, "w1 w2")
    house.settle()
    assert house.resident("w3") == set()


def test_more_can_be_wanted_or_none():
    house = House("w1", "w2", "w3", spares=2)
    house.deploy(1, "w1")
    house.settle()
    assert [house.resident(name) for name in ("w1", "w2", "w3")] == [{"m.0"}] * 3
    house = House("w1", "w2", spares=0)
    house.deploy(1, "w1")
    house.settle()
    assert house.resident("w2") == set()


def test_spares_give_way_to_what_is_deployed():
    house = House("w1", "w2", budget_bytes=2 * STAGE_BYTES)
    house.deploy(1, "w1", "w2")
    house.settle()
    house.done.clear()
    house.deploy(2, "w1", model="n")
    house.residency.tend_spares(house.now)
    orders = [action for action in house.actions if isinstance(action, ev.Load | ev.Unload) and action.worker_id == "w1"]
    assert orders == [
        ev.Unload(worker_id=WorkerId("w1"), artifact=Digest("m.1")),
        ev.Load(worker_id=WorkerId("w1"), artifact=Digest("n.0")),
    ]
    house.settle()
    assert house.resident("w1") == {"n.0"} and house.resident("w2") == {"n.0"}, "the first version and its spares are gone"


def test_a_stage_that_was_a_spare_may_be_planned_there():
    house = House("w1", "w2", budget_bytes=2 * STAGE_BYTES)
    house.deploy(1, "w1", "w2")
    house.settle()
    house.deploy(2, "w2", "w1")  # the same stages the other way round
    house.settle()
    assert (house.resident("w1"), house.resident("w2")) == ({"m.0", "m.1"},) * 2
    assert (set(house.member("w1").spares), set(house.member("w2").spares)) == ({"m.0"}, {"m.1"})


def test_a_worker_that_comes_back_has_its_spares_still():
    house = House("w1", "w2")
    house.deploy(1, "w1", "w2")
    house.settle()
    house.done.clear()
    house.join("w1", "m.0", "m.1")
    house.settle()
    assert house.places() == (("w1",), ("w2",)) and set(house.member("w1").spares) == {"m.1"} and not house.done
    house.join("w1", "m.0")  # it has lost it
    house.settle()
    assert set(house.member("w1").spares) == {"m.1"} and house.done == [ev.Load(worker_id=WorkerId("w1"), artifact=Digest("m.1"))]


def test_after_a_restart_of_the_dispatcher_they_are_spares_still():
    house = House()
    for name in ("w1", "w2"):
        house.member(name)  # expected, and not there yet
    house.deploy(1, "w1", "w2")
    house.join("w1", "m.0", "m.1")
    house.join("w2", "m.0", "m.1")
    house.settle()
    assert house.places() == (("w1",), ("w2",)) and not house.done[1:]
    assert (set(house.member("w1").spares), set(house.member("w2").spares)) == ({"m.1"}, {"m.0"})


def test_a_spare_of_what_nobody_has_is_used_when_its_worker_comes_back():
    house = House("w1", "w2")
    house.deploy(1, "w1", "w2")
    house.settle()
    house.member("w2").verdict = Verdict.SUSPECT
    house.lose("w1")
    assert house.places() == ((), ("w2",))
    house.join("w2", "m.0", "m.1")
    assert house.places() == (("w2",), ("w2",))


def test_what_is_told_and_nobody_waits_for_is_unloaded():
    house = House("w1", "w2", budget_bytes=2 * STAGE_BYTES)
    house.deploy(1, "w1")
    house.residency.resident(house.member("w1"), Digest("m.0"))
    house.residency.tend_spares(house.now)
    house.deploy(1, "w2 w1", "w2", model="n")  # the spare of w2 gives way while it is being loaded
    assert not house.member("w2").spares
    house.actions.clear()
    house.residency.resident(house.member("w2"), Digest("m.0"))  # that had been said before
    assert house.actions == [ev.Unload(worker_id=WorkerId("w2"), artifact=Digest("m.0"))]
    assert "m.0" not in house.member("w2").resident


def test_what_is_loaded_after_it_was_given_up_is_a_spare():
    house = House("w1", "w2")
    house.deploy(1, "w1")
    house.residency.resident(house.member("w1"), Digest("m.0"))
    house.residency.tend_spares(house.now)
    house.residency.refused(house.member("w2"), Digest("m.0"), ValueError("no progress"), house.now)
    house.residency.resident(house.member("w2"), Digest("m.0"))
    assert house.member("w2").spares == {"m.0": STAGE_BYTES} and house.resident("w2") == {"m.0"}


def test_a_worker_that_has_missed_the_end_of_a_version_is_told():
    house = House("w1")
    house.deploy(1, "w1")
    house.settle()
    house.actions.clear()
    house.join("w1", "m.0", "old.0")
    assert house.actions == [ev.Unload(worker_id=WorkerId("w1"), artifact=Digest("old.0"))]


def test_what_is_planned_where_it_was_a_spare_is_not_loaded_again():
    house = House("w1", "w2", budget_bytes=2 * STAGE_BYTES)
    house.deploy(1, "w1", "w2")
    house.settle()
    house.done.clear()
    house.deploy(2, "w2", "w1")
    house.settle()
    assert not [action for action in house.done if isinstance(action, ev.Load | ev.Unload)]


def test_where_bits_have_to_agree_the_spare_is_of_the_same_class():
    house = House("w1")
    house.join("w2", numeric_class="y")
    house.join("w3", budget_bytes=STAGE_BYTES)
    house.deploy(1, "w1", is_exact=True)
    house.settle()
    assert (house.resident("w2"), house.resident("w3")) == (set(), {"m.0"})


def test_a_spare_that_cannot_be_loaded_is_tried_elsewhere():
    house = House("w1", "w2", "w3")
    house.deploy(1, "w1")
    house.residency.resident(house.member("w1"), Digest("m.0"))
    house.residency.tend_spares(house.now)
    house.residency.refused(house.member("w2"), Digest("m.0"), ValueError("disk full"), house.now)
    house.actions.clear()
    house.settle()
    assert (house.resident("w2"), house.resident("w3")) == (set(), {"m.0"})
    assert not house.member("w2").spares


def test_a_worker_that_is_to_measure_has_none_for_a_while():
    house = House("w1", "w2")
    house.deploy(1, "w1", "w2")
    house.settle()
    house.residency.without_spares(WorkerId("w1"), house.now)
    house.settle()
    assert house.resident("w1") == {"m.0"}
    house.now += SPARELESS_S
    house.residency.tend_spares(house.now)
    house.settle()
    assert house.resident("w1") == {"m.0", "m.1"}


@given(st.data())
def test_no_budget_is_ever_exceeded_and_in_the_end_nothing_is_lacking_that_there_is_room_for(data):
    budgets = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    names = [f"w{number}" for number in range(len(budgets))]
    house = House()
    for name, budget in zip(names, budgets, strict=True):
        house.join(name, budget_bytes=budget * STAGE_BYTES)
    for number in range(1, data.draw(st.integers(1, 4)) + 1):
        offers = {name: house.residency.offer(house.member(name)).free_bytes // STAGE_BYTES for name in names}
        roomy = [name for name in names for _ in range(max(offers[name], 0))]
        if roomy:
            stages = data.draw(st.integers(1, min(3, len(roomy))))
            house.deploy(number, *data.draw(st.permutations(roomy))[:stages], model=data.draw(st.sampled_from("mno")))
        house.settle()
        for name, budget in zip(names, budgets, strict=True):
            member = house.member(name)
            assert len(member.resident) <= budget and set(member.spares) <= member.resident
    for name in names:
        member = house.member(name)
        lacking = {need.artifact for live in house.residency.current() for need in live.plan.stages} - member.resident
        others = {artifact for other in names if other != name for artifact in house.member(other).resident}
        for artifact in lacking & others:
            having = sum(artifact in house.member(other).resident for other in names)
            assert having >= 2 or len(member.resident) * STAGE_BYTES + STAGE_BYTES > member.stage_budget_bytes
