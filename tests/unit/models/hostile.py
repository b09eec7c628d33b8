"""Stage files as somebody would write them who means harm: real ones, changed here and there in ways that keep them readable.

python tests/unit/models/hostile.py STAGE.safetensors COUNT SEED     tries so many; prints how they ended
"""

from __future__ import annotations

import json
import random
import resource
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from adapt.errors import InputMismatchError, ModelError, WireError
from adapt.models.interpreter import Stage
from adapt.models.operators import OPERATORS
from adapt.models.profiler import example_inputs
from adapt.models.program import STAGE_KEY
from adapt.models.tensorfile import TensorFile, TensorSource, copy_pieces, read_tensor_file, write_tensor_file

NAMES = sorted(OPERATORS)
NUMBERS = [
    0,
    1,
    2,
    3,
    7,
    64,
    -1,
    -2,
    2**16,
    2**20,
    2**31,
    2**33,
    2**40,
    2**62,
    -(2**63),
    0.5,
    float(2**40),
    True,
    None,
    "sum",
    "%999999999d",
]
LIMIT_BYTES = 64 << 20  # of one value
Take = Callable[[list[Any]], Any]  # one of these


def mutate(document: dict[str, Any], take: Take) -> None:
    """Change one thing, in place."""
    take([_other_operator, _other_argument, _other_reference, _other_claim, _other_order, _one_more, _other_outputs, _other_end])(
        document, take
    )


def _operator(document: dict[str, Any], take: Take) -> list[Any]:
    return take(document["operators"])


def _other_operator(document: dict[str, Any], take: Take) -> None:
    _operator(document, take)[0] = take(NAMES)


def _other_argument(document: dict[str, Any], take: Take) -> None:
    args = _operator(document, take)[1]
    if not args:
        return
    place = take(range(len(args)))
    args[place] = [take(NUMBERS) for _ in args[place]] if isinstance(args[place], list) and take([True, False]) else take(NUMBERS)


def _other_reference(document: dict[str, Any], take: Take) -> None:
    args = _operator(document, take)[1]
    if args:
        kind = take(["v", "w"])
        args[take(range(len(args)))] = {kind: take(range(len(document["values" if kind == "v" else "weights"]) + 1))}


def _other_claim(document: dict[str, Any], take: Take) -> None:
    sizes = [2**12, 2**20, 2**40, [1, 0], [2**20, 0], [-1, 5], 1, 0, -3]
    claims = [["size", take(sizes)], ["float32", [take(sizes), take(sizes)], None], ["int64", [4], "contiguous"]]
    document["values"][take(range(len(document["values"])))] = take(claims)


def _other_order(document: dict[str, Any], take: Take) -> None:
    operators = document["operators"]
    one, other = take(range(len(operators))), take(range(len(operators)))
    operators[one], operators[other] = operators[other], operators[one]


def _one_more(document: dict[str, Any], take: Take) -> None:
    """An operator whose result the next one reads instead of its own."""
    operators = document["operators"]
    place, name = take(range(len(operators))), take(NAMES)
    used = [argument for argument in operators[place][1] if isinstance(argument, dict)]
    new = len(document["values"])
    document["values"].append(take(document["values"]))
    args = [
        take([*used, *used, *NUMBERS, [take(NUMBERS), take(NUMBERS)], [take(used)] * 5] if used else NUMBERS) for _ in range(take(range(5)))
    ]
    operators.insert(place, [name, args, {}, new, ""])
    if operators[place + 1][1]:
        operators[place + 1][1][0] = {"v": new}


def _other_outputs(document: dict[str, Any], take: Take) -> None:
    operator = _operator(document, take)
    operator[3] = take([operator[3], [operator[3]], [None] * 50, take(range(len(document["values"])))])


def _other_end(document: dict[str, Any], take: Take) -> None:
    document[take(["inputs", "outputs"])] = [take(range(len(document["values"])))]


def changed(file: TensorFile, take: Take, times: int) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(file.metadata[STAGE_KEY])
    for _ in range(times):
        mutate(document, take)
    return document


def write(file: TensorFile, document: dict[str, Any], directory: Path) -> Path:
    sources = [TensorSource(t.key, t.dtype, t.shape, lambda t=t: copy_pieces(file.path, t)) for t in file.tensors.values()]
    return write_tensor_file(directory, {STAGE_KEY: json.dumps(document)}, sources)[0]


def run(path: Path) -> str:
    """What a worker would do with it; anything but these ends is a hole."""
    try:
        stage = Stage.load(path, limit_bytes=LIMIT_BYTES)
    except WireError as error:
        return f"refused: {str(error)[len(path.name) :][:60]}"
    try:
        for batch in (1, 2):
            stage.run(example_inputs(stage.inputs, batch))
    except (InputMismatchError, ModelError):
        return "failed"
    except RuntimeError as error:  # of made-up inputs: a negative size
        if "negative dimension" in str(error):
            return "failed"
        raise
    return "ran"


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main(stage: str, count: str, seed: str) -> None:
    torch.set_num_threads(1)
    file, rng, counts = read_tensor_file(stage), random.Random(int(seed)), Counter[str]()
    directory = Path(stage).parent / f"hostile-{seed}"
    assert run(Path(stage)) == "ran"
    before = peak_bytes()
    for _ in range(int(count)):
        path = write(file, changed(file, rng.choice, rng.randint(1, 4)), directory)
        counts[run(path).partition(":")[0]] += 1
        path.unlink()
    print(json.dumps({**counts, "more_bytes": peak_bytes() - before}))


if __name__ == "__main__":
    main(*sys.argv[1:])
