"""adapt emulate around a cluster that is none: what is refused before it starts, who is interrupted how, and which status comes out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import ClassVar

import pytest

from adapt.emulation.description import ClusterSpec, DeviceSpec
from adapt.emulation.observation import Facts, Observation
from adapt.errors import AdaptError
from adapt.interfaces.cli import emulate, main

SPEC = ClusterSpec(name="one", devices=(DeviceSpec(name="pi"),))


class Cluster:
    """Starts nothing. `made`: all there were."""

    made: ClassVar[list[Cluster]] = []
    dies_after_s = 1e9

    def __init__(self, source, **settings) -> None:
        self.spec, self.events, self.is_isolated, self.address = SPEC, (), True, "tcp://127.0.0.1:1"
        self.is_closed, self._began = False, time.monotonic()
        Cluster.made.append(self)

    @property
    def dispatcher(self):
        is_alive = time.monotonic() < self._began + self.dies_after_s
        return SimpleNamespace(is_alive=is_alive, status=None if is_alive else -9, log_tail=lambda: "last words")

    def start(self) -> None: ...

    def play(self) -> None: ...

    def observation(self) -> Observation:
        return Observation(facts=Facts.of(SPEC, is_isolated=True), samples={}, events=())

    def close(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)  # impatience
        os.kill(os.getpid(), signal.SIGINT)
        self.is_closed = True


@pytest.fixture(autouse=True)
def cluster(monkeypatch):
    monkeypatch.setattr(emulate, "EmulatedCluster", Cluster)
    monkeypatch.setattr(emulate, "LOOK_S", 0.02)
    monkeypatch.setattr("adapt.interfaces.cli.interrupts.LOOK_S", 0.02)
    monkeypatch.setattr(Cluster, "made", [])
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    yield
    assert all(one.is_closed for one in Cluster.made)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def run(*arguments) -> int:
    return main.main(["emulate", "one", *map(str, arguments)], os.environ)


def test_what_cannot_be_is_refused_before_the_start(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert run("--out", tmp_path / "file" / "out", "--", "true") == 2
    assert run("--", "no-such-command-here") == 2
    assert Cluster.made == []
    said = capsys.readouterr().err
    assert "expected a folder" in said and "no such command" in said


def test_the_status_is_the_commands_also_if_nothing_can_be_written(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(emulate, "write", full)
    assert run("--out", tmp_path / "out", "--", "sh", "-c", "exit 7") == 7
    assert "No space left" in capsys.readouterr().err


def test_a_dispatcher_that_has_died_is_not_waited_for(monkeypatch, capsys):
    monkeypatch.setattr(Cluster, "dies_after_s", 0.05)
    assert run() == 1
    assert "the dispatcher has ended with status -9; its log:\nlast words" in capsys.readouterr().err


def test_a_command_goes_on_when_the_dispatcher_has_died_but_it_is_said_once(monkeypatch, capsys):
    monkeypatch.setattr(Cluster, "dies_after_s", 0.0)
    assert run("--", "sleep", "0.3") == 0
    assert capsys.readouterr().err.count("the dispatcher has ended with status -9") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_wait_and_all_is_closed(number):
    timer = threading.Timer(0.1, os.kill, (os.getpid(), number))
    timer.start()
    assert run() == 0
    timer.join()


def test_a_signal_before_the_start_is_not_missed(monkeypatch):
    monkeypatch.setattr(Cluster, "start", lambda self: os.kill(os.getpid(), signal.SIGTERM))
    assert run("--", "true") == 130


def test_all_leftovers_are_tried(monkeypatch, capsys):
    def clean(tag: str) -> None:
        if tag == "00000a":
            raise AdaptError("it cannot be removed")

    monkeypatch.setattr(emulate.ownership, "leftovers", lambda: ["00000a", "00000b"])
    monkeypatch.setattr(emulate.ownership, "clean", clean)
    assert main.main(["emulate", "--clean"]) == 1
    seen = capsys.readouterr()
    assert "cannot be removed" in seen.err and "00000b" in seen.out


# ── interrupting a command ───────────────────────────────────────────────────────────────────────────────────────────

SCRIPT = """
import sys
from adapt.interfaces.cli import interrupts
interrupts.PATIENCE_S, interrupts.INSISTENCE_S = float(sys.argv[1]), 0.2
with interrupts.Interrupts() as caught:
    try:
        interrupts.run_command([sys.executable, "-c", sys.argv[2]], {}, caught, lambda: None)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""
COMMAND = """
import signal, sys, time
def came(number, frame):
    print(signal.Signals(number).name, flush=True)
    if {ends}: sys.exit()
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, came)
print("ready", flush=True)
while True: time.sleep(60)
"""


def interrupted(*numbers: signal.Signals, ends: bool, patience_s: float = 60.0) -> list[str]:
    """What command and script say when the script alone gets these signals."""
    command = [sys.executable, "-c", SCRIPT, str(patience_s), COMMAND.format(ends=ends)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.2)
        return process.communicate(timeout=20)[0].split()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_who_is_terminated_terminates_the_command(number):
    assert interrupted(number, ends=True) == ["SIGTERM", "interrupted"]


def test_ctrl_c_is_not_sent_twice_and_patience_ends():
    """From a terminal the command would have got one of its own."""
    assert interrupted(signal.SIGINT, ends=True, patience_s=0.3) == ["SIGTERM", "interrupted"]


def test_at_a_second_interrupt_even_a_stubborn_command_has_to_go():
    assert interrupted(signal.SIGINT, signal.SIGINT, ends=False) == ["SIGTERM", "interrupted"]
