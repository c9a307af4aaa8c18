"""What an index and its shards say together: one checkpoint, or a sentence on where they disagree."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from shardkit.checkpoint import Checkpoint, TensorEntry
from shardkit.errors import LimitExceeded, Malformed, listed, shown
from shardkit.index import Index
from shardkit.limits import Limits

_LISTED = 3


def joined(path: Path, index: Index, shards: Mapping[str, Checkpoint], limits: Limits) -> Checkpoint:
    """The *shards*, scanned each by itself, as the one checkpoint that the *index* at *path* makes of them.

    A tensor that a shard holds and the index does not know is taken along; one that stands in several is taken from where
    the index says. Both are noted.

    Raises:
        Malformed: a tensor is not in the file that the index names.
        LimitExceeded: there are too many.
    """
    count = sum(len(shard.tensors) for shard in shards.values())
    if count > limits.tensors:
        raise LimitExceeded(path, f"its shards hold {count:,} tensors", limit="tensors", actual=count)
    census = _Census(index.weight_map)
    for name, shard in shards.items():
        census.add(name, shard)
    census.check(path)
    metadata, differing = _merged(shards.values())
    return Checkpoint(
        tensors=tuple(census.tensors),
        others=tuple(other for shard in shards.values() for other in shard.others),
        metadata=metadata,
        files=tuple(file for shard in shards.values() for file in shard.files),
        format=" + ".join(dict.fromkeys(shard.format for shard in shards.values())),
        notes=(*census.notes(), *differing, *(note for shard in shards.values() for note in shard.notes)),
    )


@dataclass(slots=True)
class _Census:
    """Where each tensor was found, held against the *weight_map*."""

    weight_map: Mapping[str, str]
    tensors: list[TensorEntry] = field(default_factory=list)
    found: set[str] = field(default_factory=set)
    unlisted: dict[str, list[str]] = field(default_factory=dict)
    elsewhere: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, shard: Checkpoint) -> None:
        foreign: list[TensorEntry] = []
        for entry in shard.tensors:
            if self.weight_map.get(entry.name) == name:
                self.tensors.append(entry)
                self.found.add(entry.name)
            else:
                foreign.append(entry)
        self.found.update(other.name for other in shard.others if other.is_weight and self.weight_map.get(other.name) == name)
        self._add_foreign(name, shard, foreign)

    def check(self, path: Path) -> None:
        """Raise Malformed if a tensor is not where the index says."""
        lacking = [name for name in self.weight_map if name not in self.found]
        if not lacking:
            return
        first = lacking[0]
        elsewhere = f"it lies in {shown(self.elsewhere[first])}" if first in self.elsewhere else "which does not hold it"
        join = ", and " if first in self.elsewhere else ", "
        more = f"; so it is with {len(lacking) - 1:,} more" if len(lacking) > 1 else ""
        message = f"puts it into {shown(self.weight_map[first])}{join}{elsewhere}{more}"
        hint = "index and shards are not of one model, or of one version of it: fetch them again"
        raise Malformed(path, message, where=f"tensor {shown(first)}", hint=hint)

    def notes(self) -> Iterator[str]:
        for shard, names in self.unlisted.items():
            yield f"{_counted(names)} in {shown(shard)} and not in the index; taken along"
        twice = [name for name in self.elsewhere if name in self.found]
        if twice:
            yield f"{_counted(twice)} in several shards; the one that the index names was taken"

    def _add_foreign(self, name: str, shard: Checkpoint, entries: list[TensorEntry]) -> None:
        listed = {entry.payload for entry in shard.tensors if entry.name in self.found} if entries else set()
        for entry in entries:
            if entry.name in self.weight_map or entry.name in self.found:
                self.elsewhere.setdefault(entry.name, name)
                continue
            self.tensors.append(entry)
            self.found.add(entry.name)
            if entry.payload not in listed:  # otherwise it is a tie that the shard records, and needs no place in the index
                self.unlisted.setdefault(name, []).append(entry.name)


def _counted(names: list[str]) -> str:
    return f"{listed([shown(name) for name in names], most=_LISTED)} {'stands' if len(names) == 1 else 'stand'}"


def _merged(shards: Iterable[Checkpoint]) -> tuple[dict[str, str], list[str]]:
    merged: dict[str, str] = {}
    differing: dict[str, None] = {}
    for shard in shards:
        for key, text in shard.metadata.items():
            if merged.setdefault(key, text) != text:
                differing[key] = None
    if not differing:
        return merged, []
    return merged, [f"the shards differ in their metadata {', '.join(map(shown, differing))}; that of the first was taken"]
