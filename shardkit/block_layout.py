"""How the tensors of a block stand, and in which order blocks come. Pure, and of names and sizes alone.

1. The experts of a block that are stored apart come after the rest of it, each one run of bytes, by their numbers.
2. Every such run begins with the tensors whose length is a multiple of 64 bytes. The others come last, where they put nothing
   out of place: the format knows no gaps.
3. A tensor is aligned to its type whatever the rules above say. Where they do not give it, wide types go first.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate

from shardkit.checkpoint import TensorEntry
from shardkit.named_blocks import Block

ALIGNMENT = 64

_EXPERT = re.compile(r"(.*?expert\w{0,20}?[._])(\d{1,9})(?=\.|$)")
_DEEPEST = 64  # dots at which a name that was recorded is cut


def arranged(block: Block) -> Block:
    """*block* with its tensors in the order in which they are to be written."""
    rest, experts = _experts(block.entries)
    even, odd = _parted(rest)
    entries = [*even, *(entry for expert in experts for part in _parted(expert) for entry in part), *odd]
    if misaligned(entries):
        entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    return replace(block, entries=tuple(entries))


def misaligned(entries: Iterable[TensorEntry], *, at: int = 0) -> bool:
    """Whether one of *entries*, written one after the other from offset *at* on, is out of step with its type."""
    entries = tuple(entries)
    starts = accumulate((entry.nbytes for entry in entries), initial=at)
    return any(start % entry.dtype.itemsize for entry, start in zip(entries, starts, strict=False))


def reordered(blocks: Sequence[Block], names: Iterable[str]) -> tuple[tuple[Block, ...], tuple[Block, ...]]:
    """Those of *blocks* that *names* call, in the order in which they are first called, and those that they do not.

    Args:
        blocks: each name once.
        names: of blocks, of what lies in them, or of modules around them, which call none.
    """
    by_name = {block.name: block for block in blocks}
    called = dict.fromkeys(head for name in names for head in heads(name) if head in by_name)
    return tuple(by_name[name] for name in called), tuple(block for block in blocks if block.name not in called)


def _experts(entries: Iterable[TensorEntry]) -> tuple[list[TensorEntry], list[list[TensorEntry]]]:
    """Those of *entries* that belong to no expert, and those of each expert."""
    rest: list[TensorEntry] = []
    experts: dict[str, dict[int, list[TensorEntry]]] = defaultdict(lambda: defaultdict(list))
    for entry in entries:
        match = _EXPERT.match(entry.name)
        (experts[match[1]][int(match[2])] if match else rest).append(entry)
    return rest, [group[number] for group in experts.values() for number in sorted(group)]


def _parted(entries: Iterable[TensorEntry]) -> tuple[list[TensorEntry], list[TensorEntry]]:
    """The tensors that keep the alignment of what follows them, and the others, wide types first."""
    even: list[TensorEntry] = []
    odd: list[TensorEntry] = []
    for entry in entries:
        (odd if entry.nbytes % ALIGNMENT else even).append(entry)
    return even, sorted(odd, key=lambda entry: -entry.dtype.itemsize)


def heads(name: str) -> Iterable[str]:
    """*name* up to each of its dots, and all of it."""
    steps = name.split(".", _DEEPEST)
    return (".".join(steps[:length]) for length in range(1, len(steps) + 1))
