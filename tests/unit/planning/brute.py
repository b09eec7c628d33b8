"""Small instances, and every plan of them: cuts, codecs, placement and, if asked, replicas. Nothing is shared with the solvers."""

from __future__ import annotations

import math
import random

from adapt.planning.cost import Layout, StageLayout
from adapt.planning.devices import ClusterProfile, DeviceProfile
from adapt.planning.model import NO_HANDLING, RAW, CodecProfile, Handling, LayerProfile, ModelProfile

MIB = 1 << 20


def drawn_model(draw, *, layers, codecs=1):
    made = [
        LayerProfile(
            place=f"layer{number}",
            cost_s=draw.choice([0.0, draw.uniform(0.001, 0.1), draw.uniform(0.001, 0.1)]),
            weight_bytes=draw.randrange(40) * MIB,
            peak_bytes=draw.randrange(6) * MIB,
            output_bytes=draw.randrange(1, 4 * MIB),
            end=number + 1,
            workspace_bytes=draw.randrange(6) * MIB,
        )
        for number in range(layers)
    ]
    choices = (
        RAW,
        CodecProfile(name="small", ratio=3.0, encode_bytes_per_s=100e6, decode_bytes_per_s=200e6),
        CodecProfile(name="tiny", ratio=6.0, encode_bytes_per_s=20e6, decode_bytes_per_s=40e6),
    )
    return ModelProfile("drawn", draw.randrange(1, 2 * MIB), tuple(made), choices[:codecs])


def drawn_cluster(draw, *, devices, is_direct=False, layers=0):
    kinds = [_kind(draw, number, layers) for number in range(draw.randint(1, devices))]
    chosen = tuple(_named(draw.choice(kinds), f"d{number}") for number in range(devices))
    if not is_direct:
        port = draw.choice([math.inf, math.inf, draw.uniform(5e6, 100e6)])
        return ClusterProfile(chosen, port_bytes_per_s=port, is_overlapped=draw.random() < 0.7)
    rates = [[draw.choice([2e6, 10e6, draw.uniform(1e6, 50e6)]) for _ in chosen] for _ in chosen]
    return ClusterProfile(chosen, pairs=tuple(tuple(row) for row in rates))


def _kind(draw, number, layers):
    return DeviceProfile(
        name=f"kind{number}",
        speed=draw.choice([0.25, 0.5, 1.0, 3.0]),
        budget_bytes=draw.choice([None, draw.randrange(20, 200) * MIB, draw.randrange(20, 200) * MIB]),
        down_bytes_per_s=draw.choice([math.inf, draw.uniform(2e6, 100e6)]),
        up_bytes_per_s=draw.choice([math.inf, draw.uniform(2e6, 100e6)]),
        latency_s=draw.choice([0.0, 0.01]),
        costs_s=tuple(draw.uniform(0.001, 0.1) for _ in range(layers)) if layers and draw.random() < 0.3 else None,
        handling=draw.choice([NO_HANDLING, Handling(draw.uniform(0, 0.02), draw.uniform(0, 2e-8))]),
    )


def _named(kind, name):
    return DeviceProfile(**{field: getattr(kind, field) for field in kind.__dataclass_fields__} | {"name": name})


def best_layout(model, cluster, *, has_replicas):
    """(bottleneck, layout) of the best plan, by looking at all; (inf, None) if there is none."""
    search = _Search(model, cluster, has_replicas)
    for codec in range(len(model.codecs)):
        search.go_on(0, codec, (), (codec,), frozenset(), 0.0, search.port_s(0, codec))
    return search.best


class _Search:
    def __init__(self, model, cluster, has_replicas):
        self.model, self.cluster, self.has_replicas = model, cluster, has_replicas
        self.best = (math.inf, None)
        self._times = {}

    def go_on(self, begin, entering, stages, codecs, used, worst_s, port_s):
        if max(worst_s, port_s) >= self.best[0]:
            return
        if begin == len(self.model.layers):
            self.best = (max(worst_s, port_s), Layout(stages, codecs))
            return
        for end in range(begin + 1, len(self.model.layers) + 1):
            for group in self._groups(used):
                link_s = self._link_s(stages, group, begin, entering)
                for leaving in range(len(self.model.codecs)):
                    time_s = max(link_s, self._together_s(begin, end, group, entering, leaving))
                    stage = StageLayout(begin, end, group)
                    port = port_s + self.port_s(end, leaving)
                    self.go_on(end, leaving, (*stages, stage), (*codecs, leaving), used | set(group), max(worst_s, time_s), port)

    def port_s(self, boundary, codec):
        if self.cluster.pairs is not None:
            return 0.0
        return self.model.crossing_bytes[boundary] / self.model.codecs[codec].ratio / self.cluster.port_bytes_per_s

    def _groups(self, used):
        free = [number for number in range(len(self.cluster.devices)) if number not in used]
        if not self.has_replicas:
            return [(number,) for number in free]
        return [tuple(n for place, n in enumerate(free) if mask >> place & 1) for mask in range(1, 1 << len(free))]

    def _link_s(self, stages, group, boundary, codec):
        if self.cluster.pairs is None or not stages:
            return 0.0
        sent = self.model.crossing_bytes[boundary] / self.model.codecs[codec].ratio
        return sent / self.cluster.pairs[stages[-1].devices[0]][group[0]]

    def _together_s(self, begin, end, group, entering, leaving):
        times = [self._time_s(begin, end, number, entering, leaving) for number in group]
        if math.inf in times:
            return math.inf
        return 0.0 if 0.0 in times else 1 / sum(1 / time for time in times)

    def _time_s(self, *stage):
        if stage not in self._times:
            self._times[stage] = self._fresh_time_s(*stage)
        return self._times[stage]

    def _fresh_time_s(self, begin, end, number, entering, leaving):
        model, device = self.model, self.cluster.devices[number]
        layers = model.layers[begin:end]
        arrives, leaves = model.crossing_bytes[begin], model.crossing_bytes[end]
        running = (layer.peak_bytes + layer.workspace_bytes for layer in layers)
        memory = sum(layer.weight_bytes for layer in layers) + max(arrives + leaves, *running)
        if device.budget_bytes is not None and memory > device.budget_bytes:
            return math.inf
        compute = sum(device.costs_s[begin:end]) if device.costs_s else sum(layer.cost_s for layer in layers) / device.speed
        coding = arrives / model.codecs[entering].decode_bytes_per_s + leaves / model.codecs[leaving].encode_bytes_per_s
        received, sent = arrives / model.codecs[entering].ratio, leaves / model.codecs[leaving].ratio
        compute += device.handling.task_s + device.handling.byte_s * (received + sent)
        down, up = received / device.down_bytes_per_s, sent / device.up_bytes_per_s
        if self.cluster.pairs is not None:
            down, up = down * (begin == 0), up * (end == len(model.layers))
        parts = (compute + coding / device.speed, down, up)
        return max(parts) if self.cluster.is_overlapped else sum(parts) + 2 * device.latency_s


def instances(count, seed, **limits):
    """(model, cluster) `count` times."""
    draw = random.Random(seed)
    for _ in range(count):
        layers = draw.randint(1, limits.get("layers", 7))
        codecs = draw.randint(1, limits.get("codecs", 3))
        is_direct = limits.get("is_direct", False)
        model = drawn_model(draw, layers=layers, codecs=codecs)
        yield model, drawn_cluster(draw, devices=draw.randint(1, limits.get("devices", 4)), is_direct=is_direct, layers=layers)
