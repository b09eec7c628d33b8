"""Deployments at the same moment."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from adapt.models.export import export_module
from adapt.planning.placement import WorkerOffer
from adapt.protocol.ids import Digest, WorkerId
from adapt.runtime.artifacts import ArtifactStore
from adapt.runtime.deployer import Deployer
from adapt.runtime.deployments import HEADER_BYTES, Deployments
from adapt.runtime.profiles import ProfileStore
from adapt.runtime.recipes import ProfiledProgram, Recipe
from adapt.runtime.state import StateDirectory
from adapt.scheduling import events as ev


class Around:
    """Two workers with as much room each, in which copies give way; a version is ready as soon as it is known."""

    def __init__(self, room_bytes: int) -> None:
        self.room_bytes = room_bytes
        self.versions: dict[str, ev.Version] = {}
        self.deployer: Deployer | None = None

    async def offers(self, *, wait_s: float, with_copies: bool = False) -> list[WorkerOffer]:
        free = dict.fromkeys(("w1", "w2"), self.room_bytes)
        for version in self.versions.values():
            for need, workers in zip(version.plan.stages, version.plan.places, strict=True):
                for worker in workers[:1] if with_copies else workers:
                    free[worker] -= need.memory_bytes
        return [WorkerOffer(worker_id=WorkerId(name), free_bytes=size) for name, size in free.items()]

    def tell(self, event: ev.VersionDeployed) -> None:
        self.versions[event.version.deployment] = event.version
        self.deployer.settled(event.version, None)

    def version(self, deployment: str, number: int) -> ev.Version:
        return self.versions[deployment]

    def device_kinds(self):
        return {}

    def to_worker(self, worker_id, message):
        return True


def test_two_at_the_same_moment_are_not_planned_for_the_same_room(tmp_path):
    state = StateDirectory(tmp_path)
    store = ArtifactStore(state.artifacts)
    recipes = {}
    for name in ("a", "b"):
        exported = export_module(torch.nn.Linear(256, 256).eval(), [torch.zeros(2, 256)], directory=store.directory)
        program = ProfiledProgram(Digest(exported.digest), exported.operator_costs_s)
        recipes[name] = Recipe(stages=1, codec="raw", tolerance=None, numerics="auto", program=program)

    async def both() -> Around:
        around = Around(4 * 256 * 257 + HEADER_BYTES)  # of one model
        with ThreadPoolExecutor(1) as threads:
            deployments, profiles = Deployments(state, store), ProfileStore(state.profiles)
            around.deployer = Deployer(
                store, deployments, around, profiles=profiles, models_dir=None, threads=threads, clock=time.monotonic
            )
            with deployments.under_way():
                await asyncio.gather(*(around.deployer.bring_up(name, recipe, lambda words: None) for name, recipe in recipes.items()))
        return around

    around = asyncio.run(both())
    assert {version.plan.places for version in around.versions.values()} == {(("w1", "w2"),), (("w2",),)}
    state.close()
