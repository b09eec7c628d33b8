"""Doors: what they print and with which status they end, without starting anything."""

from __future__ import annotations

import logging

import pytest

from adapt.errors import ConfigError, ConnectError
from adapt.interfaces.cli import dispatcher, doors, worker


@pytest.fixture(autouse=True)
def restored():
    """The logging of the tests, as it was."""
    root, ours = logging.getLogger(), logging.getLogger("adapt")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


def raising(error):
    def action():
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ConfigError("listen='x':\n expected y"), 2, "adapt: listen='x': expected y\n"),
        (ConnectError("tcp://h:1", "no answer"), 1, "adapt: dispatcher at tcp://h:1: no answer\n"),
        (KeyboardInterrupt(), 130, "adapt: interrupted\n"),
    ],
)
def test_an_error_is_one_line_and_a_status(capsys, error, status, line):
    assert doors.run_door("adapt", raising(error)) == status
    assert capsys.readouterr() == ("", line)


def test_a_bug_is_not_hidden():
    with pytest.raises(KeyError):
        doors.run_door("adapt", raising(KeyError("x")))


@pytest.mark.parametrize(
    ("main", "argv", "environ", "words"),
    [
        (
            dispatcher.main,
            ["--listen", "tcp://0.0.0.0:5570"],
            {},
            "adapt-dispatcher: listen='tcp://0.0.0.0:5570': expected a loopback address",
        ),
        (dispatcher.main, [], {"ADAPT_SILENCE": "soon"}, "adapt-dispatcher: ADAPT_SILENCE='soon': expected seconds"),
        (dispatcher.main, ["--config", "/nowhere"], {}, "adapt-dispatcher: config='/nowhere': No such file"),
        (dispatcher.main, [], {"ADAPT_LOG_LEVEL": "loud"}, "adapt-dispatcher: ADAPT_LOG_LEVEL='loud'"),
        (worker.main, ["--memory-limit", "lots"], {}, "adapt-worker: --memory-limit='lots': expected a size"),
        (worker.main, [], {"ADAPT_DISPATCHER": "nowhere"}, "adapt-worker: dispatcher='nowhere': expected tcp://HOST:PORT"),
    ],
)
def test_a_wrong_configuration_is_status_2(capsys, main, argv, environ, words):
    assert main(argv, environ) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(words)
    assert err.count("\n") == 1


@pytest.mark.parametrize("main", [dispatcher.main, worker.main])
def test_an_unknown_flag_is_status_2(capsys, main):
    with pytest.raises(SystemExit) as caught:
        main(["--bogus"], {})
    assert caught.value.code == 2
    assert "--bogus" in capsys.readouterr().err


@pytest.mark.parametrize(("main", "flag"), [(dispatcher.main, "--lease-ttl SECONDS"), (worker.main, "--memory-limit SIZE")])
def test_help_names_settings_and_exit_statuses(capsys, main, flag):
    with pytest.raises(SystemExit) as caught:
        main(["--help"], {})
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert flag in out
    assert "Exit status: 0 after a drain" in out


def test_an_exposed_dispatcher_warns(capsys, monkeypatch):
    async def run(config):
        assert config.is_exposed
        return 0

    monkeypatch.setattr(dispatcher, "_run", run)
    assert dispatcher.main(["--listen", "tcp://0.0.0.0:5570", "--insecure"], {}) == 0
    assert "warning: tcp://0.0.0.0:5570 can be reached by other machines" in capsys.readouterr().err
