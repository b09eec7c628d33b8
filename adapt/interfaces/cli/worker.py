"""Entry point of adapt-worker."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence

from adapt.config import WorkerConfig
from adapt.errors import ConfigError
from adapt.interfaces.cli import logs
from adapt.interfaces.cli.doors import FAILED, run_door, spare_the_collector

PROGRAM = "adapt-worker"
ABOUT = "Execute stages of models on this device for a dispatcher."
EPILOG = """\
A flag goes over its ADAPT_* variable (--cache-dir: ADAPT_CACHE_DIR), that over the file, that over the default.
When the dispatcher knows it, it prints one line on standard output: adapt-worker ready name=NAME ... pid=N
The first SIGTERM or SIGINT hands back what has not begun and finishes the rest; a second SIGINT stops at once.
A computation that hangs cannot be ended: then the process begins anew, with the same id (--hang-timeout).
Exit status: 0 after a drain, 1 for a runtime error, 2 for a wrong configuration, 130 after a second SIGINT.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(PROGRAM, description=ABOUT, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    WorkerConfig.add_options(parser)
    logs.add_option(parser)
    return parser


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ) -> int:
    """Exit status: 0 after a drain, 1 for a runtime error, 2 for a wrong configuration."""
    options = build_parser().parse_args(argv)

    def serve() -> int:
        logs.set_up(options, environ)
        config = WorkerConfig.load(options, environ)
        if importlib.util.find_spec("torch") is None:
            raise ConfigError("a worker needs torch: install adapt-inference[worker]")
        return asyncio.run(_run(config))

    return run_door(PROGRAM, serve)


async def _run(config: WorkerConfig) -> int:
    from adapt.runtime.worker import Worker  # torch takes a second: --help and a wrong flag do not wait for it

    spare_the_collector()
    return await Worker(config, on_hang=begin_anew).run()


def begin_anew(words: str) -> None:
    """The same process from its start: whoever supervises it need not notice. What hangs goes, with all connections."""
    print(f"{PROGRAM}: {words}", file=sys.stderr, flush=True)
    try:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    except OSError as error:  # this Python was replaced, say
        print(f"{PROGRAM}: cannot begin anew: {error}", file=sys.stderr, flush=True)
        os._exit(FAILED)


if __name__ == "__main__":
    sys.exit(main())
