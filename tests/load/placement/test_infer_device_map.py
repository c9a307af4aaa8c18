"""Device maps: the same as Accelerate's wherever Accelerate is right, and right where it is not;
each test runs both.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from libraries import as_of, peer
from shardkit.errors import BadDType
from shardkit.load.modules.init_empty import init_empty_weights
from shardkit.load.modules.sizes import module_sizes, tied_groups
from shardkit.load.placement.infer_device_map import infer_auto_device_map

theirs = peer("accelerate.utils")
transformers = peer("transformers")

Budgets = dict[int | str | torch.device, int | float | str]
F4: Any = getattr(torch, "float4_e2m1fn_x2", None)
has_f4 = pytest.mark.skipif(F4 is None, reason="torch has this type since 2.8")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)  # Accelerate warns of devices that this machine has not
    yield
    logging.disable(logging.NOTSET)


class ForTest(nn.Module):
    """The model of Accelerate's own tests: 64, 72 and 160 bytes or so in three parts, with a
    buffer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear1 = nn.Linear(3, 4)
        self.batchnorm = nn.BatchNorm1d(4)
        self.linear2 = nn.Linear(4, 5)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner1, self.inner2 = ForTest(), ForTest()


class Pair(nn.Module):
    """Two linear layers, tied if asked for."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False)
        if tied:
            self.linear2.weight = self.linear1.weight


class Block(nn.Module):
    pass


class Group(nn.Module):
    pass


def grown(seed: int, *, ties: bool) -> tuple[random.Random, nn.Module]:
    """A model with layers, bare parameters, buffers, empty modules and, if asked for, tied weights
    here and there.
    """
    draw = random.Random(seed)
    linears: list[nn.Linear] = []

    def grow(depth: int) -> nn.Module:
        module = draw.choice([Block, Group])()
        for _ in range(draw.randint(1, 4)):
            name = f"part{len(names):04}"
            names.append(name)
            what = draw.random()
            if what < 0.45 and depth < 3:
                setattr(module, name, grow(depth + 1))
            elif what < 0.55:
                setattr(module, name, nn.Parameter(torch.empty(draw.randint(1, 40))))
            elif what < 0.62 and not depth:  # deeper down, Accelerate forgets them
                module.register_buffer(name, torch.empty(draw.randint(1, 30)))
            elif what < 0.7:
                setattr(module, name, nn.Dropout())
            elif what < 0.8:
                setattr(module, name, nn.BatchNorm1d(draw.randint(1, 9)))
            else:
                linear = nn.Linear(draw.randint(1, 9), draw.randint(1, 9))
                if ties and linears and draw.random() < 0.2:
                    linear.weight = draw.choice(linears).weight
                linears.append(linear)
                setattr(module, name, linear)
        return module

    names: list[str] = []
    with init_empty_weights(include_buffers=True):
        return draw, grow(0)


def budgets_for(draw: random.Random, total: int) -> Budgets:
    budgets: Budgets = {number: draw.randint(0, total) for number in range(draw.randint(0, 3))}
    return budgets | {"cpu": draw.randint(0, total + 10)}


def accelerates(
    model: nn.Module, budgets: Budgets, *arguments: Any, **options: Any
) -> dict[str, object]:
    """The map that Accelerate makes, which would change the budgets that it is given."""
    return dict(theirs.infer_auto_device_map(model, dict(budgets), *arguments, **options))


@pytest.mark.parametrize("part", range(4))
def test_maps_of_models_without_ties_are_accelerates(part: int) -> None:
    for seed in range(part * 150, part * 150 + 150):
        draw, model = grown(seed, ties=False)
        budgets = budgets_for(draw, module_sizes(model)[""])
        classes = draw.choice([None, "Block", ["Group"], ["Block", "Group"]])
        options: dict[str, Any] = {
            "fallback_allocation": draw.random() < 0.3,
            "clean_result": draw.random() < 0.8,
            "dtype": draw.choice([None, "float16", torch.bfloat16]),
            "offload_buffers": True,
        }
        ours = infer_auto_device_map(model, budgets, classes, **options)
        assert ours == accelerates(model, budgets, classes, **options), (
            seed,
            budgets,
            classes,
            options,
        )


def test_maps_of_models_with_ties_are_accelerates_where_a_part_is_tied_once() -> None:
    compared = 0
    for seed in range(400):
        draw, model = grown(seed, ties=True)
        groups = tied_groups(model)
        budgets = budgets_for(draw, module_sizes(model)[""])
        tied = [name for group in groups for name in group]
        if not groups or any(
            len({name.split(".")[0] for name in group}) < len(group) for group in groups
        ):
            continue  # ties within one part: Accelerate counts that part twice
        if len({name.split(".")[0] for name in tied}) < len(tied):
            continue
        compared += 1
        assert infer_auto_device_map(model, budgets, offload_buffers=True) == accelerates(
            model, budgets, offload_buffers=True
        ), seed
    assert compared > 20


def tiny(kind: str) -> nn.Module:
    small: dict[str, Any] = {"vocab_size": 100}
    match kind:
        case "llama" | "llama tied":
            small |= {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
            }
            config: Any = transformers.LlamaConfig(
                **small, num_key_value_heads=2, tie_word_embeddings=kind == "llama tied"
            )
            make: Any = transformers.LlamaForCausalLM
        case "t5":
            config = transformers.T5Config(
                **small, d_model=32, d_ff=64, num_layers=3, num_heads=4, d_kv=8
            )
            make = transformers.T5ForConditionalGeneration
        case "gpt2":
            config = transformers.GPT2Config(
                **small, n_embd=32, n_layer=4, n_head=4, n_positions=16
            )
            make = transformers.GPT2LMHeadModel
        case "mixtral":
            small |= {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
            }
            config = transformers.MixtralConfig(**small, num_key_value_heads=2, num_local_experts=4)
            make = transformers.MixtralForCausalLM
        case _:
            config = transformers.ViTConfig(
                hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64
            )
            make = transformers.ViTForImageClassification
    with init_empty_weights():
        model: nn.Module = make(config)
    return model


@as_of("accelerate", "1.15")
@pytest.mark.parametrize("kind", ["llama", "llama tied", "t5", "gpt2", "mixtral", "vit"])
def test_maps_of_transformers_are_accelerates(kind: str) -> None:
    model = tiny(kind)
    total = module_sizes(model)[""]
    whole: Any = getattr(model, "_no_split_modules", None)
    for classes in (None, list(whole)):
        for twentieths in range(0, 22, 2):
            share = total * twentieths // 20
            cases: list[Budgets] = [
                {"cpu": share},
                {0: share, "cpu": total // 3},
                {0: share // 2, 1: share // 3, "cpu": total // 10},
                {0: 0, 1: share, 2: total // 4, "cpu": 0},
            ]
            for budgets in cases:
                ours = infer_auto_device_map(model, budgets, classes, offload_buffers=True)
                assert ours == accelerates(model, budgets, classes, offload_buffers=True), (
                    budgets,
                    classes,
                )


# Accelerate's own table: the model, the budgets, options, the map.
OWN: list[tuple[Callable[[], nn.Module], Budgets, dict[str, Any], dict[str, object]]] = [
    (ForTest, {0: 200, 1: 200}, {}, {"linear1": 0, "batchnorm": 1, "linear2": 1}),
    (ForTest, {0: 200, 1: 172, 2: 200}, {}, {"linear1": 0, "batchnorm": 1, "linear2": 1}),
    (ForTest, {0: 200, 1: 32, 2: 200}, {}, {"linear1": 0, "batchnorm": 2, "linear2": 2}),
    (
        Nested,
        {0: 200, 1: 200, 2: 200, "cpu": 1000},
        {"no_split_module_classes": ["ForTest"]},
        {"": "cpu"},
    ),
    (lambda: Pair(tied=True), {0: 399, "cpu": 1000}, {}, {"": "cpu"}),
    (lambda: Pair(tied=True), {0: 400, "cpu": 1000}, {}, {"": 0}),
]


@pytest.mark.parametrize(("build", "budgets", "options", "expected"), OWN)
def test_small_models_are_placed_as_by_accelerate(
    build: Callable[[], nn.Module],
    budgets: Budgets,
    options: dict[str, Any],
    expected: dict[str, object],
) -> None:
    with_cpu = {"cpu": 0, **budgets}
    model = build()
    ours = infer_auto_device_map(model, with_cpu, **options, offload_buffers=True)
    assert ours == accelerates(model, with_cpu, **options, offload_buffers=True)
    assert ours == expected


def test_a_bare_parameter_keeps_its_place_before_the_layers() -> None:
    model = nn.Module()
    model.weight, model.linear = nn.Parameter(torch.empty(1000)), nn.Linear(31, 31)
    budgets: Budgets = {"cpu": 6000}
    assert infer_auto_device_map(model, budgets) == accelerates(model, budgets)


def test_an_upcast_is_counted() -> None:
    model = nn.Sequential(*[nn.Linear(100, 100, bias=False, dtype=torch.float16) for _ in range(4)])
    budgets: Budgets = {"cpu": 100_000}
    assert accelerates(model, budgets, dtype=torch.float32) == {"": "cpu"}  # it takes 160,000
    assert infer_auto_device_map(model, budgets, dtype=torch.float32) == {
        "0": "cpu",
        "1": "disk",
        "2": "disk",
        "3": "disk",
    }


@pytest.mark.parametrize(
    ("dtype", "target", "right", "accelerates_size"),
    [
        (torch.float16, torch.float32, 400, 200),
        (torch.bool, None, 100, 12),
        (torch.bool, torch.float16, 100, 12),
        (torch.uint4, None, 100, 0),  # type: ignore[attr-defined] # its stubs leave it out
        pytest.param(F4, None, 100, 0, marks=has_f4),
        (torch.complex64, torch.float16, 800, 200),
        (torch.float32, torch.float16, 200, 200),
        (torch.int64, torch.float16, 800, 800),
        (torch.float8_e4m3fn, torch.float16, 100, 100),
    ],
    ids=str,
)
def test_sizes_are_true(
    dtype: torch.dtype, target: torch.dtype | None, right: int, accelerates_size: int
) -> None:
    model = nn.Module()
    model.register_buffer("weight", torch.empty(100, dtype=dtype, device="meta"))
    assert module_sizes(model, target) == {"": right, "weight": right}
    assert int(theirs.compute_module_sizes(model, target)[""]) == accelerates_size


@pytest.mark.parametrize(
    ("special", "nbytes"),
    [
        ("float16", 10),
        (torch.float64, 40),
        ("int4", 3),
        pytest.param(F4, 3, marks=has_f4),
        (theirs.CustomDtype.INT4, 3),
        ("fp8", 5),
    ],
    ids=str,
)
def test_a_special_type_overrules(special: Any, nbytes: int) -> None:
    model = nn.Linear(5, 1, bias=False)
    assert module_sizes(model, "float32", {"weight": special})[""] == nbytes


@pytest.mark.parametrize("name", ["nn", "load", "half-ish", "f6_e2m3"])
def test_what_is_no_type_of_torch_is_refused(name: str) -> None:
    with pytest.raises(BadDType, match=name):
        module_sizes(nn.Linear(5, 1), name)


def test_lazy_parameters_have_no_size_yet() -> None:
    assert module_sizes(nn.LazyLinear(3)) == {"": 0, "weight": 0, "bias": 0}


def test_parts_that_share_a_piece_of_a_name_are_not_tied() -> None:
    model = nn.Sequential(
        nn.Linear(4, 4), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), nn.Linear(8, 8)
    )
    model[2].weight = model.get_parameter(
        "1.0.weight"
    )  # in this name Accelerate finds the module "0"
    budgets: Budgets = {0: 700, "cpu": 10_000}
    assert infer_auto_device_map(model, budgets) == {"0": 0, "1": "cpu", "2": "cpu"}
    with pytest.raises(IndexError):
        accelerates(model, budgets)


def test_a_part_that_is_tied_twice_is_counted_once() -> None:
    model = nn.Module()
    model.embed = nn.Linear(4, 4)
    model.head = nn.Sequential(nn.Linear(4, 4), nn.Linear(100, 2))
    model.head[0].weight, model.head[0].bias = model.embed.weight, model.embed.bias
    budgets: Budgets = {0: 2000, "cpu": 0}  # 888 bytes, and 808 that are kept free
    assert infer_auto_device_map(model, budgets, "Sequential") == {"": 0}
    assert accelerates(model, budgets, "Sequential") == {"": "disk"}


def test_a_tied_parameter_that_stands_bare_is_placed() -> None:
    model = nn.Module()
    model.first = nn.Linear(4, 4)
    model.second = nn.Module()
    model.second.weight, model.second.inner = model.first.weight, nn.Linear(50, 50)
    model.third = nn.Linear(50, 50)
    budgets: Budgets = {0: 11_000, "cpu": 100_000}
    assert infer_auto_device_map(model, budgets) == {
        "first": 0,
        "second.weight": 0,
        "second.inner": "cpu",
        "third": "cpu",
    }
    with pytest.raises(IndexError):
        accelerates(model, budgets)


def test_the_buffers_of_a_part_that_is_split_have_a_device() -> None:
    model = nn.Module()
    model.part = nn.Module()
    model.part.first, model.part.second, model.part.third = (
        nn.Linear(4, 4),
        nn.Linear(50, 50),
        nn.Linear(50, 50),
    )
    model.part.register_buffer("table", torch.ones(10))
    budgets: Budgets = {0: 11_000, "cpu": 100}
    ours = infer_auto_device_map(model, budgets, offload_buffers=True)
    assert ours == {"part.table": 0, "part.first": 0, "part.second": "disk", "part.third": "disk"}
    with pytest.raises(ValueError, match=r"part\.table"):
        theirs.check_device_map(model, accelerates(model, budgets, offload_buffers=True))


def test_a_module_with_two_names_has_a_device_under_both() -> None:
    model = nn.Module()
    model.first = nn.Linear(4, 4)
    model.again = model.first
    model.second, model.third = nn.Linear(50, 50), nn.Linear(50, 50)
    budgets: Budgets = {0: 11_000, "cpu": 100}
    assert infer_auto_device_map(model, budgets) == {
        "first": 0,
        "again": 0,
        "second": "disk",
        "third": "disk",
    }
    with pytest.raises(IndexError):
        accelerates(model, budgets)


def test_budgets_are_left_as_they_are() -> None:
    budgets: Budgets = {0: "1MB", "cpu": "1GB"}
    infer_auto_device_map(Pair(), budgets)
    assert budgets == {0: "1MB", "cpu": "1GB"}
    theirs.infer_auto_device_map(Pair(), budgets)
    assert budgets != {0: "1MB", "cpu": "1GB"}


def test_without_a_word_on_the_cpu_it_takes_what_the_accelerators_cannot() -> None:
    assert infer_auto_device_map(Pair(), {0: 0}) == {"": "cpu"}
    assert accelerates(Pair(), {0: 0}) == {"": "disk"}


def test_a_lower_case_b_is_a_byte() -> None:
    model = Pair()
    budgets: Budgets = {0: "1kb", "cpu": 0}
    assert infer_auto_device_map(model, budgets) == {"": 0}
    assert accelerates(model, budgets) == {"": "disk"}


def test_buffers_that_fit_no_accelerator_are_warned_of() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(1000))
    with pytest.warns(UserWarning, match="offload_buffers=True"):
        infer_auto_device_map(model, {0: 100, "cpu": 100_000})
    with pytest.warns(UserWarning, match="offload_buffers=True"):
        accelerates(model, {0: 100, "cpu": 100_000})
    infer_auto_device_map(model, {0: 100, "cpu": 100_000}, offload_buffers=True)


def test_decisions_can_be_read(caplog: pytest.LogCaptureFixture) -> None:
    logging.disable(logging.NOTSET)
    with caplog.at_level(logging.INFO, logger="shardkit.load.placement.infer_device_map"):
        infer_auto_device_map(Pair(), {0: 0, "cpu": 0})
        assert [record.message for record in caplog.records if "nothing fits" in record.message]
        assert not [record.message for record in caplog.records if "goes to" in record.message]
        infer_auto_device_map(Pair(), {0: 0, "cpu": 0}, verbose=True)
    assert "linear1 (400 B) goes to disk" in caplog.text
