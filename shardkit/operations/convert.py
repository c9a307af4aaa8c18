"""The main operation: open → edit → plan → write, as one function.

`prepare` decides and writes nothing; `carry_out` has no choices left; `convert` is one after the
other.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path

from shardkit.brief import brief
from shardkit.checkpoint.edits import Edits, Ties
from shardkit.checkpoint.entries import LeftOut, OtherKind
from shardkit.errors import PlanError
from shardkit.events import Event, OnEvent
from shardkit.fleet.executor import Executor
from shardkit.fleet.parts import Part
from shardkit.fleet.ray_cluster import executor_named, refuse_part
from shardkit.limits import Limits
from shardkit.operations.write_output import How, Written, write_output, write_part
from shardkit.planning.options import ConversionOptions
from shardkit.planning.output import Output
from shardkit.planning.output_path import partial_folder
from shardkit.planning.plan import OutputFile
from shardkit.planning.prepare import Conversion, prepare
from shardkit.sizes import parse_size
from shardkit.sources import path_arguments
from shardkit.system.progress import OnBytes


@dataclass(frozen=True, slots=True, repr=False)
class Report:
    """What a conversion did.

    Attributes:
        source: what was read.
        out: the folder, or the one file, that was written.
        format: format of the source.
        shards: files that hold tensors.
        tensors: tensors written; folded ties are not among them.
        nbytes: bytes of those tensors as stored.
        engines: bytes of all files by how they were copied (the values of `Engine`).
        aliases: folded ties: each other name to the name that is kept.
        cast: tensors whose type was changed.
        left_out: weights that were not converted, with their bytes: files and subfolders beside
            what was read, and objects in it.
        objects: names of the items of the source that are not tensors.
        calls: functions that the source asks to call, which were not called.
        notes: sentences that the user should see.
        resumed: files that an earlier, interrupted run had finished.
        seconds: wall time.
        stored: size in bytes of the files that hold tensors; less than their content where they are
            compressed.
        blocks: contiguous blocks in the shards; 0 where these are cut by size alone.
        part: which part was written, as ``"3/16"``; None where the output is in its place. The
            counts above are those of the part then, and *out* is not there until all parts are
            committed.

    Example:
        >>> import shardkit
        >>> report = shardkit.convert("training.pt", "out")
        >>> report.shards, report.tensors, report.nbytes
        (1, 7, 136)
        >>> [(part.path, part.reason) for part in report.left_out][:1]
        [('optimizer_states', 'optimizer state')]
        >>> report.calls  # what the pickle asked to call
        ('argparse.Namespace',)
    """

    source: Path
    out: Path
    format: str
    shards: int
    tensors: int
    nbytes: int
    engines: Mapping[str, int] = field(hash=False)
    aliases: Mapping[str, str] = field(hash=False)
    cast: int
    left_out: tuple[LeftOut, ...]
    objects: tuple[str, ...]
    calls: tuple[str, ...]
    notes: tuple[str, ...]
    resumed: int
    seconds: float
    stored: int = 0
    blocks: int = 0
    part: str | None = None

    @classmethod
    def of(
        cls,
        output: Output,
        written: Written,
        *,
        source: Path,
        format: str = "",  # noqa: A002 - the name of the field
        cast: int = 0,
        left_out: tuple[LeftOut, ...] = (),
        objects: tuple[str, ...] = (),
        calls: tuple[str, ...] = (),
        notes: tuple[str, ...] = (),
        part: Part | None = None,
    ) -> Report:
        """Describe *output*, which is in place, or of which *part* is written; the other arguments
        are attributes.

        Example:
            >>> from pathlib import Path
            >>> import shardkit
            >>> from shardkit.operations.write_output import write_output
            >>> from shardkit.planning.prepare import prepare
            >>> output = prepare("model.safetensors", "out", shardkit.Edits()).output
            >>> written = write_output(output)
            >>> shardkit.Report.of(output, written, source=Path("model.safetensors")).tensors
            4
        """
        plan, shards = output.plan, output.plan.shards
        tensors, nbytes = len(plan.weight_map), plan.total_size
        blocks = len(plan.record.blocks) if plan.record else 0
        if part is not None:
            shards = tuple(file for file in part.files(plan.files) if file in shards)
            names = {shard.name for shard in shards}
            tensors = sum(name in names for name in plan.weight_map.values())
            nbytes = sum(shard.nbytes for shard in shards)
            blocks = sum(len(plan.blocks_in(shard)) for shard in shards)
        return cls(
            source=source,
            out=output.out,
            format=format,
            shards=len(shards),
            tensors=tensors,
            nbytes=nbytes,
            engines={engine.value: count for engine, count in written.engines.items()},
            aliases=plan.aliases,
            cast=cast,
            left_out=left_out,
            objects=objects,
            calls=calls,
            notes=(*notes, *written.notes),
            resumed=written.resumed,
            seconds=written.seconds,
            stored=_stored(output, shards, partial_folder(output.out) if part else output.out),
            blocks=blocks,
            part=None if part is None else str(part),
        )

    def __repr__(self) -> str:
        return brief(self)


def convert(
    src: str | PathLike[str],
    out: str | PathLike[str] | None = None,
    *,
    max_shard: str | int | None = "5GB",
    dtype: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rename: Sequence[tuple[str, str]] = (),
    root: str | None = None,
    ties: Ties = "keep-first",
    jobs: int | None = None,
    overwrite: bool = False,
    on_bytes: OnBytes | None = None,
    on_event: OnEvent | None = None,
    sync: bool = True,
    limit_rate: str | int | None = None,
    part: str | None = None,
    executor: str | Executor | None = None,
    format: str | None = None,  # noqa: A002 - the word of the command line
    with_companions: bool = True,
    checksum: str | None = None,
    compress: str | None = None,
    limits: Limits = Limits(),
) -> Report:
    """Convert any checkpoint to size-bounded safetensors shards, without executing its pickle.

    Args:
        src: a torch file (zip, legacy, TorchScript), safetensors, an index JSON, a folder, or a
            ``.zst`` of a file.
        out: folder to create, or a file to create where its name ends like a format that can be
            written (``.safetensors``); None for ``<stem>-shards`` beside *src*, or in the working
            folder where that is read-only or a cache.
        max_shard: limit for each file in bytes, header included, as ``"2GB"``, ``"500MiB"`` or a
            number; None for one shard. A tensor larger than that gets a file of its own.
        dtype: what floats of 16 bits or more are cast to, as ``"bf16"`` or ``"bfloat16"``; needs
            torch. None keeps each.
        include: glob patterns of names to take; none takes all. ``*`` also matches dots.
        exclude: glob patterns of names to leave out.
        rename: pairs (regular expression, replacement), applied in order to every name.
        root: dotted path of the subtree to take; ``"."`` for everything; None to find the model.
        ties: ``"keep-first"`` writes a tied weight once and records its other names; ``"copy"``
            writes it under each.
        jobs: files written at a time; None for one more than there are processors, or as many where
            they are compressed, at most 8.
        overwrite: replace an earlier output of shardkit.
        on_bytes: called, from any thread, with the number of bytes after each step.
        on_event: called, from any thread, with each `Event`: a file is started, has more bytes, is
            complete.
        sync: make every file durable (fsync) before the output appears.
        limit_rate: bytes moved in a second at most, as ``"500MB/s"`` or a number; None for as many
            as there can be.
        part: ``"K/N"`` to write only the files of part K of N, from 1, and to put nothing in place;
            other processes, on any machine that sees both folders, write the other parts, and
            `commit` ends it. ``"env"`` takes the part from Slurm, Kubernetes or torchrun.
        executor: ``"ray"``, or a `RayCluster`, to have the files written by the machines of a
            cluster; None for threads of this process.
        format: name of the format to read *src* as; None to recognise it.
        with_companions: copy the small files beside the weights (config, tokenizer) of a source
            folder.
        checksum: ``"sha256"`` or ``"xxh3"`` to write a digest of every file and tensor to
            ``shardkit.manifest.json``, and to check the CRCs of a zip source first; None for
            neither.
        compress: ``"zstd"`` for shards in the standard seekable format of zstd, which are read in
            place; ``zstd -d`` gives back the plain ones. None for plain shards.
        limits: safety limits for an untrusted source.

    Returns:
        What was done.

    Raises:
        FormatError: *src* cannot be read.
        PlanError: the options cannot be applied to *src*.
        OutputError: *out* cannot be written or replaced.

    Example:
        >>> import shardkit
        >>> report = shardkit.convert("training.pt", "shards", max_shard="2GB", checksum="sha256")
        >>> report.format, report.shards, report.tensors
        ('torch-zip', 1, 7)
        >>> sorted(path.name for path in report.out.iterdir())
        ['model.safetensors', 'shardkit.manifest.json']
    """
    begun = time.monotonic()
    how = asked_how(jobs, overwrite, on_bytes, on_event, sync, limit_rate, executor)
    chosen = None if part is None else Part.parse(part)
    if how.executor is not None:
        refuse_alone(chosen, sync)
        src, out = as_all_see_them(src, out)
    edits = Edits.asked(
        root=root, include=include, exclude=exclude, rename=rename, dtype=dtype, ties=ties
    )
    options = ConversionOptions(max_shard, format, with_companions, checksum, compress, limits)
    conversion = prepare(
        src, out, edits, options, in_parts=chosen is not None or how.executor is not None
    )
    report = carry_out(conversion, how, chosen)
    return replace(report, seconds=time.monotonic() - begun)


def carry_out(conversion: Conversion, how: How = How(), part: Part | None = None) -> Report:
    """Write what *conversion* decided, or one *part* of it, and report what was done.

    Raises:
        FormatError: the source cannot be read, or changed meanwhile.
        OutputError: the output cannot be written or replaced.
    """
    if part is None:
        return reported(conversion, write_output(conversion.output, how))
    return reported(conversion, write_part(conversion.output, part, how), part)


def reported(conversion: Conversion, written: Written, part: Part | None = None) -> Report:
    """Report what was done to write *conversion*, or one *part* of it."""
    others = conversion.checkpoint.others
    return Report.of(
        conversion.output,
        written,
        source=conversion.source,
        format=conversion.checkpoint.format,
        cast=conversion.edited.cast,
        left_out=conversion.edited.left_out,
        objects=tuple(other.name for other in others if other.kind is OtherKind.OBJECT),
        calls=tuple(other.reason for other in others if other.kind is OtherKind.CALL),
        notes=conversion.notes,
        part=part,
    )


def asked_how(
    jobs: int | None,
    overwrite: bool,
    on_bytes: OnBytes | None,
    on_event: OnEvent | None,
    sync: bool,
    limit_rate: str | int | None,
    executor: str | Executor | None = None,
) -> How:
    """How an output is to be written, from the arguments of `convert`.

    Raises:
        BadSize: *limit_rate* is no rate.
    """

    def tell(event: Event) -> None:
        if on_event is not None:
            on_event(event)
        if on_bytes is not None and event.kind in ("resumed", "written"):
            on_bytes(event.nbytes)

    limit = None if limit_rate is None else parse_rate(limit_rate)
    if isinstance(executor, str):
        executor = executor_named(executor, limit=limit)
    return How(jobs, overwrite, sync, limit, tell, executor)


def as_all_see_them(
    src: str | PathLike[str], out: str | PathLike[str] | None
) -> tuple[str, str | None]:
    """Both paths as absolute ones, for processes that have another working folder.

    Raises:
        PlanError: one names nothing that can be read, or written.
    """
    source = os.path.abspath(path_arguments.to_read(src))
    if out is None:
        return source, None
    is_folder = os.fspath(out).endswith(("/", os.sep))
    return source, os.path.abspath(path_arguments.to_write(out)) + (os.sep if is_folder else "")


def refuse_alone(part: Part | None, sync: bool) -> None:
    """Refuse what cannot go with an executor.

    Raises:
        PlanError: it is a part, or is not synced.
    """
    refuse_part(None if part is None else str(part))
    if not sync:
        raise PlanError(
            "files that are not synced last only on the machine that wrote them",
            hint="leave the files synced, as they are by default",
        )


def parse_rate(rate: str | int) -> int:
    """Bytes in a second, from a number or a text such as ``"500MB/s"``.

    Raises:
        BadSize: it is neither.
    """
    return parse_size(rate.removesuffix("/s") if isinstance(rate, str) else rate)


def _stored(output: Output, shards: Sequence[OutputFile], place: Path) -> int:
    """Bytes that *shards* of *output*, which are complete at *place*, take on the disk."""
    if not any(shard.codec for shard in shards):
        return sum(shard.nbytes for shard in shards)
    is_single = output.is_single and place == output.out
    return sum((place if is_single else place / shard.name).stat().st_size for shard in shards)
