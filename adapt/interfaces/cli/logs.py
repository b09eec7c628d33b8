"""Logs on standard error: time, level, message, and the record's fields. As text for people, or a JSON object a line for programs:

12:04:31.207 INFO     worker joined  worker_id=w1 device=cpu
{"unix_s": 1795003471.207, "monotonic_s": 512.091, "level": "info", "source": "adapt.runtime.dispatcher", "event": "worker joined", ...}

`monotonic_s` is of a clock that is never set, and that all processes of one machine share: what lies between two lines is their difference.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TextIO

from adapt.clock import monotonic
from adapt.config import LOG_LEVELS, VARIABLE_PREFIX
from adapt.errors import ConfigError

LEVEL, FORMAT = VARIABLE_PREFIX + "LOG_LEVEL", VARIABLE_PREFIX + "LOG_FORMAT"
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}  # everything else is a field


def add_option(parser: argparse.ArgumentParser, *, default: str = "info") -> None:
    parser.add_argument("--log-level", choices=LOG_LEVELS, help=f"what is logged on standard error (default: {default})")
    parser.add_argument("--log-format", choices=sorted(_FORMATTERS), help="text for people, JSON lines for programs (default: text)")


def set_up(options: argparse.Namespace, environ: Mapping[str, str], *, default: str = "info", stream: TextIO | None = None) -> None:
    """Log our own records from the chosen level on, and warnings of others.

    Raises:
        ConfigError: ADAPT_LOG_LEVEL holds no level, or ADAPT_LOG_FORMAT no format.
    """
    level = _one_of(LOG_LEVELS, LEVEL, options.log_level or environ.get(LEVEL) or default)
    form = _one_of(sorted(_FORMATTERS), FORMAT, options.log_format or environ.get(FORMAT) or "text")
    writer = logging.StreamHandler(stream or sys.stderr)
    writer.setFormatter(_FORMATTERS[form]())
    logging.basicConfig(handlers=[writer], level=logging.WARNING, force=True)
    logging.getLogger("adapt").setLevel(level.upper())


def _one_of(known: Sequence[str], variable: str, given: str) -> str:
    if given not in known:
        raise ConfigError(f"{variable}={given[:32]!r}: expected one of {', '.join(known)}")
    return given


class FieldFormatter(logging.Formatter):
    """One line for a record (a traceback takes more), its fields as name=value."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%H:%M:%S", time.localtime(record.created))
        fields = " ".join(f"{name}={_shown(value)}" for name, value in _fields(record))
        source = "" if record.name.startswith("adapt.") else f"{record.name}: "
        line = f"{moment}.{record.msecs:03.0f} {record.levelname:<8} {source}{record.getMessage()}"
        line = f"{line}  {fields}" if fields else line
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object on one line for a record, whatever it holds; its fields are text where JSON has nothing for them."""

    def format(self, record: logging.LogRecord) -> str:
        plain: dict[str, object] = {
            "unix_s": record.created,
            "monotonic_s": monotonic(),
            "level": record.levelname.lower(),
            "source": record.name,
            "event": record.getMessage(),
        }
        plain |= {name: _plain(value) for name, value in _fields(record) if name not in plain}
        if record.exc_info:
            plain["traceback"] = self.formatException(record.exc_info)
        return json.dumps(plain)


_FORMATTERS: Mapping[str, type[logging.Formatter]] = {"text": FieldFormatter, "json": JsonFormatter}


def _fields(record: logging.LogRecord) -> list[tuple[str, object]]:
    return [(name, value) for name, value in vars(record).items() if name not in _OWN]


def _plain(value: object) -> object:
    """As it is, or its text where JSON has nothing for it: objects, numbers that are none, keys that are no words."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return str(value)
    return value


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    return repr(text) if not text or any(character.isspace() for character in text) else text
