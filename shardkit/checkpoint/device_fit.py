"""Choose a device for each block: accelerators first, then the CPU, then the disk. Pure, from sizes
alone.

Blocks are taken in order, each onto the first device from the current one on that has room for it;
a device that was passed is not used again. The device that runs the blocks on CPU and disk, which
is the first accelerator, and the CPU as long as a block may be placed on disk, keep room for the
largest block that is not placed yet.

`DeviceQueue` counts the bytes, here and in `shardkit.load.placement.infer_device_map`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import inf
from typing import Generic, TypeVar

DISK = "disk"
CPU = "cpu"

D = TypeVar("D", str, int | str)


class DeviceQueue(Generic[D]):
    """Devices that are filled one after the other within their budgets, and then the disk.

    >>> devices = DeviceQueue({"gpu": 10, "cpu": 20}, keepers=("gpu",))
    >>> devices.put(4), devices.room(largest=5)
    ('gpu', 1)
    >>> devices.advance()
    >>> devices.put(12), devices.free
    ('cpu', {'gpu': 6, 'cpu': 8})

    Attributes:
        budgets: what each device may hold, in the order in which they are filled; the disk is not
            among them.
        used: bytes that each device holds, the disk with them.
    """

    def __init__(self, budgets: Mapping[D, int], *, keepers: Iterable[D]) -> None:
        """Put nothing anywhere yet.

        Args:
            budgets: bytes for each device; what is said of the disk has no meaning.
            keepers: the devices that keep room for the largest part that is yet to come.
        """
        self.budgets: dict[D, int] = {
            device: nbytes for device, nbytes in budgets.items() if device != DISK
        }
        self.used: dict[D, int] = dict.fromkeys(self.budgets, 0)
        self.used[DISK] = 0
        self._waiting: deque[D] = deque(self.used)
        self._keepers: frozenset[D] = frozenset(keepers)

    @property
    def current(self) -> D:
        """The device that is being filled."""
        return self._waiting[0]

    @property
    def free(self) -> dict[D, int]:
        """Bytes of each budget that are not used."""
        return {device: nbytes - self.used[device] for device, nbytes in self.budgets.items()}

    def kept(self, largest: int) -> int:
        """What the current device keeps free, where the *largest* part to come has so many
        bytes.
        """
        return largest if self.current in self._keepers else 0

    def room(self, largest: int) -> float:
        """What the current device may still take; no number is too large for the disk."""
        if self.current == DISK:
            return inf
        return self.budgets[self.current] - self.used[self.current] - self.kept(largest)

    def put(self, nbytes: int) -> D:
        """Let the current device hold so many bytes more."""
        self.used[self.current] += nbytes
        return self.current

    def advance(self) -> None:
        """Fill the next device from now on."""
        self._waiting.popleft()


@dataclass(frozen=True, slots=True)
class Fit:
    """The device of each block, and what it takes.

    Attributes:
        homes: the device of each block, in their order.
        budgets: bytes that each device may hold; the disk is not among them.
        used: bytes of blocks on each device, the disk included.
        left: bytes of each budget that no block takes.
        largest_loaded: for each device that loads blocks of other devices, to run or to pass them
            on, the largest of these.
        sizes: bytes of each block.
    """

    homes: Mapping[str, str]
    budgets: Mapping[str, int]
    used: Mapping[str, int]
    left: Mapping[str, int]
    largest_loaded: Mapping[str, str]
    sizes: Mapping[str, int]

    @property
    def lacking(self) -> dict[str, int]:
        """For each device that has no room for the largest block loaded there, the bytes that it is
        short.
        """
        missing = {
            device: self.sizes[block] - self.left[device]
            for device, block in self.largest_loaded.items()
        }
        return {device: nbytes for device, nbytes in missing.items() if nbytes > 0}


def fit(sizes: Mapping[str, int], budgets: Mapping[str, int]) -> Fit:
    """Choose a device for each block.

    Args:
        sizes: bytes of the blocks by name, in the order in which they are run.
        budgets: bytes that each device may hold, in the order in which they are filled:
            accelerators, then "cpu".
    """
    keepers = _keepers(budgets)
    devices = DeviceQueue(budgets, keepers=keepers)
    homes: dict[str, str] = {}
    for (name, nbytes), largest in zip(
        sizes.items(), _largest_after(tuple(sizes.values())), strict=True
    ):
        while nbytes > devices.room(largest):
            devices.advance()
        homes[name] = devices.put(nbytes)
    loaded = dict(_largest_loaded(homes, sizes, keepers))
    return Fit(homes, devices.budgets, devices.used, devices.free, loaded, sizes)


def _keepers(budgets: Iterable[str]) -> tuple[str, ...]:
    """The device that runs what is offloaded, and the CPU."""
    devices = list(budgets)
    return (*devices[:1], *(device for device in devices[1:] if device == CPU))


def _largest_after(sizes: Sequence[int]) -> list[int]:
    """For each position, the largest size after it."""
    return list(accumulate(reversed(sizes[1:]), max, initial=0))[::-1] if sizes else []


def _largest_loaded(
    homes: Mapping[str, str], sizes: Mapping[str, int], keepers: Sequence[str]
) -> Iterable[tuple[str, str]]:
    for device in keepers:
        below = (DISK,) if device == CPU else (CPU, DISK)
        coming = [name for name, home in homes.items() if home in below]
        if coming:
            yield device, max(coming, key=lambda name: sizes[name])
