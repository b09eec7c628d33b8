"""Models by name: torchvision's classification models, with random weights by seed, a file's or torchvision's own.

`build_named_model("torchvision/resnet50", seed=0)` builds what a user gets by

    torch.manual_seed(0)
    torchvision.models.resnet50(weights=None).eval()

Weights are read from safetensors files or from state dicts (`weights_only=True`); `.pt2` and TorchScript files are
code, and are refused.
"""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from adapt.errors import ExportError, UnknownModelError
from adapt.models.vision import import_torchvision

PREFIX = "torchvision/"
_CODE_SUFFIXES = (".pt2", ".torchscript", ".ptl", ".jit")
# Where the side of the images differs from 224 pixels.
_IMAGE_SIDES = {"inception_v3": 299}
_KEYS_SHOWN = 5


class NamedModel(NamedTuple):
    """A module in eval mode, and an input of a batch of 1 for it: (1, 3, height, width), float32, unless asked otherwise."""

    module: torch.nn.Module
    example_input: torch.Tensor


def model_names() -> list[str]:
    """Every name that `build_named_model` takes, with its prefix; nothing is built or downloaded."""
    models = import_torchvision().models
    return [PREFIX + name for name in models.list_models(module=models)]


def build_named_model(
    name: str,
    *,
    weights: str | Path | None = None,
    seed: int | None = None,
    model_args: Mapping[str, Any] | None = None,
    input_shape: Sequence[int] | None = None,
) -> NamedModel:
    """Build a torchvision classification model. The caller's random numbers are not disturbed.

    Args:
        name: "torchvision/resnet50" or "resnet50".
        weights: path of a `.safetensors` file or of a state dict, or the name of torchvision's own weights
            ("DEFAULT", "IMAGENET1K_V1"), which are downloaded; None for random ones.
        seed: of the random weights; None leaves them to chance.
        model_args: passed to torchvision, say `{"num_classes": 10}`.
        input_shape: shape of the input, with its batch or, in three sizes, without; by default the model's own.

    Raises:
        UnknownModelError: there is no model of this name.
        ExportError: the weights do not fit or cannot be read, or torchvision refuses `model_args`.
        ExportUnavailableError: torchvision is missing.
    """
    models = import_torchvision().models
    name = name.removeprefix(PREFIX)
    names = models.list_models(module=models)
    if name not in names:
        close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        raise UnknownModelError(PREFIX + name if not name.startswith(PREFIX) else name, suggestions=[PREFIX + other for other in close])
    arguments = dict(model_args or {})
    own_weights = None if weights is None or _is_path(weights) else _torchvision_weights(models, name, str(weights))
    state = _read_state(Path(weights)) if weights is not None and own_weights is None else None
    module = _construct(models, name, own_weights, seed, arguments, has_state=state is not None)
    if state is not None:
        _load_state(module, state, Path(str(weights)))
    return NamedModel(module.eval(), torch.rand(_shape(name, input_shape), generator=torch.Generator().manual_seed(0)))


def _construct(
    models: Any, name: str, own_weights: Any, seed: int | None, arguments: dict[str, Any], *, has_state: bool
) -> torch.nn.Module:
    builder = models.get_model_builder(name)
    if has_state and "init_weights" in inspect.signature(builder.__wrapped__ if hasattr(builder, "__wrapped__") else builder).parameters:
        arguments.setdefault("init_weights", False)  # minutes of truncated normals that would be thrown away
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # inception_v3 and googlenet announce that their default initialisation will change.
        warnings.simplefilter("ignore", FutureWarning)
        if seed is not None:
            torch.manual_seed(seed)
        else:
            torch.seed()
        try:
            module: torch.nn.Module = builder(weights=own_weights, **arguments)
        except (TypeError, ValueError) as error:
            raise ExportError(f"torchvision does not build {name} with {arguments}: {error}") from None
        except OSError as error:
            raise ExportError(f"the weights of {name} cannot be downloaded: {error}; give the path of a file instead") from error
    return module


def _is_path(weights: str | Path) -> bool:
    return isinstance(weights, Path) or "/" in weights or "." in weights or Path(weights).exists()


def _torchvision_weights(models: Any, name: str, weights: str) -> Any:
    known = models.get_model_weights(name)
    if weights not in known.__members__:
        raise ExportError(f"torchvision has no weights {weights!r} for {name}; it has {', '.join(known.__members__)}, or give a file")
    return known[weights]


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix in _CODE_SUFFIXES:
        raise ExportError(f"{path.name} is code: loading it could run anything; save the weights with safetensors or as a state dict")
    if not path.is_file():
        raise ExportError(f"there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # only who loads such a file needs the package

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a foreign file makes the readers raise
        reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise ExportError(f"{path.name} holds no weights that can be read safely: {reason}") from None
    for wrapper in ("state_dict", "model"):  # checkpoints of training scripts
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise ExportError(f"{path.name} is not a state dict: names of weights with tensors")
    return state


def _load_state(module: torch.nn.Module, state: dict[str, torch.Tensor], path: Path) -> None:
    own = module.state_dict()
    # Models trained with auxiliary classifiers are used without: what belongs to them alone may be left over.
    problems = [
        f"{kind} {', '.join(keys[:_KEYS_SHOWN])}{' ...' if len(keys) > _KEYS_SHOWN else ''}"
        for kind, keys in (
            ("it lacks", [key for key in own if key not in state and not key.endswith("num_batches_tracked")]),
            ("it also has", [key for key in state if key not in own]),
            ("of another shape are", [key for key in own if key in state and own[key].shape != state[key].shape]),
        )
        if keys
    ]
    if problems:
        raise ExportError(f"the weights in {path.name} do not fit the model: {'; '.join(problems)}")
    module.load_state_dict(state, strict=False)


def _shape(name: str, input_shape: Sequence[int] | None) -> tuple[int, ...]:
    if input_shape is None:
        side = _IMAGE_SIDES.get(name, 224)
        return (1, 3, side, side)
    shape = tuple(input_shape)
    return (1, *shape) if len(shape) == 3 else shape
