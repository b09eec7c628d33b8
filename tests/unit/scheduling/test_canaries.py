"""A version with canaries takes no request before every worker that is to have it has come to what it should."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from adapt.errors import CanaryError, InputMismatchError, ModelError, OverloadedError, UnknownModelError
from adapt.planning.placement import Plan, StageNeed
from adapt.protocol.ids import Digest, Epoch, WorkerId
from adapt.protocol.messages import StageTimes
from adapt.scheduling import events as ev
from adapt.scheduling.canaries import BUDGET_S, MOST_ASKED, MOST_AT_ONCE, MOST_RUNS, OWN_CLIENT, Run, Trial
from adapt.scheduling.tokens import RetryTokens, TokenSettings
from tests.unit.scheduling.test_scheduler import Cluster, Sent, tensor

RIGHT, WRONG = (b"0", b"1", b"2"), b"?"
TIMES = StageTimes(wait_s=0.0, decode_s=0.0, compute_s=0.1, encode_s=0.0)


def canary(*, numeric_class: str = "x", size_bytes: int = 1) -> ev.Canary:
    return ev.Canary(input=tensor(size_bytes), numeric_class=numeric_class, digests=RIGHT)


def version(number: int, *places: str, codec: str = "raw", interface: str = "") -> ev.Version:
    needs = tuple(StageNeed(artifact=Digest(f"d{number}.{stage}"), memory_bytes=10, cost_s=1.0) for stage in range(len(places)))
    at = tuple(tuple(map(WorkerId, place.split())) for place in places)
    plan = Plan(program=Digest(f"d{number}"), epoch=Epoch(1), stages=needs, places=at)
    return ev.Version(
        deployment="d", number=number, program=plan.program, codec=codec, tolerance=None, exact=False, interface=interface, plan=plan
    )


class Trials(Cluster):
    """A cluster in which version 1 of `d` takes requests, if it has one."""

    def __init__(self, *workers: str, classes: dict[str, str] | None = None, has_first: bool = True, **settings: int) -> None:
        super().__init__(**settings)
        self.settled: list[ev.Action] = []
        for worker in workers:
            self.join(worker, numeric_class=(classes or {}).get(worker, "x"), credit=8)
        if has_first:
            self.tell(ev.VersionDeployed(version=version(1, " ".join(workers))))
            self.load()
        self.taken()

    def try_out(self, *places: str, canaries: int = 1, codec: str = "raw", numeric_class: str = "x", load: bool = True) -> ev.Version:
        """Version 2, loaded."""
        second = version(2, *places, codec=codec)
        self.tell(ev.VersionDeployed(version=second, canaries=(canary(numeric_class=numeric_class),) * canaries))
        if load:
            self.load()
        return second

    def come_out(self, sent: Sent, digest: bytes | None = None) -> list[ev.Action]:
        """As it should, unless another digest is given."""
        right = RIGHT[sent.attempt.stage]
        return self.tell(
            ev.StageFinished(
                worker_id=WorkerId(sent.worker),
                attempt=sent.attempt,
                output=tensor(1),
                times=TIMES,
                digest=right if digest is None else digest,
            )
        )

    def runs(self, *, wrong: dict[str, int] | None = None) -> list[tuple[str, int]]:
        """All that is sent of canaries comes out, and what that leads to; at `wrong` workers, from some stage on, as it should not."""
        done = []
        while sent := self.sent_of_canaries():
            for one in sent:
                is_wrong = one.attempt.stage >= (wrong or {}).get(one.worker, 99)
                self.settled += self.come_out(one, WRONG if is_wrong else None)
                done.append((one.worker, one.attempt.stage))
        return done

    def sent_of_canaries(self) -> list[Sent]:
        return [one for one in self.sent() if one.request.client == OWN_CLIENT]

    def outcome(self) -> list[ev.Action]:
        found, self.settled = [one for one in self.settled if isinstance(one, (ev.VersionReady, ev.VersionFailed))], []
        return found

    def current(self) -> int:
        return next(found.number for found, _ in self.scheduler.versions())


@pytest.fixture
def trials():
    return Trials("w1", "w2")


def test_requests_go_to_the_old_version_until_every_canary_has_come_out(trials):
    trials.try_out("w1", "w2")
    (run,) = trials.sent_of_canaries()
    trials.submit()
    assert trials.the_one_sent().action.artifact == "d1.0"
    trials.come_out(run)
    (run,) = trials.sent_of_canaries()
    trials.submit()
    assert trials.the_one_sent().action.artifact == "d1.0", "one stage is missing"
    (ready,) = [one for one in trials.come_out(run) if isinstance(one, ev.VersionReady)]
    assert (ready.version.number, trials.current()) == (2, 2)
    trials.submit()
    assert trials.the_one_sent().action.artifact == "d2.0"


def test_what_two_workers_come_to_is_the_versions_own_fault(trials):
    trials.try_out("w1 w2", "w1 w2")
    trials.runs(wrong={"w1": 1, "w2": 1})
    (failed,) = trials.outcome()
    assert isinstance(failed.error, CanaryError) and (failed.error.canary, failed.error.stage) == (0, 1)
    assert ("stage 2 of 2" in str(failed.error) and "on w1 and on w2" in str(failed.error)) or "on w2 and on w1" in str(failed.error)
    assert trials.current() == 1
    assert all("d2.1" not in member.resident for member in trials.scheduler.roster), "it is unloaded"
    assert trials.scheduler.live_requests == trials.scheduler.reserved_bytes == 0
    assert trials.scheduler.counters["wrong_workers"] == 0


def test_who_is_alone_with_another_output_loses_the_stage_and_is_penalised(trials):
    trials.try_out("w1 w2", "w2")
    trials.runs(wrong={"w1": 0})
    (ready,) = trials.outcome()
    assert isinstance(ready, ev.VersionReady) and trials.current() == 2
    liar = trials.scheduler.roster.member(WorkerId("w1"))
    assert liar.qos.penalty(trials.now) >= 50 and "d2.0" not in liar.resident
    assert trials.scheduler.counters["wrong_workers"] == 1
    trials.taken()
    trials.submit()
    assert trials.the_one_sent().worker == "w2"


def test_nobody_is_blamed_by_bits_that_cannot_be_compared():
    """w1 comes to another output than the exporting process, w2 computes in another class: nobody knows whose doing that is."""
    trials = Trials("w1", "w2", classes={"w2": "y"})
    trials.try_out("w1 w2")
    done = trials.runs(wrong={"w1": 0, "w2": 0})
    assert done.count(("w1", 0)) == 2, "it is asked again: the version is not to be ready because of who cannot tell"
    (failed,) = trials.outcome()
    assert isinstance(failed.error, CanaryError) and str(failed.error).endswith("on w1")
    assert trials.scheduler.counters["wrong_workers"] == 0
    assert trials.scheduler.roster.member(WorkerId("w1")).qos.penalty(trials.now) == 0.0

    trials.try_out("w1 w2")  # and if it is gone before it can be asked again
    first = {sent.worker: sent for sent in trials.sent_of_canaries()}
    trials.come_out(first["w1"], WRONG)
    trials.taken()
    trials.lose("w1")
    (again,) = trials.sent_of_canaries()
    for sent in (first["w2"], again):
        trials.come_out(sent, WRONG)
    for judge in trials.taken(ev.JudgeCanary):
        trials.tell(ev.CanaryJudged(deployment="d", number=2, run=judge.run, error=None))
    assert trials.current() == 2 and trials.scheduler.counters["wrong_workers"] == 0


def test_a_worker_on_which_the_model_raises_once_keeps_the_stage(trials):
    """It costs what it costs for clients' requests."""
    trials.try_out("w1 w2", canaries=2)
    for sent in trials.sent_of_canaries():
        if sent.worker == "w1":
            trials.fail(sent, ModelError("MemoryError: no room"))
        else:
            trials.come_out(sent)
    trials.runs()
    assert trials.current() == 2
    member = trials.scheduler.roster.member(WorkerId("w1"))
    assert "d2.0" in member.resident and 0 < member.qos.penalty(trials.now) <= 50
    assert trials.scheduler.counters["wrong_workers"] == 0


def test_a_worker_that_never_answered_has_not_been_tried(trials):
    trials.try_out("w1 w2", canaries=2)
    first = trials.sent_of_canaries()
    (lost,) = [sent for sent in first if sent.worker == "w1"]
    trials.lose("w1")
    trials.silent.discard("w1")
    trials.join("w1", credit=8, resident=("d1.0", "d2.0"))
    for sent in first:
        if sent.worker != "w1":
            trials.come_out(sent)
    assert ("w1", 0) in trials.runs()
    assert trials.current() == 2
    assert lost.attempt.attempt == 1


def test_a_worker_that_only_beats_does_not_hold_up_the_trial(trials):
    trials.try_out("w1 w2", canaries=16)
    asked = 0
    while (sent := trials.sent_of_canaries()) or (trials.current() == 1 and not trials.outcome()):
        for one in sent:
            asked += one.worker == "w1"
        trials.settled += trials.wait(5.0)
        for one in sent:
            if one.worker == "w2":
                trials.settled += trials.come_out(one)
    assert trials.current() == 2 and asked == MOST_ASKED


def test_runs_take_no_tokens_of_clients_and_count_among_nothing_of_theirs():
    trials = Trials("w1", "w2", "w3", "w4")
    trials.scheduler._tokens = RetryTokens(TokenSettings(most=1.0, per_request=0.0, per_s=1e-9))
    trials.try_out("w1 w2")
    trials.fail(trials.sent_of_canaries()[0], ModelError("ValueError: no"))
    assert len(trials.sent_of_canaries()) == 1, "it is tried again"
    trials.submit(budget_s=1e4)
    trials.fail(trials.the_one_sent(), ModelError("ValueError: no"))
    trials.the_one_sent()
    counted = trials.scheduler.counters
    assert (counted["attempts_failed"], counted["retries"]) == (1, 1)
    trials.wait(BUDGET_S + 1)
    assert trials.scheduler.live_requests == 1 and counted["deadlines_exceeded"] == 0


def test_of_the_only_holder_the_second_wrong_output_ends_the_trial(trials):
    trials.try_out("w1", "w2")
    assert trials.runs(wrong={"w1": 0}) == [("w1", 0), ("w1", 0)]
    (failed,) = trials.outcome()
    assert "stage 1 of 2" in str(failed.error) and str(failed.error).endswith("on w1")


def test_every_holder_of_every_stage_is_tried():
    trials = Trials("w1", "w2", "w3")
    trials.try_out("w1 w2 w3", "w2 w3")
    assert set(trials.runs()) == {("w1", 0), ("w2", 0), ("w3", 0), ("w2", 1), ("w3", 1)}
    assert isinstance(trials.outcome()[0], ev.VersionReady)


def test_the_trial_waits_until_all_have_loaded_or_cannot(trials):
    trials.try_out("w1 w2", load=False)
    trials.load("w1")
    assert trials.sent_of_canaries() == []
    trials.tell(ev.StageRefused(worker_id=WorkerId("w2"), artifact=Digest("d2.0"), error=ModelError("no room")))
    assert trials.runs() == [("w1", 0)]
    assert isinstance(trials.outcome()[0], ev.VersionReady)


def test_a_worker_that_is_lost_while_it_loads_does_not_hold_up_the_trial(trials):
    trials.try_out("w1 w2", load=False)
    trials.load("w1")
    trials.lose("w2")
    trials.tell(ev.WorkerLeft(worker_id=WorkerId("w2")))
    assert trials.runs() == [("w1", 0)]


def test_a_run_survives_the_loss_of_its_worker(trials):
    trials.try_out("w1 w2")
    trials.lose(trials.sent_of_canaries()[0].worker)
    trials.wait(1)
    trials.runs()
    assert trials.current() == 2 or trials.scheduler.live_requests, "it goes on elsewhere"


@pytest.mark.parametrize("error", [None, CanaryError("0.5 off", canary=0)])
@pytest.mark.parametrize("why", ["class", "codec"])
def test_where_bits_need_not_agree_the_output_is_judged(trials, why, error):
    trials.try_out("w1", "w2", codec="zfp" if why == "codec" else "raw", numeric_class="y" if why == "class" else "x")
    (sent,) = trials.sent_of_canaries()
    trials.come_out(sent, WRONG)
    (sent,) = trials.sent_of_canaries()
    (judge,) = [one for one in trials.come_out(sent, WRONG) if isinstance(one, ev.JudgeCanary)]
    assert (judge.canary, judge.run, judge.numeric_classes) == (0, 0, ("x",))
    assert trials.current() == 1
    (outcome,) = [
        one
        for one in trials.tell(ev.CanaryJudged(deployment="d", number=2, run=judge.run, error=error))
        if isinstance(one, (ev.VersionReady, ev.VersionFailed))
    ]
    assert isinstance(outcome, ev.VersionReady) == (error is None) == (trials.current() == 2)


def test_a_model_that_raises_fails_its_trial(trials):
    trials.try_out("w1")
    (sent,) = trials.sent_of_canaries()
    trials.fail(sent, ModelError("ValueError: no"))
    (sent,) = trials.sent_of_canaries()
    (failed,) = [one for one in trials.fail(sent, ModelError("ValueError: no")) if isinstance(one, ev.VersionFailed)]
    assert isinstance(failed.error, CanaryError) and "ValueError: no" in str(failed.error)


def test_without_an_answer_the_trial_ends(trials):
    trials.try_out("w1", "w2")
    trials.silent |= {"w1", "w2"}
    failed = [one for one in trials.wait(BUDGET_S + 1) if isinstance(one, ev.VersionFailed)]
    assert [found.version.number for found in failed] == [2] and trials.current() == 1


def test_a_trial_that_nobody_waits_for_leaves_nothing_behind(trials):
    trials.try_out("w1", "w2", canaries=3)
    actions = trials.tell(ev.VersionWithdrawn(deployment="d", number=2))
    assert [type(one) for one in actions if isinstance(one, (ev.VersionFailed, ev.VersionReleased))] == [
        ev.VersionFailed,
        ev.VersionReleased,
    ]
    assert trials.scheduler.live_requests == trials.scheduler.reserved_bytes == 0
    trials.tell(ev.CanaryJudged(deployment="d", number=2, run=0, error=None))
    assert trials.current() == 1


def test_nobody_can_ask_for_a_version_that_is_tried():
    trials = Trials("w1", has_first=False)
    trials.try_out("w1")
    for number in (0, 2):
        trials.submit(version=number)
        assert isinstance(trials.the_error(), UnknownModelError)
    assert list(trials.scheduler.versions()) == []


def test_there_are_not_more_runs_than_is_good():
    trials = Trials(*(f"w{number}" for number in range(40)))
    trials.try_out(" ".join(f"w{number}" for number in range(40)), canaries=16)
    trials.runs()
    assert trials.scheduler.counters["canary_runs"] == MOST_RUNS
    assert isinstance(trials.outcome()[0], ev.VersionReady)


def test_a_few_run_at_a_time_and_as_many_as_the_narrowest_stage_has_holders():
    trials = Trials("w1", "w2", "w3", "w4", "w5", "w6")
    for places, at_once in ((("w1 w2 w3", "w4"), 1), (("w1 w2 w3", "w4 w5"), 2), (("w1 w2 w3 w4 w5 w6",), MOST_AT_ONCE)):
        trials.try_out(*places, canaries=16)
        assert len(trials.sent_of_canaries()) == at_once == trials.scheduler.live_requests
        trials.tell(ev.VersionWithdrawn(deployment="d", number=2))


def test_each_run_has_its_time_from_when_it_begins():
    """A right version on a slow worker: all runs together take longer than one may."""
    trials = Trials("w1")
    trials.try_out("w1", canaries=16)
    began = trials.now
    while sent := trials.sent_of_canaries():
        trials.wait(BUDGET_S / 8)
        trials.settled += trials.come_out(sent[0])
    assert trials.now > began + BUDGET_S
    assert [type(one) for one in trials.outcome()] == [ev.VersionReady]


def test_clients_are_not_refused_for_what_canaries_take():
    trials = Trials("w1", "w2", max_requests=2, max_retained_bytes=2)
    trials.try_out("w1 w2", canaries=4)
    assert trials.scheduler.live_requests == trials.scheduler.reserved_bytes == 2
    trials.submit()
    trials.submit()
    assert len(trials.sent()) == 4
    trials.submit()
    assert isinstance(trials.the_error(), OverloadedError), "there are two besides"


@pytest.mark.parametrize("how", ["replaced", "withdrawn", "undeployed"])
def test_a_version_that_is_given_up_before_its_runs_begin_begins_none(trials, how):
    """Regression: what is noted together may make a version resident and retire it; it was begun all the same, for ever."""
    second = trials.try_out("w1", "w2", canaries=2, load=False)
    if how == "replaced":  # by one of the same stages, which nobody has to try
        trials.tell(ev.VersionDeployed(version=replace(second, number=3)))
    for action in trials.taken(ev.Load):
        trials.scheduler.note(ev.StageResident(worker_id=action.worker_id, artifact=action.artifact), trials.now)
    if how == "withdrawn":
        trials.scheduler.note(ev.VersionWithdrawn(deployment="d", number=2), trials.now)
    elif how == "undeployed":
        trials.scheduler.note(ev.Undeployed(deployment="d"), trials.now)
    actions = trials.scheduler.decide(trials.now)
    assert [one.version.number for one in actions if isinstance(one, ev.VersionFailed)] == [2]
    assert trials.scheduler.live_requests == trials.scheduler.reserved_bytes == 0
    if how != "undeployed":
        trials.submit()
        assert trials.sent()
    trials.wait(BUDGET_S)


def test_trials_end_however_things_come_together():
    """Versions that share stages, wrong outputs, losses, withdrawals, in any order: nothing is left of any trial."""
    for seed in range(60):
        random = Random(seed)
        trials, number = Trials("w1", "w2", "w3"), 2
        for _ in range(40):
            one = random.choice(("w1", "w2", "w3"))
            match random.randrange(10):
                case 0 | 1:
                    places = [" ".join(random.sample(("w1", "w2", "w3"), random.randint(1, 3))) for _ in range(random.randint(1, 3))]
                    deployed = replace(version(random.choice((2, 100 + number)), *places), number=number)
                    trials.tell(ev.VersionDeployed(version=deployed, canaries=(canary(),) * random.randint(0, 3)))
                    number += 1
                case 2:
                    trials.load(one)
                case 3:
                    trials.load()
                case 4 | 5:
                    for sent in trials.sent():
                        trials.come_out(sent, random.choice((None, None, None, WRONG)))
                case 6:
                    trials.lose(one)
                case 7:
                    trials.silent.discard(one)
                    trials.join(one, credit=8)
                case 8:
                    trials.wait(random.choice((0.1, 3.0, BUDGET_S)))
                case 9:
                    trials.tell(ev.VersionWithdrawn(deployment="d", number=random.randint(2, number)))
        trials.wait(400)
        assert trials.scheduler.live_requests == trials.scheduler.reserved_bytes == 0, seed


def test_a_version_with_other_inputs_or_outputs_never_answers():
    trials = Trials("w1", has_first=False)
    trials.tell(ev.VersionDeployed(version=version(1, "w1", interface="new")))
    trials.load()
    trials.submit()
    arrived = trials.arrived
    for interface, is_taken in (("new", True), ("old", False), ("", True)):
        trials.taken()
        trials.sequence += 1
        request_id = type(arrived.request_id)(arrived.request_id.client, trials.sequence)
        trials.tell(
            ev.RequestArrived(
                request_id=request_id, deployment="d", version=0, program=None, interface=interface, budget_s=9.0, exact=False,
                fingerprint=trials.sequence, input=tensor(1),
            )
        )  # fmt: skip
        errors = [fail.error for fail in trials.taken(ev.Fail)]
        assert [isinstance(error, InputMismatchError) for error in errors] == ([] if is_taken else [True])


def test_bits_have_to_agree_only_with_what_the_same_arithmetic_has_computed():
    folded = replace(version(2, "w1"), arithmetic="fold")
    for numeric_class, is_comparable in (("x/fold", True), ("x", False), ("y/fold", False), ("x/contiguous", False)):
        trial = Trial(folded, (canary(numeric_class=numeric_class),))
        assert trial.is_comparable(Run(0, 0, trial), {"x"}) == is_comparable
