"""Which worker runs which stage. Pure: needs and offers in, a plan out.

This is the simple placement of the foundation: one worker per stage, the costliest stages to the least loaded workers that have the
memory, and every worker that is left relieves the busiest one; a stage whose workers are gone goes to the worker that has most room in
its time; a newcomer relieves the busiest worker; a worker that has become slow gets help.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from adapt.errors import PlanError
from adapt.protocol.ids import Digest, Epoch, WorkerId

MEBIBYTE = 1 << 20
NOBODY = "no worker is connected; start one with: adapt-worker --dispatcher ADDRESS"
LEAST_SLOWNESS = 1e-3  # that is believed: a worker may say what it likes of its seconds
WORTH_A_COPY = 0.2  # a copy of a stage has to relieve the busiest worker by so much: what is measured is rough
WORTH_A_COPY_S = 2e-3  # and by so much: of shorter tasks most is not the worker's time


@dataclass(frozen=True, slots=True, kw_only=True)
class StageNeed:
    """What one stage asks of a worker."""

    artifact: Digest
    memory_bytes: int  # weights and the activations of one item
    cost_s: float  # seconds for one item, by the quick profile


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOffer:
    """What one worker has to give."""

    worker_id: WorkerId
    free_bytes: int  # of its stage budget
    load_s: float = 0.0  # seconds for one item of everything it runs already
    slowness: float = 1.0  # measured seconds per predicted second
    numeric_class: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The stages of a program and the workers of each. Immutable: a change is a new plan under the next epoch."""

    program: Digest
    epoch: Epoch
    stages: tuple[StageNeed, ...]
    places: tuple[tuple[WorkerId, ...], ...]  # for each stage, the workers it may run on

    def added(self, stage: int, worker_id: WorkerId) -> Plan:
        """The plan in which `worker_id` runs `stage` too."""
        return self._with(stage, (*self.places[stage], worker_id))

    def removed(self, worker_id: WorkerId) -> Plan:
        """The plan without `worker_id`."""
        places = tuple(tuple(other for other in workers if other != worker_id) for workers in self.places)
        return self if places == self.places else replace(self, epoch=Epoch(self.epoch + 1), places=places)

    def dropped(self, stage: int, worker_id: WorkerId) -> Plan:
        """The plan in which `worker_id` does not run `stage`."""
        return self._with(stage, tuple(other for other in self.places[stage] if other != worker_id))

    def _with(self, stage: int, workers: tuple[WorkerId, ...]) -> Plan:
        places = (*self.places[:stage], workers, *self.places[stage + 1 :])
        return replace(self, epoch=Epoch(self.epoch + 1), places=places)


def place(needs: Sequence[StageNeed], offers: Sequence[WorkerOffer]) -> tuple[tuple[WorkerId, ...], ...]:
    """The workers of each stage: one, and then whoever is left over.

    The stage that needs most memory chooses first, so that a tight fit is not spoilt by a loose one; it takes the worker that would
    finish one item of all it runs soonest. A worker without a stage then relieves the busiest, if it has the memory.

    Raises:
        PlanError: there is no worker, or none with memory for a stage; names stage, need and the largest offer.
    """
    if not offers:
        raise PlanError(NOBODY)
    room = {offer.worker_id: offer.free_bytes for offer in offers}
    load_s = {offer.worker_id: offer.load_s for offer in offers}
    slowness = {offer.worker_id: offer.slowness for offer in offers}
    chosen: dict[int, WorkerId] = {}
    for index in sorted(range(len(needs)), key=lambda i: (-needs[i].memory_bytes, -needs[i].cost_s, i)):
        need = needs[index]
        fitting = [worker for worker, free in room.items() if free >= need.memory_bytes]
        if not fitting:
            raise PlanError(_no_room(index, len(needs), need, room))
        worker = min(fitting, key=lambda w: (load_s[w] + need.cost_s * slowness[w], -room[w], w))
        chosen[index] = worker
        room[worker] -= need.memory_bytes
        load_s[worker] += need.cost_s * slowness[worker]
    places = tuple((chosen[index],) for index in range(len(needs)))
    return _relieved(Plan(program=Digest(""), epoch=Epoch(0), stages=tuple(needs), places=places), offers).places


def apart(offers: Sequence[WorkerOffer]) -> list[list[WorkerOffer]]:
    """The offers by numeric class, the class that computes most first: for requests that have to stay in one."""
    classes: dict[str, list[WorkerOffer]] = {}
    for offer in offers:
        classes.setdefault(offer.numeric_class, []).append(offer)
    return sorted(
        classes.values(), key=lambda group: (-sum(1.0 / max(offer.slowness, LEAST_SLOWNESS) for offer in group), group[0].numeric_class)
    )


def place_apart(needs: Sequence[StageNeed], offers: Sequence[WorkerOffer]) -> tuple[tuple[WorkerId, ...], ...]:
    """As `place`, in each numeric class by itself: a request that begins in one can end in it.

    Raises:
        PlanError: no class has the memory; says what the one that computes most lacks.
    """
    found, errors = [], []
    for group in apart(offers):
        try:
            found.append(place(needs, group))
        except PlanError as error:
            errors.append(error)
    if not found:
        raise errors[0] if errors else PlanError(NOBODY)
    return tuple(tuple(worker for places in found for worker in places[index]) for index in range(len(needs)))


def _relieved(plan: Plan, offers: Sequence[WorkerOffer]) -> Plan:
    """The plan in which every offer that it has left out relieves the busiest worker, the fastest first."""
    for offer in sorted(offers, key=lambda o: (o.load_s, o.slowness, o.worker_id)):
        if (stage := relief(plan, offer)) is not None:
            plan = plan.added(stage, offer.worker_id)
    return plan


def substitute(need: StageNeed, offers: Sequence[WorkerOffer]) -> WorkerId | None:
    """The worker that should run a stage whose own workers are gone: the one that finishes an item soonest, or None without room."""
    fitting = [offer for offer in offers if offer.free_bytes >= need.memory_bytes]
    if not fitting:
        return None
    return min(fitting, key=lambda offer: (offer.load_s + need.cost_s * offer.slowness, offer.worker_id)).worker_id


def orphans(plan: Plan) -> list[int]:
    """The stages that no worker has, the costliest first."""
    return sorted((i for i, workers in enumerate(plan.places) if not workers), key=lambda i: (-plan.stages[i].cost_s, i))


def relief(plan: Plan, newcomer: WorkerOffer) -> int | None:
    """The stage that a newcomer should run too: the costliest of the busiest worker; None if it has room for none of them."""
    load_s: dict[WorkerId, float] = {}
    for need, workers in zip(plan.stages, plan.places, strict=True):
        for worker in workers:
            load_s[worker] = load_s.get(worker, 0.0) + need.cost_s / len(workers)
    if newcomer.worker_id in load_s:
        return None
    for worker in sorted(load_s, key=lambda w: (-load_s[w], w)):
        theirs = [i for i, workers in enumerate(plan.places) if worker in workers]
        for index in sorted(theirs, key=lambda i: (-plan.stages[i].cost_s / len(plan.places[i]), i)):
            if plan.stages[index].memory_bytes <= newcomer.free_bytes:
                return index
    return None


def addition(plan: Plan, seconds: Mapping[tuple[int, WorkerId], float], offers: Sequence[WorkerOffer]) -> tuple[int, WorkerId] | None:
    """A stage, and a worker that should run it too, so that the busiest worker is relieved and nobody becomes as busy; None if no copy is
    worth it. (Of two that are equally busy one is helped after the other.)

    Copies of a stage share its requests in proportion to their speeds, so that a stage of workers that need t1, t2 ... keeps each of them
    busy for 1 / (1/t1 + 1/t2 + ...) per request.

    Args:
        seconds: that a stage takes on a worker, for the places of the plan that can run it now; of others it is predicted.
        offers: of all workers that may run something now.
    """
    times = {stage: {worker: s for (at, worker), s in seconds.items() if at == stage} for stage in range(len(plan.stages))}
    if not all(times.values()):  # a stage that nobody has is another matter
        return None
    before = _busy(times)
    before_s, busiest = max((s, worker) for worker, s in before.items())
    best: tuple[float, float, int, WorkerId] | None = None
    for stage in sorted(stage for stage, workers in times.items() if busiest in workers):
        need = plan.stages[stage]
        for offer in offers:
            if offer.worker_id in plan.places[stage] or offer.free_bytes < need.memory_bytes:
                continue
            copied = {**times, stage: {**times[stage], offer.worker_id: need.cost_s * offer.slowness}}
            after = _busy(copied)
            is_worth_it = after[busiest] * (1.0 + WORTH_A_COPY) + WORTH_A_COPY_S < before_s
            if is_worth_it and after[offer.worker_id] < before_s:
                candidate = (max(after.values()), after[busiest], stage, offer.worker_id)
                best = candidate if best is None else min(best, candidate)
    return None if best is None else best[2:]


def _busy(times: Mapping[int, Mapping[WorkerId, float]]) -> dict[WorkerId, float]:
    """Seconds per request that each worker needs."""
    busy_s: dict[WorkerId, float] = {}
    for workers in times.values():
        share_s = 1.0 / sum(1.0 / max(s, 1e-9) for s in workers.values())
        for worker in workers:
            busy_s[worker] = busy_s.get(worker, 0.0) + share_s
    return busy_s


def _no_room(index: int, stages: int, need: StageNeed, room: dict[WorkerId, int]) -> str:
    best = max(room, key=lambda worker: (room[worker], worker))
    return (
        f"no worker has memory for stage {index} of {stages}: it needs {need.memory_bytes / MEBIBYTE:.1f} MiB, and the most that is free "
        f"of a stage budget is {room[best] / MEBIBYTE:.1f} MiB ({best}); raise --memory-limit, add workers, or ask for more stages"
    )
