"""What kernels take besides: of real ones, of blocks whose sizes are known, and where torch cannot tell."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from adapt.errors import ModelError
from adapt.models import workspace
from adapt.models.profiler import single_thread
from adapt.models.workspace import measured_workspace, scratch_bytes

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
KIB = 1 << 10


def taken(kernel, *inputs):
    """By a kernel whose result stays, at one thread."""
    kept = []
    with torch.inference_mode(), single_thread():
        taken_bytes = measured_workspace(lambda: kept.append(kernel(*inputs)), CPU)
    assert len(kept) == 1, "it is done once, whatever can be told"
    return taken_bytes


def block(kib: int) -> torch.Tensor:
    return torch.empty(kib * KIB, dtype=torch.uint8)


# ── kernels ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_convolution_takes_copies_of_what_it_is_given_and_makes():
    x, weight = torch.randn(1, 64, 56, 56), torch.randn(64, 64, 3, 3)
    copies = 9 * x.nbytes + x.nbytes + weight.nbytes  # each window of the input laid out, the result, the weights
    assert x.nbytes // 4 <= taken(lambda: functional.conv2d(x, weight, padding=1)) <= copies


def test_what_is_computed_in_place_of_its_result_takes_nothing():
    x = torch.randn(1, 64, 56, 56)
    assert taken(torch.relu, x) == taken(torch.add, x, x) == taken(torch.relu_, x.clone()) == 0


def test_of_results_only_what_stays_is_none():
    """As of a maximum whose places nobody wants."""
    x = torch.randn(1, 64, 56, 56)
    assert taken(lambda: torch.max(x, dim=-1)) == 0
    assert taken(lambda: torch.max(x, dim=-1).values) == 64 * 56 * 8


# ── blocks ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 64), st.booleans()), max_size=8))
def test_it_is_the_peak_above_what_stays(blocks):
    """Blocks of so many KiB, taken one after the other; when all are there, those that do not stay go."""

    def kernel():
        held = [block(kib) for kib, _ in blocks]
        return [one for one, (_, stays) in zip(held, blocks, strict=True) if stays]

    assert taken(kernel) == KIB * sum(kib for kib, stays in blocks if not stays)


@given(st.lists(st.integers(-1000, 1000)))
def test_it_is_never_negative_and_no_more_than_all_that_was_taken(steps):
    found = scratch_bytes(steps)
    levels = [sum(steps[:end]) for end in range(len(steps) + 1)]
    assert found == max(levels) - levels[-1]
    assert 0 <= found <= sum(-step for step in steps if step < 0)


def test_only_this_thread_is_looked_at():
    def kernel():
        thread = threading.Thread(target=lambda: block(4096))
        thread.start()
        thread.join()

    assert taken(kernel) == 0


def test_blocks_that_one_after_the_other_are_taken_and_freed_do_not_add_up():
    assert taken(lambda: [block(kib).nbytes for kib in (8, 64, 16)]) == 64 * KIB


# ── where torch cannot tell ──────────────────────────────────────────────────────────────────────────────────────────


class Broken:
    """A profiler that fails at its beginning, at its end, or in what it has seen."""

    def __init__(self, at: str) -> None:
        self._at = at
        self.kineto_results = SimpleNamespace(events=lambda: self._fail("events") or [])

    def _fail(self, place: str) -> None:
        if place == self._at:
            raise RuntimeError("somebody else is profiling")

    def __enter__(self):
        self._fail("enter")
        return self

    def __exit__(self, *_):
        self._fail("exit")


@pytest.mark.parametrize("at", ["enter", "exit", "events"])
def test_a_profiler_that_fails_tells_nothing(monkeypatch, at):
    monkeypatch.setattr(workspace, "profile", lambda **_: Broken(at))
    assert taken(torch.relu, torch.ones(4)) is None
    monkeypatch.setattr(workspace, "profile", lambda **_: Broken("nowhere"))
    assert taken(torch.relu, torch.ones(4)) == 0, "the same one, whole"


def test_a_build_without_kineto_tells_nothing(monkeypatch):
    monkeypatch.setattr(torch.autograd, "kineto_available", lambda: False)
    assert taken(torch.relu, torch.ones(4)) is None


def test_blocks_count_in_the_order_of_time(monkeypatch):
    told = [("[memory]", 3, -50), ("[memory]", 1, 50), ("aten::relu", 2, -1000), ("[memory]", 2, 7)]
    events = [SimpleNamespace(name=lambda n=n: n, start_ns=lambda s=s: s, nbytes=lambda b=b: b) for n, s, b in told]
    profiler = Broken("nowhere")
    profiler.kineto_results = SimpleNamespace(events=lambda: events)
    monkeypatch.setattr(workspace, "profile", lambda **_: profiler)
    assert taken(torch.relu, torch.ones(4)) == 50


def test_an_operator_that_fails_does_so_and_the_next_one_is_measured():
    def fail():
        raise ModelError("no")

    with pytest.raises(ModelError, match="no"):
        measured_workspace(fail, CPU)
    assert not torch._C._autograd._profiler_enabled()
    assert taken(lambda: block(3).nbytes) == 3 * KIB


def test_nothing_is_written_to_stderr(capfd):
    """Kineto has a line or two to say at each of its starts."""
    assert taken(lambda: block(3).nbytes) == 3 * KIB
    assert capfd.readouterr() == ("", "")


def test_on_cuda_it_is_what_the_allocator_says(monkeypatch):
    """There may be none here: the peak is forgotten before, and asked for afterwards."""
    done = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: done.append(device))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 700 + 200 * len(done[1:]))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 700)
    assert measured_workspace(lambda: done.append("work"), CUDA) == 200 and done == [CUDA, "work"]
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: 1 // 0)
    assert measured_workspace(lambda: done.append("more"), CUDA) is None and done == [CUDA, "work", "more"]
