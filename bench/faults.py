"""What does it cost when workers are killed, stopped, slowed and added?

    steady ▷ kill one ▷ restart it ▷ stop one (SIGSTOP) ▷ continue it ▷ slow one to a fifth ▷ restore it ▷ add one

A model of four stages on four workers, eight images in flight through the client that users have, each answer compared bit for bit with the
user's own eager module, each request accounted for. All settings are the defaults of ADAPT. Beside it a static chain: the same stage files,
one process each, nobody who looks after them; the first kill is its end.

Where this user may do that (root, network namespaces, control groups), each worker is an emulated device with 0.15 of a core, so that a
worker that dies takes its share along. Elsewhere they are plain processes that share the machine: those that are left get the dead one's
time, and none can be slowed.

    noticed     until the dispatcher's status, asked every 20 ms, says something else: the worker's state, the plan, a task that took too long
    gap         longest time without an answer
    lowest      lowest rate in half a second, as share of the steady one
    settled     rate in the second half of the phase, as share of the steady one: what the workers that are left can do as they are placed
    recovered   until a whole second is back at 90 % of the settled rate
    lost        ended in an error, or never; duplicated: answered twice; wrong: with other bits. They count where they end.

A restarted or added worker counts from the start of its process, which first has to import torch.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

import adapt
from adapt.emulation.ownership import missing_rights
from adapt.interfaces.tables import print_table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python bench/faults.py` too

from bench.contestants.adapt_stream import AdaptStream
from bench.contestants.chain import Chain, ChainStream
from bench.contestants.devices import CORES, Devices, IsolatedDevices, PlainDevices
from bench.harness.arguments import RESULTS
from bench.harness.contest import Array
from bench.harness.cpu import OthersMeter
from bench.harness.ledger import Ledger, Request
from bench.harness.machine import Facts, facts, in_words, lines
from bench.harness.plot_time import GONE, STALLED, WELL, Curve, Mark, draw_timeline
from bench.harness.present import wide_console
from bench.harness.report import Figure, file_name, number
from bench.harness.story import PAST, Cost, Phase, Step, Story, costs, counts_for, moments
from bench.harness.timeline import rates
from bench.harness.watch import Watch
from bench.workloads.vision import SEED, answers, images

QUESTION = "What does a failure cost?"
MODEL, SIDE = "mobilenet_v2", 128
WORKERS, SPARE, STAGES = 4, 1, 4
SHAPE = (1, 3, SIDE, SIDE)
IN_FLIGHT = 8
POOL = 32  # different inputs: an answer to another request is a wrong one
SLOWED = 0.2  # of its share
WARM_S = 1.5
SILENCE_S = 3.0  # how long the chain is watched after its end
RESIDENT_TIMEOUT_S = 60.0
DRAWN_WINDOW_S = 0.5
CHAIN_ENDS = "the static chain never comes back"
QUICK_STEPS_S = 110.0  # after that a quick run begins no further step: on a machine full of other work even starting a process takes long
KEPT_STEPS = 2  # but these

ENDS = {"kill": "restart", "stop": "continue", "slow": "restore"}
COLORS = {"kill": GONE, "stop": STALLED, "slow": STALLED}


def steps(scale: float) -> list[Step]:
    """The phases in the order of the head of this file."""
    plan = [("steady", "", 7), ("kill", "w2", 7), ("restart", "w2", 6), ("stop", "w3", 8), ("continue", "w3", 5)]
    plan += [("slow", "w1", 7), ("restore", "w1", 5), ("add", "w5", 6)]
    return [Step(action, device, length_s * scale) for action, device, length_s in plan]


# ── one round ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Own:
    """For the meter of what others do: our processes, those that live."""

    devices: Devices
    name: str = "adapt"

    def processes(self) -> dict[str, int]:
        return {"client": os.getpid(), **self.devices.pids()}


def perform(step: Step, devices: Devices) -> None:
    """Returns when it is done: for a worker that starts, when that is ready."""
    match step.action:
        case "kill":
            devices.kill(step.device)
        case "restart" | "add":
            devices.begin(step.device)
        case "stop":
            devices.stop(step.device)
        case "continue":
            devices.resume(step.device)
        case "slow":
            devices.slow(step.device, SLOWED)
        case "restore":
            devices.restore(step.device)


def play(plan: Sequence[Step], devices: Devices, watch: Watch, console: Console, *, until: float = math.inf) -> list[Phase]:
    """Do it all, one after the other. Moments are those of the machine's clock; what would begin after `until` is left out,
    but for steady and kill."""
    phases, began = list[Phase](), time.monotonic()
    for step in plan:
        if len(phases) >= KEPT_STEPS and time.monotonic() > until:
            console.print(f"[red]{step.words}: left out, this machine is too busy for three minutes[/red]", highlight=False)
            continue
        phases.append(_phase(step, devices, watch))
        at_s = phases[-1].at_s - began
        console.print(f"[dim]{at_s:7.1f} s[/dim]  {step.words:<18}[dim]then {_placed(watch)}[/dim]", highlight=False)
    return phases


def _phase(step: Step, devices: Devices, watch: Watch) -> Phase:
    looks = watch.looks()
    held = looks[-1].stages_of(step.device) if looks else []
    at_s = time.monotonic()
    perform(step, devices)
    meter, own = OthersMeter(), Own(devices)
    meter.begin(own)  # type: ignore[arg-type]
    time.sleep(step.length_s)
    meter.end(own)  # type: ignore[arg-type]
    return Phase(step, at_s, time.monotonic(), tuple(held), meter.figures(1)["others_cores"])


def _placed(watch: Watch) -> str:
    """Which stages are where now."""
    looks = watch.looks()
    held = {worker: looks[-1].stages_of(worker) for worker in sorted(looks[-1].states)} if looks else {}
    return ", ".join(f"{worker}: {' '.join(str(stage + 1) for stage in stages)}" for worker, stages in held.items() if stages)


def tell(
    round: int,
    plan: Sequence[Step],
    pool: Sequence[Array],
    expected: Sequence[Array],
    *,
    is_isolated: bool,
    console: Console,
    until: float = math.inf,
) -> Story:
    """One round: the cluster through all phases, then the chain up to its end."""
    story = Story(round)
    with tempfile.TemporaryDirectory(prefix="bench-faults-") as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        devices: Devices = (IsolatedDevices if is_isolated else PlainDevices)(WORKERS, SPARE, directory / "adapt")
        stack.callback(devices.close)
        client = stack.enter_context(adapt.Client(devices.address))
        model = client.deploy(f"torchvision/{MODEL}", seed=SEED, stages=STAGES, codec="raw", input_shape=SHAPE[1:], name=MODEL)
        _wait_until_resident(client)
        ledger = Ledger(pool, expected)
        watch = stack.enter_context(Watch(devices.address, MODEL))
        stream = AdaptStream(model, ledger, IN_FLIGHT)
        time.sleep(WARM_S)
        phases = play(plan, devices, watch, console, until=until)
        stream.stop()
        began = phases[0].at_s
        story.phases = [replace(phase, at_s=phase.at_s - began, until_s=phase.until_s - began) for phase in phases]
        story.requests = _since(ledger.requests(), began)
        story.looks = [replace(seen, at_s=seen.at_s - began) for seen in watch.looks()]
        files = [directory / "adapt" / "state" / "artifacts" / f"{stage.artifact}.safetensors" for stage in model.record.stages]
        saved = [file.rename(directory / f"{place}.safetensors") for place, file in enumerate(files)]
        stack.close()
        _tell_of_chain(story, saved, directory / "chain", devices, Ledger(pool, expected), console)
    return story


def _wait_until_resident(client: adapt.Client) -> None:
    limit = time.monotonic() + RESIDENT_TIMEOUT_S
    while sum(bool(worker.resident) for worker in client.status().workers) < STAGES:
        if time.monotonic() > limit:
            raise TimeoutError(f"not every worker has its stage after {RESIDENT_TIMEOUT_S:g} s")
        time.sleep(0.05)


def _since(requests: Sequence[Request], began: float) -> list[Request]:
    return [replace(request, asked_s=request.asked_s - began, ended_s=request.ended_s - began) for request in requests]


def _tell_of_chain(story: Story, files: Sequence[Path], directory: Path, devices: Devices, ledger: Ledger, console: Console) -> None:
    """Steady, and killed at the same moment and stage as the cluster."""
    steady, killed = story.phases[:2]
    stage = killed.held[0] if killed.held else 0
    with devices.inside() as inside, Chain(files, directory, inside=[inside(f"w{place + 1}") for place in range(len(files))]) as chain:
        stream = ChainStream(chain, ledger, IN_FLIGHT)
        time.sleep(WARM_S)
        began = time.monotonic()
        time.sleep(steady.until_s)
        chain.kill(stage)
        story.chain_killed_s = time.monotonic() - began
        time.sleep(SILENCE_S)
        stream.stop()
    story.chain = _since(ledger.requests(), began)
    open_count = sum(not request.has_ended for request in story.chain)
    console.print(
        f"[dim]{story.chain_killed_s:7.1f} s[/dim]  static chain: stage {stage + 1} killed; {open_count} requests never ended",
        highlight=False,
    )


# ── showing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


HEADS = (
    "fault",
    "noticed>",
    "by",
    "longest gap>",
    "lowest>",
    "settled>",
    "recovered>",
    "p99>",
    "lost>",
    "duplicated>",
    "wrong>",
    "others>",
)
LEGEND = (
    "noticed: by the dispatcher, from the fault on. lowest: rate in 0.5 s, as share of the steady one; settled: in the second half of the "
    "phase. recovered: until a whole second is back at 90 % of the settled rate. others: cores that other work kept busy; above 0.1 the "
    "figures are those of a crowd."
)


def show_costs(console: Console, all_costs: Sequence[Cost]) -> None:
    """A line for each fault; medians over rounds, with the lowest and the highest in brackets."""
    by_action: dict[str, list[Cost]] = {}
    for cost in all_costs:
        by_action.setdefault(cost.action, []).append(cost)
    steady = by_action["steady"]
    rate, p99 = Figure.of(cost.rate_per_s for cost in steady), Figure.of(cost.p99_s for cost in steady)
    console.print(f"\nsteady: {_figure(rate)} images/s, p99 {_figure(p99, 's')}, longest gap {_of(steady, 'gap_s', 's')}", highlight=False)
    print_table(console, QUESTION, HEADS, [_line(group) for action, group in by_action.items() if action != "steady"])
    console.print(f"[dim]{LEGEND}[/dim]", highlight=False, soft_wrap=True)


def _line(group: Sequence[Cost]) -> list[str]:
    first = group[0]
    words = list(dict.fromkeys(cost.noticed_by for cost in group if cost.noticed_by))
    counts = [sum(getattr(cost, name) for cost in group) for name in ("lost", "duplicated", "wrong")]
    return [
        f"{first.device} {PAST[first.action]}",
        _of(group, "noticed_s", "s"),
        ", ".join(words) or "-",
        _of(group, "gap_s", "s"),
        _of(group, "lowest_share", "%"),
        _of(group, "settled_share", "%"),
        _of(group, "recovered_s", "s") if any(cost.recovered_s for cost in group) else "at once",
        _of(group, "p99_s", "s"),
        *(str(count) if count == 0 else f"[red]{count}[/red]" for count in counts),
        number(max(cost.others_cores for cost in group)),
    ]


def _of(group: Sequence[Cost], name: str, unit: str) -> str:
    return _figure(Figure.of(getattr(cost, name) for cost in group), unit, is_alone=len(group) == 1)


def _figure(figure: Figure, unit: str = "", *, is_alone: bool = False) -> str:
    if math.isnan(figure.median):
        return "-"
    texts = [f"{100 * value:.0f}" if unit == "%" else f"{value:.2f}" for value in (figure.median, figure.low, figure.high)]
    spread = "" if is_alone or figure.low == figure.high else f" ({texts[1]} – {texts[2]})"
    return f"{texts[0]} {unit}{spread}".strip()


def draw(path: Path, story: Story, machine: str, *, is_isolated: bool) -> None:
    """One round as a picture."""
    came, chain = moments(story.requests), moments(story.chain)
    chain_end_s = story.chain_killed_s + SILENCE_S
    curves = [
        Curve("ADAPT", _curve(came, story.end_s)),
        Curve("static chain", _curve(chain, chain_end_s), is_ours=False, ends_s=chain_end_s, ends_in_words=CHAIN_ENDS),
    ]
    latencies = [(request.ended_s, request.latency_s) for request in story.requests if request.answers and request.ended_s >= 0]
    which = f"{WORKERS} workers of {CORES:g} cores" if is_isolated else f"{WORKERS} workers without CPU shares"
    lost = sum(request.is_lost for request in story.requests)
    foot = (
        f"{MODEL}, {STAGES} stages on {which}, {IN_FLIGHT} in flight; rates in sliding windows of {DRAWN_WINDOW_S:g} s. Of {len(story.requests)} "
        f"requests {lost} were lost; of the chain's {len(story.chain)}, {sum(request.is_lost for request in story.chain)}. {machine}"
    )
    draw_timeline(path, QUESTION, curves, latencies, list(_marks(story)), span_s=(0.0, story.end_s), foot=foot)


def _curve(came: Sequence[float], end_s: float) -> list[tuple[float, float]]:
    return [(start + DRAWN_WINDOW_S / 2, rate) for start, rate in rates(came, 0.0, end_s, window_s=DRAWN_WINDOW_S)]


def _marks(story: Story) -> Iterator[Mark]:
    for phase, cost in zip(story.phases, costs(story), strict=True):
        if phase.step.action == "steady":
            continue
        ended = next(
            (later for later in story.phases if later.at_s > phase.at_s and later.step.action == ENDS.get(phase.step.action)), None
        )
        notes = [_note(cost), f"longest gap {cost.gap_s:.2f} s", f"then {100 * cost.settled_share:.0f} %"]
        color = COLORS.get(phase.step.action, WELL)
        yield Mark(phase.at_s, phase.step.words, notes, color, None if ended is None else ended.at_s)


def _note(cost: Cost) -> str:
    if math.isnan(cost.noticed_s):
        return "not noticed" if cost.action in ENDS else ""
    verb = {"restart": "joined", "add": "joined", "continue": "heard"}.get(cost.action, "noticed")
    return f"{verb} {cost.noticed_s:.2f} s"


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_requests(path: Path, stories: Sequence[Story], known: Facts) -> None:
    """Every request, one a line, after the facts as comments. Moments are seconds since the first phase began."""
    with _table(path, known) as writer:
        writer.writerow(["contestant", "round", "phase", "number", "asked_s", "ended_s", "latency_s", "answers", "is_right", "error"])
        for story in stories:
            for contestant, requests in (("adapt", story.requests), ("chain", story.chain)):
                for one in requests:
                    phase = _phase_of(one, story) if contestant == "adapt" else ""
                    first = [contestant, story.round, phase, one.number]
                    writer.writerow(
                        [*first, *map(_moment, (one.asked_s, one.ended_s, one.latency_s)), one.answers, one.is_right, one.error]
                    )


def _phase_of(request: Request, story: Story) -> str:
    return next((phase.step.action for phase in story.phases if counts_for(request, phase, story)), "before")


def _moment(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6f}"


def write_costs(path: Path, all_costs: Sequence[Cost], known: Facts) -> None:
    """Every fault of every round, one a line."""
    with _table(path, known) as writer:
        rows = [asdict(cost) for cost in all_costs]
        writer.writerow(rows[0])
        for row in rows:
            writer.writerow(_moment(value) if isinstance(value, float) else value for value in row.values())


@contextlib.contextmanager
def _table(path: Path, known: Facts) -> Iterator[Any]:
    with path.open("w", newline="", encoding="utf-8") as file:
        file.writelines(f"# {line}\n" for line in lines(known))
        yield csv.writer(file)


def write_all(
    out: Path, stories: Sequence[Story], all_costs: Sequence[Cost], known: Facts, *, is_plotting: bool, is_isolated: bool
) -> list[Path]:
    now = datetime.now()  # noqa: DTZ005 - of the person who looks for the file
    written = [file_name(out, "faults", now, ending) for ending in (".csv", "-costs.csv")]
    write_requests(written[0], stories, known)
    write_costs(written[1], all_costs, known)
    if is_plotting:
        path = file_name(out, "faults", now, ".png")
        quietest = min(stories, key=lambda story: max(phase.others_cores for phase in story.phases))
        with contextlib.suppress(ImportError):  # no matplotlib, no picture
            draw(path, quietest, in_words(known), is_isolated=is_isolated)
            written.append(path)
    return written


# ── the door ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def parser() -> argparse.ArgumentParser:
    built = argparse.ArgumentParser(
        prog="python bench/faults.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    built.add_argument("--quick", action="store_true", help="under three minutes: one round of short phases")
    built.add_argument("--rounds", type=int, metavar="N", help="how often everything happens (3; quick: 1)")
    built.add_argument("--scale", type=float, metavar="X", help="phases last X times as long (2.5; quick: 1)")
    built.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help=f"folder for files ({RESULTS})")
    built.add_argument("--no-plot", action="store_true", help="write figures, but no picture")
    built.add_argument("--no-isolation", action="store_true", help="plain processes that share this machine; none is slowed")
    return built


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0; 1 if a request was lost, duplicated or answered wrongly; 2 for a wrong command line."""
    door = parser()
    given = door.parse_args(argv)
    until = time.monotonic() + QUICK_STEPS_S if given.quick else math.inf
    rounds, scale = given.rounds or (1 if given.quick else 3), given.scale or (1.0 if given.quick else 2.5)
    if rounds < 1 or not 0 < scale < math.inf:
        door.error("expected a positive number of rounds, and a positive scale")
    console, known = wide_console(), facts()
    console.print(f"[bold]{QUESTION}[/bold]\n[dim]{escape(in_words(known))}[/dim]", highlight=False, soft_wrap=True)
    is_isolated, plan = _chosen(steps(scale), console, wants_isolation=not given.no_isolation)
    pool = images(POOL, shape=SHAPE)
    expected = answers(MODEL, pool, threads=1)
    stories = []
    for round in range(1, rounds + 1):
        console.print(f"\n[bold]round {round}[/bold]: {MODEL}, {STAGES} stages, {WORKERS} workers, {IN_FLIGHT} in flight", highlight=False)
        stories.append(tell(round, plan, pool, expected, is_isolated=is_isolated, console=console, until=until))
    all_costs = [cost for story in stories for cost in costs(story)]
    show_costs(console, all_costs)
    _show_sums(console, stories)
    written = write_all(given.out, stories, all_costs, known, is_plotting=not given.no_plot, is_isolated=is_isolated)
    console.print(f"\n[dim]written: {escape(', '.join(map(str, written)))}[/dim]", highlight=False, soft_wrap=True)
    return 0 if all(one.answers == 1 and one.is_right for story in stories for one in story.requests) else 1


def _chosen(plan: list[Step], console: Console, *, wants_isolation: bool) -> tuple[bool, list[Step]]:
    """Whether devices have CPU shares, and what is done then."""
    missing = missing_rights() if wants_isolation else ["not wanted"]
    if not missing:
        return True, plan
    why = escape("; ".join(missing))
    console.print(f"[dim]no CPU shares ({why}): workers share this machine, and none is slowed[/dim]", highlight=False, soft_wrap=True)
    return False, [step for step in plan if step.action not in ("slow", "restore")]


def _show_sums(console: Console, stories: Sequence[Story]) -> None:
    """Every request, whenever it was asked, beside what became of the chain's."""
    everything = [request for story in stories for request in story.requests]
    chain = [request for story in stories for request in story.chain]
    late = sum(story.looks[-1].counters.get("late_answers", 0) for story in stories if story.looks)
    counts = {
        "requests": len(everything),
        "lost": sum(one.is_lost for one in everything),
        "duplicated": sum(one.answers > 1 for one in everything),
        "wrong": sum(not one.is_right for one in everything),
        "second answers of workers that the dispatcher dropped": int(late),
    }
    console.print("\nADAPT: " + ", ".join(f"{name} {count}" for name, count in counts.items()), highlight=False, soft_wrap=True)
    lost = sum(one.is_lost for one in chain)
    console.print(f"static chain: requests {len(chain)}, lost {lost}; after the kill no answer came any more", highlight=False)
    for error, count in _errors(everything).items():
        console.print(f"[red]{count} ended in {escape(error)}[/red]", highlight=False, soft_wrap=True)


def _errors(requests: Sequence[Request]) -> dict[str, int]:
    found: dict[str, int] = {}
    for request in requests:
        if request.error:
            found[request.error] = found.get(request.error, 0) + 1
    return found


if __name__ == "__main__":
    sys.exit(main())
