"""The child process in which a named model is exported: its answers, its errors, and that nothing of it stays."""

from __future__ import annotations

import asyncio
import importlib.util
import io
import os
import signal
import sys
import zipfile

import psutil
import pytest

from adapt.errors import ConfigError, ExportError, ExportUnavailableError, UnknownModelError
from adapt.protocol.messages import NamedSource
from adapt.runtime import builder, child

SMALL = NamedSource(model="torchvision/squeezenet1_1", seed=0)


def build(source, directory, **changes):
    arguments = {"directory": directory, "models_dir": None, "timeout_s": 60.0} | changes
    return asyncio.run(builder.build(source, **arguments))


# --- names of weight files --------------------------------------------------------------------------------------------


@pytest.fixture
def models_dir(tmp_path):
    """A folder of weights, beside a file and a folder that are none of its business."""
    base = tmp_path / "models"
    (base / "inner").mkdir(parents=True)
    (base / "resnet50.safetensors").write_bytes(b"w")
    (base / "inner" / "a.pth").write_bytes(b"w")
    (tmp_path / "secret.pth").write_bytes(b"s")
    (base / "leads-out.pth").symlink_to(tmp_path / "secret.pth")
    (base / "folder-out").symlink_to(tmp_path)
    (base / "stays-in.pth").symlink_to(base / "inner" / "a.pth")
    (base / "circle").symlink_to(base / "circle")
    return base


def test_a_file_under_the_folder_is_found(models_dir):
    assert builder.resolve_weights("resnet50.safetensors", models_dir) == models_dir / "resnet50.safetensors"
    assert builder.resolve_weights("inner/a.pth", models_dir) == models_dir / "inner" / "a.pth"
    assert builder.resolve_weights("stays-in.pth", models_dir) == models_dir / "inner" / "a.pth"


def test_names_of_torchvisions_own_weights_are_no_files(models_dir):
    (models_dir / "DEFAULT").write_bytes(b"w")
    for name in (None, "DEFAULT", "IMAGENET1K_V2"):
        assert builder.resolve_weights(name, models_dir) == name
        assert builder.resolve_weights(name, None) == name


@pytest.mark.parametrize(
    "weights",
    [
        "../secret.pth",
        "inner/../../secret.pth",
        "/etc/passwd",
        "leads-out.pth",
        "folder-out/secret.pth",
        "circle",
        "a\0b",
        "none.pth",
        "inner",
        "",
        "default",
    ],
)
def test_what_is_no_file_under_the_folder_is_refused(models_dir, weights):
    with pytest.raises(ConfigError, match="weights=") as caught:
        builder.resolve_weights(weights, models_dir)
    assert "--models-dir" in str(caught.value)
    assert str(models_dir) not in str(caught.value)  # a client learns nothing about the machine


def test_a_misspelt_file_gets_a_suggestion(models_dir):
    with pytest.raises(ConfigError, match=r"did you mean resnet50\.safetensors\?"):
        builder.resolve_weights("resnet5.safetensors", models_dir)


def test_without_a_folder_no_file_can_be_named():
    with pytest.raises(ConfigError, match="start it with --models-dir"):
        builder.resolve_weights("resnet50.safetensors", None)


# --- building ---------------------------------------------------------------------------------------------------------


def test_a_named_model_becomes_a_program(tmp_path):
    steps = []
    built = build(SMALL, tmp_path, progress=steps.append)
    assert built.path == tmp_path / f"{built.digest}.safetensors"
    assert built.path.stat().st_size == built.file_bytes
    assert min(built.operator_costs_s) > 0
    assert [path.name for path in tmp_path.iterdir()] == [built.path.name]
    assert steps == ["loading torch", "building torchvision/squeezenet1_1", "exporting and profiling torchvision/squeezenet1_1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "kind", "reason"),
    [
        (NamedSource(model="torchvision/resnet51"), UnknownModelError, "did you mean torchvision/resnet50"),
        (NamedSource(model="torchvision/resnet18", model_args={"flavour": 1}), ExportError, "unexpected keyword argument 'flavour'"),
        (NamedSource(model="torchvision/resnet18", weights="BEST"), ExportError, "no weights 'BEST'"),
        (NamedSource(model="torchvision/resnet18", input_shape=[1, 4, 64, 64]), ExportError, "fails on the example"),
    ],
)
def test_what_cannot_be_built_is_a_typed_error(tmp_path, source, kind, reason):
    with pytest.raises(kind, match=reason):
        build(source, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_errors_keep_their_facts(tmp_path):
    with pytest.raises(UnknownModelError) as caught:
        build(NamedSource(model="squeezenet"), tmp_path)
    assert caught.value.name == "torchvision/squeezenet"
    assert caught.value.suggestions


@pytest.mark.parametrize("shape", [[], [0, 3, 224, 224], [1 << 40], [1] * 9])
def test_an_impossible_shape_is_refused_before_a_process_is_started(tmp_path, shape):
    with pytest.raises(ConfigError, match="input_shape="):
        build(NamedSource(model="torchvision/resnet18", input_shape=shape), tmp_path)


def test_without_torch_it_is_unavailable(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExportUnavailableError, match="has no torch"):
        build(SMALL, tmp_path)


# --- files ------------------------------------------------------------------------------------------------------------


class Harm:
    """What a file may hold: whoever reads it leaves the number of their process."""

    def __init__(self, marker):
        self.words = f"import os; open({str(marker)!r}, 'w').write(str(os.getpid()))"

    def __reduce__(self):
        return exec, (self.words,)


@pytest.fixture
def harmful(tmp_path):
    """Such a file, and where the number is left."""
    import torch

    whole, path, marker = tmp_path / "whole.pt2", tmp_path / "harmful.pt2", tmp_path / "marker"
    torch.export.save(torch.export.export(torch.nn.Linear(4, 4), (torch.ones(2, 4),)), whole)
    with zipfile.ZipFile(whole) as archive, zipfile.ZipFile(path, "w") as other:
        for entry in archive.infolist():
            data = archive.read(entry)
            if "sample_inputs" in entry.filename:
                torch.save(Harm(marker), buffer := io.BytesIO())
                data = buffer.getvalue()
            other.writestr(entry, data)
    return path, marker


def test_a_file_of_torch_is_code_and_runs_in_a_child_alone(harmful, tmp_path):
    path, marker = harmful
    with pytest.raises(ExportError, match=r"harmful\.pt2"):
        asyncio.run(builder.build_file(path, directory=tmp_path / "store"))
    assert int(marker.read_text()) != os.getpid()  # it has run, or this test were none
    assert list((tmp_path / "store").iterdir()) == []


def test_nobody_opens_a_file_of_torch_for_another(harmful, tmp_path):
    """As a dispatcher would for a client that names a path, also one under --models-dir."""
    path, marker = harmful
    for model in (str(path), path.name, f"torchvision/{path.name}"):
        with pytest.raises(ExportError, match="nobody opens code for another"):
            build(NamedSource(model=model), tmp_path / "store", models_dir=path.parent)
    assert not marker.exists()


def test_a_file_without_torch_is_unavailable(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExportUnavailableError, match=r"m\.pt2 would be exported by this machine, which has no torch"):
        asyncio.run(builder.build_file(tmp_path / "m.pt2", directory=tmp_path))


# --- ends -------------------------------------------------------------------------------------------------------------


def test_after_the_timeout_nothing_is_left(tmp_path):
    with pytest.raises(ExportError, match=r"took longer than 0\.3 s"):
        build(SMALL, tmp_path, timeout_s=0.3)
    assert list(tmp_path.iterdir()) == []
    assert psutil.Process().children() == []


async def started_child():
    """The process of the child that is under way."""
    while not (children := psutil.Process().children()):  # noqa: ASYNC110  a fact of the machine, which no event tells
        await asyncio.sleep(0.01)
    return children[0]


def test_cancelling_kills_the_child(tmp_path):
    async def cancel_soon():
        work = asyncio.create_task(builder.build(SMALL, directory=tmp_path, models_dir=None, timeout_s=60), name="build")
        process = await started_child()
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        assert not process.is_running()

    asyncio.run(cancel_soon())
    assert list(tmp_path.iterdir()) == []


def test_a_child_that_is_killed_is_named_as_such(tmp_path):
    async def kill_soon():
        work = asyncio.create_task(builder.build(SMALL, directory=tmp_path, models_dir=None, timeout_s=60), name="build")
        os.kill((await started_child()).pid, signal.SIGKILL)
        with pytest.raises(ExportError, match=r"killed \(SIGKILL\), most likely because this machine has too little memory"):
            await work

    asyncio.run(kill_soon())
    assert list(tmp_path.iterdir()) == []


def test_a_child_leaves_when_its_parent_is_gone(tmp_path):
    program = "import time; from adapt.runtime.child import answer; answer(lambda request, say: time.sleep(60))"
    process = psutil.Popen([sys.executable, "-c", program], stdin=-1, stdout=-1)
    process.stdin.write(b"{}\n")
    process.stdin.close()
    assert process.wait(timeout=20) == 1
    process.stdout.close()


def test_a_child_that_says_nothing_is_an_error_with_its_last_words():
    with pytest.raises(ExportError, match=r"ended with status 1 without an answer; it last said: .*No module named adapt\.no_such"):
        asyncio.run(child.ask("adapt.no_such", {}, about="nothing"))
