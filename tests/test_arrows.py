"""Arrows point one way: reads the imports of `adapt/` with `ast` and holds them against STYLE.md, section 1.

    rank     0 ground   1 protocol   2 planning   3 scheduling   4 runtime   5 interfaces: lower never imports higher
    models   beside planning: uses ground, protocol and planning; those of its modules that are data serve runtime too
    simulation sits on scheduling, emulation on runtime; nothing imports simulation
    torch    in all other modules of models, and in TORCH_USERS; who else imports one of these does so in a function

A line that breaks the house is one sentence in `violations(root)`. The tests plant some, to know that it can find them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# room -> rooms whose modules it may import, besides itself. Modules directly in adapt/ are the ground.
_ON_GROUND = {"ground"}
_ON_PROTOCOL = _ON_GROUND | {"protocol"}
_ON_PLANNING = _ON_PROTOCOL | {"planning"}
_ON_SCHEDULING = _ON_PLANNING | {"scheduling"}
_ON_RUNTIME = _ON_SCHEDULING | {"models", "runtime"}
MAY_IMPORT: dict[str, set[str]] = {
    "ground": set(),
    "protocol": _ON_GROUND,
    "planning": _ON_PROTOCOL,
    "models": _ON_PLANNING,
    "scheduling": _ON_PLANNING,
    "simulation": _ON_SCHEDULING,
    "runtime": _ON_SCHEDULING | {"models"},
    "emulation": _ON_RUNTIME,
    "interfaces": _ON_RUNTIME | {"emulation"},
}

PURE_ROOMS = {"protocol", "planning", "scheduling", "simulation"}
NOT_PURE = {"zmq", "asyncio", "torch", "torchvision", "socket", "select", "selectors", "ssl", "threading"}
NOT_PURE |= {"multiprocessing", "subprocess", "concurrent"}
CLOCKS = {"time", "datetime"}  # whole modules: who may not read the clock has no use for the rest of them either

# Models as data. Every other module of adapt.models is a room with torch, also one that is new.
TORCH_FREE_MODELS = {"adapt.models"} | {
    f"adapt.models.{name}"
    for name in ("program", "forms", "cut", "layers", "structure", "tensorfile", "interface", "canaries", "compaction", "fold")
}
TORCH_USERS = {"adapt.runtime.executor", "adapt.runtime.worker"}
BUILDER = "adapt.runtime.builder"  # its parent side runs in a process without torch, so its child side imports inside functions
WORKER_DOOR = "adapt.interfaces.cli.worker"  # the one door behind which there is a worker
MAY_IMPORT_TORCHVISION = {"adapt.models.sources", "adapt.models.vision"}  # it costs every process 83 MiB
CALLS = "adapt.runtime.calls"  # of a client; may use rooms with torch inside the one function that is given a Module


@dataclass(frozen=True)
class Import:
    line: int
    target: str  # absolute, down to the module where that is known: "adapt.protocol.wire", "torch.nn"
    names: tuple[str, ...]  # what is taken from it; empty for a plain import
    function: str | None  # the outermost function that it stands in; None: it runs when the module is imported
    is_for_types: bool  # under `if TYPE_CHECKING`: it never runs


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else "ground"


def is_torch_room(module: str) -> bool:
    return module.startswith("adapt.models.") and module not in TORCH_FREE_MODELS


def brings_torch(module: str) -> bool:
    return is_torch_room(module) or module in TORCH_USERS


def imports_of(path: Path, root: Path, modules: set[str]) -> Iterator[Import]:
    """Every import statement, wherever it stands."""
    package = module_name(path, root)
    if path.name != "__init__.py":
        package = package.rpartition(".")[0]

    def walk(node: ast.AST, function: str | None, is_for_types: bool) -> Iterator[Import]:
        match node:
            case ast.Import(names=names):
                for alias in names:
                    yield Import(node.lineno, alias.name, (), function, is_for_types)
            case ast.ImportFrom(module=base, names=names, level=level):
                if level:
                    above = package.split(".")[: len(package.split(".")) - level + 1]
                    base = ".".join([*above, base] if base else above)
                for alias in names:  # a name may be a module itself
                    inner = f"{base}.{alias.name}"
                    if inner in modules:
                        yield Import(node.lineno, inner, (), function, is_for_types)
                    else:
                        yield Import(node.lineno, str(base), (alias.name,), function, is_for_types)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                for child in ast.iter_child_nodes(node):
                    yield from walk(child, function or name, is_for_types)
            case ast.If(test=ast.Name(id="TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING"), body=body, orelse=rest):
                for child in body:
                    yield from walk(child, function, True)
                for child in rest:
                    yield from walk(child, function, is_for_types)
            case _:  # the body of a class runs when its module is imported
                for child in ast.iter_child_nodes(node):
                    yield from walk(child, function, is_for_types)

    yield from walk(ast.parse(path.read_text(encoding="utf-8"), str(path)), None, False)


def violations(root: Path) -> list[str]:
    """Each import under root/adapt that breaks the house, as one sentence."""
    paths = sorted((root / "adapt").rglob("*.py"))
    modules = {module_name(path, root) for path in paths}
    found: list[str] = []
    for path in paths:
        module = module_name(path, root)
        torch_functions: set[str] = set()
        for item in imports_of(path, root, modules):
            for reason in _complaints(module, item):
                found.append(f"{path.relative_to(root)}:{item.line}: {reason}")
            if module == CALLS and item.function and is_torch_room(item.target):
                torch_functions.add(item.function)
        if len(torch_functions) > 1:
            found.append(f"{path.relative_to(root)}: rooms with torch in {sorted(torch_functions)}, one function may")
    return list(dict.fromkeys(found))  # one for each line, however many names it takes


def _complaints(module: str, item: Import) -> Iterator[str]:
    room, target = room_of(module), item.target
    top = target.partition(".")[0]
    runs_at_import = item.function is None and not item.is_for_types

    if top == "adapt":
        if target == "adapt":
            if module != "adapt":
                yield "nothing inside imports adapt/__init__.py; import the module that has the name"
            return
        target_room = room_of(target)
        if module != "adapt" and target_room != room and target_room not in MAY_IMPORT[room]:
            yield f"{room} does not import {target_room} ({target})"
        if room in PURE_ROOMS and target == "adapt.clock" and item.names != ("Clock",):
            yield "a pure module is given `now`; of adapt.clock it may know the type Clock"
        if target_room == "models" and room in ("runtime", "emulation", "simulation") and is_torch_room(target):
            if module in (CALLS, BUILDER) and not runs_at_import:
                pass
            elif module not in TORCH_USERS:
                yield f"in {room} only executor, builder and worker import rooms with torch ({target})"
        if runs_at_import and brings_torch(target) and not brings_torch(module) and module != WORKER_DOOR:
            yield f"{target} brings torch along; import it inside the function that needs it, or not at all"
        return

    if room in PURE_ROOMS:
        if top in NOT_PURE:
            yield f"{room} is pure: it does not import {top}"
        if top in CLOCKS:
            yield f"{room} is pure: it does not import {top}, and is given `now`"
    if module in TORCH_FREE_MODELS and top in ("torch", "torchvision"):
        yield f"{module} is data, without {top}"
    elif top == "torchvision" and module not in MAY_IMPORT_TORCHVISION:
        yield "only models/sources.py and models/vision.py import torchvision"
    elif top in ("torch", "torchvision") and runs_at_import and not brings_torch(module):
        yield f"{top} may be imported here inside a function only"


def test_every_import_keeps_the_arrows():
    assert violations(ROOT) == []


PLANTED = [
    ("protocol/a.py", "import zmq", "protocol is pure: it does not import zmq"),
    ("protocol/a.py", "from adapt.planning import profiles", "protocol does not import planning"),
    ("planning/a.py", "import asyncio.events", "it does not import asyncio"),
    ("planning/a.py", "from time import monotonic", "given `now`"),
    ("planning/a.py", "from ..runtime.endpoint import x", "planning does not import runtime (adapt.runtime.endpoint)"),
    ("planning/a.py", "from adapt.models.program import Program", "planning does not import models"),
    ("scheduling/a.py", "def f():\n    import time", "given `now`"),
    ("scheduling/a.py", "from adapt.clock import monotonic", "the type Clock"),
    ("scheduling/a.py", "from adapt import clock", "the type Clock"),
    ("scheduling/a.py", "def f():\n    import torch", "pure: it does not import torch"),
    (
        "scheduling/a.py",
        "if TYPE_CHECKING:\n    from adapt.runtime import worker",
        "scheduling does not import runtime",
    ),
    ("errors.py", "from adapt.protocol import ids", "ground does not import protocol"),
    ("runtime/local.py", "from adapt.models.convert import x", "only executor, builder and worker"),
    ("models/a.py", "from adapt.scheduling.qos import x", "models does not import scheduling"),
    ("models/program.py", "def f():\n    import torch", "is data, without torch"),
    ("models/cut.py", "from adapt.models.interpreter import run", "brings torch along"),
    ("models/interpreter.py", "import torchvision", "only models/sources.py and models/vision.py"),
    ("runtime/dispatcher.py", "from adapt.models.export import export", "only executor, builder and worker"),
    ("runtime/dispatcher.py", "def f():\n    from adapt.models import export", "only executor, builder and worker"),
    ("runtime/dispatcher.py", "from adapt.runtime import executor", "brings torch along"),
    ("runtime/dispatcher.py", "try:\n    import torch\nexcept ImportError:\n    pass", "inside a function only"),
    ("runtime/calls.py", "class C:\n    from adapt.models import export", "brings torch along"),
    (
        "runtime/calls.py",
        "def f():\n    from adapt.models import export\ndef g():\n    from adapt.models import sources",
        "rooms with torch in ['f', 'g'], one function may",
    ),
    ("runtime/local.py", "import adapt", "nothing inside imports adapt/__init__.py"),
    ("runtime/local.py", "from adapt import Client", "nothing inside imports adapt/__init__.py"),
    ("runtime/local.py", "from adapt.interfaces.cli import main", "runtime does not import interfaces"),
    ("interfaces/cli/dispatcher.py", "from adapt.runtime.worker import serve", "brings torch along"),
    ("simulation/a.py", "from adapt.runtime import endpoint", "simulation does not import runtime"),
    ("simulation/a.py", "from time import monotonic", "given `now`"),
    ("scheduling/a.py", "from adapt.simulation import timeline", "scheduling does not import simulation"),
    ("interfaces/a.py", "from adapt.simulation import timeline", "interfaces does not import simulation"),
    ("__init__.py", "from adapt.runtime.worker import Worker", "brings torch along"),
]
ALLOWED = [
    ("__init__.py", "from adapt.errors import AdaptError\nfrom adapt.runtime.client import Client"),
    ("protocol/a.py", "import numpy\nfrom adapt import errors\nfrom adapt.protocol.ids import x\nfrom . import b"),
    ("scheduling/a.py", "from adapt.clock import Clock\nfrom adapt.planning.placement import Plan"),
    (
        "models/interpreter.py",
        "import torch\nfrom adapt.models.operators import x\nfrom adapt.planning import profiles",
    ),
    ("models/vision.py", "import torchvision"),
    ("runtime/executor.py", "import torch\nfrom adapt.models.interpreter import run"),
    (
        "runtime/calls.py",
        "if TYPE_CHECKING:\n    import torch\ndef f():\n    from adapt.models import export, sources",
    ),
    ("runtime/dispatcher.py", "import asyncio, zmq, time\nfrom adapt.models.program import Program"),
    ("interfaces/cli/worker.py", "from adapt.runtime.worker import serve"),
    ("interfaces/cli/main.py", "def demo():\n    from adapt.models import sources\n    import torch"),
]


@pytest.fixture
def house(tmp_path):
    """A copy of the house's shape with empty rooms, and a way to furnish one of them."""
    rooms = [room for room in MAY_IMPORT if room != "ground"]
    names = ["__init__.py", "errors.py", "clock.py", *(f"{room}/__init__.py" for room in rooms)]
    names += [f"models/{name}.py" for name in ("program", "cut", "interpreter", "export", "sources", "operators")]
    names += [f"runtime/{name}.py" for name in ("executor", "builder", "worker")]
    names += [
        "interfaces/cli/__init__.py",
        "protocol/ids.py",
        "protocol/b.py",
        "planning/profiles.py",
        "runtime/local.py",
    ]
    names += ["runtime/endpoint.py", "runtime/calls.py", "interfaces/cli/main.py"]
    for name in names:
        path = tmp_path / "adapt" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def furnish(name: str, text: str) -> list[str]:
        (tmp_path / "adapt" / name).write_text(text, encoding="utf-8")
        return violations(tmp_path)

    return furnish


@pytest.mark.parametrize(("name", "text", "reason"), PLANTED)
def test_a_planted_violation_is_found(house, name, text, reason):
    found = house(name, text)
    assert any(line.startswith(f"adapt/{name}") and reason in line for line in found), found


@pytest.mark.parametrize(("name", "text"), ALLOWED)
def test_what_the_house_allows_is_no_violation(house, name, text):
    assert house(name, text) == []
