"""Merge an index and its shards into one checkpoint, or report where they disagree.

The contents of the shards decide, as in transformers: a tensor that is in another shard than the
index says is taken from there, and a name that no shard contains (a tied weight, a buffer that is
no longer saved) is reported. Both are notes. A shard that contains nothing of what the index
expects in it belongs to another model, and is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from shardkit.checkpoint.entries import Checkpoint, LeftOut, TensorEntry
from shardkit.errors import LimitExceeded, Malformed
from shardkit.limits import Limits
from shardkit.metadata.shard_index import Index
from shardkit.printable import listed, shown

_LISTED = 3
_FETCH = "the index and the shards belong to different models or versions: download them again"
_WRITE = "write an index that names the shard of each tensor, or give the shards one by one"


def joined(
    path: Path, index: Index, shards: Mapping[str, Checkpoint], limits: Limits
) -> Checkpoint:
    """The *shards*, scanned each by itself, as the one checkpoint that the *index* at *path* makes
    of them.

    Raises:
        Malformed: nothing that the index expects in a shard is in any.
        LimitExceeded: there are too many tensors.
    """
    _check_count(path, shards.values(), limits)
    census = _Census(index.weight_map, {name: _names(shard) for name, shard in shards.items()})
    census.check(path)
    for name, shard in shards.items():
        census.add(name, shard)
    metadata, differing = _merged(shards.values())
    return Checkpoint(
        tensors=tuple(census.tensors),
        others=tuple(other for shard in shards.values() for other in shard.others),
        metadata=metadata,
        files=tuple(file for shard in shards.values() for file in shard.files),
        format=" + ".join(dict.fromkeys(shard.format for shard in shards.values())),
        notes=(
            *census.notes(),
            *differing,
            *dict.fromkeys(note for shard in shards.values() for note in shard.notes),
        ),
        left_out=tuple(census.left_out()),
    )


def unlisted(
    folder: Path, pattern: str, shards: Mapping[str, Checkpoint], limits: Limits
) -> Checkpoint:
    """All *shards* of a set that *pattern* stands for, which has no index, as one checkpoint.

    Raises:
        Malformed: two of them hold a tensor of one name.
        LimitExceeded: there are too many tensors.
    """
    _check_count(folder, shards.values(), limits)
    weight_map: dict[str, str] = {}
    for shard, checkpoint in shards.items():
        for entry in checkpoint.tensors:
            first = weight_map.setdefault(entry.name, shard)
            if first != shard:
                message = (
                    f"is in {shown(first)} and in {shown(shard)}, and there is no index "
                    "that says which to read"
                )
                raise Malformed(folder, message, where=f"tensor {shown(entry.name)}", hint=_WRITE)
    whole = joined(folder / pattern, Index(weight_map, {}), shards, limits)
    note = (
        f"there is no index: the {len(shards):,} shards of {shown(pattern)} were joined by "
        "their numbers"
    )
    return Checkpoint(
        whole.tensors, whole.others, whole.metadata, whole.files, whole.format, (note, *whole.notes)
    )


@dataclass(slots=True)
class _Census:
    """Where each tensor is, compared with the *weight_map*.

    Attributes:
        weight_map: what the index says.
        holds: the names of all weights in each shard.
        tensors: those that are taken.
        taken: the names of these, each with the shard that it is taken from.
        moved: those that the index expects in another shard.
        unlisted: those that it does not list, by their shards.
        again: those that are not taken, because another shard has them too, by their shards.
    """

    weight_map: Mapping[str, str]
    holds: Mapping[str, frozenset[str]]
    tensors: list[TensorEntry] = field(default_factory=list)
    taken: dict[str, str] = field(default_factory=dict)
    moved: list[str] = field(default_factory=list)
    unlisted: dict[str, list[str]] = field(default_factory=dict)
    again: dict[str, list[TensorEntry]] = field(default_factory=dict)

    def check(self, path: Path) -> None:
        """Raise Malformed where nothing that the index expects in a shard is in any."""
        everywhere = frozenset[str]().union(*self.holds.values())
        met = {shard for name, shard in self.weight_map.items() if name in everywhere}
        for name, shard in self.weight_map.items():
            if shard not in met:
                message = (
                    "no shard contains it, nor anything else that the index expects in "
                    f"{shown(shard)}"
                )
                raise Malformed(path, message, where=f"tensor {shown(name)}", hint=_FETCH)

    def add(self, name: str, shard: Checkpoint) -> None:
        """Take from *shard*, which is called *name*, what is to be taken from it."""
        foreign: list[TensorEntry] = []
        for entry in shard.tensors:
            place = self.weight_map.get(entry.name)
            if place == name:
                self._take(entry, name)
            elif entry.name in self.taken or (
                place is not None and entry.name in self.holds[place]
            ):
                self.again.setdefault(name, []).append(entry)
            else:
                foreign.append(entry)
                self._take(entry, name)
        if not foreign:
            return
        listed_here = {
            entry.payload for entry in shard.tensors if self.weight_map.get(entry.name) == name
        }
        for entry in foreign:
            if entry.name in self.weight_map:
                self.moved.append(entry.name)
            elif (
                entry.payload not in listed_here
            ):  # otherwise it is a tie that the shard records, and needs no index
                self.unlisted.setdefault(name, []).append(entry.name)

    def notes(self) -> Iterator[str]:
        """Sentences on where the index and the shards disagree."""
        everywhere = frozenset[str]().union(*self.holds.values())
        lacking = [name for name in self.weight_map if name not in everywhere]
        if lacking:
            yield (
                f"the index lists {_named(lacking)}, which no shard contains; a tied weight or "
                "a buffer need not be stored"
            )
        if self.moved:
            yield (
                f"{_named(self.moved)}: in another shard than the index says; read from where it is"
            )
        for shard, names in self.unlisted.items():
            yield f"{_named(names)}: in {shown(shard)} and not in the index; converted all the same"

    def left_out(self) -> Iterator[LeftOut]:
        """Tensors that several shards hold, where they were not read."""
        for shard, entries in self.again.items():
            first = self.taken[entries[0].name]
            reason = (
                f"{_named([entry.name for entry in entries])}: read from {shown(first)}, "
                "which has it too"
            )
            yield LeftOut(shard, sum(entry.nbytes for entry in entries), reason)

    def _take(self, entry: TensorEntry, shard: str) -> None:
        self.tensors.append(entry)
        self.taken.setdefault(entry.name, shard)


def _check_count(path: Path, shards: Iterable[Checkpoint], limits: Limits) -> None:
    count = sum(len(shard.tensors) for shard in shards)
    if count > limits.tensors:
        raise LimitExceeded(
            path, f"its shards hold {count:,} tensors", limit="tensors", actual=count
        )


def _names(shard: Checkpoint) -> frozenset[str]:
    others = (other.name for other in shard.others if other.is_weight)
    return frozenset((*(entry.name for entry in shard.tensors), *others))


def _named(names: list[str]) -> str:
    return listed([shown(name) for name in names], most=_LISTED)


def _merged(shards: Iterable[Checkpoint]) -> tuple[dict[str, str], list[str]]:
    merged: dict[str, str] = {}
    differing: dict[str, None] = {}
    for shard in shards:
        for key, text in shard.metadata.items():
            if merged.setdefault(key, text) != text:
                differing[key] = None
    if not differing:
        return merged, []
    return merged, [
        (
            f"the shards differ in their metadata {', '.join(map(shown, differing))}; that of the "
            "first was taken"
        )
    ]
