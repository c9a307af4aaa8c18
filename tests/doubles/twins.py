"""Two accelerators made of main memory, on which models run as a pipeline: ``python
tests/doubles/twins.py CHECKPOINT MAP ...``.

Torch can be given a device in Python: here tensors on ``twin:0`` and ``twin:1`` are those of the
CPU, each wrapped. An operation on tensors of different devices is refused, as by any accelerator,
and every move from one to another is noted. This is for the whole process, so that each test has
one of its own; what it finds is printed as JSON, a line for each map.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

from shardkit.load import close, init_empty_weights, load_checkpoint_and_dispatch

IDS = torch.arange(7)
LAYERS = 6

moves: list[tuple[str, str]] = []


class Layer(nn.Module):
    """It has no tensor of its own, and needs its input where its parts need theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        summed: torch.Tensor = x + self.down(torch.relu(self.up(x)))
        return summed


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.register_buffer("scale", torch.full((16,), 0.5))
        self.head = nn.Linear(16, 32, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) * self.scale
        for layer in self.layers:
            x = layer(x)
        logits: torch.Tensor = self.head(x)
        return logits


class Twin(torch.Tensor):
    """A tensor on one of the two: *held*, which only this class touches."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor, device: torch.device) -> Twin:
        made: Twin = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=device,
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch documents a class method, and declares another
        cls,
        func: Callable[..., Any],
        types: object,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # Any: whatever an operation takes and gives
        options = dict(kwargs or {})
        if func is torch.ops.aten._to_copy.default:
            to = options.pop("device", args[0].device)
            return _moved(func(args[0].held, **options), args[0].device, to)
        if func is torch.ops.aten.copy_.default:
            _moved(args[1], args[1].device, args[0].device)
            _held(args[0]).copy_(_held(args[1]))
            return args[0]
        devices = {
            each.device
            for each in tree_leaves((args, options))
            if isinstance(each, torch.Tensor) and each.ndim
        }
        if len(devices) != 1:
            raise RuntimeError(
                f"all tensors must be on one device, and are on {sorted(map(str, devices))}"
            )
        made = func(*tree_map(_held, args), **tree_map(_held, options))
        (device,) = devices
        return tree_map(
            lambda each: Twin(each, device) if isinstance(each, torch.Tensor) else each, made
        )


def _held(value: Any) -> Any:  # Any: an argument of an operation
    return value.held if isinstance(value, Twin) else value


def _moved(value: torch.Tensor, origin: torch.device, to: torch.device) -> torch.Tensor:
    if origin != to:
        moves.append((str(origin), str(to)))
    return value if to.type == "cpu" else Twin(_held(value), to)


class _Module:
    """What torch asks of the module of a device."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 2

    def _is_in_bad_fork(self) -> bool:
        return False


def plug_in() -> object:
    """Let there be the twins as long as what is returned is kept."""
    backend_registration._setup_privateuseone_for_python_backend("twin", backend_module=_Module())
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]  # it declares no types

    def empty(
        size: Sequence[int], *, device: torch.device, dtype: torch.dtype | None = None, **_: object
    ) -> Twin:
        return Twin(torch.empty(size, dtype=dtype), device)

    def empty_strided(
        size: Sequence[int],
        stride: Sequence[int],
        *,
        dtype: torch.dtype,
        device: torch.device,
        **_: object,
    ) -> Twin:
        return Twin(torch.empty_strided(size, stride, dtype=dtype), device)

    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    return library


def run(checkpoint: Path, device_map: str | dict[str, int | str]) -> dict[str, object]:
    """What a model does whose parts lie as *device_map* says; a word is a map that is made, with
    room for half on each.
    """
    with init_empty_weights():
        model = Model().eval()
    half = sum(tensor.nbytes for tensor in model.parameters()) * 3 // 4
    budgets: dict[int | str | torch.device, int | float | str] | None = (
        {0: half, 1: half, "cpu": 0} if isinstance(device_map, str) else None
    )
    load_checkpoint_and_dispatch(
        model, checkpoint, device_map, max_memory=budgets, no_split_module_classes="Layer"
    )
    ran: list[tuple[str, str]] = []
    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_pre_hook(
                lambda module, args, name=name: ran.append((name, str(args[0].device)))
            )
    moves.clear()
    with torch.no_grad():
        logits, moved, running = model(IDS), list(moves), list(ran)
        close(model)
        closed = model(IDS)
    return {
        "logits": logits.tolist(),
        "closed": closed.tolist(),
        "map": {name: str(device) for name, device in vars(model)["hf_device_map"].items()},
        "weights": {name: str(tensor.device) for name, tensor in model.named_parameters()},
        "ran": running,
        "moves": moved,
    }


def main() -> None:
    """Run the maps that are asked for."""
    kept = plug_in()
    try:
        torch.ones(2, device="twin:0") + torch.ones(2, device="twin:1")
    except RuntimeError as error:
        sys.stdout.write(f"{json.dumps(str(error))}\n")
    for each in sys.argv[2:]:
        sys.stdout.write(f"{json.dumps(run(Path(sys.argv[1]), json.loads(each)))}\n")
    del kept


if __name__ == "__main__":
    main()
