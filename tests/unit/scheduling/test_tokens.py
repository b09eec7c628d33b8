"""Retries are paid for; an empty bucket delays, and never for ever."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapt.errors import ConfigError
from adapt.scheduling.tokens import RetryTokens, TokenSettings


def test_a_burst_may_use_what_has_been_saved_and_then_waits():
    tokens = RetryTokens(TokenSettings(most=3, per_request=0.5, per_s=0.1))
    assert [tokens.take(0.0) for _ in range(4)] == [True, True, True, False]
    assert tokens.next_at(0.0) == pytest.approx(10.0)
    tokens.earn()
    assert tokens.next_at(0.0) == pytest.approx(5.0)
    assert not tokens.take(4.9)
    assert tokens.take(5.1)


@given(st.lists(st.tuples(st.sampled_from(["earn", "take"]), st.integers(0, 3))))
def test_no_more_is_taken_than_was_there_and_waiting_helps(steps):
    settings = TokenSettings(most=4, per_request=0.2, per_s=0.5)
    tokens, now, earned, taken = RetryTokens(settings), 0.0, 0, 0
    for step, wait_s in steps:
        now += wait_s
        if step == "earn":
            tokens.earn()
            earned += 1
        elif tokens.take(now):
            taken += 1
        else:
            assert tokens.next_at(now) > now
        assert taken <= settings.most + settings.per_request * earned + settings.per_s * now + 1e-9
    assert tokens.take(tokens.next_at(now) + 1e-9)


@pytest.mark.parametrize("wrong", [{"most": 0.5}, {"per_request": -1.0}, {"per_s": 0.0}, {"most": math.inf}])
def test_settings_under_which_a_retry_would_never_come_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        TokenSettings(**wrong)
