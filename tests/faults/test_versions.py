"""Versions under load: a switch, a roll-back, a version that is wrong. Nothing is lost, and no answer is one of no version."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import adapt
from adapt.models.export import export_module
from tests.faults.clusters import counter, states, wait_until, workers_of
from tests.faults.traffic import Layers, Traffic, Workload, assert_clean

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def other(workload: Workload) -> Workload:
    """Another module for the same inputs."""
    return Workload(Layers(seed=1), workload.inputs)


def allow_both(traffic: Traffic, first: Workload, second: Workload) -> None:
    """What either version makes of an input is right while they change."""
    both = dict(zip(first.truth, second.truth, strict=True))
    for request_id, expected in list(traffic.truth.items()):
        (result,) = expected.results
        traffic.truth[request_id] = replace(expected, results=frozenset({result, both[result]}))


def is_of(model: adapt.Model, workload: Workload) -> bool:
    return all(model(x).equal(workload.expect(x)) for x in workload.inputs[:4])


def test_versions_are_switched_under_load(cluster_of, workload, other):
    """There and back: requests go on being answered while the new version is loaded and tried, by handles of the old one too."""
    cluster = cluster_of(3)
    with adapt.Client(cluster.address) as client:
        model = workload.deploy(client, stages=3)
        with Traffic(cluster.address, workload) as traffic:
            traffic.until_ended(40)
            before = traffic.ended
            second = client.deploy(
                other.module, example_inputs=(other.inputs[0],), stages=2, name="layers", canaries=list(other.inputs[1:4])
            )
            assert traffic.ended > before, "it never stood still"
            assert is_of(second, other) and is_of(model, other)
            traffic.until_more(40)
            before = traffic.ended
            third = client.rollback("layers")
            assert traffic.ended > before
            assert is_of(third, workload) and is_of(model, workload)
            traffic.until_more(40)
        assert (second.record.version, second.record.earlier) == (2, [1])
        assert (third.record.version, third.record.again, third.record.earlier) == (3, 1, [2])
        wait_until(lambda: all(set(worker.resident) <= resident_of(third) for worker in client.status().workers))
        assert set(states(client).values()) == {"ready"} and counter(client, "wrong_outputs") == 0
    allow_both(traffic, workload, other)
    assert_clean(traffic)


def resident_of(model: adapt.Model) -> set[str]:
    return {stage.artifact for stage in model.record.stages}


def test_a_version_that_gives_other_outputs_never_takes_traffic(cluster_of, workload, other):
    """All workers make something else of one canary in the second stage. Nobody sees an answer of that version."""
    cluster = cluster_of(2)
    with adapt.Client(cluster.address) as client:
        workload.deploy(client, stages=2)
        mark = cluster.mishaps.plan("value")
        with Traffic(cluster.address, workload) as traffic:
            traffic.until_ended(20)
            with pytest.raises(adapt.CanaryError, match="canary 1: stage 1 of 2 gives another output") as caught:
                client.deploy(
                    other.module,
                    example_inputs=(other.inputs[0],),
                    stages=2,
                    name="layers",
                    canaries=[other.inputs[0], other.marked(mark)],
                )
            traffic.until_more(20)
        assert (caught.value.canary, caught.value.stage) == (1, 0)
        assert set(cluster.mishaps.happened(mark)) <= {"w1", "w2"}
        assert client.model("layers").record.version == 1
    assert_clean(traffic)


def test_a_worker_that_is_alone_with_another_output_loses_the_stage(cluster_of, workload):
    """The version is right: another worker shows it."""
    cluster = cluster_of(2)
    with adapt.Client(cluster.address) as client:
        mark = cluster.mishaps.plan("value", only="w1")
        model = client.deploy(workload.module, example_inputs=(workload.inputs[0],), name="layers", canaries=[workload.marked(mark)])
        assert cluster.mishaps.happened(mark)
        assert (counter(client, "wrong_workers"), counter(client, "canary_runs")) == (1, 2)
        liar = workers_of(client.status())["w1"]
        assert liar.tasks_failed >= 1 and liar.penalty > 0 and not liar.resident
        x = workload.marked(mark)
        assert model(x).equal(workload.expect(x)), "it is not asked any more"


def test_what_was_rolled_back_to_is_there_after_a_restart(cluster_of, workload, other):
    cluster = cluster_of(2)
    with adapt.Client(cluster.address) as client:
        workload.deploy(client, stages=2)
        model = other.deploy(client, stages=2)
        client.rollback("layers")
        cluster.dispatcher.kill()
        cluster.dispatcher.begin_again()
        cluster.dispatcher.wait_ready()
        assert is_of(model, workload)
        assert is_of(client.rollback("layers"), other)
        assert client.model("layers").record.version == 4
        with pytest.raises(adapt.ConfigError, match="version=2: "):
            client.rollback("layers", version=2)


@pytest.mark.slow
def test_files_are_deployed_when_they_appear_and_when_they_change(cluster_of, workload, other, tmp_path):
    """A program file, another in its place, half of one, and the whole again; without traffic being disturbed."""
    shelf, made = tmp_path / "shelf", tmp_path / "made"
    shelf.mkdir()
    cluster = cluster_of(2, models_dir=shelf)
    place = shelf / "layers.safetensors"
    first, second = (Path(export_module(w.module, (w.inputs[0],), directory=made).path) for w in (workload, other))

    def put(source: Path) -> None:
        part = shelf / "new.part"
        part.write_bytes(source.read_bytes())
        os.replace(part, place)

    with adapt.Client(cluster.address) as client:

        def file() -> tuple[str, int]:
            (record,) = client.status().files or [None]
            return ("", 0) if record is None else (record.state, record.version)

        put(first)
        wait_until(lambda: file() == ("deployed", 1), told=lambda: client.status().files, limit_s=60)
        with Traffic(cluster.address, workload) as traffic:
            traffic.until_ended(20)
            put(second)
            wait_until(lambda: file() == ("deployed", 2), told=lambda: client.status().files, limit_s=60)
            assert is_of(client.model("layers"), other)
            place.write_bytes(first.read_bytes()[:-100])
            wait_until(lambda: file() == ("failed", 2), told=lambda: client.status().files, limit_s=60)
            traffic.until_more(20)
            assert is_of(client.model("layers"), other)
            assert "layers.safetensors" in client.status().files[0].reason
        put(second)  # what is deployed already makes no version
        wait_until(lambda: file() == ("deployed", 2), told=lambda: client.status().files, limit_s=60)
    allow_both(traffic, workload, other)
    assert_clean(traffic)


@pytest.mark.slow
def test_a_file_of_torch_is_deployed_with_its_example_as_a_canary(cluster_of, tmp_path):
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 5)).eval()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.export.save(torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},)), shelf / "net.pt2")
    (shelf / "weights.safetensors").write_bytes(b"of another make")
    (shelf / "broken.pt2").write_bytes(b"no archive")
    cluster = cluster_of(2, models_dir=shelf, is_lucky=True)
    with adapt.Client(cluster.address) as client:

        def found() -> dict[str, str]:
            return {record.file: record.state for record in client.status().files}

        wait_until(lambda: found() == {"net.pt2": "deployed", "broken.pt2": "failed"}, told=lambda: client.status().files, limit_s=120)
        model = client.model("net")
        with torch.inference_mode():
            for batch in (x, x[:1], torch.cat([x, x])):
                assert torch.equal(model(batch), module(batch))
        assert counter(client, "canary_runs") >= 1
