"""A small convolutional network, trained here on scikit-learn's digits, and the activations that it really sends.

    images ─▶ wide: conv, ReLU ─▶ half: conv by 2, ReLU ─▶ skip: conv, +, ReLU ─▶ deep: conv by 2, ReLU ─▶ pool, linear ─▶ logits
                             └ cut                   └ cut                  └ cut                    └ cut

Codecs care about what they are given: random weights give no such zeros, spreads and edges as training does. The digits (8 x 8 pixels,
handwritten, part of scikit-learn: nothing is downloaded) are enlarged, at the most to 64 x 64, where the first activation has 0.8 MB.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F

from bench.harness.contest import Array

CUTS = ("wide", "half", "skip", "deep")
BATCH = 32
LEARNING_RATE = 2e-3


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs, momentum=0.3))


class Skip(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution = _convolution(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.convolution(x))


def network() -> nn.Sequential:
    """Cut points lie between its children, in the order of `CUTS`."""
    return nn.Sequential(
        nn.Sequential(_convolution(1, 48), nn.ReLU()),
        nn.Sequential(_convolution(48, 64, stride=2), nn.ReLU()),
        Skip(64),
        nn.Sequential(_convolution(64, 96, stride=2), nn.ReLU()),
        nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(96 * 16, 10)),
    )


@dataclass(frozen=True, slots=True)
class Split:
    """Images (count, 1, side, side) from 0 to 1, and their digits."""

    images: torch.Tensor
    labels: torch.Tensor


def digits(side: int) -> tuple[Split, Split]:
    """To train with, and to test with: a fifth of all, 360."""
    bunch: Any = load_digits()
    images = torch.from_numpy(bunch.images.astype(np.float32) / 16.0).unsqueeze(1)
    images = F.interpolate(images, (side, side), mode="bilinear", align_corners=False)
    train, test = train_test_split(np.arange(len(images)), test_size=0.2, random_state=0, stratify=bunch.target)
    labels = torch.from_numpy(bunch.target)
    return Split(images[train], labels[train]), Split(images[test], labels[test])


def trained(split: Split, *, epochs: int, seed: int = 0) -> nn.Sequential:
    """Train from scratch; the same seed gives the same network on the same machine."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network()
        optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
        for _ in range(epochs):
            for chosen in torch.randperm(len(split.images)).split(BATCH):
                optimizer.zero_grad()
                F.cross_entropy(model(split.images[chosen]), split.labels[chosen]).backward()
                optimizer.step()
    return model.eval()


@dataclass(frozen=True, slots=True)
class Cut:
    """What crosses one cut.

    Attributes:
        name: "64 px, wide".
        activations: one message for each test image, each with a batch of 1.
        labels: the right digits.
    """

    name: str
    activations: Sequence[Array]
    labels: Array
    rest: nn.Sequential

    @property
    def message_bytes(self) -> int:
        return int(self.activations[0].nbytes)

    def top1(self, activations: Sequence[Array]) -> Array:
        """The digits that the rest of the network reads out of these activations."""
        with torch.inference_mode():
            parts = [torch.from_numpy(np.concatenate(activations[at : at + BATCH])) for at in range(0, len(activations), BATCH)]
            return np.concatenate([self.rest(part).argmax(1).numpy() for part in parts])


def cuts_of(model: nn.Sequential, split: Split, side: int) -> list[Cut]:
    """The activations of every image at every cut."""
    cuts, labels = [], split.labels.numpy()
    with torch.inference_mode():
        batches = list(split.images.split(1))
        for position, name in enumerate(CUTS, start=1):
            batches = [model[position - 1](batch) for batch in batches]
            cuts.append(Cut(f"{side} px, {name}", [batch.numpy() for batch in batches], labels, model[position:]))
    return cuts
