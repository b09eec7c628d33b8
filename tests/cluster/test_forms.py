"""Stages whose outputs have another form for a batch of one: their description says so of no batch, and their answers are right."""

from __future__ import annotations

import pytest
import torch

import adapt


class Scores(torch.nn.Module):
    """One number for each row; `squeeze` makes of a batch of one no vector but a number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 1)

    def forward(self, x):
        return self.layer(x).squeeze()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_batch_of_one_may_have_a_form_of_its_own(workers):
    module = Scores().eval()
    with adapt.LocalCluster(workers=workers) as cluster, adapt.Client(cluster.address) as client, torch.inference_mode():
        model = client.deploy(module, example_inputs=(torch.ones(4, 3),), stages=1, name="scores")
        for _ in range(3):
            for batch in (2, 1, 5):
                x = torch.randn(batch, 3)
                y = model(x)
                assert y.shape == module(x).shape and torch.equal(y, module(x))
        counted = client.status().counters
        assert counted["misfits"] <= 1 and counted.get("breakers_opened", 0) == 0
