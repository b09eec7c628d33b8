"""What control groups allow a process, read from files as Linux has them."""

from __future__ import annotations

import pytest

from adapt.runtime.cores import allowed_cores


@pytest.fixture
def machine(tmp_path):
    """Writes the files of a process and of its control groups; gives where the process is described."""
    root = tmp_path / "cgroup"

    def make(groups: str, mounts: str, files: dict[str, str]):
        for name, text in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        process = tmp_path / "self"
        process.mkdir()
        (process / "cgroup").write_text(groups)
        (process / "mountinfo").write_text(mounts.replace("ROOT", str(root)))
        return process

    return make


SECOND = "30 1 0:26 / ROOT rw,relatime shared:1 - cgroup2 cgroup2 rw\n"
FIRST = "30 1 0:26 / ROOT/cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct\n31 1 0:27 / ROOT/memory rw - cgroup cgroup rw,memory\n"


def test_the_quota_of_the_second_version(machine):
    assert allowed_cores(machine("0::/pi/worker\n", SECOND, {"pi/worker/cpu.max": "2500 10000\n", "pi/cpu.max": "max 100000\n"})) == 0.25


def test_a_group_around_it_may_allow_less(machine):
    files = {"pi/worker/cpu.max": "max 100000", "pi/cpu.max": "150000 100000", "cpu.max": "200000 100000"}
    assert allowed_cores(machine("0::/pi/worker\n", SECOND, files)) == 1.5


def test_the_quota_of_the_first_version(machine):
    files = {"cpu/pi/cpu.cfs_quota_us": "3000\n", "cpu/pi/cpu.cfs_period_us": "10000\n", "cpu/cpu.cfs_quota_us": "-1\n"}
    files |= {"cpu/cpu.cfs_period_us": "100000\n"}
    assert allowed_cores(machine("4:memory:/other\n2:cpu,cpuacct:/pi\n", FIRST, files)) == pytest.approx(0.3)


def test_in_a_container_only_its_part_is_mounted(machine):
    mount = SECOND.replace(" / ROOT", " /docker/abc ROOT")
    assert allowed_cores(machine("0::/docker/abc\n", mount, {"cpu.max": "50000 100000"})) == 0.5


@pytest.mark.parametrize("text", ["max 100000", "", "words", "0 0"])
def test_no_limit_and_no_sense_are_no_limit(machine, text):
    assert allowed_cores(machine("0::/\n", SECOND, {"cpu.max": text})) == 0.0


def test_where_nothing_is_known_there_is_no_limit(tmp_path):
    assert allowed_cores(tmp_path / "nowhere") == 0.0
