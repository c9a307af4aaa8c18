"""Streamed: the lazy tensor that replaces a streamed weight outside its block's forward.

1. It cannot leave the device that its block runs on, and is not trained: it reports that it
   requires no gradient. Only during the forward of a module it reports the flag that the weight had
   before it streamed, because modules of torch choose their path by that.
2. Once it was written, or was given other data, it has memory of its own, and its block uses that.
   Then it can be trained.
3. A deep copy of its module has one of its own. That gets memory when it is set to train, as the
   modules that PEFT saves do.
4. When a module is cast, its weights stay lazy.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from shardkit.errors import LoadError, NotTrained
from shardkit.load.devices.device_lookup import torch_device
from shardkit.load.lazy.backing import Backing, check_room
from shardkit.load.lazy.lazy_ops import Address
from shardkit.load.lazy.lazy_view import Recipe
from shardkit.load.lazy.paged import Paged, is_address
from shardkit.load.lazy.torch_operations import asked_of_to
from shardkit.load.modules.call_stack import is_in_forward, is_module_cast
from shardkit.load.modules.torch_internals import PARAMETER_MARK, tensor_requires_grad
from shardkit.printable import shown

TRAIN = "train an adapter instead (PEFT), or give the layers that train a device in the device_map"


class Streamed(Paged):
    """A weight outside its block's forward; see the rules of its module.

    Attributes:
        seated: whether it stands in a module, as its block put it there; else it is what `detach`
            made of such a one.
        origin: the device that had it in memory before it streamed; None if none had.
        learned: whether it asked for a gradient then, and nobody froze it since.
        copied: whether it is that of a deep copy.
    """

    seated: bool = False
    origin: torch.device | None = None
    learned: bool = False
    copied: bool = False
    backing: Backing

    @classmethod
    def standing_for(
        cls,
        recipe: Recipe,
        device: torch.device,
        *,
        is_buffer: bool,
        name: str = "",
        origin: torch.device | None = None,
        learned: bool = False,
    ) -> Streamed:
        """What stands in the place of the parameter, or the buffer, *name*, that *recipe* makes."""
        made = cls.__new__(cls, recipe, device)
        assert isinstance(made, Streamed)
        made.seated, made.origin, made.learned = True, origin, learned
        made.backing = Backing(recipe, made.device, name)
        if not is_buffer:
            setattr(made, PARAMETER_MARK, True)
        return made

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:  # Any: as torch declares it
        device, _ = asked_of_to(args, kwargs)
        if (
            self.seated
            and device is not None
            and (device.type != self.device.type or torch_device(device) != self.device)
        ):
            raise _immovable()
        return super().to(*args, **kwargs)

    def detach(self) -> torch.Tensor:
        """The same for others, which `nn.Parameter` takes too: a parameter that shares its memory
        once one of them is written.
        """
        if not is_address(self):
            return super().detach()
        loose = Streamed.__new__(
            Streamed, replace(self.recipe), self.device
        )  # by which a block knows its own
        assert isinstance(loose, Streamed)
        loose.backing = self.backing
        return loose

    def cpu(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.to("cpu")

    def cuda(self, device: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.to(_one_of("cuda", device))

    def xpu(self, device: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.to(_one_of("xpu", device))

    @property
    def is_trained(self) -> bool:
        """Whether autograd computes a gradient of it, as it can once it has memory."""
        asks: bool = tensor_requires_grad.__get__(self)
        return asks

    @property
    def asks(self) -> bool:
        """Whether it would require a gradient if it were an ordinary parameter."""
        return self.learned or self.is_trained

    def alias(self) -> torch.Tensor:
        """An ordinary tensor or parameter that shares its memory."""
        held = self.held
        assert held is not None
        return nn.Parameter(held, requires_grad=False) if self._is_parameter else held

    def keep(self, value: torch.Tensor) -> None:
        """Have *value*, copied into memory of its own.

        Raises:
            OverBudget: there is too little memory.
        """
        check_room(self.backing.name, value.nbytes, self.device)
        with torch.inference_mode(False):
            self.data = value.detach().clone()

    @property
    def requires_grad(self) -> bool:
        return self.is_trained or (self.learned and torch.is_grad_enabled() and is_in_forward())

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        if value and self.seated and is_address(self):
            if not self.copied:
                raise NotTrained(
                    f"{shown(self.backing.name)} streams, and cannot be trained", hint=TRAIN
                )
            self.backing.settle()
        tensor_requires_grad.__set__(self, value)
        self.learned = value

    def requires_grad_(self, requires_grad: bool = True) -> Streamed:
        self.requires_grad = requires_grad
        return self

    def register_hook(self, hook: Any) -> Any:  # Any: as torch declares it, and below
        self._see_to_gradient()
        return super().register_hook(hook)  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def register_post_accumulate_grad_hook(self, hook: Any) -> Any:
        self._see_to_gradient()
        return super().register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]  # likewise

    def retain_grad(self) -> None:
        self._see_to_gradient()
        super().retain_grad()

    def _see_to_gradient(self) -> None:
        if not self.is_trained:
            raise NotTrained(
                f"{shown(self.backing.name)} streams, and no gradient of it is computed", hint=TRAIN
            )

    def _take(self, given: Paged) -> None:
        self.recipe = given.recipe
        self.backing = given.backing or Backing(given.recipe, self.device, self.backing.name)

    def _as_address(self) -> Address:
        """Itself; while its module is cast, as a tensor of a checkpoint, so that the cast stays an
        address.
        """
        return Address(self.recipe, self.device, None if is_module_cast() else self.backing)

    def _lazy_copy(self) -> torch.Tensor:
        if not self.seated:
            return self._ordinary()
        name, origin, learned = self.backing.name, self.origin, self.learned
        is_buffer = not self._is_parameter
        copy = self.standing_for(
            self.recipe, self.device, is_buffer=is_buffer, name=name, origin=origin, learned=learned
        )
        copy.copied = True
        return copy

    def _ordinary(self) -> torch.Tensor:
        value = self.read()
        return nn.Parameter(value, self.asks) if self._is_parameter else value

    @property
    def _is_parameter(self) -> bool:
        return getattr(self, PARAMETER_MARK, False)


def _one_of(kind: str, device: object) -> torch.device:
    """*device*, which may be a number among those of its *kind*, or None for the current one."""
    return (
        torch.device(kind, device) if isinstance(device, int) else torch.device(str(device or kind))
    )


def _immovable() -> LoadError:
    return LoadError(
        "a model that streams some of its weights cannot be moved to another device",
        hint="load it with another device_map; of a single weight, take weight.detach().to(device)",
    )
