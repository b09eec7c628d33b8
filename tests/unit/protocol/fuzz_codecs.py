"""Throws malformed headers and buffers at `codecs.decode`; run by test_codecs.py in a process of its own.

A process of its own, because a decoder that reads foreign memory dies by a signal, and that is a finding. Its memory is
limited, so that a bomb is one too. Exit status 0: everything was answered with an array or a `WireError`.
"""

from __future__ import annotations

import random
import resource
import sys
import traceback
import warnings
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import asdict

from adapt.errors import WireError
from adapt.protocol import codecs

LIMIT_BYTES = 1 << 20
SPARE_BYTES = 256 << 20
SIZES = [0, 1, 3, 4, 7, 8, 56, 255, 2**16, 2**20, 2**31, 2**32, 2**48, 2**63, 2**64, -1]
NUMBERS = [0.0, -0.0, 1.0, 1e-300, 1e300, 5e-324, -1.0, float("inf"), float("nan"), 0.1]


def good_messages(rng: np.random.Generator) -> list[tuple[codecs.TensorHeader, bytes]]:
    smooth = np.cumsum(rng.standard_normal((2, 3, 20, 28)), axis=-1)
    arrays = [smooth.astype(np.float32), smooth, smooth[:1, :1, :7, :7].astype(np.float32), np.zeros((3, 500), np.int8)]
    arrays += [np.array(1.5), np.empty((0, 4), np.float16), np.zeros(9, bool)]
    encoded = [codecs.encode(array, codec=codec, tolerance=0.1) for array in arrays for codec in codecs.CODECS]
    return [(header, bytes(payload)) for header, payload in encoded]


def mutated_header(draw: random.Random, header: codecs.TensorHeader) -> dict[str, Any]:
    fields: dict[str, Any] = asdict(header)
    for _ in range(draw.choice((0, 1, 1, 2))):
        match draw.randrange(6):
            case 0:
                fields["dtype"] = draw.choice([*codecs.DTYPES, "object", ">f4", "complex64", "", "x" * 99])
            case 1:
                fields["shape"] = [draw.choice(SIZES) for _ in range(draw.randrange(10))]
            case 2:
                fields["codec"] = draw.choice([*codecs.CODECS, "auto", "zip", ""])
            case 3:
                fields[draw.choice(("payload_bytes", "zfp_bytes"))] = draw.choice(SIZES)
            case 4:
                fields["bound"] = draw.choice(NUMBERS)
            case _:
                fields["zfp_bytes"] = fields["zfp_bytes"] + draw.choice((-8, -1, 1, 8, 4096))
    return fields


def mutated_payload(draw: random.Random, payload: bytes) -> bytes:
    body = bytearray(payload)
    match draw.randrange(6):
        case 0:
            del body[draw.randrange(len(body) + 1) :]
        case 1:
            body += draw.randbytes(draw.randrange(64))
        case 2:
            for _ in range(draw.randrange(1, 9) if body else 0):
                body[draw.randrange(len(body))] ^= 1 << draw.randrange(8)
        case 3:
            body[:] = draw.randbytes(len(body))
        case 4:
            body[:] = bytes([draw.choice((0, 255))]) * len(body)
        case _:
            pass
    return bytes(body)


def main(seed: int, rounds: int) -> int:
    warnings.simplefilter("error")
    draw, messages = random.Random(seed), good_messages(np.random.default_rng(seed))
    with open("/proc/self/statm") as statm:
        used_bytes = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used_bytes + SPARE_BYTES, used_bytes + SPARE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    refused = decoded = 0
    for _ in range(rounds):
        header, payload = draw.choice(messages)
        fields, body = mutated_header(draw, header), mutated_payload(draw, payload)
        if draw.random() < 0.7:  # else the length check answers nearly everything
            fields["payload_bytes"] = len(body)
            if fields["codec"] == "zfp":
                fields["zfp_bytes"] = len(body)
        try:
            array = codecs.decode(msgspec.convert(fields, codecs.TensorHeader), body, limit_bytes=LIMIT_BYTES)
        except (WireError, msgspec.ValidationError):
            refused += 1
        except BaseException:
            print(f"seed {seed}: {fields} with {len(body)} bytes {body[:64].hex()}", file=sys.stderr)
            traceback.print_exc()
            return 1
        else:
            assert array.shape == tuple(fields["shape"]) and array.nbytes <= LIMIT_BYTES
            decoded += 1
    print(f"{refused} refused, {decoded} decoded")
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
