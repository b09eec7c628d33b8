"""From a client's `Deploy` to a version that can take requests, and what is remembered of it from one reign to the next.

    source ──build in a child, or pull from the client──▶ program ──cut──▶ stages ──place──▶ plan ──load──▶ ready

All of it runs beside the drive loop: building in a child process, cutting on a thread. Only the last step, an event to the
scheduler, touches the dispatcher's state.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapt.errors import AdaptError, ConfigError
from adapt.models.cut import StageArtifact, legal_cuts, write_stages
from adapt.models.forms import FormCheck
from adapt.models.interface import Interface, interface_digest
from adapt.models.layers import profile_model
from adapt.models.program import Program, check_optimize, read_graph, read_program
from adapt.planning.partition import partition, stage_costs_s
from adapt.planning.placement import Plan, StageNeed, WorkerOffer, place, place_apart
from adapt.protocol.codecs import resolve_codec
from adapt.protocol.ids import Digest, Epoch, WorkerId
from adapt.protocol.messages import Deploy, DeploymentRecord, StagePlace
from adapt.runtime.artifacts import ArtifactStore
from adapt.runtime.profiles import KnownCosts
from adapt.runtime.recipes import KEPT, Earlier, ProfiledProgram, Recipe
from adapt.runtime.state import StateDirectory
from adapt.runtime.terms import Proposal, Terms
from adapt.scheduling.events import Version, VersionKey
from adapt.scheduling.links import Link

log = logging.getLogger(__name__)

BYTE_S = 0.5e-9  # what a worker about as fast as who exports takes for each byte that comes or leaves; measured: 0.3 to 0.9
PROFILE_ERROR = 0.05  # stages that differ by less are alike, as far as the quick profile knows; then fewer bytes count
NUMERICS = ("auto", "close", "exact")


@dataclass(frozen=True, slots=True)
class CutModel:
    """A program and the stages it has been cut into."""

    program: Digest
    interface: str
    stages: tuple[StageNeed, ...]
    positions: tuple[int, ...]  # of the cuts, among the program's operators
    file_bytes: tuple[int, ...]
    peak_ratio: float
    leaving: tuple[tuple[int, ...], ...]  # for each stage but the last: the program's values that leave it, in order
    value_count: int  # of the program
    arithmetic: str


@dataclass(frozen=True, slots=True)
class Blueprint:
    """What must be known of a version besides what the scheduler knows."""

    interface: str
    numerics: str
    file_bytes: tuple[int, ...]  # of each stage's artifact
    recipe: Recipe | None = None  # of versions that an older ADAPT has written down
    positions: tuple[int, ...] | None = None  # of the cuts, among the program's operators; None: an older ADAPT has not written them down


class Deployments:
    """The versions in force and their artifacts; written to the state directory with every change."""

    def __init__(self, state: StateDirectory, store: ArtifactStore, *, keep_versions: int = KEPT) -> None:
        self._state, self._store = state, store
        self._versions: dict[VersionKey, Version] = {}
        self._blueprints: dict[VersionKey, Blueprint] = {}
        self._ready: set[VersionKey] = set()  # versions that have taken requests
        self._garbage: set[Digest] = set()  # artifacts that no version needs any more
        self._under_way = 0  # deployments that may be about to need them again
        self._forms: dict[Digest, FormCheck | None] = {}
        self._numbers: dict[str, int] = {}  # deployment -> the highest number it ever had
        self._served: dict[str, int] = {}  # deployment -> the highest number of a version that took requests
        self._earlier = Earlier(keep_versions)
        self._taken: dict[str, str] = {}  # file under --models-dir -> digest of what was last made a version of
        self._removed: set[str] = set()  # deployments that somebody has removed

    def restore(self) -> list[Version]:
        """The newest version of each deployment that took requests in the last reign.

        One whose artifacts are gone is dropped: it could serve nobody.
        """
        record = self._state.read_deployments()
        self._numbers = dict(record.get("numbers", {}))
        self._served = dict(record.get("served", {}))
        self._taken = dict(record.get("files", {}))
        self._removed = set(record.get("removed", []))
        self._earlier.restore(record.get("earlier", {}), is_there=self._store.has)
        newest: dict[str, tuple[Version, Blueprint]] = {}
        for plain in sorted(record.get("versions", []), key=lambda plain: (int(plain.get("number", 0)), int(plain.get("cut", 0)))):
            version, blueprint = _version_from_plain(plain)
            if plain.get("is_ready") and all(self._store.has(need.artifact) for need in version.plan.stages):
                newest[version.deployment] = (version, blueprint)
        for version, blueprint in newest.values():
            self._blueprints[version.key] = blueprint
            self._versions[version.key] = version
            self._ready.add(version.key)
        self._sweep()
        return list(self._versions.values())

    def _sweep(self) -> None:
        """Remove what deployments have left that never came about, or not to their end. The directory is ours alone."""
        needed = self._needed()
        for path in self._store.directory.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.suffix == ".safetensors" and path.stem not in needed:
                path.unlink(missing_ok=True)

    def _needed(self) -> set[Digest]:
        stages = {need.artifact for version in self._versions.values() for need in version.plan.stages}
        recipes = [blueprint.recipe.files for blueprint in self._blueprints.values() if blueprint.recipe is not None]
        return stages.union({version.program for version in self._versions.values()}, self._earlier.files, *recipes)

    def discard(self, artifacts: Iterable[Digest]) -> None:
        """Remove these unless a version needs them, once no deployment is under way."""
        self._garbage.update(artifacts)
        self._collect()

    @property
    def is_quiet(self) -> bool:
        """Whether no deployment is prepared or loaded."""
        return not self._under_way

    @contextlib.contextmanager
    def under_way(self) -> Iterator[None]:
        """While a deployment is prepared no artifact is removed: it may be about to need one that another has given up."""
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1
            self._collect()

    def next_number(self, deployment: str, wanted: int = 0) -> int:
        """The wanted number, or the next: one that no version of this deployment had which took requests, or still may.

        Raises:
            ConfigError: the wanted one is not above those.
        """
        self.check_number(deployment, wanted, also=[key[1] for key in self._versions if key[0] == deployment])
        number = wanted or self._numbers.get(deployment, 0) + 1
        self._numbers[deployment] = max(number, self._numbers.get(deployment, 0))
        self._write()
        return number

    def check_number(self, deployment: str, wanted: int, *, also: Iterable[int] = ()) -> None:
        """Raises ConfigError unless a version may have this number; 0 is the next. `also`: numbers that are taken, besides."""
        highest = max(self._served.get(deployment, 0), *also, 0)
        if wanted and wanted <= highest:
            raise ConfigError(f"version={wanted}: {deployment} has had version {highest}; give a higher number, or none for the next")

    def blueprint(self, version: Version) -> Blueprint | None:
        """None: it was dropped."""
        return self._blueprints.get(version.key)

    def next_cut(self, version: Version) -> int:
        """For the same version in other stages."""
        return 1 + max((key[2] for key in self._versions if key[:2] == version.key[:2]), default=version.cut)

    def put(self, version: Version, blueprint: Blueprint | None = None) -> None:
        """Remember a version, or its new plan."""
        key = version.key
        if blueprint is not None:
            self._blueprints[key] = blueprint
        if key in self._blueprints:
            self._versions[key] = version
            self._write()

    def ready(self, version: Version) -> None:
        """The version takes requests, and does so again after a restart. Those before it can be rolled back to."""
        before = [key for key in self._ready if key[0] == version.deployment]
        self._ready.add(version.key)
        self._removed.discard(version.deployment)
        self._served[version.deployment] = max(version.number, self._served.get(version.deployment, 0))
        replaced = [recipe for key in before if key in self._blueprints and (recipe := self._blueprints[key].recipe) is not None]
        self._garbage |= self._earlier.replaced(version.deployment, replaced, self.present(version.deployment))
        self._write()
        self._collect()

    def removed(self, deployment: str) -> None:
        """It was undeployed: there is nothing to roll back to."""
        self._removed.add(deployment)
        self._garbage |= self._earlier.forget(deployment)
        self._write()
        self._collect()

    def present(self, deployment: str) -> Recipe | None:
        """Of the newest version that has taken requests."""
        key = max((key for key in self._ready if key[0] == deployment), default=(deployment, 0, 0))
        blueprint = self._blueprints.get(key)
        return None if blueprint is None else blueprint.recipe

    def earlier(self, deployment: str) -> list[int]:
        """Versions that can be deployed again, newest last."""
        return self._earlier.numbers(deployment)

    def recipe(self, deployment: str, number: int) -> Recipe:
        """Of an earlier version. Raises ConfigError: it is not kept."""
        return self._earlier.find(deployment, number)

    def taken(self, file: str) -> str | None:
        """Digest of what was last made a version of, of this file under --models-dir."""
        return self._taken.get(file)

    def was_removed(self, deployment: str) -> bool:
        """Whether it has been, and was not deployed again since."""
        return deployment in self._removed

    def take(self, file: str, digest: str) -> None:
        self._taken[file] = digest
        self._write()

    def drop(self, version: Version) -> None:
        """Forget a version, and the artifacts that only it needed."""
        key = version.key
        self._versions.pop(key, None)
        blueprint = self._blueprints.pop(key, None)
        self._ready.discard(key)
        self._garbage |= {version.program, *(need.artifact for need in version.plan.stages)}
        if blueprint is not None and blueprint.recipe is not None:
            self._garbage |= blueprint.recipe.files
        self._write()
        self._collect()

    def _collect(self) -> None:
        """Remove what no version needs."""
        if self._under_way:
            return
        for artifact in self._garbage - self._needed():
            self._store.path(artifact).unlink(missing_ok=True)
            self._forms.pop(artifact, None)
        self._garbage.clear()

    def form(self, artifact: Digest) -> FormCheck | None:
        """What a stage makes of what; None if its file cannot be read. Reads it at the first time, which takes milliseconds."""
        if artifact not in self._forms:
            try:
                graph = read_graph(self._store.path(artifact), verify=False).graph
                self._forms[artifact] = FormCheck(graph.input_specs, graph.output_specs)
            except (OSError, AdaptError) as error:
                log.error("the form of a stage is unknown; its answers are not checked", extra={"artifact": artifact, "reason": str(error)})
                self._forms[artifact] = None
        return self._forms[artifact]

    def file_bytes(self, artifact: Digest) -> int:
        """Size of a stage's file. Raises KeyError for a stage of no version."""
        for key, version in self._versions.items():
            for need, size in zip(version.plan.stages, self._blueprints[key].file_bytes, strict=True):
                if need.artifact == artifact:
                    return size
        raise KeyError(artifact)

    def record(self, version: Version) -> DeploymentRecord:
        """The version as users see it."""
        blueprint = self._blueprints[version.key]
        plan = version.plan
        places = [
            StagePlace(artifact=need.artifact, file_bytes=size, cost_s=need.cost_s, workers=list(workers))
            for need, size, workers in zip(plan.stages, blueprint.file_bytes, plan.places, strict=True)
        ]
        return DeploymentRecord(
            name=version.deployment,
            version=version.number,
            program=version.program,
            epoch=plan.epoch,
            codec=version.codec,
            tolerance=version.tolerance,
            numerics=blueprint.numerics,
            arithmetic=version.arithmetic,
            stages=places,
            interface=blueprint.interface,
            again=0 if blueprint.recipe is None else blueprint.recipe.again,
            earlier=self._earlier.numbers(version.deployment),
        )

    def _write(self) -> None:
        versions = [
            {**_version_to_plain(version, self._blueprints[key]), "is_ready": key in self._ready} for key, version in self._versions.items()
        ]
        try:
            record = {"numbers": self._numbers, "versions": versions, "earlier": self._earlier.to_plain()}
            record |= {"served": self._served, "files": self._taken, "removed": sorted(self._removed)}
            self._state.write_deployments(record)
        except OSError as error:  # a full disk must not stop inference; the next change is written with this one
            log.error("deployments not written; a restart would not know of the last change", extra={"reason": str(error)})


def check(message: Deploy) -> str:
    """Judge a `Deploy` before anything is built for it.

    Returns:
        The name of the codec to use.

    Raises:
        ConfigError: an option is impossible; names key, value and what is expected.
    """
    if (message.named is None) == (message.uploaded is None):
        raise ConfigError("deploy: give either a named model or an uploaded program")
    if message.named is not None:
        check_optimize(message.named.optimize)
    if message.numerics not in NUMERICS:
        raise ConfigError(f"numerics={message.numerics!r}: expected one of {', '.join(NUMERICS)}")
    codec = resolve_codec(message.codec, message.tolerance)
    if message.canaries is not None and message.uploaded is None:
        raise ConfigError("canaries go with a program that their client has exported")
    if message.numerics == "exact" and codec.startswith("zfp"):
        raise ConfigError(f"numerics='exact' cannot hold with the lossy codec {codec!r}; use raw or lz4, or numerics='close'")
    return codec


def cut(store: ArtifactStore, program: ProfiledProgram, stages: int) -> CutModel:
    """Cut a program into `stages` stages of about equal cost. Blocks.

    Raises:
        PlanError: the model cannot be cut so often; names the largest number.
        ConfigError: the seconds are not those of this program.
        WireError: the file is not a program.
    """
    source = read_program(store.path(program.digest))
    costs_s = list(program.operator_costs_s)
    if len(costs_s) != len(source.graph.operators):
        raise ConfigError(f"the profile has {len(costs_s)} operators, the program {len(source.graph.operators)}")
    return _cut_at(store, program, source, partition(costs_s, legal_cuts(source), stages, byte_s=BYTE_S, slack=PROFILE_ERROR))


def plan_freely(
    store: ArtifactStore,
    program: ProfiledProgram,
    offers: Sequence[WorkerOffer],
    *,
    name: str,
    known: Mapping[WorkerId, KnownCosts] | None = None,
    links: Mapping[WorkerId, Link] | None = None,
    exact: bool = False,
) -> tuple[CutModel, Plan]:
    """Cut a program and place it as it should be fastest on these workers: in as many stages, with as many replicas, as is best. Blocks.

    A worker without a profile is as fast as it has proved to be, at first as fast as who exported the model.

    Args:
        known: what the program takes on the workers on whose kind of device it was measured.
        links: to the workers, where they have been measured; the others are no limit.
        exact: requests stay in one numeric class: the plan is for the one that computes most and has the memory.

    Raises: as `cut`; PlanError: the workers' memory cannot hold the model; says what is missing.
    """
    source = read_program(store.path(program.digest))
    terms = Terms.of(profile_model(name, source, program.operator_costs_s), known or {}, links or {})
    return _as_proposed(store, program, source, terms.best(offers, exact=exact), Epoch(1))


def cut_as(store: ArtifactStore, program: ProfiledProgram, proposal: Proposal, *, epoch: Epoch) -> tuple[CutModel, Plan]:
    """Cut a program where it was proposed. Blocks. Raises WireError: the file is not a program."""
    return _as_proposed(store, program, read_program(store.path(program.digest)), proposal, epoch)


def _as_proposed(
    store: ArtifactStore, program: ProfiledProgram, source: Program, proposal: Proposal, epoch: Epoch
) -> tuple[CutModel, Plan]:
    model = _cut_at(store, program, source, proposal.positions)
    return model, Plan(program=model.program, epoch=epoch, stages=model.stages, places=proposal.places)


def _cut_at(store: ArtifactStore, program: ProfiledProgram, source: Program, positions: Sequence[int]) -> CutModel:
    costs_s = list(program.operator_costs_s)
    artifacts = write_stages(source, positions, store.directory)
    crossing = {cut.position: cut.crossing for cut in legal_cuts(source)}
    needs = [
        StageNeed(artifact=Digest(artifact.digest), memory_bytes=_memory_bytes(artifact), cost_s=cost_s)
        for artifact, cost_s in zip(artifacts, stage_costs_s(costs_s, positions), strict=True)
    ]
    return CutModel(
        program=program.digest,
        interface=Interface.of(source).to_json(),
        stages=tuple(needs),
        positions=tuple(positions),
        file_bytes=tuple(artifact.file_bytes for artifact in artifacts),
        peak_ratio=_peak_ratio(artifacts, source),
        leaving=tuple(crossing[position] for position in positions),
        value_count=len(source.graph.values),
        arithmetic=source.arithmetic,
    )


def _memory_bytes(artifact: StageArtifact) -> int:
    """Weights, and one item's activations at both ends."""
    return artifact.file_bytes + sum(spec.bytes_at(1) for spec in (*artifact.inputs, *artifact.outputs))


def _peak_ratio(artifacts: Sequence[StageArtifact], source: Program) -> float:
    """The most bytes a request retains between two stages, in units of its input's."""
    input_bytes = sum(spec.bytes_at(1) for spec in source.graph.input_specs)
    peak_bytes = max(sum(spec.bytes_at(1) for spec in artifact.inputs) for artifact in artifacts)
    return max(peak_bytes / input_bytes, 1.0) if input_bytes else 1.0


def first_plan(model: CutModel, offers: Sequence[WorkerOffer], *, exact: bool) -> Plan:
    """Raises PlanError: no worker has memory for a stage; if requests are to stay in one numeric class, none of that class."""
    places = (place_apart if exact else place)(model.stages, offers)
    return Plan(program=model.program, epoch=Epoch(1), stages=model.stages, places=places)


# ── between Version and JSON ─────────────────────────────────────────────────────────────────────────────────────────


def _version_to_plain(version: Version, blueprint: Blueprint) -> dict[str, Any]:
    plan = version.plan
    return {
        "deployment": version.deployment,
        "number": version.number,
        "cut": version.cut,
        "program": version.program,
        "codec": version.codec,
        "tolerance": version.tolerance,
        "exact": version.exact,
        "peak_ratio": version.peak_ratio,
        "arithmetic": version.arithmetic,
        "numerics": blueprint.numerics,
        "interface": blueprint.interface,
        "recipe": None if blueprint.recipe is None else blueprint.recipe.to_plain(),
        "epoch": plan.epoch,
        "positions": blueprint.positions,
        "stages": [
            {"artifact": n.artifact, "memory_bytes": n.memory_bytes, "cost_s": n.cost_s, "file_bytes": size, "workers": list(workers)}
            for n, size, workers in zip(plan.stages, blueprint.file_bytes, plan.places, strict=True)
        ],
    }


def _version_from_plain(plain: dict[str, Any]) -> tuple[Version, Blueprint]:
    try:
        stages = plain["stages"]
        needs = [StageNeed(artifact=Digest(s["artifact"]), memory_bytes=s["memory_bytes"], cost_s=s["cost_s"]) for s in stages]
        plan = Plan(
            program=Digest(plain["program"]),
            epoch=Epoch(plain["epoch"]),
            stages=tuple(needs),
            places=tuple(tuple(WorkerId(worker) for worker in s["workers"]) for s in stages),
        )
        version = Version(
            deployment=plain["deployment"],
            number=plain["number"],
            cut=plain.get("cut", 0),
            program=plan.program,
            codec=plain["codec"],
            tolerance=plain["tolerance"],
            exact=plain["exact"],
            peak_ratio=plain["peak_ratio"],
            interface=interface_digest(plain["interface"]),
            arithmetic=plain.get("arithmetic", ""),
            plan=plan,
        )
        recipe = None if plain.get("recipe") is None else Recipe.from_plain(plain["recipe"])
        positions = None if plain.get("positions") is None else tuple(plain["positions"])
        return version, Blueprint(plain["interface"], plain["numerics"], tuple(s["file_bytes"] for s in stages), recipe, positions)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"deployments.json has an entry that cannot be read ({error!r}); remove the file to start afresh") from error
