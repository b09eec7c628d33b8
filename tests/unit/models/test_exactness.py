"""The promise: however a model is cut, its answer is that of the user's own module, bit for bit."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from adapt.models.cut import legal_cuts
from adapt.models.vision import import_torchvision
from adapt.planning.partition import partition

SMALL = ["mobilenet_v2", "resnet18", "alexnet"]
LARGE = ["inception_v3", "resnet50", "vgg16"]
FAMILIES = [
    "densenet121", "efficientnet_b0", "efficientnet_v2_s", "convnext_tiny", "vit_b_16", "swin_t", "swin_v2_t", "squeezenet1_1",
    "shufflenet_v2_x0_5", "googlenet", "mnasnet0_5", "regnet_y_400mf", "regnet_x_400mf", "maxvit_t", "mobilenet_v3_small",
    "resnext50_32x4d", "vgg11_bn",
]  # fmt: skip
# Each family that the README names; the three smallest are tried in every run.
THIRTEEN = [
    "vit_b_16", "swin_t", "efficientnet_b0", "convnext_tiny", "densenet121", "mobilenet_v3_small", "regnet_y_400mf", "googlenet",
    "mnasnet0_5", "resnext50_32x4d", "maxvit_t", "inception_v3", "resnet50",
]  # fmt: skip


def balanced(case, stages):
    return partition(case.exported.operator_costs_s, legal_cuts(case.program), stages)


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("name", [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_stages_of_a_named_model_are_exact(named_case, tmp_path, name, stages):
    case = named_case(name)
    assert case.exported.is_exact and case.exported.is_batched
    case.check(balanced(case, stages), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_exact(named_case, tmp_path, name):
    case = named_case(name)
    assert case.exported.is_exact and case.exported.is_batched
    for stages in (1, 4):
        case.check(balanced(case, stages), tmp_path)


def random_positions(program, rng):
    """Two to seven legal cuts; one of them, where there is such a one, is crossed by several values."""
    cuts = legal_cuts(program)
    several = [cut for cut in cuts if len(cut.crossing) > 1]
    chosen = rng.sample(cuts, min(rng.randint(2, 6), len(cuts))) + rng.sample(several, min(1, len(several)))
    return sorted({cut.position for cut in chosen})


@pytest.mark.parametrize(
    "name", ["mobilenet_v2", "shufflenet_v2_x0_5", "squeezenet1_1", *(pytest.param(n, marks=pytest.mark.slow) for n in THIRTEEN)]
)
def test_random_cuts_of_every_family_are_exact(named_case, tmp_path, name):
    case = named_case(name)
    rng = random.Random(f"cuts of {name}")
    for _ in range(2):
        case.check(random_positions(case.program, rng), tmp_path)


def test_every_family_of_torchvision_is_tested():
    """So each exports to operators that stages may have: nothing needs a worker that builds an architecture by its name."""
    models = import_torchvision().models
    family = {name: models.get_model_builder(name).__module__ for name in models.list_models(module=models)}
    assert set(family.values()) == {family[name] for name in [*SMALL, *LARGE, *FAMILIES]}
    assert len(set(family.values())) >= 15


class Reader(nn.Module):
    """Of tokens and their mask: ints and bools in, two results out."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(90, 32), nn.Embedding(16, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.label, self.span = nn.Linear(32, 7), nn.Linear(32, 2)

    def forward(self, tokens, mask):
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        x = self.encoder(x, src_key_padding_mask=~mask)
        return {"label": self.label(x[:, 0]), "span": self.span(x).unbind(-1)}


def test_a_reader_of_tokens_is_exact_at_random_cuts(make_case, tmp_path):
    torch.manual_seed(0)
    case = make_case(Reader().eval(), torch.randint(0, 90, (2, 12)), torch.ones(2, 12, dtype=torch.bool))
    assert case.exported.is_exact and case.exported.is_batched
    rng = random.Random("cuts of the reader")
    for batch in (1, 3):
        tokens, mask = torch.randint(0, 90, (batch, 12)), torch.rand(batch, 12) < 0.7
        mask[:, 0] = True
        expected = case.eager((tokens, mask), {})
        for _ in range(4):
            answer = case.distributed(random_positions(case.program, rng), tmp_path, (tokens, mask), {})
            assert torch.equal(answer["label"], expected["label"])
            assert all(torch.equal(one, other) for one, other in zip(answer["span"], expected["span"], strict=True))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["mobilenet_v2", "vit_b_16", "swin_t", "convnext_tiny"])
def test_a_dozen_cuts_of_a_named_model_are_exact(named_case, tmp_path, name):
    case = named_case(name)
    cuts = legal_cuts(case.program)
    for cut in cuts[:: len(cuts) // 12]:
        case.check([cut.position], tmp_path)
        for file in tmp_path.iterdir():
            file.unlink()


def test_every_cut_of_a_model_with_branches_is_exact(branches, tmp_path):
    cuts = legal_cuts(branches.program)
    assert len(cuts) >= 10
    for cut in cuts:
        branches.check([cut.position], tmp_path)
    branches.check([cut.position for cut in cuts], tmp_path)  # every operator a stage of its own


def test_every_cut_of_a_transformer_encoder_is_exact(make_case, tmp_path):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    case = make_case(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), torch.randn(1, 10, 32))
    cuts = legal_cuts(case.program)
    assert len(cuts) > 30
    for cut in cuts:
        case.check([cut.position], tmp_path)
    case.check([cut.position for cut in cuts], tmp_path)


def test_recurrent_layers_and_embeddings_are_exact(make_case, tmp_path):
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(50, 8)
            self.lstm = nn.LSTM(8, 16, batch_first=True, bidirectional=True)
            self.out = nn.Linear(32, 5)

        def forward(self, tokens):
            return self.out(self.lstm(self.embedding(tokens.abs().long() % 50))[0])

    case = make_case(Tagger().eval(), torch.zeros(1, 12))
    for cut in legal_cuts(case.program):
        case.check([cut.position], tmp_path)


def test_channels_last_weights_keep_their_layout(make_case, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 4, 1))
    case = make_case(net.eval().to(memory_format=torch.channels_last), torch.randn(1, 3, 20, 20))
    for cut in legal_cuts(case.program):
        case.check([cut.position], tmp_path)
