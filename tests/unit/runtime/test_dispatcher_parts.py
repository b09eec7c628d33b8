"""Parts of a dispatcher that does not run."""

from __future__ import annotations

import pytest

from adapt.config import DispatcherConfig
from adapt.protocol import messages as msg
from adapt.protocol.ids import RoutingId, bulk_of
from adapt.protocol.wire import Envelope
from adapt.runtime.dispatcher import Dispatcher, _Peer
from adapt.scheduling.session import Session

PI = msg.DeviceFacts(device="cpu", device_name="Cortex-A72", threads=1, numeric_class="torch-2/cpu/Cortex-A72/NEON/threads=1")


@pytest.fixture
def dispatcher(tmp_path):
    made = Dispatcher(DispatcherConfig(state_dir=tmp_path))
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
