"""Control groups on made-up trees: where they are found, what is written into them and when. Real ones: tests/cluster."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapt.emulation import groups
from adapt.emulation.groups import Groups, Hierarchies, find_hierarchies, quota
from adapt.errors import AdaptError

TAG = "0badda"
FIRST = """\
23 1 0:22 / /proc rw,relatime - proc proc rw
32 31 0:29 / {0}/cpu rw,relatime - cgroup cgroup rw,{1}
35 31 0:32 /docker/1 {0}/with\\040space rw,relatime shared:9 master:1 - cgroup cgroup rw,memory
36 31 0:33 / {0}/cpuacct rw,relatime - cgroup cgroup rw,cpuacct
41 31 0:38 / {0}/unified rw,relatime - cgroup2 cgroup2 rw
"""
SECOND = "41 31 0:38 / {0} rw,relatime - cgroup2 cgroup2 rw\n"


@pytest.fixture
def second(tmp_path):
    """The root of a tree of version 2."""
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    (tmp_path / "cgroup.subtree_control").write_text("cpu memory\n")
    return tmp_path


def unmake(folder: Path) -> None:
    """What the kernel does when a group is removed: its files go with it."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.unlink()


@pytest.mark.parametrize(("options", "cpuacct"), [("cpu", "cpuacct"), ("cpu,cpuacct", "cpu")])
def test_version_1_is_found_wherever_it_is_mounted(options, cpuacct):
    found = find_hierarchies(FIRST.format("/here", options))
    assert found == Hierarchies(1, Path("/here/cpu"), Path(f"/here/{cpuacct}"), Path("/here/with space"))
    assert len(found.roots) == (2 if cpuacct == "cpu" else 3)


def test_version_2_is_found_where_the_controllers_are_passed_on(second):
    assert find_hierarchies(SECOND.format(second)) == Hierarchies(2, second, second, second)


def test_what_is_missing_is_said_with_what_to_do(second):
    with pytest.raises(AdaptError, match=r"no cgroup hierarchy .* mount -t cgroup2"):
        find_hierarchies("23 1 0:22 / /proc rw,relatime - proc proc rw\n")
    (second / "cgroup.subtree_control").write_text("memory pids\n")
    with pytest.raises(AdaptError, match=r"subtree_control lacks cpu; run: echo \"\+cpu \+memory\" > "):
        find_hierarchies(SECOND.format(second))
    (second / "cgroup.controllers").write_text("hugetlb\n")
    with pytest.raises(AdaptError, match=r"controllers lacks cpu and memory; boot with"):
        find_hierarchies(SECOND.format(second))


def test_a_hierarchy_without_files_is_no_crash(tmp_path):
    with pytest.raises(AdaptError, match="controllers"):
        find_hierarchies(SECOND.format(tmp_path / "gone"))


@pytest.mark.parametrize(
    ("cores", "expected"),
    [(0.25, (2500, 10_000)), (2, (20_000, 10_000)), (0.1, (1000, 10_000)), (0.05, (1000, 20_000)), (0.001, (1000, 1_000_000))],
)
def test_the_period_is_10_ms_unless_the_quota_would_be_too_small(cores, expected):
    assert quota(cores) == expected


@given(st.floats(groups.MIN_CORES, 1000))
def test_a_quota_is_the_share_and_one_that_the_kernel_takes(cores):
    allowed_us, period_us = quota(cores)
    assert allowed_us >= 1000 and 10_000 <= period_us <= 1_000_000
    assert allowed_us / period_us == pytest.approx(cores, rel=1e-3)


@pytest.mark.parametrize("cores", [0.0, -1.0, 0.0009, float("nan")])
def test_an_impossible_share_is_refused(cores, second):
    with pytest.raises(AdaptError, match="cores"):
        quota(cores)
    with pytest.raises(AdaptError, match="cores"):
        Groups(TAG, find_hierarchies(SECOND.format(second))).make("m1", cores=cores)
    assert not (second / f"adapt-{TAG}" / "m1").exists()


def test_a_group_of_version_2(second):
    made = Groups(TAG, find_hierarchies(SECOND.format(second)))
    group = made.make("m1", cores=0.25, memory_bytes=64 << 20)
    folder = second / f"adapt-{TAG}" / "m1"
    assert group.procs == (folder / "cgroup.procs",) == (group.cpu_procs,) == (group.memory_procs,)
    assert (folder.parent / "cgroup.subtree_control").read_text() == "+cpu +memory"
    assert (folder / "memory.max").read_text() == str(64 << 20)
    assert (folder / "memory.swap.max").read_text() == "0"
    assert not (folder / "cpu.max").exists()  # not before the worker is ready
    group.begin_limit()
    assert (folder / "cpu.max").read_text() == "2500 10000"
    group.limit_cores(0.05)
    assert (folder / "cpu.max").read_text() == "1000 20000"
    group.limit_cores(None)
    assert (folder / "cpu.max").read_text() == "max 10000"

    (folder / "cpu.stat").write_text("usage_usec 1500000\nuser_usec 1\n")
    (folder / "memory.current").write_text("5000\n")
    (folder / "memory.stat").write_text("anon 100\ninactive_file 1000\nactive_file 500\n")
    (folder / "memory.events").write_text("low 0\noom 3\noom_kill 2\n")
    assert group.usage() == groups.Usage(1.5, 3500)
    assert group.out_of_memory_kills() == 2
    unmake(folder.parent)
    made.close()
    made.close()
    assert not folder.parent.exists() and second.exists()


def test_a_group_of_version_1(tmp_path):
    for name in ("cpu", "cpuacct", "with space"):
        (tmp_path / name).mkdir()
    made = Groups(TAG, find_hierarchies(FIRST.format(tmp_path, "cpu")))
    group = made.make("m1", cores=0.25, memory_bytes=64 << 20)
    cpu, cpuacct, memory = (tmp_path / name / f"adapt-{TAG}" / "m1" for name in ("cpu", "cpuacct", "with space"))
    assert group.procs == (cpu / "cgroup.procs", cpuacct / "cgroup.procs", memory / "cgroup.procs")
    assert (group.cpu_procs, group.memory_procs) == (cpu / "cgroup.procs", memory / "cgroup.procs")
    assert (memory / "memory.limit_in_bytes").read_text() == (memory / "memory.memsw.limit_in_bytes").read_text() == str(64 << 20)
    assert not (cpu / "cpu.cfs_quota_us").exists()
    group.begin_limit()
    assert [(cpu / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")] == ["2500", "10000"]
    group.limit_cores(None)
    assert (cpu / "cpu.cfs_quota_us").read_text() == "-1"

    (cpuacct / "cpuacct.usage").write_text("1500000000\n")
    (memory / "memory.usage_in_bytes").write_text("5000\n")
    (memory / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 1000\ntotal_active_file 500\n")
    (memory / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
    assert group.usage() == groups.Usage(1.5, 3500)
    assert group.out_of_memory_kills() == 2
    for place in (cpu, cpuacct, memory):
        unmake(place)
    made.close()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["cpu", "cpuacct", "with space"]


def test_without_a_limit_none_is_written(second):
    group = Groups(TAG, find_hierarchies(SECOND.format(second))).make("m1")
    group.begin_limit()
    folder = second / f"adapt-{TAG}" / "m1"
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"cpu.max": "max 10000"}


def test_a_group_that_exists_is_not_taken(second):
    made = Groups(TAG, find_hierarchies(SECOND.format(second)))
    made.make("m1")
    with pytest.raises(AdaptError, match="'m1' cannot be made"):
        made.make("m1")


def test_a_group_that_is_not_empty_says_who_is_in_it(second, monkeypatch):
    monkeypatch.setattr(groups, "EMPTY_WITHIN_S", 0.02)
    group = Groups(TAG, find_hierarchies(SECOND.format(second))).make("m1")
    group.memory_procs.write_text("71\n72\n")
    with pytest.raises(AdaptError, match="its processes: 71, 72"):
        group.remove()
