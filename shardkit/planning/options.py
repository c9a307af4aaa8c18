"""How a source is read and its output laid out."""

from __future__ import annotations

from dataclasses import dataclass

from shardkit.limits import Limits


@dataclass(frozen=True, slots=True)
class ConversionOptions:
    """How a source is read and its output laid out, whatever is edited.

    Attributes:
        max_shard: bound on each file, as ``"2GB"`` or bytes; None for one shard.
        format: name of the format to read the source as; None to recognise it.
        with_companions: whether the small files of a source folder come along.
        checksum: algorithm of the digests of a manifest; None for no manifest.
        compress: name of the codec that compresses the shards; None for plain ones.
        limits: what the source may ask for.
    """

    max_shard: str | int | None = "5GB"
    format: str | None = None
    with_companions: bool = True
    checksum: str | None = None
    compress: str | None = None
    limits: Limits = Limits()
