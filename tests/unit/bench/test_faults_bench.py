"""bench/faults.py: how rates, gaps and recoveries are read from moments, what is lost, and, slowly, that it runs."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")

from bench import faults
from bench.harness.ledger import Ledger, Request
from bench.harness.story import Phase, Step, Story, costs
from bench.harness.timeline import longest_gap_s, lowest_rate, mean_rate, rates, recovery_s, settled_rate
from bench.harness.watch import Seen, first_sign

ROOT = Path(__file__).resolve().parents[3]


def regular(begin_s: float, end_s: float, per_s: float) -> list[float]:
    """Moments in the middle of equal intervals, so that no window is hit at its edge."""
    return [begin_s + (place + 0.5) / per_s for place in range(round((end_s - begin_s) * per_s))]


# ── a timeline ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_dip_a_gap_and_a_recovery_are_found():
    moments = [*regular(0, 10, 40), *regular(12, 20, 20)]  # two seconds of silence, then half the rate
    assert mean_rate(moments, 0, 10) == 40 and settled_rate(moments, 10, 20) == 20
    assert lowest_rate(moments, 10, 20) == 0
    assert longest_gap_s(moments, 10, 20) == pytest.approx(2.0375)  # 1/80 before it, 1/40 after
    assert recovery_s(moments, 10, 20) == pytest.approx(1.9)  # from 11.9 on a second holds 18 answers
    assert recovery_s(moments, 0, 10) == 0


def test_what_never_comes_back_has_no_recovery_and_a_gap_to_the_end():
    moments = regular(0, 7, 40)
    assert math.isnan(recovery_s(moments, 7, 14))
    assert longest_gap_s(moments, 7, 14) == pytest.approx(7.0125)
    assert longest_gap_s([], 7, 14) == 7


@given(st.lists(st.floats(0, 20), max_size=60).map(sorted))
def test_windows_lie_within_their_span_and_gaps_are_no_longer_than_it(moments):
    windows = rates(moments, 5, 15, window_s=1.0)
    assert windows[0][0] == 5 and windows[-1][0] + 1.0 <= 15 + 1e-6
    assert all(rate >= 0 for _, rate in windows)
    before = [moment for moment in moments if moment < 5]
    assert 0 < longest_gap_s(moments, 5, 15) <= 15 - (before[-1] if before else 5)


# ── the ledger ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_request_is_accounted_for():
    pool = [np.full(2, value, np.float32) for value in range(3)]
    ledger = Ledger(pool, expected=pool)
    for moment in range(5):
        assert np.array_equal(ledger.ask(moment)[1], pool[moment % 3])
    ledger.answered(0, pool[0], 10.0)
    ledger.answered(1, pool[2], 11.0)  # another one's
    ledger.answered(2, pool[2], 12.0)
    ledger.answered(2, pool[2], 13.0)  # again
    ledger.failed(3, "WorkerLostError: gone", 14.0)
    right, wrong, double, failed, never = ledger.requests()
    assert right == Request(0, 0, 10.0, answers=1) and not right.is_lost
    assert not wrong.is_right and wrong.answers == 1
    assert double.answers == 2 and double.ended_s == 12.0
    assert failed.is_lost and failed.has_ended
    assert never.is_lost and not never.has_ended and ledger.open_count == 1


def test_an_answer_that_differs_in_one_bit_is_wrong():
    expected = [np.ones(3, np.float32)]
    ledger = Ledger(expected, expected)
    ledger.ask(0.0)
    ledger.answered(0, np.nextafter(expected[0], np.float32(2)), 1.0)
    assert not ledger.requests()[0].is_right


# ── what was noticed, and what it cost ───────────────────────────────────────────────────────────────────────────────


def look(at_s: float, state: str = "ready", places=(("w1",), ("w2",)), retries: float = 0.0) -> Seen:
    return Seen(at_s, {"w2": state}, {}, places, {"retries": retries})


def test_the_first_change_after_a_fault_is_its_sign():
    looks = [look(0.9), look(1.1), look(1.2, "suspect"), look(1.3, "lost")]
    sign = first_sign(looks, "w2", 1.0, 5.0)
    assert sign is not None and (sign.at_s, sign.words) == (1.2, "suspect")
    assert first_sign(looks, "w2", 1.0, 1.15) is None
    assert first_sign([], "w2", 1.0, 5.0) is None
    assert first_sign([look(0.9), look(1.1, retries=1.0)], "w2", 1.0, 5.0).words == "retries"
    assert first_sign([look(0.9), look(1.1, places=(("w1",), ("w1",)))], "w2", 1.0, 5.0).words == "plan changed"


def test_the_stages_of_a_worker():
    assert look(0.0, places=(("w1",), ("w2", "w1"))).stages_of("w1") == [0, 1]
    assert look(0.0).stages_of("w9") == []


def story() -> Story:
    """Ten answers a second for 4 s; then a kill, a second of silence, and 5 a second; the last request never ends."""
    ended = [*regular(0, 4, 10), *regular(5, 10, 5)]
    requests = [Request(number, moment - 0.2, moment, answers=1) for number, moment in enumerate(ended)]
    phases = [Phase(Step("steady", "", 4), 0.0, 4.0), Phase(Step("kill", "w2", 6), 4.0, 10.0, (1,), 0.5)]
    looks = [look(3.99), look(4.25, "suspect")]
    chain = [Request(0, 0.0, 0.5, answers=1), Request(1, 3.9)]
    return Story(1, phases, [*requests, Request(len(requests), 9.5)], looks, chain, chain_killed_s=4.0)


def test_a_phase_costs_what_its_requests_say():
    steady, kill = costs(story())
    assert steady.rate_per_s == 10 and steady.lost == 0 and steady.noticed_by == ""
    assert kill.noticed_s == pytest.approx(0.25) and kill.noticed_by == "suspect" and kill.stages_held == "2"
    assert kill.settled_share == pytest.approx(0.5, abs=0.04) and kill.lowest_share == 0
    assert kill.gap_s == pytest.approx(1.15) and kill.recovered_s == pytest.approx(1.0, abs=0.15)
    assert (kill.answered, kill.lost, kill.duplicated, kill.wrong) == (25, 1, 0, 0)


def test_files_and_picture(tmp_path):
    told = story()
    written = faults.write_all(tmp_path, [told], costs(told), {"cpu": "a machine", **_machine()}, is_plotting=True, is_isolated=True)
    assert [path.suffix for path in written] == [".csv", ".csv", ".png"]
    assert written[2].read_bytes().startswith(b"\x89PNG")
    rows = _read(written[0])
    assert [row["contestant"] for row in rows].count("chain") == 2 and len(rows) == len(told.requests) + 2
    assert rows[-1]["ended_s"] == "" and {row["phase"] for row in rows} == {"steady", "kill", ""}
    assert [(row["action"], row["lost"]) for row in _read(written[1])] == [("steady", "0"), ("kill", "1")]


def _machine() -> dict[str, str | int | float]:
    return {"cores": 2, "memory_gib": 1.0, "python": "3", "load_before": 0.0}


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def test_every_fault_is_undone_by_a_later_step():
    plan = faults.steps(1.0)
    assert plan[0].action == "steady"
    for place, step in enumerate(plan):
        if (undone_by := faults.ENDS.get(step.action)) is not None:
            assert (undone_by, step.device) in {(later.action, later.device) for later in plan[place + 1 :]}


def test_a_wrong_command_line_is_status_2(capsys):
    for arguments in (["--rounds", "-1"], ["--scale", "-2"], ["--nothing"]):
        with pytest.raises(SystemExit) as stopped:
            faults.main(arguments)
        assert stopped.value.code == 2


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_it_runs_and_writes_its_files(tmp_path):
    command = [sys.executable, "bench/faults.py", "--quick", "--no-isolation", "--scale", "0.4", "--out", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=190)
    assert ended.returncode == 0, ended.stderr + ended.stdout
    assert "lost 0, duplicated 0, wrong 0" in ended.stdout and "never ended" in ended.stdout
    (costs_path,) = tmp_path.glob("faults-*-costs.csv")
    rows = {row["action"]: row for row in _read(costs_path)}
    assert {"steady", "kill", "stop"} <= set(rows)
    assert rows["kill"]["noticed_by"] in ("suspect", "lost") and float(rows["kill"]["gap_s"]) < 30
    assert len(list(tmp_path.glob("faults-*.png"))) == 1
