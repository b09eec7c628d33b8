"""The meter of a link, against ways whose latency and rates are known."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapt.scheduling.links import AGAIN_S, LEAST_RATE, LOST_S, MOST_BYTES, MOST_RATE, QUICK_S, SETTLED_S, Link, LinkMeter


class Way:
    """A link, and a clock."""

    def __init__(self, latency_s: float, down: float, up: float) -> None:
        self.truth = Link(latency_s, down, up)
        self.meter, self.now = LinkMeter(), 100.0
        self.sent_bytes = 0
        self.longest_s = 0.0
        self.meter.begin(self.now)

    def probe(self) -> bool:
        """Send a probe and have it answered, if one is due."""
        ask = self.meter.ask(self.now, is_idle=True)
        if ask is None:
            return False
        took_s = 2 * self.truth.latency_s + ask.down_bytes / self.truth.down_bytes_per_s + ask.up_bytes / self.truth.up_bytes_per_s
        self.sent_bytes += ask.down_bytes + ask.up_bytes
        self.longest_s = max(self.longest_s, took_s - 2 * self.truth.latency_s)
        self.now += took_s
        self.meter.echoed(ask.number, self.now, is_idle=True)
        return True

    def series(self) -> int:
        self.now += SETTLED_S
        count = 0
        while self.probe():
            count += 1
        return count


RATES = st.floats(1e4, 1e10)


@given(st.floats(1e-5, 0.5), RATES, RATES)
def test_latency_and_rates_are_found_with_few_bytes(latency_s, down, up):
    way = Way(latency_s, down, up)
    assert 5 <= way.series() <= 15
    assert way.meter.link.latency_s == pytest.approx(latency_s)
    for found, truth in ((way.meter.link.down_bytes_per_s, down), (way.meter.link.up_bytes_per_s, up)):
        assert found == pytest.approx(truth, rel=0.01) or found >= 0.4 * truth > 1e8, "what is too fast to be told is fast"
    assert way.sent_bytes <= 7 * MOST_BYTES and way.longest_s <= max(QUICK_S * 1.01, (16 << 10) / min(down, up) * 1.01)


def test_a_series_begins_after_a_while_and_again_much_later():
    way = Way(0.001, 1e6, 1e6)
    assert not way.probe()
    way.now += SETTLED_S
    assert way.probe()
    while way.probe():
        pass
    way.now += AGAIN_S / 2
    assert not way.probe()
    way.now += AGAIN_S / 2
    way.truth = Link(0.002, 5e5, 5e5)
    assert way.series() > 0 and way.meter.link.down_bytes_per_s == pytest.approx(5e5)


def test_a_busy_worker_is_not_probed_and_what_was_disturbed_is_asked_again():
    way = Way(0.001, 1e6, 1e6)
    way.now += SETTLED_S
    assert way.meter.ask(way.now, is_idle=False) is None
    ask = way.meter.ask(way.now, is_idle=True)
    assert way.meter.ask(way.now, is_idle=True) is None, "one at a time"
    way.meter.echoed(ask.number, way.now + 9.0, is_idle=False)
    assert way.meter.link is None
    way.series()
    assert way.meter.link.latency_s == pytest.approx(0.001)


def test_a_lost_probe_ends_the_series_and_old_answers_mean_nothing():
    way = Way(0.001, 1e6, 1e6)
    way.now += SETTLED_S
    lost = way.meter.ask(way.now, is_idle=True)
    way.now += LOST_S + 1
    assert way.meter.ask(way.now, is_idle=True) is None
    way.meter.echoed(lost.number, way.now, is_idle=True)
    way.now += AGAIN_S
    way.series()
    assert way.meter.link.down_bytes_per_s == pytest.approx(1e6)


def test_a_new_session_begins_anew_and_keeps_what_is_known():
    way = Way(0.001, 1e6, 1e6)
    way.series()
    known = way.meter.link
    way.meter.begin(way.now)
    assert way.meter.ask(way.now, is_idle=True) is None and way.meter.link == known
    assert way.series() > 0


def test_tasks_are_followed_slowly_and_small_ones_not_at_all():
    way = Way(0.001, 1e6, 1e6)
    way.meter.travelled(1.0, down_bytes=1 << 20, up_bytes=0)
    assert way.meter.link is None
    way.series()
    way.meter.travelled(50.0, down_bytes=1000, up_bytes=1000)
    assert way.meter.link.down_bytes_per_s == pytest.approx(1e6)
    for _ in range(40):  # half as fast now
        way.meter.travelled(0.002 + 2 * (100_000 + 50_000) / 1e6, down_bytes=100_000, up_bytes=50_000)
    assert way.meter.link.down_bytes_per_s == pytest.approx(5e5, rel=0.01) == way.meter.link.up_bytes_per_s
    way.meter.travelled(1e6, down_bytes=100_000, up_bytes=0)  # one that is beyond belief
    assert way.meter.link.down_bytes_per_s > 3e5


def test_rates_do_not_run_away():
    """Regression: tasks that take less than two latencies raised both rates a quarter each, until they were infinite."""
    way = Way(0.2, 1e6, 1e6)
    way.series()
    for _ in range(10_000):  # the latency is less now
        way.meter.travelled(0.001, down_bytes=100_000, up_bytes=0)
    assert way.meter.link == Link(pytest.approx(0.2), pytest.approx(1e6), pytest.approx(1e6))
    way = Way(0.0, 1e6, 1e6)
    way.series()
    for seconds, bound in ((0.0, MOST_RATE), (1e9, LEAST_RATE)):
        for _ in range(10_000):
            way.meter.travelled(seconds, down_bytes=100_000, up_bytes=1 << 30)
        assert way.meter.link.down_bytes_per_s == way.meter.link.up_bytes_per_s == bound
