"""Open a path: a file, a compressed file, an index or a folder → `Checkpoint`.

==============================  ==================================================================
what is there                   what is read
==============================  ==================================================================
a file                          by the format that its content is of; first expanded if it is
                                compressed. One shard of several is read alone, and noted.
an index of shards              the shards that it lists.
a folder                        the first of these that is there, complete:

                                1. a file or an index that loaders look for, in the order of
                                   transformers (`shardkit.sources.candidates`);
                                2. the folder itself, by a format for folders;
                                3. numbered shards without an index;
                                4. the first or the third of these in another type than the
                                   default, such as fp16, if nothing else could be the model;
                                5. its one file with weights.
an entry of the Hub's cache     nothing: the error names its ``snapshots``, of which each is a
                                folder like any other.
anything else                   nothing: the error says what it is (`shardkit.sources.foreign`).
==============================  ==================================================================

Whatever else in a folder holds weights is reported as left out.
"""

from __future__ import annotations

import gc
import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from shardkit.checkpoint.empty_tensors import noted
from shardkit.checkpoint.entries import Checkpoint
from shardkit.errors import FormatError, UnknownFormat
from shardkit.limits import Limits
from shardkit.payloads.payload import unreadable
from shardkit.printable import shown, shown_path
from shardkit.sources import path_arguments, registry
from shardkit.sources.candidates import (
    Candidate,
    expanded,
    in_order,
    named,
    of_shards,
    refuse_parallel,
    refuse_rivals,
    sets_in_order,
)
from shardkit.sources.folder_contents import Beside, holds_weights, surroundings
from shardkit.sources.foreign.diagnosis import never_alone
from shardkit.sources.format import Source
from shardkit.sources.left_out import Reader, with_left_out
from shardkit.sources.scanner import Scanner, is_folder, is_regular
from shardkit.sources.weight_file_names import (
    is_adapter,
    is_index,
    likeliness,
    training_state,
    variant_of,
)

_LOG = logging.getLogger("shardkit")
_MOST_INDEXES = 8
_MOST_SCANNED = 8
_MOST_OPENED = 1_000
_FLAT_INDEX = re.compile(
    rb'\{\s*"[^"\\]{1,999}"\s*:\s*"[^"\\]{1,999}\.(safetensors|bin|pt|pth)(\.zst)?"'
)


def open(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,  # noqa: A002 - the word of the command line
    limits: Limits = Limits(),
    scratch: Path | None = None,
) -> Checkpoint:
    """Open a checkpoint of any format; headers are read, weights are not.

    Args:
        path: a file of any format, compressed or not; an index; or a folder with one of them.
        format: name of the format to read it as; None to recognise it.
        limits: safety limits for an untrusted file.
        scratch: folder for temporary files, which hold decompressed data; None for that of the
            system.

    Returns:
        A mapping of names to tensors, each with its type, shape and byte range.

    Raises:
        FormatError: it cannot be read.
        PlanError: there is no format called *format*.
        PluginError: a plugin that is needed cannot be used.

    Example:
        >>> import shardkit
        >>> checkpoint = shardkit.open("training.pt")
        >>> checkpoint.format, len(checkpoint)
        ('torch-zip', 20)
        >>> entry = checkpoint["state_dict.0.weight"]
        >>> entry.dtype.code, entry.shape, entry.nbytes
        ('F32', (4, 3), 48)
    """
    scanner = Scanner(registry.format_named(format) if format else None, limits, scratch)
    path = path_arguments.to_read(path)
    begun = time.monotonic()
    with collector_paused(), failures_told(path):
        found = noted(
            _opened_folder(path, scanner) if is_folder(path) else _opened_file(path, scanner)
        )
    taken, count = time.monotonic() - begun, len(found.tensors)
    _LOG.info(
        "%s: %s, %d tensors in %d files; headers read in %.3f s",
        shown_path(path),
        found.format,
        count,
        len(found.files),
        taken,
    )
    return found


def _opened_file(path: Path, scanner: Scanner) -> Checkpoint:
    source = scanner.source(path)
    listing = is_index(expanded(path.name))
    if not listing:  # then its content says so
        head = source.head.lstrip()
        is_flat = path.name.endswith(".json") and bool(_FLAT_INDEX.match(head))
        listing = is_flat or (head.startswith(b"{") and b'"weight_map"' in head)
    if listing:
        return with_left_out(scanner.indexed(source), Reader(path.parent, path.name))
    return scanner.alone(source)


def _opened_folder(path: Path, scanner: Scanner) -> Checkpoint:
    source = Source.folder(path, scanner.limits)
    if part := never_alone(source):
        raise part
    names = [name for name in source.names or () if not name.startswith(".")]
    variants = [name for name in names if variant_of(name) is not None]
    defaults = [name for name in names if variant_of(name) is None]

    # The folder itself, by the format that the user names.
    if scanner.format and scanner.format.sniff(source):
        return with_left_out(scanner.scanned(source), Reader(path, scanner.format.name))

    # 1. A file or an index that loaders look for.
    offers = _Offers.among(path, defaults, scanner, variants)
    if offers.complete:
        return offers.first()

    # 2. The folder itself.
    if scanner.format is None and not offers.faults and _is_of_a_folder_format(source):
        scanned = scanner.scanned(source)
        return with_left_out(scanned, Reader(path, scanned.format))

    # 3. Numbered shards without an index.
    if (checkpoint := offers.shards()) is not None:
        return checkpoint

    # 4. A variant that is alone needs no request.
    weights = _weights_among(path, names, scanner)
    if not any(_is_default_model(name) for name in weights):
        offers = _Offers.among(path, variants, scanner)
        checkpoint = offers.first() if offers.complete else offers.shards()
        if checkpoint is not None:
            return checkpoint

    # 5. Its one file with weights.
    return _only_file(source, names, weights, scanner)


@dataclass(frozen=True, slots=True)
class _Offers:
    """The files and indexes of a folder that loaders look for.

    Attributes:
        folder: the folder.
        names: of the files in it that are looked at.
        scanner: how they are read.
        instead: the end of a hint, which names a variant that is there; "" if there is none.
        complete: those of which all is there, in their order.
        incomplete: indexes that list files that are missing.
        broken: the names of indexes that cannot be read.
        faults: what to say of each index that is incomplete or broken, in their order.
    """

    folder: Path
    names: Sequence[str]
    scanner: Scanner
    instead: str
    complete: list[Candidate] = field(default_factory=list)
    incomplete: list[Candidate] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    faults: list[FormatError] = field(default_factory=list)

    @classmethod
    def among(
        cls, folder: Path, names: Sequence[str], scanner: Scanner, variants: Sequence[str] = ()
    ) -> _Offers:
        """What *names* in *folder* offer; *variants* are named where it is nothing complete."""
        likely = min(variants, key=lambda name: (not is_index(name), likeliness(name)), default="")
        instead = f", or give the variant that is there: {folder / likely}" if likely else ""
        offers = cls(folder, names, scanner, instead)
        indexes = 0
        for name in in_order(names):
            path = folder / name
            indexes += is_index(name)
            if indexes > _MOST_INDEXES or not is_regular(path):
                continue
            if not is_index(name):
                if holds_weights(Source.file(path, scanner.limits)):
                    offers.complete.append(Candidate(name, (name,)))
                continue
            try:
                candidate = scanner.listing(scanner.source(path))
            except FormatError as error:
                offers.broken.append(name)
                offers.faults.append(error)
                continue
            if candidate.missing:
                offers.incomplete.append(candidate)
                offers.faults.append(candidate.incomplete(folder, instead))
            else:
                offers.complete.append(candidate)
        if offers.complete:
            refuse_rivals(folder, offers.complete)
        return offers

    def first(self) -> Checkpoint:
        """The checkpoint that the first complete one is, and a note where loaders choose
        otherwise.
        """
        chosen, *others = self.complete
        passed = [*others, *self.incomplete]
        path = self.folder / chosen.name
        if chosen.is_file:
            self.scanner.refuse_stale(self.folder, {expanded(chosen.name): path})
            checkpoint = self.scanner.file(path)
        else:
            checkpoint = self.scanner.indexed(self.scanner.source(path))
        indexes = (each for each in passed if each.index and not is_adapter(each.name))
        rival = next((each for each in indexes if each.is_safe == chosen.is_safe), None)
        if chosen.is_file and rival is not None and not rival.missing:
            note = (
                f"{shown(chosen.name)} was read, and not the {len(rival.files):,} shards of "
                f"{shown(rival.name)}: transformers and "
                "accelerate load the single file, huggingface_hub and diffusers the shards"
            )
            checkpoint = replace(checkpoint, notes=(note, *checkpoint.notes))
        return with_left_out(checkpoint, Reader(self.folder, chosen.name, passed, self.broken))

    def shards(self) -> Checkpoint | None:
        """The complete set of numbered shards; None if no file is called like one of a set.

        Raises:
            FormatError: neither an index nor a set is complete.
        """
        sets = sets_in_order(self.names)
        complete = [each for each in sets if each.is_complete]
        if complete:
            refuse_rivals(self.folder, [of_shards(each) for each in complete])
            checkpoint = self.scanner.set(self.folder, complete[0])
            reader = Reader(self.folder, complete[0].pattern, self.incomplete, self.broken)
            return with_left_out(checkpoint, reader)
        if self.faults:
            raise self.faults[0]
        if sets:
            raise of_shards(sets[0]).incomplete(self.folder, self.instead)
        return None


def _is_of_a_folder_format(source: Source) -> bool:
    """Whether a format claims the folder *source* as a whole; what lies in it may look like
    anything.

    Raises:
        UnknownFormat: several do.
    """
    try:
        return bool(registry.recognise(source))
    except UnknownFormat as error:
        if error.claimed:
            raise
        return False


def _weights_among(folder: Path, names: Sequence[str], scanner: Scanner) -> list[str]:
    """Those of the files called *names* that may hold weights."""
    endings = tuple(registry.suffixes())
    likely_first = sorted(names, key=lambda name: not name.endswith(endings))
    regular = (name for name in likely_first if is_regular(folder / name))
    weights: list[str] = []
    for _, name in zip(range(_MOST_OPENED), regular, strict=False):
        try:
            if holds_weights(Source.file(folder / name, scanner.limits)):
                weights.append(name)
        except FormatError:
            weights.append(name)
    return sorted(weights)


def _is_default_model(name: str) -> bool:
    """Whether a file with weights called *name* may be a model of the default type."""
    is_state = training_state(expanded(name)) is not None
    return not is_state and variant_of(name) is None and not is_adapter(name)


def _only_file(
    source: Source, names: Sequence[str], weights: Sequence[str], scanner: Scanner
) -> Checkpoint:
    """The one file of the folder *source* that may be a model.

    Args:
        source: a folder without anything that loaders look for.
        names: of all files in it.
        weights: those of them that may hold weights.
        scanner: how they are read.

    Raises:
        FormatError: there is none, or there are several, or it cannot be read.
    """
    folder = source.path
    others = [name for name in weights if training_state(expanded(name)) is None]
    models = (
        [name for name in others if _is_default_model(name)]
        or [name for name in others if variant_of(name) is None]
        or others
    )
    refuse_parallel(folder, models)

    # What differs from a file of safetensors in its ending only is the same model.
    safe = {expanded(name).removesuffix(".safetensors") for name in models if _is_safe(name)}
    models = [name for name in models if _is_safe(name) or name.rpartition(".")[0] not in safe]

    # Of several, the only one that holds a tensor.
    if len(models) > 1:
        scanned = {name: scanner.file(folder / name) for name in models[:_MOST_SCANNED]}
        bearing = [
            name
            for name, each in scanned.items()
            if each.tensors or any(other.is_weight for other in each.others)
        ]
        if len(bearing) != 1 or len(scanned) != len(models):
            raise UnknownFormat(
                folder,
                f"holds {len(models):,} files with weights and no index that joins them: "
                f"{named(models)}",
                hint=f"give one of them, as in {folder / min(models, key=likeliness)}; if they "
                "are shards of one model, fetch its *.index.json",
            )
        models = bearing

    if models:
        path = folder / models[0]
        scanner.refuse_stale(folder, {expanded(path.name): path})
        return with_left_out(scanner.file(path), Reader(folder, path.name))
    if weights:
        what = [
            f"{shown(name)} ({training_state(expanded(name))})" for name in weights[:_MOST_SCANNED]
        ]
        raise UnknownFormat(
            folder,
            f"holds the state of a trainer and no model: {', '.join(what)}",
            hint=_give_a_folder(folder, _folders_with_weights(folder))
            or "pass the file or folder that holds the weights",
        )
    return _without_weights(source, names, scanner)


def _is_safe(name: str) -> bool:
    return ".safetensors" in name


def _without_weights(source: Source, names: Sequence[str], scanner: Scanner) -> Checkpoint:
    """What a format for folders makes of the folder *source*, in which no file holds weights.

    Raises:
        FormatError: none does.
    """
    try:
        registry.recognise(source)
        return scanner.scanned(source)
    except UnknownFormat as error:
        if error.claimed:
            raise
        unknown = error
    folder, endings = source.path, tuple(registry.suffixes())
    for name in names:
        if name.endswith(endings) and not (folder / name).is_dir():
            scanner.file(folder / name)  # says what is wrong with it
    inside = _folders_with_weights(folder)
    if inside and "snapshots" not in names:  # an entry of a cache, of which the error says more
        message = f"holds weights in subfolders only: {named([each.path for each in inside])}"
        raise UnknownFormat(folder, message, hint=_give_a_folder(folder, inside))
    raise unknown


def _folders_with_weights(folder: Path) -> list[Beside]:
    beside = surroundings(folder, ()).beside
    return [each for each in beside if each.is_folder and each.role.is_weights]


def _give_a_folder(folder: Path, inside: Sequence[Beside]) -> str | None:
    """A hint at the likeliest of the subfolders *inside*; None if there is none."""
    if not inside:
        return None
    likely = min(
        inside, key=lambda each: (likeliness(each.path[:-1].rpartition("/")[2]), -each.nbytes)
    )
    return f"give one of its folders, as in {folder / likely.path}"


@contextmanager
def failures_told(path: Path) -> Iterator[None]:
    """Say of *path* what the system says, in passing, of it or of what lies beside it.

    Raises:
        FormatError: something could not be looked at.
    """
    try:
        yield
    except OSError as error:
        raise unreadable(path, error) from None


@contextmanager
def collector_paused() -> Iterator[None]:
    """Keep the collector of cycles from walking, again and again, the many small objects of a scan,
    none of which is garbage.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
