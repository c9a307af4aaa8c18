"""A folder as Transformers or Diffusers saves it: its contents, and the files of its weights.

Nothing is downloaded, and no code of the folder is executed.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, Literal

import torch
from torch import nn

from shardkit.dtypes import DType
from shardkit.errors import LoadError
from shardkit.load.hub.repository import Repository
from shardkit.load.loading.match import listed
from shardkit.load.modules.weights import torch_type
from shardkit.metadata.shard_names import STEM
from shardkit.printable import shown, shown_path
from shardkit.sources import path_arguments

MAKE_IT = "create the model yourself, and call load_checkpoint_and_dispatch"
_PIPELINE, _MODEL = "model_index.json", "config.json"
Kind = Literal["pipeline", "diffusers", "transformers"]
Info = dict[str, Any]  # Any: what libraries tell, which differs from key to key


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A folder, of which only the file that says what it holds has been read.

    Attributes:
        path: the folder.
        name: what the user calls it.
        kind: what it holds: a pipeline, a model of Diffusers, or one of Transformers.
        fields: what its model_index.json says, or else its config.json.
    """

    path: Path
    name: str
    kind: Kind
    fields: Mapping[str, object]

    @classmethod
    def at(cls, path: str | PathLike[str], subfolder: str = "", *, name: str = "") -> ModelFolder:
        """What is in the folder *path*, or in the cache of the Hub under that name.

        Args:
            path: the folder, or the name of what is on the Hub.
            subfolder: the folder inside it that is meant.
            name: what the user calls it, where that is not *path*.

        Raises:
            LoadError: it does not say what it holds, or holds something else.
        """
        folder, name = _local(path, subfolder), name or str(path)
        if (folder / _PIPELINE).is_file():
            return cls(folder, name, "pipeline", _fields(folder / _PIPELINE))
        if (folder / "adapter_config.json").is_file():
            raise LoadError(
                f"{shown_path(folder)} holds an adapter, which PEFT applies to a model",
                hint="load the folder of the model, and give it to "
                "peft.PeftModel.from_pretrained with this one",
            )
        return cls._of_model(folder, name)

    def part(self, name: str) -> ModelFolder:
        """The folder of what a pipeline calls *name*: the one inside of that name, or else this
        one.

        Raises:
            LoadError: it does not say what it holds.
        """
        inside = self.path / name
        return (
            self._of_model(inside, f"{self.name}/{name}")
            if inside.is_dir()
            else self._of_model(self.path, self.name)
        )

    def weights(self, names: Sequence[str], request: Request) -> Path:
        """The first file with one of *names*; or else the folder, in which there may be one of
        another name.

        Args:
            names: as the library writes and reads them, in the order in which it looks for them.
            request: which of them will do.

        Raises:
            LoadError: there is none of the variant or the kind that is asked for.
        """
        wanted = [
            spelling
            for name in names
            if request.use_safetensors in (None, ".safetensors" in name)
            for spelling in _varied(name, request.variant)
        ]
        found = next((self.path / name for name in wanted if (self.path / name).is_file()), None)
        if found is None and (request.variant or request.use_safetensors is not None):
            raise LoadError(
                f"{shown_path(self.path)} has no weights under any of these names: "
                f"{listed(wanted)}",
                hint="leave out variant and use_safetensors, or download the files of that kind",
            )
        return found or self.path

    def has_variant(self, names: Sequence[str], variant: str | None) -> bool:
        """Whether there are weights under one of *names* with that word in it."""
        spellings = (spelling for name in names for spelling in _varied(name, variant))
        return any((self.path / spelling).is_file() for spelling in spellings)

    @classmethod
    def _of_model(cls, folder: Path, name: str) -> ModelFolder:
        if not (folder / _MODEL).is_file():
            raise LoadError(
                f"{shown_path(folder)} has no config.json, which names the class of the model",
                hint=MAKE_IT,
            )
        fields = _fields(folder / _MODEL)
        return cls(folder, name, "diffusers" if "_class_name" in fields else "transformers", fields)


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of a library when it makes a model.

    Attributes:
        dtype: what floats are cast to; None for the types that the folder says, or has.
        attn_implementation: what Transformers calls by this name; None for what it chooses.
        variant: the word in the names of the weights.
        trusted: whether code that lies in the folder may be run.
        use_safetensors: whether the weights are taken from safetensors; None for whatever there is,
            and those first.
        as_stored: whether the types are those of the weights if no *dtype* is given, and not what
            config.json says.
    """

    dtype: torch.dtype | None
    attn_implementation: str | None
    variant: str | None
    trusted: bool
    use_safetensors: bool | None = None
    as_stored: bool = False


@dataclass(frozen=True, eq=False, slots=True)
class LazyModel:
    """A model as its library makes it, with addresses for weights.

    Attributes:
        model: the model.
        info: what the library tells of missing and unexpected weights.
        whole: the classes whose modules stay on one device; none if the model does not say.
        skip: keys of arguments that stay where they are.
        notes: sentences that the user should see.
        stays: whether none of its weights can stream.
    """

    model: nn.Module
    info: Info
    whole: frozenset[str]
    skip: frozenset[str]
    notes: tuple[str, ...] = ()
    stays: bool = False


@dataclass(frozen=True, eq=False, slots=True)
class Saved:
    """What a library would save of one of its models.

    Attributes:
        state: its weights, under the names that they have in a checkpoint.
        files: what stands beside them, such as config.json: for each name the content.
        tied: names whose weights the library takes from other names, where the checkpoint has none
            under them.
        stem: what the names of the files with weights begin with.
    """

    state: Mapping[str, object]
    files: Mapping[str, bytes]
    tied: frozenset[str] = frozenset()
    stem: str = STEM


def written(*saves: Callable[[str], object]) -> dict[str, bytes]:
    """The files that functions write to the folder that they are given, by their names in it."""
    with TemporaryDirectory() as folder:
        for save in saves:
            save(folder)
        paths = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def prevalent_dtype(stored: Iterable[tuple[DType, int]]) -> torch.dtype:
    """The type that most bytes of floats have, but for those that are codes; float32 if there are
    none.

    Args:
        stored: the types and sizes of weights.
    """
    nbytes: Counter[DType] = Counter()
    for dtype, size in stored:
        if dtype.kind == "float" and dtype.bits >= 16:
            nbytes[dtype] += size
    found = [torch_type(dtype) for dtype, _ in nbytes.most_common(1)]
    return (found and found[0]) or torch.float32


def loads_as_all_do(kind: type, base: type) -> bool:
    """Whether *kind* is a *base*, and one folder with one configuration is one model, which is not
    so of all.
    """
    if not issubclass(kind, base):
        return False
    definer = next(each for each in kind.__mro__ if "from_pretrained" in vars(each))
    return definer.__module__ == base.__module__


def library(name: str, least: tuple[int, int]) -> ModuleType:
    """The library *name*, imported.

    Args:
        name: as it is imported.
        least: the oldest version that will do, up to the next that changes the first number.

    Raises:
        LoadError: it is not there, or another version of it is.
    """
    major, minor = least
    requirement = f"{name}>={major}.{minor},<{major + 1}"
    if find_spec(name) is None:
        raise LoadError(
            f"from_pretrained needs {name.title()}, which is not installed",
            hint=f'pip install "{requirement}"',
        )
    found = import_module(name)
    numbers = tuple(int(number) for number in re.findall(r"\d+", found.__version__)[:2])
    if not least <= numbers < (major + 1, 0):
        sentence = f"from_pretrained needs {requirement}, and {found.__version__} is installed"
        raise LoadError(sentence, hint=f'pip install "{requirement}"; or {MAKE_IT}')
    return found


@contextmanager
def translated_errors(folder: ModelFolder, by: ModuleType) -> Iterator[None]:
    """Let what a library raises about *folder* be a LoadError."""
    from huggingface_hub.errors import StrictDataclassError

    kinds = (
        OSError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ImportError,
        RuntimeError,
        StrictDataclassError,
    )
    try:
        yield
    except kinds as error:
        what = "pipeline" if folder.kind == "pipeline" else "model"
        raise LoadError(
            (
                f"{shown_path(folder.path)}: {by.__name__.title()} {by.__version__} makes no "
                f"{what} "
                f"of it: {error}"
            ),
            hint=f"check config.json, or update {by.__name__}",
        ) from error


def _local(path: str | PathLike[str], subfolder: str) -> Path:
    given = path_arguments.to_read(path)
    if given.is_dir():
        return given / subfolder
    if Repository.is_name(str(path)) and not given.exists():
        repository = Repository.of(str(path))
        commit = repository.cached_commit
        if commit is not None and repository.snapshot(commit).is_dir():
            return repository.snapshot(commit) / subfolder
    what = (
        "is a file" if given.exists() else "is neither a folder nor a model in the cache of the Hub"
    )
    raise LoadError(
        f"{shown_path(given)} {what}; a folder with a config.json or a model_index.json is needed",
        hint=path_arguments.looked_for(given) or f"download the model first; or {MAKE_IT}",
    )


def _fields(file: Path) -> dict[str, object]:
    """What a JSON file says. NaN and Infinity, which some models have in their config.json, are let
    through.
    """
    try:
        fields: object = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise LoadError(
            f"{shown_path(file)} is not JSON: {error}", hint="download it again"
        ) from None
    if not isinstance(fields, dict):
        raise LoadError(
            f"{shown_path(file)} must hold an object, found {shown(fields)}",
            hint="download it again",
        )
    return fields


def _varied(name: str, variant: str | None) -> tuple[str, ...]:
    """How the file *name* of a variant is called, first as it is written today."""
    if not variant:
        return (name,)
    stem, _, suffix = name.rpartition(".")
    today = f"{stem}.{variant}.{suffix}"
    if not stem.endswith(".index"):
        return (today,)
    return today, f"{stem.removesuffix('.index')}.{variant}.index.{suffix}"
