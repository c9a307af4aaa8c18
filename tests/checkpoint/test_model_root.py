import re

import pytest

from shardkit.checkpoint.entries import Checkpoint, Other, OtherKind, TensorEntry
from shardkit.checkpoint.model_root import select_root
from shardkit.dtypes import BY_CODE
from shardkit.errors import AmbiguousRoot, NothingSelected
from shardkit.payloads.payload import Literal


def tensor(*path: str, shape: tuple[int, ...] = (2,), code: str = "F32") -> TensorEntry:
    dtype = BY_CODE[code]
    return TensorEntry(path, dtype, shape, Literal(bytes(dtype.nbytes(shape))))


def plain(*path: str) -> Other:
    return Other(path, OtherKind.OBJECT, 0, "a list of 1")


OPTIMIZER: list[TensorEntry | Other] = [
    tensor("optimizer", "state", "0", "exp_avg"),
    plain("optimizer", "param_groups"),
]

MODELS: dict[str, tuple[list[TensorEntry | Other], list[str], list[str]]] = {
    "a flat state dict": ([tensor("a.weight"), tensor("a.bias")], ["a.weight", "a.bias"], []),
    "a flat one with a counter": (
        [tensor("bn.w"), tensor("bn.count", shape=(), code="I64")],
        ["bn.w", "bn.count"],
        [],
    ),
    "a model beside its optimizer": ([tensor("model", "w"), *OPTIMIZER], ["w"], ["optimizer"]),
    "a model in a wrapper": ([tensor("model", "state_dict", "w")], ["w"], []),
    "an average and no model": ([plain("model"), tensor("ema", "w")], ["w"], ["model"]),
    "a list of optimizers": (
        [
            tensor("state_dict", "w"),
            tensor("optimizers", "0", "state", "0", "m"),
            plain("optimizers", "0", "param_groups"),
        ],
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
        [
            tensor("model", "w"),
            tensor("rng", shape=(5056,), code="U8"),
            tensor("cuda_rng", "0", shape=(16,), code="U8"),
        ],
        ["w"],
        ["cuda_rng", "rng"],
    ),
    "a step counter": (
        [tensor("model", "w"), tensor("step", shape=(), code="I64")],
        ["w"],
        ["step"],
    ),
    "a flat model beside an optimizer": ([tensor("w"), *OPTIMIZER], ["w"], ["optimizer"]),
    "a nest with tensors at its top": ([tensor("w"), tensor("inner", "w")], ["w", "inner.w"], []),
    "one lone tensor in a wrapper": ([tensor("model", "w"), plain("epoch")], ["w"], ["epoch"]),
    "one lone tensor": ([tensor("w")], ["w"], []),
}


def model(name: str) -> list[TensorEntry | Other]:
    return [tensor(name, "layer.weight", shape=(2, 2)), tensor(name, "layer.bias")]


CALLBACKS = tensor("callbacks", "Ema", "weights", shape=(2, 2))

# What training programs write, as far as it matters: where the model is, and what is left out.
PROGRAMS: dict[str, tuple[list[TensorEntry | Other], str, list[str]]] = {
    "Lightning": (
        [
            *model("state_dict"),
            tensor("hyper_parameters", "class_weights"),
            CALLBACKS,
            plain("epoch"),
        ],
        "state_dict",
        ["callbacks", "epoch", "hyper_parameters"],
    ),
    "SevenNet": (
        [
            *model("model_state_dict"),
            tensor("config", "shift", shape=(9,)),
            tensor("config", "table", shape=(9, 2)),
        ],
        "model_state_dict",
        ["config"],
    ),
    "MMEngine, whose histories are arrays": (
        [
            *model("state_dict"),
            tensor("message_hub", "log_scalars", "loss", "_log_history", shape=(900,), code="F64"),
        ],
        "state_dict",
        ["message_hub"],
    ),
    "DeepSpeed": (
        [*model("module"), tensor("frozen_param_fragments", "w", shape=(2, 2))],
        "module",
        ["frozen_param_fragments"],
    ),
    "fastai": (
        [
            *model("model"),
            tensor("opt", "state", "0", "grad_avg", shape=(2, 2)),
            plain("opt", "hypers"),
        ],
        "model",
        ["opt"],
    ),
    "a model beside its statistics": (
        [*model("model"), tensor("mean"), tensor("std")],
        "model",
        ["mean", "std"],
    ),
    "a state dict beside a table": (
        [*model("state_dict"), tensor("confusion", shape=(9, 9))],
        "state_dict",
        ["confusion"],
    ),
    "a net beside arguments": (
        [*model("net"), tensor("args", "anchors", shape=(9, 2))],
        "net",
        ["args"],
    ),
    "a generator beside arguments": (
        [*model("generator"), tensor("args", "anchors", shape=(9, 2))],
        "generator",
        ["args"],
    ),
}

AMBIGUOUS: dict[str, tuple[list[TensorEntry | Other], str]] = {
    "timm, with an average": (
        [*model("state_dict"), *model("state_dict_ema")],
        "--root state_dict, or its moving average with --root state_dict_ema,",
    ),
    "a model and its average": (
        [*model("ema"), *model("model")],
        "--root model, or its moving average with --root ema,",
    ),
    "an average without a matrix": (
        [*model("state_dict"), tensor("ema", "v")],
        "--root state_dict, or its moving average",
    ),
    "two models": (
        [*model("discriminator"), *model("model")],
        "--root model, or convert everything",
    ),
    "a model and a head": (
        [*model("model"), *model("projector")],
        "--root model, or convert everything",
    ),
    "a model and a part without a matrix": (
        [*model("model"), tensor("norm", "v")],
        "--root model, or convert everything",
    ),
    "two conventional names": (
        [*model("model"), *model("net")],
        "--root model, or convert everything",
    ),
    "state dicts of several": (
        [*model("state_dict"), tensor("obs_norm_state_dict", "mean")],
        "--root state_dict, or convert everything",
    ),
}


@pytest.mark.parametrize(("contents", "path", "left_out"), PROGRAMS.values(), ids=PROGRAMS)
def test_the_model_of_training_programs_is_found_and_the_rest_is_told(
    contents: list[TensorEntry | Other], path: str, left_out: list[str]
) -> None:
    rooted = select_root(checkpoint_of(contents), None)
    assert rooted.path == (path,)
    assert [entry.name for entry in rooted.tensors] == ["layer.weight", "layer.bias"]
    assert sorted(out.path for out in rooted.left_out) == left_out


@pytest.mark.parametrize(("contents", "hint"), AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_what_could_be_the_model_too_is_asked_for(
    contents: list[TensorEntry | Other], hint: str
) -> None:
    with pytest.raises(AmbiguousRoot) as caught:
        select_root(checkpoint_of(contents), None)
    assert hint in str(caught.value.command_hint)


def test_a_state_dict_of_dicts_is_not_cut_where_a_module_is_called_model() -> None:
    contents = [*model("model"), tensor("head", "weight", shape=(2, 2))]
    with pytest.raises(AmbiguousRoot):
        select_root(checkpoint_of(contents), None)
    flat = [*model("model"), tensor("head.weight", shape=(2, 2)), tensor("bias")]
    assert select_root(checkpoint_of(flat), None).path == ()


ADAM: list[TensorEntry | Other] = [
    tensor("state", "0", "exp_avg", shape=(2, 2)),
    plain("param_groups"),
]
GENERATOR = tensor("cpu", shape=(5056,), code="U8")
NO_MODELS: dict[str, tuple[list[TensorEntry | Other], str, str]] = {
    "an optimizer": (ADAM, "optimizer state", "model.safetensors"),
    "one of many parameters": (
        [*ADAM, tensor("state", "1", "exp_avg", shape=(2, 2))],
        "optimizer state",
        "model.safetensors",
    ),
    "one in a wrapper": (OPTIMIZER, "optimizer state", "model.safetensors"),
    "one beside its scaler": (
        [*OPTIMIZER, tensor("scaler", "scale", shape=())],
        "optimizer state",
        "model.safetensors",
    ),
    "one beside a generator": ([*OPTIMIZER, GENERATOR], "optimizer state", "model.safetensors"),
    "a partition of ZeRO": (
        [
            tensor("optimizer_state_dict", "single_partition_of_fp32_groups", "0"),
            tensor("optimizer_state_dict", "base_optimizer_state", "state", "0", "exp_avg"),
            plain("optimizer_state_dict", "base_optimizer_state", "param_groups"),
            plain("optimizer_state_dict", "zero_stage"),
        ],
        "optimizer state that DeepSpeed ZeRO has partitioned",
        "*_model_states.pt",
    ),
    "a partition of ZeRO-3": (
        [
            tensor("optimizer_state_dict", "fp32_flat_groups", "0"),
            tensor("optimizer_state_dict", "optimizer_state_dict", "state", "0", "exp_avg"),
            plain("optimizer_state_dict", "optimizer_state_dict", "param_groups"),
        ],
        "optimizer state that DeepSpeed ZeRO has partitioned",
        "zero_to_fp32.py",
    ),
    "a scheduler": (
        [tensor("_last_lr", "0", shape=()), plain("last_epoch"), plain("_step_count")],
        "scheduler",
        "beside it",
    ),
    "a generator": ([GENERATOR, plain("python")], "random-number state", "beside it"),
    "generators of NumPy and of devices": (
        [
            tensor("numpy", "1", shape=(624,), code="U32"),
            tensor("cuda", "0", shape=(16,), code="U8"),
            plain("python"),
        ],
        "random-number state",
        "beside it",
    ),
}


@pytest.mark.parametrize(("contents", "state", "model"), NO_MODELS.values(), ids=NO_MODELS)
def test_a_file_that_is_no_model_is_refused_with_what_it_is_and_where_the_model_is(
    contents: list[TensorEntry | Other], state: str, model: str
) -> None:
    checkpoint = checkpoint_of(contents)
    with pytest.raises(NothingSelected, match=f"holds .*{state} but no model") as caught:
        select_root(checkpoint, None)
    assert model in str(caught.value.command_hint)
    assert "--root ." in str(caught.value.command_hint)
    assert len(select_root(checkpoint, ".").tensors) == len(checkpoint.tensors)


@pytest.mark.parametrize(
    "contents",
    [
        [tensor("w", shape=())],
        [tensor("codes", shape=(300,), code="U8")],
        [tensor("w", shape=(2, 2)), GENERATOR],
    ],
    ids=["a scalar", "codes", "a model beside a generator"],
)
def test_little_is_not_taken_for_the_state_of_a_generator(
    contents: list[TensorEntry | Other],
) -> None:
    assert len(select_root(checkpoint_of(contents), None).tensors) == len(contents)


def checkpoint_of(contents: list[TensorEntry | Other]) -> Checkpoint:
    tensors = tuple(each for each in contents if isinstance(each, TensorEntry))
    return Checkpoint(tensors, tuple(each for each in contents if isinstance(each, Other)))


@pytest.mark.parametrize(("contents", "names", "left_out"), MODELS.values(), ids=MODELS)
def test_the_model_is_found_by_the_shape_of_the_tree(
    contents: list[TensorEntry | Other], names: list[str], left_out: list[str]
) -> None:
    rooted = select_root(checkpoint_of(contents), None)
    assert [entry.name for entry in rooted.tensors] == names
    assert sorted(out.path for out in rooted.left_out) == left_out


def test_what_is_left_out_is_said_with_its_bytes() -> None:
    state = tensor("optimizer", "state", "0", "m", shape=(5,))
    rooted = select_root(
        Checkpoint((tensor("model", "w"), state), (plain("optimizer", "param_groups"),)), None
    )
    (left_out,) = rooted.left_out
    assert (left_out.path, left_out.nbytes, left_out.reason) == ("optimizer", 20, "optimizer state")


def test_several_candidates_are_listed_with_their_sizes_and_the_largest_is_suggested() -> None:
    checkpoint = Checkpoint((tensor("generator", "w"), tensor("discriminator", "w", shape=(1000,))))
    with pytest.raises(
        AmbiguousRoot, match=re.escape("'generator' (8 B), 'discriminator' (4.00 kB)")
    ) as caught:
        select_root(checkpoint, None)
    assert caught.value.hint == (
        "choose one with root='discriminator', or convert everything with root='.'"
    )
    assert (
        caught.value.command_hint
        == "choose one with --root discriminator, or convert everything with --root ."
    )


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
    with pytest.raises(
        NothingSelected, match=re.escape("no subtree 'modle'; the file holds 'model', 'n'")
    ):
        select_root(Checkpoint((tensor("model", "w"), tensor("n", "w"))), "modle")


def test_a_tree_of_any_depth_is_walked() -> None:
    path = ("a",) * 50_000
    deep = Checkpoint(
        (tensor(*path, "w"), tensor("optimizer", "state", *path, "m")),
        (plain("optimizer", "param_groups"),),
    )
    (found,) = select_root(deep, None).tensors
    assert found.path == ("w",)


def test_two_undense_weights_at_the_top_are_the_model() -> None:
    sparse = tuple(Other((name,), OtherKind.SPARSE, 8, "sparse") for name in "ab")
    assert select_root(Checkpoint((), sparse), None).others == sparse
