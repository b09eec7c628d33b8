"""Users' own modules, with inputs and outputs of every kind, at each of their legal cuts."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from adapt.errors import ExportError
from adapt.models.cut import legal_cuts, write_stages
from adapt.models.export import export_module
from adapt.models.interface import Interface
from adapt.models.interpreter import Stage
from adapt.models.program import unflatten


class Attention(nn.Module):
    """With both kinds of masks; weights among the results."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.register_buffer("later", torch.ones(6, 6, dtype=torch.bool).triu(1))

    def forward(self, x, padding):
        out, weights = self.attention(x, x, x, key_padding_mask=padding, attn_mask=self.later, average_attn_weights=False)
        return [out, weights]


class Biased(nn.Module):
    """A mask of numbers, of the caller; queries and keys of unlike lengths."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True, kdim=8, vdim=8, add_bias_kv=True)

    def forward(self, query, memory, bias):
        return self.attention(query, memory, memory, attn_mask=bias.repeat_interleave(2, 0), need_weights=False)[0]


class Translator(nn.Module):
    """Tokens of two languages; an encoder and a decoder with a mask that both need."""

    def __init__(self, is_causal=True):
        super().__init__()
        self.is_causal = is_causal
        self.source, self.target = nn.Embedding(30, 16), nn.Embedding(40, 16, padding_idx=0)
        self.body = nn.Transformer(16, 2, 1, 1, 32, batch_first=True)
        self.out = nn.Linear(16, 40)

    def forward(self, source, target):
        mask = nn.Transformer.generate_square_subsequent_mask(5)
        padding = source == 0
        hidden = self.body(
            self.source(source), self.target(target), tgt_mask=mask, src_key_padding_mask=padding, tgt_is_causal=self.is_causal
        )
        return {"logits": self.out(hidden), "tokens": self.out(hidden).argmax(-1)}


class Reader(nn.Module):
    """Tokens and what kind they are, by name; dicts in and out."""

    def __init__(self):
        super().__init__()
        self.words, self.kinds = nn.Embedding(50, 16), nn.Embedding(3, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.pool = nn.Linear(16, 16)

    def forward(self, batch, *, kinds=None, scale=1.0):
        x = self.words(batch["tokens"]) * scale
        if kinds is not None:
            x = x + self.kinds(kinds)
        x = self.encoder(x, src_key_padding_mask=batch["mask"].logical_not())
        return {"last": x, "pooled": (self.pool(x[:, 0]).tanh(), batch["mask"].sum(1))}


class State(NamedTuple):
    hidden: torch.Tensor
    cell: torch.Tensor


class Tagger(nn.Module):
    """State that the caller keeps; a namedtuple comes back."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.lstm, self.out = nn.LSTM(8, 12, batch_first=True), nn.Linear(12, 5)

    def forward(self, tokens, state):
        hidden, cell = (tensor.unsqueeze(0) for tensor in state)
        x, (hidden, cell) = self.lstm(self.embedding(tokens), (hidden, cell))
        return self.out(x), State(hidden.squeeze(0), cell.squeeze(0))


class Recommender(nn.Module):
    """Bags of ids, doubles, and flags."""

    def __init__(self):
        super().__init__()
        self.items = nn.Embedding(60, 8)
        self.mix = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, 3))

    def forward(self, ids, figures, flags):
        bag = (self.items(ids) * (ids != 0).unsqueeze(-1)).sum(1)
        x = torch.cat([bag, figures.float(), flags.to(torch.float32)], 1)
        return (self.mix(x), ids.max(1).values, [flags.any(1), {"rows": ids.shape[0], "none": None}])


class Averages(nn.Module):
    """Several ways into one place, and results of unlike depth."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv1d(4, 8, 3, padding=1), nn.GRU(4, 8, batch_first=True)
        self.gate = nn.Bilinear(8, 8, 6)

    def forward(self, x):
        left = self.left(x.transpose(1, 2)).mean(-1)
        right = self.right(x)[1][0]
        return self.gate(left, right), (left, (right,))


def ints(high, *shape):
    return lambda batch: torch.randint(0, high, (batch, *shape))


def floats(*shape, dtype=torch.float32):
    return lambda batch: torch.randn(batch, *shape, dtype=dtype)


def mask(*shape):
    """At least the first is true."""

    def made(batch):
        return (torch.rand(batch, *shape) < 0.6).index_fill(1, torch.tensor([0]), True)

    return made


def padding(length):
    return lambda batch: ~mask(length)(batch)


CASES = {
    "attention": (Attention, (floats(6, 16), padding(6)), {}, 5),
    "biased-attention": (Biased, (floats(3, 16), floats(6, 8), floats(3, 6)), {}, 5),
    "translator": (Translator, (ints(30, 7), ints(40, 5)), {}, 30),
    "reader": (Reader, ({"tokens": ints(50, 6), "mask": mask(6)},), {"kinds": ints(3, 6)}, 15),
    "tagger": (Tagger, (ints(20, 6), (floats(12), floats(12))), {}, 2),
    "recommender": (Recommender, (ints(60, 9), floats(2, dtype=torch.float64), mask(2)), {}, 5),
    "averages": (Averages, (floats(7, 4),), {}, 3),
}


SLOW = ("translator", "reader", "tagger")


def call(made, batch):
    return pytree.tree_map_only(type(floats()), lambda make: make(batch), made)


def run(case, positions, directory, calls):
    """The answers of the stages to calls, each stage given fresh copies, as if they had travelled."""
    stages = [Stage.load(artifact.path) for artifact in write_stages(case.program, positions, directory)]
    for args, kwargs in calls:
        values = Interface.of(case.program).match(args, kwargs)
        for stage in stages:
            values = stage.run([value.clone() if isinstance(value, torch.Tensor) else value for value in values])
        yield unflatten(case.program.output_structure, values)


def are_equal(ours, theirs):
    if isinstance(theirs, torch.Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    return ours == theirs


def form_of(spec):
    """Of a namedtuple the name of its class: whoever is without the user's code has another class of that name."""
    return re.sub(r"<class '[\w.]*\b(\w+)'>", r"\1", str(spec))


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES])
def test_a_module_of_ones_own_is_exact_at_every_cut(make_case, tmp_path, name):
    kind, args, kwargs, least = CASES[name]
    torch.manual_seed(0)
    example_args, example_kwargs = call((args, kwargs), 2)
    case = make_case(kind().eval(), *example_args, **example_kwargs)
    assert case.exported.is_exact and case.exported.is_batched
    positions = [cut.position for cut in legal_cuts(case.program)]
    assert len(positions) >= least
    calls = [call((args, kwargs), batch) for batch in (1, 3)]
    truth = [pytree.tree_flatten(case.eager(*given)) for given in calls]
    for chosen in [[], *([position] for position in positions), positions]:  # the last: every operator a stage of its own
        for answer, (expected, form) in zip(run(case, chosen, tmp_path, calls), truth, strict=True):
            leaves, form_here = pytree.tree_flatten(answer)
            assert form_of(form_here) == form_of(form)
            assert all(map(are_equal, leaves, expected)), f"{name}, cut at {chosen}"


def test_a_mask_whose_values_torch_looks_at_gets_advice(tmp_path):
    with pytest.raises(ExportError, match=r"cannot trace Translator: .*say so in the call \(is_causal=, tgt_is_causal=\)"):
        export_module(Translator(None), (ints(30, 7)(2), ints(40, 5)(2)), directory=tmp_path)
