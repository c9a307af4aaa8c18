"""What a folder is that no format here reads: other systems' checkpoints, known by the names in
them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from shardkit.errors import FormatError
from shardkit.printable import listed, shown
from shardkit.sources.foreign.files import kind_of
from shardkit.sources.foreign.kinds import ARRAYS, ORIGIN, Kind, joined_by_torch
from shardkit.sources.format import Source

_MOST = 32  # files that are looked into
_LISTED = 8
_KINDS = (  # the names, of which the folder holds one, and what it is
    (
        frozenset({"_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt", "orbax.checkpoint"}),
        Kind(
            "is a checkpoint of Orbax (JAX)",
            f"orbax.checkpoint restores it; {ARRAYS}",
            is_weights=True,
        ),
    ),
    (
        frozenset({"saved_model.pb", "keras_metadata.pb"}),
        Kind("is a TensorFlow SavedModel", f"load it with TensorFlow; {ARRAYS}", is_weights=True),
    ),
    (
        frozenset({".zgroup", ".zarray", ".zmetadata", "zarr.json"}),
        Kind("is a Zarr store", f"load it with zarr; {ARRAYS}", is_weights=True),
    ),
    (
        frozenset({"com.apple.CoreML"}),
        Kind("is the data of a Core ML package (.mlpackage)", ORIGIN, is_weights=True),
    ),
)


def distributed(source: Source) -> FormatError | None:
    """Why the folder *source* cannot be read, if torch.distributed.checkpoint or Paddle wrote
    it.
    """
    names = source.names or ()
    if not any(name.endswith(".distcp") for name in names):
        return None
    if any(b"paddle" in _head(source, name) for name in names if name.endswith(".metadata")):
        return FormatError(
            source.path,
            "is a distributed checkpoint of Paddle",
            hint="load it with Paddle, and save it with paddle.save",
        )
    if not any(name.endswith(".metadata") for name in names):
        what = (
            "is a checkpoint of torch.distributed.checkpoint without .metadata: its writing "
            "was not finished"
        )
        return FormatError(source.path, what, hint="take an earlier checkpoint, or fetch .metadata")
    return FormatError(
        source.path,
        "is a checkpoint of torch.distributed.checkpoint (FSDP)",
        hint=joined_by_torch(source.path),
    )


def kind_of_folder(source: Source) -> Kind:
    """What the folder *source* is, which no format recognises."""
    names = source.names or ()
    for names_of_it, kind in _KINDS:
        if names_of_it.intersection(names):
            return kind
    if found := next(_foreign_weights(source), None):
        name, kind = found
        what = f"holds no weights that can be read; {shown(name)} {kind.what}"
        return Kind(what, kind.advice_for(source.path / name), is_weights=True)
    visible = [name for name in names if not name.startswith(".")]
    held = listed([shown(name) for name in visible], most=_LISTED) or "nothing"
    return Kind(f"holds no weights; it holds {held}", _inside(source.path, visible))


def _foreign_weights(source: Source) -> Iterator[tuple[str, Kind]]:
    """The files in the folder *source* that hold weights in a form that is not read."""
    files = [
        name
        for name in source.names or ()
        if not name.startswith(".") and (source.path / name).is_file()
    ]
    for name in files[:_MOST]:
        try:
            kind = kind_of(Source.file(source.path / name, source.limits))
        except FormatError:
            continue
        if kind is not None and kind.is_weights:
            yield name, kind


def _head(source: Source, name: str) -> bytes:
    try:
        return Source.file(source.path / name, source.limits).head
    except FormatError:
        return b""


def _inside(folder: Path, names: list[str]) -> str:
    if "snapshots" in names and (folder / "snapshots").is_dir():
        return (
            "this is an entry of a Hugging Face cache: give one of the folders in "
            f"{folder / 'snapshots'}"
        )
    return "pass the file or folder that holds the weights"
