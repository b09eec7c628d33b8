"""What was seen of an emulated cluster, as files and as rows of a table. Everything says the time scale, and whether limits held."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from adapt.config import format_size
from adapt.emulation.observation import KILLED_BY_MEMORY, EventRecord, Facts, Observation, Sample

SAMPLES, EVENTS, OBSERVATION = "samples.csv", "events.csv", "observation.json"
DECIMALS = 6
PLANNED = ("at_s", "kind", "device", "detail")


def write(observation: Observation, folder: Path) -> list[Path]:
    """Write samples.csv, events.csv and observation.json, which has both and the devices; returns where they are.

    Each line of the CSV files names cluster, seed, time scale and isolation: lines of several runs can be put together.
    """
    folder.mkdir(parents=True, exist_ok=True)
    head = _head(observation.facts)
    _write_csv(
        folder / SAMPLES,
        [*head, "device", *_names(Sample)],
        ([*head.values(), name, *_rounded(sample)] for name, samples in observation.samples.items() for sample in samples),
    )
    _write_csv(
        folder / EVENTS,
        [*head, *_names(EventRecord)],
        (
            [*head.values(), *(json.dumps(value) if isinstance(value, dict) else value for value in _rounded(event))]
            for event in observation.events
        ),
    )
    (folder / OBSERVATION).write_text(json.dumps(to_plain(observation), indent=1) + "\n", encoding="utf-8")
    return [folder / name for name in (SAMPLES, EVENTS, OBSERVATION)]


def to_plain(observation: Observation) -> dict[str, Any]:
    """Only dicts, lists and plain values. Samples are columns, by device."""
    return {
        **_head(observation.facts),
        "devices": [asdict(device) for device in observation.facts.devices],
        "events": [dict(zip(_names(EventRecord), _rounded(event), strict=True)) for event in observation.events],
        "samples": {name: _columns(samples) for name, samples in observation.samples.items()},
    }


def planned(events: Iterable[EventRecord]) -> list[dict[str, Any]]:
    """The events as the seed drew them, without what was measured: the same in every run."""
    return [{name: getattr(event, name) for name in PLANNED} for event in events if event.is_planned]


def troubles(observation: Observation) -> list[str]:
    """What went otherwise than it was planned, a sentence each."""
    return [_trouble(event) for event in observation.events if event.error is not None or not event.is_planned]


def _trouble(event: EventRecord) -> str:
    if event.is_planned:
        return f"{event.kind} of {event.device} at {event.at_s:g} s failed: {event.error}"
    if event.kind == KILLED_BY_MEMORY:
        limit = format_size(event.detail["limit_bytes"])
        return f"{event.device} was killed at {event.at_s:.2f} s: it needed more memory than its limit of {limit}"
    status, words = event.detail["status"], event.detail["log"]
    return f"{event.device} ended by itself at {event.at_s:.2f} s with status {status}; its log ends with: {words}"


def summary(observation: Observation) -> tuple[list[str], list[list[str]]]:
    """A table of what each device used: columns, those aligned to the right end in ">", and rows."""
    columns = ["device", "CPU mean>", "CPU most>", "memory most>", "sent>", "received>", "alive>"]
    return columns, [_row(name, samples, observation.facts.cores(name)) for name, samples in observation.samples.items()]


def _row(name: str, samples: Sequence[Sample], cores: float | None) -> list[str]:
    seconds = sum(sample.span_s for sample in samples)
    if not seconds:
        return [name, *["-"] * 6]
    mean = sum(sample.cores * sample.span_s for sample in samples) / seconds
    alive = sum(sample.span_s for sample in samples if sample.is_alive) / seconds
    return [
        name,
        _cpu(mean, cores),
        _cpu(max(sample.cores for sample in samples), cores),
        f"{max(sample.memory_bytes for sample in samples) / (1 << 20):.0f} MiB",
        _megabytes(sum(sample.up_bytes_per_s * sample.span_s for sample in samples)),
        _megabytes(sum(sample.down_bytes_per_s * sample.span_s for sample in samples)),
        f"{alive:.0%}",
    ]


def _cpu(used: float, cores: float | None) -> str:
    return f"{used:.2f}" if cores is None else f"{used:.2f} of {cores:g}"


def _megabytes(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes < 1e9 else f"{size_bytes / 1e9:.2f} GB"


def _head(facts: Facts) -> dict[str, Any]:
    return {"cluster": facts.cluster, "seed": facts.seed, "time_scale": facts.time_scale, "is_isolated": facts.is_isolated}


def _names(kind: type[Sample] | type[EventRecord]) -> list[str]:
    return [item.name for item in fields(kind)]


def _rounded(record: Sample | EventRecord) -> list[Any]:
    values = (getattr(record, name) for name in _names(type(record)))
    return [round(value, DECIMALS) if isinstance(value, float) else value for value in values]


def _columns(samples: Sequence[Sample]) -> dict[str, list[Any]]:
    rows = [_rounded(sample) for sample in samples]
    return {name: [row[place] for row in rows] for place, name in enumerate(_names(Sample))}


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
