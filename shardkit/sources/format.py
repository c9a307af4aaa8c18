"""Format: what a format plugin exports, and Source: what its functions receive.

A format is two functions over a `Source`: *sniff* decides whether the file is of this format,
*scan* reads its headers and returns where each tensor is stored. An optional third, *lay_out*,
lists the parts of a new file. None of them reads or copies a weight, so every format gets
streaming, kernel copies, dry runs, verification and resume.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shardkit.checkpoint.entries import Checkpoint, TensorEntry
from shardkit.errors import FormatError, Malformed
from shardkit.limits import Limits
from shardkit.payloads.codec import HEAD
from shardkit.payloads.compressed import Expanded, Spool
from shardkit.payloads.payload import Extent, Literal, Part, Payload, unreadable
from shardkit.printable import several, shown
from shardkit.sources.zip_directory import DEFLATE, STORED, Member, data_start, read_members

_WINDOW = 64 << 10


class Source:
    r"""A file, or a folder, to be recognised and scanned; many small reads are cheap.

    Functions of a format receive one. They read through it and never open its path, since the
    content may be decompressed or in pieces.

    Attributes:
        path: the file or folder, for messages and for `SourceFile.of`.
        content: the bytes of the file.
        names: the names in a folder, sorted; None for a file.
        limits: safety limits for the file.
        scratch: folder for temporary files; None for the system's.

    Example:
        >>> from pathlib import Path
        >>> from shardkit.plugin import Limits, Source
        >>> source = Source.file(Path("training.pt"), Limits())
        >>> source.head[:4], source.members[0].name
        (b'PK\x03\x04', 'archive/data.pkl')
        >>> pickle = source.peek(source.members[0], 2)
        >>> storage = source.member(source.members[1])  # a payload: read when it is used
        >>> Source.folder(Path("folder"), Limits()).names
        ('config.json', 'model.safetensors')
    """

    def __init__(
        self,
        path: Path,
        content: Payload,
        *,
        names: tuple[str, ...] | None = None,
        limits: Limits,
        scratch: Path | None = None,
    ) -> None:
        """Wrap *content*, the bytes that stand for *path*; `file` and `folder` are simpler.

        Args:
            path: the file or folder, for messages and for `SourceFile.of`.
            content: the bytes to recognise and scan.
            names: the names in a folder; None for a file.
            limits: safety limits for the file.
            scratch: folder for temporary files; None for the system's.
        """
        self.path = path
        self.content = content
        self.names = names
        self.limits = limits
        self.scratch = scratch
        self._window = b""
        self._window_start = 0
        self._members: tuple[Member, ...] | None = None

    @classmethod
    def file(cls, path: Path, limits: Limits, scratch: Path | None = None) -> Source:
        """Open a regular file, which is read in place.

        Raises:
            FormatError: it cannot be opened.
        """
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise unreadable(path, error) from None
        return cls(path, Extent(path, 0, size), limits=limits, scratch=scratch)

    @classmethod
    def folder(cls, path: Path, limits: Limits) -> Source:
        """List a folder: it has no bytes of its own, only names.

        Raises:
            FormatError: it cannot be listed.
        """
        try:
            names = tuple(sorted(entry.name for entry in os.scandir(path)))
        except OSError as error:
            raise unreadable(path, error) from None
        return cls(path, Literal(b""), names=names, limits=limits)

    @property
    def is_folder(self) -> bool:
        return self.names is not None

    @property
    def size(self) -> int:
        """Bytes of the file, after decompression if it is compressed; 0 for a folder."""
        return self.content.nbytes

    @property
    def head(self) -> bytes:
        """The first bytes, at most `HEAD`."""
        return self.read(0, min(HEAD, self.size))

    @property
    def tail(self) -> bytes:
        """The last bytes, at most `HEAD`."""
        count = min(HEAD, self.size)
        return self.read(self.size - count, count)

    @property
    def members(self) -> tuple[Member, ...]:
        """The members of a zip archive in the order of its directory; empty for any other file.

        Raises:
            Malformed: it begins like a zip archive and its directory is broken or missing.
            LimitExceeded: the directory is too large.
        """
        if self._members is None:
            self._members = self._read_members()
        return self._members

    @property
    def is_relabelled_zip(self) -> bool:
        """Whether it is a zip archive but for its first two bytes, which GPT-SoVITS overwrites with
        a version of its own.
        """
        return self.head[:2] != b"PK" and bool(self.members)

    def member(self, member: Member) -> Payload:
        """Describe the content of a zip *member*; a compressed one is decompressed on first use.

        Raises:
            Malformed: its local header is broken, or its compression method is not supported.
        """
        stored = self.content.narrow(data_start(self.path, member, self.read), member.compressed)
        if member.method == STORED:
            return stored
        return Expanded(
            Spool(stored, DEFLATE, self.limits, self.scratch, member.nbytes), 0, member.nbytes
        )

    def peek(self, member: Member, nbytes: int) -> bytes:
        """Read the first *nbytes* bytes of a zip *member*, or all of a shorter one; a compressed
        one is decompressed no further.

        Raises:
            Malformed: as for `member`, or the compressed data is broken.
        """
        start = data_start(self.path, member, self.read)
        if member.method == STORED:
            return self.read(start, min(nbytes, member.nbytes))
        content = bytearray()
        try:
            for piece in DEFLATE.decompress(self._pieces(start, member.compressed)):
                content += piece
                if len(content) >= nbytes:
                    break
        except ValueError as error:
            raise Malformed(
                self.path,
                f"broken {DEFLATE.name} data: {error}",
                where=f"zip member {shown(member.name)}",
            ) from None
        return bytes(content[:nbytes])

    def read(self, start: int, nbytes: int) -> bytes:
        """Read *nbytes* bytes at offset *start*; for headers, never for weights.

        Example:
            >>> from pathlib import Path
            >>> from shardkit.plugin import Limits, Source
            >>> source = Source.file(Path("model.safetensors"), Limits())
            >>> int.from_bytes(source.read(0, 8), "little")  # length of the header
            256

        Raises:
            Malformed: the file ends before.
        """
        if start < 0 or nbytes < 0 or start + nbytes > self.content.nbytes:
            raise Malformed(
                self.path, f"needs {several(nbytes, 'byte')} at {start:,}, and has {self.size:,}"
            )
        at = start - self._window_start
        if at < 0 or at + nbytes > len(self._window):
            self._move_window(start, nbytes)
            at = 0
        return self._window[at : at + nbytes]

    def payload(self, start: int, nbytes: int) -> Payload:
        """Describe the *nbytes* bytes at offset *start* without reading them; for weights.

        Example:
            >>> from pathlib import Path
            >>> from shardkit.plugin import Limits, Source
            >>> Source.file(Path("model.safetensors"), Limits()).payload(264, 128)
            Extent(path=PosixPath('model.safetensors'), start=264, nbytes=128)

        Raises:
            ValueError: the range lies outside the file.
        """
        return self.content.narrow(start, nbytes)

    def _read_members(self) -> tuple[Member, ...]:
        if self.head[:2] == b"PK":
            return read_members(self.path, self.size, self.read, self.limits)
        if self.head[2:4] != b"\3\4":
            return ()
        try:
            members = read_members(self.path, self.size, self.read, self.limits)
        except FormatError:
            return ()
        return members if any(member.header_start == 0 for member in members) else ()

    def _pieces(self, start: int, nbytes: int) -> Iterator[memoryview]:
        stop = start + nbytes
        return (memoryview(self.read(at, min(HEAD, stop - at))) for at in range(start, stop, HEAD))

    def _move_window(self, start: int, nbytes: int) -> None:
        # Headers that stand close together are read ahead; of those far apart, as between large
        # weights, little is read.
        near = 0 <= start - self._window_start - len(self._window) < _WINDOW
        span = min(max(nbytes, _WINDOW if near else HEAD), self.size - start)
        self._window = b"".join(bytes(chunk) for chunk in self.content.narrow(start, span).chunks())
        self._window_start = start


@dataclass(frozen=True, slots=True)
class Format:
    """One file format: the record that a format plugin exports.

    Attributes:
        name: what it is called in messages, `shardkit formats` and `--format`.
        suffixes: endings that its files usually have; a hint for people, and how a writable format
            is chosen for ``-o``.
        sniff: whether a source is of this format, judged by its content; cheap. It may raise only
            the FormatError that `Source.members` raises for a broken zip archive.
        scan: reads the headers. Raises FormatError; it fills in files and notes of the checkpoint,
            the format name is filled in for it.
        lay_out: the parts of a file that holds these entries with this metadata, in order. Raises
            Unwritable. None for a format that is only read.
        api: version of this contract.

    Example:
        A format of one vector: four bytes of magic, then float32 values.

        >>> from pathlib import Path
        >>> from shardkit.plugin import BY_CODE, Checkpoint, Format, Limits, Source, TensorEntry
        >>> def sniff(source: Source) -> bool:
        ...     return source.head[:4] == b"VEC1"
        >>> def scan(source: Source) -> Checkpoint:
        ...     count = (source.size - 4) // 4
        ...     values = source.payload(4, 4 * count)
        ...     return Checkpoint((TensorEntry(("vector",), BY_CODE["F32"], (count,), values),))
        >>> FORMAT = Format("vec", (".vec",), sniff, scan)
        >>> _ = Path("one.vec").write_bytes(b"VEC1" + bytes(12))
        >>> FORMAT.scan(Source.file(Path("one.vec"), Limits()))
        <Checkpoint: 1 tensor, 12 B: 'vector'>
    """

    name: str
    suffixes: tuple[str, ...]
    sniff: Callable[[Source], bool]
    scan: Callable[[Source], Checkpoint]
    lay_out: Callable[[Sequence[TensorEntry], Mapping[str, str]], tuple[Part, ...]] | None = None
    api: int = 1
