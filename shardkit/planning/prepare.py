"""What there is to decide before a byte is written: open → edit → plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Protocol

from shardkit.brief import brief
from shardkit.checkpoint.edits import Edited, Edits, edit, fold_ties
from shardkit.checkpoint.entries import Checkpoint, SourceFile
from shardkit.checkpoint.quantised_scales import is_codes
from shardkit.errors import PlanError, several, shown, shown_path
from shardkit.hints import option, output
from shardkit.limits import Limits
from shardkit.metadata.shard_index import LARGEST_READ_BY_HUB
from shardkit.metadata.shard_names import INDEX_NAMES, stem_of
from shardkit.payloads.codec import Codec
from shardkit.payloads.digests import check_algorithm
from shardkit.payloads.payload import Extent
from shardkit.planning.companions import ModelConfig, companions
from shardkit.planning.digest_files import with_digest_files
from shardkit.planning.frames import compressed
from shardkit.planning.output_path import default_output, followed
from shardkit.planning.plan import OutputFile, Plan, plan_file, plan_folder
from shardkit.sizes import format_size, parse_size
from shardkit.sources import path_arguments, registry
from shardkit.sources.open import failures_told
from shardkit.sources.open import open as open_checkpoint


@dataclass(frozen=True, slots=True, repr=False)
class Conversion:
    """All that is decided before the first byte is written.

    Attributes:
        source: what is read.
        out: the folder, or the one file, that will appear.
        checkpoint: what the source holds.
        files: every file that is read, companions too, as it was then.
        edited: what of it is written, under which names.
        plan: the files, part by part.
        single: name of the one file, where *out* is a file.
        notes: sentences that the user should see.
        limits: what the source may ask for.
    """

    source: Path
    out: Path
    checkpoint: Checkpoint
    files: tuple[SourceFile, ...]
    edited: Edited
    plan: Plan
    single: str | None
    notes: tuple[str, ...]
    limits: Limits = Limits()

    def __repr__(self) -> str:
        return brief(self)


@dataclass(frozen=True, slots=True)
class ConversionOptions:
    """How a source is read and its output laid out, whatever is edited.

    Attributes:
        max_shard: bound on each file, as ``"2GB"`` or bytes; None for one shard.
        format: name of the format to read the source as; None to recognise it.
        with_companions: whether the small files of a source folder come along.
        checksum: algorithm of the digests of a manifest; None for no manifest.
        compress: name of the codec that compresses the shards; None for plain ones.
        limits: what the source may ask for.
    """

    max_shard: str | int | None = "5GB"
    format: str | None = None
    with_companions: bool = True
    checksum: str | None = None
    compress: str | None = None
    limits: Limits = Limits()


class Planner(Protocol):
    """What makes a plan for a folder of shards."""

    def __call__(
        self,
        checkpoint: Checkpoint,
        edited: Edited,
        *,
        max_shard: int | None,
        companions: Sequence[OutputFile],
        checksum: str | None,
    ) -> tuple[Plan, Sequence[str]]:
        """The plan, and sentences that the user should see.

        Args:
            checkpoint: the source.
            edited: what of it is written.
            max_shard: bound on each file; None for one shard.
            companions: files to bring along.
            checksum: algorithm of the digests of a manifest; None for no manifest.

        Raises:
            PlanError: what was asked cannot be made of it.
        """
        ...


def plan_by_size(
    checkpoint: Checkpoint, edited: Edited, *, max_shard: int | None, companions: Sequence[OutputFile], checksum: str | None
) -> tuple[Plan, Sequence[str]]:
    """Shards in the order of the source, cut by size alone."""
    layout = registry.format_named("safetensors")
    stem = stem_of(file.path.name for file in checkpoint.files)
    plan = plan_folder(edited, layout, max_shard=max_shard, metadata=checkpoint.metadata, companions=companions, stem=stem)
    return plan, ()


def prepare(
    src: str | PathLike[str],
    out: str | PathLike[str] | None,
    edits: Edits,
    terms: ConversionOptions = ConversionOptions(),
    *,
    planner: Planner = plan_by_size,
) -> Conversion:
    """Decide everything that `convert` would do with these arguments, and write nothing.

    Args:
        src: what to read.
        out: what to write; None for a folder beside *src*.
        edits: what to change.
        terms: how to read it and lay it out.
        planner: cuts what is written to a folder into shards.

    Raises:
        FormatError: *src* cannot be read.
        PlanError: what was asked cannot be made of it.
    """
    src = path_arguments.to_read(src)
    is_compressed = terms.compress is not None
    out = followed(path_arguments.to_write(out, is_compressed=is_compressed)) if out is not None else default_output(src)
    checksum, limits = terms.checksum, terms.limits
    limit = None if terms.max_shard is None else parse_size(terms.max_shard)
    if checksum is not None:
        check_algorithm(checksum)
    codec = None if terms.compress is None else registry.compressor_named(terms.compress)
    with failures_told(src):
        checkpoint = open_checkpoint(src, format=terms.format, limits=limits, scratch=scratch_beside(out))
        config = ModelConfig.beside(src if src.is_dir() else src.parent)
        if not config.ties_embeddings:
            edits = replace(edits, ties="copy")
        edited = edit(checkpoint, edits)
        layout = None if out.is_dir() else registry.writer_for(Path(plain_name(out, codec)).suffix)
        files = checkpoint.files
        said: Sequence[str] = ()
        if layout is not None:
            if checksum is not None:
                raise PlanError(
                    "one file has no place for a manifest of checksums",
                    hint=("name a folder, as in ", output(out.with_name(Path(plain_name(out, codec)).stem))),
                )
            plan = plan_file(edited, layout, name=plain_name(out, codec), metadata=checkpoint.metadata)
        else:
            folder = _folder(src)
            beside = companions(folder, checkpoint) if terms.with_companions and folder else ()
            files += tuple(SourceFile.of(part.path) for file in beside for part in file.parts if isinstance(part, Extent))
            plan, said = planner(checkpoint, edited, max_shard=limit, companions=beside, checksum=checksum)
        plan = compressed(plan, codec) if codec else plan
        plan = with_digest_files(plan, checksum)
        notes = (*checkpoint.notes, *edited.notes, *said, *_notes(src, config, edited, edits, plan, limit))
        notes += _format_note(checkpoint, plan)
    return Conversion(src, out, checkpoint, files, edited, plan, out.name if layout is not None else None, notes, limits)


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
            f"{shown_path(out)} is a file of {writer.name}, and only safetensors is compressed",
            hint=("leave out ", option("compress"), ", or write safetensors"),
        )
    if writer is not None:
        raise PlanError(
            f"{shown_path(out)} would be compressed",
            hint=("call it so: ", output(out.with_name(out.name + codec.suffix)), "; or name a folder"),
        )
    return out.name


def scratch_beside(out: Path) -> Path | None:
    """Where compressed sources are expanded: beside the output *out*, if that folder is there already."""
    return out.parent if out.parent.is_dir() else None


def _notes(src: Path, config: ModelConfig, edited: Edited, edits: Edits, plan: Plan, limit: int | None) -> Iterator[str]:
    if not config.ties_embeddings and (twice := fold_ties(edited.entries)[1]):
        yield f"config.json says that nothing is tied: {several(len(twice), 'weight')} with equal bytes written under each name"
    if src.is_file() and (beside := src.parent / "config.json").is_file() and not _folder(src):
        yield f"{shown_path(beside)} lies beside the source and is not copied; convert the folder to bring it along"
    if edits.dtype is not None and config.dtype not in (None, edits.dtype.torch):
        yield f"config.json says {shown(config.dtype)}, and the weights are now {edits.dtype.torch}"
    if edits.dtype is not None and config.quantised and not any(map(is_codes, edited.entries)):
        method = shown(config.quantised)
        yield f"config.json says that the weights are quantised (method {method}), and no tensor looks so: all floats were cast"
    if plan.oversized and limit is not None:
        more = f" and {len(plan.oversized) - 3} more" if len(plan.oversized) > 3 else ""
        names = ", ".join(map(shown, plan.oversized[:3]))
        yield f"larger than {format_size(limit)} with a header, and so alone in a shard: {names}{more}"
    if any(file.name in INDEX_NAMES and file.nbytes > LARGEST_READ_BY_HUB for file in plan.files):
        yield f"the index is larger than {format_size(LARGEST_READ_BY_HUB)}, the most that huggingface_hub reads"


def _format_note(checkpoint: Checkpoint, plan: Plan) -> tuple[str, ...]:
    written = checkpoint.metadata.get("format", "pt")
    if plan.format != "safetensors" or written == "pt":
        return ()
    kept = "names and axes of the weights stay as they are"
    return (f"the metadata of the source say format {shown(written)}; the output says 'pt', which readers require. The {kept}",)


def _folder(src: Path) -> Path | None:
    """The folder whose companions belong to *src*; a single file has none."""
    if src.is_dir():
        return src
    return src.parent if src.name.endswith(".json") else None
