"""The format of `torch.save` since torch 1.6: a zip archive with a pickle, `data.pkl`, and a record
for each storage.

1. The folder inside the archive has the name of the file that was saved: it is the folder of
   `data.pkl`.
2. `byteorder` was added by torch 2.1; without it the bytes are little-endian. Other records are not
   needed.
"""

from __future__ import annotations

from shardkit.pickles.byte_strings import Strings
from shardkit.pickles.objects import Vocabulary
from shardkit.pickles.torch_globals import find
from shardkit.pickles.torch_tensors import Storage, storage_of
from shardkit.pickles.unpickle import unpickle
from shardkit.pickles.walk import collect
from shardkit.plugin import (
    Checkpoint,
    Extent,
    Format,
    Malformed,
    Member,
    Payload,
    Source,
    SourceFile,
    read_all,
    shown,
)


def sniff(source: Source) -> bool:
    """Whether it is a zip archive that torch wrote, other than TorchScript."""
    return has_member(source, "data.pkl") and not has_member(source, *_OTHERS)


def scan(source: Source) -> Checkpoint:
    """Read the pickle and the directory; no weights.

    Raises:
        Malformed: the archive or its pickle is broken.
        LimitExceeded: it asks for too much.
    """
    records = Records(source)
    data = source.member(records.member("data.pkl"))
    pickle = unpickle(
        source.path,
        data,
        Vocabulary(find, storage_of),
        limits=source.limits,
        where=f"{records.root}data.pkl",
    )
    found = collect(
        source.path,
        pickle.value,
        record=records.storage,
        limits=source.limits,
        calls=pickle.calls,
        big_endian=records.is_big_endian(),
        strings=Strings(source.path, data, source.limits, source.scratch),
    )
    notes = (
        *found.notes,
        *((_RELABELLED.format(shown(source.head[:2])),) if source.is_relabelled_zip else ()),
    )
    return Checkpoint(found.tensors, found.others, files=(SourceFile.of(source.path),), notes=notes)


class Records:
    """The members of the archive, by their names below its root."""

    def __init__(self, source: Source) -> None:
        """Find the root.

        Raises:
            Malformed: it has no `data.pkl`.
        """
        self._source = source
        self._members = {member.name: member for member in source.members}
        self._storages: dict[str, Payload] = {}
        self.root = self._root()

    def find(self, name: str) -> Member | None:
        """The member *name*, if there is one."""
        return self._members.get(self.root + name)

    def member(self, name: str) -> Member:
        """The member *name*; ValueError if there is none."""
        member = self._members.get(self.root + name)
        if member is None:
            raise ValueError(f"the archive has no member {shown(self.root + name)}")
        return member

    def storage(self, storage: Storage) -> Payload:
        """The bytes of a storage; ValueError if they are not as many as it says."""
        payload = self._storages.get(storage.key)
        if payload is None:
            payload = self._source.member(self.member(f"data/{storage.key}"))
            if not isinstance(payload, Extent):  # it expands to a file, which is made once
                self._storages[storage.key] = payload
        if payload.nbytes != storage.nbytes:
            raise ValueError(
                f"record {shown(storage.key)} holds {payload.nbytes:,} bytes, and "
                f"{storage.count:,} elements of "
                f"{storage.kind.dtype.code} need {storage.nbytes:,}"
            )
        return payload

    def is_big_endian(self) -> bool:
        """What the record `byteorder` says."""
        member = self.find("byteorder")
        if member is None:
            return False
        order = bytes(read_all(self._source.member(member))) if member.nbytes < 16 else b""
        if order not in (b"little", b"big"):
            raise Malformed(
                self._source.path,
                f"says {shown(order)}, neither little nor big",
                where=f"record {shown(member.name)}",
            )
        return order == b"big"

    def _root(self) -> str:
        roots = [
            name.removesuffix("data.pkl")
            for name in self._members
            if name == "data.pkl" or name.endswith("/data.pkl")
        ]
        if not roots:
            raise Malformed(
                self._source.path,
                "is a zip archive without data.pkl, which torch.save did not write",
            )
        root = min(roots, key=len)
        if other := next((each for each in roots if not each.startswith(root)), None):
            message = (
                f"holds {shown(f'{root}data.pkl')} and {shown(f'{other}data.pkl')}, and "
                "torch.save writes one of them"
            )
            raise Malformed(
                self._source.path,
                message,
                hint="unpack it, and convert the checkpoints that are inside",
            )
        return root


_RELABELLED = (
    "it begins with {} instead of 'PK', as GPT-SoVITS writes, and is otherwise an "
    "archive of torch.save"
)
_OTHERS = (
    "constants.pkl",
    ".data/extern_modules",
)  # what TorchScript and torch.package have beside a data.pkl


def has_member(source: Source, *names: str) -> bool:
    """Whether a member of the archive has one of *names*, in the root or in a folder."""
    below = tuple(f"/{name}" for name in names)
    return any(member.name.endswith(below) or member.name in names for member in source.members)


FORMAT = Format(
    name="torch-zip", suffixes=(".bin", ".pt", ".pth", ".ckpt", ".pth.tar"), sniff=sniff, scan=scan
)
