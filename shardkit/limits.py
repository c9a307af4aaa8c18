"""Safety limits for untrusted files."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Safety limits for untrusted files: real checkpoints of any size stay far below them.

    Attributes:
        header_bytes: size of a header, an index or a zip directory, in bytes; the safetensors
            format itself allows no more.
        tensors: tensors in one checkpoint.
        pickle_ops: opcodes of one pickle.
        held_bytes: bytes of memory that parsing one pickle may take.
        json_nesting: depth of a JSON document.
        expanded_bytes: size of decompressed data, in bytes.
        ratio: decompressed size divided by compressed size, checked from 64 MiB on.

    Example:
        >>> import shardkit
        >>> strict = shardkit.Limits(tensors=10_000, expanded_bytes=50_000_000_000)
        >>> len(shardkit.open("model.safetensors", limits=strict))
        4
    """

    header_bytes: int = 100_000_000
    tensors: int = 1_000_000
    pickle_ops: int = 100_000_000
    held_bytes: int = 1_000_000_000
    json_nesting: int = 64
    expanded_bytes: int = 1_000_000_000_000
    ratio: int = 200
