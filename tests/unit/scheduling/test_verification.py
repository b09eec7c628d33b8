"""Of a share of the tasks an answer is believed only when two workers of one class have come to the same bits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapt.errors import DisagreementError, ModelError, StageNotResidentError, WireError
from adapt.protocol.ids import ClientId, RequestId, TaskId, WorkerId
from adapt.protocol.messages import StageTimes
from adapt.protocol.wire import Blob
from adapt.scheduling import events as ev
from adapt.scheduling.scheduler import RESERVE_SHARE
from adapt.scheduling.verification import Check, is_drawn
from tests.unit.scheduling.test_scheduler import ANNE, TIMEOUT_S, Cluster, Sent, only, tensor

RIGHT, WRONG, WORSE = b"right", b"wrong", b"worse"
TIMES = StageTimes(wait_s=0.0, decode_s=0.0, compute_s=1.0, encode_s=0.0)


def made(bits: bytes) -> ev.Activation:
    return ev.Activation((), (Blob.of(bits),))


class Checked(Cluster):
    """A cluster that verifies every task, and workers that say what they have come to.

    `places`: as of `Cluster.deploy`; by default a stage that all workers have.
    """

    def __init__(self, *workers: str, places: tuple[str, ...] = (), classes: dict[str, str] | None = None, credit: int = 2, **settings):
        exact = settings.pop("exact", False)
        super().__init__(**({"verify_share": 1.0} | settings))
        for worker in workers:
            self.join(worker, numeric_class=(classes or {}).get(worker, "x"), credit=credit)
        self.deploy(*(places or (" ".join(workers),)), exact=exact)
        self.taken()

    def come_to(self, sent: Sent, bits: bytes = RIGHT) -> list[ev.Action]:
        done = ev.StageFinished(worker_id=WorkerId(sent.worker), attempt=sent.attempt, output=made(bits), times=TIMES, digest=bits)
        return self.tell(done)

    def count(self, name: str) -> int:
        return self.scheduler.counters[name]

    def counts(self) -> tuple[int, int, int]:
        return self.count("verified"), self.count("unverified"), self.count("disagreements")

    def penalty(self, worker: str) -> float:
        return self.scheduler.roster.member(WorkerId(worker)).qos.penalty(self.now)

    def has(self, worker: str, artifact: str) -> bool:
        return artifact in self.scheduler.roster.member(WorkerId(worker)).resident


def the_answer(actions: list[ev.Action]) -> ev.Answer:
    (answer,) = only(actions, ev.Answer)
    return answer


# ── the draw ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(client=st.binary(min_size=16, max_size=16), share=st.floats(0.0, 1.0), stage=st.integers(0, 9), since=st.integers(1, 1 << 40))
def test_of_the_requests_of_a_client_the_share_is_drawn_as_evenly_as_can_be(client, share, stage, since):
    drawn = [is_drawn(TaskId(RequestId(ClientId(client), since + n), 1, stage), share) for n in range(200)]
    assert abs(sum(drawn) - 200 * share) < 5
    assert drawn == [is_drawn(TaskId(RequestId(ClientId(client), since + n), 7, stage), share) for n in range(200)], "in every reign"


def test_every_stage_has_its_turn():
    tasks = [[is_drawn(TaskId(RequestId(ANNE, n), 1, stage), 0.5) for stage in range(2)] for n in range(100)]
    assert {tuple(of_request) for of_request in tasks} == {(False, False), (False, True), (True, False), (True, True)}


def test_nothing_is_verified_unless_that_is_wished():
    cluster = Checked("w1", "w2", verify_share=0.0)
    cluster.submit()
    assert the_answer(cluster.come_to(cluster.the_one_sent())).unverified == 0
    assert cluster.counts() == (0, 0, 0)


def test_a_share_of_the_tasks_is_verified():
    cluster = Checked("w1", "w2", verify_share=0.25)
    for _ in range(40):
        cluster.submit()
        for sent in cluster.sent():
            cluster.come_to(sent)
    assert abs(cluster.count("verified") - 10) <= 1 and cluster.count("checks") == cluster.count("verified")
    assert (cluster.count("retries"), cluster.count("hedges")) == (0, 0)
    cluster.assert_idle()


# ── two agree ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_two_workers_compute_at_once_and_the_next_stage_begins_when_both_have_come_to_the_same():
    cluster = Checked("w1", "w2", "w3", places=("w1 w2", "w3"))
    cluster.submit()
    first, second = cluster.sent()
    assert {first.worker, second.worker} == {"w1", "w2"} and first.action.input is second.action.input
    cluster.come_to(second)
    assert cluster.sent() == [], "one answer is not enough"
    cluster.come_to(first)
    last = cluster.the_one_sent()
    assert (last.worker, last.action.artifact, cluster.counts()) == ("w3", "d.1", (1, 0, 0))
    answer = the_answer(cluster.come_to(last))
    assert answer.unverified == 1 and answer.attempts == 3, "w3 is alone with its stage"
    assert cluster.counts() == (1, 1, 0)
    cluster.assert_idle()


def test_if_the_second_has_no_room_it_computes_after_the_first_and_before_later_requests():
    cluster = Checked("w1", "w2", credit=1)
    early = cluster.submit()
    cluster.submit()
    first, second = cluster.sent()
    cluster.come_to(first)
    third, other = cluster.come_to(second), cluster.sent()
    assert not only(third, ev.Answer) or the_answer(third).request_id == early
    for sent in other:
        cluster.come_to(sent)
    for sent in cluster.sent():
        cluster.come_to(sent)
    assert cluster.counts() == (2, 0, 0)
    cluster.assert_idle()


def test_an_answer_is_compared_with_all_that_was_sent():
    """Also with what the worker has said of itself: bytes that were spoilt after they were summed are no better."""
    check = Check()
    assert check.hear(WorkerId("w1"), "x", made(RIGHT), b"1")
    assert check.hear(WorkerId("w2"), "x", made(WRONG), b"1") and check.is_split
    assert check.hear(WorkerId("w3"), "x", ev.Activation((1.5, float("nan")), made(RIGHT).blobs), b"1") and check.is_split
    assert check.hear(WorkerId("w4"), "x", ev.Activation((1.5, float("nan")), made(RIGHT).blobs), b"1") and not check.is_split
    assert check.agreed is not None and check.dissenters(check.agreed) == ["w1", "w2"]
    assert not check.hear(WorkerId("w5"), "y", made(RIGHT), b"1")


def test_what_is_held_is_reserved():
    cluster = Checked("w1", "w2", places=("w1 w2",), max_retained_bytes=1000)
    cluster.submit(size_bytes=1)
    first, second = cluster.sent()
    cluster.tell(ev.StageFinished(worker_id=WorkerId(first.worker), attempt=first.attempt, output=tensor(300), times=TIMES))
    assert cluster.scheduler.reserved_bytes == 301
    cluster.come_to(second)
    cluster.lose("w1")


# ── nobody can tell ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_where_nobody_else_of_the_class_has_the_stage_nothing_is_waited_for():
    cluster = Checked("w1", "w2", "w3", places=("w1 w3",), classes={"w3": "y"})
    for _ in range(2):
        cluster.submit()
        assert the_answer(cluster.come_to(cluster.the_one_sent())).unverified == 1
    assert cluster.counts() == (0, 2, 0)
    assert only(cluster.actions, ev.Load) == [], "w2 could have it, and is not asked to load it"
    cluster.assert_idle()


@pytest.mark.parametrize("is_answered", [True, False])
def test_when_the_second_dies_the_answer_of_the_first_is_taken(is_answered):
    cluster = Checked("w1", "w2")
    cluster.submit()
    first, second = cluster.sent()
    if is_answered:
        cluster.come_to(first)
        actions = cluster.lose(second.worker)
    else:
        cluster.lose(second.worker)
        actions = cluster.come_to(first)
    assert the_answer(actions).unverified == 1
    assert cluster.counts() == (0, 1, 0)
    cluster.assert_idle()


def test_when_the_first_dies_that_of_the_second_is():
    cluster = Checked("w1", "w2")
    cluster.submit()
    first, second = cluster.sent()
    cluster.come_to(second)
    assert the_answer(cluster.lose(first.worker)).output.blobs[0].checksum == made(RIGHT).blobs[0].checksum
    cluster.assert_idle()


def test_when_the_second_died_before_there_was_an_answer_a_third_is_asked():
    cluster = Checked("w1", "w2", "w3")
    cluster.submit()
    first, second = cluster.sent()
    cluster.lose(second.worker)
    assert cluster.come_to(first) and cluster.counts() == (0, 0, 0)
    third = cluster.the_one_sent()
    assert the_answer(cluster.come_to(third)).unverified == 0
    cluster.assert_idle()


def test_when_the_second_takes_too_long_the_answer_of_the_first_is_taken():
    cluster = Checked("w1", "w2")
    cluster.submit()
    first, second = cluster.sent()
    cluster.come_to(first)
    assert only(cluster.wait(TIMEOUT_S - 0.1), ev.Answer) == []
    assert the_answer(cluster.wait(0.2)).unverified == 1
    cluster.come_to(second)
    assert cluster.count("late_answers") == 1
    cluster.assert_idle()


def test_no_deadline_is_missed_for_it():
    """The next stage takes a second: twice that is left to it."""
    cluster = Checked("w1", "w2", "w3", places=("w1 w2", "w3"))
    cluster.submit(budget_s=10.0)
    first, _ = cluster.sent()
    cluster.wait(1)
    cluster.come_to(first)
    cluster.wait(6.9)
    assert cluster.sent() == []
    cluster.wait(0.2)
    last = cluster.the_one_sent()
    assert (last.action.artifact, cluster.counts()) == ("d.1", (0, 1, 0))
    assert the_answer(cluster.come_to(last)).unverified == 2
    cluster.submit(budget_s=10.0)
    first, _ = cluster.sent()
    cluster.wait(10.0 * (1 - RESERVE_SHARE) - 0.5)
    cluster.come_to(first)
    assert cluster.the_one_sent().action.artifact == "d.1", "there is no time at all"


def test_a_second_that_cannot_is_not_waited_for():
    cluster = Checked("w1", "w2")
    cluster.submit()
    first, second = cluster.sent()
    cluster.come_to(first)
    assert only(cluster.fail(second, StageNotResidentError("gone")), ev.Answer)
    cluster.assert_idle()


def test_where_a_second_fails_another_is_asked():
    cluster = Checked("w1", "w2", "w3")
    cluster.submit()
    first, second = cluster.sent()
    cluster.come_to(first)
    cluster.fail(second, WireError("flipped"))
    assert cluster.penalty(second.worker) >= 50
    third = cluster.the_one_sent()
    assert the_answer(cluster.come_to(third)).unverified == 0
    cluster.assert_idle()


def test_a_model_that_raises_only_where_it_is_checked_is_that_workers_doing():
    cluster = Checked("w1", "w2")
    cluster.submit()
    first, second = cluster.sent()
    cluster.come_to(first)
    assert only(cluster.fail(second, ModelError("RuntimeError: no")), ev.Answer)
    assert cluster.penalty(second.worker) >= 50 and cluster.penalty(first.worker) == 0
    cluster.assert_idle()


def test_a_model_that_raises_on_both_is_the_models_own_error():
    cluster = Checked("w1", "w2")
    cluster.submit()
    first, second = cluster.sent()
    cluster.fail(first, ModelError("RuntimeError: no"))
    cluster.fail(second, ModelError("RuntimeError: no"))
    assert isinstance(cluster.the_error(), ModelError)
    cluster.assert_idle()


# ── two differ ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("liar", [0, 1])
def test_a_third_decides_and_who_was_wrong_is_penalised_and_loses_the_stage(liar):
    cluster = Checked("w1", "w2", "w3", places=("w1 w2 w3", "w3"))
    cluster.submit()
    pair = cluster.sent()
    cluster.come_to(pair[liar], WRONG)
    assert only(cluster.come_to(pair[1 - liar]), ev.Answer) == []
    (third,) = cluster.sent()
    assert third.worker not in {sent.worker for sent in pair} and third.action.artifact == "d.0"
    cluster.come_to(third)
    last = cluster.the_one_sent()
    assert bytes(last.action.input.blobs[0].contiguous()) == RIGHT, "it goes on from the right bits"
    assert cluster.counts() == (1, 0, 1) and cluster.count("wrong_workers") == 1
    wrong = pair[liar].worker
    assert cluster.penalty(wrong) >= 50 and not cluster.has(wrong, "d.0")
    assert all(cluster.has(sent.worker, "d.0") for sent in (pair[1 - liar], third))
    assert cluster.scheduler.roster.member(WorkerId(wrong)).tally.tasks_failed == 1


def test_without_a_third_the_request_fails_and_names_both():
    cluster = Checked("w1", "w2")
    cluster.submit()
    first, second = cluster.sent()
    cluster.come_to(first)
    cluster.come_to(second, WRONG)
    error = cluster.the_error()
    assert isinstance(error, DisagreementError) and (error.stage, error.workers) == (0, ["w1", "w2"])
    assert "w1 and w2 came to different outputs" in str(error)
    assert cluster.penalty("w1") >= 50 and cluster.penalty("w2") >= 40
    assert cluster.has("w1", "d.0") and cluster.has("w2", "d.0")
    assert cluster.counts() == (0, 0, 1)
    cluster.assert_idle()


def test_three_that_differ_are_told_apart_by_a_fourth_or_not_at_all():
    for workers in (("w1", "w2", "w3"), ("w1", "w2", "w3", "w4")):
        cluster = Checked(*workers)
        cluster.submit()
        first, second = cluster.sent()
        cluster.come_to(first, WRONG)
        cluster.come_to(second)
        cluster.come_to(cluster.the_one_sent(), WORSE)
        if len(workers) == 3:
            assert cluster.the_error().workers == ["w1", "w2", "w3"]
        else:
            cluster.come_to(cluster.the_one_sent())
            assert cluster.counts() == (1, 0, 1) and cluster.count("wrong_workers") == 2
        cluster.assert_idle()


def test_a_split_is_not_believed_when_the_third_dies_nor_when_time_is_short():
    cluster = Checked("w1", "w2", "w3")
    cluster.submit()
    first, second = cluster.sent()
    cluster.come_to(first)
    cluster.come_to(second, WRONG)
    third = cluster.the_one_sent()
    cluster.lose(third.worker)
    assert isinstance(cluster.the_error(), DisagreementError)
    cluster.assert_idle()
    cluster.silent.clear()
    cluster.join(third.worker, resident=["d.0"])
    cluster.submit(budget_s=5.0)
    first, second = cluster.sent()
    cluster.come_to(first)
    cluster.come_to(second, WRONG)
    assert only(cluster.wait(6), ev.Answer) == []
    assert cluster.the_error().code == "deadline-exceeded"


def test_workers_of_other_classes_are_not_asked_who_is_right():
    cluster = Checked("w1", "w2", "w3", classes={"w3": "y"})
    while True:
        cluster.submit()
        sent = cluster.sent()
        if len(sent) == 2:
            break
        cluster.come_to(sent[0])
    first, second = sent
    assert {first.worker, second.worker} == {"w1", "w2"}
    cluster.come_to(first)
    cluster.come_to(second, WRONG)
    assert isinstance(cluster.the_error(), DisagreementError)


# ── beside all else ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_who_says_it_again_does_not_confirm_itself():
    """The connection was lost after the answer; the hello lists it, and it is said again."""
    cluster = Checked("w1", "w2")
    cluster.submit()
    first, second = cluster.sent()
    cluster.come_to(first)
    cluster.lose(first.worker)
    cluster.silent.clear()
    cluster.join(first.worker, resident=["d.0"], finished=[first.attempt])
    assert only(cluster.come_to(first), ev.Answer) == []
    assert the_answer(cluster.come_to(second)).unverified == 0


def test_deaths_of_those_who_only_checked_do_not_condemn_a_request():
    """And once somebody has died of it, one worker at a time is risked."""
    cluster = Checked("w1", "w2", "w3", "w4")
    cluster.submit()
    first, second = cluster.sent()
    for sent in (first, second):
        cluster.begin(sent)
    cluster.lose(second.worker)
    (request,) = cluster.scheduler.oldest(1)
    assert (request.deaths, request.failures) == ([], 0)
    cluster.lose(first.worker)
    assert request.deaths == [first.worker]
    again = cluster.the_one_sent()
    cluster.come_to(again)
    assert the_answer(cluster.come_to(cluster.the_one_sent())).unverified == 0
    cluster.assert_idle()


def test_it_costs_no_tokens_and_no_hedges():
    cluster = Checked("w1", "w2", hedge_share=0.05)
    before = cluster.scheduler._tokens._tokens
    for _ in range(8):
        cluster.submit()
        for sent in cluster.sent():
            cluster.come_to(sent)
    assert cluster.scheduler._tokens._tokens >= before
    assert cluster.count("retries_delayed") == cluster.count("hedges") == 0
    cluster.submit()
    cluster.wait(1)
    assert len(cluster.sent()) == 2, "a task that is verified is not hedged"


def test_an_exact_request_is_verified_in_its_own_class():
    cluster = Checked("w1", "w2", "w3", "w4", classes={"w3": "y", "w4": "y"}, exact=True)
    for _ in range(4):
        cluster.submit(exact=True)
        pair = cluster.sent()
        assert {sent.worker for sent in pair} in ({"w1", "w2"}, {"w3", "w4"})
        for sent in pair:
            actions = cluster.come_to(sent)
        assert len(the_answer(actions).numeric_classes) == 1
    assert cluster.counts() == (4, 0, 0)


def test_the_answer_of_one_that_was_given_up_counts():
    """The first is too slow; while a third has its task, it answers after all."""
    cluster = Checked("w1", "w2", "w3")
    cluster.submit()
    first, second = cluster.sent()
    cluster.wait(TIMEOUT_S / 2)
    cluster.begin(second)
    cluster.come_to(second)
    cluster.wait(TIMEOUT_S)
    assert cluster.counts() == (0, 1, 0)
    assert cluster.come_to(first)
    assert cluster.count("late_answers") == 1


def test_a_cancelled_request_leaves_nothing_behind():
    cluster = Checked("w1", "w2")
    request_id = cluster.submit()
    first, second = cluster.sent()
    cluster.come_to(first)
    actions = cluster.tell(ev.RequestCancelled(request_id=request_id))
    assert [cancel.attempt for cancel in only(actions, ev.Cancel)] == [second.attempt]
    cluster.tell(ev.AttemptCancelled(worker_id=WorkerId(second.worker), attempt=second.attempt))
    cluster.assert_idle()
    assert ("verify", request_id) not in cluster.scheduler._due
