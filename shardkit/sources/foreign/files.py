"""What a file is that no format reads: a table of tests of its content, each with what such a file
is and what to do.

Content decides. A name is looked at only where the content has no mark of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from shardkit.sizes import format_size
from shardkit.sources.foreign.archives import tar_kind, zip_kind
from shardkit.sources.foreign.kinds import AGAIN, ARRAYS, FILE, NPZ, ORIGIN, Kind, joined_by_torch
from shardkit.sources.foreign.marks import (
    LFS_POINTER,
    Test,
    begins,
    begins_like,
    has_at_four,
    is_blank,
    is_core_ml,
    is_flax,
    is_gzip,
    is_json,
    is_old_torch_tar,
    is_onnx,
    is_paddle_inference,
    is_saved_model,
    is_table,
)
from shardkit.sources.format import Source

_POINTER_SIZE = re.compile(rb"^size (\d{1,18})$", re.MULTILINE)
_TOKEN = f"{AGAIN}, with a token if it needs one"
_UNPACK = "unpack it, and convert what is inside"
_WEIGHTS = "pass the file or folder that holds the weights"
_LLAMA = "convert the model's original safetensors or .bin files"
_RESAVE = "load it where it was made and save it with torch.save"
_BY_TENSORFLOW = f"tf.train.load_checkpoint reads them; {ARRAYS}"
_BY_FLAX = (
    "flax.serialization.msgpack_restore reads it, and flax.traverse_util.flatten_dict "
    f"flattens it; {ARRAYS}"
)


def kind_of(source: Source) -> Kind | None:
    """What the file *source* is, by its content or else its name; None if nothing tells."""
    for of in (_failure, _other, _weights, zip_kind, tar_kind, _pickle):
        if kind := of(source):
            return kind
    return next((kind for name, kind in _NAMED if name.fullmatch(source.path.name)), None)


def failed_download(source: Source) -> Kind | None:
    """What a download or a checkout has left in place of the file *source*; None if it is none of
    that.
    """
    if not source.size:
        return Kind("is empty: it has no bytes", AGAIN)
    return _pointer(source.head) or _failure(source)


def _pointer(head: bytes) -> Kind | None:
    if not head.startswith(LFS_POINTER):
        return None
    size = _POINTER_SIZE.search(head)
    stands_for = f" of {format_size(int(size[1]))}" if size else ""
    what = f"is a git-lfs pointer: a line of text that stands for the real file{stands_for}"
    return Kind(what, "run `git lfs pull` in its repository, or download the file itself")


def _pickle(source: Source) -> Kind | None:
    head = source.head
    if head[:1] != b"\x80" or head[1:2] not in (b"\2", b"\3", b"\4", b"\5"):
        is_old = re.match(rb"\([dl]p\d|c[\w.]+\n\w+\n[(pq]", head)
        return (
            Kind("is a Python pickle that torch.save did not write", _RESAVE, is_weights=True)
            if is_old
            else None
        )
    if re.search(rb"paddle[\w.]*\.metadata\b", head):
        return Kind(
            "is the metadata of a distributed checkpoint of Paddle, and holds no weights",
            "give the folder to Paddle",
        )
    if b"torch.distributed.checkpoint.metadata" in head:
        what = (
            "is the metadata of a checkpoint of torch.distributed.checkpoint, and holds no weights"
        )
        return Kind(what, joined_by_torch(source.path.parent))
    if (
        source.path.suffix in (".pdparams", ".pdopt")
        or b"StructuredToParameterName@@" in head + source.tail
    ):
        return Kind(
            "is a Paddle checkpoint (.pdparams)",
            f"load it with paddle.load; {ARRAYS}",
            is_weights=True,
        )
    if b"numpy" in head:
        what = "is a Python pickle with NumPy arrays, which torch.save did not write"
        return Kind(what, f"load it with pickle, if you trust it; {ARRAYS}", is_weights=True)
    return Kind("is a Python pickle that torch.save did not write", _RESAVE, is_weights=True)


def _packed(name: str, command: str) -> tuple[str, str]:
    return f"is compressed with {name}", f"run `{command} {FILE}`, and convert what comes out"


def _first(
    rows: tuple[tuple[Test, str, str], ...], *, is_weights: bool = False
) -> Callable[[Source], Kind | None]:
    """The first kind of *rows* whose test holds."""
    kinds = [(test, Kind(what, advice, is_weights)) for test, what, advice in rows]
    return lambda source: next((kind for test, kind in kinds if test(source)), None)


def _is_cut_off_relabelled_zip(source: Source) -> bool:
    return re.match(rb"0\d\x03\x04", source.head) is not None and not source.members


# a NodeDef: its name, and its operation
_GRAPH = rb"\x0a.{1,5}?\x0a[\x01-\x7f][\w/.:-]{1,127}\x12[\x01-\x40][A-Z]\w+"
_MARKUP = rb"(\xef\xbb\xbf)?\s*(<\?xml.{,200}?>\s*)?"
_failure = _first(
    (
        (
            begins_like(_MARKUP + b"<(!doctype html|html|head|body)"),
            "is an HTML page: the download saved an error or a login page",
            _TOKEN,
        ),
        (
            begins_like(_MARKUP + rb"<error\b"),
            "is an XML error message of a storage server",
            _TOKEN,
        ),
        (is_blank, "begins with zeros only, like an unfinished download", AGAIN),
    )
)
_other = _first(
    (
        (
            begins_like(_MARKUP + b"<net name="),
            "is the text of an OpenVINO model, whose weights are in a .bin file",
            ORIGIN,
        ),
        (
            begins_like(rb"(\xef\xbb\xbf)?\s*<\?xml"),
            "is XML text and holds no weights",
            _WEIGHTS,
        ),
        (
            is_table,
            "is the index of a TensorFlow checkpoint, whose weights are in .data files",
            _BY_TENSORFLOW,
        ),
        (is_json, "is JSON text and holds no weights", _WEIGHTS),
    )
)
_weights = _first(
    (
        (is_gzip, *_packed("gzip", "gunzip")),
        (begins(b"BZh"), *_packed("bzip2", "bunzip2")),
        (begins(b"\xfd7zXZ\0"), *_packed("xz", "unxz")),
        (begins(b"\x04\x22\x4d\x18"), *_packed("lz4", "unlz4")),
        (
            begins(b"\x28\xb5\x2f\xfd"),
            *_packed("zstd more than once", "zstd -d"),
        ),  # once would have been seen through
        (begins(b"7z\xbc\xaf\x27\x1c"), "is a 7-Zip archive", f"{_UNPACK}: 7z x {FILE}"),
        (begins(b"Rar!"), "is a RAR archive", f"{_UNPACK}: unrar x {FILE}"),
        (is_old_torch_tar, "is a tar archive of torch before 0.1.10", _RESAVE),
        (begins(b"GGUF"), "is a GGUF file, as llama.cpp uses", _LLAMA),
        (begins(b"lmgg", b"fmgg", b"tjgg"), "is an old GGML file of llama.cpp", _LLAMA),
        (
            begins_like(rb"[\x01-\x20]\0\0\0.\0[A-Z][A-Za-z0-9]{2,60}Spec\0"),
            "is a model of CTranslate2",
            ORIGIN,
        ),
        (
            begins(b"\x89HDF\r\n\x1a\n"),
            "is an HDF5 file, as Keras writes",
            f"load it with Keras or h5py; {ARRAYS}",
        ),
        (begins(b"\x93NUMPY"), "is a NumPy array (.npy), which a plugin reads", NPZ),
        (begins(b"|TZR|"), "is a file of tensorizer", "load it there and save it as safetensors"),
        (has_at_four(b"PTMF"), "is a flatbuffer of PyTorch Mobile (.ptl)", ORIGIN),
        (
            has_at_four(b"ET12", b"TFL3"),
            "is a program for mobile devices (ExecuTorch or TensorFlow Lite)",
            ORIGIN,
        ),
        (
            is_saved_model,
            "looks like a TensorFlow SavedModel",
            f"load its folder with TensorFlow; {ARRAYS}",
        ),
        (
            begins_like(_GRAPH),
            "looks like a frozen TensorFlow graph (.pb)",
            f"load it with TensorFlow; {ARRAYS}",
        ),
        (is_core_ml, "looks like a Core ML model (.mlmodel)", ORIGIN),
        (is_onnx, "looks like an ONNX model (a protocol buffer)", ORIGIN),
        (is_flax, "is a MessagePack file of Flax (.msgpack)", _BY_FLAX),
        (
            is_paddle_inference,
            "looks like weights for Paddle Inference (.pdiparams)",
            "use the .pdparams it was made from",
        ),
        (
            _is_cut_off_relabelled_zip,
            (
                "begins like an archive of torch.save whose first two bytes GPT-SoVITS has "
                "replaced, "
                "and is cut off"
            ),
            AGAIN,
        ),
    ),
    is_weights=True,
)
_NAMED = (
    (
        re.compile(r".+\.data-\d{5}-of-\d{5}"),
        Kind(
            "holds weights of a TensorFlow checkpoint, by its name", _BY_TENSORFLOW, is_weights=True
        ),
    ),
    (
        re.compile(r".+\.onnx[._]data"),
        Kind("holds weights of the ONNX model beside it, by its name", ORIGIN, is_weights=True),
    ),
    (
        re.compile(r"group\d+-shard\d+of\d+\.bin"),
        Kind("holds weights of a TensorFlow.js model, by its name", ORIGIN, is_weights=True),
    ),
)
