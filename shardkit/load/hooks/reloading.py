"""`load_state_dict` into a model that streams some of its weights: refused before anything is
copied.

torch copies all weights that it can, and reports the others afterwards. The model would then be a
mixture of two checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain

from torch import nn

from shardkit.errors import LoadError
from shardkit.load.lazy.streamed_weight import Streamed
from shardkit.load.loading.match import listed
from shardkit.load.modules.torch_internals import remove_load_state_dict_hook


def guard(model: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """Attach the hook to *blocks* of *model*, to what is in them and to what is around them: each
    may be loaded by itself.
    """
    streamed = set(blocks)
    inside = {part for block in streamed for part in block.modules()}
    for module in model.modules():
        if module in inside or not streamed.isdisjoint(module.modules()):
            module.register_load_state_dict_pre_hook(refuse_copying)  # type: ignore[no-untyped-call]  # torch leaves it untyped


def unguard(model: nn.Module) -> None:
    """Take it away again."""
    for module in model.modules():
        remove_load_state_dict_hook(module, refuse_copying)


def refuse_copying(
    module: nn.Module,
    state_dict: Mapping[str, object],
    prefix: str,
    metadata: Mapping[str, object],
    *_: object,
) -> None:
    """The hook.

    Raises:
        LoadError: *state_dict* would be copied into weights that stream.
    """
    if metadata.get("assign_to_params_buffers"):
        return
    named = chain(module.named_parameters(), module.named_buffers())
    streamed = [
        prefix + name
        for name, each in named
        if isinstance(each, Streamed) and prefix + name in state_dict
    ]
    if streamed:
        raise LoadError(
            (
                f"load_state_dict would copy into {listed(streamed)}, which stream and cannot be "
                "written to; nothing was changed"
            ),
            hint="call load_state_dict(..., assign=True), which keeps the new weights in memory; "
            "or save them, and load that "
            "file with load_checkpoint_and_dispatch, so that they stream",
        )
