"""Profiles of models as files, for `adapt plan` and `adapt profile`."""

from __future__ import annotations

from pathlib import Path

from adapt.errors import ConfigError
from adapt.planning.model import ModelProfile

PROFILE_SUFFIX = ".json"


def read_profile(path: Path) -> ModelProfile:
    """Raises ConfigError: there is no profile in the file."""
    path = path.expanduser()
    try:
        return ModelProfile.from_json(path.read_text(encoding="utf-8"), name=str(path))
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or error}; expected the profile of a model") from None


def save_profile(path: Path, model: ModelProfile, *, key: str) -> None:
    """Raises ConfigError: it cannot be written; names the option `key`."""
    try:
        path.expanduser().write_text(model.to_json(), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{key}={path}: {error.strerror}") from None
