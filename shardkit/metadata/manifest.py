"""shardkit.manifest.json: a digest of every file of an output and of every tensor in it, parsed and
dumped without any I/O.

1. It contains nothing that changes from run to run: no time, no absolute path, no number of jobs.
   Same input and options, same bytes.
2. The digest of a file is over all its bytes (with sha256 it is the object id of git-lfs and of the
   Hugging Face Hub); that of a tensor over its bytes as stored. The byte range of each tensor is
   recorded too, so that damage can be located even if a header is lost.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from shardkit.errors import Malformed
from shardkit.limits import Limits
from shardkit.metadata.shard_index import fault_of_name
from shardkit.metadata.strict_json import parse_json
from shardkit.payloads.digests import ALGORITHMS
from shardkit.printable import shown

MANIFEST_NAME = "shardkit.manifest.json"
_WHERE = "manifest"
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Digests:
    """What was computed of one file, in hex.

    Attributes:
        whole: of all its bytes; "" where only blocks are summed.
        tensors: of each tensor in it.
        blocks: of each run of a block in it, in their order.
    """

    whole: str
    tensors: Mapping[str, str] = field(hash=False)
    blocks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Run:
    """A tensor in a file: the bytes [start, stop)."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Listed:
    """What a manifest says of one file."""

    name: str
    nbytes: int
    runs: tuple[Run, ...]
    digests: Digests


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a manifest says."""

    algorithm: str
    files: tuple[Listed, ...]


def dump(manifest: Manifest) -> bytes:
    """The text of *manifest*: JSON with an indent of 1.

    It is put together here, as `json` takes ten times as long for indented text.
    """
    files = {file.name: _text(file) for file in manifest.files}
    head = (
        f'{{\n "version": {_VERSION},\n "algorithm": {json.dumps(manifest.algorithm)},\n "files": '
    )
    return f"{head}{_object(files, 2)}\n}}\n".encode()


def parse(path: Path, content: bytes, limits: Limits) -> Manifest:
    """The manifest whose text is *content*.

    Raises:
        Malformed: it is none, is of a later version, or names a file that does not lie in its
            folder.
        LimitExceeded: it is nested too deeply.
    """
    match parse_json(path, content, limits, where=_WHERE):
        case {"version": int(version)} if version > _VERSION:
            raise Malformed(
                path,
                f"is of version {version}, and {_VERSION} is known",
                where=_WHERE,
                hint="update shardkit",
            )
        case {"algorithm": str(algorithm), "files": dict(files)} if algorithm in ALGORITHMS:
            return Manifest(
                algorithm, tuple(_listed(path, name, said) for name, said in files.items())
            )
        case {"algorithm": algorithm}:
            known = " and ".join(ALGORITHMS)
            raise Malformed(
                path, f"the algorithm is {shown(algorithm)}, and {known} are known", where=_WHERE
            )
    raise Malformed(path, "must name an algorithm and files", where=_WHERE)


def _text(file: Listed) -> str:
    fields = {"nbytes": f"{file.nbytes}", "digest": json.dumps(file.digests.whole)}
    if file.runs:
        digests = file.digests.tensors
        fields["tensors"] = _object(
            {
                run.name: f'{{\n     "start": {run.start},\n     "stop": {run.stop},'
                f'\n     "digest": "{digests[run.name]}"\n    }}'
                for run in file.runs
            },
            4,
        )
    return _object(fields, 3)


def _object(fields: Mapping[str, str], indent: int) -> str:
    """A JSON object whose values are JSON already, its keys indented by *indent* spaces."""
    if not fields:
        return "{}"
    lines = ",\n".join(f"{' ' * indent}{json.dumps(key)}: {text}" for key, text in fields.items())
    return f"{{\n{lines}\n{' ' * (indent - 1)}}}"


def _listed(path: Path, name: str, said: object) -> Listed:
    fault = fault_of_name(name)
    if fault:
        raise Malformed(path, f"the file {shown(name)} {fault}", where=_WHERE)
    match said:
        case {"nbytes": int(nbytes), "digest": str(whole), **rest}:
            tensors = list(_tensors(path, name, nbytes, rest.get("tensors", {})))
            return Listed(
                name,
                nbytes,
                tuple(run for run, _ in tensors),
                Digests(whole, {r.name: d for r, d in tensors}),
            )
    raise Malformed(path, f"the file {shown(name)} must have a length and a digest", where=_WHERE)


def _tensors(path: Path, name: str, nbytes: int, said: object) -> Iterator[tuple[Run, str]]:
    at = 0
    for tensor, place in said.items() if isinstance(said, dict) else ():
        match place:
            case {"start": int(start), "stop": int(stop), "digest": str(digest)} if (
                at <= start <= stop <= nbytes
            ):
                yield Run(tensor, start, stop), digest
                at = stop
            case _:
                raise Malformed(
                    path, f"tensor {shown(tensor)} has no byte range in {shown(name)}", where=_WHERE
                )
