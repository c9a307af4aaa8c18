"""Which files a part writes, and where its number comes from."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkit.errors import PlanError
from shardkit.fleet.parts import Part
from shardkit.payloads.payload import Literal
from shardkit.planning.plan import Late, OutputFile


def file(number: int, nbytes: int) -> OutputFile:
    return OutputFile(f"{number:03}", (Literal(bytes(nbytes)),))


@given(st.lists(st.integers(0, 1000), max_size=40), st.integers(1, 9))
def test_parts_are_disjoint_complete_and_balanced(sizes: list[int], count: int) -> None:
    files = [file(number, nbytes) for number, nbytes in enumerate(sizes)]
    parts = [Part(number, count).files(files) for number in range(1, count + 1)]
    names = [each.name for part in parts for each in part]
    assert sorted(names) == [each.name for each in files]
    loads = [sum(each.nbytes for each in part) for part in parts]
    largest = max(sizes, default=0)
    assert max(loads) - min(loads) <= largest + len(sizes), "no part has a file more than needed"
    assert all([each.name for each in part] == sorted(each.name for each in part) for part in parts)


def test_files_without_bytes_are_dealt_out_too() -> None:
    files = [file(number, 0) for number in range(6)]
    assert [len(Part(number, 3).files(files)) for number in (1, 2, 3)] == [2, 2, 2]


def test_what_holds_digests_of_others_is_of_no_part() -> None:
    late = OutputFile("manifest", (), late=Late(10, lambda written: b""))
    assert Part(1, 1).files([file(1, 1), late]) == (file(1, 1),)


@pytest.mark.parametrize("text", ["1/1", "3/16", "16/16"])
def test_a_part_is_written_as_it_is_read(text: str) -> None:
    assert str(Part.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "3", "0/4", "5/4", "1/0", "-1/4", "1/4/2", "a/b", "1.5/2", "9" * 30 + "/2", "ENV"]
)
def test_what_is_no_part_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(PlanError) as caught:
        Part.parse(text, {})
    assert "3/16" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("environment", "part"),
    [
        (
            {
                "SLURM_ARRAY_TASK_ID": "1",
                "SLURM_ARRAY_TASK_MIN": "1",
                "SLURM_ARRAY_TASK_MAX": "16",
                "SLURM_ARRAY_TASK_COUNT": "16",
                "SLURM_ARRAY_TASK_STEP": "1",
            },
            "1/16",
        ),
        (
            {
                "SLURM_ARRAY_TASK_ID": "15",
                "SLURM_ARRAY_TASK_MIN": "0",
                "SLURM_ARRAY_TASK_COUNT": "16",
            },
            "16/16",
        ),
        (
            {
                "SLURM_ARRAY_TASK_ID": "8",
                "SLURM_ARRAY_TASK_MIN": "0",
                "SLURM_ARRAY_TASK_MAX": "12",
                "SLURM_ARRAY_TASK_COUNT": "4",
                "SLURM_ARRAY_TASK_STEP": "4",
            },
            "3/4",
        ),
        (
            {
                "SLURM_ARRAY_TASK_ID": "7",
                "SLURM_ARRAY_TASK_MIN": "3",
                "SLURM_ARRAY_TASK_MAX": "7",
                "SLURM_ARRAY_TASK_COUNT": "2",
            },
            "2/2",
        ),
        ({"JOB_COMPLETION_INDEX": "0", "JOB_COMPLETIONS": "8"}, "1/8"),
        ({"RANK": "7", "WORLD_SIZE": "8"}, "8/8"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "JOB_COMPLETION_INDEX": "5", "JOB_COMPLETIONS": "8"},
            "1/2",
        ),
    ],
)
def test_a_scheduler_says_which_part_it_is(environment: Mapping[str, str], part: str) -> None:
    assert str(Part.parse("env", environment)) == part


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "none of RANK"),
        ({"JOB_COMPLETION_INDEX": "1"}, "JOB_COMPLETIONS is not"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "which does not exist"),
        ({"RANK": "two", "WORLD_SIZE": "4"}, "expected a number"),
        (
            {
                "SLURM_ARRAY_TASK_ID": "2",
                "SLURM_ARRAY_TASK_MIN": "1",
                "SLURM_ARRAY_TASK_MAX": "9",
                "SLURM_ARRAY_TASK_COUNT": "3",
            },
            "no parts of equal rank",
        ),
    ],
)
def test_an_environment_that_says_no_part_is_refused(
    environment: Mapping[str, str], said: str
) -> None:
    with pytest.raises(PlanError, match=said) as caught:
        Part.parse("env", environment)
    assert caught.value.hint
