"""Fresh memory gets its pages in few requests, each page once, and the kind of page that comes
faster.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import shardkit
from shardkit.load.memory.arenas import HUGE, Arena
from shardkit.load.memory.first_touch import FirstTouch, address_of

HUGE_ADVICE, SMALL_ADVICE, POPULATE = 14, 15, 23
PAGE = 4096


class System:
    """A kernel that takes as long for each kind of page as it is told, and a clock that it
    moves.
    """

    def __init__(self, huge: int = 1, small: int = 4, *, populates: bool = True) -> None:
        self.costs = {True: huge, False: small}
        self.populates = populates
        self.now = 0
        self.kinds: list[tuple[int, int, bool]] = []
        self.asked: list[tuple[int, int, bool]] = []
        self.advised: list[tuple[int, int, int]] = []

    def advise(self, start: int, nbytes: int, advice: int) -> bool:
        self.advised.append((start, nbytes, advice))
        if advice != POPULATE:
            self.kinds.append((start, start + nbytes, advice == HUGE_ADVICE))
            return True
        huge = next(
            (huge for first, last, huge in reversed(self.kinds) if first <= start < last), False
        )
        self.asked.append((start, nbytes, huge))
        self.now += nbytes * self.costs[huge]
        return self.populates

    def clock(self) -> int:
        return self.now

    @property
    def share(self) -> float:
        """Of the bytes that were asked for, those in huge pages."""
        return sum(nbytes for _, nbytes, huge in self.asked if huge) / sum(
            nbytes for _, nbytes, _ in self.asked
        )


def brought(system: System, nbytes: int, cuts: list[int]) -> int:
    """Bring an arena of *nbytes* bytes in pieces that end at *cuts*; its address is returned."""
    arena = Arena.untouched(nbytes)
    pages = FirstTouch(system.advise, system.clock)
    pages.add(arena, nbytes)
    memory = arena.memory(0, nbytes)
    for start, stop in pairwise([0, *cuts, nbytes]):
        pages.bring([memory[start:stop], memoryview(bytearray(8))])
    return address_of(memory)


@settings(deadline=None)
@given(st.integers(1, 6 * HUGE + 5), st.lists(st.integers(0, 6 * HUGE), max_size=5))
def test_every_page_is_asked_for_and_no_huge_one_twice_or_beyond_the_end(
    nbytes: int, cuts: list[int]
) -> None:
    system = System()
    start = brought(system, nbytes, sorted({cut for cut in cuts if 0 < cut < nbytes}))
    there = {
        page
        for at, length, _ in system.asked
        for page in range(at // PAGE, -(-(at + length) // PAGE))
    }
    assert there == set(range(start // PAGE, -(-(start + nbytes) // PAGE)))
    whole = [
        (at, at + length - HUGE + 1) for at, length, _ in system.asked if not (at - start) % HUGE
    ]
    large = [place for first, last in whole for place in range(first, last, HUGE)]
    assert len(large) == len(set(large))
    assert all(at + length <= start + nbytes for at, length, huge in system.asked if huge)


@pytest.mark.parametrize(("huge", "small", "least", "most"), [(1, 4, 0.9, 1.0), (20, 4, 0.0, 0.1)])
def test_the_cheaper_kind_of_page_is_used(huge: int, small: int, least: float, most: float) -> None:
    system = System(huge, small)
    brought(system, 256 * HUGE, list(range(4 * HUGE, 256 * HUGE, 4 * HUGE)))
    assert least <= system.share <= most
    assert 0 < system.share < 1  # both were tried


def test_the_kind_is_said_once_and_for_each_trial() -> None:
    system = System()
    pieces = 256
    brought(system, pieces * HUGE, [number * HUGE for number in range(1, pieces)])
    assert len(system.advised) - len(system.asked) <= 3 + 2 * pieces // 16


def test_a_kind_that_becomes_cheaper_is_found_out() -> None:
    system = System(20, 4)
    arena, nbytes = Arena.untouched(256 * HUGE), 256 * HUGE
    pages = FirstTouch(system.advise, system.clock)
    pages.add(arena, nbytes)
    memory = arena.memory(0, nbytes)
    for number in range(64):
        if number == 32:
            system.asked.clear()
            system.costs[True] = 1
        pages.bring([memory[number * 4 * HUGE : (number + 1) * 4 * HUGE]])
    assert system.share > 0.4


def test_a_system_that_cannot_populate_is_asked_for_huge_pages_only() -> None:
    system = System(populates=False)
    start = brought(system, 8 * HUGE, [4 * HUGE])
    assert len(system.asked) == 1
    assert system.advised[-1] == (start + 4 * HUGE, 4 * HUGE, HUGE_ADVICE)


LOAD = """
import json, resource, sys, torch
from torch import nn
from shardkit.load import load_checkpoint_in_model

def counted(path, dtype):
    with torch.device("meta"):
        model = nn.ModuleDict({f"l{i}": nn.Linear(2048, 2048, bias=False, dtype=dtype) for i in range(8)})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    load_checkpoint_in_model(model, path, {"": "cpu"})
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, sum(p.nbytes for p in model.parameters())

for dtype in (torch.bfloat16, torch.float32):
    counted(sys.argv[1], dtype)
    print(json.dumps(counted(sys.argv[1], dtype)))
"""


def plain(path: Path, folder: Path) -> Path:
    return path


def compressed(path: Path, folder: Path) -> Path:
    return shardkit.convert(path, folder / "compressed", compress="zstd", sync=False).out


def turned(path: Path, folder: Path) -> Path:
    state = {f"l{i}.weight": torch.ones(2048, 2048, dtype=torch.bfloat16).t() for i in range(8)}
    torch.save(state, folder / "turned.pt")
    return folder / "turned.pt"


@pytest.mark.skipif(sys.platform != "linux", reason="Linux counts page faults so")
@pytest.mark.parametrize(
    ("make", "most"),
    [(plain, 1.25), (compressed, 2.5), (turned, 2.5)],
    ids=["plain", "zstd", "turned"],
)
def test_a_load_touches_little_memory_beside_the_weights(
    make: Callable[[Path, Path], Path], most: float, tmp_path: Path
) -> None:
    """A buffer made anew for each chunk would be touched anew, page by page."""
    weights = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    save_file({f"l{i}.weight": weights + i for i in range(8)}, tmp_path / "model.safetensors")
    path = make(tmp_path / "model.safetensors", tmp_path)
    done = subprocess.run([sys.executable, "-c", LOAD, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    as_stored, cast = map(json.loads, done.stdout.splitlines())
    for faults, nbytes in (as_stored, cast):
        assert faults <= most * nbytes / PAGE + 2000
    assert cast[1] == 2 * as_stored[1]
