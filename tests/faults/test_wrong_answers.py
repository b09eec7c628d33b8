"""F9: a worker's answer is not what the model computes. It is never given to a client."""

from __future__ import annotations

import pytest
import torch

import adapt
from tests.faults.clusters import counter, states, wait_until, workers_of
from tests.faults.traffic import Traffic, assert_clean

pytestmark = pytest.mark.timeout(240)
# Everything is verified, and nobody is thought to be dead or late because the machine is busy: then an answer would be taken unverified.
VERIFYING = {"verify_share": 1, "silence": 60, "grace": 60, "lease_ttl": 60, "attempt_timeout": 60, "min_attempt_timeout": 60}


@pytest.mark.parametrize("what", ["shape", "dtype"])
@pytest.mark.parametrize("stage", range(3))
def test_f9_an_answer_of_a_wrong_form_is_a_failed_attempt(cluster_of, workload, stage, what):
    """In the middle the next stage would see it, at the end only the client could: the dispatcher must."""
    cluster = cluster_of(4)
    with adapt.Client(cluster.address) as client:
        model = workload.deploy(client, stages=3)
        mark = cluster.mishaps.plan(what, stage=model.record.stages[stage].artifact, times=1)
        with Traffic(cluster.address, workload, count=60) as traffic:
            x = workload.marked(mark)
            assert model(x).equal(workload.expect(x))
        (liar,) = cluster.mishaps.happened(mark)
        blamed = {name: record for name, record in workers_of(client.status()).items() if record.tasks_failed}
        assert set(blamed) == {liar}
    assert_clean(traffic)


def test_f9_a_model_that_raises_on_one_worker_is_answered_by_another(cluster_of, workload):
    cluster = cluster_of(3)
    with adapt.Client(cluster.address) as client:
        model = workload.deploy(client, stages=2)
        mark = cluster.mishaps.plan("raise", times=1)
        x = workload.marked(mark)
        assert model(x).equal(workload.expect(x))
        (raised,) = cluster.mishaps.happened(mark)
        assert workers_of(client.status())[raised].tasks_failed == 1
        assert set(states(client).values()) == {"ready"}


def test_f9_a_model_that_raises_everywhere_is_the_models_own_error(cluster_of, workload):
    cluster = cluster_of(3)
    with adapt.Client(cluster.address) as client:
        model = workload.deploy(client, stages=2)
        mark = cluster.mishaps.plan("raise")
        with pytest.raises(adapt.ModelError, match="has been told to raise"):
            model(workload.marked(mark))
        assert len(cluster.mishaps.happened(mark)) == 2
        assert all(record.penalty == 0.0 for record in workers_of(client.status()).values())
        assert counter(client, "evictions") == 0


def test_f9_what_the_model_really_computes_is_right_even_if_it_is_no_number(cluster_of, workload):
    cluster = cluster_of(2)
    with adapt.Client(cluster.address) as client:
        model = workload.deploy(client, stages=2)
        x = workload.inputs[0].clone()
        x[:, 5] = float("nan")
        assert model(x).isnan().equal(workload.expect(x).isnan())
        assert counter(client, "attempts_failed") == 0


def until_all_have(client: adapt.Client, model: adapt.Model) -> None:
    """Its one stage."""
    artifact = model.record.stages[0].artifact
    wait_until(lambda: all(artifact in worker.resident for worker in client.status().workers))


def test_a_worker_that_lies_is_found_and_nobody_gets_its_answers(cluster_of, workload):
    """Its answers have the right form and are wrong numbers. Two others have the stage."""
    cluster = cluster_of(3, dispatcher=VERIFYING)
    with adapt.Client(cluster.address) as client:
        model = workload.deploy(client, stages=1)
        until_all_have(client, model)
        mark = cluster.mishaps.plan("value", only="w2")
        with Traffic(cluster.address, workload, count=60) as traffic:
            inputs = iter(workload.marked(mark, index) for index in range(len(workload.inputs)))
            while not cluster.mishaps.happened(mark):
                x = next(inputs)
                assert model(x).equal(workload.expect(x))
        for x in inputs:
            assert model(x).equal(workload.expect(x))
        found = workers_of(client.status())
        assert found["w2"].tasks_failed >= 1 and not found["w2"].resident, "it has lost the stage"
        assert found["w1"].resident and found["w3"].resident
        assert not any(record.tasks_failed or record.penalty for name, record in found.items() if name != "w2")
        assert counter(client, "disagreements") >= 1 and counter(client, "unverified") == 0
        assert counter(client, "wrong_workers") == 1 and counter(client, "verified") >= 60 + len(workload.inputs)
        assert set(states(client).values()) == {"ready"}
    assert_clean(traffic)


def test_where_two_differ_and_there_is_no_third_nobody_gets_an_answer(cluster_of, workload):
    cluster = cluster_of(2, dispatcher=VERIFYING)
    with adapt.Client(cluster.address) as client:
        model = workload.deploy(client, stages=1)
        until_all_have(client, model)
        mark = cluster.mishaps.plan("value", only="w2")
        with pytest.raises(adapt.DisagreementError, match="w1 and w2 came to different outputs") as caught:
            model(workload.marked(mark))
        assert (caught.value.stage, caught.value.workers) == (0, ["w1", "w2"])
        assert all(record.penalty > 0 for record in workers_of(client.status()).values())
        assert model(workload.inputs[0]).equal(workload.expect(workload.inputs[0]))
        assert (counter(client, "disagreements"), counter(client, "verified")) == (1, 1)


def test_packed_answers_and_batches_are_verified_by_the_same_rule(cluster_of, workload):
    """What two workers pack of the same bits is the same, with an error bound too."""
    cluster = cluster_of(2, dispatcher=VERIFYING)
    with adapt.Client(cluster.address) as client:
        for codec, tolerance in (("raw", None), ("lz4", None), ("zfp+lz4", 0.1)):
            model = client.deploy(
                workload.module, example_inputs=(workload.inputs[0],), stages=1, name="packed", codec=codec, tolerance=tolerance
            )
            until_all_have(client, model)
            for x in (*workload.inputs[:8], torch.cat(list(workload.inputs[:5]))):
                y = model(x)
                assert tolerance is not None or y.equal(workload.expect(x))
        assert (counter(client, "verified"), counter(client, "unverified"), counter(client, "disagreements")) == (27, 0, 0)
