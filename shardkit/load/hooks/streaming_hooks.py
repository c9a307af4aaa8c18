"""Forward hooks that bring the weights of a block before its forward and take them away after it.

1. Outside its block's forward a streamed weight is `Streamed`: a lazy tensor, which is read when it
   is used. A direct call of a submodule, or a look at `block.weight`, is right that way, only
   slower.
2. The pre-hook stands first and the other hook last. That one runs after exceptions too, also those
   of other pre-hooks, but not after KeyboardInterrupt and SystemExit: what these leave borrowed is
   released at the same thread's next block, at its end, or by closing. So every borrow is released
   by name, and to release it twice does nothing.
3. A pager is bound to the modules that it was given. A deep copy of them has a pager of its own, on
   the same stream.
4. Where gradients are off, a weight that streams requires one if it did in memory: then it gets the
   same kernels, and so the same bits. Not in autocast, which would keep a cast of each. Where
   gradients are on, it only says so (see `gradients`).
5. What is put in a weight's place by others (an adapter, a cast, an assignment) stays there. A
   weight that was written is used as it is. One that its block writes to has what was written from
   there on, and its block is read again for others.
6. In the child of a fork, what was borrowed is not there: the lazy tensors are back at once, and a
   forward that was running raises at its next hook.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from types import FrameType
from typing import NoReturn

import torch
from torch import nn

from shardkit.errors import LoadError
from shardkit.load.hooks.gradients import BY_FLAG, Asking, refuse_late
from shardkit.load.lazy.lazy_view import Recipe
from shardkit.load.lazy.streamed_weight import Streamed
from shardkit.load.modules.call_stack import module_call
from shardkit.load.modules.torch_internals import make_subclass, version_of
from shardkit.load.modules.torch_modes import eager, is_watched, lasting, unseen
from shardkit.load.modules.weights import ParameterSlot
from shardkit.load.streaming.prefetcher import Stream
from shardkit.system.fork import begin_again_in_children
from shardkit.system.threads import Exclusive


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

    __slots__ = ("call", "is_over", "pager")

    def __init__(self, pager: Pager, call: FrameType | None) -> None:
        """Borrow nothing yet.

        Args:
            pager: whose block it is.
            call: the frame of the module call; None if it cannot be found.
        """
        self.pager = pager
        self.call = call
        self.is_over = False

    @property
    def is_running(self) -> bool:
        """Whether the module call runs in this thread; True if that cannot be found."""
        if self.is_over:
            return False
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame is not self.call:
            frame = frame.f_back
        return self.call is None or frame is not None

    def release(self) -> None:
        self.pager.put_back(self)


class Pager:
    """The hooks of one block."""

    def __init__(
        self, stream: Stream, number: int, seats: Sequence[ParameterSlot], recipes: Sequence[Recipe]
    ) -> None:
        """Put nothing in its place yet.

        Args:
            stream: where the weights come from.
            number: of the block there.
            seats: where its weights belong.
            recipes: for each, what stands there as `Streamed`.
        """
        self._stream = stream
        self._number = number
        self._seats = tuple(seats)
        self._recipes = tuple(recipes)
        self._device_type = stream.lane.device.type
        self._by_flag = False
        # What is in the seats, and for whom; a finalizer may release in the middle of it.
        self._exclusive = Exclusive()
        self._inside: set[Borrow] = set()
        self._taken: list[tuple[ParameterSlot, torch.Tensor, Streamed, int | None]] = []
        self._written: list[tuple[Streamed, torch.Tensor]] = []  # and not yet kept
        begin_again_in_children(self, Pager.forked)

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
        borrows = _borrows(self._stream)
        while borrows and not borrows[-1].is_running:  # an interrupt left it
            borrows[-1].release()
            borrows.pop()
        borrow = Borrow(self, module_call())
        borrows.append(borrow)
        holding = len(borrows) > 1
        if is_watched():
            tensors = unseen(self._stream.borrow)(self._number, borrow, holding=holding)
            if tensors is not None:
                self._exclusive.call(self._put_in, borrow, lasting(tensors), watched=True)
        else:
            tensors = self._stream.borrow(self._number, borrow, holding=holding)
            if tensors is not None:
                self._exclusive.call(self._put_in, borrow, tensors, watched=False)

    @eager
    def leave(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        """Put the lazy tensors back, and release the weights."""
        if torch.is_grad_enabled():
            refuse_late(
                output, ((stood.backing.name, tensor) for _, tensor, stood, _ in self._taken)
            )
        borrows = _borrows(self._stream)
        if not any(borrow.pager is self for borrow in borrows):
            return
        own = None
        while own is not self:  # what stands behind it, an interrupt left
            own = borrows[-1].pager
            borrows[-1].release()
            borrows.pop()

    def let_go(self) -> None:
        """Release all that an interrupt left."""
        for borrow in list(self._inside):
            borrow.release()

    def put_back(self, borrow: Borrow) -> None:
        """End *borrow*, if it is not ended.

        Raises:
            LoadError: this is the child of a fork, and the forward was running in its parent.
        """
        self._exclusive.call(self._end, borrow)
        written = list(self._written)
        try:
            for stood, tensor in written:
                stood.keep(tensor)
        finally:
            self._stream.release(self._number, borrow, written=bool(written))
            # Not before: after an interrupt, the next release of this block does it again.
            del self._written[: len(written)]
            # A frame keeps all that its function knew, such as inputs.
            borrow.is_over, borrow.call = True, None

    def forked(self) -> None:
        """Put the lazy tensors back in the child of a fork, whose memory was wiped."""
        self._exclusive = Exclusive()
        self._inside.clear()
        self._give_back()
        self._written.clear()

    __reduce__ = refuse_pickling

    def __deepcopy__(self, memo: dict[int, object]) -> Pager:
        twin = Pager(self._stream, self._number, deepcopy(self._seats, memo), self._recipes)
        twin._by_flag = self._by_flag
        return twin

    # What one thread at a time does.

    def _end(self, borrow: Borrow) -> None:
        """End *borrow*, and put the lazy tensors back if it is the last."""
        self._inside.discard(borrow)
        if not self._inside:
            self._give_back()

    def _give_back(self) -> None:
        """Put the lazy tensors back, and note those weights that were written to."""
        for seat, tensor, stood, version in self._taken:
            if version is not None and version_of(tensor) != version and seat.tensor is tensor:
                self._written.append((stood, tensor))
            seat.exchange(tensor, stood)
        self._taken.clear()

    def _put_in(self, borrow: Borrow, tensors: Sequence[torch.Tensor], *, watched: bool) -> None:
        learning = torch.is_grad_enabled()
        asking = (
            self._by_flag and not watched
            if learning
            else not torch.is_autocast_enabled(self._device_type)
        )
        self._inside.add(borrow)
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
            # torch has kernels that differ by this, even without gradients.
            if asking and stood.learned:
                tensor = (
                    Asking.of(tensor) if learning else make_subclass(nn.Parameter, tensor, True)
                )
            self._taken.append((seat, tensor, stood, version))
            seat.take(tensor)


class _Borrows:
    """Those of one thread; its end is the end of the thread."""

    def __init__(self) -> None:
        self.stack: list[Borrow] = []
        weakref.finalize(self, _release_all, self.stack, os.getpid()).atexit = False


def _release_all(stack: list[Borrow], process: int) -> None:
    # In the child of a fork the parent's other threads end at once, before anything else is run.
    while stack and os.getpid() == process:
        stack.pop().release()


@contextmanager
def undisturbed(streams: Collection[Stream]) -> Iterator[None]:
    """See that no other thread has a forward of a block of *streams* meanwhile.

    In the seats of such a block are its borrowed weights. Whoever takes them there and has not
    borrowed them finds the weights of other blocks in their memory later.

    Raises:
        LoadError: another thread runs the model, or has run it meanwhile.
    """
    before = [stream.counts.claims for stream in streams]
    _refuse_others(streams)
    yield
    _refuse_others(streams)
    if before != [stream.counts.claims for stream in streams]:
        raise _disturbed()


def _refuse_others(streams: Iterable[Stream]) -> None:
    if any(stream.borrowed_by_others(_borrows(stream)) for stream in streams):
        raise _disturbed()


def _disturbed() -> LoadError:
    return LoadError(
        "another thread runs the model while it is being saved",
        hint="save the model while no thread runs it",
    )


def _borrows(stream: Stream) -> list[Borrow]:
    local = stream.thread
    if not hasattr(local, "borrows"):
        local.borrows = _Borrows()
    borrows: _Borrows = local.borrows
    return borrows.stack
