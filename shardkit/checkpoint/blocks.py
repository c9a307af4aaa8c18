"""Blocks: which tensors of a checkpoint run together, in which order, and how each block is laid
out. Names and sizes decide.

1. The first number in a name ends the name of its block, as in ``model.layers.3``: experts belong
   to their layer.
2. A block of more than half of all bytes is a wrapper, if there are numbers inside it: the next
   number counts then, as in ``0.auto_model.encoder.layer.3``.
3. Without a number, the block is the module, as in ``lm_head``; one with tensors of its own
   includes the modules below it. A tensor beside blocks is a block of its own.
4. Blocks come in the order of the file, those of one module together and numbered ones by their
   numbers. A file that is sorted by name does not show the order in which blocks run; there, words
   in their names decide.
5. Inside a block, each expert is contiguous, and tensors that would break the alignment of the next
   come last.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from shardkit.alignment import ALIGNMENT
from shardkit.checkpoint.entries import TensorEntry
from shardkit.errors import PlanError
from shardkit.printable import listed, shown

Steps = tuple[str, ...]  # a name, cut at its dots

# dots at which a name is cut, so that a name of a million dots is no path of a million steps
_DEEPEST = 64

# In the order in which such parts are run.
_SIDES = (re.compile(r"encoder|vision|down_"), re.compile(r"decoder|up_"))
_INPUT = re.compile(r"emb|wte|wpe|shared|token|(^|[._])(stem|conv_in)")
_NORM = re.compile(r"norm|(^|[._])ln")
_OUTPUT = re.compile(r"head|classifier|score|pooler|_out$|(^|[._])(out|output|cls)([._]|$)")


@dataclass(frozen=True, slots=True)
class BlockEntries:
    """Tensors that are run as one.

    Attributes:
        name: the part of their names that they have in common.
        entries: the tensors, in the order of the file.
    """

    name: str
    entries: tuple[TensorEntry, ...]

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)


def named_blocks(
    entries: Iterable[TensorEntry], no_split: re.Pattern[str] | None = None
) -> tuple[BlockEntries, ...]:
    """All *entries* as blocks, in the order in which they are likely to be run.

    Args:
        entries: the tensors, each name once.
        no_split: what is found in the name of a module, up to one of its dots or its end, makes
            that module a block.
    """
    entries = tuple(entries)
    paths = {entry.name: tuple(entry.name.split(".", _DEEPEST)) for entry in entries}
    chosen = _chosen(paths.values(), no_split) if no_split else {}
    rest = [entry for entry in entries if paths[entry.name] not in chosen]
    numbered = _numbered(
        {paths[entry.name]: entry.nbytes for entry in rest}, sum(entry.nbytes for entry in entries)
    )
    homes = chosen | numbered
    homes |= _modules([path for path in paths.values() if path not in homes], set(homes.values()))
    found: dict[Steps, list[TensorEntry]] = defaultdict(list)
    for entry in entries:
        found[homes[paths[entry.name]]].append(entry)
    in_order = _by_words(_by_tree(found)) if _says_nothing(entries) else _by_tree(found)
    return tuple(BlockEntries(".".join(path), tuple(found[path])) for path in in_order)


def refuse_unfound(no_split: re.Pattern[str] | None, entries: Iterable[TensorEntry]) -> None:
    """Raise PlanError where the pattern *no_split* is found in the name of no module of *entries*,
    and so does nothing.
    """
    entries = tuple(entries)
    if no_split is None or _chosen(
        [tuple(entry.name.split(".", _DEEPEST)) for entry in entries], no_split
    ):
        return
    found = [shown(block.name) for block in named_blocks(entries)]
    raise PlanError(
        (f"{shown(no_split.pattern)} matches no module name, so it selects no blocks"),
        hint=f"without it, the blocks are {listed(found)}",
    )


def runs_of_names(names: Iterable[str]) -> Iterator[list[str]]:
    """*names* in pieces, those in one that are numbered one after the other."""
    run: list[str] = []
    for name in names:
        if run and not _follows(run[-1], name):
            yield run
            run = []
        run.append(name)
    if run:
        yield run


def _chosen(paths: Iterable[Steps], no_split: re.Pattern[str]) -> dict[Steps, Steps]:
    """The tensors in modules that the user names, and these."""
    heads = {path: _heads(path) for path in paths}
    matches = {
        path: next((head for head in each if no_split.search(".".join(head))), None)
        for path, each in heads.items()
    }
    return {path: match for path, match in matches.items() if match is not None}


def _heads(path: Steps) -> Iterator[Steps]:
    return (path[:length] for length in range(1, len(path) + 1))


def _numbered(sizes: dict[Steps, int], total: int) -> dict[Steps, Steps]:
    """The tensors with a number in their names, and the parts of these that end in it."""
    homes: dict[Steps, Steps] = {}
    waiting: list[tuple[Sequence[Steps], int]] = [(tuple(sizes), 0)]
    while waiting:
        paths, start = waiting.pop()
        for home, members in _by_next_number(paths, start).items():
            if 2 * sum(sizes[path] for path in members) > total and _holds_numbers(
                members, len(home)
            ):
                waiting.append((members, len(home)))
            else:
                homes.update(dict.fromkeys(members, home))
    return homes


def _by_next_number(paths: Iterable[Steps], start: int) -> dict[Steps, list[Steps]]:
    """The names with a number from the step *start* on, by what goes up to the first such."""
    found: dict[Steps, list[Steps]] = defaultdict(list)
    for path in paths:
        at = _next_number(path, start)
        if at < len(path):
            found[path[: at + 1]].append(path)
    return found


def _holds_numbers(paths: Iterable[Steps], start: int) -> bool:
    """Whether the names go on to several numbers in one place."""
    places = [home[:-1] for home in _by_next_number(paths, start)]
    return len(set(places)) < len(places)


def _next_number(path: Steps, start: int) -> int:
    """Where the first number from the step *start* on is; the end if there is none."""
    return next((at for at in range(start, len(path)) if _is_number(path[at])), len(path))


def _is_number(step: str) -> bool:
    return step.isascii() and step.isdecimal() and len(step) < 10


def _modules(paths: Sequence[Steps], blocks: Iterable[Steps]) -> dict[Steps, Steps]:
    """For each tensor the module that is its block: the outermost that has tensors of its own and
    holds no other block.
    """
    around = {head for block in blocks for head in _heads(block[:-1])}
    owners = {path[:-1] for path in paths} - around
    return {path: next((head for head in _heads(path) if head in owners), path) for path in paths}


def _says_nothing(entries: Iterable[TensorEntry]) -> bool:
    """Whether the order of the file is that of the names, as the writers of safetensors leave it:
    by type, then by name.
    """
    names: dict[int, list[str]] = defaultdict(list)
    for entry in entries:
        names[entry.dtype.itemsize].append(entry.name)
    return all(each == sorted(each) for each in names.values())


def _by_tree(blocks: Iterable[Steps]) -> list[Steps]:
    """What lies in one module side by side, modules in the order in which they first appear,
    numbered ones by their numbers.
    """
    seen: dict[tuple[Steps, str | None], int] = {}

    def place(head: Steps) -> tuple[int, int]:
        *around, step = head
        number = int(step) if _is_number(step) else None
        return seen.setdefault(
            (tuple(around), step if number is None else None), len(seen)
        ), number or 0

    return sorted(blocks, key=lambda path: [place(head) for head in _heads(path)])


def _by_words(blocks: Iterable[Steps]) -> list[Steps]:
    return sorted(blocks, key=lambda path: _turn(".".join(_before_number(path))))


def _before_number(path: Steps) -> Steps:
    """What is said of a block by the names before its number; one at the very front is that of a
    wrapper.
    """
    return path[: _next_number(path, 1)]


def _turn(name: str) -> tuple[int, int]:
    """When a part with this name is run: the side it belongs to, and within that side its kind."""
    first, last = (bool(side.search(name)) for side in _SIDES)
    kind = (
        0 if _INPUT.search(name) else 3 if _OUTPUT.search(name) else 2 if _NORM.search(name) else 1
    )
    if first != last:
        return (1 if first else 3), kind
    return (0 if kind == 0 else 2 if kind == 1 else 4), kind


def _follows(name: str, following: str) -> bool:
    (around, _, step), (next_around, _, next_step) = name.rpartition("."), following.rpartition(".")
    return (
        around == next_around
        and _is_number(step)
        and _is_number(next_step)
        and int(next_step) == int(step) + 1
    )


_EXPERT = re.compile(r"(.*?expert\w{0,20}?[._])(\d{1,9})(?=\.|$)")


def arranged(block: BlockEntries) -> BlockEntries:
    """*block* with its tensors in the order in which they are to be written."""
    rest, experts = _experts(block.entries)
    even, odd = _parted(rest)
    entries = [
        *even,
        *(entry for expert in experts for part in _parted(expert) for entry in part),
        *odd,
    ]
    if misaligned(entries):
        entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    return replace(block, entries=tuple(entries))


def misaligned(entries: Iterable[TensorEntry], *, at: int = 0) -> bool:
    """Whether one of *entries*, written one after the other from offset *at* on, is out of step
    with its type.
    """
    entries = tuple(entries)
    starts = accumulate((entry.nbytes for entry in entries), initial=at)
    return any(start % entry.dtype.itemsize for entry, start in zip(entries, starts, strict=False))


def reordered(
    blocks: Sequence[BlockEntries], names: Iterable[str]
) -> tuple[tuple[BlockEntries, ...], tuple[BlockEntries, ...]]:
    """Those of *blocks* that *names* call, in the order in which they are first called, and those
    that they do not.

    Args:
        blocks: each name once.
        names: of blocks, of what lies in them, or of modules around them, which call none.
    """
    by_name = {block.name: block for block in blocks}
    called = dict.fromkeys(head for name in names for head in heads(name) if head in by_name)
    return tuple(by_name[name] for name in called), tuple(
        block for block in blocks if block.name not in called
    )


def _experts(entries: Iterable[TensorEntry]) -> tuple[list[TensorEntry], list[list[TensorEntry]]]:
    """Those of *entries* that belong to no expert, and those of each expert."""
    rest: list[TensorEntry] = []
    experts: dict[str, dict[int, list[TensorEntry]]] = defaultdict(lambda: defaultdict(list))
    for entry in entries:
        match = _EXPERT.match(entry.name)
        (experts[match[1]][int(match[2])] if match else rest).append(entry)
    return rest, [group[number] for group in experts.values() for number in sorted(group)]


def _parted(entries: Iterable[TensorEntry]) -> tuple[list[TensorEntry], list[TensorEntry]]:
    """The tensors that keep the alignment of what follows them, and the others, wide types
    first.
    """
    even: list[TensorEntry] = []
    odd: list[TensorEntry] = []
    for entry in entries:
        (odd if entry.nbytes % ALIGNMENT else even).append(entry)
    return even, sorted(odd, key=lambda entry: -entry.dtype.itemsize)


def heads(name: str) -> Iterable[str]:
    """*name* up to each of its dots, and all of it."""
    steps = name.split(".", _DEEPEST)
    return (".".join(steps[:length]) for length in range(1, len(steps) + 1))
