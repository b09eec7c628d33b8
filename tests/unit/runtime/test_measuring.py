"""A worker's profiles: whatever a program does to who measures it, the worker says so and lives on."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch

from adapt.errors import AdaptError
from adapt.models.export import export_module
from adapt.planning.model import CodecProfile, Handling
from adapt.protocol import messages as msg
from adapt.protocol.ids import Digest
from adapt.runtime.artifacts import ArtifactStore
from adapt.runtime.measuring import Measuring


def slices(error: Exception | None) -> SimpleNamespace:
    done: Future[None] = Future()
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)
    return SimpleNamespace(done=done, cancel=done.cancel)


def raising(error: Exception):
    def raise_it(*_):
        raise error

    return raise_it


def measured(**told) -> SimpleNamespace:
    """A profiler at its end."""
    plain = {"costs_s": [0.1], "workspace_bytes": [None], "codecs": (), "held_bytes": 0, "share": 0.0}
    return SimpleNamespace(**plain | told, step=lambda: False)


def said_of(store, program, *, open_profiler, error=None, **options):
    """What a worker says of a program, whose background task must come to its end."""

    async def measure():
        said = []
        measuring = Measuring(
            store,
            open_profiler=open_profiler,
            begin=lambda step: slices(step if isinstance(step, Exception) else error),
            send=lambda message: said.append(message) or True,
            spawn=lambda work, name: asyncio.get_running_loop().create_task(work, name=name),
            **options,
        )
        measuring.measure(msg.ProfileProgram(program=program.digest, file_bytes=program.path.stat().st_size, repetitions=3))
        await measuring._task
        return said

    return asyncio.run(measure())


@pytest.fixture
def store(tmp_path):
    return ArtifactStore(tmp_path)


@pytest.fixture
def program(store):
    return export_module(torch.nn.Linear(4, 4).eval(), [torch.zeros(2, 4)], directory=store.directory, profile_repetitions=0)


@pytest.mark.parametrize(
    "error", [ValueError("max() arg is an empty sequence"), OverflowError("int too large"), OSError("gone"), KeyError(3)]
)
def test_a_program_that_cannot_be_opened_is_refused_and_the_worker_lives(store, program, error):
    """Regression: what is neither ours nor the system's ended the worker process, one worker after the other."""
    (failed,) = said_of(store, program, open_profiler=raising(error))
    assert isinstance(failed, msg.ProfileFailed) and failed.code == "plan" and failed.program == Digest(program.digest)
    assert failed.message.startswith("the program cannot be ") and type(error).__name__ in failed.message


def test_so_is_one_that_fails_while_it_is_measured(store, program):
    profiler = measured()
    (failed,) = said_of(store, program, open_profiler=lambda *_: profiler, error=MemoryError("no more"))
    assert isinstance(failed, msg.ProfileFailed) and "cannot be profiled: MemoryError: no more" in failed.message
    (told,) = said_of(store, program, open_profiler=lambda *_: profiler)
    assert told == msg.ProgramProfiled(program=program.digest, costs_s=[0.1], workspace_bytes=[None])


def test_what_a_task_takes_besides_is_told_with_a_profile(store, program):
    profiler = measured()
    meter = SimpleNamespace(handling=Handling(0.001, 1e-9), step=lambda: False)
    (told,) = said_of(store, program, open_profiler=lambda *_: profiler, open_meter=lambda: meter)
    assert told == msg.ProgramProfiled(program=program.digest, costs_s=[0.1], workspace_bytes=[None], task_s=0.001, byte_s=1e-9)


def test_so_is_what_codecs_make_of_what_crosses(store, program):
    lz4 = CodecProfile(name="lz4", ratio=1.5, encode_bytes_per_s=1e9, decode_bytes_per_s=2e9, ratios=(1.0, 2.0))
    profiler = measured(codecs=(lz4,))
    (told,) = said_of(store, program, open_profiler=lambda *_: profiler)
    codec = msg.CodecMeasured(name="lz4", ratio=1.5, ratios=[1.0, 2.0], encode_bytes_per_s=1e9, decode_bytes_per_s=2e9)
    assert told == msg.ProgramProfiled(program=program.digest, costs_s=[0.1], workspace_bytes=[None], codecs=[codec])


def test_and_what_kernels_take_besides_if_that_is_known_of_any(store, program):
    (told,) = said_of(store, program, open_profiler=lambda *_: measured(costs_s=[0.1, 0.2], workspace_bytes=[None, 7]))
    assert told == msg.ProgramProfiled(program=program.digest, costs_s=[0.1, 0.2], workspace_bytes=[None, 7])
    (told,) = said_of(store, program, open_profiler=lambda *_: measured(costs_s=[0.1, 0.2], workspace_bytes=[None, None]))
    assert told == msg.ProgramProfiled(program=program.digest, costs_s=[0.1, 0.2], workspace_bytes=[None, None])


def test_a_profile_without_it_is_still_one(store, program):
    profiler = measured()
    meter = SimpleNamespace(step=AdaptError("this machine does not talk to itself"))
    (told,) = said_of(store, program, open_profiler=lambda *_: profiler, open_meter=lambda: meter)
    assert told == msg.ProgramProfiled(program=program.digest, costs_s=[0.1], workspace_bytes=[None], task_s=None, byte_s=None)
