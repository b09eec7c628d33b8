"""A client's deployments under way: get the program, cut it, place it, wait until its stages are resident, say so.

Each runs as a background task that talks to the rest of the dispatcher by events alone; it ends with its client's session.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from adapt.clock import Clock
from adapt.config import counted
from adapt.errors import AdaptError, PlanError
from adapt.planning.placement import Plan, WorkerOffer
from adapt.protocol import messages as msg
from adapt.protocol.ids import ClientId, Digest
from adapt.protocol.wire import Blob
from adapt.runtime import builder
from adapt.runtime.artifacts import ArtifactStore, Download
from adapt.runtime.deployments import Blueprint, CutModel, Deployments, ProfiledProgram, check, cut, first_plan, plan_freely
from adapt.scheduling import events as ev

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
        models_dir: Path | None,
        threads: Executor,
        clock: Clock,
    ) -> None:
        self._store, self._deployments, self._around = store, deployments, surroundings
        self._models_dir, self._threads, self._clock = models_dir, threads, clock
        self._calls: dict[tuple[ClientId, int], _Call] = {}
        self._waiting: dict[tuple[str, int], asyncio.Future[None]] = {}  # versions that are loading

    def begin(self, client_id: ClientId, deploy: msg.Deploy) -> None:
        """Start work on a `Deploy`; its answer goes to the client."""
        task = asyncio.get_running_loop().create_task(self._answer(client_id, deploy), name=f"deploy {deploy.name}")
        key = (client_id, deploy.call)
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

    async def _answer(self, client_id: ClientId, deploy: msg.Deploy) -> None:
        try:
            with self._deployments.under_way():
                record = await self._deploy(client_id, deploy)
        except AdaptError as error:
            log.warning("deployment failed", extra={"deployment": deploy.name, "reason": str(error)})
            self._fail(client_id, deploy, error)
        except Exception as error:  # a bug of ours must not leave the client waiting
            log.exception("deployment failed", extra={"deployment": deploy.name})
            self._fail(client_id, deploy, AdaptError(f"deployment failed in the dispatcher: {type(error).__name__}: {error}"))
        else:
            self._around.to_client(client_id, msg.Deployed(call=deploy.call, deployment=record))

    def _fail(self, client_id: ClientId, deploy: msg.Deploy, error: AdaptError) -> None:
        code, message, fields = error.to_wire()
        self._around.to_client(client_id, msg.CallFailed(call=deploy.call, code=code, message=message, fields=fields))

    async def _deploy(self, client_id: ClientId, deploy: msg.Deploy) -> msg.DeploymentRecord:
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
        return self._deployments.record(self._around.version(version.deployment, version.number))

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
        model, plan = await asyncio.to_thread(plan_freely, self._store, program, offers, name=deploy.name)
        made |= {need.artifact for need in model.stages}
        return model, plan

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

    async def _program(self, client_id: ClientId, deploy: msg.Deploy) -> ProfiledProgram:
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

    def _progress(self, client_id: ClientId, deploy: msg.Deploy, step: str) -> None:
        self._around.to_client(client_id, msg.Progress(call=deploy.call, step=step[:STEP_LENGTH]))
