"""A client's deployments under way: get the program, cut it, place it, wait until its stages are resident, say so. And its profiles: get the
program, have it measured on a worker of each kind.

Each runs as a background task that talks to the rest of the dispatcher by events alone; it ends with its client's session.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from adapt.clock import Clock
from adapt.config import counted
from adapt.errors import AdaptError, ConfigError, PlanError
from adapt.models.layers import completed
from adapt.models.program import read_program
from adapt.planning.placement import Plan, WorkerOffer
from adapt.protocol import messages as msg
from adapt.protocol.ids import ClientId, Digest, WorkerId
from adapt.protocol.wire import Blob
from adapt.runtime import builder
from adapt.runtime.artifacts import ArtifactStore, Download
from adapt.runtime.deployments import Blueprint, CutModel, Deployments, ProfiledProgram, check, cut, first_plan, plan_freely
from adapt.runtime.profiles import DeviceKind, KeptProfile, Profilers, ProfileStore, chosen, combined, form_of, kinds_of, known_costs
from adapt.scheduling import events as ev
from adapt.scheduling.links import Link

log = logging.getLogger(__name__)

FIRST_WORKER_S = 30.0  # how long a deployment waits for a first worker
STEP_LENGTH = 200  # characters of what a progress line says
BUILD_TIMEOUT_S = 600.0


class Surroundings(Protocol):
    """What the deployer needs of the dispatcher."""

    def tell(self, event: ev.Event) -> None: ...

    def to_client(self, client_id: ClientId, message: msg.Message, blobs: tuple[Blob, ...] = ()) -> bool: ...

    async def offers(self, *, wait_s: float, with_copies: bool = False) -> Sequence[WorkerOffer]: ...

    def version(self, deployment: str, number: int) -> ev.Version: ...

    def device_kinds(self) -> dict[WorkerId, DeviceKind]: ...

    def to_worker(self, worker_id: WorkerId, message: msg.Message) -> bool: ...

    def links(self) -> dict[WorkerId, Link]: ...


@dataclass(slots=True)
class _Call:
    task: asyncio.Task[None]
    download: Download | None = None


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
        self._profiles, self.profilers = profiles, Profilers(surroundings.to_worker)
        self._models_dir, self._threads, self._clock = models_dir, threads, clock
        self._calls: dict[tuple[ClientId, int], _Call] = {}
        self._waiting: dict[tuple[str, int], asyncio.Future[None]] = {}  # versions that are loading

    def begin(self, client_id: ClientId, order: msg.Deploy | msg.Profile) -> None:
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
        waiting = self._waiting.get((version.deployment, version.number))
        if waiting is not None and not waiting.done():
            if error is None:
                waiting.set_result(None)
            else:
                waiting.set_exception(error)

    def piece_came(self, client_id: ClientId, message: msg.ArtifactPiece, blob: Blob) -> None:
        for download in self._downloads(client_id, message.artifact):
            download.received(message, blob)

    def piece_missing(self, client_id: ClientId, artifact: str) -> None:
        for download in self._downloads(client_id, artifact):
            download.missing()

    async def close(self) -> None:
        tasks = [call.task for call in self._calls.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _downloads(self, client_id: ClientId, artifact: str) -> list[Download]:
        downloads = [call.download for key, call in self._calls.items() if key[0] == client_id]
        return [download for download in downloads if download is not None and download.digest == artifact]

    async def _answer(self, client_id: ClientId, order: msg.Deploy | msg.Profile) -> None:
        what = "deployment" if isinstance(order, msg.Deploy) else "profile"
        answer: msg.Deployed | msg.Profiled
        try:
            with self._deployments.under_way():
                if isinstance(order, msg.Deploy):
                    answer = await self._deploy(client_id, order)
                else:
                    answer = await self._profile(client_id, order)
        except AdaptError as error:
            log.warning("%s failed", what, extra={"deployment": order.name, "reason": str(error)})
            self._fail(client_id, order, error)
        except Exception as error:  # a bug of ours must not leave the client waiting
            log.exception("%s failed", what, extra={"deployment": order.name})
            self._fail(client_id, order, AdaptError(f"{what} failed in the dispatcher: {type(error).__name__}: {error}"))
        else:
            self._around.to_client(client_id, answer)

    def _fail(self, client_id: ClientId, order: msg.Deploy | msg.Profile, error: AdaptError) -> None:
        code, message, fields = error.to_wire()
        self._around.to_client(client_id, msg.CallFailed(call=order.call, code=code, message=message, fields=fields))

    async def _deploy(self, client_id: ClientId, deploy: msg.Deploy) -> msg.Deployed:
        codec = check(deploy)
        program = await self._program(client_id, deploy)
        made = {program.digest}  # files that are of no use if this comes to nothing
        try:
            version = await self._plan(client_id, deploy, codec, program, made)
        except BaseException:
            self._deployments.discard(made)
            raise
        plan = version.plan
        workers = len({worker for place in plan.places for worker in place})
        self._progress(client_id, deploy, f"loading {counted(len(plan.stages), 'stage')} on {counted(workers, 'worker')}")
        await self._ready(version)
        log.info("deployed", extra={"deployment": deploy.name, "version": version.number, "stages": len(plan.stages)})
        record = self._deployments.record(self._around.version(version.deployment, version.number))
        return msg.Deployed(call=deploy.call, deployment=record)

    async def _plan(self, client_id: ClientId, deploy: msg.Deploy, codec: str, program: ProfiledProgram, made: set[Digest]) -> ev.Version:
        """Cut the program and place its stages. Adds to `made` what it writes."""
        self._progress(client_id, deploy, "cutting the model into stages")
        if not (offers := await self._around.offers(wait_s=FIRST_WORKER_S)):
            raise PlanError("no worker is connected; start one with: adapt-worker --dispatcher ADDRESS")
        try:
            model, plan = await self._placed(deploy, program, offers, made)
        except PlanError:  # then copies of other stages give way
            model, plan = await self._placed(deploy, program, await self._around.offers(wait_s=0.0, with_copies=True), made)
        version = ev.Version(
            deployment=deploy.name,
            number=self._deployments.next_number(deploy.name),
            program=model.program,
            codec=codec,
            tolerance=deploy.tolerance,
            exact=deploy.numerics == "exact",
            peak_ratio=model.peak_ratio,
            arithmetic=model.arithmetic,
            plan=plan,
        )
        self._deployments.put(version, Blueprint(model.interface, deploy.numerics, model.file_bytes))
        return version

    async def _placed(
        self, deploy: msg.Deploy, program: ProfiledProgram, offers: Sequence[WorkerOffer], made: set[Digest]
    ) -> tuple[CutModel, Plan]:
        if deploy.stages:
            model = await asyncio.to_thread(cut, self._store, program, deploy.stages)
            made |= {need.artifact for need in model.stages}
            return model, first_plan(model, offers)
        costs_s = await asyncio.to_thread(self._known_costs, program, self._around.device_kinds())
        model, plan = await asyncio.to_thread(
            plan_freely, self._store, program, offers, name=deploy.name, costs_s=costs_s, links=self._around.links()
        )
        made |= {need.artifact for need in model.stages}
        return model, plan

    def _known_costs(self, program: ProfiledProgram, kinds: dict[WorkerId, DeviceKind]) -> dict[WorkerId, tuple[float, ...]]:
        """Seconds of each operator on the workers whose kind was measured. Blocks."""
        kept = self._profiles.read(form_of(self._store.path(program.digest)))
        return known_costs(kept, kinds, len(program.operator_costs_s))

    async def _ready(self, version: ev.Version) -> None:
        """Hand the version to the scheduler and wait until every stage is resident, or raise what prevents it."""
        key = (version.deployment, version.number)
        self._waiting[key] = asyncio.get_running_loop().create_future()
        self._around.tell(ev.VersionDeployed(version=version))
        try:
            await self._waiting[key]
        except asyncio.CancelledError:
            self._around.tell(ev.VersionWithdrawn(deployment=version.deployment, number=version.number))
            raise
        finally:
            del self._waiting[key]

    # ── profiles ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _profile(self, client_id: ClientId, order: msg.Profile) -> msg.Profiled:
        if (order.named is None) == (order.uploaded is None):
            raise ConfigError("profile: give either a named model or an uploaded program")
        if not await self._around.offers(wait_s=FIRST_WORKER_S):
            raise PlanError("no worker is connected; start one with: adapt-worker --dispatcher ADDRESS")
        chosen(kinds_of(self._around.device_kinds()), order.device_class)  # refused before anything is exported
        program = await self._program(client_id, order)
        try:
            found = await self._measured(client_id, order, program)
            source = await asyncio.to_thread(read_program, self._store.path(program.digest))
            model = await asyncio.to_thread(combined, order.name, source, found, program.operator_costs_s)
        finally:
            self._deployments.discard({program.digest})
        return msg.Profiled(call=order.call, profile=model.to_json())

    async def _measured(
        self, client_id: ClientId, order: msg.Profile, program: ProfiledProgram
    ) -> list[tuple[DeviceKind, Sequence[float | None]]]:
        """Seconds of each operator on each kind of device that is wanted; raises PlanError if no kind could be measured."""
        path = self._store.path(program.digest)
        form = await asyncio.to_thread(form_of, path)
        kept = {} if order.again else await asyncio.to_thread(self._profiles.read, form)
        free = {offer.worker_id: offer.free_bytes for offer in await self._around.offers(wait_s=0.0)}
        found: list[tuple[DeviceKind, Sequence[float | None]]] = []
        failed: PlanError | None = None
        for kind in chosen(kinds_of(self._around.device_kinds()), order.device_class):
            known = kept.get(kind.name)
            if known is not None and len(known.costs_s) == len(program.operator_costs_s):
                found.append((kind, known.costs_s))
                continue
            roomy = sorted(kind.workers, key=lambda worker: (-free.get(worker, 0), worker))
            try:
                worker_id, costs_s = await self.profilers.measure(
                    program.digest,
                    path.stat().st_size,
                    replace(kind, workers=tuple(roomy)),
                    repetitions=order.repetitions,
                    told=partial(self._progress, client_id, order),
                )
            except PlanError as error:
                self._progress(client_id, order, str(error))
                failed = error
                continue
            if len(costs_s) != len(program.operator_costs_s):
                failed = PlanError(f"{worker_id} measured {len(costs_s)} operators, the program has {len(program.operator_costs_s)}")
                continue
            await self._keep(form, kind, worker_id, completed(costs_s, program.operator_costs_s))
            found.append((replace(kind, workers=(worker_id, *(other for other in kind.workers if other != worker_id))), costs_s))
        if not found:
            raise failed or PlanError("no worker is left that could be measured")
        return found

    async def _keep(self, form: str, kind: DeviceKind, worker_id: WorkerId, costs_s: tuple[float, ...]) -> None:
        profile = KeptProfile(device_class=kind.name, worker=worker_id, cores=kind.cores, costs_s=costs_s)
        await asyncio.to_thread(self._profiles.write, form, profile)

    # ── what both need ───────────────────────────────────────────────────────────────────────────────────────────────

    async def _program(self, client_id: ClientId, deploy: msg.Deploy | msg.Profile) -> ProfiledProgram:
        """The program: built in a child process, or pulled from the client."""
        if deploy.named is not None:
            self._progress(client_id, deploy, f"exporting {deploy.named.model}")
            built = await builder.build(
                deploy.named, directory=self._store.directory, models_dir=self._models_dir, timeout_s=BUILD_TIMEOUT_S
            )
            return ProfiledProgram(Digest(built.digest), built.operator_costs_s)
        assert deploy.uploaded is not None, "checked before"
        digest, file_bytes = Digest(deploy.uploaded.program), deploy.uploaded.file_bytes
        if not self._store.has(digest):
            self._progress(client_id, deploy, f"receiving the program, {file_bytes / 1e6:.1f} MB")
            download = Download(
                self._store,
                digest,
                file_bytes,
                send=lambda fetch: self._around.to_client(client_id, fetch),
                threads=self._threads,
                clock=self._clock,
            )
            self._calls[client_id, deploy.call].download = download
            await download.run()
        return ProfiledProgram(digest, deploy.uploaded.operator_costs_s)

    def _progress(self, client_id: ClientId, order: msg.Deploy | msg.Profile, step: str, share: float | None = None) -> None:
        self._around.to_client(client_id, msg.Progress(call=order.call, step=step[:STEP_LENGTH], share=share))
