"""A client in a process of its own, to be killed: asks without pause, and writes down each request before anything can happen to it.

    main([ADDRESS, JOURNAL, SEED, IN_FLIGHT, DEADLINE_S])

A line of the journal is a request asked, or ended. `read` makes operations of them; the client is taken for dead.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from adapt.protocol.ids import RequestId
from adapt.simulation.history import End, Expected, Operation
from tests.faults.traffic import Traffic, Workload


class Journal:
    """Each line is with the kernel before the client goes on."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def asked(self, operation: Operation, index: int) -> None:
        client, sequence = operation.request_id
        self._write({"id": [client.hex(), sequence], "at": operation.at, "deadline": operation.deadline, "index": index})

    def ended(self, operation: Operation, end: End) -> None:
        client, sequence = operation.request_id
        self._write({"id": [client.hex(), sequence], "ended": end.at, "outcome": end.outcome, "result": end.result})

    def _write(self, line: dict[str, object]) -> None:
        os.write(self._file, json.dumps(line).encode() + b"\n")


def read(path: Path, workload: Workload) -> tuple[list[Operation], dict[RequestId, Expected]]:
    """What a client that died has seen, and what it should have."""
    operations: dict[RequestId, Operation] = {}
    truth: dict[RequestId, Expected] = {}
    for line in path.read_text().splitlines():
        facts = json.loads(line)
        request_id = RequestId(bytes.fromhex(facts["id"][0]), facts["id"][1])
        if "index" in facts:
            operations[request_id] = Operation(request_id, facts["at"], facts["deadline"], client_died=True)
            truth[request_id] = Expected(results=frozenset({workload.truth[facts["index"]]}))
    for line in path.read_text().splitlines():  # an answer may have been written down before its request
        facts = json.loads(line)
        if "ended" in facts:
            request_id = RequestId(bytes.fromhex(facts["id"][0]), facts["id"][1])
            end = End(moment=facts["ended"], at=facts["ended"], outcome=facts["outcome"], result=facts["result"])
            operations[request_id].ends.append(end)
    return list(operations.values()), truth


def main(argv: Sequence[str]) -> int:
    address, journal, seed, in_flight, deadline_s = argv
    workload = Workload.of_layers(seed=int(seed), count=32)
    traffic = Traffic(address, workload, clients=1, in_flight=int(in_flight), deadline_s=float(deadline_s), journal=Journal(Path(journal)))
    with traffic:
        traffic.until_asked(int(in_flight))
        print(f"client ready pid={os.getpid()}", flush=True)
        traffic.wait()
    return 0
