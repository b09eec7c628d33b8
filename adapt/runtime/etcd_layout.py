"""What stands in etcd, and under which keys. Weights never do.

    /adapt/CLUSTER/term                  highest term that any dispatcher has reigned with, as a number; no lease
    /adapt/CLUSTER/dispatchers/leader    the dispatcher that reigns, under its lease
    /adapt/CLUSTER/workers/NAME          a worker that belongs to the cluster, under its lease

What others have written is judged like anything else that comes from outside: an entry that cannot be read counts as none.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec
from msgspec import Struct

from adapt.protocol.ids import Natural, Term, WorkerId, is_name
from adapt.runtime.etcd_link import MAX_VALUE_BYTES, Entry

MAX_TERM = 2**62
_Text = Annotated[str, msgspec.Meta(max_length=256)]
_Record = TypeVar("_Record")


class LeaderRecord(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A dispatcher that reigns."""

    owner: _Text  # of its state directory: a later life of the same dispatcher takes over at once
    term: Annotated[int, msgspec.Meta(ge=1, le=MAX_TERM)]
    addresses: Annotated[tuple[_Text, ...], msgspec.Meta(max_length=64)] = ()  # none until it listens
    lease_ttl_s: Annotated[float, msgspec.Meta(gt=0, le=1e6)] = 10.0  # that its workers shall have as well
    protocol: Natural = 0


class WorkerRecord(Struct, frozen=True, kw_only=True):
    """A worker that belongs to the cluster. Its load is in its heartbeats; this is only written when it registers."""

    incarnation: Natural
    term: Natural  # under which it was welcomed
    protocol: Natural = 0
    software: _Text = ""


class Layout:
    """The keys of one cluster."""

    def __init__(self, cluster: str) -> None:
        root = f"/adapt/{cluster}"
        self.term, self.leader, self.workers = f"{root}/term", f"{root}/dispatchers/leader", f"{root}/workers/"

    def worker(self, worker_id: WorkerId) -> str:
        return self.workers + worker_id

    def worker_of(self, key: str) -> WorkerId | None:
        """Whose key this is; None: nobody's."""
        name = key.removeprefix(self.workers)
        return WorkerId(name) if key.startswith(self.workers) and is_name(name) else None


def encode_record(record: LeaderRecord | WorkerRecord) -> bytes:
    return msgspec.json.encode(record)


def read_leader(entry: Entry | None) -> LeaderRecord | None:
    return _read(entry, LeaderRecord)


def read_worker(entry: Entry | None) -> WorkerRecord | None:
    return _read(entry, WorkerRecord)


def read_term(entry: Entry | None) -> Term:
    """0 where there is none, or something else."""
    text = b"" if entry is None else entry.value
    return Term(int(text)) if text.isdigit() and len(text) < 20 and int(text) <= MAX_TERM else Term(0)


def _read(entry: Entry | None, kind: type[_Record]) -> _Record | None:
    if entry is None or len(entry.value) > MAX_VALUE_BYTES:
        return None
    try:
        return msgspec.json.decode(entry.value, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
