"""adapt emulate: a cluster of unequal devices on this machine, for one command or until Ctrl-C."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from adapt.config import format_size
from adapt.emulation import ownership, ready
from adapt.emulation.cluster import EmulatedCluster
from adapt.emulation.description import HOST, DeviceSpec
from adapt.emulation.machines import FLOOR_BYTES
from adapt.emulation.observation import Observation
from adapt.emulation.plot import draw
from adapt.emulation.report import summary, troubles, write
from adapt.errors import AdaptError, ConfigError
from adapt.interfaces.cli.doors import FAILED, OK
from adapt.interfaces.cli.interrupts import LOOK_S, Interrupts, run_command
from adapt.interfaces.tables import print_table
from adapt.runtime.local import LocalProcess

PLAIN_WIDTH = 120
NOTHING = "-"
PICTURE, LOGS = "picture.png", "{}.log"
ABOUT = """\
Run a cluster of unequal devices on this machine: CPU shares, memory, links and mishaps as a file describes them. A command after "--"
finds the cluster by ADAPT_DISPATCHER; when it ends, the cluster ends, and its exit status is the one of adapt emulate. Without a command
the cluster runs until Ctrl-C. The schedule of events begins when everything is ready.
"""
EPILOG = """\
examples:
  adapt emulate --list
  adapt emulate pi3 -- python my_program.py
  adapt emulate cluster.toml --seed 7 --out results -- python my_program.py
"""


def add_to(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "emulate",
        help="a cluster of unequal devices on this machine",
        usage="%(prog)s [options] CLUSTER [-- COMMAND ...]",
        description=ABOUT,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("cluster", nargs="?", metavar="CLUSTER", help="a TOML file, or the name of a ready cluster")
    parser.set_defaults(after=[])
    parser.add_argument("--list", action="store_true", dest="is_list", help="show the ready clusters")
    parser.add_argument("--clean", action="store_true", help="remove what emulations that were killed have left behind")
    parser.add_argument("--seed", metavar="N", type=int, help="of random events and corrupted bytes (default: the file's)")
    parser.add_argument("--time-scale", metavar="K", type=float, default=1.0, help="everything takes K times as long (default: 1)")
    parser.add_argument(
        "--no-isolation", action="store_true", help="ordinary processes, no limits of CPU, memory and rate; needs no rights"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="write samples, events, a picture and the logs to this folder")
    return parser


def run(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """The command's exit status."""
    if options.is_list:
        return _list()
    if options.clean:
        return _clean()
    if options.cluster is None:
        raise ConfigError("which cluster? Give a TOML file or a name; adapt emulate --list shows those that come with ADAPT")
    _check(options, environ)
    console = _console()
    with Interrupts() as interrupts:
        cluster = EmulatedCluster(options.cluster, seed=options.seed, time_scale=options.time_scale, is_isolated=not options.no_isolation)
        # two of them, so that wherever a signal comes the cluster is closed, and none disturbs that
        try:
            try:
                cluster.start()
                return _use(cluster, options, environ, interrupts, console)
            finally:
                interrupts.ignore()
        finally:
            cluster.close()


def _check(options: argparse.Namespace, environ: Mapping[str, str]) -> None:
    """What would be a pity to find out after the run."""
    if options.after and shutil.which(options.after[0], path=environ.get("PATH")) is None:
        raise ConfigError(f"{options.after[0]!r} cannot be run: there is no such command")
    if options.out is not None:
        try:
            options.out.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=options.out):
                pass
        except OSError as error:
            raise ConfigError(f"--out {options.out}: cannot be written: {error.strerror}; expected a folder that can be") from None


def _use(
    cluster: EmulatedCluster, options: argparse.Namespace, environ: Mapping[str, str], interrupts: Interrupts, console: Console
) -> int:
    """The exit status."""
    try:
        _introduce(cluster, console)
        cluster.play()
        if options.after:
            return _run_command(options.after, cluster, environ, interrupts)
        return _wait_for_ctrl_c(cluster)
    except KeyboardInterrupt:
        if options.after:
            raise
        return OK
    finally:
        try:
            _report(cluster, console, options.out)
        except OSError as error:  # the disk is full, say; the command's status counts more
            _say(f"not all can be written: {error}")


def _console() -> Console:
    """Everything goes to standard error: standard output is the command's."""
    console = Console(stderr=True)
    return console if console.is_terminal else Console(stderr=True, width=PLAIN_WIDTH)


def _list() -> int:
    for name, about in ready.names().items():
        print(f"{name:<12} {about}")
    return OK


def _clean() -> int:
    tags, status = ownership.leftovers(), OK
    for tag in tags:
        try:
            ownership.clean(tag)
        except AdaptError as error:  # the others can go nevertheless
            _say(str(error))
            status = FAILED
        else:
            print(f"removed what emulation {tag} had left behind")
    if not tags:
        print("nothing was left behind")
    return status


def _run_command(command: Sequence[str], cluster: EmulatedCluster, environ: Mapping[str, str], interrupts: Interrupts) -> int:
    said: list[str] = []

    def look() -> None:
        if not said and not cluster.dispatcher.is_alive:
            said.append(_obituary(cluster.dispatcher))
            _say(said[0])

    status = run_command(command, {**environ, "ADAPT_DISPATCHER": cluster.address}, interrupts, look)
    if status < 0:
        _say(f"the command was ended by {signal.Signals(-status).name}")
        return FAILED
    return status


def _wait_for_ctrl_c(cluster: EmulatedCluster) -> int:
    """Or until there is nothing to wait for."""
    while cluster.dispatcher.is_alive:
        time.sleep(LOOK_S)
    _say(_obituary(cluster.dispatcher))
    return FAILED


def _obituary(dispatcher: LocalProcess) -> str:
    return f"the dispatcher has ended with status {dispatcher.status}; its log:\n{dispatcher.log_tail()}"


def _say(words: str) -> None:
    print(f"adapt emulate: {words}", file=sys.stderr)


# ── what is said ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _introduce(cluster: EmulatedCluster, console: Console) -> None:
    spec = cluster.spec
    said = [f"seed {spec.seed}", f"{len(cluster.events)} events"]
    if spec.time_scale != 1.0:
        said.append(f"everything takes {spec.time_scale:g} times as long")
    if not cluster.is_isolated:
        said.append("[yellow]no isolation: CPU, memory and rates are not limited[/yellow]")
    console.print(f"[bold]{escape(spec.name)}[/bold]  {escape(spec.about)}".rstrip() + f"\n{', '.join(said)}", highlight=False)
    print_table(console, "devices", *_devices(spec.devices, is_limited=cluster.is_isolated))
    console.print(f"dispatcher ready at {cluster.address}" + ("" if spec.dispatcher == HOST else f" on {spec.dispatcher}"), highlight=False)


def _devices(devices: Sequence[DeviceSpec], *, is_limited: bool) -> tuple[list[str], list[list[str]]]:
    """Columns and rows. Neighbours that are alike but for their names share a row, and a column that says nothing is left out."""
    columns = ["device", "cores>", "stage budget>", "memory limit>", "up>", "down>", "latency>", "stands for"]
    rows = []
    for facts, alike in groupby(devices, key=lambda device: _facts(device, is_limited=is_limited)):
        names = [device.name for device in alike]
        rows.append([escape(names[0] if len(names) == 1 else f"{names[0]} to {names[-1]} ({len(names)})"), *facts])
    kept = [place for place in range(len(columns)) if any(row[place] not in (NOTHING, "") for row in rows)]
    return [columns[place] for place in kept], [[row[place] for place in kept] for row in rows]


def _facts(device: DeviceSpec, *, is_limited: bool) -> list[str]:
    budget = device.memory_bytes
    return [
        f"{device.cores:g}" if device.cores is not None and is_limited else NOTHING,
        format_size(budget) if budget is not None else NOTHING,
        format_size(budget + FLOOR_BYTES) if budget is not None and is_limited else NOTHING,
        _rate(device.up_bytes_per_s if is_limited else None),
        _rate(device.down_bytes_per_s if is_limited else None),
        f"{device.latency_s * 1e3:g} ms" + (f" + {device.jitter_s * 1e3:g}" if device.jitter_s else "") if device.latency_s else NOTHING,
        escape(device.board if device.has_worker else f"{device.board} (no worker)".strip()),
    ]


def _rate(bytes_per_s: float | None) -> str:
    return NOTHING if bytes_per_s is None else f"{bytes_per_s * 8 / 1e6:g} Mbit/s"


def _report(cluster: EmulatedCluster, console: Console, out: Path | None) -> None:
    observation = cluster.observation()
    columns, rows = summary(observation)
    print_table(console, "what the devices used", columns, rows)
    for words in troubles(observation):
        console.print(f"[yellow]{escape(words)}[/yellow]", highlight=False, soft_wrap=True)
    if out is not None:
        written = [*write(observation, out), *_drawn(observation, out)]
        for file in cluster.directory.glob("*.log"):
            shutil.copy(file, out / LOGS.format(file.stem))
        written.append(out / LOGS.format("*"))
        console.print(f"written: {', '.join(os.fspath(path) for path in written)}", highlight=False, soft_wrap=True)


def _drawn(observation: Observation, out: Path) -> list[Path]:
    try:
        return [draw(observation, out / PICTURE)]
    except ConfigError as error:  # a picture is worth no failure
        _say(str(error))
        return []
