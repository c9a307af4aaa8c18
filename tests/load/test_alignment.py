"""Results do not depend on where weights lie in a file: in memory they begin at multiples of 64
bytes, as torch's own do.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from aligned import ALIGNMENT, aligned
from shardkit.load import (
    close,
    init_empty_weights,
    load_checkpoint_and_dispatch,
    load_checkpoint_in_model,
    tensors,
)

WIDTH = 24
ROW = torch.linspace(-1, 1, WIDTH)[
    None
]  # of one row: the product that depends on the address of its matrix
OFFSETS = range(4, ALIGNMENT, 4)


def blocks() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3))
    ).eval()


@pytest.fixture(scope="module")
def resident() -> nn.Sequential:
    torch.manual_seed(0)
    return blocks().requires_grad_(False)


def written(model: nn.Module, path: Path, offset: int) -> Path:
    """*model* as a safetensors file in which the first tensor begins *offset* bytes after a
    multiple of 64.
    """
    entries, data = {}, b""
    for name, tensor in model.state_dict().items():
        content = tensor.numpy().tobytes()
        entries[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    header = json.dumps(entries).encode()
    header += b" " * ((offset - 8 - len(header)) % ALIGNMENT)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    assert (path.stat().st_size - len(data)) % ALIGNMENT == offset
    return path


def empty() -> nn.Sequential:
    with init_empty_weights():
        return blocks()


@pytest.mark.parametrize("offset", OFFSETS)
def test_one_row_gives_the_bits_of_the_resident_model_from_any_offset(
    offset: int, resident: nn.Sequential, tmp_path: Path
) -> None:
    path = written(resident, tmp_path / "model.safetensors", offset)
    loaded, assigned = empty(), empty()
    load_checkpoint_in_model(loaded, path)
    assigned.load_state_dict(tensors(path), assign=True)
    streams = load_checkpoint_and_dispatch(empty(), path, {"": "disk"}, ring=2)
    with torch.no_grad():
        for model in (loaded, assigned, streams):
            assert torch.equal(model(ROW), resident(ROW))
    close(streams)
    assert torch.equal(streams(ROW), resident(ROW))


@pytest.mark.parametrize("offset", OFFSETS)
def test_a_peer_is_moved_to_multiples_of_64_bytes_with_its_ties_and_its_values(
    offset: int, resident: nn.Sequential
) -> None:
    model = blocks()
    for tensor in model.parameters():
        memory = torch.empty(tensor.nbytes + 2 * ALIGNMENT, dtype=torch.uint8)
        start = -memory.data_ptr() % ALIGNMENT + offset
        tensor.data = memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        assert tensor.data_ptr() % ALIGNMENT == offset
    model.load_state_dict(resident.state_dict())
    tied, untied = model.get_submodule("0.0"), model.get_submodule("1.0")
    tied.register_parameter("again", tied.get_parameter("weight"))
    assert aligned(model) is model
    assert not [name for name, tensor in model.named_parameters() if tensor.data_ptr() % ALIGNMENT]
    assert (
        tied.get_parameter("again")
        is tied.get_parameter("weight")
        is not untied.get_parameter("weight")
    )
    assert torch.equal(model(ROW), resident(ROW))
