"""The demo from beginning to end; the steps themselves are in the modules beside it.

reference   the eager module, in a process of its own: the right answers, and the speed of one process
etcd        only with --membership etcd: a real server
cluster     a dispatcher and workers, one process each
deploy      cut, placed, loaded
stream      all images; one worker is killed on the way, another is stopped; etcd is killed and started again
links       only behind a lossy codec: the error on every link
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adapt.config import EMBEDDED
from adapt.errors import ConfigError
from adapt.interfaces.demo import figures as fig
from adapt.interfaces.demo.images import find_photographs
from adapt.interfaces.demo.links import Replay, replay
from adapt.interfaces.demo.reference import Reference, compute_reference
from adapt.interfaces.demo.screen import Screen, Step
from adapt.interfaces.demo.stream import Answer, Fault, stream
from adapt.protocol.codecs import resolve_codec
from adapt.protocol.messages import DeploymentRecord, StatusReport
from adapt.runtime.client import Client, Model
from adapt.runtime.etcd_server import EtcdServer
from adapt.runtime.local import LocalCluster, LocalProcess, Reaper

THREADS = 1  # of every process that computes: results of other counts may differ in their last bits
DEADLINE_S = 60.0
LEASE_TTL_S = 4.0  # shorter than the default, so that the demo need not wait long until the stopped worker is given up
LOST_WITHIN_S = 20.0
ETCD = "etcd"
POLL_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What the user wants to see. `weights`: a file or a name of torchvision's, None: random ones by `seed`."""

    model: str
    weights: str | None
    seed: int
    folder: Path | None
    count: int
    workers: int
    stages: int
    codec: str
    tolerance: float | None
    in_flight: int
    has_faults: bool
    membership: str = EMBEDDED

    def __post_init__(self) -> None:
        for key, low, high in (("count", 1, 10_000), ("workers", 1, 64), ("stages", 1, 256), ("in_flight", 1, 1024)):
            if not low <= getattr(self, key) <= high:
                raise ConfigError(f"{key}={getattr(self, key)}: expected {low} to {high}")
        if self.membership not in (EMBEDDED, ETCD):
            raise ConfigError(f"membership={self.membership!r}: expected {EMBEDDED} or {ETCD}")
        resolve_codec(self.codec, self.tolerance)
        if self.weights is not None and self.weights_file is None and not self.weights.replace("_", "").isalnum():
            raise ConfigError(f"weights={self.weights!r}: there is no such file, and it is no name of torchvision's weights")

    @property
    def weights_file(self) -> Path | None:
        path = None if self.weights is None else Path(self.weights).expanduser()
        return path.resolve() if path is not None and path.is_file() else None

    @property
    def weights_in_words(self) -> str:
        return f"random weights (seed {self.seed})" if self.weights is None else f"weights {self.weights}"

    @property
    def is_lossy(self) -> bool:
        return resolve_codec(self.codec, self.tolerance).startswith("zfp")


def show(wishes: Wishes, screen: Screen) -> fig.Figures:
    """Run the demo and print it. What was found wrong is in the figures' `problems`.

    Raises:
        AdaptError: it could not be run.
    """
    find_photographs(wishes.folder)  # said before anything is started
    lossy = f", tolerance {wishes.tolerance:g}" if wishes.is_lossy else ""
    screen.line(f"{wishes.model}, {wishes.weights_in_words}: {wishes.count} images, {wishes.workers} workers, codec {wishes.codec}{lossy}")
    if wishes.weights is None:
        screen.line("Labels mean nothing with random weights; equality with the eager model means as much as ever.")
    with tempfile.TemporaryDirectory(prefix="adapt-demo-") as scratch:
        return _Show(wishes, screen, Path(scratch)).run()


class _Show:
    def __init__(self, wishes: Wishes, screen: Screen, scratch: Path) -> None:
        self._wishes, self._screen, self._scratch = wishes, screen, scratch
        self._done_to: dict[str, str] = {}  # worker -> what was done to it
        self._seen: dict[str, set[int]] = {}  # worker -> the stages that plans gave it
        self._etcd: EtcdServer | None = None

    def run(self) -> fig.Figures:
        if self._wishes.membership == EMBEDDED:
            return self._run({})
        with contextlib.closing(Reaper()) as reaper:
            with self._screen.step("etcd") as step:
                self._etcd = EtcdServer(self._scratch, reaper)
                self._etcd.wait_ready()
                step.result = f"a real server keeps the leases, at {self._etcd.endpoint}"
            try:
                return self._run({"membership": self._etcd.membership})
            finally:
                self._etcd.end()

    def _run(self, membership: dict[str, object]) -> fig.Figures:
        wishes, screen = self._wishes, self._screen
        reference = self._reference()
        with screen.step("cluster") as step:
            step.update("starting a dispatcher and workers", None)
            cluster = LocalCluster(
                workers=wishes.workers,
                device="cpu",  # where the reference is computed
                threads=THREADS,
                dispatcher={"lease_ttl": LEASE_TTL_S, **membership},
                worker=membership,
            )
            cluster.start()
            step.result = f"1 dispatcher, {wishes.workers} workers, {THREADS} thread each, at {cluster.address}"
        try:
            with Client(cluster.address) as client:
                return self._with_client(cluster, client, reference)
        finally:
            cluster.close()

    def _with_client(self, cluster: LocalCluster, client: Client, reference: Reference) -> fig.Figures:
        wishes, screen = self._wishes, self._screen
        model = self._deploy(client)
        deployment = model.record
        self._note_stages(deployment)
        faults = self._faults(cluster, deployment) if wishes.has_faults else []
        answers = self._stream(model, reference, faults)
        status = self._settled(client)
        self._note_stages(_deployment(status))
        links = self._links(cluster, deployment, reference) if wishes.is_lossy else None
        found = self._figures(cluster, deployment, reference, answers, faults, status, links)
        screen.report(found)
        if reference.categories is not None:
            kept = [(name, answer) for name, answer in zip(reference.names, answers, strict=False) if answer.output is not None]
            screen.labels([name for name, _ in kept], [reference.categories[int(np.argmax(answer.output))] for _, answer in kept])
        screen.verdict(found)
        return found

    def _reference(self) -> Reference:
        wishes = self._wishes
        with self._screen.step("reference") as step:
            reference = asyncio.run(
                compute_reference(
                    wishes.model,
                    weights=wishes.weights_file or wishes.weights,
                    seed=wishes.seed,
                    folder=wishes.folder,
                    count=wishes.count,
                    threads=THREADS,
                    directory=self._scratch,
                    progress=step.update,
                )
            )
            step.result = (
                f"{wishes.count} outputs of torchvision's own module, all different; one process: {reference.images_per_s:.1f} images/s"
            )
        return reference

    def _deploy(self, client: Client) -> Model:
        wishes = self._wishes
        with self._screen.step("deploy") as step:
            model = client.deploy(
                wishes.model,
                stages=wishes.stages,
                codec=wishes.codec,
                tolerance=wishes.tolerance,
                weights=wishes.weights_file or wishes.weights,
                seed=wishes.seed,
                progress=lambda words: step.update(words, None),
            )
            deployment = model.record
            sizes = ", ".join(f"{stage.file_bytes / 1e6:.1f}" for stage in deployment.stages)
            step.result = f"{len(deployment.stages)} stages of {sizes} MB" if len(deployment.stages) > 1 else f"1 stage of {sizes} MB"
        return model

    def _faults(self, cluster: LocalCluster, deployment: DeploymentRecord) -> list[Fault]:
        """Kill one worker after a quarter of the answers, stop another after half: those in the middle of the model. One stays."""
        count, by_name = self._wishes.count, {worker.name: worker for worker in cluster.workers}
        holders = list(dict.fromkeys(name for stage in deployment.stages for name in stage.workers))
        victims = [by_name[name] for name in [*holders[1:], *holders[:1], *(by_name.keys() - set(holders))]][: len(by_name) - 1]
        plans = zip(victims, (("killed (SIGKILL)", max(count // 4, 1)), ("stopped (SIGSTOP)", max(count // 2, 1))), strict=False)
        faults = []
        for worker, (words, after) in plans:

            def act(worker: LocalProcess = worker, words: str = words, after: int = after) -> None:
                worker.kill() if "KILL" in words else worker.stop()
                self._done_to[worker.name] = f"{words} after {after} answers"
                held = ", ".join(map(str, sorted(fig.stages_of(deployment, worker.name)))) or "none"
                self._notes.note(f"after {after} answers: {worker.name} {words}; it held stage {held}")

            faults.append(Fault(after, act))
        return sorted([*faults, *self._etcd_faults()], key=lambda fault: fault.after)

    def _etcd_faults(self) -> list[Fault]:
        """Kill etcd between the two, so that the second worker is lost without it, and start it again later."""
        if self._etcd is None:
            return []
        etcd, count = self._etcd, self._wishes.count
        gone, back = max(3 * count // 8, 1), max(5 * count // 8, 1)

        def kill() -> None:
            etcd.kill()
            self._notes.note(f"after {gone} answers: etcd killed (SIGKILL)")

        def start() -> None:
            etcd.begin_again()
            self._notes.note(f"after {back} answers: etcd started again")

        return [Fault(gone, kill), Fault(back, start)]

    def _stream(self, model: Model, reference: Reference, faults: Sequence[Fault]) -> list[Answer]:
        wishes = self._wishes
        with self._screen.step("stream") as step:
            self._notes: Step = step
            began = time.monotonic()

            def answered(number: int, answers: list[Answer]) -> None:
                rate = number / (time.monotonic() - began)
                step.update(f"{number} of {wishes.count} answers, {rate:.1f} images/s", number / wishes.count)

            answers = stream(model, reference.images, in_flight=wishes.in_flight, deadline_s=DEADLINE_S, faults=faults, answered=answered)
            came = sum(answer.output is not None for answer in answers)
            step.result = f"{came} of {wishes.count} answers, {wishes.in_flight} in flight"
        return answers

    def _settled(self, client: Client) -> StatusReport:
        """The dispatcher's report, once it has given up every worker that was killed or stopped, if it does so in time."""
        if not self._done_to:
            return client.status()
        began = time.monotonic()
        with self._screen.step("membership") as step:
            step.update("waiting until the lost workers are given up", None)
            while True:
                status = client.status()
                lost = [record.worker_id for record in status.workers if record.state == "lost"]
                is_settled = self._done_to.keys() <= set(lost) and self._etcd_is_back(status)
                if is_settled or time.monotonic() - began > LOST_WITHIN_S:
                    break
                time.sleep(POLL_S)
            step.result = (
                f"given up: {', '.join(lost) or 'nobody'} (lease {LEASE_TTL_S:g} s); {len(status.workers) - len(lost)} workers left"
            )
            if self._etcd is not None:
                step.result += f"; in etcd again: {status.counters['etcd_workers']:.0f}"
        return status

    def _etcd_is_back(self, status: StatusReport) -> bool:
        """Whether etcd, if there is one, has a lease of every worker that is left, and no more."""
        left = sum(record.state != "lost" for record in status.workers)
        counters = status.counters
        return self._etcd is None or (counters["etcd_is_well"] == 1 and counters["etcd_workers"] == left)

    def _note_stages(self, deployment: DeploymentRecord) -> None:
        for stage in deployment.stages:
            for name in stage.workers:
                self._seen.setdefault(name, set()).update(fig.stages_of(deployment, name))

    def _links(self, cluster: LocalCluster, deployment: DeploymentRecord, reference: Reference) -> Replay:
        with self._screen.step("links") as step:
            found = asyncio.run(
                replay(
                    [cluster.artifact(stage.artifact) for stage in deployment.stages],
                    codec=deployment.codec,
                    tolerance=deployment.tolerance,
                    count=self._wishes.count,
                    threads=THREADS,
                    directory=self._scratch,
                    progress=step.update,
                )
            )
            step.result = f"every activation of {len(reference.images)} images measured before and after the codec, in one process"
        return found

    def _figures(
        self,
        cluster: LocalCluster,
        deployment: DeploymentRecord,
        reference: Reference,
        answers: Sequence[Answer],
        faults: Sequence[Fault],
        status: StatusReport,
        links: Replay | None,
    ) -> fig.Figures:
        wishes, counters = self._wishes, status.counters
        elapsed_s, images_per_s, before = fig.rates(answers, faults[0].after if faults else None)
        return fig.Figures(
            model=wishes.model,
            weights=wishes.weights_in_words,
            codec=deployment.codec,
            tolerance=deployment.tolerance,
            stages=len(deployment.stages),
            threads=THREADS,
            in_flight=wishes.in_flight,
            requested=wishes.count,
            verdict=fig.judge(answers, wishes.count, reference.outputs, reference.outputs if links is None else links.outputs),
            workers_lost=sum(record.state == "lost" for record in status.workers),
            workers_expected_lost=len(self._done_to),
            retries=int(counters.get("retries", 0)),
            evictions=int(counters.get("evictions", 0)),
            late_answers=int(counters.get("late_answers", 0)),
            elapsed_s=elapsed_s,
            images_per_s=images_per_s,
            images_per_s_before_faults=before,
            single_process_images_per_s=reference.images_per_s,
            latency_p50_s=fig.latency_percentile_s(answers, 50),
            latency_p99_s=fig.latency_percentile_s(answers, 99),
            workers=fig.worker_figures({worker.name: worker.pid for worker in cluster.workers}, self._seen, self._done_to, status),
            codecs=fig.codec_figures(counters),
            links=[] if links is None else links.links,
            membership=wishes.membership,
            etcd_outages=int(counters.get("etcd_outages", 0)),
            etcd_is_back=self._etcd_is_back(status),
        )


def _deployment(status: StatusReport) -> DeploymentRecord:
    return status.deployments[0]
