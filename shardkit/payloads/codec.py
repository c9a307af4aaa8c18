"""Codec: what a compression plugin exports."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from shardkit.payloads.payload import Payload

HEAD = 4096  # bytes of a file that `Codec.sniff` is given


@dataclass(frozen=True, slots=True)
class Frame:
    """A run of compressed bytes that can be decompressed without the bytes before it.

    Attributes:
        start: offset of the frame in the compressed file, in bytes.
        nbytes: length of the frame, in bytes.
        expanded: length of its decompressed data, in bytes.

    Example:
        A codec reports one for each member of a multi-frame file; see `Codec`.

        >>> from shardkit.plugin import Frame
        >>> frames = (Frame(0, 2_000_000, 8 << 20), Frame(2_000_000, 1_500_000, 5 << 20))
        >>> sum(frame.expanded for frame in frames)
        13631488
    """

    start: int
    nbytes: int
    expanded: int


def no_frames(payload: Payload) -> tuple[Frame, ...]:
    """Stand for *frames* of a codec that writes no table of its frames."""
    return ()


def no_table(frames: Sequence[Frame]) -> bytes:
    """Stand for *table* of a codec that writes none."""
    return b""


@dataclass(frozen=True, slots=True)
class Codec:
    r"""One compression method: the record that a codec plugin exports.

    Attributes:
        name: what it is called, as in ``zstd``.
        suffix: what is added to the file's name, as in ``.zst``; a hint only.
        sniff: whether the first bytes of a file (`HEAD`, 4096, at most) are of this codec.
        decompress: compressed pieces in, decompressed pieces of any length out; a piece is valid
            until the next. Raises ValueError with a sentence if the stream is broken or ends early.
            Must not decompress more than a few MB ahead.
        frames: the frames of a complete compressed file, in order; empty where it has no table of
            them. Raises ValueError with a sentence if the table is broken.
        compress: up to 8 MiB → a frame that decompresses to them on its own; the same bytes always,
            and from any thread. None for a codec that is only read.
        table: what a file of these frames, one after the other from its first byte on, ends in, so
            that *frames* finds them.
        api: version of this contract.

    Example:
        >>> import zlib
        >>> from shardkit.plugin import Codec
        >>> def decompress(pieces):
        ...     stream = zlib.decompressobj()
        ...     for piece in pieces:
        ...         yield stream.decompress(piece)
        ...     if not stream.eof:
        ...         raise ValueError("the stream ends early")
        >>> CODEC = Codec("zlib", ".zz", lambda head: head[:2] == b"\x78\x9c", decompress)
        >>> b"".join(CODEC.decompress([memoryview(zlib.compress(b"weights"))]))
        b'weights'
    """

    name: str
    suffix: str
    sniff: Callable[[bytes], bool]
    decompress: Callable[[Iterable[memoryview]], Iterator[bytes]]
    frames: Callable[[Payload], tuple[Frame, ...]] = no_frames
    compress: Callable[[memoryview], bytes] | None = None
    table: Callable[[Sequence[Frame]], bytes] = no_table
    api: int = 1
