"""offload-prep: the same path as convert, grouped by block, so that what runs as one is read as
one.

Blocks are told from names (`named_blocks`) or by a pattern that the user gives. Nothing needs the
class of the model; who has it, and Transformers, can have the pattern made from it by
`shardkit.load.no_split_pattern`.
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
from shardkit.errors import PlanError, listed, shown, shown_path
from shardkit.hints import option, output
from shardkit.limits import Limits
from shardkit.metadata.offload_index import Origin
from shardkit.operations.convert import Report, carry_out
from shardkit.payloads.digests import check_algorithm
from shardkit.payloads.payload import unreadable
from shardkit.planning.plan import Plan, plan_blocks
from shardkit.planning.prepare import (
    Conversion,
    ConversionOptions,
    companions_of,
    decided,
    open_source,
    output_place,
)
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
    sync: bool = True,
    format: str | None = None,  # noqa: A002 - the word of the command line
    with_companions: bool = True,
    checksum: str | None = None,
    compress: str | None = None,
    limits: Limits = Limits(),
) -> Report:
    """Write any checkpoint as a folder of safetensors shards from which a model streams with one
    read per block.

    The folder is an ordinary one of Hugging Face. In it the tensors of a block stand in one run of
    bytes, blocks stand in the order in which they run, and ``offload.json`` says what lies where,
    with a digest of each block.

    Args:
        src: whatever `convert` reads.
        out: folder to make; None for ``<stem>-offload`` beside *src*, or in the working folder
            where that is read-only.
        blocks: a regular expression; each module in whose name it is found is a block. What it
            leaves, and all if it is None, is told from the names: numbered layers, and the modules
            beside them.
        order: names of blocks, or of modules or tensors in them, in the order in which they run, as
            `shardkit.load.recorded_order` has them from a run; None for the order of the source.
        max_shard: as of `convert`. Only a block that alone is larger is cut.
        dtype: likewise, as are all that follow.
        include: globs of names to take.
        exclude: globs of names to leave out.
        rename: pairs (regular expression, replacement).
        root: dotted path of the subtree to take.
        ties: how tied weights are written.
        jobs: files written at a time.
        overwrite: replace an earlier output of shardkit.
        on_bytes: called, from any thread, with the number of bytes after each step.
        sync: make every file last before the output appears.
        format: name of the format to read *src* as.
        with_companions: copy the small files beside the weights.
        checksum: algorithm of the digests, of which there is a manifest too; None for xxh3 and no
            manifest.
        compress: as of `convert`; frames begin where blocks do.
        limits: what the source may ask for.

    Returns:
        What was done.

    Raises:
        FormatError: *src* cannot be read.
        PlanError: what was asked cannot be made of it.
        OutputError: *out* cannot be written or replaced.
    """
    begun = time.monotonic()
    edits = Edits.asked(
        root=root, include=include, exclude=exclude, rename=rename, dtype=dtype, ties=ties
    )
    options = ConversionOptions(max_shard, format, with_companions, checksum, compress, limits)
    conversion = prepare_offload(src, out, edits, options, blocks=blocks, order=order)
    report = carry_out(
        conversion,
        jobs=jobs,
        overwrite=overwrite,
        on_bytes=on_bytes or (lambda count: None),
        sync=sync,
    )
    return replace(report, seconds=time.monotonic() - begun)


def prepare_offload(
    src: str | PathLike[str],
    out: str | PathLike[str] | None,
    edits: Edits,
    options: ConversionOptions = ConversionOptions(),
    *,
    blocks: str | re.Pattern[str] | None = None,
    order: Sequence[str] | None = None,
) -> Conversion:
    """Decide everything that `offload_prep` would do with these arguments, and write nothing.

    Raises:
        FormatError: *src* cannot be read.
        PlanError: what was asked cannot be made of it.
    """
    src = path_arguments.to_read(src)
    place = output_place(src, out, options, "offload")
    _refuse_one_file(place, options)
    algorithm = options.checksum or _DIGESTS
    check_algorithm(algorithm)
    no_split = _compiled(blocks)
    notes: list[str] = []
    with failures_told(src):
        opened = open_source(src, place, edits, options)
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
        )
        return decided(opened, plan, beside, (*notes, *_cut(plan, opened.max_shard)))


def read_order(path: str | PathLike[str]) -> tuple[str, ...]:
    """The names in the file *path*: a JSON list of them, or one on each line.

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
        raise PlanError(f"{shown_path(path)} is no text", hint=_ORDER) from None
    if not text.lstrip().startswith("["):
        return tuple(
            line for line in map(str.strip, text.splitlines()) if line and not line.startswith("#")
        )
    try:
        names: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PlanError(
            f"{shown_path(path)} begins like a JSON list, and is none: {error}", hint=_ORDER
        ) from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise PlanError(
            f"{shown_path(path)} must be a list of names, and holds something else", hint=_ORDER
        )
    return tuple(names)


def _refuse_one_file(out: Path, options: ConversionOptions) -> None:
    name = out.name
    if options.compress is not None:
        name = name.removesuffix(registry.compressor_named(options.compress).suffix)
    if not out.is_dir() and registry.writer_for(Path(name).suffix):
        raise PlanError(
            f"{shown_path(out)} is one file, and blocks with their record need a folder",
            hint=("name one, as in ", output(out.with_name(Path(name).stem))),
        )


def _compiled(blocks: str | re.Pattern[str] | None) -> re.Pattern[str] | None:
    try:
        return re.compile(blocks) if blocks is not None else None
    except re.error as error:
        raise PlanError(
            f"{shown(str(blocks))} is no regular expression: {error}",
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
                f"the order calls {shown(names[0]) if names else 'nothing'}, and no block has this "
                "name or lies around it"
            ),
            hint=f"the blocks are called {listed([shown(block.name) for block in blocks])}",
        )
    if not silent:
        return called, ""
    return (
        *called,
        *silent,
    ), f"not in the order, and so put last: {_listed([block.name for block in silent])}"


def _cut(plan: Plan, max_shard: int | None) -> Iterator[str]:
    assert plan.record is not None
    counts = Counter(run.block for run in plan.record.runs)
    cut = [name for name, count in counts.items() if count > 1]
    if cut and max_shard is not None:
        yield (
            f"larger than {format_size(max_shard)} with a header, and so cut over several "
            f"shards: {_listed(cut)}"
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(shown, names[:3])) + more
