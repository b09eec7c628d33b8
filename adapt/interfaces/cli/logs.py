"""Logs for people, on standard error: time, level, message, and the record's fields after it.

12:04:31.207 INFO     worker joined  worker_id=w1 device=cpu
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Mapping
from typing import TextIO

from adapt.config import LOG_LEVELS, VARIABLE_PREFIX
from adapt.errors import ConfigError

VARIABLE = VARIABLE_PREFIX + "LOG_LEVEL"
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}  # everything else is a field


def add_option(parser: argparse.ArgumentParser, *, default: str = "info") -> None:
    parser.add_argument("--log-level", choices=LOG_LEVELS, help=f"what is logged on standard error (default: {default})")


def set_up(options: argparse.Namespace, environ: Mapping[str, str], *, default: str = "info", stream: TextIO | None = None) -> None:
    """Log our own records from the chosen level on, and warnings of others.

    Raises:
        ConfigError: ADAPT_LOG_LEVEL holds no level.
    """
    level = options.log_level or environ.get(VARIABLE) or default
    if level not in LOG_LEVELS:
        raise ConfigError(f"{VARIABLE}={level[:32]!r}: expected one of {', '.join(LOG_LEVELS)}")
    writer = logging.StreamHandler(stream or sys.stderr)
    writer.setFormatter(FieldFormatter())
    logging.basicConfig(handlers=[writer], level=logging.WARNING, force=True)
    logging.getLogger("adapt").setLevel(level.upper())


class FieldFormatter(logging.Formatter):
    """One line for a record (a traceback takes more), its fields as name=value."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%H:%M:%S", time.localtime(record.created))
        fields = " ".join(f"{name}={_shown(value)}" for name, value in vars(record).items() if name not in _OWN)
        source = "" if record.name.startswith("adapt.") else f"{record.name}: "
        line = f"{moment}.{record.msecs:03.0f} {record.levelname:<8} {source}{record.getMessage()}"
        line = f"{line}  {fields}" if fields else line
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return repr(text) if not text or any(character.isspace() for character in text) else text
