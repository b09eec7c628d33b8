"""Every exception that a user of ADAPT can meet.

    AdaptError
    ├─ ConfigError                a setting is missing, misspelt or impossible
    ├─ WireError                  what arrived is not what the protocol allows
    │  └─ VersionError            ... because the two sides speak different versions of it
    ├─ ConnectError               the dispatcher could not be reached, or refused
    ├─ InputMismatchError         an input does not fit the model's inputs
    ├─ UnknownModelError          no model or deployment has this name
    ├─ ExportError                the model cannot be turned into stages
    │  ├─ ExportInterruptedError  ... because the process that did it was ended; another try may succeed
    │  └─ ExportUnavailableError  ... because torch is missing where it would be done
    ├─ PlanError                  the stages cannot be placed on the workers there are
    ├─ CanaryError                a new version does not give the outputs that it should; it takes no requests
    ├─ OverloadedError            refused at the door; try again after `retry_after_s`
    ├─ DeadlineExceededError      the request's deadline came before its answer
    ├─ ModelError                 the model itself raised
    ├─ DisagreementError          workers came to different outputs, and there is nobody who could tell which is right
    ├─ PoisonError                the request kills the workers that run it
    ├─ StageNotResidentError      inside attempts' histories: the worker has yet to load the stage
    ├─ WorkerLostError            inside attempts' histories: a worker fell silent
    └─ AttemptTimeoutError        inside attempts' histories: one try took too long

On the wire an error is its code, its message and its plain attributes; see `to_wire` and `from_wire`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, TypeAlias

MESSAGE_LIMIT = 4000  # characters of a message that travel

Plain: TypeAlias = "None | bool | int | float | str | list[Plain] | dict[str, Plain]"


class AdaptError(Exception):
    """Base of all errors. `code` names it on the wire; `retryable` says that another attempt may succeed."""

    code: ClassVar[str] = "adapt"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str) -> None:
        super().__init__(message)

    @property
    def fields(self) -> dict[str, Plain]:
        """The facts of this error: its public attributes, all of plain types."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def to_wire(self) -> tuple[str, str, dict[str, Plain]]:
        return self.code, str(self)[:MESSAGE_LIMIT], self.fields

    @staticmethod
    def from_wire(code: str, message: str, fields: Mapping[str, Plain]) -> AdaptError:
        """The error that `to_wire` described; of an unknown code, an `AdaptError` that names it."""
        kind = BY_CODE.get(code)
        if kind is None:
            message, kind = f"{message} (unknown error code {code!r})", AdaptError
        error = kind.__new__(kind)
        Exception.__init__(error, message)
        for name, value in fields.items():
            if name.isidentifier() and not name.startswith("_") and not hasattr(kind, name):
                setattr(error, name, value)
        return error


class ConfigError(AdaptError):
    """A setting is missing, misspelt or impossible; the message names key, value and what is expected."""

    code = "config"


class WireError(AdaptError):
    """What arrived is not what the protocol allows; the message names the place and what was expected."""

    code = "wire"
    retryable = True


class VersionError(WireError):
    """The two sides speak different versions of the protocol; `theirs` and `ours` are the numbers."""

    code = "version"
    retryable = False

    def __init__(self, theirs: int, *, ours: int) -> None:
        super().__init__(f"protocol version {theirs} was spoken, this side speaks {ours}; install matching versions of ADAPT")
        self.theirs, self.ours = theirs, ours


class ConnectError(AdaptError):
    """The dispatcher at `address` could not be reached, or refused."""

    code = "connect"

    def __init__(self, address: str, reason: str) -> None:
        super().__init__(f"dispatcher at {address}: {reason}")
        self.address = address


class InputMismatchError(AdaptError):
    """An input does not fit the model: the message gives what was expected and what was got."""

    code = "input-mismatch"


class UnknownModelError(AdaptError):
    """No model or deployment has this name."""

    code = "unknown-model"

    def __init__(self, name: str, *, suggestions: list[str] | None = None) -> None:
        hint = f"; did you mean {' or '.join(suggestions)}?" if suggestions else ""
        super().__init__(f"unknown model {name[:200]!r}{hint}")
        self.name, self.suggestions = name[:200], list(suggestions or [])


class ExportError(AdaptError):
    """The model cannot be turned into stages; the message gives the reason and the nearest thing to do."""

    code = "export"


class ExportInterruptedError(ExportError):
    """The process that exported the model was ended, or has ended itself; that says little about the model."""

    code = "export-interrupted"
    retryable = True


class ExportUnavailableError(ExportError):
    """The model would have to be exported in a process that has no torch."""

    code = "export-unavailable"


class PlanError(AdaptError):
    """The stages cannot be placed on the workers there are."""

    code = "plan"


class CanaryError(AdaptError):
    """A new version does not give the outputs that it should. It takes no requests; an earlier version goes on as before.

    Attributes:
        canary: number of the input, from 0. stage: zero-based, where its outputs were first seen to differ; None: that is not known.
        is_deviation: its output is another; False: there was none that could be compared.
    """

    code = "canary"

    def __init__(self, message: str, *, canary: int, stage: int | None = None, is_deviation: bool = True) -> None:
        super().__init__(message)
        self.canary, self.stage, self.is_deviation = canary, stage, is_deviation


class OverloadedError(AdaptError):
    """Refused at the door, at once; nothing was begun. Try again after `retry_after_s` seconds."""

    code = "overloaded"
    retryable = True

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceededError(AdaptError):
    """The request's deadline came before its answer. `attempts` tells what had been tried."""

    code = "deadline-exceeded"

    def __init__(self, budget_s: float, *, attempts: list[Plain] | None = None) -> None:
        super().__init__(f"no answer within {budget_s:.3g} s")
        self.budget_s, self.attempts = budget_s, list(attempts or [])


class ModelError(AdaptError):
    """The model itself raised; the message is the model's own."""

    code = "model"


class DisagreementError(AdaptError):
    """Workers of one numeric class came to different bits from the same input, and there is no other that could tell which are right. The
    request has no answer, as it might be a wrong one; asked again it may be computed elsewhere.

    Attributes:
        stage: zero-based. workers: who differ, by name.
    """

    code = "disagreement"

    def __init__(self, stage: int, *, workers: list[str]) -> None:
        super().__init__(
            f"stage {stage}: {' and '.join(workers)} came to different outputs from the same input, though they should agree to the last bit, "
            "and no other worker could tell which is right; look at these machines, or give the stage to a third worker of their kind"
        )
        self.stage, self.workers = stage, list(workers)


class PoisonError(AdaptError):
    """The request killed the workers that ran it, and is not tried again. `attempts` tells what had been tried."""

    code = "poison"

    def __init__(self, message: str, *, attempts: list[Plain] | None = None) -> None:
        super().__init__(message)
        self.attempts = list(attempts or [])


class StageNotResidentError(AdaptError):
    """The worker was asked for a stage that it has not loaded; a neutral answer, nobody's failure."""

    code = "stage-not-resident"
    retryable = True


class WorkerLostError(AdaptError):
    """A worker fell silent or left while it held a task; another attempt may succeed."""

    code = "worker-lost"
    retryable = True

    def __init__(self, worker_id: str, reason: str) -> None:
        super().__init__(f"worker {worker_id} was lost: {reason}")
        self.worker_id = worker_id


class AttemptTimeoutError(AdaptError):
    """One try of a task took longer than its timeout; another attempt may succeed."""

    code = "attempt-timeout"
    retryable = True

    def __init__(self, worker_id: str, *, timeout_s: float) -> None:
        super().__init__(f"worker {worker_id} did not answer within {timeout_s:.3g} s")
        self.worker_id, self.timeout_s = worker_id, timeout_s


def _family(kind: type[AdaptError]) -> Iterator[type[AdaptError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _family(child)


BY_CODE: dict[str, type[AdaptError]] = {kind.code: kind for kind in _family(AdaptError)}
