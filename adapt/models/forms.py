"""Whether values have the form that a program or stage takes and makes: dtypes, shapes, one batch size. Works on data, without torch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Protocol

from adapt.errors import InputMismatchError
from adapt.models.program import Affine, SizeSpec, ValueSpec
from adapt.models.structure import Node, Structure
from adapt.models.tensorfile import DTYPES

FITTED_LIMIT = 256  # kinds of input that are known again


def check_inputs(specs: Sequence[ValueSpec], leaves: Sequence[Any], *, batch_limit: int | None = None, what: str = "input") -> int | None:
    """Check leaves (numpy arrays, torch tensors, ints) against their specs; return the batch size, None if there is none.

    Raises:
        InputMismatchError: naming expected and got dtype and shape of the first that does not fit.
    """
    if len(leaves) != len(specs):
        raise InputMismatchError(f"expected {len(specs)} {what}s, got {len(leaves)}")
    for index, (spec, leaf) in enumerate(zip(specs, leaves, strict=True)):
        _check_kind(spec, leaf, f"{what} {index}")
    batch = batch_size_of(specs, leaves, what=what)
    if batch is not None and (batch < 1 or (batch_limit is not None and batch > batch_limit)):
        raise InputMismatchError(f"a batch of {batch}: expected 1 to {batch_limit or 'any number'}")
    for index, (spec, leaf) in enumerate(zip(specs, leaves, strict=True)):
        if isinstance(spec, SizeSpec):
            fits = spec.size.at(batch) == leaf if isinstance(spec.size, Affine) and batch is not None else spec.size == leaf
        else:
            fits = tuple(leaf.shape) == spec.shape_at(batch or 1)
        if not fits:
            raise _mismatch(spec, leaf, f"{what} {index}", f" (the batch is {batch} by the inputs before)" if batch and index else "")
    return batch


class InputCheck:
    """`check_inputs` against fixed specs. What has fitted once is known again: by type and shape alone."""

    def __init__(self, specs: Sequence[ValueSpec], *, batch_limit: int | None = None) -> None:
        self._specs, self._batch_limit = specs, batch_limit
        self._fitted: set[tuple[tuple[Any, Any], ...]] = set()

    def __call__(self, leaves: Sequence[Any]) -> None:
        """Raises InputMismatchError as `check_inputs` does."""
        try:
            signature = tuple([(leaf.dtype, leaf.shape) for leaf in leaves])
            if signature in self._fitted:
                return
        except (AttributeError, TypeError):  # a number among them, or something odd
            signature = None
        check_inputs(self._specs, leaves, batch_limit=self._batch_limit)
        if signature is not None and len(self._fitted) < FITTED_LIMIT:
            self._fitted.add(signature)


class FormCheck:
    """Whether a stage can have made such outputs of such inputs: dtypes, shapes, and one batch size for both.

    Export describes batches of two and more; a batch of one may be a case of its own (`squeeze`). So its form is believed when a second
    witness has seen it, or the same one twice of one task, as when there is no other. What has fitted is known again.
    """

    def __init__(self, inputs: Sequence[ValueSpec], outputs: Sequence[ValueSpec]) -> None:
        self._inputs, self._outputs = inputs, outputs
        self._fitted: set[tuple[Any, ...]] = set()
        # Forms for a batch of one that did not fit -> the tasks of which they were seen, each with who saw it
        self._odd: dict[tuple[Any, ...], set[tuple[Hashable, Hashable]]] = {}

    def __call__(self, given: Sequence[Any], made: Sequence[Any], *, task: Hashable = None, witness: Hashable = None) -> None:
        """Raises InputMismatchError, naming expected and got dtype and shape of the first that does not fit."""
        signature = (_signature(given), _signature(made))
        if signature in self._fitted:
            return
        batch = check_inputs(self._inputs, given)
        try:
            made_batch = check_inputs(self._outputs, made, what="output")
            if made_batch not in (None, batch):
                raise InputMismatchError(f"outputs of a batch of {made_batch}: expected {batch}")
        except InputMismatchError:
            if batch != 1 or not self._is_seen_again(signature, task, witness):
                raise
        if len(self._fitted) < FITTED_LIMIT:
            self._fitted.add(signature)

    def _is_seen_again(self, signature: tuple[Any, ...], task: Hashable, witness: Hashable) -> bool:
        before = self._odd.get(signature, set())
        if any(other != witness or seen == task for seen, other in before):
            del self._odd[signature]
            return True
        if len(before) < FITTED_LIMIT and (before or len(self._odd) < FITTED_LIMIT):
            self._odd[signature] = {*before, (task, witness)}
        return False


def _signature(leaves: Sequence[Any]) -> tuple[Any, ...]:
    return tuple([(leaf.dtype, leaf.shape) if hasattr(leaf, "shape") else leaf for leaf in leaves])


def batch_size_of(specs: Sequence[ValueSpec], leaves: Sequence[Any], *, what: str = "input") -> int | None:
    """The batch size by the first size that depends on it; None when no size does."""
    for index, (spec, leaf) in enumerate(zip(specs, leaves, strict=True)):
        pairs = [(spec.size, leaf)] if isinstance(spec, SizeSpec) else list(zip(spec.shape, tuple(leaf.shape), strict=True))
        for size, got in pairs:
            if isinstance(size, Affine) and size.scale:
                batch, rest = divmod(int(got) - size.offset, size.scale)
                if rest:
                    raise _mismatch(spec, leaf, f"{what} {index}")
                return batch
    return None


class Signature(Protocol):
    """What is called with arguments: a `Program`, or what a client knows of one."""

    @property
    def parameters(self) -> tuple[str, ...]: ...
    @property
    def input_structure(self) -> Structure: ...


def bind_arguments(program: Signature, args: list[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Move arguments to where the exported call had them: by position or by name."""
    match program.input_structure:
        case Node(items=(Node(items=positional), Node(keys=named))):
            pass
        case _:
            raise AssertionError("checked when the program was read")
    for name in program.parameters[len(args) : len(positional)]:
        if name not in kwargs:
            break
        args.append(kwargs.pop(name))
    while len(args) > len(positional) and len(args) <= len(program.parameters):
        name = program.parameters[len(args) - 1]
        if name not in named or name in kwargs:
            break
        kwargs[name] = args.pop()
    if len(args) != len(positional) or set(kwargs) != set(named):
        expected = [*program.parameters[: len(positional)], *map(str, named)]
        raise InputMismatchError(
            f"expected {len(expected)} inputs ({', '.join(expected)}), got {len(args)} by position"
            + (f" and {', '.join(kwargs)} by name" if kwargs else "")
        )
    return args, kwargs


def _check_kind(spec: ValueSpec, leaf: Any, place: str) -> None:
    if isinstance(spec, SizeSpec):
        if type(leaf) is not int:
            raise _mismatch(spec, leaf, place)
        return
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise _mismatch(spec, leaf, place, "; give a numpy array or a torch tensor")
    if len(leaf.shape) != len(spec.shape):
        missing_batch = len(leaf.shape) == len(spec.shape) - 1 and spec.shape and isinstance(spec.shape[0], Affine)
        raise _mismatch(spec, leaf, place, "; add the batch dimension with x[None]" if missing_batch else "")
    if (dtype := dtype_name(leaf)) != spec.dtype:
        convert = f"x.to(torch.{spec.dtype})" if str(leaf.dtype).startswith("torch.") else f'x.astype("{spec.dtype}")'
        raise _mismatch(spec, leaf, place, f"; convert with {convert}" if dtype in DTYPES else "")


def dtype_name(leaf: Any) -> str:
    """ "float32" for numpy's and for torch's."""
    return str(leaf.dtype).removeprefix("torch.")


def _mismatch(spec: ValueSpec, leaf: Any, place: str, hint: str = "") -> InputMismatchError:
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        got = f"{dtype_name(leaf)} {tuple(leaf.shape)}"
    else:
        got = f"{type(leaf).__name__} {str(leaf)[:40]!r}"
    return InputMismatchError(f"{place}: expected {spec}, got {got}{hint}")
