"""Models for the tests of this room: each is built and exported once per session."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from adapt.models.cut import write_stages
from adapt.models.export import ExportedProgram, export_module
from adapt.models.interface import Interface
from adapt.models.interpreter import Stage
from adapt.models.program import Program, read_program, unflatten
from adapt.models.sources import build_named_model


class Branches(nn.Module):
    """Skip connections, several inputs, channels last inside, batch sizes as ints, results in a dict and a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.norm = nn.LayerNorm(8)
        self.mix = nn.Linear(8, 8)
        self.late = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.register_buffer("grid", torch.arange(6.0).reshape(1, 1, 6, 1), persistent=False)

    def forward(self, image: torch.Tensor, scale: torch.Tensor, *, offset: torch.Tensor) -> dict[str, Any]:
        x = self.stem(image)
        skip = x
        x = self.mix(self.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)  # channels last from here
        x = self.late(x)
        x += skip
        left, right = x.chunk(2, dim=1)
        flat = (left + self.grid.cos()).reshape(x.shape[0], -1)
        return {"pair": (flat * scale, right + offset[:, :, None, None]), "batch": x.shape[0], "none": None}


@dataclass
class Case:
    """A module beside its program."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    exported: ExportedProgram
    program: Program

    def batch_of(self, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Other inputs, of another batch size."""
        generator = torch.Generator().manual_seed(batch)

        def other(leaf: torch.Tensor) -> torch.Tensor:
            return torch.randn((batch, *leaf.shape[1:]), generator=generator)

        return tuple(map(other, self.args)), {name: other(leaf) for name, leaf in self.kwargs.items()}

    def eager(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with torch.inference_mode():
            return self.module.eval()(*args, **kwargs)

    def distributed(self, positions: list[int], directory: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The answer of the stages, each given fresh copies, as if they had travelled."""
        values = Interface.of(self.program).match(args, kwargs)
        for artifact in write_stages(self.program, positions, directory):
            values = [value.clone() if isinstance(value, torch.Tensor) else value for value in values]
            values = Stage.load(artifact.path).run(values)
        return unflatten(self.program.output_structure, values)

    def check(self, positions: list[int], directory: Any, batches: tuple[int, ...] = (1, 3)) -> None:
        """The stages give the module's own answer: the same structure, the same bits."""
        for batch in batches:
            args, kwargs = self.batch_of(batch)
            actual, actual_spec = pytree.tree_flatten(self.distributed(positions, directory, args, kwargs))
            expected, expected_spec = pytree.tree_flatten(self.eager(args, kwargs))
            assert actual_spec == expected_spec
            for ours, theirs in zip(actual, expected, strict=True):
                if isinstance(theirs, torch.Tensor):
                    assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), f"cut at {positions}, batch {batch}"
                else:
                    assert ours == theirs


@pytest.fixture(scope="session", autouse=True)
def one_thread_without_fast_path():
    """The reference's numeric class: one thread, and attention without its fused kernel."""
    threads, fastpath = torch.get_num_threads(), torch.backends.mha.get_fastpath_enabled()
    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.set_num_threads(threads)
    torch.backends.mha.set_fastpath_enabled(fastpath)


@pytest.fixture(scope="session")
def make_case(tmp_path_factory):
    """A function from a module and its example to a `Case`."""

    def make(module: nn.Module, *args: Any, repetitions: int = 1, **kwargs: Any) -> Case:
        directory = tmp_path_factory.mktemp("programs")
        exported = export_module(module, args, kwargs, directory=directory, profile_repetitions=repetitions)
        return Case(module, args, kwargs, exported, read_program(exported.path))

    return make


@pytest.fixture(scope="session")
def named_case(make_case):
    """A function from a torchvision name to its `Case`, kept while the session lasts."""
    cases: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in cases:
            module, example = build_named_model(name, seed=0)
            cases[name] = make_case(module, example)
        return cases[name]

    return get


@pytest.fixture(scope="session")
def branches(make_case) -> Case:
    torch.manual_seed(0)
    return make_case(Branches().eval(), torch.randn(1, 3, 6, 6), torch.randn(1, 1), offset=torch.randn(1, 4))
