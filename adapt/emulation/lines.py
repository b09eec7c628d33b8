"""The connections of one emulated device, each a line of the link proxy, handled as one: what happens to a cable happens to all of them."""

from __future__ import annotations

from pathlib import Path

from adapt.emulation.description import ETCD, DeviceSpec
from adapt.emulation.proxy_control import LinkProxy
from adapt.emulation.state import BOTH, Direction, State

DISPATCHER = "dispatcher"
SCHEME = "tcp://"


class DeviceLines:
    """To the dispatcher, and to etcd where there is one. Every call raises AdaptError if the proxy cannot do it or is gone.

    Attributes:
        names: under which the proxy has them.

    Args:
        namespace: the device's; None: this process's.
    """

    def __init__(self, proxy: LinkProxy, device: DeviceSpec, namespace: Path | None) -> None:
        self._proxy, self._device, self._namespace = proxy, device, namespace
        self.names: list[str] = []

    def add(self, what: str, address: str) -> str:
        """A line to what listens there, tcp://HOST:PORT; returns where the device is to connect instead."""
        host, _, port = address.removeprefix(SCHEME).rpartition(":")
        name = self._device.name if what == DISPATCHER else f"{self._device.name} to {what}"
        late = {"latency_s": self._device.latency_s, "jitter_s": self._device.jitter_s}
        own_host, own_port = self._proxy.add(name, namespace=self._namespace, target=(host, int(port)), **late)
        self.names.append(name)
        return f"{SCHEME}{own_host}:{own_port}"

    def delay(self, latency_s: float, jitter_s: float) -> None:
        for name in self.names:
            self._proxy.delay(name, latency_s, jitter_s)

    def stall(self) -> None:
        for name in self.names:
            self._proxy.stall(name)

    def cut(self, direction: str) -> None:
        for name in self.names:
            self._proxy.cut(name, direction)

    def reset(self) -> None:
        for name in self.names:
            self._proxy.reset(name)

    def corrupt(self, per_mib: float) -> None:
        """Not on the way to etcd: its protocol has no checksums, and a wrong lease is not what is tried here."""
        for name in self._with_checksums():
            self._proxy.corrupt(name, per_mib)

    def restore(self, state: State, *, lost: frozenset[Direction]) -> None:
        """All are as the state says, but that only `lost` directions are held where they are not stalled."""
        held, checked = BOTH if state.is_stalled else lost, self._with_checksums()
        for name in self.names:
            per_mib = state.corrupt_per_mib if name in checked else 0.0
            self._proxy.restore(name, late=(state.latency_s, state.jitter_s), held=held, per_mib=per_mib)

    def _with_checksums(self) -> list[str]:
        return [name for name in self.names if not name.endswith(f" to {ETCD}")]
