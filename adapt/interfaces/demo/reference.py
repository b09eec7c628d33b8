"""The right answers, from the user's point of view: torchvision's own module, eager, in a process of its own, one image at a time.

Run as `python -m adapt.interfaces.demo.reference` (see runtime/child.py). Nothing of ADAPT that computes is in it: the module comes from
torchvision, and neither export nor interpreter is imported. It also measures what one process alone achieves.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from adapt.errors import ConfigError
from adapt.interfaces.demo.images import find_photographs, load_images
from adapt.runtime.child import Progress, answer, ask

IMAGES_FILE, OUTPUTS_FILE = "images.npy", "outputs.npy"
Array = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True, slots=True)
class Reference:
    """What the cluster's answers are held against.

    Attributes:
        images: (count, 1, 3, side, side).
        names: the photograph of each image.
        outputs: (count, 1, classes).
        images_per_s: of the one process, at `threads` threads, after a first image to warm up.
        categories: name of each class, if the weights have been trained on known ones; else None.
    """

    images: Array
    names: list[str]
    outputs: Array
    images_per_s: float
    categories: list[str] | None


async def compute_reference(
    model: str,
    *,
    weights: str | Path | None,
    seed: int,
    folder: Path | None,
    count: int,
    threads: int,
    directory: Path,
    progress: Progress,
) -> Reference:
    """Compute the answers to `count` images with the eager module, in a new process.

    Args:
        weights: a file, or the name of torchvision's own; None for random ones by `seed`.
        folder: of pictures; None for the bundled photographs.
        threads: that torch uses within one operator, as the workers do.
        directory: for files that are no longer needed afterwards.

    Raises:
        ConfigError: there are no such images, or two of them have one answer, which could hide a swap.
        AdaptError: whatever building the model raises.
    """
    request = {
        "model": model,
        "weights": None if weights is None else str(weights),
        "weights_is_file": isinstance(weights, Path),
        "seed": seed,
        "folder": None if folder is None else str(folder),
        "count": count,
        "threads": threads,
        "directory": str(directory),
    }
    told = await ask("adapt.interfaces.demo.reference", request, about=f"the reference of {model}", progress=progress)
    images, outputs = np.load(directory / IMAGES_FILE), np.load(directory / OUTPUTS_FILE)
    check_different(outputs)
    return Reference(images, told["names"], outputs, told["images_per_s"], told["categories"])


def check_different(outputs: Array) -> None:
    """Raises ConfigError if two images have the same answer, bit for bit: a swap of the two could not be seen."""
    seen: dict[bytes, int] = {}
    for index, output in enumerate(outputs):
        earlier = seen.setdefault(output.tobytes(), index)
        if earlier != index:
            raise ConfigError(f"images {earlier} and {index} have the same reference output: expected different pictures")


def _compute(request: dict[str, Any], say: Progress) -> dict[str, Any]:
    """The child's half."""
    say("loading torch", None)
    import torch

    from adapt.models.sources import build_named_model

    torch.set_num_threads(request["threads"])
    torch.set_num_interop_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)  # the fused kernel rounds differently; see DESIGN.md, section 1
    weights = request["weights"]
    say(f"building {request['model']}", None)
    named = build_named_model(request["model"], weights=Path(weights) if request["weights_is_file"] else weights, seed=request["seed"])
    module, count = named.module, request["count"]
    images = load_images(
        find_photographs(None if request["folder"] is None else Path(request["folder"])), count, named.example_input.shape[-1]
    )
    outputs = []
    with torch.inference_mode():
        module(torch.from_numpy(images.pixels[:1]))
        began = perf_counter()
        for index in range(count):
            outputs.append(module(torch.from_numpy(images.pixels[index : index + 1])).numpy())
            say(f"image {index + 1} of {count}", (index + 1) / count)
        elapsed_s = perf_counter() - began
    directory = Path(request["directory"])
    np.save(directory / IMAGES_FILE, images.pixels[:, np.newaxis])
    np.save(directory / OUTPUTS_FILE, np.stack(outputs))
    categories = _categories(request["model"], outputs[0].shape[-1]) if weights is not None else None
    return {"names": images.names, "images_per_s": count / elapsed_s, "categories": categories}


def _categories(model: str, classes: int) -> list[str] | None:
    """ImageNet's names, from what torchvision knows of its own weights, if the model has as many classes."""
    from adapt.models.sources import PREFIX
    from adapt.models.vision import import_torchvision

    known = import_torchvision().models.get_model_weights(model.removeprefix(PREFIX))
    names = next((list(weights.meta.get("categories", ())) for weights in known), [])
    return names if len(names) == classes else None


if __name__ == "__main__":
    sys.exit(answer(_compute))
