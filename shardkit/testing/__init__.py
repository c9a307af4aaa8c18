"""The conformance kit: the rules of formats and codecs, as plain functions that raise
AssertionError with a sentence.

    from shardkit.testing import check_format

    def test_the_format_keeps_its_promises():
        check_format(FORMAT, samples=[Path("tests/good.npz")])

`check_format` and `check_codec` run smaller checks, listed in `READING`, `WRITING` and `CODING`, so
that a test may be parametrised over them and name the rule that is violated. Samples should be
small, a few kilobytes: they are truncated at every byte. In the examples, ``FORMAT`` and ``CODEC``
are the records that a plugin exports.
"""

from __future__ import annotations

from shardkit.testing.codecs import CODING, CodecSample, check_codec
from shardkit.testing.damage import check_damage, check_truncation
from shardkit.testing.formats import (
    check_foreign,
    check_headers_only,
    check_payloads,
    check_scan,
    check_sniff,
    check_unusual_content,
)
from shardkit.testing.payloads import Watched, check_payload
from shardkit.testing.suite import READING, check_format
from shardkit.testing.writers import (
    WRITING,
    assembled,
    check_dtypes,
    check_large_tensor,
    check_layout,
    check_metadata,
    check_names,
    check_shapes,
    check_ties,
)

__all__ = [
    "CODING",
    "READING",
    "WRITING",
    "CodecSample",
    "Watched",
    "assembled",
    "check_codec",
    "check_damage",
    "check_dtypes",
    "check_foreign",
    "check_format",
    "check_headers_only",
    "check_large_tensor",
    "check_layout",
    "check_metadata",
    "check_names",
    "check_payload",
    "check_payloads",
    "check_scan",
    "check_shapes",
    "check_sniff",
    "check_ties",
    "check_truncation",
    "check_unusual_content",
]
