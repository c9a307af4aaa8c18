"""The byte strings of a pickle as payloads.

1. A string of more than 4 KiB is kept as its byte range, and read there.
2. Protocol 2, which torch.save uses, writes bytes as text: one character for each byte, in UTF-8.
   Such text is decoded once, when it is first read, to a temporary file.
3. A shorter string is in memory already. Equal short strings are not one string, so each gets a
   number.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from shardkit.limits import Limits
from shardkit.payloads.codec import Codec
from shardkit.payloads.compressed import Expanded, Spool
from shardkit.payloads.payload import Extent, Payload, check_range
from shardkit.pickles.objects import LongString

_DECODED = 1 << 20  # bytes of text decoded at a time


@dataclass(frozen=True, slots=True)
class Strings:
    """The strings of one pickle.

    Attributes:
        path: the file, which distinguishes equal short strings of two files.
        pickle: the bytes that the places are counted in.
        limits: bounds what is decoded.
        scratch: folder for temporary files; None for the system's.
    """

    path: Path
    pickle: Payload
    limits: Limits = Limits()
    scratch: Path | None = None

    def payload(self, string: bytes | LongString, nbytes: int, *, number: int) -> Payload:
        """The *nbytes* bytes of *string*; a short one is the same payload only with the same
        *number*.

        Raises:
            ValueError: it lies outside the pickle.
        """
        if isinstance(string, bytes):
            return Held(self.path, number, 0, string)
        stored = self.pickle.narrow(string.start, string.nbytes)
        if not string.is_latin1:
            return stored
        return Expanded(Spool(stored, _LATIN1, self.limits, self.scratch, nbytes), 0, nbytes)


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes of a short string.

    Attributes:
        path: the file that the string is in.
        number: tells it from the other strings of the file.
        start: where in the string the bytes begin.
        content: the bytes.
    """

    path: Path
    number: int
    start: int
    content: bytes

    @property
    def nbytes(self) -> int:
        return len(self.content)

    @property
    def sources(self) -> tuple[Extent, ...]:
        return ()

    def narrow(self, start: int, nbytes: int) -> Held:
        check_range(start, nbytes, self.nbytes)
        return Held(
            self.path, self.number, self.start + start, self.content[start : start + nbytes]
        )

    def chunks(self) -> Iterator[memoryview]:
        if self.content:
            yield memoryview(self.content)


def _latin1(pieces: Iterable[memoryview]) -> Iterator[bytes]:
    """The bytes that UTF-8 text stands for, one for each character."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for piece in pieces:
            for at in range(0, len(piece), _DECODED):
                yield decoder.decode(bytes(piece[at : at + _DECODED])).encode("latin-1")
        decoder.decode(b"", True)
    except UnicodeError:
        raise ValueError("it has characters that stand for no byte") from None


def _never(head: bytes) -> bool:
    return False  # only the pickle says that a text stands for bytes


_LATIN1 = Codec("Latin-1", "", sniff=_never, decompress=_latin1)
