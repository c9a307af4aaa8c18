"""Payloads that lie one behind the other, as one: a shard of many small tensors is then one copy,
and weights that lie close together in a file are one read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from shardkit.payloads.compressed import Expanded, Framed
from shardkit.payloads.payload import Concat, Extent, Payload


def follows(left: Payload, right: Payload, *, gap: int = 0) -> bool:
    """Whether *right* begins where *left* ends, or at most *gap* bytes behind that: in the same
    file, or in what the same compressed data expands to.

    >>> from pathlib import Path
    >>> first, second = Extent(Path("x"), 0, 8), Extent(Path("x"), 64, 16)
    >>> follows(first, second), follows(first, second, gap=56), follows(second, first, gap=56)
    (False, True, False)
    """
    match left, right:
        # Paths are compared last, and only where they are two: that takes the longest.
        case Extent(), Extent():
            is_near = 0 <= right.start - left.start - left.nbytes <= gap
            return is_near and (left.path is right.path or left.path == right.path)
        case Expanded(), Expanded():
            is_near = 0 <= right.start - left.start - left.nbytes <= gap
            return is_near and left.spool == right.spool
        case Framed(), Framed():
            is_near = 0 <= right.start - left.start - left.nbytes <= gap
            return is_near and left.frame == right.frame
    return False


def coalesced(payloads: Iterable[Payload]) -> Iterator[Payload]:
    """Merge adjacent *payloads*: runs of one file that touch become one, and empty ones are
    dropped.

    Args:
        payloads: in order; nested `Concat` values are flattened.

    Yields:
        Payloads with the same bytes in the same order, each as long as it can be.

    Example:
        >>> from pathlib import Path
        >>> from shardkit.plugin import Extent, coalesced
        >>> file = Path("model.safetensors")
        >>> runs = [Extent(file, 0, 8), Extent(file, 8, 100), Extent(file, 300, 4)]
        >>> [(run.start, run.nbytes) for run in coalesced(runs)]
        [(0, 108), (300, 4)]
    """
    run: Payload | None = None
    for part in _flat(payloads):
        if run is not None and follows(run, part):
            assert isinstance(run, Extent | Expanded | Framed)
            run = replace(run, nbytes=run.nbytes + part.nbytes)
            continue
        if run is not None:
            yield run
        run = part
    if run is not None:
        yield run


def _flat(payloads: Iterable[Payload]) -> Iterator[Payload]:
    for payload in payloads:
        if isinstance(payload, Concat):
            yield from _flat(payload.parts)
        elif payload.nbytes:
            yield payload
