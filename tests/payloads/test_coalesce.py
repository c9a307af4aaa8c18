"""Payloads that touch are one, and their bytes stay the same."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from shardkit.payloads.coalesce import coalesced, follows
from shardkit.payloads.payload import Concat, Extent, Literal, Payload, read_all

A, B = Path("a"), Path("b")


def test_extents_of_one_file_that_touch_are_joined() -> None:
    parts: list[Payload] = [
        Extent(A, 0, 4),
        Extent(A, 4, 8),
        Extent(A, 12, 1),
        Extent(A, 14, 1),
        Extent(B, 15, 1),
    ]
    assert list(coalesced(parts)) == [Extent(A, 0, 13), Extent(A, 14, 1), Extent(B, 15, 1)]


def test_what_is_empty_is_left_out_and_breaks_no_run() -> None:
    assert list(coalesced([Extent(A, 0, 4), Extent(B, 0, 0), Extent(A, 4, 4), Literal(b"")])) == [
        Extent(A, 0, 8)
    ]


def test_the_parts_of_a_concat_are_joined_with_their_neighbours() -> None:
    parts: list[Payload] = [
        Extent(A, 0, 4),
        Concat((Extent(A, 4, 4), Concat((Extent(B, 0, 2),)))),
        Extent(B, 2, 2),
    ]
    assert list(coalesced(parts)) == [Extent(A, 0, 8), Extent(B, 0, 4)]


@given(st.integers(0, 99), st.integers(0, 9), st.integers(0, 99), st.integers(0, 30))
def test_what_follows_begins_behind_the_end_and_no_further_than_the_gap(
    start: int, nbytes: int, behind: int, gap: int
) -> None:
    left, right = Extent(A, start, nbytes), Extent(Path("a"), behind, 1)
    assert follows(left, right, gap=gap) == (start + nbytes <= behind <= start + nbytes + gap)
    assert not follows(left, Extent(B, start + nbytes, 1), gap=gap)
    assert not follows(left, Literal(b"x"), gap=gap)


pieces: st.SearchStrategy[Payload] = st.binary(max_size=6).map(Literal)
payloads = st.one_of(pieces, st.lists(pieces, max_size=3).map(lambda parts: Concat(tuple(parts))))


@given(st.lists(payloads, max_size=8))
def test_the_bytes_stay_the_same(parts: list[Payload]) -> None:
    joined = list(coalesced(parts))
    assert b"".join(map(read_all, joined)) == b"".join(map(read_all, parts))
    assert all(part.nbytes for part in joined)
