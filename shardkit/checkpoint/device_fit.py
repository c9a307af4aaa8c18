"""Choose a device for each block: accelerators first, then the CPU, then the disk. Pure, from sizes
alone.

Blocks are taken in order, each onto the first device from the current one on that has room for it;
a device that was passed is not used again. The device that runs the blocks on CPU and disk, which
is the first accelerator, and the CPU as long as a block may be placed on disk, keep room for the
largest block that is not placed yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

DISK = "disk"
CPU = "cpu"


@dataclass(frozen=True, slots=True)
class Fit:
    """The device of each block, and what it takes.

    Attributes:
        homes: the device of each block, in their order.
        budgets: bytes that each device may hold; the disk is not among them.
        used: bytes of blocks on each device, the disk included.
        largest_loaded: for each device that loads blocks of other devices, to run or to pass them
            on, the largest of these.
        sizes: bytes of each block.
    """

    homes: Mapping[str, str]
    budgets: Mapping[str, int]
    used: Mapping[str, int]
    largest_loaded: Mapping[str, str]
    sizes: Mapping[str, int]

    @property
    def left(self) -> dict[str, int]:
        """Bytes of each budget that no block takes."""
        return {device: budget - self.used[device] for device, budget in self.budgets.items()}

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
    devices = [*budgets, DISK]
    used = dict.fromkeys(devices, 0)
    homes: dict[str, str] = {}
    for (name, nbytes), reserve in zip(
        sizes.items(), _largest_after(tuple(sizes.values())), strict=True
    ):
        while devices[0] != DISK:
            kept = reserve if devices[0] in keepers else 0
            if used[devices[0]] + nbytes + kept <= budgets[devices[0]]:
                break
            devices.pop(0)
        homes[name] = devices[0]
        used[devices[0]] += nbytes
    return Fit(homes, budgets, used, dict(_largest_loaded(homes, sizes, keepers)), sizes)


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
