"""How a deployment without a number of stages is planned: on a real program, for workers that are only described."""

from __future__ import annotations

import pytest
import torch

from adapt.errors import PlanError
from adapt.models.export import export_module
from adapt.planning.model import Handling
from adapt.planning.placement import WorkerOffer
from adapt.protocol.ids import Digest, WorkerId
from adapt.runtime.artifacts import ArtifactStore
from adapt.runtime.deployments import ProfiledProgram, plan_freely
from adapt.runtime.profiles import KnownCosts
from adapt.runtime.terms import HEADER_BYTES, MANY_KINDS
from adapt.scheduling.links import Link

WIDTH, LAYERS = 256, 8
LAYER_BYTES = 4 * (WIDTH * WIDTH + WIDTH)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    store = ArtifactStore(tmp_path_factory.mktemp("store"))
    module = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    exported = export_module(module.eval(), [torch.zeros(2, WIDTH)], directory=store.directory)
    seconds = [0.001] * len(exported.operator_costs_s)
    return store, ProfiledProgram(Digest(exported.digest), seconds)


def offers(*rooms: int, slowness: tuple[float, ...] = ()) -> list[WorkerOffer]:
    """Workers with room for so many layers each."""
    return [
        WorkerOffer(worker_id=WorkerId(f"w{number}"), free_bytes=HEADER_BYTES + room * LAYER_BYTES + 64 * WIDTH, slowness=slow)
        for number, (room, slow) in enumerate(zip(rooms, slowness or (1.0,) * len(rooms), strict=True), 1)
    ]


def layers_of(model) -> list[int]:
    return [round(size / LAYER_BYTES) for size in model.file_bytes]


def test_a_model_that_every_worker_can_hold_is_not_cut_and_runs_on_all(stored):
    model, plan = plan_freely(*stored, offers(8, 9, 20), name="m")
    assert layers_of(model) == [8]
    assert plan.places == (("w1", "w2", "w3"),)
    assert (plan.program, plan.stages) == (stored[1].digest, model.stages)


def test_one_that_no_worker_can_hold_is_cut_so_that_it_fits(stored):
    model, plan = plan_freely(*stored, offers(5, 3), name="m")
    assert layers_of(model) == [5, 3] and plan.places == (("w1",), ("w2",))
    assert sum(need.cost_s for need in plan.stages) == pytest.approx(0.001 * len(stored[1].operator_costs_s))


def test_who_has_proved_to_be_slow_gets_less(stored):
    equal, _ = plan_freely(*stored, offers(6, 6), name="m")
    assert layers_of(equal) == [4, 4]
    unequal, plan = plan_freely(*stored, offers(6, 6, slowness=(3.0, 1.0)), name="m")
    assert dict(zip([at[0] for at in plan.places], layers_of(unequal), strict=True)) == {"w1": 2, "w2": 6}


def test_workers_that_cannot_hold_it_together_are_told_what_is_missing(stored):
    with pytest.raises(PlanError, match="MiB"):
        plan_freely(*stored, offers(3, 4), name="m")


def test_very_many_kinds_of_workers_are_planned_for_all_the_same(stored):
    rooms = (2, 3, 2, 4, 5, 3, 2)
    given = offers(*rooms, slowness=(1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 2.0))
    assert len({(offer.free_bytes, offer.slowness) for offer in given}) > MANY_KINDS
    model, plan = plan_freely(*stored, given, name="m")
    room = {offer.worker_id: offer.free_bytes for offer in given}
    assert all(need.memory_bytes <= room[worker] for need, at in zip(plan.stages, plan.places, strict=True) for worker in at)
    assert sum(layers_of(model)) == LAYERS


def test_measured_workers_are_planned_by_what_they_take(stored):
    operators = len(stored[1].operator_costs_s)
    known = {WorkerId("w1"): KnownCosts((0.003,) * operators), WorkerId("w2"): KnownCosts((0.001,) * operators)}
    model, plan = plan_freely(*stored, offers(6, 6), name="m", known=known)
    assert dict(zip([at[0] for at in plan.places], layers_of(model), strict=True)) == {"w1": 2, "w2": 6}
    uneven = {WorkerId("w1"): KnownCosts((0.002,) * operators), WorkerId("w2"): KnownCosts((0.001,) * 2 + (0.004,) * (operators - 2))}
    model, plan = plan_freely(*stored, offers(6, 6), name="m", known=uneven)
    assert [(at[0], count) for at, count in zip(plan.places, layers_of(model), strict=True)] == [("w2", 3), ("w1", 5)]


def test_kernels_need_room_besides(stored):
    """Either worker holds all of the model, and no part of it beside a workspace of one layer more than is left."""
    operators, workers = len(stored[1].operator_costs_s), (WorkerId("w1"), WorkerId("w2"))

    def planned(*workspace):
        known = {worker: KnownCosts((0.001,) * operators, workspace_bytes=each) for worker, each in zip(workers, workspace, strict=True)}
        return plan_freely(*stored, offers(8, 8), name="m", known=known)

    first = (3 * LAYER_BYTES, *[0] * (operators - 1))
    assert planned(None, None)[1].places == planned((0,) * operators, (None,) * operators)[1].places == (("w1", "w2"),)
    for workspace in ((first, None), (None, first), (first, first)):
        model, plan = planned(*workspace)
        assert len(plan.places) == 2 and layers_of(model)[0] <= 5
    nonsense = planned((1 << 36,) * operators, None)
    assert nonsense[1].places == (("w1", "w2"),), "what one device takes, or says that it does, forbids nobody all plans"


def test_where_handling_takes_more_than_computing_the_model_is_not_cut(stored):
    """Two workers that could hold it all: two stages would each have the handling to do, as much as two copies have."""
    operators = len(stored[1].operator_costs_s)
    known = {worker: KnownCosts((0.001,) * operators, Handling(task_s=0.1)) for worker in (WorkerId("w1"), WorkerId("w2"))}
    _, plan = plan_freely(*stored, offers(40, 40), name="m", known=known)
    assert plan.places == (("w1", "w2"),)


def test_a_worker_that_has_proved_to_be_slow_is_not_believed_its_profile(stored):
    known = {worker: KnownCosts((0.001,) * len(stored[1].operator_costs_s)) for worker in (WorkerId("w1"), WorkerId("w2"))}
    for slowness, layers in ((1.2, [4, 4]), (3.0, [6, 2])):
        model, plan = plan_freely(*stored, offers(6, 6, slowness=(slowness, 1.0)), name="m", known=known)
        assert sorted(layers_of(model), reverse=True) == layers
        assert layers == [4, 4] or plan.places[layers_of(model).index(2)] == ("w1",)


def test_measured_links_count(stored):
    """A model that neither worker can hold: who is on the slow link gets the end that sends least, or nothing helps; a fast link is no limit."""
    fast, slow = Link(0.0001, 900e6, 900e6), Link(0.01, 1e4, 1e4)
    same, plan = plan_freely(*stored, offers(6, 6), name="m", links={WorkerId("w1"): fast, WorkerId("w2"): fast})
    unknown, other = plan_freely(*stored, offers(6, 6), name="m")
    assert layers_of(same) == layers_of(unknown) and plan.places == other.places
    _, plan = plan_freely(*stored, offers(9, 9), name="m", links={WorkerId("w1"): fast, WorkerId("w2"): slow})
    assert plan.places == (("w1", "w2"),), "for what it can still take"
    _, plan = plan_freely(*stored, offers(9, 5, 5), name="m", links={WorkerId("w1"): slow})
    assert ("w1",) not in plan.places


@pytest.mark.parametrize("slowness", [0.0, 5e-324, 1e-320, 1e300])
def test_a_worker_that_tells_nonsense_of_its_seconds_stops_no_plan(stored, slowness):
    """Regression: such numbers of one worker ended every deployment in a division by zero."""
    operators = len(stored[1].operator_costs_s)
    odd = [1e-323] * (operators - 1) + [0.001]
    for costs_s in (None, {WorkerId("w1"): [0.001] * operators}, {WorkerId("w1"): odd, WorkerId("w2"): odd}):
        known = None if costs_s is None else {worker: KnownCosts(tuple(costs)) for worker, costs in costs_s.items()}
        _, plan = plan_freely(*stored, offers(6, 6, slowness=(slowness, 1.0)), name="m", known=known)
        assert {worker for place in plan.places for worker in place} == {"w1", "w2"}
    assert plan_freely(*stored, offers(9, 9, slowness=(slowness, 1.0)), name="m", exact=True)
