"""The content and the place of an output, as one value, for a conversion or a saved model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shardkit.brief import brief
from shardkit.checkpoint.entries import Checkpoint, SourceFile
from shardkit.limits import Limits
from shardkit.metadata.unit_records import Request
from shardkit.planning.plan import Plan


@dataclass(frozen=True, slots=True)
class SourceCheck:
    """A source whose own checksums are compared before a byte is written.

    Attributes:
        checkpoint: what it holds.
        limits: what it may ask for.
    """

    checkpoint: Checkpoint
    limits: Limits


@dataclass(frozen=True, slots=True, repr=False)
class Output:
    """A plan, and the place of what it gives.

    Attributes:
        name: what messages call what is written: the path of a source, or the class of a model.
        out: the folder, or the one file, that will appear.
        plan: its files, part by part.
        files: every file that is read, companions too, as it was when it was planned.
        is_single: whether *out* is the one file of the plan, and not a folder.
        origin: the file or folder that is converted, and never replaced; None where a model is
            saved.
        check: checksums of the source to compare first; None for none.
        request: what was asked for, so that it can be planned again; None where a model is saved.
    """

    name: str
    out: Path
    plan: Plan
    files: tuple[SourceFile, ...] = ()
    is_single: bool = False
    origin: Path | None = None
    check: SourceCheck | None = None
    request: Request | None = None

    def __repr__(self) -> str:
        return brief(self)

    @property
    def single(self) -> str | None:
        """The name of the one file; None for a folder."""
        return self.out.name if self.is_single else None
