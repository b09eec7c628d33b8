"""What a task takes of a worker besides computing: measured by itself, and nothing is left behind."""

from __future__ import annotations

import threading

import pytest

pytest.importorskip("torch")

from adapt.errors import AdaptError, ModelError
from adapt.planning.model import Handling
from adapt.runtime import handling
from adapt.runtime.executor import Executor
from adapt.runtime.handling import LARGE_BYTES, SMALL_BYTES, HandlingMeter


def open_executor(notify):
    return Executor(device="cpu", threads=1, limit_bytes=1 << 26, notify=notify)


def test_a_worker_that_gives_itself_tasks_learns_what_they_take(monkeypatch):
    monkeypatch.setattr(handling, "SAMPLES", 2)
    meter, steps = HandlingMeter(open_executor), 2
    assert meter.step()
    threads = threading.active_count()  # pyzmq has started what it keeps
    while meter.step():
        steps += 1
    assert steps == 3 and meter.share == 1.0
    assert 0 < meter.handling.task_s < 1 and 0 <= meter.handling.byte_s < 1e-6
    assert threading.active_count() == threads


def test_two_sizes_tell_what_a_task_and_what_a_byte_takes():
    meter = HandlingMeter(open_executor)
    meter._samples = [(9.0, 9.0)] + [(0.001 + 2e-9 * SMALL_BYTES, 0.001 + 2e-9 * LARGE_BYTES)] * 3  # the first one is to warm up
    assert (meter.handling.task_s, meter.handling.byte_s) == (pytest.approx(0.001), pytest.approx(1e-9))
    meter._samples = [(9.0, 9.0), (0.002, 0.001)]  # noise
    assert meter.handling == Handling(0.002, 0.0)


def test_what_goes_wrong_is_an_error_and_not_a_wait(monkeypatch):
    def failing(self, inputs):
        raise ValueError("no")

    monkeypatch.setattr(handling.Echo, "run", failing)
    with pytest.raises(ModelError, match="no"):
        HandlingMeter(open_executor).step()
    monkeypatch.setattr(handling, "LOOPBACK", "tcp://nowhere.invalid:*")
    with pytest.raises(AdaptError, match="a worker's tasks to itself"):
        HandlingMeter(open_executor).step()
