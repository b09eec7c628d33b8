"""One connection to one member of an etcd cluster: the only module that knows the package etcd3.

Every call blocks, for at most `timeout_s`, so it belongs on a thread of its own (see etcd_keeper.py). A link that has failed once is
closed and replaced: a channel of gRPC remembers a member that was away for longer than the member is away, and a login is not renewed.

Of etcd3 its client is used, but not its watcher: that one starts thousands of threads a second as soon as etcd is gone, and is deaf when
it is back. `Watch` reads the stream itself, and ends with the first thing that is wrong with it.
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from queue import SimpleQueue
from types import ModuleType
from typing import Any, TypeVar

from adapt.config import EtcdSettings
from adapt.errors import AdaptError, ConfigError

MAX_VALUE_BYTES = 64 << 10  # of an entry that is looked at; ours are a few hundred
_QUIET = {"GRPC_VERBOSITY": "NONE", "GRPC_ENABLE_FORK_SUPPORT": "0"}  # every failure is an exception as well; nobody forks to use gRPC
_CHANNEL = (
    ("grpc.use_local_subchannel_pool", 1),  # a new link starts without the old one's pause
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
    ("grpc.max_receive_message_length", 256 << 20),  # whatever others have put beside our keys
)

_Answer = TypeVar("_Answer")


class EtcdError(AdaptError):
    """etcd did not do what it was asked."""


class EtcdAwayError(EtcdError):
    """No answer in time, no connection, or no majority."""


class EtcdRefusedError(EtcdError):
    """The member answers, and will not have us: user, password or rights."""


class EtcdFullError(EtcdError):
    """The quota of its database is used up: it can be read, and leases can be renewed, but nothing written."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What stands under a key, since which revision, and under which lease (0: none)."""

    value: bytes
    revision: int
    lease: int


@dataclass(frozen=True, slots=True)
class Put:
    key: str
    value: bytes
    lease: int = 0  # that the key ends with; 0: none, it stays


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All entries under some prefixes at one revision."""

    entries: dict[str, Entry]
    revision: int


@dataclass(frozen=True, slots=True)
class Lease:
    number: int
    ttl_s: float  # as it was granted: etcd gives no less than two seconds


class EtcdLink:
    """See the head of this file. Not for two threads at a time.

    Args:
        endpoint: HOST:PORT of the member.

    Raises:
        ConfigError: the package is missing, or a certificate cannot be read.
        EtcdError: logging in failed.
    """

    def __init__(self, settings: EtcdSettings, endpoint: str, *, timeout_s: float) -> None:
        self.endpoint, self.timeout_s = endpoint, timeout_s
        self._etcd3, self._grpc = load_etcd3()
        self._cluster_id = self._revision = 0
        self._watches: list[Watch] = []
        host, _, port = endpoint.rpartition(":")
        self._client = self._call(
            lambda: self._etcd3.Etcd3Client(
                host=host,
                port=int(port),
                ca_cert=settings.ca and str(settings.ca),
                cert_cert=settings.cert and str(settings.cert),
                cert_key=settings.key and str(settings.key),
                user=settings.user,
                password=settings.password,
                timeout=timeout_s,
                grpc_options=_CHANNEL,
            )
        )
        self._client.call_credentials = None  # the token is in the metadata as well; as a credential gRPC refuses it without TLS

    def close(self) -> None:
        """End it, with its watches."""
        for watch in self._watches:
            watch.cancel()
        self._client.close()
        for watch in self._watches:
            watch.join()

    # ── reading and writing ──────────────────────────────────────────────────────────────────────────────────────────

    def read(self, key: str) -> Entry | None:
        """What stands there, as the majority knows it."""
        response = self._checked(self._call(lambda: self._client.get_response(key)))
        return _entry(response.kvs[0]) if response.kvs else None

    def read_all(self, *places: str) -> Snapshot:
        """What stands under each key, and under each prefix (it ends in a slash). The revision is that of the first look."""
        entries: dict[str, Entry] = {}
        revision = 0
        for place in places:
            ask = self._client.get_prefix_response if place.endswith("/") else self._client.get_response
            response = self._checked(self._call(partial(ask, place)))
            entries |= {pair.key.decode(errors="replace"): _entry(pair) for pair in response.kvs}
            revision = revision or response.header.revision
        return Snapshot(entries, revision)

    def write(self, *puts: Put, expected: Mapping[str, int] | None = None) -> bool:
        """Write all of it or nothing.

        Args:
            expected: revisions at which keys have to be; 0: not there.

        Returns:
            Whether everything was as expected, and so was written.
        """
        make = self._client.transactions
        compare = [make.mod(key) == revision for key, revision in (expected or {}).items()]
        success = [make.put(put.key, put.value, lease=put.lease or None) for put in puts]
        succeeded, _ = self._call(lambda: self._client.transaction(compare=compare, success=success, failure=[]))
        return bool(succeeded)

    def delete(self, key: str) -> None:
        self._call(lambda: self._client.delete(key))

    def require_room(self) -> None:
        """Raises EtcdFullError if etcd says that it is full, even though nothing has to be written now."""
        try:
            kinds = {alarm.alarm_type for alarm in self._call(lambda: list(self._client.list_alarms()))}
        except EtcdRefusedError:  # we may not ask; writing will tell
            return
        if self._etcd3.etcdrpc.NOSPACE in kinds:
            raise EtcdFullError(f"etcd at {self.endpoint}: the alarm NOSPACE is raised")

    # ── leases ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def grant(self, ttl_s: int) -> Lease:
        lease = self._call(lambda: self._client.lease(ttl_s))
        return Lease(lease.id, float(lease.ttl))

    def refresh(self, lease: int) -> bool:
        """False: there is no such lease any more. (etcd does not call that an error: it answers with 0 seconds.)"""
        responses = self._call(lambda: list(self._client.refresh_lease(lease)))
        if not responses:
            raise EtcdAwayError(f"etcd at {self.endpoint} ended the stream of renewals")
        self._same_cluster(responses[-1].header)
        return bool(responses[-1].TTL > 0)

    def revoke(self, lease: int) -> None:
        self._call(lambda: self._client.revoke_lease(lease))

    # ── watching ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def watch(self, *places: str, after: int, changed: Callable[[str, Entry | None], None], broken: Callable[[EtcdError], None]) -> None:
        """Be told of every change after a revision, in order; both are called on a thread of the watch.

        Args:
            changed: is given the key and what stands there now, None: nothing.
            broken: called at most once, and nothing after it: the stream has ended, or what was asked for is compacted away.
        """
        requests = [self._watch_request(place, after + 1) for place in places]
        metadata = (*(self._client.metadata or ()), ("hasleader", "true"))  # a member without a majority ends the stream then
        stub = self._etcd3.etcdrpc.WatchStub(self._client.channel)
        self._watches.append(Watch(stub, requests, metadata, changed, lambda error: broken(self._translated(error))))

    def _watch_request(self, place: str, revision: int) -> Any:
        rpc = self._etcd3.etcdrpc
        wanted = rpc.WatchCreateRequest(key=place.encode(), range_end=_end_of(place), start_revision=revision)
        return rpc.WatchRequest(create_request=wanted)

    # ── what goes wrong ──────────────────────────────────────────────────────────────────────────────────────────────

    def _call(self, ask: Callable[[], _Answer]) -> _Answer:
        try:
            return ask()
        except ValueError:  # what a channel says that was closed meanwhile
            raise EtcdAwayError(f"etcd at {self.endpoint}: the connection was closed") from None
        except OSError as error:
            raise ConfigError(f"etcd: {error.filename}: {error.strerror}") from error
        except (self._grpc.RpcError, self._etcd3.Etcd3Exception) as error:
            raise self._translated(error) from error

    def _translated(self, error: BaseException) -> EtcdError:
        """etcd3 wraps some of gRPC's errors, and leaves others as they are."""
        if isinstance(error, EtcdError):
            return error
        cause = error if hasattr(error, "code") else error.__context__
        if cause is None or not hasattr(cause, "code"):
            return EtcdAwayError(f"etcd at {self.endpoint}: {error or type(error).__name__}")
        raised: Any = cause
        status, text = raised.code(), f"etcd at {self.endpoint}: {raised.details()}"
        codes = self._grpc.StatusCode
        is_without_users = status is codes.FAILED_PRECONDITION and "authentication is not enabled" in text
        if is_without_users or status in (codes.UNAUTHENTICATED, codes.PERMISSION_DENIED, codes.INVALID_ARGUMENT):
            return EtcdRefusedError(text)
        if status is codes.RESOURCE_EXHAUSTED and "space exceeded" in text:
            return EtcdFullError(text)
        return EtcdAwayError(text)

    def _checked(self, response: Any) -> Any:
        """A revision that goes back is another history: the member was wiped, or restored from a copy."""
        self._same_cluster(response.header)
        if response.header.revision < self._revision:
            raise EtcdAwayError(f"etcd at {self.endpoint} has gone back from revision {self._revision} to {response.header.revision}")
        self._revision = response.header.revision
        return response

    def _same_cluster(self, header: Any) -> None:
        if self._cluster_id and header.cluster_id != self._cluster_id:
            raise EtcdAwayError(f"etcd at {self.endpoint} is another cluster now")
        self._cluster_id = header.cluster_id


class Watch:
    """One stream of changes, read on a thread of its own until something is wrong with it or it is cancelled."""

    def __init__(
        self,
        stub: Any,
        requests: list[Any],
        metadata: tuple[tuple[str, str], ...],
        changed: Callable[[str, Entry | None], None],
        broken: Callable[[BaseException], None],
    ) -> None:
        self._changed, self._broken = changed, broken
        self._is_cancelled = False
        self._end: SimpleQueue[None] = SimpleQueue()
        self._stream = stub.Watch(self._ask(requests), metadata=metadata)
        self._thread = threading.Thread(target=self._read, name="etcd-watch", daemon=True)
        self._thread.start()

    def cancel(self) -> None:
        self._is_cancelled = True
        self._stream.cancel()
        self._end.put(None)

    def join(self) -> None:
        self._thread.join()

    def _ask(self, requests: list[Any]) -> Iterator[Any]:
        yield from requests
        self._end.get()  # the stream lasts as long as there may be requests

    def _read(self) -> None:
        error: BaseException = EtcdAwayError("etcd has ended the stream of changes")
        try:
            for response in self._stream:
                if response.canceled or response.compact_revision:
                    error = EtcdAwayError(f"etcd has cancelled the watch: {response.cancel_reason or 'its revision is compacted away'}")
                    break
                for event in response.events:
                    self._changed(event.kv.key.decode(errors="replace"), None if event.type else _entry(event.kv))
        except Exception as raised:  # foreign code; whatever it is, the watch is over
            error = raised
        if not self._is_cancelled:
            self._end.put(None)
            self._broken(error)


def _entry(pair: Any) -> Entry:
    return Entry(pair.value, pair.mod_revision, pair.lease)


def _end_of(place: str) -> bytes:
    """The first key after all that begin with a prefix; nothing for a single key."""
    return (place[:-1] + chr(ord("/") + 1)).encode() if place.endswith("/") else b""


_loading = threading.Lock()


@cache  # the environment is touched once, not at each reconnection
def load_etcd3() -> tuple[ModuleType, ModuleType]:
    """The packages etcd3 and grpc.

    etcd3's messages were generated for a protobuf of long ago: today's takes them only in its pure Python form, which is chosen when
    protobuf is first imported, by a variable. It is set for just that long, so that no child process inherits it.

    Raises:
        ConfigError: etcd3 is not installed, or protobuf was imported before in another form.
    """
    with _loading, warnings.catch_warnings(), _variables(PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION="python", **_QUIET):
        warnings.simplefilter("ignore")  # etcd3 of 2020 under a Python and a protobuf of today
        try:
            import etcd3
            import grpc
        except ImportError as error:
            raise ConfigError(f"membership in etcd needs the package etcd3: install adapt-inference[etcd] ({error})") from error
        except TypeError as error:
            raise ConfigError(
                "membership in etcd: protobuf was imported before etcd3, in a form that etcd3 cannot use; "
                "set PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION=python for this process"
            ) from error
    return etcd3, grpc


@contextlib.contextmanager
def _variables(**values: str) -> Iterator[None]:
    """The process's environment with these, unless they are set already."""
    added = [name for name in values if name not in os.environ]
    os.environ.update({name: values[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
