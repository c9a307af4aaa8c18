"""What is loaded into a model that streams is loaded whole or not at all; a file that changed while
it is in use is an error.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from shardkit.errors import FormatError, LoadError
from shardkit.load import Paged, close, remove_hooks, tensors
from shardkit.load.lazy.streamed_weight import Streamed
from toys import IDS, Toy, loaded, logits, saved, streamed, trained
from truth import values

Load = Callable[..., Toy]
MAP: dict[str, Any] = {"": "cpu", "layers.1": "disk", "layers.3": "disk"}


@pytest.fixture
def model(tmp_path: Path) -> Toy:
    """One of which some layers stream."""
    return loaded(saved(trained(), tmp_path), "cpu", MAP)


def other() -> dict[str, torch.Tensor]:
    """The weights of another model of the kind."""
    torch.manual_seed(5)
    made = {
        name: torch.rand_like(each) if each.is_floating_point() else each
        for name, each in Toy().state_dict().items()
    }
    return made | {"head.weight": made["embed.weight"]}  # which is tied


def inside(part: str, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What *state* has of *part*, by the names that it has there."""
    prefix = f"{part}." if part else ""
    return {
        name.removeprefix(prefix): each for name, each in state.items() if name.startswith(prefix)
    }


def state_of(module: nn.Module) -> dict[str, bytes]:
    return {
        name: values(each.read() if isinstance(each, Paged) else each)
        for name, each in module.state_dict().items()
    }


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("part", ["", "layers", "layers.1", "layers.3.up"])
def test_what_would_be_copied_into_streamed_weights_is_refused_and_changes_nothing(
    part: str, strict: bool, model: Toy
) -> None:
    module, before = model.get_submodule(part), state_of(model)
    given = inside(part, other())
    with pytest.raises(
        LoadError, match=r"load_state_dict would copy into .*, which stream"
    ) as refused:
        module.load_state_dict(given, strict=strict)
    assert "assign=True" in (refused.value.hint or "")
    assert state_of(model) == before
    assert torch.equal(logits(model), logits(trained()))


def test_a_copy_refuses_it_too(model: Toy) -> None:
    with pytest.raises(LoadError, match="load_state_dict would copy into"):
        copy.deepcopy(model).load_state_dict(other())


@pytest.mark.parametrize("part", ["", "layers.1"])
def test_with_assign_the_given_weights_take_the_place_of_those_that_stream(
    part: str, model: Toy
) -> None:
    same = copy.deepcopy(trained())
    given = inside(part, other())
    for each in (model, same):
        each.get_submodule(part).load_state_dict(given, assign=True)
    assert streamed(model) == (
        {name for name in same.state_dict() if name.startswith("layers.3") and part}
        & streamed(model)
    )
    assert torch.equal(logits(model), logits(same))
    assert state_of(model) == state_of(same)


def test_weights_beside_those_that_stream_are_copied_as_ever(model: Toy) -> None:
    given = {name: each for name, each in other().items() if name not in streamed(model)}
    model.load_state_dict(given, strict=False)
    found = state_of(model)
    assert all(found[name] == values(each) for name, each in given.items())


def test_without_its_hooks_a_model_is_loaded_as_any_other(model: Toy) -> None:
    assert any(module._load_state_dict_pre_hooks for module in model.modules())
    close(model)
    with pytest.raises(LoadError, match="load_state_dict would copy into"):
        model.load_state_dict(other())
    remove_hooks(model)
    assert not any(module._load_state_dict_pre_hooks for module in model.modules())


def stored(folder: Path, suffix: str) -> Path:
    path = folder / f"model{suffix}"
    state = {name: each.contiguous() for name, each in trained().state_dict().items()}
    if suffix == ".pt":
        torch.save(state, path)
    else:
        del state["head.weight"]
        save_file(state, path)
    return path


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_torch_save_over_the_file_that_streams_is_an_error_that_names_the_file(
    suffix: str, tmp_path: Path
) -> None:
    path = stored(tmp_path, suffix)
    model = loaded(path, "cpu", MAP)
    with pytest.raises(LoadError, match=rf"model{suffix} changed since it was opened") as refused:
        torch.save(model.state_dict(), path)
    assert "save to another file, and rename that" in (refused.value.hint or "")
    close(model)


CHANGES: dict[str, Callable[[Path], object]] = {
    "longer": lambda path: path.write_bytes(path.read_bytes() + b" "),
    "touched": lambda path: os.utime(path, ns=(1, 1)),
    "replaced": lambda path: os.replace(path.with_name("other"), path),
}


READS: dict[str, Callable[[Paged], object]] = {
    "read": Paged.read,
    "computed with": lambda weight: weight + 0,
    "cast": lambda weight: weight.to(torch.float64) + 0,
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_weight_is_not_read_from_a_file_that_changed(
    change: str, read: Callable[[Paged], object], tmp_path: Path
) -> None:
    path = stored(tmp_path, ".safetensors")
    path.with_name("other").write_bytes(path.read_bytes())
    weight = tensors(path)["layers.1.up.weight"]
    read(weight)
    CHANGES[change](path)
    with pytest.raises(LoadError, match=r"model\.safetensors changed since it was opened"):
        read(weight)


def test_a_file_that_is_gone_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = stored(tmp_path, ".safetensors")
    weight = tensors(path)["layers.1.up.weight"]
    path.unlink()
    with pytest.raises(FormatError, match=r"model\.safetensors: cannot be read"):
        weight.read()


def test_a_streamed_weight_is_not_read_from_another_file_between_forwards(
    model: Toy, tmp_path: Path
) -> None:
    [path] = list(tmp_path.iterdir())
    logits(model)
    os.utime(path, ns=(1, 1))
    weight = model.get_parameter("layers.1.up.weight")
    assert isinstance(weight, Streamed)
    with pytest.raises(LoadError, match="changed since it was opened"):
        weight.read()
    with pytest.raises(LoadError, match="changed since the model was dispatched"):
        model(IDS)
