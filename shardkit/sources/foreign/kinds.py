"""Kind: what a file or folder is that no format reads, and what to do with it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

# stands for the path in an advice: no name of a file, nor what `shown` makes of one, holds it
FILE = "\0"
AGAIN = "download it again"
ORIGIN = "convert the torch checkpoint that it was made from"
ARRAYS = "save_file of safetensors.numpy writes a dict of its arrays"
NPZ = "pip install shardkit-npz"


@dataclass(frozen=True, slots=True)
class Kind:
    """What a file is.

    Attributes:
        what: the rest of a sentence that begins with its path.
        advice: what to do.
        is_weights: whether it holds weights.
    """

    what: str
    advice: str
    is_weights: bool = False

    def advice_for(self, path: Path) -> str:
        """What to do with the file *path*, quoted for a shell."""
        return self.advice.replace(FILE, shlex.quote(str(path)))


def joined_by_torch(folder: Path) -> str:
    """How torch makes one file of the distributed checkpoint in *folder*."""
    command = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch"
    return (
        f"if you trust it, let torch make one file of it: {command} "
        f"{shlex.quote(str(folder))} out.pt; then convert out.pt"
    )
