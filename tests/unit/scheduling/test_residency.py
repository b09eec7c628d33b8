"""Versions, their plans, and what is loaded where: without requests, the scheduler is not needed for it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapt.errors import AdaptError, UnknownModelError
from adapt.planning.placement import Plan, StageNeed
from adapt.protocol.ids import Digest, Epoch, WorkerId
from adapt.scheduling import events as ev
from adapt.scheduling.liveness import Verdict
from adapt.scheduling.residency import Residency
from adapt.scheduling.roster import Member, Roster, Service

LOAD_TIMEOUT_S = 10
DISK_FULL = AdaptError("disk full")


class House:
    """A residency with its surroundings. Stages are named `model.stage`; each takes 10 bytes and a second."""

    def __init__(self, *workers: str, budget_bytes: int = 100) -> None:
        self.roster, self.actions, self.wakes, self.now = Roster(), [], 0, 0
        self.residency = Residency(self.roster, self.actions, woken=self.woken, load_timeout_s=LOAD_TIMEOUT_S)
        for name in workers:
            self.join(name, budget_bytes=budget_bytes)
        self.taken()

    def woken(self) -> None:
        self.wakes += 1

    def taken(self) -> list[ev.Action]:
        """The actions since the last look."""
        actions = list(self.actions)
        self.actions.clear()
        return actions

    def member(self, name: str) -> Member:
        return self.roster.member(WorkerId(name))

    def join(self, name: str, *resident: str, budget_bytes: int = 100) -> None:
        member = self.member(name)
        member.join(numeric_class="x", stage_budget_bytes=budget_bytes, credit=2, resident=frozenset(map(Digest, resident)))
        member.verdict = Verdict.READY
        self.residency.joined(member, self.now)

    def deploy(
        self, number: int, *places: str, model: str = "m", deployment: str = "d", is_exact: bool = False, cut: int = 0
    ) -> ev.Version:
        """A version with one stage per place; a place lists its workers, separated by blanks."""
        version = ev.Version(
            deployment=deployment,
            number=number,
            cut=cut,
            program=Digest(model),
            codec="raw",
            tolerance=None,
            exact=is_exact,
            plan=Plan(
                program=Digest(model),
                epoch=Epoch(1),
                stages=tuple(StageNeed(artifact=Digest(f"{model}.{i}"), memory_bytes=10, cost_s=1.0) for i in range(len(places))),
                places=tuple(tuple(map(WorkerId, place.split())) for place in places),
            ),
        )
        self.residency.deploy(version, self.now)
        return version

    def load(self, name: str, artifact: str) -> None:
        assert artifact in self.member(name).loading
        self.residency.resident(self.member(name), Digest(artifact))

    def refuse(self, name: str, artifact: str) -> None:
        self.residency.refused(self.member(name), Digest(artifact), DISK_FULL, self.now)

    def is_coming(self, deployment: str, stage: int, suits=lambda member: True) -> bool:
        return self.residency.is_coming(self.residency.find(deployment, 0, None), stage, suits, self.now)

    def places(self, deployment: str = "d", number: int = 0) -> tuple:
        return self.residency.find(deployment, number, None).plan.places


def loads(*pairs: tuple[str, str]) -> list[ev.Load]:
    return [ev.Load(worker_id=WorkerId(worker), artifact=Digest(artifact)) for worker, artifact in pairs]


# ── versions come and go ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_version_is_ready_once_when_every_stage_is_resident_somewhere():
    house = House("w1", "w2")
    version = house.deploy(1, "w1 w2", "w2")
    assert house.taken() == loads(("w1", "m.0"), ("w2", "m.0"), ("w2", "m.1"))
    house.load("w2", "m.1")
    assert house.taken() == []
    house.load("w1", "m.0")
    assert house.taken() == [ev.VersionReady(version=version)]
    house.load("w2", "m.0")
    assert house.taken() == []
    assert house.wakes >= 3, "whoever waits is told of each"


def test_what_a_worker_has_is_not_sent_again():
    """Regression: the published system sent the weights with every task."""
    house = House("w1")
    first = house.deploy(1, "w1")
    house.load("w1", "m.0")
    house.taken()
    second = house.deploy(2, "w1")  # the same model anew
    assert house.taken() == [ev.VersionReady(version=second), ev.VersionReleased(version=first)]
    house.join("w1", "m.0")  # and after a new session
    assert house.taken() == []


def test_a_new_version_takes_over_only_when_it_is_ready():
    house = House("w1")
    first = house.deploy(1, "w1", model="old")
    house.load("w1", "old.0")
    house.deploy(2, "w1", model="new")
    assert house.residency.find("d", 0, None).version.number == 1
    house.taken()
    house.load("w1", "new.0")
    assert house.residency.find("d", 0, None).version.number == 2
    ready, unload, released = house.taken()
    assert ready.version.number == 2
    assert unload == ev.Unload(worker_id=WorkerId("w1"), artifact=Digest("old.0"))
    assert released == ev.VersionReleased(version=first)
    assert "old.0" not in house.member("w1").resident


def test_a_replaced_version_stays_until_its_last_request_has_ended():
    house = House("w1")
    first = house.deploy(1, "w1", model="old")
    house.load("w1", "old.0")
    for _ in range(2):
        house.residency.request_began(house.residency.live(first))
    house.deploy(2, "w1", model="new")
    house.load("w1", "new.0")
    house.residency.request_ended(first)
    assert house.residency.find("d", 1, None).version.number == 1, "by its number it is found still"
    house.taken()
    house.residency.request_ended(first)
    assert house.taken()[-1] == ev.VersionReleased(version=first)
    with pytest.raises(UnknownModelError):
        house.residency.find("d", 1, None)
    assert house.residency.places(("d", 1, 0, 0)) == ()


# ── a version is cut anew ────────────────────────────────────────────────────────────────────────────────────────────


def test_another_cut_takes_over_when_it_is_resident_under_the_same_number_and_a_later_epoch():
    house = House("w1", "w2")
    first = house.deploy(1, "w1", model="old")
    house.load("w1", "old.0")
    house.residency.request_began(house.residency.live(first))
    house.join("w3")  # the present plan changes meanwhile
    assert house.places() == (("w1", "w3"),)
    second = house.deploy(1, "w2", "w1", model="new", cut=1)
    house.taken()
    house.load("w2", "new.0")
    assert house.residency.find("d", 0, None).version == house.residency.find("d", 1, None).version == first
    house.load("w1", "new.1")
    changed, ready = house.taken()
    assert isinstance(changed, ev.PlanChanged) and ready == ev.VersionReady(version=changed.version)
    assert changed.version == second and changed.version.plan.epoch > house.residency.live(first).plan.epoch == 2
    for number in (0, 1):
        assert house.residency.find("d", number, None).version == second
    assert [live.version for live in house.residency.current()] == [second]
    house.residency.request_ended(first)
    assert house.taken()[-1] == ev.VersionReleased(version=first)
    assert house.residency.find("d", 1, None).version == second


def test_another_cut_that_cannot_be_loaded_leaves_the_present_one_to_serve():
    house = House("w1")
    first = house.deploy(1, "w1", model="old")
    house.load("w1", "old.0")
    second = house.deploy(1, "w1", "w1", model="new", cut=1)
    house.load("w1", "new.0")
    house.taken()
    house.refuse("w1", "new.1")
    failed, *unloaded, released = [action for action in house.taken() if not isinstance(action, ev.PlanChanged)]
    assert isinstance(failed, ev.VersionFailed) and failed.version == second and released == ev.VersionReleased(version=failed.version)
    assert unloaded == [ev.Unload(worker_id=WorkerId("w1"), artifact=Digest("new.0"))]
    assert house.residency.find("d", 0, None).version == first and house.member("w1").resident == {"old.0"}


def test_another_cut_is_withdrawn_without_the_present_one():
    house = House("w1")
    first = house.deploy(1, "w1", model="old")
    house.load("w1", "old.0")
    second = house.deploy(1, "w1", model="new", cut=1)
    house.residency.withdraw(second.key)
    assert ev.VersionReleased(version=second) in house.taken()
    house.residency.withdraw(first.key)  # it is ready
    assert house.residency.find("d", 0, None).version == first


@pytest.mark.parametrize("how", ["undeployed", "replaced"])
def test_no_other_cut_of_what_takes_no_requests_any_more(how):
    house = House("w1")
    house.deploy(1, "w1", model="old")
    house.load("w1", "old.0")
    if how == "undeployed":
        house.residency.undeploy("d")
    else:
        house.deploy(2, "w1", model="next")
        house.load("w1", "next.0")
    house.taken()
    late = house.deploy(1, "w1", model="new", cut=1)
    failed, released = house.taken()
    assert isinstance(failed, ev.VersionFailed) and released == ev.VersionReleased(version=late)
    assert [live.version.number for live in house.residency.current()] == ([2] if how == "replaced" else [])


def test_a_newer_version_replaces_all_cuts_of_an_older_one():
    house = House("w1")
    house.deploy(1, "w1", model="old")
    house.load("w1", "old.0")
    house.deploy(1, "w1", model="new", cut=1)
    house.deploy(2, "w1", model="next")
    house.load("w1", "next.0")
    assert [live.version.key for live in house.residency.current()] == [("d", 2, 0)]
    assert house.member("w1").resident == {"next.0"} and not house.member("w1").loading


def test_stages_that_another_version_shares_are_kept():
    house = House("w1")
    house.deploy(1, "w1", "w1", deployment="one")
    house.deploy(1, "w1", "w1", deployment="two")
    for artifact in ("m.0", "m.1"):
        house.load("w1", artifact)
    house.taken()
    house.residency.undeploy("one")
    assert [type(action) for action in house.taken()] == [ev.VersionReleased]
    house.residency.undeploy("two")
    assert [type(action) for action in house.taken()] == [ev.Unload, ev.Unload, ev.VersionReleased]
    assert house.member("w1").resident == set()


def test_a_stage_that_is_still_loading_is_unloaded_too():
    house = House("w1")
    house.deploy(1, "w1")
    house.taken()
    house.residency.undeploy("d")
    assert ev.Unload(worker_id=WorkerId("w1"), artifact=Digest("m.0")) in house.taken()
    assert house.residency.next_wakeup() is None


def test_an_unknown_name_and_another_program_are_refused_with_a_hint():
    house = House("w1")
    house.deploy(1, "w1")
    with pytest.raises(UnknownModelError, match="did you mean d"):
        house.residency.find("e", 0, None)
    with pytest.raises(UnknownModelError, match="with program other"):
        house.residency.find("d", 1, Digest("other"))
    with pytest.raises(UnknownModelError):
        house.residency.find("d", 2, None)
    assert house.residency.find("d", 0, Digest("m")).version.number == 1


def test_a_version_that_outlives_a_failed_one_takes_over_when_it_is_ready():
    house = House("w1")
    house.deploy(1, "w1", model="bad")
    house.deploy(2, "w1", model="good")
    house.refuse("w1", "bad.0")
    house.load("w1", "good.0")
    assert any(isinstance(action, ev.VersionReady) and action.version.number == 2 for action in house.taken())
    assert house.residency.find("d", 0, None).version.number == 2


def test_what_is_undeployed_while_it_loads_does_not_come_back():
    house = House("w1")
    house.deploy(1, "w1", model="old")
    house.load("w1", "old.0")
    house.deploy(2, "w1", model="new")
    house.residency.undeploy("d")
    released = [action.version.number for action in house.taken() if isinstance(action, ev.VersionReleased)]
    assert sorted(released) == [1, 2]
    assert house.member("w1").loading == set()
    with pytest.raises(UnknownModelError):
        house.residency.find("d", 0, None)


# ── loads that fail ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_refused_load_goes_to_another_worker_and_never_back():
    house = House("w1", "w2")
    house.deploy(1, "w1")
    house.taken()
    house.refuse("w1", "m.0")
    assert house.places() == (("w2",),)
    assert loads(("w2", "m.0"))[0] in house.taken()
    house.refuse("w2", "m.0")
    failed = [action for action in house.taken() if isinstance(action, ev.VersionFailed)]
    assert [action.error for action in failed] == [DISK_FULL]
    with pytest.raises(UnknownModelError):
        house.residency.find("d", 0, None)
    assert house.residency.loads_failed == 2


def test_a_version_with_another_replica_does_not_fail():
    house = House("w1", "w2")
    house.deploy(1, "w1 w2")
    house.refuse("w1", "m.0")
    assert not any(isinstance(action, ev.VersionFailed) for action in house.taken())
    assert house.places() == (("w2",),)


def test_a_version_that_was_ready_never_fails():
    house = House("w1")
    house.deploy(1, "w1")
    house.load("w1", "m.0")
    house.refuse("w1", "m.0")
    assert not any(isinstance(action, ev.VersionFailed) for action in house.taken())
    assert house.places() == ((),)
    assert not house.is_coming("d", 0)
    house.join("w1")  # a new session: it may have room now
    assert house.is_coming("d", 0)


def test_a_load_that_makes_progress_is_not_given_up():
    house = House("w1")
    house.deploy(1, "w1")
    house.residency.progressed(house.member("w1"), Digest("m.0"), 6)
    assert house.residency.tick(LOAD_TIMEOUT_S) == []
    assert house.residency.next_wakeup() == 6 + LOAD_TIMEOUT_S
    assert house.residency.tick(6 + LOAD_TIMEOUT_S) == [("w1", "m.0")]


def test_progress_of_a_load_that_nobody_asked_for_sets_no_alarm():
    house = House("w1")
    house.residency.progressed(house.member("w1"), Digest("m.0"), 0)
    assert house.residency.next_wakeup() is None


def test_a_stage_that_is_resident_needs_no_progress_any_more():
    house = House("w1")
    house.deploy(1, "w1")
    house.load("w1", "m.0")
    assert house.residency.next_wakeup() is None


def test_a_stage_that_turns_out_absent_is_loaded_if_somebody_needs_it():
    house = House("w1")
    house.deploy(1, "w1")
    house.load("w1", "m.0")
    house.taken()
    house.residency.absent(house.member("w1"), Digest("m.0"), 0)
    house.residency.absent(house.member("w1"), Digest("foreign"), 0)
    assert house.taken() == loads(("w1", "m.0"))


# ── workers come and go ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_newcomer_relieves_the_busiest_where_it_has_room():
    house = House("w1")
    house.deploy(1, "w1", "w1")
    house.join("early")
    assert house.places() == (("w1",), ("w1",)), "not before the version is ready: it would wait for two loads instead of one"
    for artifact in ("m.0", "m.1"):
        house.load("w1", artifact)
    house.taken()
    house.join("small", budget_bytes=9)
    assert house.taken() == []
    house.join("w2")
    changed, load = house.taken()
    assert changed.version.plan.places == (("w1", "w2"), ("w1",)) and changed.version.plan.epoch == 2
    assert load == loads(("w2", "m.0"))[0]


def test_a_newcomer_that_has_a_stage_already_runs_it():
    house = House("w1")
    house.deploy(1, "w1")
    house.load("w1", "m.0")
    house.taken()
    house.join("w2", "m.0")
    assert house.places() == (("w1", "w2"),)
    assert [type(action) for action in house.taken()] == [ev.PlanChanged]


def test_a_worker_that_comes_back_gets_what_the_plan_has_for_it():
    house = House("w1")
    house.deploy(1, "w1", "w1")
    house.load("w1", "m.0")
    house.residency.session_ended(house.member("w1"))
    assert house.residency.next_wakeup() is None, "it loads for nobody now"
    house.taken()
    house.join("w1", "m.0")
    assert house.taken() == loads(("w1", "m.1"))


def test_a_worker_that_is_not_ready_is_asked_for_nothing_until_it_joins():
    house = House("w1")
    house.member("w1").verdict = Verdict.SUSPECT
    house.deploy(1, "w1")
    assert house.taken() == []
    house.join("w1")
    assert house.taken() == loads(("w1", "m.0"))


def test_a_lost_worker_is_out_of_every_plan_and_its_stages_are_moved_when_somebody_waits():
    house = House("w1", "w2")
    house.deploy(1, "w1", deployment="one")
    house.deploy(1, "w1", deployment="two", model="n")
    house.load("w1", "m.0")
    house.load("w1", "n.0")
    lost = house.member("w1")
    lost.verdict = Verdict.LOST
    wakes = house.wakes
    house.residency.left(lost, house.now)
    assert house.wakes > wakes
    assert house.places("one") == house.places("two") == ((),)
    assert lost.resident == set()
    house.taken()
    assert house.is_coming("one", 0)
    assert house.taken()[-1:] == loads(("w2", "m.0"))
    assert house.is_coming("one", 0)
    assert house.taken() == [], "it was asked for already"
    assert house.residency.stages_moved == 1


def test_a_version_that_loses_a_worker_while_it_loads_gets_another_or_fails():
    house = House("w1", "w2")
    house.deploy(1, "w1", "w1")
    house.load("w1", "m.0")
    for name in ("w1", "w2"):
        house.taken()
        house.residency.session_ended(house.member(name))
        house.member(name).verdict = Verdict.LOST
        house.residency.left(house.member(name), house.now)
        if name == "w1":
            assert house.places() == (("w2",), ("w2",))
    assert [type(action) for action in house.taken()][-2:] == [ev.VersionFailed, ev.VersionReleased]


def test_a_version_that_is_overtaken_while_it_loads_is_said_to_have_failed():
    """Somebody waits until it is ready."""
    house = House("w1")
    for number in (1, 2, 3):
        house.deploy(number, "w1", model=f"m{number}")
    house.load("w1", "m2.0")
    assert [(type(a), a.version.number) for a in house.taken() if not isinstance(a, (ev.Load, ev.Unload))] == [
        (ev.VersionReady, 2), (ev.VersionFailed, 1), (ev.VersionReleased, 1)
    ]  # fmt: skip
    house.load("w1", "m3.0")
    assert [type(a) for a in house.taken()] == [ev.VersionReady, ev.Unload, ev.VersionReleased]
    assert house.member("w1").resident == {"m3.0"} and house.member("w1").loading == set()


def test_a_version_that_was_overtaken_does_not_come_back_when_it_has_loaded():
    house = House("w1")
    first = house.deploy(1, "w1", model="old")
    house.residency.request_began(house.residency.live(first))  # so it goes on loading
    house.deploy(2, "w1", model="new")
    house.load("w1", "new.0")
    house.taken()
    house.load("w1", "old.0")
    assert house.taken() == []
    assert house.residency.find("d", 0, None).version.number == 2
    house.residency.request_ended(first)
    assert [type(action) for action in house.taken()] == [ev.Unload, ev.VersionReleased]


def test_a_replica_is_named_once():
    house = House("w1", "w2", "w3")
    house.deploy(1, "w1 w2")
    house.refuse("w1", "m.0")
    assert sorted(house.places()[0]) == ["w2", "w3"]


def test_a_load_that_was_given_up_and_came_after_all_is_used():
    house = House("w1")
    house.deploy(1, "w1")
    house.load("w1", "m.0")
    house.residency.absent(house.member("w1"), Digest("m.0"), 0)
    assert house.residency.tick(LOAD_TIMEOUT_S) == [("w1", "m.0")]
    house.refuse("w1", "m.0")
    assert not house.is_coming("d", 0)
    house.residency.resident(house.member("w1"), Digest("m.0"))
    assert house.is_coming("d", 0)
    assert house.places() == (("w1",),)


def test_a_stage_is_moved_only_to_a_worker_that_suits_and_has_room():
    house = House("w1", "w2", budget_bytes=10)
    house.deploy(1, "w1")
    house.load("w1", "m.0")
    house.deploy(1, "w2", deployment="other", model="n")  # w2 is full
    house.member("w1").verdict = Verdict.LOST
    house.residency.left(house.member("w1"), house.now)
    assert not house.is_coming("d", 0)
    house.join("w3", budget_bytes=10)
    assert not house.is_coming("d", 0, lambda member: member.worker_id == "w2")
    assert house.is_coming("d", 0, lambda member: member.worker_id == "w3")


def test_a_copy_gives_way_to_a_stage_that_nobody_has():
    house = House("w1", "w2", "w3", budget_bytes=10)
    house.deploy(1, "w1", "w2 w3")
    for name, artifact in (("w1", "m.0"), ("w2", "m.1"), ("w3", "m.1")):
        house.load(name, artifact)
    assert not house.is_coming("d", 1), "who has it is enough: nothing gives way to a further copy"
    house.member("w1").verdict = Verdict.LOST
    house.residency.left(house.member("w1"), house.now)
    house.taken()
    assert house.is_coming("d", 0)
    assert house.places() == (("w2",), ("w3",))
    unload = ev.Unload(worker_id=WorkerId("w2"), artifact=Digest("m.1"))
    assert [action for action in house.taken() if not isinstance(action, ev.PlanChanged)] == [unload, *loads(("w2", "m.0"))]
    house.residency.absent(house.member("w2"), Digest("m.1"), house.now)  # a task that had been on its way
    assert house.taken() == [], "what was dropped is not loaded again"
    house.member("w3").verdict = Verdict.SUSPECT
    assert not house.is_coming("d", 1), "the last of its kind gives way to nobody"


def test_as_little_as_possible_gives_way():
    house = House("w1", "w2", "w3", budget_bytes=20)
    house.deploy(1, "w1 w2", "w1 w3", "w2 w3")
    for name, artifact in (("w1", "m.0"), ("w2", "m.0"), ("w1", "m.1"), ("w3", "m.1"), ("w2", "m.2"), ("w3", "m.2")):
        house.load(name, artifact)
    house.deploy(1, "w4", deployment="other", model="n")
    house.taken()
    assert house.is_coming("other", 0)
    assert [type(action) for action in house.taken() if not isinstance(action, ev.PlanChanged)] == [ev.Unload, ev.Load]
    assert all(house.places()), "every stage has a worker still"


def test_what_another_version_has_resident_is_used_before_room_is_made():
    """Regression: a copy was dropped for it, and nobody woken."""
    house = House("w1", "w2", "w3", budget_bytes=20)
    house.deploy(1, "w1", deployment="a")
    house.deploy(1, "w2", deployment="b")  # the same artifact
    house.deploy(1, "w2 w3", deployment="c", model="c")
    for name, artifact in (("w1", "m.0"), ("w2", "m.0"), ("w2", "c.0"), ("w3", "c.0")):
        house.load(name, artifact)
    house.member("w1").verdict = Verdict.LOST
    house.taken()
    wakes = house.wakes
    house.residency.left(house.member("w1"), house.now)
    assert house.places("a") == (("w2",),) and house.wakes > wakes
    assert not [action for action in house.taken() if isinstance(action, ev.Load | ev.Unload)]


def test_the_last_of_a_numeric_class_gives_way_to_nobody_if_requests_stay_in_one():
    house = House("w1", "w2", budget_bytes=10)
    house.member("w2").numeric_class = "y"
    house.deploy(1, "w1 w2", is_exact=True)
    house.load("w1", "m.0")
    house.load("w2", "m.0")
    house.deploy(1, "w9", deployment="other", model="n")
    house.taken()
    assert not house.is_coming("other", 0)
    assert house.places() == (("w1", "w2"),)


def test_help_comes_only_from_a_class_that_has_all_stages_if_requests_stay_in_one():
    house = House("w1", "w2", "w3")
    house.member("w3").numeric_class = "y"
    house.deploy(1, "w1", "w2", is_exact=True)
    house.load("w1", "m.0")
    house.load("w2", "m.1")
    house.taken()
    house.member("w1").services[Digest("m.0")], house.member("w1").slowness = Service(10.0), 10.0
    house.residency.relieve(house.now)
    assert [action for action in house.taken() if isinstance(action, ev.Load)] == loads(("w2", "m.0"))


def test_what_a_worker_should_have_given_up_is_not_used_again():
    """Regression: an `Unload` that was lost with its session was undone, and what was to come in its place refused."""
    house = House("w1", "w2", "w3", budget_bytes=10)
    house.deploy(1, "w1", "w2 w3")
    for name, artifact in (("w1", "m.0"), ("w2", "m.1"), ("w3", "m.1")):
        house.load(name, artifact)
    house.member("w1").verdict = Verdict.LOST
    house.residency.left(house.member("w1"), house.now)
    assert house.is_coming("d", 0)
    house.taken()
    house.join("w2", "m.1", budget_bytes=10)
    unload = ev.Unload(worker_id=WorkerId("w2"), artifact=Digest("m.1"))
    assert unload in house.taken() and house.places() == (("w2",), ("w3",))


def test_copies_give_way_to_a_version_that_was_planned_in_their_place():
    house = House("w1", "w2", budget_bytes=10)
    house.deploy(1, "w1 w2")
    house.load("w1", "m.0")
    house.load("w2", "m.0")
    house.taken()
    free = {name: house.residency.copies.offer(house.member(name)).free_bytes for name in ("w1", "w2")}
    assert free == {"w1": 0, "w2": 10}, "one keeps it"
    house.deploy(1, "w2", deployment="other", model="n")
    assert [type(action) for action in house.taken() if not isinstance(action, ev.PlanChanged)] == [ev.Unload, ev.Load]
    assert house.places() == (("w1",),)


def test_a_worker_that_has_become_slow_gets_help_once():
    house = House("w1", "w2")
    house.deploy(1, "w1", "w2")
    house.load("w1", "m.0")
    house.load("w2", "m.1")
    house.taken()
    house.residency.relieve(house.now)
    assert house.taken() == [], "both take a second"
    house.member("w1").services[Digest("m.0")], house.member("w1").slowness = Service(10.0), 10.0
    house.residency.relieve(house.now)
    assert [action for action in house.taken() if isinstance(action, ev.Load)] == loads(("w2", "m.0"))
    house.residency.relieve(house.now)
    assert house.taken() == [], "it is loading"
    house.load("w2", "m.0")
    house.taken()
    house.residency.relieve(house.now)
    assert house.taken() == []
    assert (house.places(), house.residency.stages_copied) == ((("w1", "w2"), ("w2",)), 1)


def test_a_load_by_a_worker_that_does_not_suit_is_no_help():
    house = House("w1")
    house.deploy(1, "w1")
    assert house.is_coming("d", 0)
    assert not house.is_coming("d", 0, lambda member: False)
    house.member("w1").verdict = Verdict.SUSPECT
    assert not house.is_coming("d", 0)


def test_a_stage_that_another_version_has_resident_on_a_worker_is_used_at_once():
    """Versions of one model share artifacts: nothing has to be loaded, so nothing will tell the waiting to look again."""
    house = House("w1", "w2")
    house.deploy(1, "w1", deployment="one")
    house.deploy(1, "w2", deployment="two")
    house.load("w1", "m.0")
    house.load("w2", "m.0")
    house.member("w2").verdict = Verdict.LOST
    house.taken()
    wakes = house.wakes
    house.residency.left(house.member("w2"), house.now)
    assert house.places("two") == (("w1",),)
    assert not any(isinstance(action, ev.Load) for action in house.taken())
    assert house.wakes > wakes


def test_an_offer_counts_a_shared_stage_once():
    house = House("w1")
    house.deploy(1, "w1", "w1", deployment="one")
    house.deploy(1, "w1", "w1", deployment="two")
    offer = house.residency.offer(house.member("w1"))
    assert (offer.free_bytes, offer.load_s) == (80, 4.0)


# ── any order ────────────────────────────────────────────────────────────────────────────────────────────────────────

WORKERS = ["w1", "w2", "w3"]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["deploy", "undeploy", "join", "join", "lose", "load", "load", "load", "refuse", "wait", "need"]),
        st.sampled_from(WORKERS),
        st.integers(0, 2),
    ),
    max_size=40,
)


@given(STEPS)
def test_in_any_order_loads_are_wanted_watched_and_within_memory(steps):
    house, number = House(*WORKERS, budget_bytes=30), 0
    live: dict[int, bool] = {}  # versions that are not released, and whether they are ready
    for step, name, stage in steps:
        member = house.member(name)
        match step:
            case "deploy" if ready := [m for m in WORKERS if house.member(m).is_ready]:
                number += 1
                live[number] = False
                house.deploy(number, ready[0], ready[-1], model=f"m{number % 3}")
            case "undeploy":
                house.residency.undeploy("d")
            case "join":
                house.residency.session_ended(member)
                house.join(name, *sorted(member.resident), budget_bytes=30)
            case "lose":
                house.residency.session_ended(member)
                member.verdict = Verdict.LOST
                house.residency.left(member, house.now)
            case "load" if member.loading:
                house.load(name, min(member.loading))
            case "refuse" if member.loading:
                house.refuse(name, max(member.loading))
            case "wait":
                house.now += 3
                for worker_id, artifact in house.residency.tick(house.now):
                    assert artifact in house.member(worker_id).loading
                    house.refuse(worker_id, artifact)
            case "need" if any(version.deployment == "d" for version in (v.version for v in house.residency.current())):
                house.is_coming("d", min(stage, 1))
        for action in house.taken():
            match action:
                case ev.VersionReady(version=version):
                    assert live[version.number] is False, "ready once"
                    live[version.number] = True
                case ev.VersionReleased(version=version):
                    del live[version.number]
                case ev.VersionFailed(version=version):
                    assert live[version.number] is False, "what was ready does not fail"
        wanted = {need.artifact for v in house.residency._versions.values() for need in v.plan.stages}
        assert {version.number for version in (v.version for v in house.residency._versions.values())} == set(live)
        for one in house.roster:
            assert not one.loading & one.resident
            assert one.loading <= wanted
            assert all((one.worker_id, artifact) in house.residency._due for artifact in one.loading), "every load is watched"
        assert len(house.residency._due) == sum(len(one.loading) for one in house.roster), "and nothing else"
        for v in house.residency._versions.values():
            for need, workers in zip(v.plan.stages, v.plan.places, strict=True):
                assert len(set(workers)) == len(workers)
                for worker_id in workers:
                    assert house.member(worker_id).verdict is not Verdict.LOST
                    assert need.artifact in house.member(worker_id).loading | house.member(worker_id).resident, "no place is empty"
        ready = [n for n, is_ready in live.items() if is_ready]
        current = [v.version.number for v in house.residency.current()]
        assert len(current) <= 1 and len(ready) <= 1, "a newer version replaces the older"
