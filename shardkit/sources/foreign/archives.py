"""Zip and tar archives that torch did not write: which they are, and what in them is worth
unpacking.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from shardkit.alignment import round_up
from shardkit.errors import FormatError
from shardkit.printable import several, shown
from shardkit.sources.foreign.kinds import AGAIN, ARRAYS, FILE, NPZ, Kind
from shardkit.sources.foreign.marks import gunzipped, is_tar
from shardkit.sources.format import Source

_ENDINGS = (
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".safetensors",
    ".h5",
    ".npz",
    ".msgpack",
    ".gguf",
    ".onnx",
)
_BEFORE_WEIGHTS = frozenset(
    {"version", "byteorder", "serialization_id", ".format_version", ".storage_alignment"}
)  # what torch.save writes beside its pickle and the weights
_MOST = 64  # members of a tar archive that are listed
_BLOCK = 512
_SIZE = re.compile(rb"[0-7]{1,12}")


def zip_kind(source: Source) -> Kind | None:
    """What the zip archive *source* is; None if it is none."""
    if not source.head.startswith(b"PK"):
        return None
    try:
        names = [member.name for member in source.members]
    except FormatError:
        return Kind("begins like a zip archive but is not one", AGAIN)
    steps = {step for name in names for step in name.split("/")}
    if names and all(name.endswith(".npy") for name in names):
        return Kind(
            "is an archive of NumPy arrays (.npz), which a plugin reads", NPZ, is_weights=True
        )
    if "extern_modules" in steps:
        what = "is a torch.package archive, which holds code beside weights"
        return Kind(what, "load it there and save model.state_dict()", is_weights=True)
    if "archive_format" in steps or {"data", "weights"} <= steps:
        advice = "save what it was exported from: torch.save(program.state_dict, …)"
        return Kind("is an archive of torch.export (.pt2)", advice, is_weights=True)
    if "version" in steps and {name.rpartition("/")[2] for name in names} <= _BEFORE_WEIGHTS:
        what = "was left by a torch.save that failed: it holds no data.pkl and no weights"
        return Kind(what, "save it again, or use an earlier checkpoint")
    if "model.weights.h5" in steps:
        return Kind("is a Keras model (.keras)", f"load it with Keras; {ARRAYS}", is_weights=True)
    if "MAR-INF" in steps:
        return _archive("is a model archive of TorchServe (.mar)", names, f"unzip {FILE}")
    return _archive(
        f"is a zip archive of {several(len(names), 'file')} that torch did not write",
        names,
        f"unzip {FILE}",
    )


def tar_kind(source: Source) -> Kind | None:
    """What the tar archive *source* is, compressed with gzip or not; None if it is none."""
    expanded = gunzipped(source.head)
    if not is_tar(expanded or source.head):
        return None
    if expanded:
        names = _tar_names(lambda at: expanded[at : at + _BLOCK], len(expanded))
    else:
        names = _tar_names(lambda at: source.read(at, _BLOCK), source.size)
    of_nemo = source.path.suffix == ".nemo" or any(
        "model_config.yaml" in name.split("/") for name in names
    )
    what = "is a NeMo model (.nemo), a tar archive" if of_nemo else "is a tar archive"
    return _archive(f"{what} compressed with gzip" if expanded else what, names, f"tar xf {FILE}")


def _tar_names(read: Callable[[int], bytes], size: int) -> list[str]:
    """The names of the first files of a tar archive of *size* bytes, as far as it can be read."""
    names: list[str] = []
    at = 0
    for _ in range(_MOST):
        header = read(at) if at + _BLOCK <= size else b""
        digits = header[124:136].strip(b"\0 ")
        if not is_tar(header) or _SIZE.fullmatch(digits) is None:
            break
        if header[156:157] in (b"0", b"\0"):
            names.append(header[:100].rstrip(b"\0").decode("utf-8", "replace"))
        at += _BLOCK + round_up(int(digits, 8), _BLOCK)
    return names


def _archive(what: str, names: Sequence[str], command: str) -> Kind:
    """An archive that *command* unpacks, with what is most worth knowing of its *names*."""
    weights = [name for name in names if name.endswith(_ENDINGS)]
    held = ", ".join(shown(name) for name in (weights or names)[:3]) or "nothing"
    inside = shown(weights[0]) if weights else "what is inside"
    return Kind(
        f"{what}; it holds {held}",
        f"unpack it: {command}; then convert {inside}",
        is_weights=bool(weights),
    )
