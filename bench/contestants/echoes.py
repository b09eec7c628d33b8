"""Everybody who can echo an array, by name. A contestant's libraries are imported when it is opened; without them it takes no part."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial

from bench.harness.contest import Contestant
from bench.harness.rounds import Opener

Shape = tuple[int, ...]
REFERENCE = "relay-aio"


def openers(shapes: Sequence[Shape], *, with_limit: bool = False, with_duties: bool = False) -> dict[str, Opener]:
    """Name -> what opens it, for arrays of float32 in these shapes.

    Args:
        shapes: the first dimension of each is the batch.
        with_limit: whether the raw TCP connection takes part.
        with_duties: whether relays do that do part of ADAPT's work.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch RPC warns whenever a group ends; read when torch is imported
    found: dict[str, Opener] = {
        "adapt": lambda: _adapt(shapes),
        "adapt-async": lambda: _adapt_async(shapes),
        "relay-aio": lambda: _relay("aio"),
        "relay-drain": lambda: _relay("drain"),
        **(
            {"relay-messages": partial(_duties, with_scheduler=False), "relay-duties": partial(_duties, with_scheduler=True)}
            if with_duties
            else {}
        ),
        "torch-rpc": _torch_rpc,
        "ray": _ray,
        "dask": _dask,
    }
    return {**found, "tcp": _tcp} if with_limit else found


def _adapt(shapes: Sequence[Shape]) -> Contestant:
    from bench.contestants.adapt_cluster import AdaptCluster

    return AdaptCluster(shapes)


def _adapt_async(shapes: Sequence[Shape]) -> Contestant:
    from bench.contestants.adapt_cluster import AdaptAsync

    return AdaptAsync(shapes)


def _relay(idiom: str) -> Contestant:
    from bench.contestants.relay import Relay

    return Relay(idiom)


def _duties(*, with_scheduler: bool) -> Contestant:
    from bench.contestants.duties import duties

    return duties(with_scheduler=with_scheduler)


def _torch_rpc() -> Contestant:
    from bench.contestants.torch_rpc import TorchRpc

    return TorchRpc()


def _ray() -> Contestant:
    from bench.contestants.ray_actors import RayActors

    return RayActors()


def _dask() -> Contestant:
    from bench.contestants.dask_actors import DaskActors

    return DaskActors()


def _tcp() -> Contestant:
    from bench.contestants.tcp import TcpEcho

    return TcpEcho()
