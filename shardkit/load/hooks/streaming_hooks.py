"""Forward hooks that page blocks in and out.

1. Outside its block's forward a streamed weight is `Streamed`: an address, which is read when it is
   used. A direct call of a submodule, or a look at `block.weight`, is right that way, only slower.
2. The pre-hook stands first and the other hook last. That one runs after exceptions too, also those
   of other pre-hooks, but not after KeyboardInterrupt and SystemExit: what these leave held is let
   go at the same thread's next block, at its end, or by closing. So every visit is released by
   name, and to release it twice does nothing.
3. A pager is bound to the modules that it was given. A deep copy of them has a pager of its own, on
   the same stream.
4. Where gradients are off, a weight that streams requires one if it did in memory: then it gets the
   same kernels, and so the same bits. Not in autocast, which would keep a cast of each. Where
   gradients are on, it only says so (see `gradients`).
5. What is put in a weight's place by others (an adapter, a cast, an assignment) stays there. A
   weight that was written is used as it is. One that its block writes to has what was written from
   there on, and its page is read again for others.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Sequence
from contextlib import suppress
from copy import deepcopy
from types import FrameType
from typing import NoReturn

import torch
from torch import nn

from shardkit.errors import LoadError, ShardkitError
from shardkit.load.hooks.gradients import BY_FLAG, Asking, refuse_late
from shardkit.load.lazy.lazy_view import Recipe
from shardkit.load.lazy.streamed_weight import Streamed
from shardkit.load.modules.call_stack import module_call
from shardkit.load.modules.torch_internals import make_subclass, version_of
from shardkit.load.modules.torch_modes import eager, is_watched, lasting
from shardkit.load.modules.weights import ParameterSlot
from shardkit.load.streaming.prefetcher import Stream
from shardkit.system.fork import begin_again_in_children


def refuse_pickling(attached: object) -> NoReturn:
    """Stand for `__reduce__` in what is attached to a model: it is of this process.

    Raises:
        LoadError: always.
    """
    raise LoadError(
        "a model that was dispatched cannot be pickled",
        hint="shardkit.load.save(model, folder) writes its weights; or take the hooks off first, "
        "with shardkit.load.remove_hooks",
    )


class Borrow:
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

    def __init__(
        self, stream: Stream, number: int, seats: Sequence[ParameterSlot], recipes: Sequence[Recipe]
    ) -> None:
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
        self._by_flag = False
        self._inside: set[Borrow] = set()
        self._taken: list[tuple[ParameterSlot, torch.Tensor, Streamed, int | None]] = []
        begin_again_in_children(self, Pager.forked)  # after its stream, which was there before

    @property
    def stream(self) -> Stream:
        """Where the weights come from."""
        return self._stream

    @property
    def seats(self) -> tuple[ParameterSlot, ...]:
        """Where the weights belong."""
        return self._seats

    def attach(self, module: nn.Module) -> None:
        """Make *module* the block."""
        self._by_flag = any(isinstance(part, BY_FLAG) for part in module.modules())
        module.register_forward_pre_hook(self.enter, prepend=True)
        module.register_forward_hook(self.leave, always_call=True)

    @eager
    def enter(self, module: nn.Module, args: tuple[object, ...]) -> None:
        """Put the weights in their places."""
        visits = _visits(self._stream)
        if visits:
            _end_abandoned(visits)
        visit = Borrow(self, module_call())
        visits.append(visit)
        try:
            tensors = self._stream.claim(self._number, visit, holding=len(visits) > 1)
            if tensors is not None:
                watched = is_watched()
                self._put_in(visit, lasting(tensors) if watched else tensors, watched=watched)
        except BaseException:
            visit.end()
            visits.remove(visit)
            raise

    @eager
    def leave(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        """Put the addresses back, and let the weights go."""
        if torch.is_grad_enabled():
            refuse_late(
                output, ((stood.backing.name, tensor) for _, tensor, stood, _ in self._taken)
            )
        visits = _visits(self._stream)
        own = [position for position, visit in enumerate(visits) if visit.pager is self]
        if own:
            for visit in visits[
                own[-1] :
            ]:  # what stands behind was left by an interrupt inside this forward
                visit.end()
            del visits[own[-1] :]

    def let_go(self) -> None:
        """End all visits that an interrupt left."""
        for visit in list(self._inside):
            visit.end()

    def put_back(self, visit: Borrow) -> None:
        """End *visit*, if it is not ended."""
        with self._stream.lock:
            self._inside.discard(visit)
            written = [] if self._inside else self._give_back()
            try:
                for stood, tensor in written:
                    stood.keep(tensor)
            finally:
                self._stream.release(self._number, visit, written=bool(written))

    def forked(self) -> None:
        """In the child of a fork, put back what only threads had taken that are not there any
        more.
        """
        for visit in self._inside.difference(_visits(self._stream)):
            with suppress(ShardkitError):  # nobody needs it
                self.put_back(visit)
        if not self._inside:
            self._give_back()

    __reduce__ = refuse_pickling

    def __deepcopy__(self, memo: dict[int, object]) -> Pager:
        twin = Pager(self._stream, self._number, deepcopy(self._seats, memo), self._recipes)
        twin._by_flag = self._by_flag
        return twin

    def _give_back(self) -> list[tuple[Streamed, torch.Tensor]]:
        """Put the addresses back, and say which weights were written to."""
        written = []
        for seat, tensor, stood, version in self._taken:
            if seat.tensor is tensor:
                seat.take(stood)
                if version is not None and version_of(tensor) != version:
                    written.append((stood, tensor))
        self._taken.clear()
        return written

    def _put_in(self, visit: Borrow, tensors: Sequence[torch.Tensor], *, watched: bool) -> None:
        learning = torch.is_grad_enabled()
        asking = (
            self._by_flag and not watched
            if learning
            else not torch.is_autocast_enabled(self._stream.lane.device.type)
        )
        with self._stream.lock:
            self._inside.add(visit)
            for seat, tensor, recipe in zip(self._seats, tensors, self._recipes, strict=True):
                stood = seat.tensor
                if not isinstance(stood, Streamed):
                    continue
                version = None if watched else version_of(tensor)
                if stood.backing.memory is not None:
                    if stood.is_trained:
                        continue
                    tensor, version = stood.alias(), None
                elif stood.recipe is not recipe and (stood.recipe != recipe or not stood.seated):
                    continue
                if (
                    asking and stood.learned
                ):  # torch has kernels that differ by this, even without gradients
                    tensor = (
                        Asking.of(tensor) if learning else make_subclass(nn.Parameter, tensor, True)
                    )
                self._taken.append((seat, tensor, stood, version))
                seat.take(tensor)


class _Visits:
    """Those of one thread; its end is the end of the thread."""

    def __init__(self) -> None:
        self.stack: list[Borrow] = []
        weakref.finalize(self, _end_all, self.stack, os.getpid()).atexit = False


def _end_all(stack: list[Borrow], process: int) -> None:
    # In the child of a fork the parent's other threads end at once, before anything else is run,
    # and with locks that they held.
    while stack and os.getpid() == process:
        stack.pop().end()


def _visits(stream: Stream) -> list[Borrow]:
    local = stream.thread
    if not hasattr(local, "visits"):
        local.visits = _Visits()
    visits: _Visits = local.visits
    return visits.stack


def _end_abandoned(visits: list[Borrow]) -> None:
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
