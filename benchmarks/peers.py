"""What others would run for the same job, each as a process: ``python benchmarks/peers.py JOB
SOURCE [OUT]``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path


def hub(source: str, out: str) -> None:
    """torch.load, then huggingface_hub's own sharded writer."""
    _save(_load(source, mmap=False), out)


def hub_mmap(source: str, out: str) -> None:
    """The same, with the source mapped."""
    _save(_load(source, mmap=True), out)


def hub_cast(source: str, out: str) -> None:
    """The same, cast to bf16."""
    import torch

    _save(
        {name: tensor.to(torch.bfloat16) for name, tensor in _load(source, mmap=True).items()}, out
    )


def load(source: str) -> None:
    """What it takes torch to tell what is in a file."""
    _load(source, mmap=False)


def import_torch(source: str) -> None:
    """What anything that imports torch pays first."""
    import torch

    torch.zeros(1)


def _load(source: str, *, mmap: bool):  # type: ignore[no-untyped-def]  # torch is imported by those who need it only
    if source.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(source)
    import torch

    return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)


def _save(state_dict, out: str) -> None:  # type: ignore[no-untyped-def]  # likewise
    from huggingface_hub import save_torch_state_dict

    Path(out).mkdir()
    save_torch_state_dict(state_dict, out, max_shard_size="2GB")


JOBS: dict[str, Callable[..., None]] = {
    "hub": hub,
    "hub-mmap": hub_mmap,
    "hub-cast": hub_cast,
    "load": load,
    "import-torch": import_torch,
}

if __name__ == "__main__":
    JOBS[sys.argv[1]](*sys.argv[2:])
