"""Classify weight files by name. Pure: nothing is opened.

1. Numbered shards of one model are joined. Tensor-parallel parts hold slices of the same tensors,
   and ZeRO partitions slices of flat vectors: they are never joined as shards.
2. A variant (``model.fp16.safetensors``) is read only where its file or index is given.
3. The state that a trainer saves to resume (optimizer, scheduler, random numbers) is not a model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# What the loaders of Hugging Face look for in a folder, in the order of transformers'
# _get_checkpoint_shard_files; the names of diffusers in the same order after them.
STEMS = ("model", "pytorch_model", "diffusion_pytorch_model")
PREFERRED = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
)

_INDEX = re.compile(r".+\.index(\.[^.]+)?\.json")
_SHARD = re.compile(
    r"(?P<stem>.+)-(?P<number>\d{1,5})-of-(?P<total>\d{1,5})"
    r"(?P<suffix>(\.\w+)?\.(safetensors|bin|pt|pth|ckpt)(\.zst)?)",
    re.ASCII,
)
_VARIANT = re.compile(
    rf"({'|'.join(STEMS)}|adapter_model)\.(?P<before>[A-Za-z]\w*)"
    r"(-\d{1,6}-of-\d{1,6})?\.(safetensors|bin)(\.zst)?"
    rf"|({'|'.join(STEMS)})-\d{{1,6}}-of-\d{{1,6}}\.(?P<after>[A-Za-z]\w*)\.(safetensors|bin)(\.zst)?"
    r"|.+\.index\.(?P<index>[A-Za-z]\w*)\.json",
    re.ASCII,
)
_PARALLEL = re.compile(
    r"consolidated\.\d\d\.pth"
    r"|(zero_pp_rank_\d+_)?mp_rank_\d+(_\d+)*(_model_states)?\.pt"
    r"|layer_\d+-model_\d+-model_states\.pt"
)
_RANDOM = "random-number state"
_OPTIMIZER = "optimizer state"
_TRAINING = (
    (re.compile(r"(?i)(optimizer|optim)(_\d+)?\.(pt|pth|bin|pkl|safetensors)"), _OPTIMIZER),
    (re.compile(r".*_optim_states\.pt"), _OPTIMIZER),
    (re.compile(r"(lr_)?scheduler(_\d+)?\.(pt|pth|bin)"), "scheduler state"),
    (re.compile(r"rng_state(_\d+)?\.pth|random_states_\d+\.pkl"), _RANDOM),
    (re.compile(r"(grad_)?scaler(_\d+)?\.pt"), "gradient scaler state"),
    (re.compile(r"(dl_state_dict|sampler)(_\d+)?\.(bin|pt)"), "data loader state"),
    (re.compile(r"custom_checkpoint_\d+\.pkl"), "state of a custom training object"),
    (re.compile(r"training_args\.bin"), "training arguments"),
)
_FOREIGN: Mapping[str, str] = {
    ".gguf": "GGUF file",
    ".ggml": "GGML file",
    ".h5": "HDF5 file (Keras)",
    ".hdf5": "HDF5 file (Keras)",
    ".keras": "Keras archive",
    ".msgpack": "msgpack file (Flax)",
    ".onnx": "ONNX model",
    ".onnx_data": "weights of an ONNX model",
    ".distcp": "file of a distributed checkpoint (DCP)",
    ".npz": "archive of NumPy arrays",
    ".npy": "NumPy array",
    ".pdparams": "Paddle weights",
    ".tflite": "TensorFlow Lite model",
    ".mlmodel": "Core ML model",
    ".ot": "weights of rust-bert",
    ".nemo": "NeMo archive",
    ".pte": "ExecuTorch program",
    ".ptl": "TorchScript program for mobile devices",
    ".tensors": "file of tensorizer",
}
_TF_CHECKPOINT = re.compile(
    r".+\.data-\d{5}-of-\d{5}|.+\.ckpt(-\d+)?\.index|model\.ckpt-\d+\.index"
)
_STEP = re.compile(r"(checkpoint|step|epoch|global_step)[-_=]?(\d{1,12})\b.*")
_ADAPTER = re.compile(r"adapter_model\b.*|.*lora_weights\.(safetensors|bin)")


@dataclass(frozen=True, slots=True)
class ShardName:
    """The name ``STEM-NUMBER-of-TOTALSUFFIX`` of one of several files."""

    stem: str
    number: int
    total: int
    suffix: str

    @classmethod
    def of(cls, name: str) -> ShardName | None:
        """What *name* says; None if it is no such name."""
        found = _SHARD.fullmatch(name)
        if found is None:
            return None
        return cls(found["stem"], int(found["number"]), int(found["total"]), found["suffix"])


@dataclass(frozen=True, slots=True)
class ShardSet:
    """The shards of one set that are there.

    Attributes:
        names: the names by their numbers, sorted by these.
        total: how many there should be.
    """

    names: Mapping[int, str]
    total: int

    @property
    def is_complete(self) -> bool:
        """Whether all are there; sets are counted from 1, and a few from 0."""
        ends = (min(self.names), max(self.names))
        return len(self.names) == self.total and ends in ((1, self.total), (0, self.total - 1))

    @property
    def missing(self) -> list[int]:
        """The numbers that are not there."""
        first = 0 if 0 in self.names else 1
        return [number for number in range(first, first + self.total) if number not in self.names]

    def name(self, number: int) -> str:
        """What the shard of that *number* is called."""
        some = next(iter(self.names))
        found = _SHARD.fullmatch(self.names[some])
        assert found is not None  # only such names are in a set
        return (
            f"{found['stem']}-{number:0{len(found['number'])}}-of-{found['total']}{found['suffix']}"
        )

    @property
    def pattern(self) -> str:
        """A glob for the names, to call the whole set by."""
        found = _SHARD.fullmatch(next(iter(self.names.values())))
        assert found is not None
        return f"{found['stem']}-*-of-{found['total']}{found['suffix']}"


def shard_sets(names: Iterable[str]) -> list[ShardSet]:
    """The sets of several numbered shards among *names*, complete or not, in their order."""
    sets: dict[tuple[str, int, str], dict[int, str]] = {}
    for name in names:
        shard = ShardName.of(name)
        if shard is not None and 0 <= shard.number <= shard.total and shard.total > 1:
            sets.setdefault((shard.stem, shard.total, shard.suffix), {})[shard.number] = name
    return [ShardSet(dict(sorted(found.items())), key[1]) for key, found in sets.items()]


def is_index(name: str) -> bool:
    """Whether a file called *name* is an index of shards."""
    return bool(_INDEX.fullmatch(name))


def variant_of(name: str) -> str | None:
    """The variant (``fp16``) in the *name* of weights or of an index; None for the default."""
    found = _VARIANT.fullmatch(name)
    return found["before"] or found["after"] or found["index"] if found else None


def training_state(name: str) -> str | None:
    """Which part of the state of a trainer a file called *name* is; None if it may be a model."""
    return next((what for pattern, what in _TRAINING if pattern.fullmatch(name)), None)


def foreign(name: str) -> str | None:
    """What a file called *name* holds weights as, in a format that shardkit does not read."""
    if _TF_CHECKPOINT.fullmatch(name):
        return "TensorFlow checkpoint"
    dot = name.rfind(".")
    return _FOREIGN.get(name[dot:].lower()) if dot > 0 else None


def is_parallel(name: str) -> bool:
    """Whether a file called *name* is the part of one rank: tensor-parallel, or a ZeRO
    partition.
    """
    return bool(_PARALLEL.fullmatch(name))


def is_adapter(name: str) -> bool:
    """Whether a file called *name* is an adapter, which is put on top of a model."""
    return bool(_ADAPTER.fullmatch(name))


def likeliness(name: str) -> tuple[object, ...]:
    """A key that sorts the names of files and folders: the likeliest to be the model first.

    Of the steps of one run the last comes first.
    """
    step = _STEP.fullmatch(name)
    stem = name.split(".", maxsplit=1)[0].split("-", maxsplit=1)[0]
    unlikely = training_state(name) is not None or name.startswith("optim")
    known = ("model", "transformer", "unet", "pytorch_model", "diffusion_pytorch_model", "module")
    return (
        unlikely,
        variant_of(name) is not None or is_adapter(name),
        not stem.startswith(known) and "model" not in name,
        not name.endswith(".safetensors"),
        -int(step[2]) if step else 0,
        len(name),
        name,
    )
