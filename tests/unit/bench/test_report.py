"""bench/harness/report.py, plot.py, arguments.py and machine.py: figures, files, pictures, command lines."""

from __future__ import annotations

import json
import math
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from bench.harness import machine
from bench.harness.arguments import Options, build_parser, choose, read_options
from bench.harness.contest import Sample
from bench.harness.plot import Bar, Group, Lines, bars, lines
from bench.harness.report import Figure, file_name, number, rate_columns, read_csv, show, summarize, write_csv, write_json
from bench.harness.rounds import Result

FACTS = machine.Facts(cpu="a # b, c", cores=2)
SAMPLES = [
    Sample("fast", "one", 1, 200.0, 1e-3, 2e-3, {"cpu_us total": 10.0}),
    Sample("slow", "one", 1, 100.0, 2e-3, 4e-3),
    Sample("slow", "one", 2, 10.0, 2e-2, 4e-2),
    Sample("fast", "one", 2, 40.0, 1e-2, 2e-2, {"cpu_us total": 30.0}),
    Sample("fast", "two", 1, 7.0, 0.1, 0.2, {"messages_in per task": 2.0}),
]
FINITE = st.floats(1e-9, 1e9)


def test_a_summary_has_medians_spreads_and_ratios_within_rounds():
    fast, slow, alone = summarize(SAMPLES, reference="slow")
    assert (fast.contestant, slow.contestant, alone.setting) == ("fast", "slow", "two")
    assert fast.rate_per_s == Figure(120.0, 40.0, 200.0) and fast.rounds == 2
    assert fast.ratio == Figure(3.0, 2.0, 4.0), "twice and four times as fast; not 120 to 55"
    assert slow.ratio == Figure(1.0, 1.0, 1.0) and math.isnan(alone.ratio.median)
    assert fast.extra == {"cpu_us total": Figure(20.0, 10.0, 30.0)}


@given(st.lists(FINITE, min_size=1))
def test_a_figure_lies_within_its_spread(values):
    figure = Figure.of([*values, math.nan])
    assert min(values) == figure.low <= figure.median <= figure.high == max(values)


samples = st.builds(
    Sample,
    contestant=st.sampled_from(["adapt", "a, b", 'say "hi"']),
    setting=st.sampled_from(["64 in flight", "0.2 MB, 1 in flight"]),
    round=st.integers(1, 9),
    rate_per_s=FINITE,
    p50_s=FINITE,
    p99_s=FINITE,
    extra=st.dictionaries(st.sampled_from(["cpu_us client.main", "tasks"]), FINITE),
)


@given(taken=st.lists(samples, min_size=1))
def test_a_csv_gives_back_every_sample(tmp_path_factory, taken):
    path = tmp_path_factory.mktemp("csv") / "x.csv"
    write_csv(path, taken, FACTS)
    assert path.read_text().startswith("# cpu: a # b, c\n# cores: 2\ncontestant,setting,round")
    assert read_csv(path) == taken


def test_the_summary_is_strict_json(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, "try", summarize(SAMPLES, reference="slow"), Result(absent={"ray": "not installed"}), FACTS, reference="slow")
    content = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert content["machine"]["cores"] == 2 and content["absent"] == {"ray": "not installed"}
    assert content["figures"][0]["median_low_high"]["ratio"] == [3.0, 2.0, 4.0]
    assert content["figures"][2]["median_low_high"]["ratio"] == [None, None, None]


def test_a_table_for_each_setting_with_the_fastest_first(capsys):
    show(Console(width=120), summarize(SAMPLES, reference="slow"), rate_columns("tasks/s", reference="slow"))
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line]
    assert rows[0] == ["one"] and rows[2][:2] == ["fast", "120"] and rows[3][:2] == ["slow", "55.0"]
    assert rows[2][-1] == "3.00" and rows[-1][-1] == "-"


@pytest.mark.parametrize(("value", "text"), [(1234.5, "1,234"), (12.34, "12.3"), (1.234, "1.23"), (0.0, "0.00"), (math.nan, "-")])
def test_numbers_have_three_digits_that_count(value, text):
    assert number(value) == text


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5_000


def test_pictures_are_drawn(tmp_path):
    figure = Figure(2.0, 1.0, 3.0)
    groups = [
        Group("rate", "tasks/s", [Bar("adapt", figure, "(x 2)"), Bar("ray", figure * 100)], is_logarithmic=log) for log in (False, True)
    ]
    bars(tmp_path / "bars.png", "How many?", groups, foot="this machine " * 40)
    curves = {"adapt": [(0.2, figure), (3.2, figure * 2)], "tcp": [(0.2, figure)]}
    lines(tmp_path / "lines.png", "How fast?", [Lines("1 in flight", "MB", "MB/s", curves)])
    assert is_picture(tmp_path / "bars.png") and is_picture(tmp_path / "lines.png")


def test_a_file_is_named_by_bench_and_moment(tmp_path):
    path = file_name(tmp_path / "new", "dispatch", datetime(2026, 3, 4, 5, 6, 7), ".csv")  # noqa: DTZ001
    assert path.name == "dispatch-20260304-050607.csv" and path.parent.is_dir()


def test_the_machine_is_described():
    known = machine.facts()
    assert known["cores"] >= 1 and known["cpu"] and known["libzmq"] and known["pyzmq"]
    assert f"cores: {known['cores']}" in machine.lines(known) and str(known["python"]) in machine.in_words(known)


def read(*argv: str) -> Options:
    return read_options(build_parser("bench.x", "?", ["a", "b"]), argv)[0]


def test_the_command_line_becomes_options(tmp_path):
    assert read() == Options()
    assert read("--quick").rounds < Options().rounds and read("--quick").cell_s < Options().cell_s
    given = read("--quick", "--rounds", "1", "--only", "a, b", "--out", str(tmp_path), "--no-plot", "--scale", "0.5")
    assert (given.rounds, given.only, given.out, given.is_plotting) == (1, ("a", "b"), tmp_path, False)
    assert given.cell_s == pytest.approx(read("--quick").cell_s / 2)


@pytest.mark.parametrize("argv", [("--rounds", "0"), ("--rounds", "x"), ("--scale", "0"), ("--scale", "nan"), ("--scale", "inf")])
def test_nonsense_is_refused(argv):
    with pytest.raises(SystemExit) as ended:
        read(*argv)
    assert ended.value.code == 2


def test_contestants_are_chosen_in_the_order_of_the_bench(capsys):
    openers = {"a": 1, "b": 2, "c": 3}
    assert list(choose(openers, ())) == ["a", "b", "c"] and choose(openers, ("c", "a")) == {"a": 1, "c": 3}
    with pytest.raises(SystemExit) as ended:
        choose(openers, ("d",))
    assert ended.value.code == 2 and "a, b, c" in capsys.readouterr().err
