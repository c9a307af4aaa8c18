"""Tools of torch on a model that streams: export, parametrisations and normalised weights give what
they give in memory, or are refused with a sentence.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from libraries import as_of
from shardkit.errors import NotTrained, ReadOnly
from shardkit.load import load_checkpoint_and_dispatch

WIDTH = 8
X = torch.linspace(-1, 1, 3 * WIDTH).reshape(3, WIDTH)


def resident() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(5))).eval()


@pytest.fixture
def streamed(tmp_path: Path) -> nn.Sequential:
    save_file(resident().state_dict(), tmp_path / "model.safetensors")
    return load_checkpoint_and_dispatch(
        resident(), tmp_path / "model.safetensors", {"": "disk"}, ring=2
    )


@as_of("torch", "2.13")  # the oldest with which it was tried
@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad])
def test_an_exported_program_has_the_weights_and_computes_the_same(
    mode: Callable[[], AbstractContextManager[Any]], streamed: nn.Sequential
) -> None:
    with mode():
        program = torch.export.export(streamed, (X,), strict=False)
    assert torch.equal(program.module()(X), resident()(X))
    assert torch.equal(streamed(X), resident()(X))


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


REFUSED: dict[str, Callable[[nn.Module], object]] = {
    "a parametrisation": lambda m: parametrize.register_parametrization(m, "weight", Doubled()),
    "a spectral norm": parametrizations.spectral_norm,
    "an orthogonal weight": parametrizations.orthogonal,
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_replaces_the_memory_of_a_weight_is_refused_and_changes_nothing(
    how: str, streamed: nn.Sequential
) -> None:
    with pytest.raises(ReadOnly, match=r"replace the memory of '0\.weight', which streams") as no:
        REFUSED[how](streamed[0])
    assert "device_map" in str(no.value.hint)
    assert not parametrize.is_parametrized(streamed[0])
    assert torch.equal(streamed(X), resident()(X))


def test_a_weight_norm_computes_the_same(streamed: nn.Sequential) -> None:
    same = resident()
    for model in (streamed, same):
        parametrizations.weight_norm(model[0])
    assert torch.equal(streamed(X), same(X))


def test_a_backward_to_the_input_is_refused_and_a_head_on_top_is_trained(
    streamed: nn.Sequential,
) -> None:
    with pytest.raises(NotTrained, match="backward needs"):
        streamed(X.clone().requires_grad_()).sum().backward()
    torch.manual_seed(1)
    head, same = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 1)
    same.load_state_dict(head.state_dict())
    head(streamed(X)).sum().backward()
    same(resident()(X).detach()).sum().backward()
    assert head.weight.grad is not None
    assert same.weight.grad is not None
    assert torch.equal(head.weight.grad, same.weight.grad)
