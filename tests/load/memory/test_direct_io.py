"""Open files: direct reads where they are possible, the page cache where it has the bytes, and one
open for ever.
"""

from __future__ import annotations

import errno
import gc
import os
import sys
from pathlib import Path

import pytest

from shardkit.errors import FormatError
from shardkit.load.memory import direct_io as module
from shardkit.load.memory.allocate import memory_of, private
from shardkit.load.memory.direct_io import SECTOR, Files, OpenFile

NBYTES = 64 * SECTOR
CONTENT = os.urandom(NBYTES + 100)

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what is cached")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "weights"
    made.write_bytes(CONTENT)
    with made.open("rb") as file:
        os.fsync(file.fileno())
    return made


def forget(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached(path: Path) -> bool:
    with path.open("rb") as file:
        return module._Residency(file.fileno()).at(NBYTES // 2)


def sectors(file: OpenFile, start: int = 0, needed: int = NBYTES) -> bytes:
    host = private(-(-needed // SECTOR) * SECTOR)
    file.read_sectors(memory_of(host), start, needed)
    return bytes(memory_of(host)[:needed])


@linux
def test_what_was_not_cached_is_not_cached_afterwards(path: Path) -> None:
    file = OpenFile(path)
    forget(path)
    if cached(path):
        pytest.skip("this file system keeps everything in memory")
    assert sectors(file) == CONTENT[:NBYTES]
    assert not cached(path)
    memory = bytearray(NBYTES)
    file.read(memoryview(memory), 0)
    assert memory == CONTENT[:NBYTES]
    assert not cached(path)


@linux
def test_what_is_cached_is_not_read_directly(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = OpenFile(path)
    path.read_bytes()
    seen: list[int] = []
    preadv = os.preadv

    def seeing(file: int, buffers: list[memoryview], start: int) -> int:
        seen.append(file)
        return preadv(file, buffers, start)

    monkeypatch.setattr(os, "preadv", seeing)
    assert sectors(file) == CONTENT[:NBYTES]
    assert seen == [file._file]
    assert cached(path)


def test_the_end_of_the_file_may_lie_inside_the_last_sector(path: Path) -> None:
    assert sectors(OpenFile(path), NBYTES, 100) == CONTENT[NBYTES:]


def test_a_file_system_that_refuses_is_not_asked_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = OpenFile(path)
    direct = file._direct
    if direct is None:
        pytest.skip("there are no direct reads here")
    monkeypatch.setattr(file._cached, "at", lambda place: False)
    asked: list[int] = []
    preadv = os.preadv

    def refusing(file: int, *rest: object) -> int:
        if file == direct:
            asked.append(file)
            raise OSError(errno.EINVAL, "Invalid argument")
        return preadv(file, *rest)  # type: ignore[arg-type]  # what it was given

    monkeypatch.setattr(os, "preadv", refusing)
    for _ in range(3):
        assert sectors(file) == CONTENT[:NBYTES]
    assert len(asked) == 1


def test_a_disk_that_fails_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = OpenFile(path)

    def failing(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(FormatError, match="Input/output error"):
        sectors(file)


def test_a_read_that_gives_less_goes_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = OpenFile(path)
    preadv = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda file, buffers, start: preadv(file, [buffers[0][: 3 * SECTOR]], start)
    )
    assert sectors(file) == CONTENT[:NBYTES]


def test_a_file_that_became_shorter_is_told(path: Path) -> None:
    file = OpenFile(path)
    os.truncate(path, 10)
    with pytest.raises(FormatError, match="ends before byte"):
        sectors(file)
    with pytest.raises(FormatError, match="ends before byte"):
        file.read(memoryview(bytearray(100)), 0)


def test_a_file_is_opened_once_and_closed_when_nobody_has_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[int] = []
    close = os.close

    def closing(file: int) -> None:
        closed.append(file)
        close(file)

    monkeypatch.setattr(os, "close", closing)
    files = Files()
    file = files.at(path)
    assert files.at(path) is file
    opened = {each for each in (file._file, file._direct) if each is not None}
    files.close()
    gc.collect()
    assert opened.isdisjoint(closed)  # somebody may still read
    del file
    gc.collect()
    assert opened <= set(closed)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be read"):
        Files().at(tmp_path / "nothing")
