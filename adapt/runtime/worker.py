"""The worker process: executes stages, and keeps each answer until the dispatcher has it.

    link (sockets) ──RunStage──▶ Holdings: known already?  ──▶ Executor (threads) ──Done──▶ Holdings: kept ──▶ link
                   ──LoadStage─▶ ResidentStages: cached, or pulled through the link
                   ──StageAck──▶ Holdings: forgotten
                   ──ProfileProgram─▶ Measuring: fetched, then measured while the Executor has nothing else to do

All state lives on one asyncio loop; this module only connects. What an attempt goes through is in scheduling/holdings.py
and executor.py, what a stage goes through in stages.py, a profile in measuring.py, who is believed in scheduling/session.py.

A drain (SIGTERM, SIGINT, `drain`): what has not begun is handed back, what runs is finished and acknowledged, then
`Goodbye`. What arrives while draining is handed back at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import psutil

from adapt.clock import Clock, monotonic
from adapt.config import WorkerConfig
from adapt.errors import AdaptError, OverloadedError, StageNotResidentError
from adapt.models import devices
from adapt.models.interpreter import Stage
from adapt.models.profiler import Profiler
from adapt.models.program import read_program
from adapt.protocol import messages
from adapt.protocol.ids import AttemptId
from adapt.protocol.messages import (
    PROTOCOL_VERSION,
    ArtifactMissing,
    ArtifactPiece,
    CancelProfile,
    CancelStage,
    Draining,
    Goodbye,
    Heartbeat,
    LinkEcho,
    LinkProbe,
    LoadStage,
    Message,
    ProfileProgram,
    RunStage,
    StageAck,
    StageCancelled,
    StageDone,
    StageFailed,
    UnloadStage,
    WorkerHello,
)
from adapt.protocol.wire import Blob
from adapt.runtime import heap
from adapt.runtime.artifacts import ArtifactStore
from adapt.runtime.cores import allowed_cores
from adapt.runtime.executor import Begun, Cancelled, Chore, Crashed, Done, Event, Executor, Failed, RunnableStage, State, Work
from adapt.runtime.handling import HandlingMeter
from adapt.runtime.link import LinkEvent, LinkReceived, LinkRefused, PeerLink, SessionLost, SessionOpened
from adapt.runtime.measuring import Measuring
from adapt.runtime.probing import payload
from adapt.runtime.registry import open_membership
from adapt.runtime.stages import ResidentStages
from adapt.runtime.watchdog import Watchdog
from adapt.scheduling.holdings import Answer, Holdings, Kept, Verdict
from adapt.version import VERSION

log = logging.getLogger(__name__)

AT_ONCE_S = 0.0005  # what takes less is computed on the loop: the way to a thread and back takes as long
FIRST_HEARTBEAT_S = 0.5  # until a `Welcome` says how often
OVERLOADED_RETRY_S = 0.1
INTERRUPTED_STATUS = 130
GROWTH_BYTES = 24 << 20  # anonymous memory above the floor that is left alone
REGAIN_S_PER_BYTE = 1e-9  # what memory that was given back costs to have again: page faults, 0.8 measured
REGAIN_SHARE = 0.02  # of the time
LINGER_S = 1.0  # for a goodbye to leave
MESSAGE_CHARACTERS = 3000  # of an error; the wire allows 4096


class Worker:
    """One worker, from its first hello to its goodbye.

    Args:
        load_stage: makes a stage of a verified file; by default the interpreter. A seam for tests of faults.
        announce: is given the line that says the worker is ready; by default it is printed.
        on_hang: begins the process anew, as a computation hangs; called on another thread, with what to say. None: nothing is done then.

    Raises:
        ConfigError: there is no such device, or the cache directory cannot be written to.
    """

    def __init__(
        self,
        config: WorkerConfig,
        *,
        clock: Clock = monotonic,
        load_stage: Callable[[Path], RunnableStage] | None = None,
        announce: Callable[[str], None] | None = None,
        on_hang: Callable[[str], None] | None = None,
    ) -> None:
        heap.share_one_heap()
        self._config, self._clock = config, clock
        self._device = devices.choose_device(config.device)
        self._facts = devices.device_facts(self._device, threads=config.threads)
        self._announce, self._on_hang = announce or _print_line, on_hang
        self._membership = open_membership(config, clock)
        self._membership.watch(self._follow)
        self._highest_term = 0  # of all dispatchers that have welcomed us
        self._incarnation = secrets.randbits(63)
        self._store = ArtifactStore(config.cache_dir)
        self._load_stage = load_stage or self._interpreted
        self._is_interpreting = load_stage is None  # a stage of another kind may block
        self._holdings = Holdings(credit=config.credit)
        self._works: dict[AttemptId, Work] = {}  # one per held attempt
        self._begun: Work | None = None  # begun, and not said yet: it rides on the answer of the one before
        self._heartbeat_s = FIRST_HEARTBEAT_S
        self._is_ready = self._is_draining = False
        self._floor_bytes = 0  # what the runtime takes, once it is ready
        self._keep_until = 0.0  # freed memory is not given back before
        self._tasks: set[asyncio.Task[None]] = set()
        self._watchdog: Watchdog | None = None

    # --- life ------------------------------------------------------------------------------------------------------

    async def run(self, *, signals: bool = True) -> int:
        """Serve until drained.

        Args:
            signals: drain at SIGTERM and SIGINT; for a process whose main thread this is.

        Returns:
            The exit status: 0 after a drain.

        Raises:
            AdaptError: the dispatcher refused this worker; trying again as it is would not help.
        """
        loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[int] = loop.create_future()
        self._executor = Executor(
            device=self._device,
            threads=self._config.threads,
            limit_bytes=self._config.max_message_bytes,
            notify=self._executed,
            at_once_s=AT_ONCE_S if self._is_interpreting else 0.0,
            clock=self._clock,
        )
        self._stages: ResidentStages[RunnableStage] = ResidentStages(
            self._store,
            budget_bytes=self._config.memory_limit_bytes,
            load_stage=self._load_stage,
            send=self._send,
            spawn=self._spawn,
            clock=self._clock,
        )
        self._measuring = Measuring(
            self._store,
            open_profiler=self._open_profiler,
            open_meter=self._open_meter,
            begin=self._take_on,
            send=self._send,
            spawn=self._spawn,
            clock=self._clock,
        )
        if signals:
            loop.add_signal_handler(signal.SIGTERM, self.drain)
            loop.add_signal_handler(signal.SIGINT, self._interrupted)
        try:
            await self._executor.start()
            self._watch()
            self._link = self._new_link(self._config.dispatcher)
            self._spawn(self._begin(), "worker-begin")
            return await self._ended
        finally:
            await self._close()
            if signals:
                loop.remove_signal_handler(signal.SIGTERM)
                loop.remove_signal_handler(signal.SIGINT)

    async def _begin(self) -> None:
        """Find the dispatcher, and knock there."""
        self._link = self._new_link(await self._membership.find())
        self._link.start()
        await self._beat()

    def _new_link(self, address: str) -> PeerLink:
        return PeerLink(
            address,
            name=self._config.name,
            incarnation=self._incarnation,
            hello=self._hello,
            receive=self._receive,
            turned=self._executor.run_soon,
            clock=self._clock,
            limit_bytes=self._config.max_message_bytes,
        )

    def _follow(self) -> None:
        """Another dispatcher reigns, or the same one elsewhere: go there, but never away from one with whom all is well."""
        if self._link.is_open or self._link.address == self._membership.address or self._ended.done():
            return
        log.info("the dispatcher is elsewhere", extra={"before": self._link.address, "now": self._membership.address})
        before, self._link = self._link, self._new_link(self._membership.address)
        self._spawn(before.close(), "worker-leave-link")
        self._link.start()

    def _watch(self) -> None:
        if self._on_hang is not None:
            self._watchdog = Watchdog(self._executor, limit_s=self._config.hang_timeout_s, on_hang=self._on_hang)
            self._watchdog.start()

    def _end_watch(self) -> None:
        if self._watchdog is not None:
            self._watchdog.close()

    def drain(self) -> None:
        """Hand back what has not begun, finish and deliver what has, say goodbye, end. A second call changes nothing."""
        if self._is_draining:
            return
        self._is_draining = True
        self._end_watch()  # it does not begin anew any more
        handed_back = [attempt for attempt, work in self._works.items() if self._executor.withdraw(work)]
        for attempt in handed_back:
            self._let_go(attempt)
        self._holdings.hand_back(handed_back)
        self._stages.stop_pulling()
        self._measuring.stop()
        self._send(Draining(handed_back=handed_back))
        log.info("draining", extra={"handed_back": len(handed_back), "held": len(self._works)})
        asyncio.get_running_loop().call_later(self._config.drain_timeout_s, self._drain_timed_out)
        self._end_if_drained()

    def _interrupted(self) -> None:
        if self._is_draining:
            os._exit(INTERRUPTED_STATUS)  # at once: neither a computation nor a peer is waited for
        self.drain()

    def _end_if_drained(self) -> None:
        if self._is_draining and self._holdings.is_empty:
            self._end()

    def _drain_timed_out(self) -> None:
        if not self._ended.done():
            log.warning("drain timed out", extra={"held": len(self._works), "finished": len(self._holdings.finished)})
            self._end()

    def _end(self) -> None:
        if not self._ended.done():
            self._send(Goodbye(reason="drained"))
            self._ended.set_result(0)

    def _fail(self, error: BaseException) -> None:
        if not self._ended.done():
            self._ended.set_exception(error)

    async def _close(self) -> None:
        self._end_watch()
        for task in self._tasks:
            task.cancel()
        await self._stages.close()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._link.close(linger_s=LINGER_S if self._is_draining else 0.0)
        await self._membership.leave()
        await self._executor.close()

    def _spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Start a background task of this worker, which ends with it; its failure is the worker's."""
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    # --- session ---------------------------------------------------------------------------------------------------

    def _hello(self, highest_term: int) -> WorkerHello:
        return WorkerHello(
            protocol_version=PROTOCOL_VERSION,
            worker_id=self._config.name,
            incarnation=self._incarnation,
            highest_term=max(highest_term, self._highest_term),  # of an earlier link, too
            software=f"adapt {VERSION}",
            device=self._facts,
            cores=allowed_cores(),
            stage_budget_bytes=self._config.memory_limit_bytes,
            credit=self._config.credit,
            resident=list(self._stages.resident),
            held=self._holdings.held,
            finished=self._holdings.finished,
        )

    def _receive(self, event: LinkEvent) -> None:
        match event:
            case LinkReceived(message=message, blobs=blobs):
                self._handle(message, blobs)
            case SessionOpened():
                self._opened(event)
            case SessionLost(reason=reason):
                log.warning("session lost", extra={"reason": reason})
                self._stages.stop_pulling()
                self._measuring.stop()
                asyncio.get_running_loop().call_soon(self._follow)
            case LinkRefused(error=error):
                self._fail(error)

    def _opened(self, event: SessionOpened) -> None:
        welcome = event.welcome
        self._highest_term = max(self._highest_term, event.term)
        self._membership.join(self._incarnation)
        self._heartbeat_s = welcome.heartbeat_s
        self._executor.limit_bytes = min(self._config.max_message_bytes, welcome.max_message_bytes)
        self._measuring.stop()
        self._stages.stop_pulling()  # answers to what an earlier session asked for are not believed in this one
        if self._is_draining:
            self._send(Draining(handed_back=[]))
        for attempt in self._holdings.reopen(event.term):
            self._cancel_held(attempt)
        self._send_unsent()
        for work in self._works.values():
            if work.state is State.RUNNING:
                self._send(messages.Begun(attempt=work.order.attempt))
        log.info("session opened", extra={"session": event.session, "term": event.term})
        if not self._is_ready:
            self._is_ready = True
            self._floor_bytes = devices.anonymous_bytes()
            self._announce(self._ready_line())

    def _ready_line(self) -> str:
        config = self._config
        return (
            f"adapt-worker ready name={config.name} dispatcher={self._link.address} device={self._device} threads={config.threads} "
            f"stage_budget_bytes={config.memory_limit_bytes} floor_bytes={self._floor_bytes} pid={os.getpid()}"
        )

    async def _beat(self) -> None:
        while True:
            self._membership.beat(self._clock())
            if self._link.is_open:
                self._send(
                    Heartbeat(
                        progress=self._executor.progress,
                        memory_percent=psutil.virtual_memory().percent,
                        resident_bytes=self._stages.resident_bytes,
                        cores=allowed_cores(),
                    )
                )
                self._send_unsent()  # what the socket did not take before
            self._keep_memory_low()
            await asyncio.sleep(self._heartbeat_s)

    def _keep_memory_low(self) -> None:
        """Give freed memory back when much has gathered. To have it again may take 2 % of the time."""
        grown_bytes = devices.anonymous_bytes() - self._floor_bytes
        now = self._clock()
        if self._is_ready and grown_bytes > GROWTH_BYTES and now >= self._keep_until:
            self._keep_until = now + grown_bytes * REGAIN_S_PER_BYTE / REGAIN_SHARE
            self._executor.give_memory_back()

    def _send(self, message: Message, blobs: Sequence[Blob] = ()) -> bool:
        return self._link.send(message, tuple(blobs))

    # --- messages --------------------------------------------------------------------------------------------------

    def _handle(self, message: Message, blobs: tuple[Blob, ...]) -> None:
        match message:
            case RunStage():
                self._run_stage(message, blobs)
            case StageAck(attempts=attempts):
                self._holdings.acknowledge(attempts)
                self._end_if_drained()
            case CancelStage(attempt=attempt):
                self._cancel(attempt)
            case ArtifactPiece() | ArtifactMissing():
                self._stages.received(message, blobs)
                self._measuring.received(message, blobs)
            case LoadStage():
                if self._measuring.held_bytes and message.file_bytes + self._measuring.held_bytes > self._stages.room_bytes:
                    self._measuring.give_way()
                self._stages.load(message)
            case UnloadStage():
                self._stages.unload(message)
            case ProfileProgram() if self._is_draining:
                self._measuring.refuse(message, "the worker drains")
            case ProfileProgram():
                self._measuring.measure(message)
            case LinkProbe(number=number, answer_bytes=size):
                self._send(LinkEcho(number=number), (payload(size),))
            case CancelProfile():
                self._measuring.cancel(message)
            case Goodbye(reason=reason):
                log.info("the dispatcher says goodbye", extra={"reason": reason})
                self._stages.stop_pulling()
                self._measuring.stop()
                if self._is_draining and not self._works:  # it will not acknowledge the rest
                    self._end()
            case _:
                log.warning("message not meant for a worker", extra={"kind": type(message).__name__})

    def _run_stage(self, order: RunStage, blobs: tuple[Blob, ...]) -> None:
        attempt = order.attempt
        match self._holdings.accept(attempt):
            case Verdict.ACCEPTED if self._is_draining:
                self._holdings.hand_back([attempt])
                self._send(Draining(handed_back=[attempt]))
            case Verdict.ACCEPTED:
                stage = self._stages.acquire(order.artifact)
                if stage is None:
                    self._refuse(attempt, StageNotResidentError(f"stage {order.artifact[:12]} is not resident"))
                else:
                    self._works[attempt] = self._executor.submit(order, blobs, stage)
            case Verdict.FULL:
                held = f"{len(self._works)} attempts of a credit of {self._config.credit}"
                self._refuse(attempt, OverloadedError(f"the worker holds {held}", retry_after_s=OVERLOADED_RETRY_S))
            case Verdict.FINISHED:
                self._send_kept(self._holdings.kept(attempt))
            case verdict:  # held or cancelled already: its answer comes, or has come, without this
                log.debug("RunStage ignored", extra={"attempt": str(attempt), "verdict": verdict})

    def _cancel(self, attempt: AttemptId) -> None:
        match self._holdings.cancel(attempt):
            case Verdict.HELD:
                self._cancel_held(attempt)
            case Verdict.UNKNOWN:
                self._send_unsent()
            case _:  # finished: its answer is on its way, and stays as it is
                pass

    def _cancel_held(self, attempt: AttemptId) -> None:
        if self._executor.cancel(self._works[attempt]):
            self._let_go(attempt)
            self._answer(attempt, StageCancelled(attempt=attempt))

    # --- answers ---------------------------------------------------------------------------------------------------

    def _executed(self, events: list[Event]) -> None:
        """The executor says what has happened."""
        with self._link.turn():
            self._tell(events)

    def _tell(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Begun):  # first, so that it can ride on an answer that is told with it
                self._begun = event.work
        for event in events:
            match event:
                case Crashed(error=error):
                    self._fail(error)
                case Done() | Failed() | Cancelled():
                    self._finished(event)
        self._say_begun()
        self._end_if_drained()

    def _finished(self, event: Done | Failed | Cancelled) -> None:
        work = event.work
        attempt = work.order.attempt
        if self._begun is work:
            self._begun = None  # its answer says as much
        self._let_go(attempt)
        match event:
            case Done():
                begun = self._begun.order.attempt if self._begun is not None else None
                self._begun = None
                done = StageDone(
                    attempt=attempt,
                    leaves=event.leaves,
                    times=event.times,
                    input_digest=work.input_digest,
                    output_digest=event.output_digest,
                    begun=begun,
                )
                self._answer(attempt, done, event.blobs)
            case Failed():
                self._refuse(attempt, event.error)
            case Cancelled():
                self._answer(attempt, StageCancelled(attempt=attempt))

    def _say_begun(self) -> None:
        """Say what has begun, unless an answer is about to leave that can carry it."""
        if self._begun is None:
            return
        if not any(work.state in (State.ENCODING, State.ENDED) for work in self._works.values() if work is not self._begun):
            self._send(messages.Begun(attempt=self._begun.order.attempt))
            self._begun = None

    def _refuse(self, attempt: AttemptId, error: AdaptError) -> None:
        log.debug("attempt failed", extra={"attempt": str(attempt), "reason": str(error)})
        code, message, fields = error.to_wire()
        self._answer(attempt, StageFailed(attempt=attempt, code=code, message=message[:MESSAGE_CHARACTERS], fields=fields))

    def _answer(self, attempt: AttemptId, answer: Answer, blobs: tuple[Blob, ...] = ()) -> None:
        self._send_kept(self._holdings.finish(attempt, answer, blobs))

    def _send_kept(self, kept: Kept) -> None:
        kept.is_sent = self._send(kept.answer, kept.blobs)

    def _send_unsent(self) -> None:
        for kept in self._holdings.unsent():
            self._send_kept(kept)

    def _let_go(self, attempt: AttemptId) -> None:
        """The executor is through with this attempt."""
        self._stages.release(self._works.pop(attempt).order.artifact)

    def _open_profiler(self, path: Path, repetitions: int) -> Profiler:
        program = read_program(path, verify=False)  # its digest has just been compared
        return Profiler(
            program,
            device=self._device,
            repetitions=repetitions,
            room_bytes=lambda: self._stages.room_bytes,
            cores=self._quota(),
        )

    def _quota(self) -> float:
        """The share of a core that its one thread which computes has to do with; 0: all of one, or there are several threads."""
        cores = allowed_cores()
        return cores if cores < 1 and self._device == "cpu" and self._config.threads == 1 else 0.0

    def _open_meter(self) -> HandlingMeter:
        return HandlingMeter(
            lambda notify: Executor(
                device=self._device,
                threads=self._config.threads,
                limit_bytes=self._config.max_message_bytes,
                notify=notify,
                clock=self._clock,
            )
        )

    def _take_on(self, step: Callable[[], bool]) -> Chore:
        chore = Chore(step)
        self._executor.take_on(chore)
        return chore

    def _interpreted(self, path: Path) -> RunnableStage:
        return Stage.load(path, device=self._device, verify=False)  # its digest has just been compared


def _print_line(line: str) -> None:
    print(line, flush=True)
