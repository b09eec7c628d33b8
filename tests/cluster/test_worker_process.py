"""Workers in processes of their own: signals and memory."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from adapt.models.cut import legal_cuts, write_stages
from adapt.models.export import export_module
from adapt.models.program import read_program
from adapt.models.sources import build_named_model
from adapt.planning.partition import partition
from adapt.protocol import codecs
from adapt.protocol import messages as msg
from adapt.protocol.wire import Blob
from tests.cluster.scripted import WAIT_S, Scene, ScriptedDispatcher, attempt, export_net, run

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    files = tmp_path_factory.mktemp("files")
    return *export_net(files), files


@pytest.fixture
def scene(tmp_path, exported):
    _, program, files = exported
    return Scene(tmp_path, program.digest, program.file_bytes, files)


WORKER_PROCESS = """
import asyncio, sys
from pathlib import Path
from adapt.config import WorkerConfig
from adapt.interfaces.cli.worker import begin_anew
from adapt.runtime.worker import Worker

class FifoStage:  # runs until somebody has written into the fifo
    def run(self, inputs):
        with open(sys.argv[3], "rb") as fifo:
            fifo.read()
        return inputs

config = WorkerConfig(
    dispatcher=sys.argv[1], name="w1", device="cpu", memory_limit_bytes=1 << 30, cache_dir=Path(sys.argv[2]), hang_timeout_s=0.4
)
load_stage = (lambda path: FifoStage()) if sys.argv[3] else None
sys.exit(asyncio.run(Worker(config, load_stage=load_stage, on_hang=begin_anew).run()))
"""


@contextlib.asynccontextmanager
async def worker_process(directory: Path, files: Path, *, fifo: str = ""):
    """A real process in session. With `fifo`, its stages run until somebody writes there."""
    dispatcher = ScriptedDispatcher(files=files)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-c", WORKER_PROCESS, dispatcher.address, str(directory / "cache"), fifo),
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    try:
        async with asyncio.timeout(60):
            line = await process.stdout.readline()
        assert line.startswith(b"adapt-worker ready name=w1 ") and f"pid={process.pid}".encode() in line
        await dispatcher.attached()
        yield process, dispatcher
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        dispatcher.close()


@contextlib.asynccontextmanager
async def gated_process(scene):
    """A real process whose stage runs until the test writes into a fifo."""
    fifo = scene.directory / "fifo"
    os.mkfifo(fifo)
    async with worker_process(scene.directory, scene.files, fifo=str(fifo)) as (process, dispatcher):
        scene.dispatcher = dispatcher
        dispatcher.send(msg.LoadStage(artifact=scene.digest, file_bytes=scene.file_bytes))
        await dispatcher.take(msg.StageLoaded)
        yield process, dispatcher


def test_sigterm_drains_a_real_process(scene):
    async def test():
        async with gated_process(scene) as (process, dispatcher):
            for sequence in (1, 2):
                scene.run_stage(sequence)
            await dispatcher.take(msg.Begun)
            await dispatcher.quiet()
            process.send_signal(signal.SIGTERM)
            assert (await dispatcher.take(msg.Draining)).handed_back == [attempt(2)]
            (scene.directory / "fifo").write_bytes(b"go on")
            assert (await dispatcher.take(msg.StageDone)).attempt == attempt(1)
            dispatcher.send(msg.StageAck(attempts=[attempt(1)]))
            await dispatcher.take(msg.Goodbye)
            assert await asyncio.wait_for(process.wait(), WAIT_S) == 0

    run(test)


def test_a_process_whose_stage_hangs_begins_anew(scene):
    async def test():
        async with gated_process(scene) as (process, dispatcher):
            scene.run_stage(1, budget_s=3600.0)
            await dispatcher.take(msg.Begun)
            await dispatcher.quiet()
            assert not dispatcher.of(msg.WorkerHello), "somebody waits for it: it may take as long as it likes"
            dispatcher.send(msg.CancelStage(attempt=attempt(1)))
            hello = await dispatcher.attached()
            assert hello.held == hello.finished == hello.resident == []
            dispatcher.send(msg.LoadStage(artifact=scene.digest, file_bytes=scene.file_bytes))
            await dispatcher.take(msg.StageLoaded)
            assert process.returncode is None, "it is the same process"
            process.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(process.wait(), WAIT_S) == 0

    run(test)


def test_one_whose_budget_is_spent_hangs_too(scene):
    async def test():
        async with gated_process(scene) as (_, dispatcher):
            scene.run_stage(1, budget_s=0.2)
            await dispatcher.take(msg.Begun)
            assert (await dispatcher.attached()).held == []

    run(test)


def test_one_that_drains_does_not_begin_anew(scene):
    async def test():
        async with gated_process(scene) as (process, dispatcher):
            scene.run_stage(1)
            await dispatcher.take(msg.Begun)
            process.send_signal(signal.SIGTERM)
            await dispatcher.take(msg.Draining)
            dispatcher.send(msg.CancelStage(attempt=attempt(1)))
            for _ in range(30):  # three times as long as a hanging one would be left
                await dispatcher.take(msg.Heartbeat)
            assert not dispatcher.of(msg.WorkerHello)

    run(test)


def test_a_second_sigint_stops_a_real_process_at_once(scene):
    async def test():
        async with gated_process(scene) as (process, dispatcher):
            scene.run_stage(1)
            await dispatcher.take(msg.Begun)
            process.send_signal(signal.SIGINT)
            await dispatcher.take(msg.Draining)
            process.send_signal(signal.SIGINT)
            assert await asyncio.wait_for(process.wait(), WAIT_S) == 130

    run(test)


@pytest.fixture(scope="module")
def quarters(tmp_path_factory):
    """ResNet-50 in four stages of about equal cost."""
    directory = tmp_path_factory.mktemp("resnet50")
    named = build_named_model("torchvision/resnet50", seed=0)
    exported = export_module(named.module, [named.example_input], directory=directory, profile_repetitions=1)
    program = read_program(exported.path)
    return write_stages(program, partition(exported.operator_costs_s, legal_cuts(program), 4), directory)


def anonymous_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) << 10


def mapped_files(pid: int) -> set[str]:
    maps = Path(f"/proc/{pid}/maps").read_text()
    return {line.split()[-1] for line in maps.splitlines() if line.endswith(".safetensors")}


@pytest.mark.parametrize("quarter", range(4))
def test_a_worker_holds_its_stage_in_the_mapped_file_and_little_else(tmp_path, quarters, quarter):
    stage = quarters[quarter]

    async def test():
        async with worker_process(tmp_path, stage.path.parent) as (process, dispatcher):
            floor = anonymous_bytes(process.pid)
            dispatcher.send(msg.LoadStage(artifact=stage.digest, file_bytes=stage.file_bytes))
            await dispatcher.take(msg.StageLoaded)
            generator = np.random.default_rng(0)
            arrays = [generator.standard_normal(spec.shape_at(1), dtype=np.float32) for spec in stage.inputs]
            encoded = [codecs.encode(array) for array in arrays]
            blobs = [Blob.of(payload) for _, payload in encoded]
            for sequence in range(20):  # two in flight, as with the default credit
                leaves = [header for header, _ in encoded]
                order = msg.RunStage(
                    attempt=attempt(sequence),
                    artifact=stage.digest,
                    budget_s=60.0,
                    codec="raw",
                    tolerance=None,
                    leaves=leaves,
                )
                dispatcher.send(order, *blobs)
                if sequence:
                    done = await dispatcher.take(msg.StageDone)
                    dispatcher.send(msg.StageAck(attempts=[done.attempt]))
            await dispatcher.take(msg.StageDone)
            peak = anonymous_bytes(process.pid) - floor
            assert peak <= 80 << 20
            dispatcher.got[:] = [message for message in dispatcher.got if not isinstance(message, msg.Heartbeat)]
            for _ in range(400):  # at times it gives back what it has gathered
                await dispatcher.take(msg.Heartbeat)
                rest = anonymous_bytes(process.pid) - floor
                if rest <= 30 << 20:
                    break
            assert rest <= 30 << 20, (peak, rest)
            assert mapped_files(process.pid) == {str(tmp_path / "cache" / f"{stage.digest}.safetensors")}

    run(test)
