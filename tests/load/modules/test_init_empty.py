"""Models without weights: what is meta and what is not, ties, classes, threads, and what Accelerate
does in the same place.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrizations import weight_norm
from torch.testing._internal.two_tensor import TwoTensor

from libraries import peer
from shardkit.load.modules.init_empty import init_empty_weights, init_on_device

accelerate = peer("accelerate")
transformers = peer("transformers")

META = torch.device("meta")


class Marked(nn.Parameter):
    """A kind of parameter whose constructor is not to be asked again."""

    def __new__(cls, data: torch.Tensor, *, mark: str, requires_grad: bool = True) -> Marked:
        made = torch.Tensor._make_subclass(cls, data, requires_grad)
        made.mark = mark
        return made

    mark: str


class Tied(nn.Module):
    """An embedding and a head with one weight, and a buffer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("derived", torch.full((2,), 3.0), persistent=False)


def llama() -> Any:  # Any, here and below: of a library without types
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=50,
        )
    )


def t5() -> Any:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=16, d_ff=32, num_layers=2, num_heads=2, d_kv=8, vocab_size=50)
    )


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=8)
    )


def bert() -> Any:
    return transformers.BertForMaskedLM(
        transformers.BertConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            vocab_size=50,
            max_position_embeddings=8,
        )
    )


MODELS: list[Callable[[], nn.Module]] = [
    lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Linear(4, 2)),
    lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True),
    lambda: nn.Transformer(8, 2, 1, 1, 16, batch_first=True),
    lambda: nn.ParameterList([torch.ones(2), torch.ones(3)]),
    Tied,
    llama,
    t5,
    gpt2,
    bert,
]


def portrait(model: nn.Module) -> dict[str, tuple[object, ...]]:
    """What can be said of each tensor but its value."""
    tensors = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    return {
        name: (each.device, each.shape, each.dtype, each.requires_grad, type(each))
        for name, each in tensors
    }


@pytest.mark.parametrize("build", MODELS)
def test_the_same_is_meta_as_with_accelerate(build: Callable[[], nn.Module]) -> None:
    with accelerate.init_empty_weights():
        theirs = build()
    with init_empty_weights():
        ours = build()
    assert portrait(ours) == portrait(theirs)


@pytest.mark.parametrize("build", MODELS)
def test_with_buffers_all_is_meta_that_a_checkpoint_holds(build: Callable[[], nn.Module]) -> None:
    with init_empty_weights(include_buffers=True):
        ours = build()
    kept = ours.state_dict(keep_vars=True)
    assert all(tensor.device == META for tensor in kept.values())
    assert not [
        name for name, buffer in ours.named_buffers() if name not in kept and buffer.device == META
    ]


def test_a_buffer_that_no_checkpoint_holds_is_lost_by_accelerate_and_not_by_us() -> None:
    with accelerate.init_empty_weights(include_buffers=True):
        theirs = Tied()
    with init_empty_weights(include_buffers=True):
        ours = Tied()
    assert theirs.get_buffer("derived").device == META
    assert ours.get_buffer("derived").tolist() == [3.0, 3.0]
    assert ours.get_buffer("kept").device == META


def test_ties_survive_where_accelerate_breaks_them() -> None:
    with accelerate.init_empty_weights():
        theirs = Tied()
    with init_empty_weights():
        ours = Tied()
    assert theirs.head.weight is not theirs.embed.weight
    assert ours.head.weight is ours.embed.weight


def test_an_object_registered_twice_has_one_twin() -> None:
    shared = nn.Parameter(torch.ones(3))
    with init_empty_weights():
        a, b = nn.Module(), nn.Module()
        a.weight, b.weight = shared, shared
        b.again = a.weight
    assert a.weight is b.weight
    assert b.again is b.weight
    assert a.weight is not shared
    assert shared.device.type == "cpu"


def test_class_attributes_and_gradient_flag_are_kept() -> None:
    with init_empty_weights():
        module = nn.Module()
        module.weight = Marked(torch.ones(3), mark="mine", requires_grad=False)
        module.whole = nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)
    assert type(module.weight) is Marked
    assert module.weight.mark == "mine"
    assert not module.weight.requires_grad
    assert module.weight.device == META
    assert module.whole.dtype == torch.int8


def test_accelerate_cannot_make_a_parameter_whose_constructor_it_does_not_know() -> None:
    class Strict(nn.Parameter):
        def __new__(cls, rows: int, *, requires_grad: bool = True) -> Strict:
            return torch.Tensor._make_subclass(cls, torch.zeros(rows), requires_grad)

    def build() -> nn.Module:
        module = nn.Module()
        module.weight = Strict(4)
        return module

    with accelerate.init_empty_weights(), pytest.raises(TypeError):
        build()
    with init_empty_weights():
        assert type(build().weight) is Strict


def test_parameters_without_a_shape_pass_through() -> None:
    with init_empty_weights():
        lazy = nn.LazyLinear(4)
    assert isinstance(lazy.weight, UninitializedParameter)
    assert lazy(torch.ones(2, 3)).shape == (2, 4)


def test_parametrised_modules_are_meta_in_all_their_parts() -> None:
    with init_empty_weights():
        module = weight_norm(nn.Linear(3, 4))
    assert {parameter.device for parameter in module.parameters()} == {META}


def test_nothing_of_torch_is_replaced() -> None:
    before = (
        nn.Module.register_parameter,
        nn.Module.register_buffer,
        nn.Module.__setattr__,
        torch.empty,
    )
    with init_empty_weights(include_buffers=True):
        assert (
            nn.Module.register_parameter,
            nn.Module.register_buffer,
            nn.Module.__setattr__,
            torch.empty,
        ) == before
    assert nn.Linear(2, 2).weight.device.type == "cpu"


def test_an_exception_ends_the_context() -> None:
    def fail() -> None:
        with init_empty_weights(include_buffers=True):
            nn.BatchNorm1d(3)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert {tensor.device.type for tensor in nn.BatchNorm1d(3).state_dict().values()} == {"cpu"}


def test_of_nested_contexts_the_innermost_acts() -> None:
    with init_empty_weights():
        with init_on_device("cpu"):
            inner = nn.Linear(2, 2)
        outer = nn.Linear(2, 2)
        with init_empty_weights(include_buffers=True):
            both = nn.BatchNorm1d(2)
        buffers = nn.BatchNorm1d(2)
    assert inner.weight.device.type == "cpu"
    assert outer.weight.device == META
    assert both.running_mean is not None
    assert both.running_mean.device == META
    assert buffers.running_mean is not None
    assert buffers.running_mean.device.type == "cpu"


def test_only_the_thread_that_entered_is_affected() -> None:
    entered, done = threading.Event(), threading.Event()
    devices: list[str] = []

    def elsewhere() -> None:
        entered.wait()
        devices.append(nn.Linear(2, 2).weight.device.type)
        done.set()

    thread = threading.Thread(target=elsewhere)
    thread.start()
    with init_empty_weights():
        entered.set()
        done.wait()
        devices.append(nn.Linear(2, 2).weight.device.type)
    thread.join()
    assert devices == ["cpu", "meta"]


def test_threads_that_build_in_and_out_of_contexts_do_not_meet() -> None:
    wrong: list[object] = []

    def build(empty: bool) -> None:
        try:
            for _ in range(200):
                if empty:
                    with init_empty_weights():
                        module = nn.Linear(2, 2)
                else:
                    module = nn.Linear(2, 2)
                if (module.weight.device == META) != empty:
                    wrong.append(module)
        except RuntimeError as error:
            wrong.append(error)

    threads = [threading.Thread(target=build, args=(number % 2 == 0,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_parameter_is_let_go_as_soon_as_it_is_registered() -> None:
    with init_empty_weights():
        module = nn.Module()
        parameter = nn.Parameter(torch.ones(1000))
        real = weakref.ref(parameter)
        module.weight = parameter
        del parameter
        gc.collect()
        assert real() is None


def test_a_parameter_that_is_replaced_is_let_go_too() -> None:
    with init_on_device("meta"):
        module = nn.Linear(2, 2)
        twin = weakref.ref(module.weight)
        module.weight = nn.Parameter(torch.ones(2))
        gc.collect()
        assert twin() is None


def test_tensors_of_other_kinds_are_moved_by_their_own_operations() -> None:
    two: Callable[..., torch.Tensor] = TwoTensor
    with init_empty_weights():
        module = nn.Module()
        module.register_parameter("weight", nn.Parameter(two(torch.ones(2), torch.zeros(2))))
    weight: object = module.weight
    assert isinstance(weight, nn.Parameter)
    assert isinstance(weight, TwoTensor)
    assert weight.a.device == weight.b.device == META


def test_a_hundred_billion_parameters_take_no_memory() -> None:
    with init_empty_weights():
        model = nn.Sequential(*[nn.Linear(10_000, 10_000) for _ in range(1000)])
    assert sum(parameter.numel() for parameter in model.parameters()) > 10**11
    assert {parameter.device for parameter in model.parameters()} == {META}
