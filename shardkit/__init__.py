"""Any checkpoint in, any model running, never more memory than one block."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from shardkit.version import __version__

if TYPE_CHECKING:
    from shardkit.checkpoint.edits import Edits as Edits
    from shardkit.checkpoint.entries import Checkpoint as Checkpoint
    from shardkit.checkpoint.entries import TensorEntry as TensorEntry
    from shardkit.errors import AmbiguousRoot as AmbiguousRoot
    from shardkit.errors import BadDType as BadDType
    from shardkit.errors import BadSize as BadSize
    from shardkit.errors import FormatError as FormatError
    from shardkit.errors import Incomplete as Incomplete
    from shardkit.errors import LimitExceeded as LimitExceeded
    from shardkit.errors import LoadError as LoadError
    from shardkit.errors import Malformed as Malformed
    from shardkit.errors import Mismatch as Mismatch
    from shardkit.errors import NameClash as NameClash
    from shardkit.errors import NoRoom as NoRoom
    from shardkit.errors import NothingSelected as NothingSelected
    from shardkit.errors import NotTrained as NotTrained
    from shardkit.errors import OutputError as OutputError
    from shardkit.errors import OverBudget as OverBudget
    from shardkit.errors import PlanError as PlanError
    from shardkit.errors import PluginError as PluginError
    from shardkit.errors import ReadOnly as ReadOnly
    from shardkit.errors import ShardkitError as ShardkitError
    from shardkit.errors import UnknownFormat as UnknownFormat
    from shardkit.errors import UnknownTensor as UnknownTensor
    from shardkit.errors import Unwritable as Unwritable
    from shardkit.events import Event as Event
    from shardkit.fleet.ray_cluster import RayCluster as RayCluster
    from shardkit.limits import Limits as Limits
    from shardkit.operations.commit_output import Status as Status
    from shardkit.operations.commit_output import commit as commit
    from shardkit.operations.commit_output import status as status
    from shardkit.operations.compare import diff as diff
    from shardkit.operations.compare import verify as verify
    from shardkit.operations.comparison import Comparison as Comparison
    from shardkit.operations.comparison import Difference as Difference
    from shardkit.operations.convert import Report as Report
    from shardkit.operations.convert import convert as convert
    from shardkit.operations.offload_prep import offload_prep as offload_prep
    from shardkit.planning.plan import Plan as Plan
    from shardkit.sources.open import open as open

_LAZY_EXPORTS = {
    "AmbiguousRoot": "errors",
    "BadDType": "errors",
    "BadSize": "errors",
    "Checkpoint": "checkpoint.entries",
    "Comparison": "operations.comparison",
    "Difference": "operations.comparison",
    "Edits": "checkpoint.edits",
    "Event": "events",
    "FormatError": "errors",
    "Incomplete": "errors",
    "LimitExceeded": "errors",
    "Limits": "limits",
    "LoadError": "errors",
    "Malformed": "errors",
    "Mismatch": "errors",
    "NameClash": "errors",
    "NoRoom": "errors",
    "NotTrained": "errors",
    "NothingSelected": "errors",
    "OutputError": "errors",
    "OverBudget": "errors",
    "Plan": "planning.plan",
    "PlanError": "errors",
    "PluginError": "errors",
    "RayCluster": "fleet.ray_cluster",
    "ReadOnly": "errors",
    "Report": "operations.convert",
    "ShardkitError": "errors",
    "Status": "operations.commit_output",
    "TensorEntry": "checkpoint.entries",
    "UnknownFormat": "errors",
    "UnknownTensor": "errors",
    "Unwritable": "errors",
    "commit": "operations.commit_output",
    "convert": "operations.convert",
    "diff": "operations.compare",
    "offload_prep": "operations.offload_prep",
    "open": "sources.open",
    "status": "operations.commit_output",
    "verify": "operations.compare",
}

__all__ = [*_LAZY_EXPORTS, "__version__"]  # noqa: PLE0604 - the table above is the one list of public names


def __getattr__(name: str) -> object:
    """Import what a public name stands for when it is first used, so that `import shardkit` costs
    nothing (PEP 562).
    """
    if name not in _LAZY_EXPORTS:
        raise AttributeError(f"module 'shardkit' has no attribute {name!r}")
    return getattr(import_module(f"shardkit.{_LAZY_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
