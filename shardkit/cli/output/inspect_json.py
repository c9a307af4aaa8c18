"""A checkpoint as one JSON document."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from shardkit.checkpoint.entries import Checkpoint, LeftOut, OtherKind, TensorEntry
from shardkit.checkpoint.model_root import select_root
from shardkit.cli.output.shared_storage import ties
from shardkit.errors import AmbiguousRoot, NothingSelected
from shardkit.payloads.payload import Extent


def document(source: Path, checkpoint: Checkpoint, root: str | None = None) -> dict[str, object]:
    """Everything that `shardkit inspect --json` says of *checkpoint*, or of its part *root*."""
    others = checkpoint.others
    taken, inside = _root(checkpoint) if root is None else ({"name": root}, ())
    return {
        "path": source,
        "format": checkpoint.format,
        "files": [{"path": file.path, "nbytes": file.size} for file in checkpoint.files],
        "nbytes": checkpoint.nbytes,
        "root": taken,
        "tensors": list(_tensors(checkpoint)),
        "others": [
            {
                "name": each.name,
                "path": each.path,
                "kind": each.kind,
                "nbytes": each.nbytes,
                "reason": each.reason,
            }
            for each in others
            if each.kind is not OtherKind.CALL
        ],
        "calls": [each.reason for each in others if each.kind is OtherKind.CALL],
        "left_out": [asdict(part) for part in (*checkpoint.left_out, *inside)],
        "metadata": dict(checkpoint.metadata),
        "notes": checkpoint.notes,
    }


def _tensors(checkpoint: Checkpoint) -> Iterator[dict[str, object]]:
    tied = ties(checkpoint.tensors)
    for number, entry in enumerate(checkpoint.tensors):
        file, offset = _place(entry)
        yield {
            "name": entry.name,
            "path": entry.path,
            "dtype": entry.dtype.code,
            "shape": entry.shape,
            "nbytes": entry.nbytes,
            "file": file,
            "offset": offset,
            "tied_to": checkpoint.tensors[tied[number]].name if number in tied else None,
        }


def _place(entry: TensorEntry) -> tuple[str | None, int | None]:
    """The file that the bytes come from, and where in it they lie, if they lie there as they
    are.
    """
    match entry.payload:
        case Extent(path, start, _):
            return str(path), start
        case payload:
            return next((str(extent.path) for extent in payload.sources), None), None


def _root(checkpoint: Checkpoint) -> tuple[dict[str, object], tuple[LeftOut, ...]]:
    """What convert would take, or why it would ask; and what it would leave out."""
    try:
        rooted = select_root(checkpoint, None)
    except (AmbiguousRoot, NothingSelected) as error:
        return {"name": None, "error": str(error), "hint": error.command_hint}, ()
    return {"name": ".".join(rooted.path) or "."}, rooted.left_out
