"""Why a path cannot be read as a checkpoint, and what to do about it: the mistakes that people make
most often.

`diagnosed` is for what no format recognises, `explained` for what a format recognised and could not
read, and `never_alone` for what no format is asked about.
"""

from __future__ import annotations

from shardkit.errors import FormatError, UnknownFormat
from shardkit.printable import several, shown
from shardkit.sources.foreign import pieces
from shardkit.sources.foreign.files import failed_download, kind_of
from shardkit.sources.foreign.folders import distributed, kind_of_folder
from shardkit.sources.foreign.kinds import AGAIN, Kind, joined_by_torch
from shardkit.sources.foreign.marks import is_text
from shardkit.sources.format import Source

_FOUND_BY_HUB = {"model.safetensors", "pytorch_model.bin"}


def never_alone(source: Source) -> FormatError | None:
    """Why *source* is no complete checkpoint, whatever a format would make of it; None if it may be
    one.
    """
    if source.is_folder:
        names = source.names or ()
        is_model = _FOUND_BY_HUB.intersection(names) or any(".index." in name for name in names)
        return pieces.unfinished_run(source.path) or (None if is_model else distributed(source))
    if source.path.suffix != ".distcp":
        return None
    return FormatError(
        source.path,
        "is one file of a checkpoint of torch.distributed.checkpoint (FSDP), and only the folder "
        "is complete",
        hint=joined_by_torch(source.path.parent),
    )


def explained(source: Source, error: FormatError) -> FormatError:
    """What is the matter with the file *source*, over which a format raised *error*."""
    if source.is_folder:
        return error
    return pieces.of_a_split_file(source.path) or pieces.unfinished_download(source.path) or error


def diagnosed(source: Source, also: str = "") -> FormatError:
    """Why *source* is no checkpoint that can be read, as the error to raise; *also* ends its
    hint.
    """
    found = kind_of_folder(source) if source.is_folder else _diagnosis(source)
    if isinstance(found, FormatError):
        return found
    advice = found.advice_for(source.path)
    hint = f"{advice}; {also}" if also else advice
    return UnknownFormat(source.path, found.what, holds_weights=found.is_weights, hint=hint)


def _diagnosis(source: Source) -> Kind | FormatError:
    return (
        failed_download(source)
        or pieces.of_a_split_file(source.path)
        or kind_of(source)
        or pieces.unfinished_download(source.path)
        or _unknown(source.head)
    )


def _unknown(head: bytes) -> Kind:
    if len(head) < 16:
        return Kind(f"has {several(len(head), 'byte')}, too few for any format", AGAIN)
    if is_text(head):
        begin = shown(head[:40].decode("utf-8", "replace"))
        what = f"is text and holds no weights; it begins with {begin}"
        return Kind(what, "pass the file or folder that holds the weights")
    what = f"has no known format; it begins with {head[:8].hex(' ')}"
    return Kind(what, "`shardkit formats` lists what can be read")
