"""What is let in: reserved bytes against a dictionary of what was admitted."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapt.errors import OverloadedError
from adapt.protocol.ids import RequestId
from adapt.scheduling.admission import Admission, AdmissionLimits

LIMITS = AdmissionLimits(max_requests=4, max_retained_bytes=10)


def request(number: int) -> RequestId:
    return RequestId(bytes(16), number)


def test_what_is_the_dispatchers_own_takes_nothing_of_what_clients_may_have():
    admission = an_admission()
    for number in range(LIMITS.max_requests):
        admission.reserve(request(number), LIMITS.max_retained_bytes)
    admission.grow(request(0), LIMITS.max_retained_bytes + 5)
    admission.admit(request(10), LIMITS.max_retained_bytes - 1, predicted_wait_s=lambda: 1.0)
    with pytest.raises(OverloadedError, match="may retain 2 bytes, and 9 of 10 are reserved"):
        admission.admit(request(11), 2, predicted_wait_s=lambda: 1.0)
    for number in (0, 1, 2, 3, 10):
        admission.release(request(number))
    assert len(admission) == admission.reserved_bytes == 0
    admission.admit(request(12), 100, predicted_wait_s=lambda: 1.0)


def an_admission(limits: AdmissionLimits = LIMITS) -> Admission:
    return Admission(limits, random=Random(0))


STEPS = st.lists(st.tuples(st.sampled_from(["admit", "admit", "grow", "release"]), st.integers(0, 6), st.integers(0, 12)))


@given(STEPS)
def test_what_is_reserved_is_what_was_admitted_and_never_above_the_limits(steps):
    admission = an_admission()
    reserved: dict[RequestId, int] = {}
    for step, number, size_bytes in steps:
        one = request(number)
        match step:
            case "admit" if one not in reserved:
                fits = sum(reserved.values()) + size_bytes <= LIMITS.max_retained_bytes or not reserved
                try:
                    admission.admit(one, size_bytes, predicted_wait_s=lambda: 2.0)
                except OverloadedError as error:
                    assert len(reserved) == LIMITS.max_requests or not fits
                    assert 1.0 <= error.retry_after_s <= 3.0
                else:
                    assert len(reserved) < LIMITS.max_requests and fits
                    reserved[one] = size_bytes
            case "grow" if one in reserved:
                admission.grow(one, size_bytes)
                reserved[one] = max(reserved[one], size_bytes)
            case "release" if one in reserved:
                admission.release(one)
                del reserved[one]
        assert admission.reserved_bytes == sum(reserved.values())
        assert len(admission) == len(reserved)


def test_a_request_larger_than_the_limit_is_let_in_alone():
    """Nothing could ever run it otherwise; beside it there is room for nothing."""
    admission = an_admission()
    admission.admit(request(1), 100, predicted_wait_s=lambda: 0.0)
    with pytest.raises(OverloadedError, match="100 of 10 are reserved"):
        admission.admit(request(2), 1, predicted_wait_s=lambda: 0.0)
    admission.release(request(1))
    admission.admit(request(2), 1, predicted_wait_s=lambda: 0.0)


def test_the_limit_itself_may_be_reached():
    admission = an_admission()
    admission.admit(request(1), 4, predicted_wait_s=lambda: 0.0)
    admission.admit(request(2), 6, predicted_wait_s=lambda: 0.0)
    with pytest.raises(OverloadedError, match="may retain 1 bytes, and 10 of 10"):
        admission.admit(request(3), 1, predicted_wait_s=lambda: 0.0)


def test_a_refusal_names_the_limit_and_leaves_nothing_behind():
    admission = an_admission()
    for number in range(LIMITS.max_requests):
        admission.admit(request(number), 0, predicted_wait_s=lambda: 0.0)
    with pytest.raises(OverloadedError, match="4 requests are in flight"):
        admission.admit(request(9), 0, predicted_wait_s=lambda: 0.0)
    admission.release(request(0))
    admission.admit(request(9), 0, predicted_wait_s=lambda: 0.0)


def test_those_who_are_refused_together_do_not_come_back_together():
    admission = an_admission(AdmissionLimits(max_requests=0, max_retained_bytes=0))
    pauses_s = []
    for number in range(20):
        with pytest.raises(OverloadedError) as caught:
            admission.admit(request(number), 0, predicted_wait_s=lambda: 0.0)
        pauses_s.append(caught.value.retry_after_s)
    assert len(set(pauses_s)) > 10
    assert min(pauses_s) > 0.0, "nobody is told to come back at once"
