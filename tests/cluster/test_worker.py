"""A whole worker against a dispatcher that says what the test tells it to."""

from __future__ import annotations

import asyncio
import os

import numpy as np
import pytest
import torch

from adapt.errors import AdaptError
from adapt.protocol import messages as msg
from adapt.protocol.ids import routing_ids
from adapt.protocol.wire import Blob
from adapt.runtime import executor
from adapt.runtime.cores import allowed_cores
from tests.cluster.scripted import ANSWERS, BATCH, WAIT_S, Scene, attempt, export_net, output, run


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    files = tmp_path_factory.mktemp("files")
    return *export_net(files), files


@pytest.fixture(autouse=True)
def every_stage_is_long(monkeypatch):
    """However quick the machine: each says that it has begun, and no answer waits for another."""
    monkeypatch.setattr(executor, "SHORT_S", 0.0)


@pytest.fixture
def scene(tmp_path, exported):
    _, program, files = exported
    return Scene(tmp_path, program.digest, program.file_bytes, files)


# --- the ordinary way ----------------------------------------------------------------------------------------------


def test_a_worker_says_who_it_is_and_when_it_is_ready(scene):
    async def test():
        async with scene.open(load=False, threads=1, credit=3):
            hello = scene.hello
            assert (hello.worker_id, hello.credit, hello.stage_budget_bytes) == ("w1", 3, 1 << 30)
            assert (hello.resident, hello.held, hello.finished) == ([], [], [])
            assert hello.device.device == "cpu" and torch.__version__ in hello.device.numeric_class
            (line,) = scene.lines
            assert line.startswith(f"adapt-worker ready name=w1 dispatcher={scene.dispatcher.address} device=cpu threads=1 ")
            floor = int(line.partition("floor_bytes=")[2].partition(" ")[0])
            assert floor > 1 << 20 and line.endswith(f"pid={os.getpid()}")

    run(test)


def test_a_stage_is_fetched_run_and_answered_with_the_modules_own_result(scene, exported):
    x = torch.randn(BATCH, 4)

    async def test():
        async with scene.open() as dispatcher:
            assert sum(fetch.length for fetch in dispatcher.of(msg.Fetch)) == scene.file_bytes
            scene.run_stage(1, x.numpy())
            done = await dispatcher.take(msg.StageDone)
            assert done.attempt == attempt(1)
            with torch.inference_mode():
                np.testing.assert_array_equal(output(dispatcher, done), exported[0](x).numpy())
            assert done.times.compute_s > 0 and len(done.input_digest) == len(done.output_digest) == 16
            scene.run_stage(2, x.numpy())
            again = await dispatcher.take(msg.StageDone)
            assert (again.input_digest, again.output_digest) == (done.input_digest, done.output_digest)

    run(test)


def test_big_activations_travel_both_ways(scene):
    array = np.random.default_rng(0).standard_normal((500, 1000), dtype=np.float32)

    async def test():
        async with scene.open(gated=True) as dispatcher:
            scene.stage.open()
            for sequence, (codec, tolerance) in enumerate([("raw", None), ("lz4", None), ("zfp+lz4", 0.1)]):
                scene.run_stage(sequence, array, codec=codec, tolerance=tolerance)
                done = await dispatcher.take(msg.StageDone)
                header, truth = done.leaves[0], array + 1
                assert np.abs(output(dispatcher, done) - truth).max() <= header.bound <= (tolerance or 0.0) * truth.std() * (1 + 1e-6)
                assert (header.bound > 0) == (tolerance is not None), "lossy only where that was asked for, and then really"

    run(test)


def test_a_heartbeat_tells_progress_and_memory(scene):
    async def test():
        async with scene.open() as dispatcher:
            first = await dispatcher.take(msg.Heartbeat)
            assert scene.hello.cores == first.cores == allowed_cores()
            scene.run_stage(1)
            await dispatcher.take(msg.StageDone)
            dispatcher.got.clear()
            later = await dispatcher.take(msg.Heartbeat)
            assert later.progress > first.progress and 0 < later.memory_percent <= 100
            assert later.resident_bytes == scene.file_bytes

    run(test)


def test_the_begin_of_the_next_rides_on_the_answer(scene):
    async def test():
        async with scene.open(gated=True) as dispatcher:
            scene.run_stage(1)
            await scene.stage.reached(0)
            assert (await dispatcher.take(msg.Begun)).attempt == attempt(1)
            scene.run_stage(2)
            await dispatcher.quiet()
            scene.stage.gates[0].set()
            done = await dispatcher.take(msg.StageDone)
            assert done.attempt == attempt(1) and done.begun == attempt(2)
            assert not dispatcher.of(msg.Begun)

    run(test)


# --- stages --------------------------------------------------------------------------------------------------------


def test_loading_again_costs_nothing_and_the_cache_outlives_the_worker(scene):
    async def test():
        async with scene.open() as dispatcher:
            dispatcher.got.clear()
            scene.dispatcher.send(msg.LoadStage(artifact=scene.digest, file_bytes=scene.file_bytes))
            assert (await dispatcher.take(msg.StageLoaded)).load_s == 0
            assert not dispatcher.of(msg.Fetch)
        async with scene.open() as dispatcher:
            assert not dispatcher.of(msg.Fetch)

    run(test)


def test_two_orders_to_load_share_one_load(scene):
    async def test():
        async with scene.open(load=False) as dispatcher:
            for _ in range(2):
                dispatcher.send(msg.LoadStage(artifact=scene.digest, file_bytes=scene.file_bytes))
            await dispatcher.take(msg.StageLoaded)
            await dispatcher.quiet()
            assert sum(fetch.length for fetch in dispatcher.of(msg.Fetch)) == scene.file_bytes

    run(test)


def test_a_damaged_file_in_the_cache_is_fetched_anew(scene):
    cached = scene.directory / "cache" / f"{scene.digest}.safetensors"
    cached.parent.mkdir()
    cached.write_bytes(bytes(scene.file_bytes))

    async def test():
        async with scene.open() as dispatcher:
            assert dispatcher.of(msg.Fetch)
            scene.run_stage(1)
            await dispatcher.take(msg.StageDone)

    run(test)


def test_a_stage_beyond_the_budget_is_refused_with_the_numbers(scene):
    async def test():
        budget = scene.file_bytes + 100
        async with scene.open(memory_limit_bytes=budget) as dispatcher:
            dispatcher.send(msg.LoadStage(artifact="1" * 64, file_bytes=101))
            failed = await dispatcher.take(msg.LoadFailed)
            assert (failed.artifact, failed.code) == ("1" * 64, "plan")
            for part in (
                "needs 101 bytes",
                f"budget of {budget:,} bytes 100 are left",
                scene.digest[:12],
                f"{scene.file_bytes:,} bytes",
            ):
                assert part in failed.message
            dispatcher.send(msg.UnloadStage(artifact=scene.digest))
            dispatcher.send(msg.LoadStage(artifact=scene.digest, file_bytes=scene.file_bytes))
            await dispatcher.take(msg.StageLoaded)

    run(test)


def test_a_file_that_is_gone_or_no_stage_is_refused(scene):
    source = scene.directory / "source"
    source.write_bytes(b"no stage at all")

    async def test():
        async with scene.open() as dispatcher:
            dispatcher.send(msg.LoadStage(artifact="1" * 64, file_bytes=101))
            failed = await dispatcher.take(msg.LoadFailed)
            assert failed.code == "plan" and "does not have it" in failed.message
            dispatcher.send(msg.LoadStage(artifact=dispatcher.files.add(source), file_bytes=source.stat().st_size))
            assert (await dispatcher.take(msg.LoadFailed)).code == "wire"
            scene.run_stage(1)
            await dispatcher.take(msg.StageDone)

    run(test)


def test_a_stage_that_is_not_resident_is_a_neutral_answer(scene):
    async def test():
        async with scene.open(load=False) as dispatcher:
            scene.run_stage(1)
            assert (await dispatcher.take(msg.StageFailed)).code == "stage-not-resident"

    run(test)


def test_a_stage_in_use_is_unloaded_when_its_last_attempt_has_ended(scene):
    async def test():
        async with scene.open(gated=True) as dispatcher:
            scene.run_stage(1)
            await scene.stage.reached(0)
            dispatcher.send(msg.UnloadStage(artifact=scene.digest))
            await dispatcher.quiet()
            scene.stage.gates[0].set()
            await dispatcher.take(msg.StageDone)
            scene.run_stage(2)
            assert (await dispatcher.take(msg.StageFailed)).code == "stage-not-resident"

    run(test)


def test_a_download_goes_on_in_the_next_session(scene, exported, tmp_path):
    big = tmp_path / "big"
    big.write_bytes(os.urandom(3 << 20))

    async def test():
        async with scene.open(load=False) as dispatcher:
            digest = dispatcher.files.add(big)
            dispatcher.answers_left = 3
            dispatcher.send(msg.LoadStage(artifact=digest, file_bytes=big.stat().st_size))
            await dispatcher.until(lambda: len(dispatcher.of(msg.Fetch)) == 5)  # two are not answered
            asked = dispatcher.of(msg.Fetch)
            part = scene.directory / "cache" / f"{digest}.part"
            dispatcher.send(msg.SayHello())
            await dispatcher.attached()
            dispatcher.got.clear()
            dispatcher.answers_left = 10**9
            dispatcher.send(msg.LoadStage(artifact=digest, file_bytes=big.stat().st_size))
            await dispatcher.take(msg.LoadFailed)  # whole, but no stage
            # The third answer may have come without having been written yet.
            assert dispatcher.of(msg.Fetch)[0].offset in (asked[2].offset, asked[3].offset)
            assert not part.exists() and (scene.directory / "cache" / f"{digest}.safetensors").exists()

    run(test)


# --- attempts that end otherwise -----------------------------------------------------------------------------------


def test_a_wrong_input_is_named_and_disturbs_nothing(scene):
    async def test():
        async with scene.open() as dispatcher:
            scene.run_stage(1, np.zeros((BATCH, 5), np.float32))
            failed = await dispatcher.take(msg.StageFailed)
            assert failed.code == "input-mismatch" and "expected float32 (batch, 4)" in failed.message
            scene.run_stage(2)
            await dispatcher.take(msg.StageDone)

    run(test)


def test_a_budget_that_is_spent_is_not_computed_for(scene):
    async def test():
        async with scene.open(gated=True) as dispatcher:
            scene.run_stage(1, budget_s=0.0)
            assert (await dispatcher.take(msg.StageFailed)).code == "deadline-exceeded"
            assert scene.stage.runs == 0

    run(test)


def test_more_than_the_credit_is_refused(scene):
    async def test():
        async with scene.open(gated=True, credit=2) as dispatcher:
            for sequence in (1, 2, 3):
                scene.run_stage(sequence)
            failed = await dispatcher.take(msg.StageFailed)
            assert (failed.attempt, failed.code) == (attempt(3), "overloaded")
            scene.stage.open()
            assert {(await dispatcher.take(msg.StageDone)).attempt for _ in range(2)} == {attempt(1), attempt(2)}

    run(test)


def test_cancelled_before_it_begins(scene):
    async def test():
        async with scene.open(gated=True) as dispatcher:
            scene.run_stage(1)
            await scene.stage.reached(0)
            scene.run_stage(2)
            dispatcher.send(msg.CancelStage(attempt=attempt(2)))
            assert (await dispatcher.take(msg.StageCancelled)).attempt == attempt(2)
            scene.run_stage(3)  # its slot is free
            scene.stage.open()
            assert [(await dispatcher.take(msg.StageDone)).attempt for _ in range(2)] == [attempt(1), attempt(3)]
            assert scene.stage.runs == 2

    run(test)


def test_cancelled_while_it_runs(scene):
    async def test():
        async with scene.open(gated=True) as dispatcher:
            scene.run_stage(1)
            await scene.stage.reached(0)
            dispatcher.send(msg.CancelStage(attempt=attempt(1)))
            await dispatcher.quiet()
            assert not dispatcher.of(*ANSWERS)  # it keeps its slot while it computes
            scene.stage.open()
            assert (await dispatcher.take(msg.StageCancelled)).attempt == attempt(1)
            await dispatcher.quiet()
            assert not dispatcher.of(msg.StageDone)

    run(test)


def test_cancelled_before_it_came(scene):
    async def test():
        async with scene.open(gated=True) as dispatcher:
            dispatcher.send(msg.CancelStage(attempt=attempt(1)))
            assert (await dispatcher.take(msg.StageCancelled)).attempt == attempt(1)
            scene.run_stage(1)
            await dispatcher.quiet()
            assert scene.stage.runs == 0 and not dispatcher.of(*ANSWERS)

    run(test)


def test_cancelled_after_it_was_done(scene):
    async def test():
        async with scene.open() as dispatcher:
            scene.run_stage(1)
            await dispatcher.take(msg.StageDone)
            dispatcher.send(msg.CancelStage(attempt=attempt(1)))
            await dispatcher.quiet()
            assert not dispatcher.of(*ANSWERS)

    run(test)


def test_an_order_that_comes_twice_runs_once(scene):
    async def test():
        async with scene.open(gated=True) as dispatcher:
            scene.run_stage(1)
            await scene.stage.reached(0)
            scene.run_stage(1)
            await dispatcher.quiet()
            scene.stage.gates[0].set()
            first = await dispatcher.take(msg.StageDone)
            scene.run_stage(1)
            again = await dispatcher.take(msg.StageDone)
            assert again == first and scene.stage.runs == 1
            np.testing.assert_array_equal(output(dispatcher, again), output(dispatcher, first))
            dispatcher.send(msg.StageAck(attempts=[attempt(1)]))
            scene.run_stage(1)  # forgotten: it is a new one
            await scene.stage.reached(1)

    run(test)


def test_malformed_frames_disturb_nothing(scene):
    async def test():
        async with scene.open() as dispatcher:
            socket = dispatcher.endpoint._watched.socket
            control, bulk = routing_ids("w1", scene.hello.incarnation)
            for frames in (
                [b""],
                [b"RSxxxxxxxx", b"\xc1"],
                [os.urandom(20)] * 4,
                [b"PI" + bytes(8), b"\x80", b"x" * 100],
            ):
                for routing_id in (control, bulk):
                    socket.send_multipart([routing_id, *frames])
            # What cannot be read may have been an order: the worker begins a new session, in which it would come again.
            await dispatcher.until(lambda: dispatcher.of(msg.Attach))
            await dispatcher.settled()
            scene.run_stage(1)
            await dispatcher.take(msg.StageDone)

    run(test)


# --- sessions ------------------------------------------------------------------------------------------------------


def test_a_new_dispatcher_of_this_reign_is_told_what_is_held_and_finished(scene):
    async def test():
        async with scene.open(gated=True) as dispatcher:
            for sequence in (1, 2):
                scene.run_stage(sequence)
            await scene.stage.reached(0)
            scene.stage.gates[0].set()
            first = await dispatcher.take(msg.StageDone)
            await scene.stage.reached(1)
            await scene.replace_dispatcher(term=1)
            dispatcher = scene.dispatcher
            hello = await dispatcher.attached()
            assert (hello.held, hello.finished, hello.resident) == ([attempt(2)], [attempt(1)], [scene.digest])
            assert hello.highest_term == 1 and hello.incarnation == scene.hello.incarnation
            again = await dispatcher.take(msg.StageDone)
            assert again.attempt == attempt(1) and again.output_digest == first.output_digest
            assert (await dispatcher.take(msg.Begun)).attempt == attempt(2)
            scene.stage.open()
            assert (await dispatcher.take(msg.StageDone)).attempt == attempt(2)
            dispatcher.send(msg.StageAck(attempts=[attempt(1)]))
            dispatcher.send(msg.SayHello())  # once more: what is acknowledged is not sent again, the rest is
            hello = await dispatcher.attached()
            assert (hello.held, hello.finished) == ([], [attempt(2)])
            assert (await dispatcher.take(msg.StageDone)).attempt == attempt(2)
            dispatcher.send(msg.StageAck(attempts=[attempt(2)]))
            dispatcher.send(msg.SayHello())
            assert (await dispatcher.attached()).finished == []
            await dispatcher.quiet()
            assert not dispatcher.of(msg.StageDone)
            assert len(scene.lines) == 1

    run(test)


def test_a_dispatcher_of_another_reign_never_gets_an_answer_of_an_earlier_one(scene):
    async def test():
        async with scene.open(gated=True) as dispatcher:
            for sequence in (1, 2):
                scene.run_stage(sequence)
            await scene.stage.reached(0)
            scene.stage.gates[0].set()
            await dispatcher.take(msg.StageDone)
            await scene.stage.reached(1)
            await scene.replace_dispatcher(term=2)
            dispatcher = scene.dispatcher
            hello = await dispatcher.attached()
            assert (hello.held, hello.finished) == ([attempt(2)], [attempt(1)])
            assert (await dispatcher.take(msg.StageCancelled)).attempt == attempt(1)
            scene.stage.open()
            assert (await dispatcher.take(msg.StageCancelled)).attempt == attempt(2)
            dispatcher.send(msg.StageAck(attempts=[attempt(1), attempt(2)]))
            scene.run_stage(1)  # the same number, perhaps for other work
            assert (await dispatcher.take(msg.StageDone)).attempt == attempt(1)

    run(test)


def test_a_refusal_ends_the_worker_with_its_reason(scene):
    async def test():
        async with scene.open() as dispatcher:
            dispatcher.send(msg.Refused(code="config", message="go away", fields={}))
            with pytest.raises(AdaptError, match="go away"):
                await asyncio.wait_for(asyncio.shield(scene.running), WAIT_S)

    run(test)


# --- drain ---------------------------------------------------------------------------------------------------------


def test_a_drain_hands_back_what_has_not_begun_and_finishes_what_has(scene):
    async def test():
        async with scene.open(gated=True) as dispatcher:
            for sequence in (1, 2):
                scene.run_stage(sequence)
            await scene.stage.reached(0)
            await dispatcher.quiet()
            scene.worker.drain()
            assert (await dispatcher.take(msg.Draining)).handed_back == [attempt(2)]
            scene.run_stage(3)  # it was on its way
            assert (await dispatcher.take(msg.Draining)).handed_back == [attempt(3)]
            scene.stage.open()
            assert (await dispatcher.take(msg.StageDone)).attempt == attempt(1)
            assert not scene.running.done() and not dispatcher.of(msg.Goodbye)
            dispatcher.send(msg.StageAck(attempts=[attempt(1)]))
            await dispatcher.take(msg.Goodbye)
            assert await asyncio.wait_for(asyncio.shield(scene.running), WAIT_S) == 0
            assert scene.stage.runs == 1

    run(test)


def test_a_drain_without_a_dispatcher_ends(scene):
    async def test():
        async with scene.open():
            await scene.replace_dispatcher(term=1, greets=False)
            await scene.dispatcher.take(msg.WorkerHello)
            scene.worker.drain()
            assert await asyncio.wait_for(asyncio.shield(scene.running), WAIT_S) == 0

    run(test)


def test_a_drain_whose_answer_nobody_takes_ends_by_its_timeout(scene):
    async def test():
        async with scene.open(gated=True, drain_timeout_s=0.2) as dispatcher:
            scene.run_stage(1)
            await scene.stage.reached(0)
            scene.stage.open()
            await dispatcher.take(msg.StageDone)
            scene.worker.drain()
            assert await asyncio.wait_for(asyncio.shield(scene.running), WAIT_S) == 0

    run(test)


# --- profiles ------------------------------------------------------------------------------------------------------


def profile_order(scene, **changes):
    return msg.ProfileProgram(**({"program": scene.digest, "file_bytes": scene.file_bytes, "repetitions": 3} | changes))


def test_a_program_is_fetched_measured_and_forgotten(scene):
    async def test():
        async with scene.open(load=False) as dispatcher:
            dispatcher.send(profile_order(scene))
            profiled = await dispatcher.take(msg.ProgramProfiled)
            assert profiled.program == scene.digest and len(profiled.costs_s) == 3
            assert all(cost is not None and 0 < cost < 10 for cost in profiled.costs_s)
            assert [codec.name for codec in profiled.codecs][:1] == ["lz4"]
            assert all(ratio >= 0.99 for codec in profiled.codecs for ratio in codec.ratios)
            assert sum(fetch.length for fetch in dispatcher.of(msg.Fetch)) == scene.file_bytes
            assert not list((scene.directory / "cache").glob(f"{scene.digest}*"))
            assert not dispatcher.of(msg.ProfileFailed)

    run(test)


def test_tasks_go_first_and_the_profile_waits(scene):
    """While a task computes nothing is measured; when it is done the profile goes on."""

    async def test():
        async with scene.open(gated=True) as dispatcher:
            scene.run_stage(1)
            await scene.stage.reached(0)
            dispatcher.send(profile_order(scene))
            scene.run_stage(2)
            await dispatcher.quiet()
            assert not dispatcher.of(msg.ProgramProfiled)
            scene.stage.gates[0].set()
            assert (await dispatcher.take(msg.StageDone)).attempt == attempt(1)
            await scene.stage.reached(1)
            assert not dispatcher.of(msg.ProgramProfiled)
            scene.stage.open()
            assert (await dispatcher.take(msg.StageDone)).attempt == attempt(2)
            await dispatcher.take(msg.ProgramProfiled)

    run(test)


def test_a_profile_is_refused_with_its_reason(scene, exported, tmp_path):
    async def test():
        async with scene.open(load=False, memory_limit_bytes=100) as dispatcher:
            dispatcher.send(profile_order(scene))
            failed = await dispatcher.take(msg.ProfileFailed)
            assert failed.code == "plan" and "no room to profile" in failed.message
            dispatcher.send(profile_order(scene, program="0" * 64))
            failed = await dispatcher.take(msg.ProfileFailed)
            assert failed.code == "plan" and "does not have it" in failed.message

    run(test)


def test_a_cancelled_profile_is_not_told_and_can_be_asked_for_again(scene):
    async def test():
        async with scene.open(gated=True) as dispatcher:
            scene.run_stage(1)
            await scene.stage.reached(0)
            dispatcher.send(profile_order(scene))
            dispatcher.send(profile_order(scene, program="0" * 64))
            assert "another" in (await dispatcher.take(msg.ProfileFailed)).message
            dispatcher.send(msg.CancelProfile(program=scene.digest))
            scene.stage.open()
            await dispatcher.take(msg.StageDone)
            await dispatcher.quiet()
            assert not dispatcher.of(msg.ProgramProfiled, msg.ProfileFailed)
            dispatcher.send(profile_order(scene))
            await dispatcher.take(msg.ProgramProfiled)

    run(test)


def test_a_profile_gives_way_to_a_stage_that_needs_its_room(scene, monkeypatch):
    """The profiler is one that never ends and holds nearly all there is."""

    class Endless:
        costs_s, held_bytes, share = [], 1 << 29, 0.5

        def step(self):
            return True

    async def test():
        async with scene.open(load=False) as dispatcher:
            monkeypatch.setattr(scene.worker._measuring, "_open_profiler", lambda path, repetitions: Endless())
            dispatcher.send(profile_order(scene))
            while (await dispatcher.take(msg.ProfileProgress)).step != "measuring":
                pass
            dispatcher.send(msg.LoadStage(artifact="0" * 64, file_bytes=700 << 20))
            failed = await dispatcher.take(msg.ProfileFailed)
            assert failed.program == scene.digest and failed.code == "overloaded"
            assert (await dispatcher.take(msg.LoadFailed)).artifact == "0" * 64

    run(test)


def test_a_worker_that_drains_does_not_profile(scene):
    async def test():
        async with scene.open(gated=True) as dispatcher:
            scene.run_stage(1)
            await scene.stage.reached(0)
            scene.worker.drain()
            await dispatcher.take(msg.Draining)
            dispatcher.send(profile_order(scene))
            assert "drains" in (await dispatcher.take(msg.ProfileFailed)).message

    run(test)


# --- links ---------------------------------------------------------------------------------------------------------


def test_a_probe_is_echoed_with_as_many_bytes_as_it_asks_for(scene):
    async def test():
        async with scene.open(load=False) as dispatcher:
            for number, (down, up) in enumerate([(0, 0), (16 << 10, 0), (256 << 10, 0), (0, 256 << 10)]):
                dispatcher.send(msg.LinkProbe(number=number, answer_bytes=up), Blob.of(bytes(down)))
                echo = await dispatcher.take(msg.LinkEcho)
                assert echo.number == number and dispatcher.blobs[id(echo)][0].size == up

    run(test)
