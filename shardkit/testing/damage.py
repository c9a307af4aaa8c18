"""The rule for damaged files: truncated or changed anywhere, they raise a ShardkitError and nothing
else.
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
    """Check that scan raises FormatError wherever the file is truncated.

    Files of up to 4 KiB are cut at every byte; longer ones at both ends, and in places between.

    Args:
        candidate: the record that the plugin exports.
        sample: a small file of the format; a folder is skipped.

    Raises:
        AssertionError: an incomplete file was accepted, or another exception was raised.

    Example:
        >>> from pathlib import Path
        >>> from shardkit.testing import check_truncation
        >>> check_truncation(FORMAT, Path("model.safetensors"))
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
                "scan accepted it, and must raise FormatError",
            )


def check_damage(candidate: Format, sample: Path) -> None:
    """Check that a file with bytes changed at random gives a ShardkitError or a checkpoint.

    The bytes are the same in each run. Sniff, scan and reading of weights are checked.

    Args:
        candidate: the record that the plugin exports.
        sample: a small file of the format; a folder is skipped.

    Raises:
        AssertionError: another exception was raised; the message names the changed bytes.

    Example:
        >>> from pathlib import Path
        >>> from shardkit.testing import check_damage
        >>> check_damage(FORMAT, Path("model.safetensors"))
    """
    if sample.is_dir():
        return
    content = sample.read_bytes()
    for damage in damages(content):
        damaged = changed(content, damage)
        with saying(f"{sample.name} with the bytes {damage} (position: value)"):
            _read_any(candidate, Source(sample, Watched(sample, Literal(damaged)), limits=Limits()))


def places(size: int) -> Iterator[int]:
    """Yield every length below *size*; for large sizes, those near the ends and some between."""
    if size <= _SWEPT:
        yield from range(size)
    else:
        edge = _SWEPT // 8
        yield from range(edge)
        yield from range(edge, size - edge, (size - 2 * edge) // edge)
        yield from range(size - edge, size)


def damages(content: bytes) -> Iterator[dict[int, int]]:
    """Yield sets of changed bytes by their positions; near the ends, where headers are, more often
    than between.
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
    """Return *content* with other bytes at some positions."""
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
