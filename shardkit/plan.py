"""The byte-range plan: every output file as a list of parts, each a literal or a run of a source.

Making a plan is pure: the same entries and options give the same plan, and the same plan the same bytes, always. A dry run
prints it, the writer carries it out, resuming and verifying hold the result against it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from shardkit import header, index
from shardkit.checkpoint import TensorEntry
from shardkit.edits import Edited
from shardkit.errors import Unwritable
from shardkit.format import Format
from shardkit.payload import Extent, Literal, Part

INDEX_NAME = "model.safetensors.index.json"
_SHARD_NAME = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


@dataclass(frozen=True)
class OutputFile:
    """One file to be written.

    Attributes:
        name: relative to the output folder; forward slashes.
        parts: its bytes, in order.
    """

    name: str
    parts: tuple[Part, ...]

    @cached_property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True)
class Plan:
    """Everything there is to write, and nothing left to decide.

    Attributes:
        files: shards first, then the index, then the companions.
        weight_map: name of each tensor to the file that holds it.
        aliases: folded ties: each other name to the name that is kept.
        total_size: bytes of the tensors as they will be stored.
        oversized: names of the tensors that alone are larger than the bound.
        format: name of the format of the shards.
        checksum: algorithm of the digests that a manifest will hold; None for no manifest.
    """

    files: tuple[OutputFile, ...]
    weight_map: Mapping[str, str] = field(hash=False)
    aliases: Mapping[str, str] = field(hash=False)
    total_size: int
    oversized: tuple[str, ...] = ()
    format: str = "safetensors"
    checksum: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.nbytes for file in self.files)

    @property
    def shards(self) -> tuple[OutputFile, ...]:
        """The files that hold tensors."""
        names = set(self.weight_map.values())
        return tuple(file for file in self.files if file.name in names)

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hex, of what will be written from where: equal digests, equal output."""
        sha = hashlib.sha256(f"{self.checksum}\0".encode())
        for file in self.files:
            sha.update(f"{file.name}\0{file.nbytes}\0".encode("utf-8", "surrogateescape"))
            for part in file.parts:
                sha.update(_identity(part))
        return sha.hexdigest()


def plan_folder(
    edited: Edited, layout: Format, *, max_shard: int | None, metadata: Mapping[str, str], companions: Sequence[OutputFile] = ()
) -> Plan:
    """Shards of at most *max_shard* bytes (None: one shard), an index if there are several, and the *companions*.

    Raises:
        Unwritable: the format has no way to hold a tensor.
    """
    folds = _Folds.of(edited.aliases, metadata)
    fixed = header.fixed_room(metadata)
    runs = [edited.entries] if max_shard is None else list(by_size(edited.entries, max_shard - fixed, folds.size))
    names = list(_shard_names(len(runs)))
    shards = [OutputFile(name, _laid_out(layout, run, folds.metadata(run))) for name, run in zip(names, runs, strict=True)]
    weight_map = {entry.name: name for name, run in zip(names, runs, strict=True) for entry in run}
    total_size = sum(entry.nbytes for entry in edited.entries)
    listing = [OutputFile(INDEX_NAME, (Literal(index.dump(weight_map, total_size)),))] if len(runs) > 1 else []
    oversized = tuple(run[0].name for shard, run in zip(shards, runs, strict=True) if max_shard and shard.nbytes > max_shard)
    return Plan((*shards, *listing, *companions), weight_map, edited.aliases, total_size, oversized, layout.name)


def plan_file(edited: Edited, layout: Format, *, name: str, metadata: Mapping[str, str]) -> Plan:
    """All tensors in one file called *name*.

    Raises:
        Unwritable: the format has no way to hold a tensor.
    """
    folds = _Folds.of(edited.aliases, metadata)
    file = OutputFile(name, _laid_out(layout, edited.entries, folds.metadata(edited.entries)))
    total_size = sum(entry.nbytes for entry in edited.entries)
    return Plan((file,), {entry.name: name for entry in edited.entries}, edited.aliases, total_size, (), layout.name)


def by_size(entries: Iterable[TensorEntry], limit: int, size: Callable[[TensorEntry], int]) -> Iterator[tuple[TensorEntry, ...]]:
    """Cut *entries* into runs whose *size* is at most *limit* bytes; one that is larger runs alone."""
    run: list[TensorEntry] = []
    room = limit
    for entry in entries:
        need = size(entry)
        if run and need > room:
            yield tuple(run)
            run, room = [], limit
        run.append(entry)
        room -= need
    if run:
        yield tuple(run)


def is_shard_name(name: str) -> bool:
    """Whether some folder that is planned here could have a shard called *name*."""
    return bool(_SHARD_NAME.fullmatch(name))


@dataclass(frozen=True, slots=True)
class _Folds:
    """The names under which each kept tensor is known besides its own."""

    others: Mapping[str, list[str]]
    base: Mapping[str, str]

    @classmethod
    def of(cls, aliases: Mapping[str, str], metadata: Mapping[str, str]) -> _Folds:
        others: dict[str, list[str]] = {}
        for alias, kept in aliases.items():
            others.setdefault(kept, []).append(alias)
        return cls(others, metadata)

    def size(self, entry: TensorEntry) -> int:
        """Bytes that *entry* takes in a shard, with its line of the header and the records of its ties."""
        records = sum(len(json.dumps(alias)) + len(json.dumps(entry.name)) + 2 for alias in self.others.get(entry.name, ()))
        return entry.nbytes + header.room(entry) + records

    def metadata(self, run: Sequence[TensorEntry]) -> dict[str, str]:
        records = {alias: entry.name for entry in run for alias in self.others.get(entry.name, ())}
        return {**self.base, **records}


def _shard_names(count: int) -> Iterator[str]:
    if count == 1:
        yield "model.safetensors"
    else:
        yield from (f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1))


def _laid_out(layout: Format, entries: Sequence[TensorEntry], metadata: Mapping[str, str]) -> tuple[Part, ...]:
    if layout.lay_out is None:
        raise Unwritable(
            f"the format {layout.name} is only read", hint="write safetensors: leave -o out, or let it end in .safetensors"
        )
    return layout.lay_out(entries, metadata)


def _identity(part: Part) -> bytes:
    if type(part) is Extent:  # most parts are: a repr of the dataclass takes ten times as long
        return f"{part.path}\0{part.start}\0{part.nbytes}\n".encode("utf-8", "surrogateescape")
    return f"{part!r}\n".encode("utf-8", "surrogateescape")
