"""Choose the default path of an output, and check what it may replace.

Nothing is replaced without `overwrite`; with it, only files that shardkit itself writes: shards,
their index, and the files that this run copies again. The source, a folder around it or inside it,
and a mount point are never replaced.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from shardkit.checkpoint.entries import SourceFile
from shardkit.errors import NoRoom, OutputError
from shardkit.hints import option
from shardkit.hints import output as out_option
from shardkit.metadata.manifest import MANIFEST_NAME
from shardkit.metadata.offload_index import OFFLOAD_NAME
from shardkit.metadata.shard_names import INDEX_NAMES, is_shard_name
from shardkit.metadata.unit_records import PARTIAL
from shardkit.planning.output import Output
from shardkit.planning.plan import Plan
from shardkit.printable import shown, shown_path
from shardkit.sizes import format_size
from shardkit.sources import registry

_ELSEWHERE = ("choose another output with ", out_option())


def default_output(source: Path, ending: str = "shards") -> Path:
    """`<stem>-<ending>` beside *source*, or in the working folder where that is read-only or a
    cache.
    """
    source = (
        source.resolve() if source.name in ("", "..") else source
    )  # "." and ".." have no name and no parent
    model = _model_folder(source)
    beside = source.parent if model == source else Path.cwd()
    writable = os.access(beside, os.W_OK)
    return (beside if writable else Path.cwd()) / f"{_stem(model)}-{ending}"


def followed(out: Path) -> Path:
    """*out*, or where it leads if it is a link or has no name of its own: that is what a rename can
    replace.
    """
    if out.is_symlink() and not (target := out.parent / os.readlink(out)).is_symlink():
        out = target
    return out.resolve() if out.is_symlink() or out.name in ("", "..") else out


def partial_folder(out: Path) -> Path:
    """Where the output *out* is prepared: beside it, so that one rename puts it in place."""
    return out.with_name(out.name + PARTIAL)


def check_output(output: Output, *, overwrite: bool) -> None:
    """Raise OutputError unless the place of *output* is free, or *overwrite* and what is there is
    shardkit's to replace.
    """
    try:
        _check_output(output, overwrite=overwrite)
    except OSError as error:
        message = f"{shown_path(output.out)}: cannot be examined: {error.strerror or error}"
        raise OutputError(message, hint=_ELSEWHERE) from None


def check_room(folder: Path, needed: int, name: str) -> None:
    """Raise NoRoom unless the disk of *folder* has the *needed* bytes free for the output of what
    is called *name*.
    """
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise NoRoom(
            f"{shown_path(folder)} has {format_size(free)} free, "
            f"and the output of {name} needs {format_size(needed)}",
            hint=("free some space, or choose another disk with ", out_option()),
        )


def _check_output(output: Output, *, overwrite: bool) -> None:
    out = output.out
    if not out.parent.is_dir() and out.parent.exists():
        raise OutputError(f"{shown_path(out.parent)} is not a folder", hint=_ELSEWHERE)
    if out.is_dir() and os.path.ismount(out):
        raise OutputError(
            f"{shown_path(out)} is a mount point, which a rename cannot replace",
            hint=("choose a folder in it: ", out_option(out / "shards")),
        )
    if out.exists() and not out.is_dir() and not out.is_file():
        raise OutputError(f"{shown_path(out)} is neither a file nor a folder", hint=_ELSEWHERE)
    _refuse_working_folder(out)
    if not out.exists() or (out.is_dir() and not os.listdir(out)):
        return
    if not overwrite:
        raise OutputError(
            f"{shown_path(out)} exists",
            hint=(*_ELSEWHERE, ", or replace it with ", option("overwrite", True)),
        )
    _refuse_source(out, output.files, output.origin)
    _refuse_foreign(out, output.plan)


def _model_folder(source: Path) -> Path:
    """Return *source*, or the folder with the model's name if it is in a Hugging Face cache."""
    return next(
        (
            parent
            for parent in (source, *source.absolute().parents)
            if parent.name.startswith("models--")
        ),
        source,
    )


def _stem(path: Path) -> str:
    if path.name.startswith("models--"):
        return path.name.split("--")[-1]
    name = path.name
    if path.is_dir():
        return name or "model"
    endings = sorted(
        {".zst", ".index.json", ".json", ".bin", ".tar", *registry.suffixes()},
        key=len,
        reverse=True,
    )
    while stripped := next(
        (name.removesuffix(end) for end in endings if name.endswith(end) and name != end), ""
    ):
        name = stripped
    return name


def _refuse_working_folder(out: Path) -> None:
    """The output replaces a folder by a rename, and a shell whose folder that was would stand in
    one that is gone.
    """
    here, place = Path.cwd(), out.resolve()
    if place == here or place in here.parents:
        raise OutputError(
            (f"{shown_path(out)} is the working folder or contains it, and cannot be replaced"),
            hint=("choose a folder in it: ", out_option(place / "shards")),
        )


def _refuse_source(out: Path, files: Iterable[SourceFile], origin: Path | None) -> None:
    place = out.resolve()
    inputs = {file.path.resolve() for file in files} | ({origin.resolve()} if origin else set())
    is_inside = origin is not None and origin.is_dir() and origin.resolve() in place.parents
    if is_inside or any(each == place or place in each.parents for each in inputs):
        raise OutputError(
            f"{shown_path(out)} is the input, contains it or is inside it, and is not overwritten",
            hint=_ELSEWHERE,
        )


def _refuse_foreign(out: Path, plan: Plan) -> None:
    ours = {file.name for file in plan.files} | {*INDEX_NAMES, MANIFEST_NAME, OFFLOAD_NAME}
    if out.is_dir():
        found = [
            path.relative_to(out).as_posix()
            for path in out.rglob("*")
            if not path.is_dir() or path.is_symlink()
        ]
    else:
        found = [out.name]
    foreign = sorted(name for name in found if name not in ours and not is_shard_name(name))
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise OutputError(
            (
                f"{shown_path(out)} holds {shown(foreign[0])}{more}, which shardkit did not write, "
                "and is not overwritten"
            ),
            hint=(*_ELSEWHERE, ", or move those files away"),
        )
