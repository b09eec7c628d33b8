"""What was seen: sums become rates, in bounded memory, and an observer that is late or fails goes on."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapt.emulation.description import ClusterSpec, DeviceSpec
from adapt.emulation.observation import EventRecord, Facts, Observer, Reading, Track
from adapt.errors import AdaptError

WAIT_S = 20.0
SPEC = ClusterSpec(name="pair", devices=(DeviceSpec(name="a", cores=0.25), DeviceSpec(name="b")), seed=3, time_scale=2.0)
FACTS = Facts.of(SPEC, is_isolated=True)
EVENT = EventRecord(at_s=1.0, kind="crash", device="a", began_s=1.01, took_s=0.02)


def reading(cpu_s: float = 0.0, memory: int = 0, sent: int = 0, received: int = 0, is_alive: bool = True) -> Reading:
    return Reading(cpu_s, memory, sent, received, is_alive)


def test_rates_are_means_since_the_sample_before():
    track = Track()
    track.add(10.0, {"a": reading(1.0, 100, 1000, 50)})
    track.add(12.0, {"a": reading(1.5, 300, 5000, 50)})
    (sample,) = track.samples()["a"]
    assert (sample.at_s, sample.span_s, sample.cores, sample.memory_bytes) == (12.0, 2.0, 0.25, 300)
    assert (sample.up_bytes_per_s, sample.down_bytes_per_s, sample.is_alive) == (2000.0, 0.0, True)


def test_a_device_that_comes_later_or_is_left_out_once_is_counted_from_where_it_was_last_seen():
    track = Track()
    track.add(0.0, {"a": reading()})
    track.add(1.0, {"b": reading(5.0)})
    track.add(2.0, {"a": reading(1.0), "b": reading(5.5)})
    samples = track.samples()
    assert [(sample.span_s, sample.cores) for sample in samples["a"]] == [(2.0, 0.5)]
    assert [(sample.span_s, sample.cores) for sample in samples["b"]] == [(1.0, 0.5)]


def test_a_counter_that_began_anew_gives_no_negative_rate():
    track = Track()
    track.add(0.0, {"a": reading(3.0, sent=100)})
    track.add(1.0, {"a": reading(0.1, sent=10)})
    assert (track.samples()["a"][0].cores, track.samples()["a"][0].up_bytes_per_s) == (0.0, 0.0)


@given(st.lists(st.tuples(st.integers(0, 10), st.integers(0, 1000), st.booleans()), min_size=1, max_size=300), st.integers(4, 20))
def test_however_long_it_lasts_no_sum_no_peak_and_no_death_is_lost(steps, limit):
    track, cpu_s, peak = Track(limit), 0, 0
    track.add(0, {"a": reading()})
    for moment, (used, memory, is_alive) in enumerate(steps, 1):
        cpu_s, peak = cpu_s + used, max(peak, memory)
        track.add(moment, {"a": reading(cpu_s, memory, is_alive=is_alive)})
    samples = track.samples()["a"]
    assert len(samples) < limit
    assert sum(sample.cores * sample.span_s for sample in samples) == pytest.approx(cpu_s)
    assert sum(sample.span_s for sample in samples) == samples[-1].at_s == len(steps)
    assert max(sample.memory_bytes for sample in samples) == peak
    assert all(sample.is_alive for sample in samples) == all(is_alive for _, _, is_alive in steps)
    assert (track.stride == 1) == (len(steps) < limit)


class Reader:
    """Readings that grow; `until` waits for so many."""

    def __init__(self, failing: tuple[int, ...] = ()) -> None:
        self.count, self._failing = 0, failing
        self._changed = threading.Condition()

    def __call__(self) -> dict[str, Reading]:
        with self._changed:
            self.count += 1
            self._changed.notify_all()
        if self.count in self._failing:
            raise AdaptError("the group has gone")
        return {"a": reading(self.count * 0.1, sent=self.count)}

    def until(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.count >= count, WAIT_S)


class Ticking:
    """A clock that goes on by a quarter of a second with every look: whoever waits by it is always late."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.25
        return self.now


def test_an_observer_sees_and_notes_and_can_be_asked_again_after_its_end():
    read = Reader()
    observer = Observer(read, facts=FACTS, clock=Ticking(), every_s=0.001)
    observer.note(EVENT)
    read.until(5)
    seen = observer.close()
    assert seen.facts == FACTS and seen.events == (EVENT,)
    assert len(seen.samples["a"]) >= 4
    assert observer.close() == observer.observation() == seen
    assert not any(thread.name == "adapt-observer" for thread in threading.enumerate())


def test_moments_count_from_when_the_schedule_begins():
    clock = Ticking()
    observer = Observer(Reader(), facts=FACTS, clock=clock, every_s=1000.0)
    observer.count_from(100.0)
    clock.now = 399.75
    (sample,) = observer.close().samples["a"]
    assert sample.at_s == pytest.approx(300.0)


def test_a_moment_that_cannot_be_read_is_left_out(caplog):
    read = Reader(failing=(2, 4))
    observer = Observer(read, facts=FACTS, clock=Ticking(), every_s=0.001)
    read.until(6)
    assert observer.close().samples["a"]
    assert [record.message for record in caplog.records] == ["devices cannot be read; the moment is left out"]


def test_shares_hold_only_where_devices_are_isolated():
    assert [FACTS.cores("a"), FACTS.cores("b"), FACTS.cores("nobody")] == [0.25, None, None]
    assert Facts.of(SPEC, is_isolated=False).cores("a") is None
