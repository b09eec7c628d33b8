"""Ends what a cluster has started if the process that started it dies without doing so.

Reads "+PID" and "-PID" lines from standard input; when that ends, whatever is still listed is killed. Run as a child process:
the kernel closes the pipe however the parent ends, by SIGKILL too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal is the parent's to deal with
    listed: set[int] = set()
    for line in sys.stdin:
        pid = int(line[1:])
        if line[0] == "+":
            listed.add(pid)
        else:
            listed.discard(pid)
    for pid in listed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
