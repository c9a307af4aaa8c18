"""Place the blocks of the model in a checkpoint on devices, from headers and budgets alone. No
weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shardkit.checkpoint.blocks import BlockEntries, named_blocks, refuse_unfound
from shardkit.checkpoint.device_fit import CPU, DISK, Fit, fit
from shardkit.checkpoint.edits import cast_to, fold_ties
from shardkit.checkpoint.entries import Checkpoint, LeftOut
from shardkit.checkpoint.model_root import select_root
from shardkit.dtypes import DType
from shardkit.errors import NothingSelected
from shardkit.printable import listed, several, shown_path
from shardkit.sizes import format_size
from shardkit.system.free_memory import available_memory

_MOST = 10


@dataclass(frozen=True, slots=True)
class Placed:
    """The blocks of the checkpoint *source*, and where they go.

    Attributes:
        source: what was read.
        format: its format.
        dtype: the code of the type that floats are counted as; None for those that they are stored
            in.
        blocks: in the order in which they are run, tied tensors in the first that has them.
        fit: where they go.
        aliases: the other names of tied tensors, each to the name under which it is counted.
        left_out: weights that are not counted: files and subfolders beside the source, objects in
            it.
        notes: sentences that the user should see.
    """

    source: Path
    format: str
    dtype: str | None
    blocks: tuple[BlockEntries, ...]
    fit: Fit
    aliases: Mapping[str, str]
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return sum(self.fit.sizes.values())

    @property
    def read(self) -> dict[str, int]:
        """Bytes that each forward reads from disk, and brings from the CPU to an accelerator."""
        used = self.fit.used
        return {DISK: used[DISK], CPU: used.get(CPU, 0) if self.runner != CPU else 0}

    @property
    def runner(self) -> str:
        """The device that runs the blocks on CPU and disk."""
        return next(iter(self.fit.budgets))

    @property
    def largest(self) -> BlockEntries:
        """The largest block."""
        return max(self.blocks, key=lambda block: block.nbytes)


def placed(
    source: Path,
    checkpoint: Checkpoint,
    budgets: Mapping[str, int],
    *,
    root: str | None,
    dtype: DType | None,
    no_split: re.Pattern[str] | None,
) -> Placed:
    """Choose a device for each block of the model in *checkpoint*.

    Raises:
        AmbiguousRoot: several subtrees could be the model, and none is chosen.
        NothingSelected: there is no tensor.
    """
    rooted = select_root(checkpoint, root)
    if not rooted.tensors:
        raise NothingSelected(
            f"{shown_path(source)}: it holds no tensors",
            hint="run `shardkit inspect` to list the contents of the file",
        )
    entries, notes = (rooted.tensors, ()) if dtype is None else cast_to(rooted.tensors, dtype)
    kept, aliases = fold_ties(entries, reserved=())
    refuse_unfound(no_split, kept)
    blocks = named_blocks(kept, no_split)
    non_dense = [other.name for other in rooted.others if other.is_weight]
    if non_dense:
        notes += (
            (
                f"{several(len(non_dense), 'weight')} not counted, because they are not dense "
                f"tensors: {listed(non_dense, most=_MOST)}"
            ),
        )
    if CPU not in budgets and "mps" not in budgets:
        budgets = {**budgets, CPU: available_memory()}
        notes += (
            (
                "no budget is given for the CPU: it gets the free memory of this machine, "
                f"{format_size(budgets[CPU])}"
            ),
        )
    fitted = fit({block.name: block.nbytes for block in blocks}, budgets)
    code = dtype.code if dtype else None
    left_out = (*checkpoint.left_out, *rooted.left_out)
    return Placed(
        source,
        checkpoint.format,
        code,
        blocks,
        fitted,
        aliases,
        left_out,
        (*checkpoint.notes, *notes),
    )
