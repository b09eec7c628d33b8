"""F32: the wall clock may jump at any moment, and nobody waits by it: the product measures time with monotonic clocks only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import adapt

ROOT = Path(adapt.__file__).parent
WALL_CLOCKS = {("time", name) for name in ("time", "time_ns", "ctime", "localtime", "gmtime", "asctime", "strftime", "clock_gettime")}
WALL_CLOCKS |= {(kind, name) for kind in ("datetime", "date") for name in ("now", "utcnow", "today", "fromtimestamp", "utcfromtimestamp")}

# What people read, and nobody waits by: file -> the calls it may make
ALLOWED = {"interfaces/cli/logs.py": {"time.strftime", "time.localtime"}}


def wall_clock_uses(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of each use of a wall clock, called or handed on, also under another name."""
    tree = ast.parse(source)
    names = {}  # what a name stands for
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        found = None
        if isinstance(node, ast.Attribute):
            found = f"{_full_name(node.value, names)}.{node.attr}"
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and "." in names.get(node.id, ""):
            found = names[node.id]
        if found is not None and tuple(found.split(".")[-2:]) in WALL_CLOCKS:
            yield node.lineno, ".".join(found.split(".")[-2:])


def _full_name(node: ast.expr, names: dict[str, str]) -> str:
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{_full_name(node.value, names)}.{node.attr}"
    return "?"


def test_f32_nobody_waits_by_the_wall_clock():
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        place = path.relative_to(ROOT).as_posix()
        uses = [f"{line}: {name}" for line, name in wall_clock_uses(path.read_text()) if name not in ALLOWED.get(place, set())]
        if uses:
            found[place] = uses
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "import time\nlimit = time.time() + 5",
        "import time as t\nclock = t.time",
        "from time import time as now\nlimit = now() + 5",
        "import datetime\nlimit = datetime.datetime.now()",
        "from datetime import datetime as d\nlimit = d.utcnow()",
        "import time\ndef wait(clock=time.time_ns): ...",
    ],
)
def test_what_would_be_found(source):
    assert [line for line, _ in wall_clock_uses(source)] == [2]


def test_what_is_not_found():
    assert not list(wall_clock_uses("import time\ntime.monotonic(); time.perf_counter(); time.sleep(1)\nspan.time()"))
