"""Forward hooks that page blocks in and out.

1. Outside its block's forward a streamed weight is `Streamed`: an address, which is read when it is used. A direct call of a
   submodule, or a look at `block.weight`, is right that way, only slower.
2. The pre-hook stands first and the other hook last. That one runs after exceptions too, also those of other pre-hooks, but not
   after KeyboardInterrupt and SystemExit: what these leave held is let go at the same thread's next block, at its end, or by
   closing. So every visit is released by name, and to release it twice does nothing.
3. A pager is bound to the modules that it was given. A deep copy of them has a pager of its own, on the same stream.
4. Where gradients are on, a weight that streams asks for none. Where they are off, it asks for one if it did in memory: then it
   gets the same kernels, and so the same bits. Not in autocast, which would keep a cast of each.
5. What is put in a weight's place by others (an adapter, a cast, an assignment) stays there.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Sequence
from contextlib import suppress
from copy import deepcopy
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import nn

from shardkit.errors import LoadError, ShardkitError
from shardkit.forks import begin_again_in_children
from shardkit.load.paged import OWN, Paged
from shardkit.load.recipe import Recipe
from shardkit.load.recording import device_of
from shardkit.load.stream import Stream
from shardkit.load.unseen import eager, lasting
from shardkit.load.weights import Seat


class Streamed(Paged):
    """A weight outside its block's forward. It cannot leave the device that its block runs on.

    Attributes:
        origin: the device that had it in memory before it streamed; None if none had.
        learned: whether it asked for a gradient then.
    """

    origin: torch.device | None
    learned: bool

    @classmethod
    def standing_for(
        cls,
        recipe: Recipe,
        device: torch.device,
        *,
        is_buffer: bool,
        origin: torch.device | None = None,
        learned: bool = False,
    ) -> Streamed:
        """What stands in the place of the parameter, or the buffer, that *recipe* makes."""
        made = cls.__new__(cls, recipe, device)
        assert isinstance(made, Streamed)
        made.origin, made.learned = origin, learned
        if not is_buffer:
            made._is_param = True  # what makes torch take a tensor of any class for a Parameter
        return made

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:  # Any: as torch declares it
        device: torch.device | None = torch._C._nn._parse_to(*args, **kwargs)[0]
        if device is not None and (device.type != self.device.type or device_of(device) != self.device):
            raise _immovable()
        moved: torch.Tensor = super().to(*args, **kwargs)
        return moved

    def cpu(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.to("cpu")

    def cuda(self, device: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.to(_one_of("cuda", device))

    def xpu(self, device: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.to(_one_of("xpu", device))

    def __deepcopy__(self, memo: dict[int, object]) -> Streamed:
        if id(self) not in memo:
            twin = self.standing_for(self.recipe, self.device, is_buffer=True)
            twin.__dict__.update(deepcopy({name: value for name, value in self.__dict__.items() if name not in OWN}, memo))
            memo[id(self)] = twin
        found = memo[id(self)]
        assert isinstance(found, Streamed)
        return found


def _one_of(kind: str, device: object) -> torch.device:
    """*device*, which may be a number among those of its *kind*, or None for the current one."""
    return torch.device(kind, device) if isinstance(device, int) else torch.device(str(device or kind))


def _immovable() -> LoadError:
    return LoadError(
        "a model that streams some of its weights cannot be moved to another device",
        hint="load it with another device_map; of a single weight, take weight.detach().to(device)",
    )


def refuse_pickling(attached: object) -> NoReturn:
    """Stand for `__reduce__` in what is attached to a model: it is of this process.

    Raises:
        LoadError: always.
    """
    raise LoadError(
        "a model that was dispatched cannot be pickled",
        hint="shardkit.load.save(model, folder) writes its weights; or take the hooks off first, with shardkit.load.remove_hooks",
    )


class Visit:
    """One forward of one block, in one thread."""

    __slots__ = ("call", "pager")

    def __init__(self, pager: Pager, call: FrameType | None) -> None:
        """Hold nothing yet.

        Args:
            pager: whose block it is.
            call: the frame of the module call; None if it cannot be told.
        """
        self.pager = pager
        self.call = call

    def end(self) -> None:
        self.pager.put_back(self)


class Pager:
    """The hooks of one block."""

    def __init__(self, stream: Stream, number: int, seats: Sequence[Seat], recipes: Sequence[Recipe]) -> None:
        """Page nothing yet.

        Args:
            stream: where the weights come from.
            number: of the block's page there.
            seats: where its weights belong.
            recipes: for each, what stands there as `Streamed`.
        """
        self._stream = stream
        self._number = number
        self._seats = tuple(seats)
        self._recipes = tuple(recipes)
        self._inside: set[Visit] = set()
        self._taken: list[tuple[Seat, torch.Tensor, torch.Tensor]] = []
        begin_again_in_children(self, Pager.forked)  # after its stream, which was there before

    @property
    def stream(self) -> Stream:
        """Where the weights come from."""
        return self._stream

    @property
    def seats(self) -> tuple[Seat, ...]:
        """Where the weights belong."""
        return self._seats

    def attach(self, module: nn.Module) -> None:
        """Make *module* the block."""
        module.register_forward_pre_hook(self.enter, prepend=True)
        module.register_forward_hook(self.leave, always_call=True)

    @eager
    def enter(self, module: nn.Module, args: tuple[object, ...]) -> None:
        """Put the weights in their places."""
        visits = _visits(self._stream)
        if visits:
            _end_abandoned(visits)
        visit = Visit(self, _module_call())
        visits.append(visit)
        try:
            tensors = self._stream.claim(self._number, visit, holding=len(visits) > 1)
            if tensors is not None:
                self._put_in(visit, lasting(tensors))
        except BaseException:
            visit.end()
            visits.remove(visit)
            raise

    @eager
    def leave(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        """Put the addresses back, and let the weights go."""
        visits = _visits(self._stream)
        own = [position for position, visit in enumerate(visits) if visit.pager is self]
        if own:
            for visit in visits[own[-1] :]:  # what stands behind was left by an interrupt inside this forward
                visit.end()
            del visits[own[-1] :]

    def let_go(self) -> None:
        """End all visits that an interrupt left."""
        for visit in list(self._inside):
            visit.end()

    def put_back(self, visit: Visit) -> None:
        """End *visit*, if it is not ended."""
        with self._stream.lock:
            self._inside.discard(visit)
            if not self._inside:
                self._give_back()
            self._stream.release(self._number, visit)

    def forked(self) -> None:
        """In the child of a fork, put back what only threads had taken that are not there any more."""
        for visit in self._inside.difference(_visits(self._stream)):
            with suppress(ShardkitError):  # nobody needs it
                self.put_back(visit)
        if not self._inside:
            self._give_back()

    __reduce__ = refuse_pickling

    def __deepcopy__(self, memo: dict[int, object]) -> Pager:
        return Pager(self._stream, self._number, deepcopy(self._seats, memo), self._recipes)

    def _give_back(self) -> None:
        for seat, tensor, stood in self._taken:
            if seat.tensor is tensor:
                seat.take(stood)
        self._taken.clear()

    def _put_in(self, visit: Visit, tensors: Sequence[torch.Tensor]) -> None:
        asking = not torch.is_grad_enabled() and not torch.is_autocast_enabled(self._stream.lane.device.type)
        with self._stream.lock:
            self._inside.add(visit)
            for seat, tensor, recipe in zip(self._seats, tensors, self._recipes, strict=True):
                stood = seat.tensor
                if isinstance(stood, Streamed) and (stood.recipe is recipe or stood.recipe == recipe):
                    if asking and stood.learned:  # torch has kernels that differ by this, even where there are no gradients
                        tensor = torch.Tensor._make_subclass(nn.Parameter, tensor, True)
                    self._taken.append((seat, tensor, stood))
                    seat.take(tensor)


class _Visits:
    """Those of one thread; its end is the end of the thread."""

    def __init__(self) -> None:
        self.stack: list[Visit] = []
        weakref.finalize(self, _end_all, self.stack, os.getpid()).atexit = False


def _end_all(stack: list[Visit], process: int) -> None:
    # In the child of a fork the parent's other threads end at once, before anything else is run, and with locks that they held.
    while stack and os.getpid() == process:
        stack.pop().end()


def _visits(stream: Stream) -> list[Visit]:
    local = stream.thread
    if not hasattr(local, "visits"):
        local.visits = _Visits()
    visits: _Visits = local.visits
    return visits.stack


def _end_abandoned(visits: list[Visit]) -> None:
    """End those whose module call is over, though its last hook did not run."""
    running = set()
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        running.add(frame)
        frame = frame.f_back
    for visit in list(visits):
        if visit.call is not None and visit.call not in running:
            visit.end()
            visits.remove(visit)


def _module_call() -> FrameType | None:
    """The frame of the innermost module call that has hooks."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not nn.Module._call_impl.__code__:
        frame = frame.f_back
    return frame
