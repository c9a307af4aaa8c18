"""Choose which blocks of a model stay in memory, where not all of them fit.

Pure: modules and sizes are inspected, and nothing is read. From top to bottom:

1. `choose_residents` improves a given device map. It moves streamed blocks, and what is placed
   beside them, between the device that runs them, the CPU if that is another, and the disk. The
   parts on other accelerators stay there. A map that keeps the budgets and has less on disk stays
   as it is.
2. `_Movable` is the set of blocks to choose from. The budget of the runner also covers the prefetch
   buffer, and weights that cannot stream: tied weights, buffers, and direct weights of modules that
   contain blocks.
3. `search` chooses, from sizes alone. As many bytes stay as fit: each is one less to read in every
   forward. But a large streamed block makes the buffer large, and a deep buffer takes memory from
   blocks: the choice whose forward takes the fewest seconds wins.
4. `spread` distributes streamed blocks evenly between resident ones: they are read while those are
   computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import nlargest
from itertools import accumulate
from typing import NamedTuple

from torch import nn

from shardkit.alignment import ALIGNMENT, round_up
from shardkit.errors import OverBudget
from shardkit.load.devices.budgets import Device
from shardkit.load.devices.device_lookup import device_of
from shardkit.load.memory.direct_io import SECTOR
from shardkit.load.modules.blocks import ModuleBlock, cut
from shardkit.load.modules.sizes import AnyDType, module_sizes, named_tensors, prefixes
from shardkit.load.modules.torch_internals import own_buffers, own_modules, own_parameters
from shardkit.load.modules.weights import Weight, weights_of
from shardkit.load.performance.bandwidth import Rates
from shardkit.load.performance.cost_model import (
    LEAST,
    LITTLE,
    MOST,
    SMALL,
    USUAL,
    Depth,
    Ring,
    Step,
    chosen,
    ring_bytes,
    seconds_with,
)
from shardkit.load.placement.device_map import clean_device_map
from shardkit.load.streaming.page_layout import DIRECT
from shardkit.printable import shown
from shardkit.sizes import format_size, parse_size

UNMEASURED = Rates(disk=1.0)  # all time goes into reading
_LIMITS = 16  # how many of the largest sizes are tried as the largest that streams
_EDGES = 2 * SECTOR  # of a direct read: what it reads along before and behind a weight


class Residents(NamedTuple):
    """What was chosen.

    Attributes:
        device_map: a device for each part of the model.
        ring: how many blocks the prefetch buffer has room for, or how much it may take.
    """

    device_map: dict[str, Device]
    ring: Ring


def choose_residents(
    model: nn.Module,
    device_map: Mapping[str, Device],
    budgets: Mapping[Device, int],
    *,
    ring: Ring,
    whole: Collection[str] = (),
    dtype: AnyDType | None = None,
    offload_buffers: bool = False,
    rates: Callable[[Device], Rates] = lambda _: UNMEASURED,
) -> Residents:
    """Choose anew where the blocks go that *device_map* lets stream, and those beside them.

    Args:
        model: the model, on any device.
        device_map: what was made within *budgets*, such as by `infer_auto_device_map`.
        budgets: bytes that each device may hold.
        ring: how many blocks the prefetch buffer has room for at most, or how much it may take, as
            in "500MB"; None to choose it.
        whole: names of classes whose modules stream as one.
        dtype: what floats are cast to when the weights are loaded.
        offload_buffers: whether buffers stream.
        rates: measures this machine for a device that runs what streams; called only if the depth
            of the buffer depends on it.

    Raises:
        OverBudget: there is no room for the buffer, of two blocks at least.
    """
    given = Residents(dict(device_map), ring)
    sized = _Sized(model, module_sizes(model, dtype), whole, offload_buffers)
    movable = sized.movable(device_map)
    if movable is None:
        return given

    # Which blocks stay, and how deep the buffer is.
    runner, sizes = movable.runner, movable.sizes
    room = budgets.get(runner, 0) - movable.fixed
    cpu = None if runner == "cpu" else budgets.get("cpu", 0)
    most = USUAL if ring is None and sum(sizes) <= LITTLE else ring
    found = search(sizes, room, most, cpu, rates=rates(runner) if most is None else UNMEASURED)
    if found is None:
        movable.refuse_lack_of_room(most, budgets)
        return given  # a block is larger than the buffer may be: refused when it is attached

    # The map that says so, unless the given one keeps the budgets and reads less.
    made = movable.device_map_of(found, list(_parts(model)))
    before, after = sized.held(device_map, most), sized.held(made, found.ring)
    keeps_budgets = all(nbytes <= budgets.get(device, nbytes) for device, nbytes in before.items())
    if runner not in made.values() or (keeps_budgets and before["disk"] < after["disk"]):
        return given
    if not isinstance(found.ring, int) or found.ring == ring:
        return Residents(made, found.ring)
    fewer = f"at most {ring} were requested, and fewer keep more blocks resident"
    return Residents(made, Depth(found.ring, SMALL if ring is None else fewer))


# ---- What there is to choose from ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Sized:
    """A model, and the bytes of its tensors by name."""

    model: nn.Module
    nbytes: Mapping[str, int]
    whole: Collection[str]
    offload_buffers: bool

    def movable(self, device_map: Mapping[str, Device]) -> _Movable | None:
        """What may be moved; None if nothing streams with *device_map* that can."""
        runner = _runner(device_map)
        devices = {name: device_of(name, device_map) for name, _ in named_tensors(self.model)}
        ours = {name for name, device in devices.items() if device in (runner, "cpu", "disk")}
        blocks = self._blocks(
            device_map,
            lambda device: "anywhere" if device in (runner, "cpu", "disk") else None,
        )
        if not blocks or all(devices[name] == runner for name in ours):
            return None
        names = {block.name for block in blocks}
        here = ours | {name for name in devices if not names.isdisjoint(prefixes(name))}
        fixed = sum(self.nbytes[name] for name in here - _inside(blocks))
        return _Movable(device_map, runner, blocks, tuple(map(self._buffer_size, blocks)), fixed)

    def held(self, device_map: Mapping[str, Device], ring: Ring) -> Counter[Device]:
        """Bytes that each device holds with *device_map*, of weights and of the prefetch buffer.

        What is on disk passes through a staging buffer on the CPU too.
        """
        runner = _runner(device_map)
        blocks = self._blocks(
            device_map,
            lambda device: device if device in ("cpu", "disk") and device != runner else None,
        )
        away, held = _inside(blocks), Counter[Device]()
        for name, _ in named_tensors(self.model):
            device = device_of(name, device_map)
            stays = name not in away and device in ("cpu", "disk")
            held[runner if stays else device] += self.nbytes[name]
        nbytes = ring_bytes(map(self._buffer_size, blocks), ring)
        held[runner] += nbytes
        if runner != "cpu" and held["disk"]:
            held["cpu"] += nbytes
        return held

    def _blocks(
        self, device_map: Mapping[str, Device], target: Callable[[Device], Device | None]
    ) -> tuple[ModuleBlock, ...]:
        def streams(weight: Weight) -> Device | None:
            if weight.is_buffer and not self.offload_buffers:
                return None
            return target(device_of(weight.names[0], device_map))

        weights = list(weights_of(self.model))
        return cut(self.model, weights, target=streams, whole=self.whole).blocks

    def _buffer_size(self, block: ModuleBlock) -> int:
        """What *block* takes in the prefetch buffer, whatever the edges of its reads."""
        sizes = [self.nbytes[weight.names[0]] for weight in block.weights]
        edges = _EDGES * sum(nbytes >= DIRECT for nbytes in sizes)
        return edges + sum(round_up(nbytes, ALIGNMENT) for nbytes in sizes)


@dataclass(frozen=True, slots=True)
class _Movable:
    """What may be moved.

    Attributes:
        device_map: where everything was.
        runner: the device that runs what streams.
        blocks: what may lie anywhere, in the order of the model.
        sizes: what each of them takes in memory.
        fixed: bytes that must be in the memory of the runner.
    """

    device_map: Mapping[str, Device]
    runner: Device
    blocks: tuple[ModuleBlock, ...]
    sizes: tuple[int, ...]
    fixed: int

    def refuse_lack_of_room(self, ring: Ring, budgets: Mapping[Device, int]) -> None:
        """Say which budget is too small for the prefetch buffer.

        Raises:
            OverBudget: one is.
        """
        nbytes = ring_bytes(self.sizes, ring if isinstance(ring, str) else LEAST)
        blocks = f"{ring} of blocks" if isinstance(ring, str) else "two blocks"
        cannot = f"{format_size(self.fixed)} for weights that cannot be offloaded"
        what = f"{cannot}, plus a buffer for {blocks}"
        needs = [(self.runner, self.fixed + nbytes, what)]
        if self.runner != "cpu":
            what = f"a host staging buffer for {blocks}"
            needs.append(("cpu", nbytes, what))
        for device, needed, reason in needs:
            available = budgets.get(device, 0)
            if needed > available:
                pairs = zip(self.sizes, self.blocks, strict=True)
                largest, name = max((size, block.name) for size, block in pairs)
                raise OverBudget(
                    f"device {shown(device)} needs at least {format_size(needed)} (budget: "
                    f"{format_size(available)}): {reason}; the largest block is {shown(name)} "
                    f"with {format_size(largest)}",
                    needed=needed,
                    available=available,
                    hint="raise its max_memory, pass a narrower dtype, or pass a device_map with "
                    "a device for each part",
                )

    def device_map_of(self, found: ResidentSet, names: Iterable[str]) -> dict[str, Device]:
        """The device map of the parts called *names* where *found* stays."""
        devices: dict[str, Device] = {}
        for number, block in enumerate(self.blocks):
            away: Device = "cpu" if number in found.on_cpu else "disk"
            devices[block.name] = self.runner if number in found.kept else away
        made = clean_device_map({name: self._device_of(name, devices) for name in names})
        # The first accelerator in a map runs what streams.
        if _runner(made) == self.runner:
            return made
        return dict(sorted(made.items(), key=lambda item: item[1] != self.runner))

    def _device_of(self, name: str, devices: Mapping[str, Device]) -> Device:
        """That of the block around *name*, or else where it was, if nothing streams from there."""
        around = [prefix for prefix in prefixes(name) if prefix in devices]
        device = devices[around[-1]] if around else device_of(name, self.device_map)
        return device if around or device not in ("cpu", "disk") else self.runner


def _runner(device_map: Mapping[str, Device]) -> Device:
    """The device that runs what is on CPU or disk, as `main_device` says."""
    return next((device for device in device_map.values() if device not in ("cpu", "disk")), "cpu")


def _inside(blocks: Iterable[ModuleBlock]) -> set[str]:
    return {name for block in blocks for weight in block.weights for name in weight.names}


def _parts(model: nn.Module) -> Iterator[str]:
    """All names of modules that contain none, and of tensors that stand beside modules."""
    for name, module in model.named_modules(remove_duplicate=False):
        if not own_modules(module):
            yield name
            continue
        prefix = f"{name}." if name else ""
        tensors = {**own_parameters(module), **own_buffers(module)}
        yield from (f"{prefix}{each}" for each, tensor in tensors.items() if tensor is not None)


# ---- The search: blocks are numbers here, and have sizes -----------------------------------------


@dataclass(frozen=True, slots=True)
class ResidentSet:
    """Which blocks stay, and where the others lie; what is in neither set is on disk.

    Attributes:
        kept: those that stay where they are run.
        ring: how many of the others the prefetch buffer has room for, or how much it may take.
        on_cpu: those that stay in main memory, and stream from there.
    """

    kept: frozenset[int]
    ring: Ring
    on_cpu: frozenset[int] = frozenset()


def search(
    sizes: Sequence[int],
    room: int,
    ring: Ring,
    cpu: int | None = None,
    *,
    rates: Rates = UNMEASURED,
) -> ResidentSet | None:
    """Choose which blocks of *sizes* stay, so that a forward is short; None if there is no way.

    Args:
        sizes: bytes of each, in the order in which they are run.
        room: bytes that those that stay and the prefetch buffer may take together.
        ring: how many blocks the buffer has room for at most, of which two are needed; or how much
            it may take, as in "500MB"; None for as many as make a forward faster.
        cpu: bytes of main memory, through which what is on disk passes; None where it runs there.
        rates: those of this machine.
    """
    everything = frozenset(range(len(sizes)))
    if sum(sizes) <= room:
        return ResidentSet(everything, ring)

    # For each depth that may be, the most bytes that can stay. What is preferred comes first.
    tried = ((depth, _fullest(sizes, room, depth, cpu)) for depth in _depths(ring))
    ways = {depth: kept for depth, kept in tried if kept is not None}
    if not ways:
        return None

    # The depth whose forward is shortest.
    seconds = {
        depth: seconds_with(depth, _steps(sizes, kept, linked=cpu is not None), rates)
        for depth, kept in ways.items()
        if isinstance(depth, int)
    }
    depth: int | str | Depth
    if isinstance(ring, str):
        depth = ring
    else:
        depth = chosen(seconds) if ring is None else min(seconds, key=seconds.__getitem__)
    kept = ways[depth.blocks if isinstance(depth, Depth) else depth]

    # Main memory takes what it has room for. What comes from disk passes through a buffer there.
    streamed = sorted(everything - kept)
    streamed_sizes = [sizes[number] for number in streamed]
    left = cpu or 0
    if sum(streamed_sizes) > left:
        left = max(0, left - ring_bytes(streamed_sizes, depth))
    on_cpu = frozenset(streamed[at] for at in spread(streamed_sizes, left))
    return ResidentSet(kept, depth, on_cpu)


def _depths(ring: Ring) -> Sequence[int | str]:
    """What may be tried for *ring*; what is preferred where all are as fast comes first."""
    match ring:
        case None:
            return range(LEAST, MOST + 1)
        case Depth(blocks):
            return [blocks]
        case str():
            return [ring]
        case int():
            return range(max(LEAST, ring), LEAST - 1, -1)


def _steps(sizes: Sequence[int], kept: Container[int], *, linked: bool) -> list[Step]:
    """The work of a forward if *kept* stay. It is as if all others were on disk: that is open
    yet.
    """
    return [
        Step(compute=nbytes)
        if number in kept
        else Step(disk=nbytes, link=nbytes if linked else 0, compute=nbytes, room=nbytes)
        for number, nbytes in enumerate(sizes)
    ]


def _fullest(
    sizes: Sequence[int], room: int, ring: int | str, cpu: int | None
) -> frozenset[int] | None:
    """Which blocks stay so that most bytes do; None if there is no room for the prefetch buffer.

    The largest block that streams makes the buffer as large, so several limits are tried for it.
    """
    most = parse_size(ring) if isinstance(ring, str) else max(sizes)
    ways = []
    for limit in nlargest(_LIMITS, set(sizes)):
        # What is larger stays, and of the others what has room beside it and the buffer.
        small = [number for number, nbytes in enumerate(sizes) if nbytes <= limit]
        small_sizes = [sizes[number] for number in small]
        large = frozenset(range(len(sizes))).difference(small)
        left = room - _sum(sizes, large) - ring_bytes(small_sizes, ring)
        if left < 0 or limit > most:
            continue
        kept = large.union(small[at] for at in spread(small_sizes, left))
        # Main memory must hold all that streams, or else a buffer through which it comes from disk.
        streamed = [nbytes for number, nbytes in enumerate(sizes) if number not in kept]
        if cpu is None or min(sum(streamed), ring_bytes(streamed, ring)) <= cpu:
            ways.append(kept)
    return max(ways, key=lambda kept: _sum(sizes, kept), default=None)


def spread(sizes: Sequence[int], room: int) -> frozenset[int]:
    """Which blocks of *sizes* stay in *room* bytes, as evenly as can be.

    They are no fewer bytes than the first that fit.
    """
    # Of all runs from the start, the share that *room* is of the whole.
    evenly: set[int] = set()
    passed, taken, total = 0, 0, sum(sizes)
    for number, nbytes in enumerate(sizes):
        passed += nbytes
        if (taken + nbytes) * total <= passed * room:
            evenly.add(number)
            taken += nbytes
    first = {number for number, end in enumerate(accumulate(sizes)) if end <= room}
    ways = [_filled(kept, sizes, room) for kept in (evenly, first)]
    return max(ways, key=lambda kept: _sum(sizes, kept))  # evenly, if both are as many


def _filled(kept: Collection[int], sizes: Sequence[int], room: int) -> frozenset[int]:
    """*kept*, and what else there is room for, the largest first."""
    room -= _sum(sizes, kept)
    more: set[int] = set()
    others = set(range(len(sizes))).difference(kept)
    for number in sorted(others, key=lambda number: (-sizes[number], number)):
        if sizes[number] <= room:
            more.add(number)
            room -= sizes[number]
    return frozenset(kept) | more


def _sum(sizes: Sequence[int], numbers: Iterable[int]) -> int:
    return sum(sizes[number] for number in numbers)
