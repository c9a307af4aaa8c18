"""Write a file compressed: its frames made side by side, put down in their order, and listed at the end.

Memory is that of the frames under way, a few for each processor; it is used again for those that follow.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from shardkit.payloads.codec import Codec, Frame
from shardkit.payloads.payload import Extent, Part, Payload, Trailer
from shardkit.planning.plan import OutputFile
from shardkit.system.progress import OnBytes
from shardkit.writing.copier import See, write_at

_SAMPLE = 64 << 20  # of expanded bytes, to tell how fast they expand


@dataclass(frozen=True, slots=True)
class Saving:
    """What compression came to.

    Attributes:
        stored: bytes of the files as they lie on the disk.
        expanded: bytes that they expand to.
        rate: bytes that one processor of this machine expands in a second.
    """

    stored: int
    expanded: int
    rate: int

    @property
    def pays_below(self) -> int:
        """Bytes per second of a disk from which reading and then expanding, in one thread, takes as long as reading it all."""
        return int(self.rate * max(0, self.expanded - self.stored) / self.expanded) if self.expanded else 0


def write_compressed(
    file: OutputFile, output: int, pool: Executor, *, ahead: int, see: Sequence[See], see_stored: Sequence[See], on_bytes: OnBytes
) -> None:
    """Write *file* into an open, empty one.

    Args:
        file: what to write.
        output: its file descriptor.
        pool: compresses frames.
        ahead: frames that are in it at a time.
        see: called with the bytes of the file as they pass.
        see_stored: called with what they become.
        on_bytes: called with the number of bytes of the file after each step.

    Raises:
        FormatError: a source cannot be read.
        OSError: the output cannot be written.
    """
    assert file.codec is not None
    assert file.codec.compress is not None
    frames: list[Frame] = []
    at = 0
    for made, expanded in _in_order(file.codec.compress, _seen(_contents(file, ahead), see), pool, ahead):
        at = _put(made, output, at, see_stored)
        frames.append(Frame(at - len(made), len(made), expanded))
        on_bytes(expanded)
    _put(file.codec.table(frames), output, at, see_stored)


def saving(paths: Iterable[Path], codec: Codec) -> Saving:
    """What the files *paths*, written by `write_compressed`, save; expands a part of the largest to time it.

    Raises:
        FormatError: one cannot be read.
    """
    stored = [Extent(path, 0, path.stat().st_size) for path in paths]
    frames = {extent: codec.frames(extent) for extent in stored}
    expanded = sum(frame.expanded for each in frames.values() for frame in each)
    largest = max(stored, key=lambda extent: extent.nbytes)
    return Saving(sum(extent.nbytes for extent in stored), expanded, _rate(largest, frames[largest], codec))


def _rate(file: Payload, frames: Sequence[Frame], codec: Codec) -> int:
    step = 1 + sum(frame.expanded for frame in frames) // _SAMPLE
    sampled, begun = 0, time.thread_time()
    for frame in frames[::step]:
        for piece in codec.decompress(file.narrow(frame.start, frame.nbytes).chunks()):
            sampled += len(piece)
    return int(sampled / max(time.thread_time() - begun, 1e-6))


def _contents(file: OutputFile, ahead: int) -> Iterator[memoryview]:
    """What each frame of *file* is to hold; its memory is used again for that which comes *ahead* frames later."""
    chunks = chain.from_iterable(_payload(part).chunks() for part in file.parts)
    ring = [memoryview(bytearray(max(file.frames, default=0))) for _ in range(ahead)]
    rest = nothing = memoryview(b"")
    for number, nbytes in enumerate(file.frames):
        content, filled = ring[number % ahead][:nbytes], 0
        while filled < nbytes:
            if not rest:
                rest = taken = nothing  # which lets go of a chunk before the next one is made
                rest = next(chunks)
            taken = rest[: nbytes - filled]
            content[filled : filled + len(taken)] = taken
            rest = rest[len(taken) :]
            filled += len(taken)
        yield content


def _payload(part: Part) -> Payload:
    assert not isinstance(part, Trailer)
    return part


def _seen(contents: Iterable[memoryview], see: Sequence[See]) -> Iterator[memoryview]:
    for content in contents:
        for each in see:
            each(content)
        yield content


def _in_order(
    compress: Callable[[memoryview], bytes], contents: Iterable[memoryview], pool: Executor, ahead: int
) -> Iterator[tuple[bytes, int]]:
    """What each of *contents* becomes, and its length, as many made at a time as *ahead* says."""
    under_way: deque[tuple[Future[bytes], int]] = deque()
    try:
        for content in contents:
            under_way.append((pool.submit(compress, content), len(content)))
            if len(under_way) == ahead:
                made, nbytes = under_way.popleft()
                yield made.result(), nbytes
        for made, nbytes in under_way:
            yield made.result(), nbytes
    finally:
        for made, _ in under_way:
            made.cancel()


def _put(content: bytes, output: int, at: int, see: Sequence[See]) -> int:
    """Write *content* at *at*, and give where it ends."""
    for each in see:
        each(memoryview(content))
    write_at(output, content, at)
    return at + len(content)
