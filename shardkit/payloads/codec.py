"""Codec: what a compression plugin exports."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from shardkit.payloads.payload import Payload

HEAD = 4096  # bytes of a file that `Codec.sniff` is given


@dataclass(frozen=True, slots=True)
class Frame:
    """A run of compressed bytes that can be expanded without those before it.

    Attributes:
        start: first byte of the frame in the compressed file.
        nbytes: length of the frame.
        expanded: length of what it expands to.
    """

    start: int
    nbytes: int
    expanded: int


def no_frames(payload: Payload) -> tuple[Frame, ...]:
    """For a codec that keeps no table of its frames."""
    return ()


def no_table(frames: Sequence[Frame]) -> bytes:
    """For a codec that keeps none: its frames are found by reading through them."""
    return b""


@dataclass(frozen=True, slots=True)
class Codec:
    """One way to compress a file.

    Attributes:
        name: what it is called, as in ``zstd``.
        suffix: what is added to the file's name, as in ``.zst``; a hint only.
        sniff: whether the first bytes of a file (`HEAD`, 4096, at most) are of this codec.
        decompress: compressed pieces in, expanded pieces of any length out; a piece is valid until
            the next. Raises ValueError with a sentence if the stream is broken or ends early. Must
            not expand more than a few MB ahead.
        frames: the frames of a whole compressed file, in order; empty where it keeps no table of
            them. Raises ValueError with a sentence if the table is broken.
        compress: up to 8 MiB → a frame that expands to them on its own; the same bytes always, and
            from any thread. None for a codec that is only read.
        table: what a file of these frames, one after the other from its first byte on, ends in, so
            that *frames* finds them.
        api: version of this contract.
    """

    name: str
    suffix: str
    sniff: Callable[[bytes], bool]
    decompress: Callable[[Iterable[memoryview]], Iterator[bytes]]
    frames: Callable[[Payload], tuple[Frame, ...]] = no_frames
    compress: Callable[[memoryview], bytes] | None = None
    table: Callable[[Sequence[Frame]], bytes] = no_table
    api: int = 1
