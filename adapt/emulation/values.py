"""Values as people write them: "20 Mbit/s", "50 ms", 0.25. What cannot be one is a `WrongValueError` that says what is expected."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Mapping
from typing import TypeVar

from adapt.config import MAX_DURATION_S, MAX_SIZE_BYTES, MEBIBYTE, parse_size
from adapt.errors import ConfigError

T = TypeVar("T")

MAX_CORES = 1024.0
MIN_CORES = 0.001  # the kernel grants no less than 1 ms, and that in a second
MAX_BYTES_PER_S = 1e12
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,30}")
RATES = '"20 Mbit/s", "500 kbit/s", "2.5 MB/s" or "1 MiB/s"'
DURATIONS = '"50 ms", "2 s" or "1 min"'

_QUANTITY = re.compile(r"([+-]?\d+(?:\.\d+)?)\s*([^\d\s.+-]*)")
_RATE_UNITS = {
    "bit/s": 1 / 8, "kbit/s": 1e3 / 8, "mbit/s": 1e6 / 8, "gbit/s": 1e9 / 8,
    "b/s": 1.0, "kb/s": 1e3, "mb/s": 1e6, "gb/s": 1e9,
    "kib/s": 1024.0, "mib/s": 1024.0**2, "gib/s": 1024.0**3,
}  # fmt: skip
_DURATION_UNITS = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}


class WrongValueError(Exception):
    """The message says what is expected; who knows place and key says the rest."""


def shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def hint(word: str, known: Collection[str]) -> str:
    """ "did you mean pi-1?", or else what there is."""
    close = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"expected {listed(known)}"


def listed(known: Collection[str]) -> str:
    """ "crash, stop or slow". Of many, only the first."""
    words = [*known][:40]
    if len(known) > len(words):
        return f"one of {', '.join(words)}, ..."
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else "".join(words) or "nothing, as there is none"


# ── quantities ───────────────────────────────────────────────────────────────────────────────────────────────────────


def read_rate(value: object) -> float:
    """Bytes per second. "Mb/s" is refused: it means two things."""
    bytes_per_s = _quantity(value, _RATE_UNITS, "rate", RATES)
    if not 0 < bytes_per_s <= MAX_BYTES_PER_S:
        raise WrongValueError("expected more than 0 and at most 1 TB/s; to have no link at all, use an event of kind cut")
    return bytes_per_s


def read_moment(value: object) -> float:
    """Seconds, 0 or more: a moment of the schedule, or a latency."""
    duration_s = _quantity(value, _DURATION_UNITS, "duration", DURATIONS)
    if not 0 <= duration_s <= MAX_DURATION_S:
        raise WrongValueError(f"expected 0 s to {MAX_DURATION_S:g} s")
    return duration_s


def read_duration(value: object) -> float:
    """Seconds, more than 0."""
    duration_s = read_moment(value)
    if duration_s == 0:
        raise WrongValueError("expected more than 0 s")
    return duration_s


def read_durations(value: object) -> tuple[float, float]:
    """Least and most, from two durations or one that is both."""
    if not isinstance(value, list):
        duration_s = read_duration(value)
        return duration_s, duration_s
    if len(value) != 2:
        raise WrongValueError('expected one duration, or least and most as ["1 s", "4 s"]')
    least_s, most_s = (read_duration(item) for item in value)
    if least_s > most_s:
        raise WrongValueError("expected the shorter duration first")
    return least_s, most_s


def _quantity(value: object, units: Mapping[str, float], noun: str, examples: str) -> float:
    expected = f"expected a {noun} such as {examples}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise WrongValueError(f"its unit is missing; {expected}")
    match = _QUANTITY.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise WrongValueError(expected)
    unit = match[2]
    if not unit:
        raise WrongValueError(f"its unit is missing; {expected}")
    factor = units.get(unit.lower())
    if factor is None or (unit.endswith("b/s")):
        raise WrongValueError(expected)
    return float(match[1]) * factor


def read_memory(value: object) -> int:
    """Bytes: a stage budget."""
    if not isinstance(value, str | int):
        raise WrongValueError('expected a size such as "256MiB" or "1GiB"')
    try:
        size_bytes = parse_size(value)
    except (ConfigError, OverflowError):
        raise WrongValueError('expected a size such as "256MiB" or "1GiB"') from None
    if not MEBIBYTE <= size_bytes <= MAX_SIZE_BYTES:
        raise WrongValueError('expected at least 1MiB, as "256MiB"; a number without unit is bytes')
    return size_bytes


# ── numbers, words ───────────────────────────────────────────────────────────────────────────────────────────────────


def read_number(low: float, high: float) -> Callable[[object], float]:
    def read(value: object) -> float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not low <= value <= high:  # type: ignore[operator]
            raise WrongValueError(f"expected a number from {low:g} to {high:g}")
        return float(value)  # type: ignore[arg-type]

    return read


read_cores = read_number(MIN_CORES, MAX_CORES)


def read_count(low: int, high: int) -> Callable[[object], int]:
    def read(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise WrongValueError(f"expected a whole number from {low} to {high}")
        return value

    return read


def read_switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise WrongValueError("expected true or false")
    return value


def read_line(value: object) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise WrongValueError("expected a text of one line")
    return value


def read_name(value: object) -> str:
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise WrongValueError("expected 1 to 31 small letters, digits and dashes, as pi-1")
    return value


def read_accelerator(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", value):
        raise WrongValueError("expected auto, cpu, or cuda:N with the number of a GPU")
    return value


def read_choice(known: Collection[str]) -> Callable[[object], str]:
    def read(value: object) -> str:
        if not isinstance(value, str):
            raise WrongValueError(f"expected {listed(known)}")
        if value not in known:
            raise WrongValueError(f"there is no such; {hint(value, known)}")
        return value

    return read


def read_list(read: Callable[[object], T], example: str) -> Callable[[object], list[T]]:
    def read_all(value: object) -> list[T]:
        if not isinstance(value, list) or not value:
            raise WrongValueError(f"expected a list such as {example}")
        return [read(item) for item in value]

    return read_all
