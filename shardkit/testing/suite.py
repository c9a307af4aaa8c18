"""Run all checks of a format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from shardkit.sources.format import Format
from shardkit.testing.damage import check_damage, check_truncation
from shardkit.testing.formats import (
    check_foreign,
    check_headers_only,
    check_payloads,
    check_scan,
    check_sniff,
    check_unusual_content,
)
from shardkit.testing.payloads import expect
from shardkit.testing.sources import saying, source_of
from shardkit.testing.writers import WRITING

ReadingCheck = Callable[[Format, Path], None]

READING: tuple[ReadingCheck, ...] = (
    check_sniff,
    check_scan,
    check_payloads,
    check_headers_only,
    check_unusual_content,
    check_truncation,
    check_damage,
)


def check_format(
    candidate: Format, samples: Sequence[Path], *, foreign: Sequence[Path] = ()
) -> None:
    """Run every check of `READING` on every sample, and of `WRITING` if the format has a lay_out.

    Args:
        candidate: the record that the plugin exports.
        samples: small, valid files of the format; they are truncated at every byte. Where writing
            is checked, tensors get the name of the first tensor of the first sample, for formats
            that allow one name only.
        foreign: files of other formats, which it must not claim.

    Raises:
        AssertionError: a rule is violated; the message names the check and the sample.

    Example:
        >>> from pathlib import Path
        >>> from shardkit.testing import check_format
        >>> check_format(FORMAT, [Path("model.safetensors")], foreign=[Path("training.pt")])
    """
    expect(bool(samples), "a format needs one sample at least")
    with saying(f"{candidate.name}, check_foreign"):
        check_foreign(candidate, foreign)
    for sample in samples:
        for check in READING:
            with saying(f"{candidate.name}, {check.__name__}, {sample.name}"):
                check(candidate, sample)
    if candidate.lay_out is not None:
        _check_writing(candidate, samples[0])


def _check_writing(candidate: Format, sample: Path) -> None:
    name = next((entry.name for entry in candidate.scan(source_of(sample)).tensors), "weight")
    for check in WRITING:
        with saying(f"{candidate.name}, {check.__name__}"):
            check(candidate, name)
