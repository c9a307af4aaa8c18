"""What every format keeps when a file is not whole: cut off or changed anywhere, it gives a
sentence and nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from shardkit.errors import FormatError, ShardkitError
from shardkit.limits import Limits
from shardkit.payloads.payload import Extent, Literal
from shardkit.sources.format import Format, Source
from shardkit.testing.payloads import Watched, expect
from shardkit.testing.sources import claims, saying

_SWEPT = 4096
_ROUNDS = 300  # fewer for large samples
_READ = 16 << 20


def check_truncation(candidate: Format, sample: Path) -> None:
    """Wherever the file is cut off, scan raises FormatError; of more than 4 KiB, at the ends and
    here and there between.
    """
    if sample.is_dir():
        return
    size = sample.stat().st_size
    for nbytes in places(size):
        source = Source(sample, Extent(sample, 0, nbytes), limits=Limits())
        with saying(f"{sample.name} cut off after {nbytes:,} of {size:,} bytes"):
            claims(candidate, source, "it")
            expect(
                not _is_scanned(candidate, source),
                "scan took it for whole, and must raise FormatError",
            )


def check_damage(candidate: Format, sample: Path) -> None:
    """Bytes changed at random give a ShardkitError or a checkpoint, from sniff, scan and read
    alike; nothing else comes out.
    """
    if sample.is_dir():
        return
    content = sample.read_bytes()
    for damage in damages(content):
        damaged = changed(content, damage)
        with saying(f"{sample.name} with the bytes {damage} (position: value)"):
            _read_any(candidate, Source(sample, Watched(sample, Literal(damaged)), limits=Limits()))


def places(size: int) -> Iterator[int]:
    """Every length below *size*, or of many those near the ends and some between."""
    if size <= _SWEPT:
        yield from range(size)
    else:
        edge = _SWEPT // 8
        yield from range(edge)
        yield from range(edge, size - edge, (size - 2 * edge) // edge)
        yield from range(size - edge, size)


def damages(content: bytes) -> Iterator[dict[int, int]]:
    """A few changed bytes by their positions, many times; near the ends, where headers are, more
    often than between.
    """
    dice = random.Random(len(content))  # the same damage each time
    for _ in range(_ROUNDS if len(content) <= _SWEPT else _ROUNDS // 10):
        low, high = dice.choice(((0, 64), (0, 1024), (-1024, 0), (0, len(content))))
        positions = [
            dice.randrange(low, high) % len(content) for _ in range(dice.choice((1, 1, 2, 4)))
        ]
        yield {
            at: dice.choice((0, 0xFF, content[at] ^ 1 << dice.randrange(8), dice.randrange(256)))
            for at in positions
        }


def changed(content: bytes, damage: dict[int, int]) -> bytes:
    """*content* with other bytes at some positions."""
    damaged = bytearray(content)
    for at, value in damage.items():
        damaged[at] = value
    return bytes(damaged)


def _is_scanned(candidate: Format, source: Source) -> bool:
    try:
        candidate.scan(source)
    except FormatError:
        return False
    return True


def _read_any(candidate: Format, source: Source) -> None:
    claims(candidate, source, "it")
    try:
        for entry in candidate.scan(source).tensors:
            if entry.nbytes <= _READ:
                entry.read()
    except ShardkitError as error:
        expect(bool(str(error)), f"a {type(error).__name__} without a sentence came out")
