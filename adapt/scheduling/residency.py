"""Which stage is where: versions, their plans, and what is loaded on which worker because of them.

A stage's places are the workers that the plan names for it; it is *resident* on those that have loaded it. A version becomes ready
when each of its stages is resident somewhere and its canaries have come out right (see canaries.py); a retired version is released when
its last request has ended. A version that is cut anew is two for a while, of one number: the earlier cut takes requests until the later one
is ready.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from adapt.errors import AdaptError, InputMismatchError, UnknownModelError, WorkerLostError
from adapt.planning.placement import Plan, StageNeed, WorkerOffer, addition, orphans, relief, substitute
from adapt.protocol.ids import Digest, Epoch, WorkerId
from adapt.scheduling import events as ev
from adapt.scheduling.canaries import Run, Trial
from adapt.scheduling.copies import Copies
from adapt.scheduling.deadlines import Deadlines
from adapt.scheduling.liveness import Verdict
from adapt.scheduling.queues import StageKey
from adapt.scheduling.roster import Member, Roster
from adapt.scheduling.spares import Spares
from adapt.scheduling.versions import LiveVersion, Wanted

REFUSED_S = 30.0  # after a load that failed, the worker is not asked for that stage again
DISTRUSTED_S = 3600.0  # nor after it gave a wrong output
SPARELESS_S = 120.0  # nor for a spare, after its room was wanted for a measurement


class Residency:
    """The part of the scheduler that keeps stages where the plans want them.

    It appends to `actions` and calls `woken` whenever a task that had no worker may have one now.
    """

    def __init__(
        self, roster: Roster, actions: list[ev.Action], *, woken: Callable[[], None], load_timeout_s: float, spares: int = 0
    ) -> None:
        self._roster, self._actions, self._woken, self._load_timeout_s = roster, actions, woken, load_timeout_s
        self._versions: dict[ev.VersionKey, LiveVersion] = {}
        self._current: dict[str, ev.VersionKey] = {}  # deployment -> the version that takes new requests
        self._due: Deadlines[tuple[WorkerId, Digest]] = Deadlines()  # loads that must show progress
        self._runs: list[tuple[LiveVersion, Run]] = []  # of canaries, that are to begin
        self._abandoned: list[LiveVersion] = []  # in the midst of their trial
        self.copies = Copies(roster, self._wanting, self.offer)
        self._spares = Spares(roster, self.offer, wanted=spares)
        self.has_spares_to_tend = False  # something has changed that they depend on
        self.loads_failed = 0
        self.stages_moved = self.stages_copied = self.copies_dropped = 0
        self.versions_recut = self.spares_used = self.spares_dropped = 0

    # ── questions ────────────────────────────────────────────────────────────────────────────────────────────────────

    def find(self, deployment: str, number: int, program: Digest | None, interface: str = "") -> LiveVersion:
        """The version a request asks for; number 0 means the one that takes new requests.

        Raises:
            UnknownModelError: there is none, or it has another program than the request was pinned to.
            InputMismatchError: it has other inputs or outputs than the client expects.
        """
        live = self._asked_for(deployment, number)
        if live is None or live.is_untried:
            raise UnknownModelError(deployment, suggestions=sorted(self._current)[:5])
        if program is not None and program != live.version.program:
            raise UnknownModelError(f"{deployment} version {number} with program {program[:12]}")
        if interface and live.version.interface and interface != live.version.interface:
            raise InputMismatchError(
                f"version {live.version.number} of {deployment} has other inputs or outputs than the version that this model was asked for: "
                f"client.model({deployment!r}) gives the new one"
            )
        return live

    def _asked_for(self, deployment: str, number: int) -> LiveVersion | None:
        """Of several cuts the one that was ready last."""
        current = self._versions.get(self._current.get(deployment, ("", 0, 0)))
        if not number or (current is not None and current.version.number == number):
            return current
        cuts = [live for live in self._versions.values() if live.key[:2] == (deployment, number)]
        return max(cuts, key=lambda live: (live.is_ready, live.version.cut), default=None)

    def live(self, version: ev.Version) -> LiveVersion:
        return self._versions[version.key]

    def places(self, key: StageKey) -> tuple[WorkerId, ...]:
        """The workers of a stage; none if its version has been released."""
        live = self._versions.get(key[:-1])
        return () if live is None else live.plan.places[key[-1]]

    def current(self) -> Iterator[LiveVersion]:
        """The versions that take new requests."""
        for key in self._current.values():
            yield self._versions[key]

    def offer(self, member: Member) -> WorkerOffer:
        """What the worker has to give beyond what the plans in force take."""
        taken: dict[Digest, StageNeed] = {}
        load_s = 0.0
        for live in self._versions.values():
            for need, workers in zip(live.plan.stages, live.plan.places, strict=True):
                if member.worker_id in workers:
                    taken[need.artifact] = need
                    load_s += need.cost_s * member.slowness / len(workers)
        free_bytes = member.stage_budget_bytes - sum(need.memory_bytes for need in taken.values())
        return WorkerOffer(
            worker_id=member.worker_id,
            free_bytes=free_bytes,
            load_s=load_s,
            slowness=member.slowness,
            numeric_class=member.numeric_class,
        )

    def next_wakeup(self) -> float | None:
        return self._due.next_wakeup()

    def tick(self, now: float) -> list[tuple[WorkerId, Digest]]:
        """The loads that have shown no progress for too long."""
        return self._due.take_due(now)

    # ── versions come and go ─────────────────────────────────────────────────────────────────────────────────────────

    def deploy(self, version: ev.Version, now: float, *, is_restored: bool = False, canaries: tuple[ev.Canary, ...] = ()) -> None:
        live = LiveVersion(version, is_ready=is_restored, canaries=canaries)
        self._versions[live.key] = live
        if version.cut and not is_restored and not self._has_earlier_cut(version):
            self._retire(live, AdaptError(f"version {version.number} of {version.deployment} takes no requests any more"))
            return
        if not canaries:  # else nobody may wait for it yet
            self._current.setdefault(version.deployment, version.key)
        for need, workers in zip(version.plan.stages, version.plan.places, strict=True):
            for worker_id in workers:
                self._roster.member(worker_id).spares.pop(need.artifact, None)
        for need, workers in zip(version.plan.stages, version.plan.places, strict=True):
            for worker_id in workers:
                member = self._roster.member(worker_id)
                if member.verdict is Verdict.READY:
                    self._clear_room(member)
                    self._load(member, need.artifact, now)
                elif member.verdict is Verdict.LOST and not is_restored:  # it left after the plan was made
                    self._left_version(live, member, now)
        self._check_ready(live)

    def _has_earlier_cut(self, version: ev.Version) -> bool:
        """Whether this number takes the requests of its deployment."""
        return self._current.get(version.deployment, ("", 0, 0))[1] == version.number

    def withdraw(self, key: ev.VersionKey) -> None:
        """Nobody waits for this version any more: unless it is ready by now, it never will be."""
        live = self._versions.get(key)
        if live is not None and not live.is_ready:
            self._take_from(live)
            self._retire(live, AdaptError(f"version {key[1]} of {key[0]} was withdrawn before it was ready"))

    def _take_from(self, live: LiveVersion) -> None:
        """It never was ready, and requests may wait for it: no more of them."""
        if self._current.get(live.version.deployment) == live.key:
            del self._current[live.version.deployment]

    def undeploy(self, deployment: str) -> None:
        if self._current.pop(deployment, None) is not None:
            self._retire_below(deployment, None)

    def request_began(self, live: LiveVersion) -> None:
        live.requests += 1

    def request_ended(self, version: ev.Version) -> None:
        live = self.live(version)
        live.requests -= 1
        self._release_if_done(live)

    def _check_ready(self, live: LiveVersion) -> None:
        """When every stage is resident somewhere, the version is tried, and then takes over its deployment."""
        if live.is_ready or live.is_retired or live.trial is not None:
            return
        stages = range(len(live.plan.stages))
        if not all(self._holders(live, stage) for stage in stages):
            return
        if live.canaries and any(self._is_awaited(live, stage) for stage in stages):  # all that shall have it are to be tried
            return
        if live.canaries:
            live.trial = Trial(live.version, live.canaries)
            self._runs += [(live, run) for run in live.trial.begin([self._holders(live, stage) for stage in stages])]
        else:
            self._take_over(live)

    def _check_all(self) -> None:
        for live in list(self._versions.values()):
            self._check_ready(live)

    @property
    def has_trials_to_tend(self) -> bool:
        return bool(self._runs or self._abandoned)

    def take_runs(self) -> list[tuple[LiveVersion, Run]]:
        """Runs of canaries that are to begin now."""
        runs, self._runs = self._runs, []
        return runs

    def take_abandoned(self) -> list[LiveVersion]:
        """Versions whose canaries nobody waits for any more."""
        abandoned, self._abandoned = self._abandoned, []
        return abandoned

    def run_passed(self, live: LiveVersion, run: int) -> None:
        if live.trial is None or live.is_retired or live.is_ready:
            return
        self._runs += [(live, following) for following in live.trial.passed(run)]
        if live.trial.has_passed:
            self._take_over(live)

    def run_failed(self, live: LiveVersion, error: AdaptError) -> None:
        """A canary has come out wrong, or not at all. Once it is ready, or given up, no canary counts."""
        if not live.is_ready:
            self._retire(live, error)

    def get(self, key: ev.VersionKey) -> LiveVersion | None:
        return self._versions.get(key)

    def _take_over(self, live: LiveVersion) -> None:
        live.is_ready = self.has_spares_to_tend = True
        self.versions_recut += live.version.cut > 0
        deployment = live.version.deployment
        before = self._versions.get(self._current.get(deployment, live.key))
        if before is not None and before is not live and before.key[:2] == live.key[:2] and before.plan.epoch >= live.plan.epoch:
            self._replan(live, replace(live.plan, epoch=Epoch(before.plan.epoch + 1)))
        self._actions.append(ev.VersionReady(version=live.version))
        self._current[deployment] = live.key
        self._retire_below(deployment, live.key)

    def _holders(self, live: LiveVersion, stage: int) -> int:
        artifact = live.plan.stages[stage].artifact
        return sum(self._roster.has(worker_id, artifact) for worker_id in live.plan.places[stage])

    def _retire_below(self, deployment: str, key: ev.VersionKey | None) -> None:
        """Retire the versions of the deployment that are older than this one, or all."""
        for live in list(self._versions.values()):
            if live.key[0] == deployment and (key is None or live.key < key):
                how = "undeployed" if key is None else f"replaced by version {key[1]}"
                self._retire(live, AdaptError(f"version {live.key[1]} of {deployment} was {how} before it was ready"))

    def _retire(self, live: LiveVersion, error: AdaptError) -> None:
        """The version takes no new requests. Whoever waits until it is ready is told why it never will be."""
        if live.is_retired:
            return
        live.is_retired = True
        if live.trial is not None and not live.is_ready:
            self._abandoned.append(live)
        if not live.is_ready:
            self._actions.append(ev.VersionFailed(version=live.version, error=error))
        self._release_if_done(live)

    def _release_if_done(self, live: LiveVersion) -> None:
        if not live.is_retired or live.requests or self._versions.pop(live.key, None) is None:
            return
        for artifact, size in sorted((need.artifact, need.memory_bytes) for need in live.plan.stages):
            for member in self._roster:
                if (artifact in member.resident or artifact in member.loading) and not self._is_placed(member, artifact):
                    self._unplace(member, artifact, size)
        self._actions.append(ev.VersionReleased(version=live.version))

    # ── workers come and go ──────────────────────────────────────────────────────────────────────────────────────────

    def joined(self, member: Member, now: float) -> None:
        """Give a worker that has come (back) its part: what it holds, what it had, what nobody has, or what relieves the busiest."""
        self._prune_spares(member)
        for artifact in sorted(member.resident):
            if not any(self._wanting(artifact)):  # it has not heard that its version is gone
                self._unload(member, artifact)
        self._adopt(member)
        versions = list(self._versions.values())
        for live in versions:
            for stage, need in enumerate(live.plan.stages):
                if member.worker_id in live.plan.places[stage]:
                    self._load(member, need.artifact, now)
        for live in versions:  # of all versions, before any second place of any: without them no request of theirs can end
            for stage in orphans(live.plan):
                if live.plan.stages[stage].memory_bytes <= self.offer(member).free_bytes:
                    self._take(live, stage, member, now)
        for live in versions:
            if live.is_ready and not live.is_retired and (busiest := relief(live.plan, self.offer(member))) is not None:
                self._take(live, busiest, member, now)
            self._check_ready(live)
        self._woken()

    def _adopt(self, member: Member) -> None:
        """What it has besides its part is a spare if others run it, and is used if there is room for it; else it has not heard yet that it was to
        give it up."""
        for live in self._versions.values():
            for stage, need in enumerate(live.plan.stages):
                if need.artifact in member.resident and member.worker_id not in live.plan.places[stage]:
                    is_placed = self._is_placed(member, need.artifact)
                    if self._spares.are_wanted and live.plan.places[stage] and not is_placed:
                        member.spares[need.artifact] = need.memory_bytes
                        self._drop_spares(member)
                    elif is_placed or self.offer(member).free_bytes >= need.memory_bytes:
                        member.spares.pop(need.artifact, None)
                        self._replan(live, live.plan.added(stage, member.worker_id))
                    else:
                        self._unload(member, need.artifact)

    def _is_placed(self, member: Member, artifact: Digest) -> bool:
        """Whether some version wants this stage there."""
        return any(member.worker_id in workers for *_, workers in self._wanting(artifact))

    def _wanting(self, artifact: Digest) -> Iterator[Wanted]:
        """The stages that have this artifact, each with its version and its workers. Versions may be planned anew meanwhile."""
        for live in list(self._versions.values()):
            for stage, need in enumerate(live.plan.stages):
                if need.artifact == artifact:
                    yield Wanted(live, stage, need, live.plan.places[stage])

    def _take(self, live: LiveVersion, stage: int, member: Member, now: float) -> None:
        artifact = live.plan.stages[stage].artifact
        self.spares_used += artifact in member.spares
        self._replan(live, live.plan.added(stage, member.worker_id))
        self._load(member, artifact, now)
        if artifact in member.resident:  # because of another version: no `StageResident` will follow
            self._check_ready(live)
            self._woken()

    def recovered(self, member: Member, now: float) -> None:
        """A suspect has been heard again: give it what was planned for it meanwhile."""
        self.has_spares_to_tend = True
        for live in self._versions.values():
            for need, workers in zip(live.plan.stages, live.plan.places, strict=True):
                if member.worker_id in workers:
                    self._load(member, need.artifact, now)

    def session_ended(self, member: Member) -> None:
        """Whatever it was loading, it does so for nobody now."""
        for artifact in list(member.loading):
            member.loading.discard(artifact)
            self._due.clear((member.worker_id, artifact))
        self._prune_spares(member)
        self._check_all()

    def left(self, member: Member, now: float) -> None:
        """The worker is out of every plan. A version that was not ready yet needs another in its place at once."""
        member.resident.clear()
        self._prune_spares(member)
        for live in list(self._versions.values()):
            self._left_version(live, member, now)
        self._check_all()
        self._woken()

    def _left_version(self, live: LiveVersion, member: Member, now: float) -> None:
        self._replan(live, live.plan.removed(member.worker_id))
        for stage in orphans(live.plan):
            if not live.is_ready:
                self._replace_or_fail(live, stage, WorkerLostError(member.worker_id, "it left while it was loading a stage"), now)
            elif self._is_there(live, stage, self._candidates(live, stage, now), now):  # before its room is given to something else
                self.stages_moved += 1

    # ── help for those who wait ──────────────────────────────────────────────────────────────────────────────────────

    def is_coming(self, live: LiveVersion, stage: int, suits: Callable[[Member], bool], now: float) -> bool:
        """Whether a suitable worker is loading the stage; asks one that has memory for it if none is."""
        need = live.plan.stages[stage]
        places = live.plan.places[stage]
        for worker_id in places:
            member = self._roster.get(worker_id)
            if member is not None and member.is_ready and need.artifact in member.loading and suits(member):
                return True
        able = [member for member in self._candidates(live, stage, now) if suits(member)]
        is_helped = self._is_there(live, stage, able, now) or self._substitute(live, stage, able, now)
        if not is_helped and not self._make_room(live, stage, able, suits, now):
            return False
        self.stages_moved += 1
        return True

    def _candidates(self, live: LiveVersion, stage: int, now: float) -> list[Member]:
        """Those that may be given the stage besides its own."""
        artifact, places = live.plan.stages[stage].artifact, live.plan.places[stage]
        return [m for m in self._roster if m.is_ready and m.worker_id not in places and not m.refuses(artifact, now)]

    def _is_there(self, live: LiveVersion, stage: int, able: list[Member], now: float) -> bool:
        """Whether somebody has it because of another version, or as a spare: then it takes no room."""
        artifact = live.plan.stages[stage].artifact
        member = min((m for m in able if artifact in m.resident), key=lambda m: m.worker_id, default=None)
        if member is not None:
            self._take(live, stage, member, now)
        return member is not None

    def relieve(self, now: float) -> None:
        """Where a worker has become slow, and is busier than it would have to be, let another run its stage too."""
        for live in list(self._versions.values()):
            if live.is_retired or not live.is_ready or any(self._is_awaited(live, stage) for stage in range(len(live.plan.stages))):
                continue
            offers = [self.offer(member) for member in self._roster if member.is_ready and self._may_help(live, member, now)]
            if (found := addition(live.plan, self._seconds(live), offers)) is not None:
                stage, worker_id = found
                self.stages_copied += 1
                self._take(live, stage, self._roster.member(worker_id), now)

    def _may_help(self, live: LiveVersion, member: Member, now: float) -> bool:
        """Not who could not load a stage a moment ago; nor, where requests stay in one numeric class, a class that has not all stages."""
        if any(member.refuses(need.artifact, now) for need in live.plan.stages):
            return False
        return not live.version.exact or all(
            any(self._roster.has(worker_id, need.artifact, member.numeric_class) for worker_id in workers)
            for need, workers in zip(live.plan.stages, live.plan.places, strict=True)
        )

    def _is_awaited(self, live: LiveVersion, stage: int) -> bool:
        """Whether somebody is loading it: then one has to see first what that brings."""
        artifact = live.plan.stages[stage].artifact
        members = (self._roster.get(worker_id) for worker_id in live.plan.places[stage])
        return any(member is not None and artifact in member.loading for member in members)

    def _seconds(self, live: LiveVersion) -> dict[tuple[int, WorkerId], float]:
        """What each stage takes where it can run now."""
        found: dict[tuple[int, WorkerId], float] = {}
        for stage, (need, workers) in enumerate(zip(live.plan.stages, live.plan.places, strict=True)):
            for worker_id in workers:
                if self._roster.has(worker_id, need.artifact):
                    found[stage, worker_id] = self._roster.member(worker_id).expect(need.artifact, need.cost_s)[0]
        return found

    # ── room for what nobody has ─────────────────────────────────────────────────────────────────────────────────────

    def _make_room(self, live: LiveVersion, stage: int, able: list[Member], suits: Callable[[Member], bool], now: float) -> bool:
        """Copies give way to a stage that nobody suitable has: what others have too is dropped where least is at work on it. False: that is not
        enough."""
        need = live.plan.stages[stage]
        holders = [self._roster.member(worker_id) for worker_id in live.plan.places[stage] if self._roster.has(worker_id, need.artifact)]
        if any(suits(member) for member in holders):
            return False
        found: tuple[tuple[int, int, float, WorkerId], list[StageNeed]] | None = None
        for member in able:
            dropped = self.copies.enough(member, need.memory_bytes - self.offer(member).free_bytes)
            if dropped is not None:
                at_work = sum(member.at_work(copy.artifact) for copy in dropped)  # it keeps the memory until these are done
                cost = (at_work, len(dropped), sum(copy.cost_s for copy in dropped), member.worker_id)
                if found is None or cost < found[0]:
                    found = (cost, dropped)
        if found is None:
            return False
        member = self._roster.member(found[0][-1])
        for copy in found[1]:
            self._drop_copy(member, copy.artifact)
        self._take(live, stage, member, now)
        return True

    def _clear_room(self, member: Member) -> None:
        """A version has been planned on this worker at the cost of copies."""
        for copy in self.copies.enough(member, -self.offer(member).free_bytes) or ():
            self._drop_copy(member, copy.artifact)

    def _drop_copy(self, member: Member, artifact: Digest) -> None:
        for live, stage, _, workers in self._wanting(artifact):
            if member.worker_id in workers:
                self._replan(live, live.plan.dropped(stage, member.worker_id))
        self._unload(member, artifact)
        self.copies_dropped += 1
        self._woken()  # who waited for it there may have to go elsewhere

    # ── warm spares ──────────────────────────────────────────────────────────────────────────────────────────────────

    def tend_spares(self, now: float) -> None:
        """Load the next one, if one is wanted."""
        self.has_spares_to_tend = False
        if (found := self._spares.next(self._versions.values(), now)) is not None:
            member, need = found
            self._load(member, need.artifact, now)
            member.spares[need.artifact] = need.memory_bytes

    def without_spares(self, worker_id: WorkerId, now: float) -> None:
        """For a while its room is wanted for something else."""
        if (member := self._roster.get(worker_id)) is not None:
            member.spareless_until = now + SPARELESS_S
            for artifact in sorted(member.spares):
                self._drop_spare(member, artifact)

    def _prune_spares(self, member: Member) -> None:
        """What it has no more is no spare."""
        self.has_spares_to_tend = True
        member.spares = {artifact: size for artifact, size in member.spares.items() if artifact in member.resident | member.loading}

    def _drop_spares(self, member: Member) -> None:
        """Spares give way to what a plan wants there."""
        for artifact in sorted(member.spares, key=lambda artifact: (-member.spares[artifact], artifact)):
            if self._spares.room_bytes(member) >= 0:
                return
            self._drop_spare(member, artifact)

    def _unplace(self, member: Member, artifact: Digest, size_bytes: int) -> None:
        """No plan wants it there any more; if one wants it at all, it may be a spare."""
        if self._spares.are_wanted and any(self._wanting(artifact)):
            member.spares[artifact] = size_bytes
            self._drop_spares(member)
        else:
            self._unload(member, artifact)

    def _unload(self, member: Member, artifact: Digest) -> None:
        self._forget(member, artifact)
        self._actions.append(ev.Unload(worker_id=member.worker_id, artifact=artifact))

    def _drop_spare(self, member: Member, artifact: Digest) -> None:
        self.spares_dropped += 1
        self._unload(member, artifact)

    # ── stages come and go ───────────────────────────────────────────────────────────────────────────────────────────

    def resident(self, member: Member, artifact: Digest) -> None:
        self._due.clear((member.worker_id, artifact))
        if artifact not in member.loading and not self._is_placed(member, artifact):
            wanted = next(self._wanting(artifact), None)
            if wanted is None or artifact not in member.refused:  # it was told to unload it, or has begun anew since
                self._unload(member, artifact)
                return
            member.resident.add(artifact)  # it was given up, and came after all
            member.spares[artifact] = wanted.need.memory_bytes
            self._drop_spares(member)
        else:
            member.loading.discard(artifact)
            member.resident.add(artifact)
        member.refused.pop(artifact, None)
        self.has_spares_to_tend = True
        self._check_all()
        self._woken()

    def progressed(self, member: Member, artifact: Digest, now: float) -> None:
        if artifact in member.loading:
            self._due.set((member.worker_id, artifact), now + self._load_timeout_s)

    def absent(self, member: Member, artifact: Digest, now: float) -> None:
        """The worker does not have a stage that we thought it had."""
        member.resident.discard(artifact)
        self._prune_spares(member)
        if self._is_placed(member, artifact):
            self._load(member, artifact, now)

    def refused(self, member: Member, artifact: Digest, error: AdaptError, now: float) -> None:
        """The worker cannot have this stage. A version that never was ready fails if nobody can; requests of others wait."""
        self._forget(member, artifact)
        member.refused[artifact] = now + REFUSED_S
        self.loads_failed += 1
        for live, stage, _, workers in self._wanting(artifact):
            if member.worker_id in workers:
                self._replan(live, live.plan.dropped(stage, member.worker_id))
                if not live.is_ready:
                    self._replace_or_fail(live, stage, error, now)
        self._check_all()
        self._woken()

    def distrust(self, member: Member, artifact: Digest, now: float) -> None:
        """The worker gives other outputs than the rest: it is not to have this stage, as long as another has it."""
        if all(
            any(self._roster.has(other, artifact) for other in workers if other != member.worker_id)
            for *_, workers in self._wanting(artifact)
        ):
            self._drop_copy(member, artifact)
            member.refused[artifact] = now + DISTRUSTED_S

    def _replace_or_fail(self, live: LiveVersion, stage: int, error: AdaptError, now: float) -> None:
        if live.is_retired:  # it has failed already, for another stage
            return
        is_elsewhere = not live.version.cut and self._substitute(live, stage, self._candidates(live, stage, now), now)
        if is_elsewhere or live.plan.places[stage]:  # another cut is worth it as it was planned, or not at all
            return
        self._take_from(live)
        self._retire(live, error)

    def _substitute(self, live: LiveVersion, stage: int, able: list[Member], now: float) -> bool:
        need = live.plan.stages[stage]
        chosen = substitute(need, [self.offer(member) for member in able])
        if chosen is None:
            return False
        self._take(live, stage, self._roster.member(chosen), now)
        return True

    def _load(self, member: Member, artifact: Digest, now: float) -> None:
        member.spares.pop(artifact, None)
        if artifact in member.resident or artifact in member.loading:
            return
        self._drop_spares(member)
        member.loading.add(artifact)
        self._due.set((member.worker_id, artifact), now + self._load_timeout_s)
        self._actions.append(ev.Load(worker_id=member.worker_id, artifact=artifact))

    def _forget(self, member: Member, artifact: Digest) -> None:
        member.resident.discard(artifact)
        member.loading.discard(artifact)
        self._due.clear((member.worker_id, artifact))
        self._prune_spares(member)

    def _replan(self, live: LiveVersion, plan: Plan) -> None:
        if plan is not live.plan:
            live.version = replace(live.version, plan=plan)
            self._actions.append(ev.PlanChanged(version=live.version))
