"""The documents of an unfinished output, in the folder `.shardkit` of OUT.partial/: for which plan
it was begun, and one record for each file that is complete. Parsed and dumped without any I/O.

    OUT.partial/
      model-00001-of-00003.safetensors    a file that is complete, under its own name
      .shardkit/plan.json                 `PlanRecord`: the plan, its sources, what was asked for
      .shardkit/done/model-00001-of-…     `UnitRecord`: size and digests of the file of this name
      .shardkit/new/                      files that are being written, under unique names
      .shardkit/commit                    the name of the output, while it is put in place
      .shardkit/expanded/                 decompressed sources, for the parts on each machine
      .shardkit/lock                      locked by the runs that write here

The records are the only journal: a run on one machine, the parts of a job array and a cluster leave
the same ones, so that one of them can finish what another has begun.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from shardkit.checkpoint.entries import SourceFile
from shardkit.metadata.manifest import Digests
from shardkit.payloads.shared_expansion import SHARED
from shardkit.printable import shown, shown_path

PARTIAL = ".partial"  # what the folder of an unfinished output is called, behind its name
STATE = ".shardkit"
PLAN, DONE, NEW, COMMIT, LOCK, REPLACED, EXPANDED = (
    f"{STATE}/{name}" for name in ("plan.json", "done", "new", "commit", "lock", "replaced", SHARED)
)
_PLAN_SCHEMA = "shardkit.plan/1"
_UNIT_SCHEMA = "shardkit.unit/1"


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for, from which the same plan is made again.

    Attributes:
        operation: "convert" or "offload-prep".
        source: the absolute path of what is read.
        arguments: of `shardkit.convert` or `shardkit.offload_prep`, by name, where they differ from
            the defaults; values of JSON.
    """

    operation: str
    source: str
    arguments: Mapping[str, object] = field(hash=False)


@dataclass(frozen=True, slots=True)
class PlanRecord:
    """For which plan an output was begun; equal `key`, equal files.

    Attributes:
        digest: of the plan.
        sources: the files that it reads, as they were when it was planned.
        boot: names the run of the system whose page cache holds the files; "" where they are
            synced.
        version: of shardkit.
        files: name and size of each file, in bytes as planned.
        late: names of those that hold digests of others, which the commit writes.
        request: what was asked for; None where a model in memory is saved.
        in_parts: whether it is written by several runs that know nothing of each other (`--part`).
    """

    digest: str
    sources: tuple[SourceFile, ...]
    boot: str
    version: str
    files: tuple[tuple[str, int], ...] = ()
    late: tuple[str, ...] = ()
    request: Request | None = None
    in_parts: bool = False

    @property
    def key(self) -> str:
        """SHA-256, in hex, of what the files depend on."""
        identity = (self.digest, [_source_line(s) for s in self.sources], self.boot, self.version)
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def dump(self) -> bytes:
        """The text of plan.json."""
        request = self.request
        document = {
            "schema": _PLAN_SCHEMA,
            "shardkit": self.version,
            "digest": self.digest,
            "boot": self.boot,
            "in_parts": self.in_parts,
            "request": request
            and {
                "operation": request.operation,
                "source": request.source,
                "arguments": dict(request.arguments),
            },
            "sources": [_source_line(source) for source in self.sources],
            "files": [[name, nbytes] for name, nbytes in self.files],
            "late": list(self.late),
        }
        return json.dumps(document, indent=1).encode() + b"\n"

    @classmethod
    def parse(cls, content: bytes) -> PlanRecord | None:
        """What the text of plan.json says; None if it is damaged."""
        match _parsed(content):
            case {
                "schema": str(schema),
                "shardkit": str(version),
                "digest": str(digest),
                "boot": str(boot),
                "in_parts": bool(in_parts),
                "request": request,
                "sources": list(sources),
                "files": list(files),
                "late": list(late),
            } if schema == _PLAN_SCHEMA:
                known = tuple(_source(line) for line in sources)
                listed = tuple(_file(line) for line in files)
                names = tuple(map(str, late))
                return cls(digest, known, boot, version, listed, names, _request(request), in_parts)
        return None

    def differences(self, other: PlanRecord) -> Iterator[str]:
        """In which ways *other*, which was begun earlier, is not the same; each a clause of a
        sentence.
        """
        if other.version != self.version:
            yield f"it was begun by shardkit {shown(other.version)}, and this is {self.version}"
        mine, theirs = self.request, other.request
        if mine and theirs and (mine.operation, mine.source) != (theirs.operation, theirs.source):
            yield f"it was begun by {theirs.operation} of {shown(theirs.source)}"
        elif mine and theirs:
            for name in sorted({*mine.arguments, *theirs.arguments}):
                before, now = (each.arguments.get(name) for each in (theirs, mine))
                if before != now:
                    yield f"{name} was {_value(before)}, and is {_value(now)}"
        before = {path: state for path, *state in map(_source_line, other.sources)}
        for source in self.sources:
            path, *state = _source_line(source)
            if before.get(path, state) != state:
                yield f"{shown_path(source.path)} changed since"
                break
        if other.boot and not self.boot:
            yield "its files were written without fsync"
        elif self.boot and not other.boot:
            yield "its files were written with fsync"
        elif other.boot != self.boot:
            yield "its files were written without fsync, and the system has restarted since"


@dataclass(frozen=True, slots=True)
class Finished:
    """A file that is complete.

    Attributes:
        nbytes: its size.
        digests: what was summed while it was written; None where nothing was.
    """

    nbytes: int
    digests: Digests | None

    def is_whole(self, path: Path) -> bool:
        """Whether it is at *path*, at full length."""
        try:
            found = path.stat()
        except OSError:
            return False
        return stat.S_ISREG(found.st_mode) and found.st_size == self.nbytes


@dataclass(frozen=True, slots=True)
class UnitRecord:
    """The record of one complete file.

    Attributes:
        name: of the file, relative to the output; forward slashes.
        key: of the plan that it belongs to.
        finished: its size and digests.
        by: the process and the machine that wrote it.
    """

    name: str
    key: str
    finished: Finished
    by: str

    def dump(self) -> bytes:
        """The text of the record."""
        digests = self.finished.digests
        document = {
            "schema": _UNIT_SCHEMA,
            "file": self.name,
            "plan": self.key,
            "nbytes": self.finished.nbytes,
            "digests": digests
            and {
                "whole": digests.whole,
                "tensors": dict(digests.tensors),
                "blocks": list(digests.blocks),
            },
            "by": self.by,
        }
        return json.dumps(document).encode() + b"\n"

    @classmethod
    def parse(cls, content: bytes) -> UnitRecord | None:
        """What the text of a record says; None if it is damaged."""
        match _parsed(content):
            case {
                "schema": str(schema),
                "file": str(name),
                "plan": str(key),
                "nbytes": int(nbytes),
                "digests": digests,
                "by": str(by),
            } if schema == _UNIT_SCHEMA:
                summed = _digests(digests)
                if summed is not None or digests is None:
                    return cls(name, key, Finished(nbytes, summed), by)
        return None


def _parsed(content: bytes) -> object:
    """The document *content*; None if it is none. Names may hold bytes that are no UTF-8, as half
    surrogate pairs, so this is not `parse_json`.
    """
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _source_line(source: SourceFile) -> tuple[str, int, int, int]:
    return os.path.abspath(source.path), source.size, source.mtime_ns, source.inode


def _source(line: object) -> SourceFile:
    match line:
        case [str(name), int(size), int(mtime_ns), int(inode)]:
            return SourceFile(Path(name), size, mtime_ns, inode)
    return SourceFile(Path(), -1, -1, -1)  # which equals no file


def _file(line: object) -> tuple[str, int]:
    match line:
        case [str(name), int(nbytes)]:
            return name, nbytes
    return "", 0


def _request(document: object) -> Request | None:
    match document:
        case {"operation": str(operation), "source": str(source), "arguments": dict(arguments)}:
            return Request(operation, source, arguments)
    return None


def _digests(document: object) -> Digests | None:
    match document:
        case {"whole": str(whole), "tensors": dict(tensors), "blocks": list(blocks)}:
            return Digests(whole, tensors, tuple(map(str, blocks)))
    return None


def _value(value: object) -> str:
    return "not given" if value is None else shown(str(value))
