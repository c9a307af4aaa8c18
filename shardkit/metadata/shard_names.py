"""The names of the files of a sharded checkpoint, as the libraries that load them expect them."""

from __future__ import annotations

import re
from collections.abc import Iterable

STEM = "model"  # what the names of the files begin with
DIFFUSERS_STEM = "diffusion_pytorch_model"
ADAPTER_STEM = "adapter_model"  # of PEFT, which looks for no other name
_STEMS = (STEM, DIFFUSERS_STEM, ADAPTER_STEM)
_OWN_STEM = re.compile(rf"({DIFFUSERS_STEM}|{ADAPTER_STEM})(-\d+-of-\d+)?\..+")
_SHARD_NAME = re.compile(rf"({'|'.join(_STEMS)})(-\d{{5}}-of-\d{{5}})?\.safetensors(\.\w+)?")


def index_name(stem: str) -> str:
    """What the index of shards is called whose names begin with *stem*."""
    return f"{stem}.safetensors.index.json"


INDEX_NAME = index_name(STEM)
INDEX_NAMES = tuple(map(index_name, _STEMS))


def stem_of(names: Iterable[str]) -> str:
    """What the names of shards begin with where the weights were in files called *names*, so that
    the same library finds them.
    """
    found = {match[1] if (match := _OWN_STEM.fullmatch(name)) else STEM for name in names}
    return found.pop() if len(found) == 1 else STEM


def is_shard_name(name: str) -> bool:
    """Whether some folder that is planned here could have a shard called *name*."""
    return bool(_SHARD_NAME.fullmatch(name))
