"""Apply the edits of the user: root, select, rename, cast_to, fold_ties; entries in, entries out,
in that order.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import translate
from typing import Literal, get_args

from shardkit.brief import brief
from shardkit.checkpoint.entries import Checkpoint, LeftOut, Other, OtherKind, TensorEntry
from shardkit.checkpoint.model_root import Rooted, select_root
from shardkit.checkpoint.quantised_scales import decoding
from shardkit.checkpoint.tie_records import LISTING
from shardkit.dtypes import DType, parse_dtype
from shardkit.errors import NameClash, NothingSelected, PlanError, Unwritable
from shardkit.hints import Hint, excluding, option, renaming
from shardkit.payloads.cast import Cast
from shardkit.printable import listed, several, shown, shown_path

Ties = Literal["keep-first", "copy"]
"""How a tied weight is written: once, with a record of its other names, or under each name."""


@dataclass(frozen=True, slots=True)
class Edits:
    """The changes that `convert` and `verify` apply to a checkpoint; by default, none.

    Attributes:
        root: dotted path of the subtree to take; "." for everything; None to find the model.
        include: glob patterns of names below the root; if there are any, only tensors that match
            one of them are taken. ``*`` also matches dots.
        exclude: glob patterns of names below the root to leave out.
        rename: pairs of a regular expression and the replacement of every match, applied in order
            to every name.
        dtype: what floating-point tensors are cast to; None to keep each as it is.
        ties: "keep-first" writes a tied weight once and records its other names; "copy" writes a
            copy under each name.

    Raises:
        PlanError: *ties* is neither, or a rename is not a pair.

    Example:
        >>> import shardkit
        >>> edits = shardkit.Edits(rename=(("^0", "up"), ("^2", "down")), exclude=("*.bias",))
        >>> report = shardkit.convert(
        ...     "model.safetensors", "out", rename=edits.rename, exclude=edits.exclude
        ... )
        >>> shardkit.verify("out", "model.safetensors", edits).same
        True
    """

    root: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    rename: tuple[tuple[str, str], ...] = ()
    dtype: DType | None = None
    ties: Ties = "keep-first"

    def __post_init__(self) -> None:
        if self.ties not in get_args(Ties):
            known = ", ".join(map(shown, get_args(Ties)))
            raise PlanError(
                f"ties is {shown(self.ties)}; expected one of {known}", hint="choose one of them"
            )
        for rule in self.rename:
            if not _is_rule(rule):
                raise PlanError(
                    (
                        f"a rename is {shown(rule)}; expected a pair of a regular expression and "
                        f"its replacement"
                    ),
                    hint=("write it as in ", renaming("^module\\.", "")),
                )

    @classmethod
    def asked(
        cls,
        *,
        root: str | None,
        include: Sequence[str],
        exclude: Sequence[str],
        rename: Sequence[tuple[str, str]],
        dtype: str | None,
        ties: Ties,
    ) -> Edits:
        """Build the edits from the arguments that `convert` takes.

        Args:
            root: dotted path of the subtree to take, or None.
            include: glob patterns, or a single one.
            exclude: glob patterns, or a single one.
            rename: pairs (regular expression, replacement).
            dtype: name of a floating-point type, as ``"bf16"``; None to keep each.
            ties: ``"keep-first"`` or ``"copy"``.

        Raises:
            PlanError: an argument is invalid.

        Example:
            >>> import shardkit
            >>> edits = shardkit.Edits.asked(
            ...     root=None, include="*.weight", exclude=(), rename=(), dtype="bf16", ties="copy"
            ... )
            >>> edits.include, edits.dtype.code
            (('*.weight',), 'BF16')
        """
        included, excluded = (
            (globs,) if isinstance(globs, str) else tuple(globs) for globs in (include, exclude)
        )
        return cls(
            root, included, excluded, tuple(rename), parse_dtype(dtype) if dtype else None, ties
        )


@dataclass(frozen=True, slots=True, repr=False)
class Edited:
    """What is left to write.

    Attributes:
        entries: the tensors, under the names they will have.
        aliases: for each folded tie, its name to the name of the entry that has its bytes.
        left_out: weights that are not taken: files and subfolders beside the source, objects in it.
        notes: sentences that the user should see.
    """

    entries: tuple[TensorEntry, ...]
    aliases: dict[str, str]
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return brief(self)

    @property
    def cast(self) -> int:
        """How many tensors change their type."""
        return sum(isinstance(entry.payload, Cast) for entry in self.entries)


def edit(checkpoint: Checkpoint, edits: Edits) -> Edited:
    """Apply *edits* to what *checkpoint* holds.

    Raises:
        AmbiguousRoot: several subtrees could be the model, and none is chosen.
        NothingSelected: no tensor is left.
        NameClash: two tensors end up with one name.
        Unwritable: a weight that was selected is no dense tensor.
        PlanError: a rename is no regular expression.
    """
    rooted = select_root(checkpoint, edits.root)
    wanted = _Wanted.of(edits)
    names = [*(entry.name for entry in rooted.tensors), *(other.name for other in rooted.others)]
    if idle := _idle(edits.include, names):
        raise NothingSelected(f"include {_matches_none(idle[0], names)}", hint=_SHOWS)
    entries = tuple(entry for entry in rooted.tensors if wanted.takes(entry.name))
    _refuse_non_dense(
        [other for other in rooted.others if other.is_weight and wanted.takes(other.name)],
        is_all=not entries,
    )
    if not entries:
        raise NothingSelected(_why_nothing(checkpoint, rooted, edits.root), hint=_SHOWS)
    renamed = _renamed(entries, edits.rename)
    _refuse_clashes(renamed, entries)
    entries = renamed
    # What is to be left out and is not there is left out: one list of globs may serve many
    # checkpoints.
    notes = tuple(f"exclude {_matches_none(glob, names)}" for glob in _idle(edits.exclude, names))
    if edits.dtype is not None:
        entries, more = cast_to(entries, edits.dtype)
        notes += more
    kept, aliases = (
        fold_ties(entries, {"format", LISTING, *checkpoint.metadata})
        if edits.ties == "keep-first"
        else (entries, {})
    )
    return Edited(kept, aliases, (*checkpoint.left_out, *rooted.left_out), notes)


def cast_to(
    entries: Iterable[TensorEntry], dtype: DType
) -> tuple[tuple[TensorEntry, ...], tuple[str, ...]]:
    """*entries* with every float of 16 bits or more as *dtype*, and what there is to say about the
    others.

    Narrower floats are the codes of quantised weights. These, and the scales, zero points and
    tables that decode them or other codes, stay as they are.
    """
    entries = tuple(entries)
    narrow = sum(entry.dtype.kind == "float" and entry.dtype.bits < 16 for entry in entries)
    kept = decoding(entries)
    notes: list[str] = []
    if narrow:
        floats = f"{several(narrow, 'tensor')} of 8-bit or narrower floats"
        notes.append(
            f"not cast: {floats}, which are quantised and have their scales in other tensors"
        )
    if kept:
        names = listed([shown(entry.name) for entry in entries if entry.name in kept], most=3)
        tables = (
            f"{several(len(kept), 'tensor')} of scales, zero points or tables of quantised weights"
        )
        notes.append(f"not cast: {tables}: {names}")
    cast = tuple(entry if entry.name in kept else _cast(entry, dtype) for entry in entries)
    return cast, tuple(notes)


def fold_ties(
    entries: Iterable[TensorEntry], reserved: Container[str] = ("format", LISTING)
) -> tuple[tuple[TensorEntry, ...], dict[str, str]]:
    """The entries whose bytes are not those of an earlier one, and for each other one its name to
    that earlier name.

    A name in *reserved* means something else in the metadata of the output: under it a tensor is
    written again.
    """
    first: dict[tuple[object, DType, tuple[int, ...]], str] = {}
    kept: list[TensorEntry] = []
    aliases: dict[str, str] = {}
    for entry in entries:
        name = first.setdefault((entry.payload, entry.dtype, entry.shape), entry.name)
        if name == entry.name or not entry.nbytes or entry.name in reserved:
            kept.append(entry)
        else:
            aliases[entry.name] = name
    return tuple(kept), aliases


def _is_rule(rule: object) -> bool:
    match rule:
        case (str(), str()):
            return True
    return False


@dataclass(frozen=True, slots=True)
class _Wanted:
    include: re.Pattern[str] | None
    exclude: re.Pattern[str] | None

    @classmethod
    def of(cls, edits: Edits) -> _Wanted:
        return cls(_any_of(edits.include), _any_of(edits.exclude))

    def takes(self, name: str) -> bool:
        return (self.include is None or bool(self.include.match(name))) and not (
            self.exclude and self.exclude.match(name)
        )


def _any_of(globs: Sequence[str]) -> re.Pattern[str] | None:
    return re.compile("|".join(translate(glob) for glob in globs)) if globs else None


def _refuse_non_dense(others: Sequence[Other], *, is_all: bool) -> None:
    """Raise Unwritable if there are *others*, which may be all that is selected."""
    if not others:
        return
    found = listed(
        [f"{shown(other.name)} ({other.kind}: {shown(other.reason)[1:-1]})" for other in others]
    )
    advice = next((_ADVICE[other.kind] for other in others if other.kind in _ADVICE), "")
    hint: Hint = advice or _SHOWS
    if not is_all:
        either = f"{advice}, or " if advice else ""
        hint = (f"{either}leave them out: ", excluding([other.name for other in others]))
    raise Unwritable(
        f"safetensors can store dense tensors only, and these are not dense: {found}", hint=hint
    )


_ADVICE = {
    OtherKind.DISTRIBUTED: (
        "save tensor.full_tensor() of each on all ranks where the model was trained"
    ),
    OtherKind.QUANTISED: "convert the model from before it was quantised",
    OtherKind.UNKNOWN_TENSOR: (
        "save model.state_dict() or save_pretrained() with the library that made the file"
    ),
}


def _idle(globs: Iterable[str], names: Sequence[str]) -> list[str]:
    """Those of *globs* that match none of *names*."""
    return [
        glob for glob in globs if names and not any(map(re.compile(translate(glob)).match, names))
    ]


def _matches_none(pattern: str, names: Sequence[str]) -> str:
    return f"{shown(pattern)} matches none of the {several(len(names), 'name')}{_as_in(names)}"


def _as_in(names: Iterable[str]) -> str:
    """Some of *names*, for who has misspelt one."""
    return f", as in {listed([shown(name) for name in names], most=3)}"


def _why_nothing(checkpoint: Checkpoint, rooted: Rooted, root: str | None) -> str:
    if not checkpoint.tensors:
        where = shown_path(checkpoint.files[0].path) if checkpoint.files else "the source"
        whole = next(
            (
                other
                for other in checkpoint.others
                if not other.path and other.kind is OtherKind.OBJECT
            ),
            None,
        )
        only = f", only {shown(whole.reason)[1:-1]}" if whole else ""
        return "; ".join((f"{where}: it holds no tensors{only}", *checkpoint.notes))
    if rooted.tensors:
        return f"include and exclude leave none of the {several(len(rooted.tensors), 'tensor')}"
    if root is not None:
        return f"none of the file's {several(len(checkpoint.tensors), 'tensor')} is below the root"
    if not any(entry.nbytes for entry in checkpoint.tensors):
        return "; ".join(checkpoint.notes)  # which say that the file holds no values
    aside = listed([f"{shown(part.path)} ({part.reason})" for part in rooted.left_out])
    return (
        f"no model was found among the file's {several(len(checkpoint.tensors), 'tensor')}: {aside}"
    )


def _renamed(
    entries: tuple[TensorEntry, ...], rules: Iterable[tuple[str, str]]
) -> tuple[TensorEntry, ...]:
    for pattern, replacement in rules:
        try:
            compiled = re.compile(pattern)
            changes = [compiled.subn(replacement, entry.name) for entry in entries]
        except (re.error, IndexError) as error:
            raise PlanError(
                f"cannot rename {shown(pattern)} to {shown(replacement)}: {error}",
                hint="give a regular expression and its replacement, as Python's re.sub takes them",
            ) from None
        if not any(count for _, count in changes):
            names = [entry.name for entry in entries]
            raise PlanError(f"rename {_matches_none(pattern, names)}", hint=_SHOWS)
        entries = tuple(
            entry if entry.name == name else replace(entry, path=(name,))
            for entry, (name, _) in zip(entries, changes, strict=True)
        )
    return entries


def _refuse_clashes(entries: Sequence[TensorEntry], before: Sequence[TensorEntry]) -> None:
    """Raise NameClash if two of *entries* have one name; *before* has each as it was before it was
    renamed.
    """
    seen: dict[str, TensorEntry] = {}
    for entry, old in zip(entries, before, strict=True):
        first = seen.setdefault(entry.name, old)
        if first is old:
            continue
        if first.name != old.name:
            both = f"{shown(first.name)} and {shown(old.name)}"
            raise NameClash(
                f"rename gives {both} the same name, {shown(entry.name)}", hint=_RENAMED
            )
        raise clash(first, old)


def clash(
    first: TensorEntry, second: TensorEntry, where: str = "", *, hint: Hint | None = None
) -> NameClash:
    """The error that says that two tensors of *where* have one dotted name."""
    paths = (" → ".join(shown(step) for step in each.path) for each in (first, second))
    message = f"two tensors would be called {shown(first.name)}: {', and '.join(paths)}"
    return NameClash(f"{where}: {message}" if where else message, hint=hint or _APART)


_SHOWS = "run `shardkit inspect` to list the contents of the file"
_RENAMED: Hint = (
    "change ",
    option("rename"),
    " so that names stay unique, or leave one of them out with ",
    option("exclude"),
)
_APART: Hint = (
    "select one of the subtrees with ",
    option("root"),
    ", or exclude both with ",
    option("exclude"),
)


def _cast(entry: TensorEntry, dtype: DType) -> TensorEntry:
    if entry.dtype.kind != "float" or entry.dtype.bits < 16 or entry.dtype == dtype:
        return entry
    return TensorEntry(entry.path, dtype, entry.shape, Cast(entry.payload, entry.dtype, dtype))
