"""What all doors do alike: run, and turn an error into one line and an exit status."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable

from adapt.errors import AdaptError, ConfigError

OK, FAILED, MISUSED, INTERRUPTED = 0, 1, 2, 130  # 2 is argparse's own, 130 the shell's for SIGINT
COLLECT_AFTER = 10_000  # objects more; with Python's own threshold what is under way is looked through again and again


def run_door(program: str, action: Callable[[], int]) -> int:
    """The exit status: the action's, or 2 for a wrong configuration, 1 for any other error of ours, 130 after Ctrl-C.

    Args:
        program: the name that errors are reported under.
    """
    try:
        return action()
    except ConfigError as error:
        return _report(program, error, MISUSED)
    except AdaptError as error:
        return _report(program, error, FAILED)
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `adapt status | head`
        sys.stderr.close()  # Python would complain on its way out that it cannot flush standard output
        return FAILED


def spare_the_collector() -> None:
    """What has been imported stays for as long as the process does: with torch, to look through it takes a tenth of a second each time.
    What comes later is mostly freed without the collector."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER)


def _report(program: str, error: AdaptError, status: int) -> int:
    print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
    return status
