"""Kinds of devices, what is kept of their profiles, and what follows for workers; and who is asked to measure."""

from __future__ import annotations

import asyncio
import json
import math

import pytest
import torch

from adapt.errors import ConfigError, OverloadedError, PlanError
from adapt.models.export import export_module
from adapt.models.program import read_program
from adapt.planning.model import RAW, CodecProfile, Handling, ModelProfile, typical_codecs
from adapt.protocol import messages as msg
from adapt.protocol.ids import Digest, WorkerId
from adapt.runtime import profiles
from adapt.runtime.profiles import (
    DeviceKind,
    KeptProfile,
    KnownCosts,
    Measured,
    Profilers,
    ProfileStore,
    chosen,
    combined,
    form_of,
    kinds_of,
    known_costs,
)

PI = msg.DeviceFacts(device="cpu", device_name="Cortex-A72", threads=1, numeric_class="torch-2/cpu/Cortex-A72/NEON/threads=1")
PC = msg.DeviceFacts(device="cpu", device_name="Xeon", threads=2, numeric_class="torch-2/cpu/Xeon/AVX512/threads=2")
GPU = msg.DeviceFacts(device="cuda:0", device_name="Orin", threads=1, numeric_class="torch-2/cuda/Orin")
W1, W2, W3, W4 = map(WorkerId, ("w1", "w2", "w3", "w4"))
PROGRAM = Digest("a" * 64)
FORM = "f" * 64


HANDLING = Handling(0.001, 1e-9)
LZ4 = CodecProfile(name="lz4", ratio=1.5, encode_bytes_per_s=1e9, decode_bytes_per_s=2e9, ratios=(1.0, 1.25, 2.5, 1.0))
ZFP = CodecProfile(name="zfp", ratio=4.0, encode_bytes_per_s=2e8, decode_bytes_per_s=1e8, ratios=(4.0, 3.5, 5.0, 1.0))


def kept(kind: DeviceKind, *costs_s: float, worker: str = "w1") -> KeptProfile:
    return KeptProfile(device_class=kind.name, worker=worker, cores=kind.cores, costs_s=costs_s, handling=HANDLING)


def known(kept_profiles, workers, operators):
    """Seconds alone."""
    return {worker: costs.costs_s for worker, costs in known_costs(kept_profiles, workers, operators).items()}


# ── kinds ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_workers_of_one_kind_are_found_together():
    kinds = kinds_of({W3: DeviceKind.of(PI, 0.0), W1: DeviceKind.of(PI, 4.0), W2: DeviceKind.of(PC, 0.0), W4: DeviceKind.of(GPU, 0.5)})
    assert [(kind.title, kind.workers) for kind in kinds] == [
        ("Cortex-A72, 1 thread", (W1, W3)),
        ("Xeon, 2 threads", (W2,)),
        ("Orin", (W4,)),
    ]


def test_a_share_of_the_cpu_makes_a_kind_of_its_own():
    kinds = kinds_of({W1: DeviceKind.of(PI, 0.3), W2: DeviceKind.of(PI, 0.301), W3: DeviceKind.of(PI, 1.0)})
    assert [(kind.cores, kind.workers) for kind in kinds] == [(0.0, (W3,)), (0.3, (W1, W2))]
    assert kinds[1].title == "Cortex-A72, 1 thread, 0.3 cores"


def test_no_share_of_the_cpu_is_less_than_there_is():
    """Regression: one worker that told of 1e-320 cores made all plans divide by zero."""
    tiny, none = DeviceKind.of(PI, 1e-320), DeviceKind.of(PI, 0.0)
    assert (tiny.cores, none.cores) == (profiles.LEAST_CORES, 0.0)
    assert known({none.name: kept(none, 1.0)}, {W1: tiny}, 1) == {W1: (100.0,)}
    assert known({none.name: kept(none, 5e8)}, {W1: tiny, W2: none}, 1) == {W2: (5e8,)}


def test_kinds_are_chosen_by_a_part_of_their_name():
    kinds = kinds_of({W1: DeviceKind.of(PI, 0.0), W2: DeviceKind.of(PC, 0.0)})
    assert [kind.workers for kind in chosen(kinds, "cortex")] == [(W1,)]
    assert chosen(kinds, "") == kinds and chosen([], "cortex") == []
    with pytest.raises(ConfigError, match=r"device-class='M2'.*Cortex-A72.*Xeon"):
        chosen(kinds, "M2")


# ── what is known ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_worker_of_a_measured_kind_takes_what_was_measured():
    pi, pc = DeviceKind.of(PI, 0.0), DeviceKind.of(PC, 0.0)
    found = known({pi.name: kept(pi, 1.0, 2.0)}, {W1: pi, W2: pc, W3: pi}, 2)
    assert found == {W1: (1.0, 2.0), W3: (1.0, 2.0)}
    assert known({pi.name: kept(pi, 1.0, 2.0)}, {W1: pi}, 3) == {}


def test_another_share_of_the_same_cpu_is_as_much_slower():
    whole, third, tenth = DeviceKind.of(PI, 0.0), DeviceKind.of(PI, 0.3), DeviceKind.of(PI, 0.1)
    found = known({third.name: kept(third, 1.0)}, {W1: whole, W2: third, W3: tenth}, 1)
    assert {worker: cost for worker, (cost,) in found.items()} == {W1: pytest.approx(0.3), W2: 1.0, W3: pytest.approx(3.0)}


def test_what_a_task_takes_besides_grows_with_a_smaller_share_and_is_no_less_than_on_a_whole_core():
    whole, third, four = DeviceKind.of(PI, 0.0), DeviceKind.of(PI, 0.25), DeviceKind.of(PC, 1.5)
    found = known_costs({third.name: kept(third, 1.0), four.name: kept(four, 1.0)}, {W1: whole, W2: third, W3: four}, 1)
    assert found == {W1: KnownCosts((0.25,), HANDLING), W2: KnownCosts((1.0,), Handling(0.004, 4e-9)), W3: KnownCosts((1.0,), HANDLING)}


def test_what_is_kept_is_there_again(tmp_path):
    store = ProfileStore(tmp_path / "profiles")
    pi, pc = kept(DeviceKind.of(PI, 0.3), 0.1, 0.2), kept(DeviceKind.of(PC, 0.0), 0.01, 0.02)
    assert store.read(FORM) == {}
    store.write(FORM, pi)
    store.write(FORM, pc)
    assert ProfileStore(tmp_path / "profiles").read(FORM) == {pi.device_class: pi, pc.device_class: pc}


def written(*costs_s: float, cores: float = 0.0, byte_s: float = 0.0) -> str:
    profile = {"device_class": "pi", "worker": "w1", "cores": cores, "costs_s": costs_s, "handling": {"task_s": 0.0, "byte_s": byte_s}}
    return json.dumps({"version": 1, "profiles": [profile]})


DAMAGED = ["", "[]", '{"version": 1, "profiles": [{}]}', '{"version": 2, "profiles": []}']
BEYOND_BELIEF = [written(0.0, 0.0), written(1e-323), written(-1.0, 2.0), written(math.nan), written(1e200), written(0.1, cores=1e-320)]
BEYOND_BELIEF += [written(0.1, byte_s=math.inf), written(0.1, byte_s=-1.0)]


@pytest.mark.parametrize("text", DAMAGED + BEYOND_BELIEF)
def test_a_damaged_file_is_as_if_it_were_not_there(tmp_path, text):
    store = ProfileStore(tmp_path)
    (tmp_path / f"{FORM}.json").write_text(text)
    assert store.read(FORM) == {}
    store.write(FORM, kept(DeviceKind.of(PI, 0.0), 0.1))
    assert len(store.read(FORM)) == 1


def test_a_profile_of_which_only_the_computing_is_known_is_used_for_that(tmp_path):
    """As dispatchers kept them before anything else was measured, and as they do when it cannot be."""
    kind = DeviceKind.of(PI, 0.0)
    plain = {"device_class": kind.name, "worker": "w1", "cores": 0.0, "costs_s": [0.1, 0.2]}
    (tmp_path / f"{FORM}.json").write_text(json.dumps({"version": 1, "profiles": [plain]}))
    (profile,) = ProfileStore(tmp_path).read(FORM).values()
    assert profile.handling is None and profile.workspace_bytes is None
    assert known_costs({kind.name: profile}, {W1: kind}, 2) == {W1: KnownCosts((0.1, 0.2), Handling())}
    ProfileStore(tmp_path).write(FORM, profile)
    assert ProfileStore(tmp_path).read(FORM) == {kind.name: profile}


def test_a_bound_on_how_many_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(profiles, "KEPT", 3)
    for number in range(5):
        ProfileStore(tmp_path).write(f"{number}" * 64, kept(DeviceKind.of(PI, 0.0), 0.1))
    assert len(list(tmp_path.iterdir())) == 3


def test_what_codecs_make_of_it_is_kept_too(tmp_path):
    pi = DeviceKind.of(PI, 0.3)
    with_codecs = profiles.replace(kept(pi, 0.1, 0.2), codecs=(LZ4, ZFP))
    ProfileStore(tmp_path).write(FORM, with_codecs)
    assert ProfileStore(tmp_path).read(FORM) == {pi.name: with_codecs}
    plain = json.loads((tmp_path / f"{FORM}.json").read_text())
    for told in (None, []):
        plain["profiles"][0]["codecs"] = told
        (tmp_path / f"{FORM}.json").write_text(json.dumps(plain))
        assert ProfileStore(tmp_path).read(FORM) == {pi.name: profiles.replace(with_codecs, codecs=None)}
    for told in (True, [{"name": "lz4"}], [3]):
        plain["profiles"][0]["codecs"] = told
        (tmp_path / f"{FORM}.json").write_text(json.dumps(plain))
        assert ProfileStore(tmp_path).read(FORM) == {}


def test_what_kernels_take_besides_is_kept_too_as_far_as_it_can_be(tmp_path):
    pi = DeviceKind.of(PI, 0.3)
    with_workspace = profiles.replace(kept(pi, 0.1, 0.2), workspace_bytes=(None, 1 << 20))
    ProfileStore(tmp_path).write(FORM, with_workspace)
    assert ProfileStore(tmp_path).read(FORM) == {pi.name: with_workspace}
    plain = json.loads((tmp_path / f"{FORM}.json").read_text())
    for told in (None, [], [1], [1, 2, 3], [0, -1], [0, 1.5], [0, 1 << 50], "ab"):
        plain["profiles"][0]["workspace_bytes"] = told
        (tmp_path / f"{FORM}.json").write_text(json.dumps(plain))
        assert ProfileStore(tmp_path).read(FORM) == {pi.name: profiles.replace(with_workspace, workspace_bytes=None)}


def test_a_profile_is_whole_and_completed_by_what_was_known_before():
    whole = Measured([0.1], HANDLING, (LZ4,), (0,))
    assert whole.is_whole and whole.completed_by(None) == whole
    for missing in ("handling", "codecs", "workspace_bytes"):
        part = profiles.replace(whole, **{missing: None})
        assert not part.is_whole and part.completed_by(whole) == whole and part.completed_by(None) == part
    assert whole.completed_by(profiles.replace(whole, workspace_bytes=(7,))) == whole
    unknowable = profiles.replace(whole, workspace_bytes=(None,))
    assert unknowable.is_whole, "to measure it anew would tell no more"
    assert unknowable.completed_by(whole) == whole


def test_workspace_is_completed_operator_by_operator():
    new, old = Measured([0.1] * 3, workspace_bytes=(1, None, None)), Measured([0.2] * 3, workspace_bytes=(5, 6, None))
    assert new.completed_by(old).workspace_bytes == (1, 6, None)
    assert old.completed_by(new).workspace_bytes == (5, 6, None)


def test_a_worker_of_a_measured_kind_takes_its_workspace_at_any_share_of_the_cpu():
    whole, third = DeviceKind.of(PI, 0.0), DeviceKind.of(PI, 0.3)
    profile = profiles.replace(kept(third, 1.0, 2.0), workspace_bytes=(5, None))
    found = known_costs({third.name: profile}, {W1: whole, W2: third}, 2)
    assert {worker: costs.workspace_bytes for worker, costs in found.items()} == {W1: (5, None), W2: (5, None)}


def exported(directory, *, width: int = 4, seed: int = 0):
    torch.manual_seed(seed)
    module = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.ReLU(), torch.nn.Linear(width, 4)).eval()
    return read_program(export_module(module, [torch.zeros(2, 4)], directory=directory, profile_repetitions=0).path)


def test_other_weights_have_the_same_form_and_another_width_has_not(tmp_path):
    one, other, wider = exported(tmp_path), exported(tmp_path, seed=1), exported(tmp_path, width=8)
    assert one.digest != other.digest
    assert form_of(one.path) == form_of(other.path) != form_of(wider.path)


def test_what_planning_gets_is_in_seconds_of_one_core(tmp_path):
    program = exported(tmp_path)
    fast, slow = DeviceKind.of(PI, 0.5), DeviceKind.of(PI, 0.25)
    fast, slow = (profiles.replace(kind, workers=(worker,)) for kind, worker in ((fast, W1), (slow, W2)))
    model = combined("m", program, [(slow, Measured([0.8, 0.4, None], HANDLING)), (fast, Measured([0.4, 0.2, 0.2]))], [2.0, 1.0, 1.0])
    assert [layer.cost_s for layer in model.layers] == pytest.approx([0.2, 0.1, 0.1])
    assert model.costs_of("w2") == pytest.approx((0.8, 0.4, 0.4)) and model.costs_of("w1") == pytest.approx((0.4, 0.2, 0.2))
    assert model.handling_of("w2") == Handling(0.004, 4e-9) and model.handling_of("w1") == model.handling_of("w3") == Handling()
    assert model.costs_of("w3") is None and "measured on w1" in model.reference
    assert ModelProfile.from_json(model.to_json()) == model
    assert json.loads(model.to_json())["measured"][0]["workers"] == ["w2"]


def combined_with(tmp_path, *told, cores=(0.5, 0.25)):
    """The model of workers that take 0.2 and 0.4 s of one core for it, of which each has said this of codecs."""
    workers = [profiles.replace(DeviceKind.of(PI, share), workers=(worker,)) for share, worker in zip(cores, (W1, W2), strict=True)]
    costs_s = ([0.2, 0.1, 0.1], [0.8, 0.4, 0.4])
    each = [(kind, Measured(list(costs), HANDLING, codecs)) for kind, costs, codecs in zip(workers, costs_s, told, strict=True)]
    return combined("m", exported(tmp_path), each, [1.0] * 3)


def test_planning_gets_the_most_that_kernels_take_on_any_device(tmp_path):
    kinds = [profiles.replace(DeviceKind.of(facts, 0.0), workers=(worker,)) for facts, worker in ((PI, W1), (PC, W2), (GPU, W3))]

    def workspace_of(*told):
        each = [(kind, Measured([0.1] * 3, workspace_bytes=workspace)) for kind, workspace in zip(kinds, told, strict=True)]
        return [layer.workspace_bytes for layer in combined("m", exported(tmp_path), each, [1.0] * 3).layers]

    assert workspace_of((1, 2, None), None, (0, 5, 3)) == [1, 5, 3]
    assert workspace_of(None, None, None) == [0, 0, 0]


def test_planning_gets_what_the_reference_device_makes_of_what_crosses(tmp_path):
    """Speeds are of CPU seconds: those of a whole core already."""
    other = profiles.replace(LZ4, ratio=9.0)
    model = combined_with(tmp_path, (LZ4, ZFP), (other,))
    assert model.codecs == (RAW, LZ4, ZFP) and model.wire_bytes(2, 1) == model.crossing_bytes[2] / 2.5
    assert ModelProfile.from_json(model.to_json()) == model


def test_if_only_another_device_has_measured_codecs_they_are_as_much_faster(tmp_path):
    model = combined_with(tmp_path, None, (LZ4,))
    raw, lz4 = model.codecs
    assert raw == RAW and lz4.ratios == LZ4.ratios
    assert (lz4.encode_bytes_per_s, lz4.decode_bytes_per_s) == pytest.approx((2e9, 4e9)), "the reference device computes twice as fast"


def test_codecs_of_another_model_are_not_taken(tmp_path):
    short = profiles.replace(LZ4, ratios=LZ4.ratios[:3])
    assert combined_with(tmp_path, (short,), None).codecs == typical_codecs()
    assert combined_with(tmp_path, (short,), (LZ4,)).codecs[1].ratios == LZ4.ratios
    assert combined_with(tmp_path, None, None).codecs == typical_codecs()


# ── who measures ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Cluster:
    """Workers that do as they are told: `answers` says with what each answers a `ProfileProgram`, or that it does not."""

    def __init__(self, **answers) -> None:
        self.answers, self.said, self.told, self.emptied = answers, [], [], []
        self.profilers = Profilers(self.to_worker, make_room=self.emptied.append)

    def to_worker(self, worker_id, message) -> bool:
        self.said.append((worker_id, type(message).__name__))
        if worker_id not in self.answers:
            return False
        if isinstance(message, msg.ProfileProgram):
            asyncio.get_running_loop().call_soon(self.answers[worker_id], self)
        return True

    async def measure(self, *workers, cores=0.0):
        kind = profiles.replace(DeviceKind.of(PI, cores), workers=workers)
        return await self.profilers.measure(PROGRAM, 100, kind, repetitions=3, told=lambda words, share: self.told.append((words, share)))


def profiled(worker, *costs_s):
    return lambda cluster: cluster.profilers.heard(worker, msg.ProgramProfiled(program=PROGRAM, costs_s=list(costs_s)))


def refused(worker, error):
    code, message, fields = error.to_wire()
    failed = msg.ProfileFailed(program=PROGRAM, code=code, message=message, fields=fields)
    return lambda cluster: cluster.profilers.heard(worker, failed)


def gone(worker):
    return lambda cluster: cluster.profilers.worker_gone(worker)


def test_the_first_worker_that_can_measures():
    async def test():
        cluster = Cluster(w1=refused(W1, OverloadedError("busy", retry_after_s=1.0)), w2=gone(W2), w3=profiled(W3, 0.1, None))
        assert await cluster.measure(W4, W1, W2, W3) == (W3, Measured([0.1, None]))
        asked = [(worker, name) for worker, name in cluster.said if name == "ProfileProgram"]
        assert asked == [(worker, "ProfileProgram") for worker in (W4, W1, W2, W3)]

    asyncio.run(test())


@pytest.mark.parametrize("costs_s", [(0.0, 0.0), (1e-323, None), (1e9, 1e9), ()])
def test_seconds_that_nobody_can_have_measured_are_not_taken(costs_s):
    async def test():
        cluster = Cluster(w1=profiled(W1, *costs_s), w2=profiled(W2, 0.1, 0.2))
        assert await cluster.measure(W1, W2) == (W2, Measured([0.1, 0.2]))
        with pytest.raises(PlanError, match=r"w1: it says that the program takes .* s, which nobody can have measured"):
            await cluster.measure(W1)

    asyncio.run(test())


def test_what_a_task_takes_besides_is_believed_within_reason():
    def says(cluster):
        cluster.profilers.heard(W1, msg.ProgramProfiled(program=PROGRAM, costs_s=[0.1], task_s=1e9, byte_s=1e-9))

    async def test():
        assert await Cluster(w1=says).measure(W1) == (W1, Measured([0.1], Handling(profiles.MOST_HANDLING.task_s, 1e-9)))

    asyncio.run(test())


def told(codec: CodecProfile, **changes) -> msg.CodecMeasured:
    plain = {key: getattr(codec, key) for key in ("name", "ratio", "encode_bytes_per_s", "decode_bytes_per_s")}
    return msg.CodecMeasured(**{**plain, "ratios": list(codec.ratios), **changes})


BEYOND = [
    {"ratio": 0.0},
    {"ratio": math.nan},
    {"ratios": [1.0, 1e-300]},
    {"ratios": [1.0, 1e9]},
    {"ratios": [math.nan]},
    {"encode_bytes_per_s": 0.0},
    {"encode_bytes_per_s": math.nan},
    {"decode_bytes_per_s": 1e-320},
    {"decode_bytes_per_s": 1e18},
    {"name": "raw"},
    {"name": "best of all"},
]


@pytest.mark.parametrize("changes", BEYOND)
def test_of_codecs_only_what_can_be_is_believed(changes):
    """One worker that tells nonsense must stop nobody's plan; its seconds are still a profile."""

    def says(*codecs):
        message = msg.ProgramProfiled(program=PROGRAM, costs_s=[0.1], codecs=list(codecs) or None)
        return lambda cluster: cluster.profilers.heard(W1, message)

    async def believed(*codecs):
        return (await Cluster(w1=says(*codecs)).measure(W1))[1].codecs

    async def test():
        assert await believed() is None
        assert await believed(told(ZFP), told(LZ4)) == (LZ4, ZFP), "in the order of plans"
        assert await believed(told(LZ4, **changes)) is None
        assert await believed(told(LZ4), told(ZFP, **changes)) == (LZ4,)

    asyncio.run(test())


@pytest.mark.parametrize("workspace", [[1], [1, 2, 3], [], [1, 1 << 37], [1 << 62, None]])
def test_of_workspace_only_what_can_be_is_believed(workspace):
    """Its seconds are still a profile."""

    async def believed(workspace):
        message = msg.ProgramProfiled(program=PROGRAM, costs_s=[0.1, 0.2], workspace_bytes=workspace)
        cluster = Cluster(w1=lambda cluster: cluster.profilers.heard(W1, message))
        return (await cluster.measure(W1))[1]

    assert asyncio.run(believed(workspace)) == Measured([0.1, 0.2])
    assert asyncio.run(believed([None, None])) == Measured([0.1, 0.2], workspace_bytes=(None, None))
    assert asyncio.run(believed([None, 1 << 36])) == Measured([0.1, 0.2], workspace_bytes=(None, 1 << 36))


def test_if_nobody_can_all_reasons_are_told():
    async def test():
        cluster = Cluster(w1=refused(W1, PlanError("no room")), w2=gone(W2))
        with pytest.raises(PlanError, match="not profiled on Cortex-A72, 1 thread: w1: no room; w2: it has left; w4: it has left"):
            await cluster.measure(W1, W2, W4)

    asyncio.run(test())


def test_who_has_a_share_of_the_cpu_measures_together_with_others_and_who_reads_the_clock_alone():
    async def test():
        measuring, seen, two, release = set(), [], asyncio.Event(), asyncio.Event()

        def begin(worker):
            async def run(cluster):
                measuring.add(worker)
                seen.append(set(measuring))
                if len(seen) == 2:
                    two.set()
                await release.wait()
                measuring.discard(worker)
                profiled(worker, 0.1)(cluster)

            return lambda cluster: running.append(asyncio.create_task(run(cluster)))

        running = []
        cluster = Cluster(w1=begin(W1), w2=begin(W2), w3=begin(W3), w4=begin(W4))
        shares = {W1: 0.5, W3: 0.2, W2: 0.0, W4: 0.0}
        tasks = [asyncio.create_task(cluster.measure(worker, cores=cores)) for worker, cores in shares.items()]
        await two.wait()
        release.set()
        await asyncio.gather(*tasks, *running)
        assert seen == [{W1}, {W1, W3}, {W2}, {W4}]

    asyncio.run(test())


@pytest.mark.parametrize(
    ("threads", "cores", "counts"), [(1, 0.5, True), (1, 0.0, False), (1, 2.0, False), (4, 0.5, False), (4, 2.0, False)]
)
def test_only_who_has_one_thread_and_less_than_a_core_counts_what_its_processor_does(threads, cores, counts):
    facts = msg.DeviceFacts(device="cpu", device_name="Pi", threads=threads, numeric_class="Pi")
    assert DeviceKind.of(facts, cores).counts_cpu is counts


@pytest.mark.parametrize("cores", [0.0, 0.5])
def test_two_clients_that_want_the_same_worker_both_get_what_it_measures(cores):
    """Regression: the second was refused, as a worker measures one program at a time, or took the answer of the first."""

    async def test():
        cluster = Cluster(w1=profiled(W1, 0.1))
        assert await asyncio.gather(cluster.measure(W1, cores=cores), cluster.measure(W1, cores=cores)) == [(W1, Measured([0.1]))] * 2
        assert [name for _, name in cluster.said] == ["ProfileProgram"] * 2

    asyncio.run(test())


@pytest.mark.parametrize("cores", [0.0, 0.5])
def test_who_is_not_waited_for_any_more_keeps_nobody_from_measuring(cores):
    async def test():
        begun = asyncio.Event()
        cluster = Cluster(w1=lambda cluster: begun.set(), w2=profiled(W2, 0.1))
        first = asyncio.create_task(cluster.measure(W1, cores=cores))
        await begun.wait()
        second = asyncio.create_task(cluster.measure(W2, cores=0.0))
        await asyncio.sleep(0)
        for task in (first, waiting := asyncio.create_task(cluster.measure(W1, cores=0.2))):
            task.cancel()
        await asyncio.gather(first, waiting, return_exceptions=True)
        assert await second == (W2, Measured([0.1]))
        assert await cluster.measure(W2, cores=0.2) == (W2, Measured([0.1]))

    asyncio.run(test())


def test_a_worker_that_is_busy_for_too_long_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(profiles, "SILENCE_S", 0.05)

    async def test():
        cluster = Cluster(w1=lambda cluster: None)
        with pytest.raises(PlanError, match="no progress"):
            await cluster.measure(W1)
        assert cluster.said[-1] == (W1, "CancelProfile")

    asyncio.run(test())


def test_only_what_goes_forward_is_a_sign_of_life(monkeypatch):
    monkeypatch.setattr(profiles, "SILENCE_S", 0.05)

    async def test():
        ended = asyncio.Event()

        def repeat(cluster, share=0.5):  # without end
            cluster.profilers.heard(W1, msg.ProfileProgress(program=PROGRAM, step="measuring", share=share))
            if not ended.is_set():
                asyncio.get_running_loop().call_later(0.005, repeat, cluster, share * 0.9)

        cluster = Cluster(w1=repeat)
        with pytest.raises(PlanError, match="no progress"):
            await cluster.measure(W1)
        ended.set()
        assert cluster.told == [("w1: measuring", 0.5)]

    asyncio.run(test())


def test_a_worker_cannot_keep_everybody_waiting_with_new_words():
    async def test():
        def speak(cluster):
            for number in range(10 * profiles.MOST_STEPS):
                cluster.profilers.heard(W1, msg.ProfileProgress(program=PROGRAM, step=str(number), share=0.0))
            profiled(W1, 0.1)(cluster)

        cluster = Cluster(w1=speak)
        await cluster.measure(W1)
        assert len(cluster.told) == profiles.MOST_STEPS + 1, "and that it has measured"

    asyncio.run(test())


def test_who_gives_up_waiting_has_it_cancelled():
    async def test():
        begun = asyncio.Event()
        cluster = Cluster(w1=lambda cluster: begun.set())
        task = asyncio.create_task(cluster.measure(W1))
        await begun.wait()
        cluster.profilers.heard(W1, msg.ProfileProgress(program=PROGRAM, step="measuring", share=0.5))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert cluster.said == [(W1, "ProfileProgram"), (W1, "CancelProfile")] and cluster.told == [("w1: measuring", 0.5)]
        profiled(W1, 0.1)(cluster)  # too late: nobody waits for it

    asyncio.run(test())
