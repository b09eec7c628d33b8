"""Logs for people: one line, fields after the message."""

from __future__ import annotations

import argparse
import io
import logging

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


def lines(level, *records, environ=None):
    stream = io.StringIO()
    logs.set_up(argparse.Namespace(log_level=level), environ or {}, stream=stream)
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
        logs.set_up(argparse.Namespace(log_level=None), {"ADAPT_LOG_LEVEL": "loud"})
