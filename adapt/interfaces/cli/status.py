"""adapt status: workers, deployments and counters."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

import msgspec
from rich.console import Console
from rich.markup import escape

from adapt.config import format_size
from adapt.interfaces.cli import clients
from adapt.interfaces.cli.doors import OK
from adapt.interfaces.tables import print_table
from adapt.models.program import UNCHANGED
from adapt.protocol.messages import DeploymentRecord, ModelFileRecord, RequestRecord, StatusReport, WorkerRecord

PLAIN_WIDTH = 120
DIGEST_SHOWN = 12
WORKER_COLUMNS = (
    "name",
    "state",
    "device",
    "stages",
    "running>",
    "memory>",
    "budget>",
    "link>",
    "tasks>",
    "failed>",
    "penalty>",
    "computing>",
)
REQUEST_COLUMNS = ("request", "stage", "age>", "left>", "with", "attempts>")
FILE_COLUMNS = ("file", "state", "version>", "reason")
SLOW_S = 1.0
STATE_STYLES = {"ready": "green", "suspect": "yellow", "draining": "yellow", "lost": "red"}


def add_to(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "status", help="workers, deployments and counters", description="Print the state of a cluster."
    )
    clients.add_options(parser)
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")
    return parser


def run(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    with clients.connected(options, environ) as client:
        report = client.status()
    if options.json:
        print(json.dumps(to_plain(report), indent=1))
    else:
        console = Console()
        render(report, console if console.is_terminal else Console(width=PLAIN_WIDTH))
    return OK


def to_plain(report: StatusReport) -> dict[str, Any]:
    """For JSON. `call` only pairs question and answer, and a model's interface is JSON itself."""
    plain = msgspec.to_builtins(report)
    del plain["call"]
    for deployment in plain["deployments"]:
        deployment["interface"] = json.loads(deployment["interface"])
    return plain


def render(report: StatusReport, console: Console) -> None:
    """Tables for people."""
    ready = sum(worker.state == "ready" for worker in report.workers)
    console.print(f"term {report.term}, up {_duration(report.uptime_s)}, {ready} of {len(report.workers)} workers ready", highlight=False)
    if report.workers:
        rows = [_worker(worker, report.deployments) for worker in report.workers]
        print_table(console, "workers", WORKER_COLUMNS, rows)
    for deployment in report.deployments:
        _print_deployment(deployment, console)
    if not report.deployments:
        console.print("no deployments", style="dim")
    if report.files:
        print_table(console, "files under --models-dir", FILE_COLUMNS, [_file(file) for file in report.files])
    if slow := [_request(request) for request in report.requests if request.age_s >= SLOW_S]:
        print_table(console, f"requests of more than {SLOW_S:g} s", REQUEST_COLUMNS, slow)
    if counters := {name: value for name, value in report.counters.items() if value}:
        rows = [(escape(name), format_size(int(value)) if name.endswith("_bytes") else f"{value:.15g}") for name, value in counters.items()]
        print_table(console, "counters since this dispatcher started", ("name", "value>"), rows)


def _worker(worker: WorkerRecord, deployments: list[DeploymentRecord]) -> tuple[str, ...]:
    style = STATE_STYLES.get(worker.state, "white")
    return (
        escape(worker.worker_id),
        f"[{style}]{escape(worker.state)}[/{style}]",
        escape(f"{worker.device.device} x{worker.device.threads}"),
        _stages_of(worker.resident, deployments),
        f"{worker.running} of {worker.credit}",
        f"{worker.memory_percent:.0f} %",
        _megabytes(worker.stage_budget_bytes),
        _link(worker),
        str(worker.tasks_done),
        str(worker.tasks_failed),
        _penalty(worker),
        f"{worker.compute_s:.1f} s",
    )


def _file(file: ModelFileRecord) -> tuple[str, ...]:
    style = {"deployed": "green", "failed": "red"}.get(file.state, "yellow")
    return escape(file.file), f"[{style}]{escape(file.state)}[/{style}]", str(file.version or "-"), escape(file.reason)


def _request(request: RequestRecord) -> tuple[str, ...]:
    where = f"{', '.join(request.workers) or '-'}{' (and waits for another)' if request.is_queued and request.workers else ''}"
    return (
        escape(request.request),
        escape(f"{request.deployment} {request.stage + 1}"),
        f"{request.age_s:.1f} s",
        f"{request.left_s:.1f} s",
        escape("queued" if request.is_queued and not request.workers else where),
        str(request.attempts),
    )


def _link(worker: WorkerRecord) -> str:
    """Of the two directions the slower one."""
    if worker.link is None:
        return "-"
    rate = min(worker.link.down_bytes_per_s, worker.link.up_bytes_per_s) * 8 / 1e6
    return f"{rate:,.0f} Mbit/s" if rate >= 10 else f"{rate:.1f} Mbit/s"


def _penalty(worker: WorkerRecord) -> str:
    words = f"{worker.penalty:.0f}"
    return words if worker.breaker == "closed" else f"[red]{words} {escape(worker.breaker)}[/red]"


def _stages_of(resident: list[str], deployments: list[DeploymentRecord]) -> str:
    """ "resnet50 1, 3": the loaded stages by deployment and number."""
    found = []
    for deployment in deployments:
        numbers = [str(number) for number, stage in enumerate(deployment.stages, start=1) if stage.artifact in resident]
        if numbers:
            found.append(f"{deployment.name} {', '.join(numbers)}")
    return escape("; ".join(found)) or "-"


def _print_deployment(deployment: DeploymentRecord, console: Console) -> None:
    tolerance = "" if deployment.tolerance is None else f", tolerance {deployment.tolerance:g}"
    again = f" ({deployment.again} again)" if deployment.again else ""
    earlier = f", before it {' and '.join(map(str, deployment.earlier))}" if deployment.earlier else ""
    changed = "" if deployment.arithmetic == UNCHANGED else f", {deployment.arithmetic}"
    title = (
        f"{deployment.name} version {deployment.version}{again}{earlier}: program {deployment.program[:DIGEST_SHOWN]}, plan {deployment.epoch}, "
        f"codec {deployment.codec}{tolerance}, numerics {deployment.numerics}{changed}"
    )
    rows = [
        (
            str(number),
            escape(", ".join(stage.workers)) or "[red]none[/red]",
            stage.artifact[:DIGEST_SHOWN],
            _megabytes(stage.file_bytes),
            f"{stage.cost_s * 1e3:.1f} ms",
        )
        for number, stage in enumerate(deployment.stages, start=1)
    ]
    print_table(console, title, ("stage>", "workers", "artifact", "size>", "predicted>"), rows)


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes < 1e9 else f"{size_bytes / 1e9:.1f} GB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
