"""Entry point of adapt, the umbrella over what people do with a cluster."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata

from adapt.interfaces.cli import demo, deploy, emulate, logs, plan, profile, rollback, status
from adapt.interfaces.cli.doors import OK, run_door
from adapt.protocol.messages import PROTOCOL_VERSION
from adapt.version import VERSION

PROGRAM = "adapt"
ABOUT = "Distributed inference of neural networks over machines that come, go and fail."
EPILOG = """\
The processes of a cluster are adapt-dispatcher and adapt-worker.
ADAPT_DISPATCHER is the address that all of this uses unless --dispatcher gives another.
Exit status: 0 when all went well, 1 for a runtime error, 2 for wrong usage or configuration.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(PROGRAM, description=ABOUT, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (demo, deploy, rollback, status, profile, plan, emulate):
        subparser = command.add_to(commands)
        logs.add_option(subparser, default="warning")
        subparser.set_defaults(action=command.run)
    version = commands.add_parser("version", help="what is installed", description="Print what is installed.")
    version.set_defaults(action=_print_version, log_level=None, log_format=None)
    return parser


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ) -> int:
    """Exit status: 0 when all went well, 1 for a runtime error, 2 for wrong usage or configuration."""
    given, after = _split(list(sys.argv[1:] if argv is None else argv))
    options = build_parser().parse_args(given)
    if after:
        options.after = after

    def act() -> int:
        logs.set_up(options, environ, default="warning")
        return int(options.action(options, environ))

    return run_door(PROGRAM, act)


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Of `adapt emulate`, what stands after "--" is a command of its own: argparse would mix the two."""
    if "--" not in argv or argv[0] != "emulate":
        return argv, []
    place = argv.index("--")
    return argv[:place], argv[place + 1 :]


def _print_version(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    try:
        torch = f"torch {metadata.version('torch')}"
    except metadata.PackageNotFoundError:
        torch = "no torch: no workers and no exports here"
    print(f"adapt {VERSION}, protocol {PROTOCOL_VERSION}, Python {platform.python_version()}, {torch}")
    return OK


if __name__ == "__main__":
    sys.exit(main())
