"""adapt rollback: deploy an earlier version again."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from adapt.interfaces.cli import clients
from adapt.interfaces.cli.deploy import print_deployed
from adapt.interfaces.cli.doors import OK


def add_to(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "rollback",
        help="deploy an earlier version again",
        description="Deploy what an earlier version was, as the next version: loaded beside the present one, and then switched to. "
        "A second roll-back returns from the first. adapt status shows which versions are kept.",
    )
    parser.add_argument("name", metavar="NAME", help="of the deployment")
    parser.add_argument("--to", metavar="VERSION", type=int, help="which version (default: the one before the present one)")
    clients.add_options(parser)
    return parser


def run(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    console = Console(file=sys.stderr)
    with clients.connected(options, environ) as client:

        def told(words: str) -> None:
            console.print(f"{words} ...", style="dim", highlight=False, markup=False)

        model = client.rollback(options.name, version=options.to, progress=told)
    print_deployed(model.record)
    return OK
