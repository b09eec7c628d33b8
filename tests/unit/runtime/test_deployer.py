"""Deployments at the same moment, asked for once more, and on trial."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from adapt.errors import AdaptError, CanaryError, PlanError
from adapt.models.canaries import KnownCanaries, KnownCanary
from adapt.models.export import export_module
from adapt.planning.model import CodecProfile, Handling
from adapt.planning.placement import WorkerOffer
from adapt.protocol import messages as msg
from adapt.protocol.ids import ClientId, Digest, WorkerId
from adapt.runtime import builder, deployer
from adapt.runtime.artifacts import ArtifactStore
from adapt.runtime.deployer import JUDGES, Deployer
from adapt.runtime.deployments import Deployments
from adapt.runtime.profiles import DeviceKind, KeptProfile, Measured, ProfileStore, form_of
from adapt.runtime.recipes import ProfiledProgram, Recipe
from adapt.runtime.state import StateDirectory
from adapt.runtime.terms import HEADER_BYTES
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


# ── asked for once more, because the answer was lost ─────────────────────────────────────────────────────────────────

CLIENT = ClientId(b"c" * 16)
ROOM_BYTES = 1 << 30


class Serving(Around):
    """As a dispatcher does: what is ready takes the requests of its deployment, and what it replaces is dropped."""

    def __init__(self, deployments: Deployments) -> None:
        super().__init__(ROOM_BYTES)
        self.deployments = deployments
        self.answers: list[msg.Message] = []

    def tell(self, event: ev.VersionDeployed) -> None:
        before = self.versions.get(event.version.deployment)
        self.deployments.ready(event.version)
        if before is not None:
            self.deployments.drop(before)
        super().tell(event)

    def to_client(self, client_id, message, blobs=()) -> bool:
        if not isinstance(message, msg.Progress):
            self.answers.append(message)
        return True


@contextlib.asynccontextmanager
async def a_deployer(tmp_path):
    state = StateDirectory(tmp_path)
    store = ArtifactStore(state.artifacts)
    around = Serving(Deployments(state, store))
    with ThreadPoolExecutor(1) as threads:
        around.deployer = Deployer(
            store,
            around.deployments,
            around,
            profiles=ProfileStore(state.profiles),
            models_dir=None,
            threads=threads,
            clock=time.monotonic,
        )
        yield around, store
        await around.deployer.close()
    state.close()


async def ask(around: Serving, order: msg.Deploy | msg.Rollback) -> int:
    """The number of the version that answers. Raises what the dispatcher says."""
    around.deployer.begin(CLIENT, order)
    await asyncio.gather(*(call.task for call in around.deployer._calls.values()))
    answer = around.answers.pop()
    if isinstance(answer, msg.CallFailed):
        raise AdaptError.from_wire(answer.code, answer.message, answer.fields)
    return answer.deployment.version


def a_program(store: ArtifactStore, seed: int) -> ProfiledProgram:
    torch.manual_seed(seed)
    exported = export_module(torch.nn.Linear(4, 4).eval(), [torch.zeros(2, 4)], directory=store.directory)
    return ProfiledProgram(Digest(exported.digest), exported.operator_costs_s)


def test_a_roll_back_to_a_repeated_version_can_be_asked_for_once_more(tmp_path):
    """Regression: it was compared with the first version that had the recipe, and not with the number that was asked for."""

    async def roll() -> list[int]:
        async with a_deployer(tmp_path) as (around, store):
            with around.deployments.under_way():
                for seed in (1, 2):
                    recipe = Recipe(stages=1, codec="raw", tolerance=None, numerics="auto", program=a_program(store, seed))
                    await around.deployer.bring_up("d", recipe, lambda words: None)
            return [await ask(around, msg.Rollback(call=1, name="d", version=number)) for number in (1, 2, 3, 3, 4, 4)]

    assert asyncio.run(roll()) == [3, 4, 5, 5, 6, 6]


def test_a_named_model_with_a_number_can_be_asked_for_once_more(tmp_path, monkeypatch):
    built = []

    def order(**source) -> msg.Deploy:
        named = msg.NamedSource(model="torchvision/resnet18", weights=None, input_shape=None, **source)
        return msg.Deploy(call=1, name="d", stages=1, codec="raw", tolerance=None, numerics="auto", named=named, version=7)

    async def deploy() -> None:
        async with a_deployer(tmp_path) as (around, store):

            async def build(source, **options):
                built.append(source)
                program = a_program(store, len(built))
                return builder.BuiltProgram(store.path(program.digest), program.digest, 1, list(program.operator_costs_s))

            monkeypatch.setattr(builder, "build", build)
            first, again = order(seed=1, model_args={"a": 1, "b": 2}), order(seed=1, model_args={"b": 2, "a": 1})
            assert [await ask(around, first), await ask(around, again), len(built)] == [7, 7, 1]
            with pytest.raises(AdaptError, match="version=7: d has had version 7"):
                await ask(around, order(seed=2, model_args={"a": 1, "b": 2}))

    asyncio.run(deploy())


# ── on trial ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_canary_that_cannot_be_judged_fails_its_version_and_few_are_judged_at_a_time(tmp_path, monkeypatch):
    """Regression: what was raised beside the loop was heard by nobody, and the version waited for ever."""
    told: list[ev.CanaryJudged] = []
    at_work, most, changing = 0, 0, threading.Lock()

    def judge(action, known, tolerance):
        nonlocal at_work, most
        with changing:
            at_work += 1
            most = max(most, at_work)
        threading.Event().wait(0.01)  # so that others would begin meanwhile
        with changing:
            at_work -= 1
        if action.run:
            raise MemoryError("no room")

    monkeypatch.setattr(deployer, "judge", judge)
    known = KnownCanaries("p", "x", (KnownCanary((), (), ()),))

    async def all_judged() -> None:
        async with a_deployer(tmp_path) as (around, store):
            recipe = Recipe(stages=1, codec="raw", tolerance=None, numerics="auto", program=a_program(store, 1))
            with around.deployments.under_way():
                await around.deployer.bring_up("d", recipe, lambda words: None)
            around.tell = told.append
            version = around.versions["d"]
            settled = asyncio.get_running_loop().create_future()
            around.deployer._loading[version.key] = deployer._Loading(settled, known, 0.1)
            for run in range(3 * JUDGES):
                output = ev.Activation((), ())
                around.deployer.judge(ev.JudgeCanary(version=version, run=run, canary=0, output=output, numeric_classes=("x",)))
            await asyncio.gather(*around.deployer._judging)

    asyncio.run(all_judged())
    assert most <= JUDGES
    errors = {judged.run: judged.error for judged in told}
    assert sorted(errors) == list(range(3 * JUDGES)) and errors.pop(0) is None
    assert all(
        isinstance(error, CanaryError) and "MemoryError: no room" in str(error) and not error.is_deviation for error in errors.values()
    )


PI = DeviceKind.of(msg.DeviceFacts(device="cpu", device_name="Pi", threads=1, numeric_class="torch-2/cpu/Pi/threads=1"), 0.0)
HANDLING, LZ4 = Handling(0.001, 1e-9), CodecProfile(name="lz4", ratio=2.0, encode_bytes_per_s=1e9, decode_bytes_per_s=1e9)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(
    ("handling", "has_codecs", "has_workspace"),
    [(None, True, True), (HANDLING, False, True), (HANDLING, True, False), (HANDLING, True, True)],
)
def test_kept_seconds_count_on_where_what_is_missing_cannot_be_measured(tmp_path, monkeypatch, handling, has_codecs, has_workspace, again):
    store, profiles = ArtifactStore(tmp_path), ProfileStore(tmp_path / "profiles")
    exported = export_module(torch.nn.Linear(4, 4).eval(), [torch.zeros(2, 4)], directory=store.directory)
    program, form = ProfiledProgram(Digest(exported.digest), exported.operator_costs_s), form_of(store.path(exported.digest))
    codecs = (replace(LZ4, ratios=(2.0, 2.0)),) if has_codecs else None
    costs_s = tuple(0.25 for _ in program.operator_costs_s)
    workspace = tuple(7 for _ in costs_s) if has_workspace else None
    kept = KeptProfile(
        device_class=PI.name, worker="w1", cores=0.0, costs_s=costs_s, handling=handling, codecs=codecs, workspace_bytes=workspace
    )
    profiles.write(form, kept)
    order = msg.Profile(call=1, name="m", device_class="", repetitions=3, again=again)
    outcomes: list[Measured | PlanError] = []

    async def measure(*_, **__):
        if isinstance(outcome := outcomes.pop(0), PlanError):
            raise outcome
        return WorkerId("w1"), outcome

    async def measured(*told: Measured | PlanError) -> list[Measured]:
        outcomes[:] = told
        around = Around(1 << 30)
        monkeypatch.setattr(around, "device_kinds", lambda: {WorkerId("w1"): PI})
        monkeypatch.setattr(around, "to_client", lambda *_: True, raising=False)
        with ThreadPoolExecutor(1) as threads:
            deployer = Deployer(store, None, around, profiles=profiles, models_dir=None, threads=threads, clock=time.monotonic)
            monkeypatch.setattr(deployer.profilers, "measure", measure)
            return [each for _, each in await deployer._measured(ClientId(b"c"), order, program, 2)]

    if again:
        with pytest.raises(PlanError, match="busy"):
            asyncio.run(measured(PlanError("busy")))
    else:
        assert asyncio.run(measured(PlanError("busy"))) == [Measured(list(costs_s), handling, codecs, workspace)]
    assert bool(outcomes) == (not again and None not in (handling, codecs, workspace)), "it was asked for unless all was there"
    if again or None in (handling, codecs, workspace):
        asyncio.run(measured(Measured([0.5 for _ in costs_s])))  # of which nothing but the seconds could be measured
        assert profiles.read(form)[PI.name] == replace(kept, costs_s=tuple(0.5 for _ in costs_s))
