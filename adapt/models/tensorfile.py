"""One file of named tensors and text: the safetensors format, with every tensor aligned to 64 bytes.

    8 bytes   length of the header, little-endian
    header    JSON: key -> dtype, shape, [begin, end) counted from the end of the header; `__metadata__`: text -> text
    data      the tensors, one after the other, without a hole

The format allows no holes, so short `U8` tensors named `__pad__.N` fill the gaps that alignment needs. A mapped
tensor then has the alignment of torch's own allocations: some BLAS kernels choose their path, and so the last bits
of their result, by the address they are given.

Nothing here needs torch or numpy, and nothing is allocated before the sizes in the file have been checked.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapt.errors import WireError

ALIGNMENT_BYTES = 64
HEADER_LIMIT_BYTES = 32 * 2**20
FILE_LIMIT_BYTES = 2**40
RANK_LIMIT = 16
PIECE_BYTES = 2**20

# Our name of a dtype (torch's and numpy's) -> the name in the file, bytes of one item.
DTYPES: dict[str, tuple[str, int]] = {
    "bool": ("BOOL", 1),
    "uint8": ("U8", 1),
    "int8": ("I8", 1),
    "int16": ("I16", 2),
    "int32": ("I32", 4),
    "int64": ("I64", 8),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "float32": ("F32", 4),
    "float64": ("F64", 8),
}
_DTYPE_OF_TAG = {tag: dtype for dtype, (tag, _) in DTYPES.items()}
_PAD_PREFIX = "__pad__."


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies: `begin` counts from the start of the file, in bytes."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class TensorFile:
    """The checked header of a file: its texts and where its tensors lie."""

    path: Path
    file_bytes: int
    metadata: dict[str, str]
    tensors: dict[str, StoredTensor]


@dataclass(frozen=True, slots=True)
class TensorSource:
    """A tensor yet to be written. `pieces()` yields its bytes in order: C-contiguous, little-endian."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[bytes | bytearray | memoryview]]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][1]


def digest_of(path: Path | str) -> str:
    """SHA-256 of the file's bytes, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_tensor_file(path: Path | str) -> TensorFile:
    """Read and check the header of the file at `path`; its data is not touched.

    Raises:
        WireError: the file is not one that `write_tensor_file` could have written; the message names the place.
        OSError: the file cannot be opened.
    """
    path = Path(path)
    file_bytes = path.stat().st_size
    with open(path, "rb") as file:
        length_field = file.read(8)
        if len(length_field) < 8:
            raise WireError(f"{path.name}: {file_bytes} bytes are too few for a tensor file")
        header_bytes = int.from_bytes(length_field, "little")
        if header_bytes > HEADER_LIMIT_BYTES or 8 + header_bytes > file_bytes:
            raise WireError(f"{path.name}: a header of {header_bytes} bytes in a file of {file_bytes}")
        header = parse_json(file.read(header_bytes), path.name)
    if not isinstance(header, dict):
        raise WireError(f"{path.name}: the header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise WireError(f"{path.name}: __metadata__ does not map text to text")
    stored = [_read_entry(key, entry, 8 + header_bytes, path.name) for key, entry in header.items()]
    _check_tiling(stored, 8 + header_bytes, file_bytes, path.name)
    tensors = {tensor.key: tensor for tensor in stored if not tensor.key.startswith(_PAD_PREFIX)}
    return TensorFile(path, file_bytes, metadata, tensors)


def parse_json(text: bytes | str, name: str) -> Any:
    """Parse JSON that somebody else wrote. Raises WireError, and nothing else, for what is not JSON."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # ValueError covers bad UTF-8, bad JSON and endless digits
        raise WireError(f"{name}: not JSON: {str(error)[:200]}") from None


def canonical_json(document: Any) -> str:
    """One text per document, so that equal documents have equal digests."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def write_tensor_file(directory: Path | str, metadata: dict[str, str], tensors: Sequence[TensorSource]) -> tuple[Path, str, int]:
    """Write `<sha256>.safetensors` into `directory` in one streaming pass: temporary file, fsync, check, rename.

    A file that is already there under its digest is replaced by the same bytes, atomically.

    Returns:
        The path, the digest (hexadecimal) and the size in bytes.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=directory, prefix=".writing-", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            digest, file_bytes = _stream(file.write, metadata, tensors)
            os.fsync(file.fileno())
        written = read_tensor_file(temporary)
        if written.file_bytes != file_bytes or digest_of(temporary) != digest:
            raise OSError(f"{temporary}: what was read back differs from what was written")
        os.chmod(temporary, 0o644)  # mkstemp makes files private; a cache may be shared
        path = directory / f"{digest}.safetensors"
        os.replace(temporary, path)
        _sync_directory(directory)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path, digest, file_bytes


def copy_pieces(path: Path, tensor: StoredTensor) -> Iterator[bytes]:
    """The bytes of a stored tensor, in pieces: a model larger than the memory can be cut."""
    with open(path, "rb", buffering=0) as file:
        file.seek(tensor.begin)
        left = tensor.size_bytes
        while left:
            piece = file.read(min(left, PIECE_BYTES))
            if not piece:
                raise WireError(f"{path.name}: ends inside tensor {tensor.key!r}")
            left -= len(piece)
            yield piece


def _stream(write: Callable[[Any], Any], metadata: dict[str, str], tensors: Sequence[TensorSource]) -> tuple[str, int]:
    digest, file_bytes = hashlib.sha256(), 0

    def put(piece: bytes | bytearray | memoryview) -> None:
        nonlocal file_bytes
        view = memoryview(piece).cast("B") if len(piece) else memoryview(b"")
        digest.update(view)
        file_bytes += len(view)
        while len(view):  # an unbuffered file may take less than it is given, at most 2 GiB
            view = view[write(view) :]

    put(_header(metadata, tensors))
    for tensor in tensors:
        before = file_bytes
        for piece in tensor.pieces():
            put(piece)
        if file_bytes - before != tensor.size_bytes:
            raise ValueError(f"tensor {tensor.key!r} gave {file_bytes - before} bytes instead of {tensor.size_bytes}")
        put(bytes(-file_bytes % ALIGNMENT_BYTES))
    return digest.hexdigest(), file_bytes


def _header(metadata: dict[str, str], tensors: Sequence[TensorSource]) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for index, tensor in enumerate(tensors):
        if tensor.key in header or tensor.key.startswith(_PAD_PREFIX):
            raise ValueError(f"two tensors, or a tensor and padding, share the key {tensor.key!r}")
        end = offset + tensor.size_bytes
        header[tensor.key] = {
            "dtype": DTYPES[tensor.dtype][0],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end + -end % ALIGNMENT_BYTES
        if offset > end:
            header[f"{_PAD_PREFIX}{index}"] = {"dtype": "U8", "shape": [offset - end], "data_offsets": [end, offset]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode("ascii")
    text += b" " * (-(8 + len(text)) % ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text


def _read_entry(key: str, entry: Any, data_begin: int, name: str) -> StoredTensor:
    place = f"{name}: tensor {key[:100]!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise WireError(f"{place}: expected dtype, shape and data_offsets")
    tag, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = _DTYPE_OF_TAG.get(tag) if isinstance(tag, str) else None
    if dtype is None:
        raise WireError(f"{place}: dtype {str(tag)[:20]!r} is not one of {', '.join(_DTYPE_OF_TAG)}")
    if not _are_sizes(shape) or len(shape) > RANK_LIMIT:
        raise WireError(f"{place}: the shape is not a list of at most {RANK_LIMIT} sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise WireError(f"{place}: data_offsets is not [begin, end]")
    begin, end = offsets
    if end - begin != math.prod(shape) * DTYPES[dtype][1]:
        raise WireError(f"{place}: {end - begin} bytes for shape {tuple(shape)} of {dtype}")
    if (data_begin + begin) % ALIGNMENT_BYTES and not key.startswith(_PAD_PREFIX):
        raise WireError(f"{place}: not aligned to {ALIGNMENT_BYTES} bytes")
    return StoredTensor(key, dtype, tuple(shape), data_begin + begin, end - begin)


def _check_tiling(stored: list[StoredTensor], data_begin: int, file_bytes: int, name: str) -> None:
    """Tensors lie one after the other from the header to the end: no overlap, no hole, nothing outside."""
    position = data_begin
    for tensor in sorted(stored, key=lambda tensor: (tensor.begin, tensor.size_bytes)):
        if tensor.begin != position:
            raise WireError(f"{name}: tensor {tensor.key[:100]!r} begins at {tensor.begin}, the one before ends at {position}")
        position += tensor.size_bytes
    if position != file_bytes:
        raise WireError(f"{name}: the tensors end at {position}, the file at {file_bytes}")


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size <= FILE_LIMIT_BYTES for size in value)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _sync_directory(directory: Path) -> None:
    """A rename survives a power cut only when its directory is on the disk too."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
