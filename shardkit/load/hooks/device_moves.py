"""Move inputs to the device that needs them, and outputs back to the device of the inputs.

Containers keep their type. A value that need not move is the same object before and after, and so
is a container in which nothing moves: a cache that a block writes to stays the caller's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from shardkit.load.hooks.streaming_hooks import refuse_pickling
from shardkit.load.modules.blocks import CONTAINERS
from shardkit.load.modules.model_group import called
from shardkit.load.modules.sizes import prefixes
from shardkit.load.modules.torch_internals import own_buffers, own_parameters
from shardkit.load.modules.torch_modes import eager


def moved(
    value: Any, device: torch.device, skip: Collection[str] = ()
) -> Any:  # Any: whatever a model takes
    """*value* with every tensor in it on *device*, but for those under a key that is to *skip*."""
    if stays(value, device, skip):
        return value
    match value:
        case torch.Tensor():
            return value.to(device)
        case tuple() | list():
            return _like(value, [moved(part, device, skip) for part in value])
    return _refilled(
        value,
        {key: part if key in skip else moved(part, device, skip) for key, part in value.items()},
    )


def stays(value: object, device: torch.device, skip: Collection[str] = ()) -> bool:
    """Whether all of *value* is where `moved` would have it. This is asked for each block and
    forward, so it makes nothing.
    """
    if isinstance(value, torch.Tensor):
        return value.device == device
    if isinstance(value, tuple | list):
        parts: Iterable[object] = value
    elif isinstance(value, dict | Mapping):  # the first is recognised at once
        parts = (part for key, part in value.items() if key not in skip) if value else ()
    else:
        return True
    for part in parts:  # noqa: SIM110 - a third of the time that all() takes
        if not stays(part, device, skip):
            return False
    return True


def device_of_first(value: object) -> torch.device | None:
    """The device of the first tensor in *value*."""
    match value:
        case torch.Tensor():
            return value.device
        case tuple() | list():
            parts: Collection[object] = value
        case Mapping():
            parts = value.values()
        case _:
            return None
    return next((device for part in parts if (device := device_of_first(part)) is not None), None)


class Mover:
    """The hook of a module that runs on one device: its inputs come there."""

    def __init__(self, device: torch.device, skip: Collection[str] = ()) -> None:
        """Move nothing yet.

        Args:
            device: where the module runs.
            skip: keys of arguments, and of entries of mappings in them, that stay where they are.
        """
        self._device = device
        self._skip = frozenset(skip)

    def attach(self, module: nn.Module) -> None:
        """Let *module* run there."""
        module.register_forward_pre_hook(self.bring, with_kwargs=True)

    @eager
    def bring(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],  # Any: whatever a model takes
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Move the arguments, if one is elsewhere."""
        return self._moved(args, kwargs)

    def _moved(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],  # Any: whatever a model takes
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if stays(args, self._device, self._skip) and stays(kwargs, self._device, self._skip):
            return None
        return moved(args, self._device, self._skip), moved(kwargs, self._device, self._skip)


class RoundTrip(Mover):
    """The same for a complete model, whose output returns to the device of its first input."""

    def __init__(self, device: torch.device, skip: Collection[str] = ()) -> None:
        """Move nothing yet; the arguments are those of `Mover`."""
        super().__init__(device, skip)
        self._thread = threading.local()

    def attach(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(self.bring, with_kwargs=True)
        module.register_forward_hook(self.return_, always_call=True)

    @eager
    def bring(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],  # Any: whatever a model takes
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._origins().append(device_of_first((args, kwargs)))
        return self._moved(args, kwargs)

    @eager
    def return_(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Move the output."""
        origins = self._origins()
        origin = origins.pop() if origins else None
        return output if origin is None else moved(output, origin, self._skip)

    __reduce__ = refuse_pickling

    def __deepcopy__(self, memo: object) -> RoundTrip:
        return RoundTrip(self._device, self._skip)

    def _origins(self) -> list[torch.device | None]:
        """The device of the input of each of this thread's forwards that run, the innermost
        last.
        """
        if not hasattr(self._thread, "origins"):
            self._thread.origins = []
        origins: list[torch.device | None] = self._thread.origins
        return origins


def attach_movers(
    model: nn.Module,
    runs_on: Callable[[str], torch.device],
    main: torch.device,
    skip: Collection[str] = (),
) -> None:
    """Let what *model* is given come to where its parts run, and what it gives go back.

    Args:
        model: one model, or several together.
        runs_on: the device of a part, by its name.
        main: the device that runs what is not on an accelerator.
        skip: keys of arguments that stay where they are.
    """
    callees = called(model)
    runners = _runners(model, runs_on)
    if any(
        device.type != "cpu" for device in runners.get("", ())
    ):  # else only a model's own inputs can be elsewhere
        inner = ((name, module) for name, module in model.named_modules() if module not in callees)
        for name, module in inner:
            if isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
                continue
            own = next((each for each in (*own_parameters(module), *own_buffers(module))), None)
            device = _entered_on(name, model, runners) if own is None else runs_on(f"{name}.{own}")
            if device is not None:
                Mover(device, skip).attach(module)
    for callee in callees:
        RoundTrip(main, skip).attach(callee)


def _runners(
    model: nn.Module, runs_on: Callable[[str], torch.device]
) -> dict[str, set[torch.device]]:
    """The devices that run the weights in each part of *model*, by the names of the parts."""
    runners: dict[str, set[torch.device]] = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        device = runs_on(name)
        for around in prefixes(name):
            runners.setdefault(around, set()).add(device)
    return runners


def _entered_on(
    name: str, model: nn.Module, runners: Mapping[str, Collection[torch.device]]
) -> torch.device | None:
    """Where the part *name*, which has only parts itself, gets its inputs; None if it has them
    there, or one place is not right.

    It needs them as its parts do: it may add them to what they make. Where what is around it runs
    on one device, they are there; but for a container, which nobody calls.
    """
    around = name.rpartition(".")[0]
    comes_in = len(runners.get(around, ())) > 1 or isinstance(
        model.get_submodule(around), CONTAINERS
    )
    devices = runners.get(name, ())
    return next(iter(devices)) if comes_in and len(devices) == 1 else None


def _like(value: tuple[Any, ...] | list[Any], parts: list[Any]) -> Any:
    """*parts* as what *value* is."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*parts)
    return type(value)(parts)


def _refilled(value: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """*items* as what *value* is: the outputs of model libraries are dataclasses and mappings at
    once.
    """
    made: Any = type(value)
    return made(**items) if hasattr(value, "__dataclass_fields__") else made(items)
