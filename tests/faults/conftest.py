"""What the tests of faults share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapt.emulation import ownership
from tests.faults.clusters import FaultCluster
from tests.faults.nursery import Nursery
from tests.faults.traffic import Workload


@pytest.fixture(scope="session", autouse=True)
def nursery() -> Iterator[Nursery]:
    """Before all tests, so that no module of them leaves it behind; it costs nothing until it is asked for a process."""
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture(scope="session")
def workload() -> Workload:
    return Workload.of_layers()


@pytest.fixture
def cluster_of(nursery: Nursery, tmp_path: Path) -> Iterator[Callable[..., FaultCluster]]:
    """Starts a cluster for one test, and ends it; as `FaultCluster`."""
    clusters: list[FaultCluster] = []

    def start(workers: int = 3, **settings: object) -> FaultCluster:
        cluster = FaultCluster(nursery, tmp_path / f"cluster-{len(clusters)}", workers, **settings)  # type: ignore[arg-type]
        clusters.append(cluster)
        cluster.start()
        return cluster

    yield start
    for cluster in clusters:
        for worker in cluster.workers:
            if worker.is_alive:
                worker.kill()  # one that hangs, or is held, would be waited for
        cluster.close()


@pytest.fixture(scope="session")
def isolated() -> None:
    """Skips where devices cannot be isolated, and says why."""
    if missing := ownership.missing_rights():
        pytest.skip("; ".join(missing))


@pytest.fixture(scope="session")
def seed() -> int:
    """Of everything random; ADAPT_SEED repeats a run."""
    return int(os.environ.get("ADAPT_SEED", "1"))
