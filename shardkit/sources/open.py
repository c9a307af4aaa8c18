"""Open a path: a file, a compressed file, an index or a folder → `Checkpoint`.

1. A folder is the first complete candidate in it, in the order of transformers
   (`shardkit.sources.candidates`); without one, what a format for folders makes of it; and else its
   one file with weights.
2. Whatever else in the folder holds weights is reported as left out.
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
from shardkit.errors import FormatError, UnknownFormat, shown, shown_path
from shardkit.limits import Limits
from shardkit.payloads.payload import unreadable
from shardkit.sources import path_arguments, registry
from shardkit.sources.candidates import (
    Candidate,
    expanded,
    in_order,
    of_shards,
    refuse_rivals,
    sets_in_order,
)
from shardkit.sources.folder_contents import holds_weights
from shardkit.sources.foreign.diagnosis import never_alone
from shardkit.sources.format import Source
from shardkit.sources.left_out import Reader, with_left_out
from shardkit.sources.loose_files import LooseFiles
from shardkit.sources.scanner import Scanner, is_folder, is_regular
from shardkit.sources.weight_file_names import is_index, likeliness, variant_of

_LOG = logging.getLogger("shardkit")
_MOST_INDEXES = 8
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
    if not _is_index(source):
        return scanner.alone(source)
    return with_left_out(scanner.indexed(source), Reader(path.parent, path.name))


def _opened_folder(path: Path, scanner: Scanner) -> Checkpoint:
    source = Source.folder(path, scanner.limits)
    if part := never_alone(source):
        raise part
    names = [name for name in source.names or () if not name.startswith(".")]
    if scanner.format and scanner.format.sniff(source):
        return with_left_out(scanner.scanned(source), Reader(path, scanner.format.name))
    variants = [name for name in names if variant_of(name) is not None]
    defaults = [name for name in names if variant_of(name) is None]
    offers = _Offers.among(path, defaults, scanner, variants)
    if offers.complete:
        return offers.read(offers.complete[0])
    if scanner.format is None and not offers.faults and _is_of_a_folder_format(source):
        scanned = scanner.scanned(source)
        return with_left_out(scanned, Reader(path, scanned.format))
    if (checkpoint := offers.joined()) is not None:
        return checkpoint
    loose = LooseFiles.among(path, names, scanner)
    if not loose.models:  # a variant that is alone needs no request
        offers = _Offers.among(path, variants, scanner)
        if (
            checkpoint := offers.read(offers.complete[0]) if offers.complete else offers.joined()
        ) is not None:
            return checkpoint
    return loose.checkpoint(source)


@dataclass(slots=True)
class _Offers:
    """The files and indexes of a folder that loaders look for.

    Attributes:
        complete: those of which all is there, in their order.
        incomplete: indexes that list files that are missing.
        faults: what to say of each index that is incomplete, or cannot be read, by their names.
        variants: the names of weights in other types than the default.
    """

    folder: Path
    names: Sequence[str]
    scanner: Scanner
    complete: list[Candidate] = field(default_factory=list)
    incomplete: list[Candidate] = field(default_factory=list)
    faults: dict[str, FormatError] = field(default_factory=dict)
    variants: Sequence[str] = ()

    @classmethod
    def among(
        cls, folder: Path, names: Sequence[str], scanner: Scanner, variants: Sequence[str] = ()
    ) -> _Offers:
        """What *names* in *folder* offer; *variants* are named where it is nothing complete."""
        offers = cls(folder, names, scanner, variants=variants)
        indexes = 0
        for name in in_order(names):
            indexes += is_index(name)
            if indexes <= _MOST_INDEXES:
                offers._add(name)
        if offers.complete:
            refuse_rivals(folder, offers.complete)
        return offers

    def joined(self) -> Checkpoint | None:
        """The complete set of numbered shards; None if no file is called like one of a set.

        Raises:
            FormatError: neither an index nor a set is complete.
        """
        sets = sets_in_order(self.names)
        complete = [each for each in sets if each.is_complete]
        if complete:
            refuse_rivals(self.folder, [of_shards(each) for each in complete])
            chosen = complete[0]
            checkpoint = self.scanner.set(self.folder, chosen)
            return with_left_out(checkpoint, self._reader(chosen.pattern, self.incomplete))
        for fault in self.faults.values():
            raise fault
        if sets:
            raise of_shards(sets[0]).incomplete(
                self.folder, _or_variant(self.folder, self.variants)
            )
        return None

    def read(self, chosen: Candidate) -> Checkpoint:
        """The checkpoint that *chosen* is, and a note where loaders choose otherwise."""
        path = self.folder / chosen.name
        passed = [each for each in (*self.complete, *self.incomplete) if each is not chosen]
        if chosen.is_file:
            self.scanner.refuse_stale(self.folder, {expanded(chosen.name): path})
            checkpoint = self.scanner.file(path)
        else:
            checkpoint = self.scanner.indexed(self.scanner.source(path))
        rival = next(
            (each for each in passed if each.index and each.is_safe == chosen.is_safe), None
        )
        if chosen.is_file and rival is not None and not rival.missing:
            checkpoint = replace(checkpoint, notes=(_differ(chosen, rival), *checkpoint.notes))
        return with_left_out(checkpoint, self._reader(chosen.name, passed))

    def _reader(self, chosen: str, passed: Sequence[Candidate]) -> Reader:
        broken = [name for name in self.faults if all(each.name != name for each in passed)]
        return Reader(self.folder, chosen, passed, broken)

    def _add(self, name: str) -> None:
        path = self.folder / name
        if not is_regular(path):
            return
        if not is_index(name):
            if holds_weights(Source.file(path, self.scanner.limits)):
                self.complete.append(Candidate(name, (name,)))
            return
        try:
            candidate = self.scanner.listing(self.scanner.source(path))
        except FormatError as error:
            self.faults[name] = error
            return
        if candidate.missing:
            self.faults[name] = candidate.incomplete(
                self.folder, _or_variant(self.folder, self.variants)
            )
            self.incomplete.append(candidate)
        else:
            self.complete.append(candidate)


def _is_index(source: Source) -> bool:
    if is_index(expanded(source.path.name)):
        return True
    head = source.head.lstrip()
    is_flat = source.path.name.endswith(".json") and bool(_FLAT_INDEX.match(head))
    return is_flat or (head.startswith(b"{") and b'"weight_map"' in head)


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


def _differ(chosen: Candidate, rival: Candidate) -> str:
    return (
        f"{shown(chosen.name)} was read, and not the {len(rival.files):,} shards of "
        f"{shown(rival.name)}: transformers and "
        "accelerate load the single file, huggingface_hub and diffusers the shards"
    )


def _or_variant(folder: Path, variants: Sequence[str]) -> str:
    if not variants:
        return ""
    likely = min(variants, key=lambda name: (not is_index(name), likeliness(name)))
    return f", or give the variant that is there: {folder / likely}"


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
