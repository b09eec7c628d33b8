"""Deployments under way: get the program, cut it, place it, wait until its stages are resident and its canaries have come out right, say so.
And clients' profiles: get the program, have it measured on a worker of each kind. And other stages for a version that takes requests already,
when replanning.py says so.

A client's runs as a background task that talks to the rest of the dispatcher by events alone; it ends with its client's session.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from msgspec import json

from adapt.clock import Clock
from adapt.config import counted
from adapt.errors import AdaptError, CanaryError, ConfigError, PlanError
from adapt.models.canaries import FILE_LIMIT_BYTES, TOLERANCE, KnownCanaries, check_fits, deviation, read_canaries
from adapt.models.interface import interface_digest
from adapt.models.layers import completed, profile_model
from adapt.models.program import Program, read_program
from adapt.planning.placement import NOBODY, Plan, WorkerOffer
from adapt.protocol import codecs
from adapt.protocol import messages as msg
from adapt.protocol.codecs import TensorHeader
from adapt.protocol.ids import ClientId, Digest, Epoch, WorkerId
from adapt.protocol.wire import Blob
from adapt.runtime import builder
from adapt.runtime.artifacts import ArtifactStore, Download
from adapt.runtime.deployments import Blueprint, CutModel, Deployments, check, cut, cut_as, first_plan, plan_freely
from adapt.runtime.profiles import (
    DeviceKind,
    KeptProfile,
    KnownCosts,
    Measured,
    Profilers,
    ProfileStore,
    chosen,
    combined,
    form_of,
    is_believable,
    kinds_of,
    known_costs,
)
from adapt.runtime.recipes import CanaryFile, ProfiledProgram, Recipe
from adapt.runtime.terms import Proposal
from adapt.scheduling import events as ev
from adapt.scheduling.links import Link

log = logging.getLogger(__name__)

FIRST_WORKER_S = 30.0  # how long a deployment waits for a first worker
STEP_LENGTH = 200  # characters of what a progress line says
OUTPUT_LIMIT_BYTES = 1 << 30  # of a canary
JUDGES = 2  # canaries that are looked at at a time


class Surroundings(Protocol):
    """What the deployer needs of the dispatcher."""

    def tell(self, event: ev.Event) -> None: ...

    def to_client(self, client_id: ClientId, message: msg.Message, blobs: tuple[Blob, ...] = ()) -> bool: ...

    async def offers(self, *, wait_s: float, with_copies: bool = False) -> Sequence[WorkerOffer]: ...

    def version(self, deployment: str, number: int) -> ev.Version: ...

    def device_kinds(self) -> dict[WorkerId, DeviceKind]: ...

    def to_worker(self, worker_id: WorkerId, message: msg.Message) -> bool: ...

    def links(self) -> dict[WorkerId, Link]: ...

    def present(self) -> list[ev.Version]: ...


@dataclass(slots=True)
class _Call:
    task: asyncio.Task[None]
    download: Download | None = None


@dataclass(slots=True)
class _Loading:
    """A version that is to become ready."""

    settled: asyncio.Future[None]
    known: KnownCanaries | None
    tolerance: float


class Deployer:
    """See the head of this file. Lives on the dispatcher's loop."""

    def __init__(
        self,
        store: ArtifactStore,
        deployments: Deployments,
        surroundings: Surroundings,
        *,
        profiles: ProfileStore,
        models_dir: Path | None,
        threads: Executor,
        clock: Clock,
    ) -> None:
        self._store, self._deployments, self._around = store, deployments, surroundings
        self._profiles = profiles
        self.profilers = Profilers(surroundings.to_worker, make_room=self._make_room)
        self._models_dir, self._threads, self._clock = models_dir, threads, clock
        self._calls: dict[tuple[ClientId, int], _Call] = {}
        self._loading: dict[ev.VersionKey, _Loading] = {}
        self._judging: set[asyncio.Task[None]] = set()
        self._judges = asyncio.Semaphore(JUDGES)
        self.planning = asyncio.Lock()  # from reading what workers offer until the scheduler knows what was planned with that
        self._recut: asyncio.Task[None] | None = None  # waits for a version's other stages

    def begin(self, client_id: ClientId, order: msg.Deploy | msg.Rollback | msg.Profile) -> None:
        """Start work; its answer goes to the client."""
        name = f"{type(order).__name__.lower()} {order.name}"
        task = asyncio.get_running_loop().create_task(self._answer(client_id, order), name=name)
        key = (client_id, order.call)
        self._calls[key] = _Call(task)
        task.add_done_callback(lambda done: self._calls.pop(key, None))

    def cancel(self, client_id: ClientId, number: int) -> None:
        """The client does not wait for this deployment any more; nothing happens if it has ended."""
        if (call := self._calls.get((client_id, number))) is not None:
            call.task.cancel()

    def client_gone(self, client_id: ClientId) -> None:
        """Its deployments are given up."""
        for key, call in list(self._calls.items()):
            if key[0] == client_id:
                call.task.cancel()

    def settled(self, version: ev.Version, error: AdaptError | None) -> None:
        """The scheduler says that the version is ready, or why it never will be."""
        loading = self._loading.get(version.key)
        if loading is not None and not loading.settled.done():
            if error is None:
                loading.settled.set_result(None)
            else:
                loading.settled.set_exception(error)

    def judge(self, action: ev.JudgeCanary) -> None:
        """Compare a canary's output with what is expected, beside the loop; then the scheduler is told."""
        loading = self._loading.get(action.version.key)
        if loading is None or loading.known is None:  # nobody waits for it any more
            return
        task = asyncio.get_running_loop().create_task(self._judge(action, loading, loading.known), name="judge canary")
        self._judging.add(task)
        task.add_done_callback(self._judging.discard)

    async def _judge(self, action: ev.JudgeCanary, loading: _Loading, known: KnownCanaries) -> None:
        version = action.version
        try:
            async with self._judges:
                error = await asyncio.to_thread(judge, action, known, loading.tolerance)
        except Exception as fault:  # no memory, or a bug of ours: the version must not wait for ever
            log.exception("canary not judged", extra={"deployment": version.deployment, "version": version.number})
            what = f"canary {action.canary}: its output could not be compared: {type(fault).__name__}: {fault}"
            error = CanaryError(what, canary=action.canary, is_deviation=False)
        if self._loading.get(version.key) is not loading:  # the number may be another version's by now
            return
        deployment, number, cut = version.key
        self._around.tell(ev.CanaryJudged(deployment=deployment, number=number, cut=cut, run=action.run, error=error))

    def piece_came(self, client_id: ClientId, message: msg.ArtifactPiece, blob: Blob) -> None:
        for download in self._downloads(client_id, message.artifact):
            download.received(message, blob)

    def piece_missing(self, client_id: ClientId, artifact: str) -> None:
        for download in self._downloads(client_id, artifact):
            download.missing()

    async def close(self) -> None:
        tasks = [*(call.task for call in self._calls.values()), *self._judging, *([self._recut] if self._recut is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _downloads(self, client_id: ClientId, artifact: str) -> list[Download]:
        downloads = [call.download for key, call in self._calls.items() if key[0] == client_id]
        return [download for download in downloads if download is not None and download.digest == artifact]

    async def _answer(self, client_id: ClientId, order: msg.Deploy | msg.Rollback | msg.Profile) -> None:
        what = "profile" if isinstance(order, msg.Profile) else "deployment"
        answer: msg.Deployed | msg.Profiled
        try:
            with self._deployments.under_way():
                if isinstance(order, msg.Profile):
                    answer = await self._profile(client_id, order)
                else:
                    bring_up = self._deploy(client_id, order) if isinstance(order, msg.Deploy) else self._roll_back(client_id, order)
                    answer = msg.Deployed(call=order.call, deployment=await bring_up)
        except AdaptError as error:
            log.warning("%s failed", what, extra={"deployment": order.name, "reason": str(error)})
            self._fail(client_id, order, error)
        except Exception as error:  # a bug of ours must not leave the client waiting
            log.exception("%s failed", what, extra={"deployment": order.name})
            self._fail(client_id, order, AdaptError(f"{what} failed in the dispatcher: {type(error).__name__}: {error}"))
        else:
            self._around.to_client(client_id, answer)

    def _fail(self, client_id: ClientId, order: msg.Deploy | msg.Rollback | msg.Profile, error: AdaptError) -> None:
        code, message, fields = error.to_wire()
        self._around.to_client(client_id, msg.CallFailed(call=order.call, code=code, message=message, fields=fields))

    async def _deploy(self, client_id: ClientId, deploy: msg.Deploy) -> msg.DeploymentRecord:
        codec = check(deploy)
        say = partial(self._progress, client_id, deploy.call)
        if (record := self._is_present(deploy)) is not None:
            return record
        self._deployments.check_number(deploy.name, deploy.version)
        program = await self._program(client_id, deploy)
        try:
            canaries = await self._canaries(client_id, deploy)
        except BaseException:
            self._deployments.discard([program.digest])
            raise
        recipe = Recipe(
            number=deploy.version,
            source=_source(deploy),
            stages=deploy.stages,
            codec=codec,
            tolerance=deploy.tolerance,
            numerics=deploy.numerics,
            program=program,
            canaries=canaries,
        )
        return await self.bring_up(deploy.name, recipe, say)

    def _is_present(self, deploy: msg.Deploy) -> msg.DeploymentRecord | None:
        """What the client asks for once more, having lost the answer."""
        present = self._deployments.present(deploy.name)
        if not deploy.version or present is None or present.number != deploy.version:
            return None
        is_same = present.source == _source(deploy) if deploy.uploaded is None else present.program.digest == deploy.uploaded.program
        return self._deployments.record(self._around.version(deploy.name, present.number)) if is_same else None

    async def _roll_back(self, client_id: ClientId, rollback: msg.Rollback) -> msg.DeploymentRecord:
        present = self._deployments.present(rollback.name)
        if present is not None and rollback.version and rollback.version in (present.again, present.asked):  # the answer was lost
            return self._deployments.record(self._around.version(rollback.name, present.number))
        number = rollback.version or next(reversed(self._deployments.earlier(rollback.name)), 0)
        recipe = self._deployments.recipe(rollback.name, number)
        return await self.bring_up(rollback.name, recipe.repeated(number), partial(self._progress, client_id, rollback.call))

    async def bring_up(self, name: str, recipe: Recipe, say: Callable[[str], None]) -> msg.DeploymentRecord:
        """Make a version by a recipe whose files are in the store, load it beside the present one, try it, and switch to it.

        To be called while `Deployments.under_way`.

        Raises:
            PlanError: no workers, or none with memory for a stage.
            CanaryError: workers come to something else than the exporting process.
            ConfigError: it may not have the number that its recipe wishes for.
            AdaptError: it was withdrawn or replaced before it was ready, or cannot be loaded.
        """
        made = set(recipe.files)  # files that are of no use if this comes to nothing
        try:
            if not await self._around.offers(wait_s=FIRST_WORKER_S):
                raise PlanError(NOBODY)
            await self.planning.acquire()
        except BaseException:
            self._deployments.discard(made)
            raise
        try:
            await self._give_up_recut()
            version, loading = await self._begin(name, recipe, say, made)
        finally:
            self.planning.release()
        await self._settled(version, loading)
        log.info("deployed", extra={"deployment": name, "version": version.number, "stages": len(version.plan.stages)})
        return self._deployments.record(self._around.version(version.deployment, version.number))

    async def _begin(self, name: str, recipe: Recipe, say: Callable[[str], None], made: set[Digest]) -> tuple[ev.Version, _Loading]:
        """Plan a version and hand it to the scheduler; or leave nothing behind."""
        try:
            version, model = await self._plan(name, recipe, say, made)
        except BaseException:
            self._deployments.discard(made)
            raise
        return version, await self._hand_over(version, model, recipe, say)

    async def _hand_over(self, version: ev.Version, model: CutModel, recipe: Recipe, say: Callable[[str], None]) -> _Loading:
        """Tell the scheduler of a version that is written down; or drop it."""
        try:
            known, canaries = await asyncio.to_thread(self._known, recipe, model)
        except BaseException:
            self._deployments.drop(version)
            raise
        plan = version.plan
        workers = len({worker for place in plan.places for worker in place})
        tried = f", to be tried on {counted(len(canaries), 'input')}" if canaries else ""
        say(f"loading {counted(len(plan.stages), 'stage')} on {counted(workers, 'worker')}{tried}")
        loading = _Loading(asyncio.get_running_loop().create_future(), known, _tolerance(recipe))
        self._loading[version.key] = loading
        self._around.tell(ev.VersionDeployed(version=version, canaries=canaries))
        return loading

    async def recut(self, present: ev.Version, recipe: Recipe, proposal: Proposal) -> asyncio.Task[None]:
        """Cut a version that takes requests as it is proposed now, and hand it to the scheduler: loaded beside the present one, tried, and
        switched to. A deployment that begins meanwhile comes first: then it is given up.

        To be called with `planning` held.

        Returns:
            What waits until that is done; it raises AdaptError: the stages cannot be loaded, or are not right.

        Raises:
            AdaptError: it cannot be cut.
        """
        with self._deployments.under_way():
            model, plan = await asyncio.to_thread(cut_as, self._store, recipe.program, proposal, epoch=Epoch(present.plan.epoch + 1))
            version = replace(present, cut=self._deployments.next_cut(present), peak_ratio=model.peak_ratio, plan=plan)
            self._deployments.put(version, Blueprint(model.interface, recipe.numerics, model.file_bytes, recipe, model.positions))
            loading = await self._hand_over(version, model, recipe, lambda words: None)
        self._recut = asyncio.get_running_loop().create_task(self._settled(version, loading), name=f"recut {version.deployment}")
        await asyncio.sleep(0)  # what is cancelled before it has begun would withdraw nothing
        return self._recut

    async def _give_up_recut(self) -> None:
        """Unless it is done."""
        if self._recut is not None:
            self._recut.cancel()
            await asyncio.wait([self._recut])
            self._recut = None

    def _known(self, recipe: Recipe, model: CutModel) -> tuple[KnownCanaries | None, tuple[ev.Canary, ...]]:
        """The canaries of a recipe, and what has to come of them stage by stage. Blocks. Raises WireError: they are not for this program."""
        if recipe.canaries is None:
            return None, ()
        known = read_canaries(self._store.path(recipe.canaries.digest))
        graph = read_program(self._store.path(recipe.program.digest), verify=False).graph
        check_fits(known, recipe.program.digest, graph)
        return known, tuple(to_event(known, number, model.leaving, model.value_count) for number in range(len(known.canaries)))

    async def _plan(self, name: str, recipe: Recipe, say: Callable[[str], None], made: set[Digest]) -> tuple[ev.Version, CutModel]:
        """Cut the program and place its stages. Adds to `made` what it writes."""
        say("cutting the model into stages")
        try:
            model, plan = await self._placed(name, recipe, await self._around.offers(wait_s=0.0), made)
        except PlanError:  # then copies of other stages give way
            model, plan = await self._placed(name, recipe, await self._around.offers(wait_s=0.0, with_copies=True), made)
        number = self._deployments.next_number(name, recipe.number)
        version = ev.Version(
            deployment=name,
            number=number,
            program=model.program,
            codec=recipe.codec,
            tolerance=recipe.tolerance,
            exact=recipe.is_exact,
            peak_ratio=model.peak_ratio,
            interface=interface_digest(model.interface),
            arithmetic=model.arithmetic,
            plan=plan,
        )
        blueprint = Blueprint(model.interface, recipe.numerics, model.file_bytes, replace(recipe, number=number), model.positions)
        self._deployments.put(version, blueprint)
        return version, model

    async def _placed(self, name: str, recipe: Recipe, offers: Sequence[WorkerOffer], made: set[Digest]) -> tuple[CutModel, Plan]:
        if recipe.stages:
            model = await asyncio.to_thread(cut, self._store, recipe.program, recipe.stages)
            made |= {need.artifact for need in model.stages}
            return model, first_plan(model, offers, exact=recipe.is_exact)
        known = await asyncio.to_thread(self.known_costs, recipe.program, self._around.device_kinds())
        model, plan = await asyncio.to_thread(
            plan_freely, self._store, recipe.program, offers, name=name, known=known, links=self._around.links(), exact=recipe.is_exact
        )
        made |= {need.artifact for need in model.stages}
        return model, plan

    def known_costs(self, program: ProfiledProgram, kinds: dict[WorkerId, DeviceKind]) -> dict[WorkerId, KnownCosts]:
        """What the program takes on the workers whose kind was measured. Blocks."""
        kept = self._profiles.read(form_of(self._store.path(program.digest)))
        return known_costs(kept, kinds, len(program.operator_costs_s))

    async def _settled(self, version: ev.Version, loading: _Loading) -> None:
        """Wait until the version is ready, or raise what prevents it."""
        try:
            await loading.settled
        except asyncio.CancelledError:
            deployment, number, cut = version.key
            self._around.tell(ev.VersionWithdrawn(deployment=deployment, number=number, cut=cut))
            raise
        finally:
            del self._loading[version.key]

    # ── profiles ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _make_room(self, worker_id: WorkerId) -> None:
        self._around.tell(ev.RoomWanted(worker_id=worker_id))

    async def _profile(self, client_id: ClientId, order: msg.Profile) -> msg.Profiled:
        if (order.named is None) == (order.uploaded is None):
            raise ConfigError("profile: give either a named model or an uploaded program")
        if not await self._around.offers(wait_s=FIRST_WORKER_S):
            raise PlanError(NOBODY)
        chosen(kinds_of(self._around.device_kinds()), order.device_class)  # refused before anything is exported
        program = await self._program(client_id, order)
        try:
            source, boundaries = await asyncio.to_thread(self._measurable, order.name, program)
            found = await self._measured(client_id, order, program, boundaries)
            model = await asyncio.to_thread(combined, order.name, source, found, program.operator_costs_s)
        finally:
            self._deployments.discard({program.digest})
        return msg.Profiled(call=order.call, profile=model.to_json())

    def _measurable(self, name: str, program: ProfiledProgram) -> tuple[Program, int]:
        """Read here before any worker has to; and the number of its boundaries. Blocks. Raises AdaptError: it cannot be profiled."""
        try:
            source = read_program(self._store.path(program.digest))
            boundaries = len(profile_model(name, source, program.operator_costs_s).crossing_bytes)
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # of sizes that nobody can have meant
            raise ConfigError(f"{name}: the program cannot be profiled: {type(error).__name__}: {str(error)[:1000]}") from error
        return source, boundaries

    async def _measured(
        self, client_id: ClientId, order: msg.Profile, program: ProfiledProgram, boundaries: int
    ) -> list[tuple[DeviceKind, Measured]]:
        """On each kind of device that is wanted; raises PlanError if no kind could be measured. What is kept is measured anew if that is wanted
        or something of it is missing, and counts on where that fails."""
        form = await asyncio.to_thread(form_of, self._store.path(program.digest))
        kept = await asyncio.to_thread(self._profiles.read, form)
        free = {offer.worker_id: offer.free_bytes for offer in await self._around.offers(wait_s=0.0)}

        async def measured(kind: DeviceKind) -> tuple[DeviceKind, Measured] | PlanError:
            known = _fitting(kept.get(kind.name), operators=len(program.operator_costs_s), boundaries=boundaries)
            if known is not None and known.is_whole and not order.again:
                return kind, known
            roomy = sorted(kind.workers, key=lambda worker: (-free.get(worker, 0), worker))
            try:
                worker_id, told = await self._measured_on(replace(kind, workers=tuple(roomy)), client_id, order, program)
            except PlanError as error:
                self._progress(client_id, order.call, str(error))
                return error if known is None or order.again else (kind, known)
            told = told.fitting(boundaries).completed_by(known)
            await self._keep(form, kind, worker_id, completed(told.costs_s, program.operator_costs_s), told)
            return replace(kind, workers=(worker_id, *(other for other in kind.workers if other != worker_id))), told

        try:
            async with asyncio.TaskGroup() as group:
                kinds = chosen(kinds_of(self._around.device_kinds()), order.device_class)
                together_first = sorted(kinds, key=lambda kind: not kind.counts_cpu)
                by_name = {kind.name: group.create_task(measured(kind)) for kind in together_first}
        except ExceptionGroup as failed:  # of no kind's doing
            raise failed.exceptions[0] from None
        ended = [by_name[kind.name].result() for kind in kinds]
        if found := [one for one in ended if not isinstance(one, PlanError)]:
            return found
        raise next((one for one in reversed(ended) if isinstance(one, PlanError)), PlanError("no worker is left that could be measured"))

    async def _measured_on(
        self, kind: DeviceKind, client_id: ClientId, order: msg.Profile, program: ProfiledProgram
    ) -> tuple[WorkerId, Measured]:
        """By which worker, and what it says. Raises PlanError: nobody of this kind says what could be of this program."""
        worker_id, measured = await self.profilers.measure(
            program.digest,
            self._store.path(program.digest).stat().st_size,
            kind,
            repetitions=order.repetitions,
            told=partial(self._progress, client_id, order.call),
        )
        if len(measured.costs_s) != len(program.operator_costs_s):
            raise PlanError(f"{worker_id} measured {len(measured.costs_s)} operators, the program has {len(program.operator_costs_s)}")
        return worker_id, measured

    async def _keep(self, form: str, kind: DeviceKind, worker_id: WorkerId, costs_s: tuple[float, ...], measured: Measured) -> None:
        """`costs_s`: of all operators."""
        if not is_believable(costs_s):  # as completed by what a client has sent
            return
        profile = KeptProfile(
            device_class=kind.name,
            worker=worker_id,
            cores=kind.cores,
            costs_s=costs_s,
            handling=measured.handling,
            codecs=measured.codecs,
            workspace_bytes=measured.workspace_bytes,
        )
        await asyncio.to_thread(self._profiles.write, form, profile)

    # ── what both need ───────────────────────────────────────────────────────────────────────────────────────────────

    async def _program(self, client_id: ClientId, order: msg.Deploy | msg.Profile) -> ProfiledProgram:
        """The program: built in a child process, or pulled from the client."""
        if order.named is not None:
            self._progress(client_id, order.call, f"exporting {order.named.model}")
            built = await builder.build(order.named, directory=self._store.directory, models_dir=self._models_dir)
            return ProfiledProgram(Digest(built.digest), built.operator_costs_s)
        assert order.uploaded is not None, "checked before"
        digest, file_bytes = Digest(order.uploaded.program), order.uploaded.file_bytes
        await self._pull(client_id, order.call, digest, file_bytes, f"receiving the program, {file_bytes / 1e6:.1f} MB")
        return ProfiledProgram(digest, order.uploaded.operator_costs_s)

    async def _canaries(self, client_id: ClientId, deploy: msg.Deploy) -> CanaryFile | None:
        if (source := deploy.canaries) is None:
            return None
        if source.file_bytes > FILE_LIMIT_BYTES:
            raise ConfigError(f"canaries of {source.file_bytes} bytes; {FILE_LIMIT_BYTES} are allowed: give fewer, or smaller ones")
        await self._pull(client_id, deploy.call, Digest(source.file), source.file_bytes, "receiving the canaries")
        return CanaryFile(Digest(source.file), source.tolerance)

    async def _pull(self, client_id: ClientId, call: int, digest: Digest, file_bytes: int, words: str) -> None:
        if self._store.has(digest):
            return
        self._progress(client_id, call, words)
        download = Download(
            self._store,
            digest,
            file_bytes,
            send=lambda fetch: self._around.to_client(client_id, fetch),
            threads=self._threads,
            clock=self._clock,
        )
        self._calls[client_id, call].download = download
        await download.run()

    def _progress(self, client_id: ClientId, call: int, step: str, share: float | None = None) -> None:
        self._around.to_client(client_id, msg.Progress(call=call, step=step[:STEP_LENGTH], share=share))


def _source(deploy: msg.Deploy) -> str:
    """By which an order for a named model is known again; "" for a program."""
    return "" if deploy.named is None else hashlib.sha256(json.encode(deploy.named, order="sorted")).hexdigest()


def _tolerance(recipe: Recipe) -> float:
    return TOLERANCE if recipe.canaries is None else recipe.canaries.tolerance


def to_event(known: KnownCanaries, number: int, leaving: Sequence[Sequence[int]], value_count: int) -> ev.Canary:
    """What the scheduler has to know of a canary: its input as a client would send it, and each stage's digest."""
    leaves: list[msg.Leaf] = []
    blobs: list[Blob] = []
    for leaf in known.canaries[number].inputs:
        if isinstance(leaf, int):
            leaves.append(leaf)
        else:
            header, payload = codecs.encode(leaf[1], dtype=leaf[0])
            leaves.append(header)
            blobs.append(Blob.of(payload))
    digests = known.stage_digests(number, leaving, value_count)
    return ev.Canary(input=ev.Activation(leaves, tuple(blobs)), numeric_class=known.numeric_class, digests=digests)


def judge(action: ev.JudgeCanary, known: KnownCanaries, tolerance: float) -> CanaryError | None:
    """Why a canary's output is not what it should be. Blocks for as long as its decoding takes."""
    where = f"canary {action.canary} (computed by {' and '.join(action.numeric_classes)}): "
    expected = known.canaries[action.canary].outputs
    try:
        blobs = iter(action.output.blobs)
        for place, (leaf, wanted) in enumerate(zip(action.output.leaves, expected, strict=True)):
            got = (leaf.dtype, _decoded(leaf, next(blobs))) if isinstance(leaf, TensorHeader) else leaf
            off = deviation(got, wanted)  # type: ignore[arg-type]  # a number of another kind is infinitely off
            if off > tolerance:
                raise CanaryError(
                    f"{where}output {place} deviates from the exporting process's by {off:.3g} of its largest magnitude; "
                    f"{tolerance:g} is allowed (canary_tolerance)",
                    canary=action.canary,
                )
    except CanaryError as error:
        return error
    except (AdaptError, ValueError) as error:
        return CanaryError(f"{where}its output cannot be read: {error}", canary=action.canary)
    return None


def _decoded(header: TensorHeader, blob: Blob) -> codecs.Array:
    return codecs.decode(header, blob.contiguous(), limit_bytes=OUTPUT_LIMIT_BYTES)


def _fitting(kept: KeptProfile | None, *, operators: int, boundaries: int) -> Measured | None:
    """What is kept of a program with so many; None: nothing."""
    if kept is None or len(kept.costs_s) != operators:
        return None
    return Measured(list(kept.costs_s), kept.handling, kept.codecs, kept.workspace_bytes).fitting(boundaries)
