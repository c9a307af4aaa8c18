"""Any model running: weights that are read when they are used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardkit.load.attached import close as close
    from shardkit.load.attached import remove_hooks as remove_hooks
    from shardkit.load.balance import get_balanced_memory as get_balanced_memory
    from shardkit.load.block_hints import no_split_pattern as no_split_pattern
    from shardkit.load.block_hints import recorded_order as recorded_order
    from shardkit.load.budgets import get_max_memory as get_max_memory
    from shardkit.load.device_maps import check_device_map as check_device_map
    from shardkit.load.dispatch import cpu_offload as cpu_offload
    from shardkit.load.dispatch import disk_offload as disk_offload
    from shardkit.load.dispatch import dispatch_model as dispatch_model
    from shardkit.load.dispatch import load_checkpoint_and_dispatch as load_checkpoint_and_dispatch
    from shardkit.load.empty import init_empty_weights as init_empty_weights
    from shardkit.load.empty import init_on_device as init_on_device
    from shardkit.load.explaining import explain as explain
    from shardkit.load.handover import cpu_offload_with_hook as cpu_offload_with_hook
    from shardkit.load.loading import load_checkpoint_in_model as load_checkpoint_in_model
    from shardkit.load.mapping import tensors as tensors
    from shardkit.load.paged import Paged as Paged
    from shardkit.load.placement import infer_auto_device_map as infer_auto_device_map
    from shardkit.load.pretrained import from_pretrained as from_pretrained
    from shardkit.load.saving import save as save

_HOMES = {
    "Paged": "paged",
    "check_device_map": "device_maps",
    "close": "attached",
    "cpu_offload": "dispatch",
    "cpu_offload_with_hook": "handover",
    "disk_offload": "dispatch",
    "dispatch_model": "dispatch",
    "explain": "explaining",
    "from_pretrained": "pretrained",
    "get_balanced_memory": "balance",
    "get_max_memory": "budgets",
    "infer_auto_device_map": "placement",
    "init_empty_weights": "empty",
    "init_on_device": "empty",
    "load_checkpoint_and_dispatch": "dispatch",
    "load_checkpoint_in_model": "loading",
    "no_split_pattern": "block_hints",
    "recorded_order": "block_hints",
    "remove_hooks": "attached",
    "save": "saving",
    "tensors": "mapping",
}

__all__ = [*_HOMES]  # noqa: PLE0604 - the table above is the one list of public names


def __getattr__(name: str) -> object:
    """Import what a public name stands for when it is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'shardkit.load' has no attribute {name!r}")
    return getattr(import_module(f"shardkit.load.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
