"""Format "npy": a lone array. It has no name of its own; the tensor is called "tensor"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shardkit.plugin import (
    Checkpoint,
    Format,
    Literal,
    Other,
    Part,
    Source,
    TensorEntry,
    Unwritable,
    option,
    renaming,
    shown,
)
from shardkit_npz import header
from shardkit_npz.arrays import tensor

NAME = "tensor"


def sniff(source: Source) -> bool:
    """Whether the file begins like a .npy file."""
    return source.head.startswith(header.MAGIC)


def scan(source: Source) -> Checkpoint:
    """The one tensor, or what is there instead."""
    found = header.parse(source.path, "", lambda nbytes: source.read(0, min(nbytes, source.size)))
    data = source.payload(found.nbytes, source.size - found.nbytes)
    array = tensor(source.path, NAME, found, data, "")
    return Checkpoint((), (array,)) if isinstance(array, Other) else Checkpoint((array,))


def lay_out(entries: Sequence[TensorEntry], metadata: Mapping[str, str]) -> tuple[Part, ...]:
    """The parts of a file that holds the one entry.

    Raises:
        Unwritable: it is not one, or is called or accompanied by what the format has no room for.
    """
    if len(entries) != 1:
        raise Unwritable(
            f"a .npy file holds one tensor, and {len(entries)} were selected",
            hint=("write .npz, or choose one with ", option("include")),
        )
    (entry,) = entries
    if entry.name != NAME:
        message = (
            f"a .npy file keeps no name and its tensor is read as {NAME!r}; this one is "
            f"called {shown(entry.name)}"
        )
        raise Unwritable(
            message,
            hint=("rename it: ", renaming("^.*$", NAME), "; or write .npz, which keeps names"),
        )
    extra = sorted(set(metadata) - {"format"})
    if extra:
        raise Unwritable(
            f"a .npy file has no room for metadata ({', '.join(map(shown, extra[:3]))})",
            hint="write .npz, which keeps it",
        )
    return Literal(header.dump(entry)), entry.payload


FORMAT = Format(name="npy", suffixes=(header.SUFFIX,), sniff=sniff, scan=scan, lay_out=lay_out)
