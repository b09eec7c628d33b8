"""What planning knows about a model: its layers with seconds and bytes, and what codecs do to what crosses between them.

A layer is the smallest unit that the model may be cut at: the operators between two legal cuts. Boundary b lies before layer b; boundary 0
is the input, the last one the output. All figures are for a batch of one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

from adapt.errors import ConfigError

VERSION = 1
MEBIBYTE = 1 << 20
STANDARD_TOLERANCE = 0.1  # at which lossy codecs are measured; as a share of the tensor's standard deviation


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerProfile:
    """The operators between two legal cuts.

    Attributes:
        place: where people find it: the module of its heaviest operator.
        cost_s: seconds on the reference device, one thread.
        weight_bytes: of all its operators; a weight that two of them share counts once here, but in each layer that uses it.
        peak_bytes: most bytes of activations alive at once while it runs.
        output_bytes: cross the boundary after it.
        end: position of the cut after it among the program's operators.
        heaviest_bytes: weights of the operator at `place`.
        workspace_bytes: the most that the kernel of one of its operators takes besides its inputs and its result; 0: none, or not known.
    """

    place: str
    cost_s: float
    weight_bytes: int
    peak_bytes: int
    output_bytes: int
    end: int
    heaviest_bytes: int = 0
    workspace_bytes: int = 0

    @property
    def running_bytes(self) -> int:
        """Most bytes while it runs, its weights aside; more than it takes if the two are not of the same operator."""
        return self.peak_bytes + self.workspace_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecProfile:
    """What a codec does: bytes of the tensor per byte sent, and bytes of the tensor per second of one thread of the reference device.

    Attributes:
        ratios: measured at each boundary; empty: `ratio` everywhere.
    """

    name: str
    ratio: float = 1.0
    encode_bytes_per_s: float = math.inf
    decode_bytes_per_s: float = math.inf
    ratios: tuple[float, ...] = ()

    @property
    def is_lossy(self) -> bool:
        return self.name.startswith("zfp")

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> CodecProfile:
        """From its plain form, in which a speed that is missing or null is infinite. Raises ValueError, TypeError, KeyError."""
        name, ratio = str(plain["name"]), float(plain["ratio"])
        speeds = {key: math.inf if plain.get(key) is None else float(plain[key]) for key in ("encode_bytes_per_s", "decode_bytes_per_s")}
        return cls(name=name, ratio=ratio, ratios=tuple(float(each) for each in plain.get("ratios", ())), **speeds)

    def ratio_at(self, boundary: int) -> float:
        return self.ratios[boundary] if self.ratios else self.ratio

    def times(self, factor: float) -> CodecProfile:
        """On a device that is so much faster."""
        speeds = (self.encode_bytes_per_s * factor, self.decode_bytes_per_s * factor)
        return replace(self, encode_bytes_per_s=speeds[0], decode_bytes_per_s=speeds[1])


RAW = CodecProfile(name="raw")


@dataclass(frozen=True, slots=True)
class Handling:
    """What a worker does with a task besides computing and codecs: taking it from the wire, checking it, sending its answer.

    Attributes:
        task_s: for each task.
        byte_s: for each byte that it receives or sends.
    """

    task_s: float = 0.0
    byte_s: float = 0.0

    def __post_init__(self) -> None:
        if not all(math.isfinite(value) and value >= 0 for value in (self.task_s, self.byte_s)):
            raise ValueError(f"handling of {self.task_s:g} s a task and {self.byte_s:g} s a byte: expected finite seconds, not negative")

    def times(self, factor: float) -> Handling:
        return Handling(self.task_s * factor, self.byte_s * factor)

    def at_share(self, cores: float) -> Handling:
        """Of a worker whose control group allows it so many cores, from that of a whole one; 0: no limit."""
        return self if cores <= 0 or cores >= 1 else self.times(1.0 / cores)


NO_HANDLING = Handling()


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredCosts:
    """What a model takes on one kind of device.

    Attributes:
        device_class: all that the seconds depend on, in words.
        workers: of this kind; the first one was measured.
        threads: that one operator uses.
        cores: that its control group allows a worker; 0: no limit.
        costs_s: seconds of each layer.
        handling: seconds of the processor, as if it had a whole core.
    """

    device_class: str
    workers: tuple[str, ...]
    threads: int
    cores: float
    costs_s: tuple[float, ...]
    handling: Handling = NO_HANDLING


@dataclass(frozen=True)
class ModelProfile:
    """A model as the planner sees it.

    Attributes:
        codecs: what may be used; the first one is what plans use that do not choose.
        measured: on kinds of devices, where that has been done.
    """

    name: str
    input_bytes: int
    layers: tuple[LayerProfile, ...]
    codecs: tuple[CodecProfile, ...] = (RAW,)
    reference: str = field(default="", compare=False)  # the device that was measured, in words
    measured: tuple[MeasuredCosts, ...] = ()

    def __post_init__(self) -> None:
        if not self.layers or not self.codecs:
            raise ConfigError(f"{self.name}: a profile has at least one layer and one codec")
        numbers = [
            value
            for layer in self.layers
            for value in (layer.cost_s, layer.weight_bytes, layer.peak_bytes, layer.output_bytes, layer.workspace_bytes)
        ]
        if not all(math.isfinite(value) and value >= 0 for value in [self.input_bytes, *numbers]):
            raise ConfigError(f"{self.name}: seconds and bytes of a profile are finite and not negative")
        for kind in self.measured:
            if len(kind.costs_s) != len(self.layers) or not all(math.isfinite(cost) and cost >= 0 for cost in kind.costs_s):
                raise ConfigError(
                    f"{self.name}: {kind.device_class}: expected the seconds of {len(self.layers)} layers, finite, not negative"
                )
        for codec in self.codecs:
            given = (codec.ratio, codec.encode_bytes_per_s, codec.decode_bytes_per_s, *codec.ratios)
            if not all(value > 0 for value in given) or len(codec.ratios) not in (0, len(self.layers) + 1):
                raise ConfigError(f"{self.name}: codec {codec.name}: figures above 0, and ratios for all boundaries or none")

    @cached_property
    def crossing_bytes(self) -> tuple[int, ...]:
        """At each boundary, the input and the output included."""
        return (self.input_bytes, *(layer.output_bytes for layer in self.layers))

    @cached_property
    def seconds_before(self) -> tuple[float, ...]:
        """On the reference device, of all layers before each boundary."""
        return tuple(accumulate((layer.cost_s for layer in self.layers), initial=0.0))

    @cached_property
    def weights_before(self) -> tuple[int, ...]:
        return tuple(accumulate((layer.weight_bytes for layer in self.layers), initial=0))

    def memory_bytes(self, begin: int, end: int) -> int:
        """What the stage of layers `begin` to `end` needs: weights, and the most that is alive while one of its layers runs, activations and
        the kernels' workspace, or both of its ends. Workers count weights and both ends."""
        ends = self.crossing_bytes[begin] + self.crossing_bytes[end]
        running = max(layer.running_bytes for layer in self.layers[begin:end])
        return self.weights_before[end] - self.weights_before[begin] + max(running, ends)

    def without_workspace(self) -> ModelProfile:
        return replace(self, layers=tuple(replace(layer, workspace_bytes=0) for layer in self.layers))

    def wire_bytes(self, boundary: int, codec: int) -> float:
        """What is sent at a boundary with the codec of that number."""
        return self.crossing_bytes[boundary] / self.codecs[codec].ratio_at(boundary)

    def encode_s(self, boundary: int, codec: int) -> float:
        """Of one thread of the reference device."""
        return self.crossing_bytes[boundary] / self.codecs[codec].encode_bytes_per_s

    def decode_s(self, boundary: int, codec: int) -> float:
        return self.crossing_bytes[boundary] / self.codecs[codec].decode_bytes_per_s

    def costs_of(self, worker: str) -> tuple[float, ...] | None:
        """Seconds of each layer on a worker whose kind was measured."""
        return next((kind.costs_s for kind in self.measured if worker in kind.workers), None)

    def handling_of(self, worker: str) -> Handling:
        """Seconds at its share of the CPU; none if its kind was not measured."""
        return next((kind.handling.at_share(kind.cores) for kind in self.measured if worker in kind.workers), NO_HANDLING)

    def with_codecs(self, *codecs: CodecProfile) -> ModelProfile:
        return replace(self, codecs=codecs)

    def within(self, tolerance: float | None) -> ModelProfile:
        """With those of its codecs that may be used: None: without lossy ones. A tolerance below the one at which these are measured leaves
        of them what is typical; so does any tolerance where no codec was measured."""
        lossless = tuple(codec for codec in self.codecs if not codec.is_lossy)
        if tolerance is None:
            return self.with_codecs(*(lossless or (RAW,)))
        has_lossy, is_measured = len(lossless) < len(self.codecs), any(codec.ratios for codec in self.codecs)
        if (tolerance >= STANDARD_TOLERANCE and has_lossy) or (is_measured and not has_lossy):
            return self
        return self.with_codecs(*lossless, *(codec for codec in typical_codecs(tolerance=tolerance) if codec.is_lossy))

    def to_json(self) -> str:
        """Infinite speeds (of a codec that does nothing) become null."""
        content = {"version": VERSION, **asdict(self)}
        for codec in content["codecs"]:
            codec |= {key: None for key, value in codec.items() if value == math.inf}
        return json.dumps(content, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, name: str = "profile") -> ModelProfile:
        """Raises ConfigError: the text is no profile; `name` is what it is called then."""
        try:
            content = json.loads(text)
            if content.get("version") != VERSION:
                raise ConfigError(f"{name}: version {content.get('version')!r}; expected {VERSION}")
            return cls(
                name=str(content["name"]),
                input_bytes=int(content["input_bytes"]),
                layers=tuple(LayerProfile(**layer) for layer in content["layers"]),
                codecs=tuple(CodecProfile.of(codec) for codec in content["codecs"]),
                reference=str(content.get("reference", "")),
                measured=tuple(_measured(kind) for kind in content.get("measured", ())),
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"{name}: not the profile of a model: {type(error).__name__}: {error}") from None


def _measured(plain: Mapping[str, Any]) -> MeasuredCosts:
    return MeasuredCosts(
        device_class=str(plain["device_class"]),
        workers=tuple(str(worker) for worker in plain["workers"]),
        threads=int(plain["threads"]),
        cores=float(plain["cores"]),
        costs_s=tuple(float(cost) for cost in plain["costs_s"]),
        handling=Handling(**{key: float(value) for key, value in plain.get("handling", {}).items()}),
    )


def typical_codecs(*, tolerance: float | None = None) -> tuple[CodecProfile, ...]:
    """What lossless codecs, and with a tolerance a lossy one, did to activations of ResNet-18 on one core of a Xeon (bench/codecs.py). For
    a first plan; a profile that was measured has its own."""
    lossless = (RAW, CodecProfile(name="lz4", ratio=1.28, encode_bytes_per_s=573e6, decode_bytes_per_s=2739e6))
    if tolerance is None:
        return lossless
    ratio = 3.44 if tolerance >= STANDARD_TOLERANCE else 2.0
    return (*lossless, CodecProfile(name="zfp", ratio=ratio, encode_bytes_per_s=230e6, decode_bytes_per_s=250e6))
