"""Explain why weights in a folder were not read: each file, set of shards and subfolder with a
reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from shardkit.checkpoint.entries import Checkpoint, LeftOut
from shardkit.printable import shown
from shardkit.sizes import format_size
from shardkit.sources.candidates import Candidate, expanded, named
from shardkit.sources.folder_contents import LARGEST_COMPANION, Beside, Role, surroundings
from shardkit.sources.weight_file_names import (
    PREFERRED,
    ShardSet,
    is_adapter,
    is_parallel,
    shard_sets,
    training_state,
    variant_of,
)

_NOT_FETCHED = "contains no weights: a git-lfs pointer or an unfinished download"
_UNREADABLE = "cannot be read, so it is not copied"
_TOO_LARGE = f"larger than {format_size(LARGEST_COMPANION)}, so it is not copied"


@dataclass(frozen=True, slots=True)
class Reader:
    """What was read of a folder, and what was passed over for it.

    Attributes:
        folder: the folder.
        chosen: the name of what was read.
        passed: the other candidates.
        broken: the names of indexes that cannot be read.
    """

    folder: Path
    chosen: str
    passed: Sequence[Candidate] = ()
    broken: Sequence[str] = ()

    def left_out(self, beside: Sequence[Beside]) -> tuple[LeftOut, ...]:
        """What *beside* holds of weights, each with the reason why it was not read."""
        files = {each.path: each for each in beside if _is_file(each)}
        sets = [each for each in shard_sets(files) if len(each.names) > 1]
        in_sets = {name for each in sets for name in each.names.values()}
        single = (self._of(each) for each in beside if each.path not in in_sets)
        several = (self._of_set(each, files) for each in sets)
        return tuple(sorted((*self._indexes(), *single, *several), key=lambda part: part.path))

    def _of(self, beside: Beside) -> LeftOut:
        return LeftOut(beside.path, beside.nbytes, self._reason(beside))

    def _of_set(self, shards: ShardSet, files: Mapping[str, Beside]) -> LeftOut:
        names = list(shards.names.values())
        reason = self._why_not(names[0])
        count = (
            f"{len(names):,} shards"
            if shards.is_complete
            else f"{len(names):,} of {shards.total:,} shards"
        )
        return LeftOut(
            shards.pattern, sum(files[name].nbytes for name in names), f"{count}; {reason}"
        )

    def _indexes(self) -> Iterator[LeftOut]:
        """The indexes that were of no use; for others, their shards speak."""
        for each in self.passed:
            if each.missing and each.index is not None:
                are = "is" if len(each.missing) == 1 else "are"
                reason = (
                    f"{len(each.missing):,} of its {len(each.files):,} files {are} missing: "
                    f"{named(each.missing)}"
                )
                yield LeftOut(each.name, (self.folder / each.name).stat().st_size, reason)
        for name in self.broken:
            yield LeftOut(name, (self.folder / name).stat().st_size, "an index that cannot be read")

    def _reason(self, beside: Beside) -> str:
        if beside.count > 1:
            return f"{beside.count:,} files, judged by their names"
        match beside.role:
            case Role.NOT_FETCHED:
                return _NOT_FETCHED
            case Role.TOO_LARGE:
                return _TOO_LARGE
            case Role.UNREADABLE:
                return _UNREADABLE
            case Role.FOREIGN_WEIGHTS:
                return f"{beside.what}, which no installed format reads"
        if beside.is_folder:
            return "a checkpoint of its own: give this folder to read it"
        return self._why_not(beside.path)

    def _why_not(self, name: str) -> str:
        plain = expanded(name)
        if (state := training_state(plain)) is not None:
            return state
        if is_parallel(plain):
            return "part of one rank (tensor-parallel or ZeRO)"
        if (variant := variant_of(plain)) is not None:
            return f"variant {shown(variant)}: give its file or index to read it"
        if is_adapter(plain) and not is_adapter(expanded(self.chosen)):
            return "an adapter, which is applied on top of a model"
        index = next((each.name for each in self.passed if each.index and name in each.files), None)
        if plain in PREFERRED or index is not None or self._is_same_in_another_format(plain):
            of = f"in {shown(index)}; " if index else ""
            return f"{of}{shown(self.chosen)} comes first"
        return f"not part of {shown(self.chosen)}"

    def _is_same_in_another_format(self, name: str) -> bool:
        """Tell whether the name is that of the file that was read, but for its suffix."""
        return name.rpartition(".")[0] == expanded(self.chosen).rpartition(".")[0]


def _is_file(beside: Beside) -> bool:
    return "/" not in beside.path and beside.role.is_weights and beside.count == 1


def with_left_out(checkpoint: Checkpoint, reader: Reader) -> Checkpoint:
    """*checkpoint*, which *reader* read, with what is left out beside it."""
    found = surroundings(reader.folder, (file.path for file in checkpoint.files))
    left_out = (*checkpoint.left_out, *reader.left_out(found.beside))
    return replace(checkpoint, notes=(*checkpoint.notes, *found.notes), left_out=left_out)
