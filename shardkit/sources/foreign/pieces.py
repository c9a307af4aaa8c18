"""A path that is a part of something, and cannot be read alone: a piece of a split file, an
unfinished download or run.

Names and neighbours tell, since the content of a part has no mark of its own. They are looked at
only where a file cannot be read, but for what is never complete alone: a file of
torch.distributed.checkpoint, and a folder with the records of a run.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shardkit.errors import FormatError
from shardkit.hints import Hint, output
from shardkit.metadata.unit_records import COMMIT, DONE, PARTIAL, PLAN, PlanRecord
from shardkit.printable import several, shown

_MOST = 6  # pieces that a command names one by one
_NUMBERED = re.compile(
    r"(?P<stem>.+?)(?P<mark>[._-]?part[._-]?|\.)(?P<number>\d{1,5})(?:of\d+)?", re.IGNORECASE
)
_LETTERED = re.compile(
    r"(?P<stem>.*?)(?P<mark>[._-]?part[._-]?|[._-]|x)(?P<number>[a-z]{2,3})", re.IGNORECASE
)
_LOADING = re.compile(r".+\.(incomplete|crdownload|part|download|aria2|tmp)", re.IGNORECASE)


def of_a_split_file(path: Path) -> FormatError | None:
    """Why *path* cannot be read, if its name and those beside it are of pieces as `split` makes
    them.
    """
    piece = _Piece.of(path.name)
    if piece is None:
        return None
    found = _alike(piece, path.parent)
    names = list(_run(found, 0 if 0 in found or not piece.number.isdecimal() else 1))
    if not piece.is_telling and (path.name not in names or len(names) < 2):
        return None
    whole = piece.stem.rstrip("._-")
    target = path.with_name(whole or "joined.bin")
    if target.exists():
        target = path.with_name(f"joined-{target.name}")
    joined = shlex.quote(str(target))
    if len(names) < 2 or len(names) < len(found):
        return FormatError(
            path,
            "looks like one piece of a split file, and other pieces are not beside it",
            hint=(
                "fetch the other pieces, and join all of them in their order: cat PIECES > "
                f"{joined}"
            ),
        )
    return FormatError(
        path,
        f"looks like one of the {several(len(names), 'piece')} of a split file: "
        f"{shown(names[0])} to {shown(names[-1])}",
        hint=f"join the pieces: cat {_listed(path.parent, piece, names)} > {joined}",
    )


def unfinished_download(path: Path) -> FormatError | None:
    """Why *path* cannot be read, if it is called as programs call what they are still fetching."""
    if _LOADING.fullmatch(path.name) is None:
        return None
    return FormatError(
        path,
        "is an unfinished download, by its name",
        hint="finish the download, or download it again",
    )


def unfinished_run(folder: Path) -> FormatError | None:
    """Why *folder* cannot be read, if a run of shardkit prepares its output there, or was stopped
    while it did.
    """
    try:
        plan = PlanRecord.parse((folder / PLAN).read_bytes())
    except OSError:
        return None
    place = folder if folder.name not in ("", "..") else folder.resolve()
    if _committed_to(folder) == place.name:  # it is complete, and only was not cleared up
        return None
    out = place.with_name(place.name.removesuffix(PARTIAL))
    done = sum(len(names) for _, _, names in os.walk(folder / DONE))
    source = f"of {shown(plan.request.source)}, " if plan and plan.request else ""
    again: Hint = (
        f"run the same conversion again ({source}with ",
        output(out),
        "): it resumes; or delete this folder",
    )
    if plan and plan.in_parts:
        path = shlex.quote(str(out))
        again = (
            f"write the parts that are missing, and commit them: shardkit status {path} tells; or "
            "delete this folder"
        )
    return FormatError(
        folder,
        f"holds the unfinished output of a run of shardkit: {several(done, 'file')} complete",
        hint=again,
    )


def _committed_to(folder: Path) -> str:
    """The name of the output that *folder* was to become when it was last put in place."""
    try:
        return os.fsdecode((folder / COMMIT).read_bytes().partition(b"\n")[0])
    except OSError:
        return ""


@dataclass(frozen=True, slots=True)
class _Piece:
    """A name, taken apart: what was split, what stands between, and which piece it is."""

    stem: str
    mark: str
    number: str

    @classmethod
    def of(cls, name: str) -> _Piece | None:
        for pattern in (_NUMBERED, _LETTERED):
            if (match := pattern.fullmatch(name)) and (match["mark"] != "x" or not match["stem"]):
                return cls(match["stem"], match["mark"], match["number"])
        return None

    @property
    def is_telling(self) -> bool:
        """Whether its name is enough to know it by, with no other piece beside it."""
        number = self.number.lower()
        if number.isdecimal():
            return "part" in self.mark.lower() or (len(number) > 1 and number.startswith("0"))
        return set(number) == {"a"} or ("part" in self.mark.lower() and number.startswith("a"))

    def is_like(self, other: _Piece) -> bool:
        """Whether both are of one file."""
        alike = self.number.isdecimal() == other.number.isdecimal()
        return alike and (self.stem, self.mark) == (other.stem, other.mark)


def _alike(piece: _Piece, folder: Path) -> dict[int, str]:
    """The names in *folder* of pieces of the same file, each by its place in it."""
    try:
        names = os.listdir(folder)
    except OSError:
        return {}
    pieces = ((name, _Piece.of(name)) for name in names)
    return {_place(each.number): name for name, each in pieces if each and piece.is_like(each)}


def _run(found: Mapping[int, str], place: int) -> Iterator[str]:
    """Those of *found* that follow each other from *place* on."""
    while place in found:
        yield found[place]
        place += 1


def _place(number: str) -> int:
    """Which piece *number* is: a number, or letters as `split` counts with them."""
    if number.isdecimal():
        return int(number)
    place = 0
    for letter in number.lower():
        place = 26 * place + ord(letter) - ord("a")
    return place


def _listed(folder: Path, piece: _Piece, names: Sequence[str]) -> str:
    """*names*, in their order, as arguments of `cat`."""
    if len(names) <= _MOST:
        return " ".join(shlex.quote(str(folder / name)) for name in names)
    prefix = shlex.quote(str(folder / f"{piece.stem}{piece.mark}"))
    if len({len(name) for name in names}) > 1:
        return f"$(ls -v {prefix}*)"
    return prefix + "?" * (len(names[0]) - len(piece.stem) - len(piece.mark))
