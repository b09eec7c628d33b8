"""Bad input gets a clear, typed error that says what was wrong, and disturbs nobody else."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
import zmq

import adapt

pytestmark = pytest.mark.timeout(120)
torch = pytest.importorskip("torch")

X = np.ones((2, 6), np.float32)


def tiny() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3)
    ).eval()


@pytest.fixture(scope="module")
def cluster():
    with adapt.LocalCluster(workers=2, memory_limit="1MiB") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def client(cluster):
    with adapt.Client(cluster.address) as client:
        yield client


@pytest.fixture(scope="module")
def model(client):
    return client.deploy(tiny(), example_inputs=(torch.ones(2, 6),), name="tiny", stages=2)


@pytest.fixture
def still_right(model):
    """After whatever a test does, a good request is answered as before."""
    expected = model(X)
    yield
    assert np.array_equal(model(X), expected)


def words_of(error: BaseException, *words: str) -> None:
    for word in words:
        assert word in str(error), f"{word!r} should stand in: {error}"


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (np.ones((2, 5), np.float32), ["float32 (batch, 6)", "float32 (2, 5)"]),
        (np.ones((2, 6), np.float64), ["float32", "float64", "astype"]),
        (np.ones(6, np.float32), ["(6,)", "x[None]"]),
        ("a text", ["str", "numpy array"]),
        (np.ones((0, 6), np.float32), ["batch of 0"]),
    ],
)
def test_an_input_that_does_not_fit_is_named(model, still_right, x, words):
    with pytest.raises(adapt.InputMismatchError) as caught:
        model(x)
    words_of(caught.value, *words)


def test_too_many_inputs(model, still_right):
    with pytest.raises(adapt.InputMismatchError, match="expected 1 inputs"):
        model(X, X)


@pytest.mark.parametrize("deadline_s", [0, -1, float("nan")])
def test_an_impossible_deadline(model, still_right, deadline_s):
    with pytest.raises(adapt.ConfigError, match="deadline_s"):
        model(X, deadline_s=deadline_s)


def test_an_unknown_model_comes_with_suggestions(client, still_right):
    with pytest.raises(adapt.UnknownModelError, match="resnet18"):
        client.deploy("torchvision/resnet19")
    with pytest.raises(adapt.UnknownModelError, match="tiny"):
        client.model("tinny")
    with pytest.raises(adapt.UnknownModelError):
        client.undeploy("nothing")


@pytest.mark.parametrize("name", ["../../etc/passwd", "torchvision/../os", "x" * 10_000, "nul\0", "größe"])
def test_a_model_name_never_reaches_the_file_system(client, still_right, name):
    with pytest.raises(adapt.AdaptError):
        client.deploy(name)


@pytest.mark.parametrize("weights", ["../secret.safetensors", "/etc/passwd.safetensors", "no-such-file.safetensors"])
def test_weights_that_the_dispatcher_may_not_open(client, still_right, weights):
    with pytest.raises(adapt.AdaptError):
        client.deploy("torchvision/resnet18", weights=weights)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"codec": "zpf"}, "zfp"),
        ({"codec": "zfp"}, "tolerance"),
        ({"tolerance": -1.0}, "tolerance"),
        ({"stages": 0}, "stages=0"),
        ({"stages": "many"}, "auto"),
        ({"numerics": "sloppy"}, "exact"),
        ({"name": "a b"}, "letters"),
    ],
)
def test_an_impossible_option_is_named(client, still_right, options, words):
    with pytest.raises(adapt.ConfigError, match=words):
        client.deploy(tiny(), example_inputs=(torch.ones(2, 6),), **options)


def test_more_stages_than_the_model_allows(client, still_right):
    with pytest.raises(adapt.PlanError, match="at most"):
        client.deploy(tiny(), example_inputs=(torch.ones(2, 6),), stages=99, name="many")


def test_no_worker_with_memory_for_a_stage(client, still_right):
    """The workers have a budget of 1 MiB, a stage of this model needs more."""
    with pytest.raises(adapt.PlanError) as caught:
        client.deploy(torch.nn.Linear(1000, 1000), example_inputs=(torch.ones(2, 1000),), name="big", stages=1)
    words_of(caught.value, "memory", "MiB", "--memory-limit")


class Undecided(torch.nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x - 1


def test_a_model_that_cannot_be_exported_says_why(client, still_right):
    with pytest.raises(adapt.ExportError) as caught:
        client.deploy(Undecided(), example_inputs=(torch.ones(2, 6),), name="undecided")
    assert len(str(caught.value)) > 40
    with pytest.raises(adapt.ExportError, match="example_inputs"):
        client.deploy(tiny(), name="no-example")


class Raises(torch.nn.Module):
    """Takes indices into a table of four; an index beyond it makes the model itself raise."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(4, 3)

    def forward(self, x):
        return self.table(x)


def test_the_models_own_exception_comes_back(client, still_right):
    model = client.deploy(Raises(), example_inputs=(torch.zeros(2, 5, dtype=torch.int64),), name="raises", stages=1)
    with pytest.raises(adapt.ModelError, match="index"):
        model(np.full((2, 5), 9, np.int64))
    assert model(np.zeros((2, 5), np.int64)).shape == (2, 5, 3)


def test_nobody_listens_there():
    with pytest.raises(adapt.ConnectError, match=r"127\.0\.0\.1:1") as caught:
        adapt.Client("tcp://127.0.0.1:1", connect_timeout_s=0.5)
    words_of(caught.value, "0.5 s", "adapt-dispatcher")


def test_an_address_that_is_none():
    with pytest.raises(adapt.ConfigError, match="nonsense"):
        adapt.Client("nonsense")


def door(name: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"adapt.interfaces.cli.{name}", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_port_that_is_taken(cluster, still_right, tmp_path):
    result = door("dispatcher", "--listen", cluster.address, "--state-dir", str(tmp_path))
    assert result.returncode == 2 and cluster.address in result.stderr and "in use" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_state_directory_that_is_used(cluster, still_right):
    result = door("dispatcher", "--listen", "tcp://127.0.0.1:0", "--state-dir", str(cluster.directory / "state"))
    assert result.returncode == 2 and "another dispatcher" in result.stderr


def test_an_address_that_others_reach_needs_a_decision(tmp_path):
    result = door("dispatcher", "--listen", "tcp://0.0.0.0:0", "--state-dir", str(tmp_path))
    assert result.returncode == 2 and "--insecure" in result.stderr


def test_a_second_worker_of_one_name_is_refused(cluster, still_right, tmp_path):
    name = cluster.workers[0].name
    result = door("worker", "--dispatcher", cluster.address, "--name", name, "--cache-dir", str(tmp_path))
    assert result.returncode == 1 and name in result.stderr and "connected already" in result.stderr


def host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    return host, int(port)


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\xff" * 4096, os.urandom(4096), b""])
def test_bytes_of_strangers(cluster, still_right, data):
    with socket.create_connection(host_and_port(cluster.address), timeout=5) as stranger:
        stranger.sendall(data)


def test_messages_of_strangers(cluster, client, still_right):
    """A real ZeroMQ peer that speaks nonsense, in many ways, from many identities."""
    rng = random.Random(7)
    before = client.status().counters.get("malformed_messages", 0)
    context, strangers = zmq.Context(), []
    try:
        for number in range(40):
            stranger = context.socket(zmq.DEALER)
            strangers.append(stranger)
            stranger.set(zmq.LINGER, 0)
            stranger.set(zmq.IDENTITY, f"stranger{number}.c".encode())
            stranger.connect(cluster.address)
            frames = [rng.randbytes(rng.choice([0, 1, 2, 9, 10, 11, 300])) for _ in range(rng.randint(1, 6))]
            if number % 3 == 0:
                frames[0] = b"IR" + rng.randbytes(8)
            stranger.send_multipart(frames)
        pause = threading.Event()
        while client.status().counters["malformed_messages"] < before + 40:  # ends by the test's own time limit
            pause.wait(0.05)
    finally:
        for stranger in strangers:
            stranger.close(linger=0)
        context.term()
