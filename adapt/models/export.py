"""From an `nn.Module` to a program: trace with `torch.export`, convert, check against the module, time, write.

    module --copy of the structure, eval--> torch.export (batch of 2, batch size free; else fixed shapes)
           --convert--> operators --run next to the module itself--> same bits? layouts, seconds --> one file

The parameters are never copied but into the file: the copied structure shares the user's.
"""

from __future__ import annotations

import copy
import inspect
import logging
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils import _pytree as pytree

from adapt.errors import AdaptError, ExportError
from adapt.models.convert import (
    Converted,
    ConvertedWeight,
    NeedsDecomposition,
    NotAffine,
    convert,
)
from adapt.models.interpreter import Stage
from adapt.models.layouts import Layouts
from adapt.models.optimize import optimize_program
from adapt.models.profiler import operator_costs_s, single_thread
from adapt.models.program import FOLD, Graph, TensorSpec, Weight, check_optimize, program_to_metadata
from adapt.models.saved import SavedModel, read_saved
from adapt.models.tensorfile import StoredTensor, TensorSource, write_tensor_file

log = logging.getLogger(__name__)

BATCH_LIMIT = 65_536
REASON_LIMIT = 600


@dataclass(frozen=True, slots=True)
class ExportedProgram:
    """A program on disk.

    Attributes:
        path, digest, file_bytes: the file, its SHA-256 and its size.
        operator_costs_s: seconds of each operator here, at one thread, for the example's batch.
        is_batched: whether any batch size can be run; otherwise only the example's shapes.
        is_exact: whether its results were the module's own, bit for bit, on the example.
        deviation: what `optimize` changed in an output on the example, as a share of the largest number in that output.
    """

    path: Path
    digest: str
    file_bytes: int
    operator_costs_s: list[float]
    is_batched: bool
    is_exact: bool
    deviation: float = 0.0


def export_module(
    module: torch.nn.Module,
    example_inputs: Sequence[Any],
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    directory: Path | str,
    profile_repetitions: int = 3,
    optimize: str = "none",
) -> ExportedProgram:
    """Write `module`, as it computes in eval mode, as a program into `directory`.

    The module is not changed: neither its training flags nor its device nor its tensors.

    Args:
        example_inputs: positional arguments of one call: tensors (or numpy arrays), nested as the model takes them.
            The first dimension of the first tensor is taken for the batch, and so is that of every tensor of equal
            length. With a batch of 1 the example is doubled for tracing; give 2 or more if some input has a first
            dimension of 1 that is not the batch.
        example_kwargs: arguments by name.
        directory: where the file `<sha256>.safetensors` is written.
        profile_repetitions: how many runs are timed; 0 leaves the costs empty.
        optimize: "none", or "fold": see `optimize.optimize_program`.

    Raises:
        ConfigError: `optimize` is neither.
        ExportError: torch cannot trace the model, or it uses an operator that stages may not; the message says
            where and what to do.
    """
    check_optimize(optimize)
    args, kwargs = as_tensors((tuple(example_inputs), dict(example_kwargs or {})))
    copied = inference_copy(module)
    with deterministic(), single_thread():
        example = _Example(copied, args, kwargs)
        candidate = _first_that_fits(copied, example)
        return _finished(candidate, module, example, Path(directory), profile_repetitions, optimize)


def _finished(
    candidate: _Candidate, module: torch.nn.Module, example: _Example, directory: Path, repetitions: int, optimize: str
) -> ExportedProgram:
    if optimize == FOLD:
        return _optimized(candidate, module, example, directory, repetitions)
    costs_s = operator_costs_s(candidate.stage, example.leaves, repetitions) if repetitions else []
    path, digest, file_bytes = _write(candidate, module, directory)
    return ExportedProgram(path, digest, file_bytes, costs_s, candidate.is_batched, candidate.is_exact)


def _optimized(candidate: _Candidate, module: torch.nn.Module, example: _Example, directory: Path, repetitions: int) -> ExportedProgram:
    """The program as it was exported is written beside the other, and goes."""
    directory.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".plain-", dir=directory) as beside:
        path, _, _ = _write(candidate, module, beside)
        made = optimize_program(path, directory, leaves=example.leaves, profile_repetitions=repetitions)
    is_exact = candidate.is_exact and made.deviation == 0
    return ExportedProgram(made.path, made.digest, made.file_bytes, made.operator_costs_s, candidate.is_batched, is_exact, made.deviation)


def export_file(
    path: Path | str, *, directory: Path | str, profile_repetitions: int = 3, optimize: str = "none"
) -> tuple[ExportedProgram, Any, tuple[Any, ...] | None]:
    """Write the model in a `.pt2` file, which `torch.export.save` made, as a program into `directory`. To read such a file may run code in it.

    One size may vary, in whatever dimensions of the inputs: the batch. Operators are timed for a batch of one.

    Returns:
        The program; what computes as the model does, in torch alone; and positional arguments for it, if a call takes no others.

    Raises:
        ConfigError: `optimize` is none of the ways to.
        ExportError: see `read_saved`; or the model holds what cannot be turned into stages.
    """
    check_optimize(optimize)
    name = Path(path).name
    saved = read_saved(Path(path))
    try:
        with deterministic(), single_thread():
            example = _Example(saved.module, *as_tensors(saved.call_of_one()), places=saved.places)
            candidate = _converted(saved, example)
            if not candidate.is_exact:
                log.warning("the exported program differs from the model", extra={"file": name})
            exported = _finished(candidate, saved.module, example, Path(directory), profile_repetitions, optimize)
    except ExportError as error:
        raise ExportError(f"{name}: {error}") from None
    return exported, saved.module, None if saved.kwargs else tuple(as_tensors(saved.args))


def _converted(saved: SavedModel, example: _Example) -> _Candidate:
    limit = min(saved.batch_limit or BATCH_LIMIT, BATCH_LIMIT) if any(saved.places) else None
    try:
        return _candidate(saved.program, saved.module, example, limit)
    except NeedsDecomposition:
        pass
    except NotAffine as error:
        raise ExportError(f"its sizes are no multiples of the batch: {error}; export it with fixed shapes") from None
    try:
        return _candidate(saved.program.run_decompositions({}), saved.module, example, limit)
    except NeedsDecomposition as error:
        raise ExportError(f"the model writes into a tensor that it still reads: {error}") from None


@dataclass(slots=True)
class _Candidate:
    """One way to trace the model, converted and run."""

    graph: Graph
    converted: Converted
    stage: Stage
    batch_limit: int | None  # None: all shapes are fixed
    is_exact: bool

    @property
    def is_batched(self) -> bool:
        return self.batch_limit is not None


class _Example:
    """The example call, once as given and once with a doubled batch, with the module's own answers.

    `places`: of each tensor, the dimensions that are the batch; by default the first, if it is as long as the first tensor's.
    """

    def __init__(self, module: torch.nn.Module, args: Any, kwargs: Any, *, places: Sequence[tuple[int, ...]] | None = None) -> None:
        self.args, self.kwargs = args, kwargs
        self.leaves = _tensors((args, kwargs))
        self.doubled_leaves = _doubled(self.leaves, places or [(0,) if is_in_batch else () for is_in_batch in _batched(self.leaves)])
        self.expected = eager(module, args, kwargs)
        self._module = module

    def with_leaves(self, leaves: Sequence[torch.Tensor]) -> tuple[Any, Any]:
        """(args, kwargs) with copies of `leaves` in place of the tensors."""
        rest = iter(leaves)
        replaced: tuple[Any, Any] = pytree.tree_map_only(torch.Tensor, lambda _: next(rest).clone(), (self.args, self.kwargs))
        return replaced

    @cached_property
    def doubled_expected(self) -> list[Any]:
        return eager(self._module, *self.with_leaves(self.doubled_leaves))


def _first_that_fits(module: torch.nn.Module, example: _Example) -> _Candidate:
    """The first trace, in order of preference, that converts and gives the module's own bits; else the first that converts."""
    inexact, refusal = None, ""
    for is_batched in (True, False):
        try:
            exported = _trace(module, example, is_batched=is_batched)
        except _TraceRefused as error:
            refusal = error.reason  # of the last: with fixed shapes torch asks for the least
            continue
        for decompose in (False, True):
            try:
                traced = exported.run_decompositions({}) if decompose else exported
                candidate = _candidate(traced, module, example, BATCH_LIMIT if is_batched else None)
            except NeedsDecomposition as error:
                if decompose:
                    raise ExportError(f"the model writes into a tensor that it still reads: {error}") from None
                continue
            except NotAffine:
                break  # only fixed shapes can be described
            if candidate.is_exact:
                return candidate
            inexact = inexact or candidate
        if inexact:
            log.warning("the exported program differs from the module", extra={"model": type(module).__name__})
            return inexact
    raise ExportError(
        f"torch.export cannot trace {type(module).__name__}: {refusal}. "
        "The model has to take the same path for all inputs: replace branches on tensor values by torch.where, "
        "and move what is not tensor computation out of forward()"
    )


def _candidate(exported: Any, module: torch.nn.Module, example: _Example, batch_limit: int | None) -> _Candidate:
    converted = convert(exported, {name for name, tensor in _named_tensors(module) if tensor.requires_grad})
    values = tuple(_contiguous(spec) if index in converted.inputs else spec for index, spec in enumerate(converted.values))
    weights = tuple(_weight(weight) for weight in converted.weights)
    graph = Graph(tuple(converted.operators), values, weights, tuple(converted.inputs), tuple(converted.outputs))
    stage = Stage(graph, [weight.tensor for weight in converted.weights], torch.device("cpu"), "")
    layouts, is_exact, is_batched = Layouts(graph), True, batch_limit is not None
    if is_batched:
        is_exact = _are_equal(stage.run(example.doubled_leaves, observe=layouts.record), example.doubled_expected)
    observe = layouts.confirm if is_batched else layouts.record
    is_exact &= _are_equal(stage.run(example.leaves, observe=observe), example.expected)
    return _Candidate(replace(graph, values=tuple(layouts.values)), converted, stage, batch_limit, is_exact)


class _TraceRefused(Exception):
    """torch.export cannot trace the model in this way."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


def _trace(module: torch.nn.Module, example: _Example, *, is_batched: bool) -> Any:
    shapes: Any = None
    leaves = example.leaves
    if is_batched:
        if not any(_batched(leaves)):
            raise _TraceRefused("no input has a batch dimension")
        if _batch(leaves) == 1:  # torch.export takes a size of 1 for fixed
            leaves = example.doubled_leaves
    args, kwargs = example.with_leaves(leaves)
    if is_batched:
        shapes = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
        batch = torch.export.Dim("batch", min=1, max=BATCH_LIMIT)
        for leaf, is_in_batch in zip(_tensors((args, kwargs)), _batched(leaves), strict=True):
            if is_in_batch:
                shapes[leaf] = {0: batch}
    try:
        with torch.no_grad():
            return torch.export.export(module, args, kwargs, dynamic_shapes=shapes)
    except AdaptError:
        raise
    except Exception as error:  # whatever the model or torch raises while it is traced
        raise _TraceRefused(_shortened(error) + _advice(error)) from None


def _advice(error: Exception) -> str:
    """What to do where it is torch's own code that looks at values: a transformer compares its mask with a causal one."""
    if any(frame.f_code.co_name == "_detect_is_causal_mask" for frame, _ in traceback.walk_tb(error.__traceback__)):
        return "; torch's transformer looks at the values of its mask to see whether it is causal: say so in the call (is_causal=, tgt_is_causal=)"
    return ""


def _named_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _batch(leaves: Sequence[torch.Tensor]) -> int | None:
    """The batch size of the example: the first dimension of the first tensor that has one."""
    return next((leaf.shape[0] for leaf in leaves if leaf.dim()), None)


def _batched(leaves: Sequence[torch.Tensor]) -> list[bool]:
    batch = _batch(leaves)
    return [leaf.dim() > 0 and leaf.shape[0] == batch for leaf in leaves]


def _doubled(leaves: Sequence[torch.Tensor], places: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    doubled = list(leaves)
    for number, dimensions in enumerate(places):
        for dimension in dimensions:
            doubled[number] = torch.cat([doubled[number]] * 2, dimension)
    return doubled


def _shortened(error: Exception) -> str:
    """The part of torch's reason that speaks of the model; what follows is about torch's own switches."""
    told = f"{type(error).__name__}: {error}"
    for marker in (
        "(Size-like symbols",
        "Caused by:",
        "For extended logs",
        "To fix the error",
        "For more info",
        "Suggested fixes:",
    ):
        told = told.partition(marker)[0]
    return " ".join(told.split())[:REASON_LIMIT].rstrip(". ")


def as_tensors(tree: Any) -> Any:
    """Arrays become tensors, tensors go to the CPU; the user's own are not touched."""

    def convert_leaf(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return leaf.detach().cpu().contiguous()
        return torch.as_tensor(leaf) if hasattr(leaf, "__array_interface__") else leaf

    return pytree.tree_map(convert_leaf, tree)


def inference_copy(module: torch.nn.Module) -> torch.nn.Module:
    """The module's structure in eval mode around the same parameters (or, if they lie elsewhere, copies on the CPU).

    Buffers are copied: a forward that counts its calls must not count ours.
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        for tensor in (*part._buffers.values(), *vars(part).values()):
            if isinstance(tensor, torch.Tensor):
                memo[id(tensor)] = tensor.detach().to("cpu", copy=True).requires_grad_(tensor.requires_grad)
        for parameter in part._parameters.values():
            if parameter is not None:
                memo[id(parameter)] = parameter if parameter.device.type == "cpu" else _on_cpu(parameter)
    try:
        return copy.deepcopy(module, memo).eval()
    except Exception as error:  # the module's own __deepcopy__, or an attribute without one
        raise ExportError(f"{type(module).__name__} cannot be copied: {_shortened(error)}") from error


def _on_cpu(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    return torch.nn.Parameter(parameter.detach().cpu(), requires_grad=parameter.requires_grad)


def eager(module: torch.nn.Module, args: Any, kwargs: Any) -> list[Any]:
    """The module's own answer; its inputs are copies, as a module may write to them."""
    args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
    try:
        with torch.inference_mode():
            result = module(*args, **kwargs)
    except Exception as error:  # the module does not take its example
        raise ExportError(f"{type(module).__name__} fails on the example: {_shortened(error)}") from error
    return _tensors(result)


def _are_equal(actual: Sequence[Any], expected: Sequence[Any]) -> bool:
    tensors = [value for value in actual if isinstance(value, torch.Tensor)]
    return len(tensors) == len(expected) and all(
        a.dtype == e.dtype and a.shape == e.shape and torch.equal(torch.nan_to_num(a), torch.nan_to_num(e))
        for a, e in zip(tensors, expected, strict=True)
    )


@contextmanager
def deterministic() -> Iterator[None]:
    """Without the fused attention kernel, which rounds differently, and without torch's talk about itself."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    talkative = logging.getLogger("torch.fx.experimental.symbolic_shapes")  # prints whole graphs; the error says it too
    level = talkative.level
    talkative.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        talkative.setLevel(level)


def _write(candidate: _Candidate, module: torch.nn.Module, directory: Path | str) -> tuple[Path, str, int]:
    converted = candidate.converted
    sources = [TensorSource(w.key, _dtype(w.tensor), _stored(w).shape, partial(_pieces, w)) for w in converted.weights]
    metadata = program_to_metadata(
        candidate.graph,
        list(inspect.signature(module.forward).parameters),
        converted.input_structure,
        converted.output_structure,
        candidate.batch_limit,
    )
    return write_tensor_file(directory, metadata, sources)


def _weight(weight: ConvertedWeight) -> Weight:
    """The weight's entry in the graph; where it lies in the file is known only when that is written."""
    stored = StoredTensor(weight.key, _dtype(weight.tensor), tuple(_stored(weight).shape), 0, 0)
    return Weight(stored, weight.order, weight.tensor.requires_grad)


def _stored(weight: ConvertedWeight) -> torch.Tensor:
    return weight.tensor if weight.order is None else weight.tensor.permute(weight.order)


def _pieces(weight: ConvertedWeight) -> list[memoryview]:
    """The weight's bytes, without a copy where it is contiguous (as good as always)."""
    flat = _stored(weight).detach().contiguous().view(-1)
    return [memoryview(flat.view(torch.uint8).numpy().data)] if flat.numel() else []


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _contiguous(spec: Any) -> Any:
    return replace(spec, order=tuple(range(len(spec.shape)))) if isinstance(spec, TensorSpec) else spec
