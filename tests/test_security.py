"""Every promise of SECURITY.md names a test that exists."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from repository import ROOT

ROW = re.compile(r"^\| (?P<promise>[^|]+) \| (?P<tests>[^|]+) \|$", re.MULTILINE)
NAMED = re.compile(r"`(?:(?P<file>[\w/]+\.py)|(?P<test>test_\w+)|(?P<folder>[\w/*-]+))`")


def promises() -> Iterator[tuple[str, str]]:
    for row in ROW.finditer((ROOT / "SECURITY.md").read_text(encoding="utf-8")):
        if row["promise"] not in ("promise", "---"):
            yield row["promise"], row["tests"]


PROMISES = dict(promises())


def test_the_promises_are_found() -> None:
    assert len(PROMISES) > 20


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: re.sub(r"\W+", " ", promise)[:60])
def test_a_promise_names_tests_that_there_are(promise: str) -> None:
    file, named = "", list(NAMED.finditer(PROMISES[promise]))
    assert named
    for name in named:
        if name["file"]:
            file = name["file"]
            assert (ROOT / "tests" / file).is_file(), file
        elif name["folder"]:
            assert list(ROOT.glob(name["folder"])), name["folder"]
        else:
            assert f"\ndef {name['test']}(" in (ROOT / "tests" / file).read_text(
                encoding="utf-8"
            ), name[0]
