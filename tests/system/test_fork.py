"""What begins again in the child of a fork, and that it can: there locks stay locked that other
threads had.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import zstandard

from children import begun, forks, in_a_child, said_by, threaded
from shardkit.codecs.zstd import CODEC, decompress
from shardkit.limits import Limits
from shardkit.payloads.compressed import Spool
from shardkit.payloads.payload import Extent
from shardkit.system.fork import begin_again_in_children

pytestmark = [forks, threaded]


class Owner:
    """Anything that can be gone."""


def test_owners_begin_again_in_the_order_in_which_they_came_and_only_in_the_child() -> None:
    again: list[int] = []
    owners = [Owner() for _ in range(3)]
    numbers = {id(owner): number for number, owner in enumerate(owners)}
    for owner in owners:
        begin_again_in_children(owner, lambda each: again.append(numbers[id(each)]))
    del owners[1], owner
    assert in_a_child(lambda: again == [0, 2])
    assert again == []


def test_an_expansion_that_another_thread_is_at_is_done_in_the_child_as_well(
    tmp_path: Path,
) -> None:
    content = Random(3).randbytes(20_000)
    path = tmp_path / "content.zst"
    path.write_bytes(zstandard.compress(content))
    expanding, go_on, here = threading.Event(), threading.Event(), os.getpid()

    def slowly(pieces: Iterable[memoryview]) -> Iterator[bytes]:
        expanding.set()
        if os.getpid() == here:
            go_on.wait(30)
        yield from decompress(pieces)

    spool = Spool(Extent(path, 0, path.stat().st_size), replace(CODEC, decompress=slowly), Limits())
    thread = threading.Thread(target=spool.file)
    thread.start()
    expanding.wait(30)
    assert in_a_child(lambda: spool.read(1000, 5) == content[1000:1005])
    go_on.set()
    thread.join()
    assert spool.read(1000, 5) == content[1000:1005]


def test_a_parent_and_its_child_read_an_expansion_side_by_side(tmp_path: Path) -> None:
    content = Random(4).randbytes(200_000)
    path = tmp_path / "content.zst"
    path.write_bytes(zstandard.compress(content))
    spool = Spool(Extent(path, 0, path.stat().st_size), CODEC, Limits())

    def is_right() -> bool:
        return all(
            spool.read(at, 100) == content[at : at + 100] for at in range(0, len(content), 20)
        )

    assert is_right()  # it is expanded
    child = begun(is_right)
    right = is_right()
    assert said_by(child)
    assert right
