"""Everything that is decided before a byte is written: open → edit → plan.

`prepare` has the steps of convert. offload-prep combines the same steps: `output_place`,
`open_source`, `companions_of` and `decided`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

from shardkit.brief import brief
from shardkit.checkpoint.edits import Edited, Edits, edit, fold_ties
from shardkit.checkpoint.entries import Checkpoint, SourceFile
from shardkit.checkpoint.quantised_scales import is_codes
from shardkit.errors import PlanError
from shardkit.hints import option
from shardkit.hints import output as output_option
from shardkit.metadata.shard_index import LARGEST_READ_BY_HUB
from shardkit.metadata.shard_names import INDEX_NAMES, stem_of
from shardkit.metadata.unit_records import EXPANDED
from shardkit.payloads.codec import Codec
from shardkit.payloads.digests import check_algorithm
from shardkit.payloads.payload import Extent
from shardkit.planning.companions import ModelConfig, companions
from shardkit.planning.digest_files import with_digest_files
from shardkit.planning.frames import compressed
from shardkit.planning.options import ConversionOptions
from shardkit.planning.output import Output, SourceCheck
from shardkit.planning.output_path import default_output, followed, partial_folder
from shardkit.planning.plan import OutputFile, Plan, plan_file, plan_folder
from shardkit.planning.request import Asked
from shardkit.printable import several, shown, shown_path
from shardkit.sizes import format_size, parse_size
from shardkit.sources import path_arguments, registry
from shardkit.sources.open import failures_told
from shardkit.sources.open import open as open_checkpoint


@dataclass(frozen=True, slots=True, repr=False)
class Conversion:
    """All that is decided before the first byte is written.

    Attributes:
        source: what is read.
        checkpoint: what the source holds.
        edited: what of it is written, under which names.
        output: the files, part by part, and where they go.
        notes: sentences that the user should see.
    """

    source: Path
    checkpoint: Checkpoint
    edited: Edited
    output: Output
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        return brief(self)

    @property
    def out(self) -> Path:
        """The folder, or the one file, that will appear."""
        return self.output.out

    @property
    def plan(self) -> Plan:
        """The files, part by part."""
        return self.output.plan


@dataclass(frozen=True, slots=True)
class OpenedSource:
    """A source, opened and edited, and how its output is laid out: what a plan is made from.

    Attributes:
        path: what is read.
        out: what is written.
        options: how it is read and laid out.
        checkpoint: what it holds.
        config: what the config.json beside it says.
        edits: what is changed; ties are copied where the config says that there are none.
        edited: what of the checkpoint is written.
        max_shard: bound on each file in bytes; None for one shard.
        codec: what compresses the shards; None for plain ones.
    """

    path: Path
    out: Path
    options: ConversionOptions
    checkpoint: Checkpoint
    config: ModelConfig
    edits: Edits
    edited: Edited
    max_shard: int | None
    codec: Codec | None


def prepare(
    src: str | PathLike[str],
    out: str | PathLike[str] | None,
    edits: Edits,
    options: ConversionOptions = ConversionOptions(),
    *,
    in_parts: bool = False,
) -> Conversion:
    """Decide everything that `convert` would do with these arguments, and write nothing.

    Args:
        src: what to read.
        out: what to write; None for a folder beside *src*.
        edits: what to change.
        options: how to read it and lay it out.
        in_parts: whether several processes write it, which share what they decompress.

    Raises:
        FormatError: *src* cannot be read.
        PlanError: what was asked cannot be made of it.
    """
    src = path_arguments.to_read(src)
    place = output_place(src, out, options)
    asked = Asked("convert", src, edits, options)
    with failures_told(src):
        opened = open_source(src, place, edits, options, in_parts=in_parts)
        edited, metadata = opened.edited, opened.checkpoint.metadata
        # One file, where the output is called like a file that can be written.
        name = plain_name(place, opened.codec)
        layout = None if place.is_dir() else registry.writer_for(Path(name).suffix)
        if layout is not None:
            _refuse_manifest(place, name, options)
            plan = plan_file(edited, layout, name=name, metadata=metadata)
            return decided(opened, plan, asked, is_single=True)
        # Otherwise a folder: shards in the order of the source, cut by size alone.
        beside = companions_of(opened)
        layout = registry.format_named("safetensors")
        stem = stem_of(file.path.name for file in opened.checkpoint.files)
        plan = plan_folder(
            edited,
            layout,
            max_shard=opened.max_shard,
            metadata=metadata,
            companions=beside,
            stem=stem,
        )
        return decided(opened, plan, asked, beside)


def output_place(
    src: Path, out: str | PathLike[str] | None, options: ConversionOptions, ending: str = "shards"
) -> Path:
    """Where the output goes: to *out*, or by default beside *src*, under its name with *ending*.

    Raises:
        PlanError: *out* names no local path, or a file of a format that is not written.
    """
    if out is None:
        return followed(default_output(src, ending))
    return followed(path_arguments.to_write(out, is_compressed=options.compress is not None))


def open_source(
    src: Path, out: Path, edits: Edits, options: ConversionOptions, *, in_parts: bool = False
) -> OpenedSource:
    """Open *src* and apply *edits*; no weights are read. What is decompressed is shared by the
    processes of a machine where the output is written *in_parts*.

    Raises:
        FormatError: *src* cannot be read.
        PlanError: an option, or an edit, cannot be applied.
    """
    # What can be refused without a look at the source is refused first.
    max_shard = None if options.max_shard is None else parse_size(options.max_shard)
    if options.checksum is not None:
        check_algorithm(options.checksum)
    codec = None if options.compress is None else registry.compressor_named(options.compress)
    scratch = partial_folder(out) / EXPANDED if in_parts else scratch_beside(out)
    checkpoint = open_checkpoint(src, format=options.format, limits=options.limits, scratch=scratch)
    config = ModelConfig.beside(src if src.is_dir() else src.parent)
    if not config.ties_embeddings:
        edits = replace(edits, ties="copy")
    edited = edit(checkpoint, edits)
    return OpenedSource(src, out, options, checkpoint, config, edits, edited, max_shard, codec)


def companions_of(opened: OpenedSource) -> tuple[OutputFile, ...]:
    """The small files of a source folder, as files to copy; none for one file, or if not wanted."""
    folder = _folder(opened.path) if opened.options.with_companions else None
    return companions(folder, opened.checkpoint) if folder else ()


def decided(
    opened: OpenedSource,
    plan: Plan,
    asked: Asked,
    beside: Iterable[OutputFile] = (),
    notes: Iterable[str] = (),
    *,
    is_single: bool = False,
) -> Conversion:
    """The conversion that writes *plan*, compressed and with digests as the options ask.

    Args:
        opened: the source.
        plan: its files, *beside* among them.
        asked: what it was made for.
        beside: the companions.
        notes: what there is to say about the plan.
        is_single: whether the output is one file.

    Raises:
        PlanError: it cannot be compressed.
    """
    options, checkpoint = opened.options, opened.checkpoint
    plan = compressed(plan, opened.codec) if opened.codec else plan
    plan = with_digest_files(plan, options.checksum)
    copied = (part.path for file in beside for part in file.parts if isinstance(part, Extent))
    output = Output(
        shown_path(opened.path),
        opened.out,
        plan,
        (*checkpoint.files, *map(SourceFile.of, copied)),
        is_single,
        opened.path,
        SourceCheck(checkpoint, options.limits) if options.checksum is not None else None,
        asked.request(),
    )
    before = (*checkpoint.notes, *opened.edited.notes)
    after = (*_notes(opened, plan), *_format_note(checkpoint, plan))
    return Conversion(opened.path, checkpoint, opened.edited, output, (*before, *notes, *after))


def plain_name(out: Path, codec: Codec | None) -> str:
    """The name of the output *out* once it is expanded.

    Raises:
        PlanError: it is one file, and not called as what *codec* makes of one.
    """
    if codec is None or out.is_dir() or out.name.endswith(codec.suffix):
        return out.name.removesuffix(codec.suffix) if codec else out.name
    writer = registry.writer_for(out.suffix)
    if writer is not None and writer.name != "safetensors":
        raise PlanError(
            f"{shown_path(out)} is a file of {writer.name}, but only safetensors can be compressed",
            hint=("leave out ", option("compress"), ", or write safetensors"),
        )
    if writer is not None:
        raise PlanError(
            f"{shown_path(out)} would be compressed",
            hint=(
                "call it so: ",
                output_option(out.with_name(out.name + codec.suffix)),
                "; or name a folder",
            ),
        )
    return out.name


def scratch_beside(out: Path) -> Path | None:
    """Where compressed sources are expanded: beside the output *out*, if that folder is there
    already.
    """
    return out.parent if out.parent.is_dir() else None


def _refuse_manifest(out: Path, name: str, options: ConversionOptions) -> None:
    if options.checksum is not None:
        raise PlanError(
            "a single output file has no manifest for checksums",
            hint=("name a folder, as in ", output_option(out.with_name(Path(name).stem))),
        )


def _notes(opened: OpenedSource, plan: Plan) -> Iterator[str]:
    src, config, limit = opened.path, opened.config, opened.max_shard
    edits, edited = opened.edits, opened.edited
    if not config.ties_embeddings and (twice := fold_ties(edited.entries)[1]):
        yield (
            f"config.json says that nothing is tied: {several(len(twice), 'weight')} with "
            "equal bytes written under each name"
        )
    if src.is_file() and (beside := src.parent / "config.json").is_file() and not _folder(src):
        yield (
            f"{shown_path(beside)} is beside the source and is not copied; convert the folder to "
            f"copy it too"
        )
    if edits.dtype is not None and config.dtype not in (None, edits.dtype.torch):
        yield f"config.json says {shown(config.dtype)}, but the weights are now {edits.dtype.torch}"
    if edits.dtype is not None and config.quantised and not any(map(is_codes, edited.entries)):
        method = shown(config.quantised)
        yield (
            f"config.json says that the weights are quantised (method {method}), but no tensor "
            f"looks quantised: all floats were cast"
        )
    if plan.oversized and limit is not None:
        more = f" and {len(plan.oversized) - 3} more" if len(plan.oversized) > 3 else ""
        names = ", ".join(map(shown, plan.oversized[:3]))
        yield (
            f"larger than {format_size(limit)} with a header, so alone in a shard: {names}{more}"
        )
    if any(file.name in INDEX_NAMES and file.nbytes > LARGEST_READ_BY_HUB for file in plan.files):
        yield (
            f"the index is larger than {format_size(LARGEST_READ_BY_HUB)}, the most that "
            "huggingface_hub reads"
        )


def _format_note(checkpoint: Checkpoint, plan: Plan) -> tuple[str, ...]:
    written = checkpoint.metadata.get("format", "pt")
    if plan.format != "safetensors" or written == "pt":
        return ()
    kept = "names and axes of the weights stay as they are"
    return (
        (
            f"the metadata of the source say format {shown(written)}; the output says 'pt', which "
            f"readers require. The {kept}"
        ),
    )


def _folder(src: Path) -> Path | None:
    """The folder whose companions belong to *src*; a single file has none."""
    if src.is_dir():
        return src
    return src.parent if src.name.endswith(".json") else None
