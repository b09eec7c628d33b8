"""What the clients saw, held against the truth: every request has one outcome, the right one, in time. A pure function over a history.

    lost         it has no outcome, and its client has lived on
    duplicated   it has more than one
    wrong        a result that no right execution gives, or an error that its input and its surroundings do not explain
    late         its outcome came more than a second after its deadline, by its client's own clock

A request whose client died is indeterminate: it may have no outcome, but not a wrong one or two. Executions that began when the request
had ended already are no violation; they are counted, because each is work for nobody.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from adapt.protocol.ids import RequestId

GRACE_S = 1.0  # after its deadline, a request may end so late
RESULT, CANCELLED = "result", "cancelled"  # outcomes besides the codes of errors


@dataclass(frozen=True, slots=True)
class End:
    """An outcome as its client saw it.

    Attributes:
        moment: by the client's clock.
        at: in true time.
        outcome: `RESULT`, `CANCELLED`, or the code of an error.
        result: hash of the result, if it is one.
        classes: a bit for each numeric class that had a part in the result.
        stopped_s: how long the client's process stood still since the request was submitted: nobody was there to see an outcome.
    """

    moment: float
    at: float
    outcome: str
    result: int | None = None
    stopped_s: float = 0.0
    classes: int = 0


@dataclass(slots=True)
class Operation:
    """One request of a client. `deadline`: by the client's clock."""

    request_id: RequestId
    at: float  # of its submission, in true time
    deadline: float
    ends: list[End] = field(default_factory=list)
    client_died: bool = False


class Ended(NamedTuple):
    """For the story."""

    request_id: RequestId
    outcome: str


@dataclass(frozen=True, slots=True)
class Execution:
    """A stage of a request began to run somewhere, `at` a moment of true time."""

    request_id: RequestId
    stage: int
    at: float


@dataclass(slots=True)
class History:
    """What is written down while it happens.

    Attributes:
        spoilt: requests of whom a worker has given an answer of a wrong form.
        deaths: moments at which workers died, in true time.
        pinned: the program that a request was said to run, if that was said.
    """

    operations: dict[RequestId, Operation] = field(default_factory=dict)
    executions: list[Execution] = field(default_factory=list)
    spoilt: set[RequestId] = field(default_factory=set)
    deaths: list[float] = field(default_factory=list)
    pinned: dict[RequestId, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Expected:
    """The outcomes that a request may have: hashes of right results, and codes of errors. It may always be cancelled. Of what could not be verified
    where a worker lies, any result is possible."""

    results: frozenset[int]
    errors: frozenset[str] = frozenset()
    one_class: bool = False  # all of a result was computed in one numeric class
    is_unverified: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What the history shows, by request."""

    lost: tuple[RequestId, ...] = ()
    duplicated: tuple[RequestId, ...] = ()
    wrong: tuple[RequestId, ...] = ()
    late: tuple[RequestId, ...] = ()
    indeterminate: int = 0
    executions_after_end: int = 0

    @property
    def violations(self) -> list[tuple[str, RequestId]]:
        kinds = (("lost", self.lost), ("duplicated", self.duplicated), ("wrong", self.wrong), ("late", self.late))
        return [(kind, request_id) for kind, found in kinds for request_id in found]


def check(operations: Iterable[Operation], truth: Mapping[RequestId, Expected], executions: Sequence[Execution] = ()) -> Findings:
    """Judge a history that is complete: nothing is under way any more."""
    lost, duplicated, wrong, late, indeterminate = [], [], [], [], 0
    ended_at: dict[RequestId, float] = {}
    for operation in operations:
        request_id, ends = operation.request_id, operation.ends
        if not ends:
            if operation.client_died:
                indeterminate += 1
            else:
                lost.append(request_id)
            continue
        ended_at[request_id] = min(end.at for end in ends)
        if len(ends) > 1:
            duplicated.append(request_id)
        if not all(_is_right(end, truth[request_id]) for end in ends):
            wrong.append(request_id)
        if any(end.moment > operation.deadline + GRACE_S + end.stopped_s for end in ends):
            late.append(request_id)
    return Findings(
        lost=tuple(lost),
        duplicated=tuple(duplicated),
        wrong=tuple(wrong),
        late=tuple(late),
        indeterminate=indeterminate,
        executions_after_end=sum(execution.at > ended_at.get(execution.request_id, execution.at) for execution in executions),
    )


def _is_right(end: End, expected: Expected) -> bool:
    if end.outcome == RESULT:
        is_mixed = end.classes & (end.classes - 1) != 0
        return (end.result in expected.results or expected.is_unverified) and not (expected.one_class and is_mixed)
    return end.outcome == CANCELLED or end.outcome in expected.errors
