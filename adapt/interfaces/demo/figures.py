"""What the demo found out: numbers only, from the answers, the reference and the dispatcher's own counters. No printing here."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from adapt.interfaces.demo.links import Link
from adapt.interfaces.demo.stream import Answer
from adapt.protocol.messages import DeploymentRecord, StatusReport

Array = np.ndarray[Any, Any]
LINK_BYTES, LINK_RAW_BYTES = "link_bytes.", "link_raw_bytes."  # of the dispatcher's counters, by codec


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answers against the reference.

    Attributes:
        equal: bit for bit, shape and type included.
        wrong: answers that are not what they should be. Lossless: not equal. Lossy: not the bits that the same stages and codec give in
            a process of their own.
        same_top1: answers whose most likely class is the reference's.
        largest_difference: of any value of any answer from the reference.
    """

    answered: int
    failed: int
    equal: int
    wrong: int
    duplicated: int
    same_top1: int
    largest_difference: float
    errors: dict[str, int]  # of the requests that failed: message -> how many


def judge(answers: Sequence[Answer], requested: int, reference: Array, expected: Array) -> Verdict:
    """Hold answers against the eager outputs.

    Args:
        reference: (requested, 1, classes), by the eager module.
        expected: what the answers must be bit for bit: the reference itself, or, behind a lossy codec, the replay of the links.
    """
    outputs = [(index, answer.output) for index, answer in enumerate(answers) if answer.output is not None]
    errors = Counter(str(answer.error) or type(answer.error).__name__ for answer in answers if answer.error is not None)
    unanswered = requested - len(outputs) - errors.total()
    if unanswered:
        errors["no answer and no error by the deadline"] = unanswered
    comparable = [(index, np.asarray(output)) for index, output in outputs if np.shape(output) == reference[index].shape]
    return Verdict(
        answered=len(outputs),
        failed=requested - len(outputs),
        equal=sum(_same_bits(output, reference[index]) for index, output in comparable),
        wrong=len(outputs) - sum(_same_bits(output, expected[index]) for index, output in comparable),
        duplicated=sum(max(answer.deliveries - 1, 0) for answer in answers),
        same_top1=sum(int(output.argmax()) == int(reference[index].argmax()) for index, output in comparable),
        largest_difference=max((_difference(output, reference[index]) for index, output in comparable), default=0.0),
        errors=dict(errors),
    )


def _same_bits(one: Array, other: Array) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def _difference(one: Array, other: Array) -> float:
    return float(np.max(np.abs(one.astype(np.float64) - other.astype(np.float64)), initial=0.0))


@dataclass(frozen=True, slots=True)
class WorkerFigures:
    """One worker, at the end. `stages`: those it was given, from 1; `fault`: what was done to it, or ""."""

    name: str
    pid: int
    stages: list[int]
    tasks: int
    compute_s: float
    state: str
    fault: str


@dataclass(frozen=True, slots=True)
class CodecFigures:
    """Tensors between dispatcher and workers that travelled under one codec, both directions."""

    codec: str
    raw_bytes: int
    sent_bytes: int

    @property
    def ratio(self) -> float:
        return self.raw_bytes / self.sent_bytes if self.sent_bytes else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """All that the table and `--json` say. Times in seconds."""

    model: str
    weights: str
    codec: str
    tolerance: float | None
    stages: int
    threads: int
    in_flight: int
    requested: int
    verdict: Verdict
    workers_lost: int
    workers_expected_lost: int
    retries: int
    evictions: int
    late_answers: int
    elapsed_s: float
    images_per_s: float
    images_per_s_before_faults: float | None
    single_process_images_per_s: float
    latency_p50_s: float
    latency_p99_s: float
    workers: list[WorkerFigures]
    codecs: list[CodecFigures]
    links: list[Link]
    membership: str = "embedded"
    etcd_outages: int = 0  # that the dispatcher has noticed
    etcd_is_back: bool = True  # with a lease of every worker that is left, if membership is kept there

    @property
    def problems(self) -> list[str]:
        """Everything that is not as promised; empty when all is well."""
        verdict, found = self.verdict, []
        if verdict.failed:
            found.append(f"{verdict.failed} of {self.requested} requests failed")
        if verdict.wrong:
            truth = "what these stages and this codec give" if self.links else "the eager model's"
            found.append(f"{verdict.wrong} answers are wrong: not {truth}, bit for bit")
        if verdict.duplicated:
            found.append(f"{verdict.duplicated} answers came more than once")
        if self.workers_lost != self.workers_expected_lost:
            found.append(f"{self.workers_lost} workers were given up, {self.workers_expected_lost} had been killed or stopped")
        if not self.etcd_is_back:
            found.append("etcd was started again, and membership does not stand there again")
        found += [f"link from stage {link.stage}: error above its bound" for link in self.links if not link.worst_share <= 1]
        return found

    def to_plain(self) -> dict[str, Any]:
        """For JSON: one flat level for the counts and rates, lists for workers, codecs and links."""
        plain = asdict(self)
        verdict = plain.pop("verdict")
        if self.links:
            verdict["top1_agreement"] = verdict["same_top1"] / max(verdict["answered"], 1)
            plain["compression_ratio"] = _overall(self.links)
            plain["link_error_share_of_bound"] = max(link.worst_share for link in self.links)
        for codec, figures in zip(plain["codecs"], self.codecs, strict=True):
            codec["ratio"] = figures.ratio
        plain = {**plain, **verdict, "problems": self.problems}
        return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in plain.items()}


def _overall(links: Sequence[Link]) -> float:
    return sum(link.raw_bytes for link in links) / max(sum(link.sent_bytes for link in links), 1)


def rates(answers: Sequence[Answer], first_fault_after: int | None) -> tuple[float, float, float | None]:
    """Seconds from the first image sent to the last answer; images/s over all of it; images/s up to the first fault."""
    moments = sorted(answer.answered_at for answer in answers if answer.output is not None)
    if not moments:
        return 0.0, 0.0, None
    began = min(answer.sent_at for answer in answers)
    elapsed_s = moments[-1] - began
    before = None
    if first_fault_after is not None and 0 < first_fault_after <= len(moments):
        before = first_fault_after / (moments[first_fault_after - 1] - began)
    return elapsed_s, len(moments) / elapsed_s, before


def latency_percentile_s(answers: Sequence[Answer], percent: float) -> float:
    """A latency that really occurred: the smallest that `percent` of the answers did not exceed. Without answers NaN."""
    latencies = [answer.latency_s for answer in answers if answer.output is not None]
    return float(np.percentile(latencies, percent, method="inverted_cdf")) if latencies else math.nan


def codec_figures(counters: dict[str, float]) -> list[CodecFigures]:
    names = sorted(name.removeprefix(LINK_BYTES) for name in counters if name.startswith(LINK_BYTES))
    return [CodecFigures(name, int(counters.get(LINK_RAW_BYTES + name, 0)), int(counters[LINK_BYTES + name])) for name in names]


def stages_of(deployment: DeploymentRecord, worker: str) -> set[int]:
    """Numbers, from 1, of the stages that the plan gives to a worker."""
    return {number for number, stage in enumerate(deployment.stages, start=1) if worker in stage.workers}


def worker_figures(pids: dict[str, int], seen: dict[str, set[int]], faults: dict[str, str], status: StatusReport) -> list[WorkerFigures]:
    """One row for each worker that was started.

    Args:
        pids: name -> process id.
        seen: name -> the stages that plans gave it.
        faults: name -> what was done to it.
    """
    records = {record.worker_id: record for record in status.workers}
    rows = []
    for name, pid in pids.items():
        record = records.get(name)
        rows.append(
            WorkerFigures(
                name=name,
                pid=pid,
                stages=sorted(seen.get(name, ())),
                tasks=record.tasks_done if record else 0,
                compute_s=record.compute_s if record else 0.0,
                state=record.state if record else "never seen",
                fault=faults.get(name, ""),
            )
        )
    return rows
