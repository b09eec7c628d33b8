"""Tags, subnets and records: whose they are while their owner lives and after it has died. With real things: tests/cluster."""

from __future__ import annotations

import ipaddress
import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from adapt.emulation import ownership
from adapt.errors import AdaptError

pytestmark = pytest.mark.skipif(shutil.which("ip") is None, reason="`ip` is not installed")

OTHER = """
import sys
from pathlib import Path
from adapt.emulation import ownership
ownership.RECORDS = Path(sys.argv[1])
held = [ownership.claim() for _ in range(int(sys.argv[2]))]
print(*(f"{one.tag} {one.subnet}" for one in held), sep=" ", flush=True)
sys.stdin.read()
for one in held:
    one.close()
"""


@pytest.fixture(autouse=True)
def records(tmp_path, monkeypatch):
    monkeypatch.setattr(ownership, "RECORDS", tmp_path / "records")
    return tmp_path / "records"


@pytest.fixture
def another(records):
    """Start a process that claims; returns it, its tags and its subnets."""
    started = []

    def start(count: int = 1) -> tuple[subprocess.Popen, list[str], list[str]]:
        command = [sys.executable, "-c", OTHER, str(records), str(count)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        words = process.stdout.readline().split()
        return process, words[::2], words[1::2]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_claim_has_a_tag_a_subnet_and_a_record(records):
    with ownership.claim() as held:
        assert ownership.TAG.fullmatch(held.tag)
        assert held.subnet.prefixlen == 24 and held.subnet.subnet_of(ownership.SUBNETS)
        assert json.loads((records / f"{held.tag}.json").read_text()) == {"tag": held.tag, "subnet": str(held.subnet), "pid": os.getpid()}
        assert ownership.leftovers() == []
    assert list(records.glob("*.json")) == []
    held.close()
    assert "closed" in repr(held)


def test_processes_that_claim_at_once_never_get_the_same(another):
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(another, [5, 5, 5]))
    tags, subnets = ([one for held in found for one in held[place]] for place in (1, 2))
    with ownership.claim() as held:
        assert len({*tags, held.tag}) == len({*subnets, str(held.subnet)}) == 16


def test_the_claim_of_a_killed_process_is_a_leftover_until_it_is_cleaned(another, records):
    process, (tag,), _ = another()
    assert ownership.leftovers() == []
    with pytest.raises(AdaptError, match=f"{tag} is alive"):
        ownership.clean(tag)
    process.kill()
    process.wait()
    with ownership.claim() as held:
        assert ownership.leftovers() == [tag]
        ownership.clean(tag)
        ownership.clean(tag)
        assert ownership.leftovers() == []
        assert (records / f"{held.tag}.json").exists()


def test_a_subnet_of_a_leftover_is_not_given_away(another, monkeypatch):
    monkeypatch.setattr(ownership, "SUBNETS", ipaddress.IPv4Network("10.77.0.0/23"))
    process, _, (subnet,) = another()
    process.kill()
    process.wait()
    monkeypatch.setattr(ownership, "SUBNETS", ipaddress.IPv4Network(subnet).supernet())
    with ownership.claim() as held, pytest.raises(AdaptError, match="no subnet"):
        assert held.subnet != ipaddress.IPv4Network(subnet)
        ownership.claim()


def test_a_record_that_was_half_written_is_a_leftover(records):
    records.mkdir()
    (records / "00abcd.json").write_text('{"tag": "00a')
    (records / "notes.json").write_text("not ours")
    ownership.claim().close()
    assert ownership.leftovers() == ["00abcd"]
    ownership.clean("00abcd")
    assert [path.name for path in records.glob("*.json")] == ["notes.json"]


def test_without_a_record_nothing_is_ours(records, monkeypatch):
    monkeypatch.setattr(ownership, "_remove", lambda tag: pytest.fail("removed"))
    assert ownership.leftovers() == []
    ownership.clean("00abcd")
    for tag in ("", "../etc", "00ABCD", "00abcd\n", "*"):
        with pytest.raises(AdaptError, match="six hexadecimal"):
            ownership.clean(tag)


def test_a_fork_of_the_owner_removes_nothing(records):
    with ownership.claim() as held:
        pid = os.fork()
        if pid == 0:
            held.close()
            os._exit(0)
        os.waitpid(pid, 0)
        assert (records / f"{held.tag}.json").exists()


FORKS = """
import os, signal, sys, time
from pathlib import Path
from adapt.emulation import ownership
ownership.RECORDS = Path(sys.argv[1])
held = ownership.claim()
fork = os.fork()
if fork == 0:
    os.close(1)
    time.sleep(60)
    os._exit(0)
print(fork, held.tag, flush=True)
time.sleep(0.2)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_fork_that_lives_on_does_not_keep_a_claim(records):
    done = subprocess.run([sys.executable, "-c", FORKS, str(records)], stdout=subprocess.PIPE, text=True)
    fork, tag = done.stdout.split()
    try:
        assert ownership.leftovers() == [tag]
    finally:
        os.kill(int(fork), signal.SIGKILL)


DIES = """
import os, signal, sys
from pathlib import Path
from adapt.emulation import ownership
ownership.RECORDS = Path(sys.argv[1])
ownership.claim(Path(sys.argv[2]))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("name", "is_removed"), [("adapt-emulation-x", True), ("other-x", False)])
def test_a_temporary_directory_goes_with_the_leftovers_if_it_is_ours(records, tmp_path, name, is_removed):
    (tmp_path / name / "state").mkdir(parents=True)
    subprocess.run([sys.executable, "-c", DIES, str(records), str(tmp_path / name)])
    (tag,) = ownership.leftovers()
    ownership.clean(tag)
    assert (tmp_path / name).exists() != is_removed and ownership.leftovers() == []


def test_routes_and_addresses_of_the_host_are_left_alone(monkeypatch):
    taken = {
        "route": [{"dst": "default"}, {"dst": "10.77.0.0/17"}, {"dst": "10.77.200.9"}],
        "addr": [{"addr_info": [{"local": "10.77.128.3", "prefixlen": 18}]}, {}],
    }
    monkeypatch.setattr(ownership, "_ip", lambda *question: taken[question[0]])
    for _ in range(20):
        with ownership.claim() as held:
            assert int(held.subnet.network_address.packed[2]) in {*range(192, 256)} - {200}
    taken["route"].append({"dst": "10.0.0.0/8"})
    with pytest.raises(AdaptError, match=r"no subnet of 10\.77\.0\.0/16 is free"):
        ownership.claim()


def test_missing_rights_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert [line.split(":")[0] for line in ownership.missing_rights()] == ["not root"]
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [line.split()[0] for line in ownership.missing_rights()] == ["`ip`", "`tc`", "`bridge`"]
    monkeypatch.undo()
    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(ownership, "RECORDS", tmp_path / "file" / "records")
    assert [line.partition(" cannot be written")[1] for line in ownership.missing_rights()] == [" cannot be written"]
