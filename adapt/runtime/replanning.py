"""Deployments with `stages="auto"` are looked at every now and then: would their program be faster, cut and placed for the workers, speeds and links
that there are now? If so twice in a row, its version is loaded in other stages beside the present ones, and requests go there when they are
ready. Which gain is worth it says planning/replanning.py, how a version is changed deployer.py and scheduling/residency.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from adapt.errors import AdaptError, PlanError
from adapt.models.layers import profile_model
from adapt.models.program import read_program
from adapt.planning.model import ModelProfile
from adapt.planning.placement import WorkerOffer
from adapt.planning.replanning import Figures, Patience, as_their_kind, gain, is_worth_it, looks_after
from adapt.protocol.ids import WorkerId
from adapt.runtime.artifacts import ArtifactStore
from adapt.runtime.deployer import Deployer, Surroundings
from adapt.runtime.deployments import Deployments
from adapt.runtime.profiles import DeviceKind
from adapt.runtime.recipes import Recipe
from adapt.runtime.terms import Proposal, Terms
from adapt.scheduling import events as ev
from adapt.scheduling.links import Link

log = logging.getLogger(__name__)

AFTER_FAILURE = 10  # looks to let pass at least
LOAD_TIMEOUT_S = 600.0  # other stages that are not ready by then are given up


@dataclass(slots=True)
class _Watched:
    """One version, and what the last look at it has seen."""

    model: ModelProfile
    patience: Patience[Proposal] = field(default_factory=Patience)
    figures: Figures[tuple[WorkerId, str]] = field(default_factory=Figures)
    failures: int = 0  # to cut anew, one after the other
    seen: Any = None  # all that a plan depends on
    lack: str = ""  # why there was no plan, as it was logged last

    def failed(self) -> None:
        """What was loaded for nothing has cost something: each time it rests longer."""
        self.failures += 1
        self.put_off(AFTER_FAILURE * looks_after(self.failures - 1) if self.failures > 1 else AFTER_FAILURE)

    def put_off(self, looks: int) -> None:
        """After so many looks it is planned again, though nothing may have changed."""
        self.seen = None
        self.patience.rest(looks)


@dataclass(frozen=True, slots=True)
class _Outlook:
    """What the present plan does, and the best, by what is known now."""

    proposal: Proposal
    present_s: float
    proposal_s: float


class Replanner:
    """See the head of this file. Lives on the dispatcher's loop; plans beside it."""

    def __init__(
        self, store: ArtifactStore, deployments: Deployments, deployer: Deployer, surroundings: Surroundings, *, interval_s: float
    ) -> None:
        self._store, self._deployments, self._deployer, self._around = store, deployments, deployer, surroundings
        self._interval_s = interval_s
        self._watched: dict[tuple[str, int], _Watched] = {}

    async def run(self) -> None:
        """For ever."""
        while True:
            await asyncio.sleep(self._interval_s)
            await self.look()

    async def look(self) -> None:
        """At every deployment that may be cut as is best; what goes wrong with one does not concern the others."""
        present = self._around.present()
        self._watched = {key: self._watched[key] for version in present if (key := version.key[:2]) in self._watched}
        for version in present:
            try:
                await self._look_at(version.key)
            except Exception:
                log.exception("not replanned", extra={"deployment": version.deployment})
                if (watched := self._watched.get(version.key[:2])) is not None:
                    watched.put_off(AFTER_FAILURE)

    async def _look_at(self, key: ev.VersionKey) -> None:
        if (found := self._free(key)) is None:
            return
        watched = await self._watch(*found[:2])
        if watched.patience.is_resting() or not self._deployments.is_quiet:
            return
        async with self._deployer.planning:
            if (found := self._free(key)) is None:  # replaced meanwhile
                return
            version, recipe, standing = found
            outlook = await self._outlook(watched, recipe, standing)
            if outlook is None:
                return
            if not self._deployments.is_quiet:  # a deployment comes first
                watched.put_off(0)
                return
            facts = _facts(version, outlook)
            log.info("cutting anew", extra=facts)
            try:
                loading = await self._deployer.recut(version, recipe, outlook.proposal)
            except AdaptError as error:
                self._failed(watched, facts, error)
                return
        await self._until_ready(watched, version, loading, facts)

    def _free(self, key: ev.VersionKey) -> tuple[ev.Version, Recipe, Proposal] | None:
        """A version that takes requests and may be cut as is best, with its plan; None: it is not such a one, or not any more."""
        version = next((version for version in self._around.present() if version.key == key), None)
        blueprint = None if version is None else self._deployments.blueprint(version)
        if version is None or blueprint is None or blueprint.positions is None or blueprint.recipe is None or blueprint.recipe.stages:
            return None
        return version, blueprint.recipe, Proposal(blueprint.positions, version.plan.places)

    async def _watch(self, version: ev.Version, recipe: Recipe) -> _Watched:
        watched = self._watched.get(version.key[:2])
        if watched is None:
            watched = _Watched(await asyncio.to_thread(self._model, version.deployment, recipe))
            watched.patience.rest(looks_after(version.cut))
            self._watched[version.key[:2]] = watched
        return watched

    def _model(self, name: str, recipe: Recipe) -> ModelProfile:
        source = read_program(self._store.path(recipe.program.digest), verify=False)
        return profile_model(name, source, recipe.program.operator_costs_s)

    async def _until_ready(self, watched: _Watched, version: ev.Version, loading: asyncio.Task[None], facts: dict[str, object]) -> None:
        done, _ = await asyncio.wait([loading], timeout=LOAD_TIMEOUT_S)
        if not done:
            loading.cancel()
            await asyncio.wait([loading])
        if loading.cancelled():
            self._failed(watched, facts, AdaptError("it was called off" if done else f"not ready within {LOAD_TIMEOUT_S:g} s"))
        elif (error := loading.exception()) is not None:
            self._failed(watched, facts, error)
        else:
            log.info("cut anew", extra=facts)
            watched.failures = 0
            watched.patience.rest(looks_after(version.cut + 1))

    def _failed(self, watched: _Watched, facts: dict[str, object], error: BaseException) -> None:
        """The present plan goes on."""
        log.warning("not cut anew", extra=facts | {"reason": str(error)})
        watched.failed()

    # ── one look ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _outlook(self, watched: _Watched, recipe: Recipe, standing: Proposal) -> _Outlook | None:
        """What to change to now, if it is worth it."""
        kinds = self._around.device_kinds()
        links = _held_links(watched.figures, self._around.links())
        beside = await self._around.offers(wait_s=0.0)
        slowness = _held_slowness(watched.figures, beside, kinds)
        if not beside:
            return None
        offers = [_as_slow(beside, slowness)]
        if len(self._around.present()) == 1:  # no copies of other deployments' stages: nobody has asked for this
            with_copies = _as_slow(await self._around.offers(wait_s=0.0, with_copies=True), slowness)
            offers += [with_copies] if with_copies != offers[0] else []
        known = await asyncio.to_thread(self._deployer.known_costs, recipe.program, kinds)
        seen = (standing, offers, links, known)
        if seen == watched.seen and not watched.patience.is_waiting:
            return None
        watched.seen = seen
        terms, there = Terms.of(watched.model, known, links), offers[0]
        present_s = terms.seconds(there, standing)
        best = await asyncio.to_thread(self._best, watched, terms, offers, present_s, exact=recipe.is_exact)
        chosen = watched.patience.look(present_s, best, lambda proposal: terms.seconds(there, proposal))
        return None if chosen is None else _Outlook(chosen, present_s, terms.seconds(there, chosen))

    def _best(
        self, watched: _Watched, terms: Terms, offers: Sequence[Sequence[WorkerOffer]], present_s: float, *, exact: bool
    ) -> Proposal | None:
        """Beside what is there; if that is worth nothing, where copies give way. None: there is no room."""
        best, lack = None, ""
        for offered in offers:
            try:
                best = terms.best(offered, exact=exact)
            except PlanError as error:
                lack = lack or str(error)
            else:
                if is_worth_it(present_s, terms.seconds(offered, best)):
                    break
        if best is None and lack != watched.lack:
            log.info("no room to cut anew beside the present stages", extra={"deployment": watched.model.name, "reason": lack})
        watched.lack = lack if best is None else ""
        return best


def _held_slowness(
    figures: Figures[tuple[WorkerId, str]], offers: Sequence[WorkerOffer], kinds: Mapping[WorkerId, DeviceKind]
) -> dict[WorkerId, float]:
    measured = as_their_kind({offer.worker_id: offer.slowness for offer in offers}, {worker: kind.name for worker, kind in kinds.items()})
    return {worker: figures.hold((worker, "slowness"), value) for worker, value in measured.items()}


def _held_links(figures: Figures[tuple[WorkerId, str]], links: Mapping[WorkerId, Link]) -> dict[WorkerId, Link]:
    return {
        worker: Link(
            latency_s=figures.hold((worker, "latency"), link.latency_s),
            down_bytes_per_s=figures.hold((worker, "down"), link.down_bytes_per_s),
            up_bytes_per_s=figures.hold((worker, "up"), link.up_bytes_per_s),
        )
        for worker, link in links.items()
    }


def _as_slow(offers: Sequence[WorkerOffer], slowness: Mapping[WorkerId, float]) -> list[WorkerOffer]:
    """Those of the workers that are known to be so slow."""
    return [replace(offer, load_s=0.0, slowness=slowness[offer.worker_id]) for offer in offers if offer.worker_id in slowness]


def _facts(version: ev.Version, outlook: _Outlook) -> dict[str, object]:
    """For the log."""
    return {
        "deployment": version.deployment,
        "version": version.number,
        "gain": f"{gain(outlook.present_s, outlook.proposal_s):.0%}",
        "bottleneck_s": outlook.proposal_s,
        "plan": "; ".join("+".join(place) for place in outlook.proposal.places),
    }
