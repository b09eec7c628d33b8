"""tests/host.py: a bound that was missed is measured again only where the machine was disturbed."""

from __future__ import annotations

from itertools import count

import pytest

from tests.host import DISTURBED_S, HostStall, HostWatch


@pytest.mark.parametrize(("stolen_s", "is_disturbed"), [(0.0, False), (DISTURBED_S / 2, False), (2 * DISTURBED_S, True)])
def test_what_the_host_takes_within_a_second_disturbs(stolen_s, is_disturbed, monkeypatch):
    monkeypatch.setattr(HostStall, "between", lambda self, since, until: 0.0)  # of the machine that this test runs on
    looks = count()
    watch = HostWatch(lambda: 100.0 + stolen_s * min(next(looks), 1))
    while not watch._seen:
        pass
    assert watch.was_disturbed() is is_disturbed
    watch.close()


def test_so_does_a_stall(monkeypatch):
    monkeypatch.setattr(HostStall, "between", lambda self, since, until: 2 * DISTURBED_S)
    watch = HostWatch(lambda: 0.0)
    while not watch._seen:
        pass
    assert watch.was_disturbed()
    watch.close()
