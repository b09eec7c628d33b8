"""Profiles of real programs: windows within the room that there is, and runs that pause."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from adapt.errors import ConfigError, PlanError
from adapt.models import interpreter, workspace
from adapt.models import profiler as models_profiler
from adapt.models.cut import legal_cuts, window
from adapt.models.interpreter import Stage
from adapt.models.layers import completed, layer_costs_s, profile_model
from adapt.models.profiler import LEAST_RUNS, Profiler, example_inputs


@pytest.fixture(scope="module")
def wide(make_case):
    """Six layers of 256 KiB of weights, one of them eight times as heavy."""
    torch.manual_seed(0)
    parts = [nn.Linear(256, 256, bias=False) for _ in range(6)]
    parts[3:4] = [nn.Linear(256, 2048, bias=False), nn.Linear(2048, 256, bias=False)]
    return make_case(nn.Sequential(*parts).eval(), torch.randn(1, 256), repetitions=0)


def measured(program, room_bytes: int):
    """The profiler at its end, and the windows it held."""
    profiler = Profiler(program, repetitions=LEAST_RUNS, room_bytes=lambda: room_bytes)
    held = {0}
    while profiler.step():
        held.add(profiler.held_bytes)
    assert profiler.share == 1.0 and profiler.held_bytes == 0
    return profiler, held


def test_all_operators_are_measured_whatever_the_windows(branches):
    operators = len(branches.program.graph.operators)
    layers = profile_model("", branches.program, [0.0] * operators)
    least = max(layers.memory_bytes(number, number + 1) for number in range(len(layers.layers)))
    for room in (1 << 30, least):
        profiler, held = measured(branches.program, room)
        assert max(held) <= room
        assert all(cost is not None and cost >= 0 for cost in profiler.costs_s)
        assert sum(profiler.costs_s) > 0


def test_share_grows_with_every_operator(wide, monkeypatch):
    """Regression: it grew once in a run of a whole window, and a slow device was taken to be stuck."""
    monkeypatch.setattr(models_profiler, "SLICE_S", 0.0)
    profiler, shares = Profiler(wide.program, repetitions=LEAST_RUNS), [0.0]
    while profiler.step():
        shares.append(profiler.share)
    steps = [after - before for before, after in pairwise(shares[1:])]  # after the first pause the weights are there, and no more
    assert len(steps) == (LEAST_RUNS + 1) * 7 and steps == pytest.approx([1 / len(steps)] * len(steps)) and profiler.share == 1.0


def test_timed_runs_are_not_watched(wide, monkeypatch):
    """Regression: the check of what operators need was measured with them; it takes as long as a small one."""
    watched = []
    monkeypatch.setattr(interpreter, "check_call", lambda call, name, *_: watched.append(name))
    measured(wide.program, 1 << 30)
    assert len(watched) == 7, "those of the run to warm up"


def test_pauses_of_a_quota_are_shared_by_all_operators(wide, monkeypatch):
    """2 ms of every 10: a pause falls into one run or the next, and into any operator; medians of the clock would miss most of them."""
    cpu_s = clock_s = 0.0
    step = interpreter.Stage.step

    def throttled(self, run, position):
        nonlocal cpu_s, clock_s
        step(self, run, position)
        pauses_before = int(cpu_s / 0.002)
        cpu_s += 0.0003 * (position + 1)
        clock_s += 0.0003 * (position + 1) + 0.008 * (int(cpu_s / 0.002) - pauses_before)

    monkeypatch.setattr(interpreter.Stage, "step", throttled)
    monkeypatch.setattr(models_profiler, "perf_counter", lambda: clock_s)
    monkeypatch.setattr(models_profiler, "thread_time", lambda: cpu_s)
    profiler = Profiler(wide.program, repetitions=3, cores=0.2)
    while profiler.step():
        pass
    assert profiler.costs_s == pytest.approx([0.0015 * (place + 1) for place in range(7)])


def test_a_layer_without_room_is_left_out_and_the_rest_is_measured(wide):
    profiler, held = measured(wide.program, 600 << 10)
    assert max(held) <= 600 << 10
    assert [cost is None for cost in profiler.costs_s] == [False] * 3 + [True] * 2 + [False] * 2
    whole = completed(profiler.costs_s, [1.0, 1.0, 1.0, 8.0, 8.0, 1.0, 1.0])
    mean = sum(cost for cost in profiler.costs_s if cost is not None) / 5
    assert whole[3] == whole[4] == pytest.approx(8 * mean)


def test_without_room_for_any_layer_it_says_what_the_smallest_needs(wide):
    profiler = Profiler(wide.program, room_bytes=lambda: 1000)
    with pytest.raises(PlanError, match=r"no room to profile any of 7 layers: the smallest, 0, needs 0\.3 MiB"):
        while profiler.step():
            pass


class Scratch(nn.Module):
    """Three operators that make what they are given anew, and one whose kernel has to lay windows of it out."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x):
        return self.kernel(x.relu().exp().neg())


@pytest.fixture(scope="module")
def scratch(make_case):
    torch.manual_seed(0)
    return make_case(Scratch().eval(), torch.randn(2, 16, 32, 32), repetitions=0)


def test_the_workspace_of_each_operator_is_known_and_no_input_is_part_of_it(scratch):
    """The first three have nothing but a result, and free what the one before has made."""
    item_bytes = 4 * 16 * 32 * 32
    profiler, _ = measured(scratch.program, 1 << 30)
    *plain, convolution = profiler.workspace_bytes
    assert plain == [0, 0, 0] and 0 < convolution <= 10 * item_bytes + scratch.program.graph.weight_bytes


def test_workspace_is_measured_once_whatever_the_windows(branches, monkeypatch):
    measured_of: list[int] = []
    real = models_profiler.measured_workspace

    def counted(work, device):
        measured_of.append(1)
        return real(work, device)

    monkeypatch.setattr(models_profiler, "measured_workspace", counted)
    whole, _ = measured(branches.program, 1 << 30)
    assert len(measured_of) == len(whole.workspace_bytes) and None not in whole.workspace_bytes
    layers = profile_model("", branches.program, [0.0] * len(whole.costs_s))
    cut, _ = measured(branches.program, max(layers.memory_bytes(number, number + 1) for number in range(len(layers.layers))))
    assert cut.workspace_bytes == whole.workspace_bytes


def test_of_a_layer_without_room_no_workspace_is_known(wide):
    profiler, _ = measured(wide.program, 600 << 10)
    assert [taken is None for taken in profiler.workspace_bytes] == [cost is None for cost in profiler.costs_s]


def test_where_nobody_can_tell_the_workspace_there_is_still_a_profile(scratch, monkeypatch):
    def broken(**_):
        raise RuntimeError("no such build")

    monkeypatch.setattr(workspace, "profile", broken)
    profiler, _ = measured(scratch.program, 1 << 30)
    assert profiler.workspace_bytes == [None] * 4 and all(cost is not None for cost in profiler.costs_s)


def test_windows_compute_what_the_program_computes(branches):
    """Each window on what the one before has computed, cut at every third place."""
    program = branches.program
    cuts = [None, *legal_cuts(program)[1::3], None]
    values = inputs = example_inputs(program.graph.input_specs, 1)
    seen: list[int] = []
    for begin, end in pairwise(cuts):
        piece = window(program, begin, end)
        stage = Stage.of(piece.graph, program.path, device="cpu", digest=program.digest)
        assert len(piece.positions) == len(stage)
        first, last = begin.position if begin else 0, end.position if end else len(program.graph.operators)
        assert all(position < last for position in piece.positions)
        seen += [position for position in piece.positions if position >= first]
        with torch.inference_mode():
            run = stage.begin(values)
            for position in range(len(stage)):
                stage.step(run, position)
            values = stage.finish(run)
    expected = Stage.load(program.path).run(inputs)
    assert all(
        torch.equal(ours, theirs) if isinstance(theirs, torch.Tensor) else ours == theirs
        for ours, theirs in zip(values, expected, strict=True)
    )
    assert len(seen) == len(set(seen))


def test_a_program_without_operators_is_refused_by_name(make_case):
    nothing = make_case(nn.Identity(), torch.randn(1, 4), repetitions=0)
    assert not nothing.program.graph.operators
    with pytest.raises(ConfigError, match="the program has no operators"):
        Profiler(nothing.program)


def test_seconds_of_layers_are_those_of_their_operators(wide):
    model = profile_model("", wide.program, [1.0] * 7)
    assert layer_costs_s(model, [1, 2, 3, 4, 5, 6, 7]) == (1, 2, 3, 4, 5, 6, 7)
    assert completed([None] * 2, [1.0, 2.0]) == (1.0, 2.0)
