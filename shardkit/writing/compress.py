"""Write a file compressed: its frames are compressed in parallel, written in order, and listed at
the end.

Memory is that of the frames in progress, a few for each processor; it is reused for later frames.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from itertools import chain

from shardkit.payloads.codec import Frame
from shardkit.payloads.payload import Part, Payload, Trailer
from shardkit.planning.plan import OutputFile
from shardkit.system.progress import OnBytes
from shardkit.writing.copier import See, write_at


def write_compressed(
    file: OutputFile,
    output: int,
    pool: Executor,
    *,
    ahead: int,
    see: Sequence[See],
    see_stored: Sequence[See],
    on_bytes: OnBytes,
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
    for made, expanded in _in_order(
        file.codec.compress, _seen(_contents(file, ahead), see), pool, ahead
    ):
        at = _put(made, output, at, see_stored)
        frames.append(Frame(at - len(made), len(made), expanded))
        on_bytes(expanded)
    _put(file.codec.table(frames), output, at, see_stored)


def _contents(file: OutputFile, ahead: int) -> Iterator[memoryview]:
    """What each frame of *file* is to hold; its memory is used again for that which comes *ahead*
    frames later.
    """
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
    compress: Callable[[memoryview], bytes],
    contents: Iterable[memoryview],
    pool: Executor,
    ahead: int,
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
