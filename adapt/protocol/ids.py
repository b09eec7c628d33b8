"""Identities, each of a type of its own, so that two of them are never mixed up."""

from __future__ import annotations

import re
from typing import Annotated, NamedTuple, NewType

import msgspec

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

Natural = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]

WorkerId = NewType("WorkerId", str)  # stable name under which a lease is held
ClientId = NewType("ClientId", bytes)  # 16 random bytes, drawn once per client process
Digest = NewType("Digest", str)  # sha256 of a file's bytes, 64 lower-case hexadecimal digits
Incarnation = NewType("Incarnation", int)  # random; one life of a process
SessionId = NewType("SessionId", int)  # one connection of a worker or client under one term; 0: none yet
Term = NewType("Term", int)  # number of a dispatcher's reign; 0: none seen yet
Epoch = NewType("Epoch", int)  # number of a plan
RoutingId = NewType("RoutingId", bytes)  # ZeroMQ's address of one connection


class RequestId(NamedTuple):
    """One inference asked by a client: who asked, and its how-many-eth request."""

    client: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    sequence: Natural

    def __str__(self) -> str:
        return f"{self.client.hex()[:8]}-{self.sequence}"


class TaskId(NamedTuple):
    """One stage of one request, under one start of that request."""

    request: RequestId
    generation: Natural  # how often the request has been started from its input, from 1
    stage: Natural  # zero-based place in the plan

    def __str__(self) -> str:
        return f"{self.request}/{self.generation}.{self.stage}"


class AttemptId(NamedTuple):
    """One try of a task on one worker."""

    request: RequestId
    generation: Natural
    stage: Natural
    attempt: Natural  # counted from 1 within the task

    @property
    def task(self) -> TaskId:
        return TaskId(self.request, self.generation, self.stage)

    def __str__(self) -> str:
        return f"{self.request}/{self.generation}.{self.stage}#{self.attempt}"


def is_name(text: str) -> bool:
    """Whether `text` may name a worker or a deployment: 1 to 64 of letters, digits, dot, dash, underscore."""
    return _NAME.fullmatch(text) is not None


def routing_ids(name: str, incarnation: int) -> tuple[RoutingId, RoutingId]:
    """Addresses of a process's control and bulk connection. The incarnation keeps two lives of one name apart."""
    stem = f"{name}.{incarnation:016x}."
    return RoutingId(f"{stem}c".encode()), RoutingId(f"{stem}b".encode())


def bulk_of(control: RoutingId) -> RoutingId:
    """The bulk address that belongs to a control address."""
    return RoutingId(control[:-1] + b"b")


def control_of(routing_id: RoutingId) -> RoutingId:
    """The control address of a peer, given either of its addresses."""
    return RoutingId(routing_id[:-1] + b"c")
