"""offload.json: the byte ranges of each block in the shards, in the order in which blocks run;
parsed and dumped without any I/O.

1. It contains nothing that changes from run to run: no time, no absolute path. Same input and
   options, same bytes.
2. A shard is identified by its length and by the digest of its header, so that a record beside
   other shards is noticed without reading a weight. The digest of a block covers the rest.
3. A block larger than the limit of a shard has an entry for each of its runs; every other block has
   one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shardkit.errors import Malformed
from shardkit.limits import Limits
from shardkit.metadata.shard_index import fault_of_name
from shardkit.metadata.strict_json import parse_json
from shardkit.payloads.digests import ALGORITHMS
from shardkit.printable import shown

OFFLOAD_NAME = "offload.json"
_WHERE = "record of blocks"
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Shard:
    """What is known of a file with blocks in it, expanded if it is compressed.

    Attributes:
        name: relative to the record.
        nbytes: its length.
        header: SHA-256, in hex, of all that stands before the first block.
    """

    name: str
    nbytes: int
    header: str


@dataclass(frozen=True, slots=True)
class BlockRun:
    """A block, or a part of one, as it is stored in a shard: the bytes [start, stop).

    Attributes:
        block: name of the block.
        shard: name of the file.
        start: offset in the file, expanded if it is compressed.
        stop: likewise.
        tensors: their names, in the order of their data.
        digest: of the bytes, in hex; "" as long as they are not written.
    """

    block: str
    shard: str
    start: int
    stop: int
    tensors: tuple[str, ...]
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Origin:
    """What the shards were made from.

    Attributes:
        name: of the file or folder, without the folders around it.
        format: as `shardkit formats` lists it.
        files: name and length of each file that was read for weights.
    """

    name: str
    format: str
    files: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class OffloadRecord:
    """What an offload.json says.

    Attributes:
        algorithm: of the digests of blocks.
        origin: what the shards were made from.
        dtypes: bytes of each type, by its code.
        shards: the files.
        runs: the blocks, in the order in which they run.
    """

    algorithm: str
    origin: Origin
    dtypes: tuple[tuple[str, int], ...]
    shards: tuple[Shard, ...]
    runs: tuple[BlockRun, ...]

    @property
    def blocks(self) -> tuple[str, ...]:
        """The names of the blocks."""
        return tuple(dict.fromkeys(run.block for run in self.runs))

    def runs_in(self, shard: str) -> tuple[BlockRun, ...]:
        """Return the runs in the file called *shard*, in the order of its bytes."""
        return tuple(run for run in self.runs if run.shard == shard)


def dump(record: OffloadRecord, digests: Mapping[str, Sequence[str]] | None = None) -> bytes:
    """The text of *record*; with the *digests* of the runs in each shard, where they are given, in
    their order.
    """
    left = {shard: iter(each) for shard, each in (digests or {}).items()}
    origin = record.origin
    document = {
        "version": _VERSION,
        "source": {"name": origin.name, "format": origin.format, "files": dict(origin.files)},
        "dtypes": dict(record.dtypes),
        "algorithm": record.algorithm,
        "shards": {
            shard.name: {"nbytes": shard.nbytes, "header": shard.header} for shard in record.shards
        },
        "blocks": [
            _document(run, next(left[run.shard]) if run.shard in left else run.digest)
            for run in record.runs
        ],
    }
    return (json.dumps(document, indent=1) + "\n").encode("utf-8", "surrogatepass")


def parse(path: Path, content: bytes, limits: Limits) -> OffloadRecord:
    """The record whose text is *content*.

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
        case {
            "algorithm": str(algorithm),
            "source": said,
            "dtypes": dict(dtypes),
            "shards": dict(shards),
            "blocks": list(runs),
        }:
            _check_algorithm(path, algorithm)
            listed = {name: _shard(path, name, each) for name, each in shards.items()}
            found = tuple(_runs(path, runs, listed))
            return OffloadRecord(
                algorithm, _origin(path, said), _sizes(path, dtypes), tuple(listed.values()), found
            )
    raise Malformed(path, "must name a source, an algorithm, shards and blocks", where=_WHERE)


def _check_algorithm(path: Path, name: str) -> None:
    if name not in ALGORITHMS:
        raise Malformed(
            path,
            f"the algorithm is {shown(name)}, and {' and '.join(ALGORITHMS)} are known",
            where=_WHERE,
        )


def _document(run: BlockRun, digest: str) -> dict[str, object]:
    place = {"shard": run.shard, "start": run.start, "stop": run.stop, "digest": digest}
    return {"name": run.block, **place, "tensors": run.tensors}


def _origin(path: Path, said: object) -> Origin:
    match said:
        case {"name": str(name), "format": str(form), "files": dict(files)}:
            return Origin(name, form, _sizes(path, files))
    raise Malformed(path, "the source must have a name, a format and files", where=_WHERE)


def _sizes(path: Path, said: dict[str, object]) -> tuple[tuple[str, int], ...]:
    for name, nbytes in said.items():
        if type(nbytes) is not int or nbytes < 0:
            raise Malformed(
                path,
                f"{shown(name)} must have a number of bytes, found {shown(nbytes)}",
                where=_WHERE,
            )
    return tuple((name, nbytes) for name, nbytes in said.items() if isinstance(nbytes, int))


def _shard(path: Path, name: str, said: object) -> Shard:
    fault = fault_of_name(name)
    if fault:
        raise Malformed(path, f"the file {shown(name)} {fault}", where=_WHERE)
    match said:
        case {"nbytes": int(nbytes), "header": str(header)}:
            return Shard(name, nbytes, header)
    raise Malformed(
        path,
        f"the file {shown(name)} must have a length and the digest of its header",
        where=_WHERE,
    )


def _runs(path: Path, said: Sequence[object], shards: Mapping[str, Shard]) -> Iterator[BlockRun]:
    at = dict.fromkeys(shards, 0)
    for line in said:
        match line:
            case {
                "name": str(name),
                "shard": str(shard),
                "start": int(start),
                "stop": int(stop),
                "digest": str(digest),
                "tensors": list(tensors),
            } if shard in at and at[shard] <= start <= stop <= shards[shard].nbytes:
                yield BlockRun(name, shard, start, stop, _names(path, name, tensors), digest)
                at[shard] = stop
            case {"name": str(name)}:
                raise Malformed(
                    path,
                    f"the block {shown(name)} has no byte range, or overlaps another",
                    where=_WHERE,
                )
            case _:
                raise Malformed(
                    path,
                    f"a block must have a name and a byte range, found {shown(line)}",
                    where=_WHERE,
                )


def _names(path: Path, block: str, said: Sequence[object]) -> tuple[str, ...]:
    if all(isinstance(name, str) for name in said):
        return tuple(map(str, said))
    raise Malformed(
        path, f"the block {shown(block)} must name its tensors, found {shown(said)}", where=_WHERE
    )
