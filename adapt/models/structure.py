"""How tensors are nested in a model's arguments and results: a tree as plain data, without torch.

A structure is `Leaf`, `Constant` or `Node`; its leaves are numbered from left to right. `flatten` takes a value
apart by a structure, `unflatten` puts one together.
"""

from __future__ import annotations

import keyword
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from adapt.errors import InputMismatchError, WireError

DEPTH_LIMIT = 64
KINDS = ("tuple", "list", "dict", "ordereddict", "namedtuple")


@dataclass(frozen=True, slots=True)
class Leaf:
    """A tensor, or a size."""


@dataclass(frozen=True, slots=True)
class Constant:
    """A plain value (None, bool, int, float, str) that the program was exported with."""

    value: None | bool | int | float | str


@dataclass(frozen=True, slots=True)
class Node:
    """A container. `keys`: of a dict, or the field names of a namedtuple, whose class is called `name`."""

    kind: str
    items: tuple[Structure, ...]
    keys: tuple[str | int, ...] = ()
    name: str = ""


Structure: TypeAlias = Leaf | Constant | Node


def flatten(structure: Structure, value: Any, place: str = "input") -> list[Any]:
    """The leaves of `value`, in the order of `structure`.

    Raises:
        InputMismatchError: `value` is nested differently, or differs in a constant; the message names the place.
    """
    return list(_leaves(structure, value, place))


def unflatten(structure: Structure, leaves: Sequence[Any]) -> Any:
    """The value whose leaves are `leaves`; there must be as many as `count_leaves` says."""
    rest = iter(leaves)
    value = _build(structure, lambda: next(rest))
    if next(rest, structure) is not structure:
        raise ValueError(f"{len(leaves)} leaves for a structure of {count_leaves(structure)}")
    return value


def count_leaves(structure: Structure) -> int:
    match structure:
        case Leaf():
            return 1
        case Constant():
            return 0
        case Node(items=items):
            return sum(count_leaves(item) for item in items)


def to_plain(structure: Structure) -> Any:
    """JSON form: `"leaf"`, `["constant", value]` or `[kind, items, keys, name]`."""
    match structure:
        case Leaf():
            return "leaf"
        case Constant(value=value):
            return ["constant", value]
        case Node(kind=kind, items=items, keys=keys, name=name):
            return [kind, [to_plain(item) for item in items], list(keys), name]


def from_plain(document: Any, place: str, depth: int = 0) -> Structure:
    """The structure that `to_plain` wrote; raises WireError naming `place` for anything else."""
    if document == "leaf":
        return Leaf()
    if depth > DEPTH_LIMIT:
        raise WireError(f"{place}: nested more than {DEPTH_LIMIT} deep")
    match document:
        case ["constant", None | bool() | int() | float() | str() as value]:
            return Constant(value)
        case [str() as kind, list() as items, list() as keys, str() as name] if kind in KINDS:
            node = Node(
                kind,
                tuple(from_plain(item, f"{place}.{kind}[{index}]", depth + 1) for index, item in enumerate(items)),
                tuple(keys),
                name,
            )
            _check_node(node, place)
            return node
    raise WireError(f"{place}: not a structure")


def _check_node(node: Node, place: str) -> None:
    if not all(type(key) in (str, int) for key in node.keys) or len(set(node.keys)) != len(node.keys):
        raise WireError(f"{place}: keys are not distinct texts or ints")
    if len(node.keys) != (0 if node.kind in ("tuple", "list") else len(node.items)):
        raise WireError(f"{place}: {len(node.keys)} keys for {len(node.items)} items of a {node.kind}")
    # namedtuple() compiles its field names: let nothing but plain names reach it.
    if node.kind == "namedtuple" and not all(is_field_name(name) for name in (node.name, *node.keys)):
        raise WireError(f"{place}: not names of a namedtuple")


def is_field_name(name: Any) -> bool:
    return isinstance(name, str) and name.isidentifier() and name.isascii() and not keyword.iskeyword(name) and not name.startswith("_")


def _leaves(structure: Structure, value: Any, place: str) -> Iterator[Any]:
    match structure:
        case Leaf():
            yield value
        case Constant(value=constant):
            if type(value) is not type(constant) or value != constant:
                raise InputMismatchError(f"{place}: the model was exported with {constant!r}, got {_describe(value)}")
        case Node(kind="tuple" | "list" | "namedtuple", items=items):
            if not isinstance(value, (tuple, list)) or len(value) != len(items):
                raise InputMismatchError(f"{place}: expected a {structure.kind} of {len(items)}, got {_describe(value)}")
            for index, (item, part) in enumerate(zip(items, value, strict=True)):
                yield from _leaves(item, part, f"{place}[{index}]")
        case Node(items=items, keys=keys):
            if not isinstance(value, dict) or set(value) != set(keys):
                raise InputMismatchError(f"{place}: expected a dict with keys {list(keys)}, got {_describe(value)}")
            for key, item in zip(keys, items, strict=True):
                yield from _leaves(item, value[key], f"{place}[{key!r}]")


def _describe(value: Any) -> str:
    if isinstance(value, dict):
        return f"a dict with keys {list(value)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"{type(value).__name__} {str(value)[:40]!r}"


def _build(structure: Structure, take: Callable[[], Any]) -> Any:
    match structure:
        case Leaf():
            return take()
        case Constant(value=value):
            return value
        case Node(kind=kind, items=items, keys=keys, name=name):
            built = [_build(item, take) for item in items]
    match kind:
        case "tuple":
            return tuple(built)
        case "list":
            return built
        case "dict":
            return dict(zip(keys, built, strict=True))
        case "ordereddict":
            return OrderedDict(zip(keys, built, strict=True))
        case _:
            return namedtuple(name, [str(key) for key in keys])(*built)
