"""What a dispatcher remembers from one life to the next: its term and its deployments.

Files are written beside their place and renamed into it, so that a crash leaves the old one or the new one, never half of either.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from pathlib import Path
from typing import IO, Any

from adapt.errors import ConfigError

STATE_VERSION = 1


class StateDirectory:
    """One directory, used by one dispatcher at a time."""

    def __init__(self, directory: Path) -> None:
        """Lock the directory, made if it is missing.

        Raises:
            ConfigError: another dispatcher uses it, or it cannot be written.
        """
        self.directory = directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._lock: IO[str] = open(directory / "lock", "a")  # noqa: SIM115  held for life
        except OSError as error:
            raise ConfigError(f"state_dir={directory}: {error.strerror}; give a writable directory with --state-dir") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise ConfigError(f"state_dir={directory}: another dispatcher uses it; give each its own --state-dir") from None

    @property
    def artifacts(self) -> Path:
        return self.directory / "artifacts"

    @property
    def profiles(self) -> Path:
        return self.directory / "profiles"

    def read_term(self) -> int:
        """The highest term of earlier reigns; 0 in a new directory."""
        try:
            return int((self.directory / "term").read_text())
        except FileNotFoundError:
            return 0
        except ValueError as error:
            raise ConfigError(f"state_dir={self.directory}: the file 'term' should hold a number: {error}") from error

    def write_term(self, term: int) -> None:
        self._replace("term", f"{term}\n")

    def owner(self) -> str:
        """A random name that stays with the directory: what its dispatcher is known by, life after life."""
        file = self.directory / "owner"
        if not file.exists():
            self._replace("owner", secrets.token_hex(8) + "\n")
        return file.read_text().strip()

    def read_deployments(self) -> dict[str, Any]:
        """What `write_deployments` was given last; empty in a new directory."""
        try:
            record = json.loads((self.directory / "deployments.json").read_text())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise ConfigError(f"state_dir={self.directory}: deployments.json cannot be read: {error}; remove it to start afresh") from error
        if not isinstance(record, dict) or record.get("version") != STATE_VERSION:
            raise ConfigError(f"state_dir={self.directory}: deployments.json is not of version {STATE_VERSION}; remove it to start afresh")
        return record

    def write_deployments(self, record: dict[str, Any]) -> None:
        self._replace("deployments.json", json.dumps({"version": STATE_VERSION, **record}, indent=1))

    def close(self) -> None:
        self._lock.close()

    def _replace(self, name: str, text: str) -> None:
        temporary = self.directory / f"{name}.{os.getpid()}.new"
        try:
            with open(temporary, "w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.directory / name)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        descriptor = os.open(self.directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # the rename itself
        finally:
            os.close(descriptor)
