"""Compressed bytes as payloads, which are read like any other.

1. Without random access they are decompressed once, on first use, to a temporary file that has no
   name (`Expanded`).
2. With a table of frames each frame is decompressed where it is read, and there is no temporary
   file (`Framed`).
3. Equality, hashing and `sources` name the compressed original: a plan made from a `.zst` is the
   same plan the next day.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from shardkit.errors import LimitExceeded, Malformed, OutputError
from shardkit.hints import Hint, output
from shardkit.limits import Limits
from shardkit.payloads.codec import Codec
from shardkit.payloads.payload import CHUNK, Concat, Extent, Payload, check_range, rechunked
from shardkit.payloads.shared_expansion import is_shared, shared_file
from shardkit.printable import shown_path
from shardkit.sizes import format_size
from shardkit.system.fork import begin_again_in_children
from shardkit.system.threads import Exclusive

_RATIO_FROM = 64 << 20


class Spool:
    """The decompressed form of one payload. Equal spools hold equal bytes; any thread may read."""

    def __init__(
        self,
        origin: Payload,
        codec: Codec,
        limits: Limits,
        scratch: Path | None = None,
        promised: int | None = None,
    ) -> None:
        """Prepare; the data is decompressed on first use.

        Args:
            origin: the compressed bytes.
            codec: how they are compressed.
            limits: bounds the decompressed size.
            scratch: folder for the temporary file; None for the system's.
            promised: bytes that it must decompress to; None where no header states it.
        """
        self.origin = origin
        self.codec = codec
        self._promised = promised
        self._limits = limits
        self._scratch = scratch
        self._file: IO[bytes] | None = None
        self._unlock()
        begin_again_in_children(self, Spool._unlock)

    @property
    def path(self) -> Path:
        """The file that holds the compressed bytes."""
        return self.origin.sources[0].path

    def file(self) -> IO[bytes]:
        """Return the decompressed bytes, as an open file without a name.

        Raises:
            Malformed: the stream is broken.
            LimitExceeded: it decompresses to too many bytes.
            OutputError: there is no room for the temporary file.
        """
        return self._exclusive.call(self._expanded)

    def read(self, start: int, nbytes: int) -> bytes:
        """Read at most *nbytes* of the decompressed bytes, from *start* on; fewer only at their
        end.
        """
        file = self.file()
        if hasattr(
            os, "pread"
        ):  # which moves no offset: that is shared with the children of a fork
            return os.pread(file.fileno(), nbytes, start)
        return self._exclusive.call(_read_at, file, start, nbytes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Spool) and (self.origin, self.codec.name) == (
            other.origin,
            other.codec.name,
        )

    def __hash__(self) -> int:
        return hash((self.origin, self.codec.name))

    def __repr__(self) -> str:
        return f"Spool({self.origin!r}, {self.codec.name!r})"

    def __reduce__(self) -> tuple[Any, ...]:  # Any: the pickle protocol's own type
        return Spool, (self.origin, self.codec, self._limits, self._scratch, self._promised)

    def _unlock(self) -> None:
        self._exclusive = Exclusive()

    def _expanded(self) -> IO[bytes]:
        if self._file is None:
            self._file = self._expand()
            weakref.finalize(self, self._file.close)
        return self._file

    def _expand(self) -> IO[bytes]:
        with ExitStack() as undo:
            try:
                if self._scratch is not None and is_shared(self._scratch):
                    return shared_file(self._scratch, self.origin, self.codec.name, self._fill)
                file = undo.enter_context(tempfile.TemporaryFile(dir=self._scratch, buffering=0))
                self._fill(file)
            except ValueError as error:
                raise _broken(self.origin, self.codec, error) from None
            except OSError as error:
                sentence = (
                    f"cannot decompress {shown_path(self.path)} to a temporary file: "
                    f"{error.strerror}"
                )
                raise OutputError(sentence, hint=self._elsewhere()) from None
            undo.pop_all()  # from here on the spool owns the file, which goes when the spool goes
            return file

    def _fill(self, file: IO[bytes]) -> None:
        expanded = 0
        for piece in self.codec.decompress(self.origin.chunks()):
            expanded += len(piece)
            if self._promised is not None and expanded > self._promised:
                raise ValueError(f"decompresses to more than the expected {self._promised:,} bytes")
            _check_limits(self.origin, expanded, self._limits)
            self._check_room(expanded)
            file.write(piece)
        if self._promised is not None and expanded < self._promised:
            raise ValueError(f"decompresses to {expanded:,} bytes, expected {self._promised:,}")

    def _check_room(self, expanded: int) -> None:
        if expanded % (16 * CHUNK) >= CHUNK:
            return
        folder = self._scratch or Path(tempfile.gettempdir())
        free = shutil.disk_usage(folder).free
        if free < 4 * CHUNK:
            raise OutputError(
                f"{shown_path(folder)}: no space to decompress {shown_path(self.path)}: "
                f"{format_size(expanded)} written, {format_size(free)} free",
                hint=self._elsewhere(),
            )

    def _elsewhere(self) -> Hint:
        if self._scratch is None:
            return "free some space, or set TMPDIR to a folder on a larger disk"
        return ("free some space, or choose an output on a larger disk with ", output())


def _read_at(file: IO[bytes], start: int, nbytes: int) -> bytes:
    file.seek(start)
    return file.read(nbytes)


@dataclass(frozen=True, slots=True)
class Expanded:
    r"""A run of decompressed bytes, read from a temporary file.

    `Source.member` returns one for a compressed member of a zip archive. Nothing is decompressed
    before the first read; equality and `sources` refer to the compressed original.

    Attributes:
        spool: the decompressed form of one payload.
        start: offset in the decompressed bytes.
        nbytes: length of the run.

    Example:
        >>> import zipfile
        >>> from pathlib import Path
        >>> from shardkit.plugin import Expanded, Limits, Source, read_all
        >>> with zipfile.ZipFile("a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        ...     archive.writestr("weight", bytes(1000))
        >>> source = Source.file(Path("a.zip"), Limits())
        >>> payload = source.member(source.members[0])
        >>> isinstance(payload, Expanded), payload.nbytes, payload.sources[0].nbytes < 1000
        (True, 1000, True)
        >>> bytes(read_all(payload.narrow(990, 10)))
        b'\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00'
    """

    spool: Spool
    start: int
    nbytes: int

    @property
    def sources(self) -> tuple[Extent, ...]:
        return self.spool.origin.sources

    def narrow(self, start: int, nbytes: int) -> Expanded:
        check_range(start, nbytes, self.nbytes)
        return Expanded(self.spool, self.start + start, nbytes)

    def chunks(self) -> Iterator[memoryview]:
        at, stop = self.start, self.start + self.nbytes
        while at < stop:
            wanted = min(CHUNK, stop - at)
            chunk = self.spool.read(at, wanted)
            if len(chunk) < wanted:  # before it is given out: a short chunk could cut a word
                raise Malformed(
                    self.spool.path, f"decompresses to {at + len(chunk):,} bytes, expected {stop:,}"
                )
            yield memoryview(chunk)
            at += len(chunk)


class LastFrame:
    """The decompressed data of the last frame read, so that many small reads decompress it once;
    any thread may use it.
    """

    def __init__(self) -> None:
        self._held: tuple[Payload, bytes] | None = None

    def content(self, frame: Payload, expand: Callable[[], bytes]) -> bytes:
        """Return the decompressed data of *frame*: the cached one, or the result of *expand*."""
        held = self._held
        if held is None or held[0] != frame:
            held = self._held = (frame, expand())
        return held[1]

    def __reduce__(self) -> tuple[type[LastFrame], tuple[()]]:
        return LastFrame, ()  # a pickle carries no content


@dataclass(frozen=True, slots=True)
class Framed:
    """A run of the bytes that one compressed *frame* holds, decompressed where it is read.

    Attributes:
        frame: the compressed bytes of the frame.
        codec: how they are compressed.
        whole: length of the decompressed frame, in bytes.
        start: offset of the run in the decompressed frame.
        nbytes: length of the run.
        last: cache of the frame decompressed last, shared by the payloads of one file.

    Example:
        >>> from shardkit.plugin import Framed, Literal, read_all
        >>> frame = CODEC.compress(memoryview(b"weights of a layer"))
        >>> payload = Framed(Literal(frame), CODEC, whole=18, start=0, nbytes=18)
        >>> bytes(read_all(payload.narrow(11, 7)))
        b'a layer'
        >>> b"".join(map(bytes, payload.pieces()))
        b'weights of a layer'
    """

    frame: Payload
    codec: Codec
    whole: int
    start: int
    nbytes: int
    last: LastFrame = field(default_factory=LastFrame, compare=False, repr=False)

    @property
    def sources(self) -> tuple[Extent, ...]:
        return self.frame.sources

    def narrow(self, start: int, nbytes: int) -> Framed:
        check_range(start, nbytes, self.nbytes)
        return replace(self, start=self.start + start, nbytes=nbytes)

    def chunks(self) -> Iterator[memoryview]:
        if self.whole > CHUNK:
            yield from rechunked(self.pieces(), self.nbytes)
        elif self.nbytes:
            content = self.last.content(
                self.frame, lambda: b"".join(replace(self, start=0, nbytes=self.whole).pieces())
            )
            yield memoryview(content)[self.start : self.start + self.nbytes]

    def pieces(self, compressed: Iterable[memoryview] | None = None) -> Iterator[memoryview]:
        """Yield the bytes in pieces of any length, which may cut elements; none of them is cached.

        Args:
            compressed: the bytes of the frame, if they have been read by other means.
        """
        at, stop = 0, self.start + self.nbytes
        try:
            for piece in self.codec.decompress(
                self.frame.chunks() if compressed is None else compressed
            ):
                yield memoryview(piece)[max(0, self.start - at) : max(0, stop - at)]
                at += len(piece)
                if at > self.whole or (at >= stop and stop < self.whole):
                    break
        except ValueError as error:
            raise _broken(self.frame, self.codec, error) from None
        if at > self.whole or at < stop:
            lie = f"its table gives {self.whole:,} bytes for a frame that has another length"
            raise _broken(self.frame, self.codec, ValueError(lie))


def expansion(
    origin: Payload, codec: Codec, limits: Limits, scratch: Path | None = None
) -> Payload:
    """Decompress all of *origin*: in place if it has a table of frames, otherwise now.

    Raises:
        Malformed: the stream or its table is broken.
        LimitExceeded: it decompresses to too many bytes.
        OutputError: there is no room for the temporary file.
    """
    try:
        frames = codec.frames(origin)
        _check_limits(origin, sum(frame.expanded for frame in frames), limits)
        bearing = [
            (origin.narrow(each.start, each.nbytes), each.expanded)
            for each in frames
            if each.expanded
        ]
    except ValueError as error:
        raise _broken(origin, codec, error) from None
    if frames:
        last = LastFrame()
        return Concat(
            tuple(Framed(frame, codec, whole, 0, whole, last) for frame, whole in bearing)
        )
    return expanded_whole(origin, codec, limits, scratch)


def expanded_whole(
    origin: Payload, codec: Codec, limits: Limits, scratch: Path | None = None
) -> Expanded:
    """Decompress all of *origin* now, since its length is not known before."""
    spool = Spool(origin, codec, limits, scratch)
    return Expanded(spool, 0, os.fstat(spool.file().fileno()).st_size)


def _check_limits(origin: Payload, expanded: int, limits: Limits) -> None:
    path = origin.sources[0].path
    if expanded > limits.expanded_bytes:
        message = f"decompresses to more than {format_size(limits.expanded_bytes)}"
        raise LimitExceeded(path, message, limit="expanded_bytes", actual=expanded)
    ratio = expanded // max(1, origin.nbytes)
    if expanded > _RATIO_FROM and ratio > limits.ratio:
        message = f"decompresses to more than {limits.ratio} times its size, which no weights do"
        raise LimitExceeded(path, message, limit="ratio", actual=ratio + 1)


def _broken(origin: Payload, codec: Codec, error: ValueError) -> Malformed:
    return Malformed(
        origin.sources[0].path, f"broken {codec.name} data: {error}", hint="download the file again"
    )
