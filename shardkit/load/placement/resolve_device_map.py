"""Resolve a device map as it is given: a dict that is used as it is, or a word that says how to
choose one.

"auto" and "balanced" spread a model evenly over the accelerators, "balanced_low_0" leaves the first
as empty as possible, and "sequential" fills one after the other. If something streams, the first
two also choose the resident blocks (`choose_residents`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import nn

from shardkit.errors import LoadError
from shardkit.load.devices.budgets import Device, MaxMemory, device_key, get_max_memory
from shardkit.load.performance.bandwidth import Rates
from shardkit.load.performance.cost_model import Ring
from shardkit.load.placement.choose_resident import UNMEASURED, Residents, choose_residents
from shardkit.load.placement.device_map import DeviceMap, refuse_disk
from shardkit.load.placement.infer_device_map import get_balanced_memory, infer_auto_device_map
from shardkit.printable import shown

MODES = ("auto", "balanced", "balanced_low_0", "sequential")


@dataclass(frozen=True, slots=True)
class PlacementOptions:
    """The options that a device map is chosen with.

    Attributes:
        ring: size of the prefetch buffer: a number of blocks, at most where a map is made, or
            bytes, as in "500MB"; None to choose automatically.
        offload: "never" to refuse the disk.
        max_memory: what each device may hold.
        no_split: names of classes whose modules stay on one device, and stream as one.
        preload: names of classes whose modules stream as one.
        dtype: what floats are cast to when the weights are loaded.
        offload_buffers: whether buffers stream.
        rates: those of this machine, for a device that runs what streams.
    """

    ring: Ring
    offload: str = "allow"
    max_memory: MaxMemory | None = None
    no_split: frozenset[str] = frozenset()
    preload: frozenset[str] = frozenset()
    dtype: torch.dtype | None = None
    offload_buffers: bool = False
    rates: Callable[[Device], Rates] = field(default=lambda _: UNMEASURED, compare=False)

    def residents(self, model: nn.Module, device_map: str | DeviceMap) -> Residents:
        """*device_map* with devices as they are called in maps, made first if it is a word.

        Raises:
            LoadError: it is another word.
            OverBudget: what streams has no room to, or would be on disk and may not.
        """
        found, budgets = (
            self._given(device_map)
            if isinstance(device_map, Mapping)
            else self._made(model, device_map)
        )
        if self.offload == "never":
            refuse_disk(model, found.device_map, budgets, dtype=self.dtype)
        return found

    def _given(self, device_map: DeviceMap) -> tuple[Residents, Mapping[Device, int]]:
        return Residents(
            {name: device_key(device) for name, device in device_map.items()}, self.ring
        ), {}

    def _made(self, model: nn.Module, word: str) -> tuple[Residents, Mapping[Device, int]]:
        """The map that *word* asks for, and the budgets that it keeps."""
        if word not in MODES:
            raise LoadError(
                f"{shown(word)} is not a device map",
                hint=f"choose one of {', '.join(MODES)}, or give a dict",
            )
        budgets: Mapping[Device, int] = get_max_memory(self.max_memory)
        if word != "sequential":
            low_zero = word == "balanced_low_0"
            budgets = get_balanced_memory(
                model, self.max_memory, self.no_split, self.dtype, low_zero=low_zero
            )
        limits = cast("MaxMemory", budgets)
        device_map = infer_auto_device_map(
            model, limits, self.no_split, self.dtype, offload_buffers=self.offload_buffers
        )
        if word not in ("auto", "balanced"):
            return Residents(device_map, self.ring), budgets
        found = choose_residents(
            model,
            device_map,
            budgets,
            ring=self.ring,
            whole=self.no_split | self.preload,
            dtype=self.dtype,
            offload_buffers=self.offload_buffers,
            rates=self.rates,
        )
        return found, budgets
