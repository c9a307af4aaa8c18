"""Weights come into memory of their own, bit for bit, aligned, and leave it again."""

from __future__ import annotations

import gc
import mmap
import os
import re
import threading
import weakref
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardkit.dtypes import BY_CODE
from shardkit.errors import FormatError, LoadError
from shardkit.load.memory.allocate import aligned, mapped, materialise, memory_of
from shardkit.load.memory.arenas import HUGE, Arena
from shardkit.load.memory.parallel_reads import read_into
from shardkit.payloads.cast import Cast
from shardkit.payloads.payload import CHUNK, Concat, Extent, Literal, Payload, Swapped, read_all

SIZE = 40 << 20
linux_only = pytest.mark.skipif(
    not Path("/proc/self/smaps").exists(), reason="reads what Linux says of memory"
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random bytes that begins as no run of equal bytes does."""
    path = tmp_path_factory.mktemp("memory") / "weights"
    path.write_bytes(
        torch.randint(
            0, 256, (SIZE,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        )
        .numpy()
        .tobytes()
    )
    return path


def bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(memory_of(tensor.contiguous()))


def as_bytes(payload: Payload) -> tuple[Payload, torch.dtype, tuple[int, ...]]:
    return payload, torch.uint8, (payload.nbytes,)


def resident(name: str = "VmRSS") -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


@pytest.mark.parametrize("nbytes", [0, 1, 64, HUGE - 1, HUGE, HUGE + 1, 5 * HUGE + 12345])
def test_memory_is_aligned_and_may_be_written_to_its_last_byte(nbytes: int) -> None:
    tensor = aligned(nbytes)
    assert (tensor.dtype, tensor.shape) == (torch.uint8, (nbytes,))
    assert tensor.data_ptr() % 64 == 0
    assert tensor.data_ptr() % HUGE == 0 or nbytes < HUGE
    tensor.fill_(7)
    assert tensor.untyped_storage().nbytes() == nbytes
    assert memory_of(tensor) == b"\7" * nbytes


def test_memory_lasts_as_long_as_somebody_may_write_to_it() -> None:
    tensor = torch.zeros(100)
    kept, piece = weakref.ref(tensor), memory_of(tensor)[10:20]
    del tensor
    assert kept() is not None
    piece.release()
    del piece
    assert kept() is None


def test_memory_that_there_is_not_is_refused_with_a_sentence() -> None:
    with pytest.raises(LoadError, match="no memory for 1000 PB"):
        aligned(10**18)


@given(
    st.lists(st.tuples(st.integers(0, SIZE - 70_000), st.integers(0, 70_000)), max_size=40),
    st.integers(1, 5),
)
@settings(max_examples=30)
def test_any_extents_in_any_order_are_read_as_they_are(
    file: Path, ranges: list[tuple[int, int]], workers: int
) -> None:
    extents = [Extent(file, start, nbytes) for start, nbytes in ranges]
    counted: list[int] = []
    tensors = materialise(map(as_bytes, extents), workers=workers, on_bytes=counted.append)
    assert [bytes_of(tensor) for tensor in tensors] == [
        bytes(read_all(extent)) for extent in extents
    ]
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)
    assert sum(counted) == sum(extent.nbytes for extent in extents)


def test_large_small_and_derived_tensors_come_in_one_go(file: Path) -> None:
    payloads: list[Payload] = [
        Extent(file, 5, 30 << 20),
        *(Extent(file, (30 << 20) + 192 * i, 64) for i in range(3000)),
        Cast(Extent(file, 0, 20 << 20), BY_CODE["BF16"], BY_CODE["F32"]),
        Swapped(Extent(file, 3, 18 << 20), 2),
        Concat((Extent(file, 9, 100), Literal(b"x" * 28))),
        Literal(b""),
    ]
    tensors = materialise(map(as_bytes, payloads))
    for tensor, payload in zip(tensors, payloads, strict=True):
        assert bytes_of(tensor) == bytes(read_all(payload))


def test_each_tensor_is_a_storage_of_its_own_with_its_type_and_shape(file: Path) -> None:
    items = [(Extent(file, 64 * i, 48), torch.float32, (3, 4)) for i in range(5)]
    for tensor in materialise(items):
        assert (tensor.dtype, tensor.shape, tensor.untyped_storage().nbytes()) == (
            torch.float32,
            (3, 4),
            48,
        )
    scalar, empty = materialise(
        [(Literal(b"\1"), torch.bool, ()), (Literal(b""), torch.float16, (0, 7))]
    )
    assert bool(scalar) is True
    assert scalar.shape == ()
    assert (empty.dtype, empty.shape) == (torch.float16, (0, 7))


@pytest.mark.parametrize("extent", [(7, 100), (1, CHUNK + 9), (7, 0)])
def test_what_is_given_is_filled(file: Path, extent: tuple[int, int]) -> None:
    for payload in (Extent(file, *extent), Concat((Extent(file, 0, 1), Extent(file, *extent)))):
        memory = bytearray(payload.nbytes)
        read_into(payload, memoryview(memory))
        assert memory == read_all(payload)


def test_a_tensor_outlives_those_it_shares_an_arena_with(file: Path) -> None:
    first, *others = materialise([as_bytes(Extent(file, 4096 * i, 4096)) for i in range(100)])
    del others
    gc.collect()
    assert bytes_of(first) == bytes(read_all(Extent(file, 0, 4096)))


@linux_only
def test_memory_goes_when_the_last_tensor_goes_and_not_with_rounding(file: Path) -> None:
    items = [as_bytes(Extent(file, (1 << 20) * i, (1 << 20) - 64)) for i in range(40)]
    before = resident()
    tensors = materialise(items)
    # 16 MB for threads and the chunks of the allocator: huge pages that rounded up each tensor
    # would take 40 MB.
    assert resident() - before < SIZE + (16 << 20)
    del tensors
    assert resident() - before < 16 << 20


@linux_only
@pytest.mark.parametrize("payload", ["gone", "short"])
def test_a_read_that_fails_leaves_nothing_behind(file: Path, tmp_path: Path, payload: str) -> None:
    short = tmp_path / "short"
    short.write_bytes(bytes(100))
    bad = Extent(tmp_path / "gone", 0, 200) if payload == "gone" else Extent(short, 0, 200)
    items = [as_bytes(Extent(file, (4 << 20) * i, 4 << 20)) for i in range(10)]
    before, threads, files = resident(), threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(FormatError, match=bad.path.name):
            materialise([*items, as_bytes(bad)])
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == files
    assert resident() - before < 24 << 20


def test_an_interrupt_ends_the_reading(file: Path) -> None:
    calls: list[int] = []

    def interrupt(nbytes: int) -> None:
        calls.append(nbytes)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        materialise(
            [as_bytes(Extent(file, (9 << 20) * i, 9 << 20)) for i in range(4)], on_bytes=interrupt
        )
    assert len(calls) == 1


def test_a_mapped_tensor_shares_the_file_and_keeps_its_changes_to_itself(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    content = bytearray(torch.arange(100_000, dtype=torch.int32).numpy().tobytes())
    path.write_bytes(content)
    first, second, empty = mapped(
        [
            (Extent(path, 80_000, 40_000), torch.int32, (100, 100)),
            (Extent(path, 4, 8), torch.int64, (1,)),  # not aligned
            (Extent(path, 8, 0), torch.int32, (0,)),
        ]
    )
    assert first is not None
    assert second is None
    assert empty is None
    assert first.flatten().tolist() == list(range(20_000, 30_000))
    first[0, 0] = -1
    assert path.read_bytes() == content
    with path.open("r+b") as file:
        file.seek(80_004)
        file.write((77).to_bytes(4, "little"))
    assert first[0, 0] == -1


def test_only_plain_runs_of_files_are_mapped(file: Path) -> None:
    assert mapped([as_bytes(Literal(b"abc")), as_bytes(Swapped(Extent(file, 0, 4), 2))]) == [
        None,
        None,
    ]


def test_a_file_that_is_too_short_is_not_mapped(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(bytes(10))
    with pytest.raises(FormatError, match="ends before byte 12"):
        mapped([as_bytes(Extent(tmp_path / "short", 4, 8))])
    with pytest.raises(FormatError, match="cannot be read"):
        mapped([as_bytes(Extent(tmp_path / "gone", 4, 8))])


def huge_bytes(tensor: torch.Tensor) -> int:
    """How many bytes of the mapping that *tensor* lies in are huge pages."""
    blocks = Path("/proc/self/smaps").read_text().split("\nVmFlags")
    for block in blocks:
        bounds = re.search(r"^([0-9a-f]+)-([0-9a-f]+) ", block, re.MULTILINE)
        if bounds and int(bounds[1], 16) <= tensor.data_ptr() < int(bounds[2], 16):
            return 1024 * next(
                int(line.split()[1])
                for line in block.splitlines()
                if line.startswith("AnonHugePages")
            )
    raise AssertionError("the system knows nothing of this memory")


@linux_only
def test_large_memory_is_backed_by_huge_pages() -> None:
    plain = mmap.mmap(-1, 9 * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        plain.madvise(mmap.MADV_HUGEPAGE)
    if huge_bytes(torch.frombuffer(plain, dtype=torch.uint8).fill_(1)) < 7 * HUGE:
        pytest.skip("the system has no huge pages to give")
    arena = Arena.of(8 * HUGE)
    assert huge_bytes(arena.tensor(0, torch.uint8, (8 * HUGE,)).fill_(1)) > 4 * HUGE
