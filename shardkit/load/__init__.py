"""Run any model: lazy weights that are read when they are used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardkit.load.devices.budgets import get_max_memory as get_max_memory
    from shardkit.load.diagnostics.explain import explain as explain
    from shardkit.load.diagnostics.explanation import Explanation as Explanation
    from shardkit.load.dispatch.accelerate_api import cpu_offload as cpu_offload
    from shardkit.load.dispatch.accelerate_api import disk_offload as disk_offload
    from shardkit.load.dispatch.accelerate_api import dispatch_model as dispatch_model
    from shardkit.load.dispatch.accelerate_api import (
        load_checkpoint_and_dispatch as load_checkpoint_and_dispatch,
    )
    from shardkit.load.dispatch.attachments import close as close
    from shardkit.load.dispatch.attachments import remove_hooks as remove_hooks
    from shardkit.load.hooks.turn_taking import cpu_offload_with_hook as cpu_offload_with_hook
    from shardkit.load.lazy.checkpoint import tensors as tensors
    from shardkit.load.lazy.paged import Paged as Paged
    from shardkit.load.libraries.block_hints import no_split_pattern as no_split_pattern
    from shardkit.load.libraries.block_hints import recorded_order as recorded_order
    from shardkit.load.libraries.pretrained import from_pretrained as from_pretrained
    from shardkit.load.libraries.save_model import save as save
    from shardkit.load.loading.load_checkpoint import (
        load_checkpoint_in_model as load_checkpoint_in_model,
    )
    from shardkit.load.modules.init_empty import init_empty_weights as init_empty_weights
    from shardkit.load.modules.init_empty import init_on_device as init_on_device
    from shardkit.load.performance.bandwidth import Rates as Rates
    from shardkit.load.placement.device_map import check_device_map as check_device_map
    from shardkit.load.placement.infer_device_map import get_balanced_memory as get_balanced_memory
    from shardkit.load.placement.infer_device_map import (
        infer_auto_device_map as infer_auto_device_map,
    )

_LAZY_EXPORTS = {
    "Explanation": "diagnostics.explanation",
    "Paged": "lazy.paged",
    "Rates": "performance.bandwidth",
    "check_device_map": "placement.device_map",
    "close": "dispatch.attachments",
    "cpu_offload": "dispatch.accelerate_api",
    "cpu_offload_with_hook": "hooks.turn_taking",
    "disk_offload": "dispatch.accelerate_api",
    "dispatch_model": "dispatch.accelerate_api",
    "explain": "diagnostics.explain",
    "from_pretrained": "libraries.pretrained",
    "get_balanced_memory": "placement.infer_device_map",
    "get_max_memory": "devices.budgets",
    "infer_auto_device_map": "placement.infer_device_map",
    "init_empty_weights": "modules.init_empty",
    "init_on_device": "modules.init_empty",
    "load_checkpoint_and_dispatch": "dispatch.accelerate_api",
    "load_checkpoint_in_model": "loading.load_checkpoint",
    "no_split_pattern": "libraries.block_hints",
    "recorded_order": "libraries.block_hints",
    "remove_hooks": "dispatch.attachments",
    "save": "libraries.save_model",
    "tensors": "lazy.checkpoint",
}

__all__ = [*_LAZY_EXPORTS]  # noqa: PLE0604 - the table above is the one list of public names


def __getattr__(name: str) -> object:
    """Import what a public name stands for when it is first used (PEP 562)."""
    if name not in _LAZY_EXPORTS:
        raise AttributeError(f"module 'shardkit.load' has no attribute {name!r}")
    return getattr(import_module(f"shardkit.load.{_LAZY_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
