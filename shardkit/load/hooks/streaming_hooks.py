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
7. A thread finds borrowed weights only in blocks that it runs itself (see `borrow_tables`). In all
   others it finds the lazy tensors, so that a copy that it takes is right.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Sequence
from copy import deepcopy
from threading import get_ident
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import nn

from shardkit.errors import LoadError
from shardkit.load.hooks.gradients import BY_FLAG, Asking, refuse_late
from shardkit.load.lazy.lazy_view import Recipe
from shardkit.load.lazy.streamed_weight import Streamed
from shardkit.load.modules.borrow_tables import BorrowTable
from shardkit.load.modules.call_stack import hooked_call, is_executing
from shardkit.load.modules.torch_internals import (
    BUFFERS,
    PARAMETERS,
    has_autocast,
    make_subclass,
    version_of,
)
from shardkit.load.modules.torch_modes import eager, is_watched, lasting, unseen
from shardkit.load.modules.weights import ParameterSlot
from shardkit.load.streaming.prefetcher import Stream
from shardkit.load.streaming.reader_pool import BlockTensors
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

    __slots__ = ("call", "is_over", "pager", "thread")

    def __init__(self, pager: Pager, call: FrameType | None) -> None:
        """Borrow nothing yet.

        Args:
            pager: whose block it is.
            call: the frame of the module call; None if it cannot be found.
        """
        self.pager = pager
        self.call = call
        self.thread = get_ident()
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

    @property
    def is_of_another(self) -> bool:
        """Whether the module call runs in another thread; True if that cannot be found."""
        if self.is_over or self.thread == get_ident():
            return False
        return self.call is None or is_executing(self.call)

    def release(self) -> None:
        self.pager.put_back(self)


class Pager:
    """The hooks of one block.

    Attributes:
        is_retired: whether nothing is borrowed any more.
    """

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
        self.is_retired = False
        self._stream = stream
        self._number = number
        self._seats = tuple(seats)
        self._recipes = tuple(recipes)
        self._places: list[_Place] = []
        self._device_type = stream.lane.device.type
        self._by_flag = False
        # What is in the seats, and for whom; a finalizer may release in the middle of it.
        self._exclusive = Exclusive()
        self._inside: dict[Borrow, int] = {}
        self._threads = self._inside.values()
        self._taken: list[tuple[_Place, BorrowTable, torch.Tensor, Streamed, int | None]] = []
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

    @property
    def is_run_by_another(self) -> bool:
        """Whether another thread runs the block."""
        return any(borrow.is_of_another for borrow in list(self._inside))

    def attach(self, module: nn.Module) -> None:
        """Make *module* the block."""
        self._by_flag = any(isinstance(part, BY_FLAG) for part in module.modules())
        for place in self._found_places():
            BorrowTable.of(place.attributes, place.key)
        module.register_forward_pre_hook(self.enter, prepend=True)
        module.register_forward_hook(self.leave, always_call=True)

    @eager
    def enter(self, module: nn.Module, args: tuple[object, ...]) -> None:
        """Put the weights in their places."""
        if self.is_retired:
            return
        stream = self._stream
        borrows = _borrows(stream)
        while borrows and not borrows[-1].is_running:  # an interrupt left it
            borrows[-1].release()
            borrows.pop()
        borrow = Borrow(self, hooked_call())
        borrows.append(borrow)
        if not is_watched():
            tensors = stream.borrow(self._number, borrow, holding=len(borrows) > 1)
            if tensors is not None:
                self._exclusive.call(self._put_in, borrow, tensors, False)
        else:
            tensors = unseen(stream.borrow)(self._number, borrow, holding=len(borrows) > 1)
            if tensors is not None:
                self._exclusive.call(self._put_in, borrow, lasting(tensors), True)
        if borrow.pager.is_retired:  # meanwhile: no hook may be there that takes them away
            borrow.release()
            borrows.pop()

    @eager
    def leave(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        """Put the lazy tensors back, and release the weights."""
        if torch.is_grad_enabled():
            refuse_late(
                output,
                ((stood.backing.name, tensor) for _, _, tensor, stood, _ in list(self._taken)),
            )
        borrows = _borrows(self._stream)
        if not borrows or (
            borrows[-1].pager is not self and all(borrow.pager is not self for borrow in borrows)
        ):
            return
        own = None
        while own is not self:  # what stands behind it, an interrupt left
            last = borrows[-1]
            own = last.pager
            own.put_back(last)
            borrows.pop()

    def retire(self) -> None:
        """Put in no more weights from here on."""
        self.is_retired = True

    def let_go(self, *, even_running: bool = False) -> None:
        """Release all that this thread has borrowed, and what interrupts left in others.

        Args:
            even_running: release what another thread runs, too, whose memory must not be filled
                again then; else that is left to it.
        """
        for borrow in list(self._inside):
            if even_running or not borrow.is_of_another:
                borrow.release()

    def uncover(self) -> None:
        """Give the modules of the block ordinary dicts again, when nothing is borrowed."""
        for place in self._places:
            place.attributes[place.key] = dict(place.attributes[place.key])

    def put_back(self, borrow: Borrow) -> None:
        """End *borrow*, if it is not ended.

        Raises:
            LoadError: this is the child of a fork, and the forward was running in its parent.
        """
        self._exclusive.call(self._end, borrow)
        if self._written:
            self._keep_written(borrow)
        else:
            self._stream.release(self._number, borrow)
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
        made = Pager(self._stream, self._number, deepcopy(self._seats, memo), self._recipes)
        made._by_flag, made.is_retired = self._by_flag, self.is_retired
        for seat in made._seats:
            # A list of its own that such a module keeps, as LSTM does, may hold copies of what
            # another thread has borrowed.
            if not seat.is_plain and PARAMETERS in vars(seat.owner):
                seat.renew()
        return made

    def _keep_written(self, borrow: Borrow) -> None:
        """Let the lazy tensors have what was written to their weights, and release these."""
        written = list(self._written)
        try:
            for stood, tensor in written:
                stood.keep(tensor)
        finally:
            self._stream.release(self._number, borrow, written=True)
            # Not before: after an interrupt, the next release of this block does it again.
            del self._written[: len(written)]

    # What one thread at a time does.

    def _end(self, borrow: Borrow) -> None:
        """End *borrow*, and put the lazy tensors back if it is the last."""
        self._inside.pop(borrow, None)
        if not self._inside:
            self._give_back()

    def _give_back(self) -> None:
        """Put the lazy tensors back, and note those weights that were written to."""
        threads = self._threads
        for place, table, tensor, stood, version in self._taken:
            name = place.name
            if dict.get(table, name) is tensor:
                if version is not None and version_of(tensor) != version:
                    self._written.append((stood, tensor))
                if place.is_plain:
                    table[name] = stood
                else:
                    place.seat.take(stood)
            table.records[name] = (None, None, threads)
        self._taken.clear()

    def _put_in(self, borrow: Borrow, tensors: Sequence[torch.Tensor], watched: bool) -> None:
        if self.is_retired:
            return
        learning = torch.is_grad_enabled()
        asking = (
            self._by_flag and not watched
            if learning
            else not has_autocast() or not torch.is_autocast_enabled(self._device_type)
        )
        self._inside[borrow] = borrow.thread
        places = self._places or self._found_places()
        made = tensors.asking if isinstance(tensors, BlockTensors) else {}
        for number, place in enumerate(places):
            tensor = tensors[number]
            table = place.attributes[place.key]
            if type(table) is not BorrowTable:
                table = BorrowTable.of(place.attributes, place.key)
            name = place.name
            stood = dict.get(table, name)
            if not isinstance(stood, Streamed):
                continue
            version = None if watched else version_of(tensor)
            if stood.backing.memory is not None or stood.recipe is not place.recipe:
                own = _own_value(stood, place.recipe, tensor)
                if own is None:
                    continue
                if own is not tensor:
                    tensor, version = own, None
            # torch has kernels that differ by this, even without gradients.
            if asking and stood.learned:
                if learning or version is None:
                    tensor = _asking(tensor, learning)
                elif (asks := made.get(number)) is not None:
                    tensor = asks
                else:
                    made[number] = tensor = _asking(tensor, learning)
            self._taken.append((place, table, tensor, stood, version))
            table.records[name] = (tensor, stood, self._threads)
            if place.is_plain:
                table[name] = tensor
            else:
                place.seat.take(tensor)

    def _found_places(self) -> list[_Place]:
        """The places of the weights, which are there as soon as the modules are."""
        pairs = zip(self._seats, self._recipes, strict=True)
        self._places = [_Place(seat, recipe) for seat, recipe in pairs]
        return self._places


def _own_value(stood: Streamed, recipe: Recipe, tensor: torch.Tensor) -> torch.Tensor | None:
    """What a block uses for *stood*: its memory, or *tensor*, if that is what *recipe* and *stood*
    both make; None for *stood* itself.
    """
    if stood.backing.memory is not None:
        return None if stood.is_trained else stood.alias()
    return tensor if stood.recipe == recipe and stood.seated else None


def _asking(tensor: torch.Tensor, learning: bool) -> torch.Tensor:
    """*tensor* as one that says it requires a gradient."""
    if learning:
        return Asking.of(tensor)
    with torch.inference_mode(False):  # it may be used again outside of that
        return make_subclass(nn.Parameter, tensor, True)


class _Place:
    """Where a weight of a block belongs, and what stands there."""

    __slots__ = ("attributes", "is_plain", "key", "name", "recipe", "seat")

    def __init__(self, seat: ParameterSlot, recipe: Recipe) -> None:
        self.seat = seat
        self.name = seat.name
        self.recipe = recipe
        self.is_plain = seat.is_plain
        self.attributes: dict[str, Any] = vars(seat.owner)  # Any: a module has all kinds of them
        self.key = PARAMETERS if seat.name in self.attributes[PARAMETERS] else BUFFERS


class _Borrows:
    """Those of one thread; its end is the end of the thread."""

    def __init__(self) -> None:
        self.stack: list[Borrow] = []
        weakref.finalize(self, _release_all, self.stack, os.getpid()).atexit = False


def _release_all(stack: list[Borrow], process: int) -> None:
    # In the child of a fork the parent's other threads end at once, before anything else is run.
    while stack and os.getpid() == process:
        stack.pop().release()


def _borrows(stream: Stream) -> list[Borrow]:
    local = stream.thread
    try:
        borrows: _Borrows = local.borrows
    except AttributeError:
        local.borrows = borrows = _Borrows()
    return borrows.stack
