"""The index of a folder of shards (``*.index.json``): parsed and dumped, without any I/O.

Names in an untrusted index are opened: they may not leave the folder of the index. ``./`` in a name
is dropped. Besides the form of Hugging Face, ``{"metadata": …, "weight_map": {name: file}}``, the
map alone is an index, as it is for Accelerate.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from shardkit.errors import LimitExceeded, Malformed
from shardkit.limits import Limits
from shardkit.metadata.strict_json import parse_json
from shardkit.printable import shown

_WHERE = "index"
LARGEST_READ_BY_HUB = 10 << 20  # huggingface_hub refuses an index of more bytes
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_DRIVE = re.compile(r"[A-Za-z]:")
_NAMES = (
    "an index names files in its folder or below, relative to it: download it again, or correct "
    "it by hand"
)


@dataclass(frozen=True, slots=True)
class Index:
    """The content of an index.

    Attributes:
        weight_map: name of each tensor to the name of the file that holds it, relative to the
            index.
        metadata: what the writer added, as a total size; untrusted values.
    """

    weight_map: dict[str, str]
    metadata: dict[str, object]

    @property
    def shards(self) -> list[str]:
        """The names of the files, sorted."""
        return sorted(set(self.weight_map.values()))


def parse(path: Path, content: bytes, limits: Limits) -> Index:
    """Parse the index whose text is *content*.

    Raises:
        Malformed: it is not an index, or a name in it leads out of its folder.
        LimitExceeded: it holds too many tensors, or is nested too deeply.
    """
    document = parse_json(path, content, limits, where=_WHERE)
    if not isinstance(document, dict):
        raise Malformed(path, f"must be an object, found {shown(document)}", where=_WHERE)
    is_flat = "weight_map" not in document and all(
        isinstance(file, str) for file in document.values()
    )
    weight_map = document if is_flat else document.get("weight_map")
    metadata = {} if is_flat else document.get("metadata") or {}
    if not isinstance(weight_map, dict) or not weight_map:
        raise Malformed(
            path,
            f"weight_map must name a file for each tensor, found {shown(weight_map)}",
            where=_WHERE,
        )
    if not isinstance(metadata, dict):
        raise Malformed(path, f"metadata must be an object, found {shown(metadata)}", where=_WHERE)
    if len(weight_map) > limits.tensors:
        raise LimitExceeded(
            path, f"lists {len(weight_map):,} tensors", limit="tensors", actual=len(weight_map)
        )
    _check_files(path, weight_map)
    if any("./" in file for file in set(weight_map.values())):
        weight_map = {tensor: _without_dots(file) for tensor, file in weight_map.items()}
    return Index(weight_map, metadata)


def dump(weight_map: Mapping[str, str], total_size: int) -> bytes:
    """Write an index over *total_size* bytes of tensors: keys sorted, indented unless it is too
    large for huggingface_hub.
    """
    document = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    text = json.dumps(document, indent=2, sort_keys=True) + "\n"
    if len(text) > LARGEST_READ_BY_HUB:
        text = json.dumps(document, separators=(",", ":"), sort_keys=True)
    return text.encode()


def _check_files(path: Path, weight_map: dict[str, object]) -> None:
    fine: set[str] = set()
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise Malformed(
                path,
                f"the file of tensor {shown(tensor)} must be a name, found {shown(name)}",
                where=_WHERE,
            )
        if name not in fine:
            fault = fault_of_name(_without_dots(name))
            if fault:
                message = f"the file of tensor {shown(tensor)}, {shown(name)}, {fault}"
                raise Malformed(path, message, where=_WHERE, hint=_NAMES)
            fine.add(name)


def _without_dots(name: str) -> str:
    """*name* without steps that stay where they are."""
    return "/".join(step for step in name.split("/") if step != ".") if "./" in name else name


def fault_of_name(name: str) -> str | None:
    """Explain why *name* may not stand for a file in the folder of an index; None if it may.

    A format that lists files calls this for each name before the file is opened.

    Args:
        name: as the index has it, with forward slashes.

    Returns:
        The end of a sentence that begins with the name, or None.

    Example:
        >>> from shardkit.plugin import fault_of_name
        >>> fault_of_name("model-00001-of-00002.safetensors")
        >>> fault_of_name("../../etc/passwd")
        'leads out of the folder of the index'
    """
    if not name:
        return "has an empty name"
    if name.startswith("/") or _DRIVE.match(name):
        return "is an absolute path, and must be in the folder of the index"
    if "\\" in name:
        return "contains a backslash; folders are separated by /"
    if _CONTROL.search(name):
        return "contains a control character"
    steps = name.split("/")
    if ".." in steps:
        return "leads out of the folder of the index"
    return "contains an empty component or a single dot" if "" in steps or "." in steps else None
