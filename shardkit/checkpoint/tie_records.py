"""Records of tied weights in the metadata of safetensors, and how they differ from other text.

huggingface_hub and safetensors write ``alias: kept`` for each name that they drop, into a map that
users write to as well; no library reads it back. ``lm_head.weight: model.embed_tokens.weight`` is a
tie, ``author: w`` beside a tensor called ``w`` is not. A record is accepted if both names have
the same last part, as the names of tied parameters nearly always have. For any other alias,
shardkit lists it under a key of its own.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping

LISTING = "shardkit.aliases"


def recorded(aliases: Mapping[str, str]) -> dict[str, str]:
    """The metadata that record *aliases*, each to the name that is kept."""
    unlike = sorted(alias for alias, kept in aliases.items() if not _is_alike(alias, kept))
    return {**aliases, LISTING: json.dumps(unlike)} if unlike else dict(aliases)


def room(alias: str, kept: str) -> int:
    """At least the bytes that the record of *alias* takes in a header."""
    record = len(json.dumps(alias)) + len(json.dumps(kept)) + len(":,")
    if _is_alike(alias, kept):
        return record
    return record + len(json.dumps(json.dumps([alias]))) + len(f'"{LISTING}":,')


def ties(metadata: Mapping[str, str], stored: Collection[str]) -> dict[str, str]:
    """The aliases in *metadata* of a file that holds the tensors *stored*, each to the name that is
    kept.
    """
    listed = _listed(metadata)
    return {
        alias: kept
        for alias, kept in metadata.items()
        if kept in stored
        and alias not in stored
        and alias != "format"
        and (alias in listed or _is_alike(alias, kept))
    }


def without_ties(metadata: Mapping[str, str], aliases: Collection[str]) -> dict[str, str]:
    """*metadata* without the records of *aliases*, and without a listing of them."""
    rest = {key: text for key, text in metadata.items() if key not in aliases}
    if _listed(metadata):
        del rest[LISTING]
    return rest


def _is_alike(alias: str, kept: str) -> bool:
    return alias.rpartition(".")[2] == kept.rpartition(".")[2]


def _listed(metadata: Mapping[str, str]) -> frozenset[str]:
    try:
        names: object = json.loads(metadata.get(LISTING, "[]"))
    except (ValueError, RecursionError):
        return frozenset()
    return (
        frozenset(name for name in names if isinstance(name, str))
        if isinstance(names, list)
        else frozenset()
    )
