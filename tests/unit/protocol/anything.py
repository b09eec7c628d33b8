"""Hypothesis strategies for every message of the conversation, made from the messages' own types."""

from __future__ import annotations

import types
import typing
from typing import Annotated, Any

import msgspec
from hypothesis import strategies as st
from msgspec.structs import fields, replace

from adapt.protocol.codecs import TensorHeader
from adapt.protocol.messages import BY_KIND, HELLOS, PROTOCOL_VERSION, ArtifactPiece, LinkEcho, LinkProbe, Message
from adapt.protocol.wire import Blob, Buffer

KINDS = sorted(BY_KIND.values(), key=lambda kind: kind.__name__)
NUMBERS = st.integers(0, 2**63 - 1)
TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
FACTS = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | TEXT | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


def of_type(declared: Any) -> st.SearchStrategy[Any]:
    """Values of a type as messages declare it."""
    origin, inner = typing.get_origin(declared), typing.get_args(declared)
    if origin is Annotated:
        return _bounded(inner[0], [meta for meta in inner[1:] if isinstance(meta, msgspec.Meta)])
    if origin in (typing.Union, types.UnionType):
        return st.one_of([of_type(one) for one in inner])
    if origin is typing.Literal:
        return st.sampled_from(inner)
    if origin is list:
        return st.lists(of_type(inner[0]), max_size=3)
    if origin is tuple:
        return st.lists(of_type(inner[0]), max_size=3).map(tuple)
    if origin is dict:
        return st.dictionaries(TEXT, of_type(inner[1]), max_size=3)
    if isinstance(declared, type) and issubclass(declared, msgspec.Struct):
        hints = typing.get_type_hints(declared, include_extras=True)
        return st.builds(declared, **{field.name: of_type(hints[field.name]) for field in fields(declared)})
    if isinstance(declared, type) and issubclass(declared, tuple):  # a NamedTuple
        hints = typing.get_type_hints(declared, include_extras=True)
        return st.builds(declared, *(of_type(hints[name]) for name in declared._fields))
    return {
        Any: FACTS,
        int: st.integers(-(2**63), 2**64 - 1),
        float: st.floats(allow_nan=False),
        str: TEXT,
        bytes: st.binary(max_size=8),
    }.get(declared, st.booleans() if declared is bool else st.none())


def _bounded(declared: Any, metas: list[msgspec.Meta]) -> st.SearchStrategy[Any]:
    bounds: dict[str, Any] = {}
    for meta in metas:
        bounds |= {
            name: value for name in ("ge", "le", "pattern", "min_length", "max_length") if (value := getattr(meta, name)) is not None
        }
    longest = min(bounds.get("max_length", 8), max(8, bounds.get("min_length", 0)))
    if "pattern" in bounds:
        return st.from_regex(bounds["pattern"].replace("]*", "]{0,8}"))
    if declared is int:
        return st.integers(bounds["ge"], bounds["le"])
    if declared is float:
        return st.floats(bounds["ge"], bounds["le"])
    if declared is str:
        return st.text(st.characters(codec="utf-8"), min_size=bounds.get("min_length", 0), max_size=longest)
    if declared is bytes:
        return st.binary(min_size=bounds.get("min_length", 0), max_size=longest)
    return of_type(declared)


@st.composite
def messages(draw: st.DrawFn, kinds: Any = KINDS, payloads: st.SearchStrategy[bytes] | None = None) -> tuple[Message, tuple[Blob, ...]]:
    """A message and the blobs that belong to it."""
    kind = draw(st.sampled_from(kinds))
    message = draw(_strategy(kind))
    payload = payloads if payloads is not None else st.binary(max_size=64)
    if kind in (ArtifactPiece, LinkProbe, LinkEcho):
        return message, (draw(blobs(payload)),)
    if "leaves" not in _NAMES[kind]:
        return message, ()
    leaves, carried = [], []
    for leaf in message.leaves:
        if isinstance(leaf, TensorHeader):
            carried.append(draw(blobs(payload)))
            leaf = replace(leaf, payload_bytes=carried[-1].size)
        leaves.append(leaf)
    return replace(message, leaves=leaves), tuple(carried)


@st.composite
def blobs(draw: st.DrawFn, payload: st.SearchStrategy[bytes]) -> Blob:
    """A blob in some parts, empty ones among them."""
    data = draw(payload)
    whole = Blob.of(data)
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=4)))
    parts: list[Buffer] = [memoryview(data)[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    return Blob(whole.size, whole.checksum, tuple(parts))


_NAMES = {kind: [field.name for field in fields(kind)] for kind in KINDS}


def _strategy(kind: Any) -> st.SearchStrategy[Any]:
    if kind not in _STRATEGIES:
        hints = typing.get_type_hints(kind, include_extras=True)
        made = {name: of_type(hints[name]) for name in _NAMES[kind]}
        if kind in HELLOS:
            made["protocol_version"] = st.just(PROTOCOL_VERSION)
        _STRATEGIES[kind] = st.builds(kind, **made)
    return _STRATEGIES[kind]


_STRATEGIES: dict[Any, st.SearchStrategy[Any]] = {}
