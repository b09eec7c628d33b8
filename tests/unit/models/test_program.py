"""Files that somebody else wrote: whatever is in them, reading gives a program or a WireError."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapt.errors import InputMismatchError, ModelError, WireError
from adapt.models.cut import legal_cuts
from adapt.models.forms import FormCheck
from adapt.models.interface import Interface
from adapt.models.interpreter import Stage
from adapt.models.program import (
    PROGRAM_KEY,
    Affine,
    TensorSpec,
    program_to_metadata,
    read_program,
    read_stage,
)
from adapt.models.structure import Constant, Leaf, Node, flatten, from_plain, to_plain, unflatten
from adapt.models.tensorfile import HEADER_LIMIT_BYTES, TensorSource, read_tensor_file, write_tensor_file


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)

    def forward(self, x, factor=None):
        left, right = self.linear(x).chunk(2, dim=1)
        return left.masked_fill(left < 0, float("-inf")), right * 2


@pytest.fixture(scope="module")
def tiny(make_case):
    return make_case(Tiny(), torch.randn(1, 3))


def run_if_it_loads(path):
    """What a worker would do with a file; typed errors are all that may come of it."""
    try:
        program = read_program(path)
        for cut in legal_cuts(program):
            assert cut.crossing_bytes >= 0
        stage = Stage.load(path)
        stage.run([torch.ones(2, 3)])
    except (WireError, InputMismatchError, ModelError):
        pass


def test_a_program_is_read_as_it_was_written(tiny):
    program, again = tiny.program, read_program(tiny.program.path)
    assert program == again
    metadata = program_to_metadata(
        program.graph, program.parameters, program.input_structure, program.output_structure, program.batch_limit
    )
    assert metadata == read_tensor_file(program.path).metadata
    assert str(program.graph.values[program.graph.inputs[0]]) == "float32 (batch, 3)"
    assert program.parameters == ("x", "factor")


def test_every_tensor_is_aligned(branches):
    for tensor in read_tensor_file(branches.program.path).tensors.values():
        assert tensor.begin % 64 == 0


def test_a_file_of_another_digest_than_its_name_is_refused(tiny, tmp_path):
    data = bytearray(tiny.program.path.read_bytes())
    data[-70] ^= 1  # inside a weight
    path = tmp_path / tiny.program.path.name
    path.write_bytes(data)
    with pytest.raises(WireError, match="have the digest"):
        read_program(path)


def test_a_program_is_not_a_stage(tiny):
    with pytest.raises(WireError, match=r"has no adapt\.stage"):
        read_stage(tiny.program.path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(st.data())
def test_flipped_bytes_give_typed_errors_only(tiny, tmp_path, data):
    original = tiny.program.path.read_bytes()
    mutated = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        mutated = mutated[: data.draw(st.integers(0, len(mutated)))]
    path = tmp_path / "mutated.safetensors"
    path.write_bytes(mutated)
    run_if_it_loads(path)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5) | st.just("aten.relu.default"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["v", "w", "dtype", "x"]), inner, max_size=2),
    max_leaves=4,
)


def places(document):
    """Every (container, key) in a JSON document."""
    keys = list(document) if isinstance(document, dict) else range(len(document))
    for key in keys:
        yield document, key
        if isinstance(document[key], (dict, list)):
            yield from places(document[key])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(st.data())
def test_a_document_with_anything_anywhere_gives_typed_errors_only(tiny, tmp_path, data):
    file = read_tensor_file(tiny.program.path)
    document = json.loads(file.metadata[PROGRAM_KEY])
    for _ in range(data.draw(st.integers(1, 2))):
        container, key = data.draw(st.sampled_from(list(places(document))))
        if data.draw(st.booleans()):
            container[key] = data.draw(JUNK)
        elif isinstance(container, dict):
            del container[key]
        else:
            container.append(data.draw(JUNK))
    sources = [
        TensorSource(tensor.key, tensor.dtype, tensor.shape, lambda tensor=tensor: [bytes(tensor.size_bytes)])
        for tensor in file.tensors.values()
    ]
    path, _, _ = write_tensor_file(tmp_path, {PROGRAM_KEY: json.dumps(document)}, sources)
    run_if_it_loads(path)
    path.unlink()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}}, "12 bytes for shape"),
        ({"a": {"dtype": "F32", "shape": [2**39, 2**39], "data_offsets": [0, 16]}}, "16 bytes for shape"),
        ({"a": {"dtype": "C64", "shape": [2], "data_offsets": [0, 16]}}, "dtype 'C64' is not one of"),
        ({"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}, "not a list of at most"),
        ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, "not a list of at most"),
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [64, 80]}}, "begins at"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "the tensors end at"),
        ({"a": {"dtype": "F32", "shape": [4]}}, "expected dtype, shape"),
        ({"__metadata__": {"x": 1}}, "does not map text to text"),
        ([], "not a JSON object"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path, header, message):
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    path = tmp_path / "crafted.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(WireError, match=message):
        read_tensor_file(path)


@pytest.mark.parametrize("length", [HEADER_LIMIT_BYTES + 1, 2**63, 100])
def test_a_header_longer_than_the_file_is_not_allocated(tmp_path, length):
    path = tmp_path / "crafted.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(WireError, match="a header of"):
        read_tensor_file(path)


def test_nesting_without_end_is_refused(tmp_path):
    path, _, _ = write_tensor_file(tmp_path, {PROGRAM_KEY: "[" * 100_000}, [])
    with pytest.raises(WireError, match="not JSON"):
        read_program(path)


# --- inputs ---


def test_arrays_tensors_and_names_are_matched(tiny):
    array = np.ones((2, 3), dtype=np.float32)
    assert Interface.of(tiny.program).match((array,), {})[0] is array
    assert Interface.of(tiny.program).match((), {"x": array})[0] is array
    tensor = torch.ones(5, 3)
    assert Interface.of(tiny.program).match([tensor], {})[0] is tensor


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            (np.ones((2, 3)),),
            r'expected float32 \(batch, 3\), got float64 \(2, 3\); convert with x.astype\("float32"\)',
        ),
        ((torch.ones(2, 3).double(),), r"convert with x.to\(torch.float32\)"),
        ((np.ones((2, 4), np.float32),), r"expected float32 \(batch, 3\), got float32 \(2, 4\)"),
        ((np.ones(3, np.float32),), r"add the batch dimension with x\[None\]"),
        ((np.ones((0, 3), np.float32),), "a batch of 0"),
        (([[1.0, 2.0, 3.0]],), "give a numpy array or a torch tensor"),
        ((), r"expected 1 inputs \(x\), got 0"),
        ((1, 2, 3), "expected 1 inputs"),
    ],
)
def test_inputs_that_do_not_fit_name_what_was_expected_and_got(tiny, args, message):
    with pytest.raises(InputMismatchError, match=message):
        Interface.of(tiny.program).match(args, {})


def test_all_inputs_have_one_batch_size(branches):
    image, scale, offset = (
        np.zeros((2, 3, 6, 6), np.float32),
        np.zeros((2, 1), np.float32),
        np.zeros((3, 4), np.float32),
    )
    with pytest.raises(InputMismatchError, match=r"input 2: .*got float32 \(3, 4\) \(the batch is 2"):
        Interface.of(branches.program).match((image, scale), {"offset": offset})


# --- structures ---

STRUCTURES = st.recursive(
    st.builds(Leaf) | st.builds(Constant, st.none() | st.booleans() | st.integers(0, 9) | st.text(max_size=3)),
    lambda inner: st.lists(inner, max_size=3).flatmap(
        lambda items: st.sampled_from(
            [
                Node("tuple", tuple(items)),
                Node("list", tuple(items)),
                Node("dict", tuple(items), tuple("abc"[: len(items)])),
                Node("ordereddict", tuple(items), tuple(range(len(items)))),
                Node("namedtuple", tuple(items), tuple("xyz"[: len(items)]), "Point"),
            ]
        )
    ),
    max_leaves=8,
)


BATCHED = TensorSpec("float32", (Affine(2, 0), 3), (0, 1))
PLAIN = TensorSpec("int64", (4,), (0,))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ([np.zeros((4, 3), np.float32)], None),
        ([np.zeros((4, 3), np.float64)], "output 0: expected float32"),
        ([np.zeros((4, 5), np.float32)], "output 0: expected float32"),
        ([np.zeros((3, 3), np.float32)], "output 0: expected float32"),
        ([np.zeros(12, np.float32)], "output 0: expected float32"),
        ([np.zeros((2, 3), np.float32)], "outputs of a batch of 1: expected 2"),
        ([], "expected 1 outputs, got 0"),
        ([7], "output 0: expected float32"),
    ],
)
def test_what_a_stage_can_have_made(made, message):
    """The input is a batch of 2, and the output has two rows for each of it."""
    check = FormCheck([TensorSpec("float32", (Affine(1, 0), 5), (0, 1))], [BATCHED])
    for task in range(2):  # what has fitted is known again, and what has not is not
        with contextlib.nullcontext() if message is None else pytest.raises(InputMismatchError, match=message):
            check([np.zeros((2, 5), np.float32)], made, task=task, witness="w1")


@pytest.mark.parametrize(("task", "witness", "is_believed"), [(1, "w2", True), (2, "w2", True), (1, "w1", True), (2, "w1", False)])
def test_an_odd_form_is_believed_if_another_worker_or_the_only_one_says_it_again(task, witness, is_believed):
    """What `squeeze` makes of a batch of one is no vector, whatever was exported."""
    check = FormCheck([TensorSpec("float32", (Affine(1, 0), 5), (0, 1))], [TensorSpec("float32", (Affine(1, 0),), (0,))])
    given, made = [np.zeros((1, 5), np.float32)], [np.float32(1.0)]
    with pytest.raises(InputMismatchError):
        check(given, made, task=1, witness="w1")
    with contextlib.nullcontext() if is_believed else pytest.raises(InputMismatchError):
        check(given, made, task=task, witness=witness)


def test_the_only_worker_is_believed_though_others_ask_meanwhile():
    """Regression: of two tasks in turns each made the other's forgotten."""
    check = FormCheck([TensorSpec("float32", (Affine(1, 0), 5), (0, 1))], [TensorSpec("float32", (Affine(1, 0),), (0,))])
    given, made = [np.zeros((1, 5), np.float32)], [np.float32(1.0)]
    for task in (1, 2):
        with pytest.raises(InputMismatchError):
            check(given, made, task=task, witness="w1")
    check(given, made, task=1, witness="w1")


def test_no_form_of_a_larger_batch_is_believed_that_does_not_fit():
    check = FormCheck([TensorSpec("float32", (Affine(1, 0), 5), (0, 1))], [BATCHED])
    for witness in ("w1", "w2", "w3"):
        with pytest.raises(InputMismatchError):
            check([np.zeros((2, 5), np.float32)], [np.zeros((4, 2), np.float32)], task=1, witness=witness)


def test_an_output_may_be_independent_of_the_batch():
    FormCheck([TensorSpec("float32", (Affine(1, 0), 5), (0, 1))], [PLAIN])([np.zeros((9, 5), np.float32)], [np.zeros(4, np.int64)])


@given(STRUCTURES)
def test_structures_survive_json_and_put_back_what_they_took_apart(structure):
    again = from_plain(json.loads(json.dumps(to_plain(structure))), "here")
    assert again == structure
    value = unflatten(structure, [object() for _ in flatten_count(structure)])
    assert flatten(structure, unflatten(structure, flatten(structure, value))) == flatten(structure, value)


def flatten_count(structure):
    return [None] if isinstance(structure, Leaf) else [one for item in getattr(structure, "items", ()) for one in flatten_count(item)]


@pytest.mark.parametrize(
    "document",
    [
        None, "leav", ["constant", [1]], ["set", [], [], ""], ["dict", ["leaf"], [], ""], ["dict", ["leaf", "leaf"], ["a", "a"], ""],
        ["namedtuple", ["leaf"], ["__class__"], "X"], ["namedtuple", ["leaf"], ["a"], "X; import os"], ["tuple", ["leaf"], ["a"], ""],
    ],
)  # fmt: skip
def test_what_is_no_structure_is_refused(document):
    with pytest.raises(WireError):
        from_plain(document, "here")


def test_sizes_are_written_as_people_write_them():
    spec = TensorSpec("float32", (Affine(1, 0), Affine(2, -1), 3), (0, 1, 2))
    assert str(spec) == "float32 (batch, 2*batch-1, 3)"
    assert spec.shape_at(4) == (4, 7, 3) and spec.bytes_at(4) == 4 * 7 * 3 * 4
