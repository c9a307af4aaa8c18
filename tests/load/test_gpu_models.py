"""Models of Transformers and Diffusers on an accelerator: from a folder in one line, over all
tiers, alone and on two devices.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from math import isqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardkit
from accelerators import COUNT, KIND, device, needs_one, needs_two
from shardkit.errors import OverBudget
from shardkit.load import (
    Paged,
    close,
    explain,
    from_pretrained,
    get_balanced_memory,
    get_max_memory,
    infer_auto_device_map,
    init_empty_weights,
    init_on_device,
    load_checkpoint_and_dispatch,
    save,
    tensors,
)
from shardkit.load.lazy.streamed_weight import Streamed
from small_models import EAGER, IDS, MODELS, TOKENS, by_turns, layers, llama, logits

transformers: Any = pytest.importorskip("transformers", reason="its models are loaded here")
pytestmark = [
    *needs_one,
    pytest.mark.skipif(
        not transformers.__version__.startswith("5."), reason="from_pretrained needs Transformers 5"
    ),
]


@pytest.fixture(autouse=True)
def _device_is_left_clean() -> Iterator[None]:
    yield
    device.synchronize()


def streaming(model: nn.Module) -> dict[str, int | str]:
    """All in main memory but for the first layer, which says where the model runs."""
    return {"": "cpu", layers(model)[0]: 0}


DEVICE_MAPS: dict[str, Callable[[nn.Module], Any]] = {
    "device": lambda model: KIND,
    "by turns": by_turns,
    "streaming": streaming,
    "disk": lambda model: {"": "disk", layers(model)[0]: 0},
    "auto": lambda model: "auto",
}


@pytest.fixture(params=MODELS)
def kind(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Any:  # Any, here and below: Transformers types no models
    torch.manual_seed(0)
    model = MODELS[request.param]()
    model.save_pretrained(tmp_path)
    return type(model)


def saved(folder: Path) -> Any:
    """A Llama that is saved in *folder*, on the device."""
    torch.manual_seed(0)
    model = llama(**EAGER)
    model.save_pretrained(folder)
    return model.eval().to(KIND)


@pytest.mark.parametrize("device_map", DEVICE_MAPS)
def test_logits_and_tokens_are_those_of_the_model_that_transformers_loads(
    kind: Any, device_map: str, tmp_path: Path
) -> None:
    theirs = kind.from_pretrained(tmp_path, **EAGER).to(KIND)
    ours: Any = from_pretrained(tmp_path, DEVICE_MAPS[device_map](theirs), ring=2, **EAGER)
    assert type(ours) is kind
    assert {parameter.device.type for parameter in ours.parameters()} == {KIND}
    assert any(isinstance(weight, Streamed) for weight in ours.parameters()) == (
        device_map not in ("device", "auto")
    )
    for _ in range(2):
        assert torch.equal(logits(ours, KIND).cpu(), logits(theirs, KIND).cpu())
    if ours.can_generate():
        ids = IDS.to(KIND)
        assert torch.equal(ours.generate(ids, **TOKENS).cpu(), theirs.generate(ids, **TOKENS).cpu())
    close(ours)
    assert torch.equal(logits(ours, KIND).cpu(), logits(theirs, KIND).cpu())


@pytest.mark.filterwarnings(
    "ignore:the buffers of what is offloaded take:UserWarning"
)  # of the map that is then dealt anew
def test_a_model_that_does_not_fit_the_device_uses_what_there_is(tmp_path: Path) -> None:
    theirs = saved(tmp_path)
    size = sum(parameter.nbytes for parameter in theirs.parameters())
    layer = sum(parameter.nbytes for parameter in theirs.model.layers[0].parameters())
    room = size - 3 * layer + 2 * layer + 10_000  # what is in no layer, a ring, and buffers
    ours: Any = from_pretrained(
        tmp_path, "auto", max_memory={0: room, "cpu": 2 * layer}, ring=2, **EAGER
    )
    assert set(ours.hf_device_map.values()) == {0, "disk"}
    for _ in range(2):
        assert torch.equal(
            logits(ours), logits(theirs, KIND).cpu()
        )  # the input is on the CPU, and the output comes back there
    with pytest.raises(OverBudget):
        from_pretrained(tmp_path, "auto", max_memory={0: layer, "cpu": 0}, **EAGER)


def test_what_a_forward_costs_is_told_with_the_link_to_the_device(tmp_path: Path) -> None:
    layer = sum(parameter.nbytes for parameter in saved(tmp_path).model.layers[0].parameters())
    device_map: dict[str, int | str] = {
        "": 0,
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.layers.2": "disk",
    }
    model: Any = from_pretrained(tmp_path, device_map, ring=2, **EAGER)
    for _ in range(3):
        logits(model, KIND)
    told = explain(model)
    assert {part.runs_on for part in told.parts} == {f"{KIND}:0"}
    assert {part.place for part in told.parts} == {0, "cpu", "disk"}
    assert told.read == {"disk": 2 * layer, "memory": layer}
    assert told.host_ring == told.ring
    assert told.rates is not None
    assert told.rates.link is not None
    assert told.predicted is not None
    _, _, link, compute = told.predicted.busy
    assert link == pytest.approx(3 * layer / told.rates.link)
    assert told.predicted.seconds >= max(link, compute) > 0
    assert told.measured is not None
    assert (told.measured.forwards, told.measured.rows) == (2, IDS.numel())
    assert told.measured.counts.claims == 2 * 3


def test_copies_of_a_model_stream_and_end_on_their_own(tmp_path: Path) -> None:
    theirs = saved(tmp_path)
    ours: Any = from_pretrained(tmp_path, by_turns(theirs), ring=2, **EAGER)
    twin = copy.deepcopy(ours)
    assert torch.equal(logits(twin, KIND).cpu(), logits(theirs, KIND).cpu())
    del ours
    assert torch.equal(logits(twin, KIND).cpu(), logits(theirs, KIND).cpu())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("compress", [None, "zstd"])
def test_what_is_cast_or_expanded_on_the_way_streams_as_well(
    dtype: str, compress: str | None, tmp_path: Path
) -> None:
    if compress:
        pytest.importorskip("zstandard")
    saved(tmp_path / "plain")
    shardkit.convert(tmp_path / "plain", tmp_path / "out", max_shard="40kB", compress=compress)
    expected: Any = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "plain", dtype=dtype, **EAGER
    )
    expected.to(KIND)
    with init_empty_weights():
        model = llama(**EAGER).eval()
    load_checkpoint_and_dispatch(model, tmp_path / "out", by_turns(model), dtype=dtype, ring=2)
    for _ in range(2):
        assert torch.equal(logits(model, KIND).cpu(), logits(expected, KIND).cpu())


def test_a_cache_that_is_not_moved_gives_the_same_tokens(tmp_path: Path) -> None:
    same = saved(tmp_path)
    with init_empty_weights():
        model = llama(**EAGER).eval()
    load_checkpoint_and_dispatch(
        model, tmp_path, by_turns(model), skip_keys="past_key_values", ring=2
    )
    ids = IDS.to(KIND)
    assert torch.equal(model.generate(ids, **TOKENS), same.generate(ids, **TOKENS))


def test_a_model_on_the_device_is_saved_with_its_ties(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = llama(tie_word_embeddings=True).to(KIND)
    model.tie_weights()  # which a move undoes on some kinds of device
    report = save(model, tmp_path / "out", max_shard="20kB")
    assert report.tensors == len(list(model.parameters())) < len(model.state_dict())
    found = tensors(tmp_path / "out")
    assert all(torch.equal(found[name], each.cpu()) for name, each in model.state_dict().items())


def test_a_view_on_the_device_is_saved_as_its_values(tmp_path: Path) -> None:
    module = nn.Module()
    whole = torch.arange(24.0).reshape(4, 6).to(KIND)
    module.register_buffer("part", whole[1:3, ::2])
    module.register_buffer("turned", whole.t())
    save(module, tmp_path / "out")
    found = tensors(tmp_path / "out")
    assert all(torch.equal(found[name], each.cpu()) for name, each in module.state_dict().items())


def test_models_are_made_on_the_device_with_their_ties() -> None:
    for place in (torch.device(KIND), f"{KIND}:0", 0):
        with init_on_device(place):
            model = llama(tie_word_embeddings=True)
        assert {parameter.device for parameter in model.parameters()} == {torch.device(KIND, 0)}
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_budgets_are_what_the_devices_have_free() -> None:
    with init_empty_weights():
        model = llama()
    found, shares = get_max_memory(), get_max_memory({0: "50%", "cpu": 0})
    assert list(found) == [*range(COUNT), "cpu"]
    assert 0 < shares[0] < found[0] <= device.mem_get_info(0)[1]
    balanced = get_balanced_memory(model)
    assert set(balanced) == set(found)
    assert COUNT > 1 or balanced[0] < get_max_memory()[0]  # an only one keeps room for activations
    assert infer_auto_device_map(model, no_split_module_classes=["LlamaDecoderLayer"]) == {"": 0}


def test_a_model_that_is_larger_than_the_devices_goes_on_to_the_cpu_and_the_disk() -> None:
    budgets = get_max_memory()
    side = isqrt(budgets[0] // 4 // 4)  # so that no more than four layers of floats fit
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(side, side, bias=False) for _ in range(40 * COUNT)))
    found = infer_auto_device_map(model)
    held = Counter(found.values())
    order = [*range(COUNT), "cpu", "disk"]
    assert list(held) == [place for place in order if place in held]
    assert {0, "disk"} <= held.keys()
    assert all(held[place] * 4 * side * side <= room for place, room in budgets.items())


def test_a_checkpoint_is_a_mapping_of_tensors_on_the_device_that_are_read_when_they_are_used(
    tmp_path: Path,
) -> None:
    state = saved(tmp_path).state_dict()
    for found in (
        tensors(tmp_path, device=KIND),
        {name: each.to(KIND) for name, each in tensors(tmp_path).items()},
    ):
        assert found.keys() == state.keys()
        for name, tensor in state.items():
            assert isinstance(found[name], Paged)
            assert found[name].device == tensor.device
            assert torch.equal(found[name] + 0, tensor)
            assert torch.equal(found[name][:3] * 2, tensor[:3] * 2)
    model = llama(**EAGER).to(KIND)
    model.load_state_dict(tensors(tmp_path))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@needs_two
@pytest.mark.parametrize("words", ["balanced", "sequential", "auto"])
def test_a_model_is_spread_over_two_devices(words: str, kind: Any, tmp_path: Path) -> None:
    theirs = kind.from_pretrained(tmp_path, **EAGER)
    room = sum(parameter.nbytes for parameter in theirs.parameters()) * 4 // 5
    ours: Any = from_pretrained(tmp_path, words, max_memory={0: room, 1: room, "cpu": 0}, **EAGER)
    assert set(ours.hf_device_map.values()) == {0, 1}
    for _ in range(2):
        torch.testing.assert_close(logits(ours), logits(theirs))
    if ours.can_generate():
        assert torch.equal(
            ours.generate(IDS.to(KIND), **TOKENS).cpu(), theirs.generate(IDS, **TOKENS)
        )


@needs_two
def test_two_devices_main_memory_and_disk_hold_one_model(kind: Any, tmp_path: Path) -> None:
    theirs = kind.from_pretrained(tmp_path, **EAGER)
    places: list[int | str] = [1, "cpu", "disk"]
    device_map = {"": 0} | {name: places[number % 3] for number, name in enumerate(layers(theirs))}
    ours: Any = from_pretrained(tmp_path, device_map, ring=2, **EAGER)
    for _ in range(2):
        torch.testing.assert_close(logits(ours), logits(theirs))
    save(ours, tmp_path / "out")
    found = tensors(tmp_path / "out")
    assert all(torch.equal(found[name], each) for name, each in theirs.state_dict().items())
    close(ours)
