"""Memory does not grow with the file or its largest tensor: the peak of whole processes, on files
larger than the bound.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")

BOUND = 64_000_000
ELEMENTS = 48 << 20  # of two bytes: 100 MB in one tensor

PROGRAM = """
import sys, shardkit
{statement}
status = open("/proc/self/status").read()
print(int(status.split("VmHWM:")[1].split()[0]) * 1024)
"""


def legacy(tensors: dict[str, torch.Tensor], path: Path) -> None:
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


@pytest.fixture(
    scope="module", params=[torch.save, legacy, save_file], ids=["zip", "legacy", "safetensors"]
)
def large(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "large"
    save: Callable[[dict[str, torch.Tensor], Path], None] = request.param
    save({"large": torch.zeros(ELEMENTS, dtype=torch.bfloat16), "small": torch.ones(3)}, path)
    return path


def peak(statement: str, *arguments: Path) -> int:
    """Bytes resident at most in a process that runs *statement*, as the kernel counted them."""
    command = [sys.executable, "-c", PROGRAM.format(statement=statement), *map(str, arguments)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize(
    "statement",
    [
        "shardkit.open(sys.argv[1])",
        "shardkit.convert(sys.argv[1], sys.argv[2], sync=False)",
        "shardkit.convert(sys.argv[1], sys.argv[2], sync=False, compress='zstd')",
        "shardkit.offload_prep(sys.argv[1], sys.argv[2], sync=False)",
        "shardkit.verify(sys.argv[1])",
    ],
    ids=["open", "convert", "compress", "offload-prep", "verify"],
)
def test_a_tensor_larger_than_the_bound_passes_through_it(
    large: Path, tmp_path: Path, statement: str
) -> None:
    assert peak(statement, large, tmp_path / "out") < BOUND


def test_a_view_is_gathered_in_bounded_memory(tmp_path: Path) -> None:
    torch.save(
        {"turned": torch.zeros(8192, ELEMENTS // 8192, dtype=torch.bfloat16).t()},
        tmp_path / "turned.pt",
    )
    statement = "shardkit.convert(sys.argv[1], sys.argv[2], sync=False)"
    assert peak(statement, tmp_path / "turned.pt", tmp_path / "out") < 2 * BOUND
