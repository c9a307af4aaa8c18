"""Load formats and codecs from their entry points, and recognise the format of a file.

1. An entry point of the group `shardkit.formats` or `shardkit.codecs` names a `Format` or `Codec`
   record. The built-in ones are entry points too; where shardkit is not installed, the table below
   replaces them.
2. Content decides. A suffix is a hint for people, and chooses the format that is written.
3. A plugin that cannot be loaded is kept as its error: it never prevents another format from
   reading a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from shardkit.checkpoint.entries import Checkpoint
from shardkit.errors import FormatError, PlanError, PluginError, ShardkitError, UnknownFormat
from shardkit.hints import option
from shardkit.payloads.codec import Codec
from shardkit.printable import shown
from shardkit.sources.foreign.diagnosis import diagnosed, explained, never_alone
from shardkit.sources.format import Format, Source

FORMATS = "shardkit.formats"
CODECS = "shardkit.codecs"
API = 1

_OWN = "shardkit"
_BUILT_IN = {
    FORMATS: {
        "accelerate-dat": "shardkit.formats.accelerate_dat:FORMAT",
        "safetensors": "shardkit.formats.safetensors:FORMAT",
        "torch-legacy": "shardkit.formats.torch_legacy:FORMAT",
        "torch-zip": "shardkit.formats.torch_zip:FORMAT",
        "torchscript": "shardkit.formats.torch_script:FORMAT",
    },
    CODECS: {"zstd": "shardkit.codecs.zstd:CODEC"},
}

Record = TypeVar("Record", Format, Codec)
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Loaded(Generic[Record]):
    """One entry point, and what became of it.

    Attributes:
        point: the entry point.
        record: the format or codec; None where it cannot be used.
        error: why it cannot be used.
    """

    point: EntryPoint
    record: Record | None = None
    error: PluginError | None = None

    @property
    def name(self) -> str:
        """That of the entry point, and of the format or codec."""
        return self.point.name

    @property
    def group(self) -> str:
        """`FORMATS` or `CODECS`."""
        return self.point.group

    @property
    def is_own(self) -> bool:
        """Whether it comes with shardkit."""
        return _BUILT_IN[self.group].get(self.name) == self.point.value

    @property
    def distribution(self) -> str:
        """What brings it, with its version: read when it is asked for, since metadata are long and
        seldom wanted.
        """
        return f"{self.point.dist.name} {self.point.dist.version}" if self.point.dist else _OWN


@cache
def formats() -> tuple[Loaded[Format], ...]:
    """All formats that are installed, those of shardkit first."""
    return tuple(_loaded(point, Format) for point in _points(FORMATS))


@cache
def codecs() -> tuple[Loaded[Codec], ...]:
    """All codecs that are installed, those of shardkit first."""
    return tuple(_loaded(point, Codec) for point in _points(CODECS))


def recognise(source: Source) -> Format:
    """The one format that *source* is of, judged by its content.

    Raises:
        UnknownFormat: none recognises it, or more than one does.
        FormatError: it begins like a zip archive and is none, or it is a part of something.
    """
    if part := never_alone(source):
        raise part
    verdicts = [(each, _verdict(each, each.record, source)) for each in formats() if each.record]
    claimants = [each.record for each, verdict in verdicts if each.record and verdict is True]
    if len(claimants) == 1:
        return claimants[0]
    if claimants:
        names = " and ".join(claimant.name for claimant in claimants)
        hint = ("choose one with ", option("format", claimants[0].name))
        raise UnknownFormat(source.path, f"could be {names}", claimed=True, hint=hint)
    broken = next((verdict for _, verdict in verdicts if isinstance(verdict, FormatError)), None)
    raise explained(source, broken) if broken else _unknown(source, verdicts)


def scan(found: Format, source: Source) -> Checkpoint:
    """What *found* makes of *source*.

    Raises:
        FormatError: it cannot be read.
        UnknownFormat: it is of another format.
    """
    try:
        return found.scan(source)
    except FormatError as error:
        raise _misread(found, source, error) from None


def _misread(found: Format, source: Source, error: FormatError) -> FormatError:
    """Why *found* raised *error* over *source*: it is of another format, a part of something, or
    really broken.
    """
    try:
        if found.sniff(source):
            return explained(source, error)
        actual = recognise(source)
    except FormatError as other:
        return other
    if actual is found:
        return error
    hint = ("leave out ", option("format"), ", or give ", option("format", actual.name))
    return UnknownFormat(source.path, f"has the format {actual.name}, not {found.name}", hint=hint)


def format_named(name: str) -> Format:
    """The format called *name*.

    Raises:
        PlanError: there is none.
        PluginError: its plugin cannot be used.
    """
    found = next((each for each in formats() if each.name == name), None)
    if found is None:
        known = ", ".join(each.name for each in formats())
        hint = (
            "give one of them, or leave out ",
            option("format"),
            " and the file is recognised by its content",
        )
        raise PlanError(
            f"there is no format called {shown(name)}; the formats are {known}", hint=hint
        )
    if found.record is None:
        raise found.error or _broken(found, "cannot be used")
    return found.record


def compressor_named(name: str) -> Codec:
    """The codec called *name*, which can compress.

    Raises:
        PlanError: there is none.
        PluginError: its plugin cannot be used.
    """
    found = next((each for each in codecs() if each.name == name), None)
    if found is not None and found.record is None:
        raise found.error or _broken(found, "cannot be used")
    if found is None or found.record is None or found.record.compress is None:
        known = ", ".join(each.name for each in codecs() if each.record and each.record.compress)
        hint = ("give one of them, or leave out ", option("compress"))
        raise PlanError(
            f"there is no codec called {shown(name)} that compresses; there are {known or 'none'}",
            hint=hint,
        )
    return found.record


def writer_for(suffix: str) -> Format | None:
    """The format that writes files ending in *suffix*; None where none does."""
    writers = (each.record for each in formats() if each.record and each.record.lay_out)
    return next((writer for writer in writers if suffix in writer.suffixes), None)


def suffixes() -> frozenset[str]:
    """The endings that files of any format and codec usually have."""
    of_formats = {suffix for each in formats() if each.record for suffix in each.record.suffixes}
    return frozenset(of_formats.union(codec_suffixes()))


def codec_suffixes() -> tuple[str, ...]:
    """What codecs add to the name of a file."""
    return tuple(each.record.suffix for each in codecs() if each.record)


def codec_of(source: Source) -> Codec | None:
    """The codec that *source* is compressed with, judged by its first bytes; None where it is
    not.
    """
    if source.is_folder:
        return None
    head = source.head
    return next(
        (each.record for each in codecs() if each.record and _is_of(each, each.record, head)), None
    )


def _is_of(plugin: Loaded[Codec], codec: Codec, head: bytes) -> bool:
    """Whether *head* begins a file of *codec*; one that cannot tell is passed over."""
    return _load(plugin, "cannot tell what a file is", lambda: codec.sniff(head)) is True


@cache
def installed() -> tuple[EntryPoint, ...]:
    """All entry points of our groups: whatever is installed has to be looked through for them, so
    it is done once.
    """
    found = entry_points()
    return tuple(point for group in _BUILT_IN for point in found.select(group=group))


def _points(group: str) -> list[EntryPoint]:
    """The entry points of *group*, each once, our own first."""
    points = {(point.name, point.value): point for point in installed() if point.group == group}
    for name, value in _BUILT_IN[group].items():
        points.setdefault((name, value), EntryPoint(name, value, group))
    return sorted(
        points.values(),
        key=lambda point: (point.value != _BUILT_IN[group].get(point.name), point.name),
    )


def _loaded(point: EntryPoint, kind: type[Record]) -> Loaded[Record]:
    found: Loaded[Record] = Loaded(point)
    record = _load(found, "cannot be loaded", point.load)
    if isinstance(record, PluginError):
        return replace(found, error=record)
    if not isinstance(record, kind):
        return replace(
            found, error=_broken(found, f"must be a {kind.__name__}, found {shown(record)}")
        )
    fault = _fault(point, record)
    return replace(found, error=_broken(found, fault)) if fault else replace(found, record=record)


def _load(plugin: Loaded[Record], what: str, call: Callable[[], Result]) -> Result | PluginError:
    """What *call*, the code of a stranger, returns: the one place where anything at all may come
    out.
    """
    try:
        return call()
    except ShardkitError as error:
        return _broken(plugin, f"{what}: {error}")
    except (Exception, SystemExit) as error:  # noqa: BLE001 - an import can raise anything, and must not stop other formats
        return _broken(plugin, f"{what}: {type(error).__name__}: {shown(str(error))}")


def _broken(plugin: Loaded[Record], message: str) -> PluginError:
    hint = f"update or remove {plugin.distribution.partition(' ')[0]}"
    return PluginError(plugin.distribution, f"{plugin.group}:{plugin.name}", message, hint=hint)


def _fault(point: EntryPoint, record: Format | Codec) -> str | None:
    if record.api != API:
        return (
            f"is for version {shown(record.api)} of the plugin contract, and this shardkit has "
            f"version {API}"
        )
    if record.name != point.name:
        names = f"{shown(record.name)}, but its entry point is named {shown(point.name)}"
        return f"is named {names}"
    if _BUILT_IN[point.group].get(point.name, point.value) != point.value:
        return "has the name of a built-in one"
    return None


def _verdict(plugin: Loaded[Format], record: Format, source: Source) -> bool | ShardkitError:
    """Whether *record* claims *source*; an error where it cannot tell."""
    try:
        if plugin.is_own:
            return record.sniff(source)
        return _load(
            plugin, f"cannot tell what {source.path.name} is", lambda: record.sniff(source)
        )
    except FormatError as error:
        return error


def _unknown(source: Source, verdicts: Iterable[tuple[Loaded[Format], object]]) -> FormatError:
    """What *source* is instead, and which plugin would perhaps have known it."""
    broken = [each.name for each in formats() if each.error]
    broken += [each.name for each, verdict in verdicts if isinstance(verdict, PluginError)]
    also = (
        f"{', '.join(broken)} could not be loaded: run `shardkit formats` to see why"
        if broken
        else ""
    )
    return diagnosed(source, also)
