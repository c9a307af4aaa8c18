"""Choose the files beside the weights that are copied: config, tokenizer, generation settings,
licence, code.

Regular files (symlinks followed, but not out of the folder) of at most 50 MB at the top of a source
folder and in its subfolders without weights, not hidden, recognised by no format, no index, no
manifest, no record of blocks, and not named like a shard.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from shardkit.checkpoint.entries import Checkpoint
from shardkit.payloads.payload import Extent
from shardkit.planning.plan import OutputFile
from shardkit.sources.folder_contents import surroundings


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What config.json says that matters to weights.

    Attributes:
        ties_embeddings: false where the model has an output head of its own, so that equal bytes
            are no tie.
        dtype: name of the type that the model is to be loaded in; None where it does not say.
        quantised: name of the method by which the weights are quantised; None where they are not.
    """

    ties_embeddings: bool = True
    dtype: str | None = None
    quantised: str | None = None

    @classmethod
    def beside(cls, path: Path) -> ModelConfig:
        """From the config.json in the folder *path*; what is not there, or not readable, says
        nothing.
        """
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
        quantised = [
            part["quantization_config"]
            for part in parts
            if isinstance(part.get("quantization_config"), dict)
        ]
        return cls(ties, dtype, _method(quantised[0]) if quantised else None)


def _method(config: object) -> str:
    """How a quantization_config calls its method; some name only the type of their codes, as in
    ``{"fmt": "e4m3"}``.
    """
    match config:
        case {"quant_method": str(method)}:
            return method
    return "unnamed"


def companions(folder: Path, checkpoint: Checkpoint) -> tuple[OutputFile, ...]:
    """The companions of *checkpoint*, which was read from *folder*, as files to be copied."""
    found = surroundings(folder, (file.path for file in checkpoint.files))
    return tuple(_copied(folder, path) for path in found.companions)


def _copied(folder: Path, path: Path) -> OutputFile:
    parts = (Extent(path, 0, path.stat().st_size),) if path.stat().st_size else ()
    return OutputFile(path.relative_to(folder).as_posix(), parts)
