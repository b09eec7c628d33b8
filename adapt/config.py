"""The settings of each process: one frozen dataclass, merged once at the door and checked where it is made.

    flag  over  ADAPT_* variable  over  --config FILE (TOML)  over  default

    field                 flag             variable            in the file, under [dispatcher]
    lease_ttl_s: float    --lease-ttl 2    ADAPT_LEASE_TTL=2   lease_ttl = 2
    max_kept_bytes: int   --max-kept 1GiB  ADAPT_MAX_KEPT=1GiB max_kept = "1GiB"

A field is all there is to say about a setting: its default, and in its metadata how it is read and explained. Units
stand in the fields' names; flags and keys go without, and `--help` says them. Nothing but `load` and
`dispatcher_address` reads the environment, and they are given it.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import ipaddress
import math
import os
import re
import socket
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil

from adapt.errors import ConfigError

DEFAULT_ADDRESS = "tcp://127.0.0.1:5570"
VARIABLE_PREFIX = "ADAPT_"
FILE_TABLES = ("dispatcher", "worker")
POLICIES = ("earliest-finish", "lowest-memory")
EMBEDDED = "embedded"
ETCD_SCHEME = "etcd://"
ETCD_PORT = 2379
LOG_LEVELS = ("debug", "info", "warning", "error")

KIBIBYTE, MEBIBYTE, GIBIBYTE = 1 << 10, 1 << 20, 1 << 30
MIN_MESSAGE_BYTES = MEBIBYTE
MAX_SIZE_BYTES = 1 << 50
MAX_DURATION_S = 1e6
MAX_IPC_PATH_BYTES = 107  # what fits into sockaddr_un on Linux
BUDGET_SHARE = 0.6  # of the memory that is available when a worker starts

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")
_SIZE_UNITS = {
    "": 1, "b": 1,
    "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip


# --- how a value is read ----------------------------------------------------------------------------------------------


def parse_size(text: str | int, *, key: str = "size") -> int:
    """Bytes from "512MiB", "1.5 GiB", "64MB" or a plain number. K, M and G alone are refused: they mean two things."""
    expected = 'expected a size such as "512MiB", "2GiB" or a number of bytes'
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    match = _SIZE.fullmatch(text.strip()) if isinstance(text, str) else None
    unit = _SIZE_UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ConfigError(f"{key}={_shown(text)}: {expected}")
    return round(float(match[1]) * unit)


def counted(count: int, what: str) -> str:
    """ "1 stage", "2 stages"."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def format_size(size_bytes: int) -> str:
    """ "512MiB" where it is a round number of such a unit; else bytes."""
    for name, unit in (("GiB", GIBIBYTE), ("MiB", MEBIBYTE), ("KiB", KIBIBYTE)):
        if size_bytes >= unit and size_bytes % unit == 0:
            return f"{size_bytes // unit}{name}"
    return str(size_bytes)


def _parse_seconds(value: Any, key: str) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError(f'{key}={_shown(value)}: expected seconds, as a number such as "2.5"') from None


def _parse_number(value: Any, key: str) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{key}={_shown(value)}: expected a number") from None


def _parse_count(value: Any, key: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d{1,18}", value.strip()):
        return int(value)
    raise ConfigError(f"{key}={_shown(value)}: expected a whole number")


def _parse_switch(value: Any, key: str) -> bool:
    if isinstance(value, bool):
        return value
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if isinstance(value, str) and value.strip().lower() in words:
        return words[value.strip().lower()]
    raise ConfigError(f"{key}={_shown(value)}: expected true or false")


def _parse_text(value: Any, key: str) -> str:
    if isinstance(value, str) and value:
        return value
    raise ConfigError(f"{key}={_shown(value)}: expected a text that is not empty")


def _parse_path(value: Any, key: str) -> Path:
    if isinstance(value, Path):
        return value
    return Path(_parse_text(value, key)).expanduser()


def _parse_bytes(value: Any, key: str) -> int:
    return parse_size(value, key=key)


@dataclass(frozen=True, slots=True)
class _Kind:
    """How values of one kind are read, and what `--help` calls them."""

    parse: Callable[[Any, str], Any]
    metavar: str
    show: Callable[[Any], str] = str


_NAMED = _Kind(_parse_text, "NAME")
_ADDRESS = _Kind(_parse_text, "ADDRESS")
_PATH = _Kind(_parse_path, "DIR")
_SECONDS = _Kind(_parse_seconds, "SECONDS", lambda value: f"{value:g} s")
_PAUSE = _Kind(_parse_number, "SECONDS", lambda value: f"{value:g} s")  # may be none
_NUMBER = _Kind(_parse_number, "X", lambda value: f"{value:g}")
_COUNT = _Kind(_parse_count, "N")
_BYTES = _Kind(_parse_bytes, "SIZE", format_size)
_SWITCH = _Kind(_parse_switch, "")
_FILE = _Kind(_parse_path, "FILE")
_SECRET = _Kind(_parse_text, "", lambda value: "***")  # has a variable, and neither a flag nor a line in the file


def _setting(kind: _Kind, about: str, default: Any = dataclasses.MISSING, *, otherwise: str = "") -> Any:
    """A field with all that is to be said about it. `otherwise`: the default in words, where it is found at the door."""
    return field(default=default, repr=kind is not _SECRET, metadata={"kind": kind, "about": about, "otherwise": otherwise})


def _shown(value: object) -> str:
    text = repr(str(value) if isinstance(value, Path) else value)
    return text if len(text) <= 100 else f"{text[:97]}..."


# --- where values come from -------------------------------------------------------------------------------------------


def _key_of(name: str) -> str:
    """The setting's name for users: its field's, without the unit."""
    return name.removesuffix("_bytes").removesuffix("_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    """What the configurations have in common: merging and describing."""

    @classmethod
    def table(cls) -> str:
        """The table of the file that is read; the other process's is left to it."""
        raise NotImplementedError

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """Add `--config` and a flag for each setting; what is not given is not in the namespace's values (None)."""
        parser.add_argument(
            "--config",
            metavar="FILE",
            help=f"read settings from the table [{cls.table()}] of a TOML file; keys are the flags' names with _ for -",
        )
        for item in dataclasses.fields(cls):
            kind: _Kind = item.metadata["kind"]
            if kind is _SECRET:
                continue
            flag = "--" + _key_of(item.name).replace("_", "-")
            default = item.metadata["otherwise"] or _default_in_words(item, kind)
            text = (item.metadata["about"] + (f" (default: {default})" if default else "")).replace("%", "%%")
            if kind is _SWITCH:
                parser.add_argument(flag, action="store_true", default=None, dest=_key_of(item.name), help=text)
            else:
                parser.add_argument(flag, metavar=kind.metavar, dest=_key_of(item.name), help=text)

    @classmethod
    def load(cls, options: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> Self:
        """Merge flags, variables, file and defaults.

        Args:
            options: of a parser that `add_options` was called with. Settings that it lacks count as not given.
            environ: the process's environment; read here and nowhere else.

        Raises:
            ConfigError: a setting is unknown or impossible, or the file cannot be read.
        """
        path = getattr(options, "config", None) or environ.get(VARIABLE_PREFIX + "CONFIG")
        from_file = _read_file(Path(path).expanduser(), cls) if path else {}
        values: dict[str, Any] = {}
        for item in dataclasses.fields(cls):
            key, kind = _key_of(item.name), item.metadata["kind"]
            variable = VARIABLE_PREFIX + key.upper()
            if (given := getattr(options, key, None)) is not None:
                values[item.name] = kind.parse(given, "--" + key.replace("_", "-"))
            elif given := environ.get(variable):
                values[item.name] = kind.parse(given, variable)
            elif key in from_file and kind is not _SECRET:
                values[item.name] = kind.parse(from_file[key], f"{path}: {key}")
        return cls(**cls._found_at_the_door(values, environ))

    @classmethod
    def _found_at_the_door(cls, values: dict[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
        """`values`, with the defaults that depend on user and machine."""
        return values

    def _check(self) -> None:
        """What holds for every setting of a kind."""
        for item in dataclasses.fields(self):
            key, value, kind = item.name, getattr(self, item.name), item.metadata["kind"]
            if kind is _SECONDS and not (isinstance(value, (int, float)) and math.isfinite(value) and 0 < value <= MAX_DURATION_S):
                raise ConfigError(f"{key}={_shown(value)}: expected seconds, above 0 and at most {MAX_DURATION_S:g}")
            if kind is _PAUSE and not (isinstance(value, (int, float)) and 0 <= value <= MAX_DURATION_S):
                raise ConfigError(f"{key}={_shown(value)}: expected seconds, from 0 to {MAX_DURATION_S:g}")
            if kind is _BYTES and not (isinstance(value, int) and 0 < value <= MAX_SIZE_BYTES):
                raise ConfigError(f"{key}={_shown(value)}: expected bytes, above 0 and at most {MAX_SIZE_BYTES}")
            if kind in (_PATH, _FILE) and value is not None and not isinstance(value, Path):
                raise ConfigError(f"{key}={_shown(value)}: expected a pathlib.Path")


def _default_in_words(item: dataclasses.Field[Any], kind: _Kind) -> str:
    if kind is _SWITCH or item.default is dataclasses.MISSING or item.default is None:
        return ""
    return kind.show(item.default)


def _read_file(path: Path, cls: type[_Settings]) -> dict[str, Any]:
    """The settings under the process's own table. The other's table may stand beside it."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config={_shown(str(path))}: {error.strerror}; expected a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config={_shown(str(path))}: not TOML: {error}") from error
    for key in content:
        if key not in FILE_TABLES:
            raise ConfigError(_unknown(f"{path}: {key}", key, FILE_TABLES, "table"))
    table = content.get(cls.table(), {})
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: {cls.table()}={_shown(table)}: expected a table, [{cls.table()}]")
    known = [_key_of(item.name) for item in dataclasses.fields(cls) if item.metadata["kind"] is not _SECRET]
    for key in table:
        if key not in known:
            raise ConfigError(_unknown(f"{path}: {cls.table()}.{key}", key, known, "setting"))
    return table


def _unknown(where: str, key: str, known: list[str] | tuple[str, ...], noun: str) -> str:
    close = difflib.get_close_matches(key.replace("-", "_").lower(), known, n=1, cutoff=0.6)
    hint = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(known)}"
    return f"{where}: there is no such {noun}; {hint}"


# --- addresses --------------------------------------------------------------------------------------------------------


def check_address(address: str, *, key: str, is_listening: bool) -> str:
    """The address in its usual form: tcp://HOST:PORT or ipc://PATH.

    Args:
        is_listening: then the host is an IP address, an interface or "*", and the port may be 0 or "*" (a free one).

    Raises:
        ConfigError: names key, value and what is expected.
    """
    expected = f"expected tcp://HOST:PORT such as {DEFAULT_ADDRESS}, or ipc:///PATH"
    if not isinstance(address, str):
        raise ConfigError(f"{key}={_shown(address)}: {expected}")
    scheme, separator, rest = address.partition("://")
    if scheme == "ipc" and rest:
        if len(os.fsencode(rest)) > MAX_IPC_PATH_BYTES:
            raise ConfigError(f"{key}={_shown(address)}: expected a path of at most {MAX_IPC_PATH_BYTES} bytes")
        return address
    host, colon, port = rest.rpartition(":")
    if scheme != "tcp" or not separator or not colon or not host or re.search(r"\s", address):
        raise ConfigError(f"{key}={_shown(address)}: {expected}")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ConfigError(f"{key}={_shown(address)}: expected brackets around an IPv6 address, tcp://[::1]:5570")
    is_number = port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535
    if is_listening:
        if not is_number and port != "*":
            raise ConfigError(f"{key}={_shown(address)}: expected a port from 0 to 65535, or * for any free one")
        # libzmq binds to addresses and interfaces, not to names
        return f"tcp://127.0.0.1:{port}" if host == "localhost" else address
    if not is_number or int(port) == 0:
        raise ConfigError(f"{key}={_shown(address)}: expected a port from 1 to 65535")
    if host == "*":
        raise ConfigError(f"{key}={_shown(address)}: expected the host to connect to; * is for listening")
    return address


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach the address."""
    scheme, _, rest = address.partition("://")
    if scheme == "ipc":
        return True
    host = rest.rpartition(":")[0].strip("[]")
    if host in ("localhost", "lo"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def dispatcher_address(environ: Mapping[str, str] = os.environ) -> str:
    """The address that `Client()` without arguments uses: ADAPT_DISPATCHER, or the default.

    Raises:
        ConfigError: the variable holds no address.
    """
    address = environ.get(VARIABLE_PREFIX + "DISPATCHER") or DEFAULT_ADDRESS
    return check_address(address, key=VARIABLE_PREFIX + "DISPATCHER", is_listening=False)


# --- membership -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdSettings:
    """Where etcd is and how it is spoken to. `endpoints`: HOST:PORT of one or more members of one etcd cluster."""

    endpoints: tuple[str, ...]
    cluster: str = "default"
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    user: str | None = None
    password: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, path in (("etcd_ca", self.ca), ("etcd_cert", self.cert), ("etcd_key", self.key)):
            if path is not None and not path.is_file():
                raise ConfigError(f"{name}={_shown(path)}: there is no such file")
        if (self.cert is None) != (self.key is None):
            raise ConfigError("etcd_cert and etcd_key: expected both or neither")
        if self.cert is not None and self.ca is None:
            raise ConfigError("etcd_cert: expected etcd_ca as well, the authority that signed etcd's own certificate")
        if (self.user is None) != (self.password is None):
            raise ConfigError(
                "etcd_user: expected a password with it, in ADAPT_ETCD_PASSWORD or --etcd-password-file; and no password alone"
            )
        if self.user is not None and self.ca is None and not all(is_loopback(f"tcp://{endpoint}") for endpoint in self.endpoints):
            raise ConfigError("etcd_user: expected etcd_ca as well: without TLS the password would travel in clear")


class _WithMembership:
    """What dispatcher and worker have in common about etcd. No fields of its own: they would come first in every `--help`."""

    __slots__ = ()

    @property
    def etcd(self) -> EtcdSettings | None:
        """How etcd is reached; None: leases are kept by the dispatcher."""
        given: Any = self
        if given.membership == EMBEDDED:
            return None
        return EtcdSettings(
            endpoints=_etcd_endpoints(given.membership),
            cluster=given.cluster,
            ca=given.etcd_ca,
            cert=given.etcd_cert,
            key=given.etcd_key,
            user=given.etcd_user,
            password=given.etcd_password or _read_secret(given.etcd_password_file),
        )


def _etcd_endpoints(membership: str) -> tuple[str, ...]:
    """HOST:PORT of each member. Raises ConfigError: the text is neither `embedded` nor a list of them."""
    expected = f"expected {EMBEDDED}, or {ETCD_SCHEME}HOST:PORT[,HOST:PORT...] such as {ETCD_SCHEME}127.0.0.1:{ETCD_PORT}"
    if not membership.startswith(ETCD_SCHEME):
        close = difflib.get_close_matches(membership, [EMBEDDED, "etcd"], n=1)
        raise ConfigError(f"membership={_shown(membership)}: {expected}" + (f"; did you mean {close[0]}?" if close else ""))
    if "@" in membership:
        raise ConfigError("membership=etcd://...@...: the user goes into --etcd-user, the password into ADAPT_ETCD_PASSWORD or a file")
    found = []
    for endpoint in membership.removeprefix(ETCD_SCHEME).rstrip("/").split(","):
        try:
            check_address(f"tcp://{endpoint}", key="membership", is_listening=False)
        except ConfigError:
            raise ConfigError(f"membership={_shown(membership)}: {expected}") from None
        found.append(endpoint)
    return tuple(found)


def _read_secret(path: Path | None) -> str | None:
    """The first line of a file that only its owner may read."""
    if path is None:
        return None
    try:
        mode, lines = path.stat().st_mode, path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"etcd_password_file={_shown(path)}: cannot be read: {getattr(error, 'strerror', error)}") from error
    if mode & 0o077:
        raise ConfigError(f"etcd_password_file={_shown(path)}: expected a file that only its owner may read; chmod 600")
    if not lines or not lines[0]:
        raise ConfigError(f"etcd_password_file={_shown(path)}: expected the password in its first line")
    return lines[0]


# --- folders and memory of this user and machine ----------------------------------------------------------------------


def default_state_dir(cluster: str, environ: Mapping[str, str] = os.environ) -> Path:
    """Where a dispatcher of this cluster keeps its term and deployments."""
    return _base_dir(environ, "XDG_STATE_HOME", ".local/state") / "adapt" / cluster


def default_cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Where workers keep the files of stages. Content-addressed: all workers of a user may share it."""
    return _base_dir(environ, "XDG_CACHE_HOME", ".cache") / "adapt"


def _base_dir(environ: Mapping[str, str], variable: str, under_home: str) -> Path:
    given = environ.get(variable)
    if given and Path(given).is_absolute():  # the XDG specification: a relative one is to be ignored
        return Path(given)
    home = environ.get("HOME")
    return (Path(home) if home else Path.home()) / under_home


def available_memory_bytes() -> int:
    """Memory that can still be had: of the host, or of this process's control group where that has less."""
    available = int(psutil.virtual_memory().available)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text().strip()
    except OSError:
        return available
    return available if limit == "max" else max(min(available, int(limit) - int(used)), 0)


# --- the processes ----------------------------------------------------------------------------------------------------


_MEMBERSHIP = "who keeps the leases: embedded, the dispatcher itself; or etcd://HOST:PORT[,HOST:PORT...]"
_ETCD_CA = "certificate of the authority that signed etcd's; with it etcd is spoken to by TLS"
_ETCD_CERT = "our own certificate, where etcd wants one"
_ETCD_KEY = "the key of that certificate"
_ETCD_USER = "name to log in to etcd with"
_ETCD_PASSWORD_FILE = "file with the password in its first line, readable by its owner only; or set ADAPT_ETCD_PASSWORD"


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatcherConfig(_WithMembership, _Settings):
    """Settings of a dispatcher. Times in seconds, sizes in bytes."""

    listen: str = _setting(_ADDRESS, "address to listen on: tcp://HOST:PORT or ipc:///PATH", DEFAULT_ADDRESS)
    cluster: str = _setting(_NAMED, "name of the cluster; keeps the state of several apart", "default")
    membership: str = _setting(_ADDRESS, _MEMBERSHIP, EMBEDDED)
    advertise: str | None = _setting(
        _ADDRESS,
        "address under which etcd tells workers of this dispatcher",
        None,
        otherwise="where it listens; of a wildcard, every address of this machine",
    )
    etcd_ca: Path | None = _setting(_FILE, _ETCD_CA, None)
    etcd_cert: Path | None = _setting(_FILE, _ETCD_CERT, None)
    etcd_key: Path | None = _setting(_FILE, _ETCD_KEY, None)
    etcd_user: str | None = _setting(_NAMED, _ETCD_USER, None)
    etcd_password_file: Path | None = _setting(_FILE, _ETCD_PASSWORD_FILE, None)
    etcd_password: str | None = _setting(_SECRET, "the password itself; only as a variable", None)
    policy: str = _setting(_NAMED, f"how a worker is chosen for a task: {' or '.join(POLICIES)}", "earliest-finish")
    state_dir: Path = _setting(
        _PATH,
        "directory for term, deployments and programs",
        otherwise="$XDG_STATE_HOME/adapt/CLUSTER or ~/.local/state/adapt/CLUSTER",
    )
    models_dir: Path | None = _setting(
        _PATH,
        "directory of weight files that deployments may name, and of model files that are deployed by themselves",
        None,
        otherwise="none",
    )
    keep_versions: int = _setting(_COUNT, "earlier versions of each deployment that are kept to roll back to", 2)
    insecure: bool = _setting(_SWITCH, "allow a listening address that other machines reach, without encryption or authentication", False)
    heartbeat_s: float = _setting(_SECONDS, "how often workers say that they live", 0.5)
    lease_ttl_s: float = _setting(_SECONDS, "how long a worker belongs to the cluster without renewing its lease", 10.0)
    silence_s: float = _setting(_SECONDS, "a worker without heartbeats for so long is suspect: its tasks go elsewhere", 2.0)
    grace_s: float = _setting(_SECONDS, "a worker without connection for so long is out of the plan", 2.0)
    client_grace_s: float = _setting(_SECONDS, "the requests of a client without connection for so long are cancelled", 10.0)
    attempt_timeout_s: float = _setting(_SECONDS, "longest wait for one attempt of a stage before another worker tries", 20.0)
    min_attempt_timeout_s: float = _setting(_SECONDS, "shortest such wait, once it is known how long the stage takes", 2.0)
    failure_penalty: float = _setting(_NUMBER, "what a failure adds to a worker's penalty", 50.0)
    success_factor: float = _setting(_NUMBER, "what a success multiplies it by", 0.8)
    breaker_above: float = _setting(_NUMBER, "a worker whose penalty is above this gets nothing for a while", 200.0)
    breaker_decay: float = _setting(_NUMBER, "what such a penalty is multiplied by every second", 0.9)
    retry_tokens: float = _setting(_NUMBER, "second attempts after failures that may be made at once; later ones are delayed", 20.0)
    retry_tokens_per_request: float = _setting(_NUMBER, "how many more each request allows", 0.2)
    cooldown_s: float = _setting(_PAUSE, "a worker that was given a task gets no other for so long (0: credit alone decides)", 0.0)
    hedge_share: float = _setting(_NUMBER, "of tasks that an idle worker tries too, when the first takes longer than usual (0: none)", 0.05)
    verify_share: float = _setting(
        _NUMBER,
        "of tasks whose answers are believed only when a second worker of the same numeric class has come to the same bits (0 to 1)",
        0.0,
    )
    retry_tokens_per_s: float = _setting(_NUMBER, "how many more each second allows", 1.0)
    relief_s: float = _setting(_SECONDS, "how often, while there are requests, it is looked whether a slow worker needs help", 5.0)
    replan_interval_s: float = _setting(
        _PAUSE, "how often it is looked whether a deployment in as many stages as is best should be cut anew (0: never)", 30.0
    )
    load_timeout_s: float = _setting(_SECONDS, "longest wait for a worker that loads a stage, without progress", 60.0)
    spares: int = _setting(_COUNT, "workers that have each stage ready besides those that run it, where memory allows (0: none)", 1)
    max_budget_s: float = _setting(_SECONDS, "longest deadline that a request may have", 3600.0)
    max_requests: int = _setting(_COUNT, "requests that may be under way at a time", 4096)
    max_retained_bytes: int = _setting(_BYTES, "memory for inputs and activations of requests under way", 2 * GIBIBYTE)
    max_kept_bytes: int = _setting(_BYTES, "memory for results that clients have not acknowledged", 256 * MEBIBYTE)
    max_message_bytes: int = _setting(_BYTES, "largest message that is accepted", 256 * MEBIBYTE)
    piece_bytes: int = _setting(_BYTES, "size of the pieces in which big messages travel", MEBIBYTE)
    drain_timeout_s: float = _setting(_SECONDS, "longest wait for requests under way after SIGTERM or SIGINT", 30.0)

    @classmethod
    def table(cls) -> str:
        return "dispatcher"

    @classmethod
    def _found_at_the_door(cls, values: dict[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
        cluster = values.get("cluster", "default")
        _check_name("cluster", cluster)
        return {"state_dir": default_state_dir(cluster, environ), **values}

    def __post_init__(self) -> None:
        self._check()
        object.__setattr__(self, "listen", check_address(self.listen, key="listen", is_listening=True))
        _check_name("cluster", self.cluster)
        _check_choice("policy", self.policy, POLICIES)
        if self.advertise is not None:
            check_address(self.advertise, key="advertise", is_listening=False)
        _ = self.etcd  # refused here if it is impossible
        if not is_loopback(self.listen) and not self.insecure:
            raise ConfigError(
                f"listen={_shown(self.listen)}: expected a loopback address: other machines reach this one, and "
                "connections are not encrypted or authenticated; in a network that you trust, add --insecure"
            )
        if self.silence_s <= self.heartbeat_s:
            raise ConfigError(f"silence_s={self.silence_s:g}: expected more than heartbeat_s={self.heartbeat_s:g}")
        if self.lease_ttl_s <= self.heartbeat_s:
            raise ConfigError(f"lease_ttl_s={self.lease_ttl_s:g}: expected more than heartbeat_s={self.heartbeat_s:g}")
        if not 0.0 <= self.verify_share <= 1.0:
            raise ConfigError(f"verify_share={self.verify_share:g}: expected a share of all tasks, from 0 (none) to 1")
        _check_range("max_requests", self.max_requests, 1, 1 << 20)
        _check_range("keep_versions", self.keep_versions, 0, 64)
        _check_range("spares", self.spares, 0, 64)
        _check_range("max_message_bytes", self.max_message_bytes, MIN_MESSAGE_BYTES, 1 << 40)
        _check_range("piece_bytes", self.piece_bytes, 16 * KIBIBYTE, MEBIBYTE)

    @property
    def is_exposed(self) -> bool:
        """Whether other machines can reach it."""
        return not is_loopback(self.listen)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig(_WithMembership, _Settings):
    """Settings of a worker. Times in seconds, sizes in bytes."""

    dispatcher: str = _setting(
        _ADDRESS, "address of the dispatcher: tcp://HOST:PORT or ipc:///PATH; with etcd it is found there", DEFAULT_ADDRESS
    )
    cluster: str = _setting(_NAMED, "name of the cluster; keeps several apart in one etcd", "default")
    membership: str = _setting(_ADDRESS, _MEMBERSHIP, EMBEDDED)
    via: str | None = _setting(
        _ADDRESS, "address to reach the dispatcher at, whoever it is: a tunnel, a forwarded port", None, otherwise="what etcd tells"
    )
    etcd_ca: Path | None = _setting(_FILE, _ETCD_CA, None)
    etcd_cert: Path | None = _setting(_FILE, _ETCD_CERT, None)
    etcd_key: Path | None = _setting(_FILE, _ETCD_KEY, None)
    etcd_user: str | None = _setting(_NAMED, _ETCD_USER, None)
    etcd_password_file: Path | None = _setting(_FILE, _ETCD_PASSWORD_FILE, None)
    etcd_password: str | None = _setting(_SECRET, "the password itself; only as a variable", None)
    name: str = _setting(_NAMED, "name of this worker, unique in the cluster", otherwise="host name and process id")
    device: str = _setting(_NAMED, "auto (a GPU if there is one), cpu, or cuda:N", "auto")
    threads: int = _setting(_COUNT, "threads within one operator; results of other counts may differ in their last bits", 1)
    memory_limit_bytes: int = _setting(
        _BYTES,
        "memory for stages, above what the runtime itself takes",
        otherwise=f"{BUDGET_SHARE:.0%} of the memory that is available at the start",
    )
    cache_dir: Path = _setting(
        _PATH, "directory for the files of stages; workers may share one", otherwise="$XDG_CACHE_HOME/adapt or ~/.cache/adapt"
    )
    credit: int = _setting(_COUNT, "most tasks accepted at a time; it gets two, and more only while they are short", 32)
    max_message_bytes: int = _setting(_BYTES, "largest message that is accepted", 256 * MEBIBYTE)
    drain_timeout_s: float = _setting(_SECONDS, "longest wait for the running task after SIGTERM or SIGINT", 30.0)
    hang_timeout_s: float = _setting(_SECONDS, "a computation longer than this that nobody waits for any more hangs: begin anew", 60.0)

    @classmethod
    def table(cls) -> str:
        return "worker"

    @classmethod
    def _found_at_the_door(cls, values: dict[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
        found: dict[str, Any] = {"cache_dir": default_cache_dir(environ)}
        if "name" not in values:
            found["name"] = _own_name()
        if "memory_limit_bytes" not in values:
            found["memory_limit_bytes"] = max(int(BUDGET_SHARE * available_memory_bytes()), 1)
        return {**found, **values}

    def __post_init__(self) -> None:
        self._check()
        check_address(self.dispatcher, key="dispatcher", is_listening=False)
        if self.via is not None:
            check_address(self.via, key="via", is_listening=False)
            if self.membership == EMBEDDED:
                raise ConfigError(f"via={_shown(self.via)}: it is for a dispatcher that etcd tells of; expected --dispatcher {self.via}")
        _check_name("name", self.name)
        _check_name("cluster", self.cluster)
        _ = self.etcd  # refused here if it is impossible
        if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", str(self.device)):
            raise ConfigError(f"device={_shown(self.device)}: expected auto, cpu, or cuda:N with the number of a GPU")
        _check_range("threads", self.threads, 1, 1024)
        _check_range("credit", self.credit, 1, 1024)
        _check_range("max_message_bytes", self.max_message_bytes, MIN_MESSAGE_BYTES, 1 << 40)


def _own_name() -> str:
    host = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname().partition(".")[0])[:48].lstrip("._-") or "worker"
    return f"{host}-{os.getpid()}"


def _check_name(key: str, value: object) -> None:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ConfigError(f"{key}={_shown(value)}: expected 1 to 64 letters, digits, dots, dashes or underscores")


def _check_range(key: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        shown = format_size if key.endswith("_bytes") else str
        raise ConfigError(f"{key}={_shown(value)}: expected {shown(low)} to {shown(high)}")


def _check_choice(key: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        close = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"{key}={_shown(value)}: expected {' or '.join(choices)}, all that there is so far{hint}")
