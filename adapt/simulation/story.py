"""What has happened, kept as it was and put into words only when somebody asks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from adapt.errors import AdaptError
from adapt.protocol.ids import AttemptId, RequestId
from adapt.protocol.wire import Blob, Envelope
from adapt.scheduling.events import Activation, Version


class Story:
    """A line for everything that was sent, received, decided or broken."""

    def __init__(self) -> None:
        self._lines: list[tuple[float, str, str, object]] = []

    def __len__(self) -> int:
        return len(self._lines)

    def add(self, moment: float, who: str, verb: str, what: object) -> None:
        self._lines.append((moment, who, verb, what))

    def all(self) -> Iterator[str]:
        for line in self._lines:
            yield _told(line)

    def of(self, request_id: RequestId) -> Iterator[str]:
        """What concerns one request, and what befell processes and connections meanwhile."""
        mine = [index for index, line in enumerate(self._lines) if _concerns(line[3], request_id)]
        if not mine:
            return
        for line in self._lines[mine[0] : mine[-1] + 1]:
            if isinstance(line[3], str) or _concerns(line[3], request_id):
                yield _told(line)

    def digest(self) -> str:
        """Two runs with one digest were the same run."""
        hasher = hashlib.sha256()
        for line in self.all():
            hasher.update(line.encode())
        return hasher.hexdigest()


def _told(line: tuple[float, str, str, object]) -> str:
    moment, who, verb, what = line
    return f"{moment:10.4f}  {who:<12} {verb:<10} {_words(what)}"


def _words(what: object) -> str:
    match what:
        case str():
            return what
        case Envelope(message=message, session=session, term=term):
            return f"{_words(message)}  [session {session}, term {term}]"
    names = getattr(what, "__struct_fields__", ()) or getattr(what, "_fields", ())
    return f"{type(what).__name__}({', '.join(f'{name}={_value(getattr(what, name))}' for name in names if name not in _LEFT_OUT)})"


_LEFT_OUT = {"software", "device", "protocol_version", "numeric_class", "codec", "tolerance", "input_digest", "output_digest", "times"}


def _value(value: object) -> str:
    match value:
        case float():
            return f"{value:.4g}"
        case bytes():
            return value.hex()[:8]
        case frozenset() | set():
            return "{" + ", ".join(sorted(map(_value, value))) + "}"
        case AttemptId() | RequestId():
            return str(value)
        case list() | tuple():
            return "[" + ", ".join(map(_value, value)) + "]"
        case Activation():
            return f"{_value(value.leaves)}, {value.size_bytes} bytes"
        case Version():
            cut = f".{value.cut}" if value.cut else ""
            return f"{value.deployment}/{value.number}{cut} epoch {value.plan.epoch} places {_value(value.plan.places)}"
        case AdaptError():
            return f"{value.code}: {value}"
        case Blob():
            return f"{value.size} bytes"
    return str(value)


def _concerns(what: object, request_id: RequestId) -> bool:
    if isinstance(what, Envelope):
        what = what.message
    attempt = getattr(what, "attempt", None)
    if isinstance(attempt, AttemptId):
        return attempt.request == request_id
    if getattr(what, "request_id", None) == request_id:
        return True
    if request_id in (getattr(what, "request_ids", None) or ()):
        return True
    for name in ("attempts", "held", "finished", "handed_back"):
        among = getattr(what, name, None)
        if isinstance(among, list | tuple | frozenset) and any(isinstance(one, AttemptId) and one.request == request_id for one in among):
            return True
    return False
