"""How the tensors at an end of a stage are digested: by whoever has computed them, and by whoever knows what should come out.

The digest is xxh3-128 over a *mark* of each leaf: of a tensor its type, its shape and the xxh3-64 of its bytes, of a number its text.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import xxhash

PLAIN_LIMIT = 4096  # bytes of a mark


@lru_cache(1024)
def label(dtype: str, shape: tuple[int, ...]) -> bytes:
    """What a tensor's mark begins with."""
    return f"{dtype} {shape}".encode()


def tensor_mark(dtype: str, shape: tuple[int, ...], checksum: int) -> bytes:
    """`checksum`: xxh3-64 of the tensor's bytes, C-contiguous and little-endian."""
    return label(dtype, shape) + checksum.to_bytes(8, "big")


def plain_mark(value: object) -> bytes:
    return repr(value).encode()


def digest_of(marks: Iterable[bytes]) -> bytes:
    return xxhash.xxh3_128_digest(b"".join(marks))
