"""Rounds: who is measured when.

    round 1:  A(s t) B(s t) C(s t)      round 2:  C(s t) B(s t) A(s t)      round 3:  as round 1 ...

In each round every contestant has one turn, in which it is measured once under each setting (s, t). The order of turns is reversed in every
second round, so that nobody always comes after the same neighbour. A contestant is opened for its turn and closed after it: an idle system
of many processes is not free, and its neighbour would pay. `is_kept_open` opens all of them once instead, where opening takes long and
idling costs little.

In each turn a few inputs go first, unmeasured: they warm up, and their rate says how many make a cell of the wanted length.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from rich.console import Console
from rich.markup import escape

from bench.harness.contest import Array, Check, Contestant, Meter, Sample, WrongAnswerError, measure, same

Opener: TypeAlias = Callable[[], Contestant]
MakeMeters: TypeAlias = Callable[[], Sequence[Meter]]

HOW_TO_INSTALL = "pip install -e .[bench-peers]"
STRETCH_BYTES = 128 << 20  # of answers kept until they are compared; a longer cell is measured in several stretches
PROBE_S = 0.15  # a rate is believed from this long a stretch on


@dataclass(frozen=True, slots=True)
class Setting:
    """What is asked of everybody alike.

    Attributes:
        name: for tables and files.
        pool: different inputs; they are asked in turn, again and again. The same objects reach `check`, so it may look them up by `id`.
        in_flight: how many are under way at a time.
        check: input, output: whether the output is right.
        cell_s: how long one measurement shall take, about.
        least, most: bounds of the number of inputs in one measurement.
    """

    name: str
    pool: Sequence[Array]
    in_flight: int
    check: Check = same
    cell_s: float = 1.0
    least: int = 16
    most: int = 1_000_000

    def inputs(self, count: int) -> list[Array]:
        """`count` inputs, the pool over and over."""
        repeats = -(-count // len(self.pool))
        return (list(self.pool) * repeats)[:count]


@dataclass(slots=True)
class Result:
    """What a contest has brought: samples in the order in which they were taken, and who took no part or dropped out, and why."""

    samples: list[Sample] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)  # not installed
    failed: dict[str, str] = field(default_factory=dict)  # installed, but it broke


def order(names: Sequence[str], round: int) -> list[str]:
    """Of turns in a round, counted from 1."""
    return list(names) if round % 2 else list(reversed(names))


def contest(
    openers: Mapping[str, Opener],
    settings: Sequence[Setting],
    *,
    rounds: int,
    meters: MakeMeters = tuple,
    is_kept_open: bool = False,
    console: Console | None = None,
) -> Result:
    """Measure everybody in turns.

    Args:
        openers: name -> what makes the contestant; an ImportError, there or on entering, means that it is not installed.
        meters: makes what is read around each measurement, such as `CpuMeter`.
        console: for a line per measurement; none: silence.

    Raises:
        WrongAnswerError: somebody has answered wrongly. Whoever breaks otherwise drops out: see `Result.failed`.
    """
    console = console or Console(quiet=True)
    result = Result()
    with contextlib.ExitStack() as kept:
        is_open = _Kept(kept) if is_kept_open else None
        for round in range(1, rounds + 1):
            for name in order(list(openers), round):
                if name in result.absent or name in result.failed:
                    continue
                opened = openers[name] if is_open is None else is_open.opener(name, openers[name])
                _turn(name, opened, settings, round, meters, result, console)
    return result


class _Kept:
    """Contestants that stay open from their first turn to the end of the contest."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack, self._open = stack, dict[str, Contestant]()

    def opener(self, name: str, opener: Opener) -> Callable[[], AbstractContextManager[Contestant]]:
        @contextlib.contextmanager
        def opened() -> Iterator[Contestant]:
            if name not in self._open:
                self._open[name] = self._stack.enter_context(opener())
            yield self._open[name]

        return opened


def _turn(
    name: str,
    opener: Callable[[], AbstractContextManager[Contestant]],
    settings: Sequence[Setting],
    round: int,
    meters: MakeMeters,
    result: Result,
    console: Console,
) -> None:
    """One contestant under every setting. Nothing that it does wrong stops the others, but a wrong answer."""
    try:
        with opener() as contestant:
            spare_the_collector()
            for setting in settings:
                sample = replace(measure_cell(contestant, setting, round=round, meters=meters()), contestant=name)
                result.samples.append(sample)
                console.print(_line(sample), highlight=False, soft_wrap=True)
    except ImportError as error:
        result.absent[name] = f"{error}; {HOW_TO_INSTALL}"
        console.print(f"[dim]{escape(f'{name}: takes no part: {result.absent[name]}')}[/dim]", highlight=False, soft_wrap=True)
    except WrongAnswerError:
        raise
    except Exception as error:  # foreign systems fail in foreign ways
        result.failed[name] = f"{type(error).__name__}: {error}"
        console.print(f"[red]{escape(f'{name}: drops out in round {round}: {result.failed[name]}')}[/red]", highlight=False, soft_wrap=True)


def spare_the_collector() -> None:
    """What has been imported here, torch above all, takes a tenth of a second to look through; that is nobody's latency."""
    gc.collect()
    gc.freeze()


def measure_cell(contestant: Contestant, setting: Setting, *, round: int, meters: Sequence[Meter] = ()) -> Sample:
    """One contestant under one setting: a probe for warmth and the count of inputs, then the measurement."""
    rate_per_s = _probe(contestant, setting)
    count = min(max(_round_up(rate_per_s * setting.cell_s), setting.least), setting.most)
    per_stretch = stretch_length(setting, count)
    return measure(
        contestant,
        setting.inputs(per_stretch),
        in_flight=setting.in_flight,
        setting=setting.name,
        round=round,
        check=setting.check,
        stretches=-(-count // per_stretch),
        meters=meters,
    )


def stretch_length(setting: Setting, count: int) -> int:
    """How many inputs in one go: all, unless their answers would take too much memory; never fewer than are in flight twice."""
    largest = max((value.nbytes for value in setting.pool), default=1) or 1
    return min(count, max(STRETCH_BYTES // largest, 2 * setting.in_flight))


def _round_up(value: float) -> int:
    return int(-(-value // 1))


def _probe(contestant: Contestant, setting: Setting) -> float:
    """Answers per second, roughly."""
    count = max(2 * setting.in_flight, 4)
    probe_s = min(PROBE_S, setting.cell_s / 4)
    while True:
        count = min(count, setting.most, stretch_length(setting, count))
        run = contestant.run(setting.inputs(count), in_flight=setting.in_flight)
        grown = min(4 * count, setting.most, stretch_length(setting, 4 * count))
        if run.elapsed_s >= probe_s or grown <= count:
            return count / run.elapsed_s
        count = grown


def _line(sample: Sample) -> str:
    figures = f"{sample.rate_per_s:>10,.1f}/s   p50 {_time(sample.p50_s):>9}   p99 {_time(sample.p99_s):>9}"
    return f"[dim]round {sample.round}[/dim]  {escape(sample.contestant):<16} {escape(sample.setting):<20} {figures}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f} us" if seconds < 1e-2 else f"{seconds * 1e3:,.1f} ms"
