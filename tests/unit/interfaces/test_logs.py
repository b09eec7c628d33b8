"""Logs for people: one line, fields after the message."""

from __future__ import annotations

import argparse
import io
import json
import logging
import math
import time
from pathlib import Path

import pytest

from adapt.errors import ConfigError
from adapt.interfaces.cli import logs


@pytest.fixture
def restored():
    """The logging of the tests, as it was."""
    root, ours = logging.getLogger(), logging.getLogger("adapt")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


def lines(level, *records, environ=None, form=None):
    stream = io.StringIO()
    logs.set_up(argparse.Namespace(log_level=level, log_format=form), environ or {}, stream=stream)
    for name, number, message, fields in records:
        logging.getLogger(name).log(number, message, extra=fields)
    return stream.getvalue().splitlines()


@pytest.mark.usefixtures("restored")
def test_fields_follow_the_message():
    [line] = lines(
        "info", ("adapt.runtime.dispatcher", logging.INFO, "worker joined", {"worker_id": "w1", "reason": "it came", "silent_s": 1.25})
    )
    assert line.endswith(" INFO     worker joined  worker_id=w1 reason='it came' silent_s=1.25")


@pytest.mark.usefixtures("restored")
def test_the_level_is_ours_and_others_only_warn():
    records = [(name, level, "x", {}) for name in ("adapt.a", "other") for level in (logging.DEBUG, logging.INFO, logging.WARNING)]
    assert len(lines("debug", *records)) == 4
    assert len(lines(None, *records)) == 3
    assert len(lines(None, *records, environ={"ADAPT_LOG_LEVEL": "error"})) == 1
    assert lines("info", records[-1])[0].endswith("other: x")


def test_an_unknown_level_is_refused():
    with pytest.raises(ConfigError, match="ADAPT_LOG_LEVEL='loud': expected one of debug"):
        logs.set_up(argparse.Namespace(log_level=None, log_format=None), {"ADAPT_LOG_LEVEL": "loud"})


def test_an_unknown_format_is_refused():
    with pytest.raises(ConfigError, match="ADAPT_LOG_FORMAT='xml': expected one of json, text"):
        logs.set_up(argparse.Namespace(log_level=None, log_format=None), {"ADAPT_LOG_FORMAT": "xml"})


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("chosen", [{"form": "json"}, {"environ": {"ADAPT_LOG_FORMAT": "json"}}])
def test_programs_get_a_json_object_a_line_stamped_by_a_clock_that_is_never_set(chosen):
    before = time.monotonic()
    path, fields = Path("a b"), {"worker_id": "w1", "reason": 'it "came"\nback', "silent_s": 1.25, "level": "shadowed"}
    first, second = lines(
        "info",
        ("adapt.a", logging.WARNING, "worker joined", fields),
        ("adapt.a", logging.INFO, "x", {"at": path, "rate": math.inf, "rates": [math.nan], "of": {(1, 2): 3}}),
        **chosen,
    )
    told = json.loads(first)
    assert before <= told.pop("monotonic_s") <= json.loads(second)["monotonic_s"] <= time.monotonic()
    assert abs(told.pop("unix_s") - time.time()) < 60
    assert told == {**fields, "level": "warning", "source": "adapt.a", "event": "worker joined"}
    other = json.loads(second, parse_constant=pytest.fail)
    assert [other[name] for name in ("at", "rate", "rates", "of")] == ["a b", "inf", "[nan]", "{(1, 2): 3}"]


@pytest.mark.usefixtures("restored")
def test_a_traceback_stays_on_its_line():
    stream = io.StringIO()
    logs.set_up(argparse.Namespace(log_level=None, log_format="json"), {}, stream=stream)
    try:
        raise ValueError("so")
    except ValueError:
        logging.getLogger("adapt.a").exception("it failed")
    (line,) = stream.getvalue().splitlines()
    assert "ValueError: so" in json.loads(line)["traceback"]
