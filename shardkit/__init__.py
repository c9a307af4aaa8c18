"""Any checkpoint in, any model running, never more memory than one block."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shardkit.checkpoint import Checkpoint as Checkpoint
    from shardkit.checkpoint import TensorEntry as TensorEntry
    from shardkit.compare import diff as diff
    from shardkit.compare import verify as verify
    from shardkit.conversion import Report as Report
    from shardkit.conversion import convert as convert
    from shardkit.errors import ShardkitError as ShardkitError
    from shardkit.limits import Limits as Limits
    from shardkit.offload import offload_prep as offload_prep
    from shardkit.plan import Plan as Plan
    from shardkit.source import open as open

__version__ = "0.1.0"

_HOMES = {
    "Checkpoint": "checkpoint",
    "Limits": "limits",
    "Plan": "plan",
    "Report": "conversion",
    "ShardkitError": "errors",
    "TensorEntry": "checkpoint",
    "convert": "conversion",
    "diff": "compare",
    "offload_prep": "offload",
    "open": "source",
    "verify": "compare",
}

__all__ = [*_HOMES, "__version__"]  # noqa: PLE0604 - the table above is the one list of public names


def __getattr__(name: str) -> object:
    """Import what a public name stands for when it is first used, so that `import shardkit` costs nothing (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'shardkit' has no attribute {name!r}")
    return getattr(import_module(f"shardkit.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
