"""What codecs make of what crosses: on made tensors, and while real programs are profiled."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from adapt.errors import InputMismatchError
from adapt.models import compressing
from adapt.models import profiler as models_profiler
from adapt.models.compressing import SAMPLE_BYTES, Compressing, sampled
from adapt.models.cut import legal_cuts, write_stages
from adapt.models.export import export_module
from adapt.models.interpreter import Stage
from adapt.models.layers import profile_model
from adapt.models.profiler import LEAST_RUNS, Profiler, example_inputs
from adapt.models.program import read_program
from adapt.protocol.codecs import encode


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def smooth(*shape: int) -> torch.Tensor:
    """As neighbours in an image are: alike."""
    return noise(*shape).cumsum(-1)


def ratio_of(tensor: torch.Tensor, codec: str, tolerance: float | None = None) -> float:
    _, payload = encode(tensor.contiguous().numpy(), codec=codec, tolerance=tolerance)
    return tensor.nbytes / len(payload)


def ratio_of_all(leaves) -> float:
    """Of lz4; plain numbers count as eight bytes."""
    sizes = [(leaf.nbytes, ratio_of(leaf, "lz4")) if isinstance(leaf, torch.Tensor) else (8, 1.0) for leaf in leaves]
    return sum(size for size, _ in sizes) / sum(size / ratio for size, ratio in sizes)


def tried(*boundaries, count: int | None = None):
    """The profiles by name, after each of these boundaries."""
    compressing_ = Compressing(count or len(boundaries))
    for number, crossing in enumerate(boundaries):
        compressing_.take(number, crossing)
    return {profile.name: profile for profile in compressing_.profiles()}


# ── tensors ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_zeros_of_a_relu_get_smaller_and_noise_does_not():
    found = tried({0: noise(1, 16, 28, 28)}, {1: (noise(1, 16, 28, 28) - 1.5).relu()})
    assert found["lz4"].ratios[0] == pytest.approx(1.0, abs=0.02) and found["lz4"].ratios[1] > 2.0
    assert found["lz4"].ratios[1] == pytest.approx(ratio_of((noise(1, 16, 28, 28) - 1.5).relu(), "lz4"), rel=1e-3)
    assert found["zfp"].ratios[0] == pytest.approx(ratio_of(noise(1, 16, 28, 28), "zfp", 0.1), rel=1e-3) and found["zfp"].ratios[0] > 2.0
    for profile in found.values():
        assert min(profile.ratios) < profile.ratio < max(profile.ratios)
        assert 1e5 < profile.encode_bytes_per_s < 1e12 and 1e5 < profile.decode_bytes_per_s < 1e12


def test_what_crosses_together_counts_together():
    """A tensor of noise beside one of zeros three times as large, and a number, which nobody compresses."""
    alone, both = tried({0: noise(1, 1000)}, {1: torch.zeros(1, 3000)}), tried({0: noise(1, 1000), 1: torch.zeros(1, 3000), 2: 7})
    first, second = (4000 / alone["lz4"].ratios[0], 12000 / alone["lz4"].ratios[1])
    assert both["lz4"].ratios[0] == pytest.approx((16000 + 8) / (first + second + 8), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.bfloat16, torch.float16])
def test_zfp_is_not_told_of_where_it_carries_nothing(dtype):
    found = tried({0: torch.ones(1, 4096).to(dtype)})
    assert list(found) == ["lz4"] and found["lz4"].ratios[0] > 50


def test_zfp_leaves_what_it_cannot_carry_to_lz4():
    found = tried({0: torch.zeros(1, 4096, dtype=torch.int64)}, {1: smooth(1, 4096)}, {2: torch.full((1, 4096), torch.nan)})
    assert found["zfp"].ratios[0] == found["lz4"].ratios[0] > 100 and found["zfp"].ratios[2] == found["lz4"].ratios[2]
    assert found["zfp"].ratios[1] > 2 > found["lz4"].ratios[1]


def test_a_boundary_that_was_not_taken_has_the_ratio_of_all_others():
    found = tried({0: torch.zeros(1, 1000)}, {1: noise(1, 3000)}, count=4)["lz4"]
    assert found.ratios[2] == found.ratios[3] == found.ratio == pytest.approx(16000 / (4000 / found.ratios[0] + 12000), rel=1e-2)


def test_nothing_is_known_of_nothing():
    assert tried(count=3) == {} == tried({0: 7}, {1: torch.zeros(0, 4)})


def test_a_codec_that_fails_sends_it_as_it_is(monkeypatch):
    """Foreign code: for one tensor, in one direction, with an error of its own."""
    real = compressing.decode

    def decode(header, payload, *, limit_bytes):
        if header.codec == "zfp" and header.shape == (1, 1000):
            raise ValueError("no")
        return real(header, payload, limit_bytes=limit_bytes)

    monkeypatch.setattr(compressing, "decode", decode)
    found = tried({0: smooth(1, 1000)}, {1: smooth(1, 2000)})
    assert found["zfp"].ratios[0] == 1.0 < found["zfp"].ratios[1] and found["lz4"].ratios[0] > 0.99
    monkeypatch.setattr(compressing, "encode", lambda *_, **__: (_ for _ in ()).throw(InputMismatchError("never")))
    assert tried({0: smooth(1, 1000)}) == {}


def test_types_that_do_not_travel_count_as_they_are():
    assert tried({0: torch.zeros(1, 100, dtype=torch.complex64), 1: torch.zeros(1, 200)})["lz4"].ratios[0] == pytest.approx(1.98, rel=0.05)


@pytest.mark.parametrize(
    "shape", [(1, 64, 112, 112), (1, 512, 28, 28), (1, 2048, 7, 7), (3_000_000,), (1, 3_000_000), (2, 128, 50_257), (40_000, 3)]
)
def test_a_sample_of_a_large_tensor_is_small_and_like_the_whole(shape):
    whole = smooth(*shape)
    whole[..., : whole.shape[-1] // 2] = 0
    part = sampled(whole)
    assert part.ndim == min(whole.ndim, 2) or part is whole
    assert whole.nbytes > SAMPLE_BYTES / 2 and part.nbytes <= SAMPLE_BYTES
    for codec, tolerance in (("lz4", None), ("zfp", 0.1)):
        assert ratio_of(part, codec, tolerance) == pytest.approx(ratio_of(whole, codec, tolerance), rel=0.35)


def test_each_value_is_tried_once(monkeypatch):
    seen = []
    monkeypatch.setattr(compressing, "encode", lambda array, **given: seen.append(given["codec"]) or encode(array, **given))
    x, y = noise(1, 100), noise(1, 200)
    tried({0: x}, {0: x, 1: y}, {1: y})
    assert seen == ["lz4", "zfp"] * 2


# ── programs ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def profiled(program, room_bytes: int = 1 << 30):
    profiler = Profiler(program, repetitions=LEAST_RUNS, room_bytes=lambda: room_bytes)
    while profiler.step():
        pass
    return profiler, {profile.name: profile for profile in profiler.codecs}


class Permuting(torch.nn.Module):
    def forward(self, x):
        return torch.relu(x).cumsum(1).permute(0, 2, 1)


def test_an_output_is_told_of_as_it_leaves_and_not_as_it_would_cross_a_cut(tmp_path):
    program = read_program(export_module(Permuting().eval(), [torch.randn(2, 64, 64)], directory=tmp_path, profile_repetitions=0).path)
    (output,) = Stage.load(program.path).run(example_inputs(program.graph.input_specs, 1))
    assert ratio_of(output, "lz4") != pytest.approx(ratio_of(output.permute(0, 2, 1), "lz4"), rel=1e-3), "or this would show nothing"
    assert profiled(program)[1]["lz4"].ratios[-1] == pytest.approx(ratio_of(output, "lz4"), rel=1e-3)


def test_boundaries_have_the_ratios_of_what_stages_send(branches, tmp_path):
    """Channels last, skip connections, several values: as a stage that ends there would send them; whatever the windows."""
    program = branches.program
    cuts = legal_cuts(program)
    inputs = example_inputs(program.graph.input_specs, 1)
    firsts = [Stage.load(write_stages(program, [cut.position], tmp_path)[0].path) for cut in cuts]
    expected = [ratio_of_all(leaves) for leaves in (inputs, *(first.run(inputs) for first in firsts), Stage.load(program.path).run(inputs))]
    layers = profile_model("", program, [0.0] * len(program.graph.operators))
    least = max(layers.memory_bytes(number, number + 1) for number in range(len(layers.layers)))
    for room in (1 << 30, least):
        found = profiled(program, room)[1]["lz4"]
        assert len(found.ratios) == len(layers.layers) + 1
        assert found.ratios == pytest.approx(expected, rel=1e-3)


@pytest.fixture(scope="module")
def sparse(make_case):
    """Most of what crosses after each second layer are zeros; the layers in the middle are heavy."""
    torch.manual_seed(0)
    parts = [nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2048), nn.ReLU(), nn.Linear(2048, 256), nn.ReLU()]
    for part in parts[::2]:
        nn.init.constant_(part.bias, -1.0)
    return make_case(nn.Sequential(*parts).eval(), torch.randn(1, 256), repetitions=0)


def test_where_there_was_no_room_it_is_as_elsewhere(sparse):
    whole = profiled(sparse.program)[1]["lz4"]
    profiler, found = profiled(sparse.program, 600 << 10)
    assert [cost is None for cost in profiler.costs_s] == [False, False, True, False, True, False]
    some = found["lz4"]
    assert some.ratios[:3] == whole.ratios[:3] and some.ratios[3] == some.ratios[5] == some.ratio, "what enters a window was made up"
    assert some.ratios[2] > 2 > some.ratios[1] and some.ratio not in (some.ratios[4], some.ratios[6])


def test_a_profile_goes_on_in_slices_and_tries_codecs_once(sparse, monkeypatch):
    """A pause after each operator and what crosses after it, and only in the run to warm up."""
    monkeypatch.setattr(models_profiler, "SLICE_S", 0.0)
    taken, take = [], Compressing.take
    monkeypatch.setattr(Compressing, "take", lambda self, boundary, crossing: taken.append(boundary) or take(self, boundary, crossing))
    profiler = Profiler(sparse.program, repetitions=LEAST_RUNS)
    counts = []
    while profiler.step():
        counts.append(len(taken))
    assert taken == list(range(7)) and max(after - before for before, after in pairwise(counts)) <= 2
    assert len(counts) == 1 + 6 * (LEAST_RUNS + 1)


def test_a_failing_codec_fails_no_profile(sparse, monkeypatch):
    monkeypatch.setattr(compressing, "encode", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("broken build")))
    profiler, found = profiled(sparse.program)
    assert found == {} and all(cost is not None for cost in profiler.costs_s)
