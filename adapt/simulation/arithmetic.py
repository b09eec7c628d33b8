"""What the simulated models compute: numbers that tell which stages of which program made them, in which order, and where.

An activation has three leaves: a value, a set of bits that names the numeric classes that had a part in it, and the nature of its input.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from enum import IntEnum

from adapt.protocol.ids import Digest
from adapt.protocol.messages import Leaf

_MASK = (1 << 62) - 1


class Nature(IntEnum):
    """What an input does to whoever computes with it."""

    PLAIN = 0
    POISON = 1  # the process dies
    WRONG = 2  # the model raises
    FRAGILE = 3  # the model raises on one kind of worker, and on no other


@functools.cache
def _salt(artifact: str) -> int:
    return zlib.crc32(artifact.encode()) * 2654435761 + 1


def computed(value: int, artifact: str) -> int:
    """The value after one stage."""
    mixed = (value * 6364136223846793005 + _salt(artifact)) & _MASK
    return mixed ^ (mixed >> 29)


def growth(artifact: str) -> int:
    """How many times the bytes of its input the output of a stage has."""
    return 1 + (_salt(artifact) >> 1 & 1)


def digest(value: int) -> bytes:
    """Of a stage's output."""
    return value.to_bytes(8, "big")


def result(value: int, artifacts: Sequence[Digest]) -> int:
    """The value after all stages."""
    for artifact in artifacts:
        value = computed(value, artifact)
    return value


def leaves(value: int, classes: int, nature: Nature) -> list[Leaf]:
    return [value, classes, int(nature)]


def understood(given: Sequence[Leaf]) -> tuple[int, int, Nature]:
    """Value, classes and nature of an activation."""
    value, classes, nature = given
    assert isinstance(value, int) and isinstance(classes, int) and isinstance(nature, int)
    return value, classes, Nature(nature)
