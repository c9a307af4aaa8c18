"""A folder without a standard weights file: its only file with weights, or an error that suggests a
path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shardkit.checkpoint.entries import Checkpoint
from shardkit.errors import FormatError, UnknownFormat, shown
from shardkit.sources import registry
from shardkit.sources.candidates import expanded, named, refuse_parallel
from shardkit.sources.folder_contents import Beside, holds_weights, surroundings
from shardkit.sources.format import Source
from shardkit.sources.left_out import Reader, with_left_out
from shardkit.sources.scanner import Scanner, is_regular
from shardkit.sources.weight_file_names import is_adapter, likeliness, training_state, variant_of

_MOST_SCANNED = 8
_MOST_OPENED = 1_000
_ANYTHING = "pass the file or folder that holds the weights"


@dataclass(frozen=True, slots=True)
class LooseFiles:
    """A folder without anything that loaders look for."""

    path: Path
    names: Sequence[str]
    weights: Sequence[str]
    scanner: Scanner

    @classmethod
    def among(cls, path: Path, names: Sequence[str], scanner: Scanner) -> LooseFiles:
        """The files called *names* in the folder *path*."""
        endings = tuple(registry.suffixes())
        likely_first = sorted(names, key=lambda name: not name.endswith(endings))
        regular = (path / name for name in likely_first if is_regular(path / name))
        opened = (each for _, each in zip(range(_MOST_OPENED), regular, strict=False))
        weights = sorted(each.name for each in opened if _may_hold_weights(each, scanner))
        return cls(path, names, weights, scanner)

    @property
    def models(self) -> list[str]:
        """The files that may be a model of the default type."""
        models = (name for name in self.weights if training_state(expanded(name)) is None)
        return [name for name in models if variant_of(name) is None and not is_adapter(name)]

    def checkpoint(self, source: Source) -> Checkpoint:
        """Its one file with weights that may be a model.

        Raises:
            UnknownFormat: there is none, or there are several.
        """
        others = [name for name in self.weights if training_state(expanded(name)) is None]
        adapters = [name for name in others if variant_of(name) is None]
        models = self.models or adapters or others
        refuse_parallel(self.path, models)
        models = _first_of_twins(models)
        if len(models) == 1:
            return self._read(models[0])
        if models:
            return self._one_of(models)
        if self.weights:
            raise self._no_model(self.weights)
        return self._by_folder_format(source)

    def _read(self, name: str) -> Checkpoint:
        path = self.path / name
        self.scanner.refuse_stale(self.path, {expanded(name): path})
        return with_left_out(self.scanner.file(path), Reader(self.path, name))

    def _one_of(self, names: Sequence[str]) -> Checkpoint:
        """The only one of *names* that holds a tensor."""
        scanned = {name: self.scanner.file(self.path / name) for name in names[:_MOST_SCANNED]}
        bearing = [
            name
            for name, each in scanned.items()
            if each.tensors or any(o.is_weight for o in each.others)
        ]
        if len(bearing) == 1 and len(scanned) == len(names):
            return self._read(bearing[0])
        likely = self.path / min(names, key=likeliness)
        raise UnknownFormat(
            self.path,
            f"holds {len(names):,} files with weights and no index that joins them: {named(names)}",
            hint=(
                f"give one of them, as in {likely}; if they are shards of one model, fetch its "
                "*.index.json"
            ),
        )

    def _no_model(self, names: Sequence[str]) -> UnknownFormat:
        what = [
            f"{shown(name)} ({training_state(expanded(name))})" for name in names[:_MOST_SCANNED]
        ]
        return UnknownFormat(
            self.path,
            f"holds the state of a trainer and no model: {', '.join(what)}",
            hint=_a_folder(self.path, _with_weights(self.path)) or _ANYTHING,
        )

    def _by_folder_format(self, source: Source) -> Checkpoint:
        try:
            registry.recognise(source)
            return self.scanner.scanned(source)
        except UnknownFormat as error:
            if error.claimed:
                raise
            unknown = error
        endings = tuple(registry.suffixes())
        for name in self.names:
            if name.endswith(endings) and not (self.path / name).is_dir():
                self.scanner.file(self.path / name)  # says what is wrong with it
        inside = _with_weights(self.path)
        if (
            inside and "snapshots" not in self.names
        ):  # an entry of a cache, of which the error says more
            message = f"holds weights in subfolders only: {named([each.path for each in inside])}"
            raise UnknownFormat(self.path, message, hint=_a_folder(self.path, inside))
        raise unknown


def _may_hold_weights(path: Path, scanner: Scanner) -> bool:
    try:
        return holds_weights(Source.file(path, scanner.limits))
    except FormatError:
        return True


def _first_of_twins(names: Sequence[str]) -> list[str]:
    """*names* without those that differ from a file of safetensors in their ending only."""
    safe = {expanded(name).removesuffix(".safetensors") for name in names if ".safetensors" in name}
    return [name for name in names if ".safetensors" in name or name.rpartition(".")[0] not in safe]


def _with_weights(folder: Path) -> list[Beside]:
    """The subfolders of *folder* that hold weights."""
    beside = surroundings(folder, ()).beside
    return [each for each in beside if each.is_folder and each.role.is_weights]


def _a_folder(folder: Path, inside: Sequence[Beside]) -> str | None:
    """A hint at the likeliest of the subfolders *inside*; None if there is none."""
    if not inside:
        return None
    likely = min(
        inside, key=lambda each: (likeliness(each.path[:-1].rpartition("/")[2]), -each.nbytes)
    )
    return f"give one of its folders, as in {folder / likely.path}"
