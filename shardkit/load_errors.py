"""The errors of the loader; `shardkit.errors` draws the whole tree, and exports them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from shardkit.hints import Hint
from shardkit.shardkit_error import ShardkitError


class LoadError(ShardkitError):
    """A checkpoint cannot become a running model.

    Example:
        >>> import shardkit
        >>> from shardkit.load import get_max_memory
        >>> try:
        ...     get_max_memory({"tpu": "8GB"})
        ... except shardkit.LoadError as error:
        ...     print("'tpu'" in str(error))
        True
    """


class Mismatch(LoadError):
    """The model and the checkpoint are not compatible.

    Attributes:
        missing: names that the model has and the checkpoint has not.
        unexpected: names that the checkpoint has and the model has not.
        wrong_shape: for each name, the shape in the checkpoint and the shape in the model.

    Example:
        >>> import shardkit
        >>> from shardkit.load import load_checkpoint_in_model
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> try:
        ...     load_checkpoint_in_model(model, "model.safetensors")
        ... except shardkit.Mismatch as error:
        ...     print(error.wrong_shape["2.weight"])
        ((4, 8), (2, 8))
    """

    def __init__(
        self,
        message: str,
        *,
        missing: tuple[str, ...] = (),
        unexpected: tuple[str, ...] = (),
        wrong_shape: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] | None = None,
        hint: Hint | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.missing = missing
        self.unexpected = unexpected
        self.wrong_shape = dict(wrong_shape or {})


class ReadOnly(LoadError):
    """A lazy tensor of a checkpoint cannot be written; clone it first.

    Attributes:
        places: where its bytes are stored: for each run of bytes the file, the offset of its first
            byte, and its length in bytes.

    Example:
        >>> import shardkit
        >>> from shardkit.load import tensors
        >>> bias = tensors("model.safetensors")["0.bias"]
        >>> try:
        ...     bias.zero_()
        ... except shardkit.ReadOnly:
        ...     bias = bias.clone().zero_()
        >>> float(bias.sum())
        0.0
    """

    def __init__(
        self,
        message: str,
        *,
        places: tuple[tuple[Path, int, int], ...] = (),
        hint: Hint | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.places = places


class NotTrained(LoadError, RuntimeError):
    """A gradient is requested for a streamed weight, or through one that is no longer in memory.

    Example:
        >>> import shardkit
        >>> from shardkit.load import close, load_checkpoint_and_dispatch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> model = load_checkpoint_and_dispatch(model, "model.safetensors", {"": "disk"})
        >>> try:
        ...     model[0].weight.requires_grad_()
        ... except shardkit.NotTrained as error:
        ...     print(error)
        '0.weight' streams, and cannot be trained
        >>> close(model)
    """


class OverBudget(LoadError):
    """The memory budget is too small.

    Attributes:
        needed: bytes that the model needs.
        available: bytes that the budget allows.

    Example:
        >>> import shardkit
        >>> from shardkit.load import init_empty_weights, load_checkpoint_and_dispatch
        >>> from torch import nn
        >>> with init_empty_weights():
        ...     model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> try:
        ...     load_checkpoint_and_dispatch(
        ...         model, "model.safetensors", "auto", max_memory={"cpu": 200}, offload="never"
        ...     )
        ... except shardkit.OverBudget as error:
        ...     print(error.needed, error.available)
        384 200
    """

    def __init__(
        self, message: str, *, needed: int, available: int, hint: Hint | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.needed = needed
        self.available = available
