"""The checker itself: what it finds, and what it lets pass."""

from __future__ import annotations

import pytest

from adapt.protocol.ids import RequestId
from adapt.simulation.history import CANCELLED, GRACE_S, RESULT, End, Execution, Expected, Operation, check

CLIENT = bytes(16)
RIGHT, OTHER = 11, 12
EXPECTED = Expected(frozenset({RIGHT}), frozenset({"deadline-exceeded"}))


def operation(*ends: End, deadline: float = 10.0, client_died: bool = False) -> Operation:
    return Operation(RequestId(CLIENT, 1), 0.0, deadline, list(ends), client_died)


def result(moment: float = 1.0, value: int = RIGHT, **more) -> End:
    return End(moment, moment, RESULT, value, **more)


def found(*operations: Operation, expected: Expected = EXPECTED, executions=()) -> dict[str, int]:
    numbered = []
    for sequence, one in enumerate(operations):
        one.request_id = RequestId(CLIENT, sequence)
        numbered.append(one)
    findings = check(numbered, {one.request_id: expected for one in numbered}, executions)
    counts = {name: len(getattr(findings, name)) for name in ("lost", "duplicated", "wrong", "late")}
    assert sum(counts.values()) == len(findings.violations)
    return {name: count for name, count in counts.items() if count}


@pytest.mark.parametrize(
    "end",
    [
        result(),
        result(moment=10.0 + GRACE_S),
        End(2.0, 2.0, "deadline-exceeded"),
        End(2.0, 2.0, CANCELLED),
        End(15.0, 15.0, "deadline-exceeded", stopped_s=4.0),
        result(classes=0b100),
    ],
)
def test_a_right_outcome_in_time_is_no_violation(end):
    assert found(operation(end)) == {}


def test_each_violation_is_found_among_right_ones():
    assert found(operation(result()), operation()) == {"lost": 1}
    assert found(operation(result()), operation(result(1.0), result(2.0))) == {"duplicated": 1}
    assert found(operation(result(value=OTHER)), operation(result())) == {"wrong": 1}
    assert found(operation(result(moment=10.1 + GRACE_S)), operation(result())) == {"late": 1}


def test_an_error_that_nothing_explains_is_wrong():
    assert found(operation(End(1.0, 1.0, "poison"))) == {"wrong": 1}
    assert found(operation(result(value=None))) == {"wrong": 1}


def test_two_outcomes_are_two_though_they_agree_and_the_worst_of_them_counts():
    assert found(operation(result(), End(1.5, 1.5, CANCELLED))) == {"duplicated": 1}
    assert found(operation(result(), result(value=OTHER, moment=99.0))) == {"duplicated": 1, "wrong": 1, "late": 1}


def test_of_a_client_that_died_nothing_is_lost_but_wrong_and_doubled_stay_so():
    assert found(operation(client_died=True)) == {}
    assert check([operation(client_died=True)], {}).indeterminate == 1
    assert found(operation(result(value=OTHER), client_died=True)) == {"wrong": 1}
    assert found(operation(result(), result(), client_died=True)) == {"duplicated": 1}


def test_standing_still_excuses_no_more_than_it_took():
    assert found(operation(End(16.0, 16.0, "deadline-exceeded", stopped_s=4.0))) == {"late": 1}


def test_an_exact_result_is_of_one_class():
    exact = Expected(frozenset({RIGHT}), one_class=True)
    assert found(operation(result(classes=0b10)), expected=exact) == {}
    assert found(operation(result(classes=0b11)), expected=exact) == {"wrong": 1}
    assert found(operation(result(classes=0b11))) == {}


def test_work_for_nobody_is_counted_and_no_violation():
    one = operation(result(moment=5.0))
    executions = [Execution(one.request_id, stage, at) for stage, at in ((0, 1.0), (0, 5.5), (1, 7.0))]
    findings = check([one], {one.request_id: EXPECTED}, executions)
    assert findings.executions_after_end == 2 and findings.violations == []
