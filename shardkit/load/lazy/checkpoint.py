"""A checkpoint as lazy tensors: the model in it by names, and `tensors`, a `torch.load` that
executes no pickle.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import TypeVar

import torch

from shardkit.checkpoint.entries import Other, SourceFile, TensorEntry
from shardkit.checkpoint.model_root import select_root
from shardkit.dtypes import DType
from shardkit.errors import LoadError, UnknownTensor
from shardkit.formats import torch_legacy, torch_script  # noqa: F401 - here, beside torch, and not in the first load
from shardkit.limits import Limits
from shardkit.load.devices.device_lookup import torch_device
from shardkit.load.lazy.paged import Paged
from shardkit.near_names import near
from shardkit.operations.integrity import refuse_unlike_written
from shardkit.payloads.payload import Payload
from shardkit.printable import listed, shown, shown_path
from shardkit.sources.open import open as open_checkpoint

_Named = TypeVar("_Named", TensorEntry, Other)


@dataclass(frozen=True, slots=True)
class LoadedHeaders:
    """What there is to load, of which only headers have been read.

    Attributes:
        where: the path, for messages.
        entries: the dense tensors by their names.
        others: whatever else has a name: sparse tensors, objects of a pickle.
        files: the files as they were.
        notes: sentences that the user should see.
        limits: what the files may ask for.
    """

    where: str
    entries: Mapping[str, TensorEntry]
    others: Mapping[str, Other]
    files: tuple[SourceFile, ...]
    notes: tuple[str, ...] = ()
    limits: Limits = Limits()

    @classmethod
    def at(
        cls, path: str | os.PathLike[str], *, root: str | None = None, limits: Limits = Limits()
    ) -> LoadedHeaders:
        """What is at *path*, which is whatever `shardkit.open` opens.

        Args:
            path: a file of any format, compressed or not; an index; a folder with one of them.
            root: dotted path of the subtree to take; "." for everything; None to find the model.
            limits: what the file may ask for.

        Raises:
            FormatError: it cannot be read.
            PlanError: several parts of it could be the model, or there is nothing at *root*.
            LoadError: two weights have one name.
        """
        checkpoint = open_checkpoint(path, limits=limits)
        rooted = select_root(checkpoint, root)
        weights = (other for other in rooted.others if other.is_weight)
        objects = {other.name: other for other in rooted.others if not other.is_weight}
        others = objects | _by_name(weights)
        return cls(
            shown_path(Path(path)),
            _by_name(rooted.tensors),
            others,
            checkpoint.files,
            checkpoint.notes,
            limits,
        )

    def verify(self, entries: Iterable[TensorEntry]) -> None:
        """Read the files that *entries* lie in, whole, and hold them against the checksums that
        were written with them.

        Raises:
            FormatError: a file differs, or cannot be read.
            LoadError: nothing tells what was written.
        """
        used = {extent.path for entry in entries for extent in entry.payload.sources}
        unchecked = refuse_unlike_written(
            (file.path for file in self.files if file.path in used), self.entries, self.limits
        )
        if unchecked:
            raise LoadError(
                (
                    f"{shown_path(unchecked[0])} cannot be verified: it has no checksums, and no "
                    f"file beside it lists any"
                ),
                hint="write it with `shardkit convert --checksum sha256`, or load without verify",
            )

    def check_unchanged(self) -> None:
        """Raise LoadError if a file is no longer what it was when it was opened."""
        for file in self.files:
            if SourceFile.of(file.path) != file:
                raise LoadError(
                    f"{shown_path(file.path)} changed while it was read",
                    hint="load it again when nothing writes to it any more",
                )


def _by_name(found: Iterable[_Named]) -> dict[str, _Named]:
    by_name: dict[str, _Named] = {}
    for each in found:
        first = by_name.setdefault(each.name, each)
        if first is not each:
            paths = (" → ".join(map(shown, one.path)) for one in (first, each))
            raise LoadError(
                f"two weights would be called {shown(each.name)}: {', and '.join(paths)}",
                hint="give the root of one of them, or rename one with shardkit.convert",
            )
    return by_name


def tensors(
    path: str | PathLike[str],
    *,
    root: str | None = None,
    device: str | torch.device = "cpu",
    limits: Limits = Limits(),
) -> Mapping[str, Paged]:
    """Return the weights of a checkpoint as lazy tensors by name; each is read only when it is
    used.

    A safe replacement of `torch.load`: no pickle is executed.

    Args:
        path: a file of any format, compressed or not; an index; or a folder with one of them.
        root: dotted path of the subtree to take; ``"."`` for everything; None to find the model.
        device: where tensors are placed when they are read.
        limits: safety limits for an untrusted file.

    Returns:
        A mapping that `Module.load_state_dict` takes, with ``assign=True`` or without. Tied weights
        are one object. A weight that is not a dense tensor is listed, and raises a LoadError when
            it
        is requested.

    Raises:
        FormatError: the checkpoint cannot be read.
        PlanError: several subtrees of it could be the model, or there is nothing at *root*.
        LoadError: two weights have one name, or there is no such device.

    Example:
        >>> from shardkit.load import tensors
        >>> weights = tensors("training.pt")
        >>> list(weights)[:2]
        ['0.weight', '0.bias']
        >>> rows = weights["0.weight"][1:]  # a view; nothing is read
        >>> tuple(rows.shape), rows.dtype
        ((3, 3), torch.float32)
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> model.load_state_dict(tensors("model.safetensors"))
        <All keys matched successfully>
    """
    opened = LoadedHeaders.at(path, root=root, limits=limits)
    non_dense = {name: other for name, other in opened.others.items() if other.is_weight}
    return _Weights(opened.entries, non_dense, torch_device(device), opened.files)


class _Weights(Mapping[str, Paged]):
    def __init__(
        self,
        entries: Mapping[str, TensorEntry],
        non_dense: Mapping[str, Other],
        device: torch.device,
        files: tuple[SourceFile, ...],
    ) -> None:
        self._entries = entries
        self._non_dense = non_dense
        self._device = device
        self._files = files
        self._made: dict[tuple[Payload, DType, tuple[int, ...]] | str, Paged] = {}

    def __getitem__(self, name: str) -> Paged:
        if name in self._non_dense:
            raise _non_dense(self._non_dense[name])
        entry = self._entries.get(name)
        if entry is None:
            raise UnknownTensor(name, near(name, self))
        key = (
            (entry.payload, entry.dtype, entry.shape) if entry.nbytes else name
        )  # what is tied is one object
        made = self._made.get(key)
        return (
            made
            if made is not None
            else self._made.setdefault(key, Paged.of(entry, self._device, files=self._files))
        )

    def __deepcopy__(self, memo: object) -> _Weights:
        return self  # which nobody can change; a copy of one of its tensors would be read

    def __iter__(self) -> Iterator[str]:
        yield from self._entries
        yield from self._non_dense

    def __len__(self) -> int:
        return len(self._entries) + len(self._non_dense)

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._non_dense

    def __repr__(self) -> str:
        count = f"{len(self):,} tensor{'s' * (len(self) != 1)}"
        names = f": {listed([shown(name) for name in islice(self, 3)])}" if len(self) else ""
        return (
            f"<{count} on {self._device}, read when they are "
            f"used{names}{' …' if len(self) > 3 else ''}>"
        )


def _non_dense(other: Other) -> LoadError:
    return LoadError(
        f"{shown(other.name)} is not a dense tensor but a {other.kind}: "
        f"{shown(other.reason)[1:-1]}",
        hint="such weights are not read; leave the name out, or load the file with torch.load if "
        "you trust it",
    )
