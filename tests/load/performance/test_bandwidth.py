"""Rates: bounded, measured once, and of what is asked for; how fast this machine is is nobody's
promise.
"""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from shardkit.errors import FormatError
from shardkit.load.performance import bandwidth
from shardkit.load.performance.bandwidth import Product, Rates, measure
from shardkit.load.streaming.page_layout import READ
from shardkit.payloads.payload import Extent

CPU = torch.device("cpu")
PRODUCT = Product(torch.float32, (64, 64))


@pytest.fixture
def extent(tmp_path: Path) -> Extent:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(3_000_000))
    return Extent(path, 1001, 2_500_000)


def test_what_is_there_has_a_rate(extent: Extent) -> None:
    found = measure([extent], CPU, PRODUCT)
    assert all(rate is not None and rate > 0 for rate in (found.disk, found.copy, found.compute))
    assert found.link is None
    assert str(found).startswith("disk ")
    assert "link" not in str(found)


def test_without_files_no_disk_is_measured() -> None:
    assert measure([], CPU, PRODUCT).disk is None


def test_each_is_measured_once(extent: Extent, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(bytes(10_000))
    first = measure([extent], CPU, PRODUCT)
    again = measure([Extent(other, 0, 10_000)], CPU, PRODUCT)  # on the same file system
    assert again == first


def test_places_stand_in_rows_that_are_spread_over_what_streams_and_bounded(tmp_path: Path) -> None:
    big = Extent(tmp_path / "big", 5000, 100 << 30)
    places = list(bandwidth._places([big]))
    assert sum(place.nbytes for place in places) <= 1 << 29
    assert max(place.nbytes for place in places) == READ
    assert all(
        place.start % 4096 == 0 and place.start <= place.start + place.nbytes <= 5000 + big.nbytes
        for place in places
    )
    assert places[0].start < 10_000
    assert places[-1].start > 0.85 * big.nbytes
    assert sum(
        one.start + one.nbytes == other.start for one, other in pairwise(places)
    ) > 0.9 * len(places)
    small = list(
        bandwidth._places([Extent(tmp_path / "a", 4097, 10), Extent(tmp_path / "b", 0, 5000)])
    )
    assert [(place.start, place.nbytes) for place in small] == [(4096, 11), (0, 5000)]


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="gone"):
        measure([Extent(tmp_path / "gone", 0, 10)], CPU, PRODUCT)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.int8, torch.float64], ids=str
)
@pytest.mark.parametrize("rows", [1, 1000])
def test_products_of_any_type_and_size_are_measured(dtype: torch.dtype, rows: int) -> None:
    found = measure([], CPU, Product(dtype, (300, 200), rows)).compute
    assert found is not None
    assert found > 0


class Counted(TorchFunctionMode):
    """Counts the tensors of one shape that are made."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape = shape
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ones and args == self.shape
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(5, 7), (1000, 2000)], ids=str)
def test_small_matrices_are_multiplied_too_and_not_a_million_of_them(
    shape: tuple[int, int],
) -> None:
    with Counted(shape) as made:
        found = measure([], CPU, Product(torch.float32, shape)).compute
    assert found is not None
    assert found > 0
    assert 2 <= made.count <= 4096


def test_rates_can_be_given() -> None:
    assert str(Rates(disk=2e9, link=5e10)) == "disk 2.00 GB/s, link 50.0 GB/s"
