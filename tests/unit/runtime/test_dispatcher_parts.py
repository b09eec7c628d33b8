"""Parts of a dispatcher that does not run."""

from __future__ import annotations

import asyncio

import pytest

from adapt.config import DispatcherConfig
from adapt.protocol import messages as msg
from adapt.protocol.ids import Digest, RoutingId, bulk_of
from adapt.protocol.wire import Envelope
from adapt.runtime.dispatcher import Dispatcher, _Peer
from adapt.runtime.profiles import kinds_of
from adapt.scheduling.links import SETTLED_S
from adapt.scheduling.session import Session

PROGRAM = Digest("a" * 64)
PI = msg.DeviceFacts(device="cpu", device_name="Cortex-A72", threads=1, numeric_class="torch-2/cpu/Cortex-A72/NEON/threads=1")


class Now:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Now()


@pytest.fixture
def dispatcher(tmp_path, clock):
    made = Dispatcher(DispatcherConfig(state_dir=tmp_path), clock)
    yield made
    made._threads.shutdown()
    made._state.close()


def joined(dispatcher: Dispatcher, *, cores: float) -> Session:
    """A worker whose two connections stand."""
    hello = msg.WorkerHello(
        protocol_version=msg.PROTOCOL_VERSION, worker_id="w1", incarnation=1, highest_term=0, software="adapt", device=PI, cores=cores,
        stage_budget_bytes=1 << 30, credit=1, resident=[], held=[], finished=[],
    )  # fmt: skip
    session = dispatcher._sessions.welcome(RoutingId(b"w1-c"), "worker", "w1", 1)
    dispatcher._sessions.attach(bulk_of(session.routing_id), session.number)
    dispatcher._peers[session.number] = _Peer(hello)
    dispatcher._worker_joined(hello)
    return session


def test_what_a_worker_has_of_its_cpu_is_known_before_its_first_heartbeat(dispatcher):
    """Regression: it was taken to have all of it, was planned for as such, and its profile was kept as that of the whole."""
    session = joined(dispatcher, cores=0.25)
    assert [kind.cores for kind in dispatcher.device_kinds().values()] == [0.25]
    beat = msg.Heartbeat(progress=1, memory_percent=1.0, resident_bytes=0, cores=0.5)
    dispatcher._from_worker(session, Envelope(beat, session=session.number, term=1))
    assert [kind.cores for kind in dispatcher.device_kinds().values()] == [0.5]


def test_a_worker_that_fetches_a_program_is_not_probed(dispatcher, clock, monkeypatch):
    """Regression: probes waited behind the pieces of the program, and the link was taken to be slow."""

    async def test():
        probes, asked = [], asyncio.Event()

        def send(session, message, blobs=()):
            if isinstance(message, msg.LinkProbe):
                probes.append(message)
            elif isinstance(message, msg.ProfileProgram):
                asked.set()

        monkeypatch.setattr(dispatcher, "_send", send)
        session = joined(dispatcher, cores=0.0)
        beat = Envelope(msg.Heartbeat(progress=1, memory_percent=1.0, resident_bytes=0), session=session.number, term=1)

        async def profile() -> asyncio.Task:
            (kind,) = kinds_of(dispatcher.device_kinds())
            asked.clear()
            work = dispatcher._deployer.profilers.measure(PROGRAM, 100, kind, repetitions=3, told=lambda *_: None)
            task = asyncio.create_task(work)
            await asked.wait()
            return task

        first = await profile()
        clock.now += SETTLED_S
        dispatcher._from_worker(session, beat)
        assert not probes
        dispatcher._from_worker(session, Envelope(msg.ProgramProfiled(program=PROGRAM, costs_s=[0.1]), session=session.number, term=1))
        worker_id, measured = await first
        assert (worker_id, measured.costs_s) == ("w1", [0.1])
        dispatcher._from_worker(session, beat)
        assert len(probes) == 1
        second = await profile()
        dispatcher._from_worker(session, Envelope(msg.LinkEcho(number=probes[0].number), session=session.number, term=1))
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        assert len(probes) == 1
        dispatcher._from_worker(session, beat)
        assert len(probes) == 2 and probes[1].answer_bytes == probes[0].answer_bytes, "what was disturbed is asked again"

    asyncio.run(test())
