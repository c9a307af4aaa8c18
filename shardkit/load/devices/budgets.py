"""Memory budgets of devices: those that the user gives, and the free memory of each device."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from shardkit.errors import LoadError
from shardkit.printable import shown
from shardkit.sizes import parse_size
from shardkit.system.free_memory import available_memory

Device = int | str
"""A device that holds weights: the number of an accelerator, "mps", "cpu" or "disk"."""
MaxMemory = Mapping[int | str | torch.device, int | float | str]
"""A memory budget for each device: bytes, "10GB", or "80%" of what it has free. Devices are numbers
of accelerators, "cuda:0", "mps", "cpu" or "disk", or `torch.device`; one that is left out gets
none, but for the CPU.
"""

_PERCENT = re.compile(r"\s*(\d+(?:\.\d*)?)\s*%\s*", re.ASCII)
_NAMED = ("mps", "cpu", "disk")
_HINT = 'use 0, 1, ..., "cuda:0", "mps", "cpu" or "disk"'


def get_max_memory(max_memory: MaxMemory | None = None) -> dict[Device, int]:
    """Return the memory budget of each device in bytes: accelerators, then "mps", "cpu" and "disk".

    A device that is left out gets no memory, but for the CPU, which gets what is available. The
    disk has no limit, even if one is given. The name and argument are those of Accelerate.

    Args:
        max_memory: a size for each device: bytes, "10GB", or "80%" of its free memory; None for all
            that is free. Devices are numbers, names or `torch.device`.

    Returns:
        Bytes for each device, accelerators by number first.

    Raises:
        LoadError: a key is not a device, or a value is not a size.
        BadSize: a size cannot be parsed.

    Example:
        >>> from shardkit.load import get_max_memory
        >>> get_max_memory({"cpu": "6GB"})["cpu"]
        6000000000
    """
    if max_memory is None:
        return _all_there_is()
    budgets: dict[Device, int] = {}
    for key, size in max_memory.items():
        device = device_key(key)
        if device in budgets:
            raise LoadError(
                f"max_memory has two sizes for device {shown(device)}",
                hint="give one size for each device",
            )
        budgets[device] = _nbytes(device, size)
    if "cpu" not in budgets and not any(map(_shares_host_memory, budgets)):
        budgets["cpu"] = available_memory()
    return dict(sorted(budgets.items(), key=lambda item: _rank(item[0])))


def device_key(device: object) -> Device:
    """What *device* is called in budgets and device maps.

    Raises:
        LoadError: it is no device that holds weights.
    """
    match device:
        case int() if not isinstance(device, bool) and device >= 0:
            return device
        case str() if device in _NAMED:
            return device
        case torch.device():
            return _key_of(device)
        case str():
            return _key_of(_parsed(device))
    raise LoadError(f"{shown(device)} is not a device", hint=_HINT)


def accelerator() -> torch.device | None:
    """The kind of accelerator that is there; None where there is none, though torch may be made for
    one.
    """
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def free_memory(device: Device) -> int | None:
    """Bytes that *device* has free now; None if it does not say."""
    if device in ("cpu", "mps"):
        return available_memory()
    return _free_on_accelerator(device) if isinstance(device, int) else None


def _parsed(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError:
        raise LoadError(f"{shown(name)} is not a device", hint=_HINT) from None


def _key_of(device: torch.device) -> Device:
    if device.type in _NAMED:
        return device.type
    if device.type == "meta":
        raise LoadError("the meta device holds no weights", hint=_HINT)
    _, numbered, number = str(device).partition(":")
    if numbered:
        return int(number)
    there = accelerator()
    return int(torch.get_device_module(there).current_device()) if there is not None else 0


def _rank(device: Device) -> tuple[int, int]:
    return (0, device) if isinstance(device, int) else (1, _NAMED.index(device))


def _nbytes(device: Device, size: object) -> int:
    match size:
        case bool():
            pass
        case int() | float() if 0 <= size < 1 << 63:
            return int(size)
        case str() if percent := _PERCENT.fullmatch(size):
            return int(float(percent[1]) / 100 * _free(device))
        case str():
            return parse_size(size, least=0)
    raise LoadError(
        f"{shown(size)} is not a size for device {shown(device)}",
        hint='use a number of bytes, "10GB", or "80%" of its free memory',
    )


def _free(device: Device) -> int:
    free = free_memory(device)
    if free is None:
        raise LoadError(
            f"the free memory of device {shown(device)} is unknown", hint="give it a size in bytes"
        )
    return free


def _all_there_is() -> dict[Device, int]:
    if _accelerator_type() == "mps":
        return {"mps": available_memory()}
    budgets: dict[Device, int] = {}
    for index in range(torch.accelerator.device_count()):
        free = _free_on_accelerator(index)
        if free is not None:
            budgets[index] = free
    if not any(map(_shares_host_memory, budgets)):
        budgets["cpu"] = available_memory()
    return budgets


def _accelerator_type() -> str:
    there = accelerator()
    return there.type if there is not None else ""


def _free_on_accelerator(index: int) -> int | None:
    """Bytes free on an accelerator, with those that torch has taken and does not use; None if it
    does not answer.
    """
    if not 0 <= index < torch.accelerator.device_count():
        return None
    module = torch.get_device_module(_accelerator_type())
    try:
        free, _ = module.mem_get_info(index)
        return int(free + module.memory_reserved(index) - module.memory_allocated(index))
    except (
        RuntimeError,
        AttributeError,
    ):  # busy in exclusive mode, broken, or of a kind that cannot tell
        return None


def _shares_host_memory(device: Device) -> bool:
    """Whether what *device* holds is taken from the CPU's memory, which is then not to be counted
    again.
    """
    if not isinstance(device, int):
        return device == "mps"
    if _accelerator_type() != "cuda" or device >= torch.accelerator.device_count():
        return False
    return bool(getattr(torch.cuda.get_device_properties(device), "is_integrated", False))
