"""adapt status, adapt version: what is printed of a report, and as JSON. And what the umbrella refuses."""

from __future__ import annotations

import io
import json
import socket

import pytest
from msgspec import structs
from rich.console import Console

from adapt.errors import ConfigError
from adapt.interfaces.cli import deploy, main, status
from adapt.protocol.messages import (
    DeploymentRecord,
    DeviceFacts,
    LinkRecord,
    ModelFileRecord,
    RequestRecord,
    StagePlace,
    StatusReport,
    WorkerRecord,
)

DEVICE = DeviceFacts(device="cpu", device_name="a processor", threads=1, numeric_class="a class")


def worker(name, state, *resident, link=None):
    return WorkerRecord(
        worker_id=name, state=state, device=DEVICE, memory_percent=41.6, stage_budget_bytes=512 << 20, resident=list(resident),
        credit=2, running=1, tasks_done=12, tasks_failed=1, compute_s=3.25,
        link=link,
    )  # fmt: skip


def report(**changes):
    places = [
        StagePlace(artifact=letter * 64, file_bytes=1_500_000, cost_s=0.0123, workers=workers)
        for letter, workers in (("a", ["w1"]), ("b", []))
    ]
    deployment = DeploymentRecord(
        name="resnet50",
        version=2,
        program="c" * 64,
        epoch=3,
        codec="zfp",
        tolerance=0.01,
        numerics="close",
        stages=places,
        interface='{"x": 1}',
    )
    fields = {
        "workers": [worker("w1", "ready", "a" * 64), worker("w2", "lost")],
        "deployments": [deployment],
        "counters": {"retries": 3.0, "none": 0.0},
    }
    return StatusReport(call=7, term=4, uptime_s=3725.0, **{**fields, **changes})


def printed(given):
    stream = io.StringIO()
    status.render(given, Console(file=stream, width=status.PLAIN_WIDTH))
    return stream.getvalue()


def test_versions_that_can_be_rolled_back_to_and_files_that_are_deployed():
    again = structs.replace(report().deployments[0], again=1, earlier=[7, 8], version=9)
    files = [
        ModelFileRecord(file="m.pt2", deployment="m", state="deployed", version=3),
        ModelFileRecord(file="n.pt2", deployment="n", state="failed", version=0, reason="no [archive]"),
    ]
    lines = [" ".join(line.split()) for line in printed(report(deployments=[again], files=files)).splitlines()]
    assert any(line.startswith("resnet50 version 9 (1 again), before it 7 and 8: program cccc") for line in lines)
    assert "m.pt2 deployed 3" in lines and "n.pt2 failed - no [archive]" in lines


def test_a_report_for_people():
    lines = [" ".join(line.split()) for line in printed(report()).splitlines()]
    assert lines[0] == "term 4, up 1 h 02 min, 1 of 2 workers ready"
    assert "w1 ready cpu x1 resnet50 1 1 of 2 42 % 536.9 MB - 12 1 0 3.2 s" in lines
    assert "w2 lost cpu x1 - 1 of 2 42 % 536.9 MB - 12 1 0 3.2 s" in lines
    assert "resnet50 version 2: program cccccccccccc, plan 3, codec zfp, tolerance 0.01, numerics close" in lines
    assert "1 w1 aaaaaaaaaaaa 1.5 MB 12.3 ms" in lines
    assert "2 none bbbbbbbbbbbb 1.5 MB 12.3 ms" in lines
    assert "retries 3" in lines


def test_the_slower_direction_of_a_link_is_shown():
    workers = [
        worker(f"w{number}", "ready", link=LinkRecord(latency_s=0.001, down_bytes_per_s=down, up_bytes_per_s=up))
        for number, (down, up) in enumerate([(12.5e6, 125e6), (1e9, 2.5e5)], 1)
    ]
    lines = [" ".join(line.split()) for line in printed(report(workers=workers)).splitlines()]
    assert any(line.startswith("w1") and "100 Mbit/s" in line for line in lines)
    assert any(line.startswith("w2") and "2.0 Mbit/s" in line for line in lines)


def test_slow_requests_are_shown_with_where_they_are():
    def request(name, age_s, workers=(), *, is_queued=False):
        return RequestRecord(
            request=name, deployment="resnet50", version=2, stage=1, age_s=age_s, left_s=10.0, is_queued=is_queued, workers=list(workers),
            attempts=2,
        )  # fmt: skip

    requests = [request("a-1", 4.25, ["w1"]), request("a-2", 3.0, is_queued=True), request("a-3", 2.0), request("a-4", 0.5)]
    lines = [" ".join(line.split()) for line in printed(report(requests=requests)).splitlines()]
    assert "a-1 resnet50 2 4.2 s 10.0 s w1 2" in lines
    assert "a-2 resnet50 2 3.0 s 10.0 s queued 2" in lines
    assert "a-3 resnet50 2 2.0 s 10.0 s - 2" in lines
    assert not any(line.startswith("a-4") for line in lines)


def test_an_empty_cluster_has_little_to_say():
    assert printed(report(workers=[], deployments=[], counters={})).splitlines() == [
        "term 4, up 1 h 02 min, 0 of 0 workers ready",
        "no deployments",
    ]


def test_a_report_as_json():
    plain = json.loads(json.dumps(status.to_plain(report())))
    assert plain["workers"][0]["device"]["numeric_class"] == "a class"
    assert plain["deployments"][0]["interface"] == {"x": 1}
    assert plain["counters"]["retries"] == 3
    assert "call" not in plain


def test_version_says_what_is_installed(capsys):
    assert main.main(["version"], {}) == 0
    out = capsys.readouterr().out
    assert out.startswith("adapt 0.")
    assert "protocol 1" in out and "torch" in out


@pytest.fixture
def silent_address():
    """An address where a port is taken but nobody speaks the protocol."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield f"tcp://127.0.0.1:{taken.getsockname()[1]}"


@pytest.mark.parametrize("by_variable", [True, False])
def test_an_unreachable_dispatcher_is_status_1_with_its_address(capsys, silent_address, by_variable):
    argv = ["status", "--timeout", "0.3"]
    if by_variable:
        assert main.main(argv, {"ADAPT_DISPATCHER": silent_address}) == 1
    else:
        assert main.main([*argv, "--dispatcher", silent_address], {}) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("adapt: ") and silent_address in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["status", "--dispatcher", "here"], "dispatcher='here': expected tcp://HOST:PORT"),
        (["status", "--timeout", "0"], "timeout=0: expected seconds"),
        (["deploy", "resnet50", "--stages", "many"], "stages='many': expected auto, or a number"),
        (["deploy", "resnet50", "--input-shape", "3x4"], "input-shape='3x4': expected sizes with commas"),
        (["deploy", "resnet50", "--model-args", "x"], "model-args='x': not JSON"),
        (["deploy", "resnet50", "--model-args", "[]"], "expected a JSON object"),
        (["demo", "--count", "0"], "count=0: expected 1 to"),
        (["demo", "--workers", "0"], "workers=0: expected 1 to"),
        (["demo", "--codec", "zip"], "codec='zip': expected one of"),
        (["demo", "--codec", "zfp", "--tolerance", "2"], "tolerance=2.0: expected a number above 0"),
        (["demo", "--images", "/nowhere"], "images='/nowhere': expected a folder"),
        (["demo", "--weights", "no/such.pth"], "weights='no/such.pth': there is no such file"),
        (["demo", "--json", "/nowhere/at/all.json"], "there is no such folder"),
    ],
)
def test_wrong_usage_is_status_2(capsys, argv, words):
    assert main.main(argv, {}) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.startswith("adapt: ") and err.count("\n") == 1


def test_a_command_is_needed(capsys):
    with pytest.raises(SystemExit) as caught:
        main.main([], {})
    assert caught.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_stages_and_shapes_are_read():
    assert deploy._stages("auto") == "auto"
    assert deploy._stages("4") == 4
    assert deploy.read_shape("3, 96,96") == [3, 96, 96]
    with pytest.raises(ConfigError):
        deploy.read_shape("3,-1")
