"""Merge adjacent payloads: a shard of many small tensors is then one copy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from shardkit.payloads.compressed import Expanded, Framed
from shardkit.payloads.payload import Concat, Extent, Payload


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
        longer = run and _joined(run, part)
        if run and longer is None:
            yield run
        run = longer or part
    if run:
        yield run


def _flat(payloads: Iterable[Payload]) -> Iterator[Payload]:
    for payload in payloads:
        if isinstance(payload, Concat):
            yield from _flat(payload.parts)
        elif payload.nbytes:
            yield payload


def _joined(left: Payload, right: Payload) -> Payload | None:
    match left, right:
        case Extent(), Extent() if (
            left.start + left.nbytes == right.start and left.path == right.path
        ):
            return Extent(left.path, left.start, left.nbytes + right.nbytes)
        case Expanded(), Expanded() if (
            left.start + left.nbytes == right.start and left.spool == right.spool
        ):
            return Expanded(left.spool, left.start, left.nbytes + right.nbytes)
        case Framed(), Framed() if (
            left.start + left.nbytes == right.start and left.frame == right.frame
        ):
            return replace(left, nbytes=left.nbytes + right.nbytes)
    return None
