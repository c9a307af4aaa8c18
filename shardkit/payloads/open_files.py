"""Extents of files that are kept open: they replace the extents of a payload that is read
repeatedly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import TypeGuard

from shardkit.payloads.payload import CHUNK, Extent, Payload, check_range

ReadAt = Callable[[Path, memoryview, int], None]


@dataclass(frozen=True, slots=True)
class OpenExtent(Extent):
    """An extent that opens nothing.

    Attributes:
        read: fills a buffer with the bytes of a file from a place on; raises FormatError.
    """

    read: ReadAt = field(compare=False, repr=False)

    def narrow(self, start: int, nbytes: int) -> OpenExtent:
        check_range(start, nbytes, self.nbytes)
        return OpenExtent(self.path, self.start + start, nbytes, self.read)

    def chunks(self) -> Iterator[memoryview]:
        buffer = memoryview(bytearray(min(CHUNK, self.nbytes)))
        for at in range(0, self.nbytes, CHUNK):
            chunk = buffer[: self.nbytes - at]
            self.fill(chunk, at)
            yield chunk

    def fill(self, buffer: memoryview, start: int) -> None:
        """Fill *buffer* with the bytes from *start* on."""
        self.read(self.path, buffer, self.start + start)


def opened(payload: Payload, read: ReadAt) -> Payload:
    """*payload*, in which *read* reads the extents that it is made of; what is no dataclass stays
    as it is.
    """
    if isinstance(payload, Extent):
        return OpenExtent(payload.path, payload.start, payload.nbytes, read)
    made = dict(_opened_inside(payload, read))
    return replace(payload, **made) if made else payload  # type: ignore[type-var]  # only a dataclass has something inside


def _opened_inside(payload: object, read: ReadAt) -> Iterator[tuple[str, object]]:
    """The fields of *payload* that are payloads, or several."""
    for each in fields(payload) if is_dataclass(payload) else ():
        value = getattr(payload, each.name)
        if _is_payload(value):
            yield each.name, opened(value, read)
        elif isinstance(value, tuple) and value and _is_payload(value[0]):
            yield each.name, tuple(opened(part, read) for part in value)


def _is_payload(value: object) -> TypeGuard[Payload]:
    """Told by one method, because to ask for all takes as long as a small read."""
    return hasattr(type(value), "chunks")
