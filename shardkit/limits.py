"""What a stranger's file may ask for before it is refused."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Guards against lies, not against size: real checkpoints of any size stay far below.

    Attributes:
        header_bytes: a header, an index or a zip directory, in bytes (the safetensors format itself
            allows no more).
        tensors: entries in one checkpoint.
        pickle_ops: opcodes of one pickle.
        held_bytes: bytes that one pickle may make us hold.
        json_nesting: depth of a JSON document.
        expanded_bytes: what compressed data may expand to, in bytes.
        ratio: by what factor it may expand, judged once 64 MiB are reached.
    """

    header_bytes: int = 100_000_000
    tensors: int = 1_000_000
    pickle_ops: int = 100_000_000
    held_bytes: int = 1_000_000_000
    json_nesting: int = 64
    expanded_bytes: int = 1_000_000_000_000
    ratio: int = 200
