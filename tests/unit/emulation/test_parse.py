"""CLUSTER.toml: what it may say, what it becomes, and what is said about one that is wrong."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapt.emulation import ready
from adapt.emulation.description import HOST, OF_ETCD, DeviceSpec, Event, EventSpec, Kind, LinkSpec, RandomSpec
from adapt.emulation.parse import check_speed, load, parse, scaled
from adapt.emulation.schedule import expand
from adapt.emulation.values import WrongValueError, read_duration, read_moment, read_rate
from adapt.errors import ConfigError

PI = '[[device]]\nname = "pi"\n'
THREE = f"{PI}count = 3\n"
FRONT = '[[device]]\nname = "front"\nworker = false\n'  # a top-level key must stand before it
MIB = 1 << 20


def described(text):
    return parse(text, name="home.toml")


def event_of(text):
    (item,) = described(f"{PI}[[event]]\nat = '3 s'\ndevice = 'pi'\n{text}").events
    return item


# ── what it becomes ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_whole_description():
    spec = described("""
        name = "home"
        about = "two kinds of boards"
        seed = 7
        dispatcher = "front"
        [settings.dispatcher]
        lease_ttl = 2
        max_kept = "1MiB"
        [settings.worker]
        credit = 4
        [[device]]
        name = "pi"
        count = 3
        cores = 0.25
        memory = "256MiB"
        rate = "20 Mbit/s"
        latency = "2 ms"
        jitter = "1 ms"
        threads = 2
        accelerator = "cuda:0"
        present = false
        board = "Raspberry Pi 3B+"
        [[device]]
        name = "front"
        worker = false
        up = "1 MB/s"
        [[link]]
        between = ["pi-1", "front"]
        rate = "5 Mbit/s"
        [[event]]
        at = "10 s"
        kind = "crash"
        devices = ["pi-*"]
        for = "5 s"
        [[event]]
        at = "1 min"
        kind = "cut-up"
        device = "front"
        [[random]]
        kinds = ["crash", { kind = "slow", cores = 0.05 }]
        devices = ["pi-[23]", "pi-1"]
        every = "20 s"
        for = ["1 s", "4 s"]
        from = "5 s"
        until = "120 s"
        spare = 2
    """)
    pi = DeviceSpec(
        name="pi-2",
        cores=0.25,
        memory_bytes=256 * MIB,
        up_bytes_per_s=2.5e6,
        down_bytes_per_s=2.5e6,
        latency_s=0.002,
        jitter_s=0.001,
        threads=2,
        accelerator="cuda:0",
        is_present=False,
        board="Raspberry Pi 3B+",
    )
    assert [device.name for device in spec.devices] == ["pi-1", "pi-2", "pi-3", "front"]
    assert spec.device("pi-2") == pi
    assert spec.device("front") == DeviceSpec(name="front", has_worker=False, up_bytes_per_s=1e6)
    assert (spec.name, spec.about, spec.seed, spec.dispatcher) == ("home", "two kinds of boards", 7, "front")
    assert spec.dispatcher_settings == {"lease_ttl": 2, "max_kept": "1MiB"}
    assert spec.worker_settings == {"credit": 4}
    assert spec.links == (LinkSpec(between=("pi-1", "front"), bytes_per_s=5e6 / 8),)
    crashes = [EventSpec(event=Event(at_s=10.0, kind=Kind.CRASH, device=f"pi-{number}"), for_s=5.0) for number in (1, 2, 3)]
    assert spec.events == (*crashes, EventSpec(event=Event(at_s=60.0, kind=Kind.CUT_UP, device="front")))
    assert spec.random == (
        RandomSpec(
            templates=(Event(at_s=0.0, kind=Kind.CRASH, device=""), Event(at_s=0.0, kind=Kind.SLOW, device="", cores=0.05)),
            devices=("pi-1", "pi-2", "pi-3"),
            every_s=20.0,
            for_s=(1.0, 4.0),
            from_s=5.0,
            until_s=120.0,
            spared=2,
        ),
    )


def test_the_least_description():
    spec = described(PI)
    assert spec.devices == (DeviceSpec(name="pi"),)
    assert (spec.name, spec.dispatcher, spec.seed, spec.time_scale) == ("home", HOST, 0, 1.0)


def test_a_count_of_one_is_no_count():
    assert described(f"{PI}count = 1").devices == described(PI).devices


def test_a_file_gives_its_name(tmp_path):
    file = tmp_path / "My Lab (2).toml"
    file.write_text(PI)
    assert load(file).name == load(str(file)).name == "my-lab-2"


@pytest.mark.parametrize(
    ("text", "parameters"),
    [
        ("kind = 'slow'\ncores = 0.05", {"cores": 0.05}),
        ("kind = 'rate'\nrate = '8 Mbit/s'", {"up_bytes_per_s": 1e6, "down_bytes_per_s": 1e6}),
        ("kind = 'rate'\nup = '8 kbit/s'\ndown = '1 MB/s'", {"up_bytes_per_s": 1e3, "down_bytes_per_s": 1e6}),
        ("kind = 'delay'\nlatency = '50 ms'", {"latency_s": 0.05, "jitter_s": 0.0}),
        ("kind = 'delay'\nlatency = '50 ms'\njitter = '5 ms'", {"latency_s": 0.05, "jitter_s": 0.005}),
        ("kind = 'corrupt'\nper_mib = 2", {"corrupt_per_mib": 2.0}),
        ("kind = 'reset'", {}),
    ],
)
def test_events_take_the_parameters_of_their_kind(text, parameters):
    event = event_of(text).event
    assert event == Event(at_s=3.0, kind=event.kind, device="pi", **parameters)


def test_every_kind_can_be_described():
    needed = {Kind.SLOW: "cores = 1", Kind.RATE: "rate = '1 Mbit/s'", Kind.DELAY: "latency = '1 s'", Kind.CORRUPT: "per_mib = 1"}
    for kind in set(Kind) - OF_ETCD:
        assert event_of(f"kind = '{kind}'\n{needed.get(kind, '')}").event.kind is kind


ETCD_TOO = "membership = 'etcd'\n"


def test_etcd_has_events_of_its_own():
    spec = described(f"{ETCD_TOO}{PI}[[event]]\nat = '3 s'\nkind = 'crash-etcd'\nfor = '2 s'\n[[event]]\nat = '4 s'\nkind = 'restart-etcd'")
    assert spec.has_etcd
    assert [(item.event.kind, item.event.device, item.for_s) for item in spec.events] == [
        (Kind.CRASH_ETCD, "etcd", 2.0),
        (Kind.RESTART_ETCD, "etcd", None),
    ]
    drawn = described(f"{ETCD_TOO}{PI}[[random]]\nkinds = ['restart-etcd', 'crash-etcd']\nevery = '1 s'\nfor = '1 s'\nuntil = '9 s'")
    assert (drawn.random[0].devices, drawn.random[0].spared) == (("etcd",), 0)
    assert not described(PI).has_etcd and not described(f"membership = 'embedded'\n{PI}").has_etcd


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"membership = 'etc'\n{PI}", "membership='etc': there is no such; did you mean etcd?"),
        (
            f"{PI}[[event]]\nat = '1 s'\nkind = 'restart-etcd'",
            "kind='restart-etcd': a restart-etcd needs an etcd, which this cluster has not",
        ),
        (f"{ETCD_TOO}{PI}[[event]]\nat = '1 s'\nkind = 'restart-etcd'\ndevice = 'pi'", "device='pi': a restart-etcd happens to etcd"),
        (f"{ETCD_TOO}{PI}[[event]]\nat = '1 s'\nkind = 'restart-etcd'\nfor = '1 s'", "for='1 s': a restart-etcd is not undone"),
        (
            f"{ETCD_TOO}{THREE}[[random]]\nkinds = ['stop', 'crash-etcd']\nevery = '1 s'\nfor = '1 s'\nuntil = '9 s'",
            "a crash-etcd happens to etcd, a stop to a device; expected two tables",
        ),
        (
            f"{ETCD_TOO}{PI}[[random]]\nkinds = ['crash-etcd']\nevery = '1 s'\nfor = '1 s'\nuntil = '9 s'\nspare = 0",
            "spare=0: a crash-etcd happens to etcd, of which there is one; expected no such key",
        ),
        (f"{ETCD_TOO}{PI}[settings.worker]\nmembership = 'embedded'", "membership='embedded': the cluster has an etcd of its own"),
        (f"{ETCD_TOO}[[device]]\nname = 'etcd'", "expected another name"),
    ],
)
def test_what_is_wrong_about_etcd_is_refused(text, reason):
    with pytest.raises(ConfigError) as caught:
        described(text)
    assert reason in str(caught.value)


def test_random_events_are_by_default_for_all_that_have_a_worker():
    random = "[[random]]\nkinds = ['stop']\nevery = '1 s'\nfor = '1 s'\nuntil = '9 s'"
    assert described(f"dispatcher = 'front'\n{THREE}{FRONT}{random}").random[0].devices == ("pi-1", "pi-2", "pi-3")


# ── quantities ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [
        ("20 Mbit/s", 2.5e6),
        ("1Gbit/s", 1.25e8),
        ("500 kbit/s", 62500),
        ("8 bit/s", 1),
        ("2.5 MB/s", 2.5e6),
        ("1 MiB/s", 1 << 20),
        ("3 B/s", 3),
    ],
)
def test_rates_are_read(text, bytes_per_s):
    assert read_rate(text) == bytes_per_s


@pytest.mark.parametrize(
    "text", ["", "fast", "20 Mb/s", "20 Mbps", "20 mbit", "1e3 bit/s", "20 Mbit/s up", "0 bit/s", "-1 bit/s", "9999999 GB/s"]
)
def test_what_is_no_rate_is_refused(text):
    with pytest.raises(WrongValueError, match="expected"):
        read_rate(text)


@pytest.mark.parametrize(
    ("text", "duration_s"), [("50 ms", 0.05), ("2 s", 2), ("1.5min", 90), ("1 h", 3600), ("30 us", 3e-5), ("0 s", 0), ("30 µs", 3e-5)]
)
def test_durations_are_read(text, duration_s):
    assert read_moment(text) == pytest.approx(duration_s)


@pytest.mark.parametrize("text", ["", "soon", "2 sec", "-1 s", "1 s 2 ms", "99999999 h", None, True, ["1 s"]])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(WrongValueError, match="expected"):
        read_moment(text)


@pytest.mark.parametrize("value", [20, 2.5, "20", " 3 "])
@pytest.mark.parametrize(("read", "example"), [(read_rate, "20 Mbit/s"), (read_duration, "50 ms")])
def test_a_missing_unit_is_named_with_examples(value, read, example):
    with pytest.raises(WrongValueError, match=f"its unit is missing; expected a .* .{example}."):
        read(value)


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────

EVENT = f"{THREE}[[event]]\nat = '3 s'\n"
RANDOM = f"{THREE}[[random]]\nkinds = ['stop']\nevery = '1 s'\nfor = '1 s'\nuntil = '9 s'\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[[device]", "home.toml: not TOML"),
        (f"seed = {'9' * 5000}", "home.toml: not TOML"),
        (f"x = {'[' * 5000}", "home.toml: not TOML"),
        ("", "no device has a worker; expected at least one [[device]]"),
        (FRONT, "no device has a worker"),
        ("devices = 3", "home.toml: devices=3: there is no such key; did you mean device?"),
        ("xyzzy = 3", "expected name, about, seed"),
        ("[device]\nname = 'pi'", "expected tables under [[device]], with double brackets"),
        ("device = [3]", "home.toml: device 1: 3: expected a table"),
        (f"seed = -1\n{PI}", "home.toml: seed=-1: expected a whole number from 0"),
        (f"seed = true\n{PI}", "home.toml: seed=True: expected a whole number"),
        (f"seed = 0.5\n{PI}", "home.toml: seed=0.5"),
        (f'about = "a\\nb"\n{PI}', "expected a text of one line"),
        (f"name = 'My Lab'\n{PI}", "home.toml: name='My Lab': expected 1 to 31 small letters"),
        # devices
        ("[[device]]\ncores = 1", "home.toml: device 1: name is missing"),
        (f"{PI}core = 1", 'home.toml: device 1 ("pi"): core=1: there is no such key; did you mean cores?'),
        (f"{PI}cores = 0", 'home.toml: device 1 ("pi"): cores=0: expected a number from 0.001 to 1024'),
        (f"{PI}cores = 1025", "cores=1025: expected a number"),
        (f"{PI}cores = nan", "cores=nan: expected a number"),
        (f"{PI}cores = '1'", "cores='1': expected a number"),
        (f"{PI}memory = 256", "memory=256: expected at least 1MiB"),
        (f"{PI}memory = '256 megs'", "memory='256 megs': expected a size such as"),
        (f"{PI}memory = 0.5", "memory=0.5: expected a size such as"),
        (f"{PI}rate = 20", 'device 1 ("pi"): rate=20: its unit is missing; expected a rate such as "20 Mbit/s"'),
        (f"{PI}rate = '1 MB/s'\nup = '1 MB/s'", "up='1 MB/s': expected rate, for both directions, or up and down; not both"),
        (f"{PI}down = '0 bit/s'", "down='0 bit/s': expected more than 0"),
        (f"{PI}latency = 2", "latency=2: its unit is missing; expected a duration such as"),
        (f"{PI}latency = '-2 ms'", "latency='-2 ms': expected 0 s to"),
        (f"{PI}threads = 0", "threads=0: expected a whole number from 1"),
        (f"{PI}accelerator = 'gpu'", "accelerator='gpu': expected auto, cpu, or cuda:N"),
        (f"{PI}present = 'no'", "present='no': expected true or false"),
        (f"{PI}count = 0", "count=0: expected a whole number from 1 to 64"),
        (f"{PI}count = 40\n{PI.replace('pi', 'po')}count = 30", 'device 2 ("po"): with it there are 70 devices; expected at most 64'),
        (f"{PI}{PI}", "home.toml: device 2 (\"pi\"): name='pi': there is a device pi before it"),
        (f"{PI.replace('pi', 'pi-2')}{THREE}", "there is a device pi-2 before it"),
        ("[[device]]\nname = 'Pi'", "device 1 (\"Pi\"): name='Pi': expected 1 to 31 small letters, digits and dashes"),
        (f"[[device]]\nname = '{'a' * 30}'\ncount = 2", "expected a shorter name"),
        ("[[device]]\nname = 'dispatcher'", "name='dispatcher': expected another name"),
        # the dispatcher
        (f"dispatcher = 'pie'\n{PI}", "home.toml: dispatcher='pie': there is no such; did you mean pi?"),
        (f"dispatcher = 'pi'\n{THREE}", "did you mean pi-"),
        (
            f"{PI}{FRONT}",
            'device front: worker=false: it does not run the dispatcher either, which is on host; expected dispatcher = "front"',
        ),
        # settings
        (f"{PI}[settings.dispatchr]", "home.toml: settings: dispatchr={}: there is no such key; did you mean dispatcher?"),
        (f"settings = 3\n{PI}", "settings=3: expected a table"),
        (f"{PI}[settings.dispatcher]\nlease_tll = 2", "settings.dispatcher: lease_tll=2: there is no such key; did you mean lease_ttl?"),
        (f"{PI}[settings.dispatcher]\nlease_ttl = 'soon'", "settings.dispatcher: lease_ttl='soon': expected seconds"),
        (f"{PI}[settings.dispatcher]\nlease_ttl = 0.1", "settings.dispatcher: lease_ttl_s=0.1: expected more than heartbeat_s=0.5"),
        (f"{PI}[settings.dispatcher]\nlisten = 'tcp://127.0.0.1:0'", "the emulation sets this itself"),
        (f"{PI}[settings.worker]\nmemory_limit = '1GiB'", "the emulation sets this itself; expected memory in each [[device]]"),
        (f"{PI}[settings.worker]\ncredit = 0", "settings.worker: credit=0: expected 1 to 1024"),
        # links
        (f"{THREE}[[link]]\nrate = '1 MB/s'", "home.toml: link 1: between is missing"),
        (f"{THREE}[[link]]\nbetween = ['pi-1', 'pi-2']", "home.toml: link 1: rate is missing; expected it, as rate = "),
        (f"{THREE}[[link]]\nbetween = ['pi-1', 'po-2']\nrate = '1 MB/s'", "there is no such; did you mean pi-2?"),
        (f"{THREE}[[link]]\nbetween = ['pi-1', 'pi-1']\nrate = '1 MB/s'", "expected two different devices"),
        (f"{THREE}[[link]]\nbetween = ['pi-1']\nrate = '1 MB/s'", "expected two different devices"),
        (f"{THREE}[[link]]\nbetween = 'pi-1'\nrate = '1 MB/s'", 'expected a list such as ["pi-1", "pi-2"]'),
        (
            f"{THREE}[[link]]\nbetween = ['pi-1', 'pi-2']\nrate = '1 MB/s'\n[[link]]\nbetween = ['pi-2', 'pi-1']\nrate = '1 MB/s'",
            "link 2: between=['pi-2', 'pi-1']: this link is described already, in link 1",
        ),
        # events
        (f"{THREE}[[event]]\nkind = 'crash'\ndevice = 'pi-1'", "home.toml: event 1: at is missing"),
        (f"{EVENT}device = 'pi-1'", "event 1: kind is missing"),
        (f"{EVENT}kind = 'crsh'\ndevice = 'pi-1'", "event 1: kind='crsh': there is no such; did you mean crash?"),
        (f"{EVENT}kind = 3\ndevice = 'pi-1'", "kind=3: expected crash, join,"),
        (f"{EVENT}kind = 'crash'", 'device is missing; expected device = "pi-1" or devices = ["pi-*"]'),
        (f"{EVENT}kind = 'crash'\ndevice = 'pi-4'", "event 1: device='pi-4': there is no such; did you mean pi-"),
        (f"{EVENT}kind = 'crash'\ndevices = ['po-*']", "no device is called po-*; expected pi-1, pi-2 or pi-3"),
        (f"{EVENT}kind = 'crash'\ndevices = []", "expected a list such as"),
        (f"{EVENT}kind = 'crash'\ndevices = ['pi-1']\ndevice = 'pi-1'", "expected device or devices; not both"),
        (f"{EVENT}kind = 'crash'\ndevice = 'pi-1'\ncores = 1", "cores=1: a crash event does not take it; expected no parameter"),
        (f"{EVENT}kind = 'slow'\ndevice = 'pi-1'\nrate = '1 MB/s'", "a slow event does not take it; expected only cores"),
        (f"{EVENT}kind = 'slow'\ndevice = 'pi-1'", "event 1: cores is missing; expected it, as cores = 0.05"),
        (f"{EVENT}kind = 'rate'\ndevice = 'pi-1'\nup = '1 MB/s'", "rate is missing; expected rate = "),
        (f"{EVENT}kind = 'delay'\ndevice = 'pi-1'\njitter = '1 s'", "latency is missing"),
        (f"{EVENT}kind = 'corrupt'\ndevice = 'pi-1'", "per_mib is missing"),
        (f"{EVENT}kind = 'reset'\ndevice = 'pi-1'\nfor = '1 s'", "for='1 s': a reset is not undone"),
        (f"{EVENT}kind = 'join'\ndevice = 'pi-1'\nfor = '1 s'", "for='1 s': a join is not undone"),
        (f"{EVENT}kind = 'crash'\ndevice = 'pi-1'\nfor = '0 s'", "for='0 s': expected more than 0 s"),
        (
            f"dispatcher = 'front'\n{PI}{FRONT}[[event]]\nat = '1 s'\nkind = 'stop'\ndevice = 'front'",
            "device='front': front has no worker, which a stop is about",
        ),
        # random events
        (f"{THREE}[[random]]\nkinds = ['stop']\nevery = '1 s'\nfor = '1 s'", "home.toml: random 1: until is missing"),
        (RANDOM.replace("['stop']", "'stop'"), 'kinds=\'stop\': expected a list such as ["crash", "stop"]'),
        (RANDOM.replace("'stop'", "'join'"), "random 1: kinds 1: kind='join': it is what undoes others; expected crash,"),
        (RANDOM.replace("'stop'", "'crash', {kind = 'slow'}"), "random 1: kinds 2: cores is missing"),
        (RANDOM.replace("'stop'", "{kinds = 'slow'}"), "random 1: kinds 1: kinds='slow': there is no such key; did you mean kind?"),
        (RANDOM.replace("'stop'", "3"), "random 1: kinds 1: 3: expected a table"),
        (f"{RANDOM}from = '9 s'", "until='9 s': expected a moment after from, 9 s"),
        (RANDOM.replace("for = '1 s'", "for = '9 s'"), "for='9 s': expected less than what is between from and until"),
        (RANDOM.replace("for = '1 s'", "for = ['2 s', '1 s']"), "expected the shorter duration first"),
        (RANDOM.replace("for = '1 s'", "for = ['2 s']"), "expected one duration, or least and most"),
        (RANDOM.replace("every = '1 s'", "every = '1 us'"), "every='1 us': that is 9e+06 events until 9 s; expected at most 10000"),
        (f"{RANDOM}spare = 3", "spare=3: expected less than the number of devices, 3"),
        (f"{RANDOM}spare = -1", "spare=-1: expected a whole number"),
        (RANDOM.replace("count = 3", "count = 1"), "spare=1: expected less than the number of devices, 1; 1 is the default"),
        (f"{RANDOM}devices = ['po']", "no device is called po"),
        (
            f"dispatcher = 'front'\n{FRONT}{RANDOM}devices = ['*']",
            "devices=['*']: front has no worker, which a stop is about; expected a device with one",
        ),
    ],
)
def test_what_is_wrong_is_refused_with_place_key_value_and_expectation(text, reason):
    with pytest.raises(ConfigError) as caught:
        described(text)
    assert reason in str(caught.value)
    assert str(caught.value).startswith("home.toml: ")
    assert len(str(caught.value)) < 500


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"')
    with pytest.raises(ConfigError, match=r"latin\.toml: .*expected a TOML file"):
        load(tmp_path / "latin.toml")
    with pytest.raises(ConfigError, match="expected a TOML file"):
        load(tmp_path)
    with pytest.raises(ConfigError, match="no such file and no ready cluster of that name; did you mean pi3"):
        load("pi-3")


VALUES = st.recursive(
    st.none().map(lambda _: "1 s")
    | st.booleans()
    | st.integers(-5, 10**6)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["pi", "pi-1", "pi-*", "host", "1 MB/s", "2 s", "crash", "slow", "rate", "256MiB", "", "*", "[", "\x00"])
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["kind", "cores", "x"]), inner, max_size=3),
    max_leaves=4,
)
KEYS = {
    "device": ["name", "count", "cores", "memory", "rate", "up", "latency", "threads", "accelerator", "present", "worker", "board", "x"],
    "link": ["between", "rate"],
    "event": ["at", "kind", "device", "devices", "for", "cores", "rate", "down", "jitter", "per_mib"],
    "random": ["kinds", "devices", "every", "for", "from", "until", "spare"],
    "settings.dispatcher": ["lease_ttl", "heartbeat", "max_kept", "policy", "insecure", "listen", "x"],
    "settings.worker": ["credit", "drain_timeout", "name"],
}


def tables(name):
    return st.tuples(st.just(name), st.dictionaries(st.sampled_from(KEYS[name]), VALUES, max_size=6))


ARRAYS = st.one_of([tables(name) for name in ("device", "link", "event", "random")])


def as_toml(value):
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key} = {as_toml(item)}' for key, item in value.items())}}}"
    return f"[{', '.join(map(as_toml, value))}]" if isinstance(value, list) else json.dumps(value).replace("\x7f", "")


@given(st.lists(ARRAYS, max_size=3), tables("settings.dispatcher"), tables("settings.worker"))
def test_any_description_becomes_a_cluster_or_a_config_error(arrays, dispatcher, worker):
    lines = [THREE]
    headed = [(f"[[{name}]]", content) for name, content in arrays]
    for heading, content in [*headed, *((f"[{name}]", content) for name, content in (dispatcher, worker))]:
        lines += [heading, *(f"{key} = {as_toml(value)}" for key, value in content.items())]
    try:
        spec = described("\n".join(lines))
    except ConfigError as error:
        assert str(error).startswith("home.toml: ")
        return
    assert {item.event.device for item in spec.events} <= {device.name for device in spec.devices}
    scaled(spec, 2)


# ── speed ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_scaled_cluster_is_slower_in_everything():
    spec = described(f"""
        {THREE}
        cores = 0.5
        memory = "64MiB"
        up = "8 Mbit/s"
        latency = "2 ms"
        jitter = "1 ms"
        [[link]]
        between = ["pi-1", "pi-2"]
        rate = "8 Mbit/s"
        [[event]]
        at = "10 s"
        kind = "slow"
        device = "pi-1"
        cores = 0.1
        for = "5 s"
        [[event]]
        at = "10 s"
        kind = "delay"
        device = "pi-2"
        latency = "5 ms"
        [[random]]
        kinds = [{{ kind = "rate", rate = "8 Mbit/s" }}, {{ kind = "corrupt", per_mib = 3 }}]
        every = "2 s"
        for = ["1 s", "4 s"]
        from = "5 s"
        until = "120 s"
        [settings.dispatcher]
        lease_ttl = 3
        max_kept = "1MiB"
    """)
    slow = scaled(spec, 4)
    device = DeviceSpec(name="pi-1", cores=0.125, memory_bytes=64 * MIB, up_bytes_per_s=0.25e6, latency_s=0.008, jitter_s=0.004)
    assert slow.devices[0] == device
    assert slow.links[0].bytes_per_s == 0.25e6
    assert slow.events[0] == EventSpec(event=Event(at_s=40.0, kind=Kind.SLOW, device="pi-1", cores=0.025), for_s=20.0)
    assert slow.events[1].event == Event(at_s=40.0, kind=Kind.DELAY, device="pi-2", latency_s=0.02, jitter_s=0.0)
    rate = Event(at_s=0.0, kind=Kind.RATE, device="", up_bytes_per_s=0.25e6, down_bytes_per_s=0.25e6)
    corrupt = Event(at_s=0.0, kind=Kind.CORRUPT, device="", corrupt_per_mib=3.0)
    names = ("pi-1", "pi-2", "pi-3")
    assert slow.random[0] == RandomSpec(
        templates=(rate, corrupt), devices=names, every_s=8.0, for_s=(4.0, 16.0), from_s=20.0, until_s=480.0, spared=1
    )
    assert slow.time_scale == 4
    assert slow.dispatcher_settings["lease_ttl"] == 12.0
    assert slow.dispatcher_settings["silence"] == 8.0, "also what is not written waits longer"
    assert slow.dispatcher_settings["max_kept"] == "1MiB"
    assert "name" not in slow.worker_settings
    assert scaled(scaled(spec, 2), 2) == slow
    assert [(event.at_s, event.device, event.kind) for event in expand(slow)] == [
        (event.at_s * 4, event.device, event.kind) for event in expand(spec)
    ]


def test_a_scaled_device_without_a_share_has_a_part_of_one_core():
    assert scaled(described(PI), 4).devices == (DeviceSpec(name="pi", cores=0.25),)


def test_the_settings_of_a_scaled_cluster_are_still_possible():
    slow = scaled(described(PI), 1000)
    lines = [f"{key} = {value}" for key, value in slow.dispatcher_settings.items()]
    assert described(f"{PI}[settings.dispatcher]\n" + "\n".join(lines)).dispatcher_settings == slow.dispatcher_settings


@pytest.mark.parametrize("k", [0, 0.5, -1, float("nan"), float("inf"), 1001, True, "2"])
def test_an_impossible_time_scale_is_refused(k):
    with pytest.raises(ConfigError, match="expected a number from 1 to 1000"):
        scaled(described(PI), k)


@pytest.mark.parametrize(
    ("text", "arithmetic"),
    [
        (f"{PI}count = 5", "needs 5 × 1 = 5 cores; this machine has 2, of which 0.4 are kept"),
        (f"{PI}count = 5\n{PI.replace('pi', 'po')}cores = 0.1", "needs 5 × 1 + 1 × 0.1 = 5.1 cores"),
        (
            f"{PI}cores = 0.5\n[[event]]\nat = '1 s'\nkind = 'slow'\ndevice = 'pi'\ncores = 3",
            "needs 1 × 3 = 3 cores",
        ),
    ],
)
def test_more_speed_than_there_is_is_refused_with_the_arithmetic(text, arithmetic):
    with pytest.raises(ConfigError) as caught:
        check_speed(described(text), 2)
    assert arithmetic in str(caught.value)
    assert "1.6 are left" in str(caught.value)


@given(st.lists(st.none() | st.integers(1, 5000), min_size=1, max_size=20), st.integers(1, 16))
def test_the_time_scale_that_is_offered_fits_and_is_the_least_of_two_digits(thousandths, host_cores):
    tables = ["" if share is None else f"cores = {share / 1000}" for share in thousandths]
    spec = described("\n".join(f"[[device]]\nname = 'd{number}'\n{line}" for number, line in enumerate(tables)))
    need = sum(1.0 if share is None else share / 1000 for share in thousandths) / (host_cores - 0.4)
    try:
        check_speed(spec, host_cores)
    except ConfigError as error:
        if "--time-scale" not in str(error):
            smallest = min(share / 1000 for share in thousandths if share is not None)
            assert "smaller shares or fewer devices" in str(error) and smallest / (need * 1.1) < 0.001
            return
        offered = float(str(error).rpartition("--time-scale ")[2])
        digit = 10.0 ** (math.floor(math.log10(offered)) - 1)
        assert offered / digit == pytest.approx(round(offered / digit)), "two digits"
        assert offered - digit < need, "one less would not do"
        check_speed(scaled(spec, offered), host_cores)
    else:
        assert need <= 1 + 1e-6


def test_a_cluster_that_is_slower_already_is_offered_the_whole_scale():
    with pytest.raises(ConfigError, match=r"--time-scale 3\.2$"):
        check_speed(scaled(described(f"{PI}count = 5"), 2), 2)


@pytest.mark.parametrize(
    ("text", "scale", "named"),
    [
        (f"{PI}cores = 0.05", 1000, r"with time scale 1000 device pi has 5e-05 cores; expected at least 0\.001.* time scale is 50$"),
        (
            f"{PI}cores = 1\n[[event]]\nat = '1 s'\nkind = 'slow'\ndevice = 'pi'\ncores = 0.0125",
            100,
            r"event 1, the slow of pi at 100 s, has .* time scale is 12\.5$",
        ),
    ],
)
def test_a_share_that_is_too_small_for_the_kernel_is_refused_by_name(text, scale, named):
    with pytest.raises(ConfigError, match=named):
        check_speed(scaled(described(text), scale), 2)
    check_speed(scaled(described(text), 12.5), 2)


DIGITS = "9" * 400


@pytest.mark.parametrize(
    "text",
    [
        f"{PI}cores = {DIGITS}",
        f"{PI}memory = {DIGITS}",
        f"{PI}memory = '{DIGITS}GiB'",
        f"{PI}rate = '{DIGITS} Mbit/s'",
        f"{PI}latency = '{DIGITS} s'",
        f"{PI}threads = {DIGITS}",
        f"seed = {DIGITS}\n{PI}",
        f"{PI}[settings.dispatcher]\nlease_ttl = {DIGITS}",
        f"{PI}[settings.worker]\ncredit = {DIGITS}",
        f"{PI}[settings.dispatcher]\nmax_kept = '{DIGITS}GiB'",
        f"{PI}[[event]]\nat = '1 s'\nkind = 'corrupt'\ndevice = 'pi'\nper_mib = {DIGITS}",
    ],
)
def test_a_number_of_hundreds_of_digits_is_refused(text):
    with pytest.raises(ConfigError):
        described(text)


TWO_ROLES = 'dispatcher = "pi"\n' + PI + "cores = 0.5\n{}[[device]]\nname = 'po'\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (TWO_ROLES.format('latency = "5 ms"\n'), "which runs on pi itself; expected them on the other devices"),
        (TWO_ROLES.format('jitter = "5 ms"\n'), "which runs on pi itself; expected them on the other devices"),
        (
            TWO_ROLES.format("") + '[[event]]\nat = "1 s"\nkind = "stall"\ndevices = ["p*"]',
            "which runs on pi itself; expected only the other",
        ),
        (TWO_ROLES.format("") + '[[event]]\nat = "1 s"\nkind = "reset"\ndevice = "pi"', "which runs on pi itself; expected only the other"),
    ],
)
def test_a_device_has_no_way_to_a_dispatcher_that_it_runs_itself(text, reason):
    with pytest.raises(ConfigError, match=reason):
        described(text)


def test_random_events_of_connections_leave_out_who_runs_the_dispatcher():
    drawn = '[[random]]\nkinds = ["crash", {}]\nevery = "1 s"\nfor = "1 s"\nuntil = "9 s"\nspare = 0'
    assert described(TWO_ROLES.format("") + drawn.format('"stall"')).random[0].devices == ("po",)
    assert described(TWO_ROLES.format("") + drawn.format('"cut"')).random[0].devices == ("pi", "po")


def test_ready_clusters_are_loaded_by_name():
    for name in ready.names():
        assert load(name).name == name
