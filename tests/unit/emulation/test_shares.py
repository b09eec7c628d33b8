"""The CPU share of a machine: what is wanted while its worker starts holds from when that is ready."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from adapt.emulation.shares import CpuShare

SHARES = st.none() | st.sampled_from([0.1, 0.2, 0.5])


class Group:
    """What was written, and how often."""

    def __init__(self) -> None:
        self.given: list[float | None] = [None]

    def limit_cores(self, cores: float | None) -> None:
        self.given.append(cores)


def test_a_slow_while_a_worker_starts_holds_when_it_is_ready_and_does_not_starve_it():
    group = Group()
    share = CpuShare(group, 0.5)
    share.want(0.1)
    assert group.given[-1] is None
    share.settle()
    assert group.given[-1] == 0.1
    share.hurry(1.5)
    share.want(0.5)
    assert group.given[-1] == 1.5
    share.settle()
    assert group.given[-1] == 0.5


@given(st.lists(st.tuples(st.sampled_from(["want", "hurry", "settle"]), SHARES)))
def test_a_share_is_what_was_asked_for_last_and_is_never_written_twice(steps):
    group = Group()
    share, wanted, hurried = CpuShare(group, 0.3), 0.3, None
    is_hurried = True
    for step, cores in steps:
        match step:
            case "want":
                share.want(cores)
                wanted = cores
            case "hurry":
                share.hurry(cores)
                is_hurried, hurried = True, cores
            case "settle":
                share.settle()
                is_hurried = False
        assert group.given[-1] == (hurried if is_hurried else wanted)
    assert all(a != b for a, b in zip(group.given, group.given[1:], strict=False))
