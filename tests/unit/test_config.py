"""Settings: what goes over what, what is refused, and how it is said."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapt import config
from adapt.config import DispatcherConfig, WorkerConfig, check_address, dispatcher_address, is_loopback, parse_size
from adapt.errors import ConfigError

HOME = {"HOME": "/home/user"}


def options(cls, *argv):
    parser = argparse.ArgumentParser(exit_on_error=False)
    cls.add_options(parser)
    return parser.parse_args(argv)


def load_dispatcher(*argv, **environ):
    return DispatcherConfig.load(options(DispatcherConfig, *argv), HOME | environ)


def load_worker(*argv, **environ):
    return WorkerConfig.load(options(WorkerConfig, *argv), HOME | environ)


# --- precedence -------------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_documentation():
    loaded = load_dispatcher()
    assert loaded.listen == "tcp://127.0.0.1:5570"
    assert loaded.state_dir == Path("/home/user/.local/state/adapt/default")
    assert (loaded.heartbeat_s, loaded.lease_ttl_s, loaded.max_kept_bytes) == (0.5, 10.0, 256 << 20)
    assert loaded.models_dir is None and loaded.verify_share == 0.0
    assert load_worker().cache_dir == Path("/home/user/.cache/adapt")


def test_a_flag_goes_over_a_variable_over_the_file_over_the_default(tmp_path):
    file = tmp_path / "adapt.toml"
    file.write_text('[dispatcher]\nlease_ttl = 3\nsilence = 1.5\ngrace = 7\nmax_kept = "1MiB"\n[worker]\nthreads = 3\n')
    loaded = load_dispatcher("--config", str(file), "--lease-ttl", "5", ADAPT_LEASE_TTL="4", ADAPT_SILENCE="2.5")
    assert (loaded.lease_ttl_s, loaded.silence_s, loaded.grace_s, loaded.heartbeat_s) == (5.0, 2.5, 7.0, 0.5)
    assert loaded.max_kept_bytes == 1 << 20
    assert load_worker(ADAPT_CONFIG=str(file)).threads == 3


def test_every_setting_has_a_flag_a_variable_and_an_explanation():
    for cls in (DispatcherConfig, WorkerConfig):
        parser = argparse.ArgumentParser()
        cls.add_options(parser)
        text = " ".join(parser.format_help().split())
        for item in dataclasses.fields(cls):
            flag = "--" + item.name.removesuffix("_bytes").removesuffix("_s").replace("_", "-")
            if item.name == "etcd_password":  # other users of the machine read command lines
                assert f"{flag} " not in text
                continue
            assert flag in text
            assert " ".join(item.metadata["about"].split()) in text.replace("- ", "-")
    assert "(default: 10 s)" in " ".join(options_help(DispatcherConfig).split())


def options_help(cls):
    parser = argparse.ArgumentParser()
    cls.add_options(parser)
    return parser.format_help()


@pytest.mark.parametrize(
    ("flag", "variable", "field", "value"),
    [
        ("--max-retained", "ADAPT_MAX_RETAINED", "max_retained_bytes", "64MiB"),
        ("--drain-timeout", "ADAPT_DRAIN_TIMEOUT", "drain_timeout_s", "3.5"),
    ],
)
def test_flag_and_variable_mean_the_same(flag, variable, field, value):
    assert getattr(load_dispatcher(flag, value), field) == getattr(load_dispatcher(**{variable: value}), field)


def test_what_may_be_none_may_be_0():
    assert load_dispatcher().replan_interval_s == 30.0
    assert load_dispatcher("--replan-interval", "0").replan_interval_s == 0.0


def test_an_empty_variable_is_not_given():
    assert load_dispatcher(ADAPT_LISTEN="").listen == "tcp://127.0.0.1:5570"


def test_directories_follow_the_xdg_specification():
    assert load_dispatcher("--cluster", "lab", XDG_STATE_HOME="/state").state_dir == Path("/state/adapt/lab")
    assert load_dispatcher(XDG_STATE_HOME="relative").state_dir == Path("/home/user/.local/state/adapt/default")
    assert load_worker(XDG_CACHE_HOME="/cache").cache_dir == Path("/cache/adapt")
    assert load_dispatcher("--state-dir", "/here", XDG_STATE_HOME="/state").state_dir == Path("/here")


# --- the file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[dispatcher]\nlease_tll = 3", "dispatcher.lease_tll: there is no such setting; did you mean lease_ttl?"),
        ("[dispatcher]\nlease-ttl = 3", "did you mean lease_ttl?"),
        ("[dispatcher]\nxyzzy = 3", "expected one of listen, cluster"),
        ("[dispatchr]\nlisten = 3", "there is no such table; did you mean dispatcher?"),
        ("listen = 'tcp://127.0.0.1:1'", "there is no such table; expected one of dispatcher, worker"),
        ("dispatcher = 3", "expected a table, [dispatcher]"),
        ("[dispatcher", "not TOML"),
        ("[dispatcher]\nlease_ttl = 'soon'", "lease_ttl='soon': expected seconds"),
        ("[dispatcher]\ninsecure = 'maybe'", "expected true or false"),
        ("[dispatcher]\nmax_requests = 1.5", "max_requests=1.5: expected a whole number"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path, text, reason):
    file = tmp_path / "adapt.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_dispatcher("--config", str(file))
    assert reason in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load_dispatcher("--config", str(tmp_path / "none.toml"))


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--lease-ttl", "0"], "lease_ttl_s=0.0: expected seconds, above 0"),
        (["--lease-ttl", "nan"], "lease_ttl_s=nan"),
        (["--replan-interval", "-1"], "replan_interval_s=-1.0: expected seconds, from 0"),
        (["--replan-interval", "nan"], "replan_interval_s=nan"),
        (["--replan-interval", "never"], "--replan-interval='never': expected a number"),
        (["--cooldown", "inf"], "cooldown_s=inf: expected seconds, from 0"),
        (["--lease-ttl", "inf"], "lease_ttl_s=inf"),
        (["--lease-ttl", "2 minutes"], "--lease-ttl='2 minutes': expected seconds"),
        (["--lease-ttl", "0.4"], "expected more than heartbeat_s=0.5"),
        (["--silence", "0.5"], "silence_s=0.5: expected more than heartbeat_s=0.5"),
        (["--max-kept", "12Q"], "--max-kept='12Q': expected a size such as"),
        (["--max-message", "12"], "max_message_bytes=12: expected 1MiB to 1024GiB"),
        (["--piece", "8MiB"], "piece_bytes=8388608: expected 16KiB to 1MiB"),
        (["--policy", "earliest"], "policy='earliest': expected earliest-finish"),
        (["--membership", "etcd"], "membership='etcd': expected embedded, or etcd://HOST:PORT"),
        (["--membership", "etcd://127.0.0.1:2379,"], "expected embedded, or etcd://HOST:PORT"),
        (["--membership", "etcd://127.0.0.1:0"], "expected embedded, or etcd://HOST:PORT"),
        (["--membership", "etcd://127.0.0.1:2379", "--etcd-ca", "/none"], "etcd_ca='/none': there is no such file"),
        (["--membership", "etcd://127.0.0.1:2379", "--etcd-user", "adapt"], "etcd_user: expected a password"),
        (["--advertise", "tcp://*:1"], "advertise='tcp://*:1': expected the host"),
        (["--cluster", "../etc"], "cluster='../etc': expected 1 to 64 letters"),
        (["--max-requests", "many"], "expected a whole number"),
        (["--max-requests", "0"], "max_requests=0: expected 1 to"),
        (["--verify-share", "1.5"], "verify_share=1.5: expected a share of all tasks, from 0 (none) to 1"),
        (["--verify-share", "-0.1"], "verify_share=-0.1: expected"),
        (["--verify-share", "half"], "--verify-share='half': expected a number"),
    ],
)
def test_an_impossible_setting_is_refused_with_key_value_and_expectation(argv, reason):
    with pytest.raises(ConfigError) as caught:
        load_dispatcher(*argv)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--threads", "0"], "threads=0: expected 1 to 1024"),
        (["--credit", "-1"], "credit=-1: expected 1 to 1024"),
        (["--device", "gpu"], "device='gpu': expected auto, cpu, or cuda:N"),
        (["--memory-limit", "0"], "memory_limit_bytes=0: expected bytes, above 0"),
        (["--name", "a b"], "name='a b': expected 1 to 64"),
        (["--dispatcher", "127.0.0.1:5570"], "expected tcp://HOST:PORT"),
        (["--membership", "etcd://127.0.0.1:2379", "--via", "127.0.0.1:5570"], "via='127.0.0.1:5570': expected tcp://HOST:PORT"),
        (["--via", "tcp://127.0.0.1:5570"], "expected --dispatcher tcp://127.0.0.1:5570"),
    ],
)
def test_an_impossible_setting_of_a_worker_is_refused(argv, reason):
    with pytest.raises(ConfigError) as caught:
        load_worker(*argv)
    assert reason in str(caught.value)


def test_a_configuration_made_in_code_is_checked_too(tmp_path):
    with pytest.raises(ConfigError, match="silence_s=-1"):
        DispatcherConfig(state_dir=tmp_path, silence_s=-1)
    with pytest.raises(ConfigError, match=r"pathlib\.Path"):
        DispatcherConfig(state_dir="here")


def test_a_worker_has_a_name_and_a_budget_of_its_own():
    loaded = load_worker()
    assert loaded.name.endswith(f"-{config.os.getpid()}")
    assert 0 < loaded.memory_limit_bytes <= config.available_memory_bytes()
    assert load_worker("--memory-limit", "512MiB").memory_limit_bytes == 512 << 20


def test_a_long_value_is_not_echoed_whole():
    with pytest.raises(ConfigError) as caught:
        load_dispatcher("--cluster", "x" * 10_000)
    assert len(str(caught.value)) < 300


# --- etcd -------------------------------------------------------------------------------------------------------------


def test_a_password_comes_from_a_variable_or_from_a_file_of_its_own(tmp_path):
    etcd = ["--membership", "etcd://127.0.0.1:2379,[::1]:2380", "--etcd-user", "adapt"]
    loaded = load_dispatcher(*etcd, ADAPT_ETCD_PASSWORD="secret")
    assert loaded.etcd.endpoints == ("127.0.0.1:2379", "[::1]:2380")
    assert loaded.etcd.password == "secret"
    assert "secret" not in repr(loaded) and "secret" not in repr(loaded.etcd)

    file = tmp_path / "password"
    file.write_text("hidden\n")
    file.chmod(0o600)
    assert load_worker(*etcd, "--etcd-password-file", str(file)).etcd.password == "hidden"
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="only its owner may read"):
        load_worker(*etcd, "--etcd-password-file", str(file))

    settings = tmp_path / "adapt.toml"
    settings.write_text('[worker]\netcd_password = "shown"\n')
    with pytest.raises(ConfigError, match="there is no such setting"):
        load_worker(*etcd, "--config", str(settings))


def test_a_password_does_not_leave_the_machine_in_clear():
    with pytest.raises(ConfigError, match="expected etcd_ca as well"):
        load_worker("--membership", "etcd://edge:2379", "--etcd-user", "adapt", ADAPT_ETCD_PASSWORD="secret")


def test_membership_is_embedded_unless_it_is_asked_for_otherwise():
    assert load_dispatcher().etcd is None
    assert load_worker().etcd is None


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [("512MiB", 512 << 20), ("1.5 GiB", 3 << 29), ("64MB", 64_000_000), ("123", 123), ("7b", 7), (" 2kib ", 2048), (99, 99)],
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-1MiB", "1M", "1 2MiB", "0x10", "1e3MiB", None, True, 1.5])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match="expected a size"):
        parse_size(text)


@given(st.integers(0, 1 << 50))
def test_a_size_survives_being_written_and_read(size):
    assert parse_size(config.format_size(size)) == size


# --- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("listen", ["tcp://0.0.0.0:5570", "tcp://*:5570", "tcp://192.168.1.5:5570", "tcp://eth0:5570", "tcp://[::]:5570"])
def test_an_exposed_address_needs_insecure(listen):
    with pytest.raises(ConfigError, match="--insecure"):
        load_dispatcher("--listen", listen)
    loaded = load_dispatcher("--listen", listen, "--insecure")
    assert loaded.is_exposed


@pytest.mark.parametrize(
    "listen", ["tcp://127.0.0.1:0", "tcp://127.8.9.1:5570", "tcp://localhost:5570", "tcp://[::1]:*", "ipc:///tmp/adapt", "tcp://lo:1"]
)
def test_a_loopback_address_needs_nothing(listen):
    assert not load_dispatcher("--listen", listen).is_exposed


def test_localhost_becomes_an_address_that_can_be_bound():
    assert load_dispatcher("--listen", "tcp://localhost:5570").listen == "tcp://127.0.0.1:5570"


@pytest.mark.parametrize(
    "address",
    [
        "",
        "5570",
        "127.0.0.1:5570",
        "tcp://127.0.0.1",
        "tcp://:5570",
        "tcp://h:99999",
        "tcp://h:x",
        "udp://h:1",
        "tcp://::1:1",
        "tcp://a b:1",
        "ipc://",
    ],
)
def test_what_is_no_address_is_refused(address):
    for is_listening in (True, False):
        with pytest.raises(ConfigError, match="listen="):
            check_address(address, key="listen", is_listening=is_listening)


@pytest.mark.parametrize("address", ["tcp://*:5570", "tcp://127.0.0.1:0", "tcp://127.0.0.1:*"])
def test_an_address_for_listening_cannot_be_connected_to(address):
    check_address(address, key="x", is_listening=True)
    with pytest.raises(ConfigError):
        check_address(address, key="x", is_listening=False)


def test_a_socket_path_that_is_too_long_is_refused():
    with pytest.raises(ConfigError, match="at most 107 bytes"):
        check_address("ipc:///" + "x" * 200, key="x", is_listening=True)


def test_the_address_of_client_without_arguments():
    assert dispatcher_address({}) == "tcp://127.0.0.1:5570"
    assert dispatcher_address({"ADAPT_DISPATCHER": "tcp://edge:5571"}) == "tcp://edge:5571"
    with pytest.raises(ConfigError, match="ADAPT_DISPATCHER='edge'"):
        dispatcher_address({"ADAPT_DISPATCHER": "edge"})


@given(st.text(max_size=40))
def test_any_text_is_judged_without_surprise(text):
    is_loopback(text)
    with contextlib.suppress(ConfigError):
        check_address(text, key="x", is_listening=True)
