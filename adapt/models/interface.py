"""What a caller must know of a deployed model: its inputs, its outputs and how they are nested. No torch, no weights.

A client gets it as JSON with the deployment, checks inputs against it before anything is sent, and puts results together by it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from adapt.errors import InputMismatchError, WireError
from adapt.models.forms import InputCheck, bind_arguments
from adapt.models.program import Program, ValueSpec, spec_from_plain, spec_to_plain
from adapt.models.structure import Leaf, Node, Structure, count_leaves, flatten, from_plain, to_plain, unflatten
from adapt.models.tensorfile import canonical_json, parse_json


def interface_digest(text: str) -> str:
    """What tells the interfaces of two versions apart: of the text that `to_json` wrote."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Interface:
    """See `Program`, of which this is the outside. `inputs` and `outputs` describe the leaves, in order."""

    parameters: tuple[str, ...]
    inputs: tuple[ValueSpec, ...]
    input_structure: Structure
    outputs: tuple[ValueSpec, ...]
    output_structure: Structure
    batch_limit: int | None
    _check: InputCheck = field(init=False, repr=False, compare=False)
    _is_flat: bool = field(init=False, repr=False, compare=False)  # takes its leaves one by one, by position

    def __post_init__(self) -> None:
        object.__setattr__(self, "_check", InputCheck(self.inputs, batch_limit=self.batch_limit))
        match self.input_structure:
            case Node(items=(Node(items=positional), Node(items=()))):
                is_flat = all(isinstance(item, Leaf) for item in positional)
            case _:
                is_flat = False
        object.__setattr__(self, "_is_flat", is_flat)

    @classmethod
    def of(cls, program: Program) -> Interface:
        return cls(
            program.parameters,
            program.graph.input_specs,
            program.input_structure,
            program.graph.output_specs,
            program.output_structure,
            program.batch_limit,
        )

    @classmethod
    def from_json(cls, text: str) -> Interface:
        """The interface that `to_json` wrote; anything else raises WireError."""
        match parse_json(text, "interface"):
            case {
                "parameters": list() as parameters,
                "inputs": list() as inputs,
                "input_structure": input_structure,
                "outputs": list() as outputs,
                "output_structure": output_structure,
                "batch_limit": (None | int()) as batch_limit,
            }:
                interface = cls(
                    tuple(map(str, parameters)),
                    tuple(spec_from_plain(item, f"interface: inputs[{i}]") for i, item in enumerate(inputs)),
                    from_plain(input_structure, "interface: input_structure"),
                    tuple(spec_from_plain(item, f"interface: outputs[{i}]") for i, item in enumerate(outputs)),
                    from_plain(output_structure, "interface: output_structure"),
                    batch_limit,
                )
            case _:
                raise WireError("interface: not the description of a model's inputs and outputs")
        pairs = ((interface.input_structure, interface.inputs), (interface.output_structure, interface.outputs))
        if any(count_leaves(structure) != len(specs) for structure, specs in pairs):
            raise WireError("interface: structures and leaves do not agree")
        return interface

    def to_json(self) -> str:
        return canonical_json(
            {
                "parameters": list(self.parameters),
                "inputs": [spec_to_plain(spec) for spec in self.inputs],
                "input_structure": to_plain(self.input_structure),
                "outputs": [spec_to_plain(spec) for spec in self.outputs],
                "output_structure": to_plain(self.output_structure),
                "batch_limit": self.batch_limit,
            }
        )

    def match(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The leaves of a call `model(*args, **kwargs)`, in order.

        Args:
            args: numpy arrays or torch tensors, nested as in the example that the program was exported with.
            kwargs: the same; a parameter may be given by name that was exported by position.

        Raises:
            InputMismatchError: nesting, dtype or shape of an input differ; the message names what was expected and got.
        """
        if self._is_flat and not kwargs and len(args) == len(self.inputs):
            leaves = list(args)
        else:
            bound_args, bound_kwargs = bind_arguments(self, list(args), dict(kwargs))
            leaves = flatten(self.input_structure, (tuple(bound_args), bound_kwargs), "input")
        self._check(leaves)
        return leaves

    def assemble(self, leaves: Sequence[Any]) -> Any:
        """The result whose leaves these are, nested as the module's own output."""
        if len(leaves) != len(self.outputs):
            raise InputMismatchError(f"expected {len(self.outputs)} outputs, got {len(leaves)}")
        return unflatten(self.output_structure, leaves)
