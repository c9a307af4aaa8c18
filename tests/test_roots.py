import re

import pytest

from shardkit.checkpoint import Checkpoint, Other, OtherKind, TensorEntry
from shardkit.dtypes import BY_CODE
from shardkit.errors import AmbiguousRoot, NothingSelected
from shardkit.payload import Literal
from shardkit.roots import select_root


def tensor(*path: str, shape: tuple[int, ...] = (2,), code: str = "F32") -> TensorEntry:
    dtype = BY_CODE[code]
    return TensorEntry(path, dtype, shape, Literal(bytes(dtype.nbytes(shape))))


def plain(*path: str) -> Other:
    return Other(path, OtherKind.OBJECT, 0, "a list of 1")


OPTIMIZER: list[TensorEntry | Other] = [tensor("optimizer", "state", "0", "exp_avg"), plain("optimizer", "param_groups")]

MODELS: dict[str, tuple[list[TensorEntry | Other], list[str], list[str]]] = {
    "a flat state dict": ([tensor("a.weight"), tensor("a.bias")], ["a.weight", "a.bias"], []),
    "a flat one with a counter": ([tensor("bn.w"), tensor("bn.count", shape=(), code="I64")], ["bn.w", "bn.count"], []),
    "a model beside its optimizer": ([tensor("model", "w"), *OPTIMIZER], ["w"], ["optimizer"]),
    "a model in a wrapper": ([tensor("model", "state_dict", "w")], ["w"], []),
    "an average and no model": ([plain("model"), tensor("ema", "w")], ["w"], ["model"]),
    "a list of optimizers": (
        [tensor("state_dict", "w"), tensor("optimizers", "0", "state", "0", "m"), plain("optimizers", "0", "param_groups")],
        ["w"],
        ["optimizers"],
    ),
    "an optimizer that keeps its own weights": (
        [
            tensor("model", "w"),
            tensor("optimizer", "inner", "state", "0", "m"),
            plain("optimizer", "inner", "param_groups"),
            tensor("optimizer", "fp32", "0", "0"),
        ],
        ["w"],
        ["optimizer"],
    ),
    "random-number states": (
        [tensor("model", "w"), tensor("rng", shape=(5056,), code="U8"), tensor("cuda_rng", "0", shape=(16,), code="U8")],
        ["w"],
        ["cuda_rng", "rng"],
    ),
    "a step counter": ([tensor("model", "w"), tensor("step", shape=(), code="I64")], ["w"], ["step"]),
    "a flat model beside an optimizer": ([tensor("w"), *OPTIMIZER], ["w"], ["optimizer"]),
    "nothing but an optimizer": (OPTIMIZER, ["optimizer.state.0.exp_avg"], []),
    "a nest with tensors at its top": ([tensor("w"), tensor("inner", "w")], ["w", "inner.w"], []),
    "one lone tensor in a wrapper": ([tensor("model", "w"), plain("epoch")], ["w"], ["epoch"]),
    "one lone tensor": ([tensor("w")], ["w"], []),
}


@pytest.mark.parametrize(("contents", "names", "left_out"), MODELS.values(), ids=MODELS)
def test_the_model_is_found_by_the_shape_of_the_tree(
    contents: list[TensorEntry | Other], names: list[str], left_out: list[str]
) -> None:
    tensors = tuple(each for each in contents if isinstance(each, TensorEntry))
    others = tuple(each for each in contents if isinstance(each, Other))
    rooted = select_root(Checkpoint(tensors, others), None)
    assert [entry.name for entry in rooted.tensors] == names
    assert sorted(out.name for out in rooted.left_out) == left_out


def test_what_is_left_out_is_said_with_its_bytes() -> None:
    state = tensor("optimizer", "state", "0", "m", shape=(5,))
    rooted = select_root(Checkpoint((tensor("model", "w"), state), (plain("optimizer", "param_groups"),)), None)
    (left_out,) = rooted.left_out
    assert (left_out.name, left_out.nbytes, left_out.reason) == ("optimizer", 20, "optimizer state")


def test_several_candidates_are_listed_with_their_sizes_and_the_largest_is_suggested() -> None:
    checkpoint = Checkpoint((tensor("generator", "w"), tensor("discriminator", "w", shape=(1000,))))
    with pytest.raises(AmbiguousRoot, match=re.escape("'generator' (8 B), 'discriminator' (4.00 kB)")) as caught:
        select_root(checkpoint, None)
    assert caught.value.hint == "choose one with root='discriminator', or take all with root='.'"
    assert caught.value.command_hint == "choose one with --root discriminator, or take all with --root ."


def test_a_sparse_weight_makes_a_subtree_a_candidate() -> None:
    sparse = Other(("b", "w"), OtherKind.SPARSE, 8, "sparse")
    with pytest.raises(AmbiguousRoot):
        select_root(Checkpoint((tensor("a", "w"),), (sparse,)), None)


@pytest.mark.parametrize(
    ("root", "names"),
    [(".", ["m.x.w", "m.x.v", "n.w"]), ("m", ["x.w", "x.v"]), ("m.x", ["w", "v"]), ("n", ["w"])],
)
def test_a_root_is_a_dotted_path(root: str, names: list[str]) -> None:
    checkpoint = Checkpoint((tensor("m", "x", "w"), tensor("m", "x", "v"), tensor("n", "w")))
    assert [entry.name for entry in select_root(checkpoint, root).tensors] == names


def test_a_name_on_the_way_may_hold_dots() -> None:
    checkpoint = Checkpoint((tensor("a.b", "c", "w"), tensor("a", "x", "w")))
    assert [entry.name for entry in select_root(checkpoint, "a.b.c").tensors] == ["w"]


def test_a_root_that_is_not_there_says_what_is() -> None:
    with pytest.raises(NothingSelected, match=re.escape("nothing to enter at 'modle'; the file holds 'model', 'n'")):
        select_root(Checkpoint((tensor("model", "w"), tensor("n", "w"))), "modle")


def test_a_tree_of_any_depth_is_walked() -> None:
    path = ("a",) * 50_000
    deep = Checkpoint((tensor(*path, "w"), tensor("optimizer", "state", *path, "m")), (plain("optimizer", "param_groups"),))
    (found,) = select_root(deep, None).tensors
    assert found.path == ("w",)


def test_two_undense_weights_at_the_top_are_the_model() -> None:
    sparse = tuple(Other((name,), OtherKind.SPARSE, 8, "sparse") for name in "ab")
    assert select_root(Checkpoint((), sparse), None).others == sparse
