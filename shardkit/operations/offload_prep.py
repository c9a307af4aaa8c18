"""offload-prep: the same path as convert, grouped by block, so that each block is one read.

Blocks are inferred from tensor names (`named_blocks`), or chosen by a pattern that the user gives.
The class of the model is not needed; `shardkit.load.no_split_pattern` makes the pattern from it
where Transformers or Diffusers has it.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path

from shardkit.checkpoint.blocks import BlockEntries, heads, named_blocks, refuse_unfound, reordered
from shardkit.checkpoint.edits import Edits, Ties
from shardkit.checkpoint.entries import TensorEntry
from shardkit.errors import PlanError
from shardkit.events import OnEvent
from shardkit.fleet.executor import Executor
from shardkit.fleet.parts import Part
from shardkit.hints import option, output
from shardkit.limits import Limits
from shardkit.metadata.offload_index import Origin
from shardkit.metadata.shard_names import stem_of
from shardkit.operations.convert import Report, as_all_see_them, asked_how, carry_out, refuse_alone
from shardkit.payloads.digests import check_algorithm
from shardkit.payloads.payload import unreadable
from shardkit.planning.options import ConversionOptions
from shardkit.planning.plan import Plan, plan_blocks
from shardkit.planning.prepare import (
    Conversion,
    companions_of,
    decided,
    open_source,
    output_place,
)
from shardkit.planning.request import Asked, pattern_text
from shardkit.printable import listed, shown, shown_path
from shardkit.sizes import format_size
from shardkit.sources import path_arguments, registry
from shardkit.sources.open import failures_told
from shardkit.system.progress import OnBytes

_ORDER = "write a JSON list of names of modules, or one name on each line"
_DIGESTS = "xxh3"  # of blocks, where no checksum is asked for: the one that keeps up with a copy


def offload_prep(
    src: str | PathLike[str],
    out: str | PathLike[str] | None = None,
    *,
    blocks: str | re.Pattern[str] | None = None,
    order: Sequence[str] | None = None,
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
    """Write any checkpoint as a folder of safetensors shards from which a model streams with one
    read per block.

    Hugging Face libraries read the folder as any other. In it the tensors of a block are
    contiguous, blocks are stored in the order in which they run, and ``offload.json`` lists the
    byte range and a digest of each block.

    Args:
        src: a file, an index or a folder in any format that `convert` reads.
        out: folder to create; None for ``<stem>-offload`` beside *src*, or in the working folder
            where that is read-only.
        blocks: a regular expression; each module in whose name it is found is a block. Blocks of
            the other tensors, and all blocks if it is None, are inferred from the names: numbered
            layers, and the modules beside them.
        order: names of blocks, or of modules or tensors in them, in the order in which they run, as
            `shardkit.load.recorded_order` records them; None for the order of the source.
        max_shard: limit for each file in bytes, as in `convert`; only a block larger than that is
            split over several files.
        dtype: what floats of 16 bits or more are cast to; None keeps each.
        include: glob patterns of names to take.
        exclude: glob patterns of names to leave out.
        rename: pairs (regular expression, replacement).
        root: dotted path of the subtree to take; None to find the model.
        ties: ``"keep-first"`` or ``"copy"``, as in `convert`.
        jobs: files written at a time; None to choose by the number of processors.
        overwrite: replace an earlier output of shardkit.
        on_bytes: called, from any thread, with the number of bytes after each step.
        on_event: called, from any thread, with each `Event`, as in `convert`.
        sync: make every file durable (fsync) before the output appears.
        limit_rate: bytes moved in a second at most, as in `convert`.
        part: ``"K/N"`` to write the files of one part only, as in `convert`.
        executor: who writes the files, as in `convert`.
        format: name of the format to read *src* as; None to recognise it.
        with_companions: copy the small files beside the weights.
        checksum: algorithm of the digests, which are written to a manifest too; None for xxh3 and
            no manifest.
        compress: ``"zstd"`` as in `convert`; frames begin where blocks do.
        limits: safety limits for an untrusted source.

    Returns:
        What was done.

    Raises:
        FormatError: *src* cannot be read.
        PlanError: the options cannot be applied to *src*.
        OutputError: *out* cannot be written or replaced.

    Example:
        >>> import shardkit
        >>> report = shardkit.offload_prep("model.safetensors", "offload", order=["2", "0"])
        >>> report.blocks
        2
        >>> list(shardkit.open("offload"))  # in the order in which the blocks run
        ['2.weight', '2.bias', '0.weight', '0.bias']
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
    conversion = prepare_offload(
        src,
        out,
        edits,
        options,
        blocks=blocks,
        order=order,
        in_parts=chosen is not None or how.executor is not None,
    )
    report = carry_out(conversion, how, chosen)
    return replace(report, seconds=time.monotonic() - begun)


def prepare_offload(
    src: str | PathLike[str],
    out: str | PathLike[str] | None,
    edits: Edits,
    options: ConversionOptions = ConversionOptions(),
    *,
    blocks: str | re.Pattern[str] | None = None,
    order: Sequence[str] | None = None,
    in_parts: bool = False,
) -> Conversion:
    """Decide everything that `offload_prep` would do with these arguments, and write nothing.

    Raises:
        FormatError: *src* cannot be read.
        PlanError: the options cannot be applied to *src*.
    """
    src = path_arguments.to_read(src)
    place = output_place(src, out, options, "offload")
    _refuse_one_file(place, options)
    algorithm = options.checksum or _DIGESTS
    check_algorithm(algorithm)
    no_split = _compiled(blocks)
    notes: list[str] = []
    with failures_told(src):
        opened = open_source(src, place, edits, options, in_parts=in_parts)
        edited, checkpoint = opened.edited, opened.checkpoint
        # What is a block, and in which order do blocks run?
        refuse_unfound(no_split, edited.entries)
        found = named_blocks(edited.entries, no_split)
        if order is not None:
            notes += _unknown(order, edited.entries)
            found, silent = _in_order(found, order)
            notes += [silent] if silent else []
        # Shards of whole blocks.
        beside = companions_of(opened)
        plan = plan_blocks(
            edited,
            found,
            Origin(
                src.resolve().name,
                checkpoint.format,
                tuple(sorted((file.path.name, file.size) for file in checkpoint.files)),
            ),
            algorithm=algorithm,
            max_shard=opened.max_shard,
            metadata=checkpoint.metadata,
            companions=beside,
            stem=stem_of(file.path.name for file in checkpoint.files),
        )
        asked = Asked(
            "offload-prep",
            src,
            edits,
            options,
            pattern_text(blocks),
            None if order is None else tuple(order),
        )
        return decided(opened, plan, asked, beside, (*notes, *_cut(plan, opened.max_shard)))


def read_order(path: str | PathLike[str]) -> tuple[str, ...]:
    """Read the names in the file *path*: a JSON list of them, or one on each line.

    Raises:
        FormatError: it cannot be read.
        PlanError: it is neither.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise unreadable(path, error) from None
    except UnicodeDecodeError:
        raise PlanError(f"{shown_path(path)} is not UTF-8 text", hint=_ORDER) from None
    if not text.lstrip().startswith("["):
        return tuple(
            line for line in map(str.strip, text.splitlines()) if line and not line.startswith("#")
        )
    try:
        names: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PlanError(
            f"{shown_path(path)} begins like a JSON list but is invalid: {error}", hint=_ORDER
        ) from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise PlanError(
            f"{shown_path(path)} must be a list of names, and contains something else", hint=_ORDER
        )
    return tuple(names)


def _refuse_one_file(out: Path, options: ConversionOptions) -> None:
    name = out.name
    if options.compress is not None:
        name = name.removesuffix(registry.compressor_named(options.compress).suffix)
    if not out.is_dir() and registry.writer_for(Path(name).suffix):
        raise PlanError(
            f"{shown_path(out)} is a file, but offload-prep writes a folder",
            hint=("name a folder, as in ", output(out.with_name(Path(name).stem))),
        )


def _compiled(blocks: str | re.Pattern[str] | None) -> re.Pattern[str] | None:
    try:
        return re.compile(blocks) if blocks is not None else None
    except re.error as error:
        raise PlanError(
            f"{shown(str(blocks))} is not a regular expression: {error}",
            hint=("write one as in ", option("blocks", r"layers\.\d+$")),
        ) from None


def _unknown(names: Iterable[str], entries: Iterable[TensorEntry]) -> Iterator[str]:
    """A sentence on those of *names* that are part of no tensor's name: a recorded order has
    modules without weights.
    """
    known = {head for entry in entries for head in heads(entry.name)}
    if unknown := [name for name in names if name not in known]:
        yield f"in the order, but not in the checkpoint: {_listed(unknown)}"


def _in_order(
    blocks: Sequence[BlockEntries], names: Sequence[str]
) -> tuple[tuple[BlockEntries, ...], str]:
    """*blocks* in the order of *names*, and a sentence on those that these leave out; "" if there
    are none.
    """
    called, silent = reordered(blocks, names)
    if not called:
        raise PlanError(
            (
                f"the order names {shown(names[0]) if names else 'nothing'}, which is neither a "
                f"block nor part of one"
            ),
            hint=f"the blocks are called {listed([shown(block.name) for block in blocks])}",
        )
    if not silent:
        return called, ""
    return (
        *called,
        *silent,
    ), f"not in the order, so written last: {_listed([block.name for block in silent])}"


def _cut(plan: Plan, max_shard: int | None) -> Iterator[str]:
    assert plan.record is not None
    counts = Counter(run.block for run in plan.record.runs)
    cut = [name for name, count in counts.items() if count > 1]
    if cut and max_shard is not None:
        yield (
            f"larger than {format_size(max_shard)} with a header, so split over several shards: "
            f"{_listed(cut)}"
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(shown, names[:3])) + more
