"""Choose which blocks of a model stay in memory where not all of them can (pure: modules and sizes are looked at).

1. What a device map lets stream is dealt out anew, with what lies beside it: between the device that runs it, the CPU if that is
   another, and the disk. What other accelerators hold stays there.
2. The budget of the device that runs a block also pays for the ring that blocks stream through, and for what cannot stream: tied
   weights, buffers, and what a module owns that contains blocks.
3. A map that keeps the budgets so, and has less on disk, stays as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from shardkit.errors import OverBudget, shown
from shardkit.load.devices.budgets import Device
from shardkit.load.modules.blocks import ModuleBlock, cut
from shardkit.load.modules.sizes import AnyDType, module_sizes, named_tensors, prefixes
from shardkit.load.modules.torch_internals import own_buffers, own_modules, own_parameters
from shardkit.load.modules.weights import Weight, weights_of
from shardkit.load.performance.bandwidth import Rates
from shardkit.load.performance.cost_model import LEAST, LITTLE, SMALL, USUAL, Depth, Ring, ring_bytes
from shardkit.load.placement.device_map import clean_device_map, device_of
from shardkit.load.placement.resident_search import UNMEASURED, ResidentSet, deal
from shardkit.sizes import format_size

_ALIGNMENT = 64
_EDGES = 2 * 4096  # of a direct read: what it reads along before and behind a weight
_DIRECT = 256 << 10  # bytes, from which on weights are read so


class Residents(NamedTuple):
    """What was chosen.

    Attributes:
        device_map: a device for each part of the model.
        ring: how many blocks the ring has room for, or how much it may take.
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
    """Deal out anew what *device_map* lets stream, and what lies where that runs.

    Args:
        model: the model, on any device.
        device_map: what was made within *budgets*, such as by `infer_auto_device_map`.
        budgets: bytes that each device may hold.
        ring: how many blocks the ring has room for at most, or how much it may take, as in "500MB"; None for as many as pay.
        whole: names of classes whose modules stream as one.
        dtype: what floats are cast to when the weights are loaded.
        offload_buffers: whether buffers stream.
        rates: those of this machine, for a device that runs what streams; they are asked for if the ring depends on them.

    Raises:
        OverBudget: there is no room for the ring, of two blocks at least.
    """
    scales = _Scales(model, module_sizes(model, dtype), whole, offload_buffers)
    table = scales.table(device_map, budgets)
    if not table.streams:
        return Residents(dict(device_map), ring)
    most = USUAL if ring is None and sum(table.sizes) <= LITTLE else ring
    dealt = table.deal(most, rates(table.runner) if most is None else UNMEASURED)
    if dealt is None:
        return Residents(dict(device_map), ring)
    made = table.written(dealt, list(_parts(model)))
    given = scales.held(device_map, most)
    keeps_budgets = all(nbytes <= budgets.get(device, nbytes) for device, nbytes in given.items())
    if table.runner not in made.values() or (keeps_budgets and given["disk"] < scales.held(made, dealt.ring)["disk"]):
        return Residents(dict(device_map), ring)
    return Residents(made, _explained(dealt.ring, ring))


def _explained(ring: Ring, asked: Ring) -> Ring:
    """*ring*, and why it is not what the caller *asked* for, if it is not."""
    if not isinstance(ring, int) or ring == asked:
        return ring
    return Depth(ring, SMALL if asked is None else f"at most {asked} were asked for, and fewer leave more blocks in memory")


@dataclass(frozen=True, slots=True)
class _Scales:
    """A model, and what its tensors weigh."""

    model: nn.Module
    nbytes: Mapping[str, int]
    whole: Collection[str]
    offload_buffers: bool

    def table(self, device_map: Mapping[str, Device], budgets: Mapping[Device, int]) -> _Table:
        """What there is to deal anew of *device_map*."""
        runner = _runner(device_map)
        devices = {name: device_of(name, device_map) for name, _ in named_tensors(self.model)}
        ours = {name for name, device in devices.items() if device in (runner, "cpu", "disk")}
        blocks = self._blocks(device_map, lambda device: "anywhere" if device in (runner, "cpu", "disk") else None)
        around = {block.name for block in blocks}
        here = ours | {name for name in devices if not around.isdisjoint(prefixes(name))}
        return _Table(
            device_map=device_map,
            runner=runner,
            budgets=budgets,
            blocks=blocks,
            sizes=tuple(map(self._page, blocks)),
            fixed=sum(self.nbytes[name] for name in here - _inside(blocks)),
            streams=bool(blocks) and any(devices[name] != runner for name in ours),
        )

    def held(self, device_map: Mapping[str, Device], ring: Ring) -> Counter[Device]:
        """What each device holds with *device_map*: weights, and the ring, which what is on disk passes on the CPU too."""
        runner = _runner(device_map)
        blocks = self._blocks(device_map, lambda device: device if device in ("cpu", "disk") and device != runner else None)
        away, held = _inside(blocks), Counter[Device]()
        for name, _ in named_tensors(self.model):
            device = device_of(name, device_map)
            held[device if name in away or device not in ("cpu", "disk") else runner] += self.nbytes[name]
        nbytes = ring_bytes(map(self._page, blocks), ring)
        held[runner] += nbytes
        if runner != "cpu" and held["disk"]:
            held["cpu"] += nbytes
        return held

    def _blocks(self, device_map: Mapping[str, Device], target: Callable[[Device], Device | None]) -> tuple[ModuleBlock, ...]:
        def streams(weight: Weight) -> Device | None:
            return None if weight.is_buffer and not self.offload_buffers else target(device_of(weight.names[0], device_map))

        return cut(self.model, list(weights_of(self.model)), target=streams, whole=self.whole).blocks

    def _page(self, block: ModuleBlock) -> int:
        """What *block* takes in the ring, whatever the edges of its reads."""
        sizes = [self.nbytes[weight.names[0]] for weight in block.weights]
        return sum(_padded(nbytes) + (_EDGES if nbytes >= _DIRECT else 0) for nbytes in sizes)


@dataclass(frozen=True, slots=True)
class _Table:
    """What there is to deal, and to whom.

    Attributes:
        device_map: where everything was.
        runner: the device that runs what streams.
        budgets: bytes that each device may hold.
        blocks: what may lie anywhere.
        sizes: what each of them takes.
        fixed: bytes that must be in the memory of the runner.
        streams: whether anything streams, and can be dealt.
    """

    device_map: Mapping[str, Device]
    runner: Device
    budgets: Mapping[Device, int]
    blocks: tuple[ModuleBlock, ...]
    sizes: tuple[int, ...]
    fixed: int
    streams: bool

    def deal(self, ring: Ring, rates: Rates) -> ResidentSet | None:
        """Deal the blocks; None if one is larger than the ring may be, and cannot stay.

        Raises:
            OverBudget: there is no room for the ring.
        """
        available = self.budgets.get(self.runner, 0)
        cpu = None if self.runner == "cpu" else self.budgets.get("cpu", 0)
        dealt = deal(self.sizes, available - self.fixed, ring, cpu, rates=rates)
        needed = ring_bytes(self.sizes, ring if isinstance(ring, str) else LEAST)
        if dealt is None and self.fixed + needed > available:
            what = f"{format_size(self.fixed)} that cannot stream, and room for {_said(ring)} at a time"
            raise self._over_budget(self.runner, self.fixed + needed, what)
        if dealt is None and cpu is not None and needed > cpu:
            raise self._over_budget("cpu", needed, f"room for {_said(ring)} that pass through it on their way from disk")
        return dealt

    def _over_budget(self, device: Device, needed: int, what: str) -> OverBudget:
        available = self.budgets.get(device, 0)
        nbytes, largest = max((nbytes, block.name) for nbytes, block in zip(self.sizes, self.blocks, strict=True))
        return OverBudget(
            f"device {shown(device)} may hold {format_size(available)}, and needs {format_size(needed)} at least: "
            f"{what}; the largest is {shown(largest)} with {format_size(nbytes)}",
            needed=needed,
            available=available,
            hint="raise its max_memory, give a narrower dtype, or give a device_map that says where each part goes",
        )

    def written(self, dealt: ResidentSet, names: Collection[str]) -> dict[str, Device]:
        """The device map of the parts called *names* that says so."""
        homes: dict[str, Device] = {}
        for number, block in enumerate(self.blocks):
            away: Device = "cpu" if number in dealt.on_cpu else "disk"
            homes[block.name] = self.runner if number in dealt.kept else away
        made = clean_device_map({name: self._home(name, homes) for name in names})
        # The first accelerator in a map runs what streams.
        order = made if _runner(made) == self.runner else sorted(made, key=lambda name: made[name] != self.runner)
        return {name: made[name] for name in order}

    def _home(self, name: str, homes: Mapping[str, Device]) -> Device:
        """That of the block that *name* is in, or else where it was, if that was no place to stream from."""
        around = [prefix for prefix in prefixes(name) if prefix in homes]
        device = homes[around[-1]] if around else device_of(name, self.device_map)
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
        tensors = {**own_parameters(module), **own_buffers(module)}
        yield from (f"{name}.{each}" if name else each for each, tensor in tensors.items() if tensor is not None)


def _said(ring: Ring) -> str:
    return f"{ring} of blocks" if isinstance(ring, str) else "two blocks"


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
