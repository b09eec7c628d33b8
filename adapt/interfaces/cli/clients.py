"""What the commands that talk to a dispatcher have in common."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from adapt.config import DEFAULT_ADDRESS, check_address, dispatcher_address
from adapt.errors import ConfigError
from adapt.runtime.client import Client

CONNECT_TIMEOUT_S = 5.0


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dispatcher", metavar="ADDRESS", help=f"address of the dispatcher (default: $ADAPT_DISPATCHER or {DEFAULT_ADDRESS})"
    )
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=float,
        default=CONNECT_TIMEOUT_S,
        help=f"longest wait for the dispatcher (default: {CONNECT_TIMEOUT_S:g} s)",
    )


@contextmanager
def connected(options: argparse.Namespace, environ: Mapping[str, str]) -> Iterator[Client]:
    """A client of the dispatcher that options or environment name.

    Raises:
        ConfigError: the address or the timeout is impossible.
        ConnectError: nobody answers there in time.
    """
    if not 0 < options.timeout <= 3600:
        raise ConfigError(f"timeout={options.timeout:g}: expected seconds, above 0 and at most 3600")
    if options.dispatcher:
        address = check_address(options.dispatcher, key="dispatcher", is_listening=False)
    else:
        address = dispatcher_address(environ)
    with Client(address, connect_timeout_s=options.timeout) as client:
        yield client
