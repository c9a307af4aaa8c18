"""zstd: read as a stream of frames, or frame by frame where the file ends in a table of them;
written with such a table.

1. The layout of frames and blocks is read here (RFC 8878, sections 3.1.1 and 3.1.2), and the
   decompressor is given a few blocks at a time. A block decompresses to 128 KiB at most, so memory
   is bounded whatever the file says, and a file that ends early, or continues with something else,
   is recognised.
2. The table is that of the standard seekable format (zstd/contrib/seekable_format): a skippable
   frame at the end, which any zstd reader may ignore.
3. Each written frame has a checksum, which every decompressor checks. The level is zstd's own
   default: higher levels do not compress weights further.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from struct import Struct, iter_unpack
from typing import TYPE_CHECKING

from shardkit.plugin import CHUNK, Codec, Frame, Payload, PluginError, read_all

if TYPE_CHECKING:
    from zstandard import ZstdCompressor, ZstdDecompressor

_MAGIC = bytes.fromhex("28b52ffd")
_SKIPPABLE = bytes.fromhex("2a4d18")  # after a byte from 0x50 to 0x5f
_LARGEST_WINDOW = 128 << 20  # the default limit of `zstd -d`
_BLOCKS_AT_ONCE = (
    2  # few, so that the memory for them is still in the processor's cache, and is used again
)
_RLE = 1
_LEVEL = 3
_TABLE_FRAME = b"\x5e" + _SKIPPABLE

_TABLE_MAGIC = bytes.fromhex("b1ea928f")
_FOOTER = Struct("<IB4s")
_LINE = Struct("<II")
_HAS_CHECKSUMS = 0x80
_RESERVED_BITS = 0x7C
_MOST_FRAMES = (
    2_000_000  # a longer table is not worth its memory: the file is expanded as one stream
)


def sniff(head: bytes) -> bool:
    """Whether the first bytes are a zstd frame, or a skippable one as it may stand before."""
    return head.startswith(_MAGIC) or _is_skippable(head[:4])


def decompress(pieces: Iterable[memoryview]) -> Iterator[bytes]:
    """The expansion of all frames, in pieces of about 256 KiB at most.

    Raises:
        ValueError: the stream is broken or ends early.
        PluginError: the package zstandard is not there.
    """
    decompressor, _idle.decompressor = _idle.decompressor or _decompressor(), None
    stream = _Stream(pieces)
    expanded = 0
    while not stream.at_end():
        magic = stream.take(4)
        if magic == _MAGIC:
            for piece in _expanded(stream, decompressor):
                expanded += len(piece)
                yield piece
        elif _is_skippable(magic):
            stream.skip(int.from_bytes(stream.take(4), "little"))
        else:
            raise ValueError(
                f"{magic.hex(' ')} at byte {stream.taken - 4:,} is not the start of a frame"
            )
    if expanded <= CHUNK:  # so much of its memory has been touched at most
        _idle.decompressor = decompressor


def frames(payload: Payload) -> tuple[Frame, ...]:
    """The frames that the table at the end of *payload* lists; none where there is no table.

    Raises:
        ValueError: the table does not agree with the file.
    """
    if payload.nbytes < _FOOTER.size:
        return ()
    count, flags, magic = _FOOTER.unpack(
        read_all(payload.narrow(payload.nbytes - _FOOTER.size, _FOOTER.size))
    )
    if magic != _TABLE_MAGIC or count > _MOST_FRAMES:
        return ()
    if flags & _RESERVED_BITS:
        raise ValueError("its table of frames uses a reserved flag")
    width = "<II4x" if flags & _HAS_CHECKSUMS else "<II"
    table = _table(payload, count * Struct(width).size)
    sizes = list(iter_unpack(width, table))
    stops = accumulate(compressed for compressed, _ in sizes)
    listed = tuple(
        Frame(stop - nbytes, nbytes, expanded)
        for (nbytes, expanded), stop in zip(sizes, stops, strict=True)
    )
    end = listed[-1].start + listed[-1].nbytes if listed else 0
    before = payload.nbytes - len(table) - _FOOTER.size - 8
    if end != before:
        raise ValueError(
            f"its table lists frames of {end:,} bytes, and the file has {before:,} before the table"
        )
    return listed


def compress(content: memoryview) -> bytes:
    """*content* as one frame.

    Raises:
        PluginError: the package zstandard is not there.
    """
    return _compressor().compress(
        content
    )  # one for each call: its state is no matter of several threads


def table(frames: Sequence[Frame]) -> bytes:
    """The skippable frame that lists *frames*."""
    lines = b"".join(_LINE.pack(frame.nbytes, frame.expanded) for frame in frames)
    footer = _FOOTER.pack(len(frames), 0, _TABLE_MAGIC)
    return _TABLE_FRAME + (len(lines) + len(footer)).to_bytes(4, "little") + lines + footer


CODEC = Codec(
    name="zstd",
    suffix=".zst",
    sniff=sniff,
    decompress=decompress,
    frames=frames,
    compress=compress,
    table=table,
)


class _Idle(threading.local):
    """A decompressor of each thread that nobody uses: its memory, a window of the frame, need not
    be touched anew.
    """

    decompressor: ZstdDecompressor | None = None


_idle = _Idle()


class _Stream:
    """Bytes out of pieces of any length."""

    def __init__(self, pieces: Iterable[memoryview]) -> None:
        self._pieces = iter(pieces)
        self._piece = memoryview(b"")
        self.taken = 0

    def at_end(self) -> bool:
        while not self._piece:
            piece = next(self._pieces, None)
            if piece is None:
                return True
            self._piece = piece
        return False

    def take(self, count: int) -> bytes:
        """The next *count* bytes."""
        return b"".join(bytes(part) for part in self._parts(count))

    def skip(self, count: int) -> None:
        """Go past the next *count* bytes."""
        for _ in self._parts(count):
            pass

    def _parts(self, count: int) -> Iterator[memoryview]:
        while count:
            if self.at_end():
                raise ValueError(f"it ends at byte {self.taken:,}, inside a frame")
            part, self._piece = self._piece[:count], self._piece[count:]
            count -= len(part)
            self.taken += len(part)
            yield part


def _expanded(stream: _Stream, decompressor: ZstdDecompressor) -> Iterator[bytes]:
    """What one frame expands to; its magic is taken already."""
    from zstandard import ZstdError

    start = stream.taken - 4
    frame = decompressor.decompressobj()
    try:
        for part in _frame_parts(stream):
            if expanded := frame.decompress(part):
                yield expanded
    except ZstdError as error:
        reason = (
            str(error)
            .removeprefix("zstd decompressor error: ")
            .removeprefix("zstd decompress error: ")
        )
        raise ValueError(f"the frame at byte {start:,}: {reason}") from None
    if not frame.eof:
        raise ValueError(f"the frame at byte {start:,} does not end where its blocks do")


def _frame_parts(stream: _Stream) -> Iterator[bytes]:
    """The bytes of one frame, a few blocks at a time."""
    descriptor = stream.take(1)
    single_segment, has_checksum = descriptor[0] >> 5 & 1, descriptor[0] >> 2 & 1
    size_field = (single_segment, 2, 4, 8)[descriptor[0] >> 6]
    dictionary_field = (0, 1, 2, 4)[descriptor[0] & 3]
    yield _MAGIC + descriptor + stream.take((1 - single_segment) + dictionary_field + size_field)
    blocks: list[bytes] = []
    is_last = 0
    while not is_last:
        block = stream.take(3)
        is_last, kind, nbytes = (
            block[0] & 1,
            block[0] >> 1 & 3,
            int.from_bytes(block, "little") >> 3,
        )
        blocks += block, stream.take(1 if kind == _RLE else nbytes)
        if len(blocks) >= 2 * _BLOCKS_AT_ONCE or is_last:
            yield b"".join(blocks)
            blocks.clear()
    if has_checksum:
        yield stream.take(4)


def _table(payload: Payload, nbytes: int) -> bytes:
    whole = nbytes + _FOOTER.size + 8
    if whole > payload.nbytes:
        raise ValueError(
            f"its table of frames takes {whole:,} bytes, and the file has {payload.nbytes:,}"
        )
    content = bytes(read_all(payload.narrow(payload.nbytes - whole, 8 + nbytes)))
    if not _is_skippable(content[:4]) or int.from_bytes(content[4:8], "little") != whole - 8:
        raise ValueError("its table of frames does not begin where it should")
    return content[8:]


def _is_skippable(magic: bytes) -> bool:
    return len(magic) == 4 and magic[0] >> 4 == 5 and magic[1:] == _SKIPPABLE


def _decompressor() -> ZstdDecompressor:
    with _package_told():
        from zstandard import ZstdDecompressor
    return ZstdDecompressor(max_window_size=_LARGEST_WINDOW)


def _compressor() -> ZstdCompressor:
    with _package_told():
        from zstandard import ZstdCompressor
    return ZstdCompressor(_LEVEL, write_checksum=True, write_content_size=True)


@contextmanager
def _package_told() -> Iterator[None]:
    try:
        yield
    except ImportError:
        hint = "pip install zstandard"
        raise PluginError(
            "shardkit", "shardkit.codecs:zstd", "needs the package zstandard", hint=hint
        ) from None
