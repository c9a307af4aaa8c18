"""The byte-range plan: every output file as a list of parts, each a literal or a run of a source.

Making a plan is pure: the same entries and options give the same plan, and the same plan the same
bytes, always. A dry run prints it, the writer executes it, resuming and verifying compare the
result with it.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import TypeVar

from shardkit.brief import brief
from shardkit.checkpoint import tie_records
from shardkit.checkpoint.blocks import BlockEntries, arranged, misaligned
from shardkit.checkpoint.edits import Edited
from shardkit.checkpoint.entries import TensorEntry
from shardkit.errors import Unwritable
from shardkit.hints import output
from shardkit.metadata import offload_index, safetensors_header, shard_index
from shardkit.metadata.manifest import Run
from shardkit.metadata.offload_index import BlockRun, OffloadRecord, Origin, Shard
from shardkit.metadata.shard_names import STEM, index_name
from shardkit.metadata.unit_records import Finished
from shardkit.payloads.coalesce import coalesced
from shardkit.payloads.codec import Codec
from shardkit.payloads.payload import PAGE, Literal, Part
from shardkit.planning.part_identity import identity
from shardkit.sources.format import Format

_Run = TypeVar("_Run")


@dataclass(frozen=True, slots=True)
class Late:
    """Content that is known once the files before it are written, as it holds their digests.

    Attributes:
        nbytes: its length. A manifest that lists compressed files is planned as if they were not
            compressed, and may differ by a few digits.
        make: takes what was written, by name of the file, and returns the content.
    """

    nbytes: int
    make: Callable[[Mapping[str, Finished]], bytes] = field(repr=False, compare=False)


@dataclass(frozen=True)
class OutputFile:
    """One file to be written.

    Attributes:
        name: relative to the output folder; forward slashes.
        parts: its bytes, in order.
        codec: how they are compressed; None where they are stored plainly.
        frames: how many of them each frame holds, where they are compressed.
        late: what it holds instead of parts, where that depends on files that are written before
            it.
    """

    name: str
    parts: tuple[Part, ...]
    codec: Codec | None = None
    frames: tuple[int, ...] = ()
    late: Late | None = None

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all parts; where they are compressed, the file will be shorter."""
        return self.late.nbytes if self.late else sum(part.nbytes for part in self.parts)

    def settled(self, written: Mapping[str, Finished]) -> OutputFile:
        """This file with the content that follows from what was *written* before it."""
        assert self.late is not None
        return OutputFile(self.name, (Literal(self.late.make(written)),))

    @property
    def expanded(self) -> str:
        """The name that it has when it is expanded."""
        return self.name.removesuffix(self.codec.suffix) if self.codec else self.name


@dataclass(frozen=True, repr=False)
class Plan:
    """The complete content of an output, decided before anything is written.

    `shardkit.load.save` and `convert` execute plans; equal plans give the same bytes.

    Attributes:
        files: shards first, then the index, the copied files, and what holds digests of others.
        weight_map: name of each tensor to the file that holds it.
        aliases: folded ties: each other name to the name that is kept.
        total_size: bytes of the tensors as they will be stored.
        oversized: names of the tensors that alone are larger than the bound.
        format: name of the format of the shards.
        checksum: algorithm of the digests that a manifest will hold; None for no manifest.
        record: the blocks that the shards hold, without their digests; None where these are cut by
            size alone.

    Example:
        >>> import shardkit
        >>> from shardkit.planning.prepare import prepare
        >>> plan = prepare("model.safetensors", "out", shardkit.Edits()).plan
        >>> [file.name for file in plan.files], plan.total_size
        (['model.safetensors'], 304)
        >>> shard = plan.shards[0]
        >>> plan.is_safetensors(shard), len(plan.tensors_in(shard)), plan.blocks_in(shard)
        (True, 4, ())
    """

    files: tuple[OutputFile, ...]
    weight_map: Mapping[str, str] = field(hash=False)
    aliases: Mapping[str, str] = field(hash=False)
    total_size: int
    oversized: tuple[str, ...] = ()
    format: str = "safetensors"
    checksum: str | None = None
    record: OffloadRecord | None = None

    def __repr__(self) -> str:
        return brief(self)

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.nbytes for file in self.files)

    @property
    def shards(self) -> tuple[OutputFile, ...]:
        """The files that hold tensors."""
        return tuple(file for file in self.files if file.name in self._shard_names)

    def is_safetensors(self, file: OutputFile) -> bool:
        """Tell whether *file* is a shard of safetensors, compressed or not."""
        return self.format == "safetensors" and file.name in self._shard_names

    def tensors_in(self, file: OutputFile) -> tuple[Run, ...]:
        """List the byte ranges of tensors in *file*; empty where the file is compressed."""
        if (
            not self.is_safetensors(file)
            or file.codec is not None
            or not isinstance(file.parts[0], Literal)
        ):
            return ()
        return tuple(Run(*place) for place in safetensors_header.places(file.parts[0].content))

    def blocks_in(self, file: OutputFile) -> tuple[BlockRun, ...]:
        """List the byte ranges of blocks in *file*, as it is before compression."""
        return self.record.runs_in(file.expanded) if self.record is not None else ()

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hex, of everything that determines the output: equal digests, equal output.

        Files that hold digests of others follow from those, the algorithm and the record of blocks.
        """
        sha = hashlib.sha256(f"{self.checksum}\0".encode())
        absolute = cache(os.path.abspath)  # for as long as the working folder cannot change
        if self.record is not None:
            sha.update(offload_index.dump(self.record))
        for file in self.files:
            if file.late is not None:
                continue
            sha.update(
                f"{file.name}\0{file.nbytes}\0{file.frames}\0".encode("utf-8", "surrogateescape")
            )
            for part in file.parts:
                sha.update(identity(part, absolute))
        return sha.hexdigest()

    @cached_property
    def _shard_names(self) -> frozenset[str]:
        return frozenset(self.weight_map.values())


def plan_folder(
    edited: Edited,
    layout: Format,
    *,
    max_shard: int | None,
    metadata: Mapping[str, str],
    companions: Sequence[OutputFile] = (),
    stem: str = STEM,
) -> Plan:
    """Shards of at most *max_shard* bytes (None: one shard), an index if there are several, and the
    *companions*.

    Their names begin with *stem*, which is `STEM`, `DIFFUSERS_STEM` or `ADAPTER_STEM`.

    Raises:
        Unwritable: the format has no way to hold a tensor.
    """
    folds = _Folds.of(edited.aliases, metadata)
    fixed = safetensors_header.fixed_room(metadata)
    runs = (
        [edited.entries]
        if max_shard is None
        else list(by_size(edited.entries, max_shard - fixed, folds.size))
    )
    shards = [
        OutputFile(name, _laid_out(layout, run, folds.metadata(run)))
        for name, run in _named(runs, stem)
    ]
    return _folder(edited, shards, runs, max_shard, companions, layout.name, stem)


def plan_blocks(
    edited: Edited,
    blocks: Iterable[BlockEntries],
    origin: Origin,
    *,
    algorithm: str,
    max_shard: int | None,
    metadata: Mapping[str, str],
    companions: Sequence[OutputFile] = (),
    stem: str = STEM,
) -> Plan:
    """As `plan_folder`, with *blocks*, which are all that is written, each in one run of bytes, in
    this order; in safetensors.

    Args:
        edited: what is written.
        blocks: its entries; those of one block are put into the best order here.
        origin: what they come from.
        algorithm: of the digests of the blocks.
        max_shard: bound on each file; None for one shard.
        metadata: for every shard.
        companions: files to bring along.
        stem: what the names of the shards begin with.

    Raises:
        Unwritable: safetensors has no way to hold a tensor.
    """
    metadata = safetensors_header.as_readers_need(metadata)
    folds = _Folds.of(edited.aliases, metadata)
    limit = (
        sys.maxsize if max_shard is None else max_shard - safetensors_header.fixed_room(metadata)
    )
    cuts = list(by_block(map(arranged, blocks), limit, folds.size))
    runs = [tuple(entry for block in cut for entry in block.entries) for cut in cuts]
    heads = [safetensors_header.dump(run, folds.metadata(run), modulus=PAGE) for run in runs]
    data = (coalesced(entry.payload for entry in run) for run in runs)
    shards = [
        OutputFile(name, (Literal(head), *parts))
        for (name, parts), head in zip(_named(data, stem), heads, strict=True)
    ]
    plan = _folder(edited, shards, runs, max_shard, companions, "safetensors", stem)
    return replace(plan, record=_record(origin, algorithm, shards, cuts, heads))


def plan_file(edited: Edited, layout: Format, *, name: str, metadata: Mapping[str, str]) -> Plan:
    """All tensors in one file called *name*.

    Raises:
        Unwritable: the format has no way to hold a tensor.
    """
    folds = _Folds.of(edited.aliases, metadata)
    file = OutputFile(name, _laid_out(layout, edited.entries, folds.metadata(edited.entries)))
    total_size = sum(entry.nbytes for entry in edited.entries)
    return Plan(
        (file,),
        {entry.name: name for entry in edited.entries},
        edited.aliases,
        total_size,
        (),
        layout.name,
    )


def by_size(
    entries: Iterable[TensorEntry], limit: int, size: Callable[[TensorEntry], int]
) -> Iterator[tuple[TensorEntry, ...]]:
    """Cut *entries* into runs whose *size* is at most *limit* bytes; one that is larger runs
    alone.
    """
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


def by_block(
    blocks: Iterable[BlockEntries], limit: int, size: Callable[[TensorEntry], int]
) -> Iterator[tuple[BlockEntries, ...]]:
    """Cut *blocks* into shards whose *size* is at most *limit* bytes; only a block that alone is
    larger is cut itself.

    A block that would be out of step with its types behind the one before it begins a shard as
    well.
    """
    shard: list[BlockEntries] = []
    room, filled = limit, 0
    for block in blocks:
        for entries in (
            by_size(block.entries, limit, size)
            if sum(map(size, block.entries)) > limit
            else (block.entries,)
        ):
            need = sum(map(size, entries))
            if shard and (need > room or misaligned(entries, at=filled)):
                yield tuple(shard)
                shard, room, filled = [], limit, 0
            shard.append(replace(block, entries=entries))
            room -= need
            filled += sum(entry.nbytes for entry in entries)
    if shard:
        yield tuple(shard)


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
        return cls(
            others, {key: text for key, text in metadata.items() if key != tie_records.LISTING}
        )

    def size(self, entry: TensorEntry) -> int:
        """Bytes that *entry* takes in a shard, with its line of the header and the records of its
        ties.
        """
        records = sum(
            tie_records.room(alias, entry.name) for alias in self.others.get(entry.name, ())
        )
        return entry.nbytes + safetensors_header.room(entry) + records

    def metadata(self, run: Sequence[TensorEntry]) -> dict[str, str]:
        records = {alias: entry.name for entry in run for alias in self.others.get(entry.name, ())}
        return {**self.base, **tie_records.recorded(records)}


def _folder(
    edited: Edited,
    shards: Sequence[OutputFile],
    runs: Sequence[Sequence[TensorEntry]],
    max_shard: int | None,
    companions: Sequence[OutputFile],
    form: str,
    stem: str = STEM,
) -> Plan:
    """The *shards*, which hold *runs*, and what belongs beside them."""
    weight_map = {
        entry.name: shard.name for shard, run in zip(shards, runs, strict=True) for entry in run
    }
    total_size = sum(entry.nbytes for entry in edited.entries)
    listing = [_index(weight_map, total_size, stem)] if len(runs) > 1 else []
    oversized = tuple(
        run[0].name
        for shard, run in zip(shards, runs, strict=True)
        if max_shard and shard.nbytes > max_shard
    )
    return Plan(
        (*shards, *listing, *companions), weight_map, edited.aliases, total_size, oversized, form
    )


def _index(weight_map: Mapping[str, str], total_size: int, stem: str) -> OutputFile:
    return OutputFile(index_name(stem), (Literal(shard_index.dump(weight_map, total_size)),))


def _record(
    origin: Origin,
    algorithm: str,
    shards: Sequence[OutputFile],
    cuts: Sequence[Sequence[BlockEntries]],
    heads: Sequence[bytes],
) -> OffloadRecord:
    known = [
        Shard(file.name, file.nbytes, hashlib.sha256(head).hexdigest())
        for file, head in zip(shards, heads, strict=True)
    ]
    runs: list[BlockRun] = []
    dtypes: Counter[str] = Counter()
    for shard, cut, head in zip(shards, cuts, heads, strict=True):
        at = len(head)
        for block in cut:
            runs.append(
                BlockRun(
                    block.name,
                    shard.name,
                    at,
                    at + block.nbytes,
                    tuple(entry.name for entry in block.entries),
                )
            )
            at += block.nbytes
            for entry in block.entries:
                dtypes[entry.dtype.code] += entry.nbytes
    return OffloadRecord(
        algorithm, origin, tuple(sorted(dtypes.items())), tuple(known), tuple(runs)
    )


def _named(runs: Iterable[_Run], stem: str = STEM) -> Iterator[tuple[str, _Run]]:
    """*runs*, each with the name of the shard that it becomes."""
    runs = list(runs)
    names = (
        f"{stem}-{number:05d}-of-{len(runs):05d}.safetensors" for number in range(1, len(runs) + 1)
    )
    return zip(names if len(runs) > 1 else (f"{stem}.safetensors",), runs, strict=True)


def _laid_out(
    layout: Format, entries: Sequence[TensorEntry], metadata: Mapping[str, str]
) -> tuple[Part, ...]:
    if layout.lay_out is None:
        raise Unwritable(
            f"the format {layout.name} can only be read",
            hint=("write safetensors: leave out ", output(), ", or end the name in .safetensors"),
        )
    return layout.lay_out(entries, metadata)
