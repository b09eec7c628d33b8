"""What is freed is kept: seen by the page faults of a process that allocates and frees again and again."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

ROUNDS, BYTES, KEPT_FAULTS = 50, 4 << 20, 1
PROGRAM = f"""
import resource
from adapt.runtime import heap
{{call}}
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def use():
    blocks = [bytearray({BYTES}), bytearray({BYTES})]  # the second lies at the end of the heap
use()
before = faults()
for _ in range({ROUNDS}):
    use()
print((faults() - before) / {ROUNDS})
"""

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="nothing is done but with glibc")


def faults_after(call: str, **environment: str) -> float:
    """Page faults each time."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | environment
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(call=call)], env=environ, capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.mark.parametrize("call", ["heap.keep_freed()", "heap.share_one_heap()", "heap.share_one_heap(); heap.keep_freed()"])
def test_what_is_freed_is_used_again(call):
    assert faults_after("") > 100
    assert faults_after(call) <= KEPT_FAULTS


def test_no_more_is_kept_than_was_asked_for():
    assert faults_after("heap.keep_freed(1 << 20)") > 100
    assert faults_after("heap.keep_freed(1 << 20); heap.keep_freed()") <= KEPT_FAULTS


def test_who_has_set_variables_of_glibc_is_obeyed():
    assert faults_after("heap.keep_freed()", MALLOC_TRIM_THRESHOLD_="65536") > 100
