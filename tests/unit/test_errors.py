"""Every error crosses the wire as code, message and plain fields, and comes back as what it was."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapt import errors
from adapt.errors import AdaptError

EXAMPLES: list[AdaptError] = [
    AdaptError("something"),
    errors.ConfigError("listen='x': expected tcp://HOST:PORT"),
    errors.WireError("frame 3: expected 8 bytes, got 7"),
    errors.VersionError(9, ours=1),
    errors.ConnectError("tcp://127.0.0.1:5570", "connection refused"),
    errors.InputMismatchError("expected float32, got int64"),
    errors.UnknownModelError("resnet05", suggestions=["resnet50"]),
    errors.ExportError("data-dependent control flow"),
    errors.ExportInterruptedError("its process was killed"),
    errors.ExportUnavailableError("no torch here"),
    errors.PlanError("stage 2 needs 80 MB, no worker has more than 64"),
    errors.CanaryError("stage 1 gives another output", canary=0, stage=0),
    errors.OverloadedError("queue is full", retry_after_s=0.25),
    errors.DeadlineExceededError(2.0, attempts=[{"worker": "a", "attempt": 1, "reason": None}]),
    errors.ModelError("index out of range"),
    errors.PoisonError("killed a, b and c"),
    errors.DisagreementError(1, workers=["a", "b"]),
    errors.StageNotResidentError("stage 1"),
    errors.WorkerLostError("a", "its connection closed"),
    errors.AttemptTimeoutError("a", timeout_s=1.5),
]

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)


def test_there_is_an_example_of_every_error_and_every_code_is_its_own():
    assert {type(example) for example in EXAMPLES} == set(errors.BY_CODE.values())
    assert all(errors.BY_CODE[kind.code] is kind for kind in errors.BY_CODE.values())
    assert len({example.code for example in EXAMPLES}) == len(EXAMPLES)


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: error.code)
def test_an_error_crosses_the_wire(error):
    code, message, fields = msgspec.msgpack.decode(msgspec.msgpack.encode(error.to_wire()))
    back = AdaptError.from_wire(code, message, fields)
    assert type(back) is type(error)
    assert (str(back), back.fields, back.retryable) == (str(error), error.fields, error.retryable)
    assert back.to_wire() == error.to_wire()


def test_an_unknown_code_is_an_adapt_error_that_names_it():
    error = AdaptError.from_wire("from-the-future", "flux too high", {"flux": 3})
    assert type(error) is AdaptError and error.fields == {"flux": 3}
    assert str(error) == "flux too high (unknown error code 'from-the-future')"


@given(code=st.sampled_from(sorted(errors.BY_CODE)) | st.text(), message=st.text(), fields=st.dictionaries(
    st.text(max_size=9) | st.sampled_from(["args", "code", "retryable", "__class__", "_x", "fields", "to_wire"]),
    plain, max_size=4))  # fmt: skip
def test_whatever_fields_arrive_the_error_stays_usable(code, message, fields):
    error = AdaptError.from_wire(code, message, fields)
    assert str(error).startswith(message)
    assert type(error) is errors.BY_CODE.get(code, AdaptError) and error.code == type(error).code
    assert error.fields.items() <= fields.items()
    assert AdaptError.from_wire(*error.to_wire()).to_wire()[2] == error.fields


def test_suggestions_are_part_of_the_message():
    assert "did you mean resnet50 or resnet18?" in str(errors.UnknownModelError("r", suggestions=["resnet50", "resnet18"]))
    assert "did you mean" not in str(errors.UnknownModelError("r"))
