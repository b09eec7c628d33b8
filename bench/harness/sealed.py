"""Predictions that are written down, with a digest, before anybody measures what they predict. Pure but for the files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path

from adapt.planning.cost import Layout, StageLayout, forecast
from adapt.planning.devices import ClusterProfile, DeviceProfile
from adapt.planning.model import NO_HANDLING, ModelProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a plan is to do, and all that this rests on.

    Attributes:
        plan: how it was asked for: "auto", "4 stages".
        operators: of each stage; the cuts follow from them.
        workers: of each stage.
        rate_per_s: answers per second while enough is asked.
        computing_rate_per_s: the same, were computing all that a worker does.
        stage_s: time of each stage per request, its workers together.
        limiting: the workers of the stage that limits it.
        profile_digest: SHA-256 of the profile as JSON.
    """

    model: str
    plan: str
    cores: Mapping[str, float]
    codec: str
    operators: tuple[int, ...]
    workers: tuple[tuple[str, ...], ...]
    rate_per_s: float
    computing_rate_per_s: float
    stage_s: tuple[float, ...]
    limiting: tuple[str, ...]
    where: str
    latency_s: float
    profile_digest: str

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"


def predict(
    profile: ModelProfile,
    *,
    plan: str,
    codec: str,
    operators: Sequence[int],
    workers: Sequence[Sequence[str]],
    cores: Mapping[str, float],
) -> Prediction:
    """Of a plan that stands, from a profile that was measured before.

    Args:
        cores: of every worker's control group.

    Raises:
        ValueError: the stages are not this model's, a worker's kind was not measured, or the codec is not in the profile.
    """
    layout, cluster = _layout(profile, operators, workers, codec), _cluster(profile, workers, cores)
    judged = forecast(profile, cluster, layout)
    computing = forecast(profile, _computing_only(cluster), layout)
    slowest = max(range(len(judged.stage_s)), key=judged.stage_s.__getitem__)
    return Prediction(
        model=profile.name,
        plan=plan,
        cores=dict(cores),
        codec=codec,
        operators=tuple(operators),
        workers=tuple(tuple(names) for names in workers),
        rate_per_s=judged.throughput_per_s,
        computing_rate_per_s=computing.throughput_per_s,
        stage_s=judged.stage_s,
        limiting=tuple(workers[slowest]),
        where=judged.where,
        latency_s=judged.latency_s,
        profile_digest=digest_of(profile.to_json()),
    )


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def seal(prediction: Prediction, path: Path) -> str:
    """Write it down; the digest of the file, as `sha256sum` has it."""
    text = prediction.to_json()
    path.write_text(text, encoding="utf-8")
    return digest_of(text)


def _layout(profile: ModelProfile, operators: Sequence[int], workers: Sequence[Sequence[str]], codec: str) -> Layout:
    boundaries = {0: 0} | {layer.end: number for number, layer in enumerate(profile.layers, start=1)}
    positions = list(accumulate(operators, initial=0))
    if any(position not in boundaries for position in positions) or positions[-1] != profile.layers[-1].end:
        raise ValueError(f"{profile.name}: stages of {list(operators)} operators are none of a program of {profile.layers[-1].end}")
    codecs = [known.name for known in profile.codecs]
    if codec not in codecs:
        raise ValueError(f"{profile.name}: nothing is known of codec {codec}, only of {', '.join(codecs)}")
    numbers = {name: number for number, name in enumerate(_names(workers))}
    stages = tuple(
        StageLayout(boundaries[begin], boundaries[end], tuple(numbers[name] for name in names))
        for (begin, end), names in zip(pairwise(positions), workers, strict=True)
    )
    return Layout(stages, (codecs.index(codec),) * (len(stages) + 1))


def _cluster(profile: ModelProfile, workers: Sequence[Sequence[str]], cores: Mapping[str, float]) -> ClusterProfile:
    """Links without limit: those of the emulation have none, and what they take of the processor is in the handling."""
    unknown = [name for name in _names(workers) if profile.costs_of(name) is None]
    if unknown:
        raise ValueError(f"{profile.name}: not measured on {', '.join(unknown)}")
    return ClusterProfile(
        tuple(
            DeviceProfile(name=name, speed=cores[name], costs_s=profile.costs_of(name), handling=profile.handling_of(name))
            for name in _names(workers)
        )
    )


def _computing_only(cluster: ClusterProfile) -> ClusterProfile:
    return replace(cluster, devices=tuple(replace(device, handling=NO_HANDLING) for device in cluster.devices))


def _names(workers: Sequence[Sequence[str]]) -> list[str]:
    return [name for names in workers for name in names]
