"""The format of `torch.save` before torch 1.6: five pickles one after the other, then the storages.

1. The pickles are a magic number, the protocol, facts about the machine (which nothing depends on),
   the object, and the keys of the storages in the order of the file.
2. A storage is its number of elements, as 8 bytes, and the elements. Both are little-endian on
   every machine. The size of an element is known only from the first tensor that uses the storage.
3. Nothing is aligned, and nothing marks the end of the file: bytes after the last storage are
   ignored with a note.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from shardkit.pickles.byte_strings import Strings
from shardkit.pickles.objects import Global, Vocabulary
from shardkit.pickles.torch_globals import find
from shardkit.pickles.torch_tensors import Storage, storage_of
from shardkit.pickles.unpickle import Pickle, unpickle
from shardkit.pickles.walk import collect
from shardkit.plugin import (
    Checkpoint,
    Format,
    Malformed,
    Payload,
    Source,
    SourceFile,
    several,
    shown,
)
from shardkit.sizes import format_size

_MAGIC = 0x1950A86A20F9469CFC6C
_MAGIC_BYTES = _MAGIC.to_bytes(10, "little")
_PROTOCOL = 1001


def sniff(source: Source) -> bool:
    """Whether it begins with torch's magic number, pickled."""
    return source.head[:1] == b"\x80" and _MAGIC_BYTES in source.head[:32]


def scan(source: Source) -> Checkpoint:
    """Read the pickles and the lengths of the storages; no weights.

    Raises:
        Malformed: a pickle is broken, or the file ends before the last storage.
        LimitExceeded: it asks for too much.
    """
    reader = _Reader(source)
    reader.expect(_MAGIC, "the magic number of torch")
    reader.expect(_PROTOCOL, "protocol 1001, the only one there is")
    reader.next("the machine")
    root = reader.next("the object")
    reader.place(reader.next("the storage keys").value)
    strings = Strings(source.path, source.content, source.limits, source.scratch)
    found = collect(
        source.path,
        root.value,
        record=reader.record,
        limits=source.limits,
        calls=root.calls,
        strings=strings,
    )
    rest = source.size - reader.at
    unread = (f"{format_size(rest)} follow the checkpoint and were not read",) if rest else ()
    notes = (*found.notes, *unread)
    return Checkpoint(found.tensors, found.others, files=(SourceFile.of(source.path),), notes=notes)


@dataclass(slots=True)
class _Reader:
    """A position in the file, and the storages met so far."""

    source: Source
    at: int = 0
    storages: dict[str, Storage] = field(default_factory=dict)
    records: dict[str, Payload] = field(default_factory=dict)

    def next(self, what: str) -> Pickle:
        """The pickle that comes next."""
        vocabulary = Vocabulary(find, self._persistent)
        pickle = unpickle(
            self.source.path,
            self.source.content,
            vocabulary,
            limits=self.source.limits,
            start=self.at,
            where=what,
        )
        self.at = pickle.stop
        return pickle

    def expect(self, number: int, what: str) -> None:
        value = self.next(what).value
        if not (type(value) is int and value == number):
            raise Malformed(self.source.path, f"begins with {shown(value)} where it needs {what}")

    def place(self, keys: object) -> None:
        """Locate each of the storages *keys*; they follow the pickles in this order."""
        if not isinstance(keys, list):
            raise Malformed(self.source.path, f"its list of storages is {shown(keys)}")
        for key in keys:
            storage = self.storages.get(key) if isinstance(key, str) else None
            if storage is None:
                raise Malformed(
                    self.source.path, f"lists the storage {shown(key)}, which no tensor uses"
                )
            if storage.key in self.records:
                raise Malformed(self.source.path, f"lists the storage {shown(key)} twice")
            self.records[storage.key] = self._record(storage)

    def record(self, storage: Storage) -> Payload:
        """The bytes of a storage; ValueError if they are not as many as it says."""
        payload = self.records.get(storage.key)
        if payload is None:
            raise ValueError(f"its storage {shown(storage.key)} is not in the list of storages")
        if storage.nbytes > payload.nbytes:
            raise ValueError(
                f"storage {shown(storage.key)} has {several(payload.nbytes, 'byte')}, and "
                "needs "
                f"{storage.nbytes:,}"
            )
        return payload

    def _record(self, storage: Storage) -> Payload:
        where = f"storage {shown(storage.key)}"
        stop = self.at + 8 + storage.nbytes
        if stop > self.source.size:
            missing = format_size(stop - self.source.size)
            raise Malformed(
                self.source.path,
                f"the file ends {missing} before it does: a truncated download",
                where=where,
                hint="download it again",
            )
        count = int.from_bytes(self.source.read(self.at, 8), "little", signed=True)
        if count != storage.count:
            raise Malformed(
                self.source.path,
                f"it has {several(count, 'element')} here, and {storage.count:,} in the pickle",
                where=where,
                hint="download it again",
            )
        payload = self.source.payload(self.at + 8, storage.nbytes)
        self.at = stop
        return payload

    def _persistent(self, pid: object) -> object:
        match pid:
            case ("module", Global() as cls, *_):  # a class, with its source code to compare with
                return cls
        storage = storage_of(pid)
        self.storages.setdefault(storage.key, storage)
        return storage


FORMAT = Format(
    name="torch-legacy", suffixes=(".pth", ".pt", ".bin", ".t7"), sniff=sniff, scan=scan
)
