"""A faster graph with nearly the same numbers: batch norms folded into convolutions, and weights channels last. Works on data, without torch.

    y = (conv(x, W) + c - mean) / sqrt(var + eps) * gamma + beta   =   conv(x, W * s) + (c - mean) * s + beta,   s = gamma / sqrt(var + eps)

The new weights are computed in double precision and rounded once. A batch norm is folded if it alone reads what one convolution with fixed
weights gives. Convolutions whose weight lies channels last answer in that layout, and all that follows keeps it; it is chosen for models
that convolve more often than they multiply matrices (`is_convolutional`).

Both change the last bits, so each is named in the program (`CHANGES`) and with it in the numeric class of every result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from adapt.models.compaction import compact
from adapt.models.program import CHANNELS_LAST, FOLD, Argument, Graph, Operator, ValueRef, Weight, WeightRef, operator_references
from adapt.models.tensorfile import StoredTensor

ReadWeight = Callable[[Weight], np.ndarray[Any, Any]]  # a weight as the operators see it, whatever its order in the file

NHWC = (0, 2, 3, 1)
_FOLDED_DTYPES = ("float32", "float64")
_CONVOLUTIONS = {
    f"aten.conv{dims}d.{overload}": ("input", "weight", "bias") for dims in (1, 2, 3) for overload in ("default", "padding")
} | {
    "aten.convolution.default": ("input", "weight", "bias", "stride", "padding", "dilation", "transposed"),
}  # fmt: skip
_NORMS = {
    "aten.batch_norm.default": ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"),
    "aten._native_batch_norm_legit_no_training.default": ("input", "weight", "bias", "running_mean", "running_var", "momentum", "eps"),
}
_PRODUCTS = {
    f"aten.{name}.default" for name in ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention")
}  # fmt: skip
# They refuse layouts that their namesakes copy.
_FORGIVING = {"aten.view.default": "aten.reshape.default", "aten._unsafe_view.default": "aten.reshape.default"}


@dataclass(slots=True)
class Rewritten:
    """A graph with other numbers. Layouts of its values are not known any more; where its weights lie is said by `arrays`.

    Attributes:
        arrays: number of a weight -> what it holds, as it is stored; all other weights are those of the file, where their `stored` says.
        folded: how many batch norms are gone.
        changes: what was done, of `program.CHANGES`, in their order.
    """

    graph: Graph
    arrays: dict[int, np.ndarray[Any, Any]] = field(default_factory=dict)
    folded: int = 0
    changes: tuple[str, ...] = ()


def rewrite(graph: Graph, read: ReadWeight) -> Rewritten:
    """The graph with all that can be folded, folded, and with channels last if it is a convolutional one."""
    folder = _Folder(graph, read)
    folder.fold_all()
    if is_convolutional(graph):
        folder.lay_channels_last()
    return folder.result()


def is_convolutional(graph: Graph) -> bool:
    """Whether 2-D convolutions are more than products of matrices: only then do most values keep channels last."""
    names = Counter(operator.name for operator in graph.operators)
    convolutions = sum(count for name, count in names.items() if name in _CONVOLUTIONS)
    return convolutions > sum(count for name, count in names.items() if name in _PRODUCTS)


class _Folder:
    def __init__(self, graph: Graph, read: ReadWeight) -> None:
        self._graph, self._read = graph, read
        self._operators: list[Operator | None] = list(graph.operators)
        self._weights = list(graph.weights)
        self._arrays: dict[int, np.ndarray[Any, Any]] = {}
        self._folded, self._is_channels_last = 0, False
        self._maker = {operator.outputs[0]: place for place, operator in enumerate(graph.operators) if not operator.unpacks}
        uses = [reference.index for operator in graph.operators for reference in operator_references(operator) if _is_value(reference)]
        self._uses = Counter([*uses, *graph.outputs])

    def fold_all(self) -> None:
        for place, operator in enumerate(self._graph.operators):
            if operator.name in _NORMS:
                self._fold(place, operator)

    def _fold(self, place: int, norm: Operator) -> None:
        given = _named(norm, _NORMS[norm.name])
        source = given.get("input")
        maker = self._maker.get(source.index) if isinstance(source, ValueRef) and self._uses[source.index] == 1 else None
        convolution = None if maker is None else self._operators[maker]
        if (
            maker is None
            or convolution is None
            or convolution.name not in _CONVOLUTIONS
            or given.get("training")
            or norm.outputs[1:] not in _UNUSED
        ):
            return
        weight, bias = self._folded_weights(_named(convolution, _CONVOLUTIONS[convolution.name]), given)
        if weight is None or bias is None:
            return
        rest = convolution.args[3:]
        kwargs = {name: value for name, value in convolution.kwargs.items() if name not in ("input", "weight", "bias")}
        args = (convolution.args[0], weight, bias, *rest)
        self._operators[maker] = replace(convolution, args=args, kwargs=kwargs, outputs=norm.outputs[:1])
        self._operators[place] = None
        self._maker[norm.outputs[0]] = maker
        self._folded += 1

    def _folded_weights(
        self, convolution: Mapping[str, Argument], norm: Mapping[str, Argument]
    ) -> tuple[WeightRef | None, WeightRef | None]:
        """The new weight and bias, or None where something is not a fixed tensor of the right size, or would not stay finite."""
        weight, eps = convolution.get("weight"), norm.get("eps", 1e-5)
        parts = [convolution.get("bias"), norm.get("weight"), norm.get("bias"), norm.get("running_mean"), norm.get("running_var")]
        is_fixed = isinstance(weight, WeightRef) and all(part is None or isinstance(part, WeightRef) for part in parts)
        if not is_fixed or None in parts[3:] or convolution.get("transposed") or not isinstance(eps, (int, float)):
            return None, None
        assert isinstance(weight, WeightRef)
        described = self._weights[weight.index]
        old = self._array(weight)
        if described.stored.dtype not in _FOLDED_DTYPES or old is None:
            return None, None
        channels = old.shape[0]
        arrays = [None if part is None else self._array(part) for part in parts]  # type: ignore[arg-type]
        if any(part is not None and (array is None or array.shape != (channels,)) for part, array in zip(parts, arrays, strict=True)):
            return None, None
        shift, gamma, beta, mean, variance = arrays
        assert mean is not None and variance is not None
        with np.errstate(all="ignore"):  # what is not finite is not folded
            scale = (1.0 if gamma is None else gamma) / np.sqrt(variance + eps)
            new = (old * scale.reshape(-1, *[1] * (old.ndim - 1))).astype(described.stored.dtype)
            bias = ((0.0 if shift is None else shift) - mean) * scale + (0.0 if beta is None else beta)
            bias = bias.astype(described.stored.dtype)
        if not (np.isfinite(new).all() and np.isfinite(bias).all()):
            return None, None
        old_bias = parts[0]
        key = self._weights[old_bias.index].stored.key if isinstance(old_bias, WeightRef) else _bias_key(described.stored.key)
        return self._add(described.stored.key, new, described), self._add(key, bias, described)

    def _array(self, reference: WeightRef) -> np.ndarray[Any, Any] | None:
        """As the operators see it, in double precision; None for a dtype that is not folded."""
        weight, array = self._weights[reference.index], self._arrays.get(reference.index)
        if weight.stored.dtype not in _FOLDED_DTYPES:
            return None
        if array is None:
            return self._read(weight).astype(np.float64)
        return (array if weight.order is None else array.transpose(np.argsort(weight.order))).astype(np.float64)

    def _add(self, key: str, array: np.ndarray[Any, Any], like: Weight) -> WeightRef:
        order = like.order if like.order is not None and len(like.order) == array.ndim else None
        array = np.ascontiguousarray(array if order is None else array.transpose(order))
        self._arrays[len(self._weights)] = array
        self._weights.append(Weight(StoredTensor(key, str(array.dtype), array.shape, 0, array.nbytes), order, like.requires_grad))
        return WeightRef(len(self._weights) - 1)

    def lay_channels_last(self) -> None:
        """Store the weights of 2-D convolutions so, if nothing else reads them."""
        operators = [operator for operator in self._operators if operator is not None]
        readers: dict[int, list[bool]] = {}
        for operator in operators:
            given = _named(operator, _CONVOLUTIONS.get(operator.name, ()))
            for reference in operator_references(operator):
                if isinstance(reference, WeightRef):
                    readers.setdefault(reference.index, []).append(given.get("weight") == reference)
        for index, are_convolutions in readers.items():
            weight = self._weights[index]
            if all(are_convolutions) and len(weight.stored.shape) == 4 and weight.order is None:
                self._lay(index, weight)

    def _lay(self, index: int, weight: Weight) -> None:
        array = self._arrays.get(index)
        stored = np.array((self._read(weight) if array is None else array).transpose(NHWC), order="C")
        self._arrays[index] = stored
        self._weights[index] = replace(weight, stored=replace(weight.stored, shape=stored.shape), order=NHWC)
        self._is_channels_last = True

    def result(self) -> Rewritten:
        operators = [operator for operator in self._operators if operator is not None]
        if self._is_channels_last:
            operators = [replace(operator, name=_FORGIVING.get(operator.name, operator.name)) for operator in operators]
        compacted = compact(operators, self._graph.inputs, self._graph.outputs)
        values = [self._graph.values[old] for old in compacted.values]
        arrays = {new: self._arrays[old] for new, old in enumerate(compacted.weights) if old in self._arrays}
        weights = _renamed([self._weights[old] for old in compacted.weights])
        graph = Graph(tuple(compacted.operators), tuple(values), tuple(weights), compacted.inputs, compacted.outputs)
        done = {CHANNELS_LAST: self._is_channels_last, FOLD: self._folded > 0}
        return Rewritten(graph, arrays, self._folded, tuple(change for change, is_done in done.items() if is_done))


_UNUSED: Sequence[tuple[int | None, ...]] = ((), (None, None))  # what a norm gives besides its result


def _is_value(reference: ValueRef | WeightRef) -> bool:
    return isinstance(reference, ValueRef)


def _named(operator: Operator, names: Sequence[str]) -> dict[str, Argument]:
    return dict(zip(names, operator.args, strict=False)) | dict(operator.kwargs)


def _bias_key(weight_key: str) -> str:
    head, dot, tail = weight_key.rpartition(".")
    return f"{head}{dot}bias" if tail == "weight" else f"{weight_key}.bias"


def _renamed(weights: Sequence[Weight]) -> list[Weight]:
    """One key each: a convolution that was used twice has become two."""
    taken: set[str] = set()
    renamed = []
    for weight in weights:
        key = next(key for number in range(1, len(weights) + 2) if (key := _numbered(weight.stored.key, number)) not in taken)
        taken.add(key)
        renamed.append(replace(weight, stored=replace(weight.stored, key=key)))
    return renamed


def _numbered(key: str, number: int) -> str:
    return key if number == 1 else f"{key}+{number}"
