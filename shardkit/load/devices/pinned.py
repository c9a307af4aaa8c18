"""Pinned main memory, from which an accelerator copies asynchronously, in exactly the requested
size.

1. torch rounds pinned memory up to a power of two, which can double it. So the memory is allocated
   here, and registered with CUDA (or HIP, which uses the same names). Other accelerators have no
   such call, and get memory that torch pins.
2. Pinned host copies are shared with forks: a fork would copy every private pinned page at once.
3. Memory that cannot be pinned is used as it is: copies from it are correct but slower. A warning
   is raised.
4. It is released when no copy from it is in progress.
"""

from __future__ import annotations

import ctypes
import os
import warnings
import weakref
from contextlib import suppress
from typing import Any

import torch

from shardkit.load.memory.allocate import private
from shardkit.load.memory.arenas import Arena
from shardkit.sizes import format_size

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device


def ring_memory(nbytes: int, device: torch.device) -> torch.Tensor:
    """*nbytes* bytes that are filled again and again, for copies to *device*; the child of a fork
    finds zeros in them.

    Raises:
        LoadError: there is no room for it.
    """
    return _pinned(private(nbytes), device) if device.type == "cuda" else _pinned_by_torch(nbytes)


def kept_memory(nbytes: int, device: torch.device) -> torch.Tensor:
    """*nbytes* bytes that are filled once, for copies to *device*.

    Raises:
        LoadError: there is no room for it.
    """
    if device.type != "cuda":
        return _pinned_by_torch(nbytes)
    return _pinned(Arena.shared(max(1, nbytes)).tensor(0, torch.uint8, (nbytes,)), device)


def _pinned_by_torch(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)


def _pinned(memory: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The same bytes as those of *memory*, pinned for as long as a tensor has them."""
    nbytes, address = len(memory), memory.data_ptr()
    if not nbytes:
        return memory
    with torch.cuda.device(device):
        failed = int(_cudart().cudaHostRegister(address, nbytes, _PORTABLE))
    if failed:
        _forget_failure(device)
        sentence = (
            f"{format_size(nbytes)} of main memory cannot be pinned (CUDA error "
            f"{failed}): copies from it are slower"
        )
        warnings.warn(sentence, UserWarning, stacklevel=2)
        return memory
    holder = (ctypes.c_char * nbytes).from_address(address)
    weakref.finalize(
        holder, _unpin, memory, device, os.getpid()
    ).atexit = False  # which keeps the memory until then
    return torch.frombuffer(holder, dtype=torch.uint8)


def _unpin(memory: torch.Tensor, device: torch.device, process: int) -> None:
    if os.getpid() != process:  # the child of a fork has no device, and has pinned nothing
        return
    torch.accelerator.synchronize(device)
    with torch.cuda.device(device):
        _cudart().cudaHostUnregister(memory.data_ptr())


def _cudart() -> Any:  # Any: a module that has no types
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]  # likewise


def _forget_failure(device: torch.device) -> None:
    """Start a kernel, because CUDA tells of a failed call once more to whoever starts the next."""
    with suppress(RuntimeError):
        torch.zeros(1, device=device)
