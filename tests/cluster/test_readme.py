"""The README's programs run as they stand there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from adapt.emulation.description import Kind
from adapt.emulation.parse import parse
from adapt.emulation.schedule import expand

README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.mark.parametrize(("index", "output"), [(0, "(1, 1000) (1, 1000) ["), (1, "(1, 1000) 8\n")])
def test_the_programs_in_the_readme_run(tmp_path, index, output):
    programs = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(programs) == 2
    script = tmp_path / "readme.py"
    script.write_text(programs[index], encoding="utf-8")
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=110, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(output)


def test_the_cluster_in_the_readme_is_ten_lines_and_right():
    (text,) = re.findall(r"```toml\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    spec = parse(text, name="home")
    assert len(text.splitlines()) == 10
    assert [device.name for device in spec.devices] == ["pi-1", "pi-2", "pi-3", "jetson"]
    assert {event.kind for event in expand(spec)} >= {Kind.CRASH, Kind.JOIN, Kind.CUT, Kind.SLOW, Kind.STOP}
