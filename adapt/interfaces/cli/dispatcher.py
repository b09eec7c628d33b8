"""Entry point of adapt-dispatcher."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Mapping, Sequence

from adapt.config import DispatcherConfig
from adapt.interfaces.cli import logs
from adapt.interfaces.cli.doors import run_door, spare_the_collector
from adapt.runtime import heap

PROGRAM = "adapt-dispatcher"
ABOUT = "Accept workers and clients, plan where stages run, and answer every request once."
EPILOG = """\
A flag goes over its ADAPT_* variable (--lease-ttl: ADAPT_LEASE_TTL), that over the file, that over the default.
When it is ready it prints one line on standard output: adapt-dispatcher ready listen=ADDRESS term=N pid=N
The first SIGTERM or SIGINT lets requests under way end; a second SIGINT stops at once.
Exit status: 0 after a drain, 1 for a runtime error, 2 for a wrong configuration, 130 after a second SIGINT.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(PROGRAM, description=ABOUT, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    DispatcherConfig.add_options(parser)
    logs.add_option(parser)
    return parser


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ) -> int:
    """Exit status: 0 after a drain, 1 for a runtime error, 2 for a wrong configuration."""
    options = build_parser().parse_args(argv)

    def serve() -> int:
        logs.set_up(options, environ)
        config = DispatcherConfig.load(options, environ)
        if config.is_exposed:
            print(
                f"{PROGRAM}: warning: {config.listen} can be reached by other machines, without encryption or authentication (--insecure)",
                file=sys.stderr,
            )
        return asyncio.run(_run(config))

    return run_door(PROGRAM, serve)


async def _run(config: DispatcherConfig) -> int:
    from adapt.runtime.dispatcher import Dispatcher  # a wrong flag is told before anything heavy is loaded

    heap.keep_freed()
    spare_the_collector()
    return await Dispatcher(config).run()


if __name__ == "__main__":
    sys.exit(main())
