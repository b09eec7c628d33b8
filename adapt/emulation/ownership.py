"""What belongs to which emulation, so that each cleans up after itself and after nobody else.

A record /run/adapt-emulation/<tag>.json is made before anything else and removed after everything else, and an emulation holds the
lock (flock) of its record as long as it lives: the kernel lets go of it however the process ends. So

    record, locked       an emulation that lives
    record, not locked   leftovers; `clean` takes the lock and removes whatever carries the tag
    no record            nothing of ours, whatever it is called
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import json
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from adapt.emulation import groups, network
from adapt.errors import AdaptError
from adapt.runtime.forks import forget_in_forks

RECORDS = Path("/run/adapt-emulation")
SUBNETS = ipaddress.IPv4Network("10.77.0.0/16")
TAG = re.compile(r"[0-9a-f]{6}")
END_WITHIN_S = 5.0  # for killed processes
POLL_S = 0.005
DIRECTORY_PREFIX = "adapt-emulation-"
TOOLS = ("ip", "tc", "bridge")  # all of iproute2


class Claim:
    """The right to use a tag and a subnet; made by `claim`. Use it as a context manager, or `close` it.

    Attributes:
        tag: six hexadecimal digits that all things of the emulation carry.
        subnet: a /24 for its machines.
    """

    def __init__(self, tag: str, subnet: ipaddress.IPv4Network, lock: int) -> None:
        self.tag, self.subnet = tag, subnet
        self._lock: int | None = lock
        self._owner = os.getpid()
        forget_in_forks(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<claim {self.tag}, {self.subnet}{'' if self._lock is not None else ', closed'}>"

    def close(self) -> None:
        """Remove all that carries the tag, what still runs there included. Closing twice is nothing, and so is it in a fork of the owner.

        Raises:
            AdaptError: something stays; closing can be tried again, and later `clean`.
        """
        if self._lock is None or os.getpid() != self._owner:
            return
        _remove(self.tag)
        os.close(self._lock)
        self._lock = None

    def forget(self) -> None:
        """In a fork: to close the file leaves the owner its lock, but to keep it open would lock the record for longer than the owner lives."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def claim(directory: Path | None = None) -> Claim:
    """A tag and a subnet that nobody has. Raises AdaptError.

    Args:
        directory: a temporary one, made with `DIRECTORY_PREFIX`, that `clean` is to remove if its owner could not.
    """
    with _door():
        taken = [_subnet_of(path) for path in _records()]
        subnet = _free_subnet([*_networks_of_host(), *(one for one in taken if one is not None)])
        tag = _free_tag()
        lock = os.open(_record(tag), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        record = {"tag": tag, "subnet": str(subnet), "pid": os.getpid()}
        os.write(lock, json.dumps(record if directory is None else {**record, "directory": str(directory.resolve())}).encode())
        return Claim(tag, subnet, lock)


def leftovers() -> list[str]:
    """Tags of emulations that died without cleaning up."""
    if not RECORDS.is_dir():
        return []
    with _door():
        return [path.stem for path in _records() if _is_free(path)]


def clean(tag: str) -> None:
    """Remove all leftovers with this tag: processes in its groups and namespaces, groups, namespaces, interface, record, and its temporary
    directory.

    Raises:
        AdaptError: its emulation is alive, or something cannot be removed.
    """
    if not TAG.fullmatch(tag):
        raise AdaptError(f"tag {tag!r}: expected six hexadecimal digits")
    try:
        lock = os.open(_record(tag), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        with _door():  # else a look for leftovers, which tries the lock, would pass for its owner
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_nlink:  # else another process has just cleaned it
            _remove(tag, _directory_of(_record(tag)))
    except BlockingIOError:
        raise AdaptError(f"emulation {tag} is alive; end it first") from None
    finally:
        os.close(lock)


def missing_rights() -> list[str]:
    """What an isolated emulation lacks on this machine, in words, with what to do; nothing if all is there.

    It tries: it makes a namespace with a link and a group, and removes them.
    """
    if os.geteuid() != 0:
        return ["not root: namespaces, links and limits need it; run with sudo"]
    missing = [f"`{tool}` is not installed; install iproute2" for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return missing
    try:
        with claim() as probe:
            return [*_missing_network(probe.tag), *_missing_groups(probe.tag)]
    except AdaptError as error:
        return [str(error)]


def _missing_network(tag: str) -> Iterator[str]:
    name = network.namespace_of(tag, network.HUB)
    for lines, tool, inside, complaint in (
        ([f"netns add {name}"], "ip", None, "network namespaces are refused; allow CAP_SYS_ADMIN and CAP_NET_ADMIN (a container: --privileged)"),
        (["link add name a type veth peer name b"], "ip", name, "links are refused; the kernel needs veth (modprobe veth)"),
        (["link add name c type bridge"], "ip", name, "bridges are refused; the kernel needs bridge (modprobe bridge)"),
        (["qdisc replace dev a root tbf rate 1mbit burst 3200b limit 9600b"], "tc", name, "rates are refused; the kernel needs sch_tbf (modprobe sch_tbf)"),
        (["qdisc replace dev b root blackhole"], "tc", name, "cut links are refused; the kernel needs CONFIG_NET_SCHED"),
    ):  # fmt: skip
        try:
            network.run_batch(tool, inside, lines)
        except AdaptError as error:
            yield f"{complaint}: {error}"
            return
    try:
        with network.inside(network.NAMESPACES / name):
            Path("/proc/sys/net/ipv4/conf/all/rp_filter").write_text("0")
    except OSError as error:
        yield f"settings of a namespace are refused ({error}); mount /proc/sys writable (a container: --privileged)"


def _missing_groups(tag: str) -> Iterator[str]:
    try:
        made = groups.Groups(tag)
        group = made.make("_probe", cores=0.5, memory_bytes=64 << 20)
        group.begin_limit()
        group.usage()
        made.close()
    except AdaptError as error:
        yield str(error)
    except OSError as error:
        yield f"limits are refused ({error}); the kernel needs CFS bandwidth control and memory control"


def _remove(tag: str, directory: Path | None = None) -> None:
    """All that carries the tag, then that directory, the record last. Half-made things and things that are gone are no error."""
    _end_processes(tag)
    network.remove(tag)
    groups.remove(tag)
    if directory is not None:
        shutil.rmtree(directory, ignore_errors=True)
    _record(tag).unlink(missing_ok=True)


def _end_processes(tag: str) -> None:
    limit = time.monotonic() + END_WITHIN_S
    while inside := (groups.processes(tag) | network.processes(tag)) - {os.getpid()}:
        if time.monotonic() > limit:
            raise AdaptError(f"emulation {tag}: processes that do not end: {', '.join(map(str, sorted(inside)))}")
        for process in inside:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(POLL_S)


@contextlib.contextmanager
def _door() -> Iterator[None]:
    """Within it nobody else claims or looks for leftovers. Raises AdaptError."""
    try:
        RECORDS.mkdir(mode=0o755, parents=True, exist_ok=True)
        door = os.open(RECORDS / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise AdaptError(f"{RECORDS} cannot be written: {error.strerror}; run with sudo") from error
    try:
        fcntl.flock(door, fcntl.LOCK_EX)
        yield
    finally:
        os.close(door)


def _record(tag: str) -> Path:
    return RECORDS / f"{tag}.json"


def _records() -> list[Path]:
    return sorted(path for path in RECORDS.glob("*.json") if TAG.fullmatch(path.stem))


def _is_free(record: Path) -> bool:
    try:
        lock = os.open(record, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(lock)


def _subnet_of(record: Path) -> ipaddress.IPv4Network | None:
    """None for a record that was only half written: then nothing had been made yet."""
    try:
        return ipaddress.IPv4Network(json.loads(record.read_text())["subnet"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _directory_of(record: Path) -> Path | None:
    """What may be removed of the directory that the record names: only one that is called as an emulation calls its own."""
    try:
        directory = Path(json.loads(record.read_text())["directory"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    is_ours = directory.is_absolute() and directory.name.startswith(DIRECTORY_PREFIX) and directory.parent.resolve() == directory.parent
    return directory if is_ours and directory.is_dir() and not directory.is_symlink() else None


def _free_tag() -> str:
    while True:
        tag = secrets.token_hex(3)
        if not (_record(tag).exists() or network.is_used(tag) or groups.is_used(tag)):
            return tag


def _free_subnet(taken: Iterable[ipaddress.IPv4Network]) -> ipaddress.IPv4Network:
    taken, subnets = list(taken), list(SUBNETS.subnets(new_prefix=24))
    random.shuffle(subnets)
    for subnet in subnets:
        if not any(subnet.overlaps(one) for one in taken):
            return subnet
    raise AdaptError(f"no subnet of {SUBNETS} is free: routes and addresses of this machine, and other emulations, take all of it")


def _networks_of_host() -> list[ipaddress.IPv4Network]:
    """Where its routes lead and what its addresses are, but for the default route."""
    routes = [str(route["dst"]) for route in _ip("route", "show", "table", "all")]
    interfaces = _ip("addr")
    addresses = [f"{one['local']}/{one['prefixlen']}" for interface in interfaces for one in interface.get("addr_info", [])]
    return [ipaddress.IPv4Network(text, strict=False) for text in (*routes, *addresses) if text not in ("default", "0.0.0.0/0")]


def _ip(*question: str) -> list[dict[str, Any]]:
    try:
        done = subprocess.run(["ip", "-json", "-4", *question], capture_output=True, text=True)
    except OSError as error:
        raise AdaptError(f"`ip` cannot be run: {error.strerror}; install iproute2") from error
    if done.returncode:
        raise AdaptError(f"`ip {' '.join(question)}` failed: {done.stderr.strip()}")
    return list(json.loads(done.stdout or "[]"))
