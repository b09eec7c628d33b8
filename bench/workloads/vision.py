"""torchvision's models with random weights, inputs for them, and the answers of the user's own eager module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.harness.contest import Array

if TYPE_CHECKING:
    from torch import nn

SHAPE = (1, 3, 224, 224)
SEED = 0


def images(count: int, *, seed: int = 1, shape: tuple[int, ...] = SHAPE) -> list[Array]:
    """Inputs that differ; their content does not change how long anything takes."""
    random = np.random.default_rng(seed)
    return [random.standard_normal(shape, np.float32) for _ in range(count)]


def eager(model: str) -> nn.Module:
    """What `client.deploy("torchvision/...", seed=0)` is made of, built without ADAPT's interpreter."""
    import torch

    from adapt.models.vision import import_torchvision  # only the import that CPU-only torch needs

    models: Any = import_torchvision().models
    torch.manual_seed(SEED)
    module: nn.Module = getattr(models, model)(weights=None)
    return module.eval()


def answers(model: str, inputs: Sequence[Array], *, threads: int) -> list[Array]:
    """What the eager module says, in a process of its own with this number of threads."""
    from bench.contestants.gang import Eager, Gang

    with Gang("reference", [Eager(model, threads)]) as gang:
        return gang.run(inputs, in_flight=1).outputs
