"""A checkpoint as a mapping of names to Paged tensors: a torch.load that runs no pickle and reads a weight when it is used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from os import PathLike

import torch

from shardkit.checkpoint import Other, SourceFile, TensorEntry
from shardkit.dtypes import DType
from shardkit.errors import LoadError, UnknownTensor, listed, shown
from shardkit.limits import Limits
from shardkit.load.opened import Opened
from shardkit.load.paged import Paged
from shardkit.load.recording import device_of
from shardkit.near_names import near
from shardkit.payload import Payload


def tensors(
    path: str | PathLike[str], *, root: str | None = None, device: str | torch.device = "cpu", limits: Limits = Limits()
) -> Mapping[str, Paged]:
    """The weights of the checkpoint at *path* by their names, none of which is read before it is used.

    Args:
        path: whatever `shardkit.open` opens: a file of any format, compressed or not; an index; a folder with one of them.
        root: dotted path of the subtree to take; ``"."`` for everything; None to find the model.
        device: where tensors are put when they are read.
        limits: what the file may ask for.

    Returns:
        A mapping that `Module.load_state_dict` takes, with ``assign=True`` or without. Tied weights are one object. A weight
        that is no dense tensor is listed, and a LoadError when it is asked for.

    Raises:
        FormatError: the checkpoint cannot be read.
        PlanError: several parts of it could be the model, or there is nothing at *root*.
        LoadError: two weights have one name, or there is no such device.
    """
    opened = Opened.at(path, root=root, limits=limits)
    undense = {name: other for name, other in opened.others.items() if other.is_weight}
    return _Weights(opened.entries, undense, device_of(device), opened.files)


class _Weights(Mapping[str, Paged]):
    def __init__(
        self,
        entries: Mapping[str, TensorEntry],
        undense: Mapping[str, Other],
        device: torch.device,
        files: tuple[SourceFile, ...],
    ) -> None:
        self._entries = entries
        self._undense = undense
        self._device = device
        self._files = files
        self._made: dict[tuple[Payload, DType, tuple[int, ...]] | str, Paged] = {}

    def __getitem__(self, name: str) -> Paged:
        if name in self._undense:
            raise _undense(self._undense[name])
        entry = self._entries.get(name)
        if entry is None:
            raise UnknownTensor(name, near(name, self))
        key = (entry.payload, entry.dtype, entry.shape) if entry.nbytes else name  # what is tied is one object
        made = self._made.get(key)
        return made if made is not None else self._made.setdefault(key, Paged.of(entry, self._device, files=self._files))

    def __deepcopy__(self, memo: object) -> _Weights:
        return self  # which nobody can change; a copy of one of its tensors would be read

    def __iter__(self) -> Iterator[str]:
        yield from self._entries
        yield from self._undense

    def __len__(self) -> int:
        return len(self._entries) + len(self._undense)

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._undense

    def __repr__(self) -> str:
        count = f"{len(self):,} tensor{'s' * (len(self) != 1)}"
        names = f": {listed([shown(name) for name in islice(self, 3)])}" if len(self) else ""
        return f"<{count} on {self._device}, read when they are used{names}{' …' if len(self) > 3 else ''}>"


def _undense(other: Other) -> LoadError:
    return LoadError(
        f"{shown(other.name)} is no dense tensor but a {other.kind}: {shown(other.reason)[1:-1]}",
        hint="such weights are not read; leave the name out, or load the file with torch.load if you trust it",
    )
