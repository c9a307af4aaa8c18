"""What a download has is known after the process is gone, whatever else is there."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkit.load.hub.partial_file import PartialFile

SPAN = 10


def add(part: PartialFile, number: int, chunk: bytes) -> None:
    with part.open() as handle:
        part.add(number, handle, chunk)


@given(st.binary(min_size=1, max_size=64), st.data())
def test_pieces_in_any_order_and_from_many_processes_make_the_file(
    content: bytes, data: st.DataObject
) -> None:
    with TemporaryDirectory() as folder:
        made_of_pieces(Path(folder, "blob"), content, data)


def made_of_pieces(place: Path, content: bytes, data: st.DataObject) -> None:
    part = PartialFile(place, len(content), SPAN)
    expected = [0] * len(part.ranges)
    while part.present < len(content):
        number = data.draw(
            st.sampled_from(
                [
                    each
                    for each, (start, end) in enumerate(part.ranges)
                    if part.count(each) < end - start
                ]
            )
        )
        start, end = part.ranges[number]
        count = part.count(number)
        size = data.draw(st.integers(1, end - start - count))
        add(part, number, content[start + count : start + count + size])
        expected[number] += size
        if data.draw(st.booleans()):  # another process goes on; this one closed nothing
            part = PartialFile(place, len(content), SPAN)
        assert [part.count(each) for each in range(len(part.ranges))] == expected
        assert PartialFile.recorded(place, len(content), SPAN) == sum(expected)
    buffer = memoryview(bytearray(3))
    pieces = (
        bytes(each) for number in range(len(part.ranges)) for each in part.pieces(number, buffer)
    )
    assert b"".join(pieces) == content
    part.finish()
    assert place.read_bytes() == content
    assert [path.name for path in place.parent.iterdir()] == ["blob"]


@pytest.mark.parametrize("damage", ["no record", "short record", "other size", "no file", "noise"])
def test_what_is_no_record_of_this_file_is_begun_anew(tmp_path: Path, damage: str) -> None:
    place = tmp_path / "blob"
    part = PartialFile(place, 25, SPAN)
    add(part, 0, b"x" * SPAN)
    part.close()
    record = next(tmp_path.glob("*.ranges"))
    if damage == "no record":
        record.unlink()
    elif damage == "short record":
        record.write_bytes(record.read_bytes()[:-1])
    elif damage == "noise":
        record.write_bytes(b"?" * record.stat().st_size)
    elif damage == "no file":
        part.path.unlink()
    nbytes = 35 if damage == "other size" else 25
    with PartialFile(place, nbytes, SPAN) as again:
        assert again.present == 0
        assert again.path.stat().st_size == nbytes


def test_a_record_that_claims_too_much_claims_the_range(tmp_path: Path) -> None:
    with PartialFile(tmp_path / "blob", 25, SPAN):
        pass
    record = next(tmp_path.glob("*.ranges"))
    record.write_bytes(record.read_bytes()[:-24] + b"\xff" * 24)
    with PartialFile(tmp_path / "blob", 25, SPAN) as part:
        assert [part.count(number) for number in range(3)] == [10, 10, 5]


def test_to_ask_what_is_there_changes_nothing(tmp_path: Path) -> None:
    place = tmp_path / "blob"
    with PartialFile(place, 25, SPAN) as part:
        add(part, 0, b"x" * SPAN)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert PartialFile.recorded(place, 25, SPAN) == SPAN
    assert PartialFile.recorded(place, 26, SPAN) == 0
    assert PartialFile.recorded(tmp_path / "other", 25, SPAN) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_link_in_its_place_is_not_written_through(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    with PartialFile(tmp_path / "blob", 8, SPAN) as part:
        path = part.path
    path.unlink()
    path.symlink_to(victim)
    with PartialFile(tmp_path / "blob", 8, SPAN) as part:
        add(part, 0, b"12345678")
        part.finish()
    assert victim.read_bytes() == b"precious"
    assert not (tmp_path / "blob").is_symlink()
