"""What a caller of the library holds: mappings, values of NumPy, reprs of a few lines, and errors
by their names.
"""

from __future__ import annotations

import doctest
import inspect
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file

import shardkit
from repository import GOOD
from shardkit import alignment, brief, errors, near_names
from shardkit.checkpoint import device_fit
from shardkit.checkpoint.entries import TensorEntry
from shardkit.dtypes import DTYPES
from shardkit.errors import (
    BadDType,
    FormatError,
    LimitExceeded,
    Malformed,
    Mismatch,
    PluginError,
    ShardkitError,
    UnknownTensor,
)
from shardkit.load import tensors
from shardkit.load.devices import device_lookup
from shardkit.load.diagnostics.explanation import Explanation, Part
from shardkit.load.performance.cost_model import Step
from shardkit.near_names import near
from shardkit.payloads import coalesce
from shardkit.payloads.payload import Literal
from shardkit.planning.prepare import prepare

MATRIX = GOOD / "safetensors-matrix.safetensors"
TRAINING = GOOD / "zip-training.pt"


def subclasses(kind: type[Exception]) -> Iterator[type[Exception]]:
    for each in kind.__subclasses__():
        yield each
        yield from subclasses(each)


def test_every_error_is_exported_and_drawn_in_the_tree() -> None:
    documented = [
        each
        for each in subclasses(ShardkitError)
        if each.__module__ in ("shardkit.errors", "shardkit.load_errors")
    ]
    assert len(documented) > 15
    kinds: list[type[Exception]] = [ShardkitError, *documented]
    for each in kinds:
        assert getattr(shardkit, each.__name__) is each
        assert each.__name__ in shardkit.__all__
        assert each.__name__ in (errors.__doc__ or "")


@pytest.mark.parametrize(
    "error",
    [
        ShardkitError("a", hint="b"),
        FormatError(Path("x"), "a", hint="b"),
        Malformed(Path("x"), "a", where="there"),
        LimitExceeded(Path("x"), "a", limit="tensors", actual=3),
        Mismatch("a", missing=("b",), wrong_shape={"c": ((1,), (2,))}),
        PluginError("d", "e", "f"),
        UnknownTensor("a", ["b"]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_comes_through_a_pickle(error: ShardkitError) -> None:
    error.add_note("seen on Monday")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (str(copy), copy.__dict__) == (str(error), error.__dict__)


def test_a_checkpoint_is_a_mapping() -> None:
    found, arrays = shardkit.open(MATRIX), load_file(MATRIX)
    assert isinstance(found, Mapping)
    assert set(found) == set(found.keys()) == set(arrays)
    assert len(found) == len(arrays) == len(found.values())
    assert all(
        name in found and found.get(name) is entry is found[name] for name, entry in found.items()
    )
    assert found.get("nothing") is None
    assert "nothing" not in found
    assert found == dict(found)
    assert dict(found) == found
    assert found != {}
    assert found == shardkit.open(MATRIX)
    assert hash(found) == hash(shardkit.open(MATRIX))
    assert found != shardkit.open(TRAINING)
    assert {**found} == dict(found.items())


@pytest.mark.parametrize("open_it", [shardkit.open, tensors], ids=["open", "tensors"])
def test_a_name_that_is_not_there_is_an_error_of_both_kinds(open_it: object) -> None:
    assert callable(open_it)
    found = open_it(TRAINING)
    with pytest.raises(KeyError) as raised:
        found["0.wieght"]
    assert isinstance(raised.value, UnknownTensor)
    assert raised.value.name == "0.wieght"
    assert str(raised.value) == "there is no tensor '0.wieght'"
    assert "0.weight'" in (raised.value.hint or "")
    assert found.get("0.wieght", 7) == 7


NEAR = {
    ("h.0.w", ("model.h.0.w", "h.1.w")): ["model.h.0.w"],
    ("model.h.0.w", ("h.0.w", "h.1.w")): ["h.0.w"],
    ("LM_Head.weight", ("lm_head.weight", "head.weight")): ["lm_head.weight"],
    ("lm_haed.weight", ("lm_head.weight", "x")): ["lm_head.weight"],
    ("zzz", ("lm_head.weight",)): [],
    ("", ("a",)): [],
    (3, ("a",)): [],
    ("a" * 10_000, ("a",)): [],
}


@pytest.mark.parametrize(("name", "names"), NEAR, ids=lambda value: ascii(value)[:20])
def test_names_that_are_near(name: object, names: tuple[str, ...]) -> None:
    assert near(name, names) == NEAR[name, names]


def test_names_that_are_near_are_found_among_many() -> None:
    many = [f"layers.{number}.weight" for number in range(200_000)]
    assert near("layers.7.wieght", many)
    assert near("model.layers.70000.weight", many) == ["layers.70000.weight"]


def test_numpy_has_the_values_that_the_reference_reader_has() -> None:
    found, truth = shardkit.open(MATRIX), load_file(MATRIX)
    count = 0
    for name, entry in found.items():
        try:
            array = entry.numpy()
        except BadDType:
            continue
        assert array.flags.writeable
        assert array.shape == entry.shape
        assert np.array_equal(array, truth[name].numpy(), equal_nan=array.dtype.kind in "fc"), name
        count += 1
    assert count > 10
    arrays = load_arrays(GOOD / "safetensors-tied.safetensors")
    for name, entry in shardkit.open(GOOD / "safetensors-tied.safetensors").items():
        assert name not in arrays or np.array_equal(entry.numpy(), arrays[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.code)
def test_numpy_takes_what_it_has_a_type_for_and_else_names_read(dtype: object) -> None:
    from shardkit.dtypes import DType

    assert isinstance(dtype, DType)
    entry = TensorEntry(("a",), dtype, (2, 4), Literal(bytes(8 * dtype.bits // 8)))
    has = dtype.code == "BOOL" or hasattr(np, dtype.torch or "-")
    if has:
        assert entry.numpy().nbytes == entry.nbytes
        assert str(entry.numpy().dtype) == dtype.torch
    else:
        with pytest.raises(BadDType, match=f"'a': NumPy has no type for {dtype.code}") as raised:
            entry.numpy()
        assert ".read()" in (raised.value.hint or "")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    state = {f"layers.{number}.{'weight' * 30}": torch.zeros(1) for number in range(3000)}
    state["tied"] = state[f"layers.0.{'weight' * 30}"]
    torch.save(state | {"epochs": [f"e{number}" for number in range(3000)]}, folder / "many.pt")
    return folder / "many.pt"


def test_a_repr_fits_in_a_few_lines_whatever_there_is(many: Path, tmp_path: Path) -> None:
    found = shardkit.open(many)
    conversion = prepare(many, tmp_path / "out", shardkit.Edits())
    part = Part("x" * 1000, "cpu", "cpu", 3, "fits", Step())
    values: list[object] = [
        found,
        next(iter(found.values())),
        tensors(many),
        conversion,
        conversion.plan,
        conversion.edited,
        shardkit.convert(many, tmp_path / "out", max_shard="100kB", sync=False),
        shardkit.diff(many, TRAINING),
        Explanation("Toy", (part,) * 1000),
    ]
    for value in values:
        assert 20 < len(repr(value)) < 1600, type(value)
        assert repr(value).isprintable()
        assert type(value).__name__ in repr(value) or isinstance(value, Mapping)


def test_a_repr_names_what_is_there() -> None:
    text = repr(shardkit.open(TRAINING))
    assert text.startswith(
        f"<Checkpoint {TRAINING}: torch-zip, 20 tensors, 348 B: 'state_dict.0.weight', "
    )
    assert (
        repr(shardkit.open(TRAINING)["state_dict.0.weight"])
        == "TensorEntry('state_dict.0.weight', F32 [4, 3], 48 B)"
    )
    assert (
        repr(tensors(TRAINING))
        == "<7 tensors on cpu, read when they are used: '0.weight', '0.bias', '1.weight' …>"
    )


@pytest.mark.parametrize(
    "module",
    [alignment, brief, coalesce, device_fit, device_lookup, near_names],
    ids=lambda module: module.__name__,
)
def test_examples_of_private_modules_are_true(module: object) -> None:
    assert inspect.ismodule(module)
    assert doctest.testmod(module).failed == 0
