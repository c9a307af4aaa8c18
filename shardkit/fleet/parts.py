"""Parts of a plan, for the jobs of an array that know nothing of each other but their number."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapreplace
from typing import TypeVar

from shardkit.errors import PlanError
from shardkit.hints import option
from shardkit.planning.plan import OutputFile
from shardkit.printable import shown

Item = TypeVar("Item")

_WRITTEN = re.compile(r"(\d{1,9})/(\d{1,9})")
_EXAMPLE = ("write it as in ", option("part", "3/16"), ", which is the third of 16")


@dataclass(frozen=True, slots=True)
class Part:
    """One of several parts of equal rank.

    Attributes:
        number: which one, from 1.
        count: how many there are.
    """

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @classmethod
    def parse(cls, text: str, environment: Mapping[str, str] = os.environ) -> Part:
        """The part that *text* says, as ``"3/16"``; ``"env"`` for that which a scheduler has set in
        the *environment*.

        Slurm, Kubernetes (an Indexed Job) and torchrun are understood. Kubernetes does not say how
        many there are: set JOB_COMPLETIONS in the job.

        Raises:
            PlanError: it says no part.
        """
        if text == "env":
            return _of_environment(environment)
        match = _WRITTEN.fullmatch(text)
        if match is None:
            raise PlanError(f"the part is {shown(text)}; expected K/N or env", hint=_EXAMPLE)
        part = cls(int(match[1]), int(match[2]))
        if not 1 <= part.number <= part.count:
            raise PlanError(
                f"there is no part {part}: the first of {part.count} is 1/{part.count}",
                hint=_EXAMPLE,
            )
        return part

    def files(self, files: Iterable[OutputFile]) -> tuple[OutputFile, ...]:
        """Those of *files* that this part writes.

        They are assigned by size, the largest first, each to the part that has the fewest bytes
        until then. Files that hold digests of others are of no part.
        """
        return self.share([file for file in files if file.late is None], lambda file: file.nbytes)

    def share(self, items: Sequence[Item], nbytes: Callable[[Item], int]) -> tuple[Item, ...]:
        """Those of *items* that are of this part, assigned by their size, in the order in which
        they were given.
        """
        loads = [
            (0, part) for part in range(min(self.count, len(items)))
        ]  # a heap: the least first
        mine: list[int] = []
        for place in sorted(range(len(items)), key=lambda place: -nbytes(items[place])):
            amount, part = loads[0]
            heapreplace(loads, (amount + (nbytes(items[place]) or 1), part))
            if part == self.number - 1:
                mine.append(place)
        return tuple(items[place] for place in sorted(mine))


ALL = Part(1, 1)


def _of_environment(environment: Mapping[str, str]) -> Part:
    for part in _parts(environment):
        if not 1 <= part.number <= part.count:
            raise PlanError(
                f"the scheduler says part {part}, which does not exist",
                hint="check the variables of the job, or write the part as K/N",
            )
        return part
    names = (
        "RANK with WORLD_SIZE, SLURM_ARRAY_TASK_ID with SLURM_ARRAY_TASK_COUNT, "
        "JOB_COMPLETION_INDEX with JOB_COMPLETIONS"
    )
    raise PlanError(f"the environment names no part: none of {names} is set", hint=_EXAMPLE)


def _parts(environment: Mapping[str, str]) -> Iterator[Part]:
    """The parts that the *environment* tells of. torchrun comes first: its ranks are those of all
    nodes, and where a scheduler started it several times, they do the same work more than once
    rather than never.
    """

    def number(name: str) -> int | None:
        text = environment.get(name)
        if text is None:
            return None
        try:
            return int(text)
        except ValueError:
            raise PlanError(
                f"{name} is {shown(text)}; expected a number", hint="check the job"
            ) from None

    rank, world = number("RANK"), number("WORLD_SIZE")
    if rank is not None and world is not None:
        yield Part(rank + 1, world)
    task, first, count = (number(f"SLURM_ARRAY_TASK_{name}") for name in ("ID", "MIN", "COUNT"))
    if task is not None and count is not None:
        last, step = number("SLURM_ARRAY_TASK_MAX"), number("SLURM_ARRAY_TASK_STEP")
        begin = first if first is not None else 1
        stride = step or (1 if last is None or count < 2 else (last - begin) // (count - 1))
        place, rest = divmod(task - begin, max(1, stride))
        if rest or place >= count:
            raise PlanError(
                f"the task {task} is none of {count} that begin at {begin} in steps of {stride}: "
                "such an array has no parts of equal rank",
                hint="give the array as in `sbatch --array=1-16`",
            )
        yield Part(place + 1, count)
    index, completions = number("JOB_COMPLETION_INDEX"), number("JOB_COMPLETIONS")
    if index is not None:
        if completions is None:
            raise PlanError(
                "JOB_COMPLETION_INDEX is set, and JOB_COMPLETIONS is not: Kubernetes does not tell "
                "a pod how many there are",
                hint="set JOB_COMPLETIONS in the job to its number of completions",
            )
        yield Part(index + 1, completions)
