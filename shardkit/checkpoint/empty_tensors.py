"""Tensors without values, reported: the placeholders that DeepSpeed ZeRO-3 leaves, and files that
hold nothing else.

With ZeRO-3 a rank has an empty tensor of shape [0] in the place of each weight that is partitioned.
A state dict that was saved without gathering them looks complete and is not. A tensor with another
axis ([0, 128]) is empty on purpose, and so may be one of shape [0] whose name is not that of a
parameter, such as the `min_val` of an observer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from shardkit.checkpoint.entries import Checkpoint, TensorEntry
from shardkit.checkpoint.root_names import is_parameter
from shardkit.printable import listed, shown

_NAMED = 3


def noted(checkpoint: Checkpoint) -> Checkpoint:
    """*checkpoint* with what there is to report about empty tensors among its notes."""
    notes = tuple(_notes(checkpoint.tensors))
    return replace(checkpoint, notes=(*checkpoint.notes, *notes)) if notes else checkpoint


def _notes(entries: Sequence[TensorEntry]) -> Iterator[str]:
    empty = [entry for entry in entries if not entry.nbytes]
    if not empty:
        return
    short = [entry for entry in empty if entry.shape == (0,) and entry.dtype.kind == "float"]
    partitioned = any(is_parameter(entry.name.rpartition(".")[2]) for entry in short)
    if len(empty) == len(entries):
        count = "its only tensor is" if len(entries) == 1 else f"all {len(entries):,} tensors are"
        yield f"the file holds no values: {count} empty{f'. {_ZERO}' if partitioned else ''}"
    elif partitioned:
        names = listed([shown(entry.name) for entry in short], most=_NAMED)
        count = f"{len(short):,} of {len(entries):,} tensors"
        yield f"{count} {'is' if len(short) == 1 else 'are'} empty, of shape [0]: {names}. {_ZERO}"


_ZERO = (
    "DeepSpeed ZeRO-3 leaves such placeholders for weights that were not gathered when the file "
    "was saved; "
    "zero_to_fp32.py, in the folder of the DeepSpeed checkpoint, makes a complete file"
)
