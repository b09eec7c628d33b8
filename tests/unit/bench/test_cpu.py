"""bench/harness/cpu.py: lines of /proc become CPU seconds of roles and threads."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.harness.cpu import TICK_S, CpuMeter, OthersMeter, kind_of_thread, parse_stat, read, role_of, use_of

BUSY = "import time\nend = time.process_time() + 0.2\nwhile time.process_time() < end: pass\ninput()"


def line(number: int, name: str, user: int, system: int) -> str:
    before, after = "S 1 1 1 0 -1 4194304 101 0 0 0", "0 0 20 0 1 0 1377870 3133440 413"
    return f"{number} ({name}) {before} {user} {system} {after}\n"


names = st.text(st.characters(codec="ascii", exclude_characters="\n"), min_size=1, max_size=15)


@given(st.integers(1, 1 << 22), names, st.integers(0, 1 << 40), st.integers(0, 1 << 40))
def test_a_line_is_read_whatever_the_name(number, name, user, system):
    stat = parse_stat(line(number, name, user, system))
    assert (stat.number, stat.name, stat.cpu_s) == (number, name, pytest.approx((user + system) * TICK_S))


@pytest.mark.parametrize(
    ("number", "name", "kind"), [(7, "python", "main"), (8, "ZMQbg/IO/0", "io"), (9, "python", "python"), (9, "ZMQbg/Reaper", "other")]
)
def test_threads_are_told_apart(number, name, kind):
    assert kind_of_thread(parse_stat(line(number, name, 1, 1)), pid=7, main_name="python") == kind


@pytest.mark.parametrize(("name", "role"), [("worker 1", "worker"), ("worker 12", "worker"), ("client", "client"), ("7", "7")])
def test_workers_are_one_role(name, role):
    assert role_of(name) == role


def write(proc: Path, pid: int, whole: tuple[str, int], threads: dict[int, tuple[str, int, int | None]]) -> None:
    """A process: name and ticks of the whole, and of each thread name, ticks, and nanoseconds if the kernel counts them."""
    (proc / str(pid)).mkdir(exist_ok=True)
    (proc / str(pid) / "stat").write_text(line(pid, whole[0], whole[1], 0))
    for number, (name, ticks, nanoseconds) in threads.items():
        folder = proc / str(pid) / "task" / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "stat").write_text(line(number, name, ticks, 0))
        if nanoseconds is not None:
            (folder / "schedstat").write_text(f"{nanoseconds} 5 6\n")


def test_a_process_is_the_sum_of_its_threads_living_and_ended(tmp_path):
    write(tmp_path, 7, ("python", 300), {7: ("python", 100, None), 8: ("ZMQbg/IO/0", 50, 512_000_000), 9: ("python", 20, None)})
    assert read(7, tmp_path) == pytest.approx({"main": 1.0, "io": 0.512, "python": 0.2, "ended": 1.288})
    assert read(8, tmp_path) == Counter()


def test_processes_of_one_role_are_added(tmp_path):
    for pid in (7, 8):
        write(tmp_path, pid, ("python", 100), {pid: ("python", 100, None)})
    assert use_of({"worker 1": 7, "worker 2": 8}, tmp_path)["worker", "main"] == pytest.approx(2.0)


def test_a_meter_measures_a_busy_process_between_begin_and_end():
    process = subprocess.Popen([sys.executable, "-c", BUSY], stdin=subprocess.PIPE)
    contestant = SimpleNamespace(processes=lambda: {"client": os.getpid(), "worker 1": process.pid})
    meter, others = CpuMeter(), OthersMeter()
    try:
        meter.begin(contestant)
        others.begin(SimpleNamespace(processes=dict))
        limit = time.monotonic() + 20
        while read(process.pid)["main"] < 0.2 and time.monotonic() < limit:
            time.sleep(0.02)
        meter.end(contestant)
        others.end(SimpleNamespace(processes=dict))
    finally:
        process.communicate(b"\n")
    figures = meter.figures(tasks=100)
    assert 1_000 < figures["cpu_us worker.main"] < 10_000, "0.2 s for 100 tasks are 2000 us each"
    assert figures["cpu_us worker"] == pytest.approx(figures["cpu_us worker.main"], abs=700)
    roles = figures["cpu_us worker"] + figures["cpu_us client"]
    assert figures["cpu_us total"] == pytest.approx(roles)
    assert meter.figures(tasks=100) == {}
    assert others.figures(tasks=100)["others_cores"] > 0.05, "to whom it does not belong, that process is another"
