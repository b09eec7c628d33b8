"""What a cluster lacks that cannot hold a model, in words."""

from __future__ import annotations

from dataclasses import replace

from adapt.planning.devices import ClusterProfile
from adapt.planning.model import MEBIBYTE, LayerProfile, ModelProfile

MOST_DEVICES = 1024


def what_is_missing(model: ModelProfile, cluster: ClusterProfile) -> str:
    """For a cluster that cannot hold the model: the layer that fits nowhere, or how much more memory would do."""
    if not cluster.devices:
        return f"there is no worker; {model.name} needs {_mib(model.memory_bytes(0, len(model.layers)))} on one, or cut, on several"
    budget = _largest_budget(cluster)
    for number, layer in enumerate(model.layers):
        if (needed := model.memory_bytes(number, number + 1)) > budget:
            return _too_large(layer, needed, budget)
    return _too_little(model, cluster, budget)


def _too_large(layer: LayerProfile, needed: int, budget: float) -> str:
    weights = layer.heaviest_bytes or layer.weight_bytes
    workspace = f", of which its kernels take {_mib(layer.workspace_bytes)}" if layer.workspace_bytes else ""
    return (
        f"{layer.place} alone has {_mib(weights)} of weights, and no cut leads through it: its stage needs {_mib(needed)}{workspace}, "
        f"the largest stage budget is {_mib(budget)}; one worker with {_mib(needed)} or more is needed"
    )


def _too_little(model: ModelProfile, cluster: ClusterProfile, budget: float) -> str:
    whole = model.memory_bytes(0, len(model.layers))
    together = sum(device.budget_bytes or 0 for device in cluster.devices)
    words = (
        f"{model.name} has {_mib(model.weights_before[-1])} of weights and needs {_mib(whole)} in one piece; "
        f"the {len(cluster.devices)} stage budgets add up to {_mib(together)}, and no way to cut the model fits into them"
    )
    held = held_layers(model, [device.budget_bytes for device in cluster.devices])
    if held < len(model.layers):
        words += f": they hold it up to {model.layers[held].place}, and {_mib(model.memory_bytes(held, len(model.layers)))} are left over"
    more = _missing_devices(model, cluster, budget)
    if more is not None:
        words += f"; {more} more {'worker' if more == 1 else 'workers'} with {_mib(budget)} would do"
    return f"{words}, or {_mib(_missing_budget(model, len(cluster.devices)))} on each of the {len(cluster.devices)}"


def held_layers(model: ModelProfile, budgets: list[int | None]) -> int:
    """How many of the first layers fit, if every device takes as many as it can, the smallest budgets first. Not always the most."""
    held = 0
    for budget in sorted(budgets, key=lambda size: float("inf") if size is None else size):
        held = _furthest(model, held, float("inf") if budget is None else budget)
    return held


def _furthest(model: ModelProfile, begin: int, budget: float) -> int:
    """The furthest boundary that one stage from `begin` can reach."""
    return max((end for end in range(begin + 1, len(model.layers) + 1) if model.memory_bytes(begin, end) <= budget), default=begin)


def _missing_devices(model: ModelProfile, cluster: ClusterProfile, budget: float) -> int | None:
    """So many more of the largest budget are enough: those that are there hold the first layers, and each new one as many as it can."""
    held = held_layers(model, [device.budget_bytes for device in cluster.devices])
    for count in range(1, MOST_DEVICES):
        further = _furthest(model, held, budget)
        if further == len(model.layers):
            return count
        if further == held:
            return None
        held = further
    return None


def _missing_budget(model: ModelProfile, count: int) -> int:
    """The smallest budget with which so many equal devices hold the model, to a MiB."""
    low, high = 0, -(-model.memory_bytes(0, len(model.layers)) // MEBIBYTE)
    while high - low > 1:
        middle = (low + high) // 2
        if held_layers(model, [middle * MEBIBYTE] * count) == len(model.layers):
            high = middle
        else:
            low = middle
    return high * MEBIBYTE


def _largest_budget(cluster: ClusterProfile) -> float:
    budgets = [device.budget_bytes for device in cluster.devices]
    return float("inf") if None in budgets else max(budget for budget in budgets if budget is not None)


def with_budget(cluster: ClusterProfile, budget_bytes: int) -> ClusterProfile:
    """What if every worker had this stage budget?"""
    return replace(cluster, devices=tuple(replace(device, budget_bytes=budget_bytes) for device in cluster.devices))


def _mib(size: float) -> str:
    return "no limit" if size == float("inf") else f"{size / MEBIBYTE:.1f} MiB"
