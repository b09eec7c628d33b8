"""The executor against stages that wait for the test: what overlaps, in which order things happen, what ends how."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
import weakref
from concurrent.futures import Future

import numpy as np
import pytest
import torch

from adapt.errors import ConfigError, DeadlineExceededError, InputMismatchError, ModelError, WireError
from adapt.models import devices
from adapt.protocol import codecs
from adapt.protocol.ids import AttemptId, RequestId
from adapt.protocol.messages import RunStage
from adapt.protocol.wire import Blob
from adapt.runtime import executor as executor_module
from adapt.runtime.executor import Begun, Cancelled, Chore, Crashed, Done, Executor, Failed, State

WAIT_S = 20.0
LIMIT_BYTES = 64 << 20
SHORT, LONG = "0" * 64, "1" * 64  # artifacts
BIG = (1 << 18) + 1000  # float32: beyond what is decoded and encoded on the compute thread


class GatedStage:
    """Adds one. Stops in each run until the test lets it go on."""

    def __init__(self) -> None:
        self.threads: list[int] = []
        self.entered: list[Future[None]] = [Future() for _ in range(8)]
        self.gates = [threading.Event() for _ in range(8)]
        self.runs = 0

    def run(self, inputs):
        run, self.runs = self.runs, self.runs + 1
        self.threads.append(threading.get_ident())
        self.entered[run].set_result(None)
        assert self.gates[run].wait(WAIT_S)
        return [value + 1 for value in inputs]

    async def reached(self, run: int) -> None:
        await asyncio.wait_for(asyncio.wrap_future(self.entered[run]), WAIT_S)


class FreeStage:
    def __init__(self, function=lambda inputs: list(inputs)) -> None:
        self.run = function


def order(sequence: int = 1, *arrays, codec="raw", tolerance=None, budget_s=60.0, dtype=None, sent_as="raw", artifact=SHORT):
    """A RunStage of these arrays, and its blobs."""
    encoded = [codecs.encode(array, codec=sent_as, dtype=dtype) for array in arrays]
    message = RunStage(
        attempt=AttemptId(RequestId(bytes(16), sequence), 1, 0, 1),
        artifact=artifact,
        budget_s=budget_s,
        codec=codec,
        tolerance=tolerance,
        leaves=[header for header, _ in encoded],
    )
    return message, tuple(Blob.of(bytes(payload)) for _, payload in encoded)


def small(value: float = 0.0):
    return np.full((2, 3), value, np.float32)


def big(value: float = 0.0):
    return np.full(BIG, value, np.float32)


class Harness:
    """An executor, and what it has said."""

    def __init__(self, clock=None, **options) -> None:
        self.events: list[object] = []
        self.batches: list[list[object]] = []
        self.arrived = asyncio.Event()
        self.is_turning = False
        options |= {} if clock is None else {"clock": clock}
        self.executor = Executor(device="cpu", threads=1, limit_bytes=LIMIT_BYTES, notify=self._notify, **options)

    def _notify(self, events) -> None:
        self.events += events
        self.batches.append(list(events))
        self.arrived.set()

    async def __aenter__(self):
        await self.executor.start()
        return self

    async def __aexit__(self, *_):
        await self.executor.close()

    def submit(self, stage, *args, **options):
        message, blobs = order(*args, **options)
        work = self.executor.submit(message, blobs, stage)
        if not self.is_turning:  # else it runs with what was submitted before it in this turn
            self.is_turning = True
            asyncio.get_running_loop().call_soon(self.end_turn)
        return work

    def end_turn(self):
        self.is_turning = False
        self.executor.run_soon()

    async def event(self, kind, work):
        """The first event of this kind about this work."""
        async with asyncio.timeout(WAIT_S):
            while True:
                for event in self.events:
                    if isinstance(event, kind) and event.work is work:
                        return event
                self.arrived.clear()
                await self.arrived.wait()

    def kinds(self, work):
        return [type(event) for event in self.events if event.work is work]


def run(test):
    asyncio.run(test())


def output(event) -> list[np.ndarray]:
    blobs = iter(event.blobs)
    return [codecs.decode(leaf, next(blobs).contiguous(), limit_bytes=LIMIT_BYTES) for leaf in event.leaves]


@pytest.fixture(autouse=True)
def every_stage_is_long(monkeypatch):
    """However quick the machine: each says that it has begun. Tests of short stages say what is short."""
    monkeypatch.setattr(executor_module, "SHORT_S", 0.0)


@pytest.mark.parametrize("make", [small, big])
def test_a_work_begins_and_is_done(make):
    async def test():
        async with Harness() as harness:
            before = harness.executor.progress
            work = harness.submit(FreeStage(lambda inputs: [inputs[0] * 2, 7]), 1, make(3))
            done = await harness.event(Done, work)
            assert done.leaves[1] == 7
            np.testing.assert_array_equal(output(Done(work, done.leaves[:1], done.blobs, done.times, b""))[0], make(6))
            assert harness.kinds(work) == [Begun, Done]
            assert harness.executor.progress > before
            assert work.state is State.ENDED and len(work.input_digest) == len(done.output_digest) == 16

    run(test)


def test_inputs_are_decoded_and_outputs_encoded_while_another_computes():
    async def test():
        async with Harness() as harness:
            stage = GatedStage()
            first = harness.submit(stage, 1, big(1))
            await stage.reached(0)
            second = harness.submit(stage, 2, big(2))
            await asyncio.wait_for(asyncio.wrap_future(second.decoded), WAIT_S)  # while the first stands in its gate
            stage.gates[0].set()
            await stage.reached(1)
            done = await harness.event(Done, first)  # encoded while the second stands in its gate
            np.testing.assert_array_equal(output(done)[0], big(2))
            stage.gates[1].set()
            np.testing.assert_array_equal(output(await harness.event(Done, second))[0], big(3))

    run(test)


def test_one_computes_at_a_time_in_order_of_arrival():
    async def test():
        async with Harness() as harness:
            stage = GatedStage()
            works = [harness.submit(stage, index, make(index)) for index, make in enumerate([big, small, big, small])]
            for index in range(len(works)):
                await stage.reached(index)
                assert stage.runs == index + 1
                stage.gates[index].set()
            await harness.event(Done, works[-1])
            await harness.event(Done, works[-2])
            assert [event.work for event in harness.events if isinstance(event, Begun)] == works

    run(test)


def test_begun_of_the_next_is_said_in_one_batch_with_the_answer_before():
    async def test():
        async with Harness() as harness:
            stage = GatedStage()
            first = harness.submit(stage, 1, small(1))
            await stage.reached(0)
            second = harness.submit(stage, 2, small(2))
            stage.gates[0].set()
            await harness.event(Begun, second)
            assert [type(event) for event in harness.batches[-1]] == [Done, Begun]
            stage.gates[1].set()
            await harness.event(Done, second)
            assert harness.kinds(first) == harness.kinds(second) == [Begun, Done]

    run(test)


def test_a_stage_that_was_short_the_last_time_is_not_said_to_have_begun(monkeypatch):
    monkeypatch.setattr(executor_module, "SHORT_S", 3600.0)

    async def test():
        async with Harness() as harness:
            works = []
            for number in range(3):
                works.append(harness.submit(FreeStage(), number, small(number)))
                await harness.event(Done, works[-1])
            other = harness.submit(FreeStage(), 9, small(), artifact=LONG)
            await harness.event(Done, other)
            assert [harness.kinds(work) for work in (*works, other)] == [[Begun, Done], [Done], [Done], [Begun, Done]]

    run(test)


@pytest.mark.parametrize("artifact", [SHORT, LONG], ids=["short the last time", "new"])
def test_no_answer_waits_for_a_stage_that_has_begun(monkeypatch, artifact):
    """Nobody knows how long that takes, whatever it took the last time."""
    monkeypatch.setattr(executor_module, "SHORT_S", 3600.0)

    async def test():
        async with Harness() as harness:
            await harness.event(Done, harness.submit(FreeStage(), 0, small()))
            gated, long = GatedStage(), GatedStage()
            first = harness.submit(gated, 1, small())
            await gated.reached(0)
            works = [harness.submit(FreeStage(), number, small(number)) for number in range(2, 48)]
            last = harness.submit(long, 99, small(), artifact=artifact)
            gated.gates[0].set()
            await long.reached(0)
            for work in (first, *works):
                await harness.event(Done, work)
            assert [event.work for event in harness.events if isinstance(event, Done)][1:] == [first, *works], "in their order"
            if artifact == LONG:
                await harness.event(Begun, last)
            long.gates[0].set()
            await harness.event(Done, last)
            assert harness.kinds(last) == ([Done] if artifact == SHORT else [Begun, Done])

    run(test)


def test_what_takes_less_than_the_way_to_a_thread_is_run_on_the_loop():
    async def test():
        async with Harness(at_once_s=3600.0) as harness:
            stage = GatedStage()
            for gate in stage.gates:
                gate.set()
            first = harness.submit(stage, 1, small(1))
            await harness.event(Done, first)
            works = [harness.submit(stage, 2, small(2)), harness.submit(stage, 3, small(3))]
            assert stage.runs == 1, "not within `submit`: whoever submits has not noted yet that it did"
            for work in works:
                done = await harness.event(Done, work)
            np.testing.assert_array_equal(output(done)[0], small(4))
            late = harness.submit(stage, 4, big(4))
            await harness.event(Done, late)
            here = threading.get_ident()
            assert [thread == here for thread in stage.threads] == [False, True, True, False], "neither what is new nor what is big"

    run(test)


def test_a_larger_batch_than_was_short_before_is_neither_run_on_the_loop_nor_left_unsaid(monkeypatch):
    monkeypatch.setattr(executor_module, "SHORT_S", 3600.0)

    async def test():
        async with Harness(at_once_s=3600.0) as harness:
            stage = GatedStage()
            for gate in stage.gates:
                gate.set()
            for sequence, rows in enumerate((1, 1, 8, 8, 2), start=1):
                await harness.event(Done, harness.submit(stage, sequence, np.zeros((rows, 3), np.float32)))
            here = threading.get_ident()
            assert [thread == here for thread in stage.threads] == [False, True, False, True, True]
            assert [event.work.order.attempt.request.sequence for event in harness.events if isinstance(event, Begun)] == [1, 3]

    run(test)


def test_other_callbacks_have_their_turn_between_short_stages():
    async def test():
        async with Harness(at_once_s=3600.0) as harness:  # and whatever takes longer than nothing ends a turn: see `every_stage_is_long`
            stage = FreeStage(lambda inputs: [inputs[0] + 1])
            await harness.event(Done, harness.submit(stage, 1, small()))
            turns = 0

            def turn() -> None:
                nonlocal turns
                turns += 1
                asyncio.get_running_loop().call_soon(turn)

            turn()
            works = [harness.submit(stage, 2 + n, small()) for n in range(4)]
            await harness.event(Done, works[-1])
            assert turns >= len(works)

    run(test)


def test_what_came_first_is_run_first_wherever_it_runs():
    """Behind what is not short all else goes to the compute thread, and while that has work nothing is run on the loop."""

    async def test():
        async with Harness(at_once_s=3600.0) as harness:
            await harness.event(Done, harness.submit(FreeStage(), 0, small()))
            ran, has_begun = [], asyncio.Event()

            def note(number):
                ran.append((number, threading.get_ident()))
                if number == 0:  # on the loop
                    has_begun.set()
                return [1.0]

            stages = [FreeStage(lambda inputs, number=number: note(number)) for number in range(6)]
            makes = [small, small, big, small, small, small]
            works = [harness.submit(stages[number], number + 1, makes[number]()) for number in range(5)]
            await has_begun.wait()
            works.append(harness.submit(stages[5], 6, makes[5]()))
            for work in works:
                await harness.event(Done, work)
            assert [number for number, _ in ran] == list(range(6))
            here = threading.get_ident()
            assert [thread == here for _, thread in ran[:5]] == [True, True, False, False, False]

    run(test)


@pytest.mark.parametrize("makes", [[small, small], [small, big], [big, small]], ids=["here", "last on the thread", "both on the thread"])
@pytest.mark.parametrize("withdrawn", [0, 1])
def test_what_is_withdrawn_before_the_loop_gets_to_it_is_not_run_and_leaves_no_trace(makes, withdrawn):
    async def test():
        async with Harness(at_once_s=3600.0) as harness:
            await harness.event(Done, harness.submit(FreeStage(), 0, small()))
            ran = []
            works = [
                harness.submit(FreeStage(lambda inputs, number=number: [ran.append(number), 1.0][1:]), number + 1, make())
                for number, make in enumerate(makes)
            ]
            assert harness.executor.withdraw(works[withdrawn])
            assert not harness.executor.withdraw(works[withdrawn])
            await harness.event(Done, works[1 - withdrawn])
            stage = GatedStage()
            stage.gates[0].set()
            await harness.event(Done, harness.submit(stage, 9, small()))
            assert ran == [1 - withdrawn] and harness.kinds(works[withdrawn]) == []
            assert stage.threads == [threading.get_ident()], "nothing else runs: it is run at once, as before"

    run(test)


def test_an_error_of_the_model_on_the_loop_is_its_own():
    def fail(inputs):
        raise ValueError("no")

    async def test():
        async with Harness(at_once_s=3600.0) as harness:
            await harness.event(Done, harness.submit(FreeStage(), 0, small()))
            failed = await harness.event(Failed, harness.submit(FreeStage(fail), 1, small()))
            assert isinstance(failed.error, ModelError)
            await harness.event(Done, harness.submit(FreeStage(), 2, small()))

    run(test)


@pytest.mark.parametrize("make", [small, big])
def test_what_is_cancelled_before_it_begins_is_never_computed(make):
    async def test():
        async with Harness() as harness:
            stage = GatedStage()
            first = harness.submit(stage, 1, make(1))
            await stage.reached(0)
            second, third = harness.submit(stage, 2, make(2)), harness.submit(stage, 3, make(3))
            assert harness.executor.cancel(second)
            stage.gates[0].set()
            await stage.reached(1)
            stage.gates[1].set()
            done = await harness.event(Done, third)
            np.testing.assert_array_equal(output(done)[0], make(4))
            await harness.event(Done, first)  # large ones are encoded beside each other
            assert stage.runs == 2 and harness.kinds(second) == []
            assert harness.kinds(first) == [Begun, Done]

    run(test)


def test_what_is_cancelled_while_it_computes_ends_as_cancelled_and_is_not_encoded(monkeypatch):
    encoded = []
    monkeypatch.setattr(executor_module, "_encoded", lambda *args: encoded.append(args))

    async def test():
        async with Harness() as harness:
            stage = GatedStage()
            work = harness.submit(stage, 1, big())
            await stage.reached(0)
            assert not harness.executor.cancel(work)
            stage.gates[0].set()
            await harness.event(Cancelled, work)
            assert harness.kinds(work) == [Begun, Cancelled] and encoded == []

    run(test)


def test_what_is_withdrawn_while_it_computes_goes_on():
    async def test():
        async with Harness() as harness:
            stage = GatedStage()
            work = harness.submit(stage, 1, small())
            await stage.reached(0)
            assert not harness.executor.withdraw(work)
            stage.gates[0].set()
            await harness.event(Done, work)

    run(test)


def test_what_has_spent_its_budget_waiting_is_not_computed():
    now = [0.0]

    async def test():
        async with Harness(clock=lambda: now[0]) as harness:
            stage = GatedStage()
            harness.submit(stage, 1, small())
            await stage.reached(0)
            late, later = (
                harness.submit(stage, 2, small(), budget_s=5.0),
                harness.submit(stage, 3, small(), budget_s=5.1),
            )
            now[0] = 5.0
            stage.gates[0].set()
            await stage.reached(1)
            stage.gates[1].set()
            await harness.event(Done, later)
            failed = await harness.event(Failed, late)
            assert isinstance(failed.error, DeadlineExceededError) and failed.error.budget_s == 5.0
            assert harness.kinds(late) == [Failed] and stage.runs == 2

    run(test)


def _raise(error):
    raise error


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (ValueError("x" * 10_000), ModelError, "ValueError: xxx"),
        (MemoryError(), ModelError, "MemoryError"),
        (torch.OutOfMemoryError("CUDA out of memory"), ModelError, "OutOfMemoryError: CUDA"),
        (InputMismatchError("expected float32"), InputMismatchError, "expected float32"),
    ],
)
def test_an_error_of_the_model_ends_its_work_alone(error, kind, text):
    async def test():
        async with Harness() as harness:
            failed = await harness.event(Failed, harness.submit(FreeStage(lambda _: _raise(error)), 1, small()))
            assert type(failed.error) is kind
            assert str(failed.error).startswith(text) and len(str(failed.error)) <= 3000
            await harness.event(Done, harness.submit(FreeStage(), 2, small()))

    run(test)


@pytest.mark.parametrize("make", [small, big])
def test_a_payload_that_cannot_be_decoded_ends_its_work_alone(make):
    async def test():
        async with Harness() as harness:
            message, blobs = order(1, make())
            work = harness.executor.submit(message, (Blob.of(bytes(blobs[0].contiguous())[:-1]),), FreeStage())
            failed = await harness.event(Failed, work)
            assert isinstance(failed.error, WireError)
            await harness.event(Done, harness.submit(FreeStage(), 2, make()))

    run(test)


def test_a_codec_that_cannot_be_ends_its_work_alone():
    async def test():
        async with Harness() as harness:
            failed = await harness.event(Failed, harness.submit(FreeStage(), 1, small(), codec="zfp"))
            assert isinstance(failed.error, ConfigError)
            await harness.event(Done, harness.submit(FreeStage(), 2, small()))

    run(test)


def test_an_output_beyond_a_message_is_refused_with_its_size():
    async def test():
        async with Harness() as harness:
            harness.executor.limit_bytes = 1 << 20
            stage = FreeStage(lambda inputs: [torch.zeros(1 << 20)])
            failed = await harness.event(Failed, harness.submit(stage, 1, small()))
            assert isinstance(failed.error, InputMismatchError) and "4,194,304 bytes, a message 1,048,576" in str(failed.error)

    run(test)


@pytest.mark.parametrize("sent_as", ["raw", "lz4"])
@pytest.mark.parametrize("name", [*codecs.DTYPES])
def test_every_dtype_goes_through_unchanged(name, sent_as):
    array = np.arange(48).astype(codecs.DTYPES[name]).reshape(2, 3, 8)
    seen = []

    def look(inputs):
        seen.append(inputs[0])
        return list(inputs)

    async def test():
        async with Harness() as harness:
            work = harness.submit(FreeStage(look), 1, array, dtype=name, sent_as=sent_as, codec=sent_as)
            done = await harness.event(Done, work)
            assert str(seen[0].dtype) == f"torch.{name}" and done.leaves[0].dtype == name
            np.testing.assert_array_equal(output(done)[0], array)
            assert work.input_digest == done.output_digest  # the same tensors, whatever they travelled as

    run(test)


def test_digests_tell_values_shapes_and_types_apart():
    arrays = [np.zeros(4, np.float32), np.zeros((2, 2), np.float32), np.zeros(4, np.int32), np.float32([0, 0, 0, -0.0])]

    async def test():
        async with Harness() as harness:
            works = [harness.submit(FreeStage(), index, array) for index, array in enumerate(arrays)]
            digests = {(await harness.event(Done, work)).output_digest for work in works}
            assert len(digests) == len(arrays)

    run(test)


@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("shift", range(0, 65, 13))
def test_raw_tensors_are_aligned_however_they_came(parts, shift):
    data = big(5).tobytes()
    frame = bytearray(shift) + data
    view = memoryview(frame)[shift:]
    cuts = [0, *(len(data) * index // parts + index for index in range(1, parts)), len(data)]
    blob = Blob(len(data), 0, tuple(view[begin:end] for begin, end in itertools.pairwise(cuts)))
    seen = []

    def look(inputs):
        seen.append(inputs[0].data_ptr() % 64)
        return list(inputs)

    async def test():
        async with Harness() as harness:
            message, _ = order(1, big(5))
            done = await harness.event(Done, harness.executor.submit(message, (blob,), FreeStage(look)))
            np.testing.assert_array_equal(output(done)[0], big(5))
            assert seen == [0]

    run(test)


def test_outputs_travel_without_a_copy():
    tensor = torch.arange(BIG, dtype=torch.float32)

    async def test():
        async with Harness() as harness:
            done = await harness.event(Done, harness.submit(FreeStage(lambda _: [tensor]), 1, small()))
            sent = np.frombuffer(done.blobs[0].contiguous(), np.float32)
            assert np.shares_memory(sent, tensor.numpy())

    run(test)


def test_a_compressed_bomb_is_bounded_over_all_tensors():
    async def test():
        async with Harness() as harness:
            harness.executor.limit_bytes = 3 * big().nbytes
            within = harness.submit(FreeStage(lambda _: []), 1, *[big()] * 3, sent_as="lz4")
            beyond = harness.submit(FreeStage(lambda _: []), 2, *[big()] * 4, sent_as="lz4")
            await harness.event(Done, within)
            assert isinstance((await harness.event(Failed, beyond)).error, WireError)

    run(test)


def test_what_computes_long_hangs_only_when_nobody_waits_for_it():
    async def test():
        now = 0.0
        async with Harness(clock=lambda: now) as harness:
            stage = GatedStage()
            assert harness.executor.hanging_s(5.0) is None
            first = harness.submit(stage, 1, small(), budget_s=60.0)
            second = harness.submit(stage, 2, small(), budget_s=60.0)
            await stage.reached(0)
            now = 59.0
            assert harness.executor.hanging_s(5.0) is None
            now = 61.0
            assert harness.executor.hanging_s(5.0) == 61.0 and harness.executor.hanging_s(61.0) is None
            stage.gates[0].set()
            await harness.event(Done, first)
            assert harness.executor.hanging_s(5.0) is None, "the other is too late to begin"
            third = harness.submit(stage, 3, small(), budget_s=60.0, artifact=LONG)
            await stage.reached(1)
            now = 67.0
            harness.executor.cancel(third)
            assert harness.executor.hanging_s(5.0) == 6.0
            stage.gates[1].set()
            await harness.event(Cancelled, third)
            fourth = harness.submit(stage, 4, small(), budget_s=60.0, artifact=SHORT)
            await stage.reached(2)
            harness.executor.cancel(fourth)
            now = 67.0 + 3 * 61.0
            assert harness.executor.hanging_s(5.0) is None, "the last of this kind took 61 s"
            now += 1.0
            assert harness.executor.hanging_s(5.0) == 184.0
            stage.gates[2].set()
            await harness.event(Cancelled, fourth)
            assert harness.kinds(second) == [Failed]

    run(test)


def test_times_tell_waiting_from_computing():
    now = [0.0]

    async def test():
        async with Harness(clock=lambda: now[0]) as harness:
            stage = GatedStage()
            harness.submit(stage, 1, small())
            await stage.reached(0)
            work = harness.submit(stage, 2, small())
            now[0] = 2.0
            stage.gates[0].set()
            await stage.reached(1)
            now[0] = 5.0
            stage.gates[1].set()
            times = (await harness.event(Done, work)).times
            assert (times.wait_s, times.decode_s, times.compute_s, times.encode_s) == (2.0, 0.0, 3.0, 0.0)

    run(test)


def test_a_bug_on_the_compute_thread_is_told():
    class Bug(BaseException):
        pass

    async def test():
        async with Harness() as harness:
            harness.submit(FreeStage(lambda _: _raise(Bug())), 1, small())
            async with asyncio.timeout(WAIT_S):
                while not any(isinstance(event, Crashed) for event in harness.events):
                    harness.arrived.clear()
                    await harness.arrived.wait()

    run(test)


def test_it_computes_with_the_threads_it_was_told():
    async def test():
        async with Harness() as harness:
            seen = []
            stage = FreeStage(lambda inputs: seen.append(torch.get_num_threads()) or list(inputs))
            await harness.event(Done, harness.submit(stage, 1, small()))
            assert seen == [1]

    run(test)


# --- devices -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["gpu", "cuda:", "cuda:-1", "cuda:x", "", "mps"])
def test_a_device_that_is_none_is_refused(setting):
    with pytest.raises(ConfigError, match=r"expected auto, cpu, or cuda:N"):
        devices.choose_device(setting)


def test_a_gpu_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"device='cuda:0': torch .*; use cpu or auto"):
        devices.choose_device("cuda:0")
    assert devices.choose_device("auto") == devices.choose_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices.choose_device("auto") == devices.choose_device("cuda") == "cuda:0"
    assert devices.choose_device("cuda:1") == "cuda:1"
    with pytest.raises(ConfigError, match=r"this machine has cuda:0 to cuda:1"):
        devices.choose_device("cuda:2")


def test_a_numeric_class_tells_thread_counts_apart():
    one, two = (devices.device_facts("cpu", threads=count) for count in (1, 2))
    assert one.numeric_class != two.numeric_class
    assert torch.__version__ in one.numeric_class and one.device == "cpu" and one.device_name
    assert devices.anonymous_bytes() > 0


# --- chores --------------------------------------------------------------------------------------------------------


class Slices:
    """Steps of a chore: so many, told by number; one may wait for the test, or raise."""

    def __init__(self, count: int, *, gate: int = -1, error: Exception | None = None) -> None:
        self.count, self.gate, self.error = count, gate, error
        self.done = 0
        self.entered: Future[None] = Future()
        self.may_go_on = threading.Event()
        self.threads: set[int] = set()

    def __call__(self) -> bool:
        self.threads.add(threading.get_ident())
        if self.done == self.gate:
            self.entered.set_result(None)
            assert self.may_go_on.wait(WAIT_S)
        if self.error is not None:
            raise self.error
        self.done += 1
        return self.done < self.count


async def over(chore):
    await asyncio.wait_for(asyncio.wrap_future(chore.done), WAIT_S)


def test_a_chore_is_done_to_its_end_on_the_compute_thread():
    async def test():
        async with Harness() as harness:
            slices, stage = Slices(5), GatedStage()
            chore = Chore(slices)
            harness.executor.take_on(chore)
            await over(chore)
            work = harness.submit(stage, 1, small())
            stage.gates[0].set()
            await harness.event(Done, work)
            assert slices.done == 5 and slices.threads == set(stage.threads)

    run(test)


def test_a_work_waits_for_one_slice_at_most(monkeypatch):
    monkeypatch.setattr(executor_module, "QUIET_S", 60.0)  # after a work no slice runs any more, within this test

    async def test():
        async with Harness() as harness:
            slices = Slices(100, gate=3)
            chore = Chore(slices)
            harness.executor.take_on(chore)
            await asyncio.wait_for(asyncio.wrap_future(slices.entered), WAIT_S)
            works = [harness.submit(FreeStage(), number, small()) for number in range(3)]
            slices.may_go_on.set()
            for work in works:
                await harness.event(Done, work)
            assert slices.done == 4
            chore.cancel()

    run(test)


def test_a_chore_goes_on_when_the_works_are_done(monkeypatch):
    monkeypatch.setattr(executor_module, "QUIET_S", 0.01)

    async def test():
        async with Harness() as harness:
            slices = Slices(6, gate=3)
            chore = Chore(slices)
            harness.executor.take_on(chore)
            await asyncio.wait_for(asyncio.wrap_future(slices.entered), WAIT_S)
            work = harness.submit(FreeStage(), 1, small())
            slices.may_go_on.set()
            await harness.event(Done, work)
            await over(chore)
            assert slices.done == 6

    run(test)


def test_a_cancelled_chore_does_no_more_slices():
    async def test():
        async with Harness() as harness:
            slices = Slices(100, gate=2)
            chore = Chore(slices)
            harness.executor.take_on(chore)
            await asyncio.wait_for(asyncio.wrap_future(slices.entered), WAIT_S)
            chore.cancel()
            slices.may_go_on.set()
            work = harness.submit(FreeStage(), 1, small())
            await harness.event(Done, work)
            other = Chore(Slices(3))
            harness.executor.take_on(other)
            await over(other)
            assert slices.done == 3

    run(test)


def test_the_error_of_a_slice_is_the_chores_and_nobody_elses():
    async def test():
        async with Harness() as harness:
            chore = Chore(Slices(3, error=ValueError("no such operator")))
            harness.executor.take_on(chore)
            with pytest.raises(ValueError, match="no such operator"):
                await over(chore)
            work = harness.submit(FreeStage(), 1, small())
            await harness.event(Done, work)

    run(test)


def test_a_slice_that_hangs_is_noticed():
    now = [0.0]

    async def test():
        async with Harness(clock=lambda: now[0]) as harness:
            slices = Slices(2, gate=0)
            harness.executor.take_on(Chore(slices))
            await asyncio.wait_for(asyncio.wrap_future(slices.entered), WAIT_S)
            assert harness.executor.hanging_s(10.0) is None
            now[0] = 11.0
            assert harness.executor.hanging_s(10.0) == 11.0
            slices.may_go_on.set()

    run(test)


def test_a_short_stage_that_fails_keeps_no_inputs(monkeypatch):
    """Without the collector, which comes seldom."""
    monkeypatch.setattr(executor_module, "SHORT_S", 0.002)
    inputs: list[weakref.ref] = []

    def fail(values):
        inputs.append(weakref.ref(values[0]))
        if len(inputs) > 1:
            raise RuntimeError("no")
        return values

    async def test():
        async with Harness(at_once_s=60.0) as harness:
            await harness.event(Done, harness.submit(FreeStage(fail), 1, small()))
            await harness.event(Failed, harness.submit(FreeStage(fail), 2, small()))
            harness.events.clear()
            await asyncio.sleep(0)
            assert inputs[1]() is None

    gc.collect()
    gc.disable()
    try:
        run(test)
    finally:
        gc.enable()
