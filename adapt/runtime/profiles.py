"""Profiles of programs on the kinds of devices of a cluster: asked for once, on one worker of each kind, and kept on disk.

A *device class* is all that the seconds depend on: the numeric class, in which build, processor and threads are named, and what share of
the CPU the worker's control group leaves it. A program's seconds do not depend on the numbers in its weights, so what is kept belongs to its
*form*, the digest of all but these: a retrained model is not measured anew. What codecs make of its activations does depend on them, but
rarely much: it is kept with the rest, until somebody asks for it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias
from weakref import WeakValueDictionary

from msgspec import structs

from adapt.config import counted
from adapt.errors import AdaptError, ConfigError, PlanError
from adapt.models.layers import completed, layer_costs_s, profile_model, with_workspace
from adapt.models.program import Program
from adapt.models.tensorfile import canonical_json, read_tensor_file
from adapt.planning.model import NO_HANDLING, RAW, CodecProfile, Handling, MeasuredCosts, ModelProfile, typical_codecs
from adapt.protocol import messages as msg
from adapt.protocol.ids import Digest, WorkerId

log = logging.getLogger(__name__)

VERSION = 1
KEPT = 256  # forms of programs, those measured last
LEAST_CORES, MOST_CORES = 0.01, 1e6  # what may be believed: no control group hands out less
BELIEVED_S = (1e-9, 1e9)  # of a whole program
MOST_HANDLING = Handling(task_s=1.0, byte_s=1e-6)  # that is believed
BELIEVED_CODECS = ("lz4", "zfp")  # in the order in which plans have them, after raw
BELIEVED_RATIO = (0.1, 1e6)
BELIEVED_BYTES_PER_S = (1e3, 1e12)  # of one core
BELIEVED_WORKSPACE_BYTES = 1 << 36  # of one operator
SILENCE_S = 60.0  # without progress of a worker that should be measuring; it tells of some a few times a second unless others keep it busy
MOST_STEPS = 16  # of a profile, each with words of its own

Workspace: TypeAlias = tuple[int | None, ...]  # bytes that each operator's kernel takes besides; None: nobody could tell
Told: TypeAlias = Callable[[str, float | None], None]  # words, and the share that is done of what they say, if that is known


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceKind:
    """A device class, and the workers that are of it now.

    Attributes:
        name: as profiles are kept under.
        title: the same for people, without what most kinds have in common.
        cores: of the control group; 0: no limit.
    """

    name: str
    title: str
    threads: int
    cores: float
    workers: tuple[WorkerId, ...] = ()

    @property
    def counts_cpu(self) -> bool:
        """Whether its workers read their processor's clock when they measure: with one thread, and less than a core for it."""
        return self.threads == 1 and 0 < self.cores < 1

    @classmethod
    def of(cls, facts: msg.DeviceFacts, cores: float) -> DeviceKind:
        is_limited = facts.device == "cpu" and 0 < cores < facts.threads
        cores = max(cores, LEAST_CORES)
        share = f", {cores:.2g} cores" if is_limited else ""
        threads = f", {counted(facts.threads, 'thread')}" if facts.device == "cpu" else ""
        return cls(
            name=f"{facts.numeric_class}/{cores:.2g}-cores" if is_limited else facts.numeric_class,
            title=f"{facts.device_name}{threads}{share}",
            threads=facts.threads,
            cores=cores if is_limited else 0.0,
        )


def kinds_of(workers: Mapping[WorkerId, DeviceKind]) -> list[DeviceKind]:
    """The kinds there are, by name, each with its workers."""
    found: dict[str, DeviceKind] = {}
    for worker_id, kind in sorted(workers.items()):
        before = found.get(kind.name, kind)
        found[kind.name] = replace(before, workers=(*before.workers, worker_id))
    return sorted(found.values(), key=lambda kind: kind.name)


def chosen(kinds: Sequence[DeviceKind], part: str) -> list[DeviceKind]:
    """Those whose name or title has this in it. Raises ConfigError: none has."""
    found = [kind for kind in kinds if part.lower() in kind.name.lower() or part.lower() in kind.title.lower()]
    if kinds and not found:
        raise ConfigError(f"device-class={part[:80]!r}: expected a part of one of: {'; '.join(kind.name for kind in kinds)}")
    return found


def form_of(path: Path) -> str:
    """The digest of a program without the numbers in its weights. Raises WireError, OSError."""
    file = read_tensor_file(path)
    shapes = sorted((tensor.key, tensor.dtype, list(tensor.shape)) for tensor in file.tensors.values())
    return hashlib.sha256(canonical_json([file.metadata, shapes]).encode()).hexdigest()


# ── on disk ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptProfile:
    """Seconds of each operator of a program, and who measured them.

    `handling`: what a task takes of a whole core besides; `codecs`: what they make of what crosses, at the speed of a whole core;
    `workspace_bytes`: of each operator. None: it could not be measured, or was not yet when this was written.
    """

    device_class: str
    worker: str
    cores: float
    costs_s: tuple[float, ...]
    handling: Handling | None = None
    codecs: tuple[CodecProfile, ...] | None = None
    workspace_bytes: Workspace | None = None


class ProfileStore:
    """One file for each form of a program, in a directory of the dispatcher's own. What cannot be read is as if it were not there."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._writing = directory, threading.Lock()

    def read(self, form: str) -> dict[str, KeptProfile]:
        """By device class."""
        try:
            content = json.loads(self._path(form).read_text(encoding="utf-8"))
            if content["version"] != VERSION:
                return {}
            kept = [_kept(plain) for plain in content["profiles"]]
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError) as error:
            log.warning("a profile cannot be read", extra={"form": form[:12], "reason": repr(error)})
            return {}
        return {profile.device_class: profile for profile in kept}

    def write(self, form: str, profile: KeptProfile) -> None:
        """Keep it, instead of an earlier one of its class. A disk that takes nothing only costs the next measurement. May be called by several
        threads at a time."""
        with self._writing:
            self._write(form, profile)

    def _write(self, form: str, profile: KeptProfile) -> None:
        profiles = {**self.read(form), profile.device_class: profile}
        content = {"version": VERSION, "profiles": [asdict(kept) for kept in profiles.values()]}
        temporary = self._directory / f".{form}.{os.getpid()}.new"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(json.dumps(content))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._path(form))
            self._forget_old()
        except OSError as error:
            temporary.unlink(missing_ok=True)
            log.error("a profile was not kept", extra={"form": form[:12], "reason": str(error)})

    def _path(self, form: str) -> Path:
        return self._directory / f"{form}.json"

    def _forget_old(self) -> None:
        by_age = sorted(self._directory.glob("*.json"), key=lambda path: path.stat().st_mtime)
        for path in by_age[:-KEPT]:
            path.unlink(missing_ok=True)


def _kept(plain: Mapping[str, Any]) -> KeptProfile:
    costs_s = tuple(float(cost) for cost in plain["costs_s"])
    cores = float(plain["cores"])
    if not all(cost >= 0 for cost in costs_s) or not is_believable(costs_s) or not (cores == 0 or LEAST_CORES <= cores <= MOST_CORES):
        raise ValueError("seconds and cores are such as there may be")
    told = plain.get("handling")
    handling = None if told is None else Handling(task_s=float(told["task_s"]), byte_s=float(told["byte_s"]))
    return KeptProfile(
        device_class=str(plain["device_class"]),
        worker=str(plain["worker"]),
        cores=cores,
        costs_s=costs_s,
        handling=handling,
        codecs=believed_codecs(CodecProfile.of(codec) for codec in plain.get("codecs") or ()),
        workspace_bytes=believed_workspace(plain.get("workspace_bytes"), operators=len(costs_s)),
    )


def is_believable(costs_s: Iterable[float | None]) -> bool:
    """Whether a program may take this long; plans divide by it."""
    least_s, most_s = BELIEVED_S
    return least_s <= sum(cost for cost in costs_s if cost is not None) <= most_s


def believed_codecs(told: Iterable[CodecProfile]) -> tuple[CodecProfile, ...] | None:
    """Those of which plans know, once each, if their figures may be; None: of none. Plans divide by them too."""
    by_name = {codec.name: codec for codec in told if _may_be(codec)}
    return tuple(by_name[name] for name in BELIEVED_CODECS if name in by_name) or None


def believed_workspace(told: Sequence[int | None] | None, *, operators: int) -> Workspace | None:
    """That of so many operators, if it may be."""
    if told is None or len(told) != operators:
        return None
    known = [taken_bytes for taken_bytes in told if taken_bytes is not None]
    may_be = all(isinstance(taken_bytes, int) and 0 <= taken_bytes <= BELIEVED_WORKSPACE_BYTES for taken_bytes in known)
    return tuple(told) if may_be else None


def _merged(new: Workspace | None, old: Workspace | None) -> Workspace | None:
    """The new, and the old where it has nothing."""
    if new is None or old is None or len(new) != len(old):
        return old if new is None else new
    return tuple(before if taken_bytes is None else taken_bytes for taken_bytes, before in zip(new, old, strict=True))


def _may_be(codec: CodecProfile) -> bool:
    (least, most), (slowest, fastest) = BELIEVED_RATIO, BELIEVED_BYTES_PER_S
    speeds = (codec.encode_bytes_per_s, codec.decode_bytes_per_s)
    return all(least <= ratio <= most for ratio in (codec.ratio, *codec.ratios)) and all(slowest <= speed <= fastest for speed in speeds)


@dataclass(frozen=True, slots=True)
class KnownCosts:
    """What a program takes on one worker: seconds of each operator, and what a task takes besides, both at its share of the CPU; and the
    operators' workspace."""

    costs_s: tuple[float, ...]
    handling: Handling = NO_HANDLING
    workspace_bytes: Workspace | None = None  # None: not known


def known_costs(kept: Mapping[str, KeptProfile], workers: Mapping[WorkerId, DeviceKind], operators: int) -> dict[WorkerId, KnownCosts]:
    """Of each worker of whose kind there is a profile. One that differs from it only in its share of the CPU is as much slower as its share is
    smaller."""
    found: dict[WorkerId, KnownCosts] = {}
    for worker_id, kind in workers.items():
        whole_name = kind.name.removesuffix(f"/{kind.cores:.2g}-cores") if kind.cores else kind.name
        exact = kept.get(kind.name)
        near = [other for name, other in kept.items() if name == whole_name or (name.startswith(f"{whole_name}/") and other.cores)]
        profile = exact or next(iter(sorted(near, key=lambda other: other.device_class)), None)
        if profile is None or len(profile.costs_s) != operators:
            continue
        slower = (profile.cores or kind.threads) / (kind.cores or kind.threads)
        costs_s = profile.costs_s if slower == 1.0 else tuple(cost * slower for cost in profile.costs_s)
        if is_believable(costs_s):
            found[worker_id] = KnownCosts(costs_s, (profile.handling or NO_HANDLING).at_share(kind.cores), profile.workspace_bytes)
    return found


# ── measured by workers ──────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Measured:
    """What a worker says: seconds of each operator, None where it had no room for its layer; what a task takes of a whole core besides; what
    codecs make of what crosses each boundary, at the speed of a whole core; and the operators' workspace."""

    costs_s: list[float | None]
    handling: Handling | None = None  # None: not measured
    codecs: tuple[CodecProfile, ...] | None = None
    workspace_bytes: Workspace | None = None

    @property
    def is_whole(self) -> bool:
        return self.handling is not None and self.codecs is not None and self.workspace_bytes is not None

    def fitting(self, boundaries: int) -> Measured:
        """Without codecs of a program with another number of boundaries."""
        fits = self.codecs is None or all(len(codec.ratios) == boundaries for codec in self.codecs)
        return self if fits else replace(self, codecs=None)

    def completed_by(self, known: Measured | None) -> Measured:
        """What is missing as it was known before."""
        if known is None:
            return self
        return replace(
            self,
            handling=self.handling or known.handling,
            codecs=self.codecs or known.codecs,
            workspace_bytes=_merged(self.workspace_bytes, known.workspace_bytes),
        )


@dataclass(slots=True)
class _Waiting:
    """For one worker's answer."""

    answer: asyncio.Future[Measured]
    told: Told
    heard: asyncio.Event
    steps: dict[str, float] = field(default_factory=dict)  # how far each has come

    def note(self, step: str, share: float) -> None:
        """Only what goes forward is a sign of life."""
        if share > self.steps.get(step, -1.0) and (step in self.steps or len(self.steps) < MOST_STEPS):
            self.steps[step] = share
            self.heard.set()
            self.told(step, share)


class _Turns:
    """Who measures by the clock does so alone: on one machine two of them would measure each other. Who has one thread and less than a core for it
    counts what its processor does, of which nobody takes anything. Those measure together: that takes less time, and a slow device that
    measures while all others sleep has colder caches, and takes up to a tenth longer, than among others at work."""

    def __init__(self) -> None:
        self._turn, self._entering = asyncio.Lock(), asyncio.Lock()
        self._together = 0

    @contextlib.asynccontextmanager
    async def taken(self, kind: DeviceKind) -> AsyncIterator[None]:
        """First come, first served."""
        if not kind.counts_cpu:
            async with self._entering, self._turn:
                yield
            return
        async with self._entering:
            if not self._together:
                await self._turn.acquire()
            self._together += 1
        try:
            yield
        finally:
            self._together -= 1
            if not self._together:
                self._turn.release()


class Profilers:
    """Has workers measure programs, those together that do not disturb each other. Lives on the dispatcher's loop.

    Args:
        to_worker: False: the worker is not there. make_room: called before a worker is asked.
    """

    def __init__(self, to_worker: Callable[[WorkerId, msg.Message], bool], make_room: Callable[[WorkerId], None]) -> None:
        self._to_worker, self._make_room = to_worker, make_room
        self._waiting: dict[tuple[WorkerId, str], _Waiting] = {}
        self._turns = _Turns()
        self._workers: WeakValueDictionary[WorkerId, asyncio.Lock] = WeakValueDictionary()  # each measures one program at a time

    async def measure(
        self, program: Digest, file_bytes: int, kind: DeviceKind, *, repetitions: int, told: Told
    ) -> tuple[WorkerId, Measured]:
        """By a worker of this kind: the first one that can.

        Raises:
            PlanError: none has room for any layer, or all are too busy or leave.
            AdaptError: the program cannot be run.
        """
        reasons: list[str] = []
        for worker_id in kind.workers:
            try:
                async with self._workers.setdefault(worker_id, asyncio.Lock()), self._turns.taken(kind):
                    measured = await self._measured_by(worker_id, program, file_bytes, repetitions, told)
                    told(f"{worker_id}: measured", 1.0)
                    return worker_id, measured
            except AdaptError as error:
                log.warning("worker did not profile", extra={"worker_id": worker_id, "reason": str(error)})
                reasons.append(f"{worker_id}: {error}")
        raise PlanError(f"not profiled on {kind.title}: {'; '.join(reasons) or 'no such worker is there'}")

    def heard(self, worker_id: WorkerId, message: msg.ProfileProgress | msg.ProgramProfiled | msg.ProfileFailed) -> None:
        """A worker speaks of a profile; what nobody waits for any more is passed over."""
        waiting = self._waiting.get((worker_id, message.program))
        if waiting is None or waiting.answer.done():
            return
        match message:
            case msg.ProfileProgress(step=step, share=share):
                self._make_room(worker_id)  # for longer
                waiting.note(f"{worker_id}: {step}", share)
            case msg.ProgramProfiled(costs_s=costs_s) if is_believable(costs_s):
                workspace = believed_workspace(message.workspace_bytes, operators=len(costs_s))
                waiting.answer.set_result(Measured(costs_s, _believed(message), _codecs_of(message), workspace))
            case msg.ProgramProfiled(costs_s=costs_s):
                seconds = sum(cost or 0.0 for cost in costs_s)
                waiting.answer.set_exception(PlanError(f"it says that the program takes {seconds:g} s, which nobody can have measured"))
            case msg.ProfileFailed():
                waiting.answer.set_exception(AdaptError.from_wire(message.code, message.message, message.fields))

    def is_asked(self, worker_id: WorkerId) -> bool:
        """Whether this worker fetches or measures a program."""
        return any(other == worker_id for other, _ in self._waiting)

    def worker_gone(self, worker_id: WorkerId) -> None:
        """Its session has ended; it has given up what it measured."""
        for (other, _), waiting in self._waiting.items():
            if other == worker_id and not waiting.answer.done():
                waiting.answer.set_exception(PlanError("it has left"))

    async def _measured_by(self, worker_id: WorkerId, program: Digest, file_bytes: int, repetitions: int, told: Told) -> Measured:
        waiting = _Waiting(asyncio.get_running_loop().create_future(), told, asyncio.Event())
        with self._registered((worker_id, program), waiting):
            self._make_room(worker_id)
            if not self._to_worker(worker_id, msg.ProfileProgram(program=program, file_bytes=file_bytes, repetitions=repetitions)):
                raise PlanError("it has left")
            try:
                while not waiting.answer.done():
                    waiting.heard.clear()
                    await self._sign_of_life(waiting)
                return waiting.answer.result()
            finally:
                if not waiting.answer.done() or waiting.answer.exception() is not None:
                    self._to_worker(worker_id, msg.CancelProfile(program=program))

    @contextlib.contextmanager
    def _registered(self, key: tuple[WorkerId, str], waiting: _Waiting) -> Iterator[None]:
        self._waiting[key] = waiting
        try:
            yield
        finally:
            del self._waiting[key]
            if not waiting.answer.done():
                waiting.answer.cancel()

    @staticmethod
    async def _sign_of_life(waiting: _Waiting) -> None:
        heard = asyncio.ensure_future(waiting.heard.wait())
        try:
            await asyncio.wait((heard, waiting.answer), timeout=SILENCE_S, return_when=asyncio.FIRST_COMPLETED)
            if not heard.done() and not waiting.answer.done():
                raise PlanError(f"no progress for {SILENCE_S:.0f} s: other work keeps it busy; try again when it has less to do")
        finally:
            heard.cancel()


def _believed(message: msg.ProgramProfiled) -> Handling | None:
    if message.task_s is None or message.byte_s is None:
        return None
    return Handling(min(message.task_s, MOST_HANDLING.task_s), min(message.byte_s, MOST_HANDLING.byte_s))


def _codecs_of(message: msg.ProgramProfiled) -> tuple[CodecProfile, ...] | None:
    return believed_codecs(CodecProfile.of(structs.asdict(codec)) for codec in message.codecs or ())


# ── for people and for planning ──────────────────────────────────────────────────────────────────────────────────────


def combined(name: str, program: Program, profiles: Sequence[tuple[DeviceKind, Measured]], quick_s: Sequence[float]) -> ModelProfile:
    """What planning knows of a model that was measured on these kinds of devices, whose first worker each was measured.

    Its reference device is one core of the fastest kind that computes with one thread, if there is one."""
    whole = [(kind, completed(measured.costs_s, quick_s), measured) for kind, measured in profiles]
    best_first = sorted(whole, key=lambda item: (item[0].threads != 1, sum(item[1]) * (item[0].cores or 1.0)))
    kind, costs_s, _ = best_first[0]
    reference_s = [cost * (kind.cores or 1.0) for cost in costs_s]
    words = f"{kind.title}, measured on {kind.workers[0]}" + (
        f"; seconds of one core, {kind.cores:.2g} of what it took" if kind.cores else ""
    )
    workspace = [told.workspace_bytes for _, told in profiles if told.workspace_bytes is not None]
    model = with_workspace(profile_model(name, program, reference_s, reference=words), workspace)
    measured = [
        MeasuredCosts(
            device_class=kind.name,
            workers=tuple(kind.workers),
            threads=kind.threads,
            cores=kind.cores,
            costs_s=layer_costs_s(model, costs_s),
            handling=told.handling or NO_HANDLING,
        )
        for kind, costs_s, told in whole
    ]
    told_codecs = [(sum(costs_s) * (kind.cores or 1.0), told.codecs or ()) for kind, costs_s, told in best_first]
    return replace(model, codecs=_known_codecs(told_codecs, len(model.layers) + 1), measured=tuple(measured))


def _known_codecs(told: Sequence[tuple[float, Sequence[CodecProfile]]], boundaries: int) -> tuple[CodecProfile, ...]:
    """On the reference device: as it has said itself, or another one, as much faster as it computes than that. `told`: seconds of the whole
    model on one core, and codecs; the reference device comes first."""
    reference_s = told[0][0]
    for seconds, codecs in told:
        if fitting := [codec for codec in codecs if len(codec.ratios) == boundaries]:
            faster = seconds / reference_s if seconds != reference_s and reference_s > 0 else 1.0
            return (RAW, *(codec.times(faster) for codec in fitting))
    return typical_codecs()
