"""Deployments that are cut anew, on a real program and files, for workers that are only described."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from adapt.errors import PlanError
from adapt.models.export import export_module
from adapt.planning.placement import StageNeed, WorkerOffer
from adapt.protocol.ids import WorkerId
from adapt.runtime.artifacts import ArtifactStore
from adapt.runtime.deployer import Deployer
from adapt.runtime.deployments import Deployments
from adapt.runtime.profiles import ProfileStore
from adapt.runtime.recipes import ProfiledProgram, Recipe
from adapt.runtime.replanning import AFTER_FAILURE, Replanner
from adapt.runtime.state import StateDirectory
from adapt.runtime.terms import HEADER_BYTES
from adapt.scheduling import events as ev
from adapt.scheduling.links import Link

WIDTH, LAYERS = 256, 8
LAYER_BYTES = 4 * (WIDTH * WIDTH + WIDTH)


class House:
    """As a dispatcher with a scheduler: what is loaded takes the requests of its deployment. Some workers cannot load, or take their time."""

    def __init__(self, tmp_path, programs) -> None:
        self.state = StateDirectory(tmp_path)
        self.store, self.programs = ArtifactStore(self.state.artifacts), programs
        self.begun = asyncio.Event()  # to load other stages
        self.deployments = Deployments(self.state, self.store)
        self.slowness = {"w1": 1.0, "w2": 1.0, "w3": 1.0}
        self.layers = 10  # for which each worker has room
        self.is_stubborn = self.is_lazy = False  # new stages cannot be loaded; never are
        self.measured_links: dict[WorkerId, Link] = {}
        self.current: ev.Version | None = None
        self.retired: list[ev.Version] = []
        self.withdrawn: list[ev.VersionWithdrawn] = []

    @contextlib.asynccontextmanager
    async def at_work(self):
        with ThreadPoolExecutor(1) as threads:
            self.deployer = Deployer(
                self.store,
                self.deployments,
                self,
                profiles=ProfileStore(self.state.profiles),
                models_dir=None,
                threads=threads,
                clock=time.monotonic,
            )
            self.replanner = Replanner(self.store, self.deployments, self.deployer, self, interval_s=1.0)
            yield self
            await self.deployer.close()

    def recipe(self, which: int = 0, *, stages: int = 0) -> Recipe:
        path, operators = self.programs[which]
        program = ProfiledProgram(self.store.add(path), [0.001] * operators)
        return Recipe(stages=stages, codec="raw", tolerance=None, numerics="auto", program=program)

    async def deploy(self, recipe: Recipe) -> int:
        with self.deployments.under_way():
            return (await self.deployer.bring_up("d", recipe, lambda words: None)).version

    async def looks(self, count: int) -> None:
        for _ in range(count):
            await self.replanner.look()

    def sizes(self) -> dict[str, int]:
        """Layers of each stage's first worker."""
        blueprint = self.deployments.blueprint(self.current)
        return {place[0]: round(size / LAYER_BYTES) for place, size in zip(self.current.plan.places, blueprint.file_bytes, strict=True)}

    # ── what the deployer asks ───────────────────────────────────────────────────────────────────────────────────────

    async def offers(self, *, wait_s: float, with_copies: bool = False) -> list[WorkerOffer]:
        free = dict.fromkeys(self.slowness, self._room(self.layers))
        for need, place in self._taken():
            for worker in place[:1] if with_copies else place:
                free[worker] -= need.memory_bytes
        return [WorkerOffer(worker_id=WorkerId(name), free_bytes=size, slowness=self.slowness[name]) for name, size in free.items()]

    def _room(self, layers: int) -> int:
        return HEADER_BYTES + layers * LAYER_BYTES + LAYER_BYTES // 2

    def _taken(self) -> list[tuple[StageNeed, tuple[WorkerId, ...]]]:
        return [] if self.current is None else list(zip(self.current.plan.stages, self.current.plan.places, strict=True))

    def tell(self, event: ev.Event) -> None:
        if isinstance(event, ev.VersionWithdrawn):
            self.withdrawn.append(event)
            return
        assert isinstance(event, ev.VersionDeployed)
        version = event.version
        if version.cut:
            self.begun.set()
        if version.cut and self.is_stubborn:
            self.deployer.settled(version, PlanError("no room"))
            self.deployments.drop(version)
        elif not (version.cut and self.is_lazy):
            before, self.current = self.current, version
            self.deployer.settled(version, None)
            self.deployments.ready(version)
            if before is not None:
                self.retired.append(before)
                self.deployments.drop(before)

    def present(self) -> list[ev.Version]:
        return [] if self.current is None else [self.current]

    def version(self, deployment: str, number: int) -> ev.Version:
        return self.current

    def device_kinds(self):
        return {}

    def links(self) -> dict[WorkerId, Link]:
        return self.measured_links

    def to_worker(self, worker_id, message):
        return True


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Files of two programs, and how many operators each has."""
    directory = tmp_path_factory.mktemp("programs")
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        module = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))).eval()
        exported = export_module(module, [torch.zeros(2, WIDTH)], directory=directory)
        found.append((exported.path, len(exported.operator_costs_s)))
    return found


@pytest.fixture
def house(tmp_path, programs):
    house = House(tmp_path, programs)
    yield house
    house.state.close()


def in_a_house(test):
    """Runs a coroutine function on a loop of its own."""

    @functools.wraps(test)
    def run(house, **fixtures):
        async def all_of_it():
            async with house.at_work():
                await test(house, **fixtures)

        asyncio.run(all_of_it())

    return run


async def cut_for_three(house: House, **slowness: float) -> None:
    """Deployed where nobody can hold it alone; then some have become slow."""
    house.layers = 5
    assert await house.deploy(house.recipe()) == 1
    assert sorted(house.sizes().values()) == [2, 3, 3]
    house.layers = 10
    house.slowness |= slowness


@in_a_house
async def test_a_slow_worker_gets_less_at_the_second_look(house):
    await cut_for_three(house, w3=20.0)
    before = house.current
    await house.looks(1)
    assert house.current is before
    await house.looks(1)
    after = house.current
    assert house.retired == [before] and "w3" not in house.sizes()
    assert (after.number, after.cut, after.program) == (1, 1, before.program) and after.plan.epoch > before.plan.epoch
    assert house.deployments.record(after).version == 1


@in_a_house
async def test_a_link_that_has_become_slow_is_a_reason_too(house):
    await cut_for_three(house)
    house.measured_links[WorkerId("w2")] = Link(0.01, 1e4, 1e4)
    await house.looks(2)
    assert house.current.cut == 1 and house.sizes().get("w2", 0) == 0


@in_a_house
async def test_a_plan_that_is_as_good_as_any_stays_whatever_trembles(house):
    await cut_for_three(house)
    before = house.current
    for factors in ((1.1, 1.0, 1.0), (1.0, 0.95, 1.05), (1.05, 1.1, 1.0), (1.0, 1.0, 1.1)):
        house.slowness = dict(zip(house.slowness, factors, strict=True))
        await house.looks(1)
    assert house.current is before


@in_a_house
async def test_a_cut_takes_no_number_and_nothing_that_can_be_rolled_back_to(house):
    """Regression in advance: the next version, an explicit one, and a roll-back are as if nothing had been cut anew."""
    await cut_for_three(house, w3=20.0)
    await house.looks(2)
    assert house.current.cut == 1 and house.deployments.earlier("d") == []
    house.deployments.check_number("d", 2)
    second = replace(house.recipe(1), number=2)
    assert await house.deploy(second) == 2
    assert house.current.key == ("d", 2, 0) and house.deployments.earlier("d") == [1]
    again = house.deployments.recipe("d", 1).repeated(1)
    assert await house.deploy(again) == 3
    needed = {need.artifact for need in house.current.plan.stages} | {second.program.digest, again.program.digest}
    assert {path.stem for path in house.store.directory.glob("*.safetensors")} == needed


@in_a_house
async def test_a_restart_comes_back_with_the_newest_ready_cut(house):
    await cut_for_three(house, w3=20.0)
    await house.looks(2)
    cut = house.current
    restored = Deployments(house.state, house.store)
    (version,) = restored.restore()
    assert version == cut and version.plan == cut.plan
    assert restored.blueprint(version).positions == house.deployments.blueprint(cut).positions is not None


@in_a_house
async def test_what_an_older_adapt_has_written_down_is_served_and_not_cut_anew(house):
    await cut_for_three(house, w3=20.0)
    record = house.state.read_deployments()
    for plain in record["versions"]:
        del plain["cut"], plain["positions"]
    house.state.write_deployments(json.loads(json.dumps(record)))
    house.deployments = Deployments(house.state, house.store)
    (house.current,) = house.deployments.restore()
    assert house.current.key == ("d", 1, 0)
    async with house.at_work():
        await house.looks(4)
    assert house.current.cut == 0


@in_a_house
async def test_a_number_of_stages_that_was_asked_for_stays(house):
    assert await house.deploy(house.recipe(stages=3)) == 1
    house.slowness["w3"] = 20.0
    await house.looks(4)
    assert house.current.cut == 0 and len(house.current.plan.stages) == 3


@in_a_house
async def test_stages_that_cannot_be_loaded_leave_the_present_ones_and_are_not_tried_soon(house):
    await cut_for_three(house, w3=20.0)
    before, house.is_stubborn = house.current, True
    await house.looks(2)
    assert house.current is before and house.deployments.earlier("d") == []
    house.is_stubborn = False
    await house.looks(AFTER_FAILURE)
    assert house.current is before
    await house.looks(2)
    assert house.current.cut == 1, "the number of the failed one is free again"


@in_a_house
async def test_a_deployment_comes_first(house):
    """What is being loaded is withdrawn, and its room is free for the version that somebody waits for."""
    await cut_for_three(house, w3=20.0)
    house.is_lazy = True
    await house.looks(1)
    look = asyncio.ensure_future(house.replanner.look())
    await house.begun.wait()
    assert await house.deploy(house.recipe(1)) == 2
    await look
    assert [(gone.deployment, gone.number, gone.cut) for gone in house.withdrawn] == [("d", 1, 1)]
    assert house.current.key == ("d", 2, 0)


@in_a_house
async def test_while_something_is_deployed_nothing_is_cut(house):
    await cut_for_three(house, w3=20.0)
    with house.deployments.under_way():
        await house.looks(4)
    assert house.current.cut == 0
    await house.looks(2)
    assert house.current.cut == 1


@in_a_house
async def test_without_room_beside_the_present_stages_nothing_is_cut_and_it_is_said_once(house, caplog):
    await cut_for_three(house)
    house.layers = 4
    with caplog.at_level(logging.INFO, logger="adapt.runtime.replanning"):
        for slowness in (20.0, 30.0, 40.0):
            house.slowness["w3"] = slowness
            await house.looks(1)
    assert house.current.cut == 0
    assert [record.message for record in caplog.records if record.name == "adapt.runtime.replanning"] == [
        "no room to cut anew beside the present stages"
    ]


@in_a_house
async def test_a_stage_that_nobody_has_is_a_reason_too(house):
    """Its workers are gone, and nobody has room for it as a whole."""
    await cut_for_three(house)
    (gone,) = {"w1", "w2", "w3"} - set(list(house.sizes())[:2])
    del house.slowness[gone]
    present = house.current.plan
    house.current = replace(house.current, plan=present.removed(WorkerId(gone)))
    await house.looks(2)
    assert house.current.cut == 1 and gone not in house.sizes() and sum(house.sizes().values()) == LAYERS
