"""Different real images: crops of the photographs inside scikit-image's wheel, or of a folder's pictures.

Image i is a crop of photograph i modulo their number: first the whole centre of each, as torchvision evaluates, then squares of other
sizes at other places, drawn by a fixed seed. Nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adapt.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

# Photographs of things, animals and people; not the test patterns, drawings and microscopy beside them.
PHOTOGRAPHS = ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "motorcycle_left.png", "rocket.jpg", "grass.png")
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}
CENTRE_SHARE = 224 / 256  # of the shorter side: torchvision's evaluation resizes to 256 and crops 224
SMALLEST_SHARE, LARGEST_SHARE = 0.45, 0.95
ENOUGH_SIDE = 64  # smaller pictures are icons
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as torchvision's weights expect


@dataclass(frozen=True, slots=True)
class Images:
    """`pixels`: (count, 3, side, side), float32, normalised. `names`: of the photograph of each image."""

    pixels: np.ndarray[Any, np.dtype[np.float32]]
    names: list[str]


def find_photographs(folder: Path | None) -> list[Path]:
    """The bundled photographs, or the pictures in `folder`, by name.

    Raises:
        ConfigError: there are none.
    """
    if folder is None:
        package = importlib.util.find_spec("skimage")
        base = Path(package.origin).parent / "data" if package is not None and package.origin else None
        found = [base / name for name in PHOTOGRAPHS if (base / name).is_file()] if base is not None else []
        if not found:
            raise ConfigError(
                "the demo's photographs come with scikit-image: install adapt-inference[demo], or give a folder with --images"
            )
        return found
    if not folder.is_dir():
        raise ConfigError(f"images={str(folder)!r}: expected a folder with pictures")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise ConfigError(f"images={str(folder)!r}: expected pictures ({', '.join(sorted(SUFFIXES))}); there are none")
    return found


def load_images(photographs: list[Path], count: int, side: int) -> Images:
    """`count` crops of the photographs, `side` pixels wide and high; the same ones every time.

    Raises:
        ConfigError: a file is no picture, or too small.
    """
    pixels = np.empty((count, 3, side, side), np.float32)
    names = []
    opened: dict[Path, Image] = {}
    for index in range(count):
        path = photographs[index % len(photographs)]
        if path not in opened:
            opened[path] = _open(path)
        pixels[index] = _crop(opened[path], index // len(photographs), index, side)
        names.append(path.stem)
        if len(photographs) >= count:
            del opened[path]  # used once: a folder may hold thousands
    return Images(pixels, names)


def _open(path: Path) -> Image:
    from PIL import Image as pillow

    try:
        with pillow.open(path) as image:
            picture = image.convert("RGB")
    except (OSError, ValueError, pillow.DecompressionBombError) as error:
        raise ConfigError(f"images: {path.name} cannot be read as a picture: {error}") from error
    if min(picture.size) < ENOUGH_SIDE:
        raise ConfigError(f"images: {path.name} has {picture.size[0]}x{picture.size[1]} pixels; expected at least {ENOUGH_SIDE} each way")
    return picture


def _crop(picture: Image, number: int, seed: int, side: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Crop `number` of a photograph, 0 being its centre: (3, side, side), normalised."""
    from PIL import Image as pillow

    width, height = picture.size
    shortest = min(width, height)
    if number == 0:
        square = round(shortest * CENTRE_SHARE)
        left, top = (width - square) // 2, (height - square) // 2
    else:
        draw = np.random.default_rng(seed)
        square = round(shortest * draw.uniform(SMALLEST_SHARE, LARGEST_SHARE))
        left, top = int(draw.integers(width - square + 1)), int(draw.integers(height - square + 1))
    cropped = picture.resize((side, side), pillow.Resampling.BILINEAR, box=(left, top, left + square, top + square))
    values = np.asarray(cropped, np.float32) / np.float32(255)
    return ((values - np.asarray(MEAN, np.float32)) / np.asarray(STD, np.float32)).transpose(2, 0, 1)
