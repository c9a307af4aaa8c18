"""The text of a manifest: what `json` writes with an indent, put together faster."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from shardkit.limits import Limits
from shardkit.metadata.manifest import Digests, Listed, Manifest, Run, dump, parse

NAMES = st.lists(st.text(min_size=1), unique=True, max_size=4)


@given(st.integers(0, 3), NAMES)
def test_the_text_is_that_of_json_and_says_what_was_dumped(count: int, names: list[str]) -> None:
    runs = tuple(Run(name, 8 * at, 8 * at + 8) for at, name in enumerate(names))
    digests = Digests("ab", dict.fromkeys(names, "cd"))
    files = tuple(Listed(f"model-{at}.safetensors", 999, runs, digests) for at in range(count))
    manifest = Manifest("sha256", (*files, Listed('a "b" é', 0, (), Digests("", {}))))
    content = dump(manifest)
    assert content.decode() == json.dumps(json.loads(content), indent=1) + "\n"
    assert parse(Path("manifest"), content, Limits()) == manifest
    assert json.loads(dump(Manifest("xxh3", ())))["files"] == {}
