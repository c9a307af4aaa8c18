"""The fuzzers keep their own law on what they begin with; `make fuzz` goes on from there, guided by
what is reached.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from mutations import changed
from parsers import PARSERS, Parser, check
from shardkit.errors import Malformed

CHANGES = 12


@pytest.mark.parametrize("parser", PARSERS.values(), ids=PARSERS)
def test_what_a_fuzzer_begins_with_is_read_or_refused_with_a_sentence(
    parser: Parser, tmp_path: Path
) -> None:
    seeds = list(parser.seeds())
    assert seeds
    for seed in seeds:
        check(parser, seed, tmp_path)


@pytest.mark.parametrize("name", [name for name, parser in PARSERS.items() if parser.is_json])
def test_so_is_json_that_was_changed_into_other_json(name: str, tmp_path: Path) -> None:
    random = Random(0)
    made = [changed(seed, random) for seed in PARSERS[name].seeds() for _ in range(CHANGES)]
    assert len(set(filter(None, made))) > CHANGES // 2
    for content in filter(None, made):
        check(PARSERS[name], content, tmp_path)


def test_a_sentence_that_cannot_be_printed_is_a_finding(tmp_path: Path) -> None:
    def refuse(content: bytes, folder: Path) -> None:
        raise Malformed(folder, content.decode())

    parser = Parser(lambda: (), refuse)
    check(parser, b"a fault", tmp_path)
    for content in (b"\x1b[2J", b"a" * 2000):
        with pytest.raises(AssertionError, match="no sentence to print"):
            check(parser, content, tmp_path)
