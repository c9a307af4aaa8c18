"""Models of Transformers over CPU and disk: logits and generated tokens are those of the resident
model, bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from shardkit.load import close, init_empty_weights, load_checkpoint_and_dispatch
from shardkit.load.lazy.streamed_weight import Streamed
from small_models import IDS, MODELS, TOKENS, half, logits

DEVICE_MAPS: dict[str, Callable[[nn.Module], dict[str, str]]] = {
    "cpu": lambda model: {"": "cpu"},
    "half": half,
    "disk": lambda model: {"": "disk"},
}


@pytest.mark.parametrize("device_map", DEVICE_MAPS)
@pytest.mark.parametrize("kind", MODELS)
def test_logits_and_tokens_are_those_of_the_resident_model(
    kind: str, device_map: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    resident = MODELS[kind]().eval()
    torch.save(resident.state_dict(), tmp_path / "model.bin")
    with init_empty_weights():
        model = MODELS[kind]().eval()
    chosen = DEVICE_MAPS[device_map](model)
    load_checkpoint_and_dispatch(model, tmp_path / "model.bin", chosen, ring=2)
    assert any(isinstance(weight, Streamed) for weight in model.parameters()) == (
        "disk" in chosen.values()
    )
    for _ in range(2):
        assert torch.equal(logits(model), logits(resident))
    twin = copy.deepcopy(model)
    if model.can_generate():
        assert torch.equal(model.generate(IDS, **TOKENS), resident.generate(IDS, **TOKENS))
        close(model)
        assert torch.equal(twin.generate(IDS, **TOKENS), resident.generate(IDS, **TOKENS))
    close(model)
    assert torch.equal(logits(twin), logits(resident))
