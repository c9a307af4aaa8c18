"""The memory that a load takes: what stays, and little beside it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

NBYTES = 256 << 20
BESIDE = 64 << 20

LOAD = """
import sys, torch
from pathlib import Path
from torch import nn
from shardkit.load import init_empty_weights, load_checkpoint_and_dispatch, load_checkpoint_in_model

def peak():
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])

with init_empty_weights():
    model = nn.Sequential(*(nn.Linear(2048, 1024, bias=False) for _ in range(32)))
torch.ones(8, 8) @ torch.ones(8, 8)
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: that of a child is its parent's at first
before = peak()
path, device = sys.argv[1:]
if device == "cpu":
    load_checkpoint_in_model(model, path, {"": "cpu"})
else:
    load_checkpoint_and_dispatch(model, path, {"": "cpu"} | {str(number): "disk" for number in range(16)}, ring=2)
print(peak() - before)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as a pickle and as safetensors."""
    folder = tmp_path_factory.mktemp("large")
    state = {f"{number}.weight": torch.ones(1024, 2048) for number in range(32)}
    torch.save(state, folder / "model.bin")
    save_file(state, folder / "model.safetensors")
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the peak")
@pytest.mark.parametrize("name", ["model.bin", "model.safetensors"])
@pytest.mark.parametrize(("device", "stays"), [("cpu", NBYTES), ("disk", NBYTES // 2)])
def test_a_load_takes_the_memory_of_what_stays(
    name: str, device: str, stays: int, folder: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder / name), device], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert stays <= int(done.stdout) <= stays + BESIDE
