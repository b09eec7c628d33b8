"""Reference outputs, computed by the user's own eager module in a process that has never met ADAPT's interpreter.

    python tests/reference.py MODEL SEED THREADS IN.npz OUT.npz

IN holds arrays x0, x1, ...; OUT the outputs under the same names. `expected` runs it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def expected(directory: Path, model: str, inputs: Sequence[np.ndarray], *, seed: int = 0, threads: int = 1) -> list[np.ndarray]:
    """What the eager torchvision module answers, in a fresh process."""
    source, target = directory / f"{model}-in.npz", directory / f"{model}-out.npz"
    np.savez(source, **{f"x{index}": x for index, x in enumerate(inputs)})
    subprocess.run([sys.executable, __file__, model, str(seed), str(threads), str(source), str(target)], check=True, timeout=300)
    with np.load(target) as outputs:
        return [outputs[f"x{index}"] for index in range(len(inputs))]


def main(model: str, seed: str, threads: str, source: str, target: str) -> None:
    import warnings

    import torch

    from adapt.models.vision import import_torchvision  # only the import that CPU-only torch needs; nothing of it computes

    warnings.simplefilter("ignore")  # torchvision's own, about the initialisation of inception and googlenet
    torchvision = import_torchvision()
    torch.set_num_threads(int(threads))
    torch.manual_seed(int(seed))
    module = getattr(torchvision.models, model)(weights=None).eval()
    with np.load(source) as inputs, torch.inference_mode():
        np.savez(target, **{name: module(torch.from_numpy(inputs[name])).numpy() for name in inputs})


if __name__ == "__main__":
    main(*sys.argv[1:])
