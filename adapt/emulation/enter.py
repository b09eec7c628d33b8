"""Runs a command within a network namespace and control groups; the process stays the same one, and so does its id.

    python -I -S enter.py [--netns PATH] [--procs FILE ...] -- COMMAND [ARGUMENT ...]

Run as a file, without site-packages: it needs nothing of ADAPT, and should cost nothing. Exit status: the command's; 125 if a
namespace or group cannot be entered, 127 if there is no such command.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import NoReturn

CLONE_NEWNET = 0x40000000
NOT_ENTERED, NOT_FOUND = 125, 127
USAGE = "usage: enter.py [--netns PATH] [--procs FILE ...] -- COMMAND [ARGUMENT ...]"


def enter_network(descriptor: int) -> None:
    """Move the calling thread into the network namespace of an open file. Raises OSError."""
    library = ctypes.CDLL(None, use_errno=True)  # os.setns came with Python 3.12
    if library.setns(descriptor, CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")


def join_group(procs: str) -> None:
    """Move this process into the group of that cgroup.procs file. Raises OSError."""
    descriptor = os.open(procs, os.O_WRONLY)
    try:
        os.write(descriptor, str(os.getpid()).encode())
    finally:
        os.close(descriptor)


def parse(arguments: list[str]) -> tuple[str | None, list[str], list[str]]:
    """Namespace, cgroup.procs files and command. Raises ValueError."""
    end = arguments.index("--")
    network, groups, command = None, [], arguments[end + 1 :]
    option = ""
    for word in arguments[:end]:
        if word in ("--netns", "--procs"):
            option = word
        elif option == "--netns" and network is None:
            network = word
        elif option == "--procs":
            groups.append(word)
        else:
            raise ValueError(word)
    if not command:
        raise ValueError("no command")
    return network, groups, command


def main(arguments: list[str]) -> NoReturn:
    try:
        network, groups, command = parse(arguments)
    except ValueError:
        print(USAGE, file=sys.stderr)
        sys.exit(NOT_ENTERED)
    place = ""
    try:
        for place in groups:
            join_group(place)
        if network is not None:
            place = network
            descriptor = os.open(network, os.O_RDONLY | os.O_CLOEXEC)
            enter_network(descriptor)
    except OSError as error:
        print(f"enter.py: {place} cannot be entered: {error}", file=sys.stderr)
        sys.exit(NOT_ENTERED)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"enter.py: {command[0]}: {error.strerror}", file=sys.stderr)
        sys.exit(NOT_FOUND)


if __name__ == "__main__":
    main(sys.argv[1:])
