"""torchvision, also beside a torch that its compiled operators do not load with.

torchvision's wheel is linked to CUDA. Beside a CPU-only torch its library does not load, and `import torchvision`
then fails, because it describes operators (`nms`) that nobody has declared. Declaring them is enough for
classification; detection operators and image decoding are missing then. On a healthy install nothing is done.
Everybody in ADAPT who needs torchvision calls `import_torchvision()`.
"""

from __future__ import annotations

import importlib
import sys
import threading
from types import ModuleType

import torch

from adapt.errors import ExportUnavailableError

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_lock = threading.Lock()
_declarations: list[torch.library.Library] = []  # torch takes declarations back when their Library is collected


def import_torchvision() -> ModuleType:
    """The module `torchvision`, with `torchvision.models` usable.

    Raises:
        ExportUnavailableError: torchvision is not installed, or does not work with this torch.
    """
    with _lock:
        try:
            return _import()
        except ModuleNotFoundError as error:
            raise ExportUnavailableError(
                f"torchvision models need the package torchvision ({error}); install the release that belongs to torch {torch.__version__}"
            ) from None
        except RuntimeError as error:
            raise ExportUnavailableError(f"torchvision does not work with torch {torch.__version__}: {error}") from error


def _import() -> ModuleType:
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error) or _declarations:
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # half imported
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for schema in _SCHEMAS:
        library.define(schema)  # type: ignore[no-untyped-call]
    _declarations.append(library)
    return importlib.import_module("torchvision")
