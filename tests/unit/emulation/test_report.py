"""What was seen, as files, rows and a picture: everything says the time scale and whether limits held."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys

import pytest

from adapt.emulation import plot, report
from adapt.emulation.description import ClusterSpec, DeviceSpec
from adapt.emulation.observation import EventRecord, Facts, Observation, Sample
from adapt.errors import ConfigError

SPEC = ClusterSpec(name="pair", devices=(DeviceSpec(name="a", cores=0.25), DeviceSpec(name="b")), seed=3, time_scale=2.0)


def sample(at_s: float, cores: float = 0.1, rate: float = 1e6, is_alive: bool = True) -> Sample:
    return Sample(
        at_s=at_s, span_s=0.5, cores=cores, memory_bytes=100 << 20, up_bytes_per_s=rate, down_bytes_per_s=2 * rate, is_alive=is_alive
    )


def event(at_s: float, kind: str, device: str = "a", *, late_s: float = 0.01, error: str | None = None, **detail: object) -> EventRecord:
    return EventRecord(at_s=at_s, kind=kind, device=device, detail=detail, began_s=at_s + late_s, took_s=0.001, error=error)


def observed(*events: EventRecord, is_isolated: bool = True) -> Observation:
    samples = {"a": (sample(0.5), sample(1.0, cores=0.2, is_alive=False)), "b": (sample(0.5), sample(1.0))}
    return Observation(facts=Facts.of(SPEC, is_isolated=is_isolated), samples=samples, events=events)


# --- files and rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_isolated", [True, False])
def test_every_file_says_what_has_to_be_known_to_judge_it(tmp_path, is_isolated):
    seen = observed(event(0.2, "slow", cores=0.1), event(0.4, "cut", error='no, "this"\ncannot be'), is_isolated=is_isolated)
    paths = report.write(seen, tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["samples.csv", "events.csv", "observation.json"]
    tables = [list(csv.DictReader(io.StringIO(path.read_text()))) for path in paths[:2]]
    for row in [row for table in tables for row in table]:
        assert (row["cluster"], row["seed"], row["time_scale"], row["is_isolated"]) == ("pair", "3", "2.0", str(is_isolated))
    assert [(row["device"], row["at_s"], row["cores"], row["is_alive"]) for row in tables[0]] == [
        ("a", "0.5", "0.1", "True"), ("a", "1.0", "0.2", "False"), ("b", "0.5", "0.1", "True"), ("b", "1.0", "0.1", "True"),
    ]  # fmt: skip
    assert [(row["kind"], json.loads(row["detail"]), row["error"]) for row in tables[1]] == [
        ("slow", {"cores": 0.1}, ""), ("cut", {}, 'no, "this"\ncannot be'),
    ]  # fmt: skip
    record = json.loads(paths[2].read_text())
    assert (record["cluster"], record["seed"], record["time_scale"], record["is_isolated"]) == ("pair", 3, 2.0, is_isolated)
    assert [device["cores"] for device in record["devices"]] == [0.25, None]
    assert record["samples"]["a"]["at_s"] == [0.5, 1.0] and record["events"][0]["began_s"] == 0.21


def test_one_seed_gives_one_plan_whatever_was_measured():
    runs = [[event(0.2, "slow", cores=0.1, late_s=late_s), event(0.4, "cut", error=error)] for late_s, error in ((0.01, None), (0.3, "no"))]
    assert report.planned(runs[0]) == report.planned(runs[1])
    assert report.planned(runs[0])[0] == {"at_s": 0.2, "kind": "slow", "device": "a", "detail": {"cores": 0.1}}


def test_a_row_says_what_a_device_used_and_had():
    columns, rows = report.summary(observed())
    assert rows == [
        ["a", "0.15 of 0.25", "0.20 of 0.25", "100 MiB", "1.0 MB", "2.0 MB", "50%"],
        ["b", "0.10", "0.10", "100 MiB", "1.0 MB", "2.0 MB", "100%"],
    ]
    assert len(columns) == len(rows[0])
    nothing = Observation(facts=Facts.of(SPEC, is_isolated=True), samples={"a": ()}, events=())
    assert report.summary(nothing)[1] == [["a", "-", "-", "-", "-", "-", "-"]]


def test_what_nobody_ordered_is_told_but_not_planned():
    killed = {"kind": "killed-by-memory", "detail": {"limit_bytes": 284 << 20}}
    ended = {"kind": "ended", "detail": {"status": -11, "log": "Segmentation fault"}}
    unplanned = [EventRecord(at_s=1.234, device="a", began_s=1.234, took_s=0.0, is_planned=False, **facts) for facts in (killed, ended)]
    seen = observed(event(0.2, "slow"), *unplanned, event(2.0, "cut", error="no"))
    assert [row["kind"] for row in report.planned(seen.events)] == ["slow", "cut"]
    assert report.troubles(seen) == [
        "a was killed at 1.23 s: it needed more memory than its limit of 284MiB",
        "a ended by itself at 1.23 s with status -11; its log ends with: Segmentation fault",
        "cut of a at 2 s failed: no",
    ]
    assert [span.word for span in plot.spans(seen.events, "a")][1:3] == ["killed-by-memory", "ended"]


# --- the picture ------------------------------------------------------------------------------------------------------


def drawn(*events: EventRecord) -> list[tuple[str, float, float | None]]:
    return [(span.word, span.begin_s, span.end_s) for span in plot.spans(events, "a")]


def at(at_s: float, kind: str, device: str = "a", error: str | None = None) -> EventRecord:
    return event(at_s, kind, device, late_s=0.0, error=error)


def test_a_span_reaches_from_an_event_to_what_undid_it():
    assert drawn(at(1, "crash"), at(2, "cut"), at(2.5, "restore", "b"), at(3, "join"), at(4, "restore")) == [
        ("crash", 1, 3), ("cut", 2, 4),
    ]  # fmt: skip


def test_what_nothing_undid_goes_on_and_what_nothing_undoes_is_a_moment():
    assert drawn(at(1, "reset"), at(2, "join"), at(3, "stop"), at(4, "restore")) == [
        ("reset", 1, None), ("join", 2, None), ("stop", 3, float("inf")),
    ]  # fmt: skip


def test_what_remains_when_something_else_ends_goes_on():
    restore = event(3, "restore", late_s=0.0, remaining=["delay"])
    assert drawn(at(1, "delay"), at(2, "cut"), restore, at(5, "restore")) == [("delay", 1, 5), ("cut", 2, 3)]


def test_an_event_that_failed_disturbed_nothing():
    assert drawn(at(1, "slow", error="no"), at(2, "restore")) == [("slow failed", 1, None)]


@pytest.mark.parametrize("count", [0, 1, 20])
def test_a_picture_is_drawn_for_any_number_of_devices(tmp_path, count):
    seen = observed(event(0.2, "slow"), event(0.3, "reset"), event(0.4, "cut", error="no"))
    seen = Observation(facts=seen.facts, samples={f"d{number}": seen.samples["a"] for number in range(count)}, events=seen.events)
    path = plot.draw(seen, tmp_path / "picture.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install .*adapt-inference\[plot\]"):
        plot.draw(observed(), tmp_path / "picture.png")


def test_matplotlib_is_not_imported_before_something_is_drawn():
    program = "import sys, adapt.emulation.plot; raise SystemExit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
