"""Which files beside the weights come along: config, tokenizer, generation settings, licence, code.

Regular files (symlinks followed) of at most 50 MB at the top of a source folder and in its subfolders without weights, not
hidden, recognised by no format, no index, no manifest, no record of blocks, and not called like a shard.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from shardkit import registry
from shardkit.checkpoint import Checkpoint
from shardkit.errors import FormatError, UnknownFormat
from shardkit.format import Source
from shardkit.limits import Limits
from shardkit.manifest import MANIFEST_NAME
from shardkit.offload_record import OFFLOAD_NAME
from shardkit.payload import Extent
from shardkit.plan import OutputFile, is_shard_name

_LARGEST = 50_000_000
_DEEPEST = 8  # folders below the source; a guard against circles of symlinks


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What config.json says that matters to weights.

    Attributes:
        ties_embeddings: false where the model has an output head of its own, so that equal bytes are no tie.
        dtype: name of the type that the model is to be loaded in; None where it does not say.
        quantised: name of the method by which the weights are quantised; None where they are not.
    """

    ties_embeddings: bool = True
    dtype: str | None = None
    quantised: str | None = None

    @classmethod
    def beside(cls, path: Path) -> ModelConfig:
        """From the config.json in the folder *path*; what is not there, or not readable, says nothing."""
        try:
            content = json.loads((path / "config.json").read_bytes())
        except (OSError, ValueError, RecursionError):
            return cls()
        return cls._of(content) if isinstance(content, dict) else cls()

    @classmethod
    def _of(cls, content: dict[str, object]) -> ModelConfig:
        text = content.get("text_config")
        parts = [content, text] if isinstance(text, dict) else [content]
        names = [part.get(key) for part in parts for key in ("dtype", "torch_dtype")]
        dtype = next((name for name in names if isinstance(name, str)), None)
        ties = all(part.get("tie_word_embeddings") is not False for part in parts)
        quantised = [part["quantization_config"] for part in parts if isinstance(part.get("quantization_config"), dict)]
        return cls(ties, dtype, _method(quantised[0]) if quantised else None)


def _method(config: object) -> str:
    """How a quantization_config calls its method; some name only the type of their codes, as in ``{"fmt": "e4m3"}``."""
    match config:
        case {"quant_method": str(method)}:
            return method
    return "unnamed"


def companions(folder: Path, checkpoint: Checkpoint) -> tuple[OutputFile, ...]:
    """The companions of *checkpoint*, which was read from *folder*, as files to be copied."""
    weights = {file.path for file in checkpoint.files}
    return tuple(_copied(folder, path) for path in sorted(_found(folder, weights, _DEEPEST)))


def _found(folder: Path, weights: set[Path], depth: int) -> Iterator[Path]:
    paths = [folder / name for name in sorted(os.listdir(folder)) if not name.startswith(".")]
    yield from (path for path in paths if path not in weights and _comes_along(path))
    for path in paths:
        if path.is_dir() and depth:
            yield from _below(path, weights, depth - 1)


def _below(folder: Path, weights: set[Path], depth: int) -> Iterable[Path]:
    """The companions in a subfolder; none where it holds weights, which are a checkpoint of their own."""
    try:
        names = [folder / name for name in os.listdir(folder)]
    except OSError:
        return ()
    if any(path in weights or _is_weights(path) for path in names):
        return ()
    return _found(folder, weights, depth)


def _comes_along(path: Path) -> bool:
    # A pointer of git-lfs, or what a download left, can bear the name of a shard and be no weights. A manifest, or a
    # record of blocks, tells of the folder that it lies in, and of no other.
    ours = is_shard_name(path.name) or path.name in (MANIFEST_NAME, OFFLOAD_NAME)
    return _is_small_file(path) and not _is_index(path) and not ours and not _is_weights(path)


def _is_small_file(path: Path) -> bool:
    try:
        status = path.stat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size <= _LARGEST


def _is_index(path: Path) -> bool:
    return path.name.endswith(".json") and ".index." in path.name


def _is_weights(path: Path) -> bool:
    """Whether a format or a codec claims the file; one that is broken where a format would look is no companion either."""
    if not path.is_file() or not path.stat().st_size:
        return False
    try:
        source = Source.file(path, Limits())
        return registry.codec_of(source) is not None or bool(registry.recognise(source))
    except UnknownFormat as error:
        return error.claimed
    except FormatError:
        return True


def _copied(folder: Path, path: Path) -> OutputFile:
    parts = (Extent(path, 0, path.stat().st_size),) if path.stat().st_size else ()
    return OutputFile(path.relative_to(folder).as_posix(), parts)
