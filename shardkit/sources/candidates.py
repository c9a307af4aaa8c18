"""Choose which weights in one folder are the model: candidates in the order of transformers,
complete ones first.

1. `model.safetensors`, its index, `pytorch_model.bin`, its index; then the names of diffusers in
   the same order; then indexes of other names, and complete sets of numbered shards without an
   index.
2. An incomplete candidate is never chosen: if no other is complete, the error names the missing
   files. Variants, tensor-parallel parts and the state of a trainer are not candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shardkit.errors import Malformed, UnknownFormat
from shardkit.metadata.shard_index import Index
from shardkit.printable import listed, shown
from shardkit.sources import registry
from shardkit.sources.weight_file_names import (
    PREFERRED,
    STEMS,
    ShardSet,
    is_index,
    is_parallel,
    likeliness,
    shard_sets,
)

_LISTED = 8


@dataclass(frozen=True, slots=True)
class Candidate:
    """Weights in a folder that may be the model.

    Attributes:
        name: of the file or of the index; of a set of shards a glob.
        files: the names of its weights.
        missing: those of them that are not there.
        index: what the index says, if it has one.
    """

    name: str
    files: tuple[str, ...]
    missing: tuple[str, ...] = ()
    index: Index | None = None

    @property
    def is_file(self) -> bool:
        return self.files == (self.name,)

    @property
    def is_safe(self) -> bool:
        """Whether it is called like safetensors."""
        return ".safetensors" in self.name

    def incomplete(self, folder: Path, hint: str = "") -> Malformed:
        """The error that names what is missing."""
        are = "is" if len(self.missing) == 1 else "are"
        count = f"{len(self.missing):,} of the {len(self.files):,} files"
        hint = f"finish the download{hint}"
        if self.index is None:
            message = f"{count} of the set {shown(self.name)} {are} missing: {named(self.missing)}"
            return Malformed(folder, message, hint=hint)
        message = f"{count} that it lists {are} missing: {named(self.missing)}"
        return Malformed(folder / self.name, message, hint=hint)


def of_index(folder: Path, name: str, index: Index) -> Candidate:
    """The candidate that the *index* called *name* makes of the files in *folder*."""
    missing = tuple(each for each in index.shards if not stored(folder / each).exists())
    return Candidate(name, tuple(index.shards), missing, index)


def of_shards(shards: ShardSet) -> Candidate:
    """The candidate that a set of numbered shards is."""
    absent = () if shards.is_complete else shards.missing
    missing = tuple(shards.name(number) for number in absent)
    return Candidate(shards.pattern, (*shards.names.values(), *missing), missing)


def in_order(names: Sequence[str]) -> Iterator[str]:
    """Those of *names* that loaders look for, and indexes of other names, in their order."""
    by_plain = {
        expanded(name): name for name in reversed(names)
    }  # one that is there in plain goes first
    yield from (by_plain[name] for name in PREFERRED if name in by_plain)
    yield from sorted(
        (name for name in names if is_index(name) and name not in PREFERRED), key=_safe_first
    )


def sets_in_order(names: Sequence[str]) -> list[ShardSet]:
    """The sets of numbered shards among *names*, the usual names first."""
    return sorted(
        shard_sets(names), key=lambda each: (_rank(each.pattern), *_safe_first(each.pattern))
    )


def refuse_rivals(folder: Path, complete: Sequence[Candidate]) -> None:
    """Raise UnknownFormat where several complete candidates are of other names than loaders know.

    What is called alike but for its ending is one model in two formats, of which the first is
    taken.
    """
    first = complete[0]
    rivals = [each.name for each in complete if _stem(each.name) != _stem(first.name)]
    if _rank(first.name) < len(STEMS) or not rivals:
        return
    kind = "indexes" if first.index else "sets of shards"
    names = [first.name, *rivals]
    likely = min(names, key=likeliness)
    hint = f"give one of them, as in {folder / likely}" if first.index else "move the others away"
    raise UnknownFormat(folder, f"holds {len(names)} {kind}: {named(names)}", hint=hint)


def refuse_parallel(folder: Path, names: Sequence[str]) -> None:
    """Raise UnknownFormat where *names* are the parts of several ranks."""
    parts = [name for name in names if is_parallel(name)]
    if len(parts) > 1:
        raise UnknownFormat(
            folder,
            f"holds the parts of {len(parts):,} ranks: {named(parts)}; each holds slices of the "
            "same tensors (tensor-parallel or ZeRO), so that they cannot be joined as shards",
            hint="merge them with the tool that trained the model, or give one part to convert it",
        )


def stored(path: Path) -> Path:
    """Return *path*, or its compressed form if only that exists."""
    beside = (path.with_name(path.name + suffix) for suffix in registry.codec_suffixes())
    return path if path.exists() else next((each for each in beside if each.exists()), path)


def expanded(name: str) -> str:
    """What the file called *name* is called once it is expanded."""
    endings = (suffix for suffix in registry.codec_suffixes() if name.endswith(suffix))
    return name.removesuffix(next(endings, ""))


def named(names: Sequence[str]) -> str:
    """The first of *names*, and how many more there are."""
    return listed([shown(name) for name in names], most=_LISTED)


def _safe_first(name: str) -> tuple[bool, str]:
    return ".safetensors" not in name, name


def _stem(name: str) -> str:
    return name.partition(".")[0].partition("-*-of-")[0]


def _rank(name: str) -> int:
    stem = _stem(name)
    return STEMS.index(stem) if stem in STEMS else len(STEMS)
