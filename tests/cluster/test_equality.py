"""The distributed model answers, bit for bit, what the user's eager module answers."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

import adapt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from reference import expected

SIX = ("mobilenet_v2", "inception_v3", "alexnet", "resnet18", "resnet50", "vgg16")
LIGHT = ("mobilenet_v2", "resnet18", "alexnet")


def images(model: str, *, seed: int = 1) -> list[np.ndarray]:
    side = 299 if model == "inception_v3" else 224
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((batch, 3, side, side), dtype=np.float32) for batch in (1, 3)]


@pytest.fixture(scope="module")
def cluster():
    with adapt.LocalCluster(workers=4) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def client(cluster):
    with adapt.Client(cluster.address) as client:
        yield client


def check(client, model, tmp_path, *, stages, codec):
    inputs = images(model)
    truth = expected(tmp_path, model, inputs)
    assert not np.array_equal(truth[0], truth[1][:1]), "different inputs must have different answers"
    for count in stages:
        deployed = client.deploy(f"torchvision/{model}", stages=count, seed=0, codec=codec, name=f"{model}-{count}-{codec}", timeout_s=300)
        assert len(deployed.record.stages) == count
        for x, y in zip(inputs, truth, strict=True):
            answer = deployed(x)
            assert answer.dtype == y.dtype and np.array_equal(answer, y), f"{model} in {count} stages, batch {len(x)}, {codec}"
        client.undeploy(deployed.name)


@pytest.mark.parametrize("model", LIGHT)
def test_a_model_in_four_stages_answers_what_it_answers_whole(client, model, tmp_path):
    check(client, model, tmp_path, stages=(4,), codec="lz4")


def test_folded_and_exact_versions_are_never_mixed(client):
    """Both run at once on the same workers, and each answer is that of its own program, computed in its own numeric class."""
    import torch  # only what builds the module needs it

    from adapt.models.export import export_module
    from adapt.models.interpreter import Stage

    torch.manual_seed(0)
    parts = [(torch.nn.Conv2d(3 if n == 0 else 8, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.ReLU()) for n in range(3)]
    module = torch.nn.Sequential(*(layer for part in parts for layer in part))
    for _ in range(3):
        module.train()(torch.randn(8, 3, 12, 12))  # statistics that folding has to work with
    module.eval()
    images = [torch.randn(1 + n % 3, 3, 12, 12, generator=torch.Generator().manual_seed(n)) for n in range(12)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory, torch.inference_mode():
        folded = Stage.load(export_module(module, (images[0],), directory=directory, optimize="fold").path)
        truth = {"none": [module(x) for x in images], "fold": [folded.run([x])[0] for x in images]}
    torch.set_num_threads(threads)
    models = {
        optimize: client.deploy(module, example_inputs=(images[0],), stages=3, numerics="exact", optimize=optimize, name=f"net-{optimize}")
        for optimize in ("none", "fold")
    }
    futures = [(optimize, n, models[optimize].submit(x)) for n, x in enumerate(images) for optimize in models]
    classes = {"none": set(), "fold": set()}
    for optimize, n, future in futures:
        assert torch.equal(future.result(60), truth[optimize][n])
        (numeric_class,) = future.outcome.numeric_classes
        classes[optimize].add(numeric_class)
    assert all(name.endswith("/contiguous") for name in classes["none"]) and all(
        name.endswith("/channels_last/fold") for name in classes["fold"]
    )
    assert any(not torch.equal(one, other) for one, other in zip(*truth.values(), strict=True)), "folding must change some bit to be tested"
    assert {model.record.arithmetic for model in models.values()} == {"contiguous", "channels_last/fold"}
    for model in models.values():
        client.undeploy(model.name)


def saved_model(path):
    """A model of tokens and figures in a file; its own answers, of a batch at a time."""
    import torch

    class Mixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.figures, self.out = torch.nn.Embedding(30, 8), torch.nn.Linear(4, 8), torch.nn.Linear(8, 5)
            self.conv, self.norm = torch.nn.Conv2d(8, 8, (1, 3)), torch.nn.BatchNorm2d(8)

        def forward(self, tokens, figures):
            x = self.norm(self.conv(self.words(tokens).transpose(1, 2)[:, :, None])).mean((2, 3)) + self.figures(figures).tanh()
            return {"scores": self.out(x), "label": (self.out(x).argmax(-1),)}

    torch.manual_seed(0)
    batch = {0: torch.export.Dim("batch", max=16)}
    example = (torch.randint(0, 30, (2, 6)), torch.randn(2, 4))
    torch.export.save(torch.export.export(Mixed().eval(), example, dynamic_shapes=(batch, batch)), path)
    reference = torch.export.load(path).module()

    def answered(tokens, figures):
        with torch.inference_mode():
            return reference(tokens, figures)

    return [(torch.randint(0, 30, (size, 6)), torch.randn(size, 4)) for size in (1, 3)], answered


def check_saved(answer, expected):
    import torch

    assert torch.equal(answer["scores"], expected["scores"]) and torch.equal(answer["label"][0], expected["label"][0])


@pytest.mark.slow
def test_a_file_of_torch_is_deployed_by_its_path(client, tmp_path):
    calls, answered = saved_model(tmp_path / "mixed.pt2")
    told = []
    model = client.deploy(str(tmp_path / "mixed.pt2"), stages=3, canaries=calls, progress=told.append)
    assert model.name == "mixed" and len(model.record.stages) == 3
    assert told[0] == "exporting mixed.pt2 in a child process" and "running the canaries of mixed.pt2" in told
    for call in calls:
        check_saved(model(*call), answered(*call))
    client.undeploy("mixed")


@pytest.mark.slow
def test_a_file_of_torch_through_the_other_doors(cluster, client, tmp_path):
    """A path as such, on asyncio; folded; only measured; and what is wrong is told as that which it is."""
    calls, answered = saved_model(path := tmp_path / "mixed.pt2")

    async def deployed():
        async with adapt.AsyncClient(cluster.address) as asking:
            model = await asking.deploy(path, stages=2, name="awaited")
            for call in calls:
                check_saved(await model(*call), answered(*call))

    asyncio.run(deployed())
    folded = client.deploy(path, optimize="fold", name="folded")
    assert folded.record.arithmetic != "contiguous"
    for call in calls:
        assert np.allclose(folded(*call)["scores"], answered(*call)["scores"], rtol=1e-5, atol=1e-6)
    assert client.profile(path, repetitions=3).name == "mixed"
    with pytest.raises(adapt.InputMismatchError):
        client.deploy(path, canaries=[(np.zeros((1, 6), np.int64),)])
    path.write_bytes(b"no archive")
    with pytest.raises(adapt.ExportError, match=r"mixed\.pt2 is no model that torch\.export\.save has written"):
        client.deploy(path)
    for name in ("awaited", "folded"):
        client.undeploy(name)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("model", ["mobilenet_v2"])
def test_a_model_in_eight_stages_answers_what_it_answers_whole(client, model, tmp_path):
    check(client, model, tmp_path, stages=(8,), codec="lz4")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("codec", ["raw", "lz4"])
@pytest.mark.parametrize("model", SIX)
def test_every_cut_of_the_six_models_answers_what_they_answer_whole(client, model, codec, tmp_path):
    check(client, model, tmp_path, stages=(1, 2, 3, 4), codec=codec)
